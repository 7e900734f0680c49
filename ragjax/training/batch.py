"""The arrays that a training step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from ragjax.config import Config
from ragjax.data.passage_store import PassageStore
from ragjax.padding import pad_sequences
from ragjax.rag import RagPipeline, tokenize_answer, tokenize_prompts, tokenize_questions
from ragjax.retrieval.encoder import passage_batch
from ragjax.retrieval.index import Index

Rows = Any  # NumPy's arrays until they are sharded, then JAX's


@struct.dataclass
class TrainBatch:
    """B questions, their K documents, and one accepted answer each; leading axes are micro-batches."""

    row: Int[Rows, "... B"]  # number in the global batch: keys the dropout
    question: Int[Rows, "... B Q"]
    question_mask: Bool[Rows, "... B Q"]
    passages: Float[Rows, "... B K D"]  # the documents' embeddings; the question encoder's gradient comes through q·d
    valid: Bool[Rows, "... B K"]
    source: Int[Rows, "... B K S"]
    source_mask: Bool[Rows, "... B K S"]
    answer: Int[Rows, "... B T"]
    answer_mask: Bool[Rows, "... B T"]
    # as the passage encoder reads the documents, where it is trained: then `passages` are not looked at
    passage: Int[Rows, "... B K P"] | None = None
    passage_mask: Bool[Rows, "... B K P"] | None = None


def train_batch(
    rag: RagPipeline,
    index: Index,
    store: PassageStore,
    questions: Sequence[str],
    answers: Sequence[str],
    ids: Int[np.ndarray, "B K"],
    rows: Int[np.ndarray, " B"] | None = None,
) -> TrainBatch:
    """Host arrays for one step, of the global batch or of its `rows` that these are.

    Answers are padded to `generator.answer_tokens`, which none may exceed.
    """
    question, question_mask = tokenize_questions(rag, questions)
    source, source_mask = tokenize_prompts(rag, store, questions, ids)
    written = [tokenize_answer(rag, answer) for answer in answers]
    answer, answer_mask = pad_sequences(written, rag.config.generator.answer_tokens, rag.special.pad)
    shape = (*ids.shape, source.shape[1])
    passage, passage_mask = None, None
    if rag.config.train.passage_encoder != "frozen":
        passage, passage_mask = passage_batch(rag, store, ids)
    return TrainBatch(
        row=(np.arange(len(questions)) if rows is None else rows).astype(np.int32),
        question=question,
        question_mask=question_mask,
        passages=index.vectors(ids),
        valid=ids >= 0,
        source=source.reshape(shape),
        source_mask=source_mask.reshape(shape),
        answer=answer,
        answer_mask=answer_mask,
        passage=passage,
        passage_mask=passage_mask,
    )


WIDTHS = ("question", "source", "passage")  # of a batch: padded to buckets, each with its mask


def widths(batch: Any) -> list[int]:
    """To how many tokens each of `WIDTHS` is padded, 0 where the batch has no such rows."""
    rows = [getattr(batch, name, None) for name in WIDTHS]
    return [0 if row is None else row.shape[-1] for row in rows]


def widen(batch: Any, widths: Sequence[int]) -> Any:
    """Host arrays padded to so many tokens; the masks hide whatever the padding is."""

    def padded(rows: np.ndarray, width: int) -> np.ndarray:
        return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, width - rows.shape[-1])])

    named = [(kind, width) for name, width in zip(WIDTHS, widths, strict=True) for kind in (name, f"{name}_mask")]
    there = [(name, width) for name, width in named if getattr(batch, name, None) is not None]
    return replace(batch, **{name: padded(getattr(batch, name), width) for name, width in there})


def abstract_batch(config: Config, width: int) -> TrainBatch:
    """The widest batch of a training step, in shapes and types; D is the embeddings' `width`."""
    questions, documents = config.train.batch_size, config.train.k
    asked = questions, config.retriever.question_tokens
    prompts = questions, documents, config.generator.source_tokens
    answered = questions, config.generator.answer_tokens
    encoded = questions, documents, config.retriever.passage_tokens
    shape = jax.ShapeDtypeStruct
    trained = config.train.passage_encoder != "frozen"
    return TrainBatch(
        row=shape((questions,), jnp.int32),
        question=shape(asked, jnp.int32),
        question_mask=shape(asked, jnp.bool),
        passages=shape((questions, documents, width), jnp.float32),
        valid=shape((questions, documents), jnp.bool),
        source=shape(prompts, jnp.int32),
        source_mask=shape(prompts, jnp.bool),
        answer=shape(answered, jnp.int32),
        answer_mask=shape(answered, jnp.bool),
        passage=shape(encoded, jnp.int32) if trained else None,
        passage_mask=shape(encoded, jnp.bool) if trained else None,
    )
