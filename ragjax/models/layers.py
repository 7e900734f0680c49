"""What every model family shares: stacked layers, dropout by row, attention, the vocabulary visited by blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

Params = dict[str, Any]  # a nested dict of arrays, as `nnx.to_pure_dict` gives it
NEGATIVE = -1e30  # masks attention logits: finite, so that a fully masked row gives no NaN
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


def row_keys(key: Key[Array, ""], rows: Int[Array, " n"]) -> Key[Array, " n"]:
    """One dropout key a row, by its global number: the mask does not depend on how the batch is laid out."""
    return jax.vmap(partial(jax.random.fold_in, key))(rows)


def fold(keys: Key[Array, " n"] | None, data: int | Int[Array, ""]) -> Key[Array, " n"] | None:
    """Another independent key for every row."""
    return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def dropout(x: Float[Array, "n ..."], keys: Key[Array, " n"] | None, rate: float) -> Float[Array, "n ..."]:
    """Inverted dropout with one key a row; without keys, the identity."""
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key, row: jax.random.bernoulli(key, 1.0 - rate, row.shape))(keys, x)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


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


class Attended(NamedTuple):
    """P tokens that G groups of M new tokens may look at: a document's memory, a pool of slots, or their own group.

    `keys` and `values` are [n,P,Hkv,Dh] where all groups share them, [n,G,P,Hkv,Dh] where each group has its own.
    """

    keys: Float[Array, "..."]
    values: Float[Array, "..."]
    visible: Bool[Array, "#n #G #M P"]
    bias: Float[Array, "#n #G M P H"] | None = None  # added to the attention logits


def attend(queries: Float[Array, "n G M H Dh"], parts: Sequence[Attended], scale: float) -> Float[Array, "n G M H Dh"]:
    """Attention with one softmax over all the parts; groups of H/Hkv heads share keys and values.

    Parts are never joined, and what is divided is the outcome: on a CPU that takes a third of the time of a softmax.
    """
    n, groups, length, heads, width = queries.shape
    kv = parts[0].keys.shape[-2]
    q = jnp.einsum("ngmkrd->nkrgmd", (queries * scale).reshape(n, groups, length, kv, heads // kv, width))
    scores = [jnp.where(part.visible[:, None, None], _attention_scores(q, part), NEGATIVE) for part in parts]
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


def attend_within(
    queries: Float[Array, "n S H Dh"],
    keys: Float[Array, "n S Hkv Dh"],
    values: Float[Array, "n S Hkv Dh"],
    visible: Bool[Array, "#n #S S"],
) -> Float[Array, "n S H Dh"]:
    """Attention of n rows of S tokens to themselves; `visible` says which tokens each sees."""
    rows = Attended(keys, values, visible[:, None])
    return attend(queries[:, None], [rows], queries.shape[-1] ** -0.5)[:, 0]


def _attention_scores(q: Float[Array, "n k r G M Dh"], part: Attended) -> Float[Array, "n k r G M P"]:
    scores = jnp.einsum(f"nkrgmd,{_form(part)}->nkrgmp", q, part.keys, preferred_element_type=jnp.float32)
    if part.bias is None:
        return scores
    bias = part.bias.reshape(*part.bias.shape[:-1], *q.shape[1:3])
    return scores + jnp.einsum("ngmpkr->nkrgmp", bias)


def _form(part: Attended) -> str:
    return "npkd" if part.keys.ndim == 4 else "ngpkd"


def normalizer(
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
