"""The vectors in a FAISS index, where it holds them as they were: flat ones, alone or in clusters or a graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from ragjax.errors import InputError, library_errors
from ragjax.resources import cores

CURE = "write it again with faiss.write_index"
TOGETHER = 4096  # vectors that are taken out at a time


class FaissVectors:
    """What `reconstruct` gives of an index; `id_map` are the numbers that it has for its vectors, if any."""

    def __init__(self, path: Path) -> None:
        import faiss

        faiss.omp_set_num_threads(cores())
        with library_errors(f"{path}: FAISS cannot read it", CURE):
            # mapped, else 20 million vectors would be held in memory: clusters in the one way, all else in the other
            with path.open("rb") as file:
                clustered = file.read(2) == b"Iw"
            whole = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if clustered else faiss.IO_FLAG_MMAP_IFC)
            self._whole, index = whole, faiss.downcast_index(whole)
            self.id_map = None
            if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
                self.id_map = faiss.vector_to_array(index.id_map)
                index = faiss.downcast_index(index.index)
            self.dtype = _stored_dtype(index, path)
            if (clusters := faiss.try_extract_index_ivf(index)) is not None:
                clusters.make_direct_map()
        self._index, self._path, self.count, self.width = index, path, index.ntotal, index.d
        if not self.count:
            raise InputError(f"{path}: holds no vectors")

    def read(self, rows: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n D"]:
        """Some rows, in any order."""
        with library_errors(f"{self._path}: FAISS cannot give its vectors back", CURE):
            if (np.diff(rows) == 1).all():
                return self._index.reconstruct_n(int(rows[0]), len(rows))
            return self._index.reconstruct_batch(rows)

    def ids(self) -> Iterator[str] | None:
        """The numbers that the index has for its vectors; None where these are their places."""
        return None if self.id_map is None else map(str, self.id_map.tolist())


def _stored_dtype(index: Any, path: Path) -> str:
    """How the vectors lie in an index. Raises `InputError` where they do not come out as they went in."""
    import faiss

    inner = index
    while isinstance(inner, faiss.IndexPreTransform):
        chain: Any = inner.chain
        for number in range(chain.size()):
            step = faiss.downcast_VectorTransform(chain.at(number))
            if not (isinstance(step, faiss.LinearTransform) and step.is_orthonormal and step.d_in == step.d_out):
                raise _lossy(path, type(step).__name__)
        inner = faiss.downcast_index(inner.index)
    stored = faiss.downcast_index(inner.storage) if hasattr(inner, "storage") else inner
    if isinstance(stored, faiss.IndexFlat | faiss.IndexIVFFlat | faiss.IndexRefineFlat):
        return "float32"
    if isinstance(stored, faiss.IndexScalarQuantizer | faiss.IndexIVFScalarQuantizer):
        halves = {faiss.ScalarQuantizer.QT_fp16: "float16", faiss.ScalarQuantizer.QT_bf16: "bfloat16"}
        if (kind := stored.sq.qtype) in halves:
            return halves[kind]
    raise _lossy(path, type(stored).__name__)


def _lossy(path: Path, kind: str) -> InputError:
    return InputError(
        f"{path}: keeps its vectors compressed ({kind}), and they do not come out as they went in; give those that it "
        "was built from, as .npy, or a flat index"
    )
