"""Gradients compared, and read off the optimiser after a step.

Never the parameters after Adam's first step: that moves each number by ± the rate, even one whose gradient is nothing
but rounding, as a key's bias has it (softmax ignores what is added to all scores).
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import numpy as np
import optax


def norm(tree: Any) -> float:
    """Of all leaves together, in NumPy: JAX would compile a program for each shape."""
    return math.sqrt(sum(float(np.linalg.norm(leaf)) ** 2 for leaf in jax.tree.leaves(tree)))


def assert_same_gradients(ours: Any, theirs: Any, relative: float = 1e-5) -> None:
    """Equal in the norm of each leaf; one below a thousandth of the whole is measured by that, being rounding."""
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    floor = 1e-3 * norm(theirs)
    for (path, value), other in zip(jax.tree.leaves_with_path(theirs), jax.tree.leaves(ours), strict=True):
        difference = float(np.linalg.norm(other - value))
        assert difference <= relative * max(float(np.linalg.norm(value)), floor), jax.tree_util.keystr(path)


def moments(optimizer_state: Any) -> dict[str, dict[tuple[str, ...], Any]]:
    """Adam's first and second moments by path, of both parts."""
    found: dict[str, dict[tuple[str, ...], Any]] = {"mu": {}, "nu": {}}
    for part in optimizer_state.inner_states.values():
        for name, by_path in found.items():
            held = optax.tree.get(part, name)
            by_path |= {path: leaf for path, leaf in held.items() if not isinstance(leaf, optax.MaskedNode)}
    return jax.device_get(found)
