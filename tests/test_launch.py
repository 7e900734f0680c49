"""The launch scripts: dry runs, and a stand-in for gcloud that takes machines away (there is no cloud here)."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# Each call is noted. `describe` takes the next state from a file, `ssh … kept.sh` the next exit code from another.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$*" | tr '\\n' ' ' >> calls; echo >> calls
next() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$*" in
  *describe*) next states ;;
  *kept.sh*) exit "$(next codes)" ;;
esac
"""


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(LAUNCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_short_and_helps(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 40
    done = run(script.name, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and done.stderr == ""
    nothing = run(script.name)
    assert nothing.returncode == 2 and nothing.stdout == "" and "usage: " in nothing.stderr


def test_dry_runs_print_what_a_shell_would_read() -> None:
    done = run(
        "tpu.sh", "--dry-run", "run", "a.yaml", "generator.prompt_template='it is'", BUCKET="gs://b/r", NAME="mine"
    )
    [line] = [shlex.split(done.stdout)]
    assert line[:6] == ["+", "gcloud", "compute", "tpus", "tpu-vm", "ssh"] and line[6] == "mine"
    command = line[-1].removeprefix("--command=")
    assert "kept.sh" in command and "generator.prompt_template='it is'" in " ".join(shlex.split(command))
    assert run("tpu.sh", "--dry-run", "create", "--spot").stdout.split()[-1] == "--spot"
    queued = run("tpu.sh", "--dry-run", "create", "--queued").stdout
    assert "queued-resources create ragjax --node-id=ragjax" in queued
    kept = run("kept.sh", "--dry-run", "a.yaml", BUCKET="gs://b/r").stdout.splitlines()
    assert kept[0] == "+ mkdir -p runs" and kept[1].endswith("gs://b/r runs")
    assert kept[2:] == [f"+ ragjax {stage} a.yaml" for stage in ("index", "train", "evaluate")]
    keep = run("keep.sh", "--dry-run", "tpu", "a.yaml", BUCKET="gs://b/r").stdout.splitlines()
    assert next(line.split()[4:6] for line in keep if "tpu-vm" in line) == ["tpu-vm", "create"]
    keep = run("keep.sh", "--dry-run", "gpu", "a.yaml", BUCKET="gs://b/r").stdout.splitlines()
    assert "instances create ragjax-gpu" in keep[0] and "--provisioning-model=SPOT" in keep[0]
    assert any("cuda13" in line for line in keep) and "kept.sh" in keep[-1]
    shared = run("kept.sh", "--dry-run", "a.yaml", "--distributed", BUCKET="gs://b/r/s").stdout.splitlines()
    assert shared[1] == "+ gcsfuse --implicit-dirs --only-dir r/s b runs"
    assert shared[2] == "+ ragjax index a.yaml --distributed"
    several = run("processes.sh", "--dry-run", "4", "a.yaml", "train.num_docs=2", RAGJAX="ragjax").stdout.splitlines()
    assert several[1] == "+ 4 × ragjax train a.yaml train.num_docs=2 --distributed" and len(several) == 3


@pytest.mark.parametrize(
    ("kind", "states", "codes", "ends", "created"),
    [
        ("tpu", "READY", "0", 0, 0),
        ("tpu", "READY PREEMPTED READY", "143 1 0", 0, 1),  # taken away once, then a lost connection
        ("gpu", "RUNNING TERMINATED RUNNING", "143 1 0", 0, 1),
        ("tpu", "READY READY READY READY READY", "1 1 1 1 1", 1, 0),
        ("tpu", "READY", "2", 2, 0),  # the experiment is wrong: another machine would not help
    ],
)
def test_a_machine_that_is_taken_away_is_made_anew(
    kind: str, states: str, codes: str, ends: int, created: int, tmp_path: Path
) -> None:
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / "states").write_text("\n".join(states.split()) + "\n")
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BUCKET": "gs://b/r", "PAUSE": "0"}
    keep = [str(LAUNCH / "keep.sh"), kind, "a.yaml"]
    (tmp_path / "git").write_text("#!/bin/sh\n")  # the checkout is not what is tested
    (tmp_path / "git").chmod(0o755)
    done = subprocess.run(keep, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == ends, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum(" create " in call for call in calls) == created == sum(" scp " in call for call in calls)
    assert sum("kept.sh" in call for call in calls) == len(codes.split())
    assert " delete " in calls[-1], "an idle machine costs money"


def test_a_signal_to_the_script_alone_reaches_the_run(tmp_path: Path) -> None:
    """As a container's SIGTERM comes: training saves, and the script ends as it did."""
    ragjax = tmp_path / "ragjax"
    ragjax.write_text(
        f"#!/bin/bash\ntrap 'sleep 0.2; echo saved $1; exit 143' TERM\n[ $1 = index ] && exit 0\n"
        f"touch {tmp_path}/ready\nwhile :; do sleep 0.05; done\n"
    )
    ragjax.chmod(0o755)
    command, environment = [str(LAUNCH / "local.sh"), "a.yaml"], os.environ | {"RAGJAX": str(ragjax)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as script:
        while not (tmp_path / "ready").exists():
            assert script.poll() is None
            time.sleep(0.01)
        script.send_signal(signal.SIGTERM)
        out, _ = script.communicate(timeout=20)
    assert script.returncode == 143
    assert out.splitlines()[1:] == [f"+ {ragjax} train a.yaml", "saved train"]
    fails = run("local.sh", "a.yaml", RAGJAX="false")
    assert fails.returncode == 1 and fails.stdout == "+ false index a.yaml\n"
