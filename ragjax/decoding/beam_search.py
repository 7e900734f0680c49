"""Beam search over any next-token distribution; it knows nothing of models, documents or retrieval.

Beams are never copied: a token is written once into a pool of T·W slots, and each beam keeps its ancestry, the slot
that it occupies at every earlier step. A score is the sum of log-probabilities, the end token included. Once half of
the rows are finished, and again when three quarters are, the others go on by themselves.

A search can prove what it finds: an answer is never likelier than its beginning, so that whatever it has not finished
is at most as likely as the likeliest prefix that it dropped or left open (`Bound`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ragjax.marginal import is_best
from ragjax.parallel.by_device import auto_axes, axis_length

LARGE = 4096  # continuations from which on blocks are faster
BLOCKS = range(32, 513)  # their sizes; between these the time is the same

# (tokens[n,W], step, attention_mask[n,W,T·W], cache) → (log-probabilities of what follows [n,W,V], cache)
NextLogp = Callable[[Array, Array, Array, Any], tuple[Array, Any]]


@dataclass(frozen=True)
class BeamSettings:
    """How to search; a static argument of the programs that do."""

    num_beams: int  # W
    max_new_tokens: int  # T
    eos: int  # the token that ends an answer
    pad: int  # what fills up after it
    min_new_tokens: int = 0  # before these no answer ends
    length_penalty: float = 0.0  # answers are ranked by logp / length**length_penalty
    early_stopping: bool = False  # end with the first W answers
    forced_bos: int | None = None  # the only first token allowed; it counts with the probability that it has
    forced_eos: int | None = None  # the only token allowed at the length limit; likewise
    num_answers: int | None = None  # how many finished answers to keep; None: W
    most_beams: int = 0  # of a later search for the same proof (see `Bound.crowd`)
    # As transformers has it, to the letter: a forced token counts 0, a prefix cut at the length limit may push out a
    # finished answer, and whether a running beam can still win is guessed from its present length.
    hugging_face: bool = False

    def rank(
        self, logp: Float[Array | np.ndarray, "*n"], length: Int[Array | np.ndarray, "..."] | int
    ) -> Float[Array, "*n"]:
        """By what answers are compared."""
        return jnp.asarray(logp) / jnp.asarray(length, jnp.float32) ** self.length_penalty

    @property
    def places(self) -> int:
        """How many finished answers a row keeps."""
        return self.num_answers or self.num_beams

    @property
    def stops_at_first(self) -> bool:
        """Whether a row is done with its first W answers; one beam of transformers is a greedy search."""
        return self.early_stopping or (self.hugging_face and self.num_beams == 1)


@struct.dataclass
class Beams:
    """The C best answers of each row, finished ones first, then by score; on the device, or fetched from it.

    C is W unless the settings say otherwise.
    """

    tokens: Int[Array | np.ndarray, "n C T"]  # the end token included, then padding
    length: Int[Array | np.ndarray, "n C"]
    logp: Float[Array | np.ndarray, "n C"]  # nats; −inf where there are fewer than C answers
    finished: Bool[Array | np.ndarray, "n C"]  # reached the end token
    slot: Int[Array | np.ndarray, "n C"]  # of a finished one in a search with a proof: of its last prefix in the pool


@struct.dataclass
class Bound:
    """What a search that proves its answers knows of all others (nats); on the device, or fetched from it."""

    rest: Float[Array | np.ndarray, " n"]  # what any answer may gain beside the distribution searched; −inf: nothing
    floor: Float[Array | np.ndarray, " n"]  # log p of an answer known before; what is below it is not searched
    dropped: Float[Array | np.ndarray, " n"]  # the likeliest prefix dropped, of those that could still have ended
    left: Float[Array | np.ndarray, " n"]  # the likeliest prefix that was open when the row was done
    crowd: Float[Array | np.ndarray, " n"]  # the likeliest prefix that `most_beams` beams would have dropped
    steps: Int[Array | np.ndarray, " n"]

    @property
    def unfinished(self) -> Float[Array | np.ndarray, " n"]:
        """No answer is likelier that this search did not finish."""
        return np.maximum(self.dropped, self.left)


def first_bound(rest: Float[Array, " n"], floor: Float[Array, " n"]) -> Bound:
    """Before the first step; the arguments are fields of `Bound`."""
    none = jnp.full_like(rest, -jnp.inf)
    return Bound(rest, floor, none, none, none, jnp.zeros(rest.shape, jnp.int32))


@struct.dataclass
class _State:
    step: Int[Array, ""]
    last: Int[Array, "n W"]  # the newest token of each running beam
    tokens: Int[Array, "n W T"]
    ancestry: Int[Array, "n W T"]  # which of the W slots of each step this beam came through
    logp: Float[Array, "n W"]
    done: Beams
    open: Bool[Array, " n"]  # rows whose best answers can still change
    bound: Bound | None
    cache: Any

    def take(self, rows: Int[Array, " R"]) -> _State:
        """The search of some rows alone."""
        parts = {name: jax.tree.map(lambda x: x[rows], getattr(self, name)) for name in _BY_ROW}
        return replace(self, cache=self.cache.take(rows), **parts)

    def put(self, rows: Int[Array, " R"], part: _State) -> _State:
        """With these rows as the search of them alone left them."""

        def put(whole: Any, some: Any) -> Any:
            return jax.tree.map(lambda x, new: x.at[rows].set(new), whole, some)

        wholes = {name: put(getattr(self, name), getattr(part, name)) for name in _BY_ROW}
        return replace(part, cache=self.cache.put(rows, part.cache), **wholes)


_BY_ROW = ("last", "tokens", "ancestry", "logp", "done", "open", "bound")


def batch_sizes(rows: int) -> list[int]:
    """The numbers of rows of a search that lets finished rows leave: all, then a half of them, then a quarter."""
    return [rows, *(size for size in (rows // 2, rows // 4) if size > 1)]


def beam_search(
    next_logp: NextLogp,
    cache: Any,
    start: Int[Array, " n"],
    settings: BeamSettings,
    for_rows: Callable[[Int[Array, " R"]], NextLogp] | None = None,
    start_logp: Float[Array, " n"] | None = None,
    bound: Bound | None = None,
) -> tuple[Beams, Any, Bound | None]:
    """Searches until no running beam can enter the best W, or at `max_new_tokens`, which leaves unfinished prefixes.

    As in Hugging Face, the 2W best continuations are looked at in each step, and an end token finishes an answer if
    it is among the best W. With a `bound` every end of every beam is an answer, whatever its rank, the W best other
    continuations go on, and a row is done once its best answer is proved, or once this search cannot prove it.
    Pure: call it inside `jax.jit`.

    Args:
        next_logp: gives log-probabilities [n,W,V] of what follows the newest tokens [n,W], which stand at position
            `step` and attend to the slots of the pool that `attention_mask` [n,W,T·W] says; and the cache after that.
        cache: what `next_logp` keeps, of T·W slots a row. With `for_rows` it has `take(rows)` and `put(rows, part)`.
        start: the token before the first one, of each row.
        settings: how to search.
        for_rows: gives `next_logp` for some of the rows, and so lets finished rows leave (see `batch_sizes`).
        start_logp: log p of the empty prefix of each row; by default 0. Nothing is searched where it is −inf.
        bound: as `first_bound` gives it; needs `length_penalty` 0.

    Returns:
        The best answers of each row, the cache as the last step left it, and what is known of all other answers.
    """
    sizes = [*batch_sizes(start.shape[0]), 0] if for_rows else [start.shape[0], 0]

    def going(fewer: int, state: _State) -> Array:
        return (state.step < settings.max_new_tokens) & (state.open.sum() > fewer)

    state = _first_state(settings, start, cache, start_logp, bound)
    state = jax.lax.while_loop(partial(going, sizes[1]), partial(_advance, settings, next_logp), state)
    for size, fewer in pairwise(sizes[1:]):

        def with_fewer(state: _State, size: int = size, fewer: int = fewer) -> _State:
            rows = jnp.argsort(~state.open)[:size]  # those still open first
            assert for_rows is not None
            search = partial(_advance, settings, for_rows(rows))
            return state.put(rows, jax.lax.while_loop(partial(going, fewer), search, state.take(rows)))

        state = jax.lax.cond(going(0, state), with_fewer, lambda state: state, state)
    if settings.hugging_face:
        return state.done, state.cache, state.bound
    # prefixes that ran into the limit fill the places that no finished answer takes
    length = jnp.full_like(state.last, settings.max_new_tokens)
    cut = jnp.where(state.open[:, None], state.logp, -jnp.inf)
    prefixes = Beams(state.tokens, length, cut, jnp.zeros(length.shape, bool), jnp.zeros_like(length))
    return _best(settings, state.done, prefixes), state.cache, state.bound


def _first_state(
    settings: BeamSettings, start: Int[Array, " n"], cache: Any, start_logp: Array | None, bound: Bound | None
) -> _State:
    """Of W equal beams only the first counts."""
    n, width, longest = start.shape[0], settings.num_beams, settings.max_new_tokens
    start_logp = jnp.zeros(n) if start_logp is None else start_logp
    places = (n, settings.places)
    ones = jnp.ones(places, jnp.int32)
    blank = jnp.full((*places, longest), settings.pad, jnp.int32)
    return _State(
        step=jnp.zeros((), jnp.int32),
        last=jnp.broadcast_to(start[:, None], (n, width)),
        tokens=jnp.full((n, width, longest), settings.pad, jnp.int32),
        ancestry=jnp.zeros((n, width, longest), jnp.int32),
        logp=jnp.where(jnp.arange(width) == 0, start_logp[:, None], -jnp.inf),
        done=Beams(blank, ones, jnp.full(places, -jnp.inf), jnp.zeros(places, bool), jnp.zeros_like(ones)),
        open=start_logp > -jnp.inf,
        bound=bound,
        cache=cache,
    )


def _advance(settings: BeamSettings, next_logp: NextLogp, state: _State) -> _State:
    """One step of all beams."""
    (n, width), longest, step = state.last.shape, settings.max_new_tokens, state.step
    row, here = jnp.arange(n)[:, None], jnp.arange(longest) == step
    ancestry = jnp.where(here, jnp.arange(width)[None, :, None], state.ancestry)
    past = (ancestry[..., None] == jnp.arange(width)) & (jnp.arange(longest) <= step)[:, None]
    logp, cache = next_logp(state.last, step, past.reshape(n, width, longest * width), state.cache)
    total = state.logp[..., None] + _allowed(settings, logp, step)
    going, parent, token, changes = (_choose if state.bound is None else _choose_and_bound)(settings, state, total)
    return replace(
        state,
        step=step + 1,
        last=token,
        tokens=jnp.where(here, token[..., None], state.tokens[row, parent]),
        ancestry=ancestry[row, parent],
        logp=going,
        cache=cache,
        **changes,
    )


def _choose(
    settings: BeamSettings, state: _State, total: Float[Array, "n W V"]
) -> tuple[Float[Array, "n W"], Int[Array, "n W"], Int[Array, "n W"], dict[str, Any]]:
    """Of the 2W best continuations those that end are finished and W others go on: log p, parents and tokens."""
    (n, width, vocabulary), longest, step = total.shape, settings.max_new_tokens, state.step
    row = jnp.arange(n)[:, None]
    best, flat = likeliest_next(total, min(2 * width, width * vocabulary))
    parent, token = flat // vocabulary, flat % vocabulary
    done = _finish(settings, state, parent, token, best)

    going, keep = jax.lax.top_k(jnp.where(token == settings.eos, -jnp.inf, best), width)
    # log-probabilities only fall, so this bounds whatever a running beam can still become
    longer = settings.length_penalty > 0 and not settings.hugging_face
    bound = settings.rank(going[:, 0], longest if longer else step + 1)
    worst = settings.rank(done.logp, done.length).min(axis=1)
    full = settings.stops_at_first & (done.logp > -jnp.inf).all(axis=1)
    return going, parent[row, keep], token[row, keep], {"done": done, "open": state.open & (bound > worst) & ~full}


def _choose_and_bound(
    settings: BeamSettings, state: _State, total: Float[Array, "n W V"]
) -> tuple[Float[Array, "n W"], Int[Array, "n W"], Int[Array, "n W"], dict[str, Any]]:
    """All ends are finished, the W best other continuations go on, and the bound follows: as `_choose`.

    A prefix as long as the limit is no beginning of an answer: it bounds nothing.
    """
    (n, width, vocabulary), step, before = total.shape, state.step, state.bound
    assert before is not None
    parents = jnp.broadcast_to(jnp.arange(width), (n, width))
    ends = total[..., settings.eos]
    done = _finish(settings, state, parents, jnp.full_like(parents, settings.eos), ends)

    others = jnp.where(jnp.arange(vocabulary) == settings.eos, -jnp.inf, total)
    best, flat = likeliest_next(others, min(max(width, settings.most_beams) + 1, width * vocabulary))
    may_end = step + 1 < settings.max_new_tokens

    def after(count: int) -> Array:
        """The likeliest prefix that so many beams drop."""
        return jnp.where(may_end, best[:, count], -jnp.inf) if count < best.shape[1] else jnp.full(n, -jnp.inf)

    left = jnp.where(may_end, best[:, 0], -jnp.inf)
    bound = Bound(
        before.rest,
        before.floor,
        jnp.maximum(before.dropped, after(width)),
        left,
        jnp.maximum(before.crowd, after(max(width, settings.most_beams))),
        before.steps + 1,
    )
    bound = jax.tree.map(lambda new, old: jnp.where(state.open, new, old), bound, before)
    first, rival = jnp.maximum(done.logp[:, 0], bound.floor), jnp.maximum(done.logp[:, 1], bound.dropped)
    proved, hopeless = is_best(first, jnp.maximum(rival, left), bound.rest), ~is_best(first, rival, bound.rest)
    open_ = state.open & ((left > first) | ~(proved | hopeless) | ~may_end)
    changes = {"done": done, "open": open_, "bound": bound}
    return best[:, :width], flat[:, :width] // vocabulary, flat[:, :width] % vocabulary, changes


def likeliest_next(
    total: Float[Array, "n W V"], count: int
) -> tuple[Float[Array, "n {count}"], Int[Array, "n {count}"]]:
    """The `count` likeliest continuations of all beams of a row, as numbers beam · V + token: lower ones win ties.

    Where the vocabulary is split over the mesh's axis `model`, each device finds those of its part, and sends these.
    """
    n, width, vocabulary = total.shape
    parts = axis_length("model")
    if parts == 1 or vocabulary % parts:
        return likeliest(total.reshape(n, -1), count)
    each, whole = vocabulary // parts, PartitionSpec()

    def over_devices(part: Array, total: Array) -> tuple[Array, Array]:
        best, at = likeliest(total.reshape(n, -1), min(count, width * each))
        found = best, at // each * vocabulary + part * each + at % each
        best, number = (jax.lax.all_gather(x, "model", axis=1, tiled=True) for x in found)
        number, best = jax.lax.sort((number, best), num_keys=1)  # so that places decide ties as numbers do
        best, place = jax.lax.top_k(best, count)
        return best, jnp.take_along_axis(number, place, axis=1)

    axes, specs = auto_axes(), (PartitionSpec("model"), PartitionSpec(None, None, "model"))
    split = jax.shard_map(over_devices, in_specs=specs, out_specs=(whole, whole), axis_names=axes, check_vma=False)
    return split(jnp.arange(parts, dtype=jnp.int32), total)


def likeliest(logp: Float[Array, "n M"], count: int) -> tuple[Float[Array, "n {count}"], Int[Array, "n {count}"]]:
    """As `jax.lax.top_k`, to the bit, in less time where M is large: lower indices win ties.

    Each of the `count` best stands in one of the `count` blocks of the largest maxima: the others come after one entry
    of each of these. Where the shape has no blocks of a useful size it is `jax.lax.top_k`, which XLA turns into a sort
    of all M on CPUs if the values are sliced later.
    """
    size = next((size for size in BLOCKS if logp.shape[1] % size == 0), 0)
    if size == 0 or logp.shape[1] < max(LARGE, 4 * count * size):
        best, index = jax.lax.top_k(logp, count)
        return best, index
    return likeliest_by_blocks(logp, count, size)


def likeliest_by_blocks(
    logp: Float[Array, "n M"], count: int, size: int
) -> tuple[Float[Array, "n {count}"], Int[Array, "n {count}"]]:
    """As `likeliest`, with blocks of `size`, which divides M; there are at least `count` of them."""
    n = logp.shape[0]
    _, blocks = jax.lax.top_k(logp.reshape(n, -1, size).max(axis=2), count)
    # in their order, so that positions here decide ties as indices do
    index = (jnp.sort(blocks, axis=1)[..., None] * size + jnp.arange(size)).reshape(n, -1)
    best, place = jax.lax.top_k(jnp.take_along_axis(logp, index, axis=1), count)
    return best, jnp.take_along_axis(index, place, axis=1)


def _allowed(settings: BeamSettings, logp: Float[Array, "n W V"], step: Int[Array, ""]) -> Float[Array, "n W V"]:
    """−inf for tokens that may not come at this step: an end too early, or any but a forced one."""
    token = jnp.arange(logp.shape[-1])
    too_short = (token == settings.eos) & (step < settings.min_new_tokens)
    allowed = jnp.where(too_short, -jnp.inf, logp)
    for forced, when in ((settings.forced_bos, 0), (settings.forced_eos, settings.max_new_tokens - 1)):
        if forced is not None:
            only = jnp.where(token == forced, 0.0 if settings.hugging_face else logp, -jnp.inf)
            allowed = jnp.where(step == when, only, allowed)
    return allowed


def _finish(
    settings: BeamSettings,
    state: _State,
    parent: Int[Array, "n Q"],
    token: Int[Array, "n Q"],
    logp: Float[Array, "n Q"],
) -> Beams:
    """The finished answers with those of Q continuations, the best first, that end here and are among the best W."""
    row, here = jnp.arange(logp.shape[0])[:, None], jnp.arange(settings.max_new_tokens) == state.step
    tokens = jnp.where(here, token[..., None], state.tokens[row, parent])
    ends = token == settings.eos
    at_limit = state.step + 1 == settings.max_new_tokens
    complete = ends | (at_limit & settings.hugging_face)
    among_best = jnp.arange(logp.shape[1]) < settings.num_beams
    length, slot = jnp.full_like(token, state.step + 1), state.step * settings.num_beams + parent
    fresh = Beams(tokens, length, jnp.where(complete & among_best, logp, -jnp.inf), ends, slot)
    done = _best(settings, state.done, fresh)
    return jax.tree.map(lambda new, old: jnp.where(_rows(state.open, new), new, old), done, state.done)


def _rows(flags: Bool[Array, " n"], like: Array) -> Array:
    return flags.reshape(-1, *[1] * (like.ndim - 1))


def _best(settings: BeamSettings, *groups: Beams) -> Beams:
    """The best answers of several groups, finished ones first unless as Hugging Face; earlier groups win ties."""
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *groups)
    joined = replace(joined, finished=joined.finished & (joined.logp > -jnp.inf))
    score = settings.rank(joined.logp, joined.length)
    order = jnp.lexsort((-score, ~joined.finished & (not settings.hugging_face)), axis=1)[:, : settings.places]
    return jax.tree.map(lambda leaf: leaf[jnp.arange(leaf.shape[0])[:, None], order], joined)
