"""Contrastive training of the retriever: a passage that answers against those that do not (Karpukhin et al. 2020).

    −log softmax of scale · q·d⁺ among the passages that all questions of a batch bring and that do not answer this one

Each question brings K: its positive first, then what the index ranks highest and does not answer it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, Key

from ragjax.config import Config
from ragjax.data.answer_matching import has_answer
from ragjax.data.passage_store import PassageStore
from ragjax.data.questions import Question
from ragjax.errors import InputError
from ragjax.marginal import log_prior
from ragjax.models.layers import Params, fold_rngs, row_rngs
from ragjax.rag import RagModel, RagPipeline, tokenize_questions
from ragjax.retrieval.encoder import passage_batch
from ragjax.retrieval.index import Index
from ragjax.terminal import progress_bar
from ragjax.training.batch import Rows
from ragjax.training.loss import encode_questions_with_dropout


@struct.dataclass
class ContrastiveBatch:
    """B questions with K passages each, of which the first is the positive."""

    row: Int[Rows, " B"]  # number in the global batch: keys the dropout
    question: Int[Rows, "B Q"]
    question_mask: Bool[Rows, "B Q"]
    passages: Float[Rows, "B K D"]  # embeddings
    counted: Bool[Rows, "B C K"]  # which passages of all C = B questions each one is to tell its positive from, and it
    has_positive: Bool[Rows, " B"]  # a question without one teaches nothing
    # as the passage encoder reads them, where it is trained: then `passages` are not looked at
    passage: Int[Rows, "B K P"] | None = None
    passage_mask: Bool[Rows, "B K P"] | None = None


def label_positions(store: PassageStore, questions: Sequence[Question]) -> dict[str, int]:
    """Where the passages are that questions name: id → number in the corpus.

    Raises `InputError` for one that is not there.
    """
    named = {passage for question in questions for passage in question.passages}
    if not named:
        return {}
    found: dict[str, int] = {}
    with progress_bar("look up labels", len(store), "passages") as advance:
        for number, passage in enumerate(store):
            if passage.id in named:
                found[passage.id] = number
            advance()
    for question in questions:
        for passage_id in question.passages:
            if passage_id not in found:
                raise InputError(
                    f"question {question.id} names passage {passage_id!r}, which is not in the corpus; correct its "
                    '"passages", or leave them out: then passages that contain an answer count'
                )
    return found


def choose_passages(
    store: PassageStore, question: Question, ids: Int[np.ndarray, " M"], k: int, positions: dict[str, int]
) -> Int[np.ndarray, " K"]:
    """The positive, -1 where there is none, and k − 1 negatives, from the M retrieved passages `ids`, best first.

    The positive is the one that ranks highest of those that answer the question; where none was retrieved, the first
    that the question names. Negatives rank highest of those that do not answer it, filled up with -1.
    """
    answers, there = has_answer(store, question, ids), ids >= 0
    right = [*ids[answers & there], *(positions[passage] for passage in question.passages), -1]
    wrong = ids[~answers & there][: k - 1]
    return np.array([right[0], *wrong, *[-1] * (k - 1 - len(wrong))], np.int32)


def count_passages(
    store: PassageStore, questions: Sequence[Question], rows: Int[np.ndarray, " B"], ids: Int[np.ndarray, "C K"]
) -> Bool[np.ndarray, "B C K"]:
    """Of the batch's passages, those that do not answer the questions of some `rows`, and their own positives."""
    distinct, at = np.unique(ids, return_inverse=True)
    counted = []
    for question, row in zip(questions, rows, strict=True):
        wrong = ~has_answer(store, question, distinct) & (distinct >= 0)
        of_batch = wrong[at.reshape(ids.shape)]
        of_batch[row, 0] = ids[row, 0] >= 0
        counted.append(of_batch)
    return np.stack(counted)


def contrastive_batch(
    rag: RagPipeline,
    index: Index,
    store: PassageStore,
    questions: Sequence[Question],
    ids: Int[np.ndarray, "C K"],
    rows: Int[np.ndarray, " B"],
) -> ContrastiveBatch:
    """Host arrays for one step: of the questions of some `rows`, given the passages `ids` of the whole batch."""
    question, question_mask = tokenize_questions(rag, [q.question for q in questions])
    mine, passage, passage_mask = ids[rows], None, None
    if rag.config.train.passage_encoder != "frozen":
        passage, passage_mask = passage_batch(rag, store, mine)
    return ContrastiveBatch(
        row=rows.astype(np.int32),
        question=question,
        question_mask=question_mask,
        passages=index.vectors(mine),
        counted=count_passages(store, questions, rows, ids),
        has_positive=mine[:, 0] >= 0,
        passage=passage,
        passage_mask=passage_mask,
    )


def abstract_contrastive(config: Config, width: int) -> ContrastiveBatch:
    """The widest batch of a step, in shapes and types; D is the embeddings' `width`."""
    count, k, shape = config.train.batch_size, config.train.k, jax.ShapeDtypeStruct
    asked, encoded = (count, config.retriever.question_tokens), (count, k, config.retriever.passage_tokens)
    trained = config.train.passage_encoder != "frozen"
    return ContrastiveBatch(
        row=shape((count,), jnp.int32),
        question=shape(asked, jnp.int32),
        question_mask=shape(asked, jnp.bool),
        passages=shape((count, k, width), jnp.float32),
        counted=shape((count, count, k), jnp.bool),
        has_positive=shape((count,), jnp.bool),
        passage=shape(encoded, jnp.int32) if trained else None,
        passage_mask=shape(encoded, jnp.bool) if trained else None,
    )


def contrastive_logp(
    rag: RagModel, params: Params, batch: ContrastiveBatch, key: Key[Array, ""]
) -> Float[Array, "B n"]:
    """Log-softmax of each question over the n = C·K passages of the batch that count; −inf for the others.

    `key` draws the dropout masks.
    """
    settings = rag.config.retriever
    keys = row_rngs(key, batch.row) if rag.config.train.dropout > 0 else None
    queries = nnx.merge(rag.retriever.graphdef, params["retriever"])(
        batch.question, batch.question_mask, fold_rngs(keys, 0)
    )
    passages = batch.passages
    if batch.passage is not None and batch.passage_mask is not None:
        passages = encode_questions_with_dropout(rag, params, batch.passage, batch.passage_mask, keys)
    scores = settings.scale * jnp.einsum("BD,CKD->BCK", queries, passages, precision="highest")
    flat = scores.shape[0], -1
    return log_prior(scores.reshape(flat), batch.counted.reshape(flat))


def contrastive_nll(batch: ContrastiveBatch, logp: Float[Array, "B n"]) -> Float[Array, " B"]:
    """−log of the positive's probability, in nats; 0 where there is none."""
    questions, _, k = batch.counted.shape
    own = logp[jnp.arange(questions), k * jnp.arange(questions)]
    return -jnp.where(batch.has_positive, own, 0.0)


def contrastive_loss(
    rag: RagModel, params: Params, batch: ContrastiveBatch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The mean over the questions that have a positive, in nats, and what is worth watching.

    `accuracy` is the share of positives that come first; `without_positive` that of questions that have none.
    """
    logp = contrastive_logp(rag, params, batch, key)
    nll, there = contrastive_nll(batch, logp), batch.has_positive
    some = jnp.maximum(there.sum(), 1)
    first = -nll >= jax.lax.stop_gradient(logp).max(axis=-1)
    mean = nll.sum() / some
    return mean, {
        "loss": mean,
        "accuracy": (first & there).sum() / some,
        "without_positive": 1.0 - there.mean(),
    }
