"""Adapters beside a base in int8: gradients, layouts, what a run saves and gives to others, and answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gradients import assert_same_gradients, moments, norm
from trained import refused
from world import open_world, tiny_config

from ragjax.checkpoints.hub import fingerprint_files
from ragjax.checkpoints.pretrained import open_generator
from ragjax.checkpoints.quantization import dequantized
from ragjax.cli import main
from ragjax.commands.train import train
from ragjax.config import Config
from ragjax.data.question_batch import question_batch
from ragjax.data.questions import read_questions
from ragjax.models.layers import Params, is_adapter
from ragjax.parallel.mesh import local_mesh, make_mesh
from ragjax.parallel.sharding import put_global, shard_batch
from ragjax.rag import RagPipeline, load_pipeline
from ragjax.runs.checkpointer import Checkpointer
from ragjax.runs.restore import restore_params
from ragjax.runs.run_dir import load_run_config
from ragjax.training.batch import TrainBatch, attach_documents
from ragjax.training.state import abstract_state, init_train_state, saved_part, state_shardings
from ragjax.training.step import gradients, make_train_step

KEY = jax.random.key(5)
LORA: dict[str, Any] = {"train__lora__rank": 3, "train__lora__alpha": 6.0}
INT8: dict[str, Any] = {"generator__quantization": "int8", **LORA}


@dataclass(frozen=True)
class Setup:
    """The tiny models with adapters that are not 0, the generator in int8, the same in float32, and a batch."""

    int8: RagPipeline
    plain: RagPipeline
    params: Params
    batch: TrainBatch


def flat(params: Params) -> dict[tuple[str, ...], np.ndarray]:
    return nnx.traversals.flatten_mapping(jax.device_get(params))


def tree(leaves: dict[tuple[str, ...], Any]) -> Params:
    return jax.tree.map(jnp.asarray, nnx.traversals.unflatten_mapping(leaves))


@pytest.fixture(scope="module")
def setup(world: Path) -> Setup:
    int8, index, store = open_world(tiny_config(world, train__max_grad_norm=1e9, **INT8))
    chosen = read_questions(world / "train.jsonl")[:8]
    questions = question_batch(int8.tokenizers, [q.question for q in chosen], [q.answers[0] for q in chosen])
    ids = (7 * np.arange(24).reshape(8, 3) % 30).astype(np.int32)
    batch = jax.tree.map(jnp.asarray, attach_documents(int8, index, store, questions, ids))
    rng, leaves = np.random.default_rng(0), flat(int8.initial_params())
    some = {p: rng.normal(scale=0.1, size=x.shape).astype(x.dtype) for p, x in leaves.items() if p[-1] == "lora_b"}
    return Setup(int8, load_pipeline(tiny_config(world, **LORA)), tree(leaves | some), batch)


@pytest.fixture(scope="module")
def plain_gradients(setup: Setup) -> Any:
    return jax.jit(lambda params, batch: gradients(setup.plain, params, batch, KEY))


@pytest.fixture(scope="module")
def expected(setup: Setup, plain_gradients: Any) -> Any:
    """With a base of float32 numbers that are those of int8 times their scales."""
    return jax.device_get(plain_gradients(tree(flat(dequantized(jax.device_get(setup.params)))), setup.batch))


def test_gradients_are_those_of_the_weights_that_are_kept(setup: Setup, expected: Any) -> None:
    """They pass through int8 to what lies below, and stop at the adapters: nothing else of the generator has any."""
    found = jax.device_get(
        jax.jit(lambda params, batch: gradients(setup.int8, params, batch, KEY))(setup.params, setup.batch)
    )
    assert_same_gradients(found[0], expected[0], 1e-4)
    assert all(map(is_adapter, (path for path in found[0] if path[0] == "generator")))
    np.testing.assert_allclose(found[1]["loss"], expected[1]["loss"], rtol=1e-5)


def test_the_gradients_differ_from_float32s_as_by_any_rounding(
    setup: Setup, plain_gradients: Any, expected: Any
) -> None:
    """Numbers that lie anywhere within half a step of the true ones change them as much; ten times nearer ones less."""
    base, steps = flat(setup.plain.initial_params()), flat(setup.params)
    adapters = {path: leaf for path, leaf in steps.items() if is_adapter(path)}
    true = jax.device_get(plain_gradients(tree(base | adapters), setup.batch)[0])

    def difference(seed: int, of_a_step: float) -> float:
        rng, moved = np.random.default_rng(seed), dict(base)
        for path in steps:
            if path[-1] == "kernel_scale":
                kernel = *path[:-1], "kernel"
                within = of_a_step / 2 * np.broadcast_to(steps[path][:, None], base[kernel].shape)
                moved[kernel] = base[kernel] + rng.uniform(-within, within).astype(np.float32)
        some = jax.device_get(plain_gradients(tree(moved | adapters), setup.batch)[0])
        return norm([some[path] - true[path] for path in true])

    found, size = norm([expected[0][path] - true[path] for path in true]), norm(list(true.values()))
    anywhere = [difference(seed, 1.0) for seed in range(3)]
    assert 0 < found <= 2 * max(anywhere) and max(anywhere) < 0.1 * size
    assert difference(0, 0.1) < 0.2 * anywhere[0]


@pytest.mark.slow
@pytest.mark.devices(8)
def test_layouts(setup: Setup, expected: Any) -> None:
    """Split over `data` and `model`, in two parts: the scales lie as the channels that they belong to."""
    config = setup.int8.config
    settings = config.train.replace(gradient_accumulation=2)
    rag = replace(setup.int8, config=config.replace(mesh=config.mesh.replace(model=2, fsdp=True), train=settings))
    mesh, before = make_mesh(2), flat(setup.params)
    state = init_train_state(rag, jax.tree.map(jnp.array, setup.params))
    shardings = state_shardings(rag, mesh, state)
    batch = shard_batch(mesh, jax.device_get(setup.batch), 8)
    stepped, _ = make_train_step(rag, shardings)(put_global(state, shardings), batch)
    found = {path: 10 * leaf for path, leaf in moments(stepped.optimizer)["mu"].items()}
    assert_same_gradients(found, expected[0], 1e-4)
    after = flat(stepped.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved and all(is_adapter(path) or path[0] == "retriever" for path in moved)
    specs = {
        (part, name): tuple(shardings.params["generator"]["layers"][part][name].spec)
        for part in ("up", "down")
        for name in ("kernel", "kernel_scale")
    }
    assert specs == {
        ("up", "kernel"): (None, "data", "model"),
        ("up", "kernel_scale"): (None, "model"),
        ("down", "kernel"): (None, "model", "data"),
        ("down", "kernel_scale"): (None, None),
    }


# runs


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    folder = str(tmp_path_factory.mktemp("int8") / "run")
    settings = {"train__steps": 4, "train__save_every": 2, "train__keep_checkpoints": 9}
    config = tiny_config(world, output=folder, **settings, **INT8)
    open_world(config)
    train(config)
    yield config


def saved(config: Config, step: int) -> Any:
    with Checkpointer(Path(config.output) / "checkpoints", writing=False) as checkpoints:
        state = saved_part(abstract_state(load_pipeline(config), local_mesh(data=1)))
        return jax.device_get(checkpoints.restore(step, state)), checkpoints.metadata(step)


def test_a_run_goes_on_to_the_bit(trained: Config, tmp_path: Path) -> None:
    """From a checkpoint that holds adapters, and of the base its fingerprint."""
    state, metadata = saved(trained, 4)
    assert all(map(is_adapter, flat(state.params["generator"])))
    assert metadata["base"] == {"generator": fingerprint_files(load_pipeline(trained).generator.files)}
    again = trained.replace(output=str(tmp_path / "again"))
    shutil.copytree(trained.output, again.output)
    shutil.rmtree(Path(again.output) / "checkpoints" / "4")
    train(again)
    chex.assert_trees_all_equal(saved(again, 4)[0], state)


def test_what_is_exported(trained: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adapters as PEFT's; merged, the weights that were trained with, which is said."""
    assert main(["export", trained.output, str(tmp_path / "peft")]) == 0
    hf = json.loads((tmp_path / "peft/generator/adapter_config.json").read_text())
    assert hf["r"] == 3 and "int8" not in capsys.readouterr().err
    assert main(["export", trained.output, str(tmp_path / "whole"), "--merge"]) == 0
    assert "the generator's kernels are those of int8" in " ".join(capsys.readouterr().err.split())
    found, restored = (
        flat(open_generator(tmp_path / "whole/generator").load_params()),
        restore_params(load_pipeline(trained)),
    )
    assert restored is not None
    params = flat(restored[0]["generator"])
    for path, leaf in found.items():
        wanted = params[path].astype(np.float32)
        if params[path].dtype == np.int8:
            module = path[:-1]
            wanted = wanted * params[*module, "kernel_scale"][:, None]
            wanted = wanted + 2.0 * params[*module, "lora_a"] @ params[*module, "lora_b"]
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-6)


def test_a_run_answers_in_either(trained: Config, run: Path) -> None:
    """Adapters stand beside a base of either kind, and what was trained whole is quantised afterwards."""
    for config in (trained, load_run_config(run)):
        kinds = {}
        for kind in ("int8", None):
            restored = restore_params(
                load_pipeline(config.replace(generator=config.generator.replace(quantization=kind)))
            )
            assert restored is not None
            kinds[kind] = flat(restored[0])
        near, exact = flat(dequantized(tree(kinds["int8"]))), kinds[None]
        assert near.keys() == exact.keys()
        for path, leaf in exact.items():
            scale = kinds["int8"].get((*path[:-1], "kernel_scale")) if path[-1] == "kernel" else None
            bound = 0 if scale is None else scale[:, None] * (0.5 + 1e-4)
            assert (np.abs(near[path] - leaf) <= bound).all(), path


def test_int8_is_not_trained(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [str(world / "config.yaml"), "generator.quantization=int8", f"output={tmp_path}/run"]
    message = refused(capsys, tmp_path, "train", *settings)
    assert "kernels in int8 cannot be trained; set train.lora.rank" in message
    message = refused(capsys, tmp_path, "train", *settings, "train.frozen_params=[generator.layers.0-0]")
    assert "kernels in int8 cannot be trained" in message
