"""NumPy's files, mapped and never held: .npy, and the arrays of an .npz that is not compressed."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int

from ragjax.errors import InputError, library_errors

NPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"
IDS = ("ids", "id", "docids", "docid")  # what the ids are called beside the vectors in an .npz
CURE = "write it again with numpy.save"


class ArrayVectors:
    """The rows of a mapped array [n, D] of floating-point numbers."""

    def __init__(self, array: np.ndarray, where: str) -> None:
        if array.dtype == np.dtype("V2"):  # so numpy.save writes bfloat16
            array = array.view(ml_dtypes.bfloat16)
        if array.ndim != 2 or array.dtype.name not in ("float16", "float32", "float64", "bfloat16"):
            raise InputError(
                f"{where}: expected vectors [passages, dimensions] of float32, float16, bfloat16 or float64; it holds "
                f"{array.dtype} of shape {list(array.shape)}"
            )
        self.array = array
        (self.count, self.width), self.dtype = array.shape, array.dtype.name

    def read(self, rows: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n D"]:
        """Some rows, not to be written to: where they follow each other they are the file's own."""
        first, last = int(rows[0]), int(rows[-1])
        follow = last - first + 1 == len(rows) and bool((np.diff(rows) == 1).all())
        return np.asarray(self.array[first : last + 1] if follow else self.array[rows]).astype(np.float32, copy=False)


def map_npy(path: Path) -> np.ndarray:
    """Maps a .npy file. Raises `InputError` for one that is damaged, or holds Python objects."""
    return _map_array(path, 0, str(path))


def open_npz(path: Path) -> tuple[ArrayVectors, np.ndarray | None]:
    """The vectors of an .npz and, where it has such an array, their ids.

    Raises `InputError` for a zip file of something else, one that is compressed, and one of several arrays of vectors.
    """
    with library_errors(f"{path}: cannot be read", CURE), zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        if not members:
            raise InputError(f"{path}: is a zip file without arrays, as torch.save writes pickles; {CURE}")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise InputError(
                f"{path}: is compressed, and cannot be read in pieces; unzip {path.name}, and give the .npy"
            )
        arrays = {}
        with path.open("rb") as file:
            for member in members:
                file.seek(member.header_offset + 26)  # of the member's own header, whose last two parts vary
                name, extra = struct.unpack("<HH", file.read(4))
                offset = member.header_offset + 30 + name + extra
                arrays[member.filename.removesuffix(".npy")] = _map_array(path, offset, f"{path}:{member.filename}")
    ids = next((arrays.pop(name) for name in IDS if name in arrays), None)
    if len(arrays) != 1:
        raise InputError(f"{path}: holds {', '.join(arrays) or 'no vectors'}; expected one array of vectors, and ids")
    [(name, array)] = arrays.items()
    return ArrayVectors(array, f"{path}:{name}"), ids


def array_ids(array: np.ndarray, where: str) -> Iterator[str]:
    """Ids in an array of whole numbers or of texts. Raises `InputError` for one of anything else."""
    if array.ndim != 1 or array.dtype.kind not in "iuUS":
        raise InputError(f"{where}: expected ids as whole numbers or texts [passages]; it holds {array.dtype}")
    for start in range(0, len(array), 65_536):
        with library_errors(f"{where}: cannot be read", CURE):  # it may hold numbers that are no characters
            values = array[start : start + 65_536].tolist()
        for value in values:
            yield value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _map_array(path: Path, offset: int, where: str) -> np.ndarray:
    with library_errors(f"{where}: cannot be read", CURE), path.open("rb") as file:
        file.seek(offset)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise InputError(f"{where}: holds pickled Python objects; {CURE}, as numbers")
        if 0 in shape:
            raise InputError(f"{where}: is empty")
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
