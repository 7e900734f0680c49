"""How long one question takes, models loaded and programs compiled, and where the time goes.

    python -m benchmarks.answering configs/factbook.yaml decode.k=5 decode.beams=4

Questions of the test split are answered one by one, in turn thoroughly and fast; one round before compiles and does not
count. Reading the documents and the beam search are timed apart on the same questions; scoring every candidate under
every document is what thorough decoding takes more than fast decoding.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ragjax.answer import Answerer, open_answerer
from ragjax.config import InputError, load_config
from ragjax.decode import propose, read
from ragjax.passages import read_questions
from ragjax.rag import prompt_rows, retrieve


def seconds(program: Callable[[], object]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - started


def measure(answerer: Answerer, question: str) -> dict[str, float]:
    """Seconds of each stage, and of the whole in both modes."""
    rag, params, settings = answerer.rag, answerer.params, answerer.rag.config.decode
    graph, of_generator = rag.generator.graph, params["generator"]
    found = retrieve(rag, params, answerer.index, [question], settings.k)
    rows = prompt_rows(rag, answerer.store, [question], found.ids)
    memory = read(graph, of_generator, *rows)
    return {
        "thorough": seconds(lambda: answerer.answer([question], mode="thorough")),
        "fast": seconds(lambda: answerer.answer([question], mode="fast")),
        "retrieval": seconds(lambda: retrieve(rag, params, answerer.index, [question], settings.k)),
        "reading": seconds(lambda: read(graph, of_generator, *rows)),
        "beam search": seconds(lambda: propose(graph, of_generator, memory, settings, rag.special)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answering",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--questions", type=int, default=20)
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    answerer = open_answerer(config)
    questions = [q.question for q in read_questions(Path(config.questions.test))[: options.questions]]
    for question in questions:
        measure(answerer, question)
    found = [measure(answerer, question) for question in questions]
    times = {stage: np.array([m[stage] for m in found]) for stage in found[0]}
    times["scoring"] = times["thorough"] - times["fast"]
    table = Table(f"{len(questions)} questions", "median s", "min … max s", "of thorough", box=box.SIMPLE_HEAD)
    whole = np.median(times["thorough"])
    for stage in ("thorough", "fast", "retrieval", "reading", "beam search", "scoring"):
        of_stage = times[stage]
        share = f"{np.median(of_stage) / whole:.0%}"
        table.add_row(stage, f"{np.median(of_stage):.2f}", f"{of_stage.min():.2f} … {of_stage.max():.2f}", share)
    console = Console(highlight=False)
    console.print(f"k = {config.decode.k}, {config.decode.beams} beams, {config.generator.source}, {jax.devices()[0]}")
    console.print(table)


def or_input_error(program: Callable[[], None]) -> None:
    """Bad input ends as in the command line: one line, code 2."""
    try:
        program()
    except InputError as error:
        print(f"{error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    or_input_error(main)
