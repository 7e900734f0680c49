"""Ctrl-C and SIGTERM: whenever they come, a command ends with 130 or 143, and never as if nothing had been.

Python raises `KeyboardInterrupt` between any two instructions, and drops it where these are of a finalizer, of a
callback from native code, or of a library that catches everything. So a signal is raised at once, and remembered, too:
what was dropped is raised again by the next `check`, and counts when the command ends in any case.
"""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """What came since one began to listen. Handlers belong to the process, so there is one of these at a time."""

    def __init__(self) -> None:
        self.came = 0  # the first signal's number
        self.raising = True  # else a signal is only remembered
        self.instead: Callable[[], None] | None = None  # called by the first signal, which then does not interrupt
        self._raised = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """What the system calls for a signal: the first does what `instead` says, or raises; a second Ctrl-C raises."""
        first, self.came = not self.came, self.came or number
        if first and self.instead is not None:
            self.instead()
        elif self.raising and (first or number == signal.SIGINT):
            if _importing(frame):  # an extension that is being loaded prints, or breaks
                self._again_soon()
            else:
                self._raise()

    def check(self) -> None:
        """Raises `KeyboardInterrupt` if a signal came that should have interrupted."""
        if self.came and self.raising and self.instead is None:
            self._raise()

    def dropped(self, unraisable: Any, otherwise: Callable[[Any], Any]) -> None:
        """What Python calls where it drops an exception: Ctrl-C then comes again, and not there."""
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._again_soon()
        else:
            otherwise(unraisable)

    def _raise(self) -> None:
        self._raised += 1
        raise KeyboardInterrupt

    def _again_soon(self) -> None:
        """As if Ctrl-C came once more a moment later, unless something has been raised by then."""
        raised = self._raised

        def again() -> None:
            time.sleep(0.02)
            if self._raised == raised and self.raising and _listening is self:
                _thread.interrupt_main()

        _thread.start_new_thread(again, ())


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and "importlib._bootstrap" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


_listening: Signals | None = None


@contextmanager
def listening(sigterm: bool = True) -> Iterator[Signals]:
    """Handles Ctrl-C and, if so told, SIGTERM to its end. Inside another one it is that one."""
    global _listening
    if _listening is not None:
        yield _listening
        return
    signals, hook, before = Signals(), sys.unraisablehook, dict[int, Any]()
    with suppress(ValueError):  # not in the main thread, as under some notebooks
        for number in STOPPING if sigterm else STOPPING[:1]:
            before[number] = signal.signal(number, signals.handle)
    sys.unraisablehook = lambda unraisable: signals.dropped(unraisable, hook)
    _listening = signals
    try:
        yield signals
    finally:
        _listening, sys.unraisablehook = None, hook
        for listened, handler in before.items():
            signal.signal(listened, handler)


def check() -> None:
    """For long loops: raises `KeyboardInterrupt` if one has been lost."""
    if _listening is not None:
        _listening.check()


def stopped() -> int:
    """The signal that asks this command to stop, or 0."""
    return 0 if _listening is None else _listening.came


def guarded(command: Callable[[], int]) -> int:
    """The exit code that a command returns; if a signal came while it ran, 128 + that, whatever the command made of it.

    Any exception then counts as interrupted: native code makes others of a `KeyboardInterrupt`.
    """
    outermost = _listening is None
    with listening() as signals:
        code = 0
        try:
            code = command()
            signals.raising = False
        except BaseException:
            signals.raising = False
            if not signals.came:
                raise
        if signals.came and code < 128:
            with suppress(OSError, ValueError):  # nobody reads any more
                print(f"ragjax: {'interrupted' if signals.came == signal.SIGINT else 'terminated'}", file=sys.stderr)
            code = 128 + signals.came
        signals.raising = not outermost
        return code


def leave_at_once() -> Callable[[int], int]:
    """From now on, where nobody listens, a signal ends the process without a word: at its start and at its end.

    What is returned takes the process's exit code, and gives it back. Python then ends with it when the handlers of
    `atexit` are done: it would free its memory for some tenths of a second, in which no signal is heeded.
    """
    last: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(128 + number)

    def end() -> None:
        if not last:  # by an error, which is still to be shown
            for number in STOPPING:
                signal.signal(number, signal.SIG_DFL)
            return
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            pass
        except (OSError, ValueError):
            last.append(120)  # as Python ends then
        os._exit(max(last))

    def end_with(code: int) -> int:
        last.append(code)
        return code

    for number in STOPPING:
        signal.signal(number, leave)
    atexit.register(end)  # registered first, called last
    return end_with
