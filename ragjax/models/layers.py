"""What every model family shares: stacked layers, linear maps and their adapters, dropout by row, activations.

And how activations are sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int, Int8, Key

from ragjax.errors import InputError
from ragjax.parallel.by_device import axis_length

Params = dict[str, Any]  # a nested dict of arrays, as `nnx.to_pure_dict` gives it
RowRngs = Key[Array, " n"]  # one PRNG key a row, for dropout

ADAPTERS = "lora_a", "lora_b"  # the names of an adapter's parameters
SCALE = "kernel_scale"  # that of the scales of a kernel in int8
LEVELS = 127  # of int8, on either side of 0
ADAPT_PROMPT, ADAPT_ANSWER = 2**20, 2**20 + 1  # by which row keys are folded for adapters: no layer has these numbers

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Linear(nnx.Linear):
    """x·W + b, and, where the map has adapters, + s · dropout(x)·A·B (Hu et al. 2021): W + s·A·B is never made.

    `add_adapters` gives A [in, rank] and B [rank, out], `quantize_kernels` W in int8 with a scale for each of its
    columns, which multiplies what comes out; with a leading axis where layers are stacked.
    """

    kernel_scale: nnx.Param[Any]
    lora_a: nnx.Param[Any]
    lora_b: nnx.Param[Any]
    lora_scale: float = 0.0
    lora_dropout: float = 0.0
    lora_rngs: RowRngs | None = None  # as `scan_layers` gives them to a layer

    def __call__(self, x: Float[Array, "n ... D"]) -> Float[Array, "n ... E"]:  # type: ignore[override]
        """Computed in the module's type."""
        # a product of two matrices: of more axes XLA would, on CPUs, transpose a copy of dy for the gradient xᵀ·dy
        rows = x.reshape(-1, x.shape[-1])
        y = self._by_scales(rows) if hasattr(self, SCALE) else super().__call__(rows)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        if not hasattr(self, "lora_a"):
            return y
        x, a, b = (jnp.asarray(array, self.dtype) for array in (x, self.lora_a[...], self.lora_b[...]))
        return y + self.lora_scale * ((dropout(x, self.lora_rngs, self.lora_dropout) @ a) @ b)

    def _by_scales(self, x: Float[Array, "n ... D"]) -> Float[Array, "n ... E"]:
        """(x·Q) · scale + b: the scales, in float32, never multiply Q."""
        x = jnp.asarray(x, self.dtype)
        y = ((x @ self.kernel[...].astype(x.dtype)) * self.kernel_scale[...]).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def channel_scale(kernel: Float[Any, "... D E"]) -> Float[Any, "... E"]:
    """By which the columns of a kernel, of NumPy or JAX, are divided to lie within ±127; 1 for one of zeros."""
    xp = kernel.__array_namespace__()
    top = xp.max(xp.abs(kernel), axis=-2).astype(xp.float32)
    return xp.where(top > 0, top / LEVELS, xp.ones_like(top))


def to_int8(kernel: Float[Any, "... D E"], scale: Float[Any, "... E"]) -> Int8[Any, "... D E"]:
    """Q, with |kernel − Q · scale| at most half a scale: 1/254 of the largest number of the column (symmetric int8)."""
    xp = kernel.__array_namespace__()
    return xp.clip(xp.round(kernel / scale[..., None, :]), -LEVELS, LEVELS).astype(xp.int8)


def quantize_kernels(module: nnx.Module) -> None:
    """The kernels of the linear maps of stacked layers in int8, with their scales. `module` is abstract."""
    shapes = nnx.traversals.flatten_mapping(split_parameters(module)[1])
    for path, part in _stacked_maps(module):
        layers, size_in, size_out = shapes[*path, "kernel"].shape
        part.kernel = nnx.Param(jax.ShapeDtypeStruct((layers, size_in, size_out), jnp.int8))
        part.kernel_scale = nnx.Param(jax.ShapeDtypeStruct((layers, size_out), jnp.float32))


def add_adapters(module: nnx.Module, names: Collection[str], rank: int, alpha: float, rate: float) -> None:
    """Gives adapters, with s = alpha / rank, to the linear maps of stacked layers that have these names.

    Without names all get them. `module` is abstract. Raises `InputError` for a name that no linear map has.
    """
    shapes = nnx.traversals.flatten_mapping(split_parameters(module)[1])
    parts = dict(_stacked_maps(module))
    existing = {str(path[-1]) for path in parts}
    if unknown := sorted(set(names) - existing):
        raise InputError(f"no linear map is called {', '.join(unknown)}; there are {', '.join(sorted(existing))}")
    for path, part in parts.items():
        if not names or path[-1] in names:
            layers, size_in, size_out = shapes[*path, "kernel"].shape
            part.lora_a = nnx.Param(jax.ShapeDtypeStruct((layers, size_in, rank), jnp.float32))
            part.lora_b = nnx.Param(jax.ShapeDtypeStruct((layers, rank, size_out), jnp.float32))
            part.lora_scale, part.lora_dropout = alpha / rank, rate


def is_adapter(path: Sequence[str]) -> bool:
    """Whether the parameter at a path is an adapter's."""
    return path[-1] in ADAPTERS


def _stacked_maps(module: nnx.Module) -> Iterator[tuple[tuple[Any, ...], Linear]]:
    """The linear maps of stacked layers, by path."""
    return ((path, part) for path, part in nnx.iter_modules(module) if isinstance(part, Linear) and "layers" in path)


def _linear_maps(module: nnx.Module) -> list[Linear]:
    """In an order that is always the same."""
    return [part for _, part in nnx.iter_modules(module) if isinstance(part, Linear)]


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose parameters have a leading axis of `count` layers, so that compile time ignores depth."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))


def scan_layers(
    layers: nnx.Module,
    step: Callable,
    carry: Any,
    xs: Any = None,
    remat: bool = False,
    adapter_rngs: RowRngs | None = None,
) -> tuple[Any, Any]:
    """Runs `step(layer, carry, x) -> (carry, y)` through stacked layers.

    Going backward, `remat` computes each layer again; without it matrix products with parameters are kept, and only
    what lies between them is computed again: that is faster than to keep everything, and takes half the memory.
    `adapter_rngs` draw the dropout of adapters, in each layer other ones.
    """
    graph, params = nnx.split(layers)
    numbers = None
    if adapter_rngs is not None and any(part.lora_dropout > 0 for part in _linear_maps(layers)):
        numbers = jnp.arange(jax.tree.leaves(params)[0].shape[0])

    def body(carry: Any, inputs: tuple[Any, Any, Any]) -> tuple[Any, Any]:
        layer_params, x, number = inputs
        layer = nnx.merge(graph, layer_params)
        if number is not None:
            layer_rngs = fold_rngs(adapter_rngs, number)
            for at, part in enumerate(_linear_maps(layer)):
                part.lora_rngs = fold_rngs(layer_rngs, at)
        carry, y = step(layer, carry, x)
        return split_by_rows(carry), y

    policy = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    body = jax.checkpoint(body, policy=policy, prevent_cse=False)  # a loop's body needs no guard against CSE
    return jax.lax.scan(body, split_by_rows(carry), (params, xs, numbers))


def split_by_rows(activations: Any) -> Any:
    """Keeps the leading axis of activations over the mesh's axis `data`, inside `use_abstract_mesh`; else the identity.

    Left alone, XLA would follow parameters that lie over `data` (FSDP): split widths, and compute every row everywhere.
    """
    if not _partitioned_by_xla():
        return activations

    def rows(x: Array) -> Array:
        free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec("data", *free))

    return jax.tree.map(rows, activations)


def gather_table(table: Float[Array, "V D"]) -> Float[Array, "m v D"]:
    """A table in as many parts as devices along `model` share it (see `parameter_spec`), each whole on its devices."""
    model = axis_length("model")
    shards = 1 if table.shape[0] % model else model
    parts = table.reshape(shards, -1, table.shape[1])
    if shards == 1 and not _partitioned_by_xla():
        return parts
    return jax.lax.with_sharding_constraint(parts, PartitionSpec("model" if shards > 1 else None))


def _partitioned_by_xla() -> bool:
    """Whether XLA splits rows over `data`; inside `jax.shard_map` over that axis each device has its own."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape.get("data", 1) > 1 and types["data"] is AxisType.Auto


def split_parameters(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A module as its static graph and a plain tree; `nnx.merge(graph, params)` gives it back in a pure function."""
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def computation_types(module: nnx.Module) -> Params:
    """The shapes and types of parameters that lose nothing: those to which linear maps and embeddings cast their own.

    Norms compute with theirs in float32, and so do tables of distances; kernels in int8 stay. `module` may be abstract.
    """
    types = nnx.traversals.flatten_mapping(split_parameters(module)[1])
    for path, part in nnx.iter_modules(module):
        if isinstance(part, nnx.Linear | nnx.Embed) and part.dtype is not None:
            own = {
                leaf: types[leaf]
                for name in ("kernel", "bias", "embedding", *ADAPTERS)
                if (leaf := (*path, name)) in types and jnp.issubdtype(types[leaf].dtype, jnp.floating)
            }
            types |= {leaf: jax.ShapeDtypeStruct(array.shape, part.dtype) for leaf, array in own.items()}
    return nnx.traversals.unflatten_mapping(types)


def row_rngs(rng: Key[Array, ""], rows: Int[Array, " n"]) -> RowRngs:
    """One PRNG key a row, by its global number: the mask does not depend on how the batch is laid out."""
    return jax.vmap(partial(jax.random.fold_in, rng))(rows)


def fold_rngs(rngs: RowRngs | None, data: int | Int[Array, ""]) -> RowRngs | None:
    """Another independent key for every row."""
    return None if rngs is None else jax.vmap(lambda rng: jax.random.fold_in(rng, data))(rngs)


def dropout(x: Float[Array, "n ..."], rngs: RowRngs | None, rate: float) -> Float[Array, "n ..."]:
    """Inverted dropout (Srivastava et al. 2014) with one key a row; without keys, the identity."""
    if rngs is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda rng, row: jax.random.bernoulli(rng, 1.0 - rate, row.shape))(rngs, x)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
