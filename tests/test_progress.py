"""Progress: one line on a terminal, a line now and then elsewhere, always on standard error; and what it promises."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from ragjax import terminal as progress
from ragjax.terminal import progress_bar

Capture = pytest.CaptureFixture[str]
Sleep = Callable[[float], None]


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Sleep:
    """Moves the only clock that there is."""
    now = 100.0

    def pass_by(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    return pass_by


def screen(monkeypatch: pytest.MonkeyPatch, width: int = 120) -> io.StringIO:
    """A terminal instead of a file, and what is written to it."""
    written = io.StringIO()
    monkeypatch.setattr(progress, "terminal", Console(file=written, force_terminal=True, width=width))
    return written


def test_elsewhere_than_on_a_terminal_the_last_line_counts_it_all(capsys: Capture) -> None:
    with progress_bar("embed", 10, "passages") as advance:
        for _ in range(5):
            advance(2)
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("embed: 10/10 passages, ") and line.endswith(" in all") and "left" not in line


def test_a_line_every_half_minute_and_no_more(capsys: Capture, sleep: Sleep) -> None:
    with progress_bar("train", 100, "steps", done=4, first="compiling …") as advance:
        for step in range(40):
            sleep(7)
            advance(1, f"loss {step}")
    begin, *lines, end = capsys.readouterr().err.splitlines()
    assert begin == "train: compiling …"
    assert lines[0] == "train: 9/100 steps, 0.143 steps/s, 10:37 left  loss 4"
    assert [line.split()[1] for line in lines] == [f"{done}/100" for done in range(9, 45, 5)]
    assert end == "train: 44/100 steps, 0.143 steps/s, 4:40 in all"


def test_the_time_left_knows_nothing_of_compilation(capsys: Capture, sleep: Sleep) -> None:
    """Neither of that of the first step, nor of one that comes later, nor of how fast the steps were long ago."""
    with progress_bar("train", 100, "steps") as advance:
        for seconds in (400, 8, 8, 90, 8, 8, 8, *[4] * 30):
            sleep(seconds)
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 1/100 steps", "nothing is known of the other steps"
    assert lines[1] == "train: 4/100 steps, 0.125 steps/s, 12:48 left"
    assert lines[-2] == "train: 33/100 steps, 0.25 steps/s, 4:28 left"
    assert lines[-1] == "train: 37/100 steps, 0.0569 steps/s, 10:50 in all", "what is over counts it all"


def test_many_quick_steps_are_measured_together(capsys: Capture, sleep: Sleep) -> None:
    """Even if only each hundredth takes any time."""
    with progress_bar("read", None, "passages") as advance:
        for step in range(6000):
            if step % 100 == 0:
                sleep(1)
            advance()
    assert ", 100 passages/s" in capsys.readouterr().err.splitlines()[0]


def test_hours_are_told(capsys: Capture, sleep: Sleep) -> None:
    with progress_bar("train", 1000, "steps") as advance:
        for _ in range(2):
            sleep(20)
            advance()
    assert capsys.readouterr().err.splitlines()[0] == "train: 2/1000 steps, 0.05 steps/s, 5:32:40 left"


def test_what_the_caller_counts_besides_stands_beside_the_steps(capsys: Capture, sleep: Sleep) -> None:
    with progress_bar("train", 12, "steps", extra=lambda done: f"epoch {done / 4:.1f} of 3") as advance:
        sleep(30)
        advance(6)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "train: 6/12 steps (epoch 1.5 of 3)" and last.startswith("train: 6/12 steps (epoch 1.5 of 3), ")


def test_what_is_done_already_does_not_compile(capsys: Capture) -> None:
    with progress_bar("train", 12, "steps", done=12, first="compiling …"):
        pass
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("train: 12/12 steps, 0 steps/s")


def test_the_total_may_be_unknown(capsys: Capture) -> None:
    with progress_bar("read", None, "lines") as advance:
        advance(3)
    assert capsys.readouterr().err.startswith("read: 3 lines, ")


def test_what_fails_does_not_claim_to_be_done(capsys: Capture) -> None:
    with pytest.raises(ValueError, match="bad"), progress_bar("read", 3, "lines"):
        raise ValueError("bad")
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    written = screen(monkeypatch)
    with progress_bar("train", 4, "steps", done=2, first="compiling …") as advance:
        advance(1, "loss 0.25")
        advance(1, "loss 0.125")
    shown = written.getvalue()
    assert "train" in shown and "4/4 steps" in shown and "loss 0.125" in shown
    assert shown.index("compiling …") < shown.index("4/4 steps")


def test_a_bar_is_one_line_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    written = screen(monkeypatch, width=60)
    with progress_bar("train", 4, "steps") as advance:
        advance(4, "loss 0.125  recall@5 0.75  and much more that has no room there")
    assert "4/4 steps" in written.getvalue() and "no room" not in written.getvalue()
    assert "\x1b[1A" not in written.getvalue(), "it never goes up a line to draw two of them"
