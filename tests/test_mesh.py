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

from ragjax.config import InputError
from ragjax.mesh import enable_compilation_cache, make_mesh, replicate, shard_batch


def test_a_batch_is_split_and_parameters_are_whole() -> None:
    mesh = make_mesh()
    assert mesh.axis_names == ("data",) and mesh.axis_types == (AxisType.Auto,) and mesh.size == 8
    batch = {"tokens": np.arange(48).reshape(16, 3), "mask": np.ones(16, bool)}
    sharded, params = shard_batch(mesh, batch), replicate(mesh, {"w": jnp.arange(3.0)})
    chex.assert_trees_all_equal(sharded, batch)
    assert [s.data.shape for s in sharded["tokens"].addressable_shards] == [(2, 3)] * 8
    assert params["w"].sharding.is_fully_replicated and len(params["w"].sharding.device_set) == 8
    gradient = jax.jit(jax.grad(lambda w, x: jnp.mean(x @ w)))(params["w"], sharded["tokens"])
    chex.assert_trees_all_close(gradient, batch["tokens"].mean(axis=0).astype(np.float32))


def test_a_batch_that_the_devices_do_not_divide() -> None:
    with pytest.raises(InputError, match=r"12 questions cannot be split over 8 devices.*multiple of 8"):
        shard_batch(make_mesh(), {"tokens": np.zeros((12, 3))})


def test_compiled_programs_are_kept(tmp_path: Path) -> None:
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    try:
        enable_compilation_cache(tmp_path)
        jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((5, 5)))
        assert list(tmp_path.glob("jit_*"))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
