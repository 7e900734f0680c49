"""Checkpoints of the whole training state, one folder a step. The only file that knows Orbax."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from ragjax.cost import size_text
from ragjax.errors import InputError
from ragjax.mesh import from_all, is_first, on_first, wait_for_all
from ragjax.progress import terminal

Loaded = TypeVar("Loaded")
SLOWEST_SAVE = 1200.0  # seconds after which several processes give up a save, in which one may have failed
MAKE_ROOM = "make room, or lower train.keep, and run the same command again: it resumes"


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be read, though it is of this model."""


class Checkpoints:
    """The checkpoints under one folder, of which the newest `keep` stay, and with `best` the one of lowest loss.

    A save goes on in the background while training continues; a checkpoint appears under its name only when it is
    whole. One process may write, which clears away what an interrupted save left; others read meanwhile. Use as a
    context manager, or call `close`.
    """

    def __init__(self, folder: str | Path, keep: int = 2, *, best: bool = False, writing: bool) -> None:
        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs each step of its work and its tracebacks
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.best = best
        self.writing = writing
        self._ocp = ocp
        self._saving: tuple[int, Any] | None = None
        self._lost = False
        self._open()

    def _open(self) -> None:
        if self.writing and is_first():
            for leftover in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
        wait_for_all("checkpoints")
        policies = self._ocp.training.preservation_policies
        kept = [policies.LatestN(n=self.keep)]
        if self.best:
            kept.append(policies.BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False))
        policy = policies.AnyPreservationPolicy(kept)
        self._checkpointer = self._ocp.training.Checkpointer(self.folder, preservation_policy=policy)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def latest(self) -> int | None:
        """The newest step saved, or None."""
        self.wait()
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def newest(self, load: Callable[[int], Loaded]) -> tuple[int, Loaded] | None:
        """The newest step that can be read, and what `load(step)` makes of it; None if nothing was saved.

        A damaged checkpoint is reported, and the one before it is tried; where one may write, the damaged one is moved
        out of the way, else it would be kept as the newest. Raises `InputError` if none is left, or as `load` does.
        """
        self.wait()
        return self._first_readable([saved.step for saved in self._by_age()], load)

    def lowest(self, load: Callable[[int], Loaded]) -> tuple[int, Loaded] | None:
        """As `newest`, of the step whose loss was the lowest; steps without one come last."""
        self.wait()
        order = sorted(self._by_age(), key=lambda saved: _loss(saved.metrics))
        return self._first_readable([saved.step for saved in order], load)

    def _by_age(self) -> list[Any]:
        return sorted(self._checkpointer.checkpoints, key=lambda saved: saved.step, reverse=True)

    def _first_readable(self, order: list[int], load: Callable[[int], Loaded]) -> tuple[int, Loaded] | None:
        damaged: list[tuple[int, str]] = []
        for step in order:
            found, why = None, ""
            try:
                found = load(step)
            except DamagedCheckpoint as error:
                why = str(error)
            # a process may have read its own parts well
            if reasons := [of_one for of_one in from_all(why) if of_one]:
                damaged.append((step, reasons[0]))
                continue
            for bad, why in damaged:
                terminal.print(f"{why}; going back to step {step}", soft_wrap=True)
                self._set_aside(bad)
            return step, found  # type: ignore[return-value]
        if damaged:
            raise InputError(f"{damaged[0][1]}; no other can be read: delete {self.folder} to start anew")
        return None

    def _set_aside(self, step: int) -> None:
        if not self.writing:
            return
        if is_first():
            aside = self.folder.parent / "damaged-checkpoints"
            aside.mkdir(exist_ok=True)
            count = sum(path.name.startswith(f"{step}-") for path in aside.iterdir())
            self._path(step).rename(aside / f"{step}-{count + 1}")
            terminal.print(f"the damaged checkpoint is now {aside / f'{step}-{count + 1}'}", soft_wrap=True)
        self._open()

    def save(self, step: int, state: Any, metadata: dict[str, Any], loss: float | None = None) -> None:
        """Saves a tree of arrays, and JSON beside it; returns once `state` may be changed or donated.

        Raises `InputError` if it, or the save before it, cannot be written; the partial folder is removed.
        """
        self.wait()
        if jax.process_count() > 1:  # one that fails to write leaves the others waiting
            need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(lambda: state)))
            on_first(lambda: self._check_room(step, need))
        try:
            metrics = None if loss is None else {"loss": loss}
            response = self._checkpointer.save_async(
                step, state, force=True, overwrite=True, custom_metadata=metadata, metrics=metrics
            )
        except Exception as error:  # tensorstore, Orbax and the operating system each have their own
            raise self._unwritable(step, error) from error
        self._saving = (step, response)

    def _check_room(self, step: int, need: int) -> None:
        if (free := shutil.disk_usage(self.folder).free) < need:
            has = f"{size_text(need)} are needed and {size_text(free)} are free"
            raise InputError(f"{self._path(step)}: the checkpoint could not be written ({has}); {MAKE_ROOM}")

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises as `save` does."""
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            response.result(timeout=None if jax.process_count() == 1 else SLOWEST_SAVE)
        except Exception as error:
            raise self._unwritable(step, error) from error

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at `step`, in the shapes, types and shardings of `like` (arrays or `ShapeDtypeStruct`s).

        Raises `InputError` for an incomplete or damaged checkpoint, and for one of another model.
        """
        return self._load(step, like, partial=False)

    def restore_params(self, step: int, like: Any) -> Any:
        """Only the subtree `params` of the state saved at `step`; `like` and errors as in `restore`."""
        return self._load(step, {"params": like}, partial=True)["params"]

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON saved with the state. Raises `InputError` for an incomplete or damaged checkpoint."""
        return self._read_metadata(step).custom_metadata or {}

    def every_metadata(self) -> list[dict[str, Any]]:
        """The JSON of every checkpoint that can be read."""
        self.wait()
        found = []
        for saved in self._checkpointer.checkpoints:
            with suppress(DamagedCheckpoint):
                found.append(self.metadata(saved.step))
        return found

    def close(self) -> None:
        """Waits for the last save and frees what Orbax holds. Raises as `save` does."""
        try:
            self.wait()
        finally:
            if not self._lost:  # else Orbax waits on
                self._checkpointer.close()

    def _load(self, step: int, like: Any, partial: bool) -> Any:
        self._check_fits(step, like, partial)
        options, here = self._ocp.options, jax.process_index()
        loading = options.PyTreeOptions.Loading(partial_load=partial)
        # each process by itself: one that finds its part damaged would leave the others waiting
        alone = options.MultiprocessingOptions(primary_host=here, active_processes={here})
        try:
            with self._ocp.Context(
                pytree_options=options.PyTreeOptions(loading=loading), multiprocessing_options=alone
            ):
                return self._ocp.load(self._path(step), jax.tree.map(_abstract, like))
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _check_fits(self, step: int, like: Any, partial: bool) -> None:
        saved = _shapes(self._read_metadata(step).metadata)
        wanted = _shapes(like)
        missing = sorted(wanted.keys() - saved.keys())
        unknown = [] if partial else sorted(saved.keys() - wanted.keys())
        differ = [f"{n} is {saved[n]}, not {wanted[n]}" for n in wanted if n in saved and saved[n] != wanted[n]]
        problems = [f"it has no {n}" for n in missing] + [f"{n} is not of this model" for n in unknown] + differ
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise InputError(
                f"{self._path(step)}: a checkpoint of another model or optimiser: {'; '.join(problems[:3])}{more}; "
                "use the configuration that it was trained with, or another output folder"
            )

    def _read_metadata(self, step: int) -> Any:
        self.wait()
        try:
            return self._checkpointer.metadata(step)
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _unreadable(self, step: int, error: Exception) -> InputError:
        _raise_unless_of_storage(error)
        if not self._path(step).exists():
            there = ", ".join(str(c.step) for c in self._checkpointer.checkpoints) or "none"
            return InputError(f"{self._path(step)}: there is no such checkpoint; the steps saved are: {there}")
        return DamagedCheckpoint(f"{self._path(step)}: the checkpoint is incomplete or damaged ({_first_line(error)})")

    def _unwritable(self, step: int, error: Exception) -> InputError:
        _raise_unless_of_storage(error)
        if jax.process_count() == 1:
            self._open()  # Orbax would report the same failure for ever
        else:
            self._lost = True
        return InputError(
            f"{self._path(step)}: the checkpoint could not be written ({_first_line(error)}); is the disk full? "
            f"{MAKE_ROOM}"
        )


def newest_step(folder: Path) -> int:
    """The newest step that was saved under `folder`, 0 where none was; whether it can be read is another question."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def fingerprint(folder: Path, step: int) -> str:
    """ "sha256:…" of a checkpoint, which no two saves share. Raises `InputError` where it is gone."""
    path = folder / str(step) / "_CHECKPOINT_METADATA"
    try:
        return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"  # it holds when it was saved, in nanoseconds
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _raise_unless_of_storage(error: Exception) -> None:
    """Raises what JAX itself reports: a process that is gone, a device without memory."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        raise error


def _loss(metrics: Any) -> float:
    return math.inf if not metrics else float(metrics["loss"])


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Without a sharding of its own a leaf goes to the first device, wherever it was when it was saved."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shapes(tree: Any) -> dict[str, str]:
    """Name → type and shape. Names are the same for a dictionary and for a dataclass, which Orbax stores alike."""
    leaves = jax.tree_util.tree_flatten_with_path(jax.tree.map(_stored, tree))[0]
    return {jax.tree_util.keystr(p, simple=True, separator="."): f"{x.dtype}{list(x.shape)}" for p, x in leaves}


def _stored(leaf: Any) -> Any:
    """Random keys are stored as the integers that they wrap."""
    return jax.eval_shape(jax.random.key_data, leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
