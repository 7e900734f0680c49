"""What a server counts, in Prometheus' form, and the lines that it logs."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ragjax.serving.settings import Decoding
from ragjax.terminal import terminal

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32)


class Telemetry:
    """The figures of one server."""

    def __init__(self, waiting: Callable[[], int], log_questions: bool) -> None:
        self.registry = CollectorRegistry()
        self.log_questions = log_questions
        self._requests = Counter(
            "ragjax_requests", "HTTP requests answered", ["route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "ragjax_request_seconds", "Time of HTTP requests", ["route"], buckets=SECONDS, registry=self.registry
        )
        self._questions = Counter("ragjax_questions", "Questions answered", ["mode"], registry=self.registry)
        self._batch = Histogram(
            "ragjax_batch_size", "Questions answered together", buckets=SIZES, registry=self.registry
        )
        self._batch_seconds = Histogram(
            "ragjax_batch_seconds", "Time of a batch on the device", buckets=SECONDS, registry=self.registry
        )
        queue = Gauge("ragjax_queue_length", "Questions that wait for the device", registry=self.registry)
        queue.set_function(waiting)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """After each response; `route` is one of ours, never a path from outside."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        terminal.print(f"{method} {route} {status} {1000 * seconds:.0f} ms", soft_wrap=True)

    def questions(self, texts: list[str]) -> None:
        """Logs the texts of questions, where that was asked for."""
        for text in texts if self.log_questions else ():
            terminal.print(f"question: {text}", soft_wrap=True)

    def failure(self, error: BaseException) -> None:
        """Where something went wrong within; what the error says may quote a question."""
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        said = f": {str(error)[:500]}" if self.log_questions else ""
        terminal.print(f"{type(error).__name__}{where}{said}", soft_wrap=True)

    def batch(self, decoding: Decoding, size: int, seconds: float) -> None:
        """Counts a batch that was answered, and its time."""
        self._questions.labels(decoding.mode).inc(size)
        self._batch.observe(size)
        self._batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """The figures in Prometheus' form."""
        return generate_latest(self.registry)
