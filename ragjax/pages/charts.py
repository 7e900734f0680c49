"""Charts as SVG: where each line, point and tick lies; `templates/charts.html` draws them.

A chart is 360 units wide, which is about as many pixels: its words are as large as those around it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

WIDTH, HEIGHT = 360.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 12.0, 34.0  # around the plot
MOST_POINTS = 400  # of a line: more are no pixel apart
P = TypeVar("P")


@dataclass(frozen=True)
class Series:
    """A line: its name, x and y. A y of None is a gap; with `window` the mean over so many points is drawn, too."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    dots: bool = False
    window: int = 1


@dataclass(frozen=True)
class Mark:
    """A tick: where it lies, and its words."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A drawn line: pieces of "x,y x,y …", points, and the running mean, where there is one."""

    name: str
    pieces: list[str]
    points: list[tuple[float, float]]
    mean: str | None


@dataclass(frozen=True)
class Chart:
    """A drawing of lines, with its axes; places are in the units of the drawing."""

    title: str
    x_label: str
    y_label: str
    x_marks: list[Mark]
    y_marks: list[Mark]
    lines: list[Line]
    diagonal: str | None  # "x,y x,y" from (0, 0) to (1, 1)
    window: int | None  # of the running means
    description: str  # for those who do not see it


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    unit: bool = False,
    diagonal: bool = False,
    log_y: bool = False,
) -> Chart | None:
    """A chart of some lines; None where there is nothing to draw.

    Args:
        title: what it shows.
        series: its lines, in the order of the legend.
        x_label: what x is, with its unit.
        y_label: the same of y.
        unit: y goes from 0 to 1 (with `diagonal` x, too); else it begins at 0 unless it is negative somewhere.
        diagonal: draws y = x.
        log_y: y is drawn by its logarithm; what is not above 0 is left out.
    """
    series = [_drawable(of, log_y) for of in series]
    xs = [x for of in series for x, y in zip(of.xs, of.ys, strict=True) if y is not None]
    ys = [y for of in series for y in of.ys if y is not None]
    if not xs:
        return None
    if unit:
        low, high = 0.0, 1.0
    elif log_y:
        low, high = math.log10(min(ys)), math.log10(max(ys))
    else:
        low, high = min(0.0, *ys), max(ys)
    first, last = (0.0, 1.0) if diagonal else (min(xs), max(xs))
    y_ticks = _log_ticks(low, high) if log_y else _ticks(low, high)
    axes = _Axes(first, last, min(low, *y_ticks), max(high, *y_ticks), log_y)
    return Chart(
        title,
        x_label,
        y_label,
        [Mark(axes.x(x), number(x)) for x in _ticks(first, last, whole=not diagonal) if first <= x <= last],
        [Mark(axes.down(y), number(10**y if log_y else y)) for y in y_ticks],
        [axes.line(of) for of in series],
        f"{axes.x(0.0)},{axes.y(0.0)} {axes.x(1.0)},{axes.y(1.0)}" if diagonal else None,
        max(of.window for of in series) if any(of.window > 1 for of in series) else None,
        "; ".join(_description(of, x_label) for of in series if any(y is not None for y in of.ys)),
    )


@dataclass(frozen=True)
class _Axes:
    """What lies at the ends of the axes; `low` and `high` are logarithms where `log` is set."""

    first: float
    last: float
    low: float
    high: float
    log: bool

    def x(self, x: float) -> float:
        return round(LEFT + (x - self.first) * (WIDTH - LEFT - RIGHT) / ((self.last - self.first) or 1.0), 1)

    def y(self, y: float) -> float:
        return self.down(math.log10(y) if self.log else y)

    def down(self, height: float) -> float:
        share = (height - self.low) / ((self.high - self.low) or 1.0)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def line(self, of: Series) -> Line:
        shown = _thinned(list(zip(of.xs, of.ys, strict=True)))
        points = [None if y is None else (self.x(x), self.y(y)) for x, y in shown]
        mean = None
        if of.window > 1:
            mean = " ".join(f"{self.x(x):g},{self.y(y):g}" for x, y in _thinned(_running_mean(of)))
        return Line(of.name, _pieces(points), [p for p in points if p] if of.dots else [], mean)


def number(value: float) -> str:
    """Short, as a tick names it: 0.25, 12, 1.5e4."""
    text = f"{value:.4g}"
    return text.replace("e+0", "e").replace("e-0", "e-")


def _drawable(of: Series, log_y: bool) -> Series:
    """With a gap where y has no place in the chart."""
    ys = [None if y is None or not math.isfinite(y) or (log_y and y <= 0) else y for y in of.ys]
    return dataclasses.replace(of, ys=ys)


def _thinned(points: list[P]) -> list[P]:
    """Every n-th point and the last one, where there are more than can be seen."""
    every = -(-len(points) // MOST_POINTS) or 1
    return points[::every] + (points[-1:] if (len(points) - 1) % every else [])


def _running_mean(of: Series) -> list[tuple[float, float]]:
    """The mean of y over `window` points in a row, and of their x."""
    there = [(x, y) for x, y in zip(of.xs, of.ys, strict=True) if y is not None]
    parts = [there[i : i + of.window] for i in range(max(1, len(there) - of.window + 1))] if there else []
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


def _pieces(points: Sequence[tuple[float, float] | None]) -> list[str]:
    pieces: list[list[str]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{point[0]:g},{point[1]:g}")
    return [" ".join(piece) for piece in pieces if piece]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to six round numbers from `low` or below to `high` or above; `whole` ones where asked."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * of for of in (1, 2, 2.5, 5, 10) if power * of >= span / 5)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(low + 1e-9), math.ceil(high - 1e-9)
    return [float(i) for i in range(first, max(last, first + 1) + 1, max(1, (last - first) // 4))]


def _description(of: Series, x_label: str) -> str:
    points = [(x, y) for x, y in zip(of.xs, of.ys, strict=True) if y is not None]
    (x0, y0), (x1, y1) = points[0], points[-1]
    ys = [y for _, y in points]
    name = f"{of.name}: " if of.name else ""
    return (
        f"{name}{number(y0)} at {x_label} {number(x0)}, {number(y1)} at {number(x1)}, "
        f"between {number(min(ys))} and {number(max(ys))}"
    )
