"""`ragjax verify`: every file of a run, an index or an exported folder beside the checksum that was kept of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ragjax.checksums import CHECKSUMS, Record, damages, files_below, read_checksums, total_size
from ragjax.data.passage_store import MEND
from ragjax.errors import InputError
from ragjax.retrieval.bm25 import BM25
from ragjax.retrieval.index import MANIFEST, index_records
from ragjax.retrieval.refresh import FOLDER, REFRESHED_MEND
from ragjax.runs.checkpointer import CHECKPOINTS_MEND
from ragjax.runs.run_dir import load_run_config
from ragjax.terminal import bytes_bar


@dataclass(frozen=True)
class Verified:
    """One checkpoint, index or folder: how much was read of it, and what was found."""

    what: str  # checkpoint, index, BM25, refreshed index, exported models
    path: str
    files: int
    bytes: int
    damage: dict[str, str]  # what is wrong with each damaged file, by its name
    unknown: list[str]  # files that no checksum was kept of
    mend: str


@dataclass(frozen=True)
class _Part:
    what: str
    path: Path
    mend: str


def verify(folder: Path) -> list[Verified]:
    """Reads all that has checksums in a run, an index, or an exported folder, with a progress bar.

    Raises `InputError` for a folder that is none of these.
    """
    parts = _parts(folder)
    listed = [_records(part) for part in parts]
    total = sum(total_size(records.values()) for records, _ in listed)
    with bytes_bar(f"verify {folder.name}", total, soon=0) as advance:
        return [
            Verified(
                part.what,
                str(part.path),
                len(records),
                total_size(records.values()),
                broken | damages(part.path, records, advance),
                _unknown(part, records),
                part.mend,
            )
            for part, (records, broken) in zip(parts, listed, strict=True)
        ]


def _parts(folder: Path) -> list[_Part]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a run, an index or an exported folder")
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        return _of_run(folder)
    if (folder / CHECKSUMS).is_file():
        return [_Part("folder", folder, "export it again")]
    if (folder / MANIFEST).is_file() or (folder / "shards").is_dir():
        return _of_index(folder)
    raise InputError(
        f"{folder}: nothing here has checksums; expected a run (config.yaml, checkpoints/), an index ({MANIFEST}, "
        f"shards/) or an exported folder ({CHECKSUMS})"
    )


def _of_run(folder: Path) -> list[_Part]:
    def numbered(inside: str) -> list[Path]:
        return sorted((p for p in (folder / inside).glob("[0-9]*") if p.name.isdecimal()), key=lambda p: int(p.name))

    parts = [_Part("checkpoint", path, CHECKPOINTS_MEND) for path in numbered("checkpoints")]
    # one that is being built has no manifest yet
    parts += [_Part("refreshed index", p, REFRESHED_MEND) for p in numbered(FOLDER) if (p / MANIFEST).is_file()]
    index = Path(load_run_config(folder).index.path)
    if index.resolve().is_relative_to(folder.resolve()) and index.is_dir():
        parts += _of_index(index)
    return parts


def _of_index(folder: Path) -> list[_Part]:
    words = folder / BM25
    return [_Part("index", folder, MEND), *([_Part("BM25", words, MEND)] if words.is_dir() else [])]


def _records(part: _Part) -> tuple[dict[str, Record], dict[str, str]]:
    """The records that a part has of its files, and what is wrong with these records themselves."""
    if part.what.endswith("index"):
        return index_records(part.path)
    if not (part.path / CHECKSUMS).is_file():  # as a kill leaves a checkpoint just after it was written
        return {}, {}
    try:
        return read_checksums(part.path)["files"], {}
    except InputError as error:
        return {}, {CHECKSUMS: str(error).partition(": ")[2]}


def _unknown(part: _Part, records: Mapping[str, Record]) -> list[str]:
    names = records.keys() | {MANIFEST if part.what.endswith("index") else CHECKSUMS}
    inside = files_below(part.path)
    return [name for name in inside if name not in names and not (part.what == "index" and name.startswith(f"{BM25}/"))]


def print_verified(found: list[Verified], as_json: bool) -> None:
    """A line for each part and each damaged file, on standard output."""
    if as_json:
        print(json.dumps([asdict(part) for part in found], indent=1, ensure_ascii=False))
        return
    for part in found:
        state = "damaged" if part.damage else "whole" if part.files else "has no checksums"
        print(f"{part.what} {part.path}: {state} ({part.files} files, {part.bytes:,} bytes)")
        for name, what in part.damage.items():
            print(f"  {name}: {what}")
        if part.damage:
            print(f"  to mend it: {part.mend}")
        if part.files and part.unknown:
            some = ", ".join(part.unknown[:3]) + (f" and {len(part.unknown) - 3} more" if part.unknown[3:] else "")
            print(f"  not known to it: {some}")
