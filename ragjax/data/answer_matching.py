"""Whether a passage holds an accepted answer, word by word, as DPR counts it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from ragjax.data.passage_store import PassageStore
from ragjax.data.questions import Question
from ragjax.metrics import normalized_words


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether the words of some answer stand next to each other in the text, as in DPR's `has_answer`.

    Case, articles and punctuation do not count; numbers are whole words.
    """
    words = f" {normalized_words(text)} "
    return any(f" {sought} " in words for answer in answers if (sought := normalized_words(answer)))


def has_answer(store: PassageStore, question: Question, ids: Int[np.ndarray, " K"]) -> Bool[np.ndarray, " K"]:
    """Which documents answer a question: the passages it names, or else those that contain an answer; not id -1."""
    found = [store[int(i)] if i >= 0 else None for i in ids]
    if question.passages:
        return np.array([p is not None and p.id in question.passages for p in found])
    return np.array([p is not None and contains_answer(f"{p.title} {p.text}", question.answers) for p in found])
