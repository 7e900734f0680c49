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
from ragjax.files import atomic_write, read_json

CHECKSUMS = "checksums.json"
BLOCK = 1 << 20  # bytes that are read at a time
SEAL = "xxh3"

Record = dict[str, Any]
Progress = Callable[[int], object]


def _quiet(size: int) -> None:
    pass


def checksum(path: Path, progress: Progress = _quiet) -> Record:
    """The record of a file, read in blocks; `progress` is told the bytes of each. Raises `OSError`."""
    digest, size, block = xxhash.xxh3_128(), 0, memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
            progress(count)
    return {"size": size, "xxh3": digest.hexdigest()}


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of all else in it, in whatever order and layout it is written."""
    content = {key: part for key, part in value.items() if key != SEAL}
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return content | {SEAL: xxhash.xxh3_128_hexdigest(canonical.encode())}


def read_sealed(path: Path) -> dict[str, Any]:
    """A JSON object that `seal` made. Raises `InputError` naming the file where it is missing or another one now."""
    value = read_json(path, "it is written last")
    if seal(value)[SEAL] != value.get(SEAL):
        raise InputError(f"{path}: is damaged (its contents are not those that its checksum is of)")
    return value


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes what `read_sealed` reads; the file is whole or untouched."""
    with atomic_write(path) as (file,):
        file.write(json.dumps(seal(value), indent=1, ensure_ascii=False).encode() + b"\n")


def files_below(folder: Path) -> list[str]:
    """The names of all files below a folder, relative to it, but for its own checksums."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != CHECKSUMS)


def write_checksums(folder: Path, **about: Any) -> None:
    """Writes FOLDER/checksums.json, with a record of every file that is there now, and what it is `about`."""
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
    found = {name: damage(folder / name, record, progress, most) for name, record in records.items()}
    return {name: what for name, what in found.items() if what is not None}


def told(found: Mapping[str, str]) -> str:
    """Damages in one line: "a: is missing; b: its contents have changed"."""
    some = [f"{name} {what}" for name, what in list(found.items())[:3]]
    return "; ".join([*some, f"and {len(found) - 3} more"] if len(found) > 3 else some)


def total_size(records: Iterable[Record]) -> int:
    """The bytes of all files in some records."""
    return sum(record["size"] for record in records)
