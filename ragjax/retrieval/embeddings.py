"""Embeddings of passages on disk, shard by shard: written as they are encoded, and mapped.

Each file holds [n, D]; bfloat16 is kept as uint16, which .npy can name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Int

from ragjax.checksums import CheckedFiles
from ragjax.data.corpus import RUN
from ragjax.data.passage_store import MEND, map_array
from ragjax.errors import InputError
from ragjax.files import atomic_write
from ragjax.padding import Ids, pad_sequences, pick_bucket
from ragjax.resources import raise_open_file_limit

EMBEDDINGS = "embeddings.npy"


Encode = Callable[[Int[np.ndarray, "n S"], Bool[np.ndarray, "n S"]], Any]
EncodedBatch = tuple[np.ndarray, np.ndarray]  # some places [n], and the embeddings [n, D] that belong there


def embed_passages(
    batches: Iterable[EncodedBatch], count: int, *, dtype: str, path: Path, progress: Callable[[int], None]
) -> None:
    """Writes the embeddings [n, D] of a shard's passages, at least one, to `path`, in their order and in `dtype`.

    `count` is n. `progress` is told how many passages each batch had. Raises `InputError` for a full disk or embeddings
    that `dtype` cannot hold.
    """
    embeddings: np.ndarray | None = None
    with atomic_write(path) as (file,):
        for ids, batch in batches:
            with np.errstate(over="ignore"):
                stored = batch.astype(dtype, copy=False)
            if not np.isfinite(stored.astype(np.float32, copy=False)).all():
                raise InputError(f"an embedding is not finite in index.dtype={dtype}; check retriever.source, or widen")
            if embeddings is None:
                embeddings = _create(file, (count, batch.shape[1]), dtype)
            embeddings[ids] = stored
            progress(len(ids))
        assert isinstance(embeddings, np.memmap)
        embeddings.flush()


def encoded_batches(
    encode: Encode,
    token_rows: Sequence[Ids],
    *,
    width_buckets: Sequence[int],
    batch_size: int,
    pad_id: int,
    devices: int = 1,
) -> Iterator[EncodedBatch]:
    """Places of passages and their embeddings, longest passages first, so that memory runs out at once or never.

    `encode` maps tokens[n, S] and mask[n, S] to an array [n, D]: n is `batch_size` for each of so many `devices`, S
    one of `width_buckets`.

    Each device has a whole batch, and batches of one width go together: so each is padded and encoded in the same way
    whatever the number of devices. The next ones are dispatched before the previous ones are awaited: the host writes
    while the devices compute.
    """
    lengths = np.array([len(row) for row in token_rows])
    order = np.argsort(-lengths, kind="stable")
    batches = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    waiting = None
    for width, group in groupby(batches, key=lambda ids: pick_bucket(int(lengths[ids[0]]), width_buckets)):
        while together := list(islice(group, devices)):
            ids = np.concatenate(together)
            rows = [token_rows[i] for i in ids]
            rows += [rows[-1]] * (devices * batch_size - len(rows))
            current = ids, encode(*pad_sequences(rows, width, pad_id))
            if waiting is not None:
                yield _finished(*waiting)
            waiting = current
    if waiting is not None:
        yield _finished(*waiting)


def _finished(ids: Int[np.ndarray, " n"], result: Any) -> EncodedBatch:
    return ids, np.asarray(result)[: len(ids)].astype(np.float32)


def _create(file: BinaryIO, shape: tuple[int, int], dtype: str) -> np.memmap:
    header = {"descr": _npy_dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    start = file.tell()
    _reserve(file, start, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.memmap(file.name, dtype, "r+", start, shape)


def _reserve(file: BinaryIO, start: int, size: int) -> None:
    # Writing through a memory map to a full disk kills the process; so the space is claimed before.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), start, size)
        return
    for written in range(0, size, 1 << 24):
        file.write(bytes(min(1 << 24, size - written)))
    file.flush()


def _npy_dtype(dtype: str) -> np.dtype:
    return np.dtype(np.uint16) if np.dtype(dtype) == ml_dtypes.bfloat16 else np.dtype(dtype)


class Embeddings:
    """[N, D] over the arrays [n, D] of the shards; `embeddings[ids]` copies rows out, `np.asarray` all of them.

    `files` are those of the shards, which are compared with their checksums when they are first read; those of which
    only some rows are read, if `whole` says so.
    """

    def __init__(self, shards: Sequence[np.ndarray], files: Sequence[CheckedFiles] = (), whole: bool = True) -> None:
        self.shards = shards
        self._files = files
        self._whole = whole
        self._starts = np.cumsum([0, *map(len, shards)])
        self.shape = len(self), shards[0].shape[1]
        self.dtype = shards[0].dtype

    @classmethod
    def open(cls, folders: Sequence[Path], dtype: str, mend: str = MEND, whole: bool = True) -> Embeddings:
        """Maps the files in the shards' folders. Raises `ValueError` for one that is missing or damaged.

        What reads rows raises `InputError` naming the shard where it is damaged, with how to `mend` it.
        """
        raise_open_file_limit(len(folders))
        shards = [_open_embeddings(folder / EMBEDDINGS, dtype) for folder in folders]
        return cls(shards, [CheckedFiles(folder, mend) for folder in folders], whole)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, ids: Any) -> np.ndarray:
        ids = np.asarray(ids)
        numbers = np.searchsorted(self._starts, ids, "right") - 1
        rows = np.empty((*ids.shape, self.shape[1]), self.dtype)
        for number in np.unique(numbers):
            if self._whole and self._files:
                self._files[number].check(EMBEDDINGS)
            here = numbers == number
            rows[here] = self.shards[number][ids[here] - self._starts[number]]
        return rows

    def between(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop). Raises `InputError` where one is not finite, which no encoder's are that was written."""
        first, last = np.searchsorted(self._starts, [start, max(start, stop - 1)], "right") - 1
        for files in self._files[first : last + 1]:
            files.check(EMBEDDINGS)
        rows = self[np.arange(start, stop)]
        check_finite(rows, f"passages {start} to {stop - 1}")
        return rows

    def checked_shards(self) -> Iterator[np.ndarray]:
        """The arrays of the shards, each once it was found to be what was written. Raises `InputError` otherwise."""
        for number, shard in enumerate(self.shards):
            for files in self._files[number : number + 1]:
                files.check(EMBEDDINGS)
            yield shard

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.concatenate(list(self.checked_shards()))
        return whole if dtype is None else whole.astype(dtype, copy=False)


def check_finite(rows: np.ndarray, whose: str) -> None:
    """Raises `InputError` where an embedding has something else than numbers, which none has that was written."""
    if not np.isfinite(rows.astype(np.float32, copy=False)).all():
        raise InputError(f"the index is damaged: an embedding of {whose} is not finite; delete its folder and {RUN}")


def _open_embeddings(path: Path, dtype: str) -> np.ndarray:
    try:
        return map_array(path, _npy_dtype(dtype), 2).view(dtype)
    except ValueError as error:
        raise ValueError(f"{path.parent.parent.name}/{path.parent.name}/{error}") from None
