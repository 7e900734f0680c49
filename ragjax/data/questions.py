"""Questions and their answers: JSONL in the NQ-open form, {"question": …, "answer": [ … ]}.

A question that cannot be used is left out, with its line and the reason, and costs no other; a line that is no JSON
object means that the file is damaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ragjax.data.corpus import byte_lines
from ragjax.errors import InputError
from ragjax.files import is_unicode, parse_json

FEW = 5  # of what is left out is shown on the terminal


@dataclass(frozen=True)
class Question:
    question: str
    answers: tuple[str, ...]
    id: str
    passages: tuple[str, ...] = ()  # ids of those that answer it, where the file tells
    line: int = field(default=0, compare=False)  # of its file, from 1


@dataclass(frozen=True)
class LeftOut:
    """A question that cannot be asked or learnt from, and why. Its texts are Unicode, whatever the file holds."""

    file: str
    line: int
    id: str
    question: str
    answers: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Split:
    """The questions of a file: those that can be used and those that are left out, both in the order of its lines."""

    path: Path
    questions: list[Question]
    left_out: list[LeftOut]

    def __len__(self) -> int:
        return len(self.questions) + len(self.left_out)

    def first(self, count: int | None) -> Split:
        """The first `count` of the file, those that are left out counted as well."""
        lines = [question.line for question in self.questions] + [of.line for of in self.left_out]
        there = set(sorted(lines)[:count])
        kept = [question for question in self.questions if question.line in there]
        return Split(self.path, kept, [of for of in self.left_out if of.line in there])

    def without(self, problems: Sequence[str | None]) -> Split:
        """Leaves out the questions that have a problem: one entry a question, None where there is none."""
        pairs = list(zip(self.questions, problems, strict=True))
        more = [LeftOut(str(self.path), q.line, q.id, q.question, q.answers, why) for q, why in pairs if why]
        left_out = sorted([*self.left_out, *more], key=lambda of: of.line)
        return Split(self.path, [q for q, why in pairs if not why], left_out)

    def checked(self, strict: bool) -> Split:
        """Itself. Raises `InputError` if no question is left, and with `strict` if any was left out."""
        count = len(self.left_out)
        if strict and count:
            others = f"; so are {count - 1} others" if count > 1 else ""
            raise InputError(f"{self.left_out[0]}{others}; correct that, or leave them out with questions.strict=false")
        if not self.questions:
            raise InputError(f"{self.path}: none of its {count} questions can be used; the first: {self.left_out[0]}")
        return self

    def left_out_lines(self, where: Path) -> list[str]:
        """What to print of those that are left out, line by line; `where` is the file that lists all of them."""
        if not self.left_out:
            return []
        more = [f"  and {len(self.left_out) - FEW} more"] if len(self.left_out) > FEW else []
        head = f"{len(self.left_out)} of {len(self)} questions cannot be used and are left out ({where} lists them):"
        return [head, *(f"  {of}" for of in self.left_out[:FEW]), *more]


def read_split(path: Path) -> Split:
    """Reads JSONL lines {"question": …, "answer": [ … ]}; a lone string is one answer, the line number the default id.
    `passages`, optional, lists the ids of the passages that answer the question.

    Raises `InputError` naming file and line for a line that is no JSON object, and for a file without questions.
    """
    if not path.is_file():
        raise InputError(f'{path}: no such file of questions; expected JSON lines, {{"question": …, "answer": [ … ]}}')
    questions, left_out = [], []
    for number, line in byte_lines(path):
        where, broken, codec = f"{path}:{number}", None, "utf-8-sig" if number == 1 else "utf-8"
        try:
            text = line.decode(codec)
        except UnicodeDecodeError as error:
            text, broken = line.decode(codec, errors="replace"), f"not UTF-8 ({error.reason})"
        if not text.strip():
            continue
        try:
            record = parse_json(text, where)
        except InputError:
            if broken:
                raise InputError(f"{where}: {broken}") from None
            raise
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected a JSON object, not {type(record).__name__}")
        if reason := broken or _problem(record):
            left_out.append(_left_out(record, path, number, reason))
        else:
            passages, id_ = tuple(record.get("passages", [])), str(record.get("id", number))
            questions.append(Question(record["question"].strip(), tuple(_answers(record)), id_, passages, number))
    if not questions and not left_out:
        raise InputError(f"{path}: holds no questions; expected one JSON object a line")
    return Split(path, questions, left_out)


def read_questions(path: Path) -> list[Question]:
    """As `read_split`, of a file whose questions must all be usable: raises `InputError` for the first that is not."""
    return read_split(path).checked(strict=True).questions


def text_problem(text: str) -> str | None:
    """Why a text is no question; None if it is one."""
    if not text.strip():
        return "an empty question; expected some text"
    if not is_unicode(text):
        return f"the question {text[:80]!a} is not Unicode text; give it in UTF-8"
    return None


def as_json(left_out: Sequence[LeftOut]) -> list[dict[str, Any]]:
    """For the files that list what was left out: file, line, id, question, answers and the reason."""
    return [asdict(of) for of in left_out]


def _answers(record: dict[str, Any]) -> Any:
    answers = record.get("answer")
    return [answers] if isinstance(answers, str) else answers


def _problem(record: dict[str, Any]) -> str | None:
    """Why a question cannot be used, None if it can."""
    text, answers, passages = record.get("question"), _answers(record), record.get("passages", [])
    if not isinstance(text, str) or not text.strip():
        return 'empty or missing "question"; expected a text'
    if not isinstance(answers, list) or not answers:
        return 'empty or missing "answer"; expected a list of texts'
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        return '"answer" must be a list of texts that are not empty'
    if not isinstance(passages, list) or not all(isinstance(p, str) for p in passages):
        return '"passages" must be a list of passage ids'
    id_ = record.get("id", 0)
    if isinstance(id_, bool) or not isinstance(id_, str | int) or id_ == "":
        return 'empty "id"; expected a text or a whole number'
    if not is_unicode("".join([text, *answers, *passages, str(id_)])):
        return "holds half of a \\ud800-\\udfff pair, which is no Unicode text"
    return None


def _left_out(record: dict[str, Any], path: Path, number: int, reason: str) -> LeftOut:
    def shown(value: Any) -> str:
        return value.encode(errors="replace").decode() if isinstance(value, str) else ""

    answers = _answers(record)
    texts = tuple(map(shown, answers)) if isinstance(answers, list) else ()
    return LeftOut(
        str(path), number, shown(record.get("id")) or str(number), shown(record.get("question")), texts, reason
    )
