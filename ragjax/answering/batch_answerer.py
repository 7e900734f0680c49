"""The four stages for a batch of questions: documents, candidates, and what a given answer is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ragjax.answering.answers import Document
from ragjax.config import most_documents, rescores_as_hugging_face
from ragjax.data.passage_store import PassageStore
from ragjax.data.question_batch import QuestionBatch, tokenize_prompts, tokens_before_question
from ragjax.decoding.candidates import Candidates
from ragjax.decoding.decode import decode_rag_sequence
from ragjax.decoding.exact.decode import decode_exact
from ragjax.decoding.exact.document_reader import ReadDocuments
from ragjax.decoding.hf_compat import decode_hf_compatible
from ragjax.decoding.propose import join_memories, prefill_documents
from ragjax.decoding.rag_token import decode_rag_token
from ragjax.decoding.rescore import score_tokens
from ragjax.marginal import log_prior
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.padding import groups_by_length, length_buckets, pad_sequences, pick_bucket, reading_width
from ragjax.parallel.by_device import on_mesh
from ragjax.parallel.sharding import shard_batch
from ragjax.rag import RagPipeline
from ragjax.retrieval.index import Index
from ragjax.retrieval.passage_cache import PassageKVCache, open_passage_cache
from ragjax.retrieval.retrieve import RetrievalResult, log_prior_mass, retrieve
from ragjax.training.loss import TokenScores, answer_nll

T = TypeVar("T")
READ_TOGETHER = 512  # tokens of prompts on a CPU: enough for its matrix products, and what lies between fits its caches


@dataclass(frozen=True)
class BatchAnswerer:
    """Models, index and passages, and what answering and evaluation do with them."""

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

    def mass_outside(self, retrieval: RetrievalResult) -> np.ndarray | None:
        """The share [B] of the softmax over the whole corpus that other passages hold; None with a FAISS index."""
        if not self.index.on_devices:
            return None
        mass = np.exp(log_prior_mass(self.rag, self.index, retrieval, self.mesh)[:, -1])
        return np.clip(1 - mass.astype(np.float64), 0, 1)

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
        read, ids, prior = self.document_reader(questions, retrieval)
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
            read, ids, prior = self.document_reader(questions, retrieval)
            return self._gold_logp(read(np.arange(ids.size)), prior, gold)

    def document_reader(
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
        few = read_together(self.mesh, *mask.shape)
        on_cpus = self.mesh.devices.flat[0].platform == "cpu"
        if len(source) <= few:
            return self._prefill(source, mask, on_cpus)
        groups, place = groups_by_length(mask.sum(axis=1), few)
        return join_memories([self._prefill(source[rows], mask[rows], on_cpus) for rows in groups], place)

    def _prefill(self, source: np.ndarray, mask: np.ndarray, tight: bool) -> DocumentMemory:
        """In one program. Accelerators read padding in no time; else `tight` spares what of it can be spared."""
        width = reading_width(int(mask.sum(axis=1).max()), mask.shape[1]) if tight else None
        source, mask = shard_batch(self.mesh, (source, mask), len(source))
        return prefill_documents(self.rag.generator.graphdef, self.params["generator"], source, mask, width)

    def _gold_logp(self, memory: DocumentMemory, prior: np.ndarray, gold: Sequence[Sequence[int]]) -> np.ndarray:
        """log p(gold|x) [B], in nats, of one answer a question."""
        return -self.answer_scores(memory, prior, [[answer] for answer in gold])[0][:, 0]

    def answer_scores(
        self, memory: DocumentMemory, prior: np.ndarray, answers: Sequence[Sequence[Sequence[int]]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """−log p(y|x) [B,C] of C answers a question, and log p(y_t|y_<t,x,z) [B,K,C,T], in nats; within `on_mesh`.

        As answering counts it: any of the generator's end tokens ends an answer.
        """
        rows, count = [row for of in answers for row in of], len(answers[0])
        longest = max(self.rag.config.generator.max_answer_tokens, *map(len, rows))
        width = pick_bucket(longest, [self.rag.config.generator.max_answer_tokens, *length_buckets(longest + 32)])
        tokens, counted = pad_sequences(rows, width, self.rag.special.pad)
        by_question, lengths = tokens.reshape(-1, count, width), counted.sum(axis=1, dtype=np.int32)
        graph, params = self.rag.generator.graphdef, self.params["generator"]
        scored = score_tokens(graph, params, memory, by_question, lengths.reshape(-1, count), self.rag.special)
        logp = np.asarray(scored)
        each = jnp.asarray(np.moveaxis(logp, 2, 1).reshape(len(rows), *logp.shape[1::2]))
        scores, priors = TokenScores(each, jnp.zeros_like(each)), np.repeat(prior, count, axis=0)
        nll = answer_nll(self.rag, *jax.device_put((priors, scores, tokens, counted)))
        return np.asarray(nll).reshape(-1, count), logp

    def documents(self, retrieval: RetrievalResult, b: int) -> list[Document]:
        """The documents of question b, best first, and only those that are there."""
        pairs = zip(retrieval.ids[b], np.exp(retrieval.log_prior[b]), strict=True)
        return [Document(**dataclasses.asdict(self.store[int(i)]), prior=float(p)) for i, p in pairs if i >= 0]

    def text(self, tokens: Sequence[int]) -> str:
        """An answer's tokens as text, on one line."""
        return " ".join(self.rag.generator_tokenizer.decode(tokens).split())


def read_together(mesh: Mesh, prompts: int, width: int) -> int:
    """The most of so many prompts of `width` tokens that one program reads: few on one CPU, everywhere else all."""
    few = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return min(prompts, max(1, READ_TOGETHER // width)) if few else prompts


def repeat_to_size(items: Sequence[T], size: int) -> list[T]:
    """Repeats the first until there are `size`."""
    return [*items, *[items[0]] * (size - len(items))]
