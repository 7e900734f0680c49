"""What may be asked over HTTP, read and checked: of the own API, and of OpenAI's chat completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ragjax.answering.given_passages import read_passages
from ragjax.errors import InputError
from ragjax.files import unicode_json
from ragjax.serving.settings import Choices, Decoding, Limits

B = TypeVar("B", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class GivenPassage(_Body):
    """A passage that is read in place of those of the index."""

    text: str
    title: str = ""
    id: str | None = None


class AnswerRequest(_Body):
    """One question or several, to be answered alike."""

    question: str | None = Field(None, description="One question; or else `questions`.")
    questions: list[str] | None = Field(None, description="Several questions.")
    mode: str | None = Field(None, description="How to decode; by default as the run is configured.")
    num_docs: int | None = Field(None, description="Documents a question, of those that the server offers.")
    num_beams: int | None = Field(None, description="Beams under each document, of those that the server offers.")
    n_best: Annotated[int, Field(gt=0)] | None = Field(None, description="Candidates to tell of; by default all.")
    passages: list[str | GivenPassage] | None = Field(
        None, description="Texts to read in place of the index's passages; the prior is over them alone."
    )

    @property
    def texts(self) -> list[str]:
        """The questions, be it one or several."""
        return [self.question] if self.question is not None else list(self.questions or ())

    @property
    def given(self) -> list[Any] | None:
        """Its passages, if it brings any."""
        return None if self.passages is None else as_given(self.passages)


def as_given(passages: Sequence[str | GivenPassage]) -> list[Any]:
    """Passages as `Answerer.answer` takes them."""
    return [of if isinstance(of, str) else of.model_dump(exclude_none=True) for of in passages]


class ChatPart(_Body):
    """A part of a message; text is the only kind that is read."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message in OpenAI's form; further fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    role: str
    content: str | list[ChatPart] | None = None


class ChatRequest(BaseModel):
    """OpenAI's form of a request, as far as it is one question; what else it asks for is refused by name."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)

    messages: list[ChatMessage]
    model: str = "ragjax"
    stream: bool | None = False
    documents: list[str | GivenPassage] | None = Field(None, description="An extension: passages to read.")


# what a client may send without a meaning here, and the only values that some others may have
WITHOUT_EFFECT = {"user", "metadata", "store", "seed", "service_tier", "safety_identifier", "prompt_cache_key"}
ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "temperature": (0,),
    "top_p": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "stop": ([],),
    "stream_options": ({}, {"include_usage": False}),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
}

KINDS = ("str", "GivenPassage", "list[ChatPart]")  # what pydantic puts into the path of a value that may be one of two


def read_answer_request(body: bytes, choices: Choices, limits: Limits) -> tuple[AnswerRequest, Decoding]:
    """The request of `POST /v1/answer`. Raises `InputError` naming what is wrong with it."""
    request = _read(AnswerRequest, body)
    if (request.question is None) == (request.questions is None):
        raise InputError("question: give it, or questions, and not both")
    if not request.texts:
        raise InputError("questions: an empty list; give at least one")
    if len(request.texts) > limits.together:
        raise InputError(f"questions: are {len(request.texts)}; at most {limits.together} in one request")
    for i, text in enumerate(request.texts):
        name = "question" if request.question is not None else f"questions[{i}]"
        check_length(name, text, limits)
    _check_passages("passages", request.passages, limits)
    return request, choices.decoding(request.mode, request.num_docs, request.num_beams)


def read_chat_request(body: bytes, choices: Choices, limits: Limits) -> tuple[AnswerRequest, ChatRequest, Decoding]:
    """The request of `POST /v1/chat/completions`, and what it means. Raises `InputError` naming what is not offered."""
    request = _read(ChatRequest, body)
    for name, value in (request.model_extra or {}).items():
        if value is None or name in WITHOUT_EFFECT:
            continue
        if name not in ONLY:
            raise InputError(f"{name[:60]}: is not offered here; leave it out")
        if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in ONLY[name]):
            raise InputError(f"{name}: only {json.dumps(ONLY[name][0])} is offered here; leave it out")
    if [message.role for message in request.messages] != ["user"]:
        raise InputError(
            "messages: expected one message, whose role is user: it is the question; other turns are not read"
        )
    content = request.messages[0].content
    parts = [content] if isinstance(content, str) else [part.text for part in content or ()]
    question = "\n".join(parts)
    check_length("messages[0].content", question, limits)
    _check_passages("documents", request.documents, limits)
    return AnswerRequest(question=question, passages=request.documents), request, choices.decoding(None, None, None)


def check_length(name: str, question: str, limits: Limits) -> None:
    """Raises `InputError` for a question that is too long."""
    if len(question) > limits.question_characters:
        raise InputError(f"{name}: has {len(question)} characters; at most {limits.question_characters}")


def _check_passages(name: str, passages: list[Any] | None, limits: Limits) -> None:
    """Before they wait in the queue; `name` is what the request calls them."""
    if passages is None:
        return
    if len(passages) > limits.passages:
        raise InputError(f"{name}: are {len(passages)}; at most {limits.passages}")
    try:
        read_passages(as_given(passages))
    except InputError as error:
        raise InputError(str(error).replace("passages", name, 1)) from None


def _read(kind: type[B], body: bytes) -> B:
    value = unicode_json(body, "the body")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = max(error.errors(), key=lambda of: len(of["loc"]))  # of a text or an object: of what it is more like
        at = ".".join(str(part) for part in first["loc"] if part not in KINDS)[:120] or "the body"
        raise InputError(f"{at}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
