"""Keys and values that generators keep: of a document that was read, and of tokens generated after it."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class DocumentMemory:
    """What a document leaves behind: keys and values of L layers, which of them count, and how to begin."""

    keys: Float[Array, "L n S Hkv Dh"]
    values: Float[Array, "L n S Hkv Dh"]
    mask: Bool[Array, "n S"]
    offset: Int[Array, " n"]  # absolute position of the start token
    start: Int[Array, " n"]  # the token from which the answer begins

    def take(self, rows: Int[Array, " R"]) -> DocumentMemory:
        """The memories of some rows."""
        return DocumentMemory(
            self.keys[:, rows], self.values[:, rows], self.mask[rows], self.offset[rows], self.start[rows]
        )


@struct.dataclass
class KVCache:
    """A write-once pool of P slots a row, for tokens already extended."""

    keys: Float[Array, "L n P Hkv Dh"]
    values: Float[Array, "L n P Hkv Dh"]
    positions: Int[Array, "n P"]
    filled: Int[Array, ""]

    def write(
        self, layer: Int[Array, ""], keys: Float[Array, "n G M Hkv Dh"], values: Float[Array, "n G M Hkv Dh"]
    ) -> KVCache:
        """With one layer's keys and values in the next G·M slots."""
        at = (layer, 0, self.filled, 0, 0)
        slots = (1, keys.shape[0], keys.shape[1] * keys.shape[2], *keys.shape[3:])
        return replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, keys.reshape(slots), at),
            values=jax.lax.dynamic_update_slice(self.values, values.reshape(slots), at),
        )

    def place(self, positions: Int[Array, "n G M"]) -> KVCache:
        """With the positions of the tokens that the next G·M slots will hold."""
        rows = positions.reshape(positions.shape[0], -1)
        return replace(self, positions=jax.lax.dynamic_update_slice(self.positions, rows, (0, self.filled)))

    def take(self, rows: Int[Array, " R"]) -> KVCache:
        """The pools of some rows."""
        return replace(self, keys=self.keys[:, rows], values=self.values[:, rows], positions=self.positions[rows])

    def put(self, rows: Int[Array, " R"], part: KVCache) -> KVCache:
        """With the pools of some rows; all are as full as theirs, and the others have nothing in the newest slots."""
        return KVCache(
            self.keys.at[:, rows].set(part.keys),
            self.values.at[:, rows].set(part.values),
            self.positions.at[rows].set(part.positions),
            part.filled,
        )

    def advance(self, count: int) -> KVCache:
        """With `count` more slots filled, once every layer has written them."""
        return replace(self, filled=self.filled + count)


def empty_kv_cache(memory: DocumentMemory, slots: int) -> KVCache:
    """A pool of `slots` unwritten slots beside each memory."""
    layers, n, _, heads, width = memory.keys.shape
    shape = (layers, n, slots, heads, width)
    keys, values = jnp.zeros(shape, memory.keys.dtype), jnp.zeros(shape, memory.values.dtype)
    return KVCache(keys, values, jnp.zeros((n, slots), jnp.int32), jnp.zeros((), jnp.int32))
