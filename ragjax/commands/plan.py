"""`ragjax plan`: the plan as tables or JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

from rich import box
from rich.table import Table

from ragjax.planning.plan import MachinePlan, Plan
from ragjax.planning.program_cost import flops_text
from ragjax.planning.rows import Row, Total, totals
from ragjax.resources import size_text
from ragjax.terminal import Screen

PLACES = {"device": "each device", "devices": "all devices"}  # as the table has them


def _amount(row: Row) -> str:
    if row.size is None:
        return "?"
    if row.unit == "seconds":
        return f"{row.size:.3g} s"
    return flops_text(row.size) if row.unit == "FLOP" else size_text(int(row.size))


def print_plan(plan: Plan, has: dict[str, int | None], as_json: bool) -> None:
    """The rows and their totals beside what there is (see `capacity`), as a table or as one JSON object.

    Below the table: what would help where a command does not fit into memory.
    """
    rows, sums = plan.rows, totals(plan.rows, has)
    helps: dict[str, list[str]] = {}
    for total in sums:
        if total.fits is False and total.place != "disk":
            places = [total.place] if "device" in has else ["device", "host"]
            if settings := [setting for place in places for setting in plan.advice.get((total.command, place), [])]:
                helps.setdefault(total.command, []).extend(settings)
    if as_json:
        summed = [dataclasses.asdict(total) | {"fits": total.fits} for total in sums]
        whole = {"rows": [dataclasses.asdict(row) for row in rows], "totals": summed, "advice": helps}
        print(json.dumps(whole, ensure_ascii=False))
        return
    table = Table("command", "what", "where", "size", "how", box=box.SIMPLE_HEAD)
    table.columns[3].justify = "right"
    for before, row in zip([None, *rows], rows, strict=False):
        first = before is None or before.command != row.command
        if first and before is not None:
            table.add_section()
        size = _amount(row) if row.counted or row.unit != "bytes" else f"({_amount(row)})"
        table.add_row(row.command if first else "", row.what, PLACES.get(row.place, row.place), size, row.how)
    for total in sums:
        table.add_section() if total is sums[0] else None
        table.add_row("", *_verdict(total))
    console = Screen(highlight=False, markup=False, width=None if sys.stdout.isatty() else 132)
    console.print(table)
    for command, settings in helps.items():
        console.print(f"what would help to {command}: {'; '.join(settings)}", soft_wrap=True)


def print_sweep(plans: Sequence[MachinePlan], as_json: bool) -> None:
    """A line for each machine: what training and evaluation need, whether that fits, and the least times."""
    if as_json:
        lines = [
            dataclasses.asdict(plan) | {"fits": {name: total.fits for name, total in plan.needs.items()}}
            for plan in plans
        ]
        print(json.dumps(lines, ensure_ascii=False))
        return
    heads = ("devices", "each has", "to train", "a step, at least", "to evaluate", "questions/s, at most")
    table = Table(*heads, box=box.SIMPLE_HEAD)
    notes = []
    for plan in plans:
        chip, count = plan.machine.chip, plan.machine.devices
        cells = [f"{count} × {chip.name}", "" if chip.memory is None else f"{chip.memory:g} GiB"]
        if plan.problem is not None:
            table.add_row(*cells, "–", "", "–", "")
            notes.append(f"{cells[0]}: {plan.problem}")
            continue
        step, batch = (plan.seconds.get(name) for name in ("train", "evaluate"))
        cells += [_need(plan.needs.get("train")), "?" if step is None else f"{step[0]:.2g} s, {step[1].split()[0]}"]
        cells += [_need(plan.needs.get("evaluate")), "?" if batch is None else f"{plan.questions / batch[0]:,.1f}"]
        table.add_row(*cells)
    console = Screen(highlight=False, markup=False, width=None if sys.stdout.isatty() else 132)
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True)
    console.print("GPUs: from what XLA says of as many CPUs; times are those of data sheets, nothing waiting")


def _need(total: Total | None) -> str:
    if total is None:
        return "?"
    words = {True: "fits", False: "DOES NOT FIT", None: "unknown"}
    return f"{'' if total.complete else '≥ '}{size_text(total.size)}: {words[total.fits]}"


def _verdict(total: Total) -> tuple[str, str, str, str]:
    place = PLACES.get(total.place, total.place)
    words = {True: "fits", False: "DOES NOT FIT", None: "whether it fits is unknown"}
    owner = "each" if total.place == "device" else "this machine"
    there = "what there is is unknown" if total.has is None else f"{owner} has {size_text(total.has)}"
    size = ("" if total.complete else "≥ ") + size_text(total.size)
    name = "in all, on the disk" if total.command == "all" else f"in all, to {total.command}"
    return name, place, size, f"{there}: {words[total.fits]}"
