"""What `ragjax train` takes: each row of the table names the function that computes its number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import jax

from ragjax.config import reads_corpus, refreshes, train_documents
from ragjax.planning.inputs import PlanInputs
from ragjax.planning.program_cost import Cost, bytes_each, compiled_cost, flops_text, matmul_flops
from ragjax.planning.roofline import Chip, least_seconds, roofline_text
from ragjax.planning.rows import Number, Row, Unknown, make_row
from ragjax.planning.shared_rows import parameters_row, questions_text, search_row, split_text
from ragjax.resources import size_text
from ragjax.training.optimizer import partition_params
from ragjax.training.state import abstract_state, saved_part
from ragjax.training.step import step_arguments, trace_step, train_programs

STEP_TIME = "time of a step, at least"

MOMENTS = {
    "adamw": "AdamW: two float32 moments",
    "adamw_bfloat16": "AdamW: moments in bfloat16 and float32",
    "adafactor": "Adafactor: one float32 moment, factored,",
}


def train_rows(inputs: PlanInputs, chip: Chip | None) -> list[Row]:
    """The rows of `ragjax train`; with a `chip` also the least time of a step.

    The step is compiled twice, with and without `train.remat`: what recomputing saves is the question.
    """
    train = inputs.config.train
    used, other = train.remat, not train.remat

    @cache
    def step(remat: bool) -> tuple[int, Cost]:
        return compile_step(inputs, remat)

    def row(what: str, place: str, number: Callable[[], Number]) -> Row:
        return make_row("train", what, place, number)

    def part(what: str, place: str, number: Callable[[], Number], unit: str = "bytes") -> Row:
        return make_row("train", what, place, number, part=True, unit=unit)

    rows = [parameters_row(inputs, "train", "retriever")]
    if train.objective != "contrastive":
        rows.append(parameters_row(inputs, "train", "generator"))
    if train.passage_encoder == "own":
        rows.append(parameters_row(inputs, "train", "passage encoder"))
    if refreshes(inputs.config):
        rows.append(parameters_row(inputs, "train", "passage encoder", indexed=True))
    name = {True: "temporaries, activations recomputed", False: "temporaries, activations kept"}
    instead = f"{name[other]} (train.remat={str(other).lower()})"
    rows += [
        optimizer_row(inputs),
        part("gradients", "device", lambda: _gradients(inputs)),
        row(name[used], "device", lambda: _temporaries(inputs, step(used)[1])),
        part(instead, "device", lambda: _temporaries(inputs, step(other)[1])),
        search_row(inputs, "train"),
        row("checkpoints", "disk", lambda: _checkpoints(inputs)),
    ]
    if inputs.mesh.size > 1:
        rows.append(part("over the network, a step", "device", lambda: _network(step(used)[1])))
    rows.append(part("floating-point operations, a step", "devices", lambda: _flops(inputs, step(used)[0]), "FLOP"))
    if chip is not None:
        rows.append(part(STEP_TIME, "devices", lambda: _seconds(inputs, *step(used), chip), "seconds"))
    return rows


def compile_step(inputs: PlanInputs, remat: bool) -> tuple[int, Cost]:
    """FLOPs of a step on all devices, and its cost to each; of `train_programs` the largest temporaries count.

    Parameters that are frozen are results, too, but stay as they are: they are not written.
    """
    rag, train = inputs.rag(), inputs.config.train
    passages = inputs.passages()[0] if reads_corpus(inputs.config) else 0
    rag = replace(rag, config=inputs.config.replace(train=train.replace(remat=remat)))
    traced = [trace_step(rag, inputs.mesh, passages, make) for make in train_programs(train)]
    arguments = step_arguments(rag, inputs.mesh, passages)
    costs = [compiled_cost(program.lower(), arguments) for program in traced]
    most = max(cost.temporaries for cost in costs)
    _, frozen = partition_params(arguments[0].params, train.frozen_params)
    written = max(0, costs[0].written - bytes_each(frozen))
    read = costs[0].read
    if inputs.stand_ins:  # as parameters will lie, not as they were compiled
        read -= bytes_each(arguments[0]) - bytes_each(abstract_state(inputs.placed_rag(), inputs.mesh))
    return matmul_flops(traced[0].jaxpr.jaxpr), replace(costs[0], temporaries=most, read=read, written=written)


def optimizer_row(inputs: PlanInputs) -> Row:
    """What the optimiser keeps on each device of what is trained."""
    return make_row("train", "optimiser state", "device", lambda: _optimizer(inputs))


def _optimizer(inputs: PlanInputs) -> Number:
    state, moments = abstract_state(inputs.rag(), inputs.mesh), MOMENTS[inputs.config.train.optimizer]
    split = split_text(inputs.mesh, inputs.config.mesh.fsdp)
    return bytes_each(state.optimizer), f"{moments} of what is trained{split}"


def _gradients(inputs: PlanInputs) -> Number:
    params = abstract_state(inputs.rag(), inputs.mesh).params
    trained, _ = partition_params(params, inputs.config.train.frozen_params)
    count, all_of = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (trained, params))
    share = "" if count == all_of else f": {count:,} of {all_of:,} parameters"
    return bytes_each(trained), f"float32, of what is trained{share}; part of the temporaries below"


def _temporaries(inputs: PlanInputs, cost: Cost) -> Number:
    train, (data, _) = inputs.config.train, inputs.mesh.devices.shape
    batch = f"{questions_text(train.batch_size // data)}, {train_documents(inputs.config)} documents each"
    if train.gradient_accumulation > 1:
        batch += f", in {train.gradient_accumulation} parts"
    refused = "; the compiler refuses" if cost.sent is None else ""
    return cost.temporaries, f"XLA's analysis ({inputs.device_kind}): {batch}{refused}"


def _checkpoints(inputs: PlanInputs) -> Number:
    keep = inputs.config.train.keep_checkpoints
    size = bytes_each(saved_part(abstract_state(inputs.placed_rag(), inputs.one_device)))
    return (keep + 1) * size, f"at most: {keep} kept and one being written, {size_text(size)} each"


def _network(cost: Cost) -> Number:
    if cost.sent is None:
        raise Unknown("the compiler refuses what does not fit")
    kinds = ", ".join(f"{kind} {size_text(size)}" for kind, size in sorted(cost.sent.items()) if size >= 2**20)
    return sum(cost.sent.values()), f"sent by each, and received, around a ring: {kinds or 'next to nothing'}"


def _flops(inputs: PlanInputs, flops: int) -> Number:
    devices = inputs.mesh.size
    each = f", {flops_text(flops / devices)} for each" if devices > 1 else ""
    recomputed = ", what is recomputed too" if inputs.config.train.remat else ""
    return flops, f"matrix products alone{recomputed}{each}"


def _seconds(inputs: PlanInputs, flops: int, cost: Cost, chip: Chip) -> Number:
    dtype = inputs.config.dtype
    seconds, binds = least_seconds(chip, dtype, flops / inputs.mesh.size, cost)
    return seconds, roofline_text(chip, dtype, binds)
