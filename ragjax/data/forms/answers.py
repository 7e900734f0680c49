"""The forms that answers have in published sets of questions, as one list."""

from __future__ import annotations

import ast
import io
import json
import tokenize
from collections.abc import Iterator
from typing import Any


def flat_records(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The questions in a record: itself, or those of a file in SQuAD's form, data → paragraphs → qas, or TriviaQA's."""
    for level in ("data", "Data", "paragraphs", "qas"):
        if isinstance(items := fields.get(level), list):
            for item in items:
                yield from flat_records(item) if isinstance(item, dict) else [{}]
            return
    yield fields


def read_answers(value: Any) -> Any:
    """All answers in a list; what is no answer is left in it, and a value of another type is left as it is.

    A text or a whole number is one answer, unless the text is a list itself, as in DPR's tables. {"text": […]} is
    SQuAD's form, [{"answer": …}, …] KILT's, {"value": …, "aliases": […]} TriviaQA's, also with capitals; there each
    answer counts once.
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
        case {"value": str() as first, **others} | {"Value": str() as first, **others}:
            aliases = others.get("aliases", others.get("Aliases"))
            return _once([first, *aliases]) if isinstance(aliases, list) else [first]
        case [*items] if any(isinstance(item, dict) for item in items):
            answers: list[Any] = []
            for item in items:  # in KILT some give the provenance alone
                has_text = not isinstance(item, dict) or any(item.get(name) for name in ("text", "answer"))
                inside = read_answers(item) if has_text else []
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
    """The texts and whole numbers of a list as JSON, Python or NumPy writes it; None for any other text."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for parse in (json.loads, _written_by_python):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue
        if isinstance(value, list) and value and all(isinstance(item, str) or type(item) is int for item in value):
            return [str(item) for item in value]
    return None


def _written_by_python(text: str) -> list[Any]:
    """Literals one by one: `ast.literal_eval` would join texts without a comma between them, as pandas writes them."""
    items = []
    for token in tokenize.generate_tokens(io.StringIO(text[1:-1]).readline):
        if token.type in (tokenize.STRING, tokenize.NUMBER):
            items.append(ast.literal_eval(token.string))
        elif token.string.strip(", \n"):
            raise ValueError(f"{token.string!r} is no item of a list")
    return items
