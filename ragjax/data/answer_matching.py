"""Whether a passage answers a question: the one that it names, or any that holds an answer, as DPR counts it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int

from ragjax.data.corpus import document_id
from ragjax.data.passage_store import PassageStore
from ragjax.data.questions import Question
from ragjax.metrics import contains_answer


def has_answer(store: PassageStore, question: Question, ids: Int[np.ndarray, " K"]) -> Bool[np.ndarray, " K"]:
    """Which documents answer a question: the passages it names, or else those that contain an answer; not id -1."""
    found = [store[int(i)] if i >= 0 else None for i in ids]
    if question.passages:  # a label may name a document that was cut
        labels = set(question.passages)
        return np.array([p is not None and not labels.isdisjoint((p.id, document_id(p.id))) for p in found])
    return np.array([p is not None and contains_answer(f"{p.title} {p.text}", question.answers) for p in found])
