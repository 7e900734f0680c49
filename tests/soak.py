"""Kills ragjax at random moments until it has done its work all the same: `python tests/soak.py --kills 100`.

The index is built and a model trained once undisturbed. Then the same is done while processes are killed (SIGKILL),
told to stop (SIGTERM, SIGINT), caught in the middle of a save, and refused room on the disk. What they leave must be
the same to the bit: every file of the index, every logged loss, and the final state; and no half-written file remains.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from processes import RAGJAX, environment, logged, start
from world import make_world

from ragjax.checkpoint import Checkpoints
from ragjax.experiment import load_experiment
from ragjax.index import MANIFEST
from ragjax.rag import open_rag
from ragjax.step import initial_state

SETTINGS = ["train.dropout=0.1", "train.save_every=2", "index.shard=4"]
STOPPED = {signal.SIGTERM: 143, signal.SIGINT: 130}
PATIENCE = 30.0  # seconds in which a process that was told to stop has stopped, and the others when one has died


@dataclass
class Summary:
    """What was done to it, and what became of it."""

    kills: Counter[str] = field(default_factory=Counter)
    started: int = 0
    repeated: int = 0  # steps that were trained, and lost before they were saved
    slowest_stop: float = 0.0  # seconds between a signal and the end
    differences: list[str] = field(default_factory=list)


class Soak:
    """One folder with a world, an undisturbed and a disturbed run."""

    def __init__(self, folder: Path, seed: int, steps: int, processes: int) -> None:
        self.random = random.Random(seed)
        self.world = make_world(folder / "world")
        self.steps, self.processes = steps, processes
        self.summary = Summary()
        self.takes: dict[str, float] = {}  # seconds, undisturbed

    def begin(self, command: str, name: str, limit: int | None = None) -> list[subprocess.Popen]:
        """`ragjax COMMAND` into the run `name`; `limit` is the largest file that it may write, in KiB."""
        run = self.world.parent / name
        settings = [f"output={run}", f"index.folder={run}/index", f"train.steps={self.steps}", *SETTINGS]
        arguments = [command, str(self.world / "config.yaml"), *settings]
        self.summary.started += 1
        if self.processes > 1 and limit is None:
            return start(self.world, self.processes, *arguments)
        limited = [] if limit is None else ["bash", "-c", f'ulimit -f {limit} && exec "$@"', "bash"]
        process = subprocess.Popen(
            [*limited, *RAGJAX, *arguments],
            env=environment(self.world, 2 * self.processes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return [process]

    def undisturbed(self) -> None:
        for command in ("index", "train"):
            begun = time.monotonic()
            for process in self.begin(command, "whole"):
                _, err = process.communicate()
                assert process.returncode == 0, err
            self.takes[command] = time.monotonic() - begun

    def disturbed(self, command: str, kills: int) -> None:
        """Starts the command again and again, each time to be killed, and the last time not."""
        run = self.world.parent / "disturbed"
        for _ in range(kills):
            before = len(logged(run))
            faults = [self.kill, self.kill, self.stop, self.kill_in_a_save if command == "train" else self.kill]
            fault = self.random.choice(faults)
            if command == "train" and self.random.random() < 0.12:
                self.random.choice([self.fill_the_disk, self.fill_the_disk, self.refuse_to_write])()
                continue
            processes = self.begin(command, "disturbed")
            kind = fault(processes, run)
            self.summary.kills[f"{command}: {kind}"] += 1
            if command == "train":
                self.summary.repeated += max(0, max(before, len(logged(run))) - newest(run / "checkpoints"))
            elif (run / "index" / MANIFEST).exists():  # once more
                self.compare_index()
                shutil.rmtree(run / "index")
        for process in self.begin(command, "disturbed"):
            _, err = process.communicate()
            assert process.returncode == 0, err

    def kill(self, processes: list[subprocess.Popen], run: Path) -> str:
        """At any moment, imports and compilation included."""
        return self._send(processes, signal.SIGKILL, "SIGKILL", self.some_time(run))

    def kill_in_a_save(self, processes: list[subprocess.Popen], run: Path) -> str:
        def saving() -> bool:
            return any((run / "checkpoints").glob("*orbax-checkpoint-tmp*"))

        return self._send(processes, signal.SIGKILL, "SIGKILL during a save", saving)

    def stop(self, processes: list[subprocess.Popen], run: Path) -> str:
        number = self.random.choice([signal.SIGTERM, signal.SIGINT])
        return self._send(processes, number, number.name, self.some_time(run))

    def some_time(self, run: Path) -> Callable[[], bool]:
        """After some steps more and a moment, or by the clock; an index has no steps."""
        log, more, moment = run / "train.jsonl", self.random.randint(1, 6), self.random.uniform(0.0, 0.3)
        earliest = 0.0 if self.processes == 1 else 4.0  # for one that was never there the others wait five minutes
        limit = time.monotonic() + earliest + self.random.uniform(0.0, 0.8 * self.takes["index"])
        if not (run / "index" / MANIFEST).exists() or self.random.random() < 0.3:
            return lambda: time.monotonic() > limit
        first = lines(log)

        def now() -> bool:
            if lines(log) < first + more:
                return False
            time.sleep(moment)
            return True

        return now

    def _send(
        self,
        processes: list[subprocess.Popen],
        number: signal.Signals,
        name: str,
        now: Callable[[], bool],
    ) -> str:
        """Sends a signal to one of the processes as soon as `now` says so, and waits for all of them."""
        while not now() and any(process.poll() is None for process in processes):
            time.sleep(0.002)
        sent = time.monotonic()
        victim = self.random.choice(processes)
        finished = victim.poll() is not None
        victim.send_signal(number)
        limit = PATIENCE + (60.0 if number is signal.SIGKILL and len(processes) > 1 else 0.0)
        for process in processes:
            try:
                _, err = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                self.summary.differences.append(f"{name}: still there after {limit} s")
                process.kill()
                process.communicate()
                continue
            if not finished:
                expected = {0, -number, STOPPED.get(number, -number)}
                if process is not victim:
                    expected |= {75, -signal.SIGABRT}
                if process.returncode not in expected:
                    self.summary.differences.append(f"{name}: ended with {process.returncode}: {err[-400:]}")
        if number is not signal.SIGKILL:
            self.summary.slowest_stop = max(self.summary.slowest_stop, time.monotonic() - sent)
        return f"{name} after the end" if finished else name

    def fill_the_disk(self) -> None:
        """As on a full disk, no file grows beyond some kilobytes: it says so, and leaves nothing behind."""
        [process] = self.begin("train", "disturbed", limit=self.random.choice([20, 60]))
        _, err = process.communicate()
        self.summary.kills["train: no room on the disk"] += 1
        if process.returncode != 2 or "Traceback" in err:
            self.summary.differences.append(f"full disk: ended with {process.returncode}: {err[-400:]}")

    def refuse_to_write(self) -> None:
        """An output that cannot be written is refused in one line."""
        command = [
            *RAGJAX,
            "train",
            str(self.world / "config.yaml"),
            "output=/proc/ragjax",
            f"index.folder={self.world.parent}/whole/index",
        ]
        done = subprocess.run(command, env=environment(self.world, 1), capture_output=True, text=True)
        self.summary.kills["train: an output that cannot be written"] += 1
        if done.returncode != 2 or "/proc/ragjax: cannot be created" not in done.stderr:
            self.summary.differences.append(f"/proc/ragjax: ended with {done.returncode}: {done.stderr[-400:]}")

    def compare_index(self) -> None:
        ours, theirs = (files(self.world.parent / run / "index") for run in ("disturbed", "whole"))
        differ = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
        self.summary.differences += [f"index: {name}" for name in differ]

    def compare(self) -> None:
        """Adds to the differences whatever the disturbed run has otherwise than the undisturbed one."""
        whole, disturbed = self.world.parent / "whole", self.world.parent / "disturbed"
        differ, said = self.summary.differences, len(logged(whole))
        if logged(whole) != logged(disturbed):
            differ.append(f"train.jsonl: {said} lines and {len(logged(disturbed))}, or other numbers")
        self.compare_index()
        if not same_state(whole, disturbed, self.steps):
            differ.append("the final state")
        broken = [
            path for path in disturbed.rglob("*") if "partial" in path.name or "orbax-checkpoint-tmp" in path.name
        ]
        broken += list(disturbed.glob("damaged-checkpoints/*"))
        differ += [f"left behind: {path.relative_to(disturbed)}" for path in broken]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def newest(checkpoints: Path) -> int:
    return max((int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()), default=0)


def same_state(one: Path, other: Path, step: int) -> bool:
    """Whether two runs ended in the same state, to the bit."""

    def leaves(run: Path) -> list[bytes]:
        rag = open_rag(load_experiment(run))
        like = jax.eval_shape(lambda params: initial_state(rag, params), rag.abstract_params())
        with Checkpoints(run / "checkpoints", writing=False) as checkpoints:
            state = checkpoints.restore(step, like)
        return [raw(leaf) for leaf in jax.tree.leaves(state)]

    def raw(leaf: jax.Array) -> bytes:
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    return leaves(one) == leaves(other)


def soak(folder: Path, kills: int, seed: int, processes: int = 1, steps: int | None = None) -> Summary:
    """A quarter of the kills hits the index, the rest the training."""
    of_index = max(1, kills // 4)
    whole = Soak(folder, seed, steps or 4 * kills, processes)
    whole.undisturbed()
    whole.disturbed("index", of_index)
    whole.disturbed("train", kills - of_index)
    whole.compare()
    return whole.summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, help="of the training (default: four times as many as kills)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    begun = time.monotonic()
    summary = soak(folder, options.kills, options.seed, options.processes, options.steps)
    print(f"{sum(summary.kills.values())} disturbances in {(time.monotonic() - begun) / 60:.0f} min:")
    print(json.dumps(summary.kills, indent=1))
    print(f"processes started {summary.started}, steps repeated {summary.repeated}")
    print(f"slowest stop after SIGTERM or SIGINT: {summary.slowest_stop:.1f} s")
    print(f"differences found: {len(summary.differences)}")
    for difference in summary.differences:
        print(f"  {difference}")
    if not summary.differences:
        shutil.rmtree(folder)
    return int(bool(summary.differences))


if __name__ == "__main__":
    sys.exit(main())
