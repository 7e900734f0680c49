"""Kills ragjax at random moments until it has done its work all the same: `python tests/helpers/soak.py --kills 120`.

The index is built and a model trained once undisturbed. Then the same is done while processes are killed (SIGKILL),
told to stop (SIGTERM, SIGINT), caught in the middle of a save, and refused room on the disk. What they leave must be
the same to the bit: every file of the index, every logged loss, and the final state; and no half-written file remains.

With `--interrupts 200` so many builds of an index get a SIGINT, each at a random moment, and must all end with 130.
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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from processes import RAGJAX, environment, logged, start
from world import make_world

from ragjax.rag import load_pipeline
from ragjax.retrieval.index import MANIFEST
from ragjax.runs.checkpointer import Checkpointer
from ragjax.runs.run_dir import load_run_config
from ragjax.training.state import init_train_state

SETTINGS = ["train.dropout=0.1", "train.save_every=2", "index.shard_size=4"]
STOPPED = {signal.SIGTERM: 143, signal.SIGINT: 130}
PATIENCE = 30.0  # seconds in which a process that was told to stop has stopped, and the others when one has died


@dataclass
class Summary:
    """What was done to it, and what became of it."""

    kills: Counter[str] = field(default_factory=Counter)
    interrupted: Counter[int] = field(default_factory=Counter)  # builds by exit code
    started: int = 0
    repeated: int = 0  # steps that were trained, and lost before they were saved
    slowest_stop: float = 0.0  # seconds between a signal and the end
    differences: list[str] = field(default_factory=list)


class Soak:
    """One folder with a world, an undisturbed and a disturbed run; `devices` are those of one process alone."""

    def __init__(self, folder: Path, seed: int, steps: int, processes: int, devices: int) -> None:
        self.random = random.Random(seed)
        self.world = make_world(folder / "world")
        self.run = folder / "disturbed"
        self.steps, self.processes = steps, processes
        self.devices = devices if processes == 1 else 2 * processes
        self.summary = Summary()
        self.takes: dict[str, float] = {}  # seconds, undisturbed

    def begin(self, command: str, name: str, limit: int | None = None) -> list[subprocess.Popen]:
        """`ragjax COMMAND` into the run `name`; `limit` is the largest file that it may write, in KiB."""
        run = self.world.parent / name
        settings = [f"output={run}", f"index.path={run}/index", f"train.steps={self.steps}", *SETTINGS]
        arguments = [command, str(self.world / "config.yaml"), *settings]
        self.summary.started += 1
        if self.processes > 1 and limit is None:
            return start(self.world, self.processes, *arguments)
        limited = [] if limit is None else ["bash", "-c", f'ulimit -f {limit} && exec "$@"', "bash"]
        process = subprocess.Popen(
            [*limited, *RAGJAX, *arguments],
            env=environment(self.world, self.devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return [process]

    def undisturbed(self, command: str) -> None:
        begun = time.monotonic()
        for process in self.begin(command, "whole"):
            _, err = process.communicate()
            assert process.returncode == 0, err
        self.takes[command] = time.monotonic() - begun

    def disturbed(self, command: str, kills: int) -> None:
        """Starts the command again and again, each time to be hit by a fault, and the last time not."""
        faults = {
            "index": {self.kill: 3, self.stop: 1},
            "train": {
                self.kill: 10,
                self.stop: 5,
                self.kill_in_a_save: 4,
                self.kill_before_the_checksums: 4,
                self.fill_the_disk: 2,
                self.refuse_to_write: 1,
            },
        }[command]
        for fault in self.random.choices(list(faults), list(faults.values()), k=kills):
            before = len(logged(self.run))
            self.summary.kills[f"{command}: {fault(command)}"] += 1
            if (self.run / "train.jsonl").exists() and fault not in (self.fill_the_disk, self.refuse_to_write):
                self.summary.repeated += max(0, max(before, len(logged(self.run))) - self.newest())
            if command == "index" and (self.run / "index" / MANIFEST).exists():  # once more
                self.compare_index()
                shutil.rmtree(self.run / "index")
        for process in self.begin(command, self.run.name):
            _, err = process.communicate()
            assert process.returncode == 0, err

    # faults: each starts the command, does it some harm, and tells what

    def kill(self, command: str) -> str:
        """At any moment, imports and compilation included."""
        return self._send(command, signal.SIGKILL, "SIGKILL", self.some_time())

    def kill_in_a_save(self, command: str) -> str:
        def saving() -> set[int]:
            inodes = set()
            for path in (self.run / "checkpoints").glob("*orbax-checkpoint-tmp*"):
                with suppress(FileNotFoundError):
                    inodes.add(path.stat().st_ino)
            return inodes

        there = saving()  # what an earlier kill has left
        return self._send(command, signal.SIGKILL, "SIGKILL during a save", lambda: bool(saving() - there))

    def kill_before_the_checksums(self, command: str) -> str:
        """When a new checkpoint has its name, and its files have no sums yet."""

        def unsummed() -> set[str]:
            every = [path for path in (self.run / "checkpoints").glob("*") if path.name.isdigit()]
            return {path.name for path in every if not (path / "checksums.json").exists()}

        there = unsummed()
        return self._send(command, signal.SIGKILL, "SIGKILL before the checksums", lambda: bool(unsummed() - there))

    def stop(self, command: str) -> str:
        number = self.random.choice([signal.SIGTERM, signal.SIGINT])
        return self._send(command, number, number.name, self.some_time())

    def fill_the_disk(self, command: str) -> str:
        """As on a full disk, no file grows beyond some kilobytes: it says so, and leaves nothing behind."""
        if self.newest() == self.steps:
            return "no room on the disk after the end"  # nothing is left to write
        [process] = self.begin(command, self.run.name, limit=self.random.choice([20, 60]))
        _, err = process.communicate()
        if process.returncode != 2 or "Traceback" in err:
            self.summary.differences.append(f"full disk: ended with {process.returncode}: {err[-400:]}")
        return "no room on the disk"

    def refuse_to_write(self, command: str) -> str:
        """An output that cannot be written is refused in one line."""
        index = f"index.path={self.world.parent}/whole/index"
        arguments = [*RAGJAX, command, str(self.world / "config.yaml"), "output=/proc/ragjax", index]
        done = subprocess.run(arguments, env=environment(self.world, 1), capture_output=True, text=True)
        if done.returncode != 2 or "/proc/ragjax: cannot be created" not in done.stderr:
            self.summary.differences.append(f"/proc/ragjax: ended with {done.returncode}: {done.stderr[-400:]}")
        return "an output that cannot be written"

    def some_time(self) -> Callable[[], bool]:
        """After some steps more and a moment, or by the clock; an index has no steps."""
        run = self.run
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

    def _send(self, command: str, number: signal.Signals, name: str, now: Callable[[], bool]) -> str:
        """Sends a signal to one of the processes as soon as `now` says so, and waits for all of them."""
        processes = self.begin(command, self.run.name)
        while not now() and any(process.poll() is None for process in processes):
            time.sleep(0.002)
        sent = time.monotonic()
        victim = self.random.choice(processes)
        finished = victim.poll() is not None or is_ending(victim.pid)
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
                expected = {-number, STOPPED.get(number, -number)}
                if len(processes) > 1:  # JAX looks for the signal once a step: the last one ends as if there were none
                    expected |= {0} if process is victim else {0, 75, -signal.SIGABRT}
                    if number is signal.SIGINT and process is not victim:  # it hears of it as of a SIGTERM
                        expected.add(STOPPED[signal.SIGTERM])
                if process.returncode not in expected:
                    self.summary.differences.append(f"{name}: ended with {process.returncode}: {err[-400:]}")
        if number is not signal.SIGKILL:
            self.summary.slowest_stop = max(self.summary.slowest_stop, time.monotonic() - sent)
        return f"{name} after the end" if finished else name

    def interrupt(self, count: int) -> None:
        """SIGINT to so many builds, at any moment from when Python is up to the end; nothing half-written stays."""
        begun = time.monotonic()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        up, takes, index = time.monotonic() - begun, self.takes["index"], self.world.parent / "interrupted" / "index"
        while self.summary.interrupted.total() < count:
            shutil.rmtree(index.parent, ignore_errors=True)
            begun, [process] = time.monotonic(), self.begin("index", index.parent.name)
            try:
                process.wait(self.random.uniform(up, takes))
                ended = True
            except subprocess.TimeoutExpired:
                ended = is_ending(process.pid)
                process.send_signal(signal.SIGINT)
            sent = time.monotonic()
            _, err = process.communicate()
            if ended and process.returncode == 0:  # it was done before its turn
                takes = sent - begun
                continue
            self.summary.interrupted[process.returncode] += 1
            self.summary.slowest_stop = max(self.summary.slowest_stop, time.monotonic() - sent)
            left = [path for path in index.parent.rglob("*") if "partial" in path.name and path.parent != index.parent]
            if process.returncode not in (130, -signal.SIGINT) or left or "Traceback" in err or "ignored" in err:
                told = f"SIGINT after {sent - begun:.2f} s: ended with {process.returncode}, left {left}: {err[-2000:]}"
                self.summary.differences.append(told)
            if (index / MANIFEST).exists():
                self.compare_index(index)

    def compare_index(self, index: Path | None = None) -> None:
        ours, theirs = files(index or self.run / "index"), files(self.world.parent / "whole" / "index")
        differ = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
        self.summary.differences += [f"index: {name}" for name in differ]

    def newest(self) -> int:
        return max((int(path.name) for path in (self.run / "checkpoints").glob("*") if path.name.isdigit()), default=0)

    def compare(self) -> None:
        """Adds to the differences whatever the disturbed run has otherwise than the undisturbed one."""
        whole, disturbed = self.world.parent / "whole", self.run
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


def is_ending(pid: int) -> bool:
    """Whether the kernel is already taking the process apart, so that no signal reaches it (PF_EXITING in proc(5))."""
    return bool(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6]) & 0x4)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_state(one: Path, other: Path, step: int) -> bool:
    """Whether two runs ended in the same state, to the bit."""

    def leaves(run: Path) -> list[bytes]:
        rag = load_pipeline(load_run_config(run))
        like = jax.eval_shape(lambda params: init_train_state(rag, params), rag.abstract_params())
        with Checkpointer(run / "checkpoints", writing=False) as checkpoints:
            state = checkpoints.restore(step, like)
        return [raw(leaf) for leaf in jax.tree.leaves(state)]

    def raw(leaf: jax.Array) -> bytes:
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    return leaves(one) == leaves(other)


def soak(
    folder: Path,
    kills: int,
    seed: int,
    processes: int = 1,
    devices: int = 1,
    steps: int | None = None,
    interrupts: int = 0,
) -> Summary:
    """A quarter of the kills hits the index, the rest the training."""
    of_index = max(1, kills // 4)
    whole = Soak(folder, seed, steps or 4 * max(1, kills), processes, devices)
    whole.undisturbed("index")
    whole.interrupt(interrupts)
    if kills:
        whole.undisturbed("train")
        whole.disturbed("index", of_index)
        whole.disturbed("train", kills - of_index)
        whole.compare()
    return whole.summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--interrupts", type=int, default=0, help="of builds of an index, by one process")
    parser.add_argument("--steps", type=int, help="of the training (default: four times as many as kills)")
    parser.add_argument("--processes", type=int, default=1, help="of two devices each, where there are several")
    parser.add_argument("--devices", type=int, default=1, help="of one process")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.interrupts and options.processes > 1:
        parser.error("--interrupts is for one process")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    begun = time.monotonic()
    of = options
    summary = soak(folder, of.kills, of.seed, of.processes, of.devices, of.steps, of.interrupts)
    print(f"{summary.kills.total()} disturbances in {(time.monotonic() - begun) / 60:.0f} min:")
    print(json.dumps(summary.kills, indent=1))
    print(f"builds interrupted, by exit code (negative: by the signal itself): {dict(summary.interrupted)}")
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
