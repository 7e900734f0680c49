"""Attention with one softmax over several sources of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

NEGATIVE = -1e30  # masks attention logits: finite, so that a fully masked row gives no NaN


class Attention(nnx.Module):
    """The projections of one attention: queries of what looks, keys and values of what is seen, and the way back."""

    def __init__(self, width: int, heads: int, head_width: int, bias: bool, dtype: str, rngs: nnx.Rngs):
        self.heads = heads

        def linear(size_in: int, size_out: int) -> nnx.Linear:
            return nnx.Linear(size_in, size_out, use_bias=bias, dtype=jnp.dtype(dtype), rngs=rngs)

        self.query, self.key, self.value = (linear(width, heads * head_width) for _ in range(3))
        self.output = linear(heads * head_width, width)

    def queries(self, x: Float[Array, "... D"]) -> Float[Array, "... H Dh"]:
        return self._split(self.query(x))

    def memory(self, x: Float[Array, "... D"]) -> tuple[Float[Array, "... H Dh"], Float[Array, "... H Dh"]]:
        return self._split(self.key(x)), self._split(self.value(x))

    def join(self, attended: Float[Array, "... H Dh"]) -> Float[Array, "... D"]:
        return self.output(attended.reshape(*attended.shape[:-2], -1))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class AttentionSource(NamedTuple):
    """P tokens that G groups of M new tokens may look at: a document's memory, a pool of slots, or their own group.

    `keys` and `values` are [n,P,Hkv,Dh] where all groups share them, [n,G,P,Hkv,Dh] where each group has its own.
    """

    keys: Float[Array, "..."]
    values: Float[Array, "..."]
    attention_mask: Bool[Array, "#n #G #M P"]
    bias: Float[Array, "#n #G M P H"] | None = None  # added to the attention logits


def dot_product_attention(
    queries: Float[Array, "n G M H Dh"], parts: Sequence[AttentionSource], scale: float
) -> Float[Array, "n G M H Dh"]:
    """Attention with one softmax over all the parts; groups of H/Hkv heads share keys and values.

    Parts are never joined, and what is divided is the outcome: on a CPU that takes a third of the time of a softmax.
    """
    n, groups, length, heads, width = queries.shape
    kv = parts[0].keys.shape[-2]
    q = jnp.einsum("ngmkrd->nkrgmd", (queries * scale).reshape(n, groups, length, kv, heads // kv, width))
    scores = [jnp.where(part.attention_mask[:, None, None], _attention_scores(q, part), NEGATIVE) for part in parts]
    top = jax.lax.stop_gradient(reduce(jnp.maximum, [of_part.max(axis=-1, keepdims=True) for of_part in scores]))
    weights = [jnp.exp(of_part - top) for of_part in scores]
    total = reduce(jnp.add, [of_part.sum(axis=-1, keepdims=True) for of_part in weights])
    summed = [
        jnp.einsum(
            f"nkrgmp,{_form(part)}->nkrgmd",
            of_part.astype(queries.dtype),
            part.values,
            preferred_element_type=jnp.float32,
        )
        for of_part, part in zip(weights, parts, strict=True)
    ]
    attended = jnp.einsum("nkrgmd->ngmkrd", (reduce(jnp.add, summed) / total).astype(queries.dtype))
    return attended.reshape(n, groups, length, heads, width)


def self_attention(
    queries: Float[Array, "n S H Dh"],
    keys: Float[Array, "n S Hkv Dh"],
    values: Float[Array, "n S Hkv Dh"],
    visible: Bool[Array, "#n #S S"],
) -> Float[Array, "n S H Dh"]:
    """Attention of n rows of S tokens to themselves; `visible` says which tokens each sees."""
    rows = AttentionSource(keys, values, visible[:, None])
    return dot_product_attention(queries[:, None], [rows], queries.shape[-1] ** -0.5)[:, 0]


def _attention_scores(q: Float[Array, "n k r G M Dh"], part: AttentionSource) -> Float[Array, "n k r G M P"]:
    scores = jnp.einsum(f"nkrgmd,{_form(part)}->nkrgmp", q, part.keys, preferred_element_type=jnp.float32)
    if part.bias is None:
        return scores
    bias = part.bias.reshape(*part.bias.shape[:-1], *q.shape[1:3])
    return scores + jnp.einsum("ngmpkr->nkrgmp", bias)


def _form(part: AttentionSource) -> str:
    return "npkd" if part.keys.ndim == 4 else "ngpkd"
