"""The stream of training questions: deterministic, resumable, every question once an epoch."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from ragjax.data.question_sampler import QuestionSampler, usable_answers
from ragjax.data.questions import Question
from ragjax.errors import InputError

NUM_ANSWERS = [1, 2, 3, 1, 5, 1, 2]


def take(batches: QuestionSampler, n: int) -> list[tuple[list[int], list[int]]]:
    return [(b.questions.tolist(), b.answers.tolist()) for b in itertools.islice(batches, n)]


def test_the_same_seed_gives_the_same_stream() -> None:
    assert take(QuestionSampler(NUM_ANSWERS, 3, seed=4), 20) == take(QuestionSampler(NUM_ANSWERS, 3, seed=4), 20)


@pytest.mark.parametrize("resume_at", [0, 1, 2, 6, 13])
def test_resuming_equals_going_on(resume_at: int) -> None:
    """Also in the middle of an epoch, and through JSON."""
    whole = take(QuestionSampler(NUM_ANSWERS, 3, seed=0), 20)
    first = QuestionSampler(NUM_ANSWERS, 3, seed=0)
    take(first, resume_at)
    second = QuestionSampler(NUM_ANSWERS, 3, seed=0)
    second.restore(json.loads(json.dumps(first.state())))
    assert take(second, 20 - resume_at) == whole[resume_at:]


def test_every_epoch_is_another_permutation() -> None:
    stream = [q for questions, _ in take(QuestionSampler(NUM_ANSWERS, 3, seed=1), 14) for q in questions]
    epochs = [stream[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) >= 5


def test_seeds_give_unrelated_streams() -> None:
    """No epoch of one seed comes back as another epoch of its neighbour."""
    n = 50
    epochs = {
        seed: [b.questions.tolist() for b in itertools.islice(QuestionSampler([1] * n, n, seed), 4)]
        for seed in range(3)
    }
    every = [tuple(epoch) for by_seed in epochs.values() for epoch in by_seed]
    assert len(set(every)) == 12


def test_every_accepted_answer_is_trained_on_and_no_other() -> None:
    seen: dict[int, set[int]] = {}
    for questions, answers in take(QuestionSampler(NUM_ANSWERS, 7, seed=2), 60):
        for q, a in zip(questions, answers, strict=True):
            seen.setdefault(q, set()).add(a)
    assert seen == {q: set(range(n)) for q, n in enumerate(NUM_ANSWERS)}


def test_the_answer_depends_on_the_position_not_on_the_batches() -> None:
    def flat(batch_size: int, batches: int) -> list[tuple[int, int]]:
        pairs = [zip(*b, strict=True) for b in take(QuestionSampler(NUM_ANSWERS, batch_size, seed=3), batches)]
        return list(itertools.chain.from_iterable(pairs))

    assert flat(2, 21) == flat(6, 7) == flat(1, 42)


@pytest.mark.parametrize("num_answers, batch_size", [([3], 2), ([1, 1], 5)])
def test_fewer_questions_than_a_batch(num_answers: list[int], batch_size: int) -> None:
    batch = next(QuestionSampler(num_answers, batch_size, seed=0))
    assert batch.questions.shape == batch.answers.shape == (batch_size,)
    assert set(batch.questions.tolist()) <= set(range(len(num_answers)))


def test_a_position_of_another_experiment_is_refused() -> None:
    state = QuestionSampler(NUM_ANSWERS, 3, seed=0).state()
    with pytest.raises(InputError, match=r"batch_size=3, but this run has batch_size=4"):
        QuestionSampler(NUM_ANSWERS, 4, seed=0).restore(state)
    with pytest.raises(InputError, match=r"seed=0, but this run has seed=1"):
        QuestionSampler(NUM_ANSWERS, 3, seed=1).restore(state)


@pytest.mark.parametrize(("taken", "epoch"), [(0, 0), (1, 1), (2, 1), (3, 2), (7, 3)])  # 3 questions each, of 7
def test_other_questions_begin_with_the_next_epoch(taken: int, epoch: int) -> None:
    """Each of them has its turn, whatever was drawn of the others; the same ones go on where they were."""
    first = QuestionSampler(NUM_ANSWERS, 3, seed=0, fingerprint="a")
    take(first, taken)
    other = QuestionSampler([2] * 5, 1, seed=0, fingerprint="b")
    assert not other.restore(first.state() | {"batch_size": 1})
    fresh = QuestionSampler([2] * 5, 5, seed=0, fingerprint="b")
    [(questions, answers)] = take(fresh, epoch + 1)[-1:]
    found = take(other, 5)
    assert [q for [q], _ in found] == questions and [a for _, [a] in found] == answers
    assert sorted(questions) == list(range(5))
    again = QuestionSampler(NUM_ANSWERS, 3, seed=0, fingerprint="a")
    assert again.restore(first.state()) and take(again, 5) == take(first, 5)
    assert not QuestionSampler(NUM_ANSWERS, 3, seed=0, fingerprint="b").restore(first.state())


def test_impossible_streams() -> None:
    with pytest.raises(InputError, match="no questions"):
        QuestionSampler([], 3, seed=0)
    with pytest.raises(InputError, match="seed is -1"):
        QuestionSampler([1], 3, seed=-1)


def test_answers_that_are_too_long_are_counted() -> None:
    questions = [
        Question("Which?", ("one two three four", "one"), "a"),
        Question("Who?", ("one two three four five",), "b"),
        Question("Where?", ("one two", "three"), "c"),
    ]
    usable = usable_answers(questions, str.split, answer_tokens=3)  # type: ignore[arg-type]
    assert usable.questions == [0, 2] and usable.answers == [[1], [0, 1]]
    assert (usable.questions_dropped, usable.answers_dropped, usable.example) == (1, 2, "one two three four")
    with pytest.raises(InputError, match=r"generator.max_answer_tokens=3.*five.*5 tokens"):
        usable_answers(questions[1:2], str.split, answer_tokens=3)  # type: ignore[arg-type]


def test_batches_are_integer_arrays() -> None:
    batch = next(QuestionSampler(NUM_ANSWERS, 3, seed=0))
    assert all(isinstance(x, np.ndarray) and x.dtype == np.int64 for x in (batch.questions, batch.answers))
