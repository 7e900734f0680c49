"""The arrays that a training step reads: questions, and the documents attached to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from ragjax.config import Config, train_documents
from ragjax.data.passage_store import PassageStore
from ragjax.data.question_batch import QuestionBatch, Rows, tokenize_prompts
from ragjax.rag import RagPipeline
from ragjax.retrieval.encoder import passage_batch
from ragjax.retrieval.index import Index


@struct.dataclass
class TrainBatch:
    """B questions with an answer each, and their K documents; leading axes are micro-batches."""

    questions: QuestionBatch
    # the documents'; the question encoder's gradient comes through q·d
    passage_embeddings: Float[Rows, "... B K D"]
    valid: Bool[Rows, "... B K"]  # False where fewer than K documents were there
    source: Int[Rows, "... B K S"]  # the generator's prompts
    source_mask: Bool[Rows, "... B K S"]
    # as the passage encoder reads the documents, where it is trained: then `passage_embeddings` is not read
    passage_tokens: Int[Rows, "... B K P"] | None = None
    passage_mask: Bool[Rows, "... B K P"] | None = None


@struct.dataclass
class ContrastiveBatch:
    """B questions with K passages each, of which the first is the positive."""

    questions: QuestionBatch
    passage_embeddings: Float[Rows, "B K D"]
    counted: Bool[Rows, "B C K"]  # which passages of all C = B questions each one is to tell its positive from, and it
    has_positive: Bool[Rows, " B"]  # a question without one teaches nothing
    # as the passage encoder reads them, where it is trained: then `passage_embeddings` is not read
    passage_tokens: Int[Rows, "B K P"] | None = None
    passage_mask: Bool[Rows, "B K P"] | None = None


DocumentBatch = TrainBatch | ContrastiveBatch
AnyBatch = TypeVar("AnyBatch", bound=DocumentBatch)


def attach_documents(
    rag: RagPipeline, index: Index, store: PassageStore, questions: QuestionBatch, ids: Int[np.ndarray, "B K"]
) -> TrainBatch:
    """Host arrays for one step.

    Args:
        rag: the models and tokenizers.
        index: where the documents' embeddings are.
        store: where their texts and tokens are.
        questions: those of the global batch, or some of its rows, with their answers.
        ids: the documents of each of these questions, -1 where there is none.

    Raises `InputError` as `tokenize_prompts` does.
    """
    source, source_mask = tokenize_prompts(rag.tokenizers, store, questions, ids)
    shape = (*ids.shape, source.shape[1])
    passages = (None, None) if rag.config.train.passage_encoder == "frozen" else passage_batch(rag, store, ids)
    return TrainBatch(
        questions.without_prompts(),
        index.vectors(ids),
        ids >= 0,
        source.reshape(shape),
        source_mask.reshape(shape),
        *passages,
    )


PADDED = {"source": "source_mask", "passage_tokens": "passage_mask"}  # what is padded to buckets, and its masks


def widths(batch: DocumentBatch) -> list[int]:
    """To how many tokens each of `PADDED` is padded, 0 where the batch has no such rows."""
    rows = [getattr(batch, name, None) for name in PADDED]
    return [0 if row is None else row.shape[-1] for row in rows]


def widen(batch: AnyBatch, widths: Sequence[int]) -> AnyBatch:
    """Host arrays padded to so many tokens; the masks hide whatever the padding is."""

    def padded(rows: np.ndarray, width: int) -> np.ndarray:
        return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, width - rows.shape[-1])])

    named = [(name, width) for pair, width in zip(PADDED.items(), widths, strict=True) for name in pair]
    there = [(name, width) for name, width in named if getattr(batch, name, None) is not None]
    changes: dict[str, Any] = {name: padded(getattr(batch, name), width) for name, width in there}
    return replace(batch, **changes)


def abstract_batch(config: Config, embedding_dim: int) -> DocumentBatch | QuestionBatch:
    """The widest batch of a training step, in shapes and types: what the configured step reads."""
    r, g, train = config.retriever, config.generator, config.train
    b, k, shape = train.batch_size, train_documents(config), jax.ShapeDtypeStruct

    def tokens(*sizes: int) -> tuple[Any, Any]:
        return shape(sizes, jnp.int32), shape(sizes, jnp.bool)

    none = None, None
    contrastive = train.objective == "contrastive"
    questions = QuestionBatch(
        shape((b,), jnp.int32),
        *tokens(b, r.max_question_tokens),
        *(tokens(b, g.max_prompt_tokens) if train.fused_retrieval else none),
        *(none if contrastive else tokens(b, g.max_answer_tokens)),
    )
    if train.fused_retrieval:
        return questions
    embeddings = shape((b, k, embedding_dim), jnp.float32)
    passages = none if train.passage_encoder == "frozen" else tokens(b, k, r.max_passage_tokens)
    if contrastive:
        counted, has_positive = shape((b, b, k), jnp.bool), shape((b,), jnp.bool)
        return ContrastiveBatch(questions, embeddings, counted, has_positive, *passages)
    return TrainBatch(questions, embeddings, shape((b, k), jnp.bool), *tokens(b, k, g.max_prompt_tokens), *passages)
