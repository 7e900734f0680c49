"""Answers questions from Python: `ragjax.load(run).answer(["…"])`."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ragjax.config import Config, check_mode, most_documents, rescores_as_hugging_face
from ragjax.data.passage_store import PassageStore
from ragjax.data.question_batch import (
    QuestionBatch,
    prompt_problems,
    question_batch,
    tokenize_prompts,
    tokens_before_question,
)
from ragjax.data.questions import text_problem
from ragjax.decoding.candidates import Candidates
from ragjax.decoding.decode import decode_rag_sequence
from ragjax.decoding.exact.decode import decode_exact
from ragjax.decoding.exact.document_reader import ReadDocuments
from ragjax.decoding.hf_compat import decode_hf_compatible
from ragjax.decoding.propose import prefill_documents
from ragjax.decoding.rag_token import decode_rag_token
from ragjax.decoding.rescore import score_tokens
from ragjax.errors import InputError
from ragjax.marginal import log_prior
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.padding import bucket_size, length_buckets, pad_sequences, pick_bucket, reading_width
from ragjax.parallel.by_device import on_mesh
from ragjax.parallel.mesh import command_mesh
from ragjax.parallel.sharding import shard_batch
from ragjax.rag import RagPipeline
from ragjax.retrieval.index import Index, check_k
from ragjax.retrieval.passage_cache import PassageKVCache, check_passage_cache, open_passage_cache
from ragjax.retrieval.retrieve import RetrievalResult, retrieve
from ragjax.runs.restore import load_artifacts, pretrained_params, restore_params, trained_index
from ragjax.runs.run_dir import load_run_config
from ragjax.training.loss import TokenScores, answer_nll

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A retrieved passage; `prior` is p(z|x)."""

    id: str
    title: str
    text: str
    prior: float


@dataclass(frozen=True)
class Candidate:
    """A possible answer y. Lists have one entry a document; a marginal is None where its decoding did not run."""

    text: str
    finished: bool  # reached the end token
    fast: float | None  # p(y|x), documents that did not propose y contributing 0
    thorough: float | None  # p(y|x), y scored under every document
    beam_probability: list[float]  # p(y|x,z) by the beam search, 0 where z did not propose y
    doc_probability: list[float] | None  # p(y|x,z) under every document
    posterior: list[float] | None  # p(z|x,y)
    probability_bounds: list[float] | None = None  # certified, exact: p(y|x) is at least and at most this


@dataclass(frozen=True)
class Answer:
    """What was answered, how probable it is, and everything it was chosen from, best candidate first."""

    question: str
    text: str
    mode: str
    probability: float  # p(y|x) under the mode; certified and exact, what it is at least
    documents: list[Document]
    candidates: list[Candidate]
    scores: list[int] | None = None  # certified: the p(y|x,z) computed beside the beam search, of how many for thorough
    probability_bounds: list[float] | None = None  # certified, exact: p(y|x) is at least and at most this
    # exact: so many of the first candidates are the likeliest answers of all, in this order, under the documents
    # (top_k) and under all passages (corpus, None where the prior over the corpus is not known); 0 means not proved
    proved: dict[str, int | None] | None = None
    documents_read: int | None = None  # exact: by the searches
    steps: int | None = None  # exact: of the beam searches
    proved_set: dict[str, int | None] | None = None  # as `proved`, in whatever order


@dataclass(frozen=True)
class Answerer:
    """Models, index and passages, ready to answer."""

    rag: RagPipeline
    params: Params
    index: Index
    store: PassageStore
    step: int | None  # of training; None for the pretrained models
    mesh: Mesh  # of this process, where `params` lie

    @cached_property
    def passage_cache(self) -> PassageKVCache | None:
        """What the generator has read of passages under these parameters; None unless `decode.passage_cache_gib`."""
        return open_passage_cache(self.rag, self.params["generator"], self.store, self.mesh)

    def retrieve(self, questions: QuestionBatch, texts: Sequence[str]) -> RetrievalResult:
        """The documents that `candidates` reads: `decode.num_docs` of each question, and `retriever.bm25_docs` more.

        `texts` are the questions as they were asked, for BM25. Hugging Face rescores under the training's number of
        documents, whatever the number that proposed: with `hf_compatible` there are as many as either needs, and the
        prior is 0 beyond `train.num_docs`.
        """
        config = self.rag.config
        if not rescores_as_hugging_face(config):
            k = config.decode.num_docs
            return retrieve(self.rag, self.params, self.index, questions, k, self.mesh, texts)
        retrieval = retrieve(self.rag, self.params, self.index, questions, most_documents(config), self.mesh)
        counted = (retrieval.ids >= 0) & (np.arange(retrieval.ids.shape[1]) < config.train.num_docs)
        return dataclasses.replace(
            retrieval, log_prior=np.asarray(log_prior(*jax.device_put((retrieval.log_prior, counted))))
        )

    def answer(
        self, questions: str | Sequence[str], mode: str | None = None, n_best: int | None = None
    ) -> list[Answer]:
        """Answers questions, `evaluate.batch_size` at a time on each device.

        Args:
            questions: texts; a text alone is one question, and gives a list of one answer.
            mode: `exact`, `thorough`, `certified`, `fast` or `closed_book`; by default as configured.
            n_best: keeps so many candidates of each; by default all.

        Raises `InputError` for an unknown mode, and, before any is answered, for a question that is empty, no Unicode
        text or too long, naming it; `TypeError` for an argument of another type.
        """
        texts = _texts(questions)
        if n_best is not None and _whole_number("n_best", n_best) < 1:
            raise InputError(f"n_best is {n_best}; expected 1 or more")
        mode = self._mode(mode)
        for i, why in enumerate(self.problems(texts, mode)):
            if why:
                raise InputError(f"questions[{i}]: {why}")
        size = self.rag.config.evaluate.batch_size * self.mesh.shape["data"]
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        return [answer for part in parts for answer in self._batch(part, mode, n_best)]

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

    def _batch(self, questions: Sequence[str], mode: str, n_best: int | None) -> list[Answer]:
        """Filled up to one of a few sizes: each has programs of its own, which are compiled when it first comes."""
        count, devices = len(questions), self.mesh.shape["data"]
        each = -(-count // devices)
        size = min(bucket_size(each), max(self.rag.config.evaluate.batch_size, each))
        whole = repeat_to_size(questions, devices * size)
        batch = question_batch(self.rag.tokenizers, whole)
        retrieval = None if mode == "closed_book" else self.retrieve(batch, whole)
        if retrieval is not None:  # what fills up has no documents: it is not searched, or proposes nothing
            there = (np.arange(len(whole)) < count)[:, None]
            retrieval = dataclasses.replace(retrieval, log_prior=np.where(there, retrieval.log_prior, -np.inf))
        candidates, _ = self.candidates(batch, retrieval, "fast" if retrieval is None else mode)
        documents = [[] if retrieval is None else self.documents(retrieval, b) for b in range(count)]
        return [self._answer(questions[b], mode, candidates[b], documents[b], n_best) for b in range(count)]

    def candidates(
        self,
        questions: QuestionBatch,
        retrieval: RetrievalResult | None,
        mode: str,
        gold: Sequence[Sequence[int]] | None = None,
    ) -> tuple[list[Candidates], np.ndarray | None]:
        """The candidates for each of B questions, and log p(gold|x) [B], in nats, if `gold` is given.

        Args:
            questions: as both models read them; the devices along `data` divide B.
            retrieval: their documents; None for closed-book answers.
            mode: `exact`, `thorough`, `certified` or `fast`; without documents `fast`.
            gold: the tokens of an answer to each question.
        """
        with on_mesh(self.mesh):
            return self._candidates(questions, retrieval, mode, gold)

    def _candidates(
        self,
        questions: QuestionBatch,
        retrieval: RetrievalResult | None,
        mode: str,
        gold: Sequence[Sequence[int]] | None,
    ) -> tuple[list[Candidates], np.ndarray | None]:
        graph, params, config = self.rag.generator.graphdef, self.params["generator"], self.rag.config
        read, ids, prior = self._document_reader(questions, retrieval)
        settings, special = config.decode.replace(mode=mode), self.rag.special
        if retrieval is not None and mode == "exact":  # reads what it needs; the gold answer needs all
            given = (prior, retrieval.outside, settings, special, config.model == "rag_token")
            candidates = decode_exact(graph, params, read, *given)
            return candidates, None if gold is None else self._gold_logp(read(np.arange(ids.size)), prior, gold)
        memory = read(np.arange(ids.size))
        if retrieval is not None and rescores_as_hugging_face(config):
            source, mask = tokenize_prompts(self.rag.tokenizers, self.store, questions, ids)
            unmasked = self._read(source, np.ones_like(mask))
            scoring = prior[:, : config.train.num_docs]
            proposing = (ids >= 0) & (np.arange(ids.shape[1]) < config.decode.num_docs)
            candidates = decode_hf_compatible(graph, params, unmasked, memory, scoring, proposing, settings, special)
        elif retrieval is not None and config.model == "rag_token":
            candidates = decode_rag_token(graph, params, memory, prior, settings, special, config.hf_compatible)
        else:
            candidates = decode_rag_sequence(graph, params, memory, prior, settings, special)
        return candidates, None if gold is None else self._gold_logp(memory, prior, gold)

    def gold_logp(
        self, questions: QuestionBatch, retrieval: RetrievalResult, gold: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """log p(gold|x) [B], in nats, and no candidates; see `candidates`."""
        with on_mesh(self.mesh):
            read, ids, prior = self._document_reader(questions, retrieval)
            return self._gold_logp(read(np.arange(ids.size)), prior, gold)

    def _document_reader(
        self, questions: QuestionBatch, retrieval: RetrievalResult | None
    ) -> tuple[ReadDocuments, np.ndarray, np.ndarray]:
        """Reads some of the B·K documents, question-major; their ids [B,K] and log p(z|x) [B,K]."""
        tokenizers = self.rag.tokenizers
        if retrieval is None:
            store, shape = None, (len(questions.row), 1)
            ids, prior = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        else:
            store, ids, prior = self.store, retrieval.ids, retrieval.log_prior
        source, mask = tokenize_prompts(tokenizers, store, questions, ids)
        passages = lengths = None
        if store is not None and self.passage_cache is not None:
            passages, lengths = ids.reshape(-1), tokens_before_question(tokenizers, questions, mask)

        def read(rows: np.ndarray) -> DocumentMemory:
            cached = None if passages is None or lengths is None else (passages[rows], lengths[rows])
            return self._read(source[rows], mask[rows], cached)

        return read, ids, prior

    def _read(
        self, source: np.ndarray, mask: np.ndarray, cached: tuple[np.ndarray, np.ndarray] | None = None
    ) -> DocumentMemory:
        """The memories of n prompts, as many on each device.

        `cached` names the passage of each, and how many tokens come before its question, for the cache.
        """
        if cached is not None and self.passage_cache is not None:
            return self.passage_cache.read(source, mask, *cached)
        on_cpus = self.mesh.devices.flat[0].platform == "cpu"  # accelerators read the padding in no time
        width = reading_width(int(mask.sum(axis=1).max()), mask.shape[1]) if on_cpus else None
        source, mask = shard_batch(self.mesh, (source, mask), len(source))
        return prefill_documents(self.rag.generator.graphdef, self.params["generator"], source, mask, width)

    def _gold_logp(self, memory: DocumentMemory, prior: np.ndarray, gold: Sequence[Sequence[int]]) -> np.ndarray:
        """log p(gold|x) [B], in nats, as answering counts it: any of the generator's end tokens ends it."""
        longest = max(self.rag.config.generator.max_answer_tokens, *map(len, gold))
        width = pick_bucket(longest, [self.rag.config.generator.max_answer_tokens, *length_buckets(longest + 32)])
        answers, counted = pad_sequences(gold, width, self.rag.special.pad)
        lengths = counted.sum(axis=1, dtype=np.int32)[:, None]
        graph, params = self.rag.generator.graphdef, self.params["generator"]
        scored = score_tokens(graph, params, memory, answers[:, None], lengths, self.rag.special)
        logp = jnp.asarray(np.asarray(scored)[:, :, 0])
        scores = TokenScores(logp, jnp.zeros_like(logp))
        return -np.asarray(answer_nll(self.rag, *jax.device_put((prior, scores, answers, counted))))

    def documents(self, retrieval: RetrievalResult, b: int) -> list[Document]:
        """The documents of question b, best first, and only those that are there."""
        pairs = zip(retrieval.ids[b], np.exp(retrieval.log_prior[b]), strict=True)
        return [Document(**dataclasses.asdict(self.store[int(i)]), prior=float(p)) for i, p in pairs if i >= 0]

    def text(self, tokens: Sequence[int]) -> str:
        """An answer's tokens as text, on one line."""
        return " ".join(self.rag.generator_tokenizer.decode(tokens).split())

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
        told: dict[str, Any] = {}
        if proof is not None:
            told = {"proved": proof.in_order(len(candidates)), "proved_set": proof.as_set(len(candidates))}
            told |= {"documents_read": proof.documents_read, "steps": proof.steps}
        return Answer(
            question,
            candidates[0].text,
            mode,
            probability,
            documents,
            candidates,
            scores,
            candidates[0].probability_bounds,
            **told,
        )


def repeat_to_size(items: Sequence[T], size: int) -> list[T]:
    """Repeats the first until there are `size`."""
    return [*items, *[items[0]] * (size - len(items))]


def _texts(questions: object) -> list[str]:
    """A text as a list of one, a list of texts as it is. Raises `TypeError` for anything else."""
    if isinstance(questions, str):
        return [questions]
    if not isinstance(questions, Sequence) or isinstance(questions, bytes | bytearray | memoryview):
        raise TypeError(f"questions: expected a text or a list of texts, not {type(questions).__name__}")
    for i, question in enumerate(questions):
        if not isinstance(question, str):
            raise TypeError(f"questions[{i}]: expected a text, not {type(question).__name__}")
    return list(questions)


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
    check_passage_cache(rag, store, mesh)
    trained = None if untrained else restore_params(rag, mesh)
    params, step = trained or (pretrained_params(rag, mesh), None)
    index = index if step is None else trained_index(rag, index, step)
    return Answerer(rag, params, index, store, step, mesh)
