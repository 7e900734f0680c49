"""Memories of documents, each read once, when it is first needed."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from ragjax.decoding.propose import prefill_documents
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.padding import bucket_size


class DocumentReader:
    """A pool with a slot for each of n right-padded prompts, and the memory of those that were read."""

    def __init__(
        self, graph: nnx.GraphDef, params: Params, source: Int[np.ndarray, "n S"], mask: Bool[np.ndarray, "n S"]
    ) -> None:
        self._graph, self._params, self._source, self._mask = graph, params, source, mask
        self._read = np.zeros(len(source), bool)
        self._memory: DocumentMemory | None = None

    def read(self, rows: Int[np.ndarray, " _"]) -> DocumentMemory:
        """The pool, once these rows are read; slots of others may hold anything finite."""
        new = np.unique(rows[~self._read[rows]])
        if len(new) == len(self._source):
            self._memory = prefill_documents(self._graph, self._params, self._source, self._mask)
        elif len(new):
            padded = np.resize(new, min(bucket_size(len(new)), len(self._source)))  # few shapes; some are read twice
            part = prefill_documents(self._graph, self._params, self._source[padded], self._mask[padded])
            if self._memory is None:
                self._memory = _empty_pool(part, len(self._source))
            self._memory = _write(self._memory, padded, part)
        self._read[new] = True
        assert self._memory is not None, "nothing was read yet"
        return self._memory

    def take(self, rows: Int[np.ndarray, " R"]) -> DocumentMemory:
        """The memories of some rows."""
        return _take(self.read(rows), rows)


@partial(jax.jit, static_argnums=1)
def _empty_pool(part: DocumentMemory, slots: int) -> DocumentMemory:
    def by_layer(x: Array) -> Array:
        return jnp.zeros((x.shape[0], slots, *x.shape[2:]), x.dtype)

    start = jnp.zeros(slots, jnp.int32)
    mask = jnp.zeros((slots, part.mask.shape[1]), bool)
    return DocumentMemory(by_layer(part.keys), by_layer(part.values), mask, start, start)


@partial(jax.jit, donate_argnums=0)
def _write(pool: DocumentMemory, rows: Int[Array, " R"], part: DocumentMemory) -> DocumentMemory:
    return DocumentMemory(
        pool.keys.at[:, rows].set(part.keys),
        pool.values.at[:, rows].set(part.values),
        pool.mask.at[rows].set(part.mask),
        pool.offset.at[rows].set(part.offset),
        pool.start.at[rows].set(part.start),
    )


@jax.jit
def _take(memory: DocumentMemory, rows: Int[Array, " R"]) -> DocumentMemory:
    return memory.take(rows)
