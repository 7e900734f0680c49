"""Retrieval inside the training step: from the tokens of questions to a batch, without the host.

The devices hold embeddings and tokens of all passages (search.py), and put together the prompts that
`rag.prompt_rows` makes on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from ragjax.config import Config
from ragjax.data.passage_store import PassageStore
from ragjax.data.prompt import Prompt, check_prompt_fits
from ragjax.models.layers import Params
from ragjax.padding import pad_sequences
from ragjax.parallel.sharding import abstract_with_sharding
from ragjax.rag import RagModel, RagPipeline, tokenize_answer, tokenize_questions
from ragjax.retrieval.device_index import DeviceIndex, gather_rows, place_rows, rows_each, sharded_top_k, split_rows
from ragjax.retrieval.index import Index
from ragjax.training.batch import Rows, TrainBatch


@struct.dataclass
class QuestionBatch:
    """B questions and one accepted answer each, before anything is retrieved; the host knows no more of a step."""

    row: Int[Rows, " B"]  # number in the global batch: keys the dropout
    question: Int[Rows, "B Q"]  # as the retriever reads it
    question_mask: Bool[Rows, "B Q"]
    told: Int[Rows, "B S"]  # as the generator reads it
    told_mask: Bool[Rows, "B S"]
    answer: Int[Rows, "B T"]
    answer_mask: Bool[Rows, "B T"]


def question_batch(
    rag: RagPipeline, questions: Sequence[str], answers: Sequence[str], rows: Int[np.ndarray, " B"] | None = None
) -> QuestionBatch:
    """Host arrays for one step, of the global batch or of its `rows` that these are, always of the same widths.

    Raises `InputError` for a question that does not fit into a prompt.
    """
    config, tokenizer = rag.config, rag.generator_tokenizer
    question, question_mask = tokenize_questions(rag, questions, config.retriever.question_tokens)
    told = tokenizer.encode([rag.prompt.before_question + question for question in questions])
    for tokens in told:
        check_prompt_fits(rag.prompt, tokens, config.generator.source_tokens)
    told_rows, told_mask = pad_sequences(told, config.generator.source_tokens, tokenizer.pad_id)
    written = [tokenize_answer(rag, answer) for answer in answers]
    answer, answer_mask = pad_sequences(written, config.generator.answer_tokens, rag.special.pad)
    row = (np.arange(len(questions)) if rows is None else rows).astype(np.int32)
    return QuestionBatch(row, question, question_mask, told_rows, told_mask, answer, answer_mask)


def abstract_question_batch(config: Config) -> QuestionBatch:
    """The shapes and types of a step's questions."""
    count, shape = config.train.batch_size, jax.ShapeDtypeStruct
    widths = config.retriever.question_tokens, config.generator.source_tokens, config.generator.answer_tokens
    pairs = [(shape((count, width), jnp.int32), shape((count, width), jnp.bool)) for width in widths]
    return QuestionBatch(shape((count,), jnp.int32), *pairs[0], *pairs[1], *pairs[2])


def corpus_with_tokens(rag: RagPipeline, index: Index, store: PassageStore, mesh: Mesh) -> DeviceIndex:
    """Embeddings and tokens of all passages on the devices; of each as many tokens as may stand in a prompt."""
    corpus, count = index.corpus(mesh), len(store)
    width = min(store.longest, rag.config.generator.source_tokens)
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
    if not config.train.fused:
        return corpus
    tokens = table(_token_dtype(rag), config.generator.source_tokens)
    return replace(corpus, tokens=tokens, lengths=table("int32"))


def _token_dtype(rag: RagModel) -> str:
    return "uint16" if rag.generator.config.vocab_size <= 2**16 else "int32"


def retrieve_in_step(
    rag: RagModel, params: Params, asked: QuestionBatch, corpus: DeviceIndex
) -> tuple[TrainBatch, Int[Array, "B K"]]:
    """The batch that `rag.train_batch` makes on the host after `rag.search`, and the ids of the documents; pure."""
    train = rag.config.train
    retriever = nnx.merge(rag.retriever.graphdef, jax.lax.stop_gradient(params["retriever"]))
    queries = retriever(asked.question, asked.question_mask)
    recall = rag.config.index.recall if rag.config.index.kind == "approximate" else None
    _, ids = sharded_top_k(corpus, queries, train.k, recall)
    tokens, lengths = gather_rows(corpus, corpus.tokens, ids), gather_rows(corpus, corpus.lengths, ids)
    source, source_mask = prompt_on_device(
        rag.prompt, tokens, lengths, asked.told, asked.told_mask, rag.config.generator.source_tokens, rag.special.pad
    )
    batch = TrainBatch(
        row=asked.row,
        question=asked.question,
        question_mask=asked.question_mask,
        passages=gather_rows(corpus, corpus.embeddings, ids),
        valid=ids >= 0,
        source=source,
        source_mask=source_mask,
        answer=asked.answer,
        answer_mask=asked.answer_mask,
    )
    by_questions = NamedSharding(corpus.mesh, PartitionSpec("data"))
    return jax.lax.with_sharding_constraint(batch, by_questions), ids


def prompt_on_device(
    prompt: Prompt,
    passages: Int[Array, "B K P"],
    lengths: Int[Array, "B K"],
    question: Int[Array, "B Q"],
    question_mask: Bool[Array, "B Q"],
    longest: int,
    pad_id: int,
) -> tuple[Int[Array, "B K S"], Bool[Array, "B K S"]]:
    """As `text.assemble`, for every passage, which is cut to fit into `longest` tokens. The question must fit."""
    shape = lengths.shape
    asked = question_mask.sum(axis=-1)[:, None]
    fixed = len(prompt.head) + len(prompt.middle) + len(prompt.tail) + asked
    passage = passages, jnp.minimum(lengths, longest - fixed)
    questions = jnp.broadcast_to(question[:, None], (*shape, question.shape[1])), jnp.broadcast_to(asked, shape)
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
