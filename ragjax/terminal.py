"""What the terminal shows: progress with rates and time left, and text from outside made harmless."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
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


EVERY = 15.0  # seconds between two lines where there is no terminal
SOON = 2**30  # bytes that are read too soon for a bar


class Screen(Console):
    """rich's Console; symbols stand for all that a terminal would obey, but for line breaks and its own styles."""

    def render_str(self, text: str, **settings: Any) -> Text:
        """Every text that is printed, and every cell of a table, comes through here."""
        return super().render_str(visible(text, lines=True), **settings)


terminal = Screen(stderr=True, highlight=False, markup=False)


@contextmanager
def progress_bar(name: str, total: int | None, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yields `advance(count=1, note="")`; the rate is counted in `unit` a second. A lost Ctrl-C is raised there."""
    started, count = time.monotonic(), done

    def rate() -> float:
        return (count - done) / max(1e-9, time.monotonic() - started)

    def line(note: str) -> str:
        of = f"/{total}" if total else ""
        left = f", {_clock((total - count) / rate())} left" if total and count > done and count < total else ""
        return f"{name}: {count}{of} {unit}, {rate():.3g} {unit}/s{left}{'  ' + note if note else ''}"

    if terminal.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
        with Progress(*columns, TimeRemainingColumn(), console=terminal, transient=False) as bar:
            task = bar.add_task(name, total=total, completed=done, status="")

            def advance(step: int = 1, note: str = "") -> None:
                nonlocal count
                check()
                count += step
                of = f"/{total}" if total else ""
                bar.update(task, advance=step, status=f"{count}{of} {unit}  {rate():.3g}/s  {note}")

            yield advance
        return
    last = started

    def advance_quietly(step: int = 1, note: str = "") -> None:
        nonlocal count, last
        check()
        count += step
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            terminal.print(line(note), soft_wrap=True)

    yield advance_quietly
    terminal.print(f"{line('')}, {_clock(time.monotonic() - started)} in all", soft_wrap=True)


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
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
