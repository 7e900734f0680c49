"""What is known of the answers to one question: those found, a bound on all others, and what to search next.

With the likeliest m documents read, P_m(y) ≤ P(y) ≤ P_m(y) + R, R the prior mass of the others. So an answer is the
likeliest of all as soon as P_m(y) ≥ P_m(y') + R for every other one, found or not (`ragjax.marginal.is_best`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from ragjax.config import Decode
from ragjax.decoding.candidates import Proof, TokenAnswer
from ragjax.decoding.marginal_search import MarginalSearch
from ragjax.marginal import TIE, is_best


@dataclass
class AnswerScore:
    """An answer: log p(y|x) of the documents read, log p(y|x,z) under each of all K, NaN where it is not known."""

    logp: float
    doc_logp: Float[np.ndarray, " K"]


@dataclass
class QuestionSearch:
    """One question on its way through the searches; log-probabilities in nats."""

    number: int  # in its batch
    log_prior: Float[np.ndarray, " K"]  # likeliest first; −inf where there is no document
    outside: float | None  # the prior mass outside the K documents; None where that is not known
    settings: Decode
    read: int = 0  # documents, the likeliest ones, under which all answers found are known
    searched: int = 0  # documents of the newest search
    beams: int = 0  # of the newest search
    answers: dict[TokenAnswer, AnswerScore] = field(default_factory=dict)
    earlier: dict[TokenAnswer, AnswerScore] = field(default_factory=dict)  # of rounds with fewer documents
    others: float = np.inf  # no answer that is not in `answers` is likelier under the documents read
    crowd: float = -np.inf  # the likeliest prefix that a search with `max_beams` beams would drop
    steps: int = 0  # of all its searches

    @property
    def documents(self) -> int:
        """How many there are."""
        return int((self.log_prior > -np.inf).sum())

    @property
    def seeks_corpus(self) -> bool:
        """Whether the proof over the corpus is sought: p(y) ≤ 1 − R, so that more than a half outside forbids it."""
        return self.settings.prove == "corpus" and self.outside is not None and self.outside <= 0.5

    def rest(self, corpus: bool, read: int | None = None) -> float:
        """Log of the prior mass of what was not read, of the K documents or of the corpus; exactly −inf for none."""
        unread = np.exp(self.log_prior[self.read if read is None else read :].astype(np.float64)).sum()
        mass = unread + (self.outside or 0.0 if corpus else 0.0)
        return float(np.log(mass)) if mass > 0 else -np.inf

    def ranked(self) -> list[tuple[TokenAnswer, AnswerScore]]:
        """The finished answers found, the likeliest first; the unfinished ones where there is none."""
        ends = any(finished for _, finished in self.answers)
        answers = [item for item in self.answers.items() if item[0][1] == ends]
        return sorted(answers, key=lambda item: -item[1].logp)

    def best(self) -> float:
        """log p of the likeliest finished answer; −inf where there is none."""
        return max((found.logp for (_, ends), found in self.answers.items() if ends), default=-np.inf)

    def floor(self) -> float:
        """What the next search need not look below: more documents only add to an answer. Half a tie is rounding."""
        return self.best() - TIE / 2

    def add(self, found: MarginalSearch, row: int, read: int, beams: int) -> None:
        """Takes over what a search of this question found with so many documents and beams."""
        if read != self.read:  # other documents: another distribution
            self.earlier |= self.answers
            self.answers, self.others = {}, np.inf
        self.read = self.searched = read
        self.beams = beams
        self.steps += int(found.bound.steps[row])
        self.crowd = float(found.bound.crowd[row])
        of, doc_logp = found.beams, found.doc_logp[row]
        there = np.flatnonzero(of.logp[row] > -np.inf)
        for c in there:
            ends = bool(of.finished[row, c])
            by_document = np.full(len(self.log_prior), np.nan)
            if ends:
                by_document[: doc_logp.shape[0]] = doc_logp[:, c]
            tokens = tuple(int(t) for t in of.tokens[row, c, : of.length[row, c] - ends])
            self.answers[tokens, ends] = AnswerScore(float(of.logp[row, c]), by_document)
        others = float(found.bound.unfinished[row])
        if len(there) == of.logp.shape[1] and of.finished[row, there[-1]]:  # some may have been finished and not kept
            others = max(others, float(of.logp[row, there[-1]]))
        self.others = min(self.others, others)

    def join_earlier(self) -> bool:
        """Takes the answers of earlier rounds that no later one found, which may be better; whether there are any.

        What is not proved by then stays so: their log p is of fewer documents, until they are scored under all.
        """
        more = {answer: found for answer, found in self.earlier.items() if answer[1] and answer not in self.answers}
        self.answers |= more
        return bool(more)

    def read_all(self) -> None:
        """Takes the documents that were not searched into the probabilities, once all are known.

        To an answer that was not found they add what they hold, at most.
        """
        for found in self.answers.values():
            if not np.isnan(found.doc_logp[: self.documents]).any():
                found.logp = float(np.logaddexp.reduce((self.log_prior + found.doc_logp)[: self.documents]))
        self.others = float(np.logaddexp(self.others, self.rest(corpus=False)))
        self.read = len(self.log_prior)

    def proved_sets(self, corpus: bool) -> tuple[int, ...]:
        """The numbers i for which the i likeliest answers found are the i likeliest of all."""
        logp = np.array([found.logp for (_, ends), found in self.ranked() if ends])
        rivals = np.maximum(np.append(logp[1:], -np.inf), self.others)
        return tuple((np.flatnonzero(is_best(logp, rivals, self.rest(corpus))) + 1).tolist()) if len(logp) else ()

    def proved(self, corpus: bool) -> bool:
        """Whether the likeliest answer found is the likeliest of all."""
        return 1 in self.proved_sets(corpus)

    def proof(self) -> Proof:
        """What is proved; over the corpus None where its prior is not known."""
        corpus = None if self.outside is None else self.proved_sets(True)
        return Proof(self.proved_sets(False), corpus, min(self.searched, self.documents), self.steps)

    def next_search(self, rounds: Sequence[int]) -> tuple[int, int] | None:
        """How many documents and beams to search with next; None where the proof is there or out of reach.

        Args:
            rounds: the numbers of documents that may be read, ascending.
        """
        if self.documents == 0 or (self.read and self.proved(self.seeks_corpus)):
            return None
        if not self.read:
            return self._next_round(rounds), self.settings.start_beams
        best, all_read = self.best(), self.read >= self.documents
        if is_best(best, self.others, -np.inf):  # only what was not read is in the way
            return None if all_read else (self._next_round(rounds), self.beams)
        if self.crowd > best:  # more beams than allowed would not be enough: a flat distribution
            return None if all_read else (rounds[-1], self.beams)
        if self.beams < self.settings.max_beams:
            return self.read, min(2 * self.beams, self.settings.max_beams)
        return None if all_read else (self._next_round(rounds), self.beams)

    def _next_round(self, rounds: Sequence[int]) -> int:
        """The fewest documents with which a proof is likely: if the best answer stays as far ahead as it is.

        Before the first search it is taken for certain. A guess that is wrong costs a search, and nothing else.
        """
        logp = [found.logp for (_, ends), found in self.ranked() if ends][:2]
        best, second = np.exp([*logp, -np.inf, -np.inf][:2])
        lead = best - max(second, np.exp(self.others))
        for read in rounds:
            rest = np.exp(self.rest(self.seeks_corpus, read))
            ahead = lead if self.read else np.exp(self.rest(self.seeks_corpus, 0)) - rest
            if read > self.read and ahead >= rest:
                return read
        return rounds[-1]
