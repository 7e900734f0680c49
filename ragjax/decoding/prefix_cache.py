"""The prefixes that a beam search reads under each document, and the scores of candidates computed from them.

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
from ragjax.parallel.by_device import RowGroup, by_device, group_by_device

Tokens = tuple[int, ...]
MOST_NEW = 512  # prefixes a memory that are read together: what they take of memory grows with their square


@struct.dataclass
class PrefixCache:
    """The prefixes that were read after each of n memories: each is one slot, that of its last token."""

    past: KVCache
    tokens: Int[Array, "n P"]
    parent: Int[Array, "n P"]  # the slot of the prefix without its last token; -1 for the start token, and unwritten
    hidden: Float[Array, "n P D"]
    logsumexp: Float[Array, "n P"]  # of the logits of what follows

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
    attention_mask: Bool[Array, "n W P"],
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
        self._tokens, self._parent = tokens[:, :used].tolist(), parent[:, :used].tolist()

    def bounds(self, answers: Mapping[int, Sequence[Tokens]]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """By memory: upper bounds on log p(y|x,z) (nats) of its answers, and whether they are exact; nothing is read.

        An answer is never likelier than a prefix of it, so the log-probability of its longest cached prefix is a bound.
        It is exact where all T − 1 prefixes of an answer of T tokens are cached.
        """
        if not answers:
            return {}
        trees = [self._tree(row) for row in answers]
        paths = [[tree.path(y, False) for y in ys] for tree, ys in zip(trees, answers.values(), strict=True)]
        group = group_by_device(list(answers), len(self._tokens), nearly_all=True)
        logp = self._path_logp(trees, paths, group, self.prefixes.hidden, self.prefixes.logsumexp, group.local)
        return {
            row: (
                np.array([steps.sum() for steps in by_answer], np.float32),
                np.array([len(steps) == len(y) for steps, y in zip(by_answer, answers[row], strict=True)], bool),
            )
            for row, by_answer in zip(answers, logp, strict=True)
        }

    def score(self, answers: Mapping[int, Sequence[Tokens]]) -> dict[int, list[Float[np.ndarray, " T"]]]:
        """By memory: log p(y_t|y_<t,x,z) (nats) of each answer. Prefixes not cached are read, each once, together.

        Of long answers that is more than fits: they are read in several passes, of `MOST_NEW` prefixes a memory.
        """
        passes = {row: self._passes(row, by_row) for row, by_row in answers.items()}
        scores = {row: [np.zeros(0, np.float32)] * len(by_row) for row, by_row in answers.items()}
        for number in range(max(map(len, passes.values()), default=0)):
            parts = {row: own[number] for row, own in passes.items() if number < len(own)}
            trees, paths = [tree for tree, _ in parts.values()], [list(by.values()) for _, by in parts.values()]
            group = group_by_device(list(parts), len(self._tokens), nearly_all=True)
            most = max(len(tree.new) for tree in trees)
            if most == 0:
                read, rows = (self.prefixes.hidden, self.prefixes.logsumexp), group.local
            else:
                read, rows = self._read(group, trees, most), None
            for (row, (_, by_answer)), logp in zip(
                parts.items(), self._path_logp(trees, paths, group, *read, rows), strict=True
            ):
                for i, steps in zip(by_answer, logp, strict=True):
                    scores[row][i] = steps
        return scores

    def _tree(self, row: int) -> _Tree:
        return _Tree(self._tokens[row], self._parent[row], self.prefixes.tokens.shape[1])

    def _passes(self, row: int, answers: Sequence[Tokens]) -> list[tuple[_Tree, dict[int, list[int]]]]:
        """For each pass under a memory a tree, and the path along each of its answers by number."""
        passes: list[tuple[_Tree, dict[int, list[int]]]] = []
        for i in sorted(range(len(answers)), key=answers.__getitem__):  # those that share prefixes together
            tree = passes[-1][0] if passes else None
            if tree is None or (tree.new and len(tree.new) + tree.lacks(answers[i]) > MOST_NEW):
                passes.append((tree := self._tree(row), {}))
            passes[-1][1][i] = tree.path(answers[i], True)
        return passes

    def _read(self, group: RowGroup, trees: Sequence[_Tree], most: int) -> tuple[Array, Array]:
        """States and logsumexps [R,Q(,D)] of all prefixes of some memories, once the new ones of `trees` are read.

        Few shapes, so that few programs are compiled (see `read_width`).
        """
        count, slots = group.count, self.prefixes.tokens.shape[1]
        width = read_width(most, few=jax.default_backend() != "cpu")
        tokens, positions = np.zeros((2, count, width), np.int32)
        attention_mask = np.zeros((count, width, slots + width), bool)
        for r, tree in zip(group.place, trees, strict=True):
            tree.write(tokens[r], positions[r], attention_mask[r])
        # each sees itself, and what fills up sees nothing else
        attention_mask[:, np.arange(width), slots + np.arange(width)] = True
        whole = group.rows.tolist() == list(range(len(self._tokens)))
        new = (None if whole else group.local, tokens, positions, attention_mask)
        return extend_prefixes(self.graphdef, self.params, self.memory, self.prefixes, *new)

    def _path_logp(
        self,
        trees: Sequence[_Tree],
        paths: Sequence[list[list[int]]],
        group: RowGroup,
        hidden: Array,
        logsumexp: Array,
        rows: Int[np.ndarray, " R"] | None,
    ) -> list[list[Float[np.ndarray, " T"]]]:
        """The log-probabilities along each path, by tree; `rows` of the states, None for all, are the group's."""
        edges = np.zeros((2, group.count, bucket_size(max(len(tree.edges) for tree in trees), 8)), np.int32)
        for r, tree in zip(group.place, trees, strict=True):
            edges[:, r, : len(tree.edges)] = np.array(list(tree.edges), np.int32).reshape(-1, 2).T
        logp = np.asarray(edge_logp(self.graphdef, self.params, self.special, hidden, logsumexp, rows, *edges))
        return [[logp[r][path] for path in by_answer] for r, by_answer in zip(group.place, paths, strict=True)]


def read_width(most: int, few: bool) -> int:
    """How many columns stand for `most`: at most an eighth of them, or 15, are padding; with `few` a power of two.

    An accelerator compiles for seconds what it computes in milliseconds, a CPU the other way round.
    """
    step = max(16, 1 << (most - 1).bit_length() if few else 1 << max(0, most.bit_length() - 4))
    return -(-most // step) * step


class _Tree:
    """The prefixes cached under one memory, new ones that must be read, and the edges along which answers lead."""

    def __init__(self, tokens: Sequence[int], parent: Sequence[int], first: int) -> None:
        """Slots from `first` on are for new prefixes."""
        self.parent, self.first = parent, first
        # equal prefixes in two slots have equal states
        self.children = {(p, t): slot for slot, (p, t) in enumerate(zip(parent, tokens, strict=True)) if p >= 0}
        self.new: list[tuple[int, int]] = []  # parent and token
        self.edges: dict[tuple[int, int], int] = {}  # slot of a prefix and the token after it

    def lacks(self, answer: Tokens) -> int:
        """How many prefixes of an answer it does not have."""
        slot = 0
        for length, token in enumerate(answer[:-1]):
            if (child := self.children.get((slot, token))) is None:
                return len(answer) - 1 - length
            slot = child
        return 0

    def path(self, answer: Tokens, grow: bool) -> list[int]:
        """The edges along an answer; without `grow`, as far as its prefixes are cached."""
        path, slot = [], 0
        for token in answer:
            path.append(self.edges.setdefault((slot, token), len(self.edges)))
            if len(path) == len(answer):
                break
            child = self.children.get((slot, token))
            if child is None:
                if not grow:
                    break
                child = self.children[slot, token] = self.first + len(self.new)
                self.new.append((slot, token))
            slot = child
        return path

    def write(self, tokens: np.ndarray, positions: np.ndarray, attention_mask: np.ndarray) -> None:
        """Writes the new prefixes into rows of M: tokens, their positions, and which slots [M,P+M] each sees."""
        for m, (parent, token) in enumerate(self.new):
            if parent >= self.first:
                attention_mask[m] |= attention_mask[parent - self.first]
            else:
                slot = parent
                while slot >= 0:
                    attention_mask[m, slot] = True
                    slot = self.parent[slot]
            tokens[m], positions[m] = token, attention_mask[m].sum()
            attention_mask[m, self.first + m] = True


@partial(jax.jit, static_argnums=0)
def extend_prefixes(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    prefixes: PrefixCache,
    rows: Int[Array, " R"] | None,
    tokens: Int[Array, "R M"],
    positions: Int[Array, "R M"],
    attention_mask: Bool[Array, "R M Q"],
) -> tuple[Float[Array, "R Q D"], Float[Array, "R Q"]]:
    """Reads M more prefixes beside the P cached ones of some memories: states and logsumexps of all Q = P + M.

    `rows` are the memories, or None for all; `attention_mask` says which of the Q slots each new token sees, its own
    included.
    """

    def read(
        params: Params, memory: DocumentMemory, prefixes: PrefixCache, rows: Array | None, *new: Array
    ) -> tuple[Array, Array]:
        if rows is not None:
            memory, prefixes = memory.take(rows), prefixes.take(rows)
        return _extend(nnx.merge(graph, params), memory, prefixes, *new)

    return by_device(read, params, memory, prefixes, rows, tokens, positions, attention_mask)


def _extend(
    generator: Generator,
    memory: DocumentMemory,
    prefixes: PrefixCache,
    tokens: Int[Array, "R M"],
    positions: Int[Array, "R M"],
    attention_mask: Bool[Array, "R M Q"],
) -> tuple[Float[Array, "R Q D"], Float[Array, "R Q"]]:
    more, past = tokens.shape[1], prefixes.past

    def room(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)])

    slots = prefixes.tokens.shape[1]
    pool = KVCache(room(past.keys, 2), room(past.values, 2), room(past.positions, 1), jnp.asarray(slots, jnp.int32))
    hidden, _ = generator.forward_with_cache(memory, pool, tokens[:, None], positions[:, None], attention_mask[:, None])
    hidden = hidden[:, 0]
    logsumexp, _ = generator.vocab_head().logsumexp_and_mean(hidden)
    return (
        jnp.concatenate([prefixes.hidden, hidden], axis=1),
        jnp.concatenate([prefixes.logsumexp, logsumexp], axis=1),
    )


@partial(jax.jit, static_argnums=(0, 2))
def edge_logp(
    graph: nnx.GraphDef,
    params: Params,
    special: SpecialTokens,
    hidden: Float[Array, "n Q D"],
    logsumexp: Float[Array, "n Q"],
    rows: Int[Array, " R"] | None,
    slot: Int[Array, "R E"],
    token: Int[Array, "R E"],
) -> Float[Array, "R E"]:
    """log p(token | the prefix in a slot); of `special.eos`, that the answer ends there. `rows` None stands for all."""

    def along(params: Params, hidden: Array, logsumexp: Array, rows: Array | None, slot: Array, token: Array) -> Array:
        row = (jnp.arange(slot.shape[0]) if rows is None else rows)[:, None]
        logits = event_logits(nnx.merge(graph, params).vocab_head(), hidden[row, slot], token, special)
        return logits - logsumexp[row, slot]

    return by_device(along, params, hidden, logsumexp, rows, slot, token)
