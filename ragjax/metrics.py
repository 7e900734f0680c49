"""Exact match, F1, whether a passage holds an answer, calibration, intervals.

Answers are compared as SQuAD's official script compares them: lower case, no punctuation, articles or extra spaces.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
# A point joins what it stands within, and a comma joins digits: "U.S." is "us", and "1,100" does not contain "100".
WORD = re.compile(r"\w+(?:(?:\.|(?<=\d),(?=\d))\w+)*")


def normalize(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, words apart by one space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the normalised prediction equals one of the normalised answers, else 0."""
    return float(any(normalize(prediction) == normalize(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The harmonic mean of word precision and recall, against the answer that fits best."""
    return max((_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers), default=0.0)


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:  # "the" normalises to nothing: then only nothing is right
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))


def normalized_words(text: str) -> str:
    found = (re.sub("[.,]", "", word) for word in WORD.findall(unicodedata.normalize("NFC", text).lower()))
    return " ".join(word for word in found if word not in ("a", "an", "the"))


def expected_calibration_error(
    confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], bins: int = 10
) -> float:
    """The mean distance between confidence (0 to 1) and accuracy, over bins of equal width weighted by their size."""
    confidence, hits = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if not len(confidence):
        return float("nan")
    which = np.clip((confidence * bins).astype(int), 0, bins - 1)
    distance = np.bincount(which, weights=confidence - hits, minlength=bins)
    return float(np.abs(distance).sum() / len(confidence))


def bootstrap_interval(values: Float[np.ndarray, " n"], seed: int, n: int = 1000) -> tuple[float, float]:
    """The 95 % interval of the mean of `values`, by n seeded resamplings; of a paired difference, give a − b."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(n)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
