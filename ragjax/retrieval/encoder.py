"""Stage 1: embeddings of questions and passages by the encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ragjax.data.passage_store import PassageStore
from ragjax.models.layers import Params
from ragjax.padding import Ids, length_buckets, pad_sequences, pick_bucket
from ragjax.parallel.mesh import command_mesh
from ragjax.parallel.sharding import map_per_device
from ragjax.rag import RagPipeline
from ragjax.retrieval.embeddings import EncodedBatch, embed_passages, encoded_batches


@partial(jax.jit, static_argnums=0)
def encode(
    graph: nnx.GraphDef, params: Params, tokens: Int[Array, "n S"], mask: Bool[Array, "n S"]
) -> Float[Array, "n D"]:
    """Embeddings of questions or passages; `params` are the retriever's."""
    return nnx.merge(graph, params)(tokens, mask)


def passage_batch(
    rag: RagPipeline, store: PassageStore, ids: Int[np.ndarray, "*n"]
) -> tuple[Int[np.ndarray, "*n P"], Bool[np.ndarray, "*n P"]]:
    """Passages as their encoder reads them, padded to a bucket, and the mask; nothing where the id is -1."""
    settings, tokenizer = rag.config.retriever, rag.passage_tokenizer
    flat = ids.reshape(-1)
    passages = [store[int(i)] for i in flat if i >= 0]
    tokenized = iter(rag.tokenize_passages(passages))
    rows = [next(tokenized) if i >= 0 else np.zeros(0, np.int32) for i in flat]
    width = pick_bucket(max(len(row) for row in rows), length_buckets(settings.max_passage_tokens))
    tokens, mask = pad_sequences(rows, width, tokenizer.pad_id)
    return tokens.reshape(*ids.shape, width), mask.reshape(*ids.shape, width)


def embed_to_file(
    rag: RagPipeline, params: Params, token_rows: Sequence[Ids], path: Path, progress: Callable[[int], None]
) -> None:
    """Writes the embeddings of passages to a file with all devices of this process; see `embed_passages`.

    `params` are the passage encoder's, whole on every device of `command_mesh("index")`.
    """
    batches = _embeddings(rag, params, token_rows)
    embed_passages(batches, len(token_rows), dtype=rag.config.index.dtype, path=path, progress=progress)


def embed_in_memory(rag: RagPipeline, params: Params, token_rows: Sequence[Ids]) -> Float[np.ndarray, "n D"]:
    """As `embed_to_file`, in memory and in float32."""
    embeddings = np.zeros((len(token_rows), rag.passage_encoder.config.embedding_dim), np.float32)
    for ids, vectors in _embeddings(rag, params, token_rows):
        embeddings[ids] = vectors
    return embeddings


@cache  # compiled once, not for every shard or part
def _sharded_encode(graph: nnx.GraphDef, mesh: Mesh) -> Callable[..., Any]:
    return map_per_device(mesh, partial(encode, graph))


def _embeddings(rag: RagPipeline, params: Params, token_rows: Sequence[Ids]) -> Iterator[EncodedBatch]:
    mesh = command_mesh("index")
    return encoded_batches(
        partial(_sharded_encode(rag.passage_encoder.graphdef, mesh), params),
        token_rows,
        width_buckets=length_buckets(rag.config.retriever.max_passage_tokens),
        batch_size=rag.config.index.batch_size,
        pad_id=rag.passage_tokenizer.pad_id,
        devices=mesh.size,
    )
