"""RAG-Sequence and RAG-Token decoding: candidates, their marginals, and what is chosen of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ragjax.config import Decode
from ragjax.decoding.candidates import Candidates, distinct_answers, pad_answers, with_end
from ragjax.decoding.certified import certify
from ragjax.decoding.prefix_cache import PrefixScorer
from ragjax.decoding.propose import beam_search_documents, beam_search_marginal
from ragjax.decoding.rescore import fast_marginals, score_candidates, thorough_marginals
from ragjax.marginal import marginal_logp, token_posterior
from ragjax.models.generator import SpecialTokens
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.padding import bucket_size


def decode_rag_sequence(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    log_prior: Float[np.ndarray, "B K"],
    settings: Decode,
    special: SpecialTokens,
) -> list[Candidates]:
    """Candidates of B questions whose B·K documents are in `memory`, question-major.

    The fast marginal is always there. With `settings.mode` `thorough` the thorough one is, too; with `certified` bounds
    on it, as tight as it takes to know the best. Documents whose prior is −inf propose nothing.
    """
    beams, prefixes = beam_search_documents(graph, params, memory, settings, special)
    beams = jax.device_get(beams)
    documents = log_prior.shape[1]
    found = [distinct_answers(beams, b * documents, prior) for b, prior in enumerate(log_prior)]
    width = bucket_size(max(map(len, found)))
    proposed = np.full((len(found), documents, width), -np.inf, np.float32)
    for b, of_question in enumerate(found):
        for c, by_document in enumerate(of_question.values()):
            for document, logp in by_document.items():
                proposed[b, document, c] = logp
    fast = np.asarray(fast_marginals(log_prior, proposed))
    scored = thorough = responsibility = bounds = None
    needed = np.zeros((len(found), 2), int)
    known = PrefixScorer(graph, params, memory, prefixes, special)
    answers = [with_end(list(of_question), special) for of_question in found]
    if settings.mode == "thorough":
        scored = np.full_like(proposed, -np.inf)
        every = [(log_prior[b] > -np.inf)[:, None] & np.full(len(of), True) for b, of in enumerate(answers)]
        score_candidates(known, answers, every, scored)
        thorough, responsibility = (np.asarray(x) for x in thorough_marginals(log_prior, scored))
    elif settings.mode == "certified":
        finished = [np.array([ends for _, ends in of_question]) for of_question in found]
        bounds, needed = certify(known, answers, finished, log_prior, width)
    return [
        Candidates(
            tokens=[tokens for tokens, _ in of_question],
            finished=np.array([ends for _, ends in of_question], bool),
            beam_logp=proposed[b, :, : len(of_question)],
            fast_logp=fast[b, : len(of_question)],
            doc_logp=None if scored is None else scored[b, :, : len(of_question)],
            thorough_logp=None if thorough is None else thorough[b, : len(of_question)],
            posterior=None if responsibility is None else responsibility[b, :, : len(of_question)],
            bounds=None if bounds is None else bounds[:, b, : len(of_question)],
            needed=None if bounds is None else (int(needed[b, 0]), int(needed[b, 1])),
        )
        for b, of_question in enumerate(found)
    ]


def decode_rag_token(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    log_prior: Float[np.ndarray, "B K"],
    settings: Decode,
    special: SpecialTokens,
    hugging_face: bool = False,
) -> list[Candidates]:
    """RAG-Token: the beams of each question, best first, and what each is worth; `memory` as for `decode`."""
    prior = jnp.asarray(log_prior)
    beams, prefixes = beam_search_marginal(graph, params, memory, prior, settings, special, hugging_face)
    beams = jax.device_get(beams)
    found = [list(distinct_answers(beams, b, np.zeros(1))) for b in range(len(log_prior))]
    answers, lengths = pad_answers(found, special, settings.max_new_tokens)
    # every prefix of a beam was read under every document
    documents, rows = log_prior.shape[1], [with_end(of_question, special) for of_question in found]
    known = PrefixScorer(graph, params, memory, prefixes, special).score(
        {b * documents + z: of_question for b, of_question in enumerate(rows) for z in range(documents)}
    )
    tokens = np.zeros((len(found), documents, *answers.shape[1:]), np.float32)
    for row, of_row in known.items():
        for c, logp in enumerate(of_row):
            tokens[*divmod(row, documents), c, : len(logp)] = logp
    marginal, responsibility = (np.array(x) for x in _rag_token_marginals(prior, tokens, lengths))
    marginal[lengths == 0] = -np.inf  # where nothing could be answered
    scored = np.asarray(tokens.sum(axis=-1))
    return [
        Candidates(
            tokens=[tokens for tokens, _ in of_question],
            finished=np.array([ends for _, ends in of_question], bool),
            beam_logp=np.full((log_prior.shape[1], len(of_question)), -np.inf, np.float32),
            doc_logp=scored[b, :, : len(of_question)],
            thorough_logp=marginal[b, : len(of_question)],
            posterior=responsibility[b, :, : len(of_question)],
            ranked=True,
        )
        for b, of_question in enumerate(found)
    ]


@jax.jit
def _rag_token_marginals(log_prior: Array, logp: Array, lengths: Array) -> tuple[Array, Array]:
    """RAG-Token's log p(y|x) [B,C], and the mean responsibility of each document [B,K,C]."""
    counts = jnp.arange(logp.shape[-1]) < lengths[..., None]
    marginal = jnp.where(counts, marginal_logp(log_prior, logp), 0.0).sum(axis=-1)
    return marginal, token_posterior(log_prior, logp, counts)
