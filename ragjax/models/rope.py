"""Rotary positions (Su et al. 2021), and the ways in which a model's are stretched beyond what it was trained on.

linear: all turn slower by a factor (Chen et al. 2023). llama3: only the slow ones do. yarn: a ramp between the two, and
sharper attention (Peng et al. 2023). longrope: a factor for each pair (Ding et al. 2024), here those of short texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ragjax.errors import InputError
from ragjax.models.hf_config import Fields

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """By how much each pair of a head's numbers turns from one position to the next."""

    turns: tuple[float, ...]  # radians; a head's numbers beyond the pairs do not turn
    scale: float = 1.0  # of cosines and sines
    longest: int | None = None  # positions for which it is meant, where it says so

    @classmethod
    def from_hf(cls, hf: Fields, rope: Fields, head_dim: int, theta: float, partial: float = 1.0) -> Rope:
        """From config.json and the part of it that is about positions; `theta` is the base where that does not say.

        `partial` is the share of a head's numbers that turn. Raises `InputError` for another kind of scaling, and for
        what gives no finite numbers.
        """
        kind = rope.text("rope_type" if rope.has("rope_type") else "type", "default", among=KINDS)
        size = int(head_dim * partial)
        if size % 2 or not size:
            raise InputError(f"{size} numbers of a head (head_dim is {head_dim}) are to turn; expected an even number")
        theta = rope.number("rope_theta", theta)
        longest = hf.count("max_position_embeddings", 2048)
        original = (hf if hf.has("original_max_position_embeddings") else rope).count(
            "original_max_position_embeddings", longest
        )
        with np.errstate(all="ignore"):
            turns, scale = theta ** -(np.arange(0, size, 2) / size), 1.0
            if kind == "linear":
                turns = turns / rope.number("factor")
            elif kind == "llama3":
                turns = _llama3(turns, rope, original)
            elif kind == "yarn":
                turns, scale = _yarn(turns, rope, theta, longest, original)
            elif kind == "longrope":
                turns, scale = _longrope(turns, rope, longest, original)
        if not np.isfinite(turns).all() or not math.isfinite(scale):
            raise InputError(f"its rotary positions ({kind}) have no finite numbers; fetch it again")
        return cls(tuple(map(float, turns)), float(scale), original if kind == "longrope" else None)


def rope_angles(positions: Int[Array, "..."], rope: Rope) -> tuple[Array, Array]:
    """Cosines and sines [..., 1, R] of R pairs at these positions."""
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(rope.turns, jnp.float32)
    return jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale


def apply_rope(x: Float[Array, "... Dh"], angles: tuple[Array, Array]) -> Float[Array, "... Dh"]:
    """Turns the pairs (x[i], x[i + R]) by the R `angles`; what is beyond 2 R stays."""
    cosine, sine = (part.astype(x.dtype) for part in angles)
    pairs = cosine.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], axis=-1)


def _llama3(turns: np.ndarray, rope: Fields, original: int) -> np.ndarray:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    rounds = original * turns / (2 * math.pi)  # how often a pair turns round over the original length
    smooth = np.clip((rounds - low) / (high - low), 0.0, 1.0)
    return turns * (smooth + (1.0 - smooth) / rope.number("factor"))


def _yarn(turns: np.ndarray, rope: Fields, theta: float, longest: int, original: int) -> tuple[np.ndarray, float]:
    factor = rope.number("factor", longest / original)

    def sharpness(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = sharpness(1.0)
    if rope.has("mscale") and rope.has("mscale_all_dim"):
        both = [rope.number(name, least=0.0) for name in ("mscale", "mscale_all_dim")]
        scale = sharpness(both[0]) / sharpness(both[1]) if all(both) else scale

    def pair(rounds: float) -> float:
        """Which pair turns round so often over the original length."""
        return float(len(turns) * np.log(original / (rounds * 2 * math.pi)) / np.log(theta))

    low, high = pair(rope.number("beta_fast", 32.0)), pair(rope.number("beta_slow", 1.0))
    if rope.flag("truncate", True):
        low, high = float(np.floor(low)), float(np.ceil(high))
    low, high = max(low, 0.0), min(high, 2 * len(turns) - 1)
    high += 0.001 if low == high else 0.0
    stretched = np.clip((np.arange(len(turns)) - low) / (high - low), 0.0, 1.0)
    return turns * (1 - stretched + stretched / factor), rope.number("attention_factor", scale)


def _longrope(turns: np.ndarray, rope: Fields, longest: int, original: int) -> tuple[np.ndarray, float]:
    factor = rope.number("factor", longest / original)
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    factors = rope.numbers("short_factor", len(turns))
    return turns / np.array(factors), rope.number("attention_factor", scale)
