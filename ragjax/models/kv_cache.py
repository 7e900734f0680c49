"""Keys and values that generators keep: of a document that was read, and of the tokens after it.

`decode_layers` runs the layers of any family beside both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from ragjax.models.attention import AttentionSource
from ragjax.models.layers import ADAPT_ANSWER, ADAPT_PROMPT, RowRngs, fold_rngs, scan_layers
from ragjax.parallel.by_device import split_heads


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

    def widen(self, width: int) -> DocumentMemory:
        """With room for `width` tokens, no fewer than there are; what is added does not count."""

        def pad(x: Array, axis: int) -> Array:
            return jnp.pad(x, [(0, width - x.shape[axis] if a == axis else 0) for a in range(x.ndim)])

        return replace(self, keys=pad(self.keys, 2), values=pad(self.values, 2), mask=pad(self.mask, 1))


@struct.dataclass
class KVCache:
    """A write-once pool of E slots a row, for the tokens read after its document."""

    keys: Float[Array, "L n E Hkv Dh"]
    values: Float[Array, "L n E Hkv Dh"]
    positions: Int[Array, "n E"]  # of the token in each slot; kept by families that need them later
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
    keys, values = (split_heads(jnp.zeros(shape, of.dtype)) for of in (memory.keys, memory.values))
    return KVCache(keys, values, jnp.zeros((n, slots), jnp.int32), jnp.zeros((), jnp.int32))


@struct.dataclass
class LayerCache:
    """What one layer of a decoder attends to beside its new tokens: the document, and its part of the pool."""

    layer: Int[Array, ""]  # its number
    document: AttentionSource
    pool: KVCache | None  # without one, the new tokens attend to their own group alone
    attention_mask: Bool[Array, "#n #G M E"]
    bias: Float[Array, "#n #G M E H"] | None

    def append(
        self, keys: Float[Array, "n G M Hkv Dh"], values: Float[Array, "n G M Hkv Dh"]
    ) -> tuple[AttentionSource, LayerCache]:
        """The new tokens and those before them as an attention source, and the cache that holds the new ones."""
        if self.pool is None:
            return AttentionSource(keys, values, self.attention_mask, self.bias), self
        pool = self.pool.write(self.layer, keys, values)
        keys, values = pool.keys[self.layer], pool.values[self.layer]
        return AttentionSource(keys, values, self.attention_mask, self.bias), replace(self, pool=pool)


def decode_layers(
    layers: nnx.Module,
    block: Callable[[Any, Array, LayerCache], tuple[Array, LayerCache]],
    x: Float[Array, "n G M D"],
    memory: DocumentMemory,
    past: KVCache | None,
    attention_mask: Bool[Array, "#n #G M E"],
    bias: Float[Array, "#n #G M E H"] | None = None,
    remat: bool = False,
    dropout_rngs: RowRngs | None = None,
) -> tuple[Float[Array, "n G M D"], KVCache | None]:
    """The new tokens x after all the stacked layers of a decoder, and the pool with their keys and values.

    Args:
        layers: stacked, as many as `memory` has.
        block: `(layer, x, cache) -> (x, cache)`, one layer; it gives its keys and values to `cache.append`.
        x: G groups of M embedded tokens a row.
        memory: of the n documents.
        past: the pool to which the tokens are added; without one they attend to their own group alone.
        attention_mask: which slots of the pool, or else tokens of its group, each new token sees.
        bias: added to the attention logits of what `attention_mask` is about, in every layer.
        remat: whether each layer is computed again going backward (see `scan_layers`).
        dropout_rngs: one a row, for the dropout of adapters.
    """

    def step(layer: Any, carry: tuple[Array, KVCache | None], inputs: tuple[Array, Array, Array]) -> tuple[Any, None]:
        x, pool = carry
        keys, values, number = inputs
        document = AttentionSource(keys, values, memory.mask[:, None, None])
        x, cache = block(layer, x, LayerCache(number, document, pool, attention_mask, bias))
        return (x, cache.pool), None

    xs = (memory.keys, memory.values, jnp.arange(memory.keys.shape[0]))
    (hidden, pool), _ = scan_layers(layers, step, (x, past), xs, remat, fold_rngs(dropout_rngs, ADAPT_ANSWER))
    return hidden, None if pool is None else pool.advance(x.shape[1] * x.shape[2])


def cross_attention_memory(
    layers: nnx.Module,
    encoded: Float[Array, "n S D"],
    mask: Bool[Array, "n S"],
    start: int,
    remat: bool = False,
    dropout_rngs: RowRngs | None = None,
) -> DocumentMemory:
    """The memory of an encoder–decoder: the keys and values of `encoded` for the `cross` attention of each layer.

    `start` is the token from which every answer begins, at position 0; `dropout_rngs` are for adapters.
    """

    def project(layer: Any, nothing: None, _: None) -> tuple[None, tuple[Array, Array]]:
        return nothing, layer.cross.keys_and_values(encoded)

    _, (keys, values) = scan_layers(layers, project, None, None, remat, fold_rngs(dropout_rngs, ADAPT_PROMPT))
    n = mask.shape[0]
    return DocumentMemory(keys, values, mask, jnp.zeros(n, jnp.int32), jnp.full(n, start, jnp.int32))
