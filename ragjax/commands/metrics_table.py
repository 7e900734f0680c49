"""The metrics of `ragjax evaluate`, as a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from typing import Any

from rich import box
from rich.table import Table

from ragjax.commands.predictions import COMPARED
from ragjax.terminal import Screen

FOUND_BY = {"": "", "bm25_": "BM25 alone: ", "hybrid_": "with BM25's documents: "}


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
    rows = _Rows(table, list(models.values()))
    for key in first:
        by, recall, rank = key.partition("recall@")
        if recall:
            rows.add_with_answerable(f"{FOUND_BY[by]}recall@{rank} (all questions)", key)
    rows.add("prior mass of the top k (all questions)", "top_k_mass")
    for mode in ("exact", "thorough", "certified", "fast", "closed_book"):
        if mode in first:
            rows.add_mode(mode)
    rows.add("−log p(gold answer), nats", "gold_nll")
    rows.add("calibration error of p(answer)", "calibration_error")
    if "passage_cache" in first:
        rows.add("passage cache: hit rate", "passage_cache", "hit_rate")
        rows.add("  prompt tokens that were not read again", "passage_cache", "tokens_saved")
    for pair in COMPARED:
        if (key := f"{'_and_'.join(pair)}_differ") in first:
            rows.add(f"{' and '.join(pair)} differ", key, "questions")
            for mode in pair:
                rows.add(f"  of these, {mode} right", key, f"{mode}_right")
            for mode in pair if "exact" in pair else ():
                rows.add(f"  mean p of its answers, {mode}", key, f"{mode}_p_answer")
    Screen(highlight=False, markup=False).print(table)


class _Rows:
    """Adds rows to a table, each with a cell for every model."""

    def __init__(self, table: Table, models: Sequence[dict[str, Any]]) -> None:
        self.table, self.models, self.first = table, models, models[0]

    def add(self, label: str, *keys: str) -> None:
        self.table.add_row(label, *(_text(reduce(getitem, keys, m)) for m in self.models))

    def add_with_answerable(self, label: str, *keys: str) -> None:
        """What could not be asked counts as wrong; without such it is another number, if there are any."""
        self.add(label, *keys)
        if "answerable" in self.first:
            self.add("  of those that could be asked", "answerable", *keys)

    def add_mode(self, mode: str) -> None:
        """How right the answers of a mode are, what is proved of them, and its time."""
        name = mode.replace("_", " ")
        self.add_with_answerable(f"{name}: exact match", mode, "exact_match")
        self.add("  its 95 % interval", mode, "exact_match_interval")
        self.add_with_answerable(f"{name}: F1", mode, "f1")
        self.add_with_answerable(f"{name}: answer contained", mode, "contains")
        if any(m[mode]["equal_as_nothing"] for m in self.models):
            self.add("  exact matches of which nothing is left", mode, "equal_as_nothing")
        if all("proved" in m[mode] for m in self.models):
            self.add("  proved under the top k", mode, "proved", "top_k")
            if self.first[mode]["proved"]["corpus"] is not None:
                self.add("  proved under all passages", mode, "proved", "corpus")
            self.add("  documents read for the proof", mode, "documents_read")
        if all("seconds" in m[mode] for m in self.models):  # of `evaluate.modes`
            self.add("  empty answers", mode, "empty")
            self.add("  answers of one token", mode, "one_token")
            self.add("  seconds a question, the median", mode, "seconds_per_question")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " … ".join(map(_text, value))
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
