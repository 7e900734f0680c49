"""The index: embeddings of all passages on disk, searched on the devices (device_index.py) or by FAISS on the host.

index/manifest.json                  written last: a folder without it is incomplete
index/shards/00000/embeddings.npy    [n, D], 00001, …: consecutive passages, whose text and tokens lie beside them;
                                     bfloat16 is kept as uint16, which .npy can name
index/shards/00000/checksums.json    of the shard's files; the manifest has this file's own, and that of all else
index/faiss.index                    only for a FAISS kind
index/made_of.json                   what the bytes of the shards depend on (index_builder.py)
index/bm25/                          the words of the passages, with retriever.bm25_docs (bm25.py)

Embeddings are compared with their checksums when they are put on devices, and passages when they are first read. What
FAISS maps, it would take a full read to check: that is done up to CHECKED_AT_ONCE, and beyond by `ragjax verify`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, Int32

from ragjax.checksums import (
    CHECKSUMS,
    SEAL,
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
from ragjax.data.corpus import RUN
from ragjax.data.passage_store import MEND, SHARDS, shard_folder, shard_folders
from ragjax.errors import InputError
from ragjax.files import read_json
from ragjax.parallel.mesh import local_mesh
from ragjax.parallel.processes import ask_together
from ragjax.parallel.sharding import gather_to_host, put_global, replicated
from ragjax.resources import cores
from ragjax.retrieval.bm25 import Bm25Index
from ragjax.retrieval.device_index import DeviceIndex, log_normalizer, place_rows, sharded_top_k
from ragjax.retrieval.embeddings import Embeddings, check_finite
from ragjax.retrieval.faiss_index import (
    CHECKED_AT_ONCE,
    FAISS_FILE,
    OVERSAMPLE,
    EarlierStructure,
    build_faiss,
    faiss_settings,
    read_faiss,
    write_faiss,
)
from ragjax.terminal import bytes_bar

MANIFEST = "manifest.json"
MADE_OF = "made_of.json"


@dataclass
class Index:
    """Embeddings [N, D] with a way to search them: `kind` is `exact` or a FAISS index_factory string.

    `recall`, for `exact`, lets the devices miss some (see `sharded_top_k`). `together` are the devices of several
    processes that search at the same time, each for as many questions of its own (`index_mesh`); others are not asked.
    """

    embeddings: Embeddings
    kind: str
    manifest: dict[str, Any]
    faiss_index: Any = None
    recall: float | None = None
    bm25: Bm25Index | None = None  # of the same passages
    together: Mesh | None = None

    @property
    def version(self) -> str:
        """ "sha256:…" over what it was built from: its passages, its encoder, its kind, and by whom it was encoded."""
        parts = {"passages": self.manifest["corpus"]["fingerprint"], **self.manifest["fingerprints"]}
        # by an encoder that is trained; by somebody else; when there were fewer passages
        parts |= {what: self.manifest[what] for what in ("refreshed", "vectors", "trained_on") if what in self.manifest}
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
        `mesh` is what searches otherwise, by default all devices of this process; all its processes ask the same then,
        but for those of `together`.
        """
        queries = np.asarray(queries, np.float32)
        if self.on_devices:
            return self._by_devices(lambda queries, mesh: self.begin_search(queries, k, mesh), queries, mesh)
        import faiss

        faiss.omp_set_num_threads(cores())
        _, candidates = self.faiss_index.search(queries, OVERSAMPLE * k)
        if ((candidates < -1) | (candidates >= len(self))).any():  # so large a file that its checksum was not read
            raise InputError(f"{FAISS_FILE} of the index is damaged: it finds passages that are not there; {MEND}")
        ids = candidates.astype(np.int32)
        scores = np.einsum("BD,BKD->BK", queries, self.vectors(ids))
        scores = np.where(ids >= 0, scores, -np.inf).astype(np.float32)
        best = np.lexsort((ids, -scores), axis=-1)[:, :k]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)

    def begin_search(self, queries: Float[Array, "B D"], k: int, mesh: Mesh) -> tuple[Array, Array]:
        """As `search` on the devices of a mesh, where the queries lie and the result stays; the host does not wait."""
        return sharded_top_k(self.corpus(mesh), queries, k, self.recall)

    def measured_recall(self, queries: Float[np.ndarray, "B D"], k: int) -> float:
        """The mean share of the k best passages that FAISS finds; the exact ones are sought shard by shard."""
        import faiss

        scores, ids, first = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64), 0
        for shard in self.embeddings.checked_shards():
            rows = shard.astype(np.float32, copy=False)
            best, places = faiss.knn(queries, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
            scores, ids = np.hstack([scores, best]), np.hstack([ids, places + first])
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
            first += len(rows)
        _, found = self.search(queries, k)
        return float((ids[:, :, None] == found[:, None, :]).any(axis=2).mean())

    def log_normalizer(
        self, queries: Float[np.ndarray, "B D"], scale: float, mesh: Mesh | None = None
    ) -> Float32[np.ndarray, " B"]:
        """log Σ exp(scale · q·d) over all passages, by the devices whatever the kind; `mesh` as in `search`."""
        queries = np.asarray(queries, np.float32)
        return self._by_devices(lambda queries, mesh: log_normalizer(self.corpus(mesh), queries, scale), queries, mesh)

    def _by_devices(
        self, ask: Callable[[Array, Mesh], Any], queries: Float32[np.ndarray, "B D"], mesh: Mesh | None
    ) -> Any:
        """What `ask` says, on the host, of queries that lie whole on each device of the mesh that searches."""

        def on(mesh: Mesh, queries: np.ndarray) -> Any:
            return gather_to_host(ask(put_global(queries, replicated(mesh)), mesh))

        if (together := self.together) is not None:
            return ask_together(lambda every: on(together, every), queries)
        return on(mesh or local_mesh(), queries)

    def vectors(self, ids: Int[np.ndarray, "B K"]) -> Float32[np.ndarray, "B K D"]:
        """The embeddings of passages; zeros where the id is -1."""
        vectors = np.asarray(self.embeddings[np.maximum(ids, 0)], np.float32)
        check_finite(vectors, "some passages that were found")
        return np.where(ids[..., None] >= 0, vectors, np.float32(0))

    def corpus(self, mesh: Mesh) -> DeviceIndex:
        """All embeddings, put on the devices of a mesh once, in the type in which they are stored."""
        if self._corpus is None or self._corpus.mesh != mesh:
            self._corpus = None  # before the next one takes room
            rows = place_rows(mesh, len(self), self.embeddings.between)
            self._corpus = DeviceIndex(rows, len(self), mesh)
        return self._corpus

    def release(self) -> None:
        """Frees what lies on devices."""
        self._corpus = None

    _corpus: DeviceIndex | None = field(default=None, repr=False)


def write_index(
    folder: Path, kind: str, dtype: str, manifest_extra: Mapping[str, Any], earlier: EarlierStructure | None = None
) -> None:
    """Builds the FAISS structure over the shards in `folder`, if `kind` asks for one, and completes it with a manifest.

    `manifest_extra` holds `fingerprints`, a name and a "sha256:…" for each thing the index was built from; `earlier` is
    a structure of this kind that need not be trained anew.
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
        files[FAISS_FILE] = write_faiss(folder / FAISS_FILE, build_faiss(embeddings, kind, earlier))
        manifest["faiss"] = faiss_settings()
        if earlier is not None:
            manifest["trained_on"] = earlier.trained_on
    write_sealed(folder / MANIFEST, manifest | dict(manifest_extra) | {"files": files})


def index_records(folder: Path) -> tuple[dict[str, Record], dict[str, str]]:
    """The record of each file of an index, and what is wrong with those files that hold the records."""
    try:
        files = read_index_manifest(folder)["files"]
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


def check_built(folder: Path) -> None:
    """Raises `InputError` for a folder without a complete index; this costs nothing."""
    if not (folder / MANIFEST).is_file():
        state = "is not complete" if folder.is_dir() else "does not exist"
        raise InputError(f"{folder}: the index {state}; run: ragjax index CONFIG")


def read_index_manifest(folder: Path) -> dict[str, Any]:
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
        record = read_index_manifest(folder)["files"].get(f"questions/{path.name}")
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
    manifest = read_index_manifest(folder)
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
        faiss_index = None if on_devices else read_faiss(folder, manifest)
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise InputError(f"{folder}: the index is damaged ({error}); {mend}") from None
    return Index(embeddings, manifest["kind"], manifest, faiss_index, recall)


def _check_fingerprints(folder: Path, built: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for part, fingerprint in expected.items():
        if (other := built.get(part)) != fingerprint:
            raise InputError(
                f"{folder}: the index was built by another {part.replace('_', ' ')}: {other}, and the configuration "
                f"names {fingerprint}; go back to that one, or set index.path to another folder and run: "
                "ragjax index CONFIG"
            )


def check_k(k: int, count: int) -> None:
    """Raises `InputError` when more documents a question are asked for than there are passages."""
    if k > count:
        raise InputError(
            f"k is {k} but the corpus has only {count} passages; lower train.num_docs, decode.num_docs and "
            "retriever.bm25_docs"
        )
