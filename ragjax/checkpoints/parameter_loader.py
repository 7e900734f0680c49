"""From the tensors of a checkpoint to parameters on devices: leaf by leaf, and of each only the shards of this process.

At most two leaves are on the host at a time: one that is being read, and one on its way to the devices. Kernels in
int8 are quantised block by block as they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from ragjax.checkpoints.safetensors import Index, TensorReader
from ragjax.models.layers import SCALE, Params, channel_scale, to_int8

BLOCK = 2**16  # numbers read at a time: they are still in a processor's cache when they are transposed
Read = Callable[[str, Index], np.ndarray]  # of a tensor, by its name, a part


class LeafSource(NamedTuple):
    """Which tensors a parameter is made of."""

    names: tuple[str | None, ...]  # one, or one a layer; None where it is missing, and 0
    stacked: bool  # the first axis of the parameter counts layers
    transposed: bool  # the rest of it is the transpose of a tensor


def load_leaves(like: Params, sources: Mapping[tuple[str, ...], LeafSource], reader: TensorReader) -> Params:
    """Parameters of the shapes, types and shardings of `like`; without a sharding on this process's first device.

    `sources` are by path; the scales of kernels in int8 are made of the kernels'. Raises `InputError` as the reader
    does.
    """
    params: dict[tuple[str, ...], jax.Array] = {}
    sent: jax.Array | None = None
    int8 = _Int8Reader(reader)
    for path, leaf in nnx.traversals.flatten_mapping(like).items():
        if path[-1] == SCALE:
            source = sources[*path[:-1], "kernel"]._replace(transposed=False)
            params[path] = _load_leaf(leaf, source, int8.scales)
        else:
            params[path] = _load_leaf(leaf, sources[path], int8.read if leaf.dtype == np.int8 else reader.read)
        if sent is not None:
            sent.block_until_ready()
        sent = params[path]
    return nnx.traversals.unflatten_mapping(params)


class _Int8Reader:
    """Reads weights [E,D] of linear maps as int8, and the scales of their rows, each found when it is first needed.

    A library for it, such as qwix, quantises whole arrays on devices: it would need the float32 kernel there.
    """

    def __init__(self, reader: TensorReader) -> None:
        self._reader, self._scales = reader, dict[str, np.ndarray]()

    def read(self, name: str, index: Index) -> np.ndarray:
        rows, columns = index
        found = self._scales_of(name)[rows]
        if np.isnan(found).any():
            whole = self._reader.read(name, (rows, slice(None)))
            found[:] = channel_scale(whole.T)  # a view
            return to_int8(whole[:, columns].T, found).T
        return to_int8(self._reader.read(name, index).T, found).T

    def scales(self, name: str, index: Index) -> np.ndarray:
        (rows,), (_, size_in) = index, self._reader.shape(name)
        for some in _blocks(rows, size_in):
            if np.isnan(self._scales_of(name)[some]).any():
                self._scales[name][some] = channel_scale(self._reader.read(name, (some, slice(None))).T)
        return self._scales[name][rows]

    def _scales_of(self, name: str) -> np.ndarray:
        return self._scales.setdefault(name, np.full(self._reader.shape(name)[0], np.nan, np.float32))


def _load_leaf(leaf: Any, source: LeafSource, read: Read) -> jax.Array:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # several devices may hold the same one

    def shard(index: Any) -> np.ndarray:
        where = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        if where not in shards:
            shards[where] = _read_shard(leaf.dtype, tuple(slice(*part) for part in where), source, read)
        return shards[where]

    return jax.make_array_from_callback(leaf.shape, sharding, shard, dtype=leaf.dtype)


def _read_shard(dtype: Any, where: Index, source: LeafSource, read: Read) -> np.ndarray:
    """What of a parameter is at `where`, in a type."""
    shard = np.zeros([part.stop - part.start for part in where], dtype)
    layers, within = (shard, where[1:]) if source.stacked else (shard[None], where)
    for layer, name in zip(layers, source.names[where[0]] if source.stacked else source.names, strict=True):
        if name is not None and source.transposed:
            _read_tensor(layer.T, name, within[::-1], read)
        elif name is not None:
            _read_tensor(layer, name, within, read)
    return shard


def _read_tensor(target: np.ndarray, name: str, where: Index, read: Read) -> None:
    """Reads the part of a tensor that is at `where` into `target`, block by block."""
    rows, *others = where
    for some in _blocks(rows, math.prod(part.stop - part.start for part in others)):
        target[some.start - rows.start : some.stop - rows.start] = read(name, (some, *others))


def _blocks(rows: slice, width: int) -> Iterator[slice]:
    """A range of rows of so many numbers in parts of about `BLOCK` numbers."""
    most = max(1, BLOCK // max(1, width))
    return (slice(first, min(first + most, rows.stop)) for first in range(rows.start, rows.stop, most))
