"""The training step with all of a question's documents going backward, and with the likeliest alone, side by side.

    python -m benchmarks.training configs/factbook.yaml train.num_docs=8 --through 2

Both compile the configuration's own step, start from the pretrained models and see the same batches, in turn. Needs the
index. `GLIBC_TUNABLES= python -m benchmarks.training …` shows what huge pages are worth. Of the operations that are
counted, attention's products stand there twice where a backward pass recomputes them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path

import jax

from benchmarks.report import Stage, make_console, or_input_error, peak, show, timed, times_as_fast, write
from ragjax.config import load_config
from ragjax.data.question_batch import question_batch, tokenize_answer
from ragjax.data.questions import read_questions
from ragjax.parallel.mesh import local_mesh
from ragjax.planning.program_cost import matmul_flops
from ragjax.retrieval.retrieve import retrieve
from ragjax.runs.restore import load_artifacts
from ragjax.training.batch import attach_documents
from ragjax.training.state import init_train_state
from ragjax.training.step import make_train_step


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--through", type=int, default=1, help="documents of a question that go backward")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where to write training.md and training.png")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    rag, index, store = load_artifacts(config)
    jax.config.update("jax_enable_compilation_cache", False)
    k, size = config.train.num_docs, config.train.batch_size
    params = rag.initial_params()
    longest = config.generator.max_answer_tokens
    every = read_questions(Path(config.questions.train))
    questions = [q for q in every if len(tokenize_answer(rag.tokenizers, q.answers[0])) <= longest]
    batches = []
    for start in range(0, (options.steps + 1) * size, size):
        some = questions[start : start + size]
        tokens = question_batch(rag.tokenizers, [q.question for q in some], [q.answers[0] for q in some])
        batches.append(attach_documents(rag, index, store, tokens, retrieve(rag, params, index, tokens, k).ids))
    corpus = index.corpus(local_mesh(data=1)) if config.retriever.prior == "corpus" else None

    steps, states, compiling, stages = {}, {}, {}, {}
    for through in (k, options.through):
        changed = config.train.replace(backprop_docs=through)
        own = dataclasses.replace(rag, config=config.replace(train=changed))
        states[through] = init_train_state(own, jax.tree.map(jax.numpy.array, params))
        step = make_train_step(own)
        traced = step.trace(states[through], batches[0], corpus)
        lowered, started = traced.lower(), time.perf_counter()
        steps[through] = lowered.compile()
        compiling[through] = time.perf_counter() - started
        stages[f"through {through} of {k}"] = Stage(flops=matmul_flops(traced.jaxpr.jaxpr))
    for number, batch in enumerate(batches):
        for through, compiled in steps.items():
            took, (states[through], _) = timed(compiled, states[through], batch, corpus, step.schedule)
            if number > 0:  # the first one warms up
                stages[f"through {through} of {k}"].seconds.append(took)
    console, most, tunables = make_console(), peak(config.dtype), os.environ.get("GLIBC_TUNABLES") or "not set"
    console.print(
        f"{size} questions a step, {config.generator.source}, {jax.devices()[0]}, {config.dtype}, "
        f"{most / 1e9:.0f} GFLOP/s; GLIBC_TUNABLES {tunables}; "
        f"compiled in {', '.join(f'{seconds:.1f} s' for seconds in compiling.values())}\n",
        soft_wrap=True,
    )
    whole, few = stages
    show(console, "gradient of the generator", stages, whole, most)
    console.print(f"{few}: {times_as_fast(stages[whole], stages[few]):.2f} times as fast as {whole}")
    write(console, options.folder, "training", {"a training step": stages})


if __name__ == "__main__":
    or_input_error(main)
