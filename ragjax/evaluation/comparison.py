"""Whether runs differ: the same questions answered by all, their scores compared in pairs.

Of several runs on one side, such as those of several seeds, each question counts with its mean over these runs. So a
question is drawn with all of its answers, which are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ragjax.evaluation.metrics_table import MODES
from ragjax.evaluation.run_results import RunResults
from ragjax.metrics import bootstrap_interval

MEASURES = (("exact match", "exact_match"), ("F1", "f1"), ("ROUGE-L", "rouge_l"))
RESAMPLINGS = 9999
SETTINGS = {"n_resamples": RESAMPLINGS, "batch": 100}  # a batch's samples are in memory together


@dataclass(frozen=True)
class PairedDifference:
    """The mean of theirs − ours over the questions of both, with its 95 % interval and the test of no difference."""

    questions: int
    better: int  # questions on which theirs is higher
    worse: int
    mean: float
    low: float
    high: float
    p_value: float


def paired_difference(ours: Float[np.ndarray, " n"], theirs: Float[np.ndarray, " n"]) -> PairedDifference:
    """Compares the scores of two runs on the same n ≥ 1 questions.

    The interval is the percentile bootstrap over questions (Efron and Tibshirani 1993, chapter 13). The p-value is that
    of the paired permutation test (Fisher 1935), two-sided: without a difference each pair could as well stand the
    other way round. Questions on which both score the same tell nothing, and are left out of it. It is exact where 2
    to the number of the others is at most `RESAMPLINGS`; of scores of 0 and 1 it is always, as McNemar's exact test.
    """
    from scipy import stats

    differences = np.asarray(theirs, np.float64) - np.asarray(ours, np.float64)
    moved = differences[differences != 0]
    better, worse = int((moved > 0).sum()), int((moved < 0).sum())
    low = high = float(differences.mean())
    if len(np.unique(differences)) > 1:
        drawn = stats.bootstrap(
            (differences,),
            np.mean,
            n_resamples=RESAMPLINGS,
            method="percentile",
            batch=100,
            rng=np.random.default_rng(0),
        )
        low, high = map(float, drawn.confidence_interval)
    if not len(moved):
        p_value = 1.0
    elif len(np.unique(np.abs(moved))) == 1:
        p_value = float(stats.binomtest(better, better + worse).pvalue)
    else:
        test = stats.permutation_test(
            (moved, np.zeros_like(moved)),
            lambda a, b, axis: np.mean(a - b, axis=axis),
            permutation_type="samples",
            vectorized=True,
            **SETTINGS,
            rng=np.random.default_rng(0),
        )
        p_value = float(test.pvalue)
    return PairedDifference(len(differences), better, worse, float(differences.mean()), low, high, p_value)


@dataclass(frozen=True)
class Compared:
    """A measure of two sides: the mean of each over the questions of all runs, and how theirs differs from ours."""

    measure: str
    ours: float
    theirs: float
    difference: PairedDifference


@dataclass(frozen=True)
class Comparison:
    """Every measure that all runs have, over the questions that all of them answered, and what is to be said of it."""

    questions: int
    measures: list[Compared]
    warnings: list[str]


def compare(ours: Sequence[RunResults], theirs: Sequence[RunResults]) -> Comparison:
    """Compares the last models of some runs with those of others; without a question in common there is no measure."""
    runs = [*ours, *theirs]
    gold = [{of.key: of.gold for of in run.predictions[run.model]} for run in runs]
    shared = [key for key in gold[0] if all(key in by_question for by_question in gold)]
    scores = [question_scores(run) for run in runs]
    measures = []
    for measure in scores[0]:
        if not all(measure in of for of in scores):
            continue
        keys = [key for key in shared if all(key in of[measure] for of in scores)]
        every = np.array([[of[measure][key] for key in keys] for of in scores], np.float64)
        if keys:
            a, b = every[: len(ours)].mean(axis=0), every[len(ours) :].mean(axis=0)
            measures.append(Compared(measure, float(a.mean()), float(b.mean()), paired_difference(a, b)))
    warnings = []
    if len(shared) < max(map(len, gold)):
        counts = [str(len(by_question)) for by_question in gold]
        warnings.append(f"Only {len(shared)} of {', '.join(counts[:-1])} and {counts[-1]} questions are the same.")
    if len({run.model for run in runs}) > 1:
        named = ", ".join(run.name for run in runs if run.model != "trained")
        warnings.append(f"Measured before training, unlike the others: {named}.")
    if any(by_question[key] != gold[0][key] for by_question in gold for key in shared):
        warnings.append("The right answers of some questions differ between the runs.")
    return Comparison(len(shared), measures, warnings)


def question_scores(run: RunResults) -> dict[str, dict[str, float]]:
    """What was measured of each question that the last model of a run answered: measure → question → value."""
    predictions = run.predictions[run.model]
    scores: dict[str, dict[str, float]] = {}
    for mode in MODES:
        if predictions and all(mode in of.scores for of in predictions):
            for label, name in MEASURES:
                values = {of.key: getattr(of.scores[mode], name) for of in predictions}
                if None not in values.values():
                    scores[f"{mode.replace('_', ' ')}: {label}"] = values
    scores["log p(gold answer), nats"] = {of.key: -of.gold_nll for of in predictions if of.gold_nll is not None}
    scores["a right passage is retrieved"] = {of.key: float(of.retrieved) for of in predictions}
    return {measure: values for measure, values in scores.items() if values}


@dataclass(frozen=True)
class Spread:
    """A measure of several runs: the mean of their means, with the 95 % interval over questions.

    `deviation` is the standard deviation between the runs' means (with n − 1), None for one run.
    """

    runs: list[float]
    mean: float
    deviation: float | None
    low: float
    high: float


def spreads(runs: Sequence[RunResults]) -> dict[str, Spread]:
    """Of runs that differ by their seed alone, each measure that all have."""
    scores = [question_scores(run) for run in runs]
    found = {}
    for measure in scores[0]:
        if all(measure in of for of in scores):
            means = [float(np.mean(list(of[measure].values()))) for of in scores]
            by_question: dict[str, list[float]] = {}
            for of in scores:
                for key, value in of[measure].items():
                    by_question.setdefault(key, []).append(value)
            low, high = bootstrap_interval(np.array([np.mean(values) for values in by_question.values()]), seed=0)
            deviation = float(np.std(means, ddof=1)) if len(means) > 1 else None
            found[measure] = Spread(means, float(np.mean(means)), deviation, low, high)
    return found
