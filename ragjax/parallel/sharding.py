"""How arrays lie on the mesh. Parameters are whole along `data`, or, with FSDP, split there as well.

XLA does what communication that needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

# the dimension of a kernel, counted from its end, that is split over `model`: heads, or the feed-forward's inner width
SPLIT = {"query": -1, "key": -1, "value": -1, "output": -2, "up": -1, "gate": -1, "down": -2}
VOCABULARY = ("embed", "head")  # a generator's tables [V, D], whose rows are split over `model`


def parameter_spec(
    mesh: Mesh, names: Sequence[str], shape: Sequence[int], heads: int | None, fsdp: bool
) -> PartitionSpec:
    """How a parameter, or what an optimiser keeps of it, lies on the mesh; `names` is its path.

    Over `model` by `SPLIT`, if the axis divides the number of `heads` (None where there are none: the dimension
    itself), and the tables of `VOCABULARY`, if it divides V. Over `data`, with FSDP, the largest dimension left that
    the axis divides, stacked layers apart.
    """
    spec: list[str | None] = [None] * len(shape)
    module = names[-2] if len(names) > 1 else ""
    at = SPLIT.get(module)
    # what the split dimension does not reach
    if (names[-1], at) in (("bias", -2), ("kernel_scale", -2), ("lora_a", -1), ("lora_b", -2)):
        at = None
    at = 0 if names[-1] == "embedding" and module in VOCABULARY else at
    if at is not None and mesh.shape["model"] > 1 and (heads or shape[at]) % mesh.shape["model"] == 0:
        spec[at] = "model"
    if fsdp and names[-1] in ("kernel", "embedding", "bias", "scale", "lora_a", "lora_b"):
        first = 1 if "layers" in names else 0
        free = [d for d in range(first, len(shape)) if spec[d] is None and shape[d] % mesh.shape["data"] == 0]
        if free:
            spec[max(free, key=lambda d: shape[d])] = "data"
    return PartitionSpec(*spec)


def widens_bfloat16(mesh: Mesh) -> bool:
    """Whether its devices compute bfloat16 in float32, as CPUs do: before a loop XLA widens all that is read in it."""
    return mesh.devices.flat[0].platform == "cpu"


def heads_spec(mesh: Mesh, heads: int) -> PartitionSpec:
    """How keys or values [L, n, S, Hkv, Dh] of several layers lie: rows over `data`, heads as projections have them."""
    return PartitionSpec(None, "data", None, "model" if heads % mesh.shape["model"] == 0 else None)


def local_rows(mesh: Mesh, count: int) -> Int[np.ndarray, " n"]:
    """Which of the `count` rows of a batch lie on this process's devices, in order. `data` divides `count`."""
    slices = _rows(mesh).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in slices]))


def _rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def shard_batch(mesh: Mesh, batch: Any, count: int) -> Any:
    """A tree of host arrays, which hold the `local_rows` of a batch of `count`, as the batch split over the devices."""
    at = {int(row): position for position, row in enumerate(local_rows(mesh, count))}

    def split(leaf: np.ndarray) -> Any:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(count)
            return leaf[at[start] :][: stop - start]

        return jax.make_array_from_callback((count, *leaf.shape[1:]), _rows(mesh), part)

    return jax.tree.map(split, batch)


def put_global(tree: Any, shardings: Any) -> Any:
    """A tree of arrays that every process has whole, laid out as `shardings` say: one for each leaf, or one for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(leaf: Any, sharding: NamedSharding) -> Any:
        if sharding.is_fully_addressable:  # from one device to others without a detour
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def gather_to_host(tree: Any) -> Any:
    """Arrays that may be split over devices and processes, whole on every host; all processes call it."""

    def whole(leaf: Any) -> np.ndarray:
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return np.asarray(leaf) if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def map_per_device(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(params, *rows)` applied by each device to its part of the rows, as if it were alone; jitted.

    So what comes out for a row does not depend on how many devices there are, to the bit.
    """
    rows = PartitionSpec("data")

    def whole(params: Any, *arrays: Any) -> Any:
        specs = (PartitionSpec(), *(rows for _ in arrays))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(params, *arrays)

    jitted = jax.jit(whole)
    return lambda params, *arrays: jitted(params, *jax.device_put(arrays, NamedSharding(mesh, rows)))


def abstract_with_sharding(mesh: Mesh, tree: Any, *spec: str | tuple[str, ...] | None) -> Any:
    """The shapes and types of a tree, each with its place on the mesh: along no axis unless `spec` names one."""
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def allgather_rows(mesh: Mesh, arrays: Any, count: int) -> Any:
    """A tree of host arrays, which hold the `local_rows` of `count`, whole on every host."""
    # whether others have other rows must not be judged by this process's own: all or none take part
    return gather_to_host(shard_batch(mesh, arrays, count)) if mesh.is_multi_process else arrays
