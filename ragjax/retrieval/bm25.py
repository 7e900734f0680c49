"""BM25 over the passages of an index, by bm25s: which of them share rare words with a question.

index/bm25/*.npy, *.json        as bm25s writes them, without pickle: what each word is worth in each passage
index/bm25/checksums.json       of these files; and of which passages they are, and how their words are weighed

It is built from the passages of a finished index, whatever these came from, in a folder beside its own, and moved there
once it is whole. Words are those by which a passage is searched for answers (`metrics.normalized_words`), of title and
text; a character of a script without spaces is one. They are weighed as Lucene does, with the constants of DPR's BM25
(Karpukhin et al. 2020, section 5).
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from ragjax.checksums import CHECKSUMS, damage_text, damages, read_checksums, write_checksums
from ragjax.data.corpus import RUN
from ragjax.data.passage_store import MEND, PassageStore
from ragjax.errors import InputError, library_errors
from ragjax.files import PARTIAL, exclusive_lock
from ragjax.metrics import normalized_words
from ragjax.retrieval.faiss_index import CHECKED_AT_ONCE
from ragjax.terminal import progress_bar

BM25 = "bm25"
WEIGHTS = {"method": "lucene", "k1": 0.9, "b": 0.4}
WORDS = 1  # changes with what a word is


class Bm25Index:
    """The words of N passages, memory-mapped."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self._engine, self._folder = engine, folder

    def search(
        self, questions: Sequence[str], count: int
    ) -> tuple[Float32[np.ndarray, "B M"], Int32[np.ndarray, "B M"]]:
        """The M = `count` passages of the highest BM25 for each of B questions: scores and ids, equal ones by id.

        A passage without any of a question's words is no hit; where there are fewer, the id is -1 and the score -inf.
        """
        scores = np.full((len(questions), count), -np.inf, np.float32)
        ids = np.full((len(questions), count), -1, np.int32)
        for b, question in enumerate(questions):
            numbers = [self._engine.vocab_dict.get(word) for word in normalized_words(question).split()]
            if not (vocabulary_ids := [number for number in numbers if number is not None]):
                continue
            with library_errors(f"{self._folder}: is damaged", MEND):
                every = self._engine.get_scores_from_ids(vocabulary_ids)
            found = np.flatnonzero(every > 0)
            if len(found) > count:  # and all that tie with the last one
                least = np.partition(every[found], len(found) - count)[len(found) - count]
                found = found[every[found] >= least]
            best = found[np.lexsort((found, -every[found]))[:count]]
            scores[b, : len(best)], ids[b, : len(best)] = every[best], best
        return scores, ids


def check_bm25(count: int) -> None:
    """Raises `InputError` where `retriever.bm25_docs` asks for BM25 documents, and bm25s is not installed."""
    if count and find_spec("bm25s") is None:
        raise InputError("retriever.bm25_docs needs an extra: pip install 'ragjax[bm25]'")


def build_bm25(folder: Path, passages: str) -> bool:
    """Builds FOLDER/bm25 over the passages of the index in `folder`; False where it is there and whole.

    `passages` is the fingerprint of these, by which a change of the corpus is noticed. The host holds 4 bytes a word of
    the corpus and about 30 for each word of each passage that differs. Raises `InputError` for a full disk, and while
    another process builds it.
    """
    target, about = folder / BM25, _about(passages)
    if _is_whole(target, about):
        return False
    partial = folder / (BM25 + PARTIAL)
    with exclusive_lock(partial, "builds this index's BM25; wait for it"):
        new = partial / BM25
        shutil.rmtree(new, ignore_errors=True)
        try:
            engine = _build(PassageStore.open(folder))
            with library_errors(f"{target}: cannot be written", "free some space"):
                engine.save(new, show_progress=False)
                write_checksums(new, **about)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(new, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return True


def open_bm25(folder: Path, passages: str, count: int) -> Bm25Index:
    """Maps what `build_bm25` wrote for the index in `folder`, which has N = `count` passages of this fingerprint.

    Raises `InputError` where it is missing, damaged, of other passages or of another ragjax.
    """
    target = folder / BM25
    if not target.is_dir():
        raise InputError(f"{folder}: retriever.bm25_docs needs BM25, which this index lacks; {RUN}, which adds it")
    try:
        about = read_checksums(target)
    except InputError as error:
        raise InputError(f"{error}; {MEND}") from None
    if any(about.get(key) != value for key, value in _about(passages).items()):
        raise InputError(f"{target}: is of other passages, or of another ragjax; {RUN}, which builds it anew")
    if damage := damages(target, about["files"], most=CHECKED_AT_ONCE):
        raise InputError(f"{target}: is damaged ({damage_text(damage)}); {MEND}")
    with library_errors(f"{target}: is damaged", MEND):
        import bm25s

        engine = bm25s.BM25.load(target, mmap=True, show_progress=False, backend="numpy")
        data, indices, starts = (engine.scores[name] for name in ("data", "indices", "indptr"))
        sizes = engine.scores["num_docs"], len(starts), len(data), len(indices)
        if sizes != (count, len(engine.vocab_dict) + 1, starts[-1], starts[-1]):
            raise ValueError("its sizes disagree")
    return Bm25Index(engine, target)


def _build(store: PassageStore) -> Any:
    import bm25s

    vocabulary: dict[str, int] = {}
    rows = []
    with progress_bar("build BM25", len(store), "passages") as advance:
        for passage in store:
            words = normalized_words(f"{passage.title} {passage.text}").split()
            rows.append(array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in words]))
            advance()
    engine = bm25s.BM25(**WEIGHTS, backend="numpy")
    with np.errstate(invalid="ignore"):  # where no passage has a word
        engine.index((rows, vocabulary), create_empty_token=False, show_progress=False)
    return engine


def _about(passages: str) -> dict[str, Any]:
    return {"passages": passages, "words": WORDS} | WEIGHTS


def _is_whole(target: Path, about: dict[str, Any]) -> bool:
    if not (target / CHECKSUMS).is_file():
        return False
    try:
        there = read_checksums(target)
    except InputError:
        return False
    return all(there.get(key) == value for key, value in about.items()) and not damages(target, there["files"])
