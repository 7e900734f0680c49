"""Sweeps: which runs there are, what is run and what is not, and the figures of several seeds beside each other."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import refused
from world import tiny_config

from ragjax.cli import main
from ragjax.commands.comparing.sweep import SweptRun, call, plan_sweep, results, sweep
from ragjax.config import Config, index_settings, load_config
from ragjax.errors import InputError
from ragjax.rag import load_pipeline

Capture = pytest.CaptureFixture[str]
TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def planned(world: Path, output: Path, *overrides: str, fixed: Sequence[str] = ()) -> list[SweptRun]:
    def load(given: Sequence[str]) -> Config:
        return load_config(world / "config.yaml", given)

    return plan_sweep(load, overrides, [f"output={output}", *fixed])


def test_every_combination_has_a_folder(world: Path, tmp_path: Path) -> None:
    """The seed is the last; brackets, quotes and --set keep commas; what a folder's name cannot hold has a digest."""
    runs = planned(
        world,
        tmp_path,
        "seed=1,2",
        "train.steps=7",
        "train.frozen_params=[generator.embed,generator.norm],[]",
        "generator.answer_template=' {answer}, so','{answer}'",
        fixed=["generator.passage_template='{title}, {text}'"],
    )
    found = [(r.config.seed, r.config.train.frozen_params, r.config.generator.answer_template) for r in runs]
    frozen, answers = (("generator.embed", "generator.norm"), ()), (" {answer}, so", "{answer}")
    assert found == [(seed, some, text) for some in frozen for text in answers for seed in (1, 2)]
    assert {run.config.train.steps for run in runs} == {7}
    assert {run.config.generator.passage_template for run in runs} == {"{title}, {text}"}
    folders = [Path(run.config.output).relative_to(tmp_path) for run in runs]
    assert len(set(folders)) == 8 and {folder.name for folder in folders} == {"seed=1", "seed=2"}
    assert {run.config.index.path for run in runs} == {str(world / "index")}
    [alone] = planned(world, tmp_path, "train.steps=7")
    assert alone.config.output == str(tmp_path)
    assert [Path(r.config.output).name for r in planned(world, tmp_path, "train.steps=7,8")] == [
        "train.steps=7",
        "train.steps=8",
    ]


def test_more_seeds_may_follow_one(world: Path, tmp_path: Path) -> None:
    """A run stays in its folder, with its index: also that of the Factbook, whose questions a seed draws."""
    [one] = planned(world, tmp_path, "seed=6")
    assert one.config.output == str(tmp_path / "seed=6") and one.overrides.count("seed=6") == 1
    assert one == planned(world, tmp_path, "seed=6,7")[0]
    drawn = [plan_sweep(lambda given: load_config(TINY, given), [f"seed={n}"], []) for n in ("6", "7,6", "4294967295")]
    assert drawn[0][0] == drawn[1][1] and len({run.config.index.path for runs in drawn for run in runs}) == 3
    [fixed] = planned(world, tmp_path, fixed=["seed=6"])
    assert fixed.config.output == str(tmp_path) and fixed.config.seed == 6


def test_runs_share_an_index_where_they_can(world: Path, tmp_path: Path) -> None:
    runs = planned(world, tmp_path, "index.dtype=float32,bfloat16", "seed=1,2", "index.path=${output}/index")
    paths = [run.config.index.path for run in runs]
    assert paths[0] == paths[1] != paths[2] == paths[3]
    assert all(Path(path).parent == tmp_path and Path(path).name.startswith("index-") for path in paths)
    runs = planned(world, tmp_path, "train.steps=3,4", "index.path=${output}/index")
    assert {run.config.index.path for run in runs} == {str(tmp_path / "index")}


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("retriever.max_passage_tokens", 32, False),
        ("generator.passage_template", "{text}", False),
        ("index.dtype", "bfloat16", False),
        ("corpus.max_passages", 9, False),
        ("index.kind", "approximate", True),
        ("retriever.logit_scale", 3.0, True),
        ("seed", 4, True),
    ],
)
def test_what_an_index_is_built_from(world: Path, key: str, value: object, same: bool) -> None:
    before, after = tiny_config(world), tiny_config(world, **{key.replace(".", "__"): value})
    assert (index_settings(before) == index_settings(after)) is same
    assert (load_pipeline(before).fingerprints == load_pipeline(after).fingerprints) is same


def test_seeds_of_the_factbook() -> None:
    """Its questions are drawn by the run's seed, unless they have one of their own."""
    configs = [load_config(TINY, given) for given in (["seed=1"], ["seed=2"])]
    assert index_settings(configs[0]) != index_settings(configs[1])
    own = [load_config(TINY, [f"seed={n}", "corpus.factbook.seed=5"]) for n in (1, 2)]
    assert index_settings(own[0]) == index_settings(own[1])


def test_what_is_refused(world: Path, run: Path, tmp_path: Path, capsys: Capture) -> None:
    config = str(world / "config.yaml")

    def told(*overrides: str) -> str:
        return refused(capsys, tmp_path, "sweep", config, *overrides)

    assert "'seed=1,1': names a value twice" in told("seed=1,1")
    assert "seed: is given twice" in told("seed=1,2", "seed=3")
    assert "with 'train.steps=0': train.steps is 0" in told("train.steps=3,0")
    assert "output: names the folder of all runs" in told(f"output={tmp_path}/a,{tmp_path}/b")
    assert "output: is another for each run" in told("seed=1,2", f"--set=output={tmp_path}/${{seed}}")
    assert f"{run}: is a run itself" in told("seed=1,2")
    for launcher, why in (("./none tpu", "names no program"), ("", "names no program"), ("a '", "is no command of")):
        assert why in told("seed=1,2", f"output={tmp_path}/new", f"--launcher={launcher}")
    (tmp_path / "seed=1").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "seed=1")
    assert "seed=1: holds another run: " in told("seed=1,2", f"output={tmp_path}")
    with pytest.raises(InputError, match="values are written key=value,value"):
        planned(world, tmp_path, "seed")


def stage_and_run(command: Sequence[str]) -> str:
    output = next(of for of in reversed(command) if of.startswith("output="))
    return f"{command[1]} {Path(json.loads(output.partition('=')[2])).name}"


SETTINGS = ("train.steps=2", "train.num_docs=2", "evaluate.max_questions=3", "evaluate.max_untrained_questions=0")


def here(calls: list[str], stop: str = "") -> Callable[[Sequence[str]], int]:
    """Runs ragjax's commands in this process, and notes them; one is as if a signal had stopped it."""

    def run(command: Sequence[str]) -> int:
        calls.append(stage_and_run(command))
        return 143 if calls[-1] == stop else main(command[1:])

    return run


def test_a_sweep_goes_on_and_tells_the_spread(world: Path, tmp_path: Path, capsys: Capture) -> None:
    config, calls = str(world / "config.yaml"), list[str]()
    runs = planned(world, tmp_path, "seed=1,2", *SETTINGS)
    assert sweep(runs, config, call=here(calls, stop="evaluate seed=2")) == 143
    every = ["index seed=1", "train seed=1", "evaluate seed=1", "train seed=2", "evaluate seed=2"]
    assert calls == every
    [setting] = results(runs)
    assert setting.runs == [str(tmp_path / "seed=1")]
    calls.clear()
    assert sweep(runs, config, call=here(calls)) == 0 and calls == ["index seed=2", *every[3:]]
    capsys.readouterr()
    assert main(["sweep", config, "seed=1,2", *SETTINGS, f"output={tmp_path}", "--json"]) == 0  # all is finished
    [found] = json.loads(capsys.readouterr().out)
    assert found["runs"] == [str(tmp_path / f"seed={n}") for n in (1, 2)]
    metrics = [json.loads((tmp_path / f"seed={n}" / "metrics.json").read_text())["models"]["trained"] for n in (1, 2)]
    f1 = [of["thorough"]["f1"] for of in metrics]
    spread = found["measures"]["thorough: F1"]
    assert spread["runs"] == pytest.approx(f1) and spread["mean"] == pytest.approx(np.mean(f1))
    assert spread["deviation"] == pytest.approx(abs(f1[0] - f1[1]) / np.sqrt(2))
    assert spread["low"] <= spread["mean"] <= spread["high"]
    # what is measured otherwise is measured again, and what is trained otherwise refused
    again = ["evaluate.max_questions=2", f"output={tmp_path}", "--dry-run"]
    assert main(["sweep", config, "seed=1,2", *SETTINGS, *again]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.count("ragjax") for line in lines] == [3, 3] and lines[0][1:3] == ["index", config]
    assert (
        main(["sweep", config, "seed=1,2,3", *SETTINGS, f"output={tmp_path}", "--dry-run", "--launcher=echo of"]) == 0
    )
    [line] = capsys.readouterr().out.splitlines()
    assert shlex.split(line)[:4] == ["echo", "of", config, "train.steps=2"]
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "test.jsonl").write_text("".join((world / "test.jsonl").read_text().splitlines(True)[::-1]))
    other = [f"questions.test={tmp_path}/q/test.jsonl", f"output={tmp_path}", "--dry-run"]
    assert main(["sweep", config, "seed=1,2", *SETTINGS, *other]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2, "other questions are asked again"
    assert "holds another run" in refused(
        capsys, tmp_path, "sweep", config, "seed=1,2", *SETTINGS, f"output={tmp_path}", "train.generator_lr=1"
    )


def test_a_run_that_fails_does_not_stop_the_others(world: Path, tmp_path: Path) -> None:
    runs = planned(world, tmp_path, "seed=1,2,3")
    codes = {"train seed=1": 2, "evaluate seed=2": 1}
    calls = list[str]()

    def failing(command: Sequence[str]) -> int:
        calls.append(stage_and_run(command))
        return codes.get(calls[-1], 0)

    assert sweep(runs, "config.yaml", call=failing) == 2
    assert calls == [
        *("index seed=1", "train seed=1"),
        *("train seed=2", "evaluate seed=2"),
        *("train seed=3", "evaluate seed=3"),
    ]


@pytest.mark.parametrize("starting", [True, False])
def test_signals_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starting: bool) -> None:
    """One that comes to the sweep, even while the command starts, reaches it, and it ends in its own way."""
    script = f"trap 'echo got >> {tmp_path}/got; exit 143' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    start = subprocess.Popen

    def stop() -> None:
        while not (tmp_path / "ready").exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)

    def started(*arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
        child = start(*arguments, **settings)
        thread.start()
        if starting:
            thread.join()
        return child

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", started)
        assert call(["bash", "-c", script]) == 143
    thread.join()
    assert (tmp_path / "got").read_text() == "got\n"
    assert call(["bash", "-c", "exit 3"]) == 3 and call(["bash", "-c", "kill -9 $$"]) == 137
