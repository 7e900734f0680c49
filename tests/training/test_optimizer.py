"""Which parameters are trained, by ranges of layers too, and the optimisers to choose from, against optax's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import EPS
from world import open_world, tiny_config

from ragjax.config import Train
from ragjax.errors import InputError
from ragjax.parallel.mesh import make_mesh
from ragjax.parallel.sharding import put_global
from ragjax.training.optimizer import (
    FlatParams,
    join_params,
    learning_rate,
    make_optimizer,
    partition_params,
    schedule_numbers,
)
from ragjax.training.state import init_train_state, state_shardings

KERNEL, NORM = ("generator", "layers", "up", "kernel"), ("generator", "layers", "norm", "scale")
RNG = np.random.default_rng(0)


def stacked(layers: int = 6) -> FlatParams:
    return {
        KERNEL: jnp.asarray(RNG.normal(size=(layers, 4, 3)), jnp.float32),
        NORM: jnp.asarray(RNG.normal(size=(layers, 4)), jnp.float32),
        ("generator", "embed", "embedding"): jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32),
        ("retriever", "words", "embedding"): jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32),
    }


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        (["generator.layers.0-3"], [4, 5]),
        (["generator.layers.0-0", "generator.layers.3-4", "generator.layers.2-3"], [1, 5]),
        (["generator.layers.5-5"], [0, 1, 2, 3, 4]),
        (["generator.layers.0-2", "generator.layers.3-5"], []),
        (["generator.layers.up", "generator.layers.1-2"], [0, 3, 4, 5]),
    ],
)
def test_ranges_of_layers(freeze: list[str], trained: list[int]) -> None:
    """What is trained of stacked layers are those outside the ranges, and all comes back to its place."""
    flat = stacked()
    ours, frozen = partition_params(nnx.traversals.unflatten_mapping(flat), freeze)
    assert (KERNEL in ours) == bool(trained and "generator.layers.up" not in freeze)
    for path in {KERNEL, NORM} & ours.keys():
        np.testing.assert_array_equal(ours[path], flat[path][np.array(trained)])
    again = nnx.traversals.flatten_mapping(join_params(ours, frozen, freeze))
    chex.assert_trees_all_equal(dict(again), flat)
    shapes = jax.eval_shape(lambda: flat)
    abstract, _ = partition_params(nnx.traversals.unflatten_mapping(shapes), freeze)
    assert {p: leaf.shape for p, leaf in abstract.items()} == {p: leaf.shape for p, leaf in ours.items()}


@pytest.mark.parametrize("entry", ["generator.layers.3-6", "generator.layers.4-3", "retriever.layers.0-1"])
def test_layers_that_are_not_there(entry: str) -> None:
    with pytest.raises(InputError, match=rf"train\.frozen_params: {entry}: there are (0-5|no such layers); expected"):
        partition_params(nnx.traversals.unflatten_mapping(stacked()), [entry])


def test_of_models_with_adapters_only_these_are_trained() -> None:
    flat = stacked() | {(*KERNEL[:-1], "lora_a"): jnp.ones((6, 4, 2)), (*KERNEL[:-1], "lora_b"): jnp.ones((6, 2, 3))}
    params = nnx.traversals.unflatten_mapping(flat)
    ours, frozen = partition_params(params, ["generator.layers.0-4"])
    assert {path[-2:]: leaf.shape for path, leaf in ours.items()} == {
        ("up", "lora_a"): (1, 4, 2),
        ("up", "lora_b"): (1, 2, 3),
        ("words", "embedding"): (5, 4),
    }
    assert frozen[KERNEL].shape == (6, 4, 3)
    chex.assert_trees_all_equal(join_params(ours, frozen, ["generator.layers.0-4"]), params)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup_steps", "steps"), [(0, 24), (1, 7), (5, 30), (200, 3000)])
def test_rates_are_optax_s(kind: str, warmup_steps: int, steps: int) -> None:
    """Of each step and beyond the last, apart by what dividing, or multiplying by an inverse, rounds."""
    peak, falling = 3e-3, steps - warmup_steps
    theirs = {
        "cosine": optax.cosine_decay_schedule(peak, falling),
        "linear": optax.linear_schedule(peak, 0.0, falling),
        "constant": optax.constant_schedule(peak),
    }[kind]
    if warmup_steps:
        rising = optax.linear_schedule(peak / warmup_steps, peak, max(1, warmup_steps - 1))
        theirs = optax.join_schedules([rising, theirs], [warmup_steps])
    train = Train(steps=steps, warmup_steps=warmup_steps, retriever_lr=1e-3, generator_lr=peak)
    every, (of_retriever, of_generator) = jnp.arange(steps + 3), jnp.asarray(schedule_numbers(train))
    found = jax.jit(partial(learning_rate, kind))(of_generator, every)
    expected = np.broadcast_to(jax.jit(theirs)(every), every.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * EPS * peak)
    np.testing.assert_allclose(learning_rate(kind, of_retriever, every) * 3, found, rtol=1e-5, atol=4 * EPS * peak)


def updates(train: Train, params: FlatParams, steps: int = 2) -> tuple[FlatParams, Any]:
    """What some steps add to parameters whose gradient they are themselves, and the state after them."""
    optimizer = make_optimizer(train)
    update, now, state = jax.jit(optimizer.update), params, optimizer.init(params)
    for _ in range(steps):
        change, state = update(now, state, now)
        now = optax.apply_updates(now, change)
    return jax.tree.map(lambda after, before: after - before, now, params), state


SETTINGS: dict[str, Any] = {
    "lr_schedule": "constant",
    "max_grad_norm": 1e9,
    "generator_lr": 0.01,
    "retriever_lr": 0.01,
}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bfloat16", "adafactor"])
@pytest.mark.parametrize("on", ["matrices", "all"])
def test_weight_decay_is_the_same_for_all(optimizer: Any, on: Any) -> None:
    """A gradient of 0 leaves the decay alone: the rate times the weight; norms have it only where they are named."""
    train = Train(weight_decay=0.1, **SETTINGS).replace(optimizer=optimizer, weight_decay_on=on)
    params, method = stacked(), make_optimizer(train)
    found, _ = jax.jit(method.update)(jax.tree.map(jnp.zeros_like, params), method.init(params), params)
    for path, leaf in params.items():
        share = 0.0 if path == NORM and on == "matrices" else 0.01 * 0.1
        np.testing.assert_allclose(found[path], -share * leaf, rtol=1e-5, atol=1e-12)


def test_adafactor_is_optax_s() -> None:
    """Its second moments are factored from 128 on: of a [2,130,140] kernel two vectors a layer."""
    params: FlatParams = {KERNEL: jnp.asarray(RNG.normal(size=(2, 130, 140)), jnp.float32), NORM: stacked()[NORM]}
    found, state = updates(Train(optimizer="adafactor", **SETTINGS), params)
    theirs = optax.adafactor(0.01, multiply_by_parameter_scale=False)
    update, now, other = jax.jit(theirs.update), params, theirs.init(params)
    for _ in range(2):
        change, other = update(now, other, now)
        now = optax.apply_updates(now, change)
    chex.assert_trees_all_close(found, jax.tree.map(lambda a, b: a - b, now, params), rtol=1e-4, atol=1e-6)
    held = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert held < params[KERNEL].size / 50 + 2 * params[NORM].size


def test_moments_in_bfloat16() -> None:
    """The first ones only: they take half, and the steps differ by the rounding of such numbers."""
    params = stacked()
    (found, state), (expected, _) = (
        updates(Train(optimizer=o, **SETTINGS), params) for o in ("adamw_bfloat16", "adamw")
    )
    for name, dtype in (("mu", jnp.bfloat16), ("nu", jnp.float32)):
        held = optax.tree.get(state.inner_states["generator"], name)
        assert {leaf.dtype for leaf in jax.tree.leaves(held)} == {jnp.dtype(dtype)}
    chex.assert_trees_all_close(found, expected, rtol=2**-6)


def test_factored_moments_lie_on_every_device(world: Path) -> None:
    """A state of Adafactor over a mesh that splits parameters: its vectors are whole everywhere, and all fits."""
    rag, *_ = open_world(tiny_config(world, train__optimizer="adafactor", mesh__model=2, mesh__fsdp=True))
    mesh, state = make_mesh(2), init_train_state(rag, rag.initial_params())
    placed = put_global(state, state_shardings(rag, mesh, state))
    inner = placed.optimizer.inner_states["generator"]
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(optax.tree.get(inner, "v_row")))
    assert not placed.params["generator"]["layers"]["up"]["kernel"].is_fully_replicated
