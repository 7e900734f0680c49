"""Runs the application: uvicorn with bounds of its own, and a stop that answers what was asked before."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ragjax.errors import InputError
from ragjax.serving.app import Server
from ragjax.terminal import terminal

HEAD_BYTES = 16 << 10  # the longest head of a request
BACKLOG = 256


class PromptProtocol(H11Protocol):
    """Hangs up on a client that sends the head of a request too slowly, none at all, or a body that nobody reads."""

    receive_s = 10.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Watches a connection from its beginning."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Watches on while no head of a request has come whole."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._watch()  # of a head that has only begun
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def on_response_complete(self) -> None:
        """Hangs up, after a while, on who still sends what was refused."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # of a request that was refused; first it may read why
            self.loop.call_later(self.receive_s, self._leave, self.cycle)

    def _leave(self, cycle: object) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Watches no more."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.receive_s, self._hang_up)

    def _hang_up(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one. Raises `InputError` where that is not possible."""
    if not 0 <= port <= 65535:  # getaddrinfo takes it modulo 65536
        raise InputError(f"port {port}: expected 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its connections have it, too: else a client
        # whose acknowledgement is delayed waits 40 ms for the body
    except OSError as error:
        raise InputError(
            f"{host}:{port}: cannot be listened on ({error.strerror or error}); give another port"
        ) from None
    return listening


def run_server(server: Server, listening: socket.socket) -> uvicorn.Server:
    """Serves until a signal stops it, having answered what was asked by then."""
    uvicorn_server = make_uvicorn(server)
    host, port = listening.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    terminal.print(f"serving {server.serving.name} at http://{address}:{port}", soft_wrap=True)
    uvicorn_server.run(sockets=[listening])
    return uvicorn_server


def make_uvicorn(server: Server) -> uvicorn.Server:
    """The server as uvicorn runs it, with the bounds of `settings.py`."""
    protocol: Any = type("Protocol", (PromptProtocol,), {"receive_s": server.limits.receive_s})
    return uvicorn.Server(
        uvicorn.Config(
            server.application(),
            http=protocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_graceful_shutdown=round(server.limits.deadline_s) + 5,
        )
    )
