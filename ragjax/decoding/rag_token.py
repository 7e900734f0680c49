"""RAG-Token: documents are summed over at every token, in the beam search as in the marginal (Lewis et al. 2020).

p(y|x) ≈ Π_t Σ_z p_η(z|x) · p_θ(y_t|x,z,y_<t)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ragjax.config import Decode
from ragjax.decoding.candidates import Candidates, as_candidates, distinct_answers, pad_answers, with_end
from ragjax.decoding.marginal_search import search_rag_token
from ragjax.decoding.prefix_cache import PrefixScorer
from ragjax.decoding.propose import beam_settings
from ragjax.marginal import marginal_logp, token_posterior
from ragjax.models.generator import SpecialTokens
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
    search = beam_settings(settings, special, hugging_face)
    beams, prefixes = search_rag_token(graph, params, memory, prior, search, special)
    beams, documents = jax.device_get(beams), log_prior.shape[1]
    answers = [list(distinct_answers(beams, b, np.zeros(1))) for b in range(len(log_prior))]
    padded, lengths = pad_answers(answers, special, settings.max_new_tokens)
    # every prefix of a beam was read under every document
    rows = {b * documents + z: with_end(own, special) for b, own in enumerate(answers) for z in range(documents)}
    logp = np.zeros((len(answers), documents, *padded.shape[1:]), np.float32)
    for row, steps in PrefixScorer(graph, params, memory, prefixes, special).score(rows).items():
        logp[*divmod(row, documents), : steps.shape[0], : steps.shape[1]] = steps
    return as_candidates(answers, rag_token_marginals(prior, logp, lengths), ranked=True)


def rag_token_marginals(
    log_prior: Float[Array | np.ndarray, "B K"],
    logp: Float[Array | np.ndarray, "B K C T"],
    lengths: Int[np.ndarray, "B C"],
) -> dict[str, np.ndarray]:
    """What C answers a question are worth, from log p(y_t|y_<t,x,z) (nats), as fields of `Candidates`."""
    marginal, posterior = (np.array(x) for x in _marginals(log_prior, logp, lengths))
    marginal[lengths == 0] = -np.inf  # where nothing could be answered
    doc_logp = np.asarray(logp).sum(axis=-1)
    return {
        "beam_logp": np.full_like(doc_logp, -np.inf),
        "doc_logp": doc_logp,
        "thorough_logp": marginal,
        "posterior": posterior,
    }


@jax.jit
def _marginals(
    log_prior: Float[Array, "B K"], logp: Float[Array, "B K C T"], lengths: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], Float[Array, "B K C"]]:
    """log p(y|x) of each answer, and the mean responsibility of each document."""
    counted = jnp.arange(logp.shape[-1]) < lengths[..., None]
    marginal = jnp.where(counted, marginal_logp(log_prior, logp), 0.0).sum(axis=-1)
    return marginal, token_posterior(log_prior, logp, counted)
