"""Builds an index shard by shard, so that a build that was stopped goes on after the last whole shard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from ragjax.checksums import CHECKSUMS, DamagedFolder, damages, read_checksums, read_sealed
from ragjax.config import structure
from ragjax.data.corpus import Passage
from ragjax.data.passage_store import SHARDS, STORE_FILES, PassageStore, shard_folder
from ragjax.errors import InputError
from ragjax.files import LOCK, atomic_write, exclusive_lock, write_jsonl
from ragjax.parallel.processes import allgather_text, run_on_process_zero
from ragjax.rag import RagPipeline
from ragjax.retrieval.building.earlier_index import EarlierIndex
from ragjax.retrieval.building.made_of import MadeOf, index_recipe, read_made_of, write_made_of
from ragjax.retrieval.building.shard_plan import ShardPlan
from ragjax.retrieval.building.shard_writer import ReadyVectors, ShardWriter
from ragjax.retrieval.building.takeover import same_source
from ragjax.retrieval.embeddings import EMBEDDINGS
from ragjax.retrieval.faiss_index import FAISS_FILE, EarlierStructure
from ragjax.retrieval.index import MADE_OF, MANIFEST, index_damage, read_index_manifest, write_index
from ragjax.retrieval.vector_files.source import VectorSource
from ragjax.terminal import progress_bar, terminal

ReadPassages = Callable[[], Iterable[Passage]]  # the corpus from its beginning


@dataclass(frozen=True)
class ExistingIndex:
    """An index of the same things that is in the folder already."""

    counts: list[int]  # passages in each shard
    good: list[int]  # the shards that are what was written
    damage: dict[str, str]  # what is wrong with each damaged file, by its name
    vectors: dict[str, Any] | None = None  # where its embeddings come from, if not from the encoder


class IndexBuilder:
    """Builds the index in INDEX.partial, beside its folder, and moves it into the folder once it is whole.

    The steps, in this order: `find_existing`, or else `find_earlier`, then within `working_folder` what the corpus
    tells (`save`), `embed_missing` and `finish`. `content` names what the passages are made from; `rebuild` asks for a
    FAISS structure that is trained anew, `source` has embeddings to take over.
    """

    def __init__(
        self,
        rag: RagPipeline,
        folder: Path,
        content: str,
        rebuild: bool = False,
        source: VectorSource | None = None,
    ) -> None:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; choose another index.path")
        self.rag, self.folder, self.content = rag, folder, content
        self.rebuild, self.source = rebuild, source
        resolved = folder.resolve()  # pieces are renamed: both must lie on one disk
        self.partial = resolved.with_name(resolved.name + ".partial")
        self.recipe = index_recipe(rag, content)
        self.existing: ExistingIndex | None = None
        self.earlier: EarlierIndex | None = None

    def find_existing(self) -> ExistingIndex | None:
        """What process 0 finds in the folder, after reading all of it; None where this index is yet to be built.

        None, too, where it is built, but not moved to the folder.
        """
        existing = run_on_process_zero(self._find_existing)
        existing = json.loads(allgather_text(json.dumps(existing and asdict(existing)))[0])
        self.existing = None if existing is None else ExistingIndex(**existing)
        return self.existing

    def _find_existing(self) -> ExistingIndex | None:
        """Where the manifest is damaged, made_of.json says what it is, and each shard's checksums that it is whole."""
        folder = self.folder
        if not folder.is_dir() or self.is_complete():
            return None
        try:
            manifest = read_index_manifest(folder)
        except InputError:
            if (made_of := read_made_of(folder, self.recipe)) is None:
                return None
            counts = list(made_of.plan.counts)
            whole = {number: _is_whole(folder, number) for number in range(len(counts))}
            damage = {f"{SHARDS}/{number:05d}": "is not whole" for number in whole if not whole[number]}
            good = [number for number in whole if whole[number]]
            return ExistingIndex(counts, good, {MANIFEST: "is not whole"} | damage, made_of.vectors)
        if any(manifest["fingerprints"].get(part) != value for part, value in self.rag.fingerprints.items()):
            return None
        if manifest["corpus"]["content"] != self.content:
            return None
        damage, counts = index_damage(folder), manifest["shards"]
        if self.rebuild and not damage:
            return None
        bad = {Path(name).parent.name for name in damage if name.startswith(f"{SHARDS}/")}
        good = [number for number in range(len(counts)) if shard_folder(folder, number).name not in bad]
        return ExistingIndex(counts, good, damage, manifest.get("vectors"))

    def find_earlier(self) -> EarlierIndex | None:
        """The index in the folder, where it is of another corpus or kind and its embeddings can serve; in each process.

        An index that was built and not wholly moved is moved first.
        """
        if not self.is_complete():
            run_on_process_zero(self._finish_move)
            self.earlier = EarlierIndex.find(self.rag, self.folder)
        return self.earlier

    def _finish_move(self) -> None:
        if (self.partial / MANIFEST).is_file() and not (self.folder / MANIFEST).is_file():
            with suppress(InputError), exclusive_lock(self.partial, "builds this index"):
                self._move()

    def remove_leftovers(self) -> None:
        """Removes INDEX.partial where a build of this index was killed after its last step."""
        if self.saved():
            shutil.rmtree(self.partial, ignore_errors=True)

    @contextmanager
    def working_folder(self) -> Iterator[None]:
        """INDEX.partial, held by this process alone, with the shards of an earlier build of the same things.

        It is gone at the end. When anything fails it stays, if there is a shard to go on with.
        """
        new = self.partial
        with exclusive_lock(new, "builds this index; wait for it, or choose another index.path"):
            saved = self.saved()
            if saved is None and (made := len(list((new / SHARDS).glob("[0-9]*")))):
                terminal.print(
                    f"{new}: its {made} shards are of another corpus, model, setting, JAX or device; begun anew"
                )
            for path in new.iterdir() if saved is None else (new / SHARDS).glob("*.partial"):
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

    def saved(self) -> MadeOf | None:
        """What an earlier build of the same things saved of them; None if there was none."""
        saved = read_made_of(self.partial, self.recipe)
        if saved is None or self.is_complete():
            return saved
        same_vectors = same_source(saved.vectors, self.source)
        if self.existing is not None:
            goes_on = list(saved.plan.counts) == self.existing.counts and (self.source is None or same_vectors)
        else:
            goes_on = saved.plan.earlier == (self.earlier.identity if self.earlier else None)
            goes_on &= same_vectors or self.earlier is not None
        return saved if goes_on else None

    def save(self, made_of: MadeOf) -> None:
        """Keeps what is known of a build, for one that goes on with it."""
        write_made_of(self.partial, self.recipe, made_of)

    def is_complete(self) -> bool:
        """Whether only the move to the folder is left to do, or the rest of it."""
        try:
            fingerprints = read_sealed(self.partial / MANIFEST)["fingerprints"]
        except (InputError, KeyError):
            return False
        return fingerprints == self.rag.fingerprints and read_made_of(self.partial, self.recipe) is not None

    def embed_missing(self, read: ReadPassages, plan: ShardPlan, ready: ReadyVectors | None = None) -> None:
        """Writes this process's part of the missing shards in one pass over the corpus.

        Not missing are those in INDEX.partial, whose sizes alone are compared, and good ones of an existing index.
        `ready` gives the embeddings, if it is not the encoder that does.
        """
        counts, starts, good = plan.counts, plan.starts, self.existing.good if self.existing else []
        there = {number for number in range(len(counts)) if number in good or _is_whole(self.partial, number, most=0)}
        if there:
            done = sum(counts[number] for number in there)
            terminal.print(f"going on with the index: {done} of {sum(counts)} passages are there", soft_wrap=True)
        process, processes = jax.process_index(), jax.process_count()
        mine = range(process, len(counts), processes)
        missing = [number for number in mine if number not in there]
        if not missing:
            return
        work = "take over" if ready else "embed"
        name = work if processes == 1 else f"{work}, the part of one of {processes} processes"
        total, todo = (sum(counts[number] for number in of) for of in (mine, missing))
        stream, position, writer = iter(read()), 0, ShardWriter(self.rag, ready, self.earlier)
        first = "" if ready else "compiling …"
        with progress_bar(name, total, "passages", total - todo, first=first) as advance:
            for number in missing:
                start = starts[number]
                passages = list(islice(stream, start - position, start - position + counts[number]))
                position = start + len(passages)
                if len(passages) != counts[number]:
                    raise InputError("the corpus became shorter while it was read; leave it alone, and start again")
                writer.write(
                    shard_folder(self.partial, number), number, plan.kept.get(number), passages, start, advance
                )

    def finish(self, corpus: Mapping[str, Any], questions: Mapping[str, list[dict]], made_of: MadeOf) -> None:
        """Adds the questions, the search structure and the manifest to the shards, and moves all into the folder.

        `corpus` is what the manifest says of the corpus. Of an existing index only what is damaged is replaced.
        """
        if self.existing is not None:
            self._repair(corpus, questions, self.existing)
            return
        if not self.is_complete():
            earlier = None
            if self.earlier is not None and not self.rebuild:
                earlier = self.earlier.faiss_structure(made_of.plan.appended)
            self._complete(corpus, questions, self.partial, made_of.vectors, earlier)
        self._move()

    def _complete(
        self,
        corpus: Mapping[str, Any],
        questions: Mapping[str, list[dict]],
        folder: Path,
        vectors: dict[str, Any] | None,
        earlier: EarlierStructure | None = None,
    ) -> None:
        """Adds to the shards in `folder` the questions, the search structure and, last, the manifest."""
        _write_questions(folder, questions)
        about = {
            "corpus": corpus,
            "generator_tokens": PassageStore.open(folder).token_count,
            "fingerprints": self.rag.fingerprints,
        } | ({"vectors": vectors} if vectors else {})
        index = self.rag.config.index
        try:
            write_index(folder, structure(index.kind), index.dtype, about, earlier)
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
        self._complete(corpus, questions, folder, existing.vectors)

    def _move(self) -> None:
        """Moves the whole index to its folder, piece by piece, the manifest last; begun before, it does the rest.

        What else is in the folder stays.
        """
        new, folder = self.partial, self.folder
        kind = read_index_manifest(new)["kind"]
        folder.resolve().mkdir(parents=True, exist_ok=True)  # it may be a link to what is not there yet
        for name in (MANIFEST, MADE_OF):  # without them a folder is known to be incomplete
            _remove(folder / name)
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


def _is_whole(folder: Path, number: int, most: int | None = None) -> bool:
    """Whether a shard has the files that it was written with; those above `most` bytes are not read."""
    shard = shard_folder(folder, number)
    try:
        about = read_checksums(shard)
    except InputError:
        return False
    return about.get("number") == number and not damages(shard, about["files"], most=most)


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
