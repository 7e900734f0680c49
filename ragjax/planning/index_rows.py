"""What `ragjax index` takes: each row of the table names the function that computes its number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ragjax.config import ON_DEVICES
from ragjax.data.passage_store import STORE_FILES, shard_folders
from ragjax.parallel.sharding import abstract_with_sharding
from ragjax.planning.inputs import PlanInputs
from ragjax.planning.program_cost import program_temporaries
from ragjax.planning.rows import Number, Row, Unknown, make_row
from ragjax.planning.shared_rows import embeddings, faiss, parameters_row
from ragjax.retrieval.bm25 import BM25
from ragjax.retrieval.encoder import encode
from ragjax.retrieval.index import MANIFEST

ID_BYTES = 8  # a hash of each passage's id


def index_rows(inputs: PlanInputs) -> list[Row]:
    """The rows of `ragjax index`; what is built already is not counted."""
    kind, there = inputs.config.index.kind, _is_built(inputs)

    def row(what: str, place: str, number: Callable[[PlanInputs], Number], **how: Any) -> Row:
        return make_row("index", what, place, lambda: number(inputs), **how)

    rows = [
        row("passages: text and tokens", "disk", _text_and_tokens, there=there),
        row("embeddings", "disk", embeddings, there=there),
        row("passages' ids", "host", _ids),
        row("passages' tokens for the encoder", "host", _encoder_tokens),
        parameters_row(inputs, "index", "passage encoder"),
        row("temporaries of embedding", "device", _temporaries),
    ]
    if kind not in ON_DEVICES:
        rows.append(row(f"FAISS structure {kind}", "disk", faiss, there=there))
        rows.append(row(f"FAISS structure {kind}", "host", faiss))
    if inputs.config.retriever.bm25_docs:
        rows.append(row("words for BM25", "disk", _words, there=_words_folder(inputs).is_dir()))
    return rows


def _words_folder(inputs: PlanInputs) -> Path:
    return Path(inputs.config.index.path) / BM25


def _words(inputs: PlanInputs) -> Number:
    if not _words_folder(inputs).is_dir():
        raise Unknown("8 bytes for each word of each passage that differs: known once it is built")
    return sum(file.stat().st_size for file in _words_folder(inputs).iterdir()), "as measured"


def _is_built(inputs: PlanInputs) -> bool:
    return (Path(inputs.config.index.path) / MANIFEST).is_file()


def _text_and_tokens(inputs: PlanInputs) -> Number:
    if not _is_built(inputs):
        raise Unknown("the corpus as JSON and 4 bytes a token: known once it is read")
    files = (shard / name for shard in shard_folders(Path(inputs.config.index.path)) for name in STORE_FILES)
    return sum(file.stat().st_size for file in files), "as measured"


def _ids(inputs: PlanInputs) -> Number:
    count, passages = inputs.passages()
    return count * ID_BYTES, f"{passages}, {ID_BYTES} bytes each"


def _encoder_tokens(inputs: PlanInputs) -> Number:
    count, longest = (
        min(inputs.passages()[0], inputs.config.index.shard_size),
        inputs.config.retriever.max_passage_tokens,
    )
    return count * 4 * longest, f"a shard of {count:,} passages, at most {longest} tokens of 4 bytes"


def _temporaries(inputs: PlanInputs) -> Number:
    encoder, batch = inputs.model("passage encoder"), inputs.config.index.batch_size
    longest = inputs.config.retriever.max_passage_tokens
    tokens, mask = (jax.ShapeDtypeStruct((batch, longest), dtype) for dtype in (jnp.int32, jnp.bool))
    arguments = abstract_with_sharding(inputs.one_device, (encoder.untrained_types(inputs.mesh), tokens, mask))
    size = program_temporaries(encode, encoder.graphdef, *arguments)
    return size, f"XLA's analysis ({inputs.device_kind}): one device, {batch} passages of {longest} tokens"
