"""Exact decoding of a batch of questions: searches on the marginal in rounds, until each answer is proved.

Questions wait by how many documents and beams they need next, and are searched together, so many of them that questions
times documents stays the same: few programs are compiled. What cannot be proved is decoded thoroughly, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from ragjax.config import Decode
from ragjax.decoding.beam_search import BeamSettings
from ragjax.decoding.candidates import Candidates, Proof, TokenAnswer, pad_answers
from ragjax.decoding.decode import decode_rag_sequence
from ragjax.decoding.exact.document_reader import DocumentReader, ReadDocuments
from ragjax.decoding.exact.question import AnswerScore, QuestionSearch
from ragjax.decoding.marginal_search import search_marginal
from ragjax.decoding.propose import beam_settings
from ragjax.decoding.rag_token import decode_rag_token, rag_token_marginals
from ragjax.decoding.rescore import score_tokens
from ragjax.models.generator import SpecialTokens
from ragjax.models.layers import Params
from ragjax.padding import bucket_size
from ragjax.parallel.by_device import data_devices, group_by_device


def decode_exact(
    graph: nnx.GraphDef,
    params: Params,
    read: ReadDocuments,
    log_prior: Float[np.ndarray, "B K"],
    outside: Float[np.ndarray, " B"] | None,
    settings: Decode,
    special: SpecialTokens,
    by_token: bool = False,
) -> list[Candidates]:
    """The best answers of B questions, best first, with what is proved of them.

    Args:
        graph: the generator's, as `params`.
        params: the generator's.
        read: gives the memories of some of the B·K documents, question-major.
        log_prior: log p(z|x) in nats; −inf where there is no document.
        outside: the prior mass outside the K documents, no less than it is; None where only the K have a prior.
        settings: the searches; `num_beams` are those of thorough decoding, and answers kept at least.
        special: the tokens that end an answer, and those that are forced.
        by_token: whether documents are summed over at every token, as RAG-Token does, and so all read at once.
    """
    order = np.argsort(-log_prior, axis=1, kind="stable")  # likeliest first
    rows = (np.arange(len(order))[:, None] * order.shape[1] + order).reshape(-1)
    sorted_prior = np.take_along_axis(log_prior, order, axis=1)
    batch = _ExactBatch(graph, params, lambda some: read(rows[some]), sorted_prior, settings, special, by_token)
    questions = [
        QuestionSearch(b, prior, None if outside is None else float(outside[b]), settings)
        for b, prior in enumerate(sorted_prior)
    ]
    batch.search(questions)
    if settings.fallback == "thorough":
        batch.fall_back([q for q in questions if q.documents and not q.proved(False)])
    candidates = batch.candidates(questions)
    return [_by_column(own, np.argsort(order[b])) for b, own in enumerate(candidates)]


def search_settings(settings: Decode, special: SpecialTokens, beams: int) -> BeamSettings:
    """How a search on the marginal with so many beams goes."""
    return replace(
        beam_settings(settings, special, hugging_face=False),
        num_beams=beams,
        num_answers=max(2, settings.num_beams),
        most_beams=settings.max_beams,
        early_stopping=False,
    )


class _ExactBatch:
    """B questions with their documents, likeliest first; `DocumentReader` keeps what was read of them."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        params: Params,
        read: ReadDocuments,
        log_prior: Float[np.ndarray, "B K"],
        settings: Decode,
        special: SpecialTokens,
        by_token: bool,
    ) -> None:
        self.graph, self.params, self.settings, self.special = graph, params, settings, special
        self.reader = DocumentReader(read, log_prior.size)
        self.log_prior, self.by_token = log_prior, by_token
        self.lazy = settings.lazy and not by_token

    def search(self, questions: Sequence[QuestionSearch]) -> None:
        """Searches until each question is proved or given up; a question only ever waits for more."""
        count, documents = self.log_prior.shape
        each = count // data_devices()  # questions on each device, which only its own searches concern
        sizes = sorted({bucket_size(read) for read in range(1, documents + 1)} | {documents})
        rounds = [read for read in sizes if read <= documents] if self.lazy else [documents]
        waiting: dict[tuple[int, int], list[QuestionSearch]] = {}
        fresh = list(questions)
        while fresh or waiting:
            for question in fresh:
                if (chosen := question.next_search(rounds)) is not None:
                    waiting.setdefault(chosen, []).append(question)
            if not waiting:
                break
            read, beams = min(waiting)  # whoever needs as many, or the next ones, is there by now
            fresh = waiting.pop((read, beams))
            size = max(1, each // read) if self.lazy else each
            by_device = [[q for q in fresh if q.number // each == device] for device in range(count // each)]
            for start in range(0, max(map(len, by_device)), size):
                self._search_together([own[start : start + size] for own in by_device], read, beams, size)

    def _search_together(self, by_device: Sequence[list[QuestionSearch]], read: int, beams: int, size: int) -> None:
        """One search of `size` questions on each device; those that fill up have no document."""
        questions = {d * size + i: question for d, own in enumerate(by_device) for i, question in enumerate(own)}
        shape = len(by_device) * size, read
        rows, prior = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)
        rest, floor = np.full((2, len(rows)), -np.inf, np.float32)
        for i, question in questions.items():
            rows[i] = self._rows(question)[np.minimum(np.arange(read), question.documents - 1)]
            prior[i] = question.log_prior[:read]
            rest[i], floor[i] = question.rest(question.seeks_corpus, read), question.floor()
        memory = self.reader.read(rows[list(questions)].reshape(-1))
        rows %= self.log_prior.size // len(by_device)  # as each device counts them
        how = search_settings(self.settings, self.special, beams)
        given = (memory, rows, prior, rest, floor, how, self.special, self.by_token)
        found = jax.device_get(search_marginal(self.graph, self.params, *given))
        for i, question in questions.items():
            question.add(found, i, read, beams)

    def _rows(self, question: QuestionSearch) -> Int[np.ndarray, " K"]:
        documents = self.log_prior.shape[1]
        return np.arange(question.number * documents, (question.number + 1) * documents, dtype=np.int32)

    def fall_back(self, questions: Sequence[QuestionSearch]) -> None:
        """Joins what thorough decoding finds: also proved, perhaps, since the bound holds for whoever finds more."""
        if not questions:
            return
        group = group_by_device([q.number for q in questions], len(self.log_prior))
        self.reader.read(np.concatenate([self._rows(question) for question in questions]))
        memory = self.reader.take(group.expanded(self.log_prior.shape[1]))
        prior = np.full((group.count, self.log_prior.shape[1]), -np.inf, np.float32)
        prior[group.place] = self.log_prior[group.rows[group.place]]
        thorough = self.settings.replace(mode="thorough")
        decode = decode_rag_token if self.by_token else decode_rag_sequence
        found = decode(self.graph, self.params, memory, prior, thorough, self.special)
        for question, place in zip(questions, group.place, strict=True):
            candidates = found[place]
            assert candidates.doc_logp is not None and candidates.thorough_logp is not None
            for c, tokens in enumerate(candidates.tokens):
                answer = (tokens, bool(candidates.finished[c]))
                score = AnswerScore(float(candidates.thorough_logp[c]), candidates.doc_logp[:, c].astype(np.float64))
                question.answers.setdefault(answer, score)

    def candidates(self, questions: Sequence[QuestionSearch]) -> list[Candidates]:
        """What is known of the best answers of all questions."""
        if not self.by_token:
            joined = [q for q in questions if not q.proved(False) and q.join_earlier()]
            if unscored := questions if self.settings.probability == "full" else joined:
                self._score_unread(unscored)
        ranked, proofs = [q.ranked() for q in questions], [q.proof() for q in questions]
        answers = [[answer for answer, _ in own] or [((), False)] for own in ranked]
        if self.by_token:
            worth = self._score_by_token(answers)
        else:
            worth = [_marginals(q, [found for _, found in own]) for q, own in zip(questions, ranked, strict=True)]
        return [_candidates(*of) for of in zip(answers, worth, proofs, strict=True)]

    def _score_unread(self, questions: Sequence[QuestionSearch]) -> None:
        """The answers under the documents under which they are not known, in one pass."""
        answers = [[answer for answer, _ in question.ranked()] for question in questions]
        pairs = [
            (i, z)
            for i, (q, own) in enumerate(zip(questions, answers, strict=True))
            for z in range(q.documents)
            if any(np.isnan(q.answers[answer].doc_logp[z]) for answer in own)
        ]
        if pairs:
            rows = [questions[i].number * self.log_prior.shape[1] + z for i, z in pairs]
            group = group_by_device(rows, self.log_prior.size)
            memory, of = self.reader.take(group), np.array(pairs)[group.source, 0]
            tokens, lengths = pad_answers(answers, self.special, self.settings.max_new_tokens)
            logp = score_tokens(self.graph, self.params, memory, tokens[of], lengths[of], self.special)
            for (i, z), by_answer in zip(pairs, np.asarray(logp)[group.place, 0].sum(axis=-1), strict=True):
                for answer, scored in zip(answers[i], by_answer, strict=False):
                    questions[i].answers[answer].doc_logp[z] = scored
        for question in questions:
            question.read_all()

    def _score_by_token(self, answers: Sequence[Sequence[TokenAnswer]]) -> list[dict[str, Any]]:
        """RAG-Token's marginals, under all documents."""
        memory = self.reader.read(np.arange(self.log_prior.size))
        tokens, lengths = pad_answers(answers, self.special, self.settings.max_new_tokens)
        logp = np.asarray(score_tokens(self.graph, self.params, memory, tokens, lengths, self.special))
        arrays = rag_token_marginals(self.log_prior, logp, lengths)
        arrays["bounds"] = np.stack([arrays["thorough_logp"]] * 2, axis=1)
        return [{name: x[b, ..., : len(own)] for name, x in arrays.items()} for b, own in enumerate(answers)]


def _candidates(answers: Sequence[TokenAnswer], worth: dict[str, Any], proof: Proof) -> Candidates:
    tokens, finished = [y for y, _ in answers], np.array([ends for _, ends in answers])
    return Candidates(tokens, finished, **worth, ranked=True, proof=proof)


def _marginals(question: QuestionSearch, found: Sequence[AnswerScore]) -> dict[str, Any]:
    """What a question's answers are worth, as fields of `Candidates`; of none, the empty answer of probability 0."""
    prior, none = question.log_prior[:, None], [AnswerScore(-np.inf, np.full(len(question.log_prior), -np.inf))]
    doc_logp = np.stack([answer.doc_logp for answer in found or none], axis=1)
    doc_logp = np.where(prior > -np.inf, doc_logp, -np.inf)
    lower = np.array([answer.logp for answer in found or none])
    rest = question.rest(question.settings.prove == "corpus")
    upper = np.minimum(np.logaddexp(lower, rest), np.maximum(lower, 0))  # `rest` carries rounding: beyond 1 is nothing
    worth = {"beam_logp": np.full_like(doc_logp, -np.inf), "bounds": np.stack([lower, upper])}
    if not np.isnan(doc_logp).any():
        shares = np.exp(prior + doc_logp - np.where(lower == -np.inf, 0, lower))
        worth |= {"doc_logp": doc_logp, "thorough_logp": lower, "posterior": shares}
    return {name: values.astype(np.float32) for name, values in worth.items()}


def _by_column(candidates: Candidates, columns: Int[np.ndarray, " K"]) -> Candidates:
    """With the documents in another order."""

    def move(by_document: np.ndarray | None) -> np.ndarray | None:
        return None if by_document is None else by_document[columns]

    doc_logp, posterior = move(candidates.doc_logp), move(candidates.posterior)
    return replace(candidates, beam_logp=candidates.beam_logp[columns], doc_logp=doc_logp, posterior=posterior)
