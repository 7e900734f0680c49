"""Stage 1: the documents of questions, with their prior p(z|x).

The encoder finds k. With `retriever.bm25_docs` = m, BM25 adds m more: its best that are not among those k. What a
document is worth the encoder's score says, whoever found it, so that K = k + m documents make a prior as k would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ragjax.data.question_batch import QuestionBatch
from ragjax.marginal import corpus_log_prior, log_prior
from ragjax.models.layers import Params
from ragjax.parallel.mesh import local_mesh
from ragjax.parallel.sharding import allgather_rows, gather_to_host, local_rows, shard_batch
from ragjax.rag import RagPipeline
from ragjax.retrieval.encoder import encode
from ragjax.retrieval.index import Index


@dataclass(frozen=True)
class RetrievalResult:
    """The K documents of B questions, best first; id −1, score −inf and prior −inf where there was no hit."""

    queries: Float[np.ndarray, "B D"]
    ids: Int[np.ndarray, "B K"]
    scores: Float[np.ndarray, "B K"]  # inner products, before the scale
    log_prior: Float[np.ndarray, "B K"]
    outside: Float[np.ndarray, " B"] | None = None  # prior mass of all other passages, no less than it is, if they have


def encode_questions(
    rag: RagPipeline, params: Params, questions: QuestionBatch, mesh: Mesh
) -> Float[np.ndarray, "B D"]:
    """The queries of B questions, in every process; `params`, questions and mesh as in `search`."""
    return gather_to_host(begin_encoding(rag, params, questions, mesh))


def begin_encoding(rag: RagPipeline, params: Params, questions: QuestionBatch, mesh: Mesh) -> Float[Array, "B D"]:
    """The same on the devices; the host does not wait for them."""
    count = len(questions.row)
    local = questions.take(local_rows(mesh, count))
    tokens, mask = shard_batch(mesh, (local.question, local.question_mask), count)
    return encode(rag.retriever.graphdef, params["retriever"], tokens, mask)


def search(
    rag: RagPipeline, params: Params, index: Index, questions: QuestionBatch, k: int, mesh: Mesh | None = None
) -> tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B k"], Int[np.ndarray, "B k"]]:
    """The queries of B questions, and the scores and ids of their top-k, in every process of the mesh.

    Args:
        rag: the models.
        params: {"retriever": …, …}, on the mesh.
        index: all its devices search together; with a FAISS kind each process searches for the questions on its own
            devices.
        questions: host arrays with all B questions, the same in every process.
        k: how many documents to look for.
        mesh: by default one device; its axis `data` divides B.
    """
    mesh, count = mesh or local_mesh(data=1), len(questions.row)
    queries = encode_questions(rag, params, questions, mesh)
    if index.on_devices:
        return queries, *index.search(queries, k, mesh)
    hits = index.search(queries[local_rows(mesh, count)], k)
    return queries, *allgather_rows(mesh, hits, count)


def add_bm25(
    index: Index,
    queries: Float[np.ndarray, "B D"],
    scores: Float[np.ndarray, "B k"],
    ids: Int[np.ndarray, "B k"],
    texts: Sequence[str],
    count: int,
) -> tuple[Float[np.ndarray, "B K"], Int[np.ndarray, "B K"]]:
    """The k documents that the encoder found, and the m = `count` best of BM25's that are not among them.

    Where BM25 finds fewer, ids are -1. All K have the encoder's scores, by which they are sorted, equal ones by id.
    """
    assert index.bm25 is not None, "`load_artifacts` opens it"
    _, ranked = index.bm25.search(texts, ids.shape[1] + count)
    new = (ranked >= 0) & (ranked[:, :, None] != ids[:, None]).all(axis=2)
    first = np.argsort(~new, axis=1, kind="stable")[:, :count]
    more = np.where(np.take_along_axis(new, first, 1), np.take_along_axis(ranked, first, 1), -1)
    worth = np.einsum("BD,BMD->BM", queries, index.vectors(more))
    scores = np.concatenate([scores, np.where(more >= 0, worth, -np.inf)], axis=1).astype(np.float32)
    ids = np.concatenate([ids, more], axis=1)
    best = np.lexsort((ids, -scores), axis=-1)
    return np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)


def retrieve(
    rag: RagPipeline,
    params: Params,
    index: Index,
    questions: QuestionBatch,
    k: int,
    mesh: Mesh | None = None,
    texts: Sequence[str] | None = None,
) -> RetrievalResult:
    """As `search`, with the prior normalised as `retriever.prior` says.

    `texts` are the questions as they were asked: with them `retriever.bm25_docs` are added.
    """
    mesh = mesh or local_mesh(data=1)
    queries, scores, ids = search(rag, params, index, questions, k, mesh)
    if texts is not None and (more := rag.config.retriever.bm25_docs):
        rows = local_rows(mesh, len(texts))
        own = add_bm25(index, queries[rows], scores[rows], ids[rows], [texts[row] for row in rows], more)
        scores, ids = allgather_rows(mesh, own, len(texts))
    scale, valid = rag.config.retriever.logit_scale, jax.device_put(ids >= 0)
    if rag.config.retriever.prior == "corpus":
        normalizer = index.log_normalizer(queries, scale, mesh)
        prior = np.asarray(corpus_log_prior(*jax.device_put((scale * scores, normalizer)), valid))
        return RetrievalResult(queries, ids, scores, prior, mass_outside(prior, normalizer))
    return RetrievalResult(queries, ids, scores, np.asarray(log_prior(jax.device_put(scale * scores), valid)))


def mass_outside(
    log_prior: Float[np.ndarray, "B K"], log_normalizer: Float[np.ndarray, " B"]
) -> Float[np.ndarray, " B"]:
    """The prior mass of all passages but the K retrieved, at least: rounding is added to what they leave of 1.

    A score and the normalizer are float32 sums, each of which may be off by some eps of the largest number in it.
    """
    found = log_prior > -np.inf
    mass = np.exp(np.where(found, log_prior, -np.inf).astype(np.float64)).sum(axis=1)
    largest = np.abs(np.where(found, log_prior + log_normalizer[:, None], 0)).max(axis=1) + np.abs(log_normalizer)
    rounding = 16 * np.finfo(np.float32).eps * (1 + largest)
    return np.clip(1 - mass, 0, 1) + rounding


def log_prior_mass(
    rag: RagPipeline, index: Index, retrieval: RetrievalResult, k: int, mesh: Mesh | None = None
) -> Float[np.ndarray, " B"]:
    """Log of the share of the whole corpus's softmax that the best k documents hold, at most 0 but for rounding."""
    scale = rag.config.retriever.logit_scale
    normalizer = index.log_normalizer(retrieval.queries, scale, mesh)
    return np.asarray(jax.nn.logsumexp(jax.device_put(scale * retrieval.scores[:, :k]), axis=-1) - normalizer)
