"""JSON that comes from anywhere: read, or refused with the file's name. And folders that one process holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ragjax.errors import InputError
from ragjax.files import DEEPEST, exclusive_lock, parse_json, read_json, shown, unicode_json


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


HOLD = """
import sys, time
from pathlib import Path
from ragjax.files import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), ""):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match="folder: another process works here"),
            exclusive_lock(folder, "works here"),
        ):
            pass
        other.kill()
    with exclusive_lock(folder, "works here"):  # its death frees the folder
        shutil.rmtree(folder)
        with exclusive_lock(folder, "works here"):  # a new folder is not the old one
            pass


def test_where_there_are_no_locks_that_is_told(tmp_path: Path) -> None:
    """Python without fcntl: nothing but a lock needs it."""
    program = "import sys; sys.modules['fcntl'] = None\n" + HOLD
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith(
        f"InputError: {tmp_path}/.lock: cannot be locked (fcntl is unavailable); choose another file system"
    )
