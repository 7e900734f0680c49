"""An answer and everything it was chosen from, as values: what `ragjax answer --json` prints, and what a page draws."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Document:
    """A passage that was read; `prior` is p(z|x)."""

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
    """What was answered, how probable it is, and everything it was chosen from, best candidate first.

    A notebook draws its four stages.
    """

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
    # the share of the softmax over the whole corpus that passages not retrieved hold; None with a FAISS index, without
    # documents, and with passages that the caller gave
    mass_outside: float | None = None

    def _repr_html_(self) -> str:
        from ragjax.pages.four_stages import stages_fragment

        return stages_fragment(dataclasses.asdict(self))

    def save_html(self, path: str | Path) -> Path:
        """Writes the four stages as one page that needs no network, and returns its path. Raises `InputError`."""
        from ragjax.pages.four_stages import stages_page
        from ragjax.pages.rendering import write_html

        return write_html(Path(path), stages_page(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Score:
    """What a given answer y to a question is worth, in nats; see `Answerer.score`."""

    answer: str
    logp: float  # log p(y|x)
    doc_logp: list[float]  # log p(y|x,z) of each document
    documents: list[Document]
