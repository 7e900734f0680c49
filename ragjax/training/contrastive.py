"""Contrastive training of the retriever: a passage that answers against those that do not (Karpukhin et al. 2020).

    −log softmax of scale · q·d⁺ among the passages that all questions of a batch bring and that do not answer this one

Each question brings K: its positive first, then what the index ranks highest and does not answer it, and, with
`retriever.bm25_docs`, so many that BM25 ranks highest of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from ragjax.config import drops_out
from ragjax.data.answer_matching import has_answer
from ragjax.data.passage_store import PassageStore
from ragjax.data.question_batch import QuestionBatch
from ragjax.data.questions import Question
from ragjax.errors import InputError
from ragjax.marginal import log_prior
from ragjax.models.layers import Params, fold_rngs, row_rngs
from ragjax.rag import RagModel, RagPipeline
from ragjax.retrieval.encoder import passage_batch
from ragjax.retrieval.index import Index
from ragjax.terminal import progress_bar
from ragjax.training.batch import ContrastiveBatch
from ragjax.training.loss import passage_embeddings


def label_positions(store: PassageStore, questions: Sequence[Question]) -> dict[str, int]:
    """Where the passages are that questions name: id → number in the corpus.

    Raises `InputError` for one that is not there.
    """
    named = {passage for question in questions for passage in question.passages}
    if not named:
        return {}
    positions: dict[str, int] = {}
    with progress_bar("look up labels", len(store), "passages") as advance:
        for number, passage in enumerate(store):
            if passage.id in named:
                positions[passage.id] = number
            advance()
    for question in questions:
        for passage_id in question.passages:
            if passage_id not in positions:
                raise InputError(
                    f"question {question.id} names passage {passage_id!r}, which is not in the corpus; correct its "
                    '"passages", or leave them out: then passages that contain an answer count'
                )
    return positions


def choose_passages(
    store: PassageStore,
    question: Question,
    rankings: Sequence[tuple[Int[np.ndarray, " _"], int]],
    positions: dict[str, int],
) -> Int[np.ndarray, " K"]:
    """The positive, -1 where there is none, and the negatives, from passages that were retrieved.

    Args:
        store: the passages.
        question: with its answers.
        rankings: each M ids, best first, and how many negatives to take from it: the encoder's, and perhaps BM25's.
        positions: where the passages are that questions name.

    The positive is the first one that answers the question, in the first ranking that has one; where none was
    retrieved, the first that the question names. Negatives rank highest of those that do not answer it and that no
    ranking before has given, filled up with -1.
    """
    right, negatives = list[int](), list[int]()
    for ids, count in rankings:
        answers, there = has_answer(store, question, ids), ids >= 0
        right += ids[answers & there].tolist()
        wrong = [i for i in ids[~answers & there].tolist() if i not in negatives][:count]
        negatives += [*wrong, *[-1] * (count - len(wrong))]
    right += [positions[passage] for passage in question.passages]
    return np.array([[*right, -1][0], *negatives], np.int32)


def count_passages(
    store: PassageStore, questions: Sequence[Question], rows: Int[np.ndarray, " B"], ids: Int[np.ndarray, "C K"]
) -> Bool[np.ndarray, "B C K"]:
    """Of the batch's passages, those that do not answer the questions of some `rows`, and their own positives."""
    distinct, at = np.unique(ids, return_inverse=True)
    counted = []
    for question, row in zip(questions, rows, strict=True):
        wrong = ~has_answer(store, question, distinct) & (distinct >= 0)
        counts = wrong[at.reshape(ids.shape)]
        counts[row, 0] = ids[row, 0] >= 0
        counted.append(counts)
    return np.stack(counted)


def attach_passages(
    rag: RagPipeline,
    index: Index,
    store: PassageStore,
    questions: Sequence[Question],
    batch: QuestionBatch,
    ids: Int[np.ndarray, "C K"],
) -> ContrastiveBatch:
    """Host arrays for one step.

    Args:
        rag: the models and tokenizers.
        index: where the passages' embeddings are.
        store: where their texts and tokens are.
        questions: B of the C questions of the global batch.
        batch: these as the retriever reads them.
        ids: the passages of all C questions, from `choose_passages`.
    """
    own = ids[batch.row]
    passages = (None, None) if rag.config.train.passage_encoder == "frozen" else passage_batch(rag, store, own)
    counted = count_passages(store, questions, batch.row, ids)
    return ContrastiveBatch(batch, index.vectors(own), counted, own[:, 0] >= 0, *passages)


def contrastive_logp(
    rag: RagModel, params: Params, batch: ContrastiveBatch, rng: Key[Array, ""]
) -> Float[Array, "B n"]:
    """Log-softmax of each question over the n = C·K passages of the batch that count; −inf for the others.

    `rng` draws the dropout masks.
    """
    questions, settings = batch.questions, rag.config.retriever
    dropout_rngs = row_rngs(rng, questions.row) if drops_out(rag.config) else None
    queries = nnx.merge(rag.retriever.graphdef, params["retriever"])(
        questions.question, questions.question_mask, fold_rngs(dropout_rngs, 0)
    )
    passages = passage_embeddings(rag, params, batch, dropout_rngs)
    scores = settings.logit_scale * jnp.einsum("BD,CKD->BCK", queries, passages, precision="highest")
    flat = scores.shape[0], -1
    return log_prior(scores.reshape(flat), batch.counted.reshape(flat))


def contrastive_nll(batch: ContrastiveBatch, logp: Float[Array, "B n"]) -> Float[Array, " B"]:
    """−log of the positive's probability, in nats; 0 where there is none."""
    questions, _, k = batch.counted.shape
    own = logp[jnp.arange(questions), k * jnp.arange(questions)]
    return -jnp.where(batch.has_positive, own, 0.0)


def contrastive_loss(
    rag: RagModel, params: Params, batch: ContrastiveBatch, rng: Key[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The mean over the questions that have a positive, in nats, and what is worth watching.

    `accuracy` is the share of positives that come first; `without_positive` that of questions that have none.
    """
    logp = contrastive_logp(rag, params, batch, rng)
    nll, there = contrastive_nll(batch, logp), batch.has_positive
    some = jnp.maximum(there.sum(), 1)
    first = -nll >= jax.lax.stop_gradient(logp).max(axis=-1)
    mean = nll.sum() / some
    return mean, {
        "loss": mean,
        "accuracy": (first & there).sum() / some,
        "without_positive": 1.0 - there.mean(),
    }
