"""Questions and their answers, in the forms of NQ-open, DPR, FlashRAG, SQuAD, TriviaQA and KILT.

A question that cannot be used is left out, with its line and the reason, and costs no other; a line that is no record
means that the file is damaged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ragjax.checkpoints.hub import fingerprint_files
from ragjax.config import Questions
from ragjax.data.forms.answers import flat_records, read_answers
from ragjax.data.forms.columns import SAMPLE, Columns, by_file
from ragjax.data.reading.records import file_kind, read_records
from ragjax.data.reading.sources import find_files, is_missing
from ragjax.errors import InputError
from ragjax.files import is_unicode

PARTS = ("id", "question", "answers", "passages")
FEW = 5  # of what is left out is shown on the terminal


@dataclass(frozen=True)
class Question:
    """A question x with the answers that are right."""

    question: str
    answers: tuple[str, ...]
    id: str
    passages: tuple[str, ...] = ()  # ids of those that answer it, where the file tells
    line: int = field(default=0, compare=False)  # of its file, or its place among the questions, from 1


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

    path: Path  # as the configuration has it
    questions: list[Question]
    left_out: list[LeftOut]
    files: tuple[Path, ...] = ()  # that were read, where these are others
    notices: tuple[str, ...] = ()  # of what is recognised otherwise than by our own names, to be told

    def __len__(self) -> int:
        return len(self.questions) + len(self.left_out)

    @property
    def fingerprint(self) -> str:
        """Of what the files hold."""
        return fingerprint_files(self.files or [self.path])

    def first(self, count: int | None) -> Split:
        """The first `count` of the file, those that are left out counted as well."""
        lines = [question.line for question in self.questions] + [of.line for of in self.left_out]
        there = set(sorted(lines)[:count])
        kept = [question for question in self.questions if question.line in there]
        return replace(self, questions=kept, left_out=[of for of in self.left_out if of.line in there])

    def without(self, problems: Sequence[str | None]) -> Split:
        """Leaves out the questions that have a problem: one entry a question, None where there is none."""
        pairs = list(zip(self.questions, problems, strict=True))
        more = [LeftOut(str(self.path), q.line, q.id, q.question, q.answers, why) for q, why in pairs if why]
        left_out = sorted([*self.left_out, *more], key=lambda of: of.line)
        return replace(self, questions=[q for q, why in pairs if not why], left_out=left_out)

    def checked(self, strict: bool) -> Split:
        """Itself. Raises `InputError` if no question is left, and with `strict` if any was left out."""
        count = len(self.left_out)
        if strict and count:
            others = f"; so are {count - 1} others" if count > 1 else ""
            raise InputError(f"{self.left_out[0]}{others}; correct that, or leave them out with questions.strict=false")
        if not self.questions:
            raise InputError(f"{self.path}: none of its {count} questions can be used; the first: {self.left_out[0]}")
        return self

    def notice_lines(self, where: Path) -> list[str]:
        """What to print, line by line: what is recognised, and what is left out; `where` lists all of the latter."""
        if not self.left_out:
            return list(self.notices)
        more = [f"  and {len(self.left_out) - FEW} more"] if len(self.left_out) > FEW else []
        head = f"{len(self.left_out)} of {len(self)} questions cannot be used and are left out ({where} lists them):"
        return [*self.notices, head, *(f"  {of}" for of in self.left_out[:FEW]), *more]


def read_split(source: Path | str, settings: Questions | None = None) -> Split:
    """Reads the questions of a file, or of a source as `corpus.source` has them.

    Args:
        source: JSON, TSV, CSV or Parquet: records of a question, its answers, and perhaps an id, which is else its
            number, and the ids of the passages that answer it.
        settings: the section `questions`, of which `columns` and `quoting` are read; None means the defaults.

    Raises `InputError` naming file and line for a line that is no record, and for a source without questions.
    """
    if is_missing(str(source)):
        raise InputError(
            f'{source}: no such file of questions; expected JSON lines, {{"question": …, "answer": [ … ]}}, or another '
            "source that questions.train, dev and test may name"
        )
    files, settings = find_files(str(source)).files, settings or Questions()
    questions, left_out, last, notices = [], [], 0, dict[str, list[Path]]()
    for file in files:
        for number, fields, names, problem in _records(file, settings, notices):
            last = max(number, last + 1)  # several may stand on one line, or in several files
            record = _standard(fields, names)
            if reason := problem or _problem(record, fields, names):
                left_out.append(_left_out(record, file, last, reason))
            else:
                passages, id_ = tuple(map(str, record["passages"])), str(record.get("id", last))
                questions.append(Question(record["question"].strip(), tuple(record["answers"]), id_, passages, last))
    if not questions and not left_out:
        raise InputError(f"{source}: holds no questions; expected records of a question and its answers")
    return Split(Path(source), questions, left_out, files, tuple(by_file(notices)))


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


def _records(
    file: Path, settings: Questions, notices: dict[str, list[Path]]
) -> Iterator[tuple[int, dict[str, Any], Columns, str | None]]:
    """The questions of a file: number, fields, what these are called, and why the bytes are no text.

    Adds to `notices` what is recognised, and of which files.
    """
    columns = Columns("questions", settings.columns.model_dump())
    records = read_records(file, settings.quoting, columns.is_header, "questions")
    sample, doubt = list(itertools.islice(records, SAMPLE)), ""
    if sample and file_kind(file) == "table" and "".join(sample[0].fields).isdigit():
        rows = [list(record.fields.values()) for record in sample]
        doubt = columns.doubt(rows)
        columns = replace(columns, given=columns.headless(rows, f"{file}:{sample[0].number}"))
    if first := next((fields for record in sample for fields in flat_records(record.fields)), None):
        names = columns.notice({part: columns.find(part, first) for part in PARTS}, list(first))
        if notice := "; ".join(part for part in (names, doubt) if part):
            notices.setdefault(notice, []).append(file)
    for record in itertools.chain(sample, records):
        for fields in flat_records(record.fields):
            yield record.number, fields, columns, record.problem


def _standard(fields: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """A record under our own keys, answers and passages as lists; what it lacks is not there."""
    keys = {part: columns.find(part, fields) for part in PARTS}
    record = {part: fields[key] for part, key in keys.items() if key is not None}
    if record.get("id", "") is None:
        del record["id"]
    passages = record.get("passages")
    return record | {"answers": read_answers(record.get("answers")), "passages": [] if passages is None else passages}


def _problem(record: dict[str, Any], fields: dict[str, Any], columns: Columns) -> str | None:
    """Why a question cannot be used, None if it can."""
    text, answers, passages = record.get("question"), record["answers"], record["passages"]
    if lacking := [part for part in ("question", "answers") if columns.find(part, fields) is None]:
        return columns.lack(lacking[0], fields)
    if not isinstance(text, str) or not text.strip():
        return 'empty or missing "question"; expected a text'
    if not isinstance(answers, list) or not answers:
        return 'empty or missing "answers"; expected a list of texts'
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        return '"answers" must be a list of texts that are not empty'
    if not isinstance(passages, list) or not all(isinstance(p, str) or type(p) is int for p in passages):
        return '"passages" must be a list of passage ids'
    id_ = record.get("id", 0)
    if isinstance(id_, bool) or not isinstance(id_, str | int) or id_ == "":
        return 'empty "id"; expected a text or a whole number'
    if not is_unicode("".join([text, *answers, *map(str, passages), str(id_)])):
        return "holds half of a \\ud800-\\udfff pair, which is no Unicode text"
    return None


def _left_out(record: dict[str, Any], path: Path, number: int, reason: str) -> LeftOut:
    def printable(value: Any) -> str:
        return value.encode(errors="replace").decode() if isinstance(value, str) else ""

    answers = record["answers"]
    texts = tuple(map(printable, answers)) if isinstance(answers, list) else ()
    return LeftOut(
        str(path), number, printable(record.get("id")) or str(number), printable(record.get("question")), texts, reason
    )
