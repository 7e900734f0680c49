"""What every model family shares: stacked layers, dropout by row, attention, the vocabulary visited by blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from ragjax.models.attention import NEGATIVE

Params = dict[str, Any]  # a nested dict of arrays, as `nnx.to_pure_dict` gives it


LOGIT_BUDGET = 2**24  # at most so many logits at once when they are summed over the vocabulary
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
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
    if AxisType.Auto not in jax.sharding.get_abstract_mesh().axis_types:
        return activations

    def rows(x: Array) -> Array:
        free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec("data", *free))

    return jax.tree.map(rows, activations)


def gather(parameter: Array) -> Array:
    """Whole on every device, where `split_by_rows` splits; else the identity."""
    if AxisType.Auto not in jax.sharding.get_abstract_mesh().axis_types:
        return parameter
    return jax.lax.with_sharding_constraint(parameter, PartitionSpec())


def split_parameters(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A module as its static graph and a plain tree; `nnx.merge(graph, params)` gives it back in a pure function."""
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def row_rngs(key: Key[Array, ""], rows: Int[Array, " n"]) -> Key[Array, " n"]:
    """One dropout key a row, by its global number: the mask does not depend on how the batch is laid out."""
    return jax.vmap(partial(jax.random.fold_in, key))(rows)


def fold_rngs(keys: Key[Array, " n"] | None, data: int | Int[Array, ""]) -> Key[Array, " n"] | None:
    """Another independent key for every row."""
    return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def dropout(x: Float[Array, "n ..."], keys: Key[Array, " n"] | None, rate: float) -> Float[Array, "n ..."]:
    """Inverted dropout with one key a row; without keys, the identity."""
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key, row: jax.random.bernoulli(key, 1.0 - rate, row.shape))(keys, x)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def vocab_logsumexp(
    hidden: Float[Array, "... D"], head: Float[Array, "V D"], bias: Float[Array, " V"] | None = None
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Float32 logsumexp of the logits, which normalises them, and their mean over the vocabulary (for smoothing).

    The vocabulary is visited in blocks, forward and backward, so that memory does not grow with rows times V.
    """
    flat, vocabulary = hidden.reshape(-1, hidden.shape[-1]), head.shape[0]
    rows = flat.shape[0]
    blocks = -(-vocabulary // max(1024, LOGIT_BUDGET // max(1, rows)))
    block = -(-vocabulary // blocks)
    head = gather(head.astype(hidden.dtype))  # once, not for every block

    def visit(carry: tuple[Array, Array, Array], number: Array) -> tuple[tuple[Array, Array, Array], None]:
        top, total, summed = carry
        first = jnp.minimum(number * block, vocabulary - block)  # the last block overlaps the one before
        part = jax.lax.dynamic_slice_in_dim(head, first, block)
        logits = jnp.einsum("rd,vd->rv", flat, part, preferred_element_type=jnp.float32)
        if bias is not None:
            logits += jax.lax.dynamic_slice_in_dim(bias, first, block)
        fresh = first + jnp.arange(block) >= number * block
        masked = jnp.where(fresh, logits, -jnp.inf)
        new_top = jax.lax.stop_gradient(jnp.maximum(top, masked.max(axis=-1)))
        total = total * jnp.exp(top - new_top) + jnp.exp(masked - new_top[:, None]).sum(axis=-1)
        summed += jnp.where(fresh, logits, 0.0).sum(axis=-1)
        return (new_top, total, summed), None

    zero = jnp.zeros(rows, jnp.float32)
    start = (jnp.full(rows, NEGATIVE, jnp.float32), zero, zero)
    # logits that are few enough to be kept are not computed again going backward
    (top, total, summed), _ = jax.lax.scan(visit if blocks == 1 else jax.checkpoint(visit), start, jnp.arange(blocks))
    shape = hidden.shape[:-1]
    return (top + jnp.log(total)).reshape(shape), (summed / vocabulary).reshape(shape)


def target_logits(
    hidden: Float[Array, "... D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "..."],
    bias: Float[Array, " V"] | None = None,
) -> Float[Array, "..."]:
    """The float32 logits of the targets alone."""
    rows = gather(head.astype(hidden.dtype))[targets]
    logits = jnp.einsum("...d,...d->...", hidden, rows, preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias[targets]


RowRngs = Key[Array, " n"]
