"""Whether two runs differ, against every resampling and every exchange written out."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ragjax.config import load_config
from ragjax.evaluation.comparison import compare, paired_difference, spreads
from ragjax.evaluation.run_results import ModeAnswer, ModeScore, Prediction, RunResults
from ragjax.metrics import bootstrap_interval

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def test_the_interval_is_that_of_every_resampling() -> None:
    """All 6⁶ of them, one mean each; the percentiles of the drawn ones lie within what 9,999 draws can miss."""
    ours, theirs = np.array([0, 1, 0, 0.5, 1, 0.2]), np.array([1, 1, 0.7, 0.4, 1, 0.9])
    differences = theirs - ours
    means = np.sort([differences[list(of)].mean() for of in itertools.product(range(6), repeat=6)])
    found = paired_difference(ours, theirs)
    for share, end in ((0.025, found.low), (0.975, found.high)):
        slack = 4 * math.sqrt(share * (1 - share) / 9999)
        low, high = np.quantile(means, [max(0, share - slack), min(1, share + slack)])
        assert low <= end <= high
    assert found.mean == pytest.approx(differences.mean())


def test_the_p_value_is_that_of_every_exchange() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.random(9), rng.random(9)
    theirs[2] = ours[2]  # tells nothing
    differences = theirs - ours
    signs = np.array(list(itertools.product((1, -1), repeat=9)))
    exchanged = (signs * differences).mean(axis=1)
    p = min(
        1.0, 2 * min((exchanged <= differences.mean() + 1e-12).mean(), (exchanged >= differences.mean() - 1e-12).mean())
    )
    assert paired_difference(ours, theirs).p_value == pytest.approx(p)


@pytest.mark.parametrize(("better", "worse"), [(0, 1), (3, 0), (5, 2), (8, 8), (40, 20)])
def test_right_and_wrong_is_mcnemar(better: int, worse: int) -> None:
    ours = np.r_[np.zeros(better), np.ones(worse), np.ones(10)]
    theirs = np.r_[np.ones(better), np.zeros(worse), np.ones(10)]
    n, few = better + worse, min(better, worse)
    p = min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)
    found = paired_difference(ours, theirs)
    assert found.p_value == pytest.approx(p) and (found.better, found.worse) == (better, worse)
    assert found.low <= found.mean <= found.high


def test_no_difference_at_all() -> None:
    with warnings.catch_warnings(action="error"):
        same, shifted = paired_difference(np.ones(4), np.ones(4)), paired_difference(np.zeros(4), np.ones(4))
        alone = paired_difference(np.zeros(1), np.ones(1))
    assert (same.mean, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    assert (shifted.mean, shifted.low, shifted.high, shifted.p_value) == (1, 1, 1, 0.125)
    assert (alone.low, alone.high, alone.p_value) == (1, 1, 1)


def run_of(name: str, scores: Mapping[str, tuple[float, float | None]]) -> RunResults:
    """Of each question the exact match, and −log p(gold answer) where it is known."""
    predictions = [
        Prediction(
            model="trained",
            line=1,
            id=key,
            question="?",
            gold=["a"],
            answer="a",
            answers={"thorough": "a"},
            scores={"thorough": ModeScore(exact_match=match, f1=match / 2)},
            p_answer=0.5,
            gold_nll=nll,
            mass_outside=None,
            proposed=[],
            modes={"thorough": ModeAnswer(p_answer=0.5, finished=True)},
            documents=[],
        )
        for key, (match, nll) in scores.items()
    ]
    config = load_config(TINY)
    return RunResults(name, config, [], {"models": {"trained": {}}}, {"trained": predictions}, {}, {}, [])


def test_each_question_counts_with_its_mean_over_the_runs() -> None:
    """Of all runs only the questions that each of them answered; a probability that one does not know is left out."""
    ours = [run_of("a", {"p": (0, 2.0), "q": (1, 1.0), "r": (1, 3.0)}), run_of("b", {"q": (0, 2.0), "p": (0, 4.0)})]
    theirs = [run_of("c", {"x": (1, 0.0), "p": (1, 1.0), "q": (1, None)})]
    found = compare(ours, theirs)
    assert found.questions == 2 and found.warnings == ["Only 2 of 3, 2 and 3 questions are the same."]
    match, f1, nll, retrieved = found.measures
    assert (match.measure, match.ours, match.theirs) == ("thorough: exact match", 0.25, 1.0)
    assert match.difference == paired_difference(np.array([0, 0.5]), np.array([1.0, 1.0]))
    assert (f1.ours, f1.theirs) == (0.125, 0.5)
    assert (nll.ours, nll.theirs, nll.difference.questions) == (-3.0, -1.0, 1)
    assert retrieved.difference.mean == 0
    assert compare(ours, [run_of("d", {"y": (1, 0.0)})]).measures == []
    before = replace(
        theirs[0], metrics={"models": {"untrained": {}}}, predictions={"untrained": theirs[0].predictions["trained"]}
    )
    assert compare(ours, [before]).warnings[1:] == ["Measured before training, unlike the others: c."]


def test_the_spread_is_between_runs_and_the_interval_over_questions() -> None:
    """As if each question had one score, the mean of its own; of seeds that agree, the deviation is 0."""
    a = {str(i): (float(i % 2), 1.0) for i in range(10)}
    b = {key: (1.0, 1.0) for key in a}
    found = spreads([run_of("a", a), run_of("b", b)])["thorough: exact match"]
    assert (found.runs, found.mean) == ([0.5, 1.0], 0.75)
    assert found.deviation == pytest.approx(np.sqrt(0.125))
    assert (found.low, found.high) == bootstrap_interval(np.array([0.5, 1.0] * 5), seed=0)
    assert spreads([run_of("a", a), run_of("c", a)])["thorough: exact match"].deviation == 0
    assert spreads([run_of("a", a)])["thorough: exact match"].deviation is None
