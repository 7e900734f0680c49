"""Programs that each device along `data` runs by itself, on the questions that lie there, without any collective.

A question lies on one device with all its documents, so that a program of decoding is a pure function of whole
questions. Left alone, XLA would not see that: rows that are sorted or taken by number it brings to every device. The
mesh's axis `model` stays XLA's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec, get_abstract_mesh, use_abstract_mesh
from jaxtyping import Array, Float, Int

from ragjax.padding import bucket_size

LAYERS_FIRST = ("keys", "values")  # fields [L, n, …] of memories and pools; the rows of all others come first
SPECS = (PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec())  # rows first, behind the layers, none
WHOLE = 2


def on_mesh(mesh: Mesh) -> AbstractContextManager[Any]:
    """Within it `by_device` splits over the axis `data` of a mesh; nothing changes where that is one device."""
    return use_abstract_mesh(mesh.abstract_mesh) if mesh.size > 1 else nullcontext()


def data_devices() -> int:
    """The length of the axis `data` within `on_mesh`; else, and for each device by itself, 1."""
    return axis_length("data")


def axis_length(axis: str) -> int:
    """Over how many devices XLA may split along an axis of the mesh, within `on_mesh`; else 1."""
    return get_abstract_mesh().shape[axis] if axis in auto_axes() else 1


def auto_axes() -> set[str]:
    """The axes of the mesh that are still XLA's."""
    mesh = get_abstract_mesh()
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}


def split_heads(keys_or_values: Float[Array, "L n S Hkv Dh"]) -> Float[Array, "L n S Hkv Dh"]:
    """Over the axis `model`, where that divides the heads: as `sharding.heads_spec` says."""
    if (model := axis_length("model")) == 1 or keys_or_values.shape[3] % model:
        return keys_or_values
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(keys_or_values, PartitionSpec(free, free, free, "model", free))


def by_device(function: Callable[..., Any], params: Any, *arguments: Any) -> Any:
    """`function(params, *arguments)`, by each device on its own rows of the arguments; within `jax.jit`.

    Args:
        function: pure, and of each row, or of each device's rows, alone.
        params: whole along `data`.
        arguments: trees whose leaves have rows (see `LAYERS_FIRST`), a number that divides into the devices; what has
            no dimension is whole. Likewise what the function returns: what has no dimension must be equal everywhere.
    """
    if data_devices() == 1:
        return function(params, *arguments)
    parts, join = _by_place(arguments)
    joined: list[Callable[[Any], Any]] = []

    def alone(params: Any, parts: Any) -> Any:
        made, back = _by_place(function(params, *join(parts)))
        joined.append(back)
        return made

    specs = (PartitionSpec(), SPECS)
    # in 3 groups of leaves, each of which has one spec
    mesh = get_abstract_mesh()
    axes = {"data"} if mesh.shape["model"] > 1 else set(mesh.axis_names)
    split = jax.shard_map(alone, in_specs=specs, out_specs=SPECS, axis_names=axes, check_vma=False)
    made = split(params, parts)
    return joined[-1](made)


def _by_place(tree: Any) -> tuple[tuple[list[Any], list[Any], list[Any]], Callable[[Any], Any]]:
    """The leaves of a tree by where their rows are, as in `SPECS`, and what puts such leaves together again."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    groups: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    order = [WHOLE if np.ndim(leaf) == 0 else int(_name(path) in LAYERS_FIRST) for path, leaf in found]
    for place, (_, leaf) in zip(order, found, strict=True):
        groups[place].append(leaf)

    def join(groups: Iterable[Sequence[Any]]) -> Any:
        parts = [iter(group) for group in groups]
        return jax.tree.unflatten(structure, [next(parts[place]) for place in order])

    return groups, join


def _name(path: tuple[Any, ...]) -> str | None:
    return getattr(path[-1], "name", None) if path else None


@dataclass(frozen=True)
class RowGroup:
    """Some of n rows that lie on the devices, in an order in which each device has as many, all of them its own."""

    local: Int[np.ndarray, " R"]  # the rows as their devices count them
    rows: Int[np.ndarray, " R"]  # the rows as all count them; what fills up is any row of the device
    source: Int[np.ndarray, " R"]  # which of the rows asked for each is; 0 for what fills up
    place: Int[np.ndarray, " _"]  # where each of the rows asked for stands

    @property
    def count(self) -> int:
        """R."""
        return len(self.rows)

    def expanded(self, times: int) -> RowGroup:
        """The same of rows each of which stands for so many consecutive ones: of questions with their documents."""

        def expand(rows: np.ndarray) -> np.ndarray:
            return (rows[:, None] * times + np.arange(times, dtype=rows.dtype)).ravel()

        return RowGroup(*map(expand, (self.local, self.rows, self.source, self.place)))


def group_by_device(rows: Sequence[int] | Int[np.ndarray, " _"], total: int, nearly_all: bool = False) -> RowGroup:
    """Groups some of `total` rows, each asked for once: of every device 1, 2, 3, 4, 6, 8, 12, … rows, at most all.

    Where it is all, or, with `nearly_all`, the next size would be, they stand in order: that spares a program.
    """
    rows, each = np.asarray(rows, np.int32), total // data_devices()
    own = [np.flatnonzero(rows // each == device) for device in range(total // each)]
    size = bucket_size(max(map(len, own)))
    if size >= each or (nearly_all and bucket_size(size + 1) > each):
        source = np.zeros(total, np.int32)
        source[rows] = np.arange(len(rows))
        every = np.arange(total, dtype=np.int32)
        return RowGroup(every % each, every, source, rows)
    chosen, source, place = *np.zeros((2, len(own), size), np.int32), np.zeros_like(rows)
    for device, which in enumerate(own):
        chosen[device] = rows[which[0]] if len(which) else device * each
        chosen[device, : len(which)], source[device, : len(which)] = rows[which], which
        place[which] = device * size + np.arange(len(which))
    return RowGroup(chosen.ravel() % each, chosen.ravel(), source.ravel(), place)
