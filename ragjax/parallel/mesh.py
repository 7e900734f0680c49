"""The mesh of devices: its axis `data` splits questions, and `model` attention heads and feed-forward.

Training lies on the devices of all processes; what answers questions and embeds passages, on those of its own process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ragjax.errors import InputError


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all processes, or those given, `model` of them along the axis of that name.

    XLA chooses the shardings inside a jitted function. Raises `InputError` if `model` does not divide their number.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if count % model:
        raise InputError(f"mesh.model={model} does not divide the {count} devices; choose one of {_divisors(count)}")
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((count // model, model), ("data", "model"), axis_types=types, devices=devices)


def local_mesh(model: int = 1, data: int | None = None) -> Mesh:
    """The same of this process's own devices, or of as many as give the axis `data` that length.

    `model` is lowered to what divides their number: a model trained on many devices answers on few as well.
    """
    devices = jax.local_devices()
    model = math.gcd(model, len(devices))
    if data is None or data * model >= len(devices):
        return make_mesh(model, devices)
    # some of a TPU's devices are no torus that `jax.make_mesh` could order
    some = np.array(devices[: data * model]).reshape(data, model)
    return Mesh(some, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def _divisors(count: int) -> str:
    return ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)


def check_batch(mesh: Mesh, questions: int) -> None:
    """Raises `InputError` if the axis `data` does not divide the number of questions in a micro-batch."""
    if questions % (devices := mesh.shape["data"]):
        raise InputError(
            f"{questions} questions cannot be split over {devices} devices; make train.batch_size / "
            f"train.gradient_accumulation a multiple of {devices}"
        )
