"""The tree of prefixes that a beam search reads under each document, and what it says of candidates afterwards.

    log p(y|x,z) = Σ_t [ logit(y_t | y_<t, x, z) − log Σ_v exp logit(v | y_<t, x, z) ]

Whatever prefix a beam search has read under z, its state is kept. A candidate that another document proposed shares
some prefixes with it: these are not read again, and the others, each of them once, in one padded pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from ragjax.models.generator import Generator, SpecialTokens, event_logits
from ragjax.models.kv_cache import DocumentMemory, KVCache, empty_kv_cache
from ragjax.models.layers import Params
from ragjax.padding import bucket_size

Tokens = tuple[int, ...]


@struct.dataclass
class PrefixCache:
    """The prefixes that were read after each of n memories: each is one slot, that of its last token."""

    past: KVCache
    tokens: Int[Array, "n P"]
    parent: Int[Array, "n P"]  # the slot of the prefix without its last token; -1 for the start token, and unwritten
    hidden: Float[Array, "n P D"]
    normalizer: Float[Array, "n P"]  # logsumexp of the logits of what follows

    def take(self, rows: Int[Array, " R"]) -> PrefixCache:
        """What was read after some of the memories."""
        others = (x[rows] for x in (self.tokens, self.parent, self.hidden, self.normalizer))
        return PrefixCache(self.past.take(rows), *others)

    def put(self, rows: Int[Array, " R"], part: PrefixCache) -> PrefixCache:
        """With what was read after some of the memories; the others read nothing meanwhile."""

        def put(name: str) -> Array:
            return getattr(self, name).at[rows].set(getattr(part, name))

        of_rows = {name: put(name) for name in ("tokens", "parent", "hidden", "normalizer")}
        return replace(self, past=self.past.put(rows, part.past), **of_rows)


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
    visible: Bool[Array, "n W P"],
) -> tuple[Float[Array, "n W V"], PrefixCache]:
    """One step of W beams: log-probabilities of what follows `tokens`, which stand at position `step`."""
    first, past = prefixes.past.filled, prefixes.past
    positions = jnp.broadcast_to(step, (1, tokens.shape[1], 1))
    hidden, after = generator.forward_with_cache(memory, past, tokens[:, :, None], positions, visible[:, :, None, :])
    assert after is not None
    hidden = hidden[:, :, 0]
    logits = generator.logits(hidden)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    slots = jnp.arange(visible.shape[-1])
    parent = jnp.where(visible & (slots < first), slots, -1).max(axis=-1)

    def written(into: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(into, new, (0, first, *[0] * (new.ndim - 2)))

    kept = PrefixCache(
        after,
        written(prefixes.tokens, tokens),
        written(prefixes.parent, parent),
        written(prefixes.hidden, hidden),
        written(prefixes.normalizer, normalizer),
    )
    return logits - normalizer[..., None], kept


class PrefixScorer:
    """What beam searches know of any answer under n memories, and what else must be read to know all. On the host."""

    def __init__(
        self, graph: nnx.GraphDef, params: Params, memory: DocumentMemory, prefixes: PrefixCache, special: SpecialTokens
    ) -> None:
        self.graphdef, self.params, self.memory, self.prefixes, self.special = graph, params, memory, prefixes, special
        filled, tokens, parent = jax.device_get((prefixes.past.filled, prefixes.tokens, prefixes.parent))
        self._tokens, self._parent = tokens[:, :filled].tolist(), parent[:, :filled].tolist()

    def bounds(self, wanted: Mapping[int, Sequence[Tokens]]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """By memory: the log-probability of each answer's longest known prefix, and whether that is all of it.

        An answer of T tokens is known where its first T − 1 were read, and never is it likelier than a prefix of it.
        """
        if not wanted:
            return {}
        trees, paths = self._trees(wanted, grow=False)
        rows = np.array(list(wanted), np.int32)
        logp = self._along(trees, paths, self.prefixes.hidden[rows], self.prefixes.normalizer[rows])
        return {
            row: (
                np.array([of_answer.sum() for of_answer in of_row], np.float32),
                np.array([len(of_answer) == len(y) for of_answer, y in zip(of_row, answers, strict=True)], bool),
            )
            for (row, answers), of_row in zip(wanted.items(), logp, strict=True)
        }

    def score(self, wanted: Mapping[int, Sequence[Tokens]]) -> dict[int, list[Float[np.ndarray, " T"]]]:
        """By memory: log p(y_t|y_<t,x,z) of each answer. Prefixes not yet read are read now, each once, in one pass."""
        if not wanted:
            return {}
        trees, paths = self._trees(wanted, grow=True)
        rows, most = list(wanted), max((len(tree.new) for tree in trees), default=0)
        # few shapes, so that few programs are compiled; rows that fill up repeat the first
        whole = rows == list(range(len(self._tokens)))
        chosen = np.array(rows + ([] if whole else rows[:1] * (bucket_size(len(rows)) - len(rows))), np.int32)
        if most == 0:
            hidden, normalizer = self.prefixes.hidden[np.array(rows)], self.prefixes.normalizer[np.array(rows)]
        else:
            count, slots = len(chosen), self.prefixes.tokens.shape[1]
            step = max(16, 1 << max(0, most.bit_length() - 4))  # at most an eighth, or 15, is padding
            width = -(-most // step) * step
            tokens, positions = np.zeros((2, count, width), np.int32)
            visible = np.zeros((count, width, slots + width), bool)
            for r, tree in enumerate(trees):
                tree.write(tokens[r], positions[r], visible[r])
            visible[:, np.arange(width), slots + np.arange(width)] = True  # itself, as what fills up sees nothing else
            further = (None if whole else chosen, tokens, positions, visible)
            hidden, normalizer = extend_prefixes(self.graphdef, self.params, self.memory, self.prefixes, *further)
        return dict(zip(rows, self._along(trees, paths, hidden, normalizer), strict=True))

    def unread(self, wanted: Mapping[int, Sequence[Tokens]]) -> int:
        """How many prefixes `score` has to read for these answers, under all of the memories together."""
        return sum(len(tree.new) for tree in self._trees(wanted, grow=True)[0])

    def _trees(self, wanted: Mapping[int, Sequence[Tokens]], grow: bool) -> tuple[list[_Tree], list[list[list[int]]]]:
        slots = self.prefixes.tokens.shape[1]
        trees = [_Tree(self._tokens[row], self._parent[row], slots) for row in wanted]
        return trees, [[tree.path(y, grow) for y in of] for tree, of in zip(trees, wanted.values(), strict=True)]

    def _along(
        self, trees: Sequence[_Tree], paths: Sequence[list[list[int]]], hidden: Array, normalizer: Array
    ) -> list[list[Float[np.ndarray, " T"]]]:
        """The log-probabilities along paths, by tree."""
        edges = np.zeros((2, hidden.shape[0], bucket_size(max(len(tree.edges) for tree in trees), 8)), np.int32)
        for r, tree in enumerate(trees):
            edges[:, r, : len(tree.edges)] = np.array(list(tree.edges), np.int32).reshape(-1, 2).T
        logp = np.asarray(edge_logp(self.graphdef, self.params, self.special, hidden, normalizer, *edges))
        return [[of_row[path] for path in of_tree] for of_row, of_tree in zip(logp, paths, strict=False)]


class _Tree:
    """The prefixes known under one memory, those that are needed besides, and the edges along which answers lead."""

    def __init__(self, tokens: Sequence[int], parent: Sequence[int], first: int) -> None:
        """Slots from `first` on are for what is needed besides."""
        self.parent, self.first = parent, first
        # equal prefixes in two slots have equal states
        self.children = {(p, t): slot for slot, (p, t) in enumerate(zip(parent, tokens, strict=True)) if p >= 0}
        self.new: list[tuple[int, int]] = []  # parent and token
        self.edges: dict[tuple[int, int], int] = {}  # slot of a prefix and the token after it

    def path(self, answer: Tokens, grow: bool) -> list[int]:
        """The edges along an answer; without `grow`, as far as its prefixes are known."""
        found, at = [], 0
        for token in answer:
            found.append(self.edges.setdefault((at, token), len(self.edges)))
            if len(found) == len(answer):
                break
            after = self.children.get((at, token))
            if after is None:
                if not grow:
                    break
                after = self.children[at, token] = self.first + len(self.new)
                self.new.append((at, token))
            at = after
        return found

    def write(self, tokens: np.ndarray, positions: np.ndarray, visible: np.ndarray) -> None:
        """What is needed besides, into rows of M: tokens, their positions, and which slots [M,P+M] each sees."""
        for m, (parent, token) in enumerate(self.new):
            if parent >= self.first:
                visible[m] |= visible[parent - self.first]
            else:
                slot = parent
                while slot >= 0:
                    visible[m, slot] = True
                    slot = self.parent[slot]
            tokens[m], positions[m] = token, visible[m].sum()
            visible[m, self.first + m] = True


@partial(jax.jit, static_argnums=0)
def extend_prefixes(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    prefixes: PrefixCache,
    rows: Int[Array, " R"] | None,
    tokens: Int[Array, "R M"],
    positions: Int[Array, "R M"],
    visible: Bool[Array, "R M Q"],
) -> tuple[Float[Array, "R Q D"], Float[Array, "R Q"]]:
    """Reads M more prefixes beside the P known ones of some memories, Q = P + M in all: every state and normalizer.

    `rows` are the memories, or None for all; `visible` says which of the Q slots each new token sees, its own included.
    """
    if rows is not None:
        memory, prefixes = memory.take(rows), prefixes.take(rows)
    more, past, generator = tokens.shape[1], prefixes.past, nnx.merge(graph, params)

    def room(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)])

    slots = prefixes.tokens.shape[1]
    pool = KVCache(room(past.keys, 2), room(past.values, 2), room(past.positions, 1), jnp.asarray(slots, jnp.int32))
    hidden, _ = generator.forward_with_cache(memory, pool, tokens[:, None], positions[:, None], visible[:, None])
    hidden = hidden[:, 0]
    normalizer, _ = generator.vocab_logsumexp(hidden)
    return (
        jnp.concatenate([prefixes.hidden, hidden], axis=1),
        jnp.concatenate([prefixes.normalizer, normalizer], axis=1),
    )


@partial(jax.jit, static_argnums=(0, 2))
def edge_logp(
    graph: nnx.GraphDef,
    params: Params,
    special: SpecialTokens,
    hidden: Float[Array, "R Q D"],
    normalizer: Float[Array, "R Q"],
    slot: Int[Array, "R E"],
    token: Int[Array, "R E"],
) -> Float[Array, "R E"]:
    """log p(token | the prefix in a slot); of `special.eos`, that the answer ends there."""
    states = jnp.take_along_axis(hidden, slot[..., None], axis=1)
    logits = event_logits(nnx.merge(graph, params), states, token, special)
    return logits - jnp.take_along_axis(normalizer, slot, axis=1)
