"""Real processes over localhost: the same numbers however many there are, and an end for all when one is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from processes import RAGJAX, ROOT, ends, environment, logged, start, wait_for_step
from soak import same_state
from trained import files

from ragjax.cli import main

SLOW = pytest.mark.slow
STEPS = 10
SETTINGS = (
    f"train.steps={STEPS} train.dropout=0.1 train.save_every=5 train.dev_questions=3 evaluate.max_questions=5".split()
)
SETTINGS += ["evaluate.max_untrained_questions=0", "evaluate.closed_book=false"]


def launch(world: Path, count: int, devices: int, output: Path, *settings: str, stages: str = "train evaluate") -> str:
    """Trains and evaluates in `count` processes by launch/processes.sh; what it wrote on standard error."""
    command = [str(ROOT / "launch/processes.sh"), str(count), str(world / "config.yaml"), f"output={output}"]
    env = environment(world, devices) | {"DEVICES": str(devices), "STAGES": stages}
    done = subprocess.run([*command, *SETTINGS, *settings], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Gloo" not in done.stdout + done.stderr
    return done.stderr


def assert_same(run: Path, reference: Path, evaluated: bool = True) -> None:
    """The same losses to 1e-5, and the same answers."""
    every = [logged(run), logged(reference)]
    ours, theirs = ([line for line in lines if "loss" in line] for lines in every)
    measured = [{line["step"]: line["dev_loss"] for line in lines if "dev_loss" in line} for lines in every]
    assert all(measured[0][step] == pytest.approx(loss, rel=1e-5) for step, loss in measured[1].items())
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["recall"] == other["recall"] and one["distinct_documents"] == other["distinct_documents"]
        assert one == pytest.approx(other, rel=1e-3)
    if not evaluated:
        return
    predicted = [[json.loads(line) for line in (r / "predictions.jsonl").open()] for r in (run, reference)]
    assert len(predicted[0]) == len(predicted[1]) == 5
    for a, b in zip(*predicted, strict=True):
        assert (a["id"], a["answers"]) == (b["id"], b["answers"])
        assert a["p_answer"] == pytest.approx(b["p_answer"], rel=1e-3)
    metrics = [json.loads((r / "metrics.json").read_text())["models"]["trained"] for r in (run, reference)]
    assert metrics[0]["recall@1"] == metrics[1]["recall@1"]
    assert metrics[0]["top_k_mass"] == pytest.approx(metrics[1]["top_k_mass"], rel=1e-4)


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One process with one device."""
    folder = tmp_path_factory.mktemp("reference")
    launch(world, 1, 1, folder)
    yield folder


@pytest.mark.parametrize(
    ("processes", "devices", "settings", "stages"),
    [
        (2, 2, [], "train"),
        (1, 8, [], "train evaluate"),
        (2, 4, ["mesh.fsdp=true", "mesh.model=2"], "train evaluate"),
        (4, 2, ["mesh.fsdp=true"], "train"),
        (4, 2, ["mesh.model=8"], "train evaluate"),
        (3, 2, ["mesh.model=3"], "train evaluate"),  # the second process has parts of both rows
    ],
)
@SLOW
def test_the_same_numbers_on_any_layout(
    world: Path, reference: Path, tmp_path: Path, processes: int, devices: int, settings: list[str], stages: str
) -> None:
    """Each number of processes and each way to split evaluates once: an answer follows from what was trained.

    Two processes with `mesh.fsdp` are those whose checkpoint is damaged below.
    """
    assert_trained(launch(world, processes, devices, tmp_path, *settings, stages=stages))
    assert_same(tmp_path, reference, "evaluate" in stages)


def assert_trained(err: str) -> None:
    assert len(re.findall(f"train: {STEPS}/{STEPS} steps.* in all", err)) == 1, "only one process tells of progress"


@SLOW
def test_a_machine_of_two_is_taken_away_and_one_goes_on(world: Path, reference: Path, tmp_path: Path) -> None:
    """SIGTERM to either process stops both at one step, saved; one process goes on from there with one device."""
    arguments = ["train", str(world / "config.yaml"), f"output={tmp_path}", *SETTINGS, "train.save_minutes=1e-9"]
    processes = start(world, 2, *arguments)
    wait_for_step(tmp_path, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    told = ends(processes, within=30)
    assert [code for code, _ in told] == [143, 143], told
    step = int(logged(tmp_path)[-1]["step"])
    assert step < STEPS and (tmp_path / "checkpoints" / str(step)).is_dir()
    assert all(f"stopped and saved at step {step}" in err for _, err in told)
    assert "going on from step" in launch(world, 1, 1, tmp_path)
    assert_same(tmp_path, reference)


@SLOW
def test_a_machine_that_is_taken_away_before_a_run_goes_on(world: Path, tmp_path: Path) -> None:
    """SIGTERM comes when the checkpoint is read, and no step has been taken: both stop after the first one."""
    arguments = ["train", str(world / "config.yaml"), f"output={tmp_path}", *SETTINGS, "train.steps=100000"]
    assert main([*arguments, "train.steps=5"]) == 0
    processes = start(world, 2, *arguments)
    assert processes[0].stderr is not None
    while "going on from step 5" not in processes[0].stderr.readline():
        assert processes[0].poll() is None
    processes[1].send_signal(signal.SIGTERM)
    told = ends(processes, within=60)
    assert [code for code, _ in told] == [143, 143], told
    assert all("stopped and saved at step 6" in err for _, err in told), told


@SLOW
def test_a_damaged_checkpoint_is_passed_over_by_all(world: Path, reference: Path, tmp_path: Path) -> None:
    """Though one has read its own part of it well; before and after, the numbers are those of one process."""
    assert_trained(launch(world, 2, 2, tmp_path, "mesh.fsdp=true"))
    assert_same(tmp_path, reference)
    newest = tmp_path / "checkpoints" / str(STEPS)
    parts = [path for path in newest.rglob("*process_1/d/*") if path.is_file()]
    assert parts
    for path in parts:
        path.write_bytes(b"?" * path.stat().st_size)
    err = launch(world, 2, 2, tmp_path, "mesh.fsdp=true", stages="train")
    assert err.count(f"{newest}: the checkpoint is incomplete or damaged") == 1 and "going on from step 5" in err
    assert [path.name for path in (tmp_path / "damaged-checkpoints").iterdir()] == [f"{STEPS}-1"]
    assert_same(tmp_path, reference, evaluated=False)


@SLOW
def test_an_evaluation_that_was_killed_goes_on_whatever_the_number_of_processes(world: Path, tmp_path: Path) -> None:
    """Two begin, one is killed, and three go on. No batch is made twice, and the files come out the same.

    But for last bits: of 30 passages a device of four has eight, one of six only five, and sums them in another order.
    """
    settings = ["evaluate.split=train", "evaluate.batch_size=1", "evaluate.closed_book=false"]

    def arguments(output: str) -> list[str]:
        return ["evaluate", str(world / "config.yaml"), f"output={tmp_path / output}", *settings]

    def kept() -> int:
        return sum(path.read_bytes().count(b"answer (") for path in (tmp_path / "pieces").glob("*.partial"))

    processes = start(world, 2, *arguments("pieces"))
    limit = time.monotonic() + 120
    while kept() < 4:
        assert time.monotonic() < limit and all(p.poll() is None for p in processes)
        time.sleep(0.01)
    processes[1].kill()
    ends(processes, within=120)
    before = kept()
    assert 4 <= before <= 10, "batches of two questions, one on each device"
    told = ends(start(world, 3, *arguments("pieces")), within=180)
    assert [code for code, _ in told] == [0, 0, 0], told
    assert "going on with an evaluation that was stopped" in told[0][1]
    [first] = re.findall(r"answer \(untrained\): (\d+)/\d+ questions", told[0][1])
    assert int(first) == 2 * -(-(10 - before) // 3), "its share of what was missing"
    assert [code for code, _ in ends(start(world, 2, *arguments("whole")), within=180)] == [0, 0]
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / of / "predictions.jsonl").open()] for of in ("pieces", "whole")
    )
    assert len(ours) == 20
    for (at, one), (there, other) in zip(*map(jax.tree.leaves_with_path, (ours, theirs)), strict=True):
        assert at == there and one == (pytest.approx(other, rel=1e-4) if isinstance(other, float) else other), at
    assert list((tmp_path / "pieces").glob("*.partial")) == []


@SLOW
def test_the_quickstart_s_models_go_on_on_one_device(tmp_path: Path) -> None:
    """MiniLM and SmolLM2: stopped after the first step and started again, all comes out as it does at once."""
    settings = [
        f"index.path={tmp_path}/index",
        "corpus.max_passages=100",
        "train.steps=4",  # a stop may come two steps after the one that is told
        "train.batch_size=2",
        "train.num_docs=2",
    ]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}

    def begin(command: str, run: str) -> subprocess.Popen:
        arguments = [*RAGJAX, command, str(ROOT / "configs/factbook.yaml"), f"output={tmp_path / run}", *settings]
        return subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True)

    for command in ("index", "train"):
        assert ends([begin(command, "whole")], within=300)[0][0] == 0
    stopped = begin("train", "pieces")
    wait_for_step(tmp_path / "pieces", 1, [stopped])
    stopped.send_signal(signal.SIGTERM)
    [(code, err)] = ends([stopped], within=60)
    assert code == 143 and "stopped and saved at step" in err, err
    [(code, err)] = ends([begin("train", "pieces")], within=300)
    assert code == 0 and "going on from step" in err, err
    assert logged(tmp_path / "pieces") == logged(tmp_path / "whole")
    assert same_state(tmp_path / "pieces", tmp_path / "whole", 4)
    for run in ("pieces", "whole"):
        shutil.rmtree(tmp_path / run)  # a gigabyte each


@SLOW
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_stops_the_other(world: Path, tmp_path: Path, lost: int) -> None:
    arguments = ["train", str(world / "config.yaml"), f"output={tmp_path}", *SETTINGS, "train.steps=100000"]
    processes = start(world, 2, *arguments)
    wait_for_step(tmp_path, 2, processes)
    processes[lost].kill()
    code, err = ends(processes, within=90)[1 - lost]
    assert code in (75, -signal.SIGABRT), (code, err)  # Python's own end, or that of JAX's thread, whichever is first
    assert "lost another process" in err if code == 75 else "another task died" in err, err


def test_processes_that_disagree_say_so_and_stop(world: Path, tmp_path: Path) -> None:
    arguments = ["train", str(world / "config.yaml"), f"output={tmp_path / 'run'}", *SETTINGS]
    told = ends(start(world, 2, *arguments, own={1: ["train.num_docs=2", "seed=7"]}), within=90)
    assert [code for code, _ in told] == [2, 2], told
    for _, err in told:
        assert (
            "process 1 differs: seed is 0 in process 0 and 7 there; train.num_docs is 3 in process 0 and 2 there" in err
        )
        assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@SLOW
def test_what_one_process_finds_wrong_is_told_by_all(world: Path, tmp_path: Path) -> None:
    """The lock and the folder are tried by process 0 alone."""
    shutil.copy(world / "config.yaml", tmp_path / "taken")
    told = ends(start(world, 2, "train", str(world / "config.yaml"), f"output={tmp_path / 'taken'}"), within=90)
    assert [code for code, _ in told] == [2, 2], told
    assert all(f"{tmp_path / 'taken'}: cannot be created" in err and "Traceback" not in err for _, err in told)


@SLOW
def test_two_processes_build_the_same_index(world: Path, tmp_path: Path) -> None:
    """To the byte: here one process with two devices, there two with two each."""

    def arguments(folder: str) -> list[str]:
        return ["index", str(world / "config.yaml"), f"index.path={tmp_path / folder}", "index.shard_size=7"]

    told = ends(start(world, 2, *arguments("two")), within=120)
    assert [code for code, _ in told] == [0, 0], told
    assert main(arguments("one")) == 0
    one, two = (tmp_path / "one", tmp_path / "two")
    assert len(files(one)) == 5 * 6 + 2, "30 passages, seven in a shard of six files, and two files more"
    assert {p.relative_to(one): b for p, b in files(one).items()} == {
        p.relative_to(two): b for p, b in files(two).items()
    }
