"""What stands before every route: the bearer token, headers, bounds, and errors that tell no more than they must."""

from __future__ import annotations

import asyncio
import hmac
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ragjax.errors import InputError
from ragjax.serving.settings import Limits
from ragjax.serving.telemetry import Telemetry

# nothing is loaded from elsewhere, and no other page may show this one
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
KINDS = {400: "invalid_request_error", 401: "authentication_error", 503: "overloaded_error", 504: "timeout_error"}


def problem(status: int, message: str, retry_after: int | None = None) -> JSONResponse:
    """An error in OpenAI's form, which all routes have."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(content, status, headers)


class Guard:
    """Middleware: asks for the token, adds headers, counts, and turns what nobody caught into a plain 500."""

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        open_routes: frozenset[str],
        routes: frozenset[str],
        telemetry: Telemetry,
    ) -> None:
        self.app, self.token, self.open_routes = app, token, open_routes
        self.routes, self.telemetry = routes, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        path = scope["path"] if scope["path"] in self.routes else "(unknown)"

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            if path not in self.open_routes and not self._is_allowed(Headers(scope=scope).get("authorization", "")):
                await problem(401, "a bearer token is needed")(scope, receive, send_guarded)
            else:
                await self.app(scope, receive, send_guarded)
        except Exception as error:
            self.telemetry.failure(error)
            if not status:
                await problem(500, "the server failed; its log tells why")(scope, receive, send_guarded)
        finally:
            self.telemetry.request(path, scope["method"], status or 499, time.monotonic() - began)

    def _is_allowed(self, authorization: str) -> bool:
        if self.token is None:
            return True
        kind, _, given = authorization.partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode())


class Refused(Exception):
    """A request that ends with this response."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a JSON request, within bounds of size and time. Raises `Refused`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page from elsewhere cannot send without asking
        raise Refused(problem(415, "content-type: expected application/json"))

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limits.body_bytes:
                raise Refused(problem(413, f"the body has more than {limits.body_bytes} bytes"))
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), limits.receive_s)
    except TimeoutError:
        raise Refused(problem(408, f"the body did not come within {limits.receive_s:g} s")) from None
    except ClientDisconnect:
        raise Refused(Response(status_code=499)) from None


def bad_request(error: InputError) -> Refused:
    """What answers a request that is wrong: status 400, and why."""
    return Refused(problem(400, str(error)))
