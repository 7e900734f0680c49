"""Search over a million vectors, side by side: on the device, exact and approximate, and FAISS's kinds.

    python -m benchmarks.index --plot index.png

Vectors lie around some thousand centres, as embeddings do, and have length 1; queries are noisy copies of some of
them. Each FAISS kind is built as `ragjax index` builds it, and searched by FAISS's own call, with a thread for each
core. Below FAISS's Flat index as it comes stands the same tuned: its OpenBLAS told which CPU this is, and at each batch
size BLAS or not, in blocks of the size that was the fastest. In each repetition every contestant has its turn: the
machine's moods strike all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.report import or_input_error
from ragjax.config import ON_DEVICES
from ragjax.parallel.mesh import local_mesh
from ragjax.parallel.sharding import put_global, replicated
from ragjax.resources import size_text
from ragjax.retrieval.device_index import sharded_top_k
from ragjax.retrieval.embeddings import Embeddings
from ragjax.retrieval.faiss_index import build_faiss, faiss_bytes
from ragjax.retrieval.index import Index

BATCHES = (1, 8, 64)
KINDS = ["Flat", "HNSW32", "IVF1024,PQ48"]
CENTRES = 4000
MOST = 200 * 2**20  # bytes that the search may take beside the embeddings
Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def make_vectors(count: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, width), dtype=np.float32)
    vectors = np.empty((count, width), np.float32)
    for start in range(0, count, 65_536):  # a million at once would need thrice the room
        some = vectors[start : start + 65_536]
        some[:] = centres[rng.integers(CENTRES, size=len(some))] + 0.7 * rng.standard_normal(some.shape, np.float32)
        some /= np.linalg.norm(some, axis=1, keepdims=True)
    return vectors


def make_queries(vectors: np.ndarray, count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((count, vectors.shape[1]), dtype=np.float32) / np.sqrt(vectors.shape[1])
    queries = vectors[rng.integers(len(vectors), size=count)] + 0.7 * noise
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


def on_device(vectors: np.ndarray, k: int, recall: float | None) -> Search:
    corpus = Index(Embeddings([vectors]), "exact", {}).corpus(local_mesh(data=1))

    def search(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores, ids = sharded_top_k(corpus, put_global(queries, replicated(corpus.mesh)), k, recall)
        return np.asarray(scores), np.asarray(ids)

    return search


def faiss_at_its_best() -> None:
    """What must be said before FAISS is loaded.

    The OpenBLAS in its wheels is of 2021: it takes newer CPUs for an old one, and does not use their AVX-512. Threads
    that wait shall sleep, and leave the core to what is measured next.
    """
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file() and " avx512f " in cpu.read_text():
        os.environ["OPENBLAS_CORETYPE"] = "SKYLAKEX"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def by_faiss(index: Any, k: int, blas_block: int | None = None) -> Search:
    """`blas_block`: a Flat index always uses BLAS, on so many vectors at a time."""
    import faiss

    def search(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        settings = faiss.cvar.distance_compute_blas_threshold, faiss.cvar.distance_compute_blas_database_bs
        if blas_block is not None:
            faiss.cvar.distance_compute_blas_threshold, faiss.cvar.distance_compute_blas_database_bs = 1, blas_block
        found = index.search(queries, k)
        faiss.cvar.distance_compute_blas_threshold, faiss.cvar.distance_compute_blas_database_bs = settings
        return found

    return search


def tuned(index: Any, k: int, queries: np.ndarray) -> Search:
    """At each batch size the fastest of the settings."""
    best = {}
    for size in BATCHES:
        searches = [by_faiss(index, k, block) for block in (None, 4096, 16_384, 65_536)]
        best[size] = min(searches, key=lambda search: min(timed(search, queries[:size]) for _ in range(3)))
    return lambda asked: best[len(asked)](asked)


def peak_beyond_the_embeddings(count: int, width: int, k: int) -> int:
    """Bytes by which the exact search alone lets a process of its own grow, at every batch size."""
    command = [sys.executable, "-m", "benchmarks.index", "--growth", "--count", str(count), "--width", str(width)]
    done = subprocess.run([*command, "--k", str(k)], stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout)


def growth(count: int, width: int, k: int) -> int:
    search = on_device(make_vectors(count, width), k, None)
    queries = make_queries(np.eye(width, dtype=np.float32), max(BATCHES))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _status("VmRSS")
    for size in BATCHES:
        search(queries[:size])
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--kinds", nargs="*", default=["Flat", "HNSW32", "IVF1024,PQ48"], help="FAISS kinds; Flat first"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--growth", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    faiss_at_its_best()
    if options.growth:
        print(growth(options.count, options.width, options.k))
        return
    report = measure(options)
    if options.json:
        print(json.dumps(report))
    else:
        show(report, Console(highlight=False, width=None if sys.stdout.isatty() else 132))
    if options.plot is not None:
        draw(report, options.plot)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    count, width, k = options.count, options.width, options.k
    growth = peak_beyond_the_embeddings(count, width, k)
    vectors = make_vectors(count, width)
    queries = make_queries(vectors, max(BATCHES))
    import faiss

    faiss.omp_set_num_threads(os.cpu_count() or 1)
    contestants: dict[str, tuple[Search, float, int]] = {}  # the search, seconds to build it, bytes
    for kind, recall in zip(ON_DEVICES, (None, 0.95), strict=True):
        started = time.perf_counter()
        contestants[f"{kind}, on the device"] = (
            on_device(vectors, k, recall),
            time.perf_counter() - started,
            vectors.nbytes,
        )
    for kind in options.kinds:
        started = time.perf_counter()
        index = build_faiss(Embeddings([vectors]), kind)
        seconds, size = time.perf_counter() - started, faiss_bytes(kind, width, count) or 0
        contestants[f"FAISS {kind}"] = by_faiss(index, k), seconds, size
        if kind == "Flat":
            contestants["FAISS Flat, tuned"] = tuned(index, k, queries), seconds, size
    times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in BATCHES} for name in contestants}
    for search, _, _ in contestants.values():
        for size in BATCHES:
            search(queries[:size])  # compiles
    for _ in range(options.repeats):
        for size in BATCHES:
            for name, (search, _, _) in contestants.items():
                times[name][size].append(timed(search, queries[:size]))
    exact = contestants["exact, on the device"][0](queries)
    rows = []
    for name, (search, seconds, size) in contestants.items():
        ids = search(queries)[1]
        recall_at_k = float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(ids, exact[1], strict=True)]))
        of_batches = {str(b): [float(s) for s in np.quantile(times[name][b], (0.5, 0, 1))] for b in BATCHES}
        rows.append({"name": name, "build_s": seconds, "bytes": size, "recall": recall_at_k, "seconds": of_batches})
    report: dict[str, Any] = {"count": count, "width": width, "k": k, "rows": rows, "growth": growth}
    if "FAISS Flat" in contestants:
        scores, ids = contestants["FAISS Flat"][0](queries)
        differ = (ids != exact[1]) & (np.abs(scores - exact[0]) >= 1e-6)
        report["ids"] = {"differ": int((ids != exact[1]).sum()), "beyond rounding": int(differ.sum()), "of": ids.size}
    return report


def timed(search: Search, queries: np.ndarray) -> float:
    started = time.perf_counter()
    search(queries)
    return time.perf_counter() - started


def show(report: dict[str, Any], console: Console) -> None:
    console.print(
        f"{report['count']:,} vectors × {report['width']}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}"
    )
    heads = [f"queries/s, {size} at once\n(min … max)" for size in BATCHES]
    table = Table("search", "build", "memory", f"recall@{report['k']}", *heads, box=box.SIMPLE_HEAD)
    for row in report["rows"]:
        speeds = []
        for size, (median, least, most) in row["seconds"].items():
            speed, slow, fast = (int(size) / seconds for seconds in (median, most, least))
            speeds.append(f"{speed:,.0f} ({slow:,.0f} … {fast:,.0f})")
        table.add_row(row["name"], f"{row['build_s']:.1f} s", size_text(row["bytes"]), f"{row['recall']:.3f}", *speeds)
    console.print(table)
    named = {row["name"]: {int(size): of[0] for size, of in row["seconds"].items()} for row in report["rows"]}
    ours = named["exact, on the device"]
    for other in [name for name in named if name.startswith("FAISS Flat")]:
        for size, least in ((64, 4.0), (1, 1.0)):
            ratio = named[other][size] / ours[size]
            verdict = "" if other != "FAISS Flat" else f": {'at least' if ratio >= least else 'NOT'} {least:g}"
            console.print(f"exact on the device against {other}, {size} at once: {ratio:.2f} times as fast{verdict}")
    if "ids" in report:
        ids = report["ids"]
        console.print(
            f"ids that differ from FAISS Flat's: {ids['differ']} of {ids['of']}, "
            f"of which the scores differ by 1e-6 or more: {ids['beyond rounding']}"
        )
    verdict = "under" if report["growth"] < MOST else "NOT under"
    console.print(f"memory of the exact search beside the embeddings: {size_text(report['growth'])}, {verdict} 200 MiB")


def draw(report: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for at, size in zip(axes, (1, 64), strict=True):
        for number, row in enumerate(report["rows"]):
            at.scatter(
                row["recall"],
                size / row["seconds"][str(size)][0],
                s=60,
                marker="osD^vP*X"[number % 8],
                label=row["name"],
            )
        at.set(yscale="log", xlabel=f"recall@{report['k']}", title=f"{size} at once")
        at.grid(alpha=0.3)
    axes[0].set_ylabel("queries a second")
    axes[1].legend(fontsize="x-small")
    figure.suptitle(f"{report['count']:,} vectors × {report['width']}")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    or_input_error(main)
