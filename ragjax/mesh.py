"""Devices: a mesh whose axis `data` splits questions, and whose axis `model` splits attention heads and feed-forward.

Parameters are whole along `data`, or, with FSDP, split there as well. XLA does what communication that needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ragjax.config import InputError

# the dimension of a kernel, counted from its end, that is split over `model`: heads, or the feed-forward's inner width
SPLIT = {"query": -1, "key": -1, "value": -1, "output": -2, "up": -1, "gate": -1, "down": -2}


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices, `model` of them along the axis of that name; XLA chooses the shardings inside a jitted function.

    Raises `InputError` if `model` does not divide their number.
    """
    count = jax.device_count() if devices is None else len(devices)
    if count % model:
        raise InputError(f"mesh.model={model} does not divide the {count} devices; choose one of {_divisors(count)}")
    shape, names, types = (count // model, model), ("data", "model"), (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices)


def _divisors(count: int) -> str:
    return ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)


def parameter_spec(
    mesh: Mesh, names: Sequence[str], shape: Sequence[int], heads: int | None, fsdp: bool
) -> PartitionSpec:
    """How a parameter, or what an optimiser keeps of it, lies on the mesh; `names` is its path.

    Over `model` by `SPLIT`, if the axis divides the number of `heads` (None where there are none: the dimension
    itself). Over `data`, with FSDP, the largest dimension left that the axis divides, stacked layers apart.
    """
    spec: list[str | None] = [None] * len(shape)
    module = names[-2] if len(names) > 1 else ""
    at = None if names[-1] == "bias" and SPLIT.get(module) == -2 else SPLIT.get(module)
    if at is not None and mesh.shape["model"] > 1 and (heads or shape[at]) % mesh.shape["model"] == 0:
        spec[at] = "model"
    if fsdp and names[-1] in ("kernel", "embedding", "bias", "scale"):
        first = 1 if "layers" in names else 0
        free = [d for d in range(first, len(shape)) if spec[d] is None and shape[d] % mesh.shape["data"] == 0]
        if free:
            spec[max(free, key=lambda d: shape[d])] = "data"
    return PartitionSpec(*spec)


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Splits the leading axis of every host array in the tree over the devices; a process passes its own rows.

    Raises `InputError` if the number of devices does not divide the number of rows.
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    devices = mesh.local_mesh.shape["data"]
    for leaf in jax.tree.leaves(batch):
        check_split(leaf.shape[0], devices)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def check_split(rows: int, devices: int) -> None:
    """Raises `InputError` if the number of devices does not divide the number of rows."""
    if rows % devices:
        raise InputError(
            f"a batch of {rows} questions cannot be split over {devices} devices; make train.batch_size / "
            f"train.accumulate a multiple of {devices}"
        )


def lay(mesh: Mesh, tree: Any, *spec: str | None) -> Any:
    """The shapes and types of a tree, each with its place on the mesh: along no axis unless `spec` names one."""
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The tree whole on every device. It may share memory with `tree`, which matters where buffers are donated."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def enable_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs, small ones too, under `folder` for later processes; call it before any is compiled."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
