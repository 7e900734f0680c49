"""Which parameters are trained, and how they are updated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optax
from flax import nnx

from ragjax.config import Train
from ragjax.errors import InputError
from ragjax.models.layers import Params

FlatParams = dict[tuple[str, ...], Any]  # parameters by path


def partition_params(params: Params, freeze: Sequence[str]) -> tuple[FlatParams, FlatParams]:
    """Trained and frozen parameters by path. A prefix in `freeze` is a dotted path such as `generator.embed`.

    Raises `InputError` for a prefix that names nothing, or when nothing is left to train.
    """
    flat = nnx.traversals.flatten_mapping(params)
    for prefix in freeze:
        if not any(is_frozen(path, [prefix]) for path in flat):
            parts = sorted({".".join(path[:2]) for path in flat} | {path[0] for path in flat})
            raise InputError(f"train.frozen_params: no parameters under {prefix!r}; there are {', '.join(parts)}")
    frozen = {path: leaf for path, leaf in flat.items() if is_frozen(path, freeze)}
    trained = {path: leaf for path, leaf in flat.items() if path not in frozen}
    if not trained:
        raise InputError("train.frozen_params leaves nothing to train")
    return trained, frozen


def is_frozen(path: Sequence[str], freeze: Sequence[str]) -> bool:
    """Whether a parameter is under one of the prefixes of `partition_params`."""
    return any((".".join(path) + ".").startswith(prefix + ".") for prefix in freeze)


def make_optimizer(train: Train) -> optax.GradientTransformation:
    """For each model apart: clipping by the global norm, then AdamW with the retriever's or the generator's rate.

    Clipped together, the generator's gradient, several times the larger, would set the scale of the retriever's, and
    another one in every step. Weight decay acts on matrices only. The rates rise linearly over `warmup_steps`, then
    fall to zero as `lr_schedule` says.
    """

    def schedule(peak: float) -> Callable[[Any], Any]:
        left = max(1, train.steps - train.warmup_steps)
        after = {
            "cosine": optax.cosine_decay_schedule(peak, left),
            "linear": optax.linear_schedule(peak, 0.0, left),
            "constant": optax.constant_schedule(peak),
        }[train.lr_schedule]
        # the first step already moves: at step 0 of W warm-up steps the rate is peak / W
        rising = optax.linear_schedule(peak / max(1, train.warmup_steps), peak, max(1, train.warmup_steps - 1))
        return optax.join_schedules([rising, after], [train.warmup_steps]) if train.warmup_steps else after

    def is_matrix(params: FlatParams) -> dict[tuple[str, ...], bool]:
        return {path: path[-1] in ("kernel", "embedding") for path in params}

    def clipped_adamw(peak: float) -> optax.GradientTransformation:
        adamw = optax.adamw(schedule(peak), weight_decay=train.weight_decay, mask=is_matrix)
        return optax.chain(optax.clip_by_global_norm(train.max_grad_norm), adamw)

    return optax.partition(
        {
            "retriever": clipped_adamw(train.retriever_lr),
            "passage_encoder": clipped_adamw(train.retriever_lr),
            "generator": clipped_adamw(train.generator_lr),
        },
        lambda params: {path: path[0] for path in params},
    )
