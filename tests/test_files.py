"""JSON that comes from anywhere: read, or refused with the file's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ragjax.errors import InputError
from ragjax.files import DEEPEST, parse_json, read_json, shown, unicode_json


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1', r"x\.json: not JSON .* column 8"),
        (b'{\n"a": }', r"line 2, column 6"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (nested(DEEPEST + 1).encode(), "nested too deeply"),
        (nested(100_000).encode(), "nested too deeply"),
        (b"9" * 5000, "thousands of digits"),
    ],
)
def test_malformed_json_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_json(data, "x.json")


def test_json_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, "\\u00e9"]}', "x") == {"a": [1, "é"]}
    assert parse_json(nested(DEEPEST), "x") and parse_json('"' + "[" * 500 + '"', "x") == "[" * 500
    assert unicode_json('"\\ud83d\\ude00"', "x") == "😀"
    with pytest.raises(InputError, match=r"x: holds half of a \\ud800-\\udfff pair"):
        unicode_json('{"a\\ud800": 1}', "x")


def test_a_file_of_json_is_an_object(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.json: missing; it is needed"):
        read_json(tmp_path / "no.json", "it is needed")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(InputError, match=r"a\.json: expected a JSON object, not list"):
        read_json(tmp_path / "a.json")


def test_values_are_quoted_short_and_in_ascii() -> None:
    assert shown("é\x1b") == r"'\xe9\x1b'"
    assert len(shown("x" * 10_000)) == 80
