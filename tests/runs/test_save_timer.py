"""When it is time to save: by a clock that the test turns."""

from __future__ import annotations

import pytest

from ragjax.runs import save_timer
from ragjax.runs.save_timer import MOST, SaveTimer


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "seconds", [[10.0] * 400, [300.0, *[1.0] * 2000], [1.0, 1.0, 3000.0, *[1.0] * 40], [5000.0, 5000.0, 1.0]]
)
def test_it_is_told_in_time_and_asked_for_seldom(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
    """Ten minutes: steady steps, a slow first one, one that takes long, none that is shorter."""
    clock, agreed = Clock(), list[int]()

    def agree(number: int) -> int:
        agreed.append(number)
        return number

    monkeypatch.setattr(save_timer, "time", clock)
    monkeypatch.setattr(save_timer, "broadcast_from_process_zero", agree)
    timer, since, saves, longest = SaveTimer(10.0, 5), 0.0, 0, max(seconds)
    for step, taken in enumerate(seconds, 6):
        clock.now += taken
        if timer.due(step):
            assert clock.now - since >= 600
            timer.restart(step)
            since, saves = clock.now, saves + 1
        else:
            assert clock.now - since < 600 + MOST * longest
    assert saves >= 1 and len(agreed) <= 8 * (saves + 1) + 2 * len(seconds) / MOST
    if len(set(seconds)) == 1:
        assert saves == sum(seconds) // 600


def test_without_minutes_it_is_never_time() -> None:
    assert not any(SaveTimer(None, 0).due(step) for step in range(1, 100))
