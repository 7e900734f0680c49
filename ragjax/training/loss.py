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

from ragjax.marginal import corpus_log_prior, hugging_face_nll, log_prior, marginal_logp, posterior, token_posterior
from ragjax.models.generator import Generator, answer_hidden, token_logp
from ragjax.models.layers import Params, RowRngs, fold_rngs, row_rngs
from ragjax.rag import RagModel
from ragjax.retrieval.device_index import DeviceIndex, log_normalizer
from ragjax.training.batch import TrainBatch


@struct.dataclass
class TokenScores:
    """Of each token of each answer under each document, in nats. Padding counts 0 in `logp` only."""

    logp: Float[Array, "B K T"]
    # over the vocabulary, for smoothing; with RAG-Token that of log p(v|y_<t,x), the same for every document
    mean_logp: Float[Array, "B K T"]


def prior_and_token_logp(
    rag: RagModel, params: Params, batch: TrainBatch, key: Key[Array, ""], corpus: DeviceIndex | None = None
) -> tuple[Float[Array, "B K"], TokenScores]:
    """log p_η(z|x), and log p_θ(y_t|y_<t,x,z) of the training answers; pure, to be differentiated.

    `corpus` is there where the prior is normalised over it. `key` draws the dropout masks.
    With `train.backward_documents: m` below K, only the m documents of highest posterior pass a gradient to the
    generator. A document's gradient has its posterior for weight: what the others weigh together is all that is missed.
    """
    questions, documents = batch.source.shape[:2]
    keys = row_rngs(key, batch.row) if rag.config.train.dropout > 0 else None
    prior = _question_log_prior(rag, params, batch, keys, corpus)
    document_keys = None
    if keys is not None:
        document_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 1), documents))(keys)
    through = rag.config.train.backward_documents
    if through is None or through >= documents:
        return prior, _token_scores(rag, params, batch, batch.source, batch.source_mask, document_keys, prior)
    constant = jax.lax.stop_gradient(params)
    scores = _token_scores(rag, constant, batch, batch.source, batch.source_mask, document_keys, prior)
    _, likeliest = jax.lax.top_k(posterior(jax.lax.stop_gradient(prior), scores.logp.sum(axis=-1)), through)

    def chosen(x: Array) -> Array:
        return jax.vmap(lambda of_question, which: of_question[which])(x, likeliest)

    few_keys = None if document_keys is None else chosen(document_keys)
    again = _token_scores(rag, params, batch, chosen(batch.source), chosen(batch.source_mask), few_keys, prior)
    at = (jnp.arange(questions)[:, None], likeliest)
    return prior, jax.tree.map(lambda all_of_them, some: all_of_them.at[at].set(some), scores, again)


def _question_log_prior(
    rag: RagModel, params: Params, batch: TrainBatch, keys: RowRngs | None, corpus: DeviceIndex | None
) -> Float[Array, "B K"]:
    """log p_η(z|x), the questions encoded anew so that the gradient reaches their encoder, as it may the passages'."""
    settings = rag.config.retriever
    queries = nnx.merge(rag.retriever.graphdef, params["retriever"])(
        batch.question, batch.question_mask, fold_rngs(keys, 0)
    )
    passages = batch.passages
    if batch.passage is not None and batch.passage_mask is not None:
        passages = encode_questions_with_dropout(rag, params, batch.passage, batch.passage_mask, keys)
    scores = settings.scale * jnp.einsum("BD,BKD->BK", queries, passages, precision="highest")
    if settings.prior == "top_k":
        return log_prior(scores, batch.valid)
    assert corpus is not None
    return corpus_log_prior(scores, log_normalizer(corpus, queries, settings.scale), batch.valid)


def encode_questions_with_dropout(
    rag: RagModel, params: Params, passage: Int[Array, "B K P"], mask: Bool[Array, "B K P"], keys: RowRngs | None = None
) -> Float[Array, "B K D"]:
    """Embeddings of passages by the encoder as it is trained; `keys`, one a question, draw the dropout."""
    questions, documents, length = passage.shape
    rows, of_rows = questions * documents, None
    if keys is not None:
        of_rows = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 2), documents))(keys).reshape(rows)
    encoder = jax.checkpoint(_encode, static_argnums=0) if rag.config.train.remat else _encode
    tokens, shown = passage.reshape(rows, length), mask.reshape(rows, length)
    found = encoder(rag.passage_encoder.graphdef, passage_params(rag, params), tokens, shown, of_rows)
    return found.reshape(questions, documents, -1)


def passage_params(rag: RagModel, params: Params) -> Params:
    """The parameters that encode passages while they are trained."""
    return params["passage_encoder" if rag.config.train.passage_encoder == "own" else "retriever"]


def _encode(graph: nnx.GraphDef, params: Params, tokens: Array, mask: Array, keys: RowRngs | None) -> Array:
    return nnx.merge(graph, params)(tokens, mask, keys)


def _token_scores(
    rag: RagModel,
    params: Params,
    batch: TrainBatch,
    source: Int[Array, "B k S"],
    source_mask: Bool[Array, "B k S"],
    keys: Key[Array, "B k"] | None,
    prior: Float[Array, "B K"],
) -> TokenScores:
    """What each answer is worth under k of its documents, in one padded pass."""
    questions, documents, length = source.shape
    rows, remat, shape = questions * documents, rag.config.train.remat, (questions, documents, -1)
    of_rows = None if keys is None else keys.reshape(rows)
    generator = nnx.merge(rag.generator.graphdef, params["generator"])
    memory = generator.prefill(source.reshape(rows, length), source_mask.reshape(rows, length), of_rows, remat)
    answers = jnp.repeat(batch.answer, documents, axis=0)[:, None]
    hidden = answer_hidden(generator, memory, answers, of_rows, remat)
    logp, mean_logp = (x[:, 0].reshape(shape) for x in token_logp(generator, hidden, answers))
    if rag.config.model == "rag_token" and rag.config.train.label_smoothing > 0:
        mean_logp = jnp.broadcast_to(_mean_marginal_logp(generator, hidden[:, 0], prior)[:, None], logp.shape)
    return TokenScores(jnp.where(batch.answer_mask[:, None], logp, 0.0), mean_logp)


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
    rag: RagModel, params: Params, batch: TrainBatch, key: Key[Array, ""], corpus: DeviceIndex | None = None
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The mean of −log p(y|x) over the batch, in nats, and what is worth watching (Lewis et al. 2020, section 2.4).

    `posterior_entropy` is in nats; `prior_top` is the prior mass of the best document; `posterior_skipped` is what the
    documents that `train.backward_documents` leaves out weigh together. `nll_per_token` is without label smoothing.
    """
    prior, scores = prior_and_token_logp(rag, params, batch, key, corpus)
    smoothing, through = rag.config.train.label_smoothing, rag.config.train.backward_documents
    mean_loss = answer_nll(rag, prior, scores, batch.answer, batch.answer_mask, smoothing).mean()
    prior, scores = jax.lax.stop_gradient((prior, scores))
    nll = answer_nll(rag, prior, scores, batch.answer, batch.answer_mask)
    if rag.config.model == "rag_token":
        weight = token_posterior(prior, scores.logp, batch.answer_mask)
    else:
        weight = posterior(prior, scores.logp.sum(axis=-1))
    entropy = -jnp.where(weight > 0, weight * jnp.log(jnp.maximum(weight, 1e-30)), 0.0)
    kept = weight if through is None else jax.lax.top_k(weight, min(through, weight.shape[1]))[0]
    return mean_loss, {
        "loss": mean_loss,
        "nll_per_token": (nll / batch.answer_mask.sum(axis=-1)).mean(),
        "posterior_entropy": entropy.sum(axis=-1).mean(),
        "posterior_skipped": (weight.sum(axis=-1) - kept.sum(axis=-1)).mean(),
        "prior_top": jnp.exp(prior.max(axis=-1)).mean(),
    }
