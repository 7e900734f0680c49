"""Batches and parameters on eight virtual devices; the compilation cache."""

from __future__ import annotations

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType

from ragjax.errors import InputError
from ragjax.parallel.mesh import check_batch, command_mesh, index_mesh, local_mesh, make_mesh
from ragjax.parallel.processes import wait_for_all
from ragjax.parallel.sharding import (
    gather_to_host,
    local_rows,
    map_per_device,
    parameter_spec,
    put_global,
    replicated,
    shard_batch,
)
from ragjax.runs.restore import enable_compilation_cache

pytestmark = pytest.mark.devices(8)


def test_a_batch_is_split_and_parameters_are_whole() -> None:
    mesh = make_mesh()
    assert mesh.axis_names == ("data", "model") and mesh.axis_types == (AxisType.Auto,) * 2
    assert (mesh.shape["data"], mesh.shape["model"]) == (8, 1)
    batch = {"tokens": np.arange(48).reshape(16, 3), "mask": np.ones(16, bool)}
    sharded, params = shard_batch(mesh, batch, 16), put_global({"w": jnp.arange(3.0)}, replicated(mesh))
    assert local_rows(mesh, 16).tolist() == list(range(16))
    chex.assert_trees_all_equal(gather_to_host(sharded), batch)
    chex.assert_trees_all_equal(sharded, batch)
    assert [s.data.shape for s in sharded["tokens"].addressable_shards] == [(2, 3)] * 8
    assert params["w"].sharding.is_fully_replicated and len(params["w"].sharding.device_set) == 8
    gradient = jax.jit(jax.grad(lambda w, x: jnp.mean(x @ w)))(params["w"], sharded["tokens"])
    chex.assert_trees_all_close(gradient, batch["tokens"].mean(axis=0).astype(np.float32))


def test_each_device_works_as_if_alone() -> None:
    def centred(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return (x - x.mean(axis=0)) @ w + y  # the mean is over a device's own rows

    w, x, y = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((3, 2), (16, 3), (16, 2)))
    mesh = local_mesh()
    assert mesh.size == 8
    found = map_per_device(mesh, centred)(put_global(w, replicated(mesh)), x, y)
    parts = [jax.jit(centred)(w, *part) for part in zip(np.split(x, 8), np.split(y, 8), strict=True)]
    np.testing.assert_array_equal(found, np.concatenate(parts))


def test_one_process_waits_for_none() -> None:
    wait_for_all("here")


@pytest.mark.parametrize(
    ("name", "shape", "heads", "fsdp", "spec"),
    [
        ("layers.query.kernel", (2, 32, 24), 6, False, (None, None, "model")),
        ("layers.key.kernel", (2, 32, 12), 3, False, (None, None, None)),
        ("layers.output.kernel", (2, 24, 32), 6, False, (None, "model", None)),
        ("layers.output.bias", (2, 32), 6, False, (None, None)),
        ("layers.up.kernel", (2, 32, 64), None, True, (None, "data", "model")),
        ("layers.down.kernel", (2, 64, 30), None, True, (None, "model", None)),
        ("layers.key.kernel", (2, 32, 12), 3, True, (None, "data", None)),
        ("layers.ffn_norm.scale", (4, 32), None, True, (None, "data")),
        ("embed.embedding", (258, 32), None, True, ("model", "data")),
        ("embed.embedding", (259, 32), None, True, (None, "data")),
        ("head.embedding", (256, 30), None, False, ("model", None)),
        ("words.embedding", (258, 32), None, True, (None, "data")),
        ("words.embedding", (256, 32), None, True, ("data", None)),
        ("layers.query.lora_a", (2, 32, 4), 6, True, (None, "data", None)),
        ("layers.query.lora_b", (2, 4, 24), 6, False, (None, None, "model")),
        ("layers.down.lora_a", (2, 64, 4), None, False, (None, "model", None)),
        ("layers.down.lora_b", (2, 4, 32), None, True, (None, None, "data")),
        ("step", (), None, True, ()),
    ],
)
def test_where_a_parameter_lies(name: str, shape: tuple, heads: int | None, fsdp: bool, spec: tuple) -> None:
    """On 4 × 2 devices: heads, inner widths and vocabularies over `model`, with FSDP the largest left over `data`."""
    assert tuple(parameter_spec(make_mesh(2), name.split("."), shape, heads, fsdp)) == spec


def test_a_mesh_that_does_not_divide_the_devices() -> None:
    with pytest.raises(InputError, match=r"mesh\.model=3 does not divide the 8 devices; choose one of 1, 2, 4, 8"):
        make_mesh(3)


def test_where_each_command_lies() -> None:
    """Whatever the number of questions; a length of `model` that does not divide the devices stops training alone."""
    lengths = {command: dict(command_mesh(command, 2).shape) for command in ("index", "train", "evaluate", "answer")}
    together, apart = {"data": 4, "model": 2}, {"data": 8, "model": 1}
    assert lengths == {"index": apart, "train": together, "evaluate": together, "answer": together}
    lies = {command: dict(index_mesh(command, 2).shape) for command in ("train", "evaluate", "answer")}
    assert lies == {"train": together, "evaluate": apart, "answer": together}
    few = jax.devices()[2:5]
    assert dict(index_mesh("evaluate", 2, few).shape) == {"data": 3, "model": 1}
    assert command_mesh("answer", 2, few).devices.tolist() == [[device] for device in few]
    with pytest.raises(InputError, match=r"mesh\.model=2 does not divide the 3 devices"):
        command_mesh("train", 2, few)


def test_a_mesh_of_fewer_devices_answers_as_well() -> None:
    assert dict(local_mesh(2, data=1).shape) == {"data": 1, "model": 2}
    assert dict(local_mesh(16).shape) == {"data": 1, "model": 8}


def test_a_batch_that_the_devices_do_not_divide() -> None:
    with pytest.raises(InputError, match=r"12 questions cannot be split over 8 devices; make .* a multiple of 8"):
        check_batch(make_mesh(), 12)


def test_compiled_programs_are_kept(tmp_path: Path) -> None:
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        enable_compilation_cache(tmp_path)
        jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((5, 5)))
        assert list(tmp_path.glob("jit_*"))
        enable_compilation_cache(tmp_path / "another")
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path), "one that was given stays"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
