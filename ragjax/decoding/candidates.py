"""The distinct answers that the documents of a question proposed, and what each is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ragjax.decoding.beam_search import Beams
from ragjax.decoding.prefix_cache import Tokens
from ragjax.models.generator import SpecialTokens
from ragjax.padding import bucket_size

TokenAnswer = tuple[Tokens, bool]  # its tokens without the end token, and whether it was finished


@dataclass(frozen=True)
class Proof:
    """What exact decoding proved of the first candidates.

    A number i stands where the first i candidates are the i likeliest of all answers, as a set: no other answer, found
    or not, is likelier than the last of them by more than `marginal.TIE`. Where 1, 2, …, i all stand they are in order.
    """

    top_k: tuple[int, ...]  # under the K documents, ascending
    corpus: tuple[int, ...] | None  # under all passages; None where the prior over the corpus is not known
    documents_read: int  # by the searches
    steps: int  # of all beam searches

    @property
    def best(self) -> bool:
        """Whether the first candidate is the likeliest answer under the K documents."""
        return 1 in self.top_k

    def in_order(self, most: int) -> dict[str, int | None]:
        """By claim, how many of the first `most` candidates are the likeliest answers in this order; 0 is none."""

        def count(sizes: tuple[int, ...]) -> int:
            return next(i for i in range(most + 1) if i == most or i + 1 not in sizes)

        return {"top_k": count(self.top_k), "corpus": None if self.corpus is None else count(self.corpus)}

    def as_set(self, most: int) -> dict[str, int | None]:
        """By claim, how many of the first `most` candidates are the likeliest answers in some order; 0 is none."""

        def largest(sizes: tuple[int, ...]) -> int:
            return max((i for i in sizes if i <= most), default=0)

        return {"top_k": largest(self.top_k), "corpus": None if self.corpus is None else largest(self.corpus)}


@dataclass(frozen=True)
class Candidates:
    """The C distinct answers that the K documents of one question proposed, and what each is worth (nats).

    A marginal that was not computed is None. With RAG-Token no document proposes alone, and `posterior` is the mean
    over the tokens.
    """

    tokens: list[Tokens]  # without the end token
    finished: Bool[np.ndarray, " C"]
    beam_logp: Float[np.ndarray, "K C"]  # log p(y|x,z) by the beam search; −inf where z did not propose y
    fast_logp: Float[np.ndarray, " C"] | None = None  # log p(y|x), other documents contributing 0
    doc_logp: Float[np.ndarray, "K C"] | None = None  # log p(y|x,z) under every document
    thorough_logp: Float[np.ndarray, " C"] | None = None
    posterior: Float[np.ndarray, "K C"] | None = None  # p(z|x,y), from `doc_logp`
    ranked: bool = False  # the candidates stand in the order of choice
    bounds: Float[np.ndarray, "2 C"] | None = None  # certified, exact: the marginal is at least and at most this
    needed: tuple[int, int] | None = None  # certified: scores computed, and scores that thorough decoding needs
    proof: Proof | None = None  # exact

    def marginal(self, mode: str) -> Float[np.ndarray, " C"]:
        """log p(y|x) of every candidate, `thorough` or `fast`; of `certified` and `exact`, the lower bound."""
        lower = None if self.bounds is None else self.bounds[0]
        marginals = {"thorough": self.thorough_logp, "fast": self.fast_logp, "certified": lower, "exact": lower}
        marginal = marginals[mode]
        assert marginal is not None, f"these candidates have no {mode} marginal"
        return marginal

    def best(self, mode: str, count: int = 1) -> list[int]:
        """The best candidates; an unfinished one only where no finished one is left. The first proposed wins ties."""
        if self.ranked:
            return list(range(min(count, len(self.tokens))))
        order = np.lexsort((-self.marginal(mode), ~self.finished))
        return [int(i) for i in order[:count]]


def pad_answers(
    answers: Sequence[Sequence[TokenAnswer]], special: SpecialTokens, longest: int
) -> tuple[Int[np.ndarray, "B C T"], Int[np.ndarray, "B C"]]:
    """Answers with their end tokens, C padded to 1, 2, 3, 4, 6, 8, 12, 16, …, T to a quarter, half or all of `longest`.

    Few shapes, so that few programs are compiled; padding every question to K·W would undo deduplication.
    """
    rows = [with_end(by_question, special) for by_question in answers]
    count = bucket_size(max([1, *map(len, rows)]))
    needed = max((len(y) for by_question in rows for y in by_question), default=1)
    depth = next(size for size in (-(-longest // 4), -(-longest // 2), longest, needed) if size >= needed)
    tokens = np.full((len(rows), count, depth), special.pad, np.int32)
    lengths = np.zeros((len(rows), count), np.int32)
    for b, by_question in enumerate(rows):
        for c, y in enumerate(by_question):
            tokens[b, c, : len(y)] = y
            lengths[b, c] = len(y)
    return tokens, lengths


def with_end(answers: Sequence[TokenAnswer], special: SpecialTokens) -> list[Tokens]:
    """Answers as they are scored: the end token belongs to a finished one."""
    return [(*tokens, special.eos) if ends else tokens for tokens, ends in answers]


def distinct_answers(
    beams: Beams, first_row: int, log_prior: Float[np.ndarray, " K"]
) -> dict[TokenAnswer, dict[int, float]]:
    """The distinct answers of one question in the order proposed, and for each: document → log p(y|x,z), nats.

    `first_row` is the row of `beams` that its first document has. Without any document there is only the empty answer,
    of probability 0.
    """
    answers: dict[TokenAnswer, dict[int, float]] = {}
    for document in np.flatnonzero(log_prior > -np.inf):
        row = first_row + document
        for beam in np.flatnonzero(beams.logp[row] > -np.inf):
            ends = bool(beams.finished[row, beam])
            tokens = tuple(int(t) for t in beams.tokens[row, beam, : beams.length[row, beam] - ends])
            answers.setdefault((tokens, ends), {})[int(document)] = float(beams.logp[row, beam])
    return answers or {((), False): {}}


def as_candidates(
    answers: Sequence[Sequence[TokenAnswer]], arrays: Mapping[str, np.ndarray], ranked: bool = False
) -> list[Candidates]:
    """The candidates of B questions from arrays [B,…,C] that have the names of the fields of `Candidates`."""
    made = []
    for b, own in enumerate(answers):
        tokens, finished = [y for y, _ in own], np.array([ends for _, ends in own], bool)
        worth: dict[str, Any] = {name: array[b, ..., : len(own)] for name, array in arrays.items()}
        made.append(Candidates(tokens, finished, **worth, ranked=ranked))
    return made
