"""Kernels in int8: read shard by shard as they would be quantised whole, and how far they are from what was there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CASES, GOLDEN, Case, opened, write
from flax import nnx
from reference import random_llama, spread

from ragjax.checkpoints import parameter_loader
from ragjax.checkpoints.pretrained import open_generator
from ragjax.checkpoints.quantization import before_quantization, dequantized, quantized, with_int8_kernels
from ragjax.checkpoints.safetensors import Index, SafetensorsReader
from ragjax.models.layers import Params
from ragjax.parallel.mesh import make_mesh
from ragjax.planning.program_cost import bytes_each

pytestmark = pytest.mark.devices(8)
SOME = (
    "Qwen2: Qwen2ForCausalLM",
    "Phi-3: Phi3ForCausalLM, a window",
    "Gemma 3: Gemma3ForCausalLM (text)",
    "BART: BartForConditionalGeneration",
    "UMT5: UMT5ForConditionalGeneration",
)


def flat(params: Params) -> dict[tuple[str, ...], np.ndarray]:
    return nnx.traversals.flatten_mapping(jax.device_get(params))


def by_definition(params: Params) -> Params:
    """The largest number of each column of a layer's kernel becomes ±127."""
    leaves = flat(params)
    for path in [path for path in leaves if "layers" in path and path[-1] == "kernel"]:
        whole = leaves[path]
        scale = np.abs(whole).max(axis=1) / np.float32(127)
        leaves[*path[:-1], "kernel_scale"] = np.where(scale > 0, scale, np.float32(1))
        leaves[path] = np.round(whole / leaves[*path[:-1], "kernel_scale"][:, None]).astype(np.int8)
    return nnx.traversals.unflatten_mapping(leaves)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in SOME], ids=lambda case: case.name)
def test_shards_are_parts_of_the_whole(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split over `data` and `model`, along what is summed over as well; norms and embeddings stay as they are."""
    made = json.loads(gzip.decompress(GOLDEN.read_bytes()))[case.name]
    plain = opened(case, write(tmp_path / "folder", case, made["config"], made["shapes"]))
    expected, model = by_definition(plain.load_params()), with_int8_kernels(plain)
    chex.assert_trees_all_equal_shapes_and_dtypes(model.abstract_params, expected)
    chex.assert_trees_all_equal(jax.device_get(model.load_params()), expected)
    like = spread(model.abstract_params, make_mesh(2))
    monkeypatch.setattr(parameter_loader, "BLOCK", 50)
    found = model.load_params(like)
    chex.assert_trees_all_equal(jax.device_get(found), expected)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == jax.tree.map(lambda leaf: leaf.sharding, like)
    kernels = {path: leaf for path, leaf in flat(found).items() if leaf.dtype == np.int8}
    assert kernels and all("layers" in path for path in kernels)
    summed = {leaf.sharding.spec[1] for leaf in jax.tree.leaves(like) if leaf.dtype == jnp.int8}
    assert summed >= {"model"}


def test_every_case_is_there() -> None:
    assert {case.name for case in CASES} >= {*SOME}


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    random_llama(tmp_path, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False)
    return open_generator(tmp_path, dtype="bfloat16")


def test_no_number_is_further_off_than_half_a_step(llama: Any) -> None:
    """1/254 of the largest of its column, and a rounding or two of float32."""
    whole, near = flat(llama.load_params()), flat(dequantized(jax.device_get(with_int8_kernels(llama).load_params())))
    assert whole.keys() == near.keys()
    for path, leaf in whole.items():
        quantised = "layers" in path and path[-1] == "kernel"
        bound = np.abs(leaf).max(axis=-2, keepdims=True) * (1 / 254 + 2**-22) if quantised else 0
        assert (np.abs(leaf - near[path]) <= bound).all(), path
        assert np.array_equal(leaf, near[path]) != quantised


def test_they_take_half_of_bfloat16(llama: Any) -> None:
    half, int8 = llama.compute_params["layers"], with_int8_kernels(llama).compute_params["layers"]
    for name, part in half.items():
        if "kernel" in part:
            scales = 4 * part["kernel"].size / part["kernel"].shape[1]
            assert bytes_each(int8[name]) == bytes_each(part) / 2 + scales
        else:
            assert int8[name] == part


def test_the_host_reads_blocks(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number once where devices hold whole columns, else once more for the scales."""
    blocks, read = [], SafetensorsReader.read

    def counted(self: SafetensorsReader, name: str, index: Index = ()) -> np.ndarray:
        array = read(self, name, index)
        blocks.append(array.size)
        return array

    model = with_int8_kernels(llama)
    monkeypatch.setattr(SafetensorsReader, "read", counted)
    monkeypatch.setattr(parameter_loader, "BLOCK", 500)
    size = sum(leaf.size for leaf in jax.tree.leaves(llama.abstract_params))
    model.load_params()
    assert sum(blocks) == size and max(blocks) <= 500
    blocks.clear()
    model.load_params(spread(model.compute_params, make_mesh(2)))
    assert size < sum(blocks) <= 2 * size and max(blocks) <= 8 * 500


def test_on_devices_as_while_reading(llama: Any) -> None:
    """What a run has trained is quantised where it lies."""
    model, mesh = with_int8_kernels(llama), make_mesh(2)
    like = spread(model.abstract_params, mesh)
    before = before_quantization(like, "float32")
    chex.assert_trees_all_equal_shapes_and_dtypes(before, llama.abstract_params)
    found = quantized(llama.load_params(before), like)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == jax.tree.map(lambda leaf: leaf.sharding, like)
    wanted = flat(model.load_params())
    for path, leaf in flat(found).items():  # XLA may divide by 127 as it multiplies by 1/127
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-6, atol=1 if leaf.dtype == np.int8 else 0)
