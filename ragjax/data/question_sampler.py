"""Questions → batches of indices: shuffled anew each epoch, repeatable, with a position that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from ragjax.data.questions import Question
from ragjax.errors import InputError


@dataclass(frozen=True)
class SampledQuestions:
    """Which questions to train on, and which accepted answer of each."""

    questions: Int[np.ndarray, " B"]
    answers: Int[np.ndarray, " B"]


@dataclass(frozen=True)
class UsableAnswers:
    """What is left when answers longer than the target are set aside."""

    questions: list[int]  # those with at least one answer that fits
    answers: list[list[int]]  # for each of these, the answers that fit
    questions_dropped: int
    answers_dropped: int  # those of dropped questions included
    example: str | None  # the first answer dropped


def usable_answers(
    questions: Sequence[Question], encode: Callable[[str], Sequence[int]], answer_tokens: int
) -> UsableAnswers:
    """Finds the answers that fit into `answer_tokens`; `encode` gives all tokens of a target, the end token included.

    Raises `InputError` if no question is left.
    """
    fitting = [[i for i, a in enumerate(q.answers) if len(encode(a)) <= answer_tokens] for q in questions]
    kept = [i for i, answers in enumerate(fitting) if answers]
    dropped = [a for q, fit in zip(questions, fitting, strict=True) for i, a in enumerate(q.answers) if i not in fit]
    example = dropped[0] if dropped else None
    if questions and not kept:
        raise InputError(
            f"every answer is longer than generator.max_answer_tokens={answer_tokens}, for example {example!r} "
            f"({len(encode(dropped[0]))} tokens); raise generator.max_answer_tokens"
        )
    return UsableAnswers(kept, [fitting[i] for i in kept], len(questions) - len(kept), len(dropped), example)


class QuestionSampler(Iterator[SampledQuestions]):
    """An endless stream of batches: one permutation of all questions after another.

    What is at a position of the stream depends on the seed and on that position only, hence neither on the batches
    before it nor on where a run was resumed. A position counts questions.
    """

    def __init__(self, num_answers: Sequence[int], batch_size: int, seed: int, fingerprint: str | None = None) -> None:
        """`num_answers[i]` is how many accepted answers question i has, at least 1; `fingerprint` names them all."""
        import grain

        if not num_answers:
            raise InputError("there are no questions to train on")
        if seed < 0:
            raise InputError(f"seed is {seed}; expected 0 or more")
        self._settings = {"batch_size": batch_size, "seed": seed}
        self._questions = {"questions": len(num_answers), "fingerprint": fingerprint}
        # Grain shuffles epoch e by seed + e: without hashing, seed 1 would repeat the epochs of seed 0 one later.
        order, choice = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
        self._stream = iter(
            grain.MapDataset.source(range(len(num_answers)))
            .shuffle(order)
            .repeat()
            .random_map(lambda q, rng: (np.int64(q), rng.integers(num_answers[q])), seed=choice)
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            .batch(batch_size)
        )

    def __next__(self) -> SampledQuestions:
        return SampledQuestions(*next(self._stream))

    def state(self) -> dict[str, Any]:
        """The position, as JSON: what `restore` needs to go on with the next batch."""
        return {**self._settings, **self._questions, "grain": self._stream.get_state()}

    def restore(self, state: dict[str, Any]) -> bool:
        """Goes to a position from `state()`; whether it was one among the same questions.

        Among others it goes on with the next epoch, in which each of them has its turn: a position within an epoch
        means nothing there. Raises `InputError` if it belongs to other batches or another seed.
        """
        for key, value in self._settings.items():
            if state.get(key) != value:
                raise InputError(
                    f"the saved position in the training data is for {key}={state.get(key)}, but this run has "
                    f"{key}={value}; resume with the same settings, or choose another output folder"
                )
        # checkpoints from before there was a fingerprint have none
        same = all(state.get(key) in (value, None) for key, value in self._questions.items())
        at = state["grain"]
        if not same:
            epochs = -(-at["next_index"] // state["questions"])
            at = at | {"next_index": epochs * self._questions["questions"]}
        self._stream.set_state(at)
        return same
