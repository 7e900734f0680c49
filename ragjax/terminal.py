"""What the terminal shows: progress with rates and time left, and text from outside made harmless."""

from __future__ import annotations

import statistics
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ragjax.signals import check

# these only join or part letters, and Persian, Hindi and many emoji need them
KEPT = {0x200C, 0x200D}  # zero-width non-joiner and joiner


class _Symbols(dict[int, str]):
    """For `str.translate`: ␛ for ESC and the like, <U+202E> for controls that have no picture."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if code < 0x20 or code == 0x7F:
            symbol = chr(0x2421 if code == 0x7F else 0x2400 + code)
        elif unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and code not in KEPT:
            symbol = f"<U+{code:04X}>"
        else:
            symbol = character
        self[code] = symbol
        return symbol


_SYMBOLS = _Symbols()
_WITHIN_LINES = _Symbols({ord("\n"): "\n"})


def visible(text: str, lines: bool = False) -> str:
    """The text with symbols for what a terminal would obey or hide; on one line, unless `lines` keeps its breaks.

    That is: control characters (line breaks and tabs among them), those that turn the direction of writing, and those
    without width. Halves of surrogate pairs, which cannot be printed, are among them.
    """
    if text.isascii() and text.isprintable():
        return text
    return text.translate(_WITHIN_LINES if lines else _SYMBOLS)


EVERY = 30.0  # seconds between two lines where there is no terminal
SOON = 2**30  # bytes that are read too soon for a bar


class Screen(Console):
    """rich's Console; symbols stand for all that a terminal would obey, but for line breaks and its own styles."""

    def render_str(self, text: str, **settings: Any) -> Text:
        """Every text that is printed, and every cell of a table, comes through here."""
        return super().render_str(visible(text, lines=True), **settings)


terminal = Screen(stderr=True, highlight=False, markup=False)


class _Pace:
    """How long a unit of work takes: the median of the last intervals, so that one slow step counts for little."""

    INTERVALS, SHORTEST = 20, 1.0  # at most so many, of so many seconds or of one longer step

    def __init__(self, done: int) -> None:
        self.begun = self.done = done
        self.started = self.since = time.monotonic()
        self._counted = done  # at the time `since`
        self._intervals: deque[float] = deque(maxlen=self.INTERVALS)  # seconds a unit

    def advance(self, step: int) -> None:
        """Counts a step. The first one takes the programs' compilation, too, and tells nothing of the others."""
        first, self.done, now = self.done == self.begun, self.done + step, time.monotonic()
        if first:
            self.since, self._counted = now, self.done
        elif now - self.since >= self.SHORTEST and self.done > self._counted:
            self._intervals.append((now - self.since) / (self.done - self._counted))
            self.since, self._counted = now, self.done

    def seconds(self) -> float | None:
        """For a unit; None while it is not known."""
        return statistics.median(self._intervals) if self._intervals else None


@contextmanager
def progress_bar(
    name: str, total: int | None, unit: str, done: int = 0, first: str = "", extra: Callable[[int], str] | None = None
) -> Iterator[Callable[..., None]]:
    """Yields `advance(count=1, note="")`, which shows how far the work is. A lost Ctrl-C is raised there.

    On a terminal this is one line; elsewhere a line every half minute, and one at the end. Rate and time left are those
    of the last steps.

    Args:
        name: What is done, such as "train".
        total: The number of units, where it is known.
        unit: What is counted, such as "steps".
        done: Units that an earlier process has done.
        first: What is shown until the first units are done, such as "compiling …".
        extra: Makes of the number of units done what is shown beside it, such as "epoch 2.5".
    """
    pace = _Pace(done)

    def so_far() -> str:
        beside = f" ({extra(pace.done)})" if extra else ""
        return f"{pace.done}{f'/{total}' if total else ''} {unit}{beside}"

    def status(note: str) -> str:
        parts = [so_far()]
        if seconds := pace.seconds():
            parts.append(f"{1 / seconds:.3g} {unit}/s")
            if total and pace.done < total:
                parts.append(f"{_clock((total - pace.done) * seconds)} left")
        return ", ".join(parts) + (f"  {note}" if note else "")

    with _display(name, total, done, first if done != total else "") as show:

        def advance(step: int = 1, note: str = "") -> None:
            check()
            pace.advance(step)
            show(step, lambda: status(note))

        yield advance
        if not terminal.is_terminal:
            took = time.monotonic() - pace.started
            rate = (pace.done - done) / max(1e-9, took)
            terminal.print(f"{name}: {so_far()}, {rate:.3g} {unit}/s, {_clock(took)} in all", soft_wrap=True)


@contextmanager
def _display(name: str, total: int | None, done: int, first: str) -> Iterator[Callable[[int, Callable[[], str]], None]]:
    """Yields what shows a status after a number of units more: a bar on a terminal, elsewhere a line now and then."""
    if terminal.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[status]}"), console=terminal) as bar:
            task = bar.add_task(name, total=total, completed=done, status=first)
            yield lambda step, status: bar.update(task, advance=step, status=status())
        return
    if first:
        terminal.print(f"{name}: {first}", soft_wrap=True)
    last = time.monotonic()

    def show(step: int, status: Callable[[], str]) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            terminal.print(f"{name}: {status()}", soft_wrap=True)

    yield show


@contextmanager
def bytes_bar(name: str, total: int, soon: int = SOON) -> Iterator[Callable[[int], None]]:
    """Yields `advance(size)` in bytes; the bar counts MiB, and there is none where `total` is less than `soon`."""
    if total < soon:
        yield lambda size: None
        return
    done = 0
    with progress_bar(name, _mib(total), "MiB") as advance:

        def count(size: int) -> None:
            nonlocal done
            before, done = done, done + size
            advance(_mib(done) - _mib(before))

        yield count


def _mib(size: int) -> int:
    return -(-size // 2**20)


def _clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 4:05, 1:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
