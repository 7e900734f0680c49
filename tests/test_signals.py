"""Ctrl-C and SIGTERM: not lost where Python drops them, and a command that got one never ends with 0."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from ragjax.cli import main
from ragjax.errors import InputError
from ragjax.retrieval.building.index_builder import IndexBuilder
from ragjax.signals import guarded, listening
from ragjax.terminal import progress_bar

Capture = pytest.CaptureFixture[str]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Node:
    """Something with a finalizer."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self.happens = happens

    def __del__(self) -> None:
        self.happens()


def in_a_finalizer(happens: Callable[[], None]) -> None:
    Node(happens)


def in_the_finalizer_of_a_weak_reference(happens: Callable[[], None]) -> None:
    node = Node(lambda: None)
    reference = weakref.ref(node, lambda _: happens())
    del node
    assert reference() is None


def in_the_garbage_collector(happens: Callable[[], None]) -> None:
    """As JAX's callback, which was there when a build went on."""

    def callback(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            gc.callbacks.remove(callback)
            happens()

    gc.callbacks.append(callback)
    gc.collect(0)


def in_what_catches_everything(happens: Callable[[], None]) -> None:
    with suppress(BaseException):
        happens()


def in_what_makes_another_error_of_it(happens: Callable[[], None]) -> None:
    try:
        happens()
    except KeyboardInterrupt as error:
        raise SystemError("initialization failed") from error


def when_the_input_is_bad(happens: Callable[[], None]) -> None:
    try:
        raise InputError("no such file")
    finally:
        happens()


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize(
    "where",
    [
        in_a_finalizer,
        in_the_finalizer_of_a_weak_reference,
        in_the_garbage_collector,
        in_what_catches_everything,
        in_what_makes_another_error_of_it,
        when_the_input_is_bad,
    ],
)
def test_it_is_not_lost(where: Callable[[Callable[[], None]], None], number: signal.Signals, capsys: Capture) -> None:
    """Work goes on to the next sign of progress, and no further; nothing but one line is said."""
    steps = []

    def happens() -> None:
        signal.raise_signal(number)
        time.sleep(0.01)  # until the handler has run

    def command() -> int:
        with progress_bar("work", 5, "steps") as advance:
            where(happens)
            for step in range(5):
                advance()
                steps.append(step)
        return 0

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook
    assert guarded(command) == CODES[number]
    assert steps == []
    assert capsys.readouterr().err == f"ragjax: {'interrupted' if number == signal.SIGINT else 'terminated'}\n"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


def test_it_counts_when_all_is_done() -> None:
    """Swallowed, and the work is done without another sign of progress."""

    def command() -> int:
        in_what_catches_everything(lambda: signal.raise_signal(signal.SIGINT))
        return 0

    assert guarded(command) == 130


@pytest.mark.slow
def test_what_is_being_loaded_is_loaded_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an extension prints tracebacks or ends the process."""
    (tmp_path / "half.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.1)\nwhole = 1"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loaded, after = [], []

    def command() -> int:
        import half  # type: ignore[import-not-found]

        loaded.append(half.whole)
        time.sleep(5)
        after.append(1)
        return 0

    assert guarded(command) == 130
    assert (loaded, after) == ([1], [])


def test_an_error_without_a_signal_stays_one() -> None:
    def command() -> int:
        raise SystemError("initialization failed")

    with pytest.raises(SystemError, match="initialization failed"):
        guarded(command)


def test_what_may_finish_is_told_once_and_then_stopped() -> None:
    """The second Ctrl-C interrupts; another SIGTERM does not."""
    told = []

    def command() -> int:
        with listening() as signals:
            signals.instead = lambda: told.append(signals.came)
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
                time.sleep(0.01)
            told.append(0)
        return 0

    assert guarded(command) == 143
    assert told == [signal.SIGTERM]


def test_a_second_signal_of_another_kind_leaves_the_cleaning_up_alone() -> None:
    cleaned = []

    def command() -> int:
        try:
            signal.raise_signal(signal.SIGINT)
            time.sleep(5)
        finally:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.01)
            cleaned.append(True)
        return 0

    assert guarded(command) == 130 and cleaned


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_python_itself_ends(tmp_path: Path, number: signal.Signals) -> None:
    """All is done and said; what `atexit` calls takes its time."""
    program = (
        "import atexit, sys, time\n"
        "import ragjax.__main__ as entry\n"
        "try: entry.main()\n"
        "finally: atexit.register(lambda: (print('end', file=sys.stderr, flush=True), time.sleep(30)))"
    )
    command = [sys.executable, "-c", program, "config", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as child:
        assert child.stderr and child.stderr.readline() == "end\n"
        child.send_signal(number)
        out, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (CODES[number], "") and "usage: ragjax config" in out


def test_bad_input_and_a_signal_in_the_command_line(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A build that is stopped by SIGTERM leaves as little as one that is stopped by Ctrl-C."""
    monkeypatch.setattr(IndexBuilder, "embed_missing", lambda *_: signal.raise_signal(signal.SIGTERM))
    folder = world.parent / "stopped"
    assert main(["index", str(world / "config.yaml"), f"index.path={folder}", "index.batch_size=8"]) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "ragjax: terminated"
    assert not list(world.parent.glob("stopped*"))
