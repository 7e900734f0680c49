"""Parquet files and Arrow's own, as the `datasets` library keeps them: rows in batches, without vectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ragjax.data.reading.record import Record
from ragjax.errors import InputError, library_errors

PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
BATCH = 1024  # rows in memory
CURE = "fetch or write it again"


def arrow_records(path: Path) -> Iterator[Record]:
    """The rows of a Parquet or Arrow file, without columns of bytes, times and vectors; their numbers are from 1.

    Raises `InputError` for a damaged file, and where pyarrow is not installed.
    """
    number = 0
    with library_errors(f"{path}: cannot be read", CURE):
        file = ArrowFile(path)
        for _, batch in file.batches(_text_columns(file.schema)):
            for fields in batch.to_pylist():
                number += 1
                yield Record(number, fields)


def count_rows(path: Path) -> int:
    """The rows of a Parquet or Arrow file. Raises `InputError` as `arrow_records`."""
    with library_errors(f"{path}: cannot be read", CURE):
        return ArrowFile(path).count


class ArrowFile:
    """A Parquet or Arrow file, of which columns are read in batches of few rows. Raises what pyarrow raises."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parquet = _parquet(path) if _starts_with(path, PARQUET) else None
        self.schema = self._stored_batches()[0] if self._parquet is None else self._parquet.schema_arrow

    @property
    def groups(self) -> list[int]:
        """The rows of each part that is read from its first row on; only Parquet files have such."""
        if self._parquet is None:
            return []
        about = self._parquet.metadata
        return [about.row_group(number).num_rows for number in range(about.num_row_groups)]

    @property
    def count(self) -> int:
        """Its rows."""
        if self._parquet is not None:
            return self._parquet.metadata.num_rows
        return sum(batch.num_rows for batch in self._stored_batches()[1])

    def batches(self, names: list[str], row: int = 0) -> Iterator[tuple[int, Any]]:
        """The number, from 0, of the first row of each batch of some columns, and the batch.

        Begun not far before `row`: with the batch or the group that it is in.
        """
        start = 0
        if self._parquet is not None:
            groups, first = self.groups, 0
            while first < len(groups) and start + groups[first] <= row:
                start, first = start + groups[first], first + 1
            later = list(range(first, len(groups)))
            for batch in self._parquet.iter_batches(BATCH, row_groups=later, columns=names, use_threads=False):
                yield start, batch
                start += batch.num_rows
            return
        for batch in self._stored_batches()[1]:
            if start + batch.num_rows > row:
                batch.validate(full=True)
                part = batch.select(names)
                for at in range(max(0, row - start) // BATCH * BATCH, part.num_rows, BATCH):
                    yield start + at, part.slice(at, BATCH)
            start += batch.num_rows

    def _stored_batches(self) -> tuple[Any, Iterator[Any]]:
        """The columns, and the batches as they lie in an Arrow file."""
        pyarrow = _pyarrow(self.path)
        mapped = pyarrow.memory_map(str(self.path))
        if _starts_with(self.path, ARROW_FILE):
            reader = pyarrow.ipc.open_file(mapped)
            return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
        reader = pyarrow.ipc.open_stream(mapped)
        return reader.schema, iter(reader)


def _text_columns(schema: Any) -> list[str]:
    """All columns but bytes, times, which Python may be unable to hold, and lists of fractions, as embeddings are."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)

    def is_text(kind: Any) -> bool:
        return not (_holds_fractions(kind) or is_bytes(kind) or types.is_temporal(kind))

    return [field.name for field in schema if is_text(field.type)]


def is_vector(kind: Any) -> bool:
    """Whether a column's type is that of lists of fractions."""
    from pyarrow import types

    return _is_list(kind) and types.is_floating(kind.value_type)


def _holds_fractions(kind: Any) -> bool:
    return is_vector(kind) or (_is_list(kind) and _holds_fractions(kind.value_type))


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _parquet(path: Path) -> Any:
    _pyarrow(path)
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, memory_map=True)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise InputError(f"{path}: Parquet and Arrow files need an extra: pip install 'ragjax[parquet]'") from None
    return pyarrow


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
