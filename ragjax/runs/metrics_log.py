"""train.jsonl: the metrics of every step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ragjax.config import Config
from ragjax.data.reading.byte_stream import byte_lines
from ragjax.errors import InputError
from ragjax.files import atomic_write, parse_json
from ragjax.parallel.processes import is_process_zero
from ragjax.runs.trackers import tracking


def check_finite_metrics(step: int, metrics: dict[str, float], ids: Sequence[str]) -> None:
    """Raises `InputError` where a metric of a step, counted from 1, is NaN or infinite; `ids` names its questions."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise InputError(
            f"step {step}: {', '.join(bad)} is not finite; the questions of this batch: {', '.join(ids)}; "
            "the last checkpoint is kept: look at these questions, or lower the learning rates with another output"
        )


@contextmanager
def log_steps(folder: Path, done: int, config: Config) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Writes RUN/train.jsonl (steps after a resumed checkpoint are written anew), and to `train.tracker`."""
    if not is_process_zero():
        yield lambda step, metrics: None
        return
    path = folder / "train.jsonl"
    with atomic_write(path) as (kept,):
        kept.writelines(_lines_until(path, done))
    with path.open("a", encoding="utf-8") as file, tracking(config, folder) as track:

        def log(step: int, metrics: dict[str, float]) -> None:
            if not metrics:
                return
            rare = metrics.keys() & {"dev_loss", "gradient_error_generator", "index_kept", "index_overlap"}
            if step % config.train.log_every and step != config.train.steps and not rare:
                return
            file.write(json.dumps({"step": step} | {k: float(f"{v:.6g}") for k, v in metrics.items()}) + "\n")
            file.flush()
            track(step, metrics)

        yield log


def _lines_until(path: Path, done: int) -> list[bytes]:
    """The lines of a log up to a step; a last one that was not written whole is left out."""
    kept = []
    for number, line in byte_lines(path) if path.exists() else ():
        if not line.endswith(b"\n"):
            break
        record = parse_json(line, f"{path}:{number}")
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise InputError(f"{path}:{number}: no line of this log; remove it")
        if record["step"] <= done:
            kept.append(line)
    return kept
