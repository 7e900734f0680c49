"""Devices: one mesh with a `data` axis, over which questions are split and parameters are repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ragjax.config import InputError


def make_mesh() -> Mesh:
    """All devices along one axis, `data`; XLA chooses the shardings inside a jitted function."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Splits the leading axis of every host array in the tree over the devices; a process passes its own rows.

    Raises `InputError` if the number of devices does not divide the number of rows.
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    devices = mesh.local_mesh.size
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[0] % devices:
            raise InputError(
                f"a batch of {leaf.shape[0]} questions cannot be split over {devices} devices; make train.batch_size / "
                f"train.accumulate a multiple of {devices}"
            )
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The tree whole on every device. It may share memory with `tree`, which matters where buffers are donated."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def enable_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs, small ones too, under `folder` for later processes; call it before any is compiled."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
