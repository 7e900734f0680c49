"""ragjax in processes of its own: started, watched, and stopped."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RAGJAX = [sys.executable, "-m", "ragjax"]
RATES = {"examples_per_second", "tokens_per_second"}
# as conftest.py has it: a process of tiny models compiles for longer than it computes
QUICK_TO_COMPILE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0"}


def environment(world: Path, devices: int) -> dict[str, str]:
    own = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "RAGJAX_CACHE": str(world.parent / "cache"),
        "RAGJAX": " ".join(RAGJAX),
        "PYTHONPATH": str(ROOT),
    }
    return os.environ | QUICK_TO_COMPILE | own


def start(
    world: Path,
    count: int,
    *arguments: str,
    own: dict[int, list[str]] | None = None,
    program: Sequence[str] = RAGJAX,
) -> list[subprocess.Popen]:
    """`count` processes of two devices each; `own` adds arguments to some of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for i in range(count):
        of_this = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
        command = [*program, *arguments, *(own or {}).get(i, []), "--distributed"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment(world, 2) | of_this, **pipes))  # type: ignore[call-overload]
    return processes


def ends(processes: list[subprocess.Popen], within: float) -> list[tuple[int, str]]:
    """The exit code and standard error of each; fails if one is still there after so many seconds."""
    limit = time.monotonic() + within
    try:
        return [(p.wait(max(0.1, limit - time.monotonic())), p.communicate()[1]) for p in processes]
    finally:
        for process in processes:
            process.kill()


def logged(run: Path) -> list[dict[str, float]]:
    path = run / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in RATES} for line in lines if line.endswith("\n")]


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen]) -> None:
    limit = time.monotonic() + 120
    while len(logged(run)) < step:
        assert time.monotonic() < limit and all(p.poll() is None for p in processes)
        time.sleep(0.05)
