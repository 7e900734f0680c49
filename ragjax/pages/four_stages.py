"""The four stages of one answer as a drawing: what `templates/four_stages.html` prints.

An answer comes as `ragjax answer --json` prints it (`answering/answers.py`), so that a file, the server and a notebook
draw the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ragjax.pages.rendering import asset, page, render
from ragjax.pages.wording import marked, proof_text

MOST_CANDIDATES = 12  # rows of the heat map; how many more there are is told
NARROW = 12  # with more documents the cells of the heat map show no numbers, but for those that listen
LOW = 0.5  # an answer of less probability is one to look at


@dataclass(frozen=True)
class Beam:
    """An answer that a document proposed, with p(y|x,z)."""

    text: str
    p: float
    finished: bool


@dataclass(frozen=True)
class StageDocument:
    """A document z: its text in pieces (see `wording.marked`), p(z|x), p(z|x,y) of the answer, and its proposals."""

    number: int
    id: str
    title: str
    pieces: list[tuple[str, bool]]
    prior: float
    posterior: float | None
    right: bool | None  # whether it answers the question; None where that is not known
    beams: list[Beam]


@dataclass(frozen=True)
class Share:
    """One document's part of a candidate's bar, p(z|x)·p(y|x,z); `start` and `width` are shares of the bar's length."""

    number: int
    p: float
    start: float
    width: float
    missed: bool  # by fast decoding: the document did not propose this candidate


@dataclass(frozen=True)
class Cell:
    """p(y|x,z) in the heat map, None where it is not known; `level` is its shade, 0 to 10."""

    p: float | None
    level: int
    proposed: bool


@dataclass(frozen=True)
class StageCandidate:
    """A candidate as the drawing shows it: a row of stage 3."""

    text: str
    finished: bool
    cells: list[Cell]
    shares: list[Share]
    p: float  # by which it was chosen
    fast: float | None
    bounds: tuple[float, float] | None
    whisker: tuple[float, float] | None  # the bounds as shares of the bar's length


@dataclass(frozen=True)
class Stages:
    """All that the drawing shows."""

    question: str
    text: str
    mode: str
    probability: float
    bounds: tuple[float, float] | None
    proof: str | None
    scores: Sequence[int] | None
    documents: list[StageDocument]
    proposing: bool  # whether documents propose alone; with RAG-Token and exact decoding they do not
    candidates: list[StageCandidate]
    more: int  # candidates that are not drawn
    scale: float  # the probability at the end of the bars
    narrow: bool
    outside: float | None
    gold: Sequence[str]
    correct: bool | None


def stages(
    answer: Mapping[str, Any],
    gold: Sequence[str] = (),
    correct: bool | None = None,
    right: Sequence[bool] | None = None,
    longest: int | None = None,
) -> Stages:
    """The drawing of an answer.

    Args:
        answer: as JSON.
        gold: right answers, where they are known.
        correct: whether the answer is one of them.
        right: which documents answer the question.
        longest: so many characters are shown of each passage.
    """
    candidates, documents = answer["candidates"], answer["documents"]
    first = candidates[0]
    sought = [text for text in (answer["text"], *gold) if text.strip()]
    ends = [max(_chosen_by(of), *(of.get("probability_bounds") or (0.0,))) for of in candidates[:MOST_CANDIDATES]]
    scale = max(*ends, 1e-30)
    bounds = answer.get("probability_bounds")
    return Stages(
        question=answer["question"],
        text=answer["text"],
        mode=answer["mode"],
        probability=answer["probability"],
        bounds=None if bounds is None or bounds[0] == bounds[1] else (bounds[0], bounds[1]),
        proof=None if answer.get("proved") is None else proof_text(answer),
        scores=answer.get("scores"),
        documents=[
            StageDocument(
                number=z + 1,
                id=document["id"],
                title=document["title"],
                pieces=marked(document["text"], sought, longest),
                prior=document["prior"],
                posterior=None if first["posterior"] is None else first["posterior"][z],
                right=None if right is None else right[z],
                beams=_beams(candidates, z),
            )
            for z, document in enumerate(documents)
        ],
        proposing=any(p > 0 for candidate in candidates for p in candidate["beam_probability"]),
        candidates=[_candidate(of, [d["prior"] for d in documents], scale) for of in candidates[:MOST_CANDIDATES]],
        more=max(0, len(candidates) - MOST_CANDIDATES),
        scale=scale,
        narrow=len(documents) > NARROW,
        outside=answer.get("mass_outside"),
        gold=gold,
        correct=correct,
    )


def _chosen_by(candidate: Mapping[str, Any]) -> float:
    """p(y|x), or what it is at least: the best that is known of it."""
    values = (candidate["thorough"], *(candidate.get("probability_bounds") or ())[:1], candidate["fast"])
    return next((p for p in values if p is not None), 0.0)


def _beams(candidates: Sequence[Mapping[str, Any]], z: int) -> list[Beam]:
    beams = [
        Beam(candidate["text"], candidate["beam_probability"][z], candidate["finished"])
        for candidate in candidates
        if candidate["beam_probability"][z] > 0
    ]
    return sorted(beams, key=lambda beam: -beam.p)


def _candidate(candidate: Mapping[str, Any], prior: Sequence[float], scale: float) -> StageCandidate:
    beam, given = candidate["beam_probability"], candidate["doc_probability"]
    probabilities: Sequence[float | None] = given if given is not None else [p if p > 0 else None for p in beam]
    fast_ran = candidate["fast"] is not None
    shares, at = list[Share](), 0.0
    for z, p in enumerate(probabilities):
        if p is not None and (part := prior[z] * p) > 1e-4 * scale:  # what is smaller is no pixel wide
            shares.append(Share(z + 1, part, at / scale, part / scale, fast_ran and given is not None and beam[z] == 0))
            at += part
    if not shares and prior:  # only what it is in all is known
        shares.append(Share(0, _chosen_by(candidate), 0.0, _chosen_by(candidate) / scale, False))
    bounds = candidate.get("probability_bounds")
    interval = None if bounds is None or bounds[0] == bounds[1] else (bounds[0], bounds[1])
    return StageCandidate(
        text=candidate["text"],
        finished=candidate["finished"],
        cells=[Cell(p, round(10 * min(p or 0.0, 1.0)), beam[z] > 0) for z, p in enumerate(probabilities)],
        shares=shares,
        p=_chosen_by(candidate),
        fast=candidate["fast"],
        bounds=interval,
        whisker=None if interval is None else (interval[0] / scale, interval[1] / scale),
    )


def stages_fragment(answer: Mapping[str, Any]) -> str:
    """The drawing with its style, as a notebook shows it."""
    style = asset("style.css").replace(":root", ".ragjax")
    return render("notebook.html", style=Markup(style), stages=stages(answer))


def stages_page(answer: Mapping[str, Any]) -> str:
    """The drawing as a page of its own."""
    return page(answer["question"], render("answer.html", stages=stages(answer)))
