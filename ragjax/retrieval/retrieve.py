"""Stage 1: the top-k documents of questions, with their prior p(z|x)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from ragjax.marginal import corpus_log_prior, log_prior
from ragjax.models.layers import Params
from ragjax.parallel.mesh import local_mesh
from ragjax.parallel.sharding import allgather_rows, gather_to_host, local_rows, shard_batch
from ragjax.rag import RagPipeline, tokenize_questions
from ragjax.retrieval.encoder import encode
from ragjax.retrieval.index import Index


@dataclass(frozen=True)
class RetrievalResult:
    """The top-k of B questions, best first; id −1, score −inf and prior −inf where there was no hit."""

    queries: Float[np.ndarray, "B D"]
    ids: Int[np.ndarray, "B K"]
    scores: Float[np.ndarray, "B K"]  # inner products, before the scale
    log_prior: Float[np.ndarray, "B K"]


def search(
    rag: RagPipeline, params: Params, index: Index, questions: Sequence[str], k: int, mesh: Mesh | None = None
) -> tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B K"], Int[np.ndarray, "B K"]]:
    """The queries of B questions, and the scores and ids of their top-k, known to every process of the mesh.

    `params` lie on the mesh (by default one device), whose axis `data` divides B. All its devices search together; with
    a FAISS kind each process searches for the questions on its own devices.
    """
    mesh = mesh or local_mesh(data=1)
    queries = encode_questions(rag, params, questions, mesh)
    if index.on_devices:
        return queries, *index.search(queries, k, mesh)
    found = index.search(queries[local_rows(mesh, len(questions))], k)
    return queries, *allgather_rows(mesh, found, len(questions))


def encode_questions(
    rag: RagPipeline, params: Params, questions: Sequence[str], mesh: Mesh
) -> Float[np.ndarray, "B D"]:
    """The queries of B questions, known to every process; `params` and mesh as in `search`."""
    rows, count = tokenize_questions(rag, questions), len(questions)
    mine = local_rows(mesh, count)
    asked = shard_batch(mesh, tuple(of_all[mine] for of_all in rows), count)
    return gather_to_host(encode(rag.retriever.graphdef, params["retriever"], *asked))


def retrieve(
    rag: RagPipeline, params: Params, index: Index, questions: Sequence[str], k: int, mesh: Mesh | None = None
) -> RetrievalResult:
    """As `search`, with the prior normalised as the configuration says."""
    queries, scores, ids = search(rag, params, index, questions, k, mesh)
    scale, valid = rag.config.retriever.scale, jnp.asarray(ids >= 0)
    if rag.config.retriever.prior == "corpus":
        normalizer = index.log_normalizer(queries, scale, mesh)
        prior = corpus_log_prior(jnp.asarray(scale * scores), jnp.asarray(normalizer), valid)
    else:
        prior = log_prior(jnp.asarray(scale * scores), valid)
    return RetrievalResult(queries, ids, scores, np.asarray(prior))


def log_prior_mass(
    rag: RagPipeline, index: Index, retrieved: RetrievalResult, k: int, mesh: Mesh | None = None
) -> Float[np.ndarray, " B"]:
    """Log of the share of the whole corpus's softmax that the best k documents hold, at most 0 but for rounding."""
    scale = rag.config.retriever.scale
    normalizer = index.log_normalizer(retrieved.queries, scale, mesh)
    return np.asarray(jax.nn.logsumexp(jnp.asarray(scale * retrieved.scores[:, :k]), axis=-1) - normalizer)
