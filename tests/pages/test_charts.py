"""Charts: what a line of many points shows is what was measured."""

from __future__ import annotations

import pytest

from ragjax.pages.charts import LEFT, MOST_POINTS, RIGHT, WIDTH, Series, chart


@pytest.mark.parametrize("count", [300, 800, 6000])
def test_running_means_are_over_all_points(count: int) -> None:
    """Also where a line has more points than are drawn: of y = x the mean over a window is x at its middle."""
    window, xs = count // 12, [float(x) for x in range(count)]
    made = chart("t", [Series("a", xs, xs, window=window)], "step", "y")
    assert made is not None and made.window == window
    [line] = made.lines
    points = [tuple(map(float, point.split(","))) for point in (line.mean or "").split()]
    assert min(count - window, MOST_POINTS) // 2 < len(points) <= MOST_POINTS + 1
    unit = (WIDTH - LEFT - RIGHT) / (count - 1)
    assert points[0][0] == pytest.approx(LEFT + unit * (window - 1) / 2, abs=0.06)
    assert points[-1][0] == pytest.approx(WIDTH - RIGHT - unit * (window - 1) / 2, abs=0.06)
    assert len(line.pieces[0].split()) <= MOST_POINTS + 1


def test_a_spike_between_drawn_points_is_told() -> None:
    ys = [1.0] * 6000
    ys[1234] = 50.0
    made = chart("t", [Series("a", range(6000), ys)], "step", "y")
    assert made is not None and "between 1 and 50" in made.description and made.y_marks[-1].text == "50"
