"""The files behind corpus.source and questions.*: a file, a folder, a pattern of names, or what is fetched."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ragjax.checkpoints.hub import fetch, fingerprint_files, is_local
from ragjax.data.reading.hub_dataset import DATASET, fetch_dataset
from ragjax.errors import InputError

KINDS = (("jsonl", "ndjson"), ("tsv", "csv"), ("parquet",), ("arrow",), ("json",))  # suffixes of a folder's files
PACKED = (".gz", ".zst")


@dataclass(frozen=True)
class DataFiles:
    """Files in the order in which they are read."""

    source: str
    revision: str  # the resolved commit, the wheel's "sha256:…" or "local"
    files: tuple[Path, ...]
    left_out: tuple[Path, ...] = ()  # of BEIR's folders, what lies beside the corpus

    @property
    def fingerprint(self) -> str:
        """Of what they hold, and of their order. Where they were fetched, the revision says it, and is enough."""
        if self.revision != "local":
            return self.revision
        parts = [fingerprint_files([path]) for path in self.files]
        return parts[0] if len(parts) == 1 else f"sha256:{hashlib.sha256(' '.join(parts).encode()).hexdigest()}"


def find_files(source: str) -> DataFiles:
    """Brings a source onto this machine where it is not there, and lists its files.

    Of a folder as BEIR has them, corpus.jsonl with queries.jsonl and qrels/, the corpus alone is read.

    Raises `InputError` for a source that does not exist, a folder without files of a known kind or with several kinds,
    and whatever goes wrong with a download.
    """
    if source.startswith(DATASET):
        revision, files = fetch_dataset(source)
        return DataFiles(source, revision, files)
    path = Path(source).expanduser()
    if is_local(source) and not path.exists() and glob.has_magic(source):
        files = tuple(sorted(Path(found) for found in glob.glob(str(path), recursive=True)))
        if not (files := tuple(file for file in files if file.is_file())):
            raise InputError(f"{source}: no file has such a name")
        return DataFiles(source, "local", files)
    fetched = fetch(source)
    if fetched.path.is_file():
        return DataFiles(source, fetched.revision, (fetched.path,))
    every = sorted(path for path in fetched.path.rglob("*") if path.is_file() and not _is_hidden(path, fetched.path))
    beside = _beside_corpus(every, fetched.path)
    files = _of_one_kind([path for path in every if path not in beside], fetched.path)
    return DataFiles(source, fetched.revision, files, beside)


def is_missing(source: str) -> bool:
    """Whether a source should lie on this machine, by a name that is no pattern, and does not."""
    return is_local(source) and not Path(source).expanduser().exists() and not glob.has_magic(source)


def _beside_corpus(every: Sequence[Path], folder: Path) -> tuple[Path, ...]:
    """The queries and relevance judgements that lie in a folder with a corpus.jsonl: BEIR's, and no passages."""
    names = {path: path.relative_to(folder).parts for path in every}
    if not any(parts[0].startswith("corpus.json") for parts in names.values()):
        return ()
    beside = (path for path, parts in names.items() if parts[0] == "qrels" or parts[0].startswith("queries.json"))
    return tuple(beside)


def _of_one_kind(every: Sequence[Path], folder: Path) -> tuple[Path, ...]:
    """The files of the one kind in a folder; .json counts where there is no other, since what is about a corpus is
    often written so.
    """
    by_kind = {kind: [path for path in every if _suffix(path) in kind] for kind in KINDS}
    there = [kind for kind in KINDS if by_kind[kind]]
    if not there:
        listed = _listed(every, folder) or "none"
        raise InputError(f"{folder}: expected files such as *.jsonl, *.tsv, *.csv or *.parquet; found {listed}")
    if len(there) > 1 and there[1] != KINDS[-1]:
        some = _listed([by_kind[kind][0] for kind in there], folder)
        raise InputError(
            f"{folder}: holds files of several kinds ({some}); give one of them, or a pattern such as {folder}/*.jsonl"
        )
    return tuple(by_kind[there[0]])


def _suffix(path: Path) -> str:
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return name.rpartition(".")[2]


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _listed(files: Sequence[Path], folder: Path) -> str:
    return ", ".join(str(path.relative_to(folder)) for path in files[:12]) + (", …" if len(files) > 12 else "")
