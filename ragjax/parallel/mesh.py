"""The mesh of devices: its axis `data` splits questions, and `model` attention heads and feed-forward.

`command_mesh` says on which devices a command's rows and parameters lie, and `index_mesh` on which its index, for the
command and for its plan. Rows (questions with their documents, or passages) lie over `data` (`shard_batch`), the index
over all devices (`place_rows`), parameters as `state_shardings` says: whole along `data` but for training with FSDP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ragjax.errors import InputError

Command = Literal["index", "train", "evaluate", "answer"]


def command_mesh(command: Command, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices on which all that a command computes with lies, but for its index, in this process or in a plan's.

    Training lies on those of all processes. What answers questions and embeds passages lies on those of one process,
    which then never waits for another: all of them, whatever the number of questions.

    Args:
        command: as on the command line.
        model: `mesh.model`. Training needs one that divides the devices; a model that was trained on many answers on
            fewer, too; passages are embedded by each device alone.
        devices: all that there are, by default JAX's.

    Raises `InputError` if `model` does not divide the devices of training.
    """
    if command == "train":
        return make_mesh(model, devices)
    if devices is None:
        return local_mesh(1 if command == "index" else model)
    own = [device for device in devices if device.process_index == devices[0].process_index]
    return make_mesh(1 if command == "index" else math.gcd(model, len(own)), own)


def index_mesh(command: Command, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices over which a command splits its index; the arguments are those of `command_mesh`.

    Those that it computes with, and in an evaluation those of all its processes: they search together.
    """
    return make_mesh(1, devices) if command == "evaluate" else command_mesh(command, model, devices)


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
