"""What a run has left to look at: its training's log, its metrics and its predictions, read and checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ragjax.config import Config
from ragjax.data.reading.byte_stream import byte_lines
from ragjax.errors import InputError
from ragjax.evaluation.predictions import METRICS, PASSAGES, PREDICTIONS
from ragjax.files import read_json, unicode_json
from ragjax.runs.run_dir import load_run_config

AGAIN = "run: ragjax evaluate CONFIG"
STEPS = "train.jsonl"
INDEX_REPORT = "index_report.json"


class _Record(BaseModel):
    """A part of a file; what it holds besides is of no interest."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class PredictedDocument(_Record):
    """A document of a question, and what it says of the answer."""

    id: str
    passage: int
    title: str
    right: bool
    prior: float
    p_answer: float | None
    posterior: float | None


class ProposedAnswer(_Record):
    """See `predictions.proposed_answers`."""

    text: str
    finished: bool
    fast: float | None = None
    thorough: float | None = None
    bounds: list[float] | None = None
    beams: dict[str, float] = {}
    given: list[float] | None = None


class ModeScore(_Record):
    """How the answer of one mode compares with the right ones."""

    exact_match: float
    f1: float
    rouge_l: float | None = None  # an older version's have none


class ModeAnswer(_Record):
    """What one mode tells of its answer; what only some modes know may be None."""

    p_answer: float
    finished: bool
    probability_bounds: list[float] | None = None
    proved: dict[str, bool | None] | None = None
    documents_read: int | None = None
    steps: int | None = None
    seconds: float | None = None


class Prediction(_Record):
    """A line of predictions.jsonl about a question that was answered."""

    model: str
    line: int
    id: str
    question: str
    gold: list[str]
    answer: str
    answers: dict[str, str]
    scores: dict[str, ModeScore]
    p_answer: float
    gold_nll: float | None
    mass_outside: float | None
    proposed: list[ProposedAnswer]
    modes: dict[str, ModeAnswer]
    documents: list[PredictedDocument]

    @property
    def key(self) -> str:
        """What makes it the same question in another run."""
        return f"{self.id}\n{self.question}"

    @property
    def mode(self) -> str:
        """The mode whose answer and probabilities these are."""
        return next(iter(self.modes))

    @property
    def right(self) -> bool:
        """Whether the answer of the first mode is an exact match."""
        return self.scores[self.mode].exact_match == 1

    @property
    def differs(self) -> bool:
        """Whether the ways to decode that read documents gave different answers."""
        return len({answer for mode, answer in self.answers.items() if mode != "closed_book"}) > 1

    @property
    def retrieved(self) -> bool:
        """Whether a passage that answers the question is among the documents."""
        return any(document.right for document in self.documents)


class _Passage(_Record):
    passage: int
    text: str


class _ModeMetrics(_Record):
    exact_match: float | None
    exact_match_interval: list[float] | None
    f1: float | None
    rouge_l: float | None = None
    contains: float | None
    equal_as_nothing: int
    proved: dict[str, float | None] | None = None
    seconds_per_question: float | None = None


class _ModelMetrics(_Record):
    step: int | None
    questions: int
    answered: int
    top_k_mass: float | None
    mass_over_k: list[float] | None
    recall_over_k: list[float]
    gold_nll: float | None
    calibration_error: float | None


class _Metrics(_Record):
    split: str
    decode: dict[str, Any]
    bm25_docs: int = 0
    models: dict[str, _ModelMetrics]


class _AtK(_Record):
    k: int
    answered: float
    mass: dict[str, float]


class _IndexReport(_Record):
    k: list[_AtK]


@dataclass(frozen=True)
class RunResults:
    """One run: what it was trained to, what was measured, and what it answered."""

    name: str
    config: Config
    steps: list[dict[str, float]]  # of train.jsonl
    metrics: dict[str, Any]  # as metrics.json has them
    predictions: dict[str, list[Prediction]]  # by model, in the order of the file
    unanswered: dict[str, int]  # questions that could not be asked, by model
    passages: dict[int, str]  # texts by number in the index
    mass: list[tuple[int, float, float]]  # k, the median prior mass and the share of questions answered; if measured

    @property
    def model(self) -> str:
        """The model to look at: trained, where there is one."""
        return list(self.metrics["models"])[-1]

    @property
    def modes(self) -> list[str]:
        """What was measured, the first mode first."""
        first = next(iter(self.predictions[self.model]), None)
        return [] if first is None else list(first.modes)


def read_run_results(folder: Path, name: str | None = None) -> RunResults:
    """The results in the folder of a run, called `name` or as the folder is.

    Raises `InputError` where it was not evaluated, or a file is damaged.
    """
    config, metrics, path = load_run_config(folder), read_metrics(folder), folder / METRICS
    predictions: dict[str, list[Prediction]] = {model: [] for model in metrics["models"]}
    unanswered = dict.fromkeys(metrics["models"], 0)
    for where, record in _lines(folder / PREDICTIONS):
        if (about := record.get("model")) not in predictions:
            raise InputError(f"{where}: is about another model than {path} measures; {AGAIN}")
        if "error" in record:
            unanswered[about] += 1
        else:
            prediction = _sound(_checked(Prediction, record, where), where)
            if not prediction.modes.keys() <= metrics["models"][about].keys():
                raise InputError(f"{where}: tells of modes that {path} does not measure; {AGAIN}")
            predictions[about].append(prediction)
    texts = [_checked(_Passage, record, where) for where, record in _lines(folder / PASSAGES)]
    passages = {of.passage: of.text for of in texts}
    for of in (document for lines in predictions.values() for line in lines for document in line.documents):
        if of.passage not in passages:
            raise InputError(f"{folder / PASSAGES}: lacks passage {of.passage}, {of.id!a}; {AGAIN}")
    return RunResults(
        name=name or folder.resolve().name,
        config=config,
        steps=list(_read_steps(folder / STEPS)),
        metrics=metrics,
        predictions=predictions,
        unanswered=unanswered,
        passages=passages,
        mass=_read_index_report(folder / INDEX_REPORT),
    )


def read_metrics(folder: Path) -> dict[str, Any]:
    """What metrics.json holds. Raises `InputError` where there is none, or it is damaged."""
    path = folder / METRICS
    metrics = read_json(path, AGAIN)
    for model in _checked(_Metrics, metrics, path).models:
        for mode in ("exact", "thorough", "certified", "fast", "closed_book"):
            if mode in metrics["models"][model]:
                _checked(_ModeMetrics, metrics["models"][model][mode], path)
    if not metrics["models"]:
        raise InputError(f"{path}: measures no model; {AGAIN}")
    return metrics


def answer_json(prediction: Prediction, passages: dict[int, str]) -> dict[str, Any]:
    """A prediction as `ragjax answer --json` prints an answer, so that it can be drawn; with four digits."""
    documents = prediction.documents
    chosen = prediction.modes[prediction.mode]
    proved = None
    if chosen.proved is not None:
        proved = {claim: None if it is None else int(it) for claim, it in chosen.proved.items()}
    return {
        "question": prediction.question,
        "text": prediction.answer,
        "mode": prediction.mode,
        "probability": prediction.p_answer,
        "documents": [
            {"id": of.id, "title": of.title, "text": passages[of.passage], "prior": of.prior} for of in documents
        ],
        "candidates": [
            {
                "text": of.text,
                "finished": of.finished,
                "fast": of.fast,
                "thorough": of.thorough,
                "beam_probability": [of.beams.get(str(z), 0.0) for z in range(len(documents))],
                "doc_probability": of.given,
                "posterior": [document.posterior for document in documents] if i == 0 else None,
                "probability_bounds": of.bounds,
            }
            for i, of in enumerate(prediction.proposed)
        ],
        "probability_bounds": chosen.probability_bounds,
        "proved": proved,
        "documents_read": chosen.documents_read,
        "steps": chosen.steps,
        "mass_outside": prediction.mass_outside,
    }


R = TypeVar("R", bound=_Record)


def _checked(record: type[R], value: Any, where: str | Path) -> R:
    try:
        return record.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "the value"
        raise InputError(f"{where}: {at}: {first['msg'].lower()}; {AGAIN}, which writes it anew") from None


def _sound(prediction: Prediction, where: str) -> Prediction:
    """Refuses a line whose parts do not belong together."""
    count, modes, chosen = len(prediction.documents), prediction.modes.keys(), list(prediction.modes.values())
    pairs = [*(of.bounds for of in prediction.proposed), *(of.probability_bounds for of in chosen)]
    proofs = [of for of in chosen if of.proved is not None]
    problems = {
        "answers, scores, modes and candidates": bool(modes and prediction.proposed)
        and prediction.answers.keys() == modes == prediction.scores.keys(),
        "candidates and documents": all(len(of.given or ()) in (0, count) for of in prediction.proposed),
        "documents": len({of.posterior is None for of in prediction.documents}) < 2,
        "bounds": all(len(pair) == 2 for pair in pairs if pair is not None),
        "proofs": all((of.proved or {}).keys() == {"top_k", "corpus"} for of in proofs)
        and all(None not in (of.documents_read, of.steps) for of in proofs),
    }
    for name, sound in problems.items():
        if not sound:
            raise InputError(f"{where}: {name} disagree; {AGAIN}, which writes it anew")
    return prediction


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise InputError(f"{path}: missing; {AGAIN}")
    for number, line in byte_lines(path):
        where = f"{path}:{number}"
        record = unicode_json(line, where)
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected a JSON object; {AGAIN}, which writes it anew")
        yield where, record


def _read_steps(path: Path) -> Iterator[dict[str, float]]:
    """The steps of training; none for a run that was only evaluated. A last line that is not whole is left out."""
    for number, line in byte_lines(path) if path.is_file() else ():
        if not line.endswith(b"\n"):
            return
        record = unicode_json(line, f"{path}:{number}")
        numbers = isinstance(record, dict) and all(type(value) in (int, float) for value in record.values())
        if not numbers or type(record.get("step")) is not int:
            raise InputError(f"{path}:{number}: no line of this log; remove it")
        yield {name: float(value) for name, value in record.items()}


def _read_index_report(path: Path) -> list[tuple[int, float, float]]:
    """What `ragjax index-report` measured, if it was run."""
    if not path.is_file():
        return []
    report = _checked(_IndexReport, read_json(path), path)
    if any("median" not in at.mass for at in report.k):
        raise InputError(f"{path}: mass: has no median; run: ragjax index-report CONFIG")
    return [(at.k, at.mass["median"], at.answered) for at in report.k]
