"""The routes: the page, the own API, OpenAI's form, health, figures, and their description."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ragjax.answerer import Answerer
from ragjax.answering.answers import Answer
from ragjax.errors import InputError
from ragjax.pages.rendering import asset
from ragjax.serving.batching import Batcher, Job, OnDocuments, QueueFull, Stopping, TooLate
from ragjax.serving.chat import chat_response, chat_stream, model_list
from ragjax.serving.guard import Guard, Refused, bad_request, problem, read_body
from ragjax.serving.openapi import description
from ragjax.serving.page import PageView, read_query, stage_events, start_page
from ragjax.serving.requests import AnswerRequest, read_answer_request, read_chat_request
from ragjax.serving.settings import Decoding, Limits, choices
from ragjax.serving.telemetry import Telemetry
from ragjax.terminal import terminal

RETRY_AFTER = 2  # seconds after which a full queue may have room
LOOK = 0.25  # seconds between two looks whether the client is still there
OPEN = frozenset({"/", "/style.css", "/serve.js", "/health"})  # what needs no token: nothing of the corpus is there

# what a client learns of what went wrong within: that it did, and no more
FAILED = "this question could not be answered; the server's log tells why"

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclasses.dataclass(frozen=True)
class Serving:
    """How a server is set up."""

    answerer: Answerer
    name: str  # of the run, as pages and OpenAI's form call it
    limits: Limits
    token: str | None
    hosts: Sequence[str]  # names under which it may be asked for; * for any
    examples: Sequence[str]  # questions to click on
    log_questions: bool


class Server:
    """The application, and the worker that answers."""

    def __init__(self, serving: Serving) -> None:
        self.serving, self.limits = serving, serving.limits
        self.choices = choices(serving.answerer.rag.config, len(serving.answerer.index))
        self.telemetry = Telemetry(lambda: self.batcher.waiting, serving.log_questions)
        self.batcher = Batcher(serving.answerer, serving.limits, self.telemetry.batch)
        self.stopping = False

    def application(self) -> Starlette:
        """The routes, behind what `guard.py` checks."""
        routes = [
            Route("/", _refusing(self.page), methods=["GET"]),
            Route("/style.css", _static("style.css", "text/css"), methods=["GET"]),
            Route("/serve.js", _static("serve.js", "text/javascript"), methods=["GET"]),
            Route("/v1/answer", _refusing(self.answer), methods=["POST"]),
            Route("/v1/chat/completions", _refusing(self.chat), methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/stages", _refusing(self.stages), methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
        ]
        middleware = [
            Middleware(
                Guard,
                token=self.serving.token,
                open_routes=OPEN,
                routes=frozenset(route.path for route in routes),
                telemetry=self.telemetry,
            ),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(self.serving.hosts), www_redirect=False),
        ]
        handlers: Any = {404: _not_found, 405: _wrong_method}
        return Starlette(routes=routes, middleware=middleware, lifespan=self._lifespan, exception_handlers=handlers)

    def warm_up(self, questions: Sequence[str], seconds: float) -> None:
        """Answers some questions, so that programs are compiled before clients wait for them, and says which were."""
        decoding, began, sizes = self.choices.decoding(None, None, None), time.monotonic(), list[int]()
        usable = [
            text
            for text, why in zip(questions, self.serving.answerer.problems(questions, decoding.mode), strict=True)
            if why is None
        ]
        if not usable or not seconds:
            return
        terminal.print(f"warming up with test questions, {decoding.mode.replace('_', ' ')}")
        try:
            sizes.extend(self.batcher.warm_up(usable, decoding, seconds))
        except Exception as error:  # such as too little memory for the largest: it is answered one by one then
            self.telemetry.failure(error)
        terminal.print(
            f"batches of {', '.join(map(str, sizes)) or 'no size'} are compiled; {time.monotonic() - began:.1f} s"
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.batcher.start()
        try:
            yield
        finally:  # all connections have had their answers by now
            self.stopping = True
            await asyncio.to_thread(self.batcher.stop)

    async def page(self, request: Request) -> Response:
        """The start page; with a question in its address, and no token needed, the answer is on it."""
        view = PageView(self.serving.name, self.choices, self.serving.examples, self.serving.token is not None)
        try:
            form = read_query(request.query_params, self.choices, self.limits)
            if form is None or view.locked or _is_embedded(request):
                return start_page(view, request.query_params)
            question, decoding = form
            [answer] = await self._answers(request, [question], decoding)
        except InputError as error:
            return start_page(view, request.query_params, problem=str(error), status=400)
        if isinstance(answer, Exception):
            return start_page(view, request.query_params, problem=FAILED, status=500)
        return start_page(view, request.query_params, answer=answer)

    async def stages(self, request: Request) -> Response:
        """The stages of an answer as they are ready, as server-sent events of HTML."""
        body_request, decoding = self._read(read_answer_request, await read_body(request, self.limits))
        if body_request.question is None:
            raise Refused(problem(400, "question: expected one"))
        self._check([body_request.question], decoding)
        documents: asyncio.Queue[tuple[list[Any], float | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def found(these: list[Any], outside: float | None) -> None:
            loop.call_soon_threadsafe(documents.put_nowait, (these, outside))

        [job] = self._submit([body_request.question], decoding, body_request.given, found)
        answer = asyncio.ensure_future(self._wait(request, job))
        events = stage_events(body_request.question, decoding, documents, answer)
        return StreamingResponse(events, media_type="text/event-stream")

    async def answer(self, request: Request) -> Response:
        """`POST /v1/answer`: one question or several."""
        body_request, decoding = self._read(read_answer_request, await read_body(request, self.limits))
        answers = await self._answers(request, body_request.texts, decoding, body_request)
        made = [
            {"question": text, "error": {"message": FAILED}}
            if isinstance(answer, Exception)
            else _kept(answer, body_request.n_best)
            for text, answer in zip(body_request.texts, answers, strict=True)
        ]
        if len(made) == 1 and isinstance(answers[0], Exception):
            return problem(500, FAILED)
        return JSONResponse({"answers": made})

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`: one question, in OpenAI's form."""
        body = await read_body(request, self.limits)
        try:
            body_request, chat, decoding = read_chat_request(body, self.choices, self.limits)
        except InputError as error:
            raise bad_request(error) from None
        [answer] = await self._answers(request, body_request.texts, decoding, body_request, name="messages[0].content")
        if isinstance(answer, Exception):
            return problem(500, FAILED)
        if chat.stream:
            return StreamingResponse(chat_stream(answer, self.serving.name), media_type="text/event-stream")
        return JSONResponse(chat_response(answer, self.serving.name))

    async def models(self, request: Request) -> Response:
        """The one model, in OpenAI's form: clients ask for it before they offer a chat."""
        return JSONResponse(model_list(self.serving.name))

    async def health(self, request: Request) -> Response:
        """`GET /health`: whether it answers, and how many questions wait."""
        about = {"status": "stopping" if self.stopping else "ok", "waiting": self.batcher.waiting}
        return JSONResponse(about | {"step": self.serving.answerer.step}, 503 if self.stopping else 200)

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`: figures for Prometheus."""
        return Response(self.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        """`GET /openapi.json`: what all this takes and gives."""
        return JSONResponse(description(self.serving.name, self.choices, self.limits, self.serving.token is not None))

    def _read(self, read: Callable[..., tuple[AnswerRequest, Decoding]], body: bytes) -> tuple[AnswerRequest, Decoding]:
        try:
            return read(body, self.choices, self.limits)
        except InputError as error:
            raise bad_request(error) from None

    def _check(self, questions: Sequence[str], decoding: Decoding, name: str = "questions[{}]") -> None:
        """Refuses what cannot be answered before any is."""
        for i, why in enumerate(self.serving.answerer.problems(questions, decoding.mode)):
            if why:
                raise Refused(problem(400, f"{name.format(i)}: {why}"))

    def _submit(
        self,
        questions: Sequence[str],
        decoding: Decoding,
        given: list[Any] | None = None,
        on_documents: OnDocuments | None = None,
    ) -> list[Job]:
        self.telemetry.questions(list(questions))
        deadline = time.monotonic() + self.limits.deadline_s
        jobs = [Job(question, decoding, deadline, given, on_documents) for question in questions]
        try:
            self.batcher.submit(jobs)
        except (QueueFull, Stopping) as error:
            why = "the queue is full" if isinstance(error, QueueFull) else "the server is stopping"
            raise Refused(problem(503, f"{why}; try again later", RETRY_AFTER)) from None
        return jobs

    async def _answers(
        self,
        request: Request,
        questions: Sequence[str],
        decoding: Decoding,
        body_request: AnswerRequest | None = None,
        name: str = "questions[{}]",
    ) -> list[Answer | Exception]:
        """The answers, each in its place, or what went wrong with it. Raises `Refused`."""
        self._check(questions, decoding, name)
        jobs = self._submit(questions, decoding, None if body_request is None else body_request.given)
        try:
            return [await self._wait(request, job) for job in jobs]
        finally:
            for job in jobs:  # of a client that is gone, or that had a bad one
                job.result.cancel()

    async def _wait(self, request: Request, job: Job) -> Answer | Exception:
        """What became of a question. Raises `Refused` where it is too late, or the client is gone."""
        future = asyncio.wrap_future(job.result)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may look any more
        try:
            while not (await asyncio.wait({future}, timeout=LOOK))[0]:
                if time.monotonic() > job.deadline:
                    raise Refused(problem(504, f"no answer within {self.limits.deadline_s:g} s", RETRY_AFTER))
                if await request.is_disconnected():
                    raise Refused(Response(status_code=499))
        except BaseException:
            job.result.cancel()
            raise
        error = future.exception()
        if isinstance(error, TooLate):
            raise Refused(problem(504, f"no answer within {self.limits.deadline_s:g} s", RETRY_AFTER))
        if isinstance(error, InputError):
            raise bad_request(error)
        if isinstance(error, Exception):
            self.telemetry.failure(error)
            return error
        return future.result()


def _is_embedded(request: Request) -> bool:
    """Whether a page from elsewhere asks, as with an image, and nobody followed a link."""
    site, how = (request.headers.get(f"sec-fetch-{name}") for name in ("site", "mode"))
    return site not in (None, "same-origin", "none") and how != "navigate"


def _kept(answer: Answer, n_best: int | None) -> dict[str, Any]:
    made = dataclasses.asdict(answer)
    made["candidates"] = made["candidates"][:n_best]
    return made


def _refusing(endpoint: Endpoint) -> Endpoint:
    @wraps(endpoint)
    async def refusing(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Refused as refused:
            return refused.response

    return refusing


def _static(name: str, kind: str) -> Endpoint:
    async def static(request: Request) -> Response:
        return Response(asset(name), media_type=kind)

    return static


async def _not_found(request: Request, error: Exception) -> Response:
    return problem(404, "there is nothing here; /openapi.json tells what is")


async def _wrong_method(request: Request, error: Exception) -> Response:
    response = problem(405, "another method is expected here; /openapi.json tells which")
    response.headers.update(getattr(error, "headers", None) or {})  # Allow
    return response
