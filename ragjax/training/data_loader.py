"""What a training step reads: questions, one batch after the other, with the documents found for them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from ragjax.data.answer_matching import has_answer
from ragjax.data.passage_store import PassageStore
from ragjax.data.question_sampler import QuestionSampler, SampledQuestions, UsableAnswers, usable_answers
from ragjax.data.questions import Question, Split
from ragjax.models.layers import Params
from ragjax.parallel.sharding import allgather_rows, local_rows, shard_batch
from ragjax.rag import RagPipeline, drop_unfit_questions, tokenize_answer
from ragjax.retrieval.index import Index
from ragjax.retrieval.retrieve import encode_questions, search
from ragjax.terminal import terminal
from ragjax.training.batch import TrainBatch, train_batch, widen, widths
from ragjax.training.contrastive import ContrastiveBatch, choose_passages, contrastive_batch
from ragjax.training.fused_retrieval import QuestionBatch, question_batch

Pair = tuple[Question, str]  # and the answer to train on
# a batch, what retrieval alone tells, and how many tokens
LoadedBatch = tuple[TrainBatch | ContrastiveBatch | QuestionBatch, dict[str, float], int]


@dataclass(frozen=True)
class TrainQuestions:
    """Questions, and which of them and of their answers can be trained on."""

    questions: Sequence[Question]
    usable: UsableAnswers

    @property
    def fingerprint(self) -> str:
        """ "sha256:…" over what is trained on: a file from which only unusable questions were deleted has the same."""
        chosen = zip(self.usable.questions, self.usable.answers, strict=True)
        told = [[(q := self.questions[i]).question, [q.answers[a] for a in which], q.passages] for i, which in chosen]
        return f"sha256:{hashlib.sha256(json.dumps(told).encode()).hexdigest()}"

    def pairs(self, chosen: SampledQuestions) -> list[Pair]:
        of = self.usable
        return [
            (question := self.questions[of.questions[i]], question.answers[of.answers[i][a]])
            for i, a in zip(chosen.questions, chosen.answers, strict=True)
        ]


def train_questions(rag: RagPipeline, questions: Sequence[Question]) -> TrainQuestions:
    # what is not generated may be as long as it likes
    longest = rag.config.generator.answer_tokens if rag.config.train.objective == "marginal" else sys.maxsize
    usable = usable_answers(questions, lambda answer: tokenize_answer(rag, answer), longest)
    if usable.answers_dropped:
        terminal.print(
            f"{usable.answers_dropped} answers are longer than generator.answer_tokens={longest} and are not trained "
            f"on, for example {usable.example!r}; {usable.questions_dropped} questions have no other",
            soft_wrap=True,
        )
    return TrainQuestions(questions, usable)


def trainable_questions(rag: RagPipeline, split: Split) -> tuple[TrainQuestions, Split]:
    """What of a split can be trained on, and the split, in which the rest is left out.

    Raises `InputError` as `fitting` does, and where no answer fits.
    """
    marginal = rag.config.train.objective == "marginal"  # else the generator reads nothing
    split = drop_unfit_questions(rag, split, documents=marginal, closed_book=False)
    asked = train_questions(rag, split.questions)
    why = f"every answer is longer than generator.answer_tokens={rag.config.generator.answer_tokens}"
    kept = set(asked.usable.questions)
    problems = [None if i in kept else why for i in range(len(split.questions))]
    return asked, split.without(problems).checked(rag.config.questions.strict)


@dataclass
class BatchBuilder:
    """Makes batches on the mesh of questions and what is found for them. Each process reads for its own devices."""

    rag: RagPipeline
    index: Index
    store: PassageStore
    mesh: Mesh
    positions: dict[str, int]  # for contrastive training, of the passages that questions name

    @property
    def depth(self) -> int:
        """How many documents are retrieved for a question: those to train on, or among which to look for them."""
        train = self.rag.config.train
        return min(train.mined, len(self.index)) if train.objective == "contrastive" else train.k

    def search(self, params: Params, pairs: Sequence[Pair]) -> Int[np.ndarray, "B M"]:
        texts = [question.question for question, _ in pairs]
        return search(self.rag, params, self.index, texts, self.depth, self.mesh)[2]

    def read(self, pairs: Sequence[Pair], ids: Int[np.ndarray, "B M"] | None) -> LoadedBatch:
        """The batch of these questions; without ids the step retrieves, and tells."""
        mine = local_rows(self.mesh, len(pairs))
        texts, answers = [pairs[i][0].question for i in mine], [pairs[i][1] for i in mine]
        if ids is None:
            return shard_batch(self.mesh, question_batch(self.rag, texts, answers, mine), len(pairs)), {}, 0
        arrays: TrainBatch | ContrastiveBatch
        if self.rag.config.train.objective == "contrastive":
            arrays = self._contrast([pairs[i][0] for i in mine], ids, mine)
            tokens = arrays.question_mask.sum(axis=1)
            if arrays.passage_mask is not None:
                tokens = tokens + arrays.passage_mask.sum(axis=(1, 2))
        else:
            arrays = train_batch(self.rag, self.index, self.store, texts, answers, ids[mine], mine)
            tokens = arrays.source_mask.sum(axis=(1, 2)) + arrays.answer_mask.sum(axis=1) * ids.shape[1]
        # widths are agreed, since all run one program
        of_rows = np.stack([tokens, *(np.full(len(mine), width) for width in widths(arrays))], axis=1).astype(np.int32)
        of_rows = allgather_rows(self.mesh, of_rows, len(pairs))
        widest = widen(arrays, of_rows[:, 1:].max(axis=0).tolist())
        return shard_batch(self.mesh, widest, len(pairs)), self.shown(pairs, ids), int(of_rows[:, 0].sum())

    def _contrast(
        self, questions: Sequence[Question], ids: Int[np.ndarray, "B M"], mine: Int[np.ndarray, " n"]
    ) -> ContrastiveBatch:
        """What these questions learn from is chosen here, and known to all: it counts for every question."""
        k = self.rag.config.train.k
        chosen = [
            choose_passages(self.store, question, ids[i], k, self.positions)
            for question, i in zip(questions, mine, strict=True)
        ]
        of_all = allgather_rows(self.mesh, np.stack(chosen), len(ids))
        return contrastive_batch(self.rag, self.index, self.store, questions, of_all, mine)

    def shown(self, pairs: Sequence[Pair], ids: Int[np.ndarray, "B M"]) -> dict[str, float]:
        """How many questions found a document that answers among the top k, and how many of these differ."""
        mine, ids = local_rows(self.mesh, len(pairs)), ids[:, : self.rag.config.train.k]
        hits = np.array([has_answer(self.store, pairs[i][0], ids[i]).any() for i in mine])
        valid = ids[ids >= 0]
        return {
            "recall": float(allgather_rows(self.mesh, hits, len(pairs)).mean()),
            "distinct_documents": len(np.unique(valid)) / max(1, valid.size),
        }


class TrainLoader:
    """The questions of one step after the other, with their documents, unless the step itself retrieves.

    With `train.search_ahead` FAISS looks for the next step's documents in a thread while a step runs. Checkpoints keep
    what it found, so that a resumed run goes on with the very same. What is known of the next step by then is also read
    while a step runs, so that devices need not wait for it. Use as a context manager.
    """

    def __init__(
        self, reader: BatchBuilder, batches: QuestionSampler, asked: TrainQuestions, saved: Mapping[str, Any]
    ) -> None:
        """`saved` is a checkpoint's metadata, with what `state` gave."""
        self.reader, self.batches, self.asked = reader, batches, asked
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[list[Pair], Future[Any] | np.ndarray | None] | None = None
        self._position: dict[str, Any] | None = None  # in the data, before what was looked ahead for
        self._read: tuple[Index, LoadedBatch] | None = None  # with vectors of that index
        self.same_questions = batches.restore(saved["data"]) if saved else True
        if self.same_questions and saved.get("ahead") is not None:
            self._position = saved["data"]
            self._ahead = asked.pairs(next(batches)), np.array(saved["ahead"], np.int32)

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def take(self, params: Params) -> tuple[list[Pair], LoadedBatch]:
        """The next questions, read with the documents that the retriever's `params` find if none were sought before."""
        reader = self.reader
        if self._ahead is None:
            pairs = self.asked.pairs(next(self.batches))
            return pairs, reader.read(pairs, None if reader.rag.config.train.fused else reader.search(params, pairs))
        (pairs, _), ids, read = self._ahead, self._found(), self._read
        self._ahead = self._read = None
        return pairs, read[1] if read and read[0] is reader.index else reader.read(pairs, ids)

    def look_ahead(self, params: Params) -> None:
        """Begins to search for what `take` gives next."""
        reader, self._position = self.reader, self.batches.state()
        pairs = self.asked.pairs(next(self.batches))
        queries = encode_questions(reader.rag, params, [question.question for question, _ in pairs], reader.mesh)
        mine = queries[local_rows(reader.mesh, len(pairs))]
        self._ahead = pairs, self._pool.submit(lambda: reader.index.search(mine, reader.depth)[1])

    def read_ahead(self) -> None:
        """Reads what `take` gives next, if it does not hang on the parameters of the step that runs."""
        if self._ahead is None and self.reader.rag.config.train.fused:
            self._position = self.batches.state()
            self._ahead = self.asked.pairs(next(self.batches)), None
        if self._ahead is not None:
            self._read = self.reader.index, self.reader.read(self._ahead[0], self._found())

    def state(self) -> dict[str, Any]:
        """As JSON, what a run needs to go on with the next step."""
        if self._ahead is None:
            return {"data": self.batches.state(), "ahead": None}
        ids = self._found()
        return {"data": self._position, "ahead": None if ids is None else ids.tolist()}

    def _found(self) -> Int[np.ndarray, "B K"] | None:
        assert self._ahead is not None
        pairs, ids = self._ahead
        if isinstance(ids, Future):
            ids = allgather_rows(self.reader.mesh, ids.result(), len(pairs))
            self._ahead = pairs, ids
        return ids
