"""Checksums: a file that is not what was written is named before anything is made of it.

A record of a file is {"size": its bytes, "xxh3": XXH3-128 as 32 hexadecimal digits}. FOLDER/checksums.json holds one
for every file below FOLDER, and is sealed: its own `xxh3` is over all else that it says. XXH3 finds what happens by
itself, such as a bit that tips over or a file cut short, faster than disks are read; it is no defence against forgery.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from ragjax.errors import InputError
from ragjax.files import PARTIAL, atomic_write, read_json

CHECKSUMS = "checksums.json"
BLOCK = 1 << 20  # bytes that are read at a time
SEAL = "xxh3"


Record = dict[str, Any]
Progress = Callable[[int], object]


def _quiet(size: int) -> None:
    pass


class Digest:
    """The record of what is written block by block."""

    def __init__(self) -> None:
        self._size, self._hash = 0, xxhash.xxh3_128()

    def update(self, block: bytes | memoryview) -> None:
        """Adds bytes that follow those before."""
        self._size += len(block)
        self._hash.update(block)

    def record(self) -> Record:
        """Of all bytes so far."""
        return {"size": self._size, "xxh3": self._hash.hexdigest()}


def checksum(path: Path, progress: Progress = _quiet) -> Record:
    """The record of a file, read in blocks; `progress` is told the bytes of each. Raises `OSError`."""
    digest, block = Digest(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            progress(count)
    return digest.record()


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of all else in it, in whatever order and layout it is written."""
    content = {key: part for key, part in value.items() if key != SEAL}
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return content | {SEAL: xxhash.xxh3_128_hexdigest(canonical.encode())}


def read_sealed(path: Path) -> dict[str, Any]:
    """A JSON object that `seal` made. Raises `InputError` naming the file where it is missing or another one now."""
    value = read_json(path, "it is written last")
    if SEAL not in value:
        raise InputError(f"{path}: has no checksum of its own")
    if seal(value)[SEAL] != value[SEAL]:
        raise InputError(f"{path}: its contents have changed")
    return value


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes what `read_sealed` reads; the file is whole or untouched."""
    with atomic_write(path) as (file,):
        file.write(json.dumps(seal(value), indent=1, ensure_ascii=False).encode() + b"\n")


def files_below(folder: Path) -> list[str]:
    """The names of all files below a folder, relative to it, but for its own checksums."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != CHECKSUMS)


def write_checksums(folder: Path, **about: Any) -> None:
    """Writes FOLDER/checksums.json, with a record of every file that is there now, and what it is `about`."""
    (folder / (CHECKSUMS + PARTIAL)).unlink(missing_ok=True)  # of a process that was killed while it wrote them
    records = {name: checksum(folder / name) for name in files_below(folder)}
    write_sealed(folder / CHECKSUMS, about | {"files": records})


def read_checksums(folder: Path) -> dict[str, Any]:
    """What `write_checksums` wrote. Raises `InputError` where it is missing or damaged."""
    value = read_sealed(folder / CHECKSUMS)
    if not isinstance(value.get("files"), dict):
        raise InputError(f"{folder / CHECKSUMS}: lists no files")
    return value


def damage(path: Path, record: Mapping[str, Any], progress: Progress = _quiet, most: int | None = None) -> str | None:
    """What is wrong with a file, or None. Of one larger than `most` bytes the contents are not read."""
    try:
        size = path.stat().st_size
        if size != record["size"]:
            return f"has {size} bytes and not {record['size']}"
        if most is not None and size > most:
            return None
        return "its contents have changed" if checksum(path, progress) != record else None
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def damages(
    folder: Path, records: Mapping[str, Record], progress: Progress = _quiet, most: int | None = None
) -> dict[str, str]:
    """What is wrong with each damaged file of a folder, by name; `most` as in `damage`."""
    results = {name: damage(folder / name, record, progress, most) for name, record in records.items()}
    return {name: what for name, what in results.items() if what is not None}


class DamagedFolder(InputError):
    """Files in `folder` are not what was written."""

    def __init__(self, folder: Path, message: str) -> None:
        super().__init__(message)
        self.folder = folder


class CheckedFiles:
    """The files of a folder that `write_checksums` listed, each compared with its record when it is first asked for.

    A folder without checksums is not held to be damaged. `mend` tells what to do about damage.
    """

    def __init__(self, folder: Path, mend: str) -> None:
        self.folder = folder
        self.mend = mend
        self._known: dict[str, Record] | None = None
        self._checked: set[str] = set()

    def check(self, *names: str) -> None:
        """Raises `InputError` where one of these files is not what was written."""
        if self._checked.issuperset(names):
            return
        if self._known is None:
            self._known = self._records()
        records = {name: self._known[name] for name in names if name in self._known and name not in self._checked}
        if damage := damages(self.folder, records):
            raise self.damaged(damage_text(damage))
        self._checked.update(names)

    def _records(self) -> dict[str, Record]:
        if not (self.folder / CHECKSUMS).exists():
            return {}
        try:
            about = read_checksums(self.folder)
        except InputError as error:
            raise self.damaged(str(error).removeprefix(f"{self.folder}/")) from None
        if (number := about.get("number")) is not None and self.folder.name != f"{number:05d}":
            raise self.damaged(f"it is number {number}")
        return about["files"]

    def damaged(self, what: str) -> DamagedFolder:
        """An error that tells of damage in this folder."""
        return DamagedFolder(self.folder, f"{self.folder}: is damaged ({what}); {self.mend}")


def damage_text(damage: Mapping[str, str]) -> str:
    """Damages in one line: "a: is missing; b: its contents have changed"."""
    some = [f"{name} {what}" for name, what in list(damage.items())[:3]]
    return "; ".join([*some, f"and {len(damage) - 3} more"] if len(damage) > 3 else some)


def total_size(records: Iterable[Record]) -> int:
    """The bytes of all files in some records."""
    return sum(record["size"] for record in records)
