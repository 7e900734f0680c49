"""Where a run's metrics are shown while it trains: TensorBoard, Weights & Biases or trackio, each of them an extra."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

from ragjax.config import Config
from ragjax.errors import InputError
from ragjax.files import atomic_write

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "ragjax"  # of all runs, unless the environment names another
RUN_ID = "tracker_id"  # a file: by what is in it a resumed run goes on where it was shown before

Track = Callable[[int, Mapping[str, float]], None]
Opened = tuple[Track, Callable[[], object]]  # and what ends it


def check_tracker(tracker: str) -> None:
    """Raises `InputError` where the package of `train.tracker` is not installed."""
    if (package := PACKAGES.get(tracker)) and find_spec(package) is None:
        raise InputError(f"train.tracker={tracker} needs an extra: pip install 'ragjax[{tracker}]'")


@contextmanager
def tracking(config: Config, folder: Path) -> Iterator[Track]:
    """Gives what takes a step and its metrics. Raises `InputError` where the tracker cannot be opened."""
    tracker = config.train.tracker
    open_tracker = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}.get(tracker)
    if open_tracker is None:
        yield lambda step, metrics: None
        return
    try:
        track, close = open_tracker(config, folder)
    except Exception as error:  # without a login or a network; each has errors of its own
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"train.tracker={tracker}: cannot be opened: {why}; or choose train.tracker=none") from None
    try:
        yield track
    finally:
        close()


def _tensorboard(config: Config, folder: Path) -> Opened:
    from tensorboardX import SummaryWriter

    # a file is named by the second: the suffix keeps apart what begins within one
    writer = SummaryWriter(str(folder / "tensorboard"), filename_suffix=f".{secrets.token_hex(4)}")

    def track(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return track, writer.close


def _wandb(config: Config, folder: Path) -> Opened:
    """WANDB_MODE=offline keeps all below RUN/wandb, for `wandb sync`."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        dir=str(folder),
        id=_run_id(folder),
        name=folder.resolve().name,
        resume="allow",
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(console="off"),
    )
    return lambda step, metrics: run.log(dict(metrics), step=step), run.finish


def _trackio(config: Config, folder: Path) -> Opened:
    """On this machine, in TRACKIO_DIR, unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another place."""
    import trackio

    with redirect_stdout(sys.stderr):  # what it tells is no output of the command
        run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{folder.resolve().name}-{_run_id(folder)}",
            resume="allow",
            config=config.model_dump(mode="json"),
            embed=False,
        )

    def close() -> None:
        with redirect_stdout(sys.stderr):
            trackio.finish()

    return lambda step, metrics: run.log(dict(metrics), step=step), close


def _run_id(folder: Path) -> str:
    """The same whenever the run goes on, and another for another run."""
    path = folder / RUN_ID
    if not path.is_file():
        with atomic_write(path) as (file,):
            file.write(secrets.token_hex(4).encode())
    return path.read_text(encoding="utf-8").strip()
