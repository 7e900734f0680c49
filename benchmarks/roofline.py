"""What each program costs on accelerators that need not be there, and the least time that it takes by roofline.

For each program on each device: FLOPs of matrix products, bytes that must go to and from its memory (arguments and
results, once), bytes that it sends to other devices; and the longest of the times that these take at the data sheet's
rates, with what takes it. `python -m benchmarks.roofline configs/rag_sequence_nq.yaml --topology v5e:2x4`
"""

from __future__ import annotations

import argparse

from rich import box
from rich.table import Table

from benchmarks.report import make_console
from ragjax.config import load_config
from ragjax.planning.evaluate_rows import answering_costs
from ragjax.planning.inputs import open_inputs
from ragjax.planning.plan import planned_mesh
from ragjax.planning.program_cost import flops_text
from ragjax.planning.roofline import chip_of, least_seconds
from ragjax.planning.train_rows import compile_step
from ragjax.resources import size_text

PROGRAMS = {"reading": "prefill", "step": "step of the search", "scoring": "scoring"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--topology", default="v5e:2x4", help="as for `ragjax plan`")
    parser.add_argument("settings", nargs="*", help="overrides, such as mesh.model=4")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.settings)
    mesh = planned_mesh(config, None, options.topology)
    chip, inputs = chip_of(mesh.devices.flat[0].device_kind), open_inputs(config, mesh)
    if chip is None:
        parser.error(f"no data sheet of {mesh.devices.flat[0].device_kind}")
    answering, own = answering_costs(inputs, with_step=True), inputs.mesh_of("evaluate")
    costs = {what: (*answering[name], own) for name, what in PROGRAMS.items()}
    costs["training step"] = (*compile_step(inputs, config.train.remat), mesh)
    heads = ("program", "questions", "FLOPs", "memory", "network", "at least", "binds", "temporaries")
    table = Table(*heads, box=box.SIMPLE_HEAD, title=f"each of {mesh.size} × {chip.name}")
    for what, (flops, cost, on) in costs.items():
        seconds, binds = least_seconds(chip, config.dtype, flops / on.size, cost)
        training = what == "training step"
        questions = config.train.batch_size if training else config.evaluate.batch_size * on.shape["data"]
        memory, sent = size_text(cost.read + cost.written), sum((cost.sent or {}).values())
        shown = flops_text(flops / on.size), memory, size_text(sent), f"{seconds * 1e3:.3g} ms", binds
        table.add_row(what, str(questions), *shown, size_text(cost.temporaries))
    make_console().print(table)


if __name__ == "__main__":
    main()
