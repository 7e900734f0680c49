"""Whether two runs differ: the same questions answered by both, their scores compared in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

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


def in_pairs(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int]]:
    """Where the questions of both stand, by what identifies each, in the order of ours."""
    places = {key: i for i, key in enumerate(theirs)}
    return [(i, places[key]) for i, key in enumerate(ours) if key in places]
