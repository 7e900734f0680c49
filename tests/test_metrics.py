import math

import numpy as np
import pytest

from ragjax.metrics import bootstrap_interval, contains_answer, exact_match, expected_calibration_error, f1, squad_words


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
