"""Builds an index shard by shard, so that a build that was stopped goes on after the last whole one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from ragjax.checksums import CHECKSUMS, DamagedFolder, damages, read_checksums, read_sealed, write_checksums
from ragjax.config import structure
from ragjax.data.corpus import CorpusStats, Passage
from ragjax.data.passage_store import SHARDS, STORE_FILES, shard_folder, write_store
from ragjax.data.prompt import passage_text
from ragjax.data.question_batch import tokenize_passages
from ragjax.errors import InputError
from ragjax.files import LOCK, atomic_write, exclusive_lock, partial_folder, write_jsonl
from ragjax.parallel.mesh import local_mesh
from ragjax.parallel.processes import allgather_text, run_on_process_zero
from ragjax.parallel.sharding import put_global, replicated
from ragjax.rag import RagPipeline
from ragjax.retrieval.embeddings import EMBEDDINGS
from ragjax.retrieval.encoder import embed_to_file
from ragjax.retrieval.faiss_index import FAISS_FILE
from ragjax.retrieval.index import MADE_OF, MANIFEST, index_damage, read_manifest, write_index
from ragjax.terminal import progress_bar, terminal

ReadPassages = Callable[[], Iterable[Passage]]  # the corpus from its beginning


@dataclass(frozen=True)
class _ExistingIndex:
    """An index of the same things that is there already."""

    shard: int  # passages in each shard but the last
    good: list[int]  # the shards that are what was written
    damage: dict[str, str]  # what is wrong with each damaged file, by its name


def find_existing_index(
    folder: Path, new: Path, rag: RagPipeline, content: str, made_of: dict[str, Any]
) -> _ExistingIndex | None:
    """What is in the folder, after reading all of it; None where this index is yet to be built, or moved there.

    Where the manifest is damaged, made_of.json tells what it is, and each shard's own checksums that it is whole.
    """
    if not folder.is_dir() or is_complete(new, rag):
        return None
    try:
        manifest = read_manifest(folder)
    except InputError:
        if (scan := read_saved_stats(folder, made_of)) is None:
            return None
        shard = rag.config.index.shard
        good = {number: _is_good(folder, number) for number in range(-(-scan.count // shard))}
        damage = {f"{SHARDS}/{number:05d}": "is not whole" for number in good if not good[number]}
        return _ExistingIndex(shard, [n for n in good if good[n]], {MANIFEST: "is not whole"} | damage)
    if any(manifest["fingerprints"].get(part) != of for part, of in rag.fingerprints.items()):
        return None
    if manifest["corpus"]["content"] != content:
        return None
    damage = index_damage(folder)
    bad = {Path(name).parent.name for name in damage if name.startswith(f"{SHARDS}/")}
    counts = manifest["shards"]
    return _ExistingIndex(counts[0], [n for n in range(len(counts)) if shard_folder(folder, n).name not in bad], damage)


def _is_good(folder: Path, number: int, most: int | None = None) -> bool:
    """Whether a shard has the files that it was written with; those above `most` bytes are not read."""
    shard = shard_folder(folder, number)
    try:
        about = read_checksums(shard)
    except InputError:
        return False
    return about.get("number") == number and not damages(shard, about["files"], most=most)


def agree_on_existing(look: Callable[[], _ExistingIndex | None]) -> _ExistingIndex | None:
    """What process 0 finds, told to all."""
    found = run_on_process_zero(look)
    found = json.loads(allgather_text(json.dumps(found and asdict(found)))[0])
    return None if found is None else _ExistingIndex(**found)


def partial_index_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another index.folder")
    folder = folder.resolve()  # pieces are renamed: both must lie on one disk
    return folder.with_name(folder.name + ".partial")


def index_recipe(rag: RagPipeline, content: str) -> dict[str, Any]:
    """Everything that the bytes of the shards depend on; index.kind is not among it."""
    config = rag.config
    return {
        "content": content,
        "fingerprints": {name: of for name, of in rag.fingerprints.items() if name != "kind"},
        "dtype": config.dtype,
        "index": {name: getattr(config.index, name) for name in ("dtype", "batch_size", "shard")},
        "jax": jax.__version__,
        "device": f"{jax.default_backend()} {jax.local_devices()[0].device_kind}",
    }


def read_saved_stats(new: Path, made_of: dict[str, Any]) -> CorpusStats | None:
    """What the scan of an earlier build of the same things found; None if there was none."""
    try:
        building = read_sealed(new / MADE_OF)
        scan = CorpusStats(**building["scan"]) if building["made_of"] == made_of else None
    except (InputError, KeyError, TypeError):
        return None
    if scan and type(scan.count) is type(scan.size) is int and min(scan.count, scan.size) > 0:
        return scan if isinstance(scan.fingerprint, str) else None
    return None


@contextmanager
def building_folder(new: Path, made_of: dict[str, Any]) -> Iterator[None]:
    """INDEX.partial, held by this process alone, with the shards of an earlier build of the same things.

    It is gone at the end. When anything fails it stays, if there is a shard to go on with.
    """
    with exclusive_lock(new, "builds this index; wait for it, or choose another index.folder"):
        scan = read_saved_stats(new, made_of)
        if scan is None and (made := len(list((new / SHARDS).glob("[0-9]*")))):
            terminal.print(f"{new}: its {made} shards are of another corpus, model, setting, JAX or device; begun anew")
        for path in new.iterdir() if scan is None else (new / SHARDS).glob("*.partial"):
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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_complete(new: Path, rag: RagPipeline) -> bool:
    """Whether only the swap is left to do, or the rest of it."""
    try:
        return read_sealed(new / MANIFEST)["fingerprints"] == rag.fingerprints
    except (InputError, KeyError):
        return False


def embed_shards(rag: RagPipeline, read: ReadPassages, count: int, new: Path, elsewhere: Sequence[int]) -> None:
    """Writes this process's part of the shards that are missing here and `elsewhere`, in one pass over the corpus.

    Those of an earlier build are not read again: their sizes are compared.
    """
    size = rag.config.index.shard
    starts = range(0, count, size)
    there = [start for start in starts if start // size in elsewhere or _is_good(new, start // size, most=0)]
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
    write = _shard_writer(rag)
    with progress_bar(name, total, "passages", total - todo) as advance:
        for start in missing:
            passages = list(islice(stream, start - position, start - position + size))
            position = start + len(passages)
            if len(passages) != min(size, count - start):
                raise InputError("the corpus became shorter while it was read; leave it alone, and start again")
            folder = shard_folder(new, start // size)
            with partial_folder(folder) as unfinished:
                write(unfinished, passages, advance)
                write_checksums(unfinished, number=start // size)
                _remove(folder)
                unfinished.rename(folder)


def _shard_writer(rag: RagPipeline) -> Callable[[Path, Sequence[Passage], Callable[[int], None]], None]:
    """Writes the text, tokens and embeddings of some passages into a folder, with all devices of this process."""
    settings = rag.config.retriever
    told = partial(passage_text, rag.config.generator.passage)
    params = put_global(rag.passage_encoder.load_params(), replicated(local_mesh()))

    def write(folder: Path, passages: Sequence[Passage], advance: Callable[[int], None]) -> None:
        write_store(folder, passages, rag.generator_tokenizer.encode, told)
        rows = tokenize_passages(rag.passage_tokenizer, settings.passage, passages, settings.passage_tokens)
        embed_to_file(rag, params, rows, folder / EMBEDDINGS, advance)

    return write


def _write_questions(folder: Path, questions: dict[str, list[dict]]) -> None:
    for split, records in questions.items():
        (folder / "questions").mkdir(exist_ok=True)
        write_jsonl(folder / "questions" / f"{split}.jsonl", records)


def complete_index(
    rag: RagPipeline, about: Callable[[Path], dict[str, Any]], questions: dict[str, list[dict]], folder: Path
) -> None:
    """Adds the questions, the search structure and, last, the manifest to the shards."""
    _write_questions(folder, questions)
    try:
        write_index(folder, structure(rag.config.index.kind), rag.config.index.dtype, about(folder))
    except DamagedFolder as error:
        _remove(error.folder)  # so that it is made again
        raise


def repair_index(
    rag: RagPipeline,
    about: Callable[[Path], dict[str, Any]],
    questions: dict[str, list[dict]],
    there: _ExistingIndex,
    new: Path,
    folder: Path,
) -> None:
    """Puts what was made anew into its place; where it is not what it was, the structure and the manifest follow."""
    made = sorted(path for path in (new / SHARDS).glob("[0-9]*") if path.name.isdigit())
    for path in made:
        target = folder / path.relative_to(new)
        target.parent.mkdir(exist_ok=True)
        _remove(target)
        os.replace(path, target)
    if there.damage.keys() & {MANIFEST, MADE_OF}:
        _copy(new / MADE_OF, folder / MADE_OF)
    if MANIFEST not in there.damage:
        records = read_manifest(folder)["files"]
        again = {str((path / CHECKSUMS).relative_to(new)) for path in made} | there.damage.keys()
        if any(name.startswith("questions/") for name in again):
            _write_questions(folder, questions)
        if not damages(folder, {name: record for name, record in records.items() if name in again}):
            return
    complete_index(rag, about, questions, folder)


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as (file,):
        file.write(source.read_bytes())


def swap_folders(new: Path, folder: Path) -> None:
    """Moves a whole index to its place, piece by piece, the manifest last; begun before, it does the rest.

    What else is in the folder stays.
    """
    kind = read_manifest(new)["kind"]
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, MADE_OF):  # without them a folder is known to be incomplete
        (folder / name).unlink(missing_ok=True)
    for old in (EMBEDDINGS, *STORE_FILES, *([FAISS_FILE] if kind == "exact" else [])):  # of before there were shards
        (folder / old).unlink(missing_ok=True)
    questions = (new / "questions").glob("*.jsonl")
    for path in (new / SHARDS, *questions, new / FAISS_FILE, new / MANIFEST):
        if path.exists():
            target = folder / path.relative_to(new)
            target.parent.mkdir(exist_ok=True)
            if path.is_dir() and target.exists():
                _remove(target)
            if path.name == MANIFEST:  # what was made of what stays here until all is there
                _copy(new / MADE_OF, folder / MADE_OF)
            os.replace(path, target)
