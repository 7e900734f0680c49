"""The page of the server, whole or stage by stage; drawn by the templates of the report."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import HTMLResponse

from ragjax.answering.answers import Answer
from ragjax.errors import InputError
from ragjax.pages.four_stages import stages
from ragjax.pages.rendering import render
from ragjax.serving.guard import Refused
from ragjax.serving.requests import check_length
from ragjax.serving.settings import Choices, Decoding, Limits


@dataclass(frozen=True)
class PageView:
    """What every page of a server shows."""

    name: str
    choices: Choices
    examples: Sequence[str]
    locked: bool  # a token is needed to ask


def read_query(query: Mapping[str, str], choices: Choices, limits: Limits) -> tuple[str, Decoding] | None:
    """The question of a link and how to answer it; None where it has none. Raises `InputError`."""
    if not (question := query.get("question", "").strip()):
        return None
    check_length("question", question, limits)
    numbers: dict[str, int | None] = {}
    for name in ("num_docs", "num_beams"):
        text = query.get(name)
        if text and not (text.isascii() and text.isdigit() and len(text) < 7):
            raise InputError(f"{name}: expected a whole number")
        numbers[name] = int(text) if text else None
    return question, choices.decoding(query.get("mode") or None, numbers["num_docs"], numbers["num_beams"])


def start_page(
    view: PageView,
    query: Mapping[str, str],
    answer: Answer | None = None,
    problem: str | None = None,
    status: int = 200,
) -> HTMLResponse:
    """The page with its form filled in as asked, and the answer or the problem, if there is one."""
    drawn = None if answer is None else stages(dataclasses.asdict(answer))
    form = {name: query.get(name, "") for name in ("question", "mode", "num_docs", "num_beams")}
    return HTMLResponse(render("serve.html", view=view, form=form, stages=drawn, problem=problem), status)


async def stage_events(
    question: str,
    decoding: Decoding,
    documents: asyncio.Queue[tuple[list[Any], float | None]],
    answer: asyncio.Future[Answer | Exception],
) -> AsyncIterator[str]:
    """Event `retrieval` with stage 1, then `answer` with all four, or `problem` with a text."""
    found: asyncio.Future[Any] = asyncio.ensure_future(documents.get())
    try:
        await asyncio.wait({found, answer}, return_when=asyncio.FIRST_COMPLETED)
        if found.done():
            these, outside = found.result()
            early = {
                "question": question,
                "text": "",
                "mode": decoding.mode,
                "probability": 0.0,
                "documents": [dataclasses.asdict(document) for document in these],
                "candidates": [_nothing(len(these))],
                "mass_outside": outside,
            }
            yield _event("retrieval", render("serve_retrieval.html", stages=stages(early)))
        made = await answer
        if isinstance(made, Exception):
            yield _event("problem", "this question could not be answered; the server's log tells why")
        else:
            yield _event("answer", render("serve_answer.html", stages=stages(dataclasses.asdict(made))))
    except Refused as refused:
        body = json.loads(bytes(refused.response.body) or b"{}")
        yield _event("problem", body.get("error", {}).get("message", "the request was given up"))
    finally:
        found.cancel()
        answer.cancel()


def _nothing(count: int) -> dict[str, Any]:
    nothing = {"text": "", "finished": True, "fast": 0.0, "thorough": None, "doc_probability": None, "posterior": None}
    return nothing | {"beam_probability": [0.0] * count}


def _event(name: str, html: str) -> str:
    return f"event: {name}\ndata: {json.dumps(html)}\n\n"
