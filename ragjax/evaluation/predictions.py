"""The lines of predictions.jsonl, made of what each mode decoded, and the metrics that follow from them.

RUN/predictions.jsonl   one line a question and model
RUN/passages.jsonl      each passage that they name, once
RUN/metrics.json        the metrics
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ragjax.answerer import Answerer
from ragjax.data.passage_store import PassageStore
from ragjax.data.questions import LeftOut, Question
from ragjax.decoding.candidates import Candidates
from ragjax.metrics import answer_words, bootstrap_interval, expected_calibration_error, score_answer
from ragjax.retrieval.retrieve import RetrievalResult

METRICS, PREDICTIONS, PASSAGES = "metrics.json", "predictions.jsonl", "passages.jsonl"
COMPARED = (("exact", "thorough"), ("thorough", "fast"))


def chosen_answer(answerer: Answerer, candidates: Candidates, mode: str) -> dict[str, Any]:
    """What a mode answers, how likely that is, and what is proved of it; tokens count without <s> and the end."""
    by, special = "fast" if mode == "closed_book" else mode, answerer.rag.special
    best = candidates.best(by)[0]
    starts = (special.bos, special.forced_bos)
    chosen: dict[str, Any] = {
        "answer": answerer.text(candidates.tokens[best]),
        "tokens": sum(token not in starts for token in candidates.tokens[best]),
        "p_answer": float(np.exp(candidates.marginal(by)[best])),
        "finished": bool(candidates.finished[best]),
    }
    if candidates.bounds is not None:
        chosen["probability_bounds"] = np.exp(candidates.bounds[:, best]).tolist()
    if (proof := candidates.proof) is not None:
        # the line holds one answer, so that only whether it is the best of all matters
        chosen["proved"] = {claim: None if n is None else bool(n) for claim, n in proof.in_order(1).items()}
        chosen |= {"documents_read": proof.documents_read, "steps": proof.steps}
    return chosen


def document_shares(
    answerer: Answerer,
    retrieval: RetrievalResult,
    b: int,
    candidates: Candidates,
    mode: str,
    right: Bool[np.ndarray, " K"],
) -> list[dict[str, Any]]:
    """The documents of question b, with p(y|x,z) and p(z|x,y) of the answer chosen; None where they are not known.

    `passage` is its number in the index, and `right` says whether it answers the question.
    """
    best, logp, posterior = candidates.best(mode)[0], candidates.doc_logp, candidates.posterior
    return [
        {
            "id": document.id,
            "passage": int(retrieval.ids[b, z]),
            "title": document.title,
            "right": bool(right[z]),
            "prior": document.prior,
            "p_answer": None if logp is None else float(np.exp(logp[z, best])),
            "posterior": None if posterior is None else float(posterior[z, best]),
        }
        for z, document in enumerate(answerer.documents(retrieval, b))
    ]


def proposed_answers(answerer: Answerer, candidates: Candidates, mode: str, count: int) -> list[dict[str, Any]]:
    """All candidates, best first; what is not known, or is 0, is left out.

    `beams` has p(y|x,z) by the number of each of `count` documents that proposed y, `given` under every document. Four
    digits are kept: these are to be looked at.
    """
    lines = []
    for c in candidates.best(mode, len(candidates.tokens)):
        line: dict[str, Any] = {"text": answerer.text(candidates.tokens[c]), "finished": bool(candidates.finished[c])}
        for name, logp in (("fast", candidates.fast_logp), ("thorough", candidates.thorough_logp)):
            if logp is not None:
                [line[name]] = _probabilities(logp[c : c + 1])
        if candidates.bounds is not None:
            line["bounds"] = _probabilities(candidates.bounds[:, c])
        proposed = candidates.beam_logp[:count, c] > -np.inf
        if proposed.any():
            beams = enumerate(_probabilities(candidates.beam_logp[:count, c]))
            line["beams"] = {str(z): p for z, p in beams if proposed[z]}
        if candidates.doc_logp is not None:
            line["given"] = _probabilities(candidates.doc_logp[:count, c])
        lines.append(line)
    return lines


def _probabilities(logp: Float[np.ndarray, " n"]) -> list[float]:
    """With four digits each, and none below 1e-9."""
    return [float(f"{p:.4g}") if p >= 1e-9 else 0.0 for p in np.exp(logp).tolist()]


def prediction_line(answerer: Answerer, question: Question, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line, of the results of one or several passes; probabilities are those of the first mode's answer."""
    config, by_mode, about = answerer.rag.config.evaluate, dict[str, Any](), dict[str, Any]()
    for result in results:
        about = result | about
        by_mode |= {mode: dict(chosen) for mode, chosen in result.get("modes", {}).items()}
    answers, first = {mode: chosen.pop("answer") for mode, chosen in by_mode.items()}, next(iter(by_mode))
    words = answer_words(config.normalization, config.language)
    return {
        "line": question.line,
        "id": question.id,
        "question": question.question,
        "gold": list(question.answers),
        "answer": answers[first],
        "answers": answers,
        "scores": {mode: score_answer(answer, question.answers, words) for mode, answer in answers.items()},
        "p_answer": by_mode[first]["p_answer"],
        "finished": by_mode[first]["finished"],
        "gold_nll": about["gold_nll"],
        "candidates": about["candidates"],
        "mass_outside": about.get("mass_outside"),
        "proposed": about["proposed"],
        "modes": by_mode,
        "documents": about["documents"],
    }


def passage_lines(store: PassageStore, predictions: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each passage that the lines name, once, by its number in the index."""
    numbers = {document["passage"] for line in predictions for document in line.get("documents", ())}
    return ({"passage": i} | dataclasses.asdict(store[i]) for i in sorted(numbers))


def unanswered_line(question: LeftOut) -> dict[str, Any]:
    """The line of a question that could not be asked."""
    return {
        "line": question.line,
        "id": question.id,
        "question": question.question,
        "gold": list(question.answers),
        "error": question.reason,
    }


def score_modes(predictions: Sequence[dict[str, Any]], missed: int, modes: Sequence[str]) -> dict[str, Any]:
    """Exact match, its interval, F1, ROUGE-L and containment of each mode; `missed` questions more count as wrong.

    `equal_as_nothing` counts the exact matches of which nothing is left on either side, as of "A" and "the". The rest
    is about the questions answered: the shares of answers that are empty or one token, the time, and the proofs.
    """
    scores: dict[str, Any] = {}
    for mode in modes:
        every, chosen = [p["scores"][mode] for p in predictions], [p["modes"][mode] for p in predictions]
        matches, f1s, rouge, contained = (
            np.array([score[name] for score in every] + [0.0] * missed)
            for name in ("exact_match", "f1", "rouge_l", "contains")
        )
        scores[mode] = {
            "exact_match": _mean(matches),
            "exact_match_interval": list(bootstrap_interval(matches, seed=0)) if len(matches) else None,
            "f1": _mean(f1s),
            "rouge_l": _mean(rouge),
            "contains": _mean(contained),
            "equal_as_nothing": sum(score["equal_as_nothing"] for score in every),
            "empty": _mean([not p["answers"][mode] for p in predictions]),
            "one_token": _mean([c["tokens"] == 1 for c in chosen]),
        }
        if chosen and "seconds" in chosen[0]:  # the median leaves out the batches that compiled programs
            seconds = [c["seconds"] for c in chosen]
            scores[mode] |= {"seconds_per_question": float(np.median(seconds)), "seconds": float(sum(seconds))}
        if chosen and "proved" in chosen[0]:
            proved = [c["proved"] for c in chosen]
            has_corpus_proof = proved[0]["corpus"] is not None
            scores[mode]["proved"] = {
                "top_k": _mean([claims["top_k"] for claims in proved]),
                "corpus": _mean([claims["corpus"] for claims in proved]) if has_corpus_proof else None,
            }
            scores[mode] |= {name: _mean([c[name] for c in chosen]) for name in ("documents_read", "steps")}
    return scores


def summarise(predictions: Sequence[dict[str, Any]], missed: int, modes: Sequence[str]) -> dict[str, Any]:
    """The metrics of one model's answers; see `score_modes`. Calibration is about the first mode."""
    summary: dict[str, Any] = {"answered": len(predictions)} | ({"unanswerable": missed} if missed else {})
    summary |= score_modes(predictions, missed, modes)
    for pair in COMPARED:
        if set(pair) <= set(modes):
            differ = [p for p in predictions if len({p["answers"][mode] for mode in pair}) > 1]
            summary[f"{'_and_'.join(pair)}_differ"] = {
                "questions": len(differ),
                **{f"{mode}_right": int(sum(p["scores"][mode]["exact_match"] for p in differ)) for mode in pair},
                **{f"{mode}_p_answer": _mean([p["modes"][mode]["p_answer"] for p in differ]) for mode in pair},
            }
    summary["gold_nll"] = _mean([p["gold_nll"] for p in predictions if p["gold_nll"] is not None])
    summary["mean_candidates"] = _mean([p["candidates"] for p in predictions])
    right = np.array([p["scores"][modes[0]]["exact_match"] == 1 for p in predictions])
    confidence = np.array([p["p_answer"] for p in predictions])
    summary["calibration_error"] = expected_calibration_error(confidence, right) if predictions else None
    return summary


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None
