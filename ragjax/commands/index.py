"""`ragjax index`: read the corpus, tokenise it once, embed it, and make it searchable.

A first pass over the corpus checks and counts it; a second one writes the shards that are not there yet, each by
itself: its bytes depend on its own passages only. All this happens in INDEX.partial, beside the index, where a build
that was stopped goes on; when everything is there, it is moved into the folder, which lacks its manifest meanwhile.
Several processes share the shards between them (on a file system that all of them see), and the first does the rest.

Of an index that is there already every file is compared with its checksum, and only what is damaged is made anew: its
shards are written beside it as ever and then take their places, where they have the same bytes as before.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import jax
import numpy as np

from ragjax.checkpoints.hub import fetch, fingerprint_files
from ragjax.checksums import damage_text
from ragjax.config import ON_DEVICES, Config
from ragjax.data.corpus import FACTBOOK, PASSAGES, CorpusReader, CorpusStats, Passage, scan_passages
from ragjax.data.factbook import build as factbook
from ragjax.data.factbook import facts as factbook_facts
from ragjax.data.prompt import passage_text
from ragjax.data.reading.sources import DataFiles, find_files, is_missing
from ragjax.errors import InputError
from ragjax.files import cache_folder
from ragjax.parallel.processes import is_process_zero, run_on_process_zero, wait_for_all
from ragjax.rag import RagPipeline, load_pipeline
from ragjax.resources import free_disk, host_memory, size_text
from ragjax.retrieval.bm25 import build_bm25, check_bm25
from ragjax.retrieval.faiss_index import check_kind, faiss_bytes, smaller_kinds
from ragjax.retrieval.index import read_index_manifest
from ragjax.retrieval.index_builder import IndexBuilder, ReadPassages
from ragjax.runs.restore import enable_compilation_cache
from ragjax.runs.run_dir import check_processes_agree
from ragjax.terminal import progress_bar, terminal

SAMPLE = 1000  # passages whose tokens are counted before the index is built
MANY = 2**20  # bytes of an earlier build that are worth telling of


def build_index(config: Config) -> Path:
    """Builds the folder `index.path`: passages, the generator's tokens, embeddings, search structure, manifest.

    An index of the same contents that is there already is read and compared with its checksums; it stays, and what is
    damaged of it is made anew. Another one is replaced only once the new one is whole. A build that was stopped goes on
    with the shards it has. With `retriever.bm25_docs` the words of the passages are added. Raises `InputError` for bad
    input.
    """
    check_processes_agree(config)
    check_bm25(config.retriever.bm25_docs)
    folder = _build_embeddings(config)
    if config.retriever.bm25_docs:
        passages = read_index_manifest(folder)["corpus"]["fingerprint"]
        run_on_process_zero(lambda: build_bm25(folder, passages))
    return folder


def _build_embeddings(config: Config) -> Path:
    """All but BM25."""
    _check_corpus(config.corpus.source, FACTBOOK if config.corpus.format == "factbook" else PASSAGES)
    enable_compilation_cache(cache_folder() / "xla")
    rag = load_pipeline(config)
    check_kind(config.index.kind, rag.passage_encoder.config.embedding_dim)
    source = _corpus_files(config)
    builder = IndexBuilder(rag, Path(config.index.path), _content(config, source))
    existing, folder = builder.find_existing(), builder.folder
    if existing is not None and not existing.damage:
        builder.remove_leftovers()
        terminal.print(f"{folder} holds this index already; delete it to build it anew", soft_wrap=True)
        return folder
    if existing is not None:
        damage = damage_text(existing.damage)
        terminal.print(f"{folder}: is damaged ({damage}); only this is built anew", soft_wrap=True)
        builder = builder.with_shard_size(existing.shard)
    with ExitStack() as stack:
        run_on_process_zero(lambda: stack.enter_context(builder.working_folder()))
        if not builder.partial.is_dir():
            raise InputError(
                f"{builder.partial}: process {jax.process_index()} does not see what process 0 has made there"
            )
        corpus, questions = _open_corpus(config, source)
        read, stats = corpus.read, _corpus_stats(builder, corpus)
        if not builder.is_complete():
            if existing is None:
                run_on_process_zero(lambda: _check_room(builder.rag, read, stats, builder.partial))
            builder.embed_missing(read, stats.count, existing.good if existing else [])
        wait_for_all("ragjax index: the shards are written")
        about = {
            "source": source.source,
            "pin": source.revision,
            "content": builder.content,
            "fingerprint": stats.fingerprint,
        }
        run_on_process_zero(lambda: builder.finish(about, questions, existing))
    return folder


class FactbookReader:
    """The passages of the Factbook, with what `CorpusReader` says of files."""

    def __init__(self, passages: list[Passage]) -> None:
        self.passages = passages

    def read(self) -> list[Passage]:
        """The passages, in their order."""
        return self.passages

    def place(self, position: int) -> str:
        """Where a passage is, from 1."""
        return f"passage {position}"

    def notices(self) -> list[str]:
        """Nothing is left out or mapped."""
        return []


def _check_corpus(source: str, expected: str) -> None:
    """Raises `InputError` for a corpus that should lie on this machine and does not, before any model is fetched."""
    if is_missing(source):
        raise InputError(f"corpus.source: {source}: no such file; expected {expected}")


def _corpus_files(config: Config) -> DataFiles:
    """The files of the corpus; of the Factbook its folder."""
    source = config.corpus.source
    if config.corpus.format != "factbook":
        found = find_files(source)
        for path in found.left_out[:12]:
            terminal.print(f"{path}: lies beside BEIR's corpus.jsonl and is left out: no passages", soft_wrap=True)
        return found
    fetched = fetch(source)
    return DataFiles(source, fetched.revision, (fetched.path,))


def _content(config: Config, source: DataFiles) -> str:
    """What the passages are made from: the files' contents, and the code that turns the Factbook into passages."""
    if config.corpus.format != "factbook":
        return source.fingerprint
    [path] = source.files
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    content = fingerprint_files(files) if source.revision == "local" else source.revision
    return f"{content} {fingerprint_files([Path(str(m.__file__)) for m in (factbook, factbook_facts)])}"


def _open_corpus(config: Config, source: DataFiles) -> tuple[CorpusReader | FactbookReader, dict[str, list[dict]]]:
    """What streams the corpus, and the questions that the Factbook brings, by split."""
    c = config.corpus
    if c.format != "factbook":
        return CorpusReader(source.files, c), {}
    [path] = source.files
    passages, questions = factbook.build_factbook(
        path, c.factbook.max_passage_words, config.seed, c.factbook.categories
    )
    if c.max_passages is not None:
        passages = passages[: c.max_passages]
        kept = {passage.id for passage in passages}
        questions = {
            split: [q for q in records if kept.intersection(q["passages"])] for split, records in questions.items()
        }
    if not passages:
        raise InputError(f"{path}: no passages were found in this Factbook")
    return FactbookReader(passages), questions


def _corpus_stats(builder: IndexBuilder, corpus: CorpusReader | FactbookReader) -> CorpusStats:
    """Checks and counts the corpus, before anything is embedded; once for a build and all that go on with it."""
    stats = builder.saved_stats()
    if stats is None:
        with progress_bar("read", None, "passages") as advance:
            stats = scan_passages(corpus.read, advance, place=corpus.place)
        for line in corpus.notices():
            terminal.print(line, soft_wrap=True)
        if is_process_zero():
            builder.save_stats(stats)
    return stats


def _check_room(rag: RagPipeline, read: ReadPassages, stats: CorpusStats, new: Path) -> None:
    """Tells what the index will take of disk and memory. Raises `InputError` where this machine cannot build it.

    All but the tokens is known exactly; how many these are, the first passages tell.
    """
    index = rag.config.index
    check_kind(index.kind, rag.passage_encoder.config.embedding_dim, stats.count)
    some = [passage_text(rag.config.generator.passage_template, passage) for passage in islice(read(), SAMPLE)]
    tokens = sum(map(len, rag.generator_tokenizer.encode(some)))
    width, offsets = rag.passage_encoder.config.embedding_dim, 16 * (stats.count + -(-stats.count // index.shard_size))
    disk = {
        "text": stats.size + offsets,
        "tokens": round(4 * tokens * stats.count / len(some)),
        "embeddings": stats.count * width * np.dtype(index.dtype).itemsize,
    }
    faiss = None
    if index.kind not in ON_DEVICES and (faiss := faiss_bytes(index.kind, width, stats.count)) is not None:
        disk[index.kind] = faiss
    there = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
    need, free, memory = sum(disk.values()), free_disk(new), host_memory()
    parts = ", ".join(f"{'about ' if part == 'tokens' else ''}{size_text(size)} {part}" for part, size in disk.items())
    goes_on = f", of which {size_text(there)} are there" if there > MANY else ""
    terminal.print(f"{stats.count} passages will take {size_text(need)} of disk ({parts}){goes_on}", soft_wrap=True)
    if need - there > free:
        half = size_text(disk["embeddings"] // 2)
        halves = [f"index.dtype=bfloat16 ({half} less)"] if index.dtype == "float32" else []
        leaner = smaller_kinds(width, stats.count, (faiss or 0) - (need - there - free)) if faiss else []
        raise InputError(
            f"{new.parent}: has {size_text(free)} free, and the index needs {size_text(need - there)} more; "
            f"what would help: {'; '.join([*halves, *leaner, 'corpus.max_passages', 'another index.path'])}"
        )
    searched = disk["embeddings"] if index.kind in ON_DEVICES else faiss
    if searched is None or memory is None:
        return
    where = "all devices together, or the host's where these are CPUs" if index.kind in ON_DEVICES else "each host's"
    terminal.print(f"to search it takes {size_text(searched)} of memory: {where}", soft_wrap=True)
    if searched > memory:
        fit = "; ".join(smaller_kinds(width, stats.count, memory)) or "none that is common"
        has = f"{size_text(searched)} of memory, and this machine has {size_text(memory)}; kinds that would fit: {fit}"
        if index.kind not in ON_DEVICES:
            raise InputError(f"index.kind={index.kind}: building it takes {has}")
        if jax.default_backend() == "cpu":
            terminal.print(f"it can be built here, but not searched: that takes {has}", soft_wrap=True)
