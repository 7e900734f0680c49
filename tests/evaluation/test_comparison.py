"""Whether two runs differ, against every resampling and every exchange written out."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest

from ragjax.evaluation.comparison import in_pairs, paired_difference


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


def test_questions_are_paired_by_what_they_are() -> None:
    assert in_pairs(["a", "b", "c"], ["c", "x", "a"]) == [(0, 2), (2, 0)]
