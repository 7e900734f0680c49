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
        for batch in _batches(path):
            for fields in batch.to_pylist():
                number += 1
                yield Record(number, fields)


def count_rows(path: Path) -> int:
    """The rows of a Parquet or Arrow file. Raises `InputError` as `arrow_records`."""
    with library_errors(f"{path}: cannot be read", CURE):
        if _starts_with(path, PARQUET):
            return _parquet(path).metadata.num_rows
        return sum(batch.num_rows for batch in _batches(path))


def _batches(path: Path) -> Iterator[Any]:
    """Record batches of few rows, of the columns that can hold text."""
    if _starts_with(path, PARQUET):
        file = _parquet(path)
        names = _text_columns(file.schema_arrow)
        yield from file.iter_batches(BATCH, columns=names, use_threads=False)
        return
    pyarrow = _pyarrow(path)
    with pyarrow.memory_map(str(path)) as mapped:
        if _starts_with(path, ARROW_FILE):
            reader = pyarrow.ipc.open_file(mapped)
            stored = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            reader = stored = pyarrow.ipc.open_stream(mapped)
        names = _text_columns(reader.schema)
        for batch in stored:
            batch.validate(full=True)
            part = batch.select(names)
            yield from (part.slice(start, BATCH) for start in range(0, part.num_rows, BATCH))


def _text_columns(schema: Any) -> list[str]:
    """All columns but bytes, times, which Python may be unable to hold, and lists of fractions, as embeddings are."""
    from pyarrow import types

    def is_vector(kind: Any) -> bool:
        lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return lists and (types.is_floating(kind.value_type) or is_vector(kind.value_type))

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)

    def is_text(kind: Any) -> bool:
        return not (is_vector(kind) or is_bytes(kind) or types.is_temporal(kind))

    return [field.name for field in schema if is_text(field.type)]


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
