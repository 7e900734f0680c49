"""A server in a thread of this process, and a client of it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ragjax.serving.app import Server, Serving
from ragjax.serving.server import bind, make_uvicorn

JSON = {"Content-Type": "application/json"}


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

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        status, _, text = self.ask("POST", path, body, headers)
        return status, json.loads(text)


@contextmanager
def running(serving: Serving) -> Iterator[Running]:
    server = Server(serving)
    uvicorn_server = make_uvicorn(server)
    with bind("127.0.0.1", 0) as listening:
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
