"""Tokens of questions, prompts and answers against text put together by hand; once a step for each question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
from world import open_world, tiny_config

from ragjax.answerer import Answerer
from ragjax.data.corpus import Passage
from ragjax.data.passage_store import PassageStore
from ragjax.data.prompt import passage_text
from ragjax.data.question_batch import (
    Tokenizers,
    prompt_problems,
    question_batch,
    tokenize_answer,
    tokenize_prompts,
    tokenize_questions,
)
from ragjax.data.question_sampler import QuestionSampler
from ragjax.data.questions import read_questions
from ragjax.data.tokenizer import Tokenizer
from ragjax.errors import InputError
from ragjax.parallel.mesh import local_mesh, make_mesh
from ragjax.parallel.sharding import put_global, replicated
from ragjax.rag import load_pipeline
from ragjax.training.data_loader import BatchBuilder, TrainLoader, train_questions

TEMPLATE = {"generator__prompt_template": "{passage}\n\nQuestion: {question}\nAnswer:"}
QUESTIONS = ["What is the capital of Arland?", "Who?", "Where is Kesvik, and how far away is it from Lorton?"]


@pytest.fixture(scope="module")
def tokenizers(world: Path) -> Tokenizers:
    return load_pipeline(tiny_config(world, **TEMPLATE)).tokenizers


@pytest.fixture(scope="module")
def store(world: Path) -> PassageStore:
    return open_world(tiny_config(world))[2]


def rows(tokens: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    """What is not padding, which stands behind."""
    assert (np.diff(mask.astype(int)) <= 0).all()
    return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]


# questions


@pytest.mark.parametrize("widest", [False, True])
def test_both_models_read_a_question_as_their_tokenizers_spell_it(tokenizers: Tokenizers, widest: bool) -> None:
    batch = question_batch(tokenizers, QUESTIONS, ["a", "b", "c"], widest)
    assert rows(batch.question, batch.question_mask) == tokenizers.retriever.encode(QUESTIONS, special=True)
    spaced = [tokenizers.prompt.before_question + question for question in QUESTIONS]
    assert rows(*batch.for_generator) == tokenizers.generator.encode(spaced)
    assert rows(*batch.answers) == [tokenize_answer(tokenizers, answer) for answer in "abc"]
    config = tokenizers.config
    if widest:
        assert batch.question.shape == (3, config.retriever.max_question_tokens)
        assert batch.for_generator[0].shape == (3, config.generator.max_prompt_tokens)
    assert batch.answers[0].shape == (3, config.generator.max_answer_tokens)
    assert batch.row.tolist() == [0, 1, 2]


def test_some_of_the_questions_keep_their_numbers(tokenizers: Tokenizers) -> None:
    whole = question_batch(tokenizers, QUESTIONS)
    some = whole.take(np.array([2, 0]))
    assert some.row.tolist() == [2, 0] and some.answer is None
    np.testing.assert_array_equal(some.question, whole.question[[2, 0]])
    np.testing.assert_array_equal(some.for_generator[1], whole.for_generator[1][[2, 0]])


def test_the_retriever_reads_the_beginning_of_a_long_question(tokenizers: Tokenizers) -> None:
    long = "What is " + "very " * 60 + "long?"
    [tokens] = rows(*_for_retriever(tokenizers, [long]))
    [whole] = tokenizers.retriever.encode([long], special=True)
    assert tokens == [*whole[:63], whole[-1]]
    [problem] = prompt_problems(tokenizers, [long])
    assert problem is not None and "generator.max_prompt_tokens is 128" in problem
    with pytest.raises(InputError, match="before any passage"):
        question_batch(tokenizers, [long], widest=True)


def _for_retriever(tokenizers: Tokenizers, questions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    batch = tokenize_questions(tokenizers, questions)
    assert batch.generator_question is None
    return batch.question, batch.question_mask


def test_an_empty_question(tokenizers: Tokenizers) -> None:
    with pytest.raises(InputError, match=r"questions\[1\]: an empty question"):
        tokenize_questions(tokenizers, ["Who?", " \n"])


# prompts and answers


def test_prompts_are_the_text_assembled_by_hand(tokenizers: Tokenizers, store: PassageStore) -> None:
    ids = np.array([[4, 0], [29, 4], [-1, 7]])
    tokens, mask = tokenize_prompts(tokenizers, store, question_batch(tokenizers, QUESTIONS), ids)
    texts = [
        (f"{store[int(i)].title}: {store[int(i)].text}" if i >= 0 else "") + f"\n\nQuestion: {question}\nAnswer:"
        for question, documents in zip(QUESTIONS, ids, strict=True)
        for i in documents
    ]
    assert rows(tokens, mask) == tokenizers.generator.encode(texts)
    assert (tokens[~mask] == tokenizers.generator.pad_id).all()
    chex.assert_shape(tokens, (6, 128))


def test_passages_are_cut_to_fit_and_questions_never(world: Path, store: PassageStore) -> None:
    longest = 64
    tokenizers = load_pipeline(tiny_config(world, **TEMPLATE, generator__max_prompt_tokens=longest)).tokenizers
    question = QUESTIONS[0]
    [tokens], mask = tokenize_prompts(tokenizers, store, question_batch(tokenizers, [question]), np.array([[7]]))
    assert mask.all() and tokens.shape == (longest,)
    ending = f"\n\nQuestion: {question}\nAnswer:"
    whole = f"{store[7].title}: {store[7].text}"
    assert tokenizers.generator.decode(tokens) == whole[: longest - len(ending)] + ending
    with pytest.raises(InputError, match=r"generator\.max_prompt_tokens is 64"):
        tokenize_prompts(tokenizers, store, question_batch(tokenizers, ["Why? " * 12]), np.array([[7]]))


def test_closed_book_prompts_have_no_passage(tokenizers: Tokenizers) -> None:
    tokens, mask = tokenize_prompts(tokenizers, None, question_batch(tokenizers, QUESTIONS), np.zeros((3, 1), int))
    texts = [tokenizers.generator.decode(row) for row in rows(tokens, mask)]
    assert texts == [f"Question: {question}\nAnswer:" for question in QUESTIONS]


def test_answers_end_in_the_end_token(tokenizers: Tokenizers) -> None:
    tokens = tokenize_answer(tokenizers, "Kesvik")
    assert tokens[-1] == tokenizers.special.eos and tokens.count(tokenizers.special.eos) == 1
    assert tokenizers.generator.decode(tokens[:-1]) == " Kesvik"


def test_a_title_or_an_answer_that_reads_as_a_slot_stays_as_it_is(tokenizers: Tokenizers) -> None:
    assert passage_text("{title}: {text}", Passage("1", "{text}", "a {title}")) == "{text}: a {title}"
    tokens = tokenize_answer(tokenizers, "{answer} {text}")
    assert tokenizers.generator.decode(tokens).strip() == "{answer} {text}"


# once a step


@contextmanager
def encode_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, Tokenizer]]]:
    """How often each tokenizer was given each text."""
    calls: Counter[tuple[str, Tokenizer]] = Counter()
    encode = Tokenizer.encode

    def count(self: Tokenizer, texts: Any, *more: Any, **named: Any) -> list[list[int]]:
        calls.update((text.strip(), self) for text in texts)
        return encode(self, texts, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", count)
        yield calls


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train__fused_retrieval": True},
        {"train__objective": "contrastive", "train__mined_negatives": 6},
        {"index__kind": "Flat", "train__prefetch_retrieval": True},
        {"train__prefetch_retrieval": True},
    ],
    ids=["host", "fused", "contrastive", "ahead", "ahead on devices"],
)
def test_a_step_tokenises_each_question_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """By the retriever's tokenizer, and by the generator's unless it reads nothing."""
    own = {"index__path": str(tmp_path / "index")} if "index__kind" in settings else {}
    rag, index, store = open_world(tiny_config(world, **settings, **own))
    mesh, questions = make_mesh(), train_questions(rag, read_questions(world / "train.jsonl"))
    params = put_global(rag.initial_params(), replicated(mesh))
    sampler = QuestionSampler([len(answers) for answers in questions.usable.answers], 8, seed=0)
    with TrainLoader(BatchBuilder(rag, index, store, mesh, {}), sampler, questions, {}) as loader:
        for _ in range(2):
            with encode_calls(monkeypatch) as calls:
                if rag.config.train.prefetch_retrieval:
                    loader.look_ahead(params)
                loader.read_ahead()
                pairs, _ = loader.take(params)
            texts = [question.question for question, _ in pairs]
            assert [calls[text, rag.retriever_tokenizer] for text in texts] == [1] * 8
            by_generator = 0 if rag.config.train.objective == "contrastive" else 1
            assert [calls[text, rag.generator_tokenizer] for text in texts] == [by_generator] * 8


def test_answering_reads_the_tokens_of_a_batch(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rag, index, store = open_world(tiny_config(world))
    answerer = Answerer(rag, rag.initial_params(), index, store, None, local_mesh(data=1))
    questions = question_batch(rag.tokenizers, QUESTIONS[:2])
    with encode_calls(monkeypatch) as calls:
        retrieval = answerer.retrieve(questions, QUESTIONS[:2])
        open_book, _ = answerer.candidates(questions, retrieval, "thorough")
        answerer.candidates(questions, None, "fast")
    assert not calls and len(open_book) == 2


def test_the_tokenizers_follow_the_configuration(world: Path) -> None:
    rag = load_pipeline(tiny_config(world))
    other = replace(rag, config=tiny_config(world, generator__answer_template="<{answer}>"))
    assert rag.generator_tokenizer.decode(tokenize_answer(other.tokenizers, "A")) == "<A>"
