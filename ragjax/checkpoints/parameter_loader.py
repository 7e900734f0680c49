"""From the tensors of a checkpoint to parameters on devices: leaf by leaf, and of each only the shards of this process.

At most two leaves are on the host at a time: one that is being read, and one on its way to the devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from ragjax.checkpoints.safetensors import Index, TensorReader
from ragjax.models.layers import Params

BLOCK = 2**16  # numbers read at a time: they are still in a processor's cache when they are transposed


class LeafSource(NamedTuple):
    """Which tensors a parameter is made of."""

    names: tuple[str | None, ...]  # one, or one a layer; None where it is missing, and 0
    stacked: bool  # the first axis of the parameter counts layers
    transposed: bool  # the rest of it is the transpose of a tensor


def load_leaves(like: Params, sources: Mapping[tuple[str, ...], LeafSource], reader: TensorReader) -> Params:
    """Parameters of the shapes, types and shardings of `like`; without a sharding on this process's first device.

    `sources` are by path. Raises `InputError` as the reader does.
    """
    params: dict[tuple[str, ...], jax.Array] = {}
    sent: jax.Array | None = None
    for path, leaf in nnx.traversals.flatten_mapping(like).items():
        params[path] = _load_leaf(leaf, sources[path], reader)
        if sent is not None:
            sent.block_until_ready()
        sent = params[path]
    return nnx.traversals.unflatten_mapping(params)


def _load_leaf(leaf: Any, source: LeafSource, reader: TensorReader) -> jax.Array:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # several devices may hold the same one

    def shard(index: Any) -> np.ndarray:
        where = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        if where not in shards:
            shards[where] = _read_shard(leaf.dtype, tuple(slice(*part) for part in where), source, reader)
        return shards[where]

    return jax.make_array_from_callback(leaf.shape, sharding, shard, dtype=leaf.dtype)


def _read_shard(dtype: Any, where: Index, source: LeafSource, reader: TensorReader) -> np.ndarray:
    """What of a parameter is at `where`, in a type."""
    shard = np.zeros([part.stop - part.start for part in where], dtype)
    layers, within = (shard, where[1:]) if source.stacked else (shard[None], where)
    for layer, name in zip(layers, source.names[where[0]] if source.stacked else source.names, strict=True):
        if name is not None and source.transposed:
            _read_tensor(layer.T, name, within[::-1], reader)
        elif name is not None:
            _read_tensor(layer, name, within, reader)
    return shard


def _read_tensor(target: np.ndarray, name: str, where: Index, reader: TensorReader) -> None:
    """Reads the part of a tensor that is at `where` into `target`, block by block."""
    rows, *others = where
    most = max(1, BLOCK // max(1, math.prod(part.stop - part.start for part in others)))
    for first in range(rows.start, rows.stop, most):
        some = slice(first, min(first + most, rows.stop))
        target[first - rows.start : some.stop - rows.start] = reader.read(name, (some, *others))
