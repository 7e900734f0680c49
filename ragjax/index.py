"""The index: embeddings of all passages on disk, searched on the devices (search.py) or by FAISS on the host.

index/manifest.json                  written last: a folder without it is incomplete
index/shards/00000/embeddings.npy    [n, D], 00001, …: consecutive passages, whose text and tokens lie beside them;
                                     bfloat16 is kept as uint16, which .npy can name
index/faiss.index                    only for a FAISS kind
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Float32, Int, Int32

from ragjax.config import ON_DEVICES
from ragjax.cost import size_text
from ragjax.errors import InputError
from ragjax.files import atomic_write
from ragjax.mesh import local_mesh, on_host, place, replicated
from ragjax.passages import may_map, shard_folder, shard_folders
from ragjax.progress import progress_bar
from ragjax.search import Corpus, log_normalizer, place_rows, search_corpus
from ragjax.text import Ids, bucket, pad_rows

EMBEDDINGS, FAISS_FILE, MANIFEST = "embeddings.npy", "faiss.index", "manifest.json"
TRAIN_SAMPLE = 200_000  # passages a FAISS structure is trained on, at most
ADD_BATCH = 65_536  # fixed, because an HNSW graph depends on it (and not on the number of threads, since FAISS 1.15)
TRAIN_THREADS = 8  # fixed, because OPQ's rotation depends on it
OVERSAMPLE = 4  # FAISS is asked for so many times k, of which exact scores choose

Encode = Callable[[Int[np.ndarray, "n S"], Bool[np.ndarray, "n S"]], Any]
EncodedBatch = tuple[np.ndarray, np.ndarray]  # some places [n], and the embeddings [n, D] that belong there


def embed_passages(
    batches: Iterable[EncodedBatch], count: int, *, dtype: str, path: Path, progress: Callable[[int], None]
) -> None:
    """Writes the embeddings [n, D] of a shard's passages, at least one, to `path`, in their order and in `dtype`.

    `count` is n. `progress` is told how many passages each batch had. Raises `InputError` for a full disk or embeddings
    that `dtype` cannot hold.
    """
    embeddings: np.ndarray | None = None
    with atomic_write(path) as (file,):
        for ids, batch in batches:
            with np.errstate(over="ignore"):
                stored = batch.astype(dtype)
            if not np.isfinite(stored.astype(np.float32)).all():
                raise InputError(f"an embedding is not finite in index.dtype={dtype}; check retriever.source, or widen")
            if embeddings is None:
                embeddings = _create(file, (count, batch.shape[1]), dtype)
            embeddings[ids] = stored
            progress(len(ids))
        assert isinstance(embeddings, np.memmap)
        embeddings.flush()


def encoded_batches(
    encode: Encode,
    token_rows: Sequence[Ids],
    *,
    width_buckets: Sequence[int],
    batch_size: int,
    pad_id: int,
    devices: int = 1,
) -> Iterator[EncodedBatch]:
    """Places of passages and their embeddings, longest passages first, so that memory runs out at once or never.

    `encode` maps tokens[n, S] and mask[n, S] to an array [n, D]: n is `batch_size` for each of so many `devices`, S
    one of `width_buckets`.

    Each device has a whole batch, and batches of one width go together: so each is padded and encoded in the same way
    whatever the number of devices. The next ones are dispatched before the previous ones are awaited: the host writes
    while the devices compute.
    """
    lengths = np.array([len(row) for row in token_rows])
    order = np.argsort(-lengths, kind="stable")
    batches = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    waiting = None
    for width, group in groupby(batches, key=lambda ids: bucket(int(lengths[ids[0]]), width_buckets)):
        while together := list(islice(group, devices)):
            ids = np.concatenate(together)
            rows = [token_rows[i] for i in ids]
            rows += [rows[-1]] * (devices * batch_size - len(rows))
            current = ids, encode(*pad_rows(rows, width, pad_id))
            if waiting is not None:
                yield _finished(*waiting)
            waiting = current
    if waiting is not None:
        yield _finished(*waiting)


def _finished(ids: Int[np.ndarray, " n"], result: Any) -> EncodedBatch:
    return ids, np.asarray(result)[: len(ids)].astype(np.float32)


def _create(file: BinaryIO, shape: tuple[int, int], dtype: str) -> np.memmap:
    header = {"descr": _npy_dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    start = file.tell()
    _reserve(file, start, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.memmap(file.name, dtype, "r+", start, shape)


def _reserve(file: BinaryIO, start: int, size: int) -> None:
    # Writing through a memory map to a full disk kills the process; so the space is claimed before.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), start, size)
        return
    for written in range(0, size, 1 << 24):
        file.write(bytes(min(1 << 24, size - written)))
    file.flush()


def _npy_dtype(dtype: str) -> np.dtype:
    return np.dtype(np.uint16) if np.dtype(dtype) == ml_dtypes.bfloat16 else np.dtype(dtype)


class Embeddings:
    """[N, D] over the arrays [n, D] of the shards; `embeddings[ids]` copies rows out, `np.asarray` all of them."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])
        self.shape = len(self), shards[0].shape[1]
        self.dtype = shards[0].dtype

    @classmethod
    def open(cls, folders: Sequence[Path], dtype: str) -> Embeddings:
        """Maps the files in the shards' folders. Raises `ValueError` for one that is missing or damaged."""
        may_map(len(folders))
        return cls([_open_embeddings(folder / EMBEDDINGS, dtype) for folder in folders])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, ids: Any) -> np.ndarray:
        ids = np.asarray(ids)
        numbers = np.searchsorted(self._starts, ids, "right") - 1
        rows = np.empty((*ids.shape, self.shape[1]), self.dtype)
        for number in np.unique(numbers):
            here = numbers == number
            rows[here] = self.shards[number][ids[here] - self._starts[number]]
        return rows

    def between(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop). Raises `InputError` where one is not finite, which no encoder's are that was written."""
        rows = self[np.arange(start, stop)]
        if not np.isfinite(rows.astype(np.float32)).all():
            raise InputError(
                f"the index is damaged: an embedding of passages {start} to {stop - 1} is not finite; delete its "
                "folder and run: ragjax index CONFIG"
            )
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.concatenate(self.shards)
        return whole if dtype is None else whole.astype(dtype, copy=False)


def _open_embeddings(path: Path, dtype: str) -> np.ndarray:
    where = f"{path.parent.parent.name}/{path.parent.name}/{path.name}"
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{where} is missing") from None
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{where}: {error}") from None
    if stored.dtype != _npy_dtype(dtype) or stored.ndim != 2:
        raise ValueError(f"{where} holds {stored.dtype}{list(stored.shape)} and not {dtype}[n, D]")
    return stored.view(dtype)


@dataclass
class Index:
    """Embeddings [N, D] with a way to search them: `kind` is `exact` or a FAISS index_factory string.

    `recall`, for `exact`, lets the devices miss some (see `search_corpus`).
    """

    embeddings: Embeddings
    kind: str
    manifest: dict[str, Any]
    faiss_index: Any = None
    recall: float | None = None

    @property
    def version(self) -> str:
        """ "sha256:…" over what it was built from: its passages, its encoder, its kind."""
        parts = {"passages": self.manifest["corpus"]["fingerprint"], **self.manifest["fingerprints"]}
        if "refreshed" in self.manifest:  # by an encoder that is trained
            parts["refreshed"] = self.manifest["refreshed"]
        return f"sha256:{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"

    @property
    def on_devices(self) -> bool:
        """Whether the devices search, all of a mesh together, or FAISS does, for each process by itself."""
        return self.kind == "exact"

    def __len__(self) -> int:
        return len(self.embeddings)

    def search(
        self, queries: Float[np.ndarray, "B D"], k: int, mesh: Mesh | None = None
    ) -> tuple[Float32[np.ndarray, "B K"], Int32[np.ndarray, "B K"]]:
        """The k passages with the largest inner products: scores and ids, best first, equal ones by id.

        Where there are fewer hits than k, the id is -1 and the score -inf. A FAISS kind finds 4k candidates
        approximately; they are scored again from the stored embeddings, so that scores are exact, and sorted by that.
        `mesh` is what searches otherwise, by default one device; all its processes ask the same then.
        """
        queries = np.asarray(queries, np.float32)
        if self.on_devices:
            corpus = self.corpus(mesh or local_mesh(data=1))
            return on_host(search_corpus(corpus, place(queries, replicated(corpus.mesh)), k, self.recall))
        import faiss

        faiss.omp_set_num_threads(_cores())
        _, found = self.faiss_index.search(queries, OVERSAMPLE * k)
        ids = found.astype(np.int32)
        scores = np.einsum("BD,BKD->BK", queries, self.vectors(ids))
        scores = np.where(ids >= 0, scores, -np.inf).astype(np.float32)
        best = np.lexsort((ids, -scores), axis=-1)[:, :k]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)

    def log_normalizer(
        self, queries: Float[np.ndarray, "B D"], scale: float, mesh: Mesh | None = None
    ) -> Float32[np.ndarray, " B"]:
        """log Σ exp(scale · q·d) over all passages, by the devices whatever the kind; `mesh` as in `search`."""
        corpus = self.corpus(mesh or local_mesh(data=1))
        return on_host(log_normalizer(corpus, place(np.asarray(queries, np.float32), replicated(corpus.mesh)), scale))

    def vectors(self, ids: Int[np.ndarray, "B K"]) -> Float32[np.ndarray, "B K D"]:
        """The embeddings of passages; zeros where the id is -1."""
        found = np.asarray(self.embeddings[np.maximum(ids, 0)], np.float32)
        return np.where(ids[..., None] >= 0, found, np.float32(0))

    def corpus(self, mesh: Mesh) -> Corpus:
        """All embeddings, put on the devices of a mesh once, in the type in which they are stored."""
        if self._corpus is None or self._corpus.mesh != mesh:
            self._corpus = None  # before the next one takes room
            rows = place_rows(mesh, len(self), self.embeddings.between)
            self._corpus = Corpus(rows, len(self), mesh)
        return self._corpus

    def release(self) -> None:
        """Frees what lies on devices."""
        self._corpus = None

    _corpus: Corpus | None = field(default=None, repr=False)


def write_index(folder: Path, kind: str, dtype: str, manifest_extra: Mapping[str, Any]) -> None:
    """Builds the FAISS structure over the shards in `folder`, if `kind` asks for one, and completes it with a manifest.

    `manifest_extra` holds `fingerprints`, a name and a "sha256:…" for each thing the index was built from.
    Raises `InputError` for a bad kind, too few passages to train it, or a full disk.
    """
    embeddings = Embeddings.open(shard_folders(folder), dtype)
    faiss_index = None if kind == "exact" else _build_faiss(embeddings, kind)
    for old in (MANIFEST, FAISS_FILE):
        (folder / old).unlink(missing_ok=True)
    count, width = embeddings.shape
    manifest = {"kind": kind, "dtype": dtype, "N": count, "D": width, "shards": [len(s) for s in embeddings.shards]}
    if faiss_index is not None:
        _write_faiss(folder / FAISS_FILE, faiss_index)
        manifest["faiss"] = _faiss_settings()
    with atomic_write(folder / MANIFEST) as (file,):
        file.write(json.dumps(manifest | dict(manifest_extra), indent=1, ensure_ascii=False).encode() + b"\n")


def check_kind(kind: str, width: int) -> None:
    """Raises `InputError` when `kind` is neither `exact`, `approximate` nor a FAISS factory string for width D."""
    if kind not in ON_DEVICES:
        _empty_faiss(kind, width)


def _empty_faiss(kind: str, width: int) -> Any:
    import faiss

    try:
        return faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
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


def _faiss_settings() -> dict[str, Any]:
    """What a FAISS structure may depend on beside the embeddings and its kind."""
    import faiss

    settings = {"train_sample": TRAIN_SAMPLE, "train_threads": TRAIN_THREADS, "add_batch": ADD_BATCH}
    return {"version": faiss.__version__} | settings | {"add_threads": _cores()}


def _build_faiss(embeddings: Embeddings, kind: str) -> Any:
    import faiss

    count, width = embeddings.shape
    index = _empty_faiss(kind, width)
    if not index.is_trained:
        sample = np.arange(count)
        if count > TRAIN_SAMPLE:
            sample = np.sort(np.random.default_rng(0).choice(count, TRAIN_SAMPLE, replace=False))
        faiss.omp_set_num_threads(TRAIN_THREADS)
        try:
            index.train(np.asarray(embeddings[sample], np.float32))
        except RuntimeError as error:
            raise InputError(
                f"index.kind={kind} cannot be trained on the {len(sample)} passages there are "
                f"({_faiss_reason(error)}); use exact, or fewer clusters"
            ) from None
    faiss.omp_set_num_threads(_cores())
    with progress_bar(f"build {kind}", count, "passages") as advance:
        for start in range(0, count, ADD_BATCH):
            stop = min(start + ADD_BATCH, count)
            index.add(embeddings.between(start, stop).astype(np.float32))
            advance(stop - start)
    _search_widely(index)
    return index


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


def _write_faiss(path: Path, index: Any) -> None:
    import faiss

    with atomic_write(path) as (file,):
        # FAISS's own writer overlooks a disk that fills up while it closes the file; ours raises.
        writer = faiss.PyCallbackIOWriter(file.write, 1 << 20)  # type: ignore[attr-defined]  # not in its stubs
        faiss.write_index(index, writer)


def _faiss_reason(error: Exception) -> str:
    """The last part of FAISS's message, which follows the place in its source."""
    return str(error).strip().rsplit(": ", 1)[-1] or type(error).__name__


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_built(folder: Path) -> None:
    """Raises `InputError` for a folder without a complete index; this costs nothing."""
    if not (folder / MANIFEST).is_file():
        state = "is not complete" if folder.is_dir() else "does not exist"
        raise InputError(f"{folder}: the index {state}; run: ragjax index CONFIG")


def open_index(folder: Path, expected_fingerprints: Mapping[str, str], recall: float | None = None) -> Index:
    """Opens an index, memory-mapped, after checking what it was built from; `recall` as in `Index`.

    Raises `InputError` for a folder that is missing or incomplete, or whose manifest has another fingerprint than
    one of `expected_fingerprints`.
    """
    folder = Path(folder)
    check_built(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if "shards" not in manifest and "embeddings" in manifest:
            raise InputError(f"{folder}: the index was built by an older ragjax; run: ragjax index CONFIG")
        _check_fingerprints(folder, manifest["fingerprints"], expected_fingerprints)
        counts, width = manifest["shards"], manifest["D"]
        folders = [shard_folder(folder, number) for number in range(len(counts))]
        embeddings = Embeddings.open(folders, manifest["dtype"])
        for path, count, shard in zip(folders, counts, embeddings.shards, strict=True):
            if shard.shape != (count, width):
                raise ValueError(f"shards/{path.name}: embeddings of shape {shard.shape}, not {(count, width)}")
        if len(embeddings) != manifest["N"]:
            raise ValueError(f"the shards hold {len(embeddings)} passages, not {manifest['N']}")
        faiss_index = None if manifest["kind"] == "exact" else _read_faiss(folder / FAISS_FILE, manifest["N"])
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise InputError(f"{folder}: the index is damaged ({error}); delete it and run: ragjax index CONFIG") from None
    return Index(embeddings, manifest["kind"], manifest, faiss_index, recall)


def _check_fingerprints(folder: Path, built: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for part, fingerprint in expected.items():
        if (other := built.get(part)) != fingerprint:
            raise InputError(
                f"{folder}: the index was built by another {part.replace('_', ' ')}: {other}, and the configuration "
                f"names {fingerprint}; go back to that one, or set index.folder to another folder and run: "
                "ragjax index CONFIG"
            )


def _read_faiss(path: Path, count: int) -> Any:
    import faiss

    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise ValueError(f"{path.name}: {_faiss_reason(error)}") from None
    if index.ntotal != count:
        raise ValueError(f"{path.name} holds {index.ntotal} passages")
    return index


def check_k(k: int, count: int) -> None:
    """Raises `InputError` when more documents a question are asked for than there are passages."""
    if k > count:
        raise InputError(f"k is {k} but the corpus has only {count} passages; lower train.k and decode.k")
