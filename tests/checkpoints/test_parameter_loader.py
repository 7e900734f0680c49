"""Parameters read shard by shard are those read whole, and neither a device nor the host ever holds much more."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CASES, GOLDEN, Case, opened, ours, write
from flax import nnx
from reference import random_llama, spread
from safetensors.numpy import save_file

from ragjax.checkpoints import parameter_loader
from ragjax.checkpoints.pretrained import open_generator
from ragjax.checkpoints.random_init import LLAMA
from ragjax.checkpoints.safetensors import Index, SafetensorsReader
from ragjax.models.layers import Params
from ragjax.parallel.mesh import make_mesh

pytestmark = pytest.mark.devices(8)

pytestmark = pytest.mark.devices(8)


def in_types(params: Params, like: Params) -> Params:
    return jax.tree.map(lambda x, leaf: np.asarray(x).astype(leaf.dtype), params, like)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(gzip.decompress(GOLDEN.read_bytes()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shards_are_parts_of_the_whole(
    case: Case, golden: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stacked, transposed, fused with others, missing or tied: and block by block, of whatever size."""
    made = golden[case.name]
    model = opened(case, write(tmp_path / "folder", case, made["config"], made["shapes"]), dtype="bfloat16")
    whole, like = model.load_params(), spread(model.compute_params, make_mesh(2))
    chex.assert_trees_all_equal_shapes_and_dtypes(whole, model.abstract_params)
    for block in (parameter_loader.BLOCK, 50):
        monkeypatch.setattr(parameter_loader, "BLOCK", block)
        found = model.load_params(like)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, like)
        chex.assert_trees_all_equal(jax.device_get(found), in_types(whole, like))
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == jax.tree.map(lambda leaf: leaf.sharding, like)
    axes = {axis for leaf in jax.tree.leaves(like) for axis in leaf.sharding.spec} - {None}
    assert axes == {"data", "model"}


def test_no_device_has_more_than_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each tensor every number is read once, though several devices hold it, in blocks of bounded size."""
    random_llama(tmp_path, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False)
    model = open_generator(tmp_path, dtype="bfloat16")
    like = spread(model.compute_params, make_mesh(2))
    earlier, read = jax.live_arrays(), SafetensorsReader.read
    before = {id(array) for array in earlier}  # which live as long as `earlier`: no other array gets their numbers
    most, blocks = Counter[jax.Device](), []

    def on_devices() -> Counter[jax.Device]:
        held = Counter[jax.Device]()
        for array in jax.live_arrays():
            for shard in array.addressable_shards if id(array) not in before else ():
                held[shard.device] += shard.data.nbytes
        return held

    def counted(self: SafetensorsReader, name: str, index: Index = ()) -> np.ndarray:
        array, held = read(self, name, index), on_devices()
        blocks.append(array.size)
        most.update({device: size - most[device] for device, size in held.items() if size > most[device]})
        return array

    monkeypatch.setattr(SafetensorsReader, "read", counted)
    monkeypatch.setattr(parameter_loader, "BLOCK", 500)
    params = model.load_params(like)
    held, size = on_devices(), sum(leaf.size for leaf in jax.tree.leaves(params))
    assert len(held) == 8 and max(held.values()) < 2 * size / 3  # two bytes each, not all are split by eight
    assert all(most[device] < held[device] for device in held), (most, held)
    assert sum(blocks) == size and max(blocks) <= 500


SOME = [
    "BERT: sentence-transformers, cls, Dense (LaBSE)",
    "MPNet: MPNetModel",
    "Qwen2: Qwen2ForCausalLM",
    "Gemma 3: Gemma3ForCausalLM (text)",
    "BART: BartForConditionalGeneration",
    "UMT5: UMT5ForConditionalGeneration",
]


@pytest.mark.parametrize("case", [case for case in CASES if case.name in SOME], ids=lambda case: case.name)
def test_the_types_of_computation_change_no_bit(case: Case, golden: dict[str, Any], tmp_path: Path) -> None:
    """Rounded when they are read, or whenever they are used: the same numbers."""
    made = golden[case.name]
    model = opened(case, write(tmp_path / "folder", case, made["config"], made["shapes"]), dtype="bfloat16")
    types = nnx.traversals.flatten_mapping(model.compute_params)
    for path, leaf in types.items():
        kept = any("norm" in part or part == "distances" for part in path) or path[-1] == "logits_bias"
        assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16), path
    assert any(leaf.dtype == jnp.bfloat16 for leaf in types.values())
    np.testing.assert_array_equal(ours(case, model, model.load_params(model.compute_params)), ours(case, model))


def test_every_case_is_there() -> None:
    assert {case.name for case in CASES} >= {*SOME}


BIG = """
import sys
from pathlib import Path
import jax, numpy as np
from ragjax.checkpoints.pretrained import open_generator
from ragjax.checkpoints.safetensors import SafetensorsReader
from ragjax.parallel.mesh import make_mesh
from ragjax.parallel.processes import initialize_distributed
from reference import spread

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

if len(sys.argv) > 2:
    initialize_distributed(stop_together=False)
model, read, peak, count = open_generator(Path(sys.argv[1]), dtype="bfloat16"), SafetensorsReader.read, 0, 0
like, before = spread(model.compute_params, make_mesh()), anonymous()
def counted(self, name, index=()):
    global peak, count
    array = read(self, name, index)
    peak, count = max(peak, anonymous() - before), count + array.size
    return array
SafetensorsReader.read = counted
params = jax.block_until_ready(model.load_params(like))
print("took", peak, count, file=sys.stderr)
"""


def measured(folder: Path, devices: int, processes: int = 1) -> list[tuple[int, int]]:
    """By process the most bytes that loading took, and how many numbers it read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, root / "tests" / "helpers")))
    own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": paths}
    if processes > 1:
        own |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-c", BIG, str(folder), *["many"] * (processes > 1)]
    started = [
        subprocess.Popen(command, env=os.environ | own | {"JAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    texts = [process.communicate(timeout=300)[1] for process in started]
    assert all(process.returncode == 0 for process in started), texts
    lines = [text.splitlines()[-1].split() for text in texts]
    return [(int(peak), int(count)) for _, peak, count in lines]


@pytest.mark.slow
def test_the_host_holds_two_leaves_and_a_process_reads_its_shards(tmp_path: Path) -> None:
    """On a CPU the devices' memory is the host's, too: all parameters together, and two leaves."""
    hf = {**LLAMA, "vocab_size": 32_000, "hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 4096}
    hf |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    rng, tensors = np.random.default_rng(0), dict[str, np.ndarray]()
    model = parameter_shapes(tmp_path / "config.json")
    for name, shape in model.items():
        tensors[name] = rng.random(shape, np.float32).astype(jnp.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    size = sum(array.size for array in tensors.values())
    leaf = 2 * 8 * 1024 * 4096
    [(peak, count)] = measured(tmp_path, devices=8)
    assert count == size
    assert peak < 2 * size + 2 * leaf + 2**24, (peak, 2 * size, leaf)
    for peak, count in measured(tmp_path, devices=2, processes=2):
        assert 0.5 * size <= count < 0.501 * size
        assert peak < size + 2 * leaf + 2**24


def parameter_shapes(config: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all tensors of a Llama."""
    from ragjax.checkpoints.name_tables import LLAMA as NAMES
    from ragjax.checkpoints.pretrained import generator_shape

    names, shapes = {ours: theirs for ours, theirs, _ in NAMES}, dict[str, tuple[int, ...]]()
    for path, leaf in nnx.traversals.flatten_mapping(generator_shape(config).abstract_params).items():
        name, stacked = names[".".join(path)], "layers" in path
        shape = leaf.shape[1:] if stacked else leaf.shape
        for i in range(leaf.shape[0] if stacked else 1):
            shapes[name.format(i)] = shape[::-1] if path[-1] == "kernel" else shape
    return shapes
