"""JSON: an object a line, one array of objects, or objects that follow each other over many lines."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from ragjax.data.reading.byte_stream import (
    LONGEST_LINE,
    byte_lines,
    decode_line,
    first_bytes,
    open_unpacked,
    packing_errors,
)
from ragjax.data.reading.record import Record
from ragjax.errors import InputError
from ragjax.files import DEEPEST, parse_json

FORMATS = "JSON, an object a line, or a table with tabs or commas (*.tsv, *.csv), or Parquet"
BLOCK = 1 << 20  # bytes read at once of what has no lines
DECODER, LONGEST_TOKEN = json.JSONDecoder(), 16  # but for strings: an error nearer to the end may be one cut in two
HEAD = 4096
# how a file begins that is one object with an array of its records, as SQuAD's and TriviaQA's; short entries before it
DATA = re.compile(r'\s*\{(?:\s*"\w+"\s*:\s*(?:"[^"\\]*"|[\w.-]+)\s*,)*\s*"[Dd]ata"\s*:\s*(?=\[\s*\{)')
BETWEEN = {False: re.compile(r"\s*"), True: re.compile(r"[\s,]*")}  # by whether the values stand in an array


def json_records(path: Path) -> Iterator[Record]:
    """The objects of a JSON file, one at a time. A record's number is its line where each has one, else its place.

    Raises `InputError` naming file and number for what is no JSON object. A line that is one but for its encoding is a
    record with a problem.
    """
    return _line_records(path) if has_lines(path) else _stream_records(path)


def has_lines(path: Path) -> bool:
    """Whether the first line is an object by itself; or is nothing that could begin one, and is told as a line."""
    head = first_bytes(path, 4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if not head.startswith(b"{"):
        return not head.startswith(b"[")
    for number, line in byte_lines(path):
        text, _ = decode_line(number, line)
        if text.strip():
            try:
                parse_json(text, path)
            except InputError:
                return False
            return True
    return True


def _line_records(path: Path) -> Iterator[Record]:
    for number, line in byte_lines(path):
        text, problem = decode_line(number, line)
        if not text.strip():
            continue
        try:
            value = parse_json(text, f"{path}:{number}")
        except InputError:
            if problem:
                raise InputError(f"{path}:{number}: {problem}") from None
            if not text.lstrip().startswith(("{", "[")):
                raise InputError(f"{path}:{number}: is no JSON object; expected {FORMATS}") from None
            raise
        if not isinstance(value, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, not {type(value).__name__}")
        yield Record(number, value, problem)


def _stream_records(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with open_unpacked(path) as file:
            for number, fields in _values(file, path):
                yield Record(number, fields)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number + 1}: not UTF-8 ({error.reason})") from None
    except packing_errors() as error:
        raise InputError(f"{path}:{number + 1}: cannot be read ({error})") from None


def _values(file: io.BufferedIOBase, path: Path) -> Iterator[tuple[int, dict]]:
    """The objects of an array, or those that follow each other, with their numbers from 1.

    The text of one at a time is kept; one that is not whole yet is tried again with twice the text. Of an object that
    has its records in an array called "data" they alone count.
    """
    utf8, number, opened, closed = codecs.getincrementaldecoder("utf-8-sig")(), 0, False, False  # the array
    head = DATA.match(text := utf8.decode(file.read(HEAD)))
    at = head.end() if head else 0
    while True:
        at = BETWEEN[opened].match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("[", at) and not (number or opened):
            at, opened = at + 1, True
        elif text.startswith("]", at) and opened and not closed:
            at, closed = at + 1, True
            if head:
                parse_json('{"data":[]' + text[at:] + utf8.decode(file.read(LONGEST_LINE), final=True), path)
                return
        elif at < len(text) and (closed or text[at] != "{"):
            raise InputError(f"{path}:{number + 1}: expected a JSON object, not {text[at : at + 20]!a}")
        elif (found := _first_value(text, at, f"{path}:{number + 1}")) is not None:
            (value, at), number = found, number + 1
            yield number, value
        elif block := file.read(max(BLOCK, len(text) - at)):
            text, at = text[at:] + utf8.decode(block), 0
        elif at < len(text) or opened != closed:
            raise InputError(f"{path}:{number + 1}: not JSON: the file ends within an object or array")
        else:
            utf8.decode(b"", final=True)
            return


def _first_value(text: str, at: int, where: str) -> tuple[dict, int] | None:
    """The object that begins at a place of a text, and where it ends; None where the text ends before.

    Raises `InputError` for what is no JSON, whatever may follow.
    """
    if at == len(text):
        return None
    try:
        value, end = DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        if error.pos < len(text) - LONGEST_TOKEN and not error.msg.startswith("Unterminated string"):
            raise InputError(f"{where}: not JSON ({error.msg} at {text[error.pos : error.pos + 20]!a})") from None
        if len(text) - at > LONGEST_LINE:
            raise InputError(f"{where}: longer than {LONGEST_LINE >> 20} MiB, or not JSON ({error.msg})") from None
        return None
    except RecursionError:
        raise InputError(f"{where}: not JSON: nested too deeply") from None
    except ValueError:
        raise InputError(f"{where}: not JSON: a number has thousands of digits") from None
    if text.count("{", at, end) + text.count("[", at, end) > DEEPEST:
        parse_json(text[at:end], where)  # refuses what is nested too deeply
    return value, end
