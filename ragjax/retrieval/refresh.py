"""The index follows its passage encoder, where that is trained: the corpus is encoded anew while training goes on.

RUN/refreshed/000120/             begun after step 120, with the encoder as it was then
    shards/00000/embeddings.npy      what one process encoded after one step: consecutive passages, in order
    faiss.index, manifest.json       as in an index; without the manifest it is not complete, and not searched

A re-encoding is spread evenly over `refresh.steps` steps, so it is never late: all processes search the new index from
the same step on, and so does a run that was resumed. After the last step the index is built anew once more, for what is
asked then. Text and tokens stay where they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from ragjax.checksums import write_checksums
from ragjax.data.passage_store import PassageStore, shard_folder
from ragjax.data.question_batch import tokenize_questions
from ragjax.errors import InputError
from ragjax.models.layers import Params
from ragjax.parallel.mesh import command_mesh
from ragjax.parallel.processes import broadcast_from_process_zero, run_on_process_zero, wait_for_all
from ragjax.parallel.sharding import gather_to_host, put_global, replicated
from ragjax.rag import RagPipeline
from ragjax.retrieval.embeddings import EMBEDDINGS
from ragjax.retrieval.encoder import embed_in_memory, embed_to_file
from ragjax.retrieval.index import MANIFEST, Index, open_index, write_index
from ragjax.retrieval.retrieve import encode_questions
from ragjax.terminal import progress_bar

FOLDER = "refreshed"
REFRESHED_MEND = "delete its version of the index: the one after the last step ragjax train CONFIG makes again"
TOGETHER = 1024  # passages whose text is held at a time; of a part only the tokens are


@dataclass(frozen=True)
class RefreshedIndex:
    """The steps after which the index was begun that is searched, and the one that is being built; None for neither.

    The index that `ragjax index` built is the one searched at first. After the last step another one is begun.
    """

    searched: int | None = None
    building: int | None = None


class IndexRefresher:
    """The index that is searched at each step of training; `state` goes into checkpoints."""

    def __init__(self, rag: RagPipeline, base: Index, store: PassageStore, output: Path, mesh: Mesh) -> None:
        self.rag, self.base, self.store, self.mesh = rag, base, store, mesh
        self.folder = output / FOLDER
        self.state = RefreshedIndex()
        self.index = base
        self._placed: tuple[int, Params] | None = None  # the encoder of the index begun then, on this process's devices
        if (parts := rag.config.refresh.steps * jax.process_count()) > len(base):
            raise InputError(
                f"refresh.steps={rag.config.refresh.steps} would make {parts} parts of {len(base)} passages; lower it"
            )

    def saved(self) -> dict[str, Any]:
        """The state as JSON, for a checkpoint."""
        return asdict(self.state) | {"processes": jax.process_count()}

    def restore(self, saved: dict[str, Any], step: int, indexed: Params | None) -> None:
        """Goes on as at the checkpoint of `step`, or begins: what is missing of an index being built is encoded again,
        by the encoder `indexed`; without one it stays missing.

        Raises `InputError` where the index that was searched is gone.
        """
        self.state = refreshed_at(saved)

        def clear() -> None:
            for path in self._versions():
                other_parts = saved.get("processes") != jax.process_count() and int(path.name) == self.state.building
                if int(path.name) > step or step == 0 or other_parts:  # of steps that are about to be repeated
                    shutil.rmtree(path)

        run_on_process_zero(clear)
        if self.state.searched is not None:
            self.index = refreshed_index(self.rag, self.base, self.folder.parent, self.state.searched)
        begun = self.state.building
        if indexed is not None and begun is not None and begun < self.rag.config.train.steps:
            self._encode(range(step - begun + 1), indexed)

    def should_start(self, step: int, kept: float | None) -> bool:
        """Whether a re-encoding begins after this step; `kept` is what `overlap` told, if it was asked."""
        settings = self.rag.config.refresh
        due = settings.every is not None and step % settings.every == 0
        drifted = settings.min_overlap is not None and kept is not None and kept < settings.min_overlap
        left = self.rag.config.train.steps - step  # at its end the index is built anew in any case
        return (
            self.state.building is None and bool(broadcast_from_process_zero(due or drifted)) and left > settings.steps
        )

    def start(self, step: int) -> None:
        """Begins to build the index anew, after this step of training."""
        self.state = RefreshedIndex(self.state.searched, step)

    def begin_anew(self, step: int, encoder: Params) -> None:
        """Encodes the whole index, as far as it is not there, and searches it from here on."""
        self.start(step)
        self.complete(encoder)

    def advance(self, step: int, indexed: Params | None) -> bool:
        """Encodes the part of this step; True when the new index is the one searched from now on."""
        begun = self.state.building
        if begun is None:
            return False
        self._encode([step - begun], indexed)
        if step - begun + 1 < self.rag.config.refresh.steps:
            return False
        self._switch()
        return True

    def is_complete(self, step: int) -> bool:
        """Whether the index begun after this step is complete."""
        return (version_folder(self.folder.parent, step) / MANIFEST).is_file()

    def complete(self, encoder: Params) -> None:
        """Encodes all parts that are missing of the index that was begun, and switches."""
        with progress_bar("refresh the index", len(self.base), "passages") as advance:
            self._encode(range(self.rag.config.refresh.steps), encoder, advance)
        self._switch()

    def keep_only(self, referred: Iterable[RefreshedIndex]) -> None:
        """Deletes the versions of the index that neither this state nor those of checkpoints refer to."""
        kept = {step for state in (self.state, *referred) for step in (state.searched, state.building)}

        def delete() -> None:
            for path in self._versions():
                if int(path.name) not in kept:
                    shutil.rmtree(path)

        run_on_process_zero(delete)

    def overlap(self, params: Params, encoder: Params, questions: Sequence[str], k: int) -> float:
        """The mean share of the top k that would stay there if the index were built by `encoder` now.

        Sought among 4k documents of each question, so what would come from further below is overlooked.
        """
        queries = self._queries(params, questions)
        _, ids = self.index.search(queries, min(4 * k, len(self.base)), self.mesh)
        distinct, at = np.unique(np.maximum(ids, 0), return_inverse=True)
        vectors = embed_in_memory(self.rag, _on_devices_here(encoder), self._rows(distinct.tolist()))
        fresh = np.einsum("BD,BKD->BK", queries, vectors[at.reshape(ids.shape)])
        best = np.argsort(-np.where(ids >= 0, fresh, -np.inf), axis=1, kind="stable")[:, :k]
        return _shared(ids[:, :k], np.take_along_axis(ids, best, 1))

    def compare(self, before: Index, params: Params, questions: Sequence[str], k: int) -> float:
        """The mean share of the top k in another index that are there in this one, too."""
        queries = self._queries(params, questions)
        return _shared(*(index.search(queries, k, self.mesh)[1] for index in (before, self.index)))

    def _queries(self, params: Params, questions: Sequence[str]) -> Float[np.ndarray, "B D"]:
        """Filled up so that the devices divide them."""
        missing = -len(questions) % self.mesh.shape["data"]
        batch = tokenize_questions(self.rag.tokenizers, [*questions, *[questions[0]] * missing])
        return encode_questions(self.rag, params, batch, self.mesh)[: len(questions)]

    def _rows(self, ids: Iterable[int]) -> list[np.ndarray]:
        stream, rows = iter(ids), list[np.ndarray]()
        while some := [self.store[i] for i in islice(stream, TOGETHER)]:
            rows += self.rag.tokenize_passages(some)
        return rows

    def _versions(self) -> list[Path]:
        return [path for path in self.folder.glob("*") if path.name.isdigit()]

    def _encode(self, parts: Iterable[int], encoder: Params | None, advance: Any = lambda count: None) -> None:
        """This process's share of some parts, as far as they are not there; a part is what one step encodes."""
        assert self.state.building is not None and encoder is not None
        steps, processes = self.rag.config.refresh.steps, jax.process_count()
        folder, count = version_folder(self.folder.parent, self.state.building), steps * processes
        if self._placed is None or self._placed[0] != self.state.building:  # the same in all processes
            self._placed = self.state.building, _on_devices_here(encoder)
        for part in parts:
            number = part * processes + jax.process_index()
            start, stop = (len(self.base) * n // count for n in (number, number + 1))
            path = shard_folder(folder, number) / EMBEDDINGS
            if path.exists():
                advance(stop - start)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            embed_to_file(self.rag, self._placed[1], self._rows(range(start, stop)), path, advance)
            write_checksums(path.parent, number=number)

    def _switch(self) -> None:
        begun = self.state.building
        assert begun is not None
        wait_for_all(f"the index begun at step {begun} is encoded")
        folder = version_folder(self.folder.parent, begun)

        def write() -> None:
            if not (folder / MANIFEST).exists():
                manifest = self.base.manifest
                about = {"corpus": manifest["corpus"], "fingerprints": manifest["fingerprints"], "refreshed": begun}
                write_index(folder, self.base.kind, manifest["dtype"], about)

        run_on_process_zero(write)
        self.index.release()
        self._placed = None
        self.index = refreshed_index(self.rag, self.base, self.folder.parent, begun)
        self.state = RefreshedIndex(begun, None)


def refreshed_at(metadata: Mapping[str, Any]) -> RefreshedIndex:
    """What a checkpoint says of the index."""
    return RefreshedIndex(metadata.get("searched"), metadata.get("building"))


def _on_devices_here(encoder: Params) -> Params:
    return put_global(gather_to_host(encoder), replicated(command_mesh("index")))


def version_folder(output: Path, step: int) -> Path:
    """Where the index begun after `step` lies, of the run in `output`."""
    return output / FOLDER / f"{step:06d}"


def refreshed_index(rag: RagPipeline, base: Index, output: Path, step: int) -> Index:
    """The index begun after `step` of the run in `output`. Raises `InputError` where it is missing or damaged."""
    folder = version_folder(output, step)
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder}: the index that this run searched after step {step} is gone; bring it back, or train anew with "
            "another output"
        )
    index = open_index(folder, rag.fingerprints, base.recall, REFRESHED_MEND)
    index.bm25, index.together = base.bm25, base.together  # words stay where they are, too
    if len(index) != len(base):
        raise InputError(f"{folder}: holds {len(index)} passages and {rag.config.index.path} {len(base)}")
    if index.manifest["corpus"]["fingerprint"] != base.manifest["corpus"]["fingerprint"]:
        raise InputError(
            f"{folder}: is of other passages than {rag.config.index.path} holds now; index those of then there, or "
            "train anew with another output"
        )
    return index


def _shared(one: Int[np.ndarray, "B K"], other: Int[np.ndarray, "B K"]) -> float:
    there = one >= 0
    both = (one[:, :, None] == other[:, None, :]).any(axis=2) & there
    return float((both.sum(axis=1) / np.maximum(1, there.sum(axis=1))).mean())
