"""The forms that answers have in published sets of questions, as one list."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any


def flat_records(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The questions in a record: itself, or those of a file in SQuAD's form, data → paragraphs → qas."""
    for level in ("data", "paragraphs", "qas"):
        if isinstance(items := fields.get(level), list):
            for item in items:
                yield from flat_records(item) if isinstance(item, dict) else [{}]
            return
    yield fields


def read_answers(value: Any) -> Any:
    """All answers in a list; what is no answer is left in it, and a value of another type is left as it is.

    A text or a whole number is one answer, unless the text is a list itself, as in DPR's tables. {"text": […]} is
    SQuAD's form, [{"answer": …}, …] KILT's, {"value": …, "aliases": […]} TriviaQA's; there each answer counts once.
    """
    match value:
        case str():
            return _listed(value) or [value]
        case bool():
            return value
        case int():
            return [str(value)]
        case {"text": inside} | {"answer": inside}:
            return _once(read_answers(inside))
        case {"value": str() as first, "aliases": [*aliases]}:
            return _once([first, *aliases])
        case {"value": str() as first}:
            return [first]
        case [*items] if any(isinstance(item, dict) for item in items):
            answers: list[Any] = []
            for item in items:  # in KILT some give the provenance alone
                inside = read_answers(item) if not isinstance(item, dict) or {"text", "answer"} & set(item) else []
                answers += inside if isinstance(inside, list) else [inside]
            return _once(answers)
        case [*items]:
            return [str(item) if type(item) is int else item for item in items]
    return value


def _once(answers: Any) -> Any:
    """Without those that stand there before."""
    if not isinstance(answers, list):
        return answers
    return [answer for i, answer in enumerate(answers) if answer not in answers[:i]]


def _listed(text: str) -> list[str] | None:
    """The texts of a list that is written as Python or JSON writes it; None for any other text."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return value
    return None
