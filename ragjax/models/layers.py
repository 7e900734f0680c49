"""What every model family shares: stacked layers, dropout by row, activations, and how activations are sharded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int, Key

Params = dict[str, Any]  # a nested dict of arrays, as `nnx.to_pure_dict` gives it
RowRngs = Key[Array, " n"]  # one PRNG key a row, for dropout

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose parameters have a leading axis of `count` layers, so that compile time ignores depth."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))


def scan_layers(layers: nnx.Module, step: Callable, carry: Any, xs: Any = None, remat: bool = False) -> tuple[Any, Any]:
    """Runs `step(layer, carry, x) -> (carry, y)` through stacked layers.

    Going backward, `remat` computes each layer again; without it matrix products with parameters are kept, and only
    what lies between them is computed again: that is faster than to keep everything, and takes half the memory.
    """
    graph, params = nnx.split(layers)

    def body(carry: Any, inputs: tuple[Any, Any]) -> tuple[Any, Any]:
        layer_params, x = inputs
        carry, y = step(nnx.merge(graph, layer_params), carry, x)
        return split_by_rows(carry), y

    policy = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    body = jax.checkpoint(body, policy=policy, prevent_cse=False)  # a loop's body needs no guard against CSE
    return jax.lax.scan(body, split_by_rows(carry), (params, xs))


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


def gather(parameter: Array) -> Array:
    """Whole on every device, where `split_by_rows` splits; else the identity."""
    if not _partitioned_by_xla():
        return parameter
    return jax.lax.with_sharding_constraint(parameter, PartitionSpec())


def _partitioned_by_xla() -> bool:
    """Whether XLA splits rows over `data`; inside `jax.shard_map` over that axis each device has its own."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get("data") is AxisType.Auto


def split_parameters(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A module as its static graph and a plain tree; `nnx.merge(graph, params)` gives it back in a pure function."""
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


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
