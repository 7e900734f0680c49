"""Exact match, F1, ROUGE-L, whether a text holds an answer, calibration, intervals.

Answers are compared word by word, after they were made equal in one of three ways (`answer_words`): as SQuAD's official
script does, as MLQA's does, or hardly at all.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import regex
from jaxtyping import Bool, Float

# Characters of scripts that are written without spaces: Thai, Lao, Myanmar, Khmer, and what China and Japan write.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = {  # that MLQA leaves out; the English ones are SQuAD's, too
    "ar": re.compile(r"\sال^|ال"),
    "de": re.compile(r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b"),
    "en": re.compile(r"\b(a|an|the)\b"),
    "es": re.compile(r"\b(un|una|unos|unas|el|la|los|las)\b"),
    "vi": re.compile(r"\b(của|là|cái|chiếc|những)\b"),
}
ANY_PUNCTUATION = regex.compile(rf"[\p{{P}}{regex.escape(string.punctuation)}]")
UNSPACED_CHARACTER = regex.compile(rf"([{UNSPACED}])")
# A point joins what it stands within, and a comma joins digits: "U.S." is "us", and "1,100" does not contain "100".
# A vowel sign or accent belongs to its letter, and a character of a script without spaces is a word.
LETTER = rf"(?:(?![{UNSPACED}])[\w\p{{M}}])"
WORD = regex.compile(rf"{LETTER}+(?:(?:\.|(?<=\d),(?=\d)){LETTER}+)*|(?!\p{{P}})[{UNSPACED}]")

CALIBRATION_BINS = 10

Words = Callable[[str], list[str]]  # what is compared of an answer


def squad_words(text: str) -> list[str]:
    """Lower case, without ASCII punctuation and English articles, cut at spaces: SQuAD's script to the letter."""
    return ARTICLES["en"].sub(" ", text.lower().translate(PUNCTUATION)).split()


def mlqa_words(text: str, language: str = "en") -> list[str]:
    """Lower case, without any script's punctuation and the articles of `language`, as MLQA's script; cut at spaces, and
    around each character of a script that has none, where MLQA's does so for Chinese alone.
    """
    plain = ANY_PUNCTUATION.sub("", text.lower())
    if language in ARTICLES:
        plain = ARTICLES[language].sub(" ", plain)
    return UNSPACED_CHARACTER.sub(r" \1 ", plain).split()


def answer_words(normalization: str, language: str) -> Words:
    """How answers are compared under `evaluate.normalization` and `evaluate.language`."""
    ways: dict[str, Words] = {"squad": squad_words, "mlqa": partial(mlqa_words, language=language), "none": str.split}
    return ways[normalization]


def exact_match(prediction: str, answers: Sequence[str], words: Words = squad_words) -> float:
    """1 if the words of the prediction are those of one of the answers, else 0."""
    predicted = words(prediction)
    return float(any(predicted == words(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str], words: Words = squad_words) -> float:
    """The harmonic mean of word precision and recall, against the answer that fits best."""
    predicted = words(prediction)
    return max((_f1(predicted, words(answer)) for answer in answers), default=0.0)


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:  # "the" normalises to nothing: then only nothing is right
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))


def rouge_l(prediction: str, answers: Sequence[str], words: Words = squad_words) -> float:
    """ROUGE-L (Lin 2004): as F1, but of words in the same order, the longest common subsequence; for long answers."""
    predicted = words(prediction)
    return max((_rouge_l(predicted, words(answer)) for answer in answers), default=0.0)


def _rouge_l(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    return 2 * longest_common_subsequence(predicted, gold) / (len(predicted) + len(gold))


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Its length, by Hyyrö's bits (2004): a 0 at bit i where one more word of `one[: i + 1]` can be matched."""
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    every = row = (1 << len(one)) - 1
    for word in other:
        matched = row & places.get(word, 0)
        row = (row + matched) | (row - matched)
    return len(one) - (row & every).bit_count()


def equal_as_nothing(prediction: str, answers: Sequence[str], words: Words = squad_words) -> bool:
    """Whether a prediction counts as right only because nothing is left of it, nor of an answer: "A" and "the"."""
    left = [answer for answer in answers if not words(answer)]
    return bool(left) and not words(prediction) and prediction.strip() not in {answer.strip() for answer in left}


def score_answer(prediction: str, answers: Sequence[str], words: Words = squad_words) -> dict[str, float | bool]:
    """Exact match, F1, ROUGE-L, and whether a prediction contains an answer, as chat models answer in sentences."""
    return {
        "exact_match": exact_match(prediction, answers, words),
        "f1": f1(prediction, answers, words),
        "rouge_l": rouge_l(prediction, answers, words),
        "contains": float(contains_answer(prediction, answers)),
        "equal_as_nothing": equal_as_nothing(prediction, answers, words),
    }


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether the words of some answer stand next to each other in the text, as in DPR's `has_answer`.

    Case, articles and punctuation do not count; numbers are whole words. In scripts without spaces each character is a
    word.
    """
    words = f" {normalized_words(text)} "
    return any(f" {sought} " in words for answer in answers if (sought := normalized_words(answer)))


def normalized_words(text: str) -> str:
    """The words of a text without case, punctuation and articles, with single spaces between them."""
    found = (re.sub("[.,]", "", word) for word in WORD.findall(unicodedata.normalize("NFC", text).lower()))
    return " ".join(word for word in found if word not in ("a", "an", "the"))


@dataclass(frozen=True)
class CalibrationBin:
    """The answers whose confidence lies in one bin: their mean confidence, the share right, and how many they are."""

    confidence: float
    accuracy: float
    count: int


def calibration_bins(
    confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], bins: int = CALIBRATION_BINS
) -> list[CalibrationBin]:
    """The bins of equal width that hold an answer, by confidence (0 to 1)."""
    confidence, hits = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    which = np.clip((confidence * bins).astype(int), 0, bins - 1)
    return [
        CalibrationBin(float(confidence[inside].mean()), float(hits[inside].mean()), int(inside.sum()))
        for number in range(bins)
        if (inside := which == number).any()
    ]


def expected_calibration_error(
    confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], bins: int = CALIBRATION_BINS
) -> float:
    """The mean distance between confidence (0 to 1) and accuracy, over bins of equal width weighted by their size."""
    filled = calibration_bins(confidence, correct, bins)
    if not filled:
        return float("nan")
    return sum(of.count * abs(of.confidence - of.accuracy) for of in filled) / len(confidence)


def bootstrap_interval(values: Float[np.ndarray, " n"], seed: int, n: int = 1000) -> tuple[float, float]:
    """The 95 % interval of the mean of `values`, by n seeded resamplings; of a paired difference, give a − b."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(n)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
