"""The rows of a plan: what takes room or work, how much, and how that was computed; and their sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ragjax.planning.program_cost import NotCompiled

Number = tuple[int | float, str]  # a size, and how it was computed, in words


class Unknown(Exception):
    """Why a size cannot be computed."""


@dataclass(frozen=True)
class Row:
    """One thing that takes room, or work; `size` is None where it is unknown, and then `how` says why."""

    command: str  # index, train or evaluate
    what: str
    place: str  # disk, host, device: each one, and the host itself where there is only a CPU; devices: all together
    size: int | float | None
    how: str
    counted: bool = True  # in the totals: not what is there already, nor a part of another row, nor another setting's
    unit: str = "bytes"  # or FLOP, seconds


def make_row(
    command: str,
    what: str,
    place: str,
    number: Callable[[], Number],
    *,
    there: bool = False,
    part: bool = False,
    unit: str = "bytes",
) -> Row:
    """A row with the number that `number` computes; unknown where that raises `Unknown` or `NotCompiled`.

    Not counted in totals is what is `there` already, or is `part` of another row or of another setting.
    """
    counted = not (there or part)
    try:
        size, how = number()
    except (Unknown, NotCompiled) as why:
        return Row(command, what, place, None, f"unknown ({why})", counted, unit)
    return Row(command, what, place, size, f"{how}; it is there already" if there else how, counted, unit)


@dataclass(frozen=True)
class Total:
    """What a command needs in a place and what this machine has there, both in bytes; `has` is None if unknown."""

    command: str
    place: str
    size: int
    complete: bool  # False where a row is unknown: more than `size` is needed
    has: int | None

    @property
    def fits(self) -> bool | None:
        """None where it cannot be said."""
        if self.has is None or (self.size <= self.has and not self.complete):
            return None
        return self.size <= self.has


def totals(rows: Sequence[Row], has: dict[str, int | None]) -> list[Total]:
    """What each command needs in memory, and all of them on the disk; `has` is from `plan.capacity`."""
    sums: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        place = "host" if row.place == "device" and "device" not in has else row.place
        if row.counted:
            sums.setdefault(("all" if place == "disk" else row.command, place), []).append(row)
    return [
        Total(command, place, sum(int(r.size or 0) for r in some), all(r.size is not None for r in some), has[place])
        for (command, place), some in sorted(sums.items(), key=lambda item: item[0][0] == "all")
    ]
