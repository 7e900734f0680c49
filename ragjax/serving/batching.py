"""One worker on the device: a bounded queue, and batches of questions that are answered alike and about as long."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ragjax.answerer import Answerer
from ragjax.answering.answers import Answer, Document
from ragjax.padding import filled_size
from ragjax.serving.settings import Decoding, Limits

OnDocuments = Callable[[list[Document], "float | None"], None]


class QueueFull(Exception):
    """There is no room for more questions; some seconds later there may be."""


class TooLate(Exception):
    """The deadline of a question passed before it was its turn."""


class Stopping(Exception):
    """The server is about to end."""


@dataclass(eq=False)
class Job:
    """A question that waits for its answer. Cancelling its `result` takes it out of the queue."""

    question: str
    decoding: Decoding
    deadline: float  # of time.monotonic
    passages: list[Any] | None = None
    on_documents: OnDocuments | None = None  # called by the worker
    result: Future[Answer] = field(default_factory=Future)


class Batcher:
    """Answers questions one batch after the other, in a thread of its own.

    Whatever goes wrong with one of a batch costs that one: the others are answered again without it.
    """

    def __init__(
        self, answerer: Answerer, limits: Limits, on_batch: Callable[[Decoding, int, float], None] = lambda *_: None
    ) -> None:
        """`on_batch` is told how, how many and how long, in seconds, before each is answered."""
        self._answerer, self._limits, self._on_batch = answerer, limits, on_batch
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._open = True
        self._answerers: dict[tuple[int, int], Answerer] = {}
        self._thread = threading.Thread(target=self._run, name="ragjax worker", daemon=True)

    @property
    def waiting(self) -> int:
        """How many questions wait for their turn."""
        return sum(not job.result.cancelled() for job in self._waiting)

    def start(self) -> None:
        """Lets the worker begin."""
        self._thread.start()

    def warm_up(self, questions: Sequence[str], decoding: Decoding, seconds: float) -> Iterator[int]:
        """Lets programs be compiled before any client waits for them; before `start`.

        Answers a batch of every size that has programs of its own, the smallest, then the largest first, and yields
        each size. No batch begins when so many seconds are over.
        """
        answerer, began, endless = self._answerer_for(decoding), time.monotonic(), itertools.cycle(questions)
        devices, most = answerer.mesh.shape["data"], self._limits.batch
        sizes = {filled_size(count, devices, most): count for count in range(1, most + 1)}
        first, *others = sizes.values()
        for count in (first, *reversed(others)):
            if time.monotonic() - began >= seconds:
                return
            answerer.answer(list(itertools.islice(endless, count)), decoding.mode)
            yield count

    def stop(self) -> None:
        """Answers all that wait, and ends the worker."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all of them, or none. Raises `QueueFull`, and `Stopping` after `stop`."""
        with self._changed:
            if not self._open:
                raise Stopping
            self._waiting = [job for job in self._waiting if not job.result.cancelled()]
            if len(self._waiting) + len(jobs) > self._limits.waiting:
                raise QueueFull
            self._waiting += jobs
            self._changed.notify()

    def _run(self) -> None:
        while batch := self._take():
            self._answer(batch)

    def _take(self) -> list[Job]:
        """The next batch: the first that waits, and those most like it. Empty once there will be no more."""
        while True:
            with self._changed:
                while not (waiting := [job for job in self._waiting if self._is_wanted(job)]) and self._open:
                    self._waiting = []
                    self._changed.wait()
                batch = alike(waiting, self._limits.batch)
                self._waiting = [job for job in waiting if job not in batch]
            if not batch:
                return []
            if taken := [job for job in batch if job.result.set_running_or_notify_cancel()]:
                return taken

    def _is_wanted(self, job: Job) -> bool:
        """Whether somebody still waits for it; one whose time is over is told."""
        if job.result.cancelled():
            return False
        if job.deadline > time.monotonic():
            return True
        if job.result.set_running_or_notify_cancel():
            job.result.set_exception(TooLate())
        return False

    def _answer(self, batch: Sequence[Job]) -> None:
        """Gives each of a batch its answer or what went wrong."""
        first, began = batch[0], time.monotonic()

        def on_documents(i: int, documents: list[Document], outside: float | None) -> None:
            if (call := batch[i].on_documents) is not None:
                call(documents, outside)

        try:
            answers = self._answerer_for(first.decoding).answer(
                [job.question for job in batch],
                first.decoding.mode,
                passages=first.passages,
                on_documents=on_documents,
            )
        except Exception as error:
            if len(batch) == 1:
                first.result.set_exception(error)
            else:  # which one it was shows when each is alone
                for job in batch:
                    self._answer([job])
            return
        self._on_batch(first.decoding, len(batch), time.monotonic() - began)
        for job, answer in zip(batch, answers, strict=True):
            job.result.set_result(answer)

    def _answerer_for(self, decoding: Decoding) -> Answerer:
        """The run's models with other settings; only the run's own have a cache of passages."""
        key = decoding.num_docs, decoding.num_beams
        if (found := self._answerers.get(key)) is None:
            config = self._answerer.rag.config
            decode = config.decode.replace(num_docs=decoding.num_docs, num_beams=decoding.num_beams)
            if decode != config.decode:
                decode = decode.replace(passage_cache_gib=0.0)
            settings = config.replace(decode=decode, evaluate=config.evaluate.replace(batch_size=self._limits.batch))
            rag = dataclasses.replace(self._answerer.rag, config=settings)
            found = self._answerers[key] = dataclasses.replace(self._answerer, rag=rag)
        return found


def alike(waiting: Sequence[Job], most: int) -> list[Job]:
    """The first that waits, and of those decoded as it is the most alike in length, in the order they came.

    Questions with passages of their own are answered alone.
    """
    if not waiting:
        return []
    first, length = waiting[0], len(waiting[0].question)
    if first.passages is not None:
        return [first]
    same = [job for job in waiting if job.decoding == first.decoding and job.passages is None]
    nearest = sorted(same, key=lambda job: (job is not first, abs(len(job.question) - length)))[:most]
    return [job for job in same if job in nearest]
