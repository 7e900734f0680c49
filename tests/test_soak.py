"""The short version of soak.py: some of everything that it does, on one process and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import soak


@pytest.mark.parametrize(("processes", "kills"), [(1, 5), pytest.param(2, 6, marks=pytest.mark.slow)])
def test_whatever_is_killed_ends_as_if_nothing_had_been(tmp_path: Path, processes: int, kills: int) -> None:
    summary = soak(tmp_path, kills, seed=4, processes=processes, steps=12)
    assert summary.differences == []
    assert sum(summary.kills.values()) == kills and summary.started > kills
