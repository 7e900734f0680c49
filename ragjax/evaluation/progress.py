"""An evaluation batch by batch: shared out over processes, kept in journals, and gone on with where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from ragjax.answerer import Answerer
from ragjax.answering.batch_answerer import repeat_to_size
from ragjax.data.questions import Question
from ragjax.parallel.processes import allgather_text, is_process_zero, wait_for_all
from ragjax.runs.journal import Journal, read_journal
from ragjax.terminal import progress_bar, terminal

Retrieval = TypeVar("Retrieval")
BatchResults = dict[int, list[Any]]  # one result a question, by the number of the batch's first question


class EvaluationProgress:
    """The results of all processes' batches so far, each process's in a journal of its own; see `evaluate`.

    Whatever the number of processes that wrote them, those that go on share out what is missing.
    """

    def __init__(self, folder: Path, evaluation: dict[str, Any]) -> None:
        self.folder, self.evaluation = folder, evaluation
        self._journal = Journal(folder / f"predictions.{jax.process_index()}.partial", evaluation)
        self._before: dict[str, BatchResults] = {}  # by measure and version of the index; in process 0 alone
        self._done: dict[str, list[int]] = {}  # the first questions of their batches, in all processes

    def __enter__(self) -> EvaluationProgress:
        self._journal.__enter__()
        wait_for_all("evaluation")  # now nobody cuts off another one's last line
        for path in sorted(self.folder.glob("predictions.*.partial")) if is_process_zero() else []:
            for record in read_journal(path, self.evaluation):
                self._before.setdefault(record["measure"], {})[record["start"]] = record["results"]
        done = {measure: list(results) for measure, results in self._before.items()}
        self._done = json.loads(allgather_text(json.dumps(done))[0])
        if count := sum(map(len, self._done.values())):
            terminal.print(f"going on with an evaluation that was stopped: {count} batches were done", soft_wrap=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._journal.__exit__(*error)

    def delete(self) -> None:
        """Removes what was kept, of all processes."""
        for path in self.folder.glob("predictions.*.partial"):
            path.unlink(missing_ok=True)

    def measure(
        self,
        name: str,
        answerer: Answerer,
        questions: Sequence[Question],
        size: int,
        find: Callable[[list[Question]], Retrieval],
        measure_batch: Callable[[Retrieval, list[Question]], list[Any]],
    ) -> list[Any]:
        """One result a question, in their order, in every process.

        Args:
            name: of the measure, for the progress bar and the journal.
            answerer: whose mesh and index are used.
            questions: all of them; batches of them are split over the processes.
            size: the most questions of a batch on each device; the last batch is filled up.
            find: looks for what the index knows of a batch.
            measure_batch: gives one result, as JSON, for each question of a batch, by what was found.
        """
        devices = answerer.mesh.shape["data"]
        size = max(1, min(size, -(-len(questions) // devices))) * devices
        measure = f"{name} {answerer.index.version}"
        done = set(self._done.get(measure, []))
        missing = [start for start in range(0, len(questions), size) if start not in done]
        mine = missing[jax.process_index() :: jax.process_count()]

        def batch(start: int) -> list[Question]:
            return repeat_to_size(list(questions[start : start + size]), size)

        found = _find_together(name, missing, lambda start: find(batch(start))) if answerer.index.together else {}
        counts = {start: len(questions[start : start + size]) for start in mine}
        results = dict(self._before.get(measure, {}))
        with progress_bar(name, sum(counts.values()), "questions", first="compiling …") as advance:
            for start, count in counts.items():
                chosen = batch(start)
                retrieval = found.pop(start) if start in found else find(chosen)
                results[start] = measure_batch(retrieval, chosen)[:count]
                self._journal.add({"measure": measure, "start": start, "results": results[start]})
                advance(count)
        by_process = [json.loads(text) for text in allgather_text(json.dumps(list(results.items())))]
        by_start = dict(item for items in by_process for item in items)
        return [result for start in sorted(by_start) for result in by_start[start]]


def _find_together(name: str, missing: list[int], find: Callable[[int], Retrieval]) -> dict[int, Retrieval]:
    """What there is to find for this process's batches, and `find` searches for in all processes at once.

    After that none waits for another, however long it answers. `missing` are the batches of all, each the number of its
    first question, dealt out one by one; who has none left asks for the last one with the others.
    """
    found, processes = dict[int, Retrieval](), jax.process_count()
    with progress_bar(f"documents: {name}", len(missing), "batches", first="compiling …") as advance:
        for first in range(0, len(missing), processes):
            start = missing[min(first + jax.process_index(), len(missing) - 1)]
            found[start] = find(start)
            advance(min(processes, len(missing) - first))
    return found
