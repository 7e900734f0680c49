"""Vectors that somebody else computed, taken over: matched with the passages of the corpus, and believed once some
passages, embedded anew, agree with theirs.

Of each passage 8 bytes are kept, and 24 where the vectors have ids and another order than the corpus.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, UInt64
from xxhash import xxh3_64_intdigest

from ragjax.data.corpus import Passage
from ragjax.errors import InputError
from ragjax.files import shown
from ragjax.rag import RagPipeline
from ragjax.retrieval.embeddings import EncodedBatch
from ragjax.retrieval.encoder import embed_in_memory, indexing_params
from ragjax.retrieval.vector_files.source import IDS_BESIDE, VectorSource
from ragjax.terminal import progress_bar, terminal

CHECKED = 64  # passages that are embedded anew
AGREES = 0.99  # the least cosine: half precision, and passages cut at other lengths by a few tokens, stay above it
LENGTH = 0.02  # by so much of its length a vector may differ
ONE = 2e-6  # what the squared length of a vector of length 1 may miss in float32
TOGETHER = 2048  # vectors that are held at a time
NAMED = 3  # ids that a message lists


class Takeover:
    """The vectors of `source` for the passages of a corpus. `visit` sees each passage first, then `match` decides."""

    def __init__(self, rag: RagPipeline, source: VectorSource) -> None:
        if source.width != (width := rag.passage_encoder.config.embedding_dim):
            raise InputError(
                f"{source.source}: its vectors have {source.width} dimensions, and those of the encoder of passages "
                f"{width}; name the one that they were made with by retriever.source or retriever.passage_encoder"
            )
        self.rag, self.source = rag, source
        self._more = rag.config.corpus.max_passages is not None  # vectors that no passage asks for are no mistake then
        self._ids, self._random = array("Q"), random.Random(rag.config.seed)
        self._sample: list[tuple[int, Passage]] = []

    def visit(self, passage: Passage, _: bytes) -> None:
        """Notes a passage of the corpus; each of them has the same chance to be among those embedded anew."""
        position = len(self._ids)
        self._ids.append(_key(passage.id))
        if position < CHECKED:
            self._sample.append((position, passage))
        elif (place := self._random.randrange(position + 1)) < CHECKED:
            self._sample[place] = position, passage

    def match(self, read: Callable[[], Iterable[Passage]]) -> dict[str, Any]:
        """Checks that each passage has its vector and some have the right one; what the manifest says of all this.

        `read` gives the corpus anew, to name passages. Raises `InputError` where the vectors are not of this corpus, or
        not of this encoder.
        """
        by_id = self.source.ids is not None and not self._same_order(read)
        positions = np.array([position for position, _ in self._sample])
        rows = self._rows([passage.id for _, passage in self._sample]) if by_id else positions
        agreement = self._check(self.source.read(rows))
        width, dtype = self.source.width, self.source.parts[0].dtype
        how = f"by the ids {self.source.ids_from}" if self.source.ids else "its rows taken in the corpus' order"
        terminal.print(
            f"{self.source.source}: {len(self.source):,} vectors × {width}, {dtype}, {how}; "
            f"{len(positions)} passages embedded anew agree, by a cosine of {agreement['least']:.5f} or more",
            soft_wrap=True,
        )
        return self.source.description() | {"by_id": by_id, "agreement": agreement}

    def embeddings(self, by_id: bool) -> Callable[[Sequence[Passage], int], Iterator[EncodedBatch]]:
        """What gives the embeddings of passages that stand at some position, in pieces."""

        def read(passages: Sequence[Passage], start: int) -> Iterator[EncodedBatch]:
            for at in range(0, len(passages), TOGETHER):
                some = passages[at : at + TOGETHER]
                rows = self._rows([p.id for p in some]) if by_id else np.arange(start + at, start + at + len(some))
                yield np.arange(at, at + len(some)), self._normalized(self.source.read(rows), some)

        return read

    def _same_order(self, read: Callable[[], Iterable[Passage]]) -> bool:
        """Whether the ids of the vectors are those of the corpus in the same order. Raises `InputError` where a passage
        has no vector, two have one, or a vector has no passage.
        """
        ours, theirs = np.frombuffer(self._ids, np.uint64), self._source_ids
        if len(theirs) != len(self.source):
            raise InputError(
                f"{self.source.source}: there are {len(self.source):,} vectors, and {len(theirs):,} ids "
                f"{self._place_of_ids}; there must be one for each"
            )
        if np.array_equal(ours, theirs[: len(ours)]) and (self._more or len(ours) == len(theirs)):
            return True
        ordered = theirs[self._order]
        if len(twice := np.unique(ordered[1:][ordered[1:] == ordered[:-1]])):
            raise self._refused("{} ids stand twice", len(twice), self._names(twice), "delete one of the vectors")
        if len(lacking := np.setdiff1d(ours, ordered)):
            keys = set(lacking.tolist())
            some = list(islice((passage.id for passage in read() if _key(passage.id) in keys), NAMED))
            what = f"{{}} of {len(ours):,} passages have no vector"
            raise self._refused(
                what, len(lacking), some, "embed them as the others, or take the corpus that the vectors are of"
            )
        if not self._more and len(unknown := np.setdiff1d(ordered, ours)):
            what = f"{{}} of {len(theirs):,} vectors are of passages that the corpus does not have"
            raise self._refused(what, len(unknown), self._names(unknown), "take the corpus that the vectors are of")
        return False

    def check_count(self, count: int) -> None:
        """Raises `InputError` where vectors without ids are not as many as there are passages."""
        have = len(self.source)
        if self.source.ids is None and (have < count or (have > count and not self._more)):
            names = ", ".join(name.format(stem=self.source.files[0].stem) for name in IDS_BESIDE)
            raise InputError(
                f"{self.source.source}: there are {have:,} vectors, and {count:,} passages in the corpus; without ids "
                f"there must be one for each, in the same order; ids stand beside the vectors, in one of {names}"
            )

    def _check(self, vectors: Float32[np.ndarray, "n D"]) -> dict[str, Any]:
        """How well the encoder agrees with the vectors of the sample. Raises `InputError` where it does not."""
        passages, settings = [passage for _, passage in self._sample], self.rag.config.retriever
        vectors = self._normalized(vectors, passages)
        params = indexing_params(self.rag)
        expected = embed_in_memory(self.rag, params, self.rag.tokenize_passages(passages))
        lengths = np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected, axis=1)
        cosines = np.einsum("nD,mD->nm", _unit(vectors), _unit(expected))
        own = np.diagonal(cosines)
        found = {"passages": len(own), "least": float(own.min()), "median": float(np.median(own))}
        encoder = self.rag.passage_encoder.config
        about = f"{self.source.source}: {len(own)} of its vectors were compared with new embeddings of their passages"
        if own.min() < AGREES:
            strangers = int((cosines.max(axis=0) > own + 1e-3).sum())
            others = ""
            if 2 * strangers >= len(own):
                others = f"; {strangers} are nearer to the vector of another passage: is the order right?"
            raise InputError(
                f"{about}: the cosine is {own.min():.4f} at least and {np.median(own):.4f} in the median, not {AGREES} "
                f"or more{others}; check that {settings.passage_encoder or settings.source} is the model, and "
                f"retriever.pooling ({encoder.pooling}), retriever.normalize ({str(encoder.normalize).lower()}), "
                f"retriever.passage_template ({self.rag.passage_template!r}) and retriever.max_passage_tokens "
                f"({settings.max_passage_tokens})"
            )
        if np.abs(lengths - 1).max() > LENGTH:
            raise InputError(
                f"{about}: they point the same way, but are {np.median(lengths):.3g} times as long; where they were "
                "brought to length 1, set retriever.normalize=true"
            )
        return found

    def _normalized(self, vectors: Float32[np.ndarray, "n D"], passages: Sequence[Passage]) -> np.ndarray:
        """Of length 1 where the encoder's are. Raises `InputError` for one that is zero or not finite."""
        squares = np.einsum("nD,nD->n", vectors, vectors)
        bad = np.flatnonzero(~np.isfinite(squares) | (squares == 0))
        if len(bad):
            name = shown(passages[bad[0]].id)
            raise InputError(
                f"{self.source.source}: the vector of passage {name} is zero or not finite; embed it again"
            )
        longer = np.abs(squares - 1) > ONE
        if not (self.rag.passage_encoder.config.normalize and longer.any()):
            return vectors
        return np.where(longer[:, None], _unit(vectors), vectors)  # others stay what they are, to the byte

    def _rows(self, ids: Sequence[str]) -> Int[np.ndarray, " n"]:
        """The rows of passages that have one."""
        keys = np.array([_key(id_) for id_ in ids], np.uint64)
        rows = self._order[np.minimum(np.searchsorted(self._ordered, keys), len(self._order) - 1)]
        if (lost := np.flatnonzero(self._source_ids[rows] != keys)).size:
            raise InputError(f"{self.source.source}: has no vector of passage {shown(ids[lost[0]])} any more")
        return rows

    @cached_property
    def _source_ids(self) -> UInt64[np.ndarray, " N"]:
        assert self.source.ids is not None
        keys = array("Q")
        with progress_bar("read the ids of the vectors", len(self.source), "ids") as advance:
            for id_ in self.source.ids():
                keys.append(_key(id_))
                if len(keys) % TOGETHER == 0:
                    advance(TOGETHER)
            advance(len(keys) % TOGETHER)
        return np.frombuffer(keys, np.uint64)

    @cached_property
    def _order(self) -> Int[np.ndarray, " N"]:
        return np.argsort(self._source_ids, kind="stable")

    @cached_property
    def _ordered(self) -> UInt64[np.ndarray, " N"]:
        return self._source_ids[self._order]

    def _names(self, keys: UInt64[np.ndarray, " n"]) -> list[str]:
        assert self.source.ids is not None
        sought = set(keys.tolist())
        return list(dict.fromkeys(islice((id_ for id_ in self.source.ids() if _key(id_) in sought), NAMED)))

    @property
    def _place_of_ids(self) -> str:
        return self.source.ids_from if self.source.ids_from.startswith("beside") else f"in {self.source.ids_from}"

    def _refused(self, what: str, count: int, names: Sequence[str], cure: str) -> InputError:
        listed = ", ".join([*map(shown, names), *(["…"] if count > len(names) else [])])
        return InputError(f"{self.source.source}: {what.format(f'{count:,}')} ({listed}); {cure}")


def same_source(saved: dict[str, Any] | None, source: VectorSource | None) -> bool:
    """Whether a build that saved this took over the same files, if any."""
    if source is None or saved is None:
        return source is saved
    return all(saved.get(name) == value for name, value in source.description().items())


def has_vectors(saved: dict[str, Any] | None, source: VectorSource) -> bool:
    """Whether an index that saved this was taken over from these files, wherever they lay."""
    return saved is not None and sorted(saved["files"].values()) == sorted(source.description()["files"].values())


def _key(id_: str) -> int:
    return xxh3_64_intdigest(id_.encode("utf-8", "surrogatepass"))


def _unit(vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
