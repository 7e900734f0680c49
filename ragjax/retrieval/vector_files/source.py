"""Where ready vectors come from: files of one kind, known by their first bytes, and the ids of their passages.

The rule of ids: those in the files themselves (a column of Parquet or Arrow, an array of an .npz, the numbers of a
FAISS index), or else in a file beside them, called as `IDS_BESIDE` has it, an id a line or in a .npy. Without any the
rows are those of the corpus, in its order.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int

from ragjax.checkpoints.hub import fetch, is_local
from ragjax.data.reading.arrow import ARROW_FILE, ARROW_STREAM, PARQUET
from ragjax.data.reading.byte_stream import text_lines
from ragjax.data.reading.hub_dataset import DATASET, fetch_dataset
from ragjax.errors import InputError, library_errors
from ragjax.retrieval.vector_files.arrays import NPY, ZIP, ArrayVectors, array_ids, map_npy, open_npz
from ragjax.retrieval.vector_files.arrow_columns import ArrowVectors
from ragjax.retrieval.vector_files.faiss_vectors import FaissVectors

EXPECTED = (
    "expected vectors as .npy or .npz, Parquet or Arrow with a column of them, a FAISS index, or a folder or pattern "
    "of such files"
)
IDS_BESIDE = ("{stem}.ids", "{stem}.ids.txt", "{stem}_ids.txt", "{stem}_ids.npy", "ids.txt", "ids.npy", "docid")
KINDS = (".npy", ".npz", ".parquet", ".arrow", ".faiss", ".index", ".pkl", ".pickle", ".pt")
PYSERINI = "index"  # the FAISS file of such a folder, with `docid` beside it
UNPICKLE = (
    "import pickle, sys, numpy as np; rows = [row for name in sys.argv[1:] for row in pickle.load(open(name, 'rb'))]; "
    "np.save('embeddings.npy', np.array([vector for _, vector in rows], 'float32')); "
    "open('ids.txt', 'w').writelines(f'{id}\\n' for id, _ in rows)"
)


@runtime_checkable
class VectorFile(Protocol):
    """Rows of one file, of which some are read at a time."""

    count: int
    width: int
    dtype: str

    def read(self, rows: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n D"]:
        """Some rows."""


@dataclass(frozen=True)
class VectorSource:
    """Vectors [N, D] over some files; `ids` gives the id of each row's passage, from the first one on, if known."""

    source: str
    files: tuple[Path, ...]
    parts: tuple[VectorFile, ...]
    ids: Callable[[], Iterator[str]] | None
    ids_from: str  # where the ids stand

    def __len__(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def width(self) -> int:
        """D."""
        return self.parts[0].width

    def read(self, rows: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n D"]:
        """Some rows, in any order. Raises `InputError` for a damaged file."""
        starts = np.cumsum([0, *(part.count for part in self.parts)])
        numbers = np.searchsorted(starts, rows, "right") - 1
        if (numbers == numbers[0]).all():
            return self.parts[numbers[0]].read(rows - starts[numbers[0]])
        found = np.empty((len(rows), self.width), np.float32)
        for number in np.unique(numbers):
            here = numbers == number
            found[here] = self.parts[number].read(rows[here] - starts[number])
        return found

    def description(self) -> dict[str, Any]:
        """What tells these files from others, as JSON: their names, sizes and times."""
        return {
            "source": self.source,
            "files": {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in self.files},
            "N": len(self),
            "D": self.width,
            "dtype": self.parts[0].dtype,
        }


def open_vectors(source: str) -> VectorSource:
    """Opens ready vectors without reading them.

    Raises `InputError` for files that are missing, damaged or of another kind, and for pickles.
    """
    files = _find_files(source)
    parts, ids = list[VectorFile](), list[Callable[[], Iterator[str] | None]]()
    for path in files:
        part, ids_inside = _open(path)
        parts.append(part)
        ids.append(ids_inside)
    if len(differ := {part.width for part in parts}) > 1:
        raise InputError(f"{source}: its files hold vectors of {sorted(differ)} dimensions; give those of one model")
    inside = [one() is not None for one in ids]
    if any(inside):
        if not all(inside):
            raise InputError(f"{files[inside.index(False)]}: holds no ids, and other files of {source} do")
        return VectorSource(source, files, tuple(parts), lambda: _chained(ids), "beside the vectors")
    beside = _ids_beside(files)
    if not beside:
        return VectorSource(source, files, tuple(parts), None, "")
    names = ", ".join(path.name for path in beside[:3])
    return VectorSource(source, (*files, *beside), tuple(parts), lambda: _chained([_ids_of(p) for p in beside]), names)


def _find_files(source: str) -> tuple[Path, ...]:
    if source.startswith(DATASET):
        return fetch_dataset(source)[1]
    path = Path(source).expanduser()
    if is_local(source) and not path.exists():
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not (files := tuple(file for file in found if not _is_ids(file, found))):
            raise InputError(f"--from {source}: no such file or folder; {EXPECTED}")
        return files
    path = fetch(source).path
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise InputError(f"--from {source}: is neither a file nor a folder; {EXPECTED}")
    if (path / PYSERINI).is_file():
        return (path / PYSERINI,)
    every = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in KINDS)
    files = tuple(file for file in every if not _is_ids(file, every))
    if len({file.suffix for file in files}) != 1:
        listed = ", ".join(file.name for file in files[:12]) or "none"
        raise InputError(f"--from {source}: {EXPECTED}, all of one kind; found {listed}")
    return files


def _is_ids(file: Path, files: Sequence[Path]) -> bool:
    """Whether a file among others holds the ids of one of them."""
    return any(file.name in _names_of_ids(other) for other in files if other != file)


def _names_of_ids(file: Path) -> list[str]:
    return [name.format(stem=file.stem) for name in IDS_BESIDE]


def _open(path: Path) -> tuple[VectorFile, Callable[[], Iterator[str] | None]]:
    """The vectors of a file, and what gives their ids, or None where it holds none."""
    with library_errors(f"{path}: cannot be read", "make it readable"), path.open("rb") as file:
        head = file.read(8)
    if head[:2] in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5") or path.suffix in (".pkl", ".pickle"):
        raise InputError(
            f"{path}: is a pickle, which may run any program when it is read; if you trust it, turn it into .npy and "
            f'ids.txt outside of ragjax: python -c "{UNPICKLE}" {path}'
        )
    if head.startswith(NPY):
        return ArrayVectors(map_npy(path), str(path)), lambda: None
    if head.startswith(ZIP):
        vectors, array = open_npz(path)
        return vectors, lambda: None if array is None else array_ids(array, str(path))
    if head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        columns = ArrowVectors(path)
        return columns, lambda: columns.ids() if columns.id_column else None
    if head.startswith(b"I"):
        index = FaissVectors(path)
        return index, index.ids
    raise InputError(f"{path}: begins with {head!r}; {EXPECTED}")


def _ids_beside(files: Sequence[Path]) -> list[Path]:
    """The file of ids of each file; or one for all of them."""
    found = [next((path for name in _names_of_ids(f) if (path := f.with_name(name)).is_file()), None) for f in files]
    there = list(dict.fromkeys(path for path in found if path is not None))
    if there and (None in found or len(there) not in (1, len(files))):
        missing = files[found.index(None)] if None in found else files[0]
        raise InputError(
            f"{missing}: has no file of ids beside it, and others have; {', '.join(_names_of_ids(missing))}"
        )
    return there


def _ids_of(path: Path) -> Callable[[], Iterator[str]]:
    def read() -> Iterator[str]:
        with path.open("rb") as file:
            is_array = file.read(len(NPY)) == NPY
        if is_array:
            return array_ids(map_npy(path), str(path))
        return (line.rstrip("\r\n") for _, line in text_lines(path))

    return read


def _chained(ids: Sequence[Callable[[], Iterator[str] | None]]) -> Iterator[str]:
    for one in ids:
        yield from one() or ()
