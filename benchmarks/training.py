"""The training step with all of a question's documents going backward, and with the likeliest alone, side by side.

    python -m benchmarks.training configs/factbook.yaml

Both compile the configuration's own step, start from the pretrained models and see the same batches, in turn. Needs the
index. `GLIBC_TUNABLES= python -m benchmarks.training …` shows what huge pages are worth.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.answering import or_input_error
from ragjax.config import load_config
from ragjax.mesh import local_mesh
from ragjax.passages import read_questions
from ragjax.rag import answer_tokens, retrieve, train_batch
from ragjax.step import initial_state, make_train_step
from ragjax.world import open_world


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    rag, index, store = open_world(config)
    jax.config.update("jax_enable_compilation_cache", False)
    k, size = config.train.k, config.train.batch_size
    params = rag.initial_params()
    longest = config.generator.answer_tokens
    every = read_questions(Path(config.questions.train))
    questions = [q for q in every if len(answer_tokens(rag, q.answers[0])) <= longest]
    batches = []
    for start in range(0, (options.steps + 1) * size, size):
        some = questions[start : start + size]
        texts, answers = [q.question for q in some], [q.answers[0] for q in some]
        ids = retrieve(rag, params, index, texts, k).ids
        batches.append(train_batch(rag, index, store, texts, answers, ids))
    corpus = index.corpus(local_mesh(data=1)) if config.retriever.prior == "corpus" else None

    steps, states, compiling = {}, {}, {}
    for through in (k, 1):
        changed = dataclasses.replace(config.train, backward_documents=through)
        own = dataclasses.replace(rag, config=dataclasses.replace(config, train=changed))
        states[through] = initial_state(own, jax.tree.map(jax.numpy.array, params))
        lowered = make_train_step(own).lower(states[through], batches[0], corpus)
        started = time.perf_counter()
        steps[through] = lowered.compile()
        compiling[through] = time.perf_counter() - started
    times: dict[int, list[float]] = {through: [] for through in steps}
    for batch in batches:
        for through, step in steps.items():
            started = time.perf_counter()
            states[through], _ = jax.block_until_ready(step(states[through], batch, corpus))
            times[through].append(time.perf_counter() - started)

    table = Table("gradient of the generator", "compile s", "median s", "min … max s", "ratio", box=box.SIMPLE_HEAD)
    base = float(np.median(times[k][1:]))
    for through, of in times.items():
        seconds = np.array(of[1:])  # the first one warms up
        table.add_row(
            f"through {through} of {k} documents",
            f"{compiling[through]:.1f}",
            f"{np.median(seconds):.2f}",
            f"{seconds.min():.2f} … {seconds.max():.2f}",
            f"{np.median(seconds) / base:.2f}",
        )
    console = Console(highlight=False)
    tunables = os.environ.get("GLIBC_TUNABLES") or "not set"
    console.print(f"{size} questions a step, {config.generator.source}, {jax.devices()[0]}; GLIBC_TUNABLES {tunables}")
    console.print(table)


if __name__ == "__main__":
    or_input_error(main)
