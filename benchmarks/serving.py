"""What a server holds: many clients at once, each answer compared with the one given alone.

    python -m benchmarks.serving runs/tiny --clients 1 16 64 --requests 2000

`ragjax serve` answers on the loopback, as a process of its own. Clients ask the questions of the test split in turn,
and come again when the queue is full. No answer may be lost, and each must have the text, and the probability within
1e-5 and within a thousandth of it, of the answer to the question asked alone, in Python. Where the two best candidates
are within 1e-3 nats of each other, rounding decides: these are counted apart. One client alone asks one question after
the other, each at least once, and makes a tenth of the requests. HTTP's own cost is that of /health. Programs are
compiled before.

What many clients gain over one is what a batch spares. It does the arithmetic of its questions all the same; but the
weights are read once for all of them, and the host's work, and a program's fixed cost, are shared. On an accelerator
that is most of a question's time. On CPUs it is so in the steps of the beam search, while reading the documents is
arithmetic alone: that bounds the gain, and the bound is told, from this device's speed in a large matrix product.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.table import Table

from benchmarks.report import flops_of, make_console, or_input_error, peak
from ragjax.answerer import Answerer, open_answerer
from ragjax.answering.answers import Answer
from ragjax.data.question_batch import question_batch, tokenize_prompts
from ragjax.data.questions import read_questions
from ragjax.decoding.propose import prefill_documents
from ragjax.marginal import TIE
from ragjax.padding import bucket_size
from ragjax.runs.run_dir import load_run_config

HEADS = (
    *("clients", "requests", "a second", "median ms", "99 % ms"),
    *("lost", "other text", "wrong", "near ties", "Δp / p", "503", "most in queue", "MiB"),
)
JSON = {"Content-Type": "application/json"}


@dataclass
class Client:
    """One connection that is kept open, and what it met with."""

    port: int
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    answers: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def get(self, path: str) -> Any:
        began = time.perf_counter()
        self.connection.request("GET", path)
        body = self.connection.getresponse().read()
        self.seconds.append(time.perf_counter() - began)
        return json.loads(body)

    def ask(self, *questions: str) -> None:
        """Asks until there is an answer, however often the queue is full before; another one than that is lost."""
        began, status = time.perf_counter(), 503
        while status == 503:
            self.connection.request("POST", "/v1/answer", json.dumps({"questions": questions}), JSON)
            response = self.connection.getresponse()
            body, status = json.loads(response.read()), response.status
            self.statuses[status] += 1
            if status == 503:
                time.sleep(0.05)
        self.seconds.append(time.perf_counter() - began)
        if status == 200:
            self.answers += body["answers"]


@dataclass(frozen=True)
class Load:
    """What came of so many clients at once."""

    clients: list[Client]
    requests: int
    seconds: float
    waiting: int  # the most that were seen in the queue

    @property
    def rate(self) -> float:
        return self.requests / self.seconds

    def row(self, alone: dict[str, Answer], mib: float) -> list[str]:
        times = [1000 * s for client in self.clients for s in client.seconds]
        answers = [answer for client in self.clients for answer in client.answers]
        differ = [alone[a["question"]] for a in answers if is_other(a, alone[a["question"]])]
        ties = sum(map(is_near_tie, differ))
        cells: tuple[Any, ...] = (len(self.clients), self.requests, f"{self.rate:.3g}", f"{np.median(times):.1f}")
        texts = sum(a["text"] != alone[a["question"]].text for a in answers)
        most = max((off(a, alone[a["question"]]) for a in answers), default=0.0)
        cells += (f"{np.quantile(times, 0.99):.1f}", self.requests - len(answers), texts, len(differ) - ties, ties)
        cells += (f"{most:.0e}",)
        refused = sum(client.statuses[503] for client in self.clients)
        return [str(cell) for cell in (*cells, refused, self.waiting, f"{mib:.0f}")]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64], help="at once, one row each")
    parser.add_argument("--requests", type=int, default=2000, help="of each row; of one client a tenth")
    parser.add_argument("--questions", type=int, default=64, help="that are different")
    parser.add_argument("--batch", type=int, default=8, help="questions answered together")
    parser.add_argument("--queue", type=int, default=64, help="questions that may wait")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another value of the run's")
    options = parser.parse_args()
    config, console = load_run_config(options.run, options.set), make_console()
    texts = [question.question for question in read_questions(Path(config.questions.test))][: options.questions]
    answerer = open_answerer(config)
    alone = {text: answerer.answer(text)[0] for text in texts}
    step, flops = answerer.step, reading_flops(answerer, texts)
    del answerer
    most = peak(config.dtype)
    table = Table(*HEADS, box=box.SIMPLE_HEAD)
    rates = {}
    arguments = f"--batch {options.batch} --queue {options.queue} --deadline 600".split() + with_set(options.set)
    with served(options.run, arguments) as (process, port):
        warm_up(port, texts, options.batch, options.clients)
        http_only = Client(port)
        for _ in range(500):
            http_only.get("/health")
        for clients in options.clients:
            requests = max(len(texts), options.requests // 10) if clients == 1 else options.requests
            load = put_under_load(port, clients, requests, texts)
            rates[clients] = load.rate
            table.add_row(*load.row(alone, resident(process.pid)))
    d, http_s = config.decode, float(np.median(http_only.seconds))
    console.print(
        f"{config.generator.source}, step {step}: {d.mode}, k = {d.num_docs}, {d.num_beams} beams, batches of up to "
        f"{options.batch}, a queue of {options.queue}; {jax.devices()[0]}",
        soft_wrap=True,
    )
    console.print(table)
    console.print(f"HTTP alone: {1000 * http_s:.2f} ms a request")
    if len(rates) > 1 and 1 in rates:
        alone_s, bound = 1 / rates[1] - http_s, most / flops
        console.print(f"{max(rates)} clients: {rates[max(rates)] * alone_s:.2f} times one at a time, without HTTP")
        console.print(
            f"reading its documents takes {flops / 1e9:.3g} GFLOP a question: at {most / 1e9:.0f} GFLOP/s that alone "
            f"allows {bound:.3g} questions a second, {bound * alone_s:.2f} times one at a time",
            soft_wrap=True,
        )


def reading_flops(answerer: Answerer, texts: list[str]) -> float:
    """Of reading the documents of a question, each as long as it is, in the mean over the questions."""
    graph, params, total = answerer.rag.generator.graphdef, answerer.params["generator"], 0
    of_length: dict[int, int] = {}
    for text in texts:
        batch = question_batch(answerer.rag.tokenizers, [text])
        _, mask = tokenize_prompts(answerer.rag.tokenizers, answerer.store, batch, answerer.retrieve(batch, [text]).ids)
        for length in mask.sum(axis=1).tolist():
            if length not in of_length:
                source = np.zeros((1, length), np.int32)
                of_length[length] = flops_of(partial(prefill_documents, graph), params, source, source == 0)
            total += of_length[length]
    return total / len(texts)


def with_set(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@contextmanager
def served(run: Path, arguments: list[str]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`ragjax serve` on a free port, until the end."""
    command = [sys.executable, "-m", "ragjax", "serve", str(run), "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = next(line for line in process.stderr if line.startswith("serving "))
        log = threading.Thread(target=lambda: [None for _ in process.stderr or ()])  # a line a request
        log.start()
        try:
            yield process, int(told.rstrip().rsplit(":", 1)[1])
        finally:
            process.terminate()
            process.wait(60)
            log.join()


def warm_up(port: int, texts: list[str], batch: int, clients: list[int]) -> None:
    """Lets programs be compiled: for batches of every size, and for those that so many clients bring about."""
    client = Client(port)
    for size in sorted({min(bucket_size(count), batch) for count in range(1, batch + 1)}):  # others are filled up
        for start in range(0, len(texts), size):
            client.ask(*texts[start : start + size])
    for count in clients:
        if count > 1:
            put_under_load(port, count, max(count, len(texts)), texts)


def put_under_load(port: int, clients: int, requests: int, texts: list[str]) -> Load:
    """So many requests of so many clients at once."""
    made, ended, waiting = [Client(port) for _ in range(clients)], threading.Event(), [0]

    def look() -> None:
        watcher = Client(port)
        while not ended.wait(0.05):
            waiting.append(watcher.get("/health")["waiting"])

    def work(number: int) -> None:
        for i in range(number, requests, clients):
            made[number].ask(texts[i % len(texts)])

    watching = threading.Thread(target=look)
    watching.start()
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    seconds = time.perf_counter() - began
    ended.set()
    watching.join()
    return Load(made, requests, seconds, max(waiting))


def is_other(answer: dict[str, Any], alone: Answer) -> bool:
    far = abs(answer["probability"] - alone.probability) > 1e-5 or off(answer, alone) > 1e-3
    return bool(answer["text"] != alone.text or far)


def off(answer: dict[str, Any], alone: Answer) -> float:
    """By which share of it the probability differs; of another text it is 0."""
    if answer["text"] != alone.text or not alone.probability:
        return 0.0
    return abs(answer["probability"] / alone.probability - 1)


def is_near_tie(answer: Answer) -> bool:
    """Whether the best two finished candidates are as likely, for all that rounding can tell."""
    marginals = [c.thorough if c.thorough is not None else c.fast for c in answer.candidates if c.finished]
    first, second = [*(p for p in marginals if p), 0.0, 0.0][:2]
    return second > 0 and abs(math.log(first) - math.log(second)) < TIE


def resident(pid: int) -> float:
    """MiB that a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


if __name__ == "__main__":
    or_input_error(main)
