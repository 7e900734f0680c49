"""Answers questions from Python: `ragjax.load(run).answer(["…"])`."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ragjax.answering.answers import Answer, Candidate, Document, Score
from ragjax.answering.batch_answerer import BatchAnswerer, repeat_to_size
from ragjax.answering.given_passages import (
    GivenPassages,
    Retriever,
    embed_given,
    read_passages,
    search_elsewhere,
    weigh_given,
)
from ragjax.config import Config, check_mode, most_documents
from ragjax.data.question_batch import (
    QuestionBatch,
    prompt_problems,
    question_batch,
    tokenize_answer,
    tokenize_questions,
)
from ragjax.data.questions import text_problem
from ragjax.decoding.candidates import Candidates
from ragjax.errors import InputError
from ragjax.files import is_unicode
from ragjax.models.layers import Params
from ragjax.padding import bucket_size, filled_size
from ragjax.parallel.by_device import on_mesh
from ragjax.parallel.mesh import command_mesh
from ragjax.rag import RagPipeline
from ragjax.retrieval.index import check_k
from ragjax.retrieval.passage_cache import check_passage_cache
from ragjax.retrieval.retrieve import RetrievalResult, encode_questions, retrieve
from ragjax.runs.restore import (
    check_answering_fits,
    load_artifacts,
    pretrained_params,
    restore_params,
    trained_index,
)
from ragjax.runs.run_dir import load_run_config
from ragjax.training.loss import passage_params


@dataclass(frozen=True)
class Answerer(BatchAnswerer):
    """Models, index and passages, ready to answer."""

    def answer(
        self,
        questions: str | Sequence[str],
        mode: str | None = None,
        n_best: int | None = None,
        passages: Sequence[Any] | None = None,
        on_documents: Callable[[int, list[Document], float | None], None] | None = None,
    ) -> list[Answer]:
        """Answers questions, `evaluate.batch_size` at a time on each device.

        Args:
            questions: texts; a text alone is one question, and gives a list of one answer.
            mode: `exact`, `thorough`, `certified`, `fast` or `closed_book`; by default as configured.
            n_best: keeps so many candidates of each; by default all.
            passages: texts, {"text": …, "title": …, "id": …}, or documents that `search` gave, which are read in place
                of those of the index, all of them for each question: p(z|x) is over them alone.
            on_documents: called with the number of each question, its documents and the mass outside (see `Answer`),
                before these are read.

        Raises `InputError` for an unknown mode, and, before any is answered, for a question that is empty, no Unicode
        text or too long, naming it, and for passages where the prior is over the corpus; `TypeError` for an argument
        of another type.
        """
        texts = _texts("questions", questions)
        if n_best is not None and _whole_number("n_best", n_best) < 1:
            raise InputError(f"n_best is {n_best}; expected 1 or more")
        mode = self._mode(mode)
        for i, why in enumerate(self.problems(texts, mode)):
            if why:
                raise InputError(f"questions[{i}]: {why}")
        given = self._given(passages, mode)
        answers: list[Answer] = []
        for part in self._parts(texts):
            answers += self._batch(part, mode, n_best, given, partial(_shifted, on_documents, len(answers)))
        return answers

    def search(self, questions: str | Sequence[str], k: int | None = None) -> list[list[Document]]:
        """The k best documents of each question (`decode.num_docs` by default), with p(z|x) over these k, best first.

        Raises `InputError` and `TypeError` as `answer` does, and for more than there are passages.
        """
        texts, config = self._checked_texts(questions), self.rag.config
        k = config.decode.num_docs if k is None else _whole_number("k", k)
        if not 1 <= k <= len(self.index):
            raise InputError(f"k is {k}; expected 1 to {len(self.index)}, the passages of the index")
        found = []
        for part in self._parts(texts):
            batch = tokenize_questions(self.rag.tokenizers, self._filled(part))
            retrieval = retrieve(self.rag, self.params, self.index, batch, k, self.mesh)
            found += [self.documents(retrieval, b) for b in range(len(part))]
        return found

    def embed(self, questions: str | Sequence[str]) -> np.ndarray:
        """The question encoder's embeddings [n, D], float32: p(z|x) ∝ exp(`retriever.logit_scale` · q·d)."""
        texts, parts = self._checked_texts(questions), [np.zeros((0, self.rag.retriever.config.embedding_dim))]
        for part in self._parts(texts):
            batch = tokenize_questions(self.rag.tokenizers, self._filled(part))
            parts.append(encode_questions(self.rag, self.params, batch, self.mesh)[: len(part)])
        return np.concatenate(parts).astype(np.float32)

    def embed_passages(self, passages: Sequence[Any]) -> np.ndarray:
        """The passage encoder's embeddings [n, D], float32, of passages as `answer` takes them."""
        return embed_given(self.rag, self._passage_params, read_passages(passages)).astype(np.float32)

    def score(self, question: str, answers: str | Sequence[str], passages: Sequence[Any] | None = None) -> list[Score]:
        """What given answers to a question are worth, whether or not a beam search would find them.

        They are scored as training does, the end token included, and p(y|x) sums over the documents that `answer`
        would read, or over `passages`. Raises `InputError` and `TypeError` as `answer` does.
        """
        if not isinstance(question, str):
            raise TypeError(f"question: expected a text, not {type(question).__name__}")
        if why := self.problems([question], "thorough")[0]:
            raise InputError(f"question: {why}")
        texts = _texts("answers", answers)
        gold = [self._answer_tokens(i, text) for i, text in enumerate(texts)]
        if not gold:
            return []
        given, whole = self._given(passages, "thorough"), self._filled([question])
        batch = question_batch(self.rag.tokenizers, whole)
        answerer, retrieval, _ = self._find(whole, batch, given)
        padded = repeat_to_size(gold, bucket_size(len(gold)))
        with on_mesh(self.mesh):
            read, ids, prior = answerer.document_reader(batch, retrieval)
            nll, logp = answerer.answer_scores(read(np.arange(ids.size)), prior, [padded] * len(whole))
        documents = answerer.documents(retrieval, 0)
        by_document = logp[0, : len(documents)].sum(axis=-1).T
        return [Score(text, -float(nll[0, c]), by_document[c].tolist(), documents) for c, text in enumerate(texts)]

    def _checked_texts(self, questions: object) -> list[str]:
        texts = _texts("questions", questions)
        for i, text in enumerate(texts):
            if why := text_problem(text):
                raise InputError(f"questions[{i}]: {why}")
        return texts

    def _answer_tokens(self, i: int, text: str) -> list[int]:
        if not is_unicode(text):
            raise InputError(f"answers[{i}]: not Unicode text; give it in UTF-8")
        config = self.rag.generator.config
        row, taken = tokenize_answer(self.rag.tokenizers, text), self.rag.config.generator.max_prompt_tokens
        room = config.max_positions - (0 if config.encoder_decoder else taken)
        if len(row) > room:
            raise InputError(f"answers[{i}]: has {len(row)} tokens, and the generator has room for {room}")
        return row

    def with_retriever(self, retriever: Retriever) -> Answerer:
        """The same models over the documents that another retriever finds, by its scores.

        Raises `InputError` where the prior is over the corpus, and `TypeError` for what has not the methods of
        `Retriever`.
        """
        if not isinstance(retriever, Retriever):
            raise TypeError(f"retriever: expected search and passage, which {type(retriever).__name__} has not")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Answerer)}
        return _RetrieverAnswerer(**fields | {"rag": self._reading_others("retriever")}, retriever=retriever)

    def _parts(self, texts: list[str]) -> list[list[str]]:
        """Batches, `evaluate.batch_size` for each device along `data`."""
        size = self.rag.config.evaluate.batch_size * self.mesh.shape["data"]
        return [texts[start : start + size] for start in range(0, len(texts), size)]

    def _filled(self, questions: Sequence[str]) -> list[str]:
        """Filled up with the first, to one of a few sizes for each device."""
        size = filled_size(len(questions), self.mesh.shape["data"], self.rag.config.evaluate.batch_size)
        return repeat_to_size(questions, size)

    def _find(
        self, texts: Sequence[str], batch: QuestionBatch, given: tuple[Answerer, np.ndarray] | None
    ) -> tuple[Answerer, RetrievalResult, np.ndarray | None]:
        """What reads the documents of B questions, these, and the prior mass [B] of others, where it is known."""
        if given is not None:
            return given[0], weigh_given(self.rag, self.params, given[1], batch, self.mesh), None
        retrieval = self.retrieve(batch, texts)
        return self, retrieval, self.mass_outside(retrieval)

    def _given(self, passages: object, mode: str) -> tuple[Answerer, np.ndarray] | None:
        """An answerer that reads given passages, and their embeddings [n, D]."""
        if passages is None:
            return None
        found = read_passages(passages)
        if mode == "closed_book":
            raise InputError("passages: closed_book reads none; leave them out")
        rag = self._reading_others("passages")
        reading = dataclasses.replace(self, rag=rag, store=GivenPassages(rag, found))
        return reading, embed_given(rag, self._passage_params, found)

    def _reading_others(self, name: str) -> RagPipeline:
        """The models without the cache of the index's passages. Raises `InputError` naming what cannot be given."""
        config = self.rag.config
        if config.retriever.prior == "corpus":
            raise InputError(f"{name}: retriever.prior=corpus is over the corpus, and nothing else")
        if config.hf_compatible:
            raise InputError(f"{name}: hf_compatible=true reads the passages of its index alone")
        uncached = config.replace(decode=config.decode.replace(passage_cache_gib=0.0))
        return dataclasses.replace(self.rag, config=uncached)

    @cached_property
    def _passage_params(self) -> Params:
        """The passage encoder's, as it is now; with one that is not trained they are the pretrained ones."""
        if self.rag.config.train.passage_encoder != "frozen":
            return passage_params(self.rag, self.params)
        if self.step is None and self.rag.passage_encoder is self.rag.retriever:
            return self.params["retriever"]
        return jax.device_put(self.rag.passage_encoder.load_params(), jax.local_devices()[0])

    def problems(self, questions: Sequence[str], mode: str | None = None) -> list[str | None]:
        """Why each question cannot be answered, or None where it can."""
        closed_book = self._mode(mode) == "closed_book"
        problems = [text_problem(question) for question in questions]
        sound = [i for i, why in enumerate(problems) if why is None]
        texts = [questions[i] for i in sound]
        for i, why in zip(
            sound, prompt_problems(self.rag.tokenizers, texts, not closed_book, closed_book), strict=True
        ):
            problems[i] = why
        return problems

    def _mode(self, mode: object) -> str:
        if mode is not None and not isinstance(mode, str):
            raise TypeError(f"mode: expected a text, not {type(mode).__name__}")
        mode = mode or self.rag.config.decode.mode
        check_mode(self.rag.config, mode)
        return mode

    def _batch(
        self,
        questions: Sequence[str],
        mode: str,
        n_best: int | None,
        given: tuple[Answerer, np.ndarray] | None,
        on_documents: Callable[[int, list[Document], float | None], None],
    ) -> list[Answer]:
        """Filled up to one of a few sizes: each has programs of its own, which are compiled when it first comes."""
        count, whole = len(questions), self._filled(questions)
        batch = question_batch(self.rag.tokenizers, whole)
        answerer, retrieval, outside = (self, None, None) if mode == "closed_book" else self._find(whole, batch, given)
        if retrieval is not None:  # what fills up has no documents: it is not searched, or proposes nothing
            there = (np.arange(len(whole)) < count)[:, None]
            retrieval = dataclasses.replace(retrieval, log_prior=np.where(there, retrieval.log_prior, -np.inf))
        documents = [[] if retrieval is None else answerer.documents(retrieval, b) for b in range(count)]
        masses = [None if outside is None else float(outside[b]) for b in range(count)]
        for b in range(count):
            on_documents(b, documents[b], masses[b])
        candidates, _ = answerer.candidates(batch, retrieval, "fast" if retrieval is None else mode)
        answers = [self._answer(questions[b], mode, candidates[b], documents[b], n_best) for b in range(count)]
        return [dataclasses.replace(answer, mass_outside=mass) for answer, mass in zip(answers, masses, strict=True)]

    def _answer(
        self, question: str, mode: str, result: Candidates, documents: list[Document], n_best: int | None
    ) -> Answer:
        count, by = len(documents), "fast" if mode == "closed_book" else mode
        candidates = [
            Candidate(
                text=self.text(result.tokens[c]),
                finished=bool(result.finished[c]),
                fast=None if result.fast_logp is None else math.exp(result.fast_logp[c]),
                thorough=None if result.thorough_logp is None else math.exp(result.thorough_logp[c]),
                beam_probability=np.exp(result.beam_logp[:count, c]).tolist(),
                doc_probability=None if result.doc_logp is None else np.exp(result.doc_logp[:count, c]).tolist(),
                posterior=None if result.posterior is None else result.posterior[:count, c].tolist(),
                probability_bounds=None if result.bounds is None else np.exp(result.bounds[:, c]).tolist(),
            )
            for c in result.best(by, len(result.tokens) if n_best is None else n_best)
        ]
        probability = math.exp(result.marginal(by)[result.best(by)[0]])
        scores, proof = None if result.needed is None else list(result.needed), result.proof
        proof_fields: dict[str, Any] = {}
        if proof is not None:
            proof_fields = {"proved": proof.in_order(len(candidates)), "proved_set": proof.as_set(len(candidates))}
            proof_fields |= {"documents_read": proof.documents_read, "steps": proof.steps}
        return Answer(
            question,
            candidates[0].text,
            mode,
            probability,
            documents,
            candidates,
            scores,
            candidates[0].probability_bounds,
            **proof_fields,
        )


@dataclass(frozen=True)
class _RetrieverAnswerer(Answerer):
    """Answers from what a retriever of the caller's finds."""

    retriever: Retriever

    def search(self, questions: str | Sequence[str], k: int | None = None) -> list[list[Document]]:
        texts = self._checked_texts(questions)
        k = self.rag.config.decode.num_docs if k is None else _whole_number("k", k)
        store, found = search_elsewhere(self.rag, self.retriever, texts, k)
        return [dataclasses.replace(self, store=store).documents(found, b) for b in range(len(texts))]

    def _find(
        self, texts: Sequence[str], batch: QuestionBatch, given: tuple[Answerer, np.ndarray] | None
    ) -> tuple[Answerer, RetrievalResult, np.ndarray | None]:
        if given is not None:
            return super()._find(texts, batch, given)
        distinct = list(dict.fromkeys(texts))  # batches are filled up
        store, found = search_elsewhere(self.rag, self.retriever, distinct, self.rag.config.decode.num_docs)
        rows = np.array([distinct.index(text) for text in texts])
        arrays = (found.queries[rows], found.ids[rows], found.scores[rows], found.log_prior[rows])
        return dataclasses.replace(self, store=store), RetrievalResult(*arrays), None


def _shifted(
    call: Callable[[int, list[Document], float | None], None] | None,
    first: int,
    b: int,
    documents: list[Document],
    outside: float | None,
) -> None:
    """Calls with a question's number among all, of which `first` were in earlier batches."""
    if call is not None:
        call(first + b, documents, outside)


def _texts(name: str, texts: object) -> list[str]:
    """A text as a list of one, a list of texts as it is. Raises `TypeError` for anything else."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence) or isinstance(texts, bytes | bytearray | memoryview):
        raise TypeError(f"{name}: expected a text or a list of texts, not {type(texts).__name__}")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}]: expected a text, not {type(text).__name__}")
    return list(texts)


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected a whole number, not {type(value).__name__}")
    return operator.index(value)  # type: ignore[arg-type]


def load(run: str | Path, untrained: bool = False) -> Answerer:
    """The newest checkpoint of a run (an `output` folder; with `train.keep_best` the best), or its pretrained models.

    Raises `InputError` if the folder holds no run, or its index or models are missing or do not fit, and `TypeError`
    for an argument of another type.
    """
    if not isinstance(run, str | os.PathLike):
        raise TypeError(f"run: expected the path of a folder, not {type(run).__name__}")
    if not isinstance(untrained, bool):
        raise TypeError(f"untrained: expected True or False, not {type(untrained).__name__}")
    return open_answerer(load_run_config(Path(run)), untrained)


def open_answerer(config: Config, untrained: bool = False) -> Answerer:
    """As `load`, for a configuration; without a checkpoint in its `output` the models are the pretrained ones.

    They lie on all devices of this process (`command_mesh`).
    """
    rag, index, store = load_artifacts(config)
    check_k(most_documents(config), len(index))
    mesh = command_mesh("answer", config.mesh.model)
    check_answering_fits(rag, mesh)
    check_passage_cache(rag, store, mesh)
    trained = None if untrained else restore_params(rag, mesh)
    params, step = trained or (pretrained_params(rag, mesh), None)
    index = index if step is None else trained_index(rag, index, step)
    return Answerer(rag, params, index, store, step, mesh)
