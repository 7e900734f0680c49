"""The index: embeddings of all passages on disk, searched on the devices (search.py) or by FAISS on the host.

index/manifest.json                  written last: a folder without it is incomplete
index/shards/00000/embeddings.npy    [n, D], 00001, …: consecutive passages, whose text and tokens lie beside them;
                                     bfloat16 is kept as uint16, which .npy can name
index/shards/00000/checksums.json    of the shard's files; the manifest has this file's own, and that of all else
index/faiss.index                    only for a FAISS kind
index/made_of.json                   what the bytes of the shards depend on (build_index.py)

Embeddings are compared with their checksums when they are put on devices, and passages when they are first read. What
FAISS maps, it would take a full read to check: that is done up to CHECKED_AT_ONCE, and beyond by `ragjax verify`.
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

from ragjax.checksums import (
    CHECKSUMS,
    SEAL,
    CheckedFiles,
    Digest,
    Record,
    checksum,
    damage,
    damages,
    read_checksums,
    read_sealed,
    total_size,
    write_checksums,
    write_sealed,
)
from ragjax.config import ON_DEVICES
from ragjax.cost import size_text
from ragjax.errors import InputError
from ragjax.files import atomic_write, read_json
from ragjax.mesh import local_mesh, on_host, place, replicated
from ragjax.passages import MEND, SHARDS, map_array, may_map, shard_folder, shard_folders
from ragjax.progress import bytes_bar, progress_bar
from ragjax.search import Corpus, log_normalizer, place_rows, search_corpus
from ragjax.text import Ids, bucket, pad_rows

EMBEDDINGS, FAISS_FILE, MANIFEST = "embeddings.npy", "faiss.index", "manifest.json"
MADE_OF = "made_of.json"
RUN = "run: ragjax index CONFIG"
TRAIN_SAMPLE = 200_000  # passages a FAISS structure is trained on, at most
ADD_BATCH = 65_536  # fixed, because an HNSW graph depends on it (and not on the number of threads, since FAISS 1.15)
TRIAL = 256  # passages with which a kind is tried before anything is embedded
TRAIN_THREADS = 8  # fixed, because OPQ's rotation depends on it
CHECKED_AT_ONCE = 2**30  # bytes of files under a FAISS kind up to which they are checked when they are first read
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
    """[N, D] over the arrays [n, D] of the shards; `embeddings[ids]` copies rows out, `np.asarray` all of them.

    `files` are those of the shards, which are compared with their checksums when they are first read; those of which
    only some rows are read, if `whole` says so.
    """

    def __init__(self, shards: Sequence[np.ndarray], files: Sequence[CheckedFiles] = (), whole: bool = True) -> None:
        self.shards = shards
        self._files = files
        self._whole = whole
        self._starts = np.cumsum([0, *map(len, shards)])
        self.shape = len(self), shards[0].shape[1]
        self.dtype = shards[0].dtype

    @classmethod
    def open(cls, folders: Sequence[Path], dtype: str, mend: str = MEND, whole: bool = True) -> Embeddings:
        """Maps the files in the shards' folders. Raises `ValueError` for one that is missing or damaged.

        What reads rows raises `InputError` naming the shard where it is damaged, with how to `mend` it.
        """
        may_map(len(folders))
        shards = [_open_embeddings(folder / EMBEDDINGS, dtype) for folder in folders]
        return cls(shards, [CheckedFiles(folder, mend) for folder in folders], whole)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, ids: Any) -> np.ndarray:
        ids = np.asarray(ids)
        numbers = np.searchsorted(self._starts, ids, "right") - 1
        rows = np.empty((*ids.shape, self.shape[1]), self.dtype)
        for number in np.unique(numbers):
            if self._whole and self._files:
                self._files[number].check(EMBEDDINGS)
            here = numbers == number
            rows[here] = self.shards[number][ids[here] - self._starts[number]]
        return rows

    def between(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop). Raises `InputError` where one is not finite, which no encoder's are that was written."""
        first, last = np.searchsorted(self._starts, [start, max(start, stop - 1)], "right") - 1
        for files in self._files[first : last + 1]:
            files.check(EMBEDDINGS)
        rows = self[np.arange(start, stop)]
        _check_finite(rows, f"passages {start} to {stop - 1}")
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.concatenate(self.shards)
        return whole if dtype is None else whole.astype(dtype, copy=False)


def _check_finite(rows: np.ndarray, whose: str) -> None:
    if not np.isfinite(rows.astype(np.float32, copy=False)).all():
        raise InputError(f"the index is damaged: an embedding of {whose} is not finite; delete its folder and {RUN}")


def _open_embeddings(path: Path, dtype: str) -> np.ndarray:
    try:
        return map_array(path, _npy_dtype(dtype), 2).view(dtype)
    except ValueError as error:
        raise ValueError(f"{path.parent.parent.name}/{path.parent.name}/{error}") from None


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
        _check_finite(found, "some passages that were found")
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
    Raises `InputError` for a bad kind, too few passages to train it, a damaged shard, or a full disk.
    """
    folders = shard_folders(folder)
    for number, shard in enumerate(folders):
        if not (shard / CHECKSUMS).exists():
            write_checksums(shard, number=number)
    embeddings = Embeddings.open(folders, dtype)
    count, width = embeddings.shape
    manifest = {"kind": kind, "dtype": dtype, "N": count, "D": width, "shards": [len(s) for s in embeddings.shards]}
    others = [shard / CHECKSUMS for shard in folders] + sorted((folder / "questions").glob("*.jsonl"))
    files = {str(path.relative_to(folder)): checksum(path) for path in [*others, folder / MADE_OF] if path.exists()}
    if kind == "exact":
        (folder / FAISS_FILE).unlink(missing_ok=True)
    else:
        files[FAISS_FILE] = _write_faiss(folder / FAISS_FILE, _build_faiss(embeddings, kind))
        manifest["faiss"] = _faiss_settings()
    write_sealed(folder / MANIFEST, manifest | dict(manifest_extra) | {"files": files})


def index_records(folder: Path) -> tuple[dict[str, Record], dict[str, str]]:
    """The record of each file of an index, and what is wrong with those files that hold the records."""
    try:
        files = read_manifest(folder)["files"]
    except InputError as error:
        files = {}
        broken = {MANIFEST: str(error).removeprefix(f"{folder}: ")}
    else:
        broken = {}
    records: dict[str, Record] = dict(files)
    shards = [name for name in files if Path(name).name == CHECKSUMS]
    # where the manifest does not tell, the shards that are there speak for themselves
    for name in shards or [str(p.relative_to(folder)) for p in sorted((folder / SHARDS).glob(f"[0-9]*/{CHECKSUMS}"))]:
        if name in files and damage(folder / name, files[name]) is not None:
            continue  # it is found with the others
        try:
            inside = read_checksums(folder / Path(name).parent)["files"]
        except InputError as error:
            broken[name] = str(error).partition(": ")[2]
            continue
        records |= {str(Path(name).with_name(of)): record for of, record in inside.items()}
    return records, broken


def index_damage(folder: Path) -> dict[str, str]:
    """What is wrong with each damaged file of an index, by its name in the folder, once all have been read.

    A progress bar shows this where it takes long.
    """
    records, broken = index_records(folder)
    with bytes_bar("check the index", total_size(records.values())) as advance:
        return broken | damages(folder, records, advance)


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


def _faiss_settings() -> dict[str, Any]:
    """What a FAISS structure may depend on beside the embeddings and its kind."""
    import faiss

    settings = {"train_sample": TRAIN_SAMPLE, "train_threads": TRAIN_THREADS, "add_batch": ADD_BATCH}
    return {"version": faiss.__version__} | settings | {"add_threads": _cores()}


def _build_faiss(embeddings: Embeddings, kind: str) -> Any:

    count, width = embeddings.shape
    index = _empty_faiss(kind, width)
    if not index.is_trained:
        sample = np.arange(count)
        if count > TRAIN_SAMPLE:
            sample = np.sort(np.random.default_rng(0).choice(count, TRAIN_SAMPLE, replace=False))
        _train(index, kind, np.asarray(embeddings[sample], np.float32))
    with progress_bar(f"build {kind}", count, "passages") as advance:
        for start in range(0, count, ADD_BATCH):
            stop = min(start + ADD_BATCH, count)
            _add(index, kind, embeddings.between(start, stop).astype(np.float32))
            advance(stop - start)
    _search_widely(index)
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

    faiss.omp_set_num_threads(_cores())
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


def _write_faiss(path: Path, index: Any) -> Record:
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_built(folder: Path) -> None:
    """Raises `InputError` for a folder without a complete index; this costs nothing."""
    if not (folder / MANIFEST).is_file():
        state = "is not complete" if folder.is_dir() else "does not exist"
        raise InputError(f"{folder}: the index {state}; run: ragjax index CONFIG")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index. Raises `InputError` where it is missing, damaged or of an older ragjax."""
    check_built(folder)
    try:
        if SEAL in read_json(folder / MANIFEST):
            return read_sealed(folder / MANIFEST)
        why = "was built by an older ragjax"
    except InputError as error:
        why = f"is damaged ({str(error).removeprefix(f'{folder}/')})"
    raise InputError(f"{folder}: the index {why}; {RUN}")


def check_listed(path: Path) -> None:
    """Raises `InputError` for a file of questions that an index brought, and that is not what was written any more."""
    folder = path.parent.parent
    if path.parent.name == "questions" and (folder / MANIFEST).is_file():
        record = read_manifest(folder)["files"].get(f"questions/{path.name}")
        if record is not None and (what := damage(path, record)) is not None:
            raise InputError(f"{path}: {what}; {MEND}")


def open_index(
    folder: Path, expected_fingerprints: Mapping[str, str], recall: float | None = None, mend: str = MEND
) -> Index:
    """Opens an index, memory-mapped, after checking what it was built from; `recall` as in `Index`.

    Raises `InputError` for a folder that is missing, incomplete or damaged, saying how to `mend` it, or whose manifest
    has another fingerprint than one of `expected_fingerprints`.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    try:
        _check_fingerprints(folder, manifest["fingerprints"], expected_fingerprints)
        counts, width, on_devices = manifest["shards"], manifest["D"], manifest["kind"] == "exact"
        folders = [shard_folder(folder, number) for number in range(len(counts))]
        size = manifest["N"] * width * np.dtype(manifest["dtype"]).itemsize
        embeddings = Embeddings.open(folders, manifest["dtype"], mend, on_devices or size <= CHECKED_AT_ONCE)
        for path, count, shard in zip(folders, counts, embeddings.shards, strict=True):
            if shard.shape != (count, width):
                raise ValueError(f"shards/{path.name}: embeddings of shape {shard.shape}, not {(count, width)}")
        if len(embeddings) != manifest["N"]:
            raise ValueError(f"the shards hold {len(embeddings)} passages, not {manifest['N']}")
        faiss_index = None if on_devices else _read_faiss(folder, manifest)
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise InputError(f"{folder}: the index is damaged ({error}); {mend}") from None
    return Index(embeddings, manifest["kind"], manifest, faiss_index, recall)


def _check_fingerprints(folder: Path, built: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for part, fingerprint in expected.items():
        if (other := built.get(part)) != fingerprint:
            raise InputError(
                f"{folder}: the index was built by another {part.replace('_', ' ')}: {other}, and the configuration "
                f"names {fingerprint}; go back to that one, or set index.folder to another folder and run: "
                "ragjax index CONFIG"
            )


def _read_faiss(folder: Path, manifest: Mapping[str, Any]) -> Any:
    import faiss

    path, record = folder / FAISS_FILE, manifest["files"][FAISS_FILE]
    # one that is larger is mapped, and read where a search comes by
    if (what := damage(path, record, most=CHECKED_AT_ONCE)) is not None:
        raise ValueError(f"{path.name} {what}")
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise ValueError(f"{path.name}: {_faiss_reason(error)}") from None
    if index.ntotal != manifest["N"]:
        raise ValueError(f"{path.name} holds {index.ntotal} passages")
    return index


def check_k(k: int, count: int) -> None:
    """Raises `InputError` when more documents a question are asked for than there are passages."""
    if k > count:
        raise InputError(f"k is {k} but the corpus has only {count} passages; lower train.k and decode.k")
