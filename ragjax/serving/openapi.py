"""The description of the API in the form of OpenAPI 3.1."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from pydantic import TypeAdapter

from ragjax.answering.answers import Answer
from ragjax.serving.requests import AnswerRequest, ChatRequest
from ragjax.serving.settings import Choices, Limits

REFERENCES = "#/components/schemas/{model}"


def description(name: str, choices: Choices, limits: Limits, token: bool) -> dict[str, Any]:
    """Of the server of one run: what it offers and its bounds are told, too."""
    schemas: dict[str, Any] = {}
    for title, model in (("AnswerRequest", AnswerRequest), ("ChatRequest", ChatRequest), ("Answer", Answer)):
        schema = TypeAdapter(model).json_schema(ref_template=REFERENCES)
        schemas |= schema.pop("$defs", {}) | {title: schema}
    offered = schemas["AnswerRequest"]["properties"]
    for key, values in (("mode", choices.modes), ("num_docs", choices.num_docs), ("num_beams", choices.num_beams)):
        offered[key]["enum"] = [*values, None]
    answers = {"type": "object", "properties": {"answers": {"type": "array", "items": _ref("Answer")}}}
    bounds = (
        f"At most {limits.together} questions a request, {limits.question_characters} characters a question, "
        f"{limits.passages} passages and {limits.body_bytes} bytes; an answer comes within {limits.deadline_s:g} s."
    )
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": f"ragjax: {name}", "version": version("ragjax"), "description": bounds},
        "paths": {
            "/v1/answer": {"post": _operation("Answers questions.", "AnswerRequest", answers)},
            "/v1/chat/completions": {
                "post": _operation("Answers a question in OpenAI's form.", "ChatRequest", {"type": "object"})
            },
            "/stages": {"post": _operation("The stages of an answer as HTML, in events.", "AnswerRequest", None)},
            "/v1/models": {
                "get": {
                    "summary": "The model, in OpenAI's form.",
                    "responses": {"200": {"description": "A list of one."}},
                }
            },
            "/health": {
                "get": {
                    "summary": "Whether it answers.",
                    "security": [],  # needs no token
                    "responses": {"200": {"description": "It does."}},
                }
            },
            "/metrics": {
                "get": {"summary": "Figures for Prometheus.", "responses": {"200": {"description": "Figures."}}}
            },
        },
        "components": {"schemas": schemas},
    }
    if token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def _operation(summary: str, body: str, answer: dict[str, Any] | None) -> dict[str, Any]:
    found = {"text/event-stream": {}} if answer is None else {"application/json": {"schema": answer}}
    failures = {
        "400": "The request cannot be answered; the message says why.",
        "413": "The body is too large.",
        "503": "The queue is full; Retry-After says when to come again.",
        "504": "There was no answer in time.",
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}},
        "responses": {"200": {"description": "The answer.", "content": found}}
        | {status: {"description": text} for status, text in failures.items()},
    }


def _ref(model: str) -> dict[str, str]:
    return {"$ref": REFERENCES.format(model=model)}
