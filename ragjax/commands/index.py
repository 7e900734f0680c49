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
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import jax
import numpy as np

from ragjax.checkpoints.hub import fetch, fingerprint_files
from ragjax.checksums import damage_text
from ragjax.config import ON_DEVICES, Config, factbook_seed
from ragjax.data.corpus import FACTBOOK, PASSAGES, CorpusReader, Passage, scan_passages
from ragjax.data.factbook import build as factbook
from ragjax.data.factbook import facts as factbook_facts
from ragjax.data.prompt import passage_text
from ragjax.data.reading.sources import DataFiles, find_files, is_missing
from ragjax.errors import InputError
from ragjax.files import cache_folder
from ragjax.parallel.processes import run_on_process_zero, wait_for_all
from ragjax.rag import RagPipeline, load_pipeline
from ragjax.resources import free_disk, host_memory, size_text
from ragjax.retrieval.bm25 import build_bm25, check_bm25
from ragjax.retrieval.building.earlier_index import EarlierIndex
from ragjax.retrieval.building.index_builder import IndexBuilder, ReadPassages
from ragjax.retrieval.building.made_of import MadeOf
from ragjax.retrieval.building.shard_plan import PassageKeys, ShardPlan, equal_shards, plan_growth
from ragjax.retrieval.building.takeover import Takeover, has_vectors
from ragjax.retrieval.faiss_index import check_kind, faiss_bytes, smaller_kinds
from ragjax.retrieval.index import MADE_OF, open_index, read_index_manifest
from ragjax.retrieval.vector_files.source import open_vectors
from ragjax.runs.restore import enable_compilation_cache
from ragjax.runs.run_dir import check_processes_agree
from ragjax.terminal import progress_bar, terminal

SAMPLE = 1000  # passages whose tokens are counted before the index is built
MANY = 2**20  # bytes of an earlier build that are worth telling of
QUERIES, RECALL_AT = 128, 10  # passages that are sought, and how deep


def build_index(config: Config, source: str | None = None, rebuild: bool = False) -> Path:
    """Builds the folder `index.path`: passages, the generator's tokens, embeddings, search structure, manifest.

    An index of the same contents that is there already is read and compared with its checksums; it stays, and what is
    damaged of it is made anew. Of one of other contents, or of another kind, the embeddings serve as far as they can;
    it is replaced only once the new one is whole. A build that was stopped goes on with the shards it has. With
    `retriever.bm25_docs` the words of the passages are added.

    Args:
        config: The configuration.
        source: Takes the embeddings from there instead of embedding passages; see `open_vectors`.
        rebuild: Trains a FAISS kind anew, where otherwise what it has learnt from an earlier corpus stays.

    Raises `InputError` for bad input.
    """
    check_processes_agree(config)
    check_bm25(config.retriever.bm25_docs)
    folder = _build_embeddings(config, source, rebuild)
    if config.retriever.bm25_docs:
        passages = read_index_manifest(folder)["corpus"]["fingerprint"]
        run_on_process_zero(lambda: build_bm25(folder, passages))
    return folder


def _build_embeddings(config: Config, source: str | None, rebuild: bool) -> Path:
    """All but BM25."""
    if rebuild and config.index.kind in ON_DEVICES:
        raise InputError(
            f"--rebuild trains a FAISS kind anew, and index.kind={config.index.kind} has nothing to train; to embed "
            f"all passages anew, delete {config.index.path}"
        )
    _check_corpus(config.corpus.source, FACTBOOK if config.corpus.format == "factbook" else PASSAGES)
    vectors = None if source is None else open_vectors(source)
    enable_compilation_cache(cache_folder() / "xla")
    rag = load_pipeline(config)
    check_kind(config.index.kind, rag.passage_encoder.config.embedding_dim)
    takeover = None if vectors is None else Takeover(rag, vectors)
    files = _corpus_files(config)
    builder = IndexBuilder(rag, Path(config.index.path), _content(config, files), rebuild, vectors)
    folder = builder.folder
    if _is_there(builder):
        return folder
    with ExitStack() as stack:
        run_on_process_zero(lambda: stack.enter_context(builder.working_folder()))
        if not builder.partial.is_dir():
            raise InputError(
                f"{builder.partial}: process {jax.process_index()} does not see what process 0 has made there"
            )
        corpus, questions = _open_corpus(config, files)
        run_on_process_zero(lambda: _prepare(builder, corpus, takeover))
        if (made_of := builder.saved()) is None:
            raise InputError(f"{builder.partial}: {MADE_OF} is gone; leave the folder alone, and start again")
        if not builder.is_complete():
            if builder.existing is None:
                run_on_process_zero(lambda: _check_room(builder.rag, corpus.read, made_of, builder.partial))
            ready = takeover.embeddings(bool((made_of.vectors or {})["by_id"])) if takeover else None
            builder.embed_missing(corpus.read, made_of.plan, ready)
        wait_for_all("ragjax index: the shards are written")
        about = {
            "source": files.source,
            "pin": files.revision,
            "content": builder.content,
            "fingerprint": made_of.stats.fingerprint,
        }
        run_on_process_zero(lambda: builder.finish(about, questions, made_of))
    run_on_process_zero(lambda: _tell_recall(rag, folder, made_of.plan))
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
        path, c.factbook.max_passage_words, factbook_seed(config), c.factbook.categories
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


def _is_there(builder: IndexBuilder) -> bool:
    """Whether the folder holds this index, whole; what of it can serve else is told, or found."""
    existing, folder = builder.find_existing(), builder.folder
    if existing is None:
        if builder.source is None:
            builder.find_earlier()
        return False
    if not existing.damage:
        builder.remove_leftovers()
        if builder.source is not None and not has_vectors(existing.vectors, builder.source):
            raise InputError(
                f"{folder}: holds this index already, with other embeddings than {builder.source.source} has now; "
                "delete it to take these over, or choose another index.path"
            )
        terminal.print(f"{folder} holds this index already; delete it to build it anew", soft_wrap=True)
        return True
    damage = damage_text(existing.damage)
    terminal.print(f"{folder}: is damaged ({damage}); only this is built anew", soft_wrap=True)
    if existing.vectors and builder.source is None:
        source = existing.vectors.get("source")
        terminal.print(f"its vectors were taken from {source}; the damaged ones are embedded", soft_wrap=True)
    return False


def _prepare(builder: IndexBuilder, corpus: CorpusReader | FactbookReader, takeover: Takeover | None) -> None:
    """Checks and counts the corpus, before anything is embedded, and plans the shards; once for a build and all that go
    on with it.
    """
    if builder.saved() is not None:
        return
    earlier, keys = builder.earlier, PassageKeys()

    def visit(passage: Passage, record: bytes) -> None:
        if takeover is not None:
            takeover.visit(passage, record)
        if earlier is not None:
            keys.add(record)

    with progress_bar("read", None, "passages") as advance:
        stats = scan_passages(corpus.read, advance, place=corpus.place, visit=visit)
    for line in corpus.notices():
        terminal.print(line, soft_wrap=True)
    size, vectors = builder.rag.config.index.shard_size, None
    if builder.existing is not None:
        plan, vectors = ShardPlan(tuple(builder.existing.counts)), builder.existing.vectors
    elif earlier is not None:
        plan = _plan_growth(earlier, keys, size)
        vectors = earlier.manifest.get("vectors")
    else:
        plan = equal_shards(stats.count, size)
    if takeover is not None:
        takeover.check_count(stats.count)
        vectors = takeover.match(corpus.read)
    builder.save(MadeOf(stats, plan, vectors))


def _plan_growth(earlier: EarlierIndex, keys: PassageKeys, size: int) -> ShardPlan:
    """Tells how the corpus differs from that of the index in the folder, and what of it stays."""
    plan, changes = plan_growth(earlier.identity, earlier.passages, earlier.shards, keys, size)
    if not earlier.stays:
        plan = replace(equal_shards(len(keys), size), earlier=plan.earlier, appended=plan.appended)
    counts = ", ".join(f"{count:,} {name}" for name, count in asdict(changes).items())
    terminal.print(
        f"{earlier.folder}: {counts} since it was built; {len(plan.kept)} of its {len(earlier.shards)} shards stay",
        soft_wrap=True,
    )
    return plan


def _tell_recall(rag: RagPipeline, folder: Path, plan: ShardPlan) -> None:
    """How much a structure finds that was trained on an earlier corpus, with some passages as questions."""
    if plan.earlier is None or (trained_on := read_index_manifest(folder).get("trained_on")) is None:
        return
    index = open_index(folder, rag.fingerprints)
    new = np.repeat([number not in plan.kept for number in range(len(plan.counts))], plan.counts)
    rng, shares = np.random.default_rng(rag.config.seed), list[str]()
    for name, places in {"passages in shards that stay": ~new, "those in new ones": new}.items():
        if places.any():
            drawn = rng.permutation(np.flatnonzero(places))[:QUERIES]
            share = index.measured_recall(np.asarray(index.embeddings[drawn], np.float32), min(RECALL_AT, len(index)))
            shares.append(f"{share:.3f} for {name}")
    terminal.print(
        f"{index.kind} was trained when there were {trained_on:,} passages; recall@{RECALL_AT}, passages as questions: "
        f"{', '.join(shares)}; --rebuild trains it anew",
        soft_wrap=True,
    )


def _check_room(rag: RagPipeline, read: ReadPassages, made_of: MadeOf, new: Path) -> None:
    """Tells what the index will take of disk and memory. Raises `InputError` where this machine cannot build it.

    All but the tokens is known exactly; how many these are, the first passages tell. Shards that stay take no room.
    """
    index, stats = rag.config.index, made_of.stats
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
    there = sum(path.stat().st_size for path in new.rglob("*") if path.is_file() and path.stat().st_nlink == 1)
    stay = round((1 - made_of.plan.new_passages / stats.count) * (sum(disk.values()) - (faiss or 0)))
    need, free, memory = sum(disk.values()) - stay, free_disk(new), host_memory()
    parts = ", ".join(f"{'about ' if part == 'tokens' else ''}{size_text(size)} {part}" for part, size in disk.items())
    whole = size_text(sum(disk.values()))
    goes_on = f", of which {size_text(there)} are there" if there > MANY else ""
    goes_on += f", of which {size_text(stay)} stay as they are" if stay else ""
    terminal.print(f"{stats.count} passages will take {whole} of disk ({parts}){goes_on}", soft_wrap=True)
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
