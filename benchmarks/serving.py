"""What a server holds: many clients at once, each answer compared with the one given alone.

    python -m benchmarks.serving runs/tiny --clients 64 --requests 2000

A server of its own on the loopback answers so many requests from so many clients, which ask the questions of the test
split in turn and come again when the queue is full. No answer may be lost, and each must have the text, and the
probability within 1e-5, of the answer to the question asked alone; where the two best candidates are within 1e-3 nats
of each other, rounding decides, and these are counted apart. Then one client asks one question after the other. HTTP's
own cost is that of /health. Programs are compiled before.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.table import Table

from benchmarks.report import make_console, or_input_error
from ragjax.answerer import open_answerer
from ragjax.answering.answers import Answer
from ragjax.data.questions import read_questions
from ragjax.marginal import TIE
from ragjax.runs.run_dir import load_run_config
from ragjax.serving.app import Server, Serving
from ragjax.serving.server import bind, make_uvicorn
from ragjax.serving.settings import Limits
from ragjax.terminal import terminal

HEADS = ("clients", "requests", "per second", "median ms", "99 % ms", "503", "wrong", "near ties", "MiB")
JSON = {"Content-Type": "application/json"}


@dataclass
class Client:
    """One connection that is kept open, and what it met with."""

    port: int
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def get(self, path: str) -> None:
        began = time.perf_counter()
        self.connection.request("GET", path)
        self.connection.getresponse().read()
        self.seconds.append(time.perf_counter() - began)

    def ask(self, question: str) -> dict[str, Any]:
        """The answer, however often the queue is full before."""
        began = time.perf_counter()
        while True:
            self.connection.request("POST", "/v1/answer", json.dumps({"question": question}), JSON)
            response = self.connection.getresponse()
            body = json.loads(response.read())
            self.statuses[response.status] += 1
            if response.status != 503:
                break
            time.sleep(0.05)
        assert response.status == 200, body
        self.seconds.append(time.perf_counter() - began)
        [answer] = body["answers"]
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64], help="at once, one row each")
    parser.add_argument("--requests", type=int, default=2000, help="of each row; of one client a tenth")
    parser.add_argument("--questions", type=int, default=64, help="that are different")
    parser.add_argument("--mode", help="instead of decode.mode")
    options = parser.parse_args()
    config = load_run_config(options.run, [] if options.mode is None else [f"decode.mode={options.mode}"])
    answerer, console, limits = open_answerer(config), make_console(), Limits(deadline_s=600)
    texts = [question.question for question in read_questions(Path(config.questions.test))][: options.questions]
    alone = {text: answerer.answer(text)[0] for text in texts}
    terminal.quiet = True  # a line a request
    serving = Serving(answerer, options.run.name, limits, None, ("127.0.0.1",), [], False)
    server = Server(serving)
    uvicorn_server = make_uvicorn(server)
    with bind("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=lambda: uvicorn_server.run(sockets=[listening]))
        thread.start()
        port = listening.getsockname()[1]
        try:
            load(port, limits.batch * 4, 4 * len(texts), texts)  # compiles
            table = Table(
                "clients", "requests", "per second", "median ms", "99 % ms", "503", "wrong", "near ties", "MiB"
            )
            table.box = box.SIMPLE_HEAD
            for clients in options.clients:
                count = options.requests // (10 if clients == 1 else 1)
                table.add_row(*row(clients, *load(port, clients, count, texts), alone))
            http_only = Client(port)
            for _ in range(200):
                http_only.get("/health")
        finally:
            uvicorn_server.should_exit = True
            thread.join()
    d = config.decode
    console.print(
        f"{config.generator.source}, step {answerer.step}: {d.mode}, k = {d.num_docs}, {d.num_beams} beams, batches of "
        f"up to {limits.batch}, a queue of {limits.waiting}; {jax.devices()[0]}",
        soft_wrap=True,
    )
    console.print(table)
    console.print(f"HTTP alone: {1000 * float(np.median(http_only.seconds)):.2f} ms a request")


def load(port: int, clients: int, requests: int, texts: list[str]) -> tuple[list[Client], list[dict[str, Any]], float]:
    """So many requests of so many clients at once, their answers, and the seconds in all."""
    made = [Client(port) for _ in range(clients)]

    def work(number: int) -> list[dict[str, Any]]:
        return [made[number].ask(texts[i % len(texts)]) for i in range(number, requests, clients)]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for part in pool.map(work, range(clients)) for answer in part]
    return made, answers, time.perf_counter() - began


def row(
    clients: int, made: list[Client], answers: list[dict[str, Any]], seconds: float, alone: dict[str, Answer]
) -> list[str]:
    """The cells of a row; a wrong answer counts as near a tie where rounding may decide."""
    times = [1000 * s for client in made for s in client.seconds]
    refused = sum(client.statuses[503] for client in made)
    wrong, ties = 0, 0
    for answer in answers:
        expected = alone[answer["question"]]
        if answer["text"] != expected.text or abs(answer["probability"] - expected.probability) > 1e-5:
            near = is_near_tie(expected)
            wrong, ties = wrong + (not near), ties + near
    numbers = [f"{len(answers) / seconds:.1f}", f"{np.median(times):.0f}", f"{np.quantile(times, 0.99):.0f}"]
    return [str(clients), str(len(answers)), *numbers, str(refused), str(wrong), str(ties), f"{resident():.0f}"]


def is_near_tie(answer: Answer) -> bool:
    """Whether the best two finished candidates are as likely, for all that rounding can tell."""
    marginals = [c.thorough if c.thorough is not None else c.fast for c in answer.candidates if c.finished]
    first, second = [*(p for p in marginals if p), 0.0, 0.0][:2]
    return second > 0 and abs(math.log(first) - math.log(second)) < TIE


def resident() -> float:
    """MiB that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


if __name__ == "__main__":
    or_input_error(main)
