"""The bytes and lines of a file. What gzip or Zstandard has packed is unpacked, whatever the file is called."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

from ragjax.errors import InputError

LONGEST_LINE = 64 << 20  # bytes of a record
GZIP, ZSTD, ZIP = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"


def open_unpacked(path: Path) -> io.BufferedIOBase:
    """Opens a file for reading what it holds, unpacked.

    Raises `InputError` for a file that is missing, a zip archive, or packed by Zstandard where that is not installed,
    and `OSError` for what the operating system refuses.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(GZIP):
        return gzip.open(path)
    if head == ZSTD:
        return _zstd(path).open(path)
    if head == ZIP:
        raise InputError(f"{path}: is a zip archive; unpack it")
    return path.open("rb")


def first_bytes(path: Path, count: int) -> bytes:
    """The first `count` bytes of a file, unpacked. Raises `InputError` where it cannot be read."""
    try:
        with open_unpacked(path) as file:
            return file.read(count)
    except packing_errors() as error:
        raise InputError(f"{path}:1: cannot be read ({error})") from None


def byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of a file, unpacked. Raises `InputError` where it cannot be read."""
    number = 0
    try:
        with open_unpacked(path) as file:
            for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:
                    raise InputError(f"{path}:{number}: longer than {LONGEST_LINE >> 20} MiB; expected a record a line")
                yield number, line
    except packing_errors() as error:
        raise InputError(f"{path}:{number + 1}: cannot be read ({error})") from None


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of a UTF-8 file, unpacked. Raises `InputError` where it is none."""
    for number, line in byte_lines(path):
        text, problem = decode_line(number, line)
        if problem:
            raise InputError(f"{path}:{number}: {problem}")
        yield number, text


def decode_line(number: int, line: bytes) -> tuple[str, str | None]:
    """A line as text, without the mark before the first one; and, where it is not UTF-8, why."""
    codec = "utf-8-sig" if number == 1 else "utf-8"
    try:
        return line.decode(codec), None
    except UnicodeDecodeError as error:
        return line.decode(codec, errors="replace"), f"not UTF-8 ({error.reason}); save the file in UTF-8"


def packing_errors() -> tuple[type[Exception], ...]:
    """What reading a file, packed or not, may raise beside `InputError`."""
    try:
        return OSError, EOFError, zlib.error, _zstd(Path()).ZstdError
    except InputError:
        return OSError, EOFError, zlib.error


def _zstd(path: Path) -> ModuleType:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]  # Python 3.14 has it
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise InputError(
                f"{path}: is packed by Zstandard; unpack it with zstd -d, or: pip install 'ragjax[zstd]'"
            ) from None
    return zstd
