"""Gives the vectors of a FAISS index, in a process of its own: run by its path, asked on standard input.

FAISS believes what a file says of its sizes. A damaged one makes it read what is not there, and the system ends the
process; so this one imports nothing of ragjax, and has nothing to lose.

A request is a number n and n rows, as int64; the answer a line of JSON, {"bytes"} or {"error"}, and so many bytes: the
vectors float32[n, D]. The first answer comes unasked: {"count", "width", "dtype", "bytes"} or {"error"} or
{"compressed"}, with the numbers int64[N] that the index has for its vectors, or none.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

SPARE = 4 << 30  # bytes of memory beside twice the file's: damaged sizes ask for more than any machine has


def limit_memory(size: int) -> None:
    """At most so many bytes beside what is mapped, where the system has such a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, most in ((resource.RLIMIT_DATA, size), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # a lower one is set, or macOS does not know it
            resource.setrlimit(kind, (most, most))


def stored_type(index: Any) -> tuple[str | None, str]:
    """How the vectors lie in an index, None where they do not come out as they went in; and the kind that says so."""
    import faiss

    inner = index
    while isinstance(inner, faiss.IndexPreTransform):
        chain: Any = inner.chain
        for number in range(chain.size()):
            step = faiss.downcast_VectorTransform(chain.at(number))
            if not (isinstance(step, faiss.LinearTransform) and step.is_orthonormal and step.d_in == step.d_out):
                return None, type(step).__name__
        inner = faiss.downcast_index(inner.index)
    stored = faiss.downcast_index(inner.storage) if hasattr(inner, "storage") else inner
    kind = type(stored).__name__
    if isinstance(stored, faiss.IndexFlat | faiss.IndexIVFFlat | faiss.IndexRefineFlat):
        return "float32", kind
    if isinstance(stored, faiss.IndexScalarQuantizer | faiss.IndexIVFScalarQuantizer):
        halves = {faiss.ScalarQuantizer.QT_fp16: "float16", faiss.ScalarQuantizer.QT_bf16: "bfloat16"}
        return halves.get(stored.sq.qtype), kind
    return None, kind


def serve(path: Path, requests: BinaryIO, answers: BinaryIO) -> None:
    """Opens the index, mapped where FAISS can, and answers until there are no more requests."""
    import faiss
    import numpy as np

    def answer(values: Any = None, **about: object) -> None:
        data = b"" if values is None else np.ascontiguousarray(values).data.cast("B")
        answers.write(json.dumps(about | {"bytes": len(data)}).encode() + b"\n")
        answers.write(data)
        answers.flush()

    faiss.omp_set_num_threads(1)  # it copies; each thread would take memory
    limit_memory(SPARE + 2 * (size := path.stat().st_size))
    with path.open("rb") as file:
        clustered = file.read(2) == b"Iw"
    # mapped, else 20 million vectors would be held in memory: clusters in the one way, all else in the other
    whole = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if clustered else faiss.IO_FLAG_MMAP_IFC)
    index, numbers = faiss.downcast_index(whole), None
    if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
        numbers = faiss.vector_to_array(index.id_map)
        index = faiss.downcast_index(index.index)
    dtype, kind = stored_type(index)
    if dtype is None:
        return answer(compressed=kind)
    width = (2 if "16" in dtype else 4) * index.d
    if index.ntotal * width > size or (numbers is not None and len(numbers) != index.ntotal):
        raise ValueError(f"{index.ntotal} vectors of {width} bytes are not in {size} bytes")
    if (clusters := faiss.try_extract_index_ivf(index)) is not None:
        clusters.make_direct_map()
    answer(numbers, count=index.ntotal, width=index.d, dtype=dtype)
    while head := requests.read(8):
        rows = np.frombuffer(requests.read(8 * int.from_bytes(head, sys.byteorder)), np.int64)
        follow = bool((np.diff(rows) == 1).all())
        answer(index.reconstruct_n(int(rows[0]), len(rows)) if follow else index.reconstruct_batch(rows))


def main() -> None:
    """Arguments: the folders of Python's modules as JSON, the index."""
    sys.path = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what FAISS prints is no answer
    try:
        serve(Path(sys.argv[2]), sys.stdin.buffer, answers)
    except Exception as error:
        answers.write(json.dumps({"error": f"{error}" or type(error).__name__}).encode() + b"\n")


if __name__ == "__main__":
    main()
