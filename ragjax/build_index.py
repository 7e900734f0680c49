"""`ragjax index`: read the corpus, tokenise it once, embed it, and make it searchable.

A first pass over the corpus checks and counts it; a second one writes the shards that are not there yet, each by
itself: its bytes depend on its own passages only. All this happens in INDEX.partial, beside the index, where a build
that was stopped goes on; when everything is there, it is moved into the folder, which lacks its manifest meanwhile.
Several processes share the shards between them (on a file system that all of them see), and the first does the rest.

Of an index that is there already every file is compared with its checksum, and only what is damaged is made anew: its
shards are written beside it as ever and then take their places, where they have the same bytes as before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ragjax import factbook, factbook_facts
from ragjax.checksums import (
    CHECKSUMS,
    DamagedFolder,
    damages,
    read_checksums,
    read_sealed,
    told,
    write_checksums,
    write_sealed,
)
from ragjax.config import ON_DEVICES, Config, Corpus, replace, structure
from ragjax.cost import free_disk, host_memory, size_text
from ragjax.embeddings import EMBEDDINGS
from ragjax.errors import InputError
from ragjax.experiment import check_processes_agree
from ragjax.faiss_index import FAISS_FILE, check_kind, faiss_bytes, smaller_kinds
from ragjax.files import LOCK, alone, atomic_write, partial_folder, write_jsonl
from ragjax.hub import Fetched, cache_folder, fetch, fingerprint_files, is_local
from ragjax.index import MADE_OF, MANIFEST, index_damage, read_manifest, write_index
from ragjax.mesh import (
    enable_compilation_cache,
    from_all,
    is_first,
    local_mesh,
    on_first,
    place,
    replicated,
    wait_for_all,
)
from ragjax.passages import (
    FORMATS,
    SHARDS,
    STORE_FILES,
    Passage,
    PassageStore,
    Scan,
    passage_place,
    read_passages,
    scan_passages,
    shard_folder,
    write_store,
)
from ragjax.progress import progress_bar, terminal
from ragjax.rag import Rag, embed_with, open_rag, passage_rows, passage_text

SAMPLE = 1000  # passages whose tokens are counted before the index is built
MANY = 2**20  # bytes of an earlier build that are worth telling of

Read = Callable[[], Iterable[Passage]]  # the corpus from its beginning


def build_index(config: Config) -> Path:
    """Builds the folder `index.folder`: passages, the generator's tokens, embeddings, search structure, manifest.

    An index of the same contents that is there already is read and compared with its checksums; it stays, and what is
    damaged of it is made anew. Another one is replaced only once the new one is whole. A build that was stopped goes on
    with the shards it has. Raises `InputError` for bad input.
    """
    check_processes_agree(config)
    _check_corpus(config.corpus)
    enable_compilation_cache(cache_folder() / "xla")
    rag = open_rag(config)
    check_kind(config.index.kind, rag.passage_encoder.config.embedding_width)
    corpus = fetch(config.corpus.source)
    content = _content(config, corpus)
    folder = Path(config.index.folder)
    new, made_of = _partial(folder), _made_of(rag, content)
    there = _agreed(lambda: _there(folder, new, rag, content, made_of))
    if there is not None and not there.damage:
        if _found(new, made_of):  # by a build that was killed after its last step
            shutil.rmtree(new, ignore_errors=True)
        terminal.print(f"{folder} holds this index already; delete it to build it anew", soft_wrap=True)
        return folder
    if there is not None:
        terminal.print(f"{folder}: is damaged ({told(there.damage)}); only this is built anew", soft_wrap=True)
        index = replace(rag.config.index, shard=there.shard)
        rag = dataclasses.replace(rag, config=replace(rag.config, index=index))
        made_of = _made_of(rag, content)
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(_building(new, made_of)))
        if not new.is_dir():
            raise InputError(f"{new}: process {jax.process_index()} does not see what process 0 has made there")
        read, questions = _read_corpus(config, corpus)
        place = partial(passage_place, corpus.path, config.corpus.format)
        scan, whole = _scan(new, made_of, read, place), there is None and _is_whole(new, rag)
        if not whole:
            if there is None:
                on_first(lambda: _check_room(rag, read, scan, new))
            _write_shards(rag, read, scan.count, new, there.good if there else [])
        wait_for_all("ragjax index: the shards are written")

        def finish() -> None:
            about = partial(_about, rag, corpus, content, scan)
            if there is not None:
                _mend(rag, about, questions, there, new, folder)
                return
            if not whole:
                _complete(rag, about, questions, new)
            _swap(new, folder)

        on_first(finish)
    return folder


def _check_corpus(corpus: Corpus) -> None:
    """Raises `InputError` for a corpus that should lie on this machine and does not, before any model is fetched."""
    if is_local(corpus.source) and not Path(corpus.source).expanduser().exists():
        raise InputError(f"corpus.source: {corpus.source}: no such file; expected {FORMATS[corpus.format]}")


def _content(config: Config, corpus: Fetched) -> str:
    """What the passages are made from: the files' contents, and the code that turns the Factbook into passages."""
    files = [corpus.path] if corpus.path.is_file() else [p for p in corpus.path.rglob("*") if p.is_file()]
    content = fingerprint_files(files) if corpus.pin == "local" else corpus.pin
    if config.corpus.format != "factbook":
        return content
    return f"{content} {fingerprint_files([Path(str(m.__file__)) for m in (factbook, factbook_facts)])}"


@dataclass(frozen=True)
class _There:
    """An index of the same things that is there already."""

    shard: int  # passages in each shard but the last
    good: list[int]  # the shards that are what was written
    damage: dict[str, str]  # what is wrong with each damaged file, by its name


def _there(folder: Path, new: Path, rag: Rag, content: str, made_of: dict[str, Any]) -> _There | None:
    """What is in the folder, after reading all of it; None where this index is yet to be built, or moved there.

    Where the manifest is damaged, made_of.json tells what it is, and each shard's own checksums that it is whole.
    """
    if not folder.is_dir() or _is_whole(new, rag):
        return None
    try:
        manifest = read_manifest(folder)
    except InputError:
        if (scan := _found(folder, made_of)) is None:
            return None
        shard = rag.config.index.shard
        good = {number: _is_good(folder, number) for number in range(-(-scan.count // shard))}
        damage = {f"{SHARDS}/{number:05d}": "is not whole" for number in good if not good[number]}
        return _There(shard, [n for n in good if good[n]], {MANIFEST: "is not whole"} | damage)
    if any(manifest["fingerprints"].get(part) != of for part, of in rag.fingerprints.items()):
        return None
    if manifest["corpus"]["content"] != content:
        return None
    damage = index_damage(folder)
    bad = {Path(name).parent.name for name in damage if name.startswith(f"{SHARDS}/")}
    counts = manifest["shards"]
    return _There(counts[0], [n for n in range(len(counts)) if shard_folder(folder, n).name not in bad], damage)


def _is_good(folder: Path, number: int, most: int | None = None) -> bool:
    """Whether a shard has the files that it was written with; those above `most` bytes are not read."""
    shard = shard_folder(folder, number)
    try:
        about = read_checksums(shard)
    except InputError:
        return False
    return about.get("number") == number and not damages(shard, about["files"], most=most)


def _agreed(look: Callable[[], _There | None]) -> _There | None:
    """What process 0 finds, told to all."""
    found = on_first(look)
    found = json.loads(from_all(json.dumps(found and asdict(found)))[0])
    return None if found is None else _There(**found)


def _partial(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another index.folder")
    folder = folder.resolve()  # pieces are renamed: both must lie on one disk
    return folder.with_name(folder.name + ".partial")


def _made_of(rag: Rag, content: str) -> dict[str, Any]:
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


def _found(new: Path, made_of: dict[str, Any]) -> Scan | None:
    """What the scan of an earlier build of the same things found; None if there was none."""
    try:
        building = read_sealed(new / MADE_OF)
        scan = Scan(**building["scan"]) if building["made_of"] == made_of else None
    except (InputError, KeyError, TypeError):
        return None
    if scan and type(scan.count) is type(scan.size) is int and min(scan.count, scan.size) > 0:
        return scan if isinstance(scan.fingerprint, str) else None
    return None


@contextmanager
def _building(new: Path, made_of: dict[str, Any]) -> Iterator[None]:
    """INDEX.partial, held by this process alone, with the shards of an earlier build of the same things.

    It is gone at the end. When anything fails it stays, if there is a shard to go on with.
    """
    with alone(new, "builds this index; wait for it, or choose another index.folder"):
        scan = _found(new, made_of)
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


def _read_corpus(config: Config, corpus: Fetched) -> tuple[Read, dict[str, list[dict]]]:
    """How to stream the corpus, and the questions that the Factbook brings, by split."""
    c = config.corpus
    if c.format != "factbook":
        return lambda: read_passages(corpus.path, c.format, c.limit), {}
    passages, questions = factbook.build_factbook(corpus.path, c.passage_words, config.seed, c.categories)
    if c.limit is not None:
        passages = passages[: c.limit]
        kept = {passage.id for passage in passages}
        questions = {
            split: [q for q in records if kept.intersection(q["passages"])] for split, records in questions.items()
        }
    if not passages:
        raise InputError(f"{corpus.path}: no passages were found in this Factbook")
    return lambda: passages, questions


def _scan(new: Path, made_of: dict[str, Any], read: Read, place: Callable[[int], str]) -> Scan:
    """Checks and counts the corpus, before anything is embedded; once for a build and all that go on with it."""
    scan = _found(new, made_of)
    if scan is None:
        with progress_bar("read", None, "passages") as advance:
            scan = scan_passages(read, advance, place=place)
        if is_first():
            write_sealed(new / MADE_OF, {"made_of": made_of, "scan": asdict(scan)})
    return scan


def _is_whole(new: Path, rag: Rag) -> bool:
    """Whether only the swap is left to do, or the rest of it."""
    try:
        return read_sealed(new / MANIFEST)["fingerprints"] == rag.fingerprints
    except (InputError, KeyError):
        return False


def _check_room(rag: Rag, read: Read, scan: Scan, new: Path) -> None:
    """Tells what the index will take of disk and memory. Raises `InputError` where this machine cannot build it.

    All but the tokens is known exactly; how many these are, the first passages tell.
    """
    index = rag.config.index
    check_kind(index.kind, rag.passage_encoder.config.embedding_width, scan.count)
    some = [passage_text(rag.config.generator.passage, passage) for passage in islice(read(), SAMPLE)]
    tokens = sum(map(len, rag.generator_tokenizer.encode(some)))
    width, offsets = rag.passage_encoder.config.embedding_width, 16 * (scan.count + -(-scan.count // index.shard))
    disk = {
        "text": scan.size + offsets,
        "tokens": round(4 * tokens * scan.count / len(some)),
        "embeddings": scan.count * width * np.dtype(index.dtype).itemsize,
    }
    of_faiss = None
    if index.kind not in ON_DEVICES and (of_faiss := faiss_bytes(index.kind, width, scan.count)) is not None:
        disk[index.kind] = of_faiss
    there = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
    need, free, memory = sum(disk.values()), free_disk(new), host_memory()
    parts = ", ".join(f"{'about ' if part == 'tokens' else ''}{size_text(size)} {part}" for part, size in disk.items())
    goes_on = f", of which {size_text(there)} are there" if there > MANY else ""
    terminal.print(f"{scan.count} passages will take {size_text(need)} of disk ({parts}){goes_on}", soft_wrap=True)
    if need - there > free:
        half = size_text(disk["embeddings"] // 2)
        halves = [f"index.dtype=bfloat16 ({half} less)"] if index.dtype == "float32" else []
        leaner = smaller_kinds(width, scan.count, (of_faiss or 0) - (need - there - free)) if of_faiss else []
        raise InputError(
            f"{new.parent}: has {size_text(free)} free, and the index needs {size_text(need - there)} more; "
            f"what would help: {'; '.join([*halves, *leaner, 'corpus.limit', 'another index.folder'])}"
        )
    searched = disk["embeddings"] if index.kind in ON_DEVICES else of_faiss
    if searched is None or memory is None:
        return
    where = "all devices together, or the host's where these are CPUs" if index.kind in ON_DEVICES else "each host's"
    terminal.print(f"to search it takes {size_text(searched)} of memory: {where}", soft_wrap=True)
    if searched > memory:
        fit = "; ".join(smaller_kinds(width, scan.count, memory)) or "none that is common"
        has = f"{size_text(searched)} of memory, and this machine has {size_text(memory)}; kinds that would fit: {fit}"
        if index.kind not in ON_DEVICES:
            raise InputError(f"index.kind={index.kind}: building it takes {has}")
        if jax.default_backend() == "cpu":
            terminal.print(f"it can be built here, but not searched: that takes {has}", soft_wrap=True)


def _write_shards(rag: Rag, read: Read, count: int, new: Path, elsewhere: Sequence[int]) -> None:
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


def _shard_writer(rag: Rag) -> Callable[[Path, Sequence[Passage], Callable[[int], None]], None]:
    """Writes the text, tokens and embeddings of some passages into a folder, with all devices of this process."""
    settings = rag.config.retriever
    told = partial(passage_text, rag.config.generator.passage)
    params = place(rag.passage_encoder.read(), replicated(local_mesh()))

    def write(folder: Path, passages: Sequence[Passage], advance: Callable[[int], None]) -> None:
        write_store(folder, passages, rag.generator_tokenizer.encode, told)
        rows = passage_rows(rag.passage_tokenizer, settings.passage, passages, settings.passage_tokens)
        embed_with(rag, params, rows, folder / EMBEDDINGS, advance)

    return write


def _about(rag: Rag, corpus: Fetched, content: str, scan: Scan, folder: Path) -> dict[str, Any]:
    """What the manifest tells of the shards in `folder`."""
    return {
        "corpus": {"source": corpus.source, "pin": corpus.pin, "content": content, "fingerprint": scan.fingerprint},
        "generator_tokens": PassageStore.open(folder).token_count,
        "fingerprints": rag.fingerprints,
    }


def _write_questions(folder: Path, questions: dict[str, list[dict]]) -> None:
    for split, records in questions.items():
        (folder / "questions").mkdir(exist_ok=True)
        write_jsonl(folder / "questions" / f"{split}.jsonl", records)


def _complete(
    rag: Rag, about: Callable[[Path], dict[str, Any]], questions: dict[str, list[dict]], folder: Path
) -> None:
    """Adds the questions, the search structure and, last, the manifest to the shards."""
    _write_questions(folder, questions)
    try:
        write_index(folder, structure(rag.config.index.kind), rag.config.index.dtype, about(folder))
    except DamagedFolder as error:
        _remove(error.folder)  # so that it is made again
        raise


def _mend(
    rag: Rag,
    about: Callable[[Path], dict[str, Any]],
    questions: dict[str, list[dict]],
    there: _There,
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
    _complete(rag, about, questions, folder)


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as (file,):
        file.write(source.read_bytes())


def _swap(new: Path, folder: Path) -> None:
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
