"""What a long piece of work has done so far, kept for whoever begins the very same work again."""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path
from typing import Any

from ragjax.errors import InputError
from ragjax.files import lock_file


class Journal:
    """JSON records that outlive the process that made them, for one that begins the very same work again.

    The first line is a header that says which work it is; whatever stands under another header is dropped. Each line
    carries a checksum: what a kill or a full disk cut short is dropped, and all after it. Nothing is written before the
    first record. Use as a context manager, which one process at a time may do.
    """

    def __init__(self, path: Path, header: Any) -> None:
        self.path, self.header = path, header

    def __enter__(self) -> Journal:
        """Raises `InputError` if the file cannot be written, or while another process holds it."""
        try:
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None
        if not lock_file(self._file):
            self._file.close()
            raise InputError(f"{self.path}: another process does this work; wait for it")
        kept = _valid_lines(self.path)
        whole = sum(map(len, kept)) if kept and _of_line(kept[0]) == self.header else 0
        self._file.truncate(whole)
        self.empty = whole == 0
        return self

    def __exit__(self, *error: object) -> None:
        if self.empty:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def add(self, record: Any) -> None:
        """Raises `InputError` where there is no room; the records before it are kept."""
        lines = b"".join(map(_line, [self.header, record] if self.empty else [record]))
        why: str | None = "the disk is full"
        try:
            if self._file.write(lines) == len(lines):
                self.empty, why = False, None
        except OSError as error:
            why = error.strerror
        if why:
            raise InputError(f"{self.path}: cannot be written ({why}); run the same command again: it goes on")


def read_journal(path: Path, header: Any) -> list[Any]:
    """The records under this very header, none under another one."""
    lines = [_of_line(line) for line in _valid_lines(path)]
    return lines[1:] if lines and lines[0] == header else []


def _line(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return _line_sum(text) + text + b"\n"


def _of_line(line: bytes) -> Any:
    return json.loads(line[9:])


def _valid_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return list(itertools.takewhile(lambda line: line.endswith(b"\n") and line[:9] == _line_sum(line[9:-1]), lines))


def _line_sum(text: bytes) -> bytes:
    return b"%08x " % zlib.crc32(text)
