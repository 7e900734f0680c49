"""Answers questions from Python: `ragjax.load(run).answer(["…"])`."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ragjax.config import Config, check_mode, most_documents, rescores_as_hugging_face
from ragjax.data.passage_store import PassageStore
from ragjax.data.questions import text_problem
from ragjax.decoding.candidates import Candidates
from ragjax.decoding.decode import decode_rag_sequence
from ragjax.decoding.hf_compat import decode_hf_compatible
from ragjax.decoding.propose import prefill_documents
from ragjax.decoding.rag_token import decode_rag_token
from ragjax.decoding.rescore import score_tokens
from ragjax.errors import InputError
from ragjax.marginal import log_prior
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.padding import bucket_size, length_buckets, pad_sequences, pick_bucket
from ragjax.parallel.mesh import local_mesh
from ragjax.parallel.sharding import shard_batch
from ragjax.rag import RagPipeline, prompt_problems, tokenize_answer, tokenize_prompts
from ragjax.retrieval.index import Index, check_k
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
    probability_bounds: list[float] | None = None  # certified: the thorough p(y|x) is at least and at most this


@dataclass(frozen=True)
class Answer:
    """What was answered, how probable it is, and everything it was chosen from, best candidate first."""

    question: str
    text: str
    mode: str
    probability: float  # p(y|x) under the mode; certified, what it is at least
    documents: list[Document]
    candidates: list[Candidate]
    scores: list[int] | None = None  # certified: the p(y|x,z) computed beside the beam search, of how many for thorough


@dataclass(frozen=True)
class Answerer:
    """Models, index and passages, ready to answer."""

    rag: RagPipeline
    params: Params
    index: Index
    store: PassageStore
    step: int | None  # of training; None for the pretrained models
    mesh: Mesh  # of this process, where `params` lie

    def retrieve(self, questions: Sequence[str]) -> RetrievalResult:
        """The documents that `candidates` reads, `decode.k` of each question.

        Hugging Face rescores under the training's number of documents, whatever the number that proposed: with
        `hf_compatible` there are as many as either needs, and the prior is 0 beyond `train.k`.
        """
        config = self.rag.config
        if not rescores_as_hugging_face(config):
            return retrieve(self.rag, self.params, self.index, questions, config.decode.k, self.mesh)
        found = retrieve(self.rag, self.params, self.index, questions, most_documents(config), self.mesh)
        counted = (found.ids >= 0) & (np.arange(found.ids.shape[1]) < config.train.k)
        return dataclasses.replace(
            found, log_prior=np.asarray(log_prior(jnp.asarray(found.log_prior), jnp.asarray(counted)))
        )

    def answer(
        self, questions: str | Sequence[str], mode: str | None = None, n_best: int | None = None
    ) -> list[Answer]:
        """Answers questions, `evaluate.batch_size` at a time; a text is one question, and gives a list of one answer.

        `mode` is `thorough`, `certified`, `fast` or `closed_book`, by default as configured; `n_best` keeps so many
        candidates of each. Raises `InputError` for an unknown mode, and, before any is answered, for a question that is
        empty, no Unicode text or too long, naming it; `TypeError` for an argument of another type.
        """
        asked = _texts(questions)
        if n_best is not None and _whole_number("n_best", n_best) < 1:
            raise InputError(f"n_best is {n_best}; expected 1 or more")
        mode = self._mode(mode)
        for i, why in enumerate(self.problems(asked, mode)):
            if why:
                raise InputError(f"questions[{i}]: {why}")
        size = self.rag.config.evaluate.batch_size
        parts = [asked[start : start + size] for start in range(0, len(asked), size)]
        return [answer for part in parts for answer in self._batch(part, size, mode, n_best)]

    def problems(self, questions: Sequence[str], mode: str | None = None) -> list[str | None]:
        """Why each question cannot be answered, or None where it can."""
        closed_book = self._mode(mode) == "closed_book"
        problems = [text_problem(question) for question in questions]
        sound = [i for i, why in enumerate(problems) if why is None]
        told = prompt_problems(self.rag, [questions[i] for i in sound], not closed_book, closed_book)
        for i, why in zip(sound, told, strict=True):
            problems[i] = why
        return problems

    def _mode(self, mode: object) -> str:
        if mode is not None and not isinstance(mode, str):
            raise TypeError(f"mode: expected a text, not {type(mode).__name__}")
        mode = mode or self.rag.config.decode.mode
        check_mode(self.rag.config, mode)
        return mode

    def _batch(self, questions: Sequence[str], most: int, mode: str, n_best: int | None) -> list[Answer]:
        """Filled up to one of a few sizes: each has programs of its own, which are compiled when it first comes."""
        count = len(questions)
        whole = repeat_to_size(questions, min(bucket_size(count), max(most, count)))
        if mode == "closed_book":
            found, _ = self.candidates(whole, None, "fast")
            documents: list[list[Document]] = [[]] * count
        else:
            retrieved = self.retrieve(whole)
            found, _ = self.candidates(whole, retrieved, mode)
            documents = [self.documents(retrieved, b) for b in range(count)]
        return [self._answer(questions[b], mode, found[b], documents[b], n_best) for b in range(count)]

    def candidates(
        self, questions: Sequence[str], retrieved: RetrievalResult | None, mode: str, gold: Sequence[str] | None = None
    ) -> tuple[list[Candidates], np.ndarray | None]:
        """What the documents propose (without `retrieved`: the question alone), and log p(gold|x) [B] if asked."""
        graph, params, config = self.rag.generator.graphdef, self.params["generator"], self.rag.config
        if retrieved is None:
            ids, prior = np.zeros((len(questions), 1), np.int32), np.zeros((len(questions), 1), np.float32)
        else:
            ids, prior = retrieved.ids, retrieved.log_prior
        store = None if retrieved is None else self.store
        source, mask = tokenize_prompts(self.rag, store, questions, ids)
        source, mask = shard_batch(self.mesh, (source, mask), len(source))
        memory = prefill_documents(graph, params, source, mask)
        settings, special = config.decode.replace(mode=mode), self.rag.special
        if retrieved is not None and rescores_as_hugging_face(config):
            unmasked = prefill_documents(graph, params, source, jnp.ones_like(mask))
            scoring = prior[:, : config.train.k]
            proposing = (ids >= 0) & (np.arange(ids.shape[1]) < config.decode.k)
            found = decode_hf_compatible(graph, params, unmasked, memory, scoring, proposing, settings, special)
        elif retrieved is not None and config.model == "rag_token":
            found = decode_rag_token(graph, params, memory, prior, settings, special, config.hf_compatible)
        else:
            found = decode_rag_sequence(graph, params, memory, prior, settings, special)
        return found, None if gold is None else self._gold_logp(memory, prior, gold)

    def _gold_logp(self, memory: DocumentMemory, prior: np.ndarray, gold: Sequence[str]) -> np.ndarray:
        """log p(gold|x) [B], in nats, as answering counts it: any of the generator's end tokens ends it."""
        rows = [tokenize_answer(self.rag, answer) for answer in gold]
        longest = max(self.rag.config.generator.answer_tokens, *map(len, rows))
        width = pick_bucket(longest, [self.rag.config.generator.answer_tokens, *length_buckets(longest + 32)])
        answers, counted = pad_sequences(rows, width, self.rag.special.pad)
        lengths = counted.sum(axis=1, dtype=np.int32)[:, None]
        graph, params = self.rag.generator.graphdef, self.params["generator"]
        logp = score_tokens(graph, params, memory, answers[:, None], lengths, self.rag.special)[:, :, 0]
        scores = TokenScores(logp, jnp.zeros_like(logp))
        return -np.asarray(answer_nll(self.rag, jnp.asarray(prior), scores, jnp.asarray(answers), jnp.asarray(counted)))

    def documents(self, retrieved: RetrievalResult, b: int) -> list[Document]:
        """The documents of question b, best first, and only those that are there."""
        pairs = zip(retrieved.ids[b], np.exp(retrieved.log_prior[b]), strict=True)
        return [Document(**dataclasses.asdict(self.store[int(i)]), prior=float(p)) for i, p in pairs if i >= 0]

    def text(self, tokens: Sequence[int]) -> str:
        """An answer's tokens as text, on one line."""
        return " ".join(self.rag.generator_tokenizer.decode(tokens).split())

    def _answer(
        self, question: str, mode: str, found: Candidates, documents: list[Document], n_best: int | None
    ) -> Answer:
        count, by = len(documents), "fast" if mode == "closed_book" else mode
        candidates = [
            Candidate(
                text=self.text(found.tokens[c]),
                finished=bool(found.finished[c]),
                fast=None if found.fast_logp is None else math.exp(found.fast_logp[c]),
                thorough=None if found.thorough_logp is None else math.exp(found.thorough_logp[c]),
                beam_probability=np.exp(found.beam_logp[:count, c]).tolist(),
                doc_probability=None if found.doc_logp is None else np.exp(found.doc_logp[:count, c]).tolist(),
                posterior=None if found.posterior is None else found.posterior[:count, c].tolist(),
                probability_bounds=None if found.bounds is None else np.exp(found.bounds[:, c]).tolist(),
            )
            for c in found.best(by, len(found.tokens) if n_best is None else n_best)
        ]
        probability = math.exp(found.marginal(by)[found.best(by)[0]])
        scores = None if found.needed is None else list(found.needed)
        return Answer(question, candidates[0].text, mode, probability, documents, candidates, scores)


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

    They lie on `mesh.model` devices.
    """
    rag, index, store = load_artifacts(config)
    check_k(most_documents(config), len(index))
    mesh = local_mesh(config.mesh.model, data=1)
    trained = None if untrained else restore_params(rag, mesh)
    params, step = trained or (pretrained_params(rag, mesh), None)
    index = index if step is None else trained_index(rag, index, step)
    return Answerer(rag, params, index, store, step, mesh)
