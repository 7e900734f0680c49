"""`ragjax index-report`: what an index costs, what its approximation misses, and what the top k leave out."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32
from rich import box
from rich.table import Table

from ragjax.config import Config
from ragjax.data.answer_matching import has_answer
from ragjax.data.passage_store import SHARDS, STORE_FILES, PassageStore
from ragjax.data.question_batch import drop_unfit_questions, tokenize_questions
from ragjax.data.questions import Question, as_json
from ragjax.errors import InputError
from ragjax.files import atomic_write, check_writable
from ragjax.parallel.mesh import local_mesh
from ragjax.resources import size_text
from ragjax.retrieval.device_index import block_log_normalizer, blockwise_top_k
from ragjax.retrieval.embeddings import EMBEDDINGS, Embeddings
from ragjax.retrieval.faiss_index import FAISS_FILE
from ragjax.retrieval.index import Index
from ragjax.retrieval.retrieve import encode_questions
from ragjax.runs.restore import load_artifacts, open_split, pretrained_params, restore_params, trained_index
from ragjax.runs.run_dir import make_folder
from ragjax.terminal import Screen, progress_bar, terminal

KS = (1, 2, 5, 10, 20, 50, 100)
BATCHES = (1, 8, 64)
SHARES = (0.5, 0.9, 0.99)  # of the prior, for which the smallest k is named
TOGETHER = 64  # questions searched together, except where latency is measured
REPEATS, LONGEST = 100, 10.0  # searches timed at each batch size, and seconds after which no other is begun
PLOTS = (".png", ".svg")


Encode = Callable[[Sequence[Question]], Float[np.ndarray, "B D"]]


@dataclass(frozen=True)
class Measured:
    """Of each question, for each k: shares of the prior's mass and of the exact top k, and whether it is answered."""

    mass: Float[np.ndarray, "Q k"]
    recall: Float[np.ndarray, "Q k"]
    answered: Float[np.ndarray, "Q k"]


def index_report(config: Config, count: int, plot: Path | None = None) -> dict[str, Any]:
    """Measures the index on `count` questions of `evaluate.split`, drawn by the seed, with the newest checkpoint's
    question encoder, or the pretrained one.

    Writes RUN/index_report.json and the plot, and returns the report. Raises `InputError` for bad input.
    """
    if plot is not None:
        _check_plot(plot)
    split, folder = open_split(config, config.evaluate.split), Path(config.output)
    check_writable(folder)
    rag, index, store = load_artifacts(config)
    split = drop_unfit_questions(rag.tokenizers, split, documents=False, closed_book=False)
    mesh, step = local_mesh(data=1), None
    if (restored := restore_params(rag, mesh)) is None:
        params = pretrained_params(rag, mesh)
    else:
        params, step = restored
        index = trained_index(rag, index, step)
    make_folder(folder)
    for line in split.notice_lines(folder / "index_report.json"):
        terminal.print(line, soft_wrap=True)

    def encode(questions: Sequence[Question]) -> Float[np.ndarray, "B D"]:
        batch = tokenize_questions(rag.tokenizers, [question.question for question in questions])
        return encode_questions(rag, params, batch, mesh)

    drawn = np.sort(np.random.default_rng(config.seed).permutation(len(split.questions))[:count])
    sample = [split.questions[i] for i in drawn]
    ks = [k for k in KS if k <= len(index)]
    measured = measure(index, store, encode, sample, ks, config.retriever.logit_scale)
    queries = encode(sample[:TOGETHER])
    report = {
        "index": {"kind": config.index.kind, "dtype": index.manifest["dtype"], "N": len(index)},
        "step": step,
        "split": config.evaluate.split,
        "questions": len(sample),
        "left_out": as_json(split.left_out),
        "scale": config.retriever.logit_scale,
        "bytes_per_passage": _bytes(Path(config.index.path), index),
        "k": [_at(k, measured, i) for i, k in enumerate(ks)],
        "smallest_k": {str(share): _smallest(ks, np.median(measured.mass, axis=0), share) for share in SHARES},
        "latency": [_latency(index, queries, size, config.decode.num_docs) for size in BATCHES],
        "fingerprints": rag.fingerprints | {"questions": split.fingerprint},
    }
    with atomic_write(folder / "index_report.json") as (file,):
        file.write(json.dumps(report, indent=1).encode() + b"\n")
    if plot is not None:
        _draw(report, plot)
    return report


def measure(
    index: Index, store: PassageStore, encode: Encode, questions: Sequence[Question], ks: Sequence[int], scale: float
) -> Measured:
    """Searches the index for each question, and compares what it finds with the exact search, for each k of `ks`."""
    mass, recall, answered = list[np.ndarray](), list[list[float]](), list[list[bool]]()
    with progress_bar("measure", len(questions), "questions", first="compiling …") as advance:
        for start in range(0, len(questions), TOGETHER):
            batch = questions[start : start + TOGETHER]
            queries = encode(batch)
            scores, exact, normalizer = exact_by_shards(index.embeddings, queries, ks[-1], scale)
            _, ids = index.search(queries, ks[-1])
            log_mass = np.logaddexp.accumulate(scale * scores.astype(np.float64), axis=1) - normalizer[:, None]
            mass.append(np.minimum(1.0, np.exp(log_mass)[:, np.array(ks) - 1]))
            for b, question in enumerate(batch):
                hits = has_answer(store, question, ids[b])
                recall.append([len(np.intersect1d(ids[b, :k], exact[b, :k])) / k for k in ks])
                answered.append([bool(hits[:k].any()) for k in ks])
            advance(len(batch))
    return Measured(np.concatenate(mass), np.array(recall, float), np.array(answered, float))


def exact_by_shards(
    embeddings: Embeddings, queries: Float[np.ndarray, "B D"], k: int, scale: float
) -> tuple[Float32[np.ndarray, "B K"], Int32[np.ndarray, "B K"], Float[np.ndarray, " B"]]:
    """Scores and ids of the true top k, and log Σ exp(scale · q·d) over all passages.

    One shard after the other is on the device: an index that only the host can hold is measured as well.
    """
    on_device = jnp.asarray(queries)
    scores = np.full((len(queries), 0), -np.inf, np.float32)
    ids, normalizer, first = np.zeros((len(queries), 0), np.int32), np.full(len(queries), -np.inf), 0
    for shard in embeddings.checked_shards():
        rows = jnp.asarray(shard)
        shard_scores, places = map(np.asarray, blockwise_top_k(rows, on_device, k))
        shard_normalizer = np.asarray(block_log_normalizer(rows, on_device, scale), np.float64)
        normalizer = np.logaddexp(normalizer, shard_normalizer)
        scores = np.concatenate([scores, shard_scores], 1)
        ids = np.concatenate([ids, np.where(places < 0, -1, first + places)], 1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # equal ones by id, as shards are in order
        scores, ids = np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)
        first += len(shard)
    return scores, ids, normalizer


def _at(k: int, measured: Measured, i: int) -> dict[str, Any]:
    """The summary for k, which is column i of what was measured."""
    mass = measured.mass[:, i]
    low, middle, high = (float(q) for q in np.quantile(mass, (0.1, 0.5, 0.9)))
    return {
        "k": k,
        "recall": float(measured.recall[:, i].mean()),  # of the exact top k
        "answered": float(measured.answered[:, i].mean()),  # questions with a passage that answers among them
        "mass": {"mean": float(mass.mean()), "10 %": low, "median": middle, "90 %": high},
        "unknown": {"median": 1 - middle, "worst": 1 - float(mass.min())},  # how much p(y|x) may be above p_topk(y|x)
    }


def _smallest(ks: Sequence[int], mass: Float[np.ndarray, " k"], share: float) -> int | None:
    """The smallest k whose mass is at least this share; None where no k has so much."""
    return next((k for k, at_k in zip(ks, mass.tolist(), strict=True) if at_k >= share), None)


def _bytes(folder: Path, index: Index) -> dict[str, float]:
    """Of each passage, on disk; a FAISS structure takes as much memory. Embeddings are those before any refresh."""

    def total(*names: str) -> float:
        files = [file for name in names for file in (folder / SHARDS).glob(f"*/{name}")]
        return sum(file.stat().st_size for file in files) / len(index)

    structure = folder / FAISS_FILE
    return {
        "embeddings": total(EMBEDDINGS),
        "structure": structure.stat().st_size / len(index) if structure.exists() else 0.0,
        "text and tokens": total(*STORE_FILES),
    }


def _latency(index: Index, queries: Float[np.ndarray, "B D"], size: int, k: int) -> dict[str, Any]:
    """Milliseconds of a search for so many questions at once, already encoded."""
    rows, times = np.resize(queries, (size, queries.shape[1])), list[float]()
    index.search(rows, k)  # compiles
    began = time.perf_counter()
    while len(times) < REPEATS and (time.perf_counter() - began < LONGEST or not times):
        started = time.perf_counter()
        index.search(rows, k)
        times.append(time.perf_counter() - started)
    median, slow = (1000 * float(q) for q in np.quantile(times, (0.5, 0.99)))
    return {"batch": size, "median_ms": median, "p99_ms": slow, "questions_per_second": 1000 * size / median}


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """The report as tables, or as one JSON object."""
    if as_json:
        print(json.dumps(report))
        return
    console = Screen(highlight=False, markup=False)
    about, each = report["index"], report["bytes_per_passage"]
    encoder = "the pretrained encoder" if report["step"] is None else f"the encoder of step {report['step']}"
    questions = f"{report['questions']} {report['split']} questions"
    console.print(f"{about['kind']}, {about['N']:,} passages, {about['dtype']}; {questions}, {encoder}", soft_wrap=True)
    sizes = ", ".join(f"{name} {size:,.0f}" for name, size in each.items() if size)
    whole = size_text(round(sum(each.values()) * about["N"]))
    console.print(f"bytes a passage: {sizes}; {whole} in all", soft_wrap=True)
    heads = (
        "of the exact\ntop k",
        "questions\nanswered",
        "prior mass\nmedian",
        "10 % … 90 %",
        "p(y|x) known\nto within",
    )
    table = Table("k", *heads, box=box.SIMPLE_HEAD)
    for at in report["k"]:
        mass, unknown = at["mass"], at["unknown"]
        spread = f"{mass['10 %']:.3f} … {mass['90 %']:.3f}"
        bound = f"{unknown['median']:.3f} (worst {unknown['worst']:.3f})"
        row = (str(at["k"]), f"{at['recall']:.3f}", f"{at['answered']:.3f}", f"{mass['median']:.3f}", spread, bound)
        table.add_row(*row)
    console.print(table)
    for share, k in report["smallest_k"].items():
        needed = f"k = {k}" if k else f"more than k = {report['k'][-1]['k']}"
        console.print(f"{100 * float(share):.0f} % of the prior, for the median question: {needed}")
    speed = Table("questions at once", "median ms", "99 % ms", "questions/s", box=box.SIMPLE_HEAD)
    for at in report["latency"]:
        values = f"{at['median_ms']:.2f}", f"{at['p99_ms']:.2f}", f"{at['questions_per_second']:,.0f}"
        speed.add_row(str(at["batch"]), *values)
    console.print(speed)


def _check_plot(path: Path) -> None:
    if path.suffix.lower() not in PLOTS:
        raise InputError(f"--plot {path}: expected a name that ends in {' or '.join(PLOTS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs an extra: pip install 'ragjax[plot]'")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path}: there is no folder {path.absolute().parent}")


def _draw(report: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    about, at = report["index"], report["k"]
    ks, masses = [row["k"] for row in at], [row["mass"] for row in at]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    low, high = ([mass[name] for mass in masses] for name in ("10 %", "90 %"))
    axes.fill_between(ks, low, high, alpha=0.2, label="prior mass, 10 % to 90 % of the questions")
    axes.plot(ks, [mass["median"] for mass in masses], marker="o", label="prior mass, median question")
    axes.plot(ks, [row["answered"] for row in at], marker="s", label="questions with a passage that answers")
    axes.plot(ks, [row["recall"] for row in at], marker="^", label="share of the exact top k found")
    axes.set(xscale="log", xlabel="k, documents a question", ylabel="share", ylim=(0, 1.02))
    axes.set_xticks(ks, [str(k) for k in ks], minor=False)
    axes.minorticks_off()
    axes.set_title(f"{about['kind']}, {about['N']:,} passages, {report['questions']} {report['split']} questions")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    with atomic_write(path) as (file,):
        figure.savefig(file, format=path.suffix.lower()[1:], dpi=150)
