"""What Python offers besides answers: given passages, search, embeddings, scores of given answers, configurations."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from world import LANDS, tiny_config

import ragjax
from ragjax.answerer import Answerer
from ragjax.config import load_config
from ragjax.errors import InputError

QUESTIONS = [f"Capital of {land}?" for land in LANDS[:3]]


@pytest.fixture(scope="module")
def answerer(run: Path) -> Answerer:
    return ragjax.load(run)


def test_search_finds_what_answers_are_made_from(answerer: Answerer) -> None:
    answers, found = answerer.answer(QUESTIONS), answerer.search(QUESTIONS)
    for answer, documents in zip(answers, found, strict=True):
        assert [d.id for d in documents] == [d.id for d in answer.documents]
        np.testing.assert_allclose([d.prior for d in documents], [d.prior for d in answer.documents], rtol=1e-5)
    [every] = answerer.search(QUESTIONS[0], k=30)
    assert len({d.id for d in every}) == 30 and sum(d.prior for d in every) == pytest.approx(1, rel=1e-5)
    assert [d.id for d in every[:3]] == [d.id for d in found[0]]
    outside = sum(d.prior for d in every[3:])
    assert answers[0].mass_outside == pytest.approx(outside, abs=1e-5)
    assert answerer.search([]) == []


def test_embeddings_make_the_prior(answerer: Answerer) -> None:
    [every] = answerer.search(QUESTIONS[1], k=30)
    queries, passages = answerer.embed(QUESTIONS), answerer.embed_passages(every)
    assert queries.shape == (3, passages.shape[1]) and queries.dtype == passages.dtype == np.float32
    scores = answerer.rag.config.retriever.logit_scale * passages @ queries[1]
    np.testing.assert_allclose([d.prior for d in every], np.exp(scores) / np.exp(scores).sum(), rtol=1e-4)
    assert answerer.embed([]).shape == (0, passages.shape[1])


def test_given_passages_are_read_in_place_of_the_index(answerer: Answerer) -> None:
    """Those of the index, given, make the same answer; the order in which they are given does not matter."""
    for mode in ("thorough", "exact"):
        usual = answerer.answer(QUESTIONS[:2], mode=mode)
        for answer in usual:
            [given] = answerer.answer(answer.question, mode=mode, passages=answer.documents[::-1])
            assert [d.id for d in given.documents] == [d.id for d in answer.documents]
            np.testing.assert_allclose(
                [d.prior for d in given.documents], [d.prior for d in answer.documents], rtol=1e-4
            )
            assert given.text == answer.text and given.mass_outside is None
            assert given.probability == pytest.approx(answer.probability, rel=1e-3)


def test_given_passages_are_texts_too(answerer: Answerer) -> None:
    texts = ["Its capital is Here.", {"text": "Its capital is There.", "title": "Land"}, {"text": "x", "id": "mine"}]
    one, two = answerer.answer(QUESTIONS[:2], passages=texts)
    assert {d.id for d in one.documents} == {d.id for d in two.documents} == {"given-1", "given-2", "mine"}
    assert sum(d.prior for d in one.documents) == pytest.approx(1, rel=1e-5)
    vectors, query = answerer.embed_passages(texts), answerer.embed(QUESTIONS[0])[0]
    scores = answerer.rag.config.retriever.logit_scale * vectors @ query
    order = np.argsort(-scores)
    assert [d.id for d in one.documents] == [["given-1", "given-2", "mine"][i] for i in order]
    np.testing.assert_allclose(
        [d.prior for d in one.documents], np.sort(np.exp(scores) / np.exp(scores).sum())[::-1], 1e-4
    )


class Elsewhere:
    """Finds what the index does, in reversed order, under other numbers."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer, self.known = answerer, dict[int, Any]()

    def search(self, questions: Sequence[str], k: int) -> tuple[list[list[float]], list[list[int]]]:
        found = [documents[::-1] for documents in self.answerer.search(questions, k)]
        self.known |= {int(d.id[1:]) + 100: d for documents in found for d in documents}
        scores = [[math.log(d.prior) + 7 for d in documents] for documents in found]
        return scores, [[int(d.id[1:]) + 100 for d in documents] for documents in found]

    def passage(self, id: int) -> dict[str, str]:
        return {"text": self.known[id].text, "title": self.known[id].title, "id": str(id)}


def test_a_retriever_of_ones_own(answerer: Answerer) -> None:
    own = answerer.with_retriever(Elsewhere(answerer))
    for made, usual in zip(own.answer(QUESTIONS[:2]), answerer.answer(QUESTIONS[:2]), strict=True):
        assert [d.text for d in made.documents] == [d.text for d in usual.documents]
        np.testing.assert_allclose([d.prior for d in made.documents], [d.prior for d in usual.documents], rtol=1e-4)
        assert made.text == usual.text and made.probability == pytest.approx(usual.probability, rel=1e-3)
        assert made.mass_outside is None
    [found] = own.search(QUESTIONS[0], k=2)
    assert [d.title for d in found] == [d.title for d in answerer.search(QUESTIONS[0], k=2)[0]]
    with pytest.raises(TypeError, match="retriever: expected search and passage, which str has not"):
        inspect.unwrap(Answerer.with_retriever)(answerer, "bm25")


class Wrong(Elsewhere):
    """Gives what it was told to."""

    given: Any

    def search(self, questions: Sequence[str], k: int) -> Any:
        return self.given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([[1.0]], [[0]]), r"gave scores \(1, 1\) and ids \(1, 1\)"),
        (([[1.0] * 3], [[0.5] * 3]), "of float64; expected numbers and whole numbers"),
        (([[1.0, math.nan, 0.0]], [[0, 1, 2]]), "scores that are not finite"),
    ],
)
def test_what_a_retriever_may_not_give(answerer: Answerer, given: Any, message: str) -> None:
    wrong = Wrong(answerer)
    wrong.given = given
    with pytest.raises(InputError, match=message):
        answerer.with_retriever(wrong).answer(QUESTIONS[0])


def test_scores_of_given_answers_are_those_of_candidates(answerer: Answerer) -> None:
    [answer] = answerer.answer(QUESTIONS[0], mode="thorough")
    finished = [c for c in answer.candidates if c.finished and c.text][:3]
    scores = answerer.score(QUESTIONS[0], [c.text for c in finished])
    for score, c in zip(scores, finished, strict=True):
        assert (score.answer, score.documents) == (c.text, answer.documents)
        assert c.thorough is not None and c.doc_probability is not None
        if answerer.text(answerer.rag.generator_tokenizer.encode([" " + c.text])[0]) == c.text:
            np.testing.assert_allclose(np.exp(score.doc_logp), c.doc_probability, rtol=1e-2, atol=1e-6)
            assert np.exp(score.logp) == pytest.approx(c.thorough, rel=1e-2)
    for score in answerer.score(QUESTIONS[0], ["K", "never seen", ""]):
        prior = np.log([d.prior for d in score.documents])
        assert score.logp == pytest.approx(np.logaddexp.reduce(prior + score.doc_logp), rel=1e-4, abs=1e-4)
    again = answerer.score(QUESTIONS[0], ["K", "K", "K"], passages=scores[0].documents[::-1])
    [first, *_] = answerer.score(QUESTIONS[0], ["K", "never seen", ""])
    assert [s.logp for s in again] == pytest.approx([first.logp] * 3, rel=1e-3)
    assert [s.doc_logp for s in again] == [pytest.approx(first.doc_logp, rel=1e-3)] * 3
    assert answerer.score(QUESTIONS[0], []) == []


def test_an_answer_is_drawn_in_a_notebook(answerer: Answerer, tmp_path: Path) -> None:
    [answer] = answerer.answer(QUESTIONS[0])
    assert QUESTIONS[0] in answer._repr_html_() and 'class="ragjax"' in answer._repr_html_()
    assert json.loads(json.dumps(dataclasses.asdict(answer)))["mass_outside"] == answer.mass_outside
    assert answer.save_html(str(tmp_path / "a.html")).read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ([], "passages: an empty list; give at least one"),
        (["a", " "], r"passages\[1\]: an empty text"),
        ([{"title": "no text"}], r"passages\[0\]: an empty text"),
        ([{"text": "a", "url": "b"}], r"passages\[0\]: has 'url'; expected text"),
        (["\ud800"], r"passages\[0\]: text is not Unicode text"),
    ],
)
def test_bad_passages_are_refused(answerer: Answerer, passages: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        answerer.answer(QUESTIONS[0], passages=passages)
    with pytest.raises(InputError, match=message):
        answerer.score(QUESTIONS[0], "K", passages=passages)


def test_what_cannot_be_given(answerer: Answerer, world: Path) -> None:
    with pytest.raises(InputError, match="closed_book reads none"):
        answerer.answer(QUESTIONS[0], mode="closed_book", passages=["a"])
    corpus = dataclasses.replace(answerer, rag=dataclasses.replace(answerer.rag, config=prior_over_corpus(world)))
    with pytest.raises(InputError, match=r"passages: retriever\.prior=corpus is over the corpus"):
        corpus.answer(QUESTIONS[0], passages=["a"])
    with pytest.raises(InputError, match="k is 31; expected 1 to 30"):
        answerer.search(QUESTIONS, k=31)
    with pytest.raises(InputError, match="an empty question"):
        answerer.embed(["", "a"])
    with pytest.raises(InputError, match=r"answers\[1\]: has \d+ tokens, and the generator has room for"):
        answerer.score(QUESTIONS[0], ["K", "x " * 5000])
    with pytest.raises(InputError, match="question: an empty question"):
        answerer.score(" ", ["K"])


def prior_over_corpus(world: Path) -> ragjax.Config:
    return tiny_config(world, retriever__prior="corpus")


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("search", (3,), "questions: expected a text or a list of texts, not int"),
        ("search", ("a", 2.0), "k: expected a whole number, not float"),
        ("embed", (b"a",), "questions: expected a text or a list of texts, not bytes"),
        ("embed_passages", ("a",), "passages: expected a list of texts or of {text, title}, not str"),
        ("embed_passages", ([3],), r"passages\[0\]: expected a text or {text, title}, not int"),
        ("embed_passages", ([{"text": "a", "title": 3}],), r"passages\[0\]: title: expected a text, not int"),
        ("score", (["a"], "b"), "question: expected a text, not list"),
        ("score", ("a", None), "answers: expected a text or a list of texts, not NoneType"),
        ("score", ("a", ["b", 3]), r"answers\[1\]: expected a text, not int"),
    ],
)
def test_wrong_types_name_the_argument(answerer: Answerer, call: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}$"):
        inspect.unwrap(getattr(Answerer, call))(answerer, *arguments)


def test_a_configuration_from_values(run: Path) -> None:
    """The same as from YAML, and refused in the same words."""
    config = load_config(run / "config.yaml")
    values = config.model_dump(mode="json")
    assert ragjax.Config(**values) == config
    values["train"]["steps"] = "many"
    with pytest.raises(InputError, match=r"Config: train\.steps is 'many'; expected a whole number"):
        ragjax.Config(**values)
    with pytest.raises(InputError, match="Config: corpus, generator, output, retriever must be given"):
        ragjax.Config()  # type: ignore[call-arg]
