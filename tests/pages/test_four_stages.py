"""The drawing of an answer: its numbers add up, and no text of a corpus is obeyed."""

from __future__ import annotations

import base64
import copy
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from html_tree import Element, check_harmless, elements
from hypothesis import given
from hypothesis import strategies as st

from ragjax.answering.answers import Answer, Candidate, Document
from ragjax.errors import InputError
from ragjax.metrics import contains_answer
from ragjax.pages.four_stages import MOST_CANDIDATES, stages, stages_fragment, stages_page
from ragjax.pages.wording import marked, percent, probability
from ragjax.terminal import visible

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</style><script>alert(1)</script>",
    "javascript:alert(1) {{ 7*7 }} {% raw %} &lt;b&gt; ${1}",
    "\x1b[31mred\x07 \u202egnihtemos\u2066 \u200b \ud800 \x00",
    "<!-- --> ]]> <![CDATA[",
]
PRIOR = [0.7, 0.2, 0.1]


def candidate(text: str, beam: list[float], given: list[float] | None, **more: Any) -> dict[str, Any]:
    fast = sum(p * b for p, b in zip(PRIOR, beam, strict=True))
    joint = None if given is None else [p * g for p, g in zip(PRIOR, given, strict=True)]
    thorough = None if joint is None else sum(joint)
    posterior = None if joint is None else [p / sum(joint) for p in joint]
    return {
        "text": text,
        "finished": True,
        "fast": fast,
        "thorough": thorough,
        "beam_probability": beam,
        "doc_probability": given,
        "posterior": posterior,
        "probability_bounds": None,
    } | more


@pytest.fixture
def answer() -> dict[str, Any]:
    documents = [
        {"id": f"d{z}", "title": f"Title {z}", "text": f"The capital, Paris, is number {z}.", "prior": prior}
        for z, prior in enumerate(PRIOR)
    ]
    candidates = [
        candidate("Paris", [0.9, 0.8, 0.0], [0.9, 0.8, 0.5]),
        candidate("Lyon", [0.0, 0.1, 0.0], [0.05, 0.1, 0.0]),
        candidate("no end", [0.0, 0.0, 0.3], [0.0, 0.0, 0.3], finished=False),
    ]
    return {
        "question": "What is the capital of France?",
        "text": "Paris",
        "mode": "thorough",
        "probability": candidates[0]["thorough"],
        "documents": documents,
        "candidates": candidates,
        "scores": None,
        "probability_bounds": None,
        "proved": None,
        "documents_read": None,
        "steps": None,
        "mass_outside": 0.25,
    }


def of_class(found: list[Element], name: str) -> list[Element]:
    return [element for element in found if name in element.attributes.get("class", "").split()]


def test_bars_are_sums_over_the_documents(answer: dict[str, Any]) -> None:
    drawn = stages(answer)
    for made, given_ in zip(drawn.candidates, answer["candidates"], strict=True):
        assert sum(share.p for share in made.shares) == pytest.approx(given_["thorough"])
        assert sum(share.width for share in made.shares) * drawn.scale == pytest.approx(given_["thorough"])
        at = 0.0
        for share in made.shares:
            z = share.number - 1
            assert share.p == pytest.approx(PRIOR[z] * given_["doc_probability"][z])
            assert share.missed == (given_["beam_probability"][z] == 0)
            assert share.start == pytest.approx(at)
            at += share.width
        missed = sum(share.p for share in made.shares if share.missed)
        assert made.p - missed == pytest.approx(given_["fast"])
    assert drawn.scale == drawn.probability == drawn.candidates[0].p
    assert [[beam.text for beam in d.beams] for d in drawn.documents] == [["Paris"], ["Paris", "Lyon"], ["no end"]]
    assert [d.posterior for d in drawn.documents] == answer["candidates"][0]["posterior"]


def test_the_page_shows_the_numbers(answer: dict[str, Any]) -> None:
    page = stages_page(answer)
    found = check_harmless(page, scripts=0)
    shown = [element.attributes["value"] for element in found if element.tag == "data"]
    assert shown == ["0.75", "0.25", str(answer["probability"])]
    marks = [element.text for element in found if element.tag == "mark"]
    assert marks == ["Paris"] * 3
    rows = [element.cells for element in found if element.tag == "tr" and "Paris" in element.text]
    assert any(row.startswith("Paris 0.840 0.790 0.900 0.800 0.500") for row in rows), rows
    assert len([e for e in found if e.attributes.get("fill") == "url(#hatch)"]) == 1 + 1 + 1  # Paris, Lyon, the legend
    assert [e.cells for e in found if e.tag == "h2"] == [
        "1 Retrieval documents z and their prior p(z|x)",
        "2 Proposals a beam search under each document, with p(y|x,z)",
        "3 Marginal p(y|x) = Σ p(z|x) · p(y|x,z)",
        "4 Answer the best finished candidate, thorough",
    ]
    assert all(e.attributes.get("aria-label") or e.attributes.get("aria-hidden") for e in found if e.tag == "svg")


def test_certified_and_exact_answers_have_whiskers_and_a_proof(answer: dict[str, Any]) -> None:
    candidates = [
        candidate(c["text"], [0.0] * 3, None, fast=None, probability_bounds=[c["thorough"], c["thorough"] + 0.1])
        for c in answer["candidates"]
    ]
    exact = {"mode": "exact", "candidates": candidates, "probability_bounds": candidates[0]["probability_bounds"]}
    exact |= {"proved": {"top_k": 1, "corpus": None}, "documents_read": 2, "steps": 7}
    drawn = stages(answer | exact)
    low, high = candidates[0]["probability_bounds"]
    assert drawn.scale == high and drawn.candidates[0].whisker == pytest.approx((low / high, 1))
    assert drawn.bounds == (low, high) and not drawn.proposing
    page = stages_page(answer | exact)
    found = check_harmless(page, scripts=0)
    assert len(of_class(found, "whisker")) == 3
    text = next(e.cells for e in found if e.tag == "main")
    assert "Proved: no other answer is likelier under these documents (2 of 3 documents read, 7 steps)." in text
    assert "p(y|x) ≥ 0.840" in text and "at most 0.940" in text and "propose together" not in text


def test_without_documents(answer: dict[str, Any]) -> None:
    alone = {"text": "Paris", "finished": True, "fast": 0.5, "thorough": None, "beam_probability": []}
    alone |= {"doc_probability": None, "posterior": None}
    closed = answer | {"mode": "closed_book", "documents": [], "candidates": [alone], "mass_outside": None}
    text = next(e.cells for e in check_harmless(stages_page(closed), 0) if e.tag == "main")
    assert "No documents: the generator answered by itself." in text and "Paris 0.500" in text


def test_many_candidates_and_documents(answer: dict[str, Any]) -> None:
    documents = answer["documents"] * 5
    every = [
        candidate("x", [0.1, 0.0, 0.0], [0.1, 0.2, 0.3])
        | {"text": f"answer {i}", "beam_probability": [0.1] * 15, "doc_probability": [0.2] * 15, "posterior": None}
        for i in range(MOST_CANDIDATES + 5)
    ]
    drawn = stages(answer | {"documents": documents, "candidates": every})
    assert (len(drawn.candidates), drawn.more, drawn.narrow) == (MOST_CANDIDATES, 5, True)
    page = stages_page(answer | {"documents": documents, "candidates": every})
    assert "5 less probable candidates are not shown" in page and '<span class="hidden">0.200</span>' in page


def test_hostile_texts_are_shown_and_not_obeyed(answer: dict[str, Any]) -> None:
    """In every place where a text can stand."""
    for bad in HOSTILE:
        evil = copy.deepcopy(answer) | {"question": bad, "text": bad}
        for document in evil["documents"]:
            document |= {"id": bad, "title": bad, "text": f"before {bad} after"}
        for c in evil["candidates"]:
            c["text"] = bad
        for html in (stages_page(evil), stages_fragment(evil)):
            html.encode()
            found = check_harmless(html, scripts=0)
            told = visible(bad)
            assert sum(" ".join(told.split()) in " ".join(e.text.split()) for e in found if e.tag == "bdi") >= 3
            passages = [e.text for e in found if e.tag == "p" and e.text.startswith("before")]
            assert len(passages) == 3 and all(" ".join(told.split()) in p for p in passages)
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)


def test_only_its_own_style_is_allowed(answer: dict[str, Any]) -> None:
    found = elements(stages_page(answer))
    policy = next(e.attributes["content"] for e in found if "http-equiv" in e.attributes)
    style = next("".join(e.texts) for e in found if e.tag == "style")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"style-src 'sha256-{digest}';" in policy
    assert "script-src 'none'" in policy and "unsafe" not in policy


def test_an_answer_draws_itself(answer: dict[str, Any], tmp_path: Path) -> None:
    made = Answer(
        **answer
        | {
            "documents": [Document(**d) for d in answer["documents"]],
            "candidates": [Candidate(**c) for c in answer["candidates"]],
        }
    )
    assert made._repr_html_() == stages_fragment(answer)
    assert made.save_html(tmp_path / "answer.html").read_text(encoding="utf-8") == stages_page(answer)
    with pytest.raises(InputError, match="there is no folder"):
        made.save_html(tmp_path / "none" / "answer.html")
    with pytest.raises(InputError, match="cannot be written"):
        (tmp_path / "folder").mkdir()
        made.save_html(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.html", "folder"]


WORDS = st.lists(st.sampled_from("Paris the a France, U.S. us 1,100 100 東京 São x-y".split()), max_size=12)


@given(WORDS, st.lists(WORDS, max_size=3), st.one_of(st.none(), st.integers(5, 40)))
def test_marked_words_are_those_that_count_as_an_answer(
    words: list[str], answers: list[list[str]], longest: int | None
) -> None:
    text, sought = " ".join(words), [" ".join(answer) for answer in answers]
    pieces = marked(text, sought, longest)
    assert all(any(contains_answer(hit, [a]) for a in sought) for hit, is_hit in pieces if is_hit)
    whole = "".join(piece for piece, _ in pieces)
    if longest is None or len(text) <= longest:
        assert whole == text
        assert any(is_hit for _, is_hit in pieces) == contains_answer(text, sought)
    else:
        assert len(whole) <= longest + 2 and whole.strip("…") in text


def test_what_is_marked_stays_in_sight() -> None:
    text = "word " * 300 + "Paris" + " word" * 300
    pieces = marked(text, ["Paris"], 100)
    assert ("Paris", True) in pieces and pieces[0] == pieces[-1] == ("…", False)
    assert sum(len(piece) for piece, _ in pieces) == 102


def test_numbers_as_they_are_printed() -> None:
    assert [probability(p) for p in (None, 0.0, 1.0, 0.8834, 0.0005, 0.0004, 4.19e-5, 1e-12)] == (
        "– 0.000 1.000 0.883 0.001 4e-4 4e-5 1e-12".split()
    )
    assert [percent(share) for share in (-1.0, 0.0, 0.125, 1 / 3, 1.0, 2.0)] == "0% 0% 12.5% 33.33% 100% 100%".split()
