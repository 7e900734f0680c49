"""The short version of soak.py: some of everything that it does, on one device, on several, and on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import soak


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "kills", "interrupts"), [(1, 1, 3, 4), (1, 8, 2, 0), (2, 2, 3, 0)])
def test_whatever_is_killed_ends_as_if_nothing_had_been(
    tmp_path: Path, processes: int, devices: int, kills: int, interrupts: int
) -> None:
    """And a build that gets Ctrl-C ends with 130, or by that signal where Python itself begins or ends."""
    summary = soak(tmp_path, kills, 4, processes, devices, steps=8, interrupts=interrupts)
    assert summary.differences == []
    assert summary.kills.total() == kills and summary.started > kills
    assert summary.interrupted.total() == interrupts and summary.interrupted.keys() <= {130, -2}
