"""The index that is in the folder, as far as it can serve one of another corpus: an index that grows.

A passage keeps its embedding where title and text are what they were, for then its encoder reads the same; a shard
stays where all its passages stay, with their ids. Neither is believed of a checksum alone: bytes are compared.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ragjax.checksums import CHECKSUMS, SEAL, damage_text, read_checksums, read_sealed, write_sealed
from ragjax.config import structure
from ragjax.data.corpus import Passage, passage_record
from ragjax.data.passage_store import SHARDS, STORE_FILES, StoreShard, shard_folder
from ragjax.errors import InputError
from ragjax.files import partial_folder
from ragjax.rag import RagPipeline
from ragjax.resources import raise_open_file_limit
from ragjax.retrieval.building.shard_plan import PassageKeys, content_of
from ragjax.retrieval.embeddings import Embeddings, EncodedBatch
from ragjax.retrieval.faiss_index import FAISS_FILE, EarlierStructure
from ragjax.retrieval.index import MADE_OF, index_damage, read_index_manifest
from ragjax.terminal import progress_bar, terminal

TOGETHER = 4096  # embeddings that are copied at a time


@dataclass(frozen=True)
class EarlierIndex:
    """Its whole shards. `stays` says whether these may stay: they hold the tokens of the generator that is used now."""

    folder: Path
    manifest: Mapping[str, Any]
    shards: Mapping[int, int]  # how many passages each has, by its number
    stays: bool
    structure: Path | None  # of FAISS, where it is whole and of the kind that is asked for

    @classmethod
    def find(cls, rag: RagPipeline, folder: Path) -> EarlierIndex | None:
        """The index in `folder`, after reading all of it; None where there is none by the same encoder and of the same
        index.dtype.
        """
        try:
            manifest = read_index_manifest(folder)
            computed = read_sealed(folder / MADE_OF)["made_of"]["dtype"]
            built, counts, kind = manifest["fingerprints"], manifest["shards"], manifest["kind"]
        except (InputError, KeyError, TypeError):
            return None
        encoders = ("encoder", "encoder_tokenizer")
        same = all(built.get(part) == rag.fingerprints[part] for part in encoders) and computed == rag.config.dtype
        if not same or manifest["dtype"] != rag.config.index.dtype:
            return None
        if damage := index_damage(folder):
            terminal.print(f"{folder}: is damaged ({damage_text(damage)}); what is whole serves", soft_wrap=True)
        bad = {Path(name).parent.name for name in damage if name.startswith(f"{SHARDS}/")}
        whole = {n: count for n, count in enumerate(counts) if shard_folder(folder, n).name not in bad}
        if not whole:
            return None
        stays = built.get("generator_tokenizer") == rag.fingerprints["generator_tokenizer"]
        usable = kind == structure(rag.config.index.kind) and FAISS_FILE not in damage and len(whole) == len(counts)
        path = folder / FAISS_FILE
        return cls(folder, manifest, whole, stays, path if usable and path.is_file() else None)

    @property
    def identity(self) -> str:
        """The checksum of its manifest, which holds those of all its files."""
        return str(self.manifest[SEAL])

    def faiss_structure(self, appended: bool) -> EarlierStructure | None:
        """What goes on as the new index's structure; `appended` as in `ShardPlan`."""
        if self.structure is None:
            return None
        trained_on = self.manifest.get("trained_on", self.manifest["N"])
        return EarlierStructure(self.structure, trained_on, self.manifest["N"] if appended else 0)

    @cached_property
    def passages(self) -> PassageKeys:
        """Those of its whole shards, one after the other."""
        keys = PassageKeys()
        with progress_bar("compare with the index", sum(self.shards.values()), "passages") as advance:
            for shard in self._stores:
                text, ends = shard.text.tobytes(), shard.text_offsets.tolist()
                for start, stop in itertools.pairwise(ends):
                    keys.add(text[start:stop])
                advance(len(shard))
        return keys

    def link_shard(self, number: int, passages: Sequence[Passage], target: Path, as_number: int) -> bool:
        """Puts a shard into the folder `target` under another number; False where it does not hold these passages.

        Its files are the same ones there, or copies where the disk knows no other names of a file.
        """
        source = shard_folder(self.folder, number)
        if self._store(number).text.tobytes() != b"".join(map(passage_record, passages)):
            return False
        with partial_folder(target) as unfinished:
            records = read_checksums(source)["files"]
            for name in records:
                try:
                    os.link(source / name, unfinished / name)
                except OSError:
                    shutil.copyfile(source / name, unfinished / name)
            write_sealed(unfinished / CHECKSUMS, {"number": as_number, "files": records})
            unfinished.rename(target)
        return True

    def find_embeddings(self, passages: Sequence[Passage]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The places, among `passages`, of those that are here with the same title and text, and their rows here."""
        contents, order = self.passages.contents, self._by_content
        keys = PassageKeys()
        records = [passage_record(passage) for passage in passages]
        for record in records:
            keys.add(record)
        at = np.searchsorted(contents, keys.contents, sorter=order)
        rows = order[np.minimum(at, len(order) - 1)]
        likely = np.flatnonzero(contents[rows] == keys.contents)
        places = [i for i in likely.tolist() if content_of(self._record(int(rows[i]))) == content_of(records[i])]
        return np.array(places, np.int64), rows[places]

    def embeddings(self, places: Int[np.ndarray, " n"], rows: Int[np.ndarray, " n"]) -> list[EncodedBatch]:
        """The embeddings of some rows, for these places."""
        starts = range(0, len(rows), TOGETHER)
        return [(places[at : at + TOGETHER], self._embeddings[rows[at : at + TOGETHER]]) for at in starts]

    @cached_property
    def _embeddings(self) -> Embeddings:
        folders = [shard_folder(self.folder, number) for number in self.shards]
        return Embeddings.open(folders, self.manifest["dtype"], whole=False)  # they were read when it was found

    @cached_property
    def _stores(self) -> list[StoreShard]:
        raise_open_file_limit(len(STORE_FILES) * len(self.shards))
        return [StoreShard.open(shard_folder(self.folder, number)) for number in self.shards]

    def _store(self, number: int) -> StoreShard:
        return self._stores[list(self.shards).index(number)]

    @cached_property
    def _by_content(self) -> Int[np.ndarray, " n"]:
        return np.argsort(self.passages.contents, kind="stable")

    @cached_property
    def _starts(self) -> Int[np.ndarray, " n"]:
        return np.cumsum([0, *self.shards.values()])

    def _record(self, row: int) -> bytes:
        shard = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._stores[shard].record(row - int(self._starts[shard]))
