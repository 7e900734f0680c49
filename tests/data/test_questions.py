"""Questions: what a file holds, and that a bad one costs itself and no other."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from ragjax.data.questions import FEW, Question, Split, as_json, read_questions, read_split, text_problem
from ragjax.errors import InputError
from ragjax.files import write_jsonl

GOOD = {"question": "q", "answer": "a"}


def written(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    write_jsonl(path, [{"question": "Où ?", "answer": ["a", "b"], "x": 1}, {"question": "q", "answer": "c", "id": "z"}])
    assert "Où" in path.read_text(encoding="utf-8")
    assert read_questions(path) == [Question("Où ?", ("a", "b"), "1"), Question("q", ("c",), "z")]
    assert [question.line for question in read_questions(path)] == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["q.jsonl"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": " ", "answer": ["a"]}', 'empty or missing "question"; expected a text'),
        (b'{"question": ["q"], "answer": ["a"]}', 'empty or missing "question"; expected a text'),
        (
            b'{"question": "q"}',
            'empty or missing "answers": no "answers" among its keys (question); name it by questions.col',
        ),
        (
            b'{"frage": "q", "answer": "a"}',
            'empty or missing "question": no "question" among its keys (frage, answer); ',
        ),
        (b'{"question": "q", "answer": []}', 'empty or missing "answers"; expected a list of texts'),
        (b'{"question": "q", "answer": ["a", 3.5]}', '"answers" must be a list of texts that are not empty'),
        (b'{"question": "q", "answer": [""]}', '"answers" must be a list of texts that are not empty'),
        (b'{"question": "q", "answer": ["a"], "passages": "p"}', '"passages" must be a list of passage ids'),
        (b'{"question": "q", "answer": ["a"], "id": true}', 'empty "id"; expected a text or a whole number'),
        (
            b'{"question": "q \\ud83d", "answer": ["a"]}',
            "holds half of a \\ud800-\\udfff pair, which is no Unicode text",
        ),
        (b'{"question": "q", "answer": ["\\udc80 \\ud83d\\ude00"]}', "holds half of a \\ud800-\\udfff pair"),
        (b'{"question": "caf\xe9", "answer": ["a"]}', "not UTF-8 (invalid continuation byte)"),
    ],
)
def test_a_bad_question_is_left_out_with_its_line(tmp_path: Path, line: bytes, reason: str) -> None:
    good = json.dumps(GOOD).encode()
    split = read_split(written(tmp_path / "q.jsonl", good, b"", line, good))
    assert [question.line for question in split.questions] == [1, 4]
    [bad] = split.left_out
    assert (bad.file, bad.line) == (str(tmp_path / "q.jsonl"), 3) and bad.reason.startswith(reason)
    json.dumps(as_json(split.left_out), ensure_ascii=False).encode()  # whatever was there, this can be written
    assert len(split) == 3 and split.checked(strict=False) is split
    with pytest.raises(InputError, match=r"q\.jsonl:3: .*; correct that, or leave them out with questions\.strict=fal"):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "q.jsonl:2: not JSON"),
        (b"[1]", "q.jsonl:2: expected a JSON object, not list"),
        (b"[" * 100_000, "q.jsonl:2: not JSON: nested too deeply"),
        (b'{"question": "caf\xe9", ', r"q.jsonl:2: not UTF-8 \("),
        (b'{"question": "\\ud83d", ', "q.jsonl:2: not JSON"),
    ],
)
def test_a_line_that_is_no_json_is_a_damaged_file(tmp_path: Path, line: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_split(written(tmp_path / "q.jsonl", json.dumps(GOOD).encode(), line))


def test_a_mark_before_the_first_line_is_no_part_of_it(tmp_path: Path) -> None:
    assert read_questions(written(tmp_path / "q.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())) == [
        Question("q", ("a",), "1")
    ]


def test_files_without_a_usable_question(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no questions"):
        read_split(written(tmp_path / "q.jsonl", b""))
    split = read_split(written(tmp_path / "q.jsonl", b"{}", b"{}"))
    with pytest.raises(InputError, match=r"none of its 2 questions can be used; the first: .*q\.jsonl:1: empty or mis"):
        split.checked(strict=False)
    with pytest.raises(InputError, match=r"none\.jsonl: no such file of questions"):
        read_split(tmp_path / "none.jsonl")
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-9])
    with pytest.raises(InputError, match=r"q\.jsonl\.gz:1: cannot be read"):
        read_split(tmp_path / "q.jsonl.gz")


def test_those_left_out_later_stand_with_the_others(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"q{i}" if i % 3 else "", "answer": "a"}).encode() for i in range(9)]
    split = read_split(written(tmp_path / "q.jsonl", *lines))
    fewer = split.without([None, "too long", None, None, None, "too long"])
    assert [of.line for of in fewer.left_out] == [1, 3, 4, 7, 9]
    assert [q.line for q in fewer.questions] == [2, 5, 6, 8]
    head = fewer.first(4)
    assert ([q.line for q in head.questions], [of.line for of in head.left_out]) == ([2], [1, 3, 4])
    assert fewer.first(None) == fewer and len(fewer) == len(split) == 9


def test_the_first_are_told_and_the_others_counted(tmp_path: Path) -> None:
    lines = [json.dumps({"question": "q", "answer": "a" if i else []}).encode() for i in [1, *[0] * (FEW + 2)]]
    told = read_split(written(tmp_path / "q.jsonl", *lines)).notice_lines(Path("out.json"))
    assert told[0] == f"{FEW + 2} of {FEW + 3} questions cannot be used and are left out (out.json lists them):"
    assert told[1].startswith(f"  {tmp_path / 'q.jsonl'}:2: ") and told[-1] == "  and 2 more" and len(told) == FEW + 2
    assert Split(tmp_path, [Question("q", ("a",), "1")], []).notice_lines(Path("out.json")) == []


def test_what_is_no_question() -> None:
    assert text_problem("Where?") is None
    assert text_problem(" \t\n") == "an empty question; expected some text"
    told = text_problem("\udcff" * 1000)
    assert told is not None and "is not Unicode text; give it in UTF-8" in told and len(told) < 600
