"""Devices and processes: a mesh whose axis `data` splits questions, and `model` attention heads and feed-forward.

Parameters are whole along `data`, or, with FSDP, split there as well. XLA does what communication that needs. Training
lies on the devices of all processes; what answers questions and embeds passages, on those of its own process.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from ragjax.errors import InputError
from ragjax.progress import terminal

Result = TypeVar("Result")

# the dimension of a kernel, counted from its end, that is split over `model`: heads, or the feed-forward's inner width
SPLIT = {"query": -1, "key": -1, "value": -1, "output": -2, "up": -1, "gate": -1, "down": -2}
SIGN_OF_LIFE = 10.0  # seconds between two, while one process works and the others wait
SILENT = 60  # seconds without a sign of life after which a process counts as dead, and the others stop


def join_processes(stop_together: bool) -> None:
    """Joins the other processes of this run; call it before anything else of JAX.

    Where there are others JAX knows by itself on TPU pods, SLURM, Open MPI and Kubernetes; elsewhere the environment
    says: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. With `stop_together`
    SIGTERM no longer ends this process, but tells JAX to let all of them reach one step and stop there
    (`reached_preemption_sync_point`). Progress is shown by process 0 alone, and only Python writes to standard output.
    Raises `InputError` if they cannot be joined.
    """

    def number(name: str) -> int | None:
        value = os.environ.get(name)
        if value is not None and not value.isdecimal():
            raise InputError(f"{name} is {value!r}; expected a number")
        return None if value is None else int(value)

    count, index = number("JAX_NUM_PROCESSES"), number("JAX_PROCESS_ID")
    # Gloo, which connects CPUs, tells on standard output of each connection it makes
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    jax.config.update("jax_enable_preemption_service", stop_together)
    try:
        jax.distributed.initialize(
            num_processes=count, process_id=index, heartbeat_timeout_seconds=SILENT, shutdown_timeout_seconds=SILENT
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: the other processes cannot be joined ({str(error).splitlines()[0]}); where JAX does not "
            "find them by itself, set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None
    terminal.quiet = not is_first()


def is_first() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here; `name` is the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_all(text: str) -> list[str]:
    """The texts that the processes give, in their order."""
    if jax.process_count() == 1:
        return [text]
    given = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(given)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(given)] = given
    every = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(every, lengths, strict=True)]


def on_first(action: Callable[[], Result]) -> Result | None:
    """What `action` returns, run in process 0 alone while the others wait, however long, who get None.

    An `InputError` that it raises is raised in all of them.
    """
    if jax.process_count() == 1:
        return action()
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        running = pool.submit(action) if is_first() else None
        while True:
            state = {"done": False, "message": ""}
            if running is not None:
                # a collective that others reach half a minute before is given up: so they are told that it goes on
                state["done"] = running in wait([running], timeout=SIGN_OF_LIFE).done
            if running is not None and state["done"] and (error := running.exception()) is not None:
                if not isinstance(error, InputError):
                    raise error
                state["message"] = str(error)
            state = json.loads(from_all(json.dumps(state))[0])
            if state["message"]:
                raise InputError(state["message"])
            if state["done"]:
                return None if running is None else running.result()
    finally:
        pool.shutdown(wait=False)


def first_says(flag: bool) -> bool:
    """The flag of process 0."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


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


def check_batch(mesh: Mesh, questions: int) -> None:
    """Raises `InputError` if the axis `data` does not divide the number of questions in a micro-batch."""
    if questions % (devices := mesh.shape["data"]):
        raise InputError(
            f"{questions} questions cannot be split over {devices} devices; make train.batch_size / train.accumulate "
            f"a multiple of {devices}"
        )


def rows_here(mesh: Mesh, count: int) -> Int[np.ndarray, " n"]:
    """Which of the `count` rows of a batch lie on this process's devices, in order. `data` divides `count`."""
    slices = _rows(mesh).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in slices]))


def _rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def shard_batch(mesh: Mesh, batch: Any, count: int) -> Any:
    """A tree of host arrays, which hold the `rows_here` of a batch of `count`, as the batch split over the devices."""
    at = {int(row): position for position, row in enumerate(rows_here(mesh, count))}

    def split(leaf: np.ndarray) -> Any:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(count)
            return leaf[at[start] :][: stop - start]

        return jax.make_array_from_callback((count, *leaf.shape[1:]), _rows(mesh), part)

    return jax.tree.map(split, batch)


def place(tree: Any, shardings: Any) -> Any:
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


def on_host(tree: Any) -> Any:
    """Arrays that may be split over devices and processes, whole on every host; all processes call it."""

    def whole(leaf: Any) -> np.ndarray:
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return np.asarray(leaf) if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def on_each_device(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(params, *rows)` applied by each device to its part of the rows, as if it were alone; jitted.

    So what comes out for a row does not depend on how many devices there are, to the bit.
    """
    rows = PartitionSpec("data")

    def whole(params: Any, *arrays: Any) -> Any:
        specs = (PartitionSpec(), *(rows for _ in arrays))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(params, *arrays)

    jitted = jax.jit(whole)
    return lambda params, *arrays: jitted(params, *jax.device_put(arrays, NamedSharding(mesh, rows)))


def lay(mesh: Mesh, tree: Any, *spec: str | tuple[str, ...] | None) -> Any:
    """The shapes and types of a tree, each with its place on the mesh: along no axis unless `spec` names one."""
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def enable_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs, small ones too, under `folder` for later processes; call it before any is compiled.

    A folder that JAX was given already ($JAX_COMPILATION_CACHE_DIR) is used instead.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
