"""What an answer is worth: log p(y|x) with gradients into retriever and generator, and its mean, the loss.

RAG-Sequence: log p(y|x) = logsumexp_z [ log p_η(z|x) + log p_θ(y|x,z) ]        p_η = softmax(scale · q(x)·d(z))
RAG-Token:    log p(y|x) = Σ_t logsumexp_z [ log p_η(z|x) + log p_θ(y_t|y_<t,x,z) ]

Training's y ends in the tokenizer's own end token. Where the generator has more than one, answering sums over all of
them, so that the loss is an upper bound on its −log p(y|x).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, Key

from ragjax.config import drops_out
from ragjax.marginal import corpus_log_prior, hugging_face_nll, log_prior, marginal_logp, posterior, token_posterior
from ragjax.models.generator import Generator, answer_hidden, token_logp
from ragjax.models.layers import Params, RowRngs, fold_rngs, row_rngs
from ragjax.rag import RagModel
from ragjax.retrieval.device_index import DeviceIndex, log_normalizer
from ragjax.training.batch import DocumentBatch, TrainBatch


@struct.dataclass
class TokenScores:
    """Of each token of each answer under each document, in nats. Padding counts 0 in `logp` only."""

    logp: Float[Array, "B K T"]
    # over the vocabulary, for smoothing; with RAG-Token that of log p(v|y_<t,x), the same for every document
    mean_logp: Float[Array, "B K T"]


def prior_and_token_logp(
    rag: RagModel, params: Params, batch: TrainBatch, rng: Key[Array, ""], corpus: DeviceIndex | None = None
) -> tuple[Float[Array, "B K"], TokenScores]:
    """log p_η(z|x), and log p_θ(y_t|y_<t,x,z) of the training answers; pure, to be differentiated.

    With `train.backprop_docs: m` below K, only the m documents of highest posterior pass a gradient to the
    generator. A document's gradient has its posterior for weight: what the others weigh together is all that is missed.

    Args:
        rag: the models and the configuration.
        params: {"retriever": …, "generator": …}, and the passage encoder's where it has its own.
        batch: B questions with their answers and K documents each.
        rng: draws the dropout masks.
        corpus: all embeddings, where the prior is normalised over them.
    """
    questions, documents = batch.source.shape[:2]
    dropout_rngs = row_rngs(rng, batch.questions.row) if drops_out(rag.config) else None
    prior = _question_log_prior(rag, params, batch, dropout_rngs, corpus)
    document_rngs = None
    if dropout_rngs is not None:
        document_rngs = jax.vmap(lambda rng: jax.random.split(jax.random.fold_in(rng, 1), documents))(dropout_rngs)
    through = rag.config.train.backprop_docs
    if through is None or through >= documents:
        return prior, _token_scores(rag, params, batch, batch.source, batch.source_mask, document_rngs, prior)
    constant = jax.lax.stop_gradient(params)
    scores = _token_scores(rag, constant, batch, batch.source, batch.source_mask, document_rngs, prior)
    _, likeliest = jax.lax.top_k(posterior(jax.lax.stop_gradient(prior), scores.logp.sum(axis=-1)), through)

    def likeliest_of(x: Array) -> Array:
        return jax.vmap(lambda documents, which: documents[which])(x, likeliest)

    few_rngs = None if document_rngs is None else likeliest_of(document_rngs)
    few = likeliest_of(batch.source), likeliest_of(batch.source_mask)
    again = _token_scores(rag, params, batch, *few, few_rngs, prior)
    at = (jnp.arange(questions)[:, None], likeliest)
    return prior, jax.tree.map(lambda whole, few: whole.at[at].set(few), scores, again)


def _question_log_prior(
    rag: RagModel, params: Params, batch: TrainBatch, dropout_rngs: RowRngs | None, corpus: DeviceIndex | None
) -> Float[Array, "B K"]:
    """log p_η(z|x), the questions encoded anew so that the gradient reaches their encoder, as it may the passages'."""
    questions, settings = batch.questions, rag.config.retriever
    queries = nnx.merge(rag.retriever.graphdef, params["retriever"])(
        questions.question, questions.question_mask, fold_rngs(dropout_rngs, 0)
    )
    passages = passage_embeddings(rag, params, batch, dropout_rngs)
    scores = settings.logit_scale * jnp.einsum("BD,BKD->BK", queries, passages, precision="highest")
    if settings.prior == "top_k":
        return log_prior(scores, batch.valid)
    assert corpus is not None
    return corpus_log_prior(scores, log_normalizer(corpus, queries, settings.logit_scale), batch.valid)


def passage_embeddings(
    rag: RagModel, params: Params, batch: DocumentBatch, dropout_rngs: RowRngs | None = None
) -> Float[Array, "B K D"]:
    """The documents' embeddings: those of the index, or, where their encoder is trained, made here with its gradient.

    `dropout_rngs`, one a question, draw the dropout.
    """
    if batch.passage_tokens is None or batch.passage_mask is None:
        return batch.passage_embeddings
    questions, documents, length = batch.passage_tokens.shape
    rows, passage_rngs = questions * documents, None
    if dropout_rngs is not None:
        split = jax.vmap(lambda rng: jax.random.split(jax.random.fold_in(rng, 2), documents))
        passage_rngs = split(dropout_rngs).reshape(rows)
    encoder = jax.checkpoint(_encode, static_argnums=0) if rag.config.train.remat else _encode
    tokens, mask = batch.passage_tokens.reshape(rows, length), batch.passage_mask.reshape(rows, length)
    embeddings = encoder(rag.passage_encoder.graphdef, passage_params(rag, params), tokens, mask, passage_rngs)
    return embeddings.reshape(questions, documents, -1)


def passage_params(rag: RagModel, params: Params) -> Params:
    """The parameters that encode passages while they are trained."""
    return params["passage_encoder" if rag.config.train.passage_encoder == "own" else "retriever"]


def _encode(graph: nnx.GraphDef, params: Params, tokens: Array, mask: Array, rngs: RowRngs | None) -> Array:
    return nnx.merge(graph, params)(tokens, mask, rngs)


def _token_scores(
    rag: RagModel,
    params: Params,
    batch: TrainBatch,
    source: Int[Array, "B k S"],
    source_mask: Bool[Array, "B k S"],
    document_rngs: Key[Array, "B k"] | None,
    prior: Float[Array, "B K"],
) -> TokenScores:
    """What each answer is worth under k of its documents, in one padded pass."""
    questions, documents, length = source.shape
    answer, answer_mask = batch.questions.answers
    rows, remat, shape = questions * documents, rag.config.train.remat, (questions, documents, -1)
    rngs = None if document_rngs is None else document_rngs.reshape(rows)
    generator = nnx.merge(rag.generator.graphdef, params["generator"])
    memory = generator.prefill(source.reshape(rows, length), source_mask.reshape(rows, length), rngs, remat)
    answers = jnp.repeat(answer, documents, axis=0)[:, None]
    hidden = answer_hidden(generator, memory, answers, rngs, remat)
    logp, mean_logp = (x[:, 0].reshape(shape) for x in token_logp(generator, hidden, answers))
    if rag.config.model == "rag_token" and rag.config.train.label_smoothing > 0:
        mean_logp = jnp.broadcast_to(_mean_marginal_logp(generator, hidden[:, 0], prior)[:, None], logp.shape)
    return TokenScores(jnp.where(answer_mask[:, None], logp, 0.0), mean_logp)


def _mean_marginal_logp(
    generator: Generator, hidden: Float[Array, "n T D"], prior: Float[Array, "B K"]
) -> Float[Array, "B T"]:
    """The mean over the vocabulary of log p(v|y_<t,x), documents summed over, one token after the other."""

    @jax.checkpoint
    def at_token(state: Float[Array, "n D"]) -> Float[Array, " B"]:
        logp = jax.nn.log_softmax(generator.vocab_head().logits(state), axis=-1)
        return marginal_logp(prior, logp.reshape(*prior.shape, -1)).mean(axis=-1)

    return jax.lax.map(at_token, hidden.swapaxes(0, 1)).T


def answer_nll(
    rag: RagModel,
    log_prior: Float[Array, "B K"],
    scores: TokenScores,
    answer: Int[Array, "B T"],
    answer_mask: Bool[Array, "B T"],
    smoothing: float = 0.0,
) -> Float[Array, " B"]:
    """−log p(y|x) of one answer a question, in nats, as the configuration's model has it.

    Smoothing (Szegedy et al. 2016, section 7) mixes the log-probability of each token with the mean over the
    vocabulary: RAG-Sequence under each document, before documents are summed over; RAG-Token after.
    """
    is_bos = answer[:, 0] == (-1 if rag.special.bos is None else rag.special.bos)
    excluded = is_bos & rag.config.train.exclude_bos
    if rag.config.hf_compatible and rag.config.model == "rag_sequence":
        excluded = jnp.broadcast_to(excluded.all(), excluded.shape)
        vocabulary = rag.generator.config.vocab_size
        return hugging_face_nll(log_prior, scores.logp, answer_mask, excluded, smoothing, scores.mean_logp, vocabulary)
    counted = answer_mask & ~(excluded[:, None] & (jnp.arange(answer.shape[1]) == 0))

    def smooth(logp: Array, mean: Array) -> Array:
        # 0 times the mean would cost its gradient
        return logp if smoothing == 0.0 else (1.0 - smoothing) * logp + smoothing * mean

    if rag.config.model == "rag_token":
        marginal = smooth(marginal_logp(log_prior, scores.logp), scores.mean_logp[:, 0])
        return -jnp.where(counted, marginal, 0.0).sum(axis=-1)
    smoothed = smooth(scores.logp, scores.mean_logp)
    return -marginal_logp(log_prior, jnp.where(counted[:, None], smoothed, 0.0).sum(axis=-1))


def rag_loss(
    rag: RagModel, params: Params, batch: TrainBatch, rng: Key[Array, ""], corpus: DeviceIndex | None = None
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The mean of −log p(y|x) over the batch, in nats, and what is worth watching (Lewis et al. 2020, section 2.4).

    The arguments are those of `prior_and_token_logp`. `nll_per_token` is without label smoothing. `posterior_entropy`
    is in nats. `prior_top` is the prior mass of the best document. `posterior_skipped` is what the documents that
    `train.backprop_docs` leaves out weigh together.
    """
    answer, answer_mask = batch.questions.answers
    prior, scores = prior_and_token_logp(rag, params, batch, rng, corpus)
    smoothing, through = rag.config.train.label_smoothing, rag.config.train.backprop_docs
    mean_loss = answer_nll(rag, prior, scores, answer, answer_mask, smoothing).mean()
    prior, scores = jax.lax.stop_gradient((prior, scores))
    nll = answer_nll(rag, prior, scores, answer, answer_mask)
    if rag.config.model == "rag_token":
        weight = token_posterior(prior, scores.logp, answer_mask)
    else:
        weight = posterior(prior, scores.logp.sum(axis=-1))
    entropy = -jnp.where(weight > 0, weight * jnp.log(jnp.maximum(weight, 1e-30)), 0.0)
    kept = weight if through is None else jax.lax.top_k(weight, min(through, weight.shape[1]))[0]
    return mean_loss, {
        "loss": mean_loss,
        "nll_per_token": (nll / answer_mask.sum(axis=-1)).mean(),
        "posterior_entropy": entropy.sum(axis=-1).mean(),
        "posterior_skipped": (weight.sum(axis=-1) - kept.sum(axis=-1)).mean(),
        "prior_top": jnp.exp(prior.max(axis=-1)).mean(),
    }
