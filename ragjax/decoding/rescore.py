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
from ragjax.parallel.by_device import by_device

MOST_TOKENS = 1024  # of answers that are scored together under a document


@partial(jax.jit, static_argnums=(0, 5))
def score_tokens(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    answers: Int[Array, "B C T"],
    lengths: Int[Array, "B C"],
    special: SpecialTokens,
) -> Float[Array, "B K C T"]:
    """log p(y_t|y_<t,x,z) (nats) of C answers a question under all K documents, in one padded pass over B·K memories.

    That of `special.eos` is that the answer ends, whichever token writes it. Padding has 0. Of long answers some go
    after others, so that the memory it takes does not grow with C·T (see `MOST_TOKENS`).
    """

    def score(params: Params, memory: DocumentMemory, answers: Array, lengths: Array) -> Array:
        questions, count, longest = answers.shape
        documents = memory.start.shape[0] // questions
        rows, generator = jnp.repeat(answers, documents, axis=0), nnx.merge(graph, params)
        head = generator.vocab_head()

        def some(rows: Array) -> Array:
            hidden = answer_hidden(generator, memory, rows)
            return event_logits(head, hidden, rows, special) - head.logsumexp_and_mean(hidden)[0]

        size = max(1, MOST_TOKENS // longest)
        if count <= size:
            logp = some(rows)
        else:
            parts = -(-count // size)
            rows = jnp.pad(rows, ((0, 0), (0, parts * size - count), (0, 0)))
            by_part = jax.lax.map(some, rows.reshape(-1, parts, size, longest).swapaxes(0, 1))
            logp = by_part.swapaxes(0, 1).reshape(-1, parts * size, longest)[:, :count]
        logp = logp.reshape(questions, documents, count, longest)
        return jnp.where(jnp.arange(longest) < lengths[:, None, :, None], logp, 0.0)

    return by_device(score, params, memory, answers, lengths)


def score_candidates(
    scorer: PrefixScorer,
    answers: Sequence[Sequence[Tokens]],
    chosen: Sequence[Bool[np.ndarray, "K _"]],
    logp: Float[np.ndarray, "B K C"],
) -> None:
    """Writes log p(y|x,z) (nats) of the chosen candidates of every question into `logp`, computed in one pass.

    `answers` are the candidates of each question as they are scored (see `with_end`), `chosen` which of them under
    which of its documents.
    """
    documents = logp.shape[1]
    columns = {
        b * documents + z: np.flatnonzero(under_document).tolist()
        for b, by_document in enumerate(chosen)
        for z, under_document in enumerate(by_document)
        if under_document.any()
    }
    scores = scorer.score({row: [answers[row // documents][c] for c in cs] for row, cs in columns.items()})
    for row, steps in scores.items():
        logp[row // documents, row % documents, columns[row]] = steps.sum(axis=1)


@jax.jit
def fast_marginals(log_prior: Float[Array, "B K"], beam_logp: Float[Array, "B K C"]) -> Float[Array, "B C"]:
    """The fast marginal of candidates; `beam_logp` is −inf where a document did not propose one."""
    return fast_marginal(log_prior, beam_logp, beam_logp > -jnp.inf)


@jax.jit
def thorough_marginals(
    log_prior: Float[Array, "B K"], doc_logp: Float[Array, "B K C"]
) -> tuple[Float[Array, "B C"], Float[Array, "B K C"]]:
    """The thorough marginal of candidates, and the posterior of each document."""
    return thorough_marginal(log_prior, doc_logp), posterior(log_prior, doc_logp)
