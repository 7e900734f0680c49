"""Passages that the generator read once, kept for all questions that retrieve them.

A decoder-only model reads from left to right. In a prompt that begins with the passage, the keys and values of

    head + passage | middle + question + tail

left of the bar do not depend on the question. They stay in a pool with a slot for each passage, and only what is right
of the bar is read for a question. The sum is the same: others approximate this for prompts of several passages.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from ragjax.config import most_documents
from ragjax.data.passage_store import PassageStore
from ragjax.decoding.propose import prefill_documents
from ragjax.errors import InputError
from ragjax.models.generator import Generator
from ragjax.models.kv_cache import DocumentMemory, empty_kv_cache
from ragjax.models.layers import Params
from ragjax.padding import Ids, length_buckets, pad_sequences, pick_bucket
from ragjax.parallel.by_device import by_device, on_mesh
from ragjax.parallel.processes import allgather_text
from ragjax.parallel.sharding import heads_spec, shard_batch
from ragjax.rag import RagModel
from ragjax.terminal import terminal


class Pool(NamedTuple):
    """Keys and values of passages; every device has its own slots, which it counts from 0."""

    keys: Float[Array, "L slots P Hkv Dh"]
    values: Float[Array, "L slots P Hkv Dh"]


@dataclass
class PassageCacheStatistics:
    """What a cache was asked for, and what it spared. Prompts that only fill up a batch do not count."""

    passages: int = 0  # one for each prompt
    hits: int = 0  # read before, or for another prompt of the batch
    tokens: int = 0  # of all prompts
    tokens_read: int = 0

    @property
    def hit_rate(self) -> float | None:
        """The share of passages that were there; None before the first."""
        return self.hits / self.passages if self.passages else None

    @property
    def tokens_saved(self) -> float | None:
        """The share of the prompts' tokens that were not read; a passage cut to fit is read whole, for others."""
        return 1 - self.tokens_read / self.tokens if self.tokens else None

    def as_json(self) -> dict[str, int | float | None]:
        """The counts and both shares."""
        return asdict(self) | {"hit_rate": self.hit_rate, "tokens_saved": self.tokens_saved}

    def sum_over_processes(self) -> PassageCacheStatistics:
        """The sums over all processes, each of which calls it."""
        counts = [json.loads(text) for text in allgather_text(json.dumps(astuple(self)))]
        return PassageCacheStatistics(*map(sum, zip(*counts, strict=True)))


class PassageKVCache:
    """Keys and values of passages under one set of parameters; on each device, those of its own questions.

    The passages asked for least recently leave. Answers are those of reading anew, up to rounding.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        params: Params,
        mesh: Mesh,
        beginning: Callable[[int], Ids],
        width: int,
        slots: int,
    ) -> None:
        """A pool with nothing in it.

        Args:
            graph: the generator's, decoder only.
            params: the generator's.
            mesh: over whose axis `data` prompts are split.
            beginning: the first tokens of every prompt with the passage of a number, whole (-1: with none).
            width: the most tokens of these that a prompt can have.
            slots: passages on each device.
        """
        self.graph, self.params, self.mesh = graph, params, mesh
        self.width, self.slots, self.statistics = width, slots, PassageCacheStatistics()
        self._beginning, self._lock = beginning, threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forgets all passages."""
        self._pool: Pool | None = None
        # by device: passage → slot, the one asked for least recently first
        self._slots: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(self.mesh.shape["data"])]

    @property
    def size(self) -> int:
        """Bytes on each device, once something was read."""
        return sum(array.addressable_data(0).nbytes for array in self._pool or ())

    def read(
        self,
        source: Int[np.ndarray, "n S"],
        mask: Bool[np.ndarray, "n S"],
        passages: Int[np.ndarray, " n"],
        lengths: Int[np.ndarray, " n"],
    ) -> DocumentMemory:
        """The memory that `prefill_documents` gives of n right-padded prompts; what the mask hides may differ.

        Args:
            source: the prompts.
            mask: true on their tokens.
            passages: the passage with which each begins, by its number.
            lengths: how many of its tokens come before what depends on the question.
        """
        by_device = passages.reshape(self.mesh.shape["data"], -1)
        prompts = shard_batch(self.mesh, (source, mask, lengths.astype(np.int32)), len(source))
        after = int((mask.sum(axis=1) - lengths).min()), int((mask.sum(axis=1) - lengths).max())
        fits = after[0] >= 1 and lengths.max() <= self.width  # a question may have no tokens
        if not fits or any(len(set(row)) > self.slots for row in by_device.tolist()):
            with on_mesh(self.mesh):
                return prefill_documents(self.graph, self.params, *prompts[:2])
        with self._lock, on_mesh(self.mesh):
            try:
                slots, missing = self._assign(by_device)
                read = self._read_missing(missing, rows=-(-by_device.shape[1] // 4))
                self._count(source, mask, by_device, lengths, missing, read)
                [at] = shard_batch(self.mesh, (slots.reshape(-1),), len(source))
                width = pick_bucket(after[1] - 1, (8, 16, 24, *length_buckets(max(32, source.shape[1]))))
                return join_question(self.graph, self.params, self._pool, at, *prompts, width)
            except BaseException:  # the pool may lack what its slots promise
                self.clear()
                raise

    def _assign(self, passages: Int[np.ndarray, "devices n"]) -> tuple[Int[np.ndarray, "devices n"], list[dict]]:
        """A slot for each passage, and by device the slots of those that are not there: passage → slot."""
        missing: list[dict[int, int]] = []
        for order, own in zip(self._slots, passages.tolist(), strict=True):
            for passage in own:
                if passage in order:
                    order.move_to_end(passage)
            missing.append({})
            for passage in own:
                if passage not in order:
                    slot = len(order) if len(order) < self.slots else order.popitem(last=False)[1]
                    order[passage] = missing[-1][passage] = slot
        slots = [[order[p] for p in own] for order, own in zip(self._slots, passages.tolist(), strict=True)]
        return np.array(slots, np.int32), missing

    def _read_missing(self, missing: Sequence[dict[int, int]], rows: int) -> dict[int, int]:
        """Reads passages into their slots, on each device so many rows at a time; passage → its tokens.

        One number of rows whatever is missing, and few widths, so that few programs are compiled.
        """
        tokens = {p: np.asarray(self._beginning(p))[: self.width] for device in missing for p in device}
        if self._pool is None:
            self._pool = _empty_pool(self.graph, self.mesh, self.params, self.width, self.slots)
        queues = [sorted(device, key=lambda p: -len(tokens[p])) for device in missing]  # alike ones are padded least
        for start in range(0, max(map(len, queues)), rows):
            chunk = [queue[start : start + rows] for queue in queues]
            texts, slots = [], np.full((len(chunk), rows), self.slots, np.int32)  # what fills up is written nowhere
            for d, passages in enumerate(chunk):
                texts += [tokens[p] for p in passages] + [()] * (rows - len(passages))
                slots[d, : len(passages)] = [missing[d][p] for p in passages]
            width = pick_bucket(max(map(len, texts)), length_buckets(self.width))
            arrays = shard_batch(self.mesh, (*pad_sequences(texts, width, 0), slots.reshape(-1)), slots.size)
            self._pool = read_passages(self.graph, self.params, self._pool, *arrays)
        return {p: len(ids) for p, ids in tokens.items()}

    def _count(
        self,
        source: Int[np.ndarray, "n S"],
        mask: Bool[np.ndarray, "n S"],
        passages: Int[np.ndarray, "devices _"],
        lengths: Int[np.ndarray, " n"],
        missing: Sequence[dict[int, int]],
        read: dict[int, int],
    ) -> None:
        """Adds a batch to the statistics, each prompt once."""
        prompts = np.column_stack([passages.reshape(-1), np.where(mask, source, -1)])
        first = np.unique(prompts, axis=0, return_index=True)[1]
        distinct = {(int(row // passages.shape[1]), int(passages.reshape(-1)[row])) for row in first}
        misses = [p for d, p in distinct if p in missing[d]]
        self.statistics.passages += len(first)
        self.statistics.hits += len(first) - len(misses)
        self.statistics.tokens += int(mask[first].sum())
        self.statistics.tokens_read += int(mask[first].sum() - lengths[first].sum()) + sum(read[p] for p in misses)


def passage_cache_problem(rag: RagModel) -> str | None:
    """Why this generator's memory of a passage depends on the question, in words, or None."""
    if rag.generator.config.encoder_decoder:
        return "an encoder–decoder reads passage and question together"
    if rag.prompt.question_first:
        return "the question stands before the passage in generator.prompt_template"
    return None


def check_passage_cache(rag: RagModel, store: PassageStore, mesh: Mesh) -> None:
    """Says why there is no cache although the configuration has room for one. Raises `InputError` for too little room.

    Too little is less than the passages that one batch of questions may retrieve.
    """
    if rag.config.decode.passage_cache_gib and (why := passage_cache_problem(rag)):
        terminal.print(f"decode.passage_cache_gib has no effect: {why}", soft_wrap=True)
    elif rag.config.decode.passage_cache_gib:
        _pool_size(rag, store, mesh)


def open_passage_cache(rag: RagModel, params: Params, store: PassageStore, mesh: Mesh) -> PassageKVCache | None:
    """A cache with nothing in it, of the generator's `params`; None where the configuration or the prompt has none.

    Raises `InputError` as `check_passage_cache` does.
    """
    if not rag.config.decode.passage_cache_gib or passage_cache_problem(rag):
        return None

    def beginning(passage: int) -> Ids:
        return np.array([*rag.prompt.head, *(store.tokens(passage) if passage >= 0 else ())], np.int32)

    return PassageKVCache(rag.generator.graphdef, params, mesh, beginning, *_pool_size(rag, store, mesh))


def _pool_size(rag: RagModel, store: PassageStore, mesh: Mesh) -> tuple[int, int]:
    """The tokens of a slot, and the slots on each device."""
    config, prompt, model = rag.config, rag.prompt, rag.generator
    room = config.generator.max_prompt_tokens - len(prompt.middle) - len(prompt.tail) - 1
    width = max(1, min(room, len(prompt.head) + store.longest))
    shapes, count = _slot_shapes(model.graphdef, model.abstract_params, width), len(store) + 1  # one for no passage
    parts = mesh.shape["model"] if "model" in heads_spec(mesh, shapes[0].shape[3]) else 1
    each = sum(s.size * s.dtype.itemsize for s in shapes) // parts
    slots = int(config.decode.passage_cache_gib * 2**30) // each
    needed = min(count, config.evaluate.batch_size * most_documents(config))
    if slots < needed:
        least = math.ceil(needed * each / 2**30 * 1000) / 1000
        raise InputError(
            f"decode.passage_cache_gib={config.decode.passage_cache_gib:g} has room for {slots} passages of {width} "
            f"tokens, but the questions of one device may retrieve {needed}; give at least {least:g}, or 0 for no "
            "cache, or lower evaluate.batch_size (of a server, --batch)"
        )
    return width, min(slots, count)


def _slot_shapes(graph: nnx.GraphDef, params: Params, width: int) -> list[jax.ShapeDtypeStruct]:
    """Keys and values of one passage."""

    def keys_and_values(params: Params) -> tuple[Array, Array]:
        memory = nnx.merge(graph, params).prefill(jnp.zeros((1, width), jnp.int32), jnp.ones((1, width), bool))
        return memory.keys, memory.values

    return list(jax.eval_shape(keys_and_values, params))


def _empty_pool(graph: nnx.GraphDef, mesh: Mesh, params: Params, width: int, slots: int) -> Pool:
    shapes = _slot_shapes(graph, params, width)
    place = NamedSharding(mesh, heads_spec(mesh, shapes[0].shape[3]))
    count = slots * mesh.shape["data"]
    return Pool(*(jnp.zeros((s.shape[0], count, *s.shape[2:]), s.dtype, device=place) for s in shapes))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_passages(
    graph: nnx.GraphDef,
    params: Params,
    pool: Pool,
    source: Int[Array, "n S"],
    mask: Bool[Array, "n S"],
    slots: Int[Array, " n"],
) -> Pool:
    """The pool with n beginnings of prompts in slots of their device; a slot that is not there takes nothing."""

    def read(params: Params, pool: Pool, source: Array, mask: Array, slots: Array) -> Pool:
        memory = nnx.merge(graph, params).prefill(source, mask)

        def write(pool: Array, new: Array) -> Array:
            return pool.at[:, slots, : new.shape[2]].set(new, mode="drop")

        # all of the beginning, its last token, too, which is the start token only where a prompt ends
        return Pool(write(pool.keys, memory.keys), write(pool.values, memory.values))

    return by_device(read, params, pool, source, mask, slots)


@partial(jax.jit, static_argnums=(0, 7))
def join_question(
    graph: nnx.GraphDef,
    params: Params,
    pool: Pool,
    slots: Int[Array, " n"],
    source: Int[Array, "n S"],
    mask: Bool[Array, "n S"],
    lengths: Int[Array, " n"],
    width: int,
) -> DocumentMemory:
    """The memories of n prompts, of which the first `lengths` tokens are in slots of the pool of their device.

    `width` is at least the number of tokens between these and the last one, which is the start token.
    """

    def read(params: Params, pool: Pool, slots: Array, source: Array, mask: Array, lengths: Array) -> DocumentMemory:
        return _join(nnx.merge(graph, params), pool, slots, source, mask, lengths, width)

    return by_device(read, params, pool, slots, source, mask, lengths)


def _join(
    generator: Generator, pool: Pool, slots: Array, source: Array, mask: Array, lengths: Array, width: int
) -> DocumentMemory:
    """As `join_question`, on one device."""
    columns = jnp.arange(source.shape[1])

    def take(pool: Array) -> Array:
        kept = pool[:, slots, : len(columns)]
        return jnp.pad(kept, [(0, 0), (0, 0), (0, len(columns) - kept.shape[2]), (0, 0), (0, 0)])

    keys, values = take(pool.keys), take(pool.values)
    last = mask.sum(axis=1) - 1
    start = jnp.take_along_axis(source, last[:, None], axis=1)[:, 0]
    passage = DocumentMemory(keys, values, columns < lengths[:, None], lengths, start)
    new = jnp.arange(width)
    # a cut passage is the beginning of the whole one: the question's part follows where it ends
    tokens = jnp.take_along_axis(source, jnp.minimum(lengths[:, None] + new, len(columns) - 1), axis=1)
    causal = jnp.tril(jnp.ones((1, 1, width, width), bool))
    _, own = generator.forward_with_cache(
        passage, empty_kv_cache(passage, width), tokens[:, None], new[None, None], causal
    )
    assert own is not None
    at = jnp.clip(columns - lengths[:, None], 0, width - 1)[None, :, :, None, None]

    def join(passage: Array, own: Array) -> Array:
        return jnp.where(
            (columns < lengths[:, None])[None, :, :, None, None], passage, jnp.take_along_axis(own, at, axis=2)
        )

    return DocumentMemory(join(keys, own.keys), join(values, own.values), columns < last[:, None], last, start)
