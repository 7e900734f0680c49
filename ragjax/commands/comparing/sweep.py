"""`ragjax sweep`: a run for every combination of some values, one after the other, and what came of them.

OUTPUT/seed=1                          where only seeds differ, or there is one
OUTPUT/train.lora.rank=8/seed=1        where other values do, too: a folder of the runs that `ragjax compare` takes
OUTPUT/index                           one index, for all runs that can share it (unless index.path names another)

Each run is `ragjax index`, `ragjax train` and `ragjax evaluate`, each in a process of its own, so that the devices are
free in between. What is finished is not run again; what was stopped goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ragjax.checkpoints.hub import fingerprint_files
from ragjax.config import Config, index_settings
from ragjax.config.reading import escaped
from ragjax.errors import InputError
from ragjax.evaluation.comparison import Spread, spreads
from ragjax.evaluation.predictions import METRICS
from ragjax.evaluation.run_results import RunResults, read_run_results
from ragjax.files import read_json
from ragjax.pages.wording import rounded
from ragjax.resources import size_text
from ragjax.runs.checkpointer import newest_step
from ragjax.runs.run_dir import check_same_run
from ragjax.signals import listening
from ragjax.terminal import Screen, terminal

SEED = "seed"
LONGEST_NAME = 120
PIECES = re.compile(
    r"""(?P<quoted>"(?:\\.|[^"\\])*"|'[^']*')|(?P<open>[\[{(])|(?P<close>[\]})])|(?P<comma>,)|.""", re.S
)
STAGES = ("index", "train", "evaluate")


@dataclass(frozen=True)
class SweptRun:
    """One run: its configuration, the values that make it another than the others, and how it is started."""

    config: Config
    values: dict[str, str]
    overrides: list[str]

    @property
    def settings(self) -> str:
        """Its values but for the seed: what runs of several seeds have in common."""
        return ",".join(f"{key}={value}" for key, value in self.values.items() if key != SEED)

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end, and evaluated after that as the configuration says."""
        folder = Path(self.config.output)
        if newest_step(folder / "checkpoints") < self.config.train.steps or not (folder / METRICS).is_file():
            return False
        metrics, questions = read_json(folder / METRICS), Path(questions_of(self.config))
        fingerprint = (metrics.get("fingerprints") or {}).get("questions")
        if fingerprint is not None and questions.is_file() and fingerprint != fingerprint_files([questions]):
            return False
        settings = {"trained_steps": self.config.train.steps, "decode": self.config.decode.model_dump(mode="json")}
        settings["evaluate"] = self.config.evaluate.model_dump(mode="json")
        return all(metrics.get(key) == value for key, value in settings.items())


def questions_of(config: Config) -> str:
    """Where the questions of an evaluation come from."""
    return str(getattr(config.questions, config.evaluate.split))


Load = Callable[[Sequence[str]], Config]


def plan_sweep(load: Load, overrides: Sequence[str], fixed: Sequence[str]) -> list[SweptRun]:
    """The runs of a sweep, the seeds of the first values first.

    Args:
        load: Makes the configuration of overrides.
        overrides: KEY=VALUE,VALUE,…; commas within brackets or quotes do not separate values.
        fixed: KEY=VALUE, as they are.

    A seed is a value of its own even where it is the only one: others may follow. Raises `InputError` for values that a
    configuration refuses, several of a key that is given again, and a folder that holds another run.
    """
    values: dict[str, list[str]] = {}
    for key, choices in map(_split, overrides):
        if max(len(choices), len(values.get(key, choices))) > 1 and key in values:
            raise InputError(f"{key}: is given twice; write all of its values together, as seed=1,2,3")
        values[key] = choices
    swept = {key: choices for key, choices in values.items() if len(choices) > 1 or key == SEED}
    if SEED in swept:
        swept[SEED] = swept.pop(SEED)  # the last
    if "output" in swept:
        raise InputError("output: names the folder of all runs; give one")
    same = [*fixed, *(f"{key}={choices[0]}" for key, choices in values.items() if key not in swept)]
    chosen = [dict(zip(swept, combination, strict=True)) for combination in itertools.product(*swept.values())]
    given = [[*same, *(f"{key}={value}" for key, value in choice.items())] for choice in chosen]
    configs = [load(one) for one in given]
    if len(outputs := {config.output for config in configs}) > 1:
        raise InputError(f"output: is another for each run ({', '.join(sorted(outputs))}); set output=FOLDER")
    output = Path(configs[0].output)
    if swept and (output / "config.yaml").exists():
        raise InputError(f"{output}: is a run itself; set output=FOLDER to one for all runs of the sweep")
    runs, sharing = [], list(configs)
    if SEED in swept:  # with another seed, too, an index stays where it is
        sharing.append(load([*given[-1], f"{SEED}={(configs[-1].seed + 1) % 2**32}"]))
    for config, choice, one in zip(configs, chosen, given, strict=True):
        places = {"output": str(output / _folder(choice)), "index.path": _index_path(config, sharing)}
        own = [override for override in one if override.partition("=")[0] not in places]
        own += [f"{key}={json.dumps(escaped(value), ensure_ascii=False)}" for key, value in places.items()]
        runs.append(SweptRun(load(own), choice, own))
        check_same_run(runs[-1].config)
    return runs


def _split(override: str) -> tuple[str, list[str]]:
    """The key, and its values: what stands between commas that are in no brackets and no quotes."""
    key, sign, text = override.partition("=")
    if not sign:
        raise InputError(f"{override!a}: values are written key=value,value, for example seed=1,2,3")
    values, depth = [""], 0
    for piece in PIECES.finditer(text):
        depth += (piece.lastgroup == "open") - (piece.lastgroup == "close")
        if piece.lastgroup == "comma" and depth == 0:
            values.append("")
        else:
            values[-1] += piece.group()
    if len(set(values)) < len(values):
        raise InputError(f"{override!a}: names a value twice")
    return key, values


def _folder(choice: dict[str, str]) -> Path:
    """The folder of a run: what its values are, and within that its seed."""
    others = {key: value for key, value in choice.items() if key != SEED}
    seed = {key: value for key, value in choice.items() if key == SEED}
    return Path(*(_name(part) for part in (others, seed) if part))


def _name(choice: dict[str, str]) -> str:
    """As a folder's name; a digest keeps apart what it cannot hold."""
    name = ",".join(f"{key}={value}" for key, value in choice.items())
    plain = re.sub(r"[^\w.,=+-]", "_", name)[:LONGEST_NAME]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _index_path(config: Config, configs: Sequence[Config]) -> str:
    """Where the index of a run is: that of all runs if they can share it, else one for each of its kind."""
    path, settings = config.index.path, index_settings(config)
    if all(other.index.path != path or index_settings(other) == settings for other in configs):
        return path
    return f"{path}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"


def check_launcher(launcher: str | None) -> None:
    """Raises `InputError` for a launcher that cannot be started here."""
    try:
        words = ["ragjax"] if launcher is None else shlex.split(launcher)
    except ValueError as error:
        raise InputError(f"--launcher: {launcher!a} is no command of a shell ({error})") from None
    if launcher is not None and not (words and shutil.which(words[0])):
        raise InputError(f"--launcher: {launcher!a} names no program that can be run here; give its path")


def commands(run: SweptRun, config: str, launcher: str | None = None) -> list[list[str]]:
    """What runs it: the arguments of `ragjax` for each stage, or else those of `launcher`, which runs all of them."""
    if launcher is not None:
        return [[*shlex.split(launcher), config, *run.overrides]]
    return [["ragjax", stage, config, *run.overrides] for stage in STAGES]


def print_commands(runs: Sequence[SweptRun], config: str, launcher: str | None) -> None:
    """A line for each run that is not finished, as a shell reads it."""
    for run in runs:
        if not run.is_finished:
            print(" && ".join(map(shlex.join, commands(run, config, launcher))))


def call(command: Sequence[str]) -> int:
    """Runs a command in a process of its own, with its output on standard error; tells time and memory; its exit code.

    A signal that comes meanwhile is passed on, once: training saves then, and ends.
    """
    program = [sys.executable, "-m", "ragjax"] if command[0] == "ragjax" else [command[0]]
    began, passed_on = time.monotonic(), False
    child: subprocess.Popen[bytes] | None = None

    def pass_on() -> None:
        nonlocal passed_on
        if child is not None and not passed_on:
            passed_on = True
            child.send_signal(signals.came)

    with listening() as signals:
        before, signals.instead = signals.instead, pass_on
        try:
            child = subprocess.Popen([*program, *command[1:]], stdout=2, process_group=0)  # Ctrl-C comes here alone
            if signals.came:  # while the command started
                pass_on()
            while True:
                try:
                    _, status, usage = os.wait4(child.pid, 0)
                    break
                except KeyboardInterrupt:  # the second one
                    child.send_signal(signal.SIGINT)
        finally:
            signals.instead = before
    child.returncode = code = os.waitstatus_to_exitcode(status)
    memory = size_text(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    terminal.print(f"{shlex.join(command[:2])}: {time.monotonic() - began:.0f} s, at most {memory} of memory resident")
    return code if code >= 0 else 128 - code


def sweep(runs: Sequence[SweptRun], config: str, launcher: str | None = None, call: Callable[..., int] = call) -> int:
    """Runs what is not finished, one after the other; returns 0, or the exit code of what failed first.

    A run that fails does not keep the others from running; a signal does.
    """
    failed, built = 0, set[str]()
    for number, run in enumerate(runs, 1):
        about = f"run {number} of {len(runs)}: {run.config.output}"
        if run.is_finished:
            terminal.print(f"{about}: finished before", soft_wrap=True)
            continue
        terminal.print(about, soft_wrap=True)
        for command in commands(run, config, launcher):
            if command[:2] == ["ragjax", "index"] and run.config.index.path in built:
                continue
            if code := call(command):
                failed = failed or code
                terminal.print(f"{about}: ended with exit code {code}", soft_wrap=True)
                if code > 128:
                    return code
                break
            built.add(run.config.index.path)
    return failed


@dataclass(frozen=True)
class Setting:
    """Runs that differ by their seed alone: their folders, and what was measured."""

    settings: str
    runs: list[str]
    measures: dict[str, Spread]


def results(runs: Sequence[SweptRun]) -> list[Setting]:
    """What the finished runs came to, for each setting. Raises `InputError` for damaged files."""
    by_settings: dict[str, list[RunResults]] = {}
    for run in runs:
        if run.is_finished:
            by_settings.setdefault(run.settings, []).append(
                read_run_results(Path(run.config.output), run.config.output)
            )
    return [Setting(name, [run.name for run in of], spreads(of)) for name, of in by_settings.items()]


def print_results(found: Sequence[Setting], count: int, as_json: bool) -> None:
    """For each setting every measure: the runs', their mean, its interval; `count` is the number of runs."""
    if as_json:
        print(json.dumps([asdict(of) for of in found]))
        return
    screen = Screen(highlight=False, markup=False)
    for of in found:
        table = Table(of.settings or "measure", "runs", "mean", "deviation", "95 % interval", box=box.SIMPLE_HEAD)
        for measure, spread in of.measures.items():
            each = " ".join(map(rounded, spread.runs))
            table.add_row(measure, each, *map(rounded, (spread.mean, spread.deviation, [spread.low, spread.high])))
        screen.print(table)
    if (finished := sum(len(of.runs) for of in found)) < count:
        screen.print(f"{finished} of {count} runs are finished")


def run_sweep(load: Load, options: Any) -> int:
    """The command: plans, runs or prints, and tells the results."""
    runs = plan_sweep(load, options.overrides, options.set)
    if options.dry_run:
        print_commands(runs, options.config, options.launcher)
        return 0
    check_launcher(options.launcher)
    code = sweep(runs, options.config, options.launcher)
    if code <= 128:
        print_results(results(runs), len(runs), options.json)
    return code
