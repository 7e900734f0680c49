"""What a training step reads: questions, one batch after the other, with the documents retrieved for them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from ragjax.data.answer_matching import has_answer
from ragjax.data.passage_store import PassageStore
from ragjax.data.question_batch import (
    QuestionBatch,
    drop_unfit_questions,
    question_batch,
    tokenize_answer,
    tokenize_questions,
)
from ragjax.data.question_sampler import QuestionSampler, SampledQuestions, UsableAnswers, usable_answers
from ragjax.data.questions import Question, Split
from ragjax.models.layers import Params
from ragjax.parallel.sharding import allgather_rows, gather_to_host, local_rows, shard_batch
from ragjax.rag import RagPipeline
from ragjax.retrieval.index import Index
from ragjax.retrieval.retrieve import add_bm25, begin_encoding, encode_questions, search
from ragjax.terminal import terminal
from ragjax.training.batch import DocumentBatch, TrainBatch, attach_documents, widen, widths
from ragjax.training.contrastive import attach_passages, choose_passages

Pair = tuple[Question, str]  # and the answer to train on
# a batch, the metrics of its retrieval, and how many tokens; where the step itself retrieves, it says the latter two
LoadedBatch = tuple[DocumentBatch | QuestionBatch, dict[str, float], int]


@dataclass(frozen=True)
class TrainQuestions:
    """Questions, and which of them and of their answers can be trained on."""

    questions: Sequence[Question]
    usable: UsableAnswers

    @property
    def fingerprint(self) -> str:
        """ "sha256:…" over what is trained on: a file from which only unusable questions were deleted has the same."""
        pairs = zip(self.usable.questions, self.usable.answers, strict=True)
        content = [[(q := self.questions[i]).question, [q.answers[a] for a in which], q.passages] for i, which in pairs]
        return f"sha256:{hashlib.sha256(json.dumps(content).encode()).hexdigest()}"

    def pairs(self, sample: SampledQuestions) -> list[Pair]:
        """The questions of a sample, each with the answer to train on."""
        usable = self.usable
        return [
            (question := self.questions[usable.questions[i]], question.answers[usable.answers[i][a]])
            for i, a in zip(sample.questions, sample.answers, strict=True)
        ]


def train_questions(rag: RagPipeline, questions: Sequence[Question]) -> TrainQuestions:
    """What can be trained on; says how many answers are too long. Raises `InputError` where all are."""
    # what is not generated may be as long as it likes
    longest = rag.config.generator.max_answer_tokens if rag.config.train.objective == "marginal" else sys.maxsize
    tokenizers = rag.tokenizers
    usable = usable_answers(questions, lambda answer: tokenize_answer(tokenizers, answer), longest)
    if usable.answers_dropped:
        terminal.print(
            f"{usable.answers_dropped} answers are longer than generator.max_answer_tokens={longest} and are not "
            f"trained on, for example {usable.example!r}; questions that have no other: {usable.questions_dropped}",
            soft_wrap=True,
        )
    return TrainQuestions(questions, usable)


def trainable_questions(rag: RagPipeline, split: Split) -> tuple[TrainQuestions, Split]:
    """What of a split can be trained on, and the split, in which the rest is left out.

    Raises `InputError` as `drop_unfit_questions` does, and where no answer fits.
    """
    marginal = rag.config.train.objective == "marginal"  # else the generator reads nothing
    split = drop_unfit_questions(rag.tokenizers, split, documents=marginal, closed_book=False)
    questions = train_questions(rag, split.questions)
    why = f"every answer is longer than generator.max_answer_tokens={rag.config.generator.max_answer_tokens}"
    kept = set(questions.usable.questions)
    problems = [None if i in kept else why for i in range(len(split.questions))]
    return questions, split.without(problems).checked(rag.config.questions.strict)


@dataclass
class BatchBuilder:
    """Makes batches on the mesh: tokenises questions, searches, attaches documents, shards.

    Each process attaches documents to the questions on its own devices.
    """

    rag: RagPipeline
    index: Index
    store: PassageStore
    mesh: Mesh
    positions: dict[str, int]  # for contrastive training, of the passages that questions name

    @property
    def contrastive(self) -> bool:
        """Whether documents are looked for among which to choose, and not those to train on."""
        return self.rag.config.train.objective == "contrastive"

    @property
    def depth(self) -> int:
        """How many documents the encoder finds of a question: those to train on, or among which to look for them."""
        train = self.rag.config.train
        return min(train.mined_negatives, len(self.index)) if self.contrastive else train.num_docs

    def tokenize(self, pairs: Sequence[Pair], widest: bool = False) -> QuestionBatch:
        """The tokens of all these questions, and so of the same widths in every process; see `question_batch`."""
        if self.contrastive:
            return tokenize_questions(self.rag.tokenizers, _texts(pairs))
        return question_batch(self.rag.tokenizers, _texts(pairs), [answer for _, answer in pairs], widest)

    def search(self, params: Params, pairs: Sequence[Pair], questions: QuestionBatch) -> Int[np.ndarray, "B M"]:
        """The M documents of each question, in every process: `depth` and what `add_bm25` adds."""
        return self.complete(*search(self.rag, params, self.index, questions, self.depth, self.mesh), pairs)

    def complete(
        self,
        queries: Float[np.ndarray, "B D"],
        scores: Float[np.ndarray, "B k"],
        ids: Int[np.ndarray, "B k"],
        pairs: Sequence[Pair],
    ) -> Int[np.ndarray, "B M"]:
        """The M documents of each question of which k were found; every process has all, before and after."""
        if not self.rag.config.retriever.bm25_docs:
            return ids
        rows = self.rows(pairs)
        own = self.add_bm25(queries[rows], scores[rows], ids[rows], [pairs[i] for i in rows])
        return allgather_rows(self.mesh, own, len(pairs))

    def rows(self, pairs: Sequence[Pair]) -> Int[np.ndarray, " n"]:
        """Which of these questions are on this process's devices."""
        return local_rows(self.mesh, len(pairs))

    def search_host(self, queries: Float[np.ndarray, "n D"], pairs: Sequence[Pair]) -> Int[np.ndarray, "n M"]:
        """As `search`, by FAISS alone, for the questions of this process."""
        return self.add_bm25(queries, *self.index.search(queries, self.depth), pairs)

    def add_bm25(
        self,
        queries: Float[np.ndarray, "n D"],
        scores: Float[np.ndarray, "n k"],
        ids: Int[np.ndarray, "n k"],
        pairs: Sequence[Pair],
    ) -> Int[np.ndarray, "n M"]:
        """With `retriever.bm25_docs` more; in contrastive training with BM25's own `depth`, from which to choose."""
        if not (count := self.rag.config.retriever.bm25_docs):
            return ids
        if not self.contrastive:
            return add_bm25(self.index, queries, scores, ids, _texts(pairs), count)[1]
        assert self.index.bm25 is not None
        return np.concatenate([ids, self.index.bm25.search(_texts(pairs), self.depth)[1]], axis=1)

    def load(self, params: Params, pairs: Sequence[Pair]) -> LoadedBatch:
        """The batch of these questions with the documents that the retriever's `params` find, searched here."""
        questions = self.tokenize(pairs)
        return self.attach(pairs, questions, self.search(params, pairs, questions))

    def attach(
        self, pairs: Sequence[Pair], questions: QuestionBatch, ids: Int[np.ndarray, "B M"] | None
    ) -> LoadedBatch:
        """The batch of these questions with their documents `ids`; without ids the step itself retrieves."""
        rows = local_rows(self.mesh, len(pairs))
        local = questions.take(rows)
        if ids is None:
            return shard_batch(self.mesh, local, len(pairs)), {}, 0
        batch: DocumentBatch
        if self.contrastive:
            own = [pairs[i][0] for i in rows]
            passages = self._choose(own, ids[rows], len(ids))
            batch = attach_passages(self.rag, self.index, self.store, own, local, passages)
        else:
            batch = attach_documents(self.rag, self.index, self.store, local, ids[rows])
        # widths are agreed, since all run one program
        counts = np.stack([_tokens(batch), *(np.full(len(rows), width) for width in widths(batch))], axis=1)
        counts = allgather_rows(self.mesh, counts.astype(np.int32), len(pairs))
        batch = shard_batch(self.mesh, widen(batch, counts[:, 1:].max(axis=0).tolist()), len(pairs))
        return batch, self.retrieval_metrics(pairs, ids), int(counts[:, 0].sum())

    def _choose(self, questions: Sequence[Question], ids: Int[np.ndarray, "n M"], count: int) -> Int[np.ndarray, "C K"]:
        """The passages that each of all C = `count` questions brings: they count for every question."""
        negatives, more = self.rag.config.train.num_docs - 1, self.rag.config.retriever.bm25_docs

        def choose(question: Question, row: Int[np.ndarray, " M"]) -> Int[np.ndarray, " K"]:
            rankings = [(row[: self.depth], negatives), *([(row[self.depth :], more)] if more else [])]
            return choose_passages(self.store, question, rankings, self.positions)

        own = [choose(question, row) for question, row in zip(questions, ids, strict=True)]
        return allgather_rows(self.mesh, np.stack(own), count)

    def retrieval_metrics(self, pairs: Sequence[Pair], ids: Int[np.ndarray, "B M"]) -> dict[str, float]:
        """The share of questions with a document that answers among the K, and of documents that differ.

        In contrastive training the K are the encoder's best.
        """
        train = self.rag.config.train
        rows, ids = local_rows(self.mesh, len(pairs)), ids[:, : train.num_docs] if self.contrastive else ids
        hits = np.array([has_answer(self.store, pairs[i][0], ids[i]).any() for i in rows])
        valid = ids[ids >= 0]
        return {
            "recall": float(allgather_rows(self.mesh, hits, len(pairs)).mean()),
            "distinct_documents": len(np.unique(valid)) / max(1, valid.size),
        }


def _texts(pairs: Sequence[Pair]) -> list[str]:
    return [question.question for question, _ in pairs]


def _tokens(batch: DocumentBatch) -> Int[np.ndarray, " n"]:
    """How many tokens the models read, and the generator writes, of each question and its documents."""
    if isinstance(batch, TrainBatch):
        _, answer_mask = batch.questions.answers
        return batch.source_mask.sum(axis=(1, 2)) + answer_mask.sum(axis=1) * batch.valid.shape[1]
    tokens = batch.questions.question_mask.sum(axis=1)
    return tokens if batch.passage_mask is None else tokens + batch.passage_mask.sum(axis=(1, 2))


@dataclass
class _NextStep:
    """What there is of the next step's questions while a step runs."""

    pairs: list[Pair]
    questions: QuestionBatch
    # while they are sought by FAISS, or on the devices with queries and scores; None where the step itself retrieves
    ids: Future[Any] | tuple[jax.Array, ...] | Int[np.ndarray, "B M"] | None
    batch: tuple[Index, LoadedBatch] | None = None  # with vectors of that index


class TrainLoader:
    """The questions of one step after the other, with their documents, unless the step itself retrieves.

    With `train.prefetch_retrieval` FAISS looks for the next step's documents in a thread while a step runs, and devices
    look for them just before it. Checkpoints keep their ids, so that a resumed run goes on with the very same.
    `read_ahead` assembles the next batch while a step runs, so that devices need not wait for it. Use as a context
    manager.
    """

    def __init__(
        self, builder: BatchBuilder, sampler: QuestionSampler, questions: TrainQuestions, saved: Mapping[str, Any]
    ) -> None:
        """`saved` is a checkpoint's metadata, with what `state` returned; empty at the beginning of a run."""
        self.builder, self.sampler, self.questions = builder, sampler, questions
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._next: _NextStep | None = None
        self._position: dict[str, Any] | None = None  # in the data, before the next step's questions
        self.same_questions = sampler.restore(saved["data"]) if saved else True
        if self.same_questions and saved.get("ahead") is not None:
            self._position = saved["data"]
            self._next = self._draw(np.array(saved["ahead"], np.int32))

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def take(self, params: Params) -> tuple[list[Pair], LoadedBatch]:
        """The next step's questions and batch, with the documents that `params` find if none were looked for before."""
        step, self._next = self._next, None
        if step is not None:
            if step.batch is not None and step.batch[0] is self.builder.index:
                return step.pairs, step.batch[1]
            return step.pairs, self.builder.attach(step.pairs, step.questions, self._ids(step))
        step, builder = self._draw(), self.builder
        fused = builder.rag.config.train.fused_retrieval
        ids = None if fused else builder.search(params, step.pairs, step.questions)
        return step.pairs, builder.attach(step.pairs, step.questions, ids)

    def look_ahead(self, params: Params) -> None:
        """Begins to search for what `take` gives next."""
        builder, self._position = self.builder, self.sampler.state()
        step = self._draw()
        if builder.index.on_devices:
            found = begin_encoding(builder.rag, params, step.questions, builder.mesh)
            step.ids = found, *builder.index.begin_search(found, builder.depth, builder.mesh)
        else:
            queries, rows = (
                encode_questions(builder.rag, params, step.questions, builder.mesh),
                builder.rows(step.pairs),
            )
            step.ids = self._pool.submit(builder.search_host, queries[rows], [step.pairs[i] for i in rows])
        self._next = step

    def read_ahead(self) -> None:
        """Assembles what `take` gives next, if it does not depend on the parameters of the step that runs."""
        if self._next is None and self.builder.rag.config.train.fused_retrieval:
            self._position = self.sampler.state()
            self._next = self._draw()
        if (step := self._next) is not None:
            ids = self._ids(step)
            step.batch = self.builder.index, self.builder.attach(step.pairs, step.questions, ids)

    def state(self) -> dict[str, Any]:
        """As JSON, what a run needs to go on with the next step: the position in the data, and ids searched ahead."""
        if self._next is None:
            return {"data": self.sampler.state(), "ahead": None}
        ids = self._ids(self._next)
        return {"data": self._position, "ahead": None if ids is None else ids.tolist()}

    def _draw(self, ids: Int[np.ndarray, "B M"] | None = None) -> _NextStep:
        pairs = self.questions.pairs(next(self.sampler))
        return _NextStep(pairs, self.builder.tokenize(pairs, widest=self.builder.rag.config.train.fused_retrieval), ids)

    def _ids(self, step: _NextStep) -> Int[np.ndarray, "B M"] | None:
        ids = step.ids
        if isinstance(ids, Future):
            ids = step.ids = allgather_rows(self.builder.mesh, ids.result(), len(step.pairs))
        elif isinstance(ids, tuple):
            queries, scores, found = gather_to_host(ids)
            ids = step.ids = self.builder.complete(queries, scores, found, step.pairs)
        return ids
