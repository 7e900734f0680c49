"""What the benchmarks share: how long, how many floating-point operations, and how to show both beside each other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

from ragjax.config import Decode
from ragjax.decoding.beam_search import batch_sizes
from ragjax.decoding.prefix_cache import PrefixCache, Tokens
from ragjax.decoding.propose import beam_search_documents, beam_settings
from ragjax.errors import InputError
from ragjax.models.generator import SpecialTokens
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.planning.program_cost import matmul_flops


@dataclass
class Stage:
    """How long each run took, in seconds, and the floating-point operations that its algorithm needs, in the mean."""

    seconds: list[float] = field(default_factory=list)
    flops: float | None = None  # of matrix products, padding not counted

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def timed(program: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    """Seconds until all of a program's result is there, and the result."""
    started = time.perf_counter()
    found = jax.block_until_ready(program(*given))
    return time.perf_counter() - started, found


def peak(dtype: str) -> float:
    """This device's floating-point operations a second in XLA's product of two large matrices."""
    size = 4096 if jax.default_backend() == "cpu" else 16384  # so large that the call itself takes no time beside it
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(square, square))
    return 2 * size**3 / min(timed(product, square, square)[0] for _ in range(5))


def torch_place(dtype: str) -> dict[str, Any]:
    """What torch's models and tensors are moved to, to compute where and in what JAX does."""
    import torch

    return {"device": {"gpu": "cuda"}.get(jax.default_backend(), "cpu"), "dtype": getattr(torch, dtype)}


def flops_of(program: Callable[..., Any], *given: Any) -> int:
    """As `matmul_flops`: the body of a loop that ends when it is done counts once."""
    return matmul_flops(jax.make_jaxpr(program)(*given).jaxpr)


def flops_of_search(
    graph: nnx.GraphDef, params: Params, memory: DocumentMemory, settings: Decode, special: SpecialTokens
) -> float:
    """Of the beam search after n memories, for each prefix that it reads, in the mean."""
    search = beam_settings(settings, special, hugging_face=False)
    flops = flops_of(lambda p, m: beam_search_documents(graph, p, m, search, special), params, memory)
    return flops / settings.num_beams / sum(batch_sizes(memory.start.shape[0]))  # a step of each size counts once


def count_read(prefixes: PrefixCache, beams: int) -> int:
    """How many prefixes a beam search has read after all of its memories, the start token once for each beam."""
    return int((prefixes.parent >= 0).sum()) + prefixes.parent.shape[0] * beams


def count_unread(prefixes: PrefixCache, answers: Mapping[int, Sequence[Tokens]]) -> int:
    """How many prefixes `PrefixScorer.score` has to read for these answers, by memory, that the search has not read."""
    tokens, parents = jax.device_get((prefixes.tokens, prefixes.parent))
    count = 0
    for row, ys in answers.items():
        cached: list[Tokens] = []
        for token, parent in zip(tokens[row].tolist(), parents[row].tolist(), strict=True):
            cached.append((*cached[parent], token) if parent >= 0 else ())
        count += len({y[:t] for y in ys for t in range(1, len(y))} - set(cached))
    return count


def make_console() -> Console:
    """What is printed there can be written by `write`, too."""
    return Console(highlight=False, record=True, width=None if sys.stdout.isatty() else 132)


def show(console: Console, title: str, stages: Mapping[str, Stage], base: str, most: float) -> None:
    """A table in Markdown; `base` is what the others are compared with, `most` the `peak`."""
    heads = ["median s", "min … max s", f"of {base}", "GFLOP", "GFLOP/s", "of the peak"]
    table = Table(title, *heads, box=box.MARKDOWN)
    for name, stage in stages.items():
        needed = ["", "", ""]
        if stage.flops is not None:
            speed = stage.flops / stage.median
            needed = [f"{stage.flops / 1e9:.1f}", f"{speed / 1e9:.0f}", f"{speed / most:.0%}"]
        spread = f"{min(stage.seconds):.3f} … {max(stage.seconds):.3f}"
        table.add_row(name, f"{stage.median:.3f}", spread, f"{stage.median / stages[base].median:.2f}", *needed)
    console.print(table)


def times_as_fast(slow: Stage, fast: Stage) -> float:
    """The median over the runs, in each of which both had their turn."""
    return float(np.median(np.array(slow.seconds) / np.array(fast.seconds)))


def write(console: Console, folder: Path | None, name: str, pictures: Mapping[str, Mapping[str, Stage]]) -> None:
    """`name`.md, which is what was printed, and `name`.png with a picture of each table; without a folder nothing."""
    if folder is None:
        return
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(console.export_text(), encoding="utf-8")
    figure = Figure(figsize=(8, 1 + 0.4 * sum(map(len, pictures.values()))), layout="constrained")
    rows = figure.subplots(len(pictures), squeeze=False, height_ratios=[len(stages) for stages in pictures.values()])
    for (title, stages), axes in zip(pictures.items(), rows[:, 0], strict=True):
        medians = np.array([stage.median for stage in stages.values()])
        spread = np.array([[min(stage.seconds), max(stage.seconds)] for stage in stages.values()]).T
        bars = axes.barh(list(stages), medians, xerr=np.abs(spread - medians), color="tab:blue", capsize=3)
        axes.bar_label(bars, [f"{median:.3g} s" for median in medians], padding=6)
        axes.set(xscale="log", xlabel="seconds", title=title)
        axes.invert_yaxis()
        axes.margins(x=0.2)
    figure.savefig(folder / f"{name}.png", dpi=150)


def or_input_error(program: Callable[[], None]) -> None:
    """Bad input ends as in the command line: one line, code 2."""
    try:
        program()
    except InputError as error:
        print(f"{error}", file=sys.stderr)
        sys.exit(2)
