"""Attention with one softmax over several sources of keys and values; windows, soft caps and biases by distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.models.layers import Linear

NEGATIVE = -1e30  # masks attention logits: finite, so that a fully masked row gives no NaN


class Attention(nnx.Module):
    """The four projections of multi-head attention (Vaswani et al. 2017): Q, K, V and output."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, bias: bool, dtype: str, rngs: nnx.Rngs):
        self.num_heads = num_heads

        def linear(size_in: int, size_out: int) -> Linear:
            return Linear(size_in, size_out, use_bias=bias, dtype=jnp.dtype(dtype), rngs=rngs)

        self.query, self.key, self.value = (linear(hidden_size, num_heads * head_dim) for _ in range(3))
        self.output = linear(num_heads * head_dim, hidden_size)

    def queries(self, x: Float[Array, "... D"]) -> Float[Array, "... H Dh"]:
        """Q of the tokens that attend."""
        return self._split(self.query(x))

    def keys_and_values(self, x: Float[Array, "... D"]) -> tuple[Float[Array, "... H Dh"], Float[Array, "... H Dh"]]:
        """K and V of the tokens that are attended to."""
        return self._split(self.key(x)), self._split(self.value(x))

    def project_back(self, attended: Float[Array, "... H Dh"]) -> Float[Array, "... D"]:
        """The output projection of what all heads attended to."""
        return self.output(attended.reshape(*attended.shape[:-2], -1))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class AttentionSource(NamedTuple):
    """P tokens that G groups of M new tokens may attend to: a document's memory, a pool of slots, or their own group.

    `keys` and `values` are [n,P,Hkv,Dh] where all groups share them, [n,G,P,Hkv,Dh] where each group has its own.
    """

    keys: Float[Array, "..."]
    values: Float[Array, "..."]
    attention_mask: Bool[Array, "#n #G #M P"]
    bias: Float[Array, "#n #G M P H"] | None = None  # added to the attention logits

    def within(self, distance: Int[Array, "#n #G #M P"], window: int | Int[Array, ""]) -> AttentionSource:
        """Without the tokens that stand `window` tokens or more before the one that attends (Beltagy et al. 2020)."""
        return self._replace(attention_mask=self.attention_mask & (distance < window))


def dot_product_attention(
    queries: Float[Array, "n G M H Dh"], sources: Sequence[AttentionSource], scale: float, softcap: float = 0.0
) -> Float[Array, "n G M H Dh"]:
    """softmax(cap(scale · QKᵀ) + bias) · V, one softmax over all sources; groups of H/Hkv heads share keys and values.

    Grouped queries are those of Ainslie et al. 2023; `softcap`, where it is not 0, is that of Gemma 2 (2024):
    cap(x) = softcap · tanh(x / softcap). The sources are never concatenated, and the weighted sum is divided rather
    than the weights: on a CPU that takes a third of the time of a softmax.
    """
    n, groups, length, heads, head_dim = queries.shape
    kv_heads = sources[0].keys.shape[-2]
    q = (queries * scale).reshape(n, groups, length, kv_heads, heads // kv_heads, head_dim)
    q = jnp.einsum("ngmkrd->nkrgmd", q)
    scores = [
        jnp.where(source.attention_mask[:, None, None], _attention_scores(q, source, softcap), NEGATIVE)
        for source in sources
    ]
    top = jax.lax.stop_gradient(reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x in scores]))
    weights = [jnp.exp(x - top) for x in scores]
    total = reduce(jnp.add, [x.sum(axis=-1, keepdims=True) for x in weights])
    summed = [
        jnp.einsum(
            f"nkrgmp,{_axes(source)}->nkrgmd",
            weight.astype(queries.dtype),
            source.values,
            preferred_element_type=jnp.float32,
        )
        for weight, source in zip(weights, sources, strict=True)
    ]
    attended = jnp.einsum("nkrgmd->ngmkrd", (reduce(jnp.add, summed) / total).astype(queries.dtype))
    return attended.reshape(n, groups, length, heads, head_dim)


def self_attention(
    queries: Float[Array, "n S H Dh"],
    keys: Float[Array, "n S Hkv Dh"],
    values: Float[Array, "n S Hkv Dh"],
    attention_mask: Bool[Array, "#n #S S"],
    bias: Float[Array, "S S H"] | None = None,
) -> Float[Array, "n S H Dh"]:
    """Attention of n rows of S tokens to themselves; `attention_mask` says which tokens each sees."""
    source = AttentionSource(keys, values, attention_mask[:, None], None if bias is None else bias[None, None])
    return dot_product_attention(queries[:, None], [source], queries.shape[-1] ** -0.5)[:, 0]


def distance_bucket(distance: Int[Array, "..."], buckets: int, farthest: int, both_ways: bool) -> Int[Array, "..."]:
    """The row of a bias table for a key that stands `distance` tokens after the query (Raffel et al. 2020).

    Near distances have a row each; farther ones share rows on a logarithmic scale up to `farthest`. Without
    `both_ways` a key after the query counts as distance 0.
    """
    side = jnp.zeros_like(distance)
    if both_ways:
        buckets //= 2
        side = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(farthest / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return side + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def _attention_scores(
    q: Float[Array, "n k r G M Dh"], source: AttentionSource, softcap: float
) -> Float[Array, "n k r G M P"]:
    scores = jnp.einsum(f"nkrgmd,{_axes(source)}->nkrgmp", q, source.keys, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if source.bias is None:
        return scores
    bias = source.bias.reshape(*source.bias.shape[:-1], *q.shape[1:3])
    return scores + jnp.einsum("ngmpkr->nkrgmp", bias)


def _axes(source: AttentionSource) -> str:
    """The axes of a source's keys and values: shared by all groups, or each group's own."""
    return "npkd" if source.keys.ndim == 4 else "ngpkd"
