"""Progress: a bar on a terminal, a line now and then elsewhere, always on standard error."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ragjax import terminal as progress
from ragjax.terminal import progress_bar


def test_elsewhere_than_on_a_terminal_the_last_line_counts_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("embed", 10, "passages") as advance:
        for _ in range(5):
            advance(2)
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("embed: 10/10 passages, ") and line.endswith(" in all") and "left" not in line


def test_lines_tell_rate_time_left_and_note(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(float(second) for second in range(0, 1000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "EVERY", 30.0)
    with progress_bar("train", 12, "steps", done=4) as advance:
        advance(1)  # after 20 seconds: not yet
        advance(1, "loss 0.5")
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("train: 6/12 steps, ") and first.endswith("  loss 0.5")
    assert " left" in first and last.startswith("train: 6/12 steps")


def test_the_total_may_be_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("read", None, "lines") as advance:
        advance(3)
    assert capsys.readouterr().err.startswith("read: 3 lines, ")


def test_what_fails_does_not_claim_to_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="bad"), progress_bar("read", 3, "lines"):
        raise ValueError("bad")
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "terminal", Console(file=screen, force_terminal=True, width=120))
    with progress_bar("train", 4, "steps", done=2) as advance:
        advance(1, "loss 0.25")
        advance(1, "loss 0.125")
    shown = screen.getvalue()
    assert "train" in shown and "4/4 steps" in shown and "loss 0.125" in shown
