"""Memories of documents, each read once, when it is first needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ragjax.models.kv_cache import DocumentMemory
from ragjax.parallel.by_device import RowGroup, by_device, data_devices, group_by_device, split_heads

ReadDocuments = Callable[[Int[np.ndarray, " _"]], DocumentMemory]  # of some rows


class DocumentReader:
    """A pool with a slot for each of n documents, and the memory of those that were read."""

    def __init__(self, read: ReadDocuments, count: int) -> None:
        self._read_rows, self._read = read, np.zeros(count, bool)
        self._memory: DocumentMemory | None = None

    def read(self, rows: Int[np.ndarray, " _"]) -> DocumentMemory:
        """The pool, once these rows are read; slots of others may hold anything finite."""
        new = np.unique(rows[~self._read[rows]])
        if len(new) == len(self._read):
            self._memory = self._read_rows(new)
        elif len(new):
            group = group_by_device(new, len(self._read))  # few shapes; some are read twice
            part = self._read_rows(group.rows)
            self._memory = _write(self._memory, group.local, part, len(self._read) // data_devices())
        self._read[new] = True
        assert self._memory is not None, "nothing was read yet"
        return self._memory

    def take(self, group: RowGroup) -> DocumentMemory:
        """The memories of some rows; what fills up the group may be anything finite."""
        return _take(self.read(group.rows[group.place]), group.local)


# the rows of these are a device's own, as it counts them


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _write(pool: DocumentMemory | None, rows: Int[Array, " R"], part: DocumentMemory, slots: int) -> DocumentMemory:
    """A pool, or one with so many empty slots, with the memories of some rows."""

    def write(_: None, pool: DocumentMemory | None, rows: Array, part: DocumentMemory) -> DocumentMemory:
        pool = _empty_pool(part, slots) if pool is None else pool
        return DocumentMemory(
            pool.keys.at[:, rows].set(part.keys),
            pool.values.at[:, rows].set(part.values),
            pool.mask.at[rows].set(part.mask),
            pool.offset.at[rows].set(part.offset),
            pool.start.at[rows].set(part.start),
        )

    return by_device(write, None, pool, rows, part)


def _empty_pool(part: DocumentMemory, slots: int) -> DocumentMemory:
    def by_layer(x: Array) -> Array:
        return split_heads(jnp.zeros((x.shape[0], slots, *x.shape[2:]), x.dtype))

    start = jnp.zeros(slots, jnp.int32)
    mask = jnp.zeros((slots, part.mask.shape[1]), bool)
    return DocumentMemory(by_layer(part.keys), by_layer(part.values), mask, start, start)


@jax.jit
def _take(memory: DocumentMemory, rows: Int[Array, " R"]) -> DocumentMemory:
    return by_device(lambda _, memory, rows: memory.take(rows), None, memory, rows)
