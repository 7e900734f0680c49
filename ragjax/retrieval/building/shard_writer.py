"""Writes a shard: the text and tokens of its passages, and their embeddings, wherever these come from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ragjax.checksums import write_checksums
from ragjax.data.corpus import Passage
from ragjax.data.passage_store import write_store
from ragjax.data.prompt import passage_text
from ragjax.files import partial_folder
from ragjax.models.layers import Params
from ragjax.rag import RagPipeline
from ragjax.retrieval.building.earlier_index import EarlierIndex
from ragjax.retrieval.embeddings import EMBEDDINGS, EncodedBatch, embed_passages
from ragjax.retrieval.encoder import embed_batches, indexing_params

ReadyVectors = Callable[[Sequence[Passage], int], Iterable[EncodedBatch]]  # of passages, the first at this position


class ShardWriter:
    """Writes shards with text, tokens and embeddings, with all devices of this process."""

    def __init__(self, rag: RagPipeline, ready: ReadyVectors | None, earlier: EarlierIndex | None) -> None:
        self.rag, self.ready, self.earlier = rag, ready, earlier
        self._text_of = partial(passage_text, rag.config.generator.passage_template)

    @cached_property
    def _params(self) -> Params:
        return indexing_params(self.rag)

    def write(
        self,
        folder: Path,
        number: int,
        kept: int | None,
        passages: Sequence[Passage],
        start: int,
        advance: Callable[[int], None],
    ) -> None:
        """Makes the shard `folder`, the first passage of which stands at `start`; `kept` is its number in the earlier
        index, where all of it stays.
        """
        if self.earlier and kept is not None and self.earlier.link_shard(kept, passages, folder, number):
            advance(len(passages))
            return
        with partial_folder(folder) as unfinished:
            write_store(unfinished, passages, self.rag.generator_tokenizer.encode, self._text_of)
            embed_passages(
                self._embeddings(passages, start),
                len(passages),
                dtype=self.rag.config.index.dtype,
                path=unfinished / EMBEDDINGS,
                progress=advance,
            )
            write_checksums(unfinished, number=number)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)

    def _embeddings(self, passages: Sequence[Passage], start: int) -> Iterator[EncodedBatch]:
        """Ready ones, or those of the earlier index and, of passages that are new, what the encoder says."""
        if self.ready is not None:
            yield from self.ready(passages, start)
            return
        new = np.arange(len(passages))
        if self.earlier is not None:
            places, rows = self.earlier.find_embeddings(passages)
            yield from self.earlier.embeddings(places, rows)
            new = np.setdiff1d(new, places)
        if len(new):
            token_rows = self.rag.tokenize_passages([passages[i] for i in new.tolist()])
            for ids, vectors in embed_batches(self.rag, self._params, token_rows):
                yield new[ids], vectors
