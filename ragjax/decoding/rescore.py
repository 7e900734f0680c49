"""Stage 3: every distinct candidate scored under all documents of its question."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.decoding.prefix_cache import PrefixScorer, Tokens
from ragjax.marginal import fast_marginal, posterior, thorough_marginal
from ragjax.models.generator import SpecialTokens, answer_hidden, event_logits
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params


@partial(jax.jit, static_argnums=(0, 5))
def score_tokens(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    answers: Int[Array, "B C T"],
    lengths: Int[Array, "B C"],
    special: SpecialTokens,
) -> Float[Array, "B K C T"]:
    """log p(y_t|y_<t,x,z) of C answers a question under all K documents, in one padded pass over B·K memories.

    That of `special.eos` is that the answer ends, whichever token writes it.
    """
    questions, count, longest = answers.shape
    documents = memory.start.shape[0] // questions
    rows, generator = jnp.repeat(answers, documents, axis=0), nnx.merge(graph, params)
    hidden = answer_hidden(generator, memory, rows)
    logp = event_logits(generator, hidden, rows, special) - generator.vocab_logsumexp(hidden)[0]
    logp = logp.reshape(questions, documents, count, longest)
    return jnp.where(jnp.arange(longest) < lengths[:, None, :, None], logp, 0.0)


def score_candidates(
    known: PrefixScorer,
    answers: Sequence[Sequence[Tokens]],
    wanted: Sequence[Bool[np.ndarray, "K _"]],
    into: np.ndarray,
) -> None:
    """Scores the wanted candidates of every question in one pass, `into` log p(y|x,z) [B,K,C]."""
    documents = into.shape[1]
    chosen = {
        b * documents + z: np.flatnonzero(of_document).tolist()
        for b, of_question in enumerate(wanted)
        for z, of_document in enumerate(of_question)
        if of_document.any()
    }
    found = known.score({row: [answers[row // documents][c] for c in which] for row, which in chosen.items()})
    for row, of_row in found.items():
        into[row // documents, row % documents, chosen[row]] = [logp.sum() for logp in of_row]


@jax.jit
def fast_marginals(log_prior: Array, proposed: Array) -> Array:
    return fast_marginal(log_prior, proposed, proposed > -jnp.inf)


@jax.jit
def thorough_marginals(log_prior: Array, scored: Array) -> tuple[Array, Array]:
    return thorough_marginal(log_prior, scored), posterior(log_prior, scored)
