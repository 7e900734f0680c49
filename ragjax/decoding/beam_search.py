"""Beam search; knows nothing of retrieval.

Beams are never copied: a token is written once into a pool of T·W slots, and each beam keeps its ancestry, the slot
that it occupies at every earlier step. A score is the sum of log-probabilities, the end token included. Once half of
the rows are finished, and again when three quarters are, the others go on by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# (tokens[n,W], step, visible[n,W,T·W], cache) → (log-probabilities of what follows [n,W,V], cache)
NextLogp = Callable[[Array, Array, Array, Any], tuple[Array, Any]]


@struct.dataclass
class Beams:
    """The W best answers of each row, finished ones first, then by score; on the device, or fetched from it."""

    tokens: Int[Array | np.ndarray, "n W T"]  # the end token included, then padding
    length: Int[Array | np.ndarray, "n W"]
    logp: Float[Array | np.ndarray, "n W"]  # nats; −inf where there are fewer than W answers
    finished: Bool[Array | np.ndarray, "n W"]  # reached the end token


@struct.dataclass
class _State:
    step: Int[Array, ""]
    last: Int[Array, "n W"]  # the newest token of each running beam
    tokens: Int[Array, "n W T"]
    ancestry: Int[Array, "n W T"]  # which of the W slots of each step this beam came through
    logp: Float[Array, "n W"]
    done: Beams
    open: Bool[Array, " n"]  # rows whose best answers can still change
    cache: Any

    def take(self, rows: Int[Array, " R"]) -> _State:
        """The search of some rows alone."""
        own = {name: jax.tree.map(lambda x: x[rows], getattr(self, name)) for name in _OF_ROWS}
        return replace(self, cache=self.cache.take(rows), **own)

    def put(self, rows: Int[Array, " R"], part: _State) -> _State:
        """With these rows as the search of them alone left them."""

        def put(whole: Any, some: Any) -> Any:
            return jax.tree.map(lambda x, new: x.at[rows].set(new), whole, some)

        own = {name: put(getattr(self, name), getattr(part, name)) for name in _OF_ROWS}
        return replace(part, cache=self.cache.put(rows, part.cache), **own)


_OF_ROWS = ("last", "tokens", "ancestry", "logp", "done", "open")


def batch_sizes(rows: int) -> list[int]:
    """Of how many rows the steps of a search are that lets finished rows leave: first all, then those still open."""
    return [rows, *(size for size in (rows // 2, rows // 4) if size > 1)]


def beam_search(
    next_logp: NextLogp,
    cache: Any,
    start: Int[Array, " n"],
    *,
    beams: int,
    max_new_tokens: int,
    eos: int,
    pad: int,
    min_new_tokens: int = 0,
    length_penalty: float = 0.0,
    early_stopping: bool = False,
    forced_bos: int | None = None,
    forced_eos: int | None = None,
    hugging_face: bool = False,
    for_rows: Callable[[Int[Array, " R"]], NextLogp] | None = None,
) -> tuple[Beams, Any]:
    """Searches until no running beam can enter the best W, or at `max_new_tokens`, which leaves unfinished prefixes.

    As in Hugging Face, the 2W best continuations are looked at in each step, and an end token finishes an answer if
    it is among the best W. Answers are ranked by logp / length**length_penalty. `early_stopping` ends with the first W
    answers. `forced_bos` is the only first token allowed, `forced_eos` the only one at the length limit; both count
    with the probability that they have. The cache as the last step left it is given back. Pure: call it inside
    `jax.jit`.

    `for_rows`, which gives `next_logp` for some of the rows, lets finished rows leave (`batch_sizes`); the cache then
    has `take(rows)` and `put(rows, part)`.

    With `hugging_face` the search is transformers' to the letter: a forced token counts 0, a prefix cut at the length
    limit may push out a finished answer, and whether a running beam can still win is guessed from its present length.
    """
    n, width, longest = start.shape[0], beams, max_new_tokens
    early_stopping = early_stopping or (hugging_face and width == 1)  # there, one beam is a greedy search

    def rank(logp: Array, length: Array | int) -> Array:
        return logp / jnp.asarray(length, jnp.float32) ** length_penalty

    def advance(next_logp: NextLogp, state: _State) -> _State:
        n = state.last.shape[0]
        row = jnp.arange(n)[:, None]
        step, last_step = state.step, state.step + 1 == longest
        here = jnp.arange(longest) == step
        ancestry = jnp.where(here, jnp.arange(width)[None, :, None], state.ancestry)
        seen = (ancestry[..., None] == jnp.arange(width)) & (jnp.arange(longest) <= step)[:, None]
        logp, cache = next_logp(state.last, step, seen.reshape(n, width, longest * width), state.cache)
        vocabulary = logp.shape[-1]
        too_short = (jnp.arange(vocabulary) == eos) & (step < min_new_tokens)
        allowed = jnp.where(too_short, -jnp.inf, logp)
        for forced, when in ((forced_bos, 0), (forced_eos, longest - 1)):
            if forced is not None:
                only = jnp.where(jnp.arange(vocabulary) == forced, 0.0 if hugging_face else logp, -jnp.inf)
                allowed = jnp.where(step == when, only, allowed)
        total = state.logp[..., None] + allowed
        best, flat = jax.lax.top_k(total.reshape(n, -1), min(2 * width, width * vocabulary))
        parent, token = flat // vocabulary, flat % vocabulary
        tokens = jnp.where(here, token[..., None], state.tokens[row, parent])
        ends = token == eos

        among_best = jnp.arange(best.shape[1]) < width
        newly = Beams(tokens, jnp.full_like(token, step + 1), best, ends)
        complete = ends | (last_step & hugging_face)
        newly = replace(newly, logp=jnp.where(complete & among_best, best, -jnp.inf))
        done = _best(width, rank, state.done, newly, finished_first=not hugging_face)
        done = jax.tree.map(lambda new, old: jnp.where(_rows(state.open, new), new, old), done, state.done)

        going, keep = jax.lax.top_k(jnp.where(ends, -jnp.inf, best), width)
        # log-probabilities only fall, so this bounds whatever a running beam can still become
        bound = rank(going[:, 0], longest if length_penalty > 0 and not hugging_face else step + 1)
        worst = rank(done.logp, done.length).min(axis=1)
        full = early_stopping & (done.logp > -jnp.inf).all(axis=1)
        return _State(
            step=step + 1,
            last=token[row, keep],
            tokens=tokens[row, keep],
            ancestry=ancestry[row, parent[row, keep]],
            logp=going,
            done=done,
            open=state.open & (bound > worst) & ~full,
            cache=cache,
        )

    blank = jnp.full((n, width, longest), pad, jnp.int32)
    first_only = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)
    none = Beams(blank, jnp.ones((n, width), jnp.int32), jnp.full((n, width), -jnp.inf), jnp.zeros((n, width), bool))
    state = _State(
        step=jnp.zeros((), jnp.int32),
        last=jnp.broadcast_to(start[:, None], (n, width)),
        tokens=blank,
        ancestry=jnp.zeros((n, width, longest), jnp.int32),
        logp=jnp.broadcast_to(first_only, (n, width)),
        done=none,
        open=jnp.ones(n, bool),
        cache=cache,
    )
    sizes = [*batch_sizes(n), 0] if for_rows else [n, 0]

    def going(fewer: int, state: _State) -> Array:
        return (state.step < longest) & (state.open.sum() > fewer)

    state = jax.lax.while_loop(partial(going, sizes[1]), partial(advance, next_logp), state)
    for size, fewer in pairwise(sizes[1:]):

        def with_fewer(state: _State, size: int = size, fewer: int = fewer) -> _State:
            rows = jnp.argsort(~state.open)[:size]  # those still open first
            assert for_rows is not None
            search = partial(advance, for_rows(rows))
            return state.put(rows, jax.lax.while_loop(partial(going, fewer), search, state.take(rows)))

        state = jax.lax.cond(going(0, state), with_fewer, lambda state: state, state)
    if hugging_face:
        return state.done, state.cache
    # prefixes that ran into the limit fill the places that no finished answer takes
    length = jnp.full((n, width), longest, jnp.int32)
    cut = jnp.where(state.open[:, None], state.logp, -jnp.inf)
    prefixes = Beams(state.tokens, length, cut, jnp.zeros((n, width), bool))
    return _best(width, rank, state.done, prefixes), state.cache


def _rows(flags: Bool[Array, " n"], like: Array) -> Array:
    return flags.reshape(-1, *[1] * (like.ndim - 1))


def _best(width: int, rank: Callable[[Array, Array], Array], *groups: Beams, finished_first: bool = True) -> Beams:
    """The best `width` answers of several groups, finished before unfinished; earlier groups win ties."""
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *groups)
    joined = replace(joined, finished=joined.finished & (joined.logp > -jnp.inf))
    score = rank(joined.logp, joined.length)
    order = jnp.lexsort((-score, ~joined.finished & finished_first), axis=1)[:, :width]
    return jax.tree.map(lambda leaf: leaf[jnp.arange(leaf.shape[0])[:, None], order], joined)
