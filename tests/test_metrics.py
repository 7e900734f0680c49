import itertools
import math
import random
import re
import string
import unicodedata

import numpy as np
import pytest

from ragjax.metrics import (
    answer_words,
    bootstrap_interval,
    contains_answer,
    equal_as_nothing,
    exact_match,
    expected_calibration_error,
    f1,
    longest_common_subsequence,
    mlqa_words,
    rouge_l,
    score_answer,
    squad_words,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Capital, of France!", "capital of france"),
        ("An apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),
        ("the", ""),
        ("Þingvellir\n", "þingvellir"),
    ],
)
def test_normalize(text, expected):
    assert " ".join(squad_words(text)) == expected


def test_exact_match_takes_the_best_alias():
    assert exact_match("The U.S.", ["United States", "US"]) == 1
    assert exact_match("Paris, France", ["Paris"]) == 0
    assert exact_match("", ["Paris"]) == 0
    assert exact_match("Paris", []) == 0


def test_f1_counts_repeated_words_once_each():
    # 2 common of 3 predicted and 4 gold words: precision 2/3, recall 1/2
    assert f1("red red blue", ["red blue green white"]) == pytest.approx(4 / 7)
    assert f1("red red", ["red red green"]) == pytest.approx(4 / 5)
    assert f1("the cat", ["dog", "cat"]) == 1
    assert f1("", ["cat"]) == 0
    assert f1("the", ["a"]) == 1
    assert f1("cat", []) == 0


@pytest.mark.parametrize(
    ("text", "answer", "contained"),
    [
        ("Its capital is Port-au-Prince, since 1770.", "port au prince", True),
        ("Its capital is The Hague.", "Hague", True),
        ("US dollars (USD)", "U.S. dollars", True),
        ("capital:Paris/Versailles", "Paris", True),
        ("Paris's river", "Paris", True),
        ("Parisian", "Paris", False),
        ("1,100 m", "100", False),
        ("3.5 million", "5 million", False),
        ("1,100 m", "1100 m", True),
        ("São Tomé", "Sa\u0303o Tome\u0301", True),
        ("Paris to London", "Paris London", False),
        ("東京は日本の首都です。", "東京", True),
        ("東京は日本の首都です。", "京都", False),
        ("กรุงเทพเป็นเมืองหลวง", "กรุงเทพ", True),
        ("서울은 수도이다", "서울", False),  # Korean has spaces: its words are whole
        ("नमस्ते दुनिया", "नमस", False),  # a vowel sign belongs to its letter
        ("नमस्ते दुनिया", "दुनिया", True),
        ("Er sagte: „Köln“.", "Köln", True),
        ("C++ is a language", "C", True),
        ("ジョン・スミス氏", "ジョン スミス", True),
        ("anything", "the", False),
        ("anything", "", False),
    ],
)
def test_contains_answer_matches_whole_words(text, answer, contained):
    assert contains_answer(text, [answer]) is contained
    assert contains_answer(text, ["missing words", answer]) is contained


def test_expected_calibration_error_by_hand():
    confidence = np.array([0.95, 0.85, 0.15, 0.12, 1.0])
    correct = np.array([True, False, False, True, True])
    # bins 9: (.95, 1.0) sum 1.95 - 2, 8: .85 - 0, 1: .27 - 1
    assert expected_calibration_error(confidence, correct) == pytest.approx((0.05 + 0.85 + 0.73) / 5)
    assert expected_calibration_error(np.ones(4), np.ones(4, bool)) == 0


def test_bootstrap_interval():
    values = np.r_[np.ones(300), np.zeros(100)]
    low, high = bootstrap_interval(values, seed=0)
    normal = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - normal, 0.75 + normal), abs=0.01)
    assert bootstrap_interval(values, seed=0) == (low, high) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval(np.full(5, 2.0), seed=3) == (2.0, 2.0)


# MLQA's own script (mlqa_evaluation_v1.py) in a few lines: what evaluate.normalization=mlqa must equal
MLQA_PUNCTUATION = {chr(i) for i in range(0x30000) if unicodedata.category(chr(i)).startswith("P")} | set(
    string.punctuation
)
MLQA_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": r"\sال^|ال",
}


def as_mlqa(text: str, language: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in MLQA_PUNCTUATION)
    if language in MLQA_ARTICLES:
        text = re.sub(MLQA_ARTICLES[language], " ", text)
    if language != "zh":
        return text.split()
    words, run = [], ""
    for c in text:
        if re.search("[\u4e00-\u9fa5]", c) or c in MLQA_PUNCTUATION:
            words += [*run.split(), c]
            run = ""
        else:
            run += c
    return words + run.split()


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The “Capital”, of a land!", "en"),
        ("¿El río de las Amazonas?", "es"),
        ("Die „Stadt“ an der Ems — eine", "de"),
        ("مدينة القاهرة، الكبرى؟", "ar"),
        ("भारत की राजधानी।", "hi"),
        ("Thủ đô của Việt Nam", "vi"),
        ("“北京”是中国的首都，GDP 3.6 万亿。", "zh"),
    ],
)
def test_mlqa_words_are_those_of_its_script(text, language):
    assert mlqa_words(text, language) == as_mlqa(text, language) != squad_words(text)


def test_answers_in_scripts_without_spaces():
    words = answer_words("mlqa", "other")
    assert exact_match("東京。", ["東京"], words) == 1 and exact_match("東京。", ["東京"]) == 0
    assert exact_match("“Paris”", ["Paris"], words) == 1 and exact_match("“Paris”", ["Paris"]) == 0
    assert f1("東京都", ["東京"], words) == pytest.approx(4 / 5) and f1("東京都", ["東京"]) == 0
    assert f1("ประเทศไทย", ["ไทย"], words) == pytest.approx(2 * 3 / 12)
    none = answer_words("none", "en")
    assert exact_match("The Hague", ["Hague"], none) == 0 and exact_match(" The  Hague\n", ["The Hague"], none) == 1


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        (
            "on fell the fell a fell rain fell on fell cat cat cat the",
            "sat fell fell rain fell sat while fell while a the on mat",
            0.444444444444,
        ),
        ("fell a rain sat", "fell fell the rain while rain mat mat rain sat while while the", 0.352941176471),
        ("cat rain cat a the fell rain fell a sat", "while a rain a fell", 0.4),
        ("Rain fell on the mat, while a cat sat.", "The cat sat on the mat while rain fell.", 0.444444444444),
        ("no word in common", "cat", 0.0),
    ],
)
def test_rouge_l_is_that_of_googles_script(prediction, gold, expected):
    """rouge-score 0.1.2, without its stemmer; its words are runs of ASCII letters and digits in lower case."""

    def words(text):
        return re.findall("[a-z0-9]+", text.lower())

    assert rouge_l(prediction, [gold], words) == pytest.approx(expected, abs=1e-11)
    assert rouge_l(prediction, ["nothing", gold], words) == pytest.approx(expected, abs=1e-11)


def test_longest_common_subsequence_against_all_of_them():
    rng = random.Random(4)
    for _ in range(40):
        one, other = (rng.choices("abc", k=rng.randint(0, 8)) for _ in range(2))
        every = [set(itertools.combinations(one, n)) & set(itertools.combinations(other, n)) for n in range(9)]
        assert longest_common_subsequence(one, other) == max(n for n, common in enumerate(every) if common)
    assert longest_common_subsequence(["a", "b"] * 500, ["b", "a"] * 500) == 999


def test_rouge_l_is_f1_of_words_in_order():
    assert rouge_l("c b", ["b c"]) == 0.5 and f1("c b", ["b c"]) == 1
    assert rouge_l("the", ["A"]) == 1 and rouge_l("", ["b"]) == 0 and rouge_l("x", []) == 0


def test_pairs_of_which_nothing_is_left_are_known():
    for prediction, answers, nothing in (
        ("the", ["A"], True),
        ("!!!", ["?"], True),
        ("", ["A"], True),
        ("A", ["A"], False),
    ):
        scores = score_answer(prediction, answers)
        assert scores["exact_match"] == 1 and scores["equal_as_nothing"] is nothing
    assert not equal_as_nothing("the", ["A"], answer_words("none", "en"))
    assert not equal_as_nothing("B", ["A"]) and not equal_as_nothing("the", ["B"])
    assert score_answer("The capital of France is Paris.", ["Paris"])["contains"] == 1
    assert score_answer("The capital of France is Paris.", ["Par"])["contains"] == 0
