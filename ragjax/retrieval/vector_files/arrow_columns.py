"""A column of vectors in Parquet or Arrow files, read in the order of its rows, as in wiki_dpr."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from ragjax.data.forms.columns import IDS
from ragjax.data.reading.arrow import CURE, ArrowFile, is_vector
from ragjax.errors import InputError, library_errors

VECTORS = ("embeddings", "embedding", "vectors", "vector", "emb")
ID_NAMES = (*IDS, "docno")


class ArrowVectors:
    """The vectors of a file; rows that rise are read in one pass from the first of them."""

    def __init__(self, path: Path) -> None:
        with library_errors(f"{path}: cannot be read", CURE):
            self.file = ArrowFile(path)
            self.column, self.id_column = _columns(path, self.file.schema)
            self._group = max(self.file.groups, default=0)  # rows
            self.count, first = self.file.count, next(self._from(0), None)
        if first is None or not self.count:
            raise InputError(f"{path}: has no rows")
        number = self.file.schema.field(self.column).type.value_type
        self.width, self.dtype = first[1].shape[1], np.dtype(number.to_pandas_dtype()).name
        self._ahead: Iterator[tuple[int, np.ndarray]] = iter(())
        self._block: tuple[int, np.ndarray] = first

    def read(self, rows: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n D"]:
        """Some rows, in any order."""
        found, order = np.empty((len(rows), self.width), np.float32), np.argsort(rows, kind="stable")
        ordered, at = rows[order], 0
        while at < len(ordered):
            start, block = self._block_with(int(ordered[at]))
            stop = int(np.searchsorted(ordered, start + len(block)))
            found[order[at:stop]] = block[ordered[at:stop] - start]
            at = stop
        return found

    def ids(self) -> Iterator[str]:
        """The ids that stand beside the vectors."""
        with library_errors(f"{self.file.path}: cannot be read", CURE):
            for _, batch in self.file.batches([str(self.id_column)]):
                yield from map(str, batch.column(0).to_pylist())

    def _block_with(self, row: int) -> tuple[int, np.ndarray]:
        start, block = self._block
        if row < start or row - start >= len(block) + self._group:  # behind, or so far that one may jump
            self._ahead = self._from(row)
        elif row < start + len(block):
            return self._block
        with library_errors(f"{self.file.path}: cannot be read", CURE):
            for start, block in self._ahead:
                if block.shape[1] != self.width:
                    raise InputError(f"{self.file.path}: row {start} has {block.shape[1]} numbers, not {self.width}")
                if row < start + len(block):
                    self._block = start, block
                    return self._block
        raise InputError(f"{self.file.path}: ends before row {row}; {CURE}")

    def _from(self, row: int) -> Iterator[tuple[int, np.ndarray]]:
        for start, batch in self.file.batches([self.column], row):
            yield start, _as_array(batch.column(0), f"{self.file.path}: rows {start} to {start + batch.num_rows - 1}")


def _columns(path: Path, schema: Any) -> tuple[str, str | None]:
    """The names of the vectors and of the ids. Raises `InputError` where it is not clear which the vectors are."""
    found = [field.name for field in schema if is_vector(field.type)]
    usual = [name for name in found if name.lower() in VECTORS]
    chosen = usual if len(usual) == 1 else found
    if len(chosen) != 1:
        listed = ", ".join(found or schema.names)
        raise InputError(
            f"{path}: {'several columns hold' if found else 'no column holds'} vectors ({listed}); "
            "keep one, or call it embeddings"
        )
    by_name = {name.lower(): name for name in schema.names}
    return chosen[0], next((by_name[name] for name in ID_NAMES if name in by_name), None)


def _as_array(column: Any, where: str) -> np.ndarray:
    """Lists of numbers as an array [n, D]. Raises `InputError` where one is missing or has another length."""
    numbers = column.flatten()
    if column.null_count or numbers.null_count or len(numbers) % max(1, len(column)) or not len(numbers):
        raise InputError(f"{where}: a vector is missing, or has another length; {CURE}")
    width = len(numbers) // len(column)
    if hasattr(column, "offsets") and (np.diff(column.offsets.to_numpy()) != width).any():
        raise InputError(f"{where}: vectors have different lengths; {CURE}")
    return numbers.to_numpy(zero_copy_only=False).reshape(len(column), width).astype(np.float32)
