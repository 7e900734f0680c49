"""Checkpoints of the whole training state, one folder a step. The only file that knows Orbax."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from ragjax.checksums import CHECKSUMS, damage_text, damages, read_checksums, total_size, write_checksums
from ragjax.errors import InputError
from ragjax.parallel.processes import allgather_text, is_process_zero, run_on_process_zero
from ragjax.resources import size_text
from ragjax.terminal import bytes_bar, terminal

Loaded = TypeVar("Loaded")
SAVE_TIMEOUT = 1200.0  # seconds after which several processes give up a save, in which one may have failed
LAST_SAVE_TIMEOUT = 10.0  # the same where JAX has failed already
SMALL_FILE = 1 << 20  # bytes up to which a file is read when only the metadata are asked for
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that is being written
DAMAGED = "the checkpoint is incomplete or damaged"
CHECKPOINTS_MEND = "ragjax train sets it aside and goes on from the one before"
MAKE_ROOM = "make room, or lower train.keep_checkpoints, and run the same command again: it resumes"


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be read, though it is of this model."""


class Checkpointer:
    """The checkpoints under one folder, of which the newest `keep` stay, and with `best` the one of lowest loss.

    A save goes on in the background while training continues; a checkpoint appears under its name only when it is
    whole, and then gets STEP/checksums.json, with a checksum of each of its files. The files are compared with it,
    once, before the first of them is used. A checkpoint without it, as a kill at that moment leaves one, counts as
    undamaged.

    One process may write, and clears away what an interrupted save left; others read meanwhile. Use as a context
    manager, or call `wait` at the end.
    """

    def __init__(self, folder: str | Path, keep: int = 2, *, best: bool = False, writing: bool) -> None:
        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs each step of its work and its tracebacks
        self.folder = Path(folder).absolute()
        self.keep, self.best, self.writing = keep, best, writing
        self._ocp = ocp
        self._saving: tuple[int, Any] | None = None
        self._completing = Lock()
        self._intact: set[int] = set()  # steps whose files are what was saved
        self._metadata: dict[int, Any] = {}  # by step, as Orbax reads it: it opens every array
        if writing:
            run_on_process_zero(self._clear)

    def _clear(self) -> None:
        """Removes what interrupted saves left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        last = time.monotonic() + 5  # what cannot be written whole may still be written to
        while (leftovers := list(self.folder.glob(f"*{UNFINISHED}*"))) and time.monotonic() < last:
            for leftover in leftovers:
                shutil.rmtree(leftover, ignore_errors=True)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
            self.wait()
            return
        with suppress(InputError, jax.errors.JaxRuntimeError):  # another process may be gone, as `error` says
            self.wait(LAST_SAVE_TIMEOUT)

    def steps(self) -> list[int]:
        """The steps saved, damaged ones too, the newest first."""
        self.wait()
        return self._steps()

    def _steps(self) -> list[int]:
        folders = (path for path in self.folder.glob("[0-9]*") if path.is_dir())
        return sorted((int(path.name) for path in folders if path.name.isdecimal()), reverse=True)

    def restore_latest(self, load: Callable[[int], Loaded]) -> tuple[int, Loaded] | None:
        """The newest step that can be read, and what `load(step)` returns for it; None if nothing was saved.

        A damaged checkpoint is reported, and the one before it is tried; where one may write, the damaged one is moved
        out of the way, else it would be kept as the newest. Raises `InputError` if none is left, or as `load` does.
        """
        return self._first_readable(self.steps(), load)

    def restore_best(self, load: Callable[[int], Loaded]) -> tuple[int, Loaded] | None:
        """As `restore_latest`, but the step whose loss is the lowest comes first; steps without a loss come last."""
        return self._first_readable(sorted(self.steps(), key=self._loss), load)

    def _first_readable(self, order: list[int], load: Callable[[int], Loaded]) -> tuple[int, Loaded] | None:
        order = json.loads(allgather_text(json.dumps(order))[0])  # the same in all processes
        damaged: list[tuple[int, str]] = []
        for step in order:
            loaded, why = None, self._damage_for_all(step)
            if not why:
                try:
                    loaded = load(step)
                except DamagedCheckpoint as error:
                    why = str(error)
                # a process may have read its own parts well
                why = next(filter(None, allgather_text(why)), "")
            if why:
                damaged.append((step, why))
                continue
            for bad, why in damaged:
                terminal.print(f"{why}; going back to step {step}", soft_wrap=True)
                self._set_aside(bad)
            if self.writing:
                run_on_process_zero(lambda: self._write_checksums(step))  # noqa: B023  # it is called at once
            return step, loaded  # type: ignore[return-value]
        if damaged:
            raise InputError(f"{damaged[0][1]}; no other can be read: delete {self.folder} to start anew")
        return None

    def _set_aside(self, step: int) -> None:
        def move() -> None:
            aside = self.folder.parent / "damaged-checkpoints"
            aside.mkdir(exist_ok=True)
            count = sum(path.name.startswith(f"{step}-") for path in aside.iterdir())
            self._path(step).rename(aside / f"{step}-{count + 1}")
            terminal.print(f"the damaged checkpoint is now {aside / f'{step}-{count + 1}'}", soft_wrap=True)

        if self.writing:
            run_on_process_zero(move)

    def save(self, step: int, state: Any, metadata: dict[str, Any], loss: float | None = None) -> None:
        """Saves a tree of arrays, and JSON beside it; returns once `state` may be changed or donated.

        Raises `InputError` if it, or the save before it, cannot be written; the partial folder is removed.
        """
        self.wait()
        if jax.process_count() > 1:  # one that fails to write leaves the others waiting
            need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(lambda: state)))
            run_on_process_zero(lambda: self._check_room(step, need))
        self._intact.discard(step)
        self._metadata.pop(step, None)
        try:
            about = {"overwrite": True, "custom_metadata": {"metadata": metadata, "loss": loss}}
            response = self._ocp.save_async(self._path(step), state, **about)
        except Exception as error:  # tensorstore, Orbax and the operating system each have their own
            raise self._unwritable(step, error) from error
        if is_process_zero():
            response.on_complete(lambda _: self._complete_early(step))
        self._saving = (step, response)

    def _check_room(self, step: int, need: int) -> None:
        if (free := shutil.disk_usage(self.folder).free) < need:
            has = f"{size_text(need)} are needed and {size_text(free)} are free"
            raise InputError(f"{self._path(step)}: the checkpoint could not be written ({has}); {MAKE_ROOM}")

    def wait(self, timeout: float = SAVE_TIMEOUT) -> None:
        """Waits until the last save is on disk, checksums and all; several processes so many seconds, one to its end.

        Raises as `save` does.
        """
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            response.result(timeout=None if jax.process_count() == 1 else timeout)
            if is_process_zero():
                self._complete(step)
        except Exception as error:
            raise self._unwritable(step, error) from error

    def _complete_early(self, step: int) -> None:
        """`_complete`, in the background. What fails here fails again in `wait`, which raises."""
        with suppress(InputError, OSError):
            self._complete(step)

    def _complete(self, step: int) -> None:
        """Writes the checksums of a new checkpoint, and only then deletes those that are no longer kept."""
        with self._completing:
            self._write_checksums(step)
            steps = self._steps()
            kept = {step, *steps[: self.keep], *([min(steps, key=self._loss)] if self.best else [])}
            for old in set(steps) - kept:
                gone = self._path(old).with_name(f"{old}{UNFINISHED}-deleted")
                self._path(old).rename(gone)  # it is there as a whole, or not at all
                shutil.rmtree(gone)

    def _write_checksums(self, step: int) -> None:
        if not (self._path(step) / CHECKSUMS).exists():
            write_checksums(self._path(step))

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state saved at `step`; `abstract_state` (arrays or `ShapeDtypeStruct`s) has its shapes, types, shardings.

        Raises `InputError` for an incomplete or damaged checkpoint, and for one of another model.
        """
        self.wait()
        return self._load(step, abstract_state, partial=False)

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Only the subtree `params` of the state saved at `step`; else as `restore`."""
        self.wait()
        return self._load(step, {"params": abstract_params}, partial=True)["params"]

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON saved with the state. Raises `InputError` for an incomplete or damaged checkpoint.

        Of its files only the small ones are compared with their checksums, unless all were before.
        """
        self.wait()
        return self._about(step)["metadata"]

    def _loss(self, step: int) -> float:
        """The loss saved with a state; infinite where there is none, or it cannot be read."""
        try:
            loss = self._about(step)["loss"]
        except InputError:
            return math.inf
        return math.inf if loss is None else loss

    def _about(self, step: int) -> dict[str, Any]:
        self._check(step, SMALL_FILE)
        about = self._read_metadata(step).custom_metadata
        if not isinstance(about, dict) or not {"metadata", "loss"} <= about.keys():
            raise DamagedCheckpoint(f"{self._path(step)}: {DAMAGED} (it does not say where training was)")
        return about

    def every_metadata(self) -> list[dict[str, Any]]:
        """The JSON of every checkpoint that can be read."""
        every = []
        for step in self.steps():
            with suppress(InputError):
                every.append(self.metadata(step))
        return every

    def _damage(self, step: int, most: int | None) -> dict[str, str]:
        """What is wrong with each damaged file, by name; {} where there are no checksums. `most` is in bytes."""
        folder = self._path(step)
        if not (folder / CHECKSUMS).exists():
            return {}
        try:
            records = read_checksums(folder)["files"]
        except InputError as error:
            return {CHECKSUMS: f"{str(error).partition(': ')[2]}, so nothing vouches for the other files"}
        with bytes_bar(f"check step {step}", 0 if most else total_size(records.values())) as advance:
            return damages(folder, records, advance, most)

    def _check(self, step: int, most: int | None = None) -> None:
        """Raises `DamagedCheckpoint` for files that are not what was saved; those above `most` bytes are not read."""
        if step in self._intact:
            return
        if damage := self._damage(step, most):
            raise DamagedCheckpoint(f"{self._path(step)}: {DAMAGED} ({damage_text(damage)})")
        if most is None:
            self._intact.add(step)

    def _damage_for_all(self, step: int) -> str:
        """What is wrong with a checkpoint, or "", as process 0 finds it for all."""

        def check() -> str:
            try:
                self._check(step)
            except DamagedCheckpoint as error:
                return str(error)
            return ""

        why = allgather_text(run_on_process_zero(check) or "")[0]
        if not why:
            self._intact.add(step)
        return why

    def _load(self, step: int, abstract: Any, partial: bool) -> Any:
        self._check(step)
        self._check_fits(step, abstract, partial)
        loading = self._ocp.options.PyTreeOptions.Loading(partial_load=partial)
        try:
            with self._this_process_alone(pytree_options=self._ocp.options.PyTreeOptions(loading=loading)):
                abstract = jax.tree.map(_with_sharding, abstract)
                return jax.tree.map(_put_exactly, self._ocp.load(self._path(step), abstract), abstract)
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _this_process_alone(self, **options: Any) -> Any:
        """Each process reads by itself: one that finds its part damaged would leave the others waiting."""
        here = jax.process_index()
        multiprocessing = self._ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
        return self._ocp.Context(multiprocessing_options=multiprocessing, **options)

    def _check_fits(self, step: int, abstract: Any, partial: bool) -> None:
        """Raises `InputError` unless the arrays saved have the names, types and shapes of `abstract`."""
        self._about(step)
        saved = _shapes(self._read_metadata(step).metadata)
        if not saved:  # what Orbax makes of blocks that are not there
            raise DamagedCheckpoint(f"{self._path(step)}: {DAMAGED} (its arrays cannot be read)")
        expected = _shapes(abstract)
        missing = sorted(expected.keys() - saved.keys())
        unknown = [] if partial else sorted(saved.keys() - expected.keys())
        differ = [f"{n} is {saved[n]}, not {expected[n]}" for n in expected if n in saved and saved[n] != expected[n]]
        problems = [f"it has no {n}" for n in missing] + [f"{n} is not of this model" for n in unknown] + differ
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise InputError(
                f"{self._path(step)}: a checkpoint of another model or optimiser: {'; '.join(problems[:3])}{more}; "
                "use the configuration that it was trained with, or another output folder"
            )

    def _read_metadata(self, step: int) -> Any:
        if step not in self._metadata:
            try:
                with self._this_process_alone():
                    self._metadata[step] = self._ocp.metadata(self._path(step))
            except Exception as error:
                raise self._unreadable(step, error) from error
        return self._metadata[step]

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _unreadable(self, step: int, error: Exception) -> InputError:
        _raise_errors_of_jax(error)
        if not self._path(step).exists():
            there = ", ".join(map(str, sorted(self._steps()))) or "none"
            return InputError(f"{self._path(step)}: there is no such checkpoint; the steps saved are: {there}")
        return DamagedCheckpoint(f"{self._path(step)}: {DAMAGED} ({_first_line(error)})")

    def _unwritable(self, step: int, error: Exception) -> InputError:
        _raise_errors_of_jax(error)
        if jax.process_count() == 1:
            self._clear()
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


def _raise_errors_of_jax(error: Exception) -> None:
    """Raises again what JAX reports, such as a process that is gone or a device without memory: no fault of the disk.

    Where processes wait for one another, Orbax wraps it in a `TimeoutError`, and may drop what it wraps.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, jax.errors.JaxRuntimeError):
            raise cause
        if isinstance(cause, TimeoutError) and "barrier" in str(cause):
            raise jax.errors.JaxRuntimeError(str(cause)) from cause
        cause = cause.__cause__ or cause.__context__


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    """Without a sharding of its own a leaf goes to the first device, wherever it was when it was saved."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _put_exactly(leaf: jax.Array, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """An equivalent sharding is not enough: on one device a key comes back as if it had a dimension."""
    return leaf if leaf.sharding == abstract.sharding else jax.device_put(leaf, abstract.sharding)


def _shapes(tree: Any) -> dict[str, str]:
    """Name → type and shape. Names are the same for a dictionary and for a dataclass, which Orbax stores alike."""
    leaves = jax.tree_util.tree_flatten_with_path(jax.tree.map(_stored, tree))[0]
    texts = {jax.tree_util.keystr(p, simple=True, separator="."): f"{x.dtype}{list(x.shape)}" for p, x in leaves}
    either = "params.", "indexed."  # begin the names of what Orbax converts: from float32 to bfloat16, and back
    return {n: text.replace("bfloat16", "float32") if n.startswith(either) else text for n, text in texts.items()}


def _stored(leaf: Any) -> Any:
    """Random keys are stored as the integers that they wrap."""
    return jax.eval_shape(jax.random.key_data, leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
