"""The records of a file: what it holds is known by its first bytes, not by its name."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from ragjax.data.reading.arrow import ARROW_FILE, ARROW_STREAM, PARQUET, arrow_records, count_rows
from ragjax.data.reading.byte_stream import byte_lines, first_bytes
from ragjax.data.reading.json_records import has_lines, json_records
from ragjax.data.reading.record import Record
from ragjax.data.reading.tables import is_table_name, table_records
from ragjax.errors import InputError
from ragjax.files import LFS

FileKind = Literal["json", "table", "arrow"]


def file_kind(path: Path) -> FileKind:
    """What a file holds. Raises `InputError` where it cannot be read."""
    head = first_bytes(path, 4096)
    if head.startswith(LFS):
        raise InputError(f"{path}: is a pointer of Git LFS and not the file itself; run: git lfs pull")
    if head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        return "arrow"
    begins_as_json = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[")
    if is_table_name(path.name):
        return "table"
    return "json" if begins_as_json or b"\t" not in head.partition(b"\n")[0] else "table"


def read_records(
    path: Path,
    quoting: str,
    is_header: Callable[[Sequence[str]], bool],
    section: str,
    expected: FileKind | None = None,
) -> Iterator[Record]:
    """The records of a JSON, TSV, CSV, Parquet or Arrow file, one at a time; `expected` is what it must hold.

    `quoting`, `is_header` and `section` are for tables, see `table_records`. Raises `InputError` naming file and
    number for whatever is malformed.
    """
    kind = file_kind(path)
    if expected is not None and kind != expected:
        sought = "JSON" if expected == "json" else "table"
        raise InputError(f"{path}: holds no {sought}; leave out corpus.format, and what it holds is recognised")
    if kind == "json":
        return json_records(path)
    return table_records(path, quoting, is_header, section) if kind == "table" else arrow_records(path)


def count_records(path: Path) -> int:
    """The most records that a file can hold: its lines, or its rows. Raises `InputError` as `read_records`."""
    kind = file_kind(path)
    if kind == "arrow":
        return count_rows(path)
    if kind == "json" and not has_lines(path):
        return sum(1 for _ in json_records(path))
    return sum(1 for _, line in byte_lines(path) if line.strip())
