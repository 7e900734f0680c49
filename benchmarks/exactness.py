"""Time against exactness: fast, thorough, certified and exact decoding with few and with many documents.

    python -m benchmarks.exactness configs/factbook.yaml --documents 10 --record exactness.json
    python -m benchmarks.exactness --draw exactness.svg --record exactness.json

Questions of the test split, spread over it, are answered one by one by every mode in turn, with the configuration's
newest checkpoint, or else the pretrained models. An answer is exact if it is the likeliest of all answers under the
documents: if exact decoding proves its best answer, and this one is no less likely by more than `TIE`. Where nothing is
proved, an answer counts as not exact. The probability that a mode gives away is told, too: that of the best answer any
mode found, and that of its own. `--record` keeps the numbers, those of other documents and models, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.progress import track
from rich.table import Table

from benchmarks.answering import MODES, score_whole, spread, warm
from benchmarks.report import make_console, or_input_error, timed
from ragjax.answerer import Answerer, open_answerer
from ragjax.config import load_config
from ragjax.data.question_batch import question_batch, tokenize_prompts
from ragjax.data.questions import read_questions
from ragjax.decoding.candidates import Candidates, TokenAnswer
from ragjax.decoding.propose import prefill_documents
from ragjax.files import atomic_write
from ragjax.marginal import TIE


def measure(answerer: Answerer, question: str) -> tuple[dict[str, float], dict[str, Candidates]]:
    """Seconds of each mode, finding the documents included, and its candidates.

    Exact decoding is timed as configured; then its answers are scored under all documents, untimed.
    """
    finding, (batch, retrieved) = timed(_retrieve, answerer, question)
    seconds, found = {}, {}
    for mode in MODES:
        seconds[mode], ([found[mode]], _) = timed(answerer.candidates, batch, retrieved, mode)
        seconds[mode] += finding
    [found["exact"]], _ = _with_full_probability(answerer).candidates(batch, retrieved, "exact")
    return seconds, found


def difference(answerer: Answerer, question: str, found: Candidates) -> float:
    """By how much log p(y|x) of the best answer differs from that of this answerer's models, nats."""
    rag, (batch, retrieved) = answerer.rag, _retrieve(answerer, question)
    prompts = tokenize_prompts(rag.tokenizers, answerer.store, batch, retrieved.ids)
    memory = prefill_documents(rag.generator.graphdef, answerer.params["generator"], *prompts)
    scored = score_whole(answerer, memory, found, retrieved.log_prior[0])
    best = found.best("exact")[0]
    return abs(list(scored.values())[best] - float(found.marginal("exact")[best]))


def _with_full_probability(answerer: Answerer) -> Answerer:
    config = answerer.rag.config
    config = config.replace(decode=config.decode.replace(probability="full"))
    return dataclasses.replace(answerer, rag=dataclasses.replace(answerer.rag, config=config))


def _retrieve(answerer: Answerer, question: str) -> Any:
    batch = question_batch(answerer.rag.tokenizers, [question])
    return batch, answerer.retrieve(batch, [question])


def lost(found: dict[str, Candidates]) -> dict[str, float]:
    """By mode, how much less likely its answer is than the best that any mode found, nats; inf for an unfinished one.

    Fast and certified decoding choose among thorough's candidates, whose marginals are known.
    """
    thorough, exact = found["thorough"], found["exact"]
    assert thorough.thorough_logp is not None and exact.thorough_logp is not None
    known = dict(_marginals(exact, exact.thorough_logp)) | dict(_marginals(thorough, thorough.thorough_logp))
    most = max((logp for (_, ended), logp in known.items() if ended), default=-np.inf)
    gaps = {}
    for mode, candidates in found.items():
        c = candidates.best(mode)[0]
        own = known[candidates.tokens[c], bool(candidates.finished[c])]
        gaps[mode] = max(most - own, 0.0) if candidates.finished[c] else np.inf
    return gaps


def _marginals(candidates: Candidates, logp: np.ndarray) -> Iterator[tuple[TokenAnswer, float]]:
    for tokens, ends, own in zip(candidates.tokens, candidates.finished, logp, strict=True):
        yield (tokens, bool(ends)), float(own)


def numbers(seconds: list[dict[str, float]], gaps: list[dict[str, float]], proved: list[bool]) -> dict[str, Any]:
    """By mode: the median of the seconds and their spread, the share of exact answers, the loss where there is one."""
    by_mode = {}
    for mode in MODES:
        took, gap = np.array([s[mode] for s in seconds]), np.array([g[mode] for g in gaps])
        by_mode[mode] = {
            "seconds": float(np.median(took)),
            "mean_seconds": float(took.mean()),
            "least_and_most_seconds": [float(took.min()), float(took.max())],
            "exact": float(np.mean((gap <= TIE) & np.array(proved))),
            "below_the_best_found": float(np.mean(gap > TIE)),
            "largest_loss_in_nats": float(gap.max()),
        }
    return by_mode


def draw(record: list[dict[str, Any]], path: Path) -> None:
    """Seconds a question against the share of exact answers, a line for each mode."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "exactness"}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    heights = (6, 6, -13, -25)  # of the names of points, which would overlap else
    for mode, marker, height in zip(MODES, "*os^", heights, strict=True):
        points = sorted((of["documents"], of["modes"][mode]) for of in record)
        x, y = [point["seconds"] for _, point in points], [100 * point["exact"] for _, point in points]
        axes.plot(x, y, marker=marker, label=mode, alpha=0.8)
        for (documents, _), seconds, share in zip(points, x, y, strict=True):
            at, off = (seconds, share), "offset points"
            axes.annotate(f"k = {documents}", at, (0, height), textcoords=off, ha="center", fontsize=8)
    axes.set(xscale="log", xlabel="seconds a question (median)", ylabel="answers proved the likeliest of all, %")
    axes.set(ylim=(0, 110))
    for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        ticks(lambda x, _: f"{x:g}")
    axes.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exactness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--documents", type=int, default=10, help="k")
    parser.add_argument("--questions", type=int, default=20, help="of the test split, spread over it")
    parser.add_argument("--record", type=Path, required=True, help="the JSON file that keeps the numbers")
    parser.add_argument("--draw", type=Path, help="a picture (.svg, .png) of the record; nothing is measured")
    options = parser.parse_intermixed_args()
    record: list[dict[str, Any]] = json.loads(options.record.read_text()) if options.record.exists() else []
    if options.draw:
        draw(record, options.draw)
        return
    if options.config is None:
        parser.error("expected a configuration, or --draw")
    config = load_config(options.config, [*options.overrides, f"decode.num_docs={options.documents}"])
    answerer, console = open_answerer(config), make_console()
    questions = spread([q.question for q in read_questions(Path(config.questions.test))], options.questions)
    for question in questions[:: max(1, len(questions) // 4)]:
        measure(answerer, question)  # compiles; a shape yet to come shows in the longest time, not in the median
    warm(answerer, questions)
    seconds, gaps, proved, read, apart = [], [], [], [], []
    whole = None if config.dtype == "float32" else open_answerer(config.replace(dtype="float32"))
    for question in track(questions, "answer", console=None, disable=not console.is_terminal):
        took, found = measure(answerer, question)
        proof = found["exact"].proof
        assert proof is not None
        seconds.append(took)
        gaps.append(lost(found))
        proved.append(proof.best)
        read.append(proof.documents_read)
        if whole is not None and proof.best:
            apart.append(difference(whole, question, found["exact"]))
    one = {
        "generator": config.generator.source,
        "step": answerer.step,
        "documents": options.documents,
        "beams": config.decode.num_beams,
        "probability": config.decode.probability,
        "fallback": config.decode.fallback,
        "questions": len(questions),
        "proved": float(np.mean(proved)),
        "documents_read": float(np.mean(read)),
        "device": f"{jax.devices()[0]}, {platform.processor() or platform.machine()}, {config.dtype}",
        "modes": numbers(seconds, gaps, proved),
    }
    record = sorted([of for of in record if of["documents"] != options.documents] + [one], key=lambda o: o["documents"])
    with atomic_write(options.record) as (file,):
        file.write(json.dumps(record, indent=1).encode() + b"\n")
    heads = ["median s", "mean s", "min … max s", "exact", "below the best found", "largest loss, nats"]
    title = f"k = {options.documents}, {len(questions)} questions, {one['beams']} beams"
    table = Table(title, *heads, box=box.MARKDOWN)
    for mode, of in one["modes"].items():
        least, most = of["least_and_most_seconds"]
        spent = [f"{of['seconds']:.3f}", f"{of['mean_seconds']:.3f}", f"{least:.3f} … {most:.3f}"]
        shares = [f"{of['exact']:.0%}", f"{of['below_the_best_found']:.0%}"]
        table.add_row(mode, *spent, *shares, f"{of['largest_loss_in_nats']:.3f}")
    console.print(table)
    console.print(f"exact: proved {one['proved']:.1%}, {one['documents_read']:.1f} documents read in the mean")
    if apart:
        of = f"median {np.median(apart):.1e}, most {max(apart):.1e}"
        console.print(f"log p(y|x) of proved answers in {config.dtype} and in float32, nats apart: {of}")


if __name__ == "__main__":
    or_input_error(main)
