"""Attention with one softmax over several sources of keys and values; windows, soft caps and biases by distance.

`self_attention` alone decides by what a text reads itself: long ones by kernels that never hold all logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ragjax.models.layers import Linear

NEGATIVE = -1e30  # masks attention logits: finite, so that a fully masked row gives no NaN
LONG = 1024  # tokens from which on a text is read by a kernel: in shorter ones there is little to save
BLOCK = 512  # tokens that a TPU's kernel takes at a time


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
    """E tokens that G groups of M new tokens may attend to: a document's memory, a pool of slots, or their own group.

    `keys` and `values` are [n,E,Hkv,Dh] where all groups share them, [n,G,E,Hkv,Dh] where each group has its own.
    """

    keys: Float[Array, "..."]
    values: Float[Array, "..."]
    attention_mask: Bool[Array, "#n #G #M E"]
    bias: Float[Array, "#n #G M E H"] | None = None  # added to the attention logits

    def within(self, distance: Int[Array, "#n #G #M E"], window: int | Int[Array, ""]) -> AttentionSource:
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
    mask: Bool[Array, "n S"] | None = None,
    bias: Float[Array, "S S H"] | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = False,
    windows: Sequence[int] = (),
    layer: int | Int[Array, ""] = 0,
) -> Float[Array, "n S H Dh"]:
    """Attention of n right-padded rows of S tokens to themselves.

    From `LONG` tokens on it is computed on TPUs by splash attention, on NVIDIA's GPUs by cuDNN where that can, and
    elsewhere, as whatever has a bias, with all its logits in memory.

    Args:
        queries: one for each token and head.
        keys: of as many heads or fewer, as in `dot_product_attention`.
        values: likewise.
        mask: which tokens are none of the padding. Causal attention needs none: it sees no padding.
        bias: added to the attention logits.
        scale: of the logits; by default Dh^(-1/2).
        softcap: as in `dot_product_attention`.
        causal: whether a token sees itself and those before it only.
        windows: by layer, how many tokens one sees to a side, itself included; 0 means all, () so everywhere.
        layer: the number of this one.
    """
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    length, settings = queries.shape[1], dict[str, Any](scale=scale, softcap=softcap, causal=causal)
    if length < LONG or bias is not None:
        window = jnp.array([window or length for window in windows])[layer] if windows else None
        return _with_all_logits(queries, keys, values, mask, bias, window=window, **settings)
    kinds = [window if window < length else 0 for window in windows] or [0]
    by_kind = {kind: partial(_by_kernel, window=kind or None, **settings) for kind in sorted(set(kinds))}
    which = jnp.array([list(by_kind).index(kind) for kind in kinds])[layer]
    return jax.lax.switch(which, list(by_kind.values()), queries, keys, values, mask)


def _with_all_logits(
    queries: Float[Array, "n S H Dh"],
    keys: Float[Array, "n S Hkv Dh"],
    values: Float[Array, "n S Hkv Dh"],
    mask: Bool[Array, "n S"] | None,
    bias: Float[Array, "S S H"] | None = None,
    *,
    scale: float,
    softcap: float,
    causal: bool,
    window: int | Int[Array, ""] | None,
) -> Float[Array, "n S H Dh"]:
    where = jnp.arange(queries.shape[1])
    distance = where[:, None] - where
    seen = jnp.ones((1, 1, 1, len(where)), bool) if mask is None else mask[:, None, None]
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & ((distance if causal else jnp.abs(distance)) < window)
    source = AttentionSource(keys, values, seen, None if bias is None else bias[None, None])
    return dot_product_attention(queries[:, None], [source], scale, softcap)[:, 0]


def _by_kernel(queries: Array, keys: Array, values: Array, mask: Array | None, **settings: Any) -> Array:
    """By what the platform has for which the program is compiled."""
    kernels: dict[str, Callable[..., Array]] = {"tpu": partial(_splash_on_mesh, **settings)}
    if _cudnn_can(queries, settings):
        kernels["cuda"] = partial(fused_attention, **settings)
    ours = partial(_with_all_logits, **settings)
    return jax.lax.platform_dependent(queries, keys, values, mask, default=ours, **kernels)


def _cudnn_can(queries: Float[Array, "n S H Dh"], settings: dict[str, Any]) -> bool:
    """Whether there is a GPU whose cuDNN has such an attention: in 16 bits, without soft caps, windows to one side."""
    generation = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")[0]  # NVIDIA's: a number
    largest = {"8": 128}.get(generation, 256 if generation.isdigit() and int(generation) > 8 else 0)
    one_sided, fits = settings["causal"] or settings["window"] is None, queries.shape[-1] in range(8, largest + 1, 8)
    return queries.dtype.itemsize == 2 and not settings["softcap"] and one_sided and fits


def fused_attention(
    queries: Float[Array, "n S H Dh"],
    keys: Float[Array, "n S Hkv Dh"],
    values: Float[Array, "n S Hkv Dh"],
    mask: Bool[Array, "n S"] | None,
    *,
    scale: float,
    softcap: float,
    causal: bool,
    window: int | None,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Float[Array, "n S H Dh"]:
    """`self_attention` by JAX's own function, which has no soft cap."""
    assert softcap == 0.0
    return jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=None if mask is None else mask.sum(axis=-1, dtype=jnp.int32),
        local_window_size=None if window is None else (window - 1, 0 if causal else window - 1),
        implementation=implementation,
    )


def _splash_on_mesh(queries: Array, keys: Array, values: Array, mask: Array | None, **settings: Any) -> Array:
    """`splash_attention` by each device on its rows and heads: XLA cannot split a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Auto}
    attend: Callable[..., Array] = partial(splash_attention, **settings)
    if not axes:
        return attend(queries, keys, values, mask)

    def along(axis: str, *sizes: int) -> str | None:
        return axis if axis in axes and not any(size % mesh.shape[axis] for size in sizes) else None

    rows = along("data", queries.shape[0])
    tokens = PartitionSpec(rows, None, along("model", queries.shape[2], keys.shape[2]))
    specs = (tokens, tokens, tokens, PartitionSpec(rows))
    split = jax.shard_map(attend, in_specs=specs, out_specs=tokens, axis_names=axes, check_vma=False)
    return split(queries, keys, values, mask)


def splash_attention(
    queries: Float[Array, "n S H Dh"],
    keys: Float[Array, "n S Hkv Dh"],
    values: Float[Array, "n S Hkv Dh"],
    mask: Bool[Array, "n S"] | None,
    *,
    scale: float,
    softcap: float,
    causal: bool,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "n S H Dh"]:
    """`self_attention` by JAX's kernel for TPUs, which passes over blocks that no token sees; rows need some token.

    `interpret` computes what the kernel does on any device, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import

    length, added = queries.shape[1], -queries.shape[1] % BLOCK
    if added and not causal and mask is None:
        mask = jnp.ones(queries.shape[:2], bool)

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, added if axis == 1 else 0) for axis in range(x.ndim)])

    def heads_first(x: Array) -> Array:
        return pad(x).swapaxes(1, 2)

    square, side = (length + added, length + added), None if window is None else window - 1
    sees: Any = splash.LocalMask(square, (side, 0 if causal else side), offset=0)
    if side is None and not causal:
        sees = splash.FullMask(square)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": BLOCK for name in names}
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([sees] * queries.shape[2]),
        block_sizes=splash.BlockSizes(**blocks),
        attn_logits_soft_cap=softcap or None,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    given = heads_first(queries * scale), heads_first(keys), heads_first(values)
    if mask is None:
        return jax.vmap(kernel)(*given).swapaxes(1, 2)[:, :length]
    seen = pad(mask).astype(jnp.int32)
    segments = splash.SegmentIds(q=jnp.ones_like(seen), kv=seen)
    return jax.vmap(kernel)(*given, segments).swapaxes(1, 2)[:, :length]


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
) -> Float[Array, "n k r G M E"]:
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
