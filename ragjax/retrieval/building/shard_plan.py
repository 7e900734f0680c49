"""Which passages stand in which shard of an index that is being built, and which shards of an earlier one stay."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64
from xxhash import xxh3_64_intdigest

BEFORE_TITLE = b', "title": '  # in a passage's record; within JSON's strings the quotes would be escaped


def content_of(record: bytes) -> bytes:
    """What a passage's record says beside its id: title and text."""
    return record.partition(BEFORE_TITLE)[2]


class PassageKeys:
    """64 bits for the id and 64 for the title and text of each passage, in their order.

    Equal keys are a reason to look, not a proof: whoever takes one passage for another compares their bytes, too.
    """

    def __init__(self) -> None:
        self._ids, self._contents = array("Q"), array("Q")

    def add(self, record: bytes) -> None:
        """Adds a passage by its record, as `passage_record` writes it."""
        id_, _, content = record.partition(BEFORE_TITLE)
        self._ids.append(xxh3_64_intdigest(id_))
        self._contents.append(xxh3_64_intdigest(content))

    def __len__(self) -> int:
        return len(self._ids)

    @cached_property
    def ids(self) -> UInt64[np.ndarray, " N"]:
        """Once this was read, no passage can be added."""
        return np.frombuffer(self._ids, np.uint64)

    @cached_property
    def contents(self) -> UInt64[np.ndarray, " N"]:
        """Once this was read, no passage can be added."""
        return np.frombuffer(self._contents, np.uint64)


@dataclass(frozen=True)
class Changes:
    """How many passages of a corpus are not as in the earlier index: by their ids, then by title and text."""

    added: int
    changed: int
    removed: int
    unchanged: int


@dataclass(frozen=True)
class ShardPlan:
    """The shards of an index in order; some may be shards of an earlier one, as they are."""

    counts: tuple[int, ...]  # passages in each
    earlier: str | None = None  # the checksum of the earlier index's manifest
    kept: Mapping[int, int] = field(default_factory=dict)  # the numbers there of the shards that stay, by those here
    appended: bool = False  # the passages of the earlier index are the first ones, in their order

    @property
    def starts(self) -> list[int]:
        """The position of each shard's first passage."""
        return list(accumulate(self.counts[:-1], initial=0))

    @property
    def new_passages(self) -> int:
        """Passages in shards that must be written."""
        return sum(count for number, count in enumerate(self.counts) if number not in self.kept)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        plan: dict[str, Any] = {"shards": list(self.counts)}
        if self.earlier is not None:
            kept = {str(here): there for here, there in self.kept.items()}
            plan |= {"earlier": self.earlier, "kept": kept, "appended": self.appended}
        return plan

    @classmethod
    def from_json(cls, value: Any) -> ShardPlan:
        """Raises `KeyError`, `TypeError` or `ValueError` for anything that `as_json` does not write."""
        counts, earlier = tuple(value["shards"]), value.get("earlier")
        kept = {int(here): there for here, there in value.get("kept", {}).items()}
        if not counts or any(type(count) is not int or count < 1 for count in counts):
            raise ValueError("shards")
        if any(type(there) is not int or not 0 <= here < len(counts) for here, there in kept.items()):
            raise ValueError("kept")
        return cls(counts, earlier, kept, value.get("appended") is True)


def equal_shards(count: int, size: int) -> ShardPlan:
    """So many passages in shards of one size; the last one has what is left."""
    return ShardPlan(tuple(min(size, count - start) for start in range(0, count, size)))


def plan_growth(
    earlier: str, before: PassageKeys, shards: Mapping[int, int], now: PassageKeys, size: int
) -> tuple[ShardPlan, Changes]:
    """The shards of a corpus in the order of its passages, with those of an earlier index whose passages still follow
    each other; what stands between them makes shards of at most `size` passages.

    Args:
        earlier: The checksum of the earlier index's manifest.
        before: The passages of its shards, one shard after the other.
        shards: How many each has, by its number.
        now: The passages of the corpus.
    """
    place, changes = _places(before, now)
    runs, start = list[tuple[int, int, int]](), 0
    for number, count in shards.items():
        shard_place = place[start : start + count]
        if shard_place[0] >= 0 and (np.diff(shard_place) == 1).all():
            runs.append((int(shard_place[0]), count, number))
        start += count
    counts, kept, position = list[int](), dict[int, int](), 0
    for first, count, number in [*_worth_keeping(sorted(runs), len(now), size), (len(now), 0, -1)]:
        counts += [min(size, first - at) for at in range(position, first, size)]
        if count:
            kept[len(counts)] = number
            counts.append(count)
        position = first + count
    appended = len(place) <= len(now) and bool((place == np.arange(len(place))).all())
    return ShardPlan(tuple(counts), earlier, kept, appended), changes


def _places(before: PassageKeys, now: PassageKeys) -> tuple[Int[np.ndarray, " n"], Changes]:
    """Where each earlier passage stands now; -1 where it is gone or says something else."""
    order = np.argsort(now.ids, kind="stable")
    place = order[np.minimum(np.searchsorted(now.ids, before.ids, sorter=order), len(now) - 1)]
    there = now.ids[place] == before.ids
    same = there & (now.contents[place] == before.contents)
    remaining, unchanged = int(there.sum()), int(same.sum())
    changes = Changes(len(now) - remaining, remaining - unchanged, len(before) - remaining, unchanged)
    return np.where(same, place, -1), changes


def _worth_keeping(runs: Sequence[tuple[int, int, int]], total: int, size: int) -> Sequence[tuple[int, int, int]]:
    """Of shards (first passage, count, number) those that are not written anew together with what stands beside them.

    That are those of less than half the size next to new passages: else an index that grows often by little would end
    in shards of a few passages.
    """
    while True:
        ends = [0, *(first + count for first, count, _ in runs)]
        firsts = [*(first for first, _, _ in runs), total]
        enclosed = [firsts[i] == ends[i] and firsts[i + 1] == ends[i + 1] for i in range(len(runs))]
        kept = [run for run, inside in zip(runs, enclosed, strict=True) if inside or 2 * run[1] >= size]
        if len(kept) == len(runs):
            return kept
        runs = kept
