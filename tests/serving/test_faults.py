"""What others do wrong, at once and for long: the server goes on, and answers what is asked well."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from http_server import HEAD, Held, Running, running
from world import LANDS

import ragjax
from ragjax.answerer import Answerer
from ragjax.commands.serve import ServeOptions, allowed_hosts
from ragjax.serving.app import Serving
from ragjax.serving.settings import Limits

QUESTIONS = [f"Capital of {land}?" for land in LANDS[:8]]
LIMITS = Limits(batch=2, receive_s=0.5, deadline_s=30.0)
SLOW = 60


@pytest.fixture(scope="module")
def serving(run: Path) -> Serving:
    return Serving(ragjax.load(run), "tiny", LIMITS, None, allowed_hosts(ServeOptions()), [], False)


@pytest.fixture(scope="module")
def here(serving: Serving) -> Iterator[Running]:
    with running(serving) as server:
        yield server


def right(here: Running, answerer: Answerer) -> None:
    """Asks, and compares with the answer in Python."""
    status, told = here.post("/v1/answer", {"question": QUESTIONS[0]})
    [alone] = answerer.answer(QUESTIONS[0])
    assert status == 200 and told["answers"][0]["text"] == alone.text


def test_a_client_that_goes_in_mid_answer(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has begun with its questions; what others ask is answered after them."""
    held = Held(serving.answerer, monkeypatch)
    with running(serving) as here, ThreadPoolExecutor(1) as pool:
        gone = here.leave(json.dumps({"questions": QUESTIONS[:2]}).encode())
        assert held.begun.wait(10)
        stays = pool.submit(here.post, "/v1/answer", {"question": QUESTIONS[2]})
        gone.close()
        time.sleep(0.4)  # longer than the server takes to look
        held.go.set()
        status, told = stays.result()
        assert status == 200 and told["answers"][0]["question"] == QUESTIONS[2]
        assert here.server.batcher.waiting == 0
    assert held.batches == [QUESTIONS[:2], [QUESTIONS[2]]]


def test_many_slow_clients(here: Running, serving: Serving) -> None:
    """Each sends a byte now and then, some of them of a body; others are answered, and the slow ones are left."""
    slow = [socket.create_connection(("127.0.0.1", here.port), timeout=5) for _ in range(SLOW)]
    began = time.monotonic()
    for i, client in enumerate(slow):
        client.sendall(HEAD.format(99).encode() if i % 2 else b"GET /hea")
    while time.monotonic() - began < 1.5:
        for client in slow:
            try:
                client.sendall(b"x")
            except ConnectionError:
                continue  # left
        right(here, serving.answerer)
    for client in slow:
        try:
            while client.recv(4096):
                pass
        except ConnectionError:
            pass
        client.close()
    assert time.monotonic() - began < 10
    right(here, serving.answerer)


VALID: dict[str, dict[str, Any]] = {
    "/v1/answer": {"questions": QUESTIONS[:2], "mode": "fast", "num_docs": 2, "num_beams": 1, "n_best": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": QUESTIONS[0]}], "n": 1, "temperature": 0},
    "/stages": {"question": QUESTIONS[0], "mode": "thorough", "num_docs": 3, "num_beams": 2},
}
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    10**400,
    "",
    "x" * 3000,
    "\ud800",
    "\x00",
    [],
    {},
    [[]],
    [None],
    {"a": {"b": []}},
]


def malformed(rng: random.Random, body: dict[str, Any]) -> bytes:
    """A body with another value somewhere, without a key, with one more, or with other bytes."""
    made, kind = dict(body), rng.randrange(5)
    if kind < 2:
        made[rng.choice(list(made))] = rng.choice(VALUES)
    elif kind == 2:
        made[f"more {rng.random()}"] = rng.choice(VALUES)
    elif kind == 3:
        del made[rng.choice(list(made))]
    data = bytearray(json.dumps(made).encode())
    if kind == 4:
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(3)] = rng.choice([b"", b"\xff", b"[", b'"', b"\\ud800", b"\x00", b"NaN"])
    return bytes(data)


def test_a_hundred_malformed_bodies(here: Running, serving: Serving) -> None:
    """Each is answered or refused in JSON, and nothing fails within."""
    rng, statuses = random.Random(5), []
    for i in range(100):
        path = list(VALID)[i % 3]
        body = malformed(rng, VALID[path])
        status, _, text = here.ask("POST", path, body)
        statuses.append(status)
        assert status in (200, 400), (path, body, text)
        assert "Traceback" not in text
        if status == 400:
            assert json.loads(text)["error"]["message"]
        else:
            assert "could not be answered" not in text, (path, body)
    assert statuses.count(400) > 60
    right(here, serving.answerer)
