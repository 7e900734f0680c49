"""Retrieval inside the training step: from the tokens of questions to a batch, without the host.

The devices hold embeddings and tokens of all passages (`DeviceIndex`), and put together the prompts that
`tokenize_prompts` makes on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from ragjax.data.passage_store import PassageStore
from ragjax.data.prompt import Prompt
from ragjax.data.question_batch import QuestionBatch
from ragjax.models.layers import Params
from ragjax.parallel.sharding import abstract_with_sharding
from ragjax.rag import RagModel, RagPipeline
from ragjax.retrieval.device_index import DeviceIndex, gather_rows, place_rows, rows_each, sharded_top_k, split_rows
from ragjax.retrieval.index import Index
from ragjax.training.batch import TrainBatch


def corpus_with_tokens(rag: RagPipeline, index: Index, store: PassageStore, mesh: Mesh) -> DeviceIndex:
    """Embeddings and tokens of all passages on the devices; of each as many tokens as may stand in a prompt."""
    corpus, count = index.corpus(mesh), len(store)
    width = min(store.longest, rag.config.generator.max_prompt_tokens)
    dtype = _token_dtype(rag)

    def tokens(start: int, stop: int) -> np.ndarray:
        return store.token_rows(start, stop, width)[0].astype(dtype)

    def lengths(start: int, stop: int) -> np.ndarray:
        return store.token_rows(start, stop, width)[1]

    return replace(corpus, tokens=place_rows(mesh, count, tokens), lengths=place_rows(mesh, count, lengths))


def abstract_corpus(rag: RagModel, mesh: Mesh, passages: int) -> DeviceIndex:
    """What the devices hold of N passages, in shapes, types and places; of tokens the most there can be."""
    config, split = rag.config, split_rows(mesh)
    rows = rows_each(mesh, passages) * mesh.size

    def table(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return abstract_with_sharding(mesh, jax.ShapeDtypeStruct((rows, *shape), dtype), *split)

    corpus = DeviceIndex(table(config.index.dtype, rag.retriever.config.embedding_dim), passages, mesh)
    if not config.train.fused_retrieval:
        return corpus
    tokens = table(_token_dtype(rag), config.generator.max_prompt_tokens)
    return replace(corpus, tokens=tokens, lengths=table("int32"))


def _token_dtype(rag: RagModel) -> str:
    return "uint16" if rag.generator.config.vocab_size <= 2**16 else "int32"


def retrieve_in_step(
    rag: RagModel, params: Params, questions: QuestionBatch, corpus: DeviceIndex
) -> tuple[TrainBatch, Int[Array, "B K"]]:
    """The batch that `search` and `attach_documents` make on the host, and the ids of the documents; pure.

    `questions` are the widest, with their answers, and lie with `corpus` on its devices.
    """
    train = rag.config.train
    retriever = nnx.merge(rag.retriever.graphdef, jax.lax.stop_gradient(params["retriever"]))
    queries = retriever(questions.question, questions.question_mask)
    recall = rag.config.index.recall_target if rag.config.index.kind == "approximate" else None
    _, ids = sharded_top_k(corpus, queries, train.num_docs, recall)
    tokens, lengths = gather_rows(corpus, corpus.tokens, ids), gather_rows(corpus, corpus.lengths, ids)
    source, source_mask = prompt_on_device(
        rag.prompt, tokens, lengths, *questions.for_generator, rag.config.generator.max_prompt_tokens, rag.special.pad
    )
    embeddings = gather_rows(corpus, corpus.embeddings, ids)
    batch = TrainBatch(questions.without_prompts(), embeddings, ids >= 0, source, source_mask)
    by_questions = NamedSharding(corpus.mesh, PartitionSpec("data"))
    return jax.lax.with_sharding_constraint(batch, by_questions), ids


def prompt_on_device(
    prompt: Prompt,
    passage_tokens: Int[Array, "B K P"],
    lengths: Int[Array, "B K"],
    question: Int[Array, "B Q"],
    question_mask: Bool[Array, "B Q"],
    longest: int,
    pad_id: int,
) -> tuple[Int[Array, "B K S"], Bool[Array, "B K S"]]:
    """As `data.prompt.assemble`, for K passages of each question, in one program.

    Args:
        prompt: the tokens around a passage and a question.
        passage_tokens: those of which as many count as `lengths` says; they are cut so that a prompt fits.
        lengths: in tokens.
        question: as the generator reads it; it must fit.
        question_mask: true on the question's own tokens.
        longest: S, in tokens.
        pad_id: what stands behind a prompt.
    """
    shape = lengths.shape
    question_lengths = question_mask.sum(axis=-1)[:, None]
    fixed = len(prompt.head) + len(prompt.middle) + len(prompt.tail) + question_lengths
    passage = passage_tokens, jnp.minimum(lengths, longest - fixed)
    questions = (
        jnp.broadcast_to(question[:, None], (*shape, question.shape[1])),
        jnp.broadcast_to(question_lengths, shape),
    )
    first, second = (questions, passage) if prompt.question_first else (passage, questions)
    position = jnp.broadcast_to(jnp.arange(longest), (*shape, longest))
    source = jnp.full((*shape, longest), pad_id, jnp.int32)
    end = jnp.zeros(shape, jnp.int32)
    for tokens, length in (_constant(prompt.head), first, _constant(prompt.middle), second, _constant(prompt.tail)):
        begin, end = end, end + length
        if tokens.shape[-1] == 0:
            continue
        rows = jnp.broadcast_to(tokens, (*shape, tokens.shape[-1]))
        at = jnp.clip(position - begin[..., None], 0, tokens.shape[-1] - 1)
        here = (position >= begin[..., None]) & (position < end[..., None])
        source = jnp.where(here, jnp.take_along_axis(rows, at, -1), source)
    return source, position < end[..., None]


def _constant(tokens: Sequence[int]) -> tuple[Array, int]:
    return jnp.array(tokens, jnp.int32), len(tokens)
