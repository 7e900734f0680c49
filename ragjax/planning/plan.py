"""`ragjax plan`: what a run needs of disk and memory, from each model's config.json, before anything is built.

The sizes of parameters, of the training state and of embeddings are exact. Temporaries, and the bytes that devices send
to each other, are what XLA says of the very programs that `ragjax train` and `ragjax evaluate` run, compiled here from
shapes alone: for virtual CPU devices as many as asked for, or for a TPU that need not be there.

Where the number of a row comes from: index_rows.py, train_rows.py and evaluate_rows.py list the rows in the order of
the table, each beside the function that computes it.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from ragjax.config import ON_DEVICES, Config
from ragjax.errors import InputError
from ragjax.parallel.mesh import command_mesh
from ragjax.planning.evaluate_rows import BATCH_TIME, evaluate_rows
from ragjax.planning.index_rows import index_rows
from ragjax.planning.inputs import PlanInputs, open_inputs
from ragjax.planning.memory import memory_advice
from ragjax.planning.roofline import MACHINES, Chip, Machine, chip_of
from ragjax.planning.rows import Row, Total, Unknown, totals
from ragjax.planning.shared_rows import faiss
from ragjax.planning.train_rows import STEP_TIME, train_rows
from ragjax.resources import free_disk, host_memory, size_text
from ragjax.retrieval.faiss_index import faiss_bytes
from ragjax.training.state import for_inference, larger_model_axis

# for the TPU's compiler where there is none: else it asks, at length, which machine this is
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process is refused, as if both wanted the TPU
}
CHIPS_OF_A_MACHINE = 8  # of TPU v5e and v6e
SMALL_FAISS = "IVF16384,SQ8"  # a byte for each number


@dataclass(frozen=True)
class Plan:
    """The rows, in the order of the table, and for each command and place settings that would lower what it needs."""

    rows: list[Row]
    advice: dict[tuple[str, str], list[str]]


def memory_plan(config: Config, mesh: Mesh | None = None, chip: Chip | None = None, stand_ins: bool = False) -> Plan:
    """What `ragjax index`, `train` and `evaluate` will need. Of a model on the hub only its config.json is fetched.

    The mesh, by default one device, may be of devices that are not there; with a `chip` it tells the least times, too.
    With `stand_ins` CPU devices of the mesh stand for accelerators: parameters are counted in the types of these, and
    prompts read as these do, though it is CPUs that XLA compiles for. A model or a corpus that cannot be had makes the
    rows that depend on it unknown. Raises `InputError` for settings that do not go together.
    """
    inputs = open_inputs(config, mesh or command_mesh("train", config.mesh.model, jax.devices()[:1]), stand_ins)
    rows = [*index_rows(inputs), *train_rows(inputs, chip), *evaluate_rows(inputs, chip)]
    return Plan(rows, _advice(inputs))


@dataclass(frozen=True)
class MachinePlan:
    """What a configuration needs of some chips together, and how fast these may be."""

    machine: Machine
    needs: dict[str, Total]  # of each device, to train and to evaluate
    seconds: dict[str, tuple[float, str]]  # at least, and how that was computed: a step, a batch of questions
    questions: int  # in such a batch, of all processes together
    problem: str | None = None  # why there is no plan


def sweep(config: Config) -> Iterator[MachinePlan]:
    """A plan for each of `MACHINES`, which need not be there, as soon as it is computed.

    TPUs' own compiler tells their temporaries and traffic, and that of as many CPUs those of GPUs.
    """
    most = max(machine.devices for machine in MACHINES if machine.topology is None)
    with suppress(RuntimeError):  # JAX has started: then there are as many as there are
        jax.config.update("jax_num_cpu_devices", most)
    for machine in MACHINES:
        try:
            mesh = planned_mesh(config, machine.devices, machine.topology)
            plan = memory_plan(config, mesh, machine.chip, stand_ins=True)
        except InputError as error:
            yield MachinePlan(machine, {}, {}, 0, str(error))
            continue
        has: dict[str, int | None] = {"disk": None, "host": None}
        if machine.chip.memory is not None:
            has["device"] = int(machine.chip.memory * 2**30)
        sums = totals(plan.rows, has)
        needs = {of.command: of for of in sums if of.place == "device" and of.command != "index"}
        timed = {STEP_TIME: "train", BATCH_TIME: "evaluate"}
        seconds = {timed[row.what]: (row.size, row.how) for row in plan.rows if row.what in timed and row.size}
        own = command_mesh("evaluate", config.mesh.model, list(mesh.devices.flat))
        questions = config.evaluate.batch_size * own.shape["data"] * (mesh.size // own.size)
        yield MachinePlan(machine, needs, seconds, questions)


def _advice(inputs: PlanInputs) -> dict[tuple[str, str], list[str]]:
    """For each command and place, settings that would lower what it needs there."""
    index, settings = inputs.config.index, inputs.config.evaluate
    exact = index.kind in ON_DEVICES
    evaluate = ["index.kind=HNSW32 (the host then searches)"] if exact else []
    if exact and index.dtype == "float32":
        evaluate.append("index.dtype=bfloat16")
    if settings.batch_size > 1:
        evaluate.append("evaluate.batch_size=1")
    if settings.max_untrained_questions != 0:
        evaluate.append("evaluate.max_untrained_questions=0")
    if inputs.config.generator.quantization is None:
        evaluate.append("generator.quantization=int8")
    if inputs.config.decode.passage_cache_gib:
        evaluate.append("a smaller decode.passage_cache_gib")
    with suppress(Unknown):
        if (model := larger_model_axis(for_inference(inputs.rag()), inputs.mesh_of("evaluate"))) is not None:
            instead = " (mesh.fsdp splits parameters in training only)" if inputs.config.mesh.fsdp else ""
            evaluate.append(f"mesh.model={model}{instead}")
    evaluate.append("smaller decode.num_docs or decode.num_beams")
    advice = {("index", "device"): ["a smaller index.batch_size"], ("evaluate", "device"): evaluate}
    with suppress(Unknown):
        advice["train", "device"] = memory_advice(inputs.placed_rag(), inputs.mesh)
    with suppress(Unknown):
        (count, _), encoder = inputs.passages(), inputs.model("passage encoder")
        size = faiss_bytes(SMALL_FAISS, encoder.config.embedding_dim, count)
        if not exact and size and size < faiss(inputs)[0]:
            for command in ("index", "train", "evaluate"):
                advice[command, "host"] = [f"index.kind={SMALL_FAISS} ({size_text(size)})"]
    return advice


def planned_mesh(config: Config, devices: int | None, topology: str | None) -> Mesh:
    """The mesh to plan for: a TPU topology such as v5e:2x4, or so many devices, which a CPU can play.

    By default the devices of this machine, and one where it has only a CPU. Call it before JAX is used.
    Raises `InputError` where there are none such.
    """
    if topology is not None:
        return command_mesh("train", config.mesh.model, _tpu_devices(topology))
    if devices is not None:
        with suppress(RuntimeError):  # JAX has started: then there are as many as there are
            jax.config.update("jax_num_cpu_devices", devices)
    available = jax.devices()
    count = devices or (1 if jax.default_backend() == "cpu" else len(available))
    if len(available) < count:
        with suppress(RuntimeError):  # an accelerator alone may have been allowed
            available = jax.devices("cpu")
    if len(available) < count:
        raise InputError(f"--devices {count}: this machine can play {len(available)} devices; try JAX_PLATFORMS=cpu")
    return command_mesh("train", config.mesh.model, available[:count])


def _tpu_devices(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU that need not be there, by its compiler alone."""
    for variable, value in NO_TPU.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    # up to eight chips may be of one machine; of more, every four are
    sides = [int(side) for side in re.findall(r"\d+", name.partition(":")[2])]
    bounds = (*sides, *[1] * (3 - len(sides)))[:3]
    one_machine = {"chips_per_host_bounds": bounds} if sides and math.prod(sides) <= CHIPS_OF_A_MACHINE else {}
    try:
        return topologies.get_topology_desc(name, "tpu", **one_machine).devices
    except RuntimeError as error:
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(f"--topology {name} needs an extra: pip install 'ragjax[tpu]'") from None
        raise InputError(f"--topology {name}: {str(error).splitlines()[0]}; an example: v5e:2x4") from None


def planned_chip(mesh: Mesh, peak: int | float | None) -> Chip | None:
    """For the least times: the chip that the devices are, or one of which `peak` alone is known, in TFLOP/s."""
    return chip_of(mesh.devices.flat[0].device_kind) if peak is None else Chip("", peak, peak)


def capacity(config: Config, mesh: Mesh, memory: int | None = None) -> dict[str, int | None]:
    """Bytes that this machine has: free where `index.path` will lie, of the host, and of each device, or `memory`.

    Of a device that is not there its data sheet tells.

    Where the one device is this machine's CPU there is no entry for it: it is the host.
    """
    has: dict[str, int | None] = {"disk": free_disk(Path(config.index.path)), "host": host_memory()}
    if memory is not None or mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        device = mesh.devices.flat[0]
        has["device"] = memory
        if memory is None and device in jax.local_devices():
            has["device"] = (device.memory_stats() or {}).get("bytes_limit")
        elif memory is None and (chip := chip_of(device.device_kind)) and chip.memory is not None:
            has["device"] = int(chip.memory * 2**30)
    return has
