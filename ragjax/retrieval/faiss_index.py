"""FAISS: which kinds there are and what they need, and a structure over all embeddings: built, written and mapped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ragjax.checksums import Digest, Record, damage
from ragjax.config import ON_DEVICES
from ragjax.errors import InputError, library_errors
from ragjax.files import atomic_write
from ragjax.resources import cores, size_text
from ragjax.retrieval.embeddings import Embeddings
from ragjax.terminal import progress_bar

FAISS_FILE = "faiss.index"
OVERSAMPLE = 4  # FAISS is asked for so many times k, of which exact scores choose
TRAIN_SAMPLE = 200_000  # passages a FAISS structure is trained on, at most
ADD_BATCH = 65_536  # fixed, because an HNSW graph depends on it (and not on the number of threads, since FAISS 1.15)
TRIAL = 256  # passages with which a kind is tried before anything is embedded
TRAIN_THREADS = 8  # fixed, because OPQ's rotation depends on it
CHECKED_AT_ONCE = 2**30  # bytes of mapped files under a FAISS kind up to which they are checked when first read


def check_kind(kind: str, width: int, count: int | None = None) -> None:
    """Raises `InputError` when `kind` is neither `exact`, `approximate` nor a FAISS factory string for width D.

    Also, where `count` is given, when FAISS refuses to build it over so few passages, as far as a trial on random
    vectors tells within a moment.
    """
    if kind in ON_DEVICES:
        return
    index = _empty_faiss(kind, width)
    if count is None:
        return
    import faiss

    clusters, sample = faiss.try_extract_index_ivf(index), min(count, TRAIN_SAMPLE)
    if clusters is not None and clusters.nlist > sample:
        raise _untrainable(kind, sample, f"it has {clusters.nlist} clusters")
    if index.is_trained or count <= TRIAL:
        few = np.random.default_rng(0).normal(size=(min(count, TRIAL), width)).astype(np.float32)
        if not index.is_trained:
            _train(index, kind, few)
        _add(index, kind, few)


def _empty_faiss(kind: str, width: int) -> Any:
    import faiss

    try:
        index = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
        if isinstance(_inner(index), faiss.IndexIDMap | faiss.IndexIDMap2):
            raise ValueError("passages have no other numbers than their places, which IDMap asks for")
        return index
    except Exception as error:  # a RuntimeError, or an assertion of the bindings
        raise InputError(
            f"index.kind is {kind!r}, which FAISS does not accept for width {width} ({_faiss_reason(error)}); "
            "use exact, approximate, or an index_factory string such as HNSW32 or IVF256,Flat"
        ) from None


def faiss_bytes(kind: str, width: int, count: int) -> int | None:
    """What FAISS needs for N vectors of width D, in memory as on disk, by its own fields; None for rarer kinds.

    Graphs: each vector, its expected links over all levels (4 bytes each), its level and offset (12 bytes). Clusters:
    each code with its id (8 bytes), and the centroids. Small tables such as codebooks are left out.
    Raises `InputError` as `check_kind` does.
    """
    import faiss

    whole = _empty_faiss(kind, width)  # owns what is inside
    index = _inner(whole)
    if isinstance(index, faiss.IndexHNSW):
        probability = faiss.vector_to_array(index.hnsw.assign_probas)
        links = faiss.vector_to_array(index.hnsw.cum_nneighbor_per_level)[1 : len(probability) + 1]
        return round(count * (index.storage.sa_code_size() + 4 * float(probability @ links) + 12))
    if isinstance(index, faiss.IndexIVF):
        return count * (index.code_size + 8) + index.nlist * index.d * 4
    return count * index.code_size if isinstance(index, faiss.IndexFlatCodes) else None


def smaller_kinds(width: int, count: int, room: int) -> list[str]:
    """FAISS kinds whose structure fits into `room` bytes, the most exact first, each with its size."""
    lists = 2 ** max(0, round(math.log2(4 * math.sqrt(count))))
    parts = max(part for part in range(1, max(1, width // 6) + 1) if width % part == 0)
    kinds = ("HNSW32", f"IVF{lists},SQ8", f"OPQ{parts},IVF{lists},PQ{parts}")
    sizes = {kind: faiss_bytes(kind, width, count) for kind in kinds}
    return [
        f"index.kind={kind} ({size_text(size)})" for kind, size in sizes.items() if size is not None and size <= room
    ]


def faiss_settings() -> dict[str, Any]:
    """What a FAISS structure may depend on beside the embeddings and its kind."""
    import faiss

    settings = {"train_sample": TRAIN_SAMPLE, "train_threads": TRAIN_THREADS, "add_batch": ADD_BATCH}
    return {"version": faiss.__version__} | settings | {"add_threads": cores()}


@dataclass(frozen=True)
class EarlierStructure:
    """The structure of an index of earlier passages, which a new one goes on with."""

    path: Path
    trained_on: int  # how many passages there were when it was trained
    unchanged: int  # its first passages have these numbers and embeddings still; all others are added anew


def build_faiss(embeddings: Embeddings, kind: str, earlier: EarlierStructure | None = None) -> Any:
    """A FAISS structure of some kind over all embeddings; with `earlier` one that is not trained anew.

    Raises `InputError` where FAISS refuses.
    """
    (count, width), first = embeddings.shape, 0
    if earlier is not None:
        index = _read_earlier(earlier)
        first = index.ntotal
    else:
        index = _empty_faiss(kind, width)
    if not index.is_trained:
        sample = np.arange(count)
        if count > TRAIN_SAMPLE:
            sample = np.sort(np.random.default_rng(0).choice(count, TRAIN_SAMPLE, replace=False))
        _train(index, kind, np.asarray(embeddings[sample], np.float32))
    with progress_bar(f"build {kind}", count, "passages", first) as advance:
        for start in range(first, count, ADD_BATCH):
            stop = min(start + ADD_BATCH, count)
            _add(index, kind, embeddings.between(start, stop).astype(np.float32))
            advance(stop - start)
    _search_widely(index)
    return index


def _read_earlier(earlier: EarlierStructure) -> Any:
    """A structure with its unchanged passages, or with none: what it learnt when it was trained stays."""
    import faiss

    with library_errors(f"{earlier.path}: FAISS cannot read it", "run ragjax index CONFIG --rebuild"):
        index = faiss.read_index(str(earlier.path))
        if index.ntotal != earlier.unchanged:
            index.reset()
    return index


def _train(index: Any, kind: str, vectors: Float[np.ndarray, "n D"]) -> None:
    import faiss

    faiss.omp_set_num_threads(TRAIN_THREADS)
    try:
        index.train(vectors)
    except RuntimeError as error:
        raise _untrainable(kind, len(vectors), _faiss_reason(error)) from None


def _untrainable(kind: str, count: int, why: str) -> InputError:
    return InputError(
        f"index.kind={kind} cannot be trained on the {count} passages there are ({why}); use exact, or fewer clusters"
    )


def _add(index: Any, kind: str, vectors: Float[np.ndarray, "n D"]) -> None:
    import faiss

    faiss.omp_set_num_threads(cores())
    try:
        index.add(vectors)
    except RuntimeError as error:
        why = _faiss_reason(error)
        raise InputError(
            f"index.kind={kind} cannot be built over the {len(vectors)} passages there are ({why}); use exact or HNSW32"
        ) from None


def _search_widely(index: Any) -> None:
    """FAISS looks into one cluster by default: take an eighth of them and at least 8; follow 128 nodes of a graph."""
    import faiss

    clusters = faiss.try_extract_index_ivf(index)
    if clusters is not None:
        clusters.nprobe = min(clusters.nlist, max(8, clusters.nlist // 8))
    inner = _inner(index)
    if isinstance(inner, faiss.IndexHNSW):
        inner.hnsw.efSearch = 128


def _inner(index: Any) -> Any:
    """What searches, under whatever transforms the vectors before."""
    import faiss

    inner = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return inner


def write_faiss(path: Path, index: Any) -> Record:
    """Writes a FAISS structure; the record of its file."""
    import faiss

    digest = Digest()
    with atomic_write(path) as (file,):

        def write(block: bytes) -> int:
            digest.update(block)
            return file.write(block)

        # FAISS's own writer overlooks a disk that fills up while it closes the file; ours raises.
        writer = faiss.PyCallbackIOWriter(write, 1 << 20)  # type: ignore[attr-defined]  # not in its stubs
        faiss.write_index(index, writer)
    return digest.record()


def _faiss_reason(error: Exception) -> str:
    """The last part of FAISS's message, which follows the place in its source."""
    return str(error).strip().rsplit(": ", 1)[-1] or type(error).__name__


def read_faiss(folder: Path, manifest: Mapping[str, Any]) -> Any:
    """Maps the structure of an index. Raises `ValueError` where it is missing, damaged or of other passages."""
    import faiss

    path, record = folder / FAISS_FILE, manifest["files"][FAISS_FILE]
    # of clusters, FAISS maps the lists, which are read where a search comes by; all else it reads at once
    most = CHECKED_AT_ONCE if "IVF" in manifest["kind"] else None
    if (what := damage(path, record, most=most)) is not None:
        raise ValueError(f"{path.name} {what}")
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise ValueError(f"{path.name}: {_faiss_reason(error)}") from None
    if index.ntotal != manifest["N"]:
        raise ValueError(f"{path.name} holds {index.ntotal} passages")
    return index
