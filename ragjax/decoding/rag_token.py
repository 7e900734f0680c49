"""RAG-Token: documents are summed over at every token, in the beam search as in the marginal (Lewis et al. 2020).

p(y|x) ≈ Π_t Σ_z p_η(z|x) · p_θ(y_t|x,z,y_<t)
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ragjax.config import Decode
from ragjax.decoding.beam_search import Beams, beam_search
from ragjax.decoding.candidates import Candidates, as_candidates, distinct_answers, pad_answers, with_end
from ragjax.decoding.prefix_cache import PrefixCache, PrefixScorer, beam_step, empty_prefix_cache
from ragjax.decoding.propose import beam_settings
from ragjax.marginal import marginal_logp, token_posterior
from ragjax.models.generator import SpecialTokens, join_ends
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params


def decode_rag_token(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    log_prior: Float[np.ndarray, "B K"],
    settings: Decode,
    special: SpecialTokens,
    hugging_face: bool = False,
) -> list[Candidates]:
    """The beams of each question, best first, and what each is worth; arguments as of `decode_rag_sequence`.

    `hugging_face` repeats transformers' beam search to the letter.
    """
    prior = jnp.asarray(log_prior)
    beams, prefixes = beam_search_rag_token(graph, params, memory, prior, settings, special, hugging_face)
    beams, documents = jax.device_get(beams), log_prior.shape[1]
    answers = [list(distinct_answers(beams, b, np.zeros(1))) for b in range(len(log_prior))]
    padded, lengths = pad_answers(answers, special, settings.max_new_tokens)
    # every prefix of a beam was read under every document
    rows = {b * documents + z: with_end(own, special) for b, own in enumerate(answers) for z in range(documents)}
    logp = np.zeros((len(answers), documents, *padded.shape[1:]), np.float32)
    for row, by_answer in PrefixScorer(graph, params, memory, prefixes, special).score(rows).items():
        for c, steps in enumerate(by_answer):
            logp[*divmod(row, documents), c, : len(steps)] = steps
    marginal, posterior = (np.array(x) for x in _marginals(prior, logp, lengths))
    marginal[lengths == 0] = -np.inf  # where nothing could be answered
    doc_logp = logp.sum(axis=-1)
    arrays = {
        "beam_logp": np.full_like(doc_logp, -np.inf),
        "doc_logp": doc_logp,
        "thorough_logp": marginal,
        "posterior": posterior,
    }
    return as_candidates(answers, arrays, ranked=True)


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def beam_search_rag_token(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    log_prior: Float[Array, "B K"],
    settings: Decode,
    special: SpecialTokens,
    hugging_face: bool = False,
) -> tuple[Beams, PrefixCache]:
    """A beam search of B rows, whose probabilities are summed over K documents; and the prefixes read under each."""
    generator, (questions, documents) = nnx.merge(graph, params), log_prior.shape

    def next_logp(tokens: Array, number: Array, mask: Array, prefixes: PrefixCache) -> tuple[Array, PrefixCache]:
        rows, masks = (jnp.repeat(x, documents, axis=0) for x in (tokens, mask))
        rows = jnp.where(number == 0, memory.start[:, None], rows)  # a prompt's last token: every document has its own
        logp, prefixes = beam_step(generator, memory, prefixes, rows, number, masks)
        logp = join_ends(logp, special).reshape(questions, documents, *logp.shape[1:])
        return marginal_logp(log_prior, logp), prefixes

    search = beam_settings(settings, special, hugging_face)
    cache = empty_prefix_cache(generator, memory, search.max_new_tokens * search.num_beams)
    return beam_search(next_logp, cache, memory.start[::documents], search)


@jax.jit
def _marginals(
    log_prior: Float[Array, "B K"], logp: Float[Array, "B K C T"], lengths: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], Float[Array, "B K C"]]:
    """log p(y|x) of each answer, and the mean responsibility of each document."""
    counted = jnp.arange(logp.shape[-1]) < lengths[..., None]
    marginal = jnp.where(counted, marginal_logp(log_prior, logp), 0.0).sum(axis=-1)
    return marginal, token_posterior(log_prior, logp, counted)
