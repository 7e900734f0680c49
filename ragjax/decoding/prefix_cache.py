"""The prefixes that a beam search reads under each document, and the scores of candidates computed from them.

    log p(y|x,z) = Σ_t [ logit(y_t | y_<t, x, z) − log Σ_v exp logit(v | y_<t, x, z) ]

Whatever prefix a beam search has read under z, its state is kept. A candidate that another document proposed shares
some prefixes with it: these are not read again, and the others, each of them once, in one padded pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from ragjax.models.generator import Generator, SpecialTokens, event_logits
from ragjax.models.kv_cache import DocumentMemory, KVCache, empty_kv_cache
from ragjax.models.layers import Params
from ragjax.padding import bucket_size
from ragjax.parallel.by_device import RowGroup, by_device, group_by_device

Tokens = tuple[int, ...]
MOST_NEW = 512  # prefixes a memory that are read together: what they take of memory grows with their square


@struct.dataclass
class PrefixCache:
    """The prefixes that were read after each of n memories: each is one slot, that of its last token."""

    past: KVCache
    tokens: Int[Array, "n E"]
    parent: Int[Array, "n E"]  # the slot of the prefix without its last token; -1 for the start token, and unwritten
    hidden: Float[Array, "n E D"]
    logsumexp: Float[Array, "n E"]  # of the logits of what follows

    def take(self, rows: Int[Array, " R"]) -> PrefixCache:
        """What was read after some of the memories."""
        others = (x[rows] for x in (self.tokens, self.parent, self.hidden, self.logsumexp))
        return PrefixCache(self.past.take(rows), *others)

    def closed(self) -> PrefixCache:
        """Full, as far as a search that has ended is concerned: devices that search alone do not end together."""
        slots = jnp.asarray(self.tokens.shape[1], jnp.int32)
        return replace(self, past=replace(self.past, filled=slots))

    def put(self, rows: Int[Array, " R"], part: PrefixCache) -> PrefixCache:
        """With what was read after some of the memories; the others read nothing meanwhile."""

        def put(name: str) -> Array:
            return getattr(self, name).at[rows].set(getattr(part, name))

        arrays = {name: put(name) for name in ("tokens", "parent", "hidden", "logsumexp")}
        return replace(self, past=self.past.put(rows, part.past), **arrays)


def empty_prefix_cache(generator: Generator, memory: DocumentMemory, slots: int) -> PrefixCache:
    """`slots` unwritten slots beside each memory."""
    shape, config = (memory.start.shape[0], slots), generator.config
    nothing, states = jnp.zeros(shape, jnp.int32), jnp.zeros((*shape, config.hidden_size), config.dtype)
    return PrefixCache(empty_kv_cache(memory, slots), nothing, nothing - 1, states, jnp.zeros(shape, jnp.float32))


def beam_step(
    generator: Generator,
    memory: DocumentMemory,
    prefixes: PrefixCache,
    tokens: Int[Array, "n W"],
    step: Int[Array, ""],
    attention_mask: Bool[Array, "n W E"],
) -> tuple[Float[Array, "n W V"], PrefixCache]:
    """One step of W beams: log-probabilities (nats) of what follows `tokens`, which stand at position `step`.

    `attention_mask` says which slots each beam sees, its own new one included. The prefixes read are cached.
    """
    first, past = prefixes.past.filled, prefixes.past
    positions = jnp.broadcast_to(step, (1, tokens.shape[1], 1))
    hidden, after = generator.forward_with_cache(
        memory, past, tokens[:, :, None], positions, attention_mask[:, :, None, :]
    )
    assert after is not None
    hidden = hidden[:, :, 0]
    logits = generator.vocab_head().logits(hidden)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    slots = jnp.arange(attention_mask.shape[-1])
    parent = jnp.where(attention_mask & (slots < first), slots, -1).max(axis=-1)

    def write(into: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(into, new, (0, first, *[0] * (new.ndim - 2)))

    cache = PrefixCache(
        after,
        write(prefixes.tokens, tokens),
        write(prefixes.parent, parent),
        write(prefixes.hidden, hidden),
        write(prefixes.logsumexp, logsumexp),
    )
    return logits - logsumexp[..., None], cache


class PrefixScorer:
    """Scores any answer under n memories, on the host: from the prefix cache where it can, else by reading more."""

    def __init__(
        self, graph: nnx.GraphDef, params: Params, memory: DocumentMemory, prefixes: PrefixCache, special: SpecialTokens
    ) -> None:
        self.graphdef, self.params, self.memory, self.prefixes, self.special = graph, params, memory, prefixes, special
        tokens, parent = jax.device_get((prefixes.tokens, prefixes.parent))
        used = 1 + int(np.flatnonzero((parent >= 0).any(axis=0)).max(initial=0))
        self._tokens, self._parent = tokens[:, :used], parent[:, :used]

    def bounds(self, answers: Mapping[int, Sequence[Tokens]]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """By memory: upper bounds on log p(y|x,z) (nats) of its answers, and whether they are exact; nothing is read.

        An answer is never likelier than a prefix of it, so the log-probability of its longest cached prefix is a bound.
        It is exact where all T − 1 prefixes of an answer of T tokens are cached.
        """
        if not answers:
            return {}
        forest, group = self._forest(answers, grow=False)
        logp = self._path_logp(forest, group, self.prefixes.hidden, self.prefixes.logsumexp, group.local)
        bounds = zip(logp, forest.by_row(forest.whole), strict=True)
        return {row: (steps.sum(axis=1), whole) for row, (steps, whole) in zip(answers, bounds, strict=True)}

    def score(self, answers: Mapping[int, Sequence[Tokens]]) -> dict[int, Float[np.ndarray, "_ T"]]:
        """By memory: log p(y_t|y_<t,x,z) (nats) of each answer, 0 beyond its end.

        Prefixes not cached are read, each once, together; of long answers more than `MOST_NEW` under a memory in parts.
        """
        if not answers:
            return {}
        forest, group = self._forest(answers, grow=True)
        if forest.most_new > MOST_NEW and max(map(len, answers.values())) > 1:
            return self._score_in_two(answers)
        if forest.new_slot.size == 0:
            logp = self._path_logp(forest, group, self.prefixes.hidden, self.prefixes.logsumexp, group.local)
        else:
            logp = self._path_logp(forest, group, *self._read(forest, group), None)
        return dict(zip(answers, logp, strict=True))

    def _score_in_two(self, answers: Mapping[int, Sequence[Tokens]]) -> dict[int, Float[np.ndarray, "_ T"]]:
        """As `score`, one half of the answers after the other; those that share prefixes stay together."""
        longest = max(len(y) for ys in answers.values() for y in ys)
        scores = {row: np.zeros((len(ys), longest), np.float32) for row, ys in answers.items()}
        order = {row: sorted(range(len(ys)), key=ys.__getitem__) for row, ys in answers.items()}
        for part in (0, 1):
            some = {row: of[len(of) // 2 :] if part else of[: len(of) // 2] for row, of in order.items()}
            parts = {row: [answers[row][i] for i in of] for row, of in some.items() if of}
            for row, logp in self.score(parts).items():
                scores[row][some[row], : logp.shape[1]] = logp
        return scores

    def _forest(self, answers: Mapping[int, Sequence[Tokens]], grow: bool) -> tuple[_Forest, RowGroup]:
        """The prefixes of the answers under their memories, and where the rows of these lie."""
        rows = np.array(list(answers))
        slots = self.prefixes.tokens.shape[1]
        forest = _Forest(list(answers.values()), self._tokens[rows], self._parent[rows], slots, grow)
        return forest, group_by_device(rows, len(self._tokens), nearly_all=True)

    def _read(self, forest: _Forest, group: RowGroup) -> tuple[Array, Array]:
        """States and logsumexps [R,prefixes(,D)] of all prefixes of some memories, once the new ones are read.

        Few shapes, so that few programs are compiled (see `read_width`).
        """
        slots = self.prefixes.tokens.shape[1]
        width = read_width(forest.most_new, few=jax.default_backend() != "cpu")
        tokens, parent = np.zeros((group.count, width), np.int32), np.full((group.count, width), -1, np.int32)
        at = group.place[forest.new_row], forest.new_slot - slots
        tokens[at], parent[at] = forest.new_token, forest.new_parent
        whole = group.rows.tolist() == list(range(len(self._tokens)))
        new = (None if whole else group.local, tokens, parent)
        return extend_prefixes(self.graphdef, self.params, self.memory, self.prefixes, *new)

    def _path_logp(
        self,
        forest: _Forest,
        group: RowGroup,
        hidden: Array,
        logsumexp: Array,
        rows: Int[np.ndarray, " R"] | None,
    ) -> list[Float[np.ndarray, "_ T"]]:
        """The log-probabilities along each answer, by memory; `rows` of the states, None for all, are the group's."""
        edges = np.zeros((2, group.count, bucket_size(int(forest.edge.max(initial=-1)) + 1, 8)), np.int32)
        edges[:, group.place[forest.edge_row], forest.edge] = forest.edge_slot, forest.edge_token
        logp = np.asarray(edge_logp(self.graphdef, self.params, self.special, hidden, logsumexp, rows, *edges))
        return forest.by_row(forest.along_answers(logp[group.place]))


def read_width(most: int, few: bool) -> int:
    """How many columns stand for `most`: at most an eighth of them, or 15, are padding; with `few` a power of two.

    An accelerator compiles for seconds what it computes in milliseconds, a CPU the other way round.
    """
    step = max(16, 1 << (most - 1).bit_length() if few else 1 << max(0, most.bit_length() - 4))
    return -(-most // step) * step


class _Forest:
    """The prefixes of answers under R memories: the slots that hold them, which are new, and the edges along answers.

    All rows at once, in arrays: this is work of the host between programs of the device. A node is a prefix of some
    answer, whatever the row; its key is that of its parent and its last token, so that keys rise with nodes.
    """

    def __init__(
        self,
        answers: Sequence[Sequence[Tokens]],
        tokens: Int[np.ndarray, "R E"],
        parent: Int[np.ndarray, "R E"],
        first: int,
        grow: bool,
    ) -> None:
        """`answers` of each row; what its slots hold; and the slot from `first` on is for what is new.

        Without `grow` there is nothing new, and edges end where the prefixes cached end.
        """
        distinct: dict[Tokens, int] = {}
        number = np.array(
            [distinct.setdefault(y, len(distinct)) for row_answers in answers for y in row_answers], np.int64
        )
        self._ends = np.cumsum([len(row_answers) for row_answers in answers])
        row = np.repeat(np.arange(len(answers)), np.diff(self._ends, prepend=0))
        base = 2 + max(int(tokens.max()), max((token for y in distinct for token in y), default=0))
        by_answer, keys = _prefix_nodes(list(distinct), base)
        (up, token), nodes, count = np.divmod(keys, base), by_answer[number], len(keys)

        held = np.full(tokens.shape, -1)  # the node in each slot; that of the start token is slot 0
        held[:, 0] = 0
        for slot in range(1, tokens.shape[1]):
            above = np.where(parent[:, slot] >= 0, held[np.arange(len(held)), parent[:, slot]], -1)
            held[:, slot] = _find(keys, above * base + tokens[:, slot])
        in_row, slots = np.nonzero(held >= 0)
        cached, which = np.unique(in_row * count + held[in_row, slots], return_index=True)
        slot_of = slots[which]  # equal prefixes in two slots have equal states

        there = nodes >= 0
        if not grow:
            reached = _find(cached, row[:, None] * count + up[nodes]) >= 0
            there &= np.logical_and.accumulate(reached, axis=1)
        edges, index = np.unique((row[:, None] * count + nodes)[there], return_inverse=True)
        self.edge_row, node = np.divmod(edges, count)
        self.edge = np.arange(len(edges)) - np.searchsorted(self.edge_row, self.edge_row)  # counted in its row
        self.edge_token, states = token[node], self.edge_row * count + up[node]
        new = np.setdiff1d(states, cached)
        self.new_row, node = np.divmod(new, count)
        self.new_slot = first + np.arange(len(new)) - np.searchsorted(self.new_row, self.new_row)
        every, place = np.concatenate([cached, new]), np.concatenate([slot_of, self.new_slot])
        order = np.argsort(every)

        def find_slot(of: np.ndarray) -> np.ndarray:
            return place[order[np.searchsorted(every, of, sorter=order)]]

        self.new_token, self.new_parent = token[node], find_slot(self.new_row * count + up[node])
        self.most_new = int(self.new_slot.max(initial=first - 1)) + 1 - first  # under one memory
        self.edge_slot = find_slot(states)
        self.whole = there.sum(axis=1) == (nodes >= 0).sum(axis=1)  # of each answer, whether edges lead to its end
        self._row, self._there, self._paths = row, there, np.zeros(nodes.shape, np.int64)
        self._paths[there] = self.edge[index]

    def along_answers(self, logp: Float[np.ndarray, "R edges"]) -> Float[np.ndarray, "_ T"]:
        """The values of the edges along every answer; 0 beyond the last."""
        return np.where(self._there, logp[self._row[:, None], self._paths], np.float32(0))

    def by_row(self, values: np.ndarray) -> list[np.ndarray]:
        """What there is of every answer, row by row."""
        return [values[start:end] for start, end in pairwise([0, *self._ends.tolist()])]


def _prefix_nodes(answers: Sequence[Tokens], base: int) -> tuple[Int[np.ndarray, "A T"], Int[np.ndarray, " N"]]:
    """The nodes of the prefixes of each answer, −1 beyond its end; and the keys of all nodes, −1 of the empty prefix.

    A key is the parent's number · `base` + the last token, which is below `base` − 1.
    """
    lengths = np.array([len(y) for y in answers], np.int64)
    nodes, keys = np.full((len(answers), lengths.max(initial=0)), -1), np.array([-1])
    tokens, last = np.zeros_like(nodes), np.zeros_like(lengths)
    tokens[np.arange(nodes.shape[1]) < lengths[:, None]] = [token for y in answers for token in y]
    for step in range(nodes.shape[1]):
        goes_on = lengths > step
        found, index = np.unique(last[goes_on] * base + tokens[goes_on, step], return_inverse=True)
        last[goes_on] = nodes[goes_on, step] = len(keys) + index
        keys = np.append(keys, found)
    return nodes, keys


def _find(keys: Int[np.ndarray, " N"], sought: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Where in the rising keys the wanted ones stand; −1 for those that do not."""
    at = np.minimum(np.searchsorted(keys, sought), len(keys) - 1)
    return np.where(keys[at] == sought, at, -1)


@partial(jax.jit, static_argnums=0)
def extend_prefixes(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    prefixes: PrefixCache,
    rows: Int[Array, " R"] | None,
    tokens: Int[Array, "R M"],
    parent: Int[Array, "R M"],
) -> tuple[Float[Array, "R prefixes D"], Float[Array, "R prefixes"]]:
    """Reads M more prefixes beside those in the caches of some memories: states and logsumexps of all.

    `rows` are the memories, or None for all; `parent` is the slot of the prefix without its last token, −1 for what
    fills up.
    """

    def read(
        params: Params, memory: DocumentMemory, prefixes: PrefixCache, rows: Array | None, *new: Array
    ) -> tuple[Array, Array]:
        if rows is not None:
            memory, prefixes = memory.take(rows), prefixes.take(rows)
        return _extend(nnx.merge(graph, params), memory, prefixes, *new)

    return by_device(read, params, memory, prefixes, rows, tokens, parent)


def _extend(
    generator: Generator,
    memory: DocumentMemory,
    prefixes: PrefixCache,
    tokens: Int[Array, "R M"],
    parent: Int[Array, "R M"],
) -> tuple[Float[Array, "R prefixes D"], Float[Array, "R prefixes"]]:
    more, past = tokens.shape[1], prefixes.past

    def room(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)])

    slots = prefixes.tokens.shape[1]
    pool = KVCache(room(past.keys, 2), room(past.values, 2), room(past.positions, 1), jnp.asarray(slots, jnp.int32))
    seen = _ancestors(jnp.concatenate([prefixes.parent, parent], axis=1), slots)
    positions = seen.sum(axis=-1, dtype=jnp.int32) - 1
    hidden, _ = generator.forward_with_cache(memory, pool, tokens[:, None], positions[:, None], seen[:, None])
    hidden = hidden[:, 0]
    logsumexp, _ = generator.vocab_head().logsumexp_and_mean(hidden)
    return (
        jnp.concatenate([prefixes.hidden, hidden], axis=1),
        jnp.concatenate([prefixes.logsumexp, logsumexp], axis=1),
    )


def _ancestors(parent: Int[Array, "R prefixes"], first: int) -> Bool[Array, "R M prefixes"]:
    """Which slots lie on the way from each slot, from `first` on, to the start token: its own, too."""
    rows, slots = parent.shape

    def up(state: tuple[Array, Array]) -> tuple[Array, Array]:
        at, seen = state
        above = jnp.take_along_axis(parent, jnp.maximum(at, 0), axis=1)
        return jnp.where(at >= 0, above, -1), seen | (at[..., None] == jnp.arange(slots))

    own = jnp.broadcast_to(jnp.arange(first, slots, dtype=jnp.int32), (rows, slots - first))
    start = own, jnp.zeros((*own.shape, slots), bool)
    return jax.lax.while_loop(lambda state: (state[0] >= 0).any(), up, start)[1]


@partial(jax.jit, static_argnums=(0, 2))
def edge_logp(
    graph: nnx.GraphDef,
    params: Params,
    special: SpecialTokens,
    hidden: Float[Array, "n prefixes D"],
    logsumexp: Float[Array, "n prefixes"],
    rows: Int[Array, " R"] | None,
    slot: Int[Array, "R edges"],
    token: Int[Array, "R edges"],
) -> Float[Array, "R edges"]:
    """log p(token | the prefix in a slot); of `special.eos`, that the answer ends there. `rows` None stands for all."""

    def along(params: Params, hidden: Array, logsumexp: Array, rows: Array | None, slot: Array, token: Array) -> Array:
        row = (jnp.arange(slot.shape[0]) if rows is None else rows)[:, None]
        logits = event_logits(nnx.merge(graph, params).vocab_head(), hidden[row, slot], token, special)
        return logits - logsumexp[row, slot]

    return by_device(along, params, hidden, logsumexp, rows, slot, token)
