"""Which parameters are trained, and how they are updated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from ragjax.config import Train
from ragjax.errors import InputError
from ragjax.models.layers import ADAPTERS, Params, is_adapter

FlatParams = dict[tuple[str, ...], Any]  # parameters by path
RANGE = re.compile(r"(.+\.layers)\.(\d+)-(\d+)")  # of layers, the last one included
MATRICES = ("kernel", "embedding", *ADAPTERS)


def partition_params(params: Params, freeze: Sequence[str]) -> tuple[FlatParams, FlatParams]:
    """Trained and frozen parameters by path; `join_params` puts them together again.

    An entry of `freeze` is a dotted path such as `generator.embed`, whose parameters are frozen, or a range of layers
    such as `generator.layers.0-11`. Of stacked layers some of which are frozen, the trained and the frozen ones are in
    one part each. In a model that has adapters all but these are frozen. Raises `InputError` for an entry that names
    nothing, for kernels in int8 that are not frozen, or when nothing is left to train.
    """
    flat = nnx.traversals.flatten_mapping(params)
    _check_entries(flat, freeze)
    whole, layers = frozen_paths(flat, freeze), frozen_layers(flat, freeze)
    frozen = {path: leaf for path, leaf in flat.items() if path in whole}
    trained = {path: leaf for path, leaf in flat.items() if path not in whole}
    for path in sorted(layers.keys() & trained.keys()):
        frozen[path] = _take_layers(flat[path], layers[path])
        trained[path] = _take_layers(flat[path], _others(flat[path], layers[path]))
    if not trained:
        raise InputError("train.frozen_params leaves nothing to train")
    if any(leaf.dtype == jnp.int8 for leaf in trained.values()):
        raise InputError(
            "generator.quantization: kernels in int8 cannot be trained; set train.lora.rank, such as 16, or "
            "train.frozen_params=[generator.layers]"
        )
    return trained, frozen


def join_params(trained: FlatParams, frozen: FlatParams, freeze: Sequence[str]) -> Params:
    """The parameters that `partition_params` took apart."""
    joined, both = frozen | trained, sorted(trained.keys() & frozen.keys())
    joined |= {path: jnp.concatenate([frozen[path], trained[path]]) for path in both}
    layers = frozen_layers(joined, freeze)
    for path in both:
        order = np.argsort([*layers[path], *_others(joined[path], layers[path])])
        joined[path] = _take_layers(joined[path], order.tolist())
    return nnx.traversals.unflatten_mapping(joined)


def frozen_paths(flat: FlatParams, freeze: Sequence[str]) -> set[tuple[str, ...]]:
    """The parameters no part of which is trained."""
    adapted = {path[0] for path in flat if is_adapter(path)}
    frozen = {path for path in flat if path[0] in adapted and not is_adapter(path)} | _all_layers(flat, freeze)
    return frozen.union(*(_below(flat, entry) for entry in freeze))


def frozen_layers(flat: FlatParams, freeze: Sequence[str]) -> dict[tuple[str, ...], list[int]]:
    """By path, the layers that ranges freeze."""
    found: dict[tuple[str, ...], set[int]] = {}
    for match in filter(None, map(RANGE.fullmatch, freeze)):
        for path in _below(flat, match[1]):
            count = flat[path].shape[0]
            found.setdefault(path, set()).update(range(int(match[2]), min(int(match[3]) + 1, count)))
    return {path: sorted(layers) for path, layers in found.items()}


def _below(flat: FlatParams, prefix: str) -> set[tuple[str, ...]]:
    return {path for path in flat if f"{'.'.join(path)}.".startswith(f"{prefix}.")}


def _check_entries(flat: FlatParams, freeze: Sequence[str]) -> None:
    for entry in freeze:
        if match := RANGE.fullmatch(entry):
            count = min((flat[path].shape[0] for path in _below(flat, match[1])), default=0)
            if not int(match[2]) <= int(match[3]) < count:
                there = f"there are 0-{count - 1}" if count else "there are no such layers"
                raise InputError(f"train.frozen_params: {entry}: {there}; expected the first and the last of them")
        elif not _below(flat, entry):
            parts = sorted({".".join(path[:2]) for path in flat} | {path[0] for path in flat})
            raise InputError(f"train.frozen_params: no parameters under {entry!r}; there are {', '.join(parts)}")


def _all_layers(flat: FlatParams, freeze: Sequence[str]) -> set[tuple[str, ...]]:
    """Stacked parameters whose layers are all frozen by ranges."""
    return {path for path, layers in frozen_layers(flat, freeze).items() if len(layers) == flat[path].shape[0]}


def _others(leaf: Any, layers: Sequence[int]) -> list[int]:
    return [layer for layer in range(leaf.shape[0]) if layer not in set(layers)]


def _take_layers(leaf: Any, layers: Sequence[int]) -> Any:
    """Some of the stacked layers, in this order, as few slices of what may be a shape only."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(shape=(len(layers), *leaf.shape[1:]))
    starts = [at for at, layer in enumerate(layers) if at == 0 or layer != layers[at - 1] + 1]
    runs = zip(starts, [*starts[1:], len(layers)], strict=True)
    return jnp.concatenate([leaf[layers[a] : layers[b - 1] + 1] for a, b in runs])


def schedule_numbers(train: Train) -> Float[np.ndarray, "2 6"]:
    """What the rates of all steps follow from, a row for the retriever and one for the generator.

    A training step takes them as an argument: runs with other rates or another number of steps share its program.
    """
    rising, falling = max(1, train.warmup_steps - 1), max(1, train.steps - train.warmup_steps)
    one, rows = np.float32(1), list[list[Any]]()
    for peak in (train.retriever_lr, train.generator_lr):
        # the first step already moves: at step 0 of W warm-up steps the rate is peak / W
        missing = peak / max(1, train.warmup_steps) - peak
        rows.append([peak, missing, train.warmup_steps, one / np.float32(rising), falling, one / np.float32(falling)])
    return np.array(rows, np.float32)


def learning_rate(kind: str, numbers: Float[Array, " 6"], step: Any) -> Any:
    """The rate of a step, counted from 0, by a row of `schedule_numbers`; of `kind` see `train.lr_schedule`."""
    peak, missing, warmup_steps, per_rising, falling, per_falling = numbers
    rising = missing * (1 - step * per_rising) + peak
    done = jnp.clip(step - warmup_steps, 0, falling)
    after = {
        "cosine": lambda: peak * (0.5 * (1 + jnp.cos(done * (jnp.pi * per_falling)))),
        "linear": lambda: peak * (1 - done * per_falling),
        "constant": lambda: peak,
    }[kind]()
    return jnp.where(step < warmup_steps, rising, after)


def make_optimizer(train: Train, numbers: Float[Array, "2 6"] | None = None) -> optax.GradientTransformation:
    """For each model apart: clipping by the global norm, then `train.optimizer` with the model's own rate.

    Clipped together, the generator's gradient, several times the larger, would set the scale of the retriever's, and
    another one in every step. Weight decay acts on matrices only, unless `weight_decay_on` says otherwise. The rates
    rise linearly over `warmup_steps`, then fall to zero as `lr_schedule` says; their `numbers` are those of
    `schedule_numbers` unless given. AdamW's second moments stay float32: in bfloat16 what a step changes of them is
    less than their rounding.
    """
    retriever_numbers, generator_numbers = jnp.asarray(schedule_numbers(train)) if numbers is None else numbers

    def decays(params: FlatParams) -> dict[tuple[str, ...], bool]:
        return {path: train.weight_decay_on == "all" or path[-1] in MATRICES for path in params}

    def clipped(numbers: Float[Array, " 6"]) -> optax.GradientTransformation:
        schedule = partial(learning_rate, train.lr_schedule, numbers)
        clip = optax.clip_by_global_norm(train.max_grad_norm)
        if train.optimizer == "adafactor":
            # as Shazeer and Stern 2018 have it, but for rates that do not depend on the step or on the weights
            scale = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
            decay = optax.add_decayed_weights(train.weight_decay, decays)
            return optax.chain(clip, scale, decay, optax.scale_by_learning_rate(schedule))
        mu_dtype = jnp.bfloat16 if train.optimizer == "adamw_bfloat16" else None
        adamw = optax.adamw(schedule, weight_decay=train.weight_decay, mask=decays, mu_dtype=mu_dtype)
        return optax.chain(clip, adamw)

    return optax.partition(
        {
            "retriever": clipped(retriever_numbers),
            "passage_encoder": clipped(retriever_numbers),
            "generator": clipped(generator_numbers),
        },
        lambda params: {path: path[0] for path in params},
    )
