"""The metrics of `ragjax evaluate`, as a table on the terminal."""

from __future__ import annotations

import json
from functools import reduce
from operator import getitem
from typing import Any

from rich import box
from rich.table import Table

from ragjax.terminal import Screen


def print_metrics(report: dict[str, Any], as_json: bool) -> None:
    """The metrics as a table, one column for each model; how many questions were answered stands in its head."""
    if as_json:
        print(json.dumps(report))
        return
    models = report["models"]
    first = next(iter(models.values()))
    heads = [
        f"{name}{'' if m['step'] is None else ', step ' + str(m['step'])}\n{m['answered']} answered"
        + (f", {m['unanswerable']} not" if "unanswerable" in m else "")
        for name, m in models.items()
    ]
    table = Table(f"{first['questions']} {report['split']} questions", *heads, box=box.SIMPLE_HEAD)

    def text(value: Any) -> str:
        if isinstance(value, list):
            return " … ".join(map(text, value))
        return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    def row(label: str, *keys: str) -> None:
        table.add_row(label, *(text(reduce(getitem, keys, m)) for m in models.values()))

    def row_and_without(label: str, *keys: str) -> None:
        """What could not be asked counts as wrong; without such it is another number, if there are any."""
        row(label, *keys)
        if "answerable" in first:
            row("  of those that could be asked", "answerable", *keys)

    for key in first:
        if key.startswith("recall@"):
            row_and_without(f"{key} (all questions)", key)
    row("prior mass of the top k (all questions)", "top_k_mass")
    for mode in ("thorough", "fast", "closed_book"):
        if mode in first:
            row_and_without(f"{mode.replace('_', ' ')}: exact match", mode, "exact_match")
            row("  its 95 % interval", mode, "exact_match_interval")
            row_and_without(f"{mode.replace('_', ' ')}: F1", mode, "f1")
            row_and_without(f"{mode.replace('_', ' ')}: answer contained", mode, "contains")
            if any(m[mode]["equal_as_nothing"] for m in models.values()):
                row("  exact matches of which nothing is left", mode, "equal_as_nothing")
    row("−log p(gold answer), nats", "gold_nll")
    row("calibration error of p(answer)", "calibration_error")
    if "fast" in first:
        row("thorough and fast differ", "thorough_and_fast_differ", "questions")
        for mode in ("thorough", "fast"):
            row(f"  of these, {mode} right", "thorough_and_fast_differ", f"{mode}_right")
    Screen(highlight=False, markup=False).print(table)
