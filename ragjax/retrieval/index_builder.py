"""Builds an index shard by shard, so that a build that was stopped goes on after the last whole shard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from ragjax.checksums import (
    CHECKSUMS,
    DamagedFolder,
    damages,
    read_checksums,
    read_sealed,
    write_checksums,
    write_sealed,
)
from ragjax.config import structure
from ragjax.data.corpus import CorpusStats, Passage
from ragjax.data.passage_store import SHARDS, STORE_FILES, PassageStore, shard_folder, write_store
from ragjax.data.prompt import passage_text
from ragjax.errors import InputError
from ragjax.files import LOCK, atomic_write, exclusive_lock, partial_folder, write_jsonl
from ragjax.parallel.mesh import command_mesh
from ragjax.parallel.processes import allgather_text, run_on_process_zero
from ragjax.parallel.sharding import abstract_with_sharding
from ragjax.rag import RagPipeline
from ragjax.retrieval.embeddings import EMBEDDINGS
from ragjax.retrieval.encoder import embed_to_file
from ragjax.retrieval.faiss_index import FAISS_FILE
from ragjax.retrieval.index import MADE_OF, MANIFEST, index_damage, read_index_manifest, write_index
from ragjax.terminal import progress_bar, terminal

ReadPassages = Callable[[], Iterable[Passage]]  # the corpus from its beginning


@dataclass(frozen=True)
class ExistingIndex:
    """An index of the same things that is in the folder already."""

    shard: int  # passages in each shard but the last
    good: list[int]  # the shards that are what was written
    damage: dict[str, str]  # what is wrong with each damaged file, by its name


class IndexBuilder:
    """Builds the index in INDEX.partial, beside its folder, and moves it into the folder once it is whole.

    The steps, in this order: `find_existing`, then within `working_folder` the statistics of the corpus,
    `embed_missing` and `finish`. `content` names what the passages are made from.
    """

    def __init__(self, rag: RagPipeline, folder: Path, content: str) -> None:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; choose another index.path")
        self.rag, self.folder, self.content = rag, folder, content
        resolved = folder.resolve()  # pieces are renamed: both must lie on one disk
        self.partial = resolved.with_name(resolved.name + ".partial")
        self.recipe = index_recipe(rag, content)

    def with_shard_size(self, shard: int) -> IndexBuilder:
        """The builder of the same index in shards of so many passages."""
        index = self.rag.config.index.replace(shard_size=shard)
        rag = replace(self.rag, config=self.rag.config.replace(index=index))
        return IndexBuilder(rag, self.folder, self.content)

    def find_existing(self) -> ExistingIndex | None:
        """What process 0 finds in the folder, after reading all of it; None where this index is yet to be built.

        None, too, where it is built, but not moved to the folder.
        """
        existing = run_on_process_zero(self._find_existing)
        existing = json.loads(allgather_text(json.dumps(existing and asdict(existing)))[0])
        return None if existing is None else ExistingIndex(**existing)

    def _find_existing(self) -> ExistingIndex | None:
        """Where the manifest is damaged, made_of.json says what it is, and each shard's checksums that it is whole."""
        folder, shard = self.folder, self.rag.config.index.shard_size
        if not folder.is_dir() or self.is_complete():
            return None
        try:
            manifest = read_index_manifest(folder)
        except InputError:
            if (stats := read_saved_stats(folder, self.recipe)) is None:
                return None
            whole = {number: _is_whole(folder, number) for number in range(-(-stats.count // shard))}
            damage = {f"{SHARDS}/{number:05d}": "is not whole" for number in whole if not whole[number]}
            return ExistingIndex(shard, [n for n in whole if whole[n]], {MANIFEST: "is not whole"} | damage)
        if any(manifest["fingerprints"].get(part) != value for part, value in self.rag.fingerprints.items()):
            return None
        if manifest["corpus"]["content"] != self.content:
            return None
        damage, counts = index_damage(folder), manifest["shards"]
        bad = {Path(name).parent.name for name in damage if name.startswith(f"{SHARDS}/")}
        good = [number for number in range(len(counts)) if shard_folder(folder, number).name not in bad]
        return ExistingIndex(counts[0], good, damage)

    def remove_leftovers(self) -> None:
        """Removes INDEX.partial where a build of this index was killed after its last step."""
        if self.saved_stats():
            shutil.rmtree(self.partial, ignore_errors=True)

    @contextmanager
    def working_folder(self) -> Iterator[None]:
        """INDEX.partial, held by this process alone, with the shards of an earlier build of the same things.

        It is gone at the end. When anything fails it stays, if there is a shard to go on with.
        """
        new = self.partial
        with exclusive_lock(new, "builds this index; wait for it, or choose another index.path"):
            stats = self.saved_stats()
            if stats is None and (made := len(list((new / SHARDS).glob("[0-9]*")))):
                terminal.print(
                    f"{new}: its {made} shards are of another corpus, model, setting, JAX or device; begun anew"
                )
            for path in new.iterdir() if stats is None else (new / SHARDS).glob("*.partial"):
                if path.name != LOCK:
                    _remove(path)
            try:
                yield
            except BaseException:
                # with its manifest it may be on its way to its place
                if (new / MANIFEST).exists() or any(path.name.isdigit() for path in (new / SHARDS).glob("*")):
                    terminal.print(f"{new} stays: run the same command again to go on", soft_wrap=True)
                else:
                    shutil.rmtree(new, ignore_errors=True)
                raise
            shutil.rmtree(new, ignore_errors=True)

    def saved_stats(self) -> CorpusStats | None:
        """The statistics of the corpus that an earlier build of the same things saved; None if there was none."""
        return read_saved_stats(self.partial, self.recipe)

    def save_stats(self, stats: CorpusStats) -> None:
        """Keeps the statistics of the corpus for a build that goes on with this one."""
        write_sealed(self.partial / MADE_OF, {"made_of": self.recipe, "scan": asdict(stats)})

    def is_complete(self) -> bool:
        """Whether only the move to the folder is left to do, or the rest of it."""
        try:
            return read_sealed(self.partial / MANIFEST)["fingerprints"] == self.rag.fingerprints
        except (InputError, KeyError):
            return False

    def embed_missing(self, read: ReadPassages, count: int, good: Sequence[int]) -> None:
        """Writes this process's part of the missing shards in one pass over the corpus of `count` passages.

        Not missing are those in INDEX.partial, whose sizes alone are compared, and the `good` ones in the folder.
        """
        size = self.rag.config.index.shard_size
        starts = range(0, count, size)
        there = [start for start in starts if start // size in good or _is_whole(self.partial, start // size, most=0)]
        if there:
            done = sum(min(size, count - start) for start in there)
            terminal.print(f"going on with the index: {done} of {count} passages are there", soft_wrap=True)
        process, processes = jax.process_index(), jax.process_count()
        mine = starts[process::processes]
        missing = [start for start in mine if start not in there]
        if not missing:
            return
        name = "embed" if processes == 1 else f"embed, the part of one of {processes} processes"
        total = sum(min(size, count - start) for start in mine)
        todo = sum(min(size, count - start) for start in missing)
        stream, position = iter(read()), 0
        write = _shard_writer(self.rag)
        with progress_bar(name, total, "passages", total - todo, first="compiling …") as advance:
            for start in missing:
                passages = list(islice(stream, start - position, start - position + size))
                position = start + len(passages)
                if len(passages) != min(size, count - start):
                    raise InputError("the corpus became shorter while it was read; leave it alone, and start again")
                folder = shard_folder(self.partial, start // size)
                with partial_folder(folder) as unfinished:
                    write(unfinished, passages, advance)
                    write_checksums(unfinished, number=start // size)
                    _remove(folder)
                    unfinished.rename(folder)

    def finish(
        self, corpus: Mapping[str, Any], questions: Mapping[str, list[dict]], existing: ExistingIndex | None
    ) -> None:
        """Adds the questions, the search structure and the manifest to the shards, and moves all into the folder.

        `corpus` is what the manifest says of the corpus. Of an `existing` index only what is damaged is replaced.
        """
        if existing is not None:
            self._repair(corpus, questions, existing)
            return
        if not self.is_complete():
            self._complete(corpus, questions, self.partial)
        self._move()

    def _complete(self, corpus: Mapping[str, Any], questions: Mapping[str, list[dict]], folder: Path) -> None:
        """Adds to the shards in `folder` the questions, the search structure and, last, the manifest."""
        _write_questions(folder, questions)
        about = {
            "corpus": corpus,
            "generator_tokens": PassageStore.open(folder).token_count,
            "fingerprints": self.rag.fingerprints,
        }
        try:
            write_index(folder, structure(self.rag.config.index.kind), self.rag.config.index.dtype, about)
        except DamagedFolder as error:
            _remove(error.folder)  # so that it is made again
            raise

    def _repair(self, corpus: Mapping[str, Any], questions: Mapping[str, list[dict]], existing: ExistingIndex) -> None:
        """Puts new shards into their places; where they are not what they were, structure and manifest follow."""
        new, folder, damage = self.partial, self.folder, existing.damage
        made = sorted(path for path in (new / SHARDS).glob("[0-9]*") if path.name.isdigit())
        for path in made:
            target = folder / path.relative_to(new)
            target.parent.mkdir(exist_ok=True)
            _remove(target)
            os.replace(path, target)
        if damage.keys() & {MANIFEST, MADE_OF}:
            _copy(new / MADE_OF, folder / MADE_OF)
        if MANIFEST not in damage:
            records = read_index_manifest(folder)["files"]
            again = {str((path / CHECKSUMS).relative_to(new)) for path in made} | damage.keys()
            if any(name.startswith("questions/") for name in again):
                _write_questions(folder, questions)
            if not damages(folder, {name: record for name, record in records.items() if name in again}):
                return
        self._complete(corpus, questions, folder)

    def _move(self) -> None:
        """Moves the whole index to its folder, piece by piece, the manifest last; begun before, it does the rest.

        What else is in the folder stays.
        """
        new, folder = self.partial, self.folder
        kind = read_index_manifest(new)["kind"]
        folder.mkdir(parents=True, exist_ok=True)
        for name in (MANIFEST, MADE_OF):  # without them a folder is known to be incomplete
            (folder / name).unlink(missing_ok=True)
        for old in (EMBEDDINGS, *STORE_FILES, *([FAISS_FILE] if kind == "exact" else [])):  # from before shards
            (folder / old).unlink(missing_ok=True)
        questions = (new / "questions").glob("*.jsonl")
        for path in (new / SHARDS, *questions, new / FAISS_FILE, new / MANIFEST):
            if path.exists():
                target = folder / path.relative_to(new)
                target.parent.mkdir(exist_ok=True)
                if path.is_dir() and target.exists():
                    _remove(target)
                if path.name == MANIFEST:  # INDEX.partial keeps its own, by which it is known, until all is moved
                    _copy(new / MADE_OF, folder / MADE_OF)
                os.replace(path, target)


def index_recipe(rag: RagPipeline, content: str) -> dict[str, Any]:
    """Everything that the bytes of the shards depend on; index.kind is not among it."""
    config = rag.config
    return {
        "content": content,
        "fingerprints": {name: value for name, value in rag.fingerprints.items() if name != "kind"},
        "dtype": config.dtype,
        "index": {name: getattr(config.index, name) for name in ("dtype", "batch_size", "shard_size")},
        "jax": jax.__version__,
        "device": f"{jax.default_backend()} {jax.local_devices()[0].device_kind}",
    }


def read_saved_stats(folder: Path, recipe: Mapping[str, Any]) -> CorpusStats | None:
    """The statistics of the corpus in FOLDER/made_of.json; None unless it is there, whole, and of this recipe."""
    try:
        building = read_sealed(folder / MADE_OF)
        stats = CorpusStats(**building["scan"]) if building["made_of"] == recipe else None
    except (InputError, KeyError, TypeError):
        return None
    if stats and type(stats.count) is type(stats.size) is int and min(stats.count, stats.size) > 0:
        return stats if isinstance(stats.fingerprint, str) else None
    return None


def _is_whole(folder: Path, number: int, most: int | None = None) -> bool:
    """Whether a shard has the files that it was written with; those above `most` bytes are not read."""
    shard = shard_folder(folder, number)
    try:
        about = read_checksums(shard)
    except InputError:
        return False
    return about.get("number") == number and not damages(shard, about["files"], most=most)


def _shard_writer(rag: RagPipeline) -> Callable[[Path, Sequence[Passage], Callable[[int], None]], None]:
    """Writes the text, tokens and embeddings of some passages into a folder, with all devices of this process."""
    text_of = partial(passage_text, rag.config.generator.passage_template)
    encoder, mesh = rag.passage_encoder, command_mesh("index")
    params = encoder.load_params(abstract_with_sharding(mesh, encoder.untrained_types(mesh)))

    def write(folder: Path, passages: Sequence[Passage], advance: Callable[[int], None]) -> None:
        write_store(folder, passages, rag.generator_tokenizer.encode, text_of)
        embed_to_file(rag, params, rag.tokenize_passages(passages), folder / EMBEDDINGS, advance)

    return write


def _write_questions(folder: Path, questions: Mapping[str, list[dict]]) -> None:
    for split, records in questions.items():
        (folder / "questions").mkdir(exist_ok=True)
        write_jsonl(folder / "questions" / f"{split}.jsonl", records)


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as (file,):
        file.write(source.read_bytes())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
