"""The metrics of `ragjax evaluate`, as a table on the terminal."""

from __future__ import annotations

import json
from functools import reduce
from operator import getitem
from typing import Any

from rich import box
from rich.table import Table

from ragjax.commands.predictions import COMPARED
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
    for mode in ("exact", "thorough", "certified", "fast", "closed_book"):
        if mode in first:
            row_and_without(f"{mode.replace('_', ' ')}: exact match", mode, "exact_match")
            row("  its 95 % interval", mode, "exact_match_interval")
            row_and_without(f"{mode.replace('_', ' ')}: F1", mode, "f1")
            row_and_without(f"{mode.replace('_', ' ')}: answer contained", mode, "contains")
            if any(m[mode]["equal_as_nothing"] for m in models.values()):
                row("  exact matches of which nothing is left", mode, "equal_as_nothing")
            if "proved" in first[mode]:
                row("  proved under the top k", mode, "proved", "top_k")
                if first[mode]["proved"]["corpus"] is not None:
                    row("  proved under all passages", mode, "proved", "corpus")
                row("  documents read for the proof", mode, "documents_read")
            if "seconds" in first[mode]:  # of `evaluate.modes`
                row("  empty answers", mode, "empty")
                row("  answers of one token", mode, "one_token")
                row("  seconds a question, the median", mode, "seconds_per_question")
    row("−log p(gold answer), nats", "gold_nll")
    row("calibration error of p(answer)", "calibration_error")
    if "passage_cache" in first:
        row("passage cache: hit rate", "passage_cache", "hit_rate")
        row("  prompt tokens that were not read again", "passage_cache", "tokens_saved")
    for pair in COMPARED:
        if (key := f"{'_and_'.join(pair)}_differ") in first:
            row(f"{' and '.join(pair)} differ", key, "questions")
            for mode in pair:
                row(f"  of these, {mode} right", key, f"{mode}_right")
            for mode in pair if "exact" in pair else ():
                row(f"  mean p of its answers, {mode}", key, f"{mode}_p_answer")
    Screen(highlight=False, markup=False).print(table)
