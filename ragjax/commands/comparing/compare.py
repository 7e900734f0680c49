"""`ragjax compare`: whether a run, or the runs of some seeds, answers better than another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from ragjax.errors import InputError
from ragjax.evaluation.comparison import Comparison, compare
from ragjax.evaluation.run_results import RunResults, read_run_results
from ragjax.pages.wording import probability, rounded
from ragjax.terminal import Screen


def compare_folders(ours: Path, theirs: Path) -> Comparison:
    """Compares the run in one folder, or all runs in it, with those of another.

    Raises `InputError` where there is none, one was not evaluated, or no question is common to all.
    """
    if ours.resolve() == theirs.resolve():
        raise InputError(f"{theirs}: is the first folder again; name another one")
    found = compare(read_runs(ours), read_runs(theirs))
    if not found.measures:
        raise InputError(f"{ours} and {theirs}: have no question in common; evaluate both on the same ones")
    return found


def read_runs(folder: Path) -> list[RunResults]:
    """The run in a folder, or those in the folders of it, as `ragjax sweep` makes one for each seed."""
    if (folder / "config.yaml").is_file():
        return [read_run_results(folder)]
    inside = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if not inside:
        raise InputError(f"{folder}: no run here, nor in the folders of it (config.yaml is missing)")
    return [read_run_results(path) for path in inside]


def print_comparison(found: Comparison, names: Sequence[str], as_json: bool) -> None:
    """A row for each measure; `names` are those of both sides."""
    if as_json:
        print(json.dumps(asdict(found)))
        return
    table = Table(f"{found.questions} questions", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("A", "B", "B − A", "95 % interval", "better/\nworse", "p-value"):
        table.add_column(head, no_wrap=True)
    before: list[str] = []
    for of in found.measures:
        d = of.difference
        row = [rounded(of.ours), rounded(of.theirs), f"{d.mean:+.3f}", f"{d.low:+.3f} … {d.high:+.3f}"]
        row += [f"{d.better}/{d.worse}", probability(d.p_value)]
        if row != before or not of.measure.endswith("ROUGE-L"):  # of short answers it is F1
            table.add_row(of.measure, *row)
        before = row
    screen = Screen(highlight=False, markup=False)
    for side, name in zip("AB", names, strict=True):
        screen.print(f"{side}: {name}", soft_wrap=True)
    screen.print(table)
    for text in found.warnings:
        screen.print(text)
