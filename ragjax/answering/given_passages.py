"""Passages from the caller in place of the index's: given with a question, or found by a retriever of the caller's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from ragjax.data.corpus import Passage
from ragjax.data.passage_store import PassageStore
from ragjax.data.prompt import passage_text
from ragjax.data.question_batch import QuestionBatch
from ragjax.errors import InputError
from ragjax.files import is_unicode
from ragjax.marginal import log_prior
from ragjax.models.layers import Params
from ragjax.padding import bucket_size
from ragjax.rag import RagPipeline
from ragjax.retrieval.encoder import encode, passage_batch
from ragjax.retrieval.retrieve import RetrievalResult, encode_questions

FIELDS = ("text", "title", "id")


@runtime_checkable
class Retriever(Protocol):
    """What finds documents in place of the index. Its scores are logits: p(z|x) is their softmax over what it found."""

    def search(self, questions: Sequence[str], k: int) -> tuple[Any, Any]:
        """The scores [B,k] and the ids [B,k] of the documents of B questions; an id below 0 where there are fewer."""
        ...

    def passage(self, id: int) -> Any:
        """The passage of an id: a text, or {"text": …, "title": …, "id": …}."""
        ...


class GivenPassages(PassageStore):
    """A store in memory; the tokens are the generator's."""

    def __init__(self, rag: RagPipeline, passages: Sequence[Passage]) -> None:
        template = rag.config.generator.passage_template
        self._passages = list(passages)
        texts = [passage_text(template, passage) for passage in self._passages]
        self._rows = [np.asarray(row, np.int32) for row in rag.generator_tokenizer.encode(texts)]

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, i: int) -> Passage:
        return self._passages[i]

    def tokens(self, i: int) -> Int[np.ndarray, " S"]:
        """The tokens of a passage, as `PassageStore.tokens` gives them."""
        return self._rows[i]


def read_passages(passages: object) -> list[Passage]:
    """Texts, {"text": …, "title": …, "id": …}, or what `Answerer.search` gives, as passages.

    Raises `TypeError` for another type, and `InputError` for a text that is empty or no Unicode.
    """
    if isinstance(passages, str | bytes | Mapping) or not isinstance(passages, Sequence):
        raise TypeError(f"passages: expected a list of texts or of {{text, title}}, not {type(passages).__name__}")
    if not passages:
        raise InputError("passages: an empty list; give at least one, or leave it out to search the index")
    return [_read_passage(passage, i) for i, passage in enumerate(passages)]


def _read_passage(given: Any, i: int) -> Passage:
    if isinstance(given, str):
        fields: dict[str, Any] = {"text": given}
    elif isinstance(given, Mapping):
        fields = dict(given)
        if unknown := [key for key in fields if key not in FIELDS]:
            raise InputError(f"passages[{i}]: has {unknown[0]!r}; expected text, and perhaps title and id")
    elif all(hasattr(given, name) for name in FIELDS):
        fields = {name: getattr(given, name) for name in FIELDS}
    else:
        raise TypeError(f"passages[{i}]: expected a text or {{text, title}}, not {type(given).__name__}")
    fields = {"text": "", "title": "", "id": f"given-{i + 1}"} | fields
    for name, value in fields.items():
        if not isinstance(value, str):
            raise TypeError(f"passages[{i}]: {name}: expected a text, not {type(value).__name__}")
        if not is_unicode(value):
            raise InputError(f"passages[{i}]: {name} is not Unicode text (it holds half of a surrogate pair)")
    if not fields["text"].strip():
        raise InputError(f"passages[{i}]: an empty text; expected some")
    return Passage(**fields)


def embed_given(rag: RagPipeline, params: Params, passages: Sequence[Passage]) -> Float[np.ndarray, "n D"]:
    """Embeddings of passages, `index.batch_size` at a time; `params` are their encoder's."""
    parts, size = [], rag.config.index.batch_size
    store = GivenPassages(rag, passages)
    for start in range(0, len(passages), size):
        count = min(size, len(passages) - start)
        ids = np.full(bucket_size(count), -1, np.int32)
        ids[:count] = np.arange(start, start + count)
        parts.append(np.asarray(encode(rag.passage_encoder.graphdef, params, *passage_batch(rag, store, ids)))[:count])
    return np.concatenate(parts)


def weigh_given(
    rag: RagPipeline, params: Params, embeddings: Float[np.ndarray, "n D"], questions: QuestionBatch, mesh: Mesh
) -> RetrievalResult:
    """All n given passages for each of B questions, best first, with the prior over them alone.

    Their number is filled up to one of a few, so that few programs are compiled; the rest has id −1 and prior 0.
    """
    queries = encode_questions(rag, params, questions, mesh)
    found = queries @ embeddings.T
    order = np.argsort(-found, axis=1, kind="stable")
    shape = (len(queries), bucket_size(len(embeddings)))
    ids, scores = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
    ids[:, : len(embeddings)] = order
    scores[:, : len(embeddings)] = np.take_along_axis(found, order, 1)
    prior = log_prior(*jax.device_put((rag.config.retriever.logit_scale * scores, ids >= 0)))
    return RetrievalResult(queries, ids, scores, np.asarray(prior))


def search_elsewhere(
    rag: RagPipeline, retriever: Retriever, questions: Sequence[str], k: int
) -> tuple[GivenPassages, RetrievalResult]:
    """What a retriever finds for B questions, best first, and the passages of it all.

    Raises `InputError` where its answer has not the shapes of `Retriever`, and as `read_passages` does.
    """
    try:
        scores, ids = (np.asarray(array) for array in retriever.search(list(questions), k))
    except ValueError as error:  # no two, or rows of several lengths
        raise InputError(f"retriever.search gave no two arrays ({error})") from None
    shape = (len(questions), k)
    if scores.shape != shape or ids.shape != shape or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(
            f"retriever.search gave scores {scores.shape} and ids {ids.shape} of {ids.dtype}; expected numbers and "
            f"whole numbers of the shape {shape}"
        )
    there = ids >= 0
    if not np.isfinite(scores[there]).all():
        raise InputError("retriever.search gave scores that are not finite")
    masked = np.where(there, scores, -np.inf).astype(np.float32)
    order = np.argsort(-masked, axis=1, kind="stable")
    masked, ids = np.take_along_axis(masked, order, 1), np.take_along_axis(ids, order, 1)
    distinct = np.unique(ids[ids >= 0])
    store = GivenPassages(rag, [_read_passage(retriever.passage(int(i)), int(i)) for i in distinct])
    numbers = np.where(ids >= 0, np.searchsorted(distinct, ids), -1).astype(np.int32)
    prior = np.asarray(log_prior(*jax.device_put((masked, numbers >= 0))))
    return store, RetrievalResult(np.zeros((len(questions), 0), np.float32), numbers, masked, prior)
