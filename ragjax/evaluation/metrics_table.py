"""The metrics of `ragjax evaluate`, as the rows of a table: for the terminal and for pages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from rich import box
from rich.table import Table

from ragjax.evaluation.predictions import COMPARED
from ragjax.pages.wording import rounded
from ragjax.terminal import Screen

FOUND_BY = {"": "", "bm25_": "BM25 alone: ", "hybrid_": "with BM25's documents: "}
MODES = ("exact", "thorough", "certified", "fast", "closed_book")


@dataclass(frozen=True)
class Row:
    """A measure: where it stands in a model's metrics, and its value for each model."""

    label: str
    keys: tuple[str, ...]
    values: list[Any]
    below: bool  # tells more of the row above it


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
    for row in metric_rows(list(models.values())):
        table.add_row(f"  {row.label}" if row.below else row.label, *map(rounded, row.values))
    Screen(highlight=False, markup=False).print(table)


def metric_rows(models: Sequence[Mapping[str, Any]]) -> list[Row]:
    """All that was measured of some models, which are those of metrics.json; a measure that one lacks is left out."""
    rows, first = _Rows(models), models[0]
    for key in first:
        by, recall, rank = key.partition("recall@")
        if recall:
            rows.add_with_answerable(f"{FOUND_BY.get(by, by)}recall@{rank} (all questions)", key)
    rows.add("prior mass of the top k (all questions)", "top_k_mass")
    for mode in MODES:
        if all(mode in m for m in models):
            rows.add_mode(mode)
    rows.add("−log p(gold answer), nats", "gold_nll")
    rows.add("calibration error of p(answer)", "calibration_error")
    if all("passage_cache" in m for m in models):
        rows.add("passage cache: hit rate", "passage_cache", "hit_rate")
        rows.add_below("prompt tokens that were not read again", "passage_cache", "tokens_saved")
    for pair in COMPARED:
        if all((key := f"{'_and_'.join(pair)}_differ") in m for m in models):
            rows.add(f"{' and '.join(pair)} differ", key, "questions")
            for mode in pair:
                rows.add_below(f"of these, {mode} right", key, f"{mode}_right")
            for mode in pair if "exact" in pair else ():
                rows.add_below(f"mean p of its answers, {mode}", key, f"{mode}_p_answer")
    return rows.rows


class _Rows:
    """Collects rows, each with a value for every model."""

    def __init__(self, models: Sequence[Mapping[str, Any]]) -> None:
        self.models, self.rows = models, list[Row]()

    def add(self, label: str, *keys: str, below: bool = False) -> None:
        values = [reduce(_get, keys, m) for m in self.models]
        if not any(value is _ABSENT for value in values):
            self.rows.append(Row(label, keys, values, below))

    def add_below(self, label: str, *keys: str) -> None:
        self.add(label, *keys, below=True)

    def add_with_answerable(self, label: str, *keys: str) -> None:
        """What could not be asked counts as wrong; without such it is another number, if there are any."""
        self.add(label, *keys)
        self.add_below("of those that could be asked", "answerable", *keys)

    def add_mode(self, mode: str) -> None:
        """How right the answers of a mode are, what is proved of them, and its time."""
        name = mode.replace("_", " ")
        self.add_with_answerable(f"{name}: exact match", mode, "exact_match")
        self.add_below("its 95 % interval", mode, "exact_match_interval")
        self.add_with_answerable(f"{name}: F1", mode, "f1")
        if any(rounded(m[mode].get("rouge_l")) != rounded(m[mode]["f1"]) for m in self.models):  # as of long answers
            self.add_with_answerable(f"{name}: ROUGE-L", mode, "rouge_l")
        self.add_with_answerable(f"{name}: answer contained", mode, "contains")
        if any(m[mode]["equal_as_nothing"] for m in self.models):
            self.add_below("exact matches of which nothing is left", mode, "equal_as_nothing")
        self.add_below("proved under the top k", mode, "proved", "top_k")
        if any(_get(_get(m[mode], "proved"), "corpus") not in (None, _ABSENT) for m in self.models):
            self.add_below("proved under all passages", mode, "proved", "corpus")
        self.add_below("documents read for the proof", mode, "documents_read")
        if all("seconds" in m[mode] for m in self.models):  # of `evaluate.modes`
            self.add_below("empty answers", mode, "empty")
            self.add_below("answers of one token", mode, "one_token")
            self.add_below("seconds a question, the median", mode, "seconds_per_question")


_ABSENT = object()


def _get(metrics: Any, key: str) -> Any:
    return metrics.get(key, _ABSENT) if isinstance(metrics, Mapping) else _ABSENT
