"""Rows of tokens padded to a few widths, and counts to a few sizes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Integer

Ids = Sequence[int] | Integer[np.ndarray, " _"]


def length_buckets(longest: int) -> tuple[int, ...]:
    """A few widths ending at `longest`: 32, 64, 96, 128, 160, 192, 256, 320, 384, 512, …"""
    widths = [32, 64, 96, 128]
    while (last := widths[-1]) < longest:
        widths += [last * 5 // 4, last * 3 // 2, last * 2]
    return (*(w for w in widths if w < longest), longest)


def pick_bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest width that holds `length` tokens. Raises `ValueError` when none does."""
    fitting = [b for b in buckets if b >= length]
    if not fitting:
        raise ValueError(f"{length} tokens do not fit into {max(buckets)}")
    return min(fitting)


def reading_width(longest: int, most: int) -> int:
    """How many tokens to read of rows padded to `most`, where time follows the tokens and programs are cheap."""
    return min(-(-longest // 16) * 16, most)


def groups_by_length(lengths: Int[np.ndarray, " n"], most: int) -> tuple[Int[np.ndarray, "G m"], Int[np.ndarray, " n"]]:
    """n rows in as few groups of at most `most` as there can be, those of like lengths together; and their places.

    All groups have as many rows: what fills up the last one are rows of others. A place counts through all groups.
    """
    count = -(-len(lengths) // most)
    order = np.argsort(lengths, kind="stable")
    return np.resize(order, (count, -(-len(lengths) // count))), np.argsort(order)


def pad_sequences(
    rows: Sequence[Ids], width: int, pad_id: int
) -> tuple[Int[np.ndarray, "n S"], Bool[np.ndarray, "n S"]]:
    """Rows padded on the right to `width`, and the mask that is true on their own tokens."""
    lengths = np.array([len(row) for row in rows], np.int32)
    if len(rows) and lengths.max() > width:
        raise ValueError(f"a row of {lengths.max()} tokens does not fit into {width}")
    tokens = np.full((len(rows), width), pad_id, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, np.arange(width) < lengths[:, None]


def bucket_size(count: int, least: int = 1) -> int:
    """1, 2, 3, 4, 6, 8, 12, 16, …, from `least` on: so few shapes that few programs are compiled."""
    power = 1 << (max(count, least) - 1).bit_length()
    return power * 3 // 4 if max(count, least) <= power * 3 // 4 else power


def filled_size(count: int, devices: int, most: int) -> int:
    """To how many rows `count` are filled up: as many on each device, one of a few sizes; `most` is one of them."""
    each = -(-count // devices)
    return devices * min(bucket_size(each), max(most, each))
