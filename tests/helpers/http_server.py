"""A server in a thread of this process, and a client of it."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from ragjax.answerer import Answerer
from ragjax.answering.answers import Answer
from ragjax.serving import telemetry
from ragjax.serving.app import Server, Serving
from ragjax.serving.server import bind, make_uvicorn
from ragjax.terminal import Screen, terminal

JSON = {"Content-Type": "application/json"}
HEAD = "POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"


@dataclass
class Running:
    """A server in a thread of this process."""

    server: Any  # its `Server`; None where it runs elsewhere
    port: int
    stop: Any

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, sent, JSON | (headers or {}) if method == "POST" else headers or {})
            response = connection.getresponse()
            told = {name.lower(): value for name, value in response.getheaders()}
            return response.status, told, response.read().decode()
        finally:
            connection.close()

    def leave(self, body: bytes) -> socket.socket:
        """Sends a question and does not wait for its answer: the connection, to be closed."""
        gone = socket.create_connection(("127.0.0.1", self.port))
        gone.sendall(HEAD.format(len(body)).encode() + body)
        return gone

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        status, _, text = self.ask("POST", path, body, headers)
        return status, json.loads(text)


@contextmanager
def running(serving: Serving, logged: bool = False) -> Iterator[Running]:
    """Its log, whose lines come after the responses and so perhaps after the test, goes nowhere unless asked for."""
    server = Server(serving)
    uvicorn_server = make_uvicorn(server)
    with bind("127.0.0.1", 0) as listening, pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry, "terminal", terminal if logged else Screen(file=io.StringIO()))
        thread = threading.Thread(target=lambda: uvicorn_server.run(sockets=[listening]), daemon=True)
        thread.start()

        def stop() -> None:
            uvicorn_server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()

        while not uvicorn_server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield Running(server, listening.getsockname()[1], stop)
        finally:
            stop()


class Held:
    """Makes an answerer wait in its first batch until it is let go, and break on one question."""

    def __init__(self, answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go, self.batches = threading.Event(), threading.Event(), list[list[str]]()
        real = Answerer.answer

        def held(these: Answerer, questions: list[str], *given: Any, **more: Any) -> list[Answer]:
            self.batches.append(list(questions))
            self.begun.set()
            assert self.go.wait(30)
            if "break" in questions:
                raise RuntimeError("secret within")
            return real(these, questions, *given, **more)

        monkeypatch.setattr(Answerer, "answer", held)
