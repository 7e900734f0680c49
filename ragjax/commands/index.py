"""`ragjax index`: read the corpus, tokenise it once, embed it, and make it searchable.

A first pass over the corpus checks and counts it; a second one writes the shards that are not there yet, each by
itself: its bytes depend on its own passages only. All this happens in INDEX.partial, beside the index, where a build
that was stopped goes on; when everything is there, it is moved into the folder, which lacks its manifest meanwhile.
Several processes share the shards between them (on a file system that all of them see), and the first does the rest.

Of an index that is there already every file is compared with its checksum, and only what is damaged is made anew: its
shards are written beside it as ever and then take their places, where they have the same bytes as before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ragjax.checkpoints.hub import ResolvedSource, fetch, fingerprint_files, is_local
from ragjax.checksums import damage_text, write_sealed
from ragjax.config import ON_DEVICES, Config, Corpus
from ragjax.data.corpus import FORMATS, CorpusStats, passage_place, read_passages, scan_passages
from ragjax.data.factbook import build as factbook
from ragjax.data.factbook import facts as factbook_facts
from ragjax.data.passage_store import PassageStore
from ragjax.data.prompt import passage_text
from ragjax.errors import InputError
from ragjax.files import cache_folder
from ragjax.parallel.processes import is_process_zero, run_on_process_zero, wait_for_all
from ragjax.rag import RagPipeline, load_pipeline
from ragjax.resources import free_disk, host_memory, size_text
from ragjax.retrieval.faiss_index import check_kind, faiss_bytes, smaller_kinds
from ragjax.retrieval.index import MADE_OF
from ragjax.retrieval.index_builder import (
    ReadPassages,
    agree_on_existing,
    building_folder,
    complete_index,
    embed_shards,
    find_existing_index,
    index_recipe,
    is_complete,
    partial_index_folder,
    read_saved_stats,
    repair_index,
    swap_folders,
)
from ragjax.runs.restore import enable_compilation_cache
from ragjax.runs.run_dir import check_processes_agree
from ragjax.terminal import progress_bar, terminal

SAMPLE = 1000  # passages whose tokens are counted before the index is built
MANY = 2**20  # bytes of an earlier build that are worth telling of


def build_index(config: Config) -> Path:
    """Builds the folder `index.folder`: passages, the generator's tokens, embeddings, search structure, manifest.

    An index of the same contents that is there already is read and compared with its checksums; it stays, and what is
    damaged of it is made anew. Another one is replaced only once the new one is whole. A build that was stopped goes on
    with the shards it has. Raises `InputError` for bad input.
    """
    check_processes_agree(config)
    _check_corpus(config.corpus)
    enable_compilation_cache(cache_folder() / "xla")
    rag = load_pipeline(config)
    check_kind(config.index.kind, rag.passage_encoder.config.embedding_dim)
    corpus = fetch(config.corpus.source)
    content = _content(config, corpus)
    folder = Path(config.index.folder)
    new, made_of = partial_index_folder(folder), index_recipe(rag, content)
    there = agree_on_existing(lambda: find_existing_index(folder, new, rag, content, made_of))
    if there is not None and not there.damage:
        if read_saved_stats(new, made_of):  # by a build that was killed after its last step
            shutil.rmtree(new, ignore_errors=True)
        terminal.print(f"{folder} holds this index already; delete it to build it anew", soft_wrap=True)
        return folder
    if there is not None:
        terminal.print(f"{folder}: is damaged ({damage_text(there.damage)}); only this is built anew", soft_wrap=True)
        index = replace(rag.config.index, shard=there.shard)
        rag = replace(rag, config=replace(rag.config, index=index))
        made_of = index_recipe(rag, content)
    with ExitStack() as stack:
        run_on_process_zero(lambda: stack.enter_context(building_folder(new, made_of)))
        if not new.is_dir():
            raise InputError(f"{new}: process {jax.process_index()} does not see what process 0 has made there")
        read, questions = _read_corpus(config, corpus)
        place = partial(passage_place, corpus.path, config.corpus.format)
        scan, whole = _scan(new, made_of, read, place), there is None and is_complete(new, rag)
        if not whole:
            if there is None:
                run_on_process_zero(lambda: _check_room(rag, read, scan, new))
            embed_shards(rag, read, scan.count, new, there.good if there else [])
        wait_for_all("ragjax index: the shards are written")

        def finish() -> None:
            about = partial(_about, rag, corpus, content, scan)
            if there is not None:
                repair_index(rag, about, questions, there, new, folder)
                return
            if not whole:
                complete_index(rag, about, questions, new)
            swap_folders(new, folder)

        run_on_process_zero(finish)
    return folder


def _check_corpus(corpus: Corpus) -> None:
    """Raises `InputError` for a corpus that should lie on this machine and does not, before any model is fetched."""
    if is_local(corpus.source) and not Path(corpus.source).expanduser().exists():
        raise InputError(f"corpus.source: {corpus.source}: no such file; expected {FORMATS[corpus.format]}")


def _content(config: Config, corpus: ResolvedSource) -> str:
    """What the passages are made from: the files' contents, and the code that turns the Factbook into passages."""
    files = [corpus.path] if corpus.path.is_file() else [p for p in corpus.path.rglob("*") if p.is_file()]
    content = fingerprint_files(files) if corpus.pin == "local" else corpus.pin
    if config.corpus.format != "factbook":
        return content
    return f"{content} {fingerprint_files([Path(str(m.__file__)) for m in (factbook, factbook_facts)])}"


def _read_corpus(config: Config, corpus: ResolvedSource) -> tuple[ReadPassages, dict[str, list[dict]]]:
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


def _scan(new: Path, made_of: dict[str, Any], read: ReadPassages, place: Callable[[int], str]) -> CorpusStats:
    """Checks and counts the corpus, before anything is embedded; once for a build and all that go on with it."""
    scan = read_saved_stats(new, made_of)
    if scan is None:
        with progress_bar("read", None, "passages") as advance:
            scan = scan_passages(read, advance, place=place)
        if is_process_zero():
            write_sealed(new / MADE_OF, {"made_of": made_of, "scan": asdict(scan)})
    return scan


def _check_room(rag: RagPipeline, read: ReadPassages, scan: CorpusStats, new: Path) -> None:
    """Tells what the index will take of disk and memory. Raises `InputError` where this machine cannot build it.

    All but the tokens is known exactly; how many these are, the first passages tell.
    """
    index = rag.config.index
    check_kind(index.kind, rag.passage_encoder.config.embedding_dim, scan.count)
    some = [passage_text(rag.config.generator.passage, passage) for passage in islice(read(), SAMPLE)]
    tokens = sum(map(len, rag.generator_tokenizer.encode(some)))
    width, offsets = rag.passage_encoder.config.embedding_dim, 16 * (scan.count + -(-scan.count // index.shard))
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


def _about(rag: RagPipeline, corpus: ResolvedSource, content: str, scan: CorpusStats, folder: Path) -> dict[str, Any]:
    """What the manifest tells of the shards in `folder`."""
    return {
        "corpus": {"source": corpus.source, "pin": corpus.pin, "content": content, "fingerprint": scan.fingerprint},
        "generator_tokens": PassageStore.open(folder).token_count,
        "fingerprints": rag.fingerprints,
    }
