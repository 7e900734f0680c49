"""Search on the devices: all passages split over a mesh, and those with the largest inner products q·d.

Everything here may be part of a larger jitted function. Scores are float32, whatever the embeddings are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

BLOCK = 8192  # passages scored at a time, by each device
GROUP = 32  # of so many of them only the best one is ranked: a top-k of all would cost more
AGAIN = 8  # questions whose best groups are fetched at a time
UPLOAD = 65_536  # passages sent to a device at a time
NOTHING = -1e30  # the logarithm of nothing, whose differences are numbers


@struct.dataclass
class DeviceIndex:
    """All N passages on the devices of `mesh`, each of which holds as many consecutive ones, n / devices.

    The last ones are filled up with rows of zeros. `tokens`, the generator's, and their numbers are there where a
    training step builds its own prompts.
    """

    embeddings: Any  # Float[Array, "n D"], or in a plan its shape
    count: int = struct.field(pytree_node=False)  # N
    mesh: Mesh = struct.field(pytree_node=False)
    tokens: Any = None  # Int[Array, "n P"]
    lengths: Any = None  # Int[Array, " n"]

    @property
    def split(self) -> PartitionSpec:
        """How its rows are split over the devices."""
        return split_rows(self.mesh)

    @property
    def platform(self) -> str:
        """Such as "tpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def in_three_passes(self) -> bool:
        """Whether scores take three products in bfloat16, which is what TPUs compute; of float32 rows they take six."""
        return self.platform == "tpu" and self.embeddings.dtype == jnp.bfloat16

    def here(self) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """Within `jax.shard_map`: the first passage of this device, and how many it has."""
        rows = self.embeddings.shape[0] // self.mesh.size
        first = rows * jax.lax.axis_index(self.mesh.axis_names)
        return first, jnp.clip(self.count - first, 0, rows)


def split_rows(mesh: Mesh) -> PartitionSpec:
    """Over all devices, whatever the axes are called."""
    return PartitionSpec(mesh.axis_names)


def rows_each(mesh: Mesh, count: int) -> int:
    """How many of `count` passages each device holds, at most."""
    return -(-count // mesh.size)


def place_rows(mesh: Mesh, count: int, read: Callable[[int, int], np.ndarray]) -> Array:
    """Rows of a table on the host, split over the mesh; `read(start, stop)` gives some, and is asked for few at a time.

    Each process reads only what its own devices hold.
    """
    rows, sharding = rows_each(mesh, count), NamedSharding(mesh, split_rows(mesh))
    like = read(0, 0)
    shape, parts = (rows * mesh.size, *like.shape[1:]), []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        first, last, _ = index[0].indices(shape[0])
        if rows <= UPLOAD:  # at once: each device would need two programs
            some = read(first, min(last, count)) if first < count else like
            whole = np.zeros((rows, *like.shape[1:]), like.dtype)
            whole[: len(some)] = some
            parts.append(jax.device_put(whole, device))
            continue
        part = jnp.zeros((rows, *like.shape[1:]), like.dtype, device=device)
        for start in range(first, min(last, count), UPLOAD):
            some = jax.device_put(read(start, min(start + UPLOAD, last, count)), device)
            part = _put(part, some, np.int32(start - first))
        parts.append(part)
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


@partial(jax.jit, donate_argnums=0)
def _put(whole: Array, rows: Array, start: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, rows, start, 0)


@partial(jax.jit, static_argnames=("k", "recall"))
def sharded_top_k(
    corpus: DeviceIndex, queries: Float[Array, "B D"], k: int, recall: float | None = None
) -> tuple[Float32[Array, "B K"], Int32[Array, "B K"]]:
    """The k passages with the largest inner products: scores and ids, best first, equal ones by id.

    Where there are fewer than k, the id is -1 and the score -inf. With a `recall`, TPUs find that share of them on
    average (`jax.lax.approx_max_k`), and equal ones come in any order. Other devices, where JAX would sort, find all.
    """
    if corpus.platform != "tpu":
        recall = None

    def best_here(embeddings: Array, queries: Array) -> tuple[Array, Array]:
        first, count = corpus.here()
        scores, ids = blockwise_top_k(
            embeddings, queries, k, count=count, recall=recall, total=corpus.count, three_passes=corpus.in_three_passes
        )
        return scores, jnp.where(ids >= 0, first + ids, -1)

    by_device = PartitionSpec(None, corpus.mesh.axis_names)
    found = jax.shard_map(
        best_here,
        mesh=corpus.mesh,
        in_specs=(corpus.split, PartitionSpec()),
        out_specs=(by_device, by_device),
        check_vma=False,
    )(corpus.embeddings, queries)
    return _best(*found, k)


@partial(jax.jit, static_argnames=("k", "block", "group", "recall", "total", "three_passes"))
def blockwise_top_k(
    embeddings: Float[Array, "n D"],
    queries: Float[Array, "B D"],
    k: int,
    *,
    count: Int[Array, ""] | int | None = None,
    block: int = BLOCK,
    group: int = GROUP,
    recall: float | None = None,
    total: int | None = None,
    three_passes: bool = False,
) -> tuple[Float32[Array, "B K"], Int32[Array, "B K"]]:
    """As `sharded_top_k`, among the first `count` rows of one array; ids count its rows.

    Over `block` passages at a time: memory grows with B·block, never with B·n. Of these only the best of each `group`
    is kept; the k best groups hold the k best passages, and are scored again at the end. For if one of these lay in
    another group, each of the k would hold one before it. `total` is of how many passages these are a part, for the
    recall; for `three_passes` see `inner_products`.
    """
    rows = embeddings.shape[0]
    count, block = rows if count is None else count, min(block, rows)
    group = 1 if recall is not None else math.gcd(block, group)
    groups = block // group

    def merge(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scores, _, fresh = _scores_of_block(embeddings, queries, i, block, count, three_passes)
        maxima = jnp.where(fresh[:, None], scores, -jnp.inf).reshape(groups, group, -1).max(axis=1).T
        if recall is None:
            which = jnp.broadcast_to(jnp.arange(groups), maxima.shape)
        else:
            maxima, which = jax.lax.approx_max_k(
                maxima, min(k, block), recall_target=recall, reduction_input_size_override=total or rows
            )
        # top_k prefers the lower position among equals: earlier blocks stand first, so lower ids win.
        return _best(jnp.concatenate([best[0], maxima], 1), jnp.concatenate([best[1], i * groups + which], 1), k)

    def among(query_and_groups: tuple[Array, Array]) -> tuple[Array, Array]:
        query, which = query_and_groups
        first = which // groups * block  # of its block, whose rows before are another's: see _scores_of_block
        ids = (jnp.minimum(first, rows - block) + which % groups * group)[:, None] + jnp.arange(group)
        scores = jnp.einsum("KmD,D->Km", embeddings[ids].astype(jnp.float32), query, precision="highest")
        fresh = (which >= 0)[:, None] & (ids >= first[:, None]) & (ids < count)
        return _best(jnp.where(fresh, scores, -jnp.inf).ravel(), ids.ravel(), k)

    queries = queries.astype(jnp.float32)
    shape = (queries.shape[0], k)
    nothing = jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32)
    _, best = jax.lax.fori_loop(0, -(-rows // block), merge, nothing)
    return jax.lax.map(among, (queries, jnp.sort(best)), batch_size=AGAIN)


def _scores_of_block(
    embeddings: Float[Array, "n D"],
    queries: Float[Array, "B D"],
    i: Array,
    block: int,
    count: Array | int,
    three_passes: bool,
) -> tuple[Float32[Array, "m B"], Int32[Array, " m"], Bool[Array, " m"]]:
    """Scores and ids of block i, and which of them count: no row beyond `count`, and none that an earlier block had.

    The last block is moved back to lie within n. With the passages first, a CPU takes a fifth less time.
    """
    start = jnp.minimum(i * block, embeddings.shape[0] - block)
    passages = jax.lax.dynamic_slice_in_dim(embeddings, start, block)
    scores = inner_products(passages, queries.astype(jnp.float32), three_passes)
    ids = start + jnp.arange(block, dtype=jnp.int32)
    return scores, ids, (ids >= i * block) & (ids < count)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def inner_products(
    passages: Float[Array, "m D"], queries: Float32[Array, "B D"], three_passes: bool
) -> Float32[Array, "m B"]:
    """d·q in float32, differentiable by the queries; with `three_passes` passages in bfloat16 are not widened.

    A float32 q is the sum of three bfloat16 numbers, q₀ + q₁ + q₂, of 8 of its 24 bits each. So d·q is the sum of the
    three d·qᵢ, whose products are exact in float32.
    """
    if not three_passes:
        return jnp.einsum("mD,BD->mB", passages.astype(jnp.float32), queries, precision="highest")
    parts, rest = [], queries
    for _ in range(3):
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)  # which XLA keeps, unlike two casts
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    products = jnp.einsum("mD,kBD->kmB", passages, jnp.stack(parts), preferred_element_type=jnp.float32)
    return products[2] + products[1] + products[0]


@inner_products.defjvp
def _inner_products_jvp(three_passes: bool, primals: Any, tangents: Any) -> tuple[Array, Array]:
    passages, queries = primals
    return inner_products(passages, queries, three_passes), inner_products(passages, tangents[1], False)


def _best(scores: Float32[Array, "*B n"], ids: Int32[Array, "*B n"], k: int) -> tuple[Array, Array]:
    scores, columns = jax.lax.top_k(scores, k)
    return scores, jnp.where(scores > -jnp.inf, jnp.take_along_axis(ids, columns, -1), -1)


@partial(jax.jit, static_argnames="scale")
def log_normalizer(corpus: DeviceIndex, queries: Float[Array, "B D"], scale: float) -> Float32[Array, " B"]:
    """log Σ exp(scale · q·d) over all N passages; differentiable by the queries, in memory as `blockwise_top_k`."""

    def on_device(embeddings: Array, queries: Array) -> Array:
        _, count = corpus.here()
        return block_log_normalizer(embeddings, queries, scale, count=count, three_passes=corpus.in_three_passes)[
            :, None
        ]

    parts = jax.shard_map(
        on_device,
        mesh=corpus.mesh,
        in_specs=(corpus.split, PartitionSpec()),
        out_specs=PartitionSpec(None, corpus.mesh.axis_names),
        check_vma=False,
    )(corpus.embeddings, queries)
    return jax.nn.logsumexp(parts, axis=1)


@partial(jax.jit, static_argnames=("scale", "block", "three_passes"))
def block_log_normalizer(
    embeddings: Float[Array, "n D"],
    queries: Float[Array, "B D"],
    scale: float,
    *,
    count: Int[Array, ""] | int | None = None,
    block: int = BLOCK,
    three_passes: bool = False,
) -> Float32[Array, " B"]:
    """As `log_normalizer`, over the first `count` rows of one array; a very negative number where that is 0."""
    rows = embeddings.shape[0]
    block, limit = min(block, rows), rows if count is None else count

    @jax.checkpoint
    def visit(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
        top, total = carry
        scores, _, fresh = _scores_of_block(embeddings, queries, i, block, limit, three_passes)
        fresh = fresh[:, None]
        scores = jnp.where(fresh, scale * scores, NOTHING)
        new_top = jax.lax.stop_gradient(jnp.maximum(top, scores.max(axis=0)))
        added = jnp.where(fresh, jnp.exp(scores - new_top), 0.0).sum(axis=0)
        return (new_top, total * jnp.exp(top - new_top) + added), None

    start = jnp.full(queries.shape[0], NOTHING), jnp.zeros(queries.shape[0])
    (top, total), _ = jax.lax.scan(visit, start, jnp.arange(-(-rows // block)))
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + top, NOTHING)


def gather_rows(corpus: DeviceIndex, table: Array, ids: Int[Array, "B K"]) -> Array:
    """Rows [B, K, …] of a table that lies as the corpus does, each fetched from the device that has it; 0 where id −1.

    Integers become int32 and floats float32.
    """
    wide = jnp.int32 if jnp.issubdtype(table.dtype, jnp.integer) else jnp.float32

    def on_device(part: Array, ids: Array) -> Array:
        first, count = corpus.here()
        at = ids - first
        rows = part[jnp.clip(at, 0, part.shape[0] - 1)].astype(wide)
        mine = ((at >= 0) & (at < count)).reshape(*ids.shape, *[1] * (part.ndim - 1))
        return jax.lax.psum(jnp.where(mine, rows, 0), corpus.mesh.axis_names)

    return jax.shard_map(
        on_device,
        mesh=corpus.mesh,
        in_specs=(corpus.split, PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(table, ids)
