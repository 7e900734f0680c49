"""Passages and their tokens on disk, memory-mapped shard by shard."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ragjax.checksums import CheckedFiles
from ragjax.data.corpus import PASSAGE_FIELDS, RUN, Passage, passage_record
from ragjax.errors import InputError
from ragjax.files import atomic_write, parse_json
from ragjax.resources import raise_open_file_limit

SHARDS = "shards"
STORE_FILES = ("text.bin", "text_offsets.npy", "tokens.bin", "token_offsets.npy")


MEND = f"{RUN}, which builds anew what is damaged, alone"


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
            for record in map(passage_record, chunk):
                text.write(record)
                text_ends.append(text_ends[-1] + len(record))
            for ids in encode([text_of(passage) for passage in chunk]):
                tokens.write(np.asarray(ids, np.int32).tobytes())
                token_ends.append(token_ends[-1] + len(ids))
        np.save(text_offsets, np.asarray(text_ends, np.int64))
        np.save(token_offsets, np.asarray(token_ends, np.int64))


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
        record = parse_json(self.record(i), self.files.folder / STORE_FILES[0])
        if not isinstance(record, dict) or [type(record.get(name)) for name in PASSAGE_FIELDS] != [str] * 3:
            raise self.files.damaged(f"passage {i} of {STORE_FILES[0]} has no id, title and text")
        return Passage(**{name: record[name] for name in PASSAGE_FIELDS})

    def record(self, i: int) -> bytes:
        """Passage `i` as it is written."""
        start, stop = self._text_ends[i : i + 2]
        return self.text[start:stop].tobytes()

    def tokens(self, i: int) -> Int[np.ndarray, " S"]:
        """The generator's tokens of the i-th passage of the shard."""
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
        raise_open_file_limit(len(STORE_FILES) * len(folders))
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
