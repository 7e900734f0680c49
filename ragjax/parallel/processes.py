"""The processes of one run: joined, told apart, and agreed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ragjax.errors import InputError
from ragjax.terminal import terminal

Result = TypeVar("Result")


SIGN_OF_LIFE = 10.0  # seconds between two, while one process works and the others wait
SILENT = 60  # seconds without a sign of life after which a process counts as dead, and the others stop


def initialize_distributed(stop_together: bool) -> None:
    """Joins the other processes of this run; call it before anything else of JAX.

    Where there are others JAX knows by itself on TPU pods, SLURM, Open MPI and Kubernetes; elsewhere the environment
    says: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. With `stop_together`
    SIGTERM no longer ends this process, but tells JAX to let all of them reach one step and stop there
    (`reached_preemption_sync_point`). Progress is shown by process 0 alone, and only Python writes to standard output.
    Raises `InputError` if they cannot be joined.
    """

    def number(name: str) -> int | None:
        value = os.environ.get(name)
        if value is not None and not value.isdecimal():
            raise InputError(f"{name} is {value!r}; expected a number")
        return None if value is None else int(value)

    count, index = number("JAX_NUM_PROCESSES"), number("JAX_PROCESS_ID")
    # Gloo, which connects CPUs, tells on standard output of each connection it makes
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    jax.config.update("jax_enable_preemption_service", stop_together)
    try:
        jax.distributed.initialize(
            num_processes=count, process_id=index, heartbeat_timeout_seconds=SILENT, shutdown_timeout_seconds=SILENT
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: the other processes cannot be joined ({str(error).splitlines()[0]}); where JAX does not "
            "find them by itself, set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None
    terminal.quiet = not is_process_zero()


def is_process_zero() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here; `name` is the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def allgather_text(text: str) -> list[str]:
    """The texts that the processes give, in their order."""
    if jax.process_count() == 1:
        return [text]
    given = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(given)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(given)] = given
    every = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(every, lengths, strict=True)]


def ask_together(ask: Callable[[np.ndarray], Any], rows: np.ndarray) -> Any:
    """What `ask`, which all processes must call with the same rows, says of this process's own.

    Those of one process after those of another: together they would make other shapes, and so other last bits.

    Args:
        ask: a function of rows [n, …].
        rows: each process has as many; they all call this.
    """
    found = [ask(process_rows) for process_rows in multihost_utils.process_allgather(rows)]
    return found[jax.process_index()]


def run_on_process_zero(action: Callable[[], Result]) -> Result | None:
    """What `action` returns, run in process 0 alone while the others wait, however long, who get None.

    An `InputError` that it raises is raised in all of them.
    """
    if jax.process_count() == 1:
        return action()
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        running = pool.submit(action) if is_process_zero() else None
        while True:
            state = {"done": False, "message": ""}
            if running is not None:
                # a collective that others reach half a minute before is given up: so they are told that it goes on
                state["done"] = running in wait([running], timeout=SIGN_OF_LIFE).done
            if running is not None and state["done"] and (error := running.exception()) is not None:
                if not isinstance(error, InputError):
                    raise error
                state["message"] = str(error)
            state = json.loads(allgather_text(json.dumps(state))[0])
            if state["message"]:
                raise InputError(state["message"])
            if state["done"]:
                return None if running is None else running.result()
    finally:
        pool.shutdown(wait=False)


def broadcast_from_process_zero(number: int) -> int:
    """The number, or the truth, that process 0 has."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
