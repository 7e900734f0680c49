"""Answers in the form of OpenAI's chat completions."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from ragjax.answering.answers import Answer


def chat_response(answer: Answer, model: str) -> dict[str, Any]:
    """The whole answer; `ragjax` is an extension, with all that it was chosen from."""
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(answer)}
    return _frame("chat.completion", model) | {"choices": [choice], "ragjax": dataclasses.asdict(answer)}


async def chat_stream(answer: Answer, model: str) -> AsyncIterator[str]:
    """The same as server-sent events: an answer is chosen whole, so that its text comes in one piece."""
    frame = _frame("chat.completion.chunk", model)
    deltas: list[tuple[dict[str, Any], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": answer.text}, None), ({}, _reason(answer))]
    for delta, reason in deltas:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        yield f"data: {json.dumps(frame | {'choices': [choice]}, ensure_ascii=False)}\n\n"
    yield "data: [DONE]\n\n"


def model_list(name: str) -> dict[str, Any]:
    """What OpenAI's `GET /v1/models` gives: the one run that is served."""
    return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "ragjax"}]}


def _reason(answer: Answer) -> str:
    return "stop" if answer.candidates[0].finished else "length"


def _frame(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
