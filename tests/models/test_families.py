"""Small checkpoints of every family against what transformers computed of them (tests/helpers/families.py)."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import ANSWER, CASES, GOLDEN, REFUSED, TABLE, TOLERANCE, Case, opened, ours, rows, write
from flax import nnx
from safetensors.numpy import load_file

from ragjax.checkpoints.pretrained import open_encoder, open_generator, save_encoder, save_generator
from ragjax.decoding.prefix_cache import beam_step, empty_prefix_cache
from ragjax.errors import InputError


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(gzip.decompress(GOLDEN.read_bytes()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_family_equals_transformers(case: Case, golden: dict[str, Any], tmp_path: Path) -> None:
    made = golden[case.name]
    found = ours(case, opened(case, write(tmp_path / "folder", case, made["config"], made["shapes"])))
    np.testing.assert_allclose(found, made["expected"], atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_saved_is_read_again(case: Case, golden: dict[str, Any], tmp_path: Path) -> None:
    """Under the names that transformers has, but for those of heads that an encoder does not need."""
    made = golden[case.name]
    model = opened(case, write(tmp_path / "folder", case, made["config"], made["shapes"]))
    params = {name: value for name, value in model.load_params().items() if not name.startswith("dense")}
    saved = tmp_path / "saved"
    (save_encoder if case.pooling else save_generator)(saved, model.hf_config, params)
    again = open_encoder(saved, case.pooling, False) if case.pooling else open_generator(saved)
    chex.assert_trees_all_equal(again.load_params(), params)
    if not case.pooling:
        kept = {name for name in made["shapes"] if "EncDecAttention.relative" not in name}
        assert set(load_file(saved / "model.safetensors")) == kept | {"final_logits_bias"} & kept


@pytest.mark.parametrize(
    "name",
    [
        "Mistral: a window shorter than the prompt",
        "Phi-4-mini: longrope on three quarters of a head",
        "Gemma 2: other caps",
        "Gemma 3: Gemma3ForCausalLM (text)",
        "UMT5: UMT5ForConditionalGeneration",
    ],
)
def test_stepping_through_a_pool_equals_transformers(name: str, golden: dict[str, Any], tmp_path: Path) -> None:
    """Two beams a text, whose slots alternate; one of them is the answer, the other one a decoy."""
    case, made = next(case for case in CASES if case.name == name), golden[name]
    model = opened(case, write(tmp_path / "folder", case, made["config"], made["shapes"]))
    tokens, mask, answers = rows(made["config"]["pad_token_id"])
    params, slot = model.load_params(), np.arange(2 * ANSWER)

    @jax.jit
    def begin(params: Any) -> Any:
        generator = nnx.merge(model.graphdef, params)
        memory = generator.prefill(jnp.asarray(tokens), jnp.asarray(mask))
        return memory, empty_prefix_cache(generator, memory, 2 * ANSWER)

    memory, read = begin(params)
    read = jax.device_put(read, memory.start.sharding)  # else the first step would be another program
    step = jax.jit(lambda params, *given: beam_step(nnx.merge(model.graphdef, params), *given))
    last, found = np.repeat(np.asarray(memory.start)[:, None], 2, axis=1), []
    for t in range(ANSWER):
        own = (slot % 2 == np.arange(2)[:, None]) & (slot // 2 <= t)
        logp, read = step(params, memory, read, last, np.int32(t), np.broadcast_to(own, (3, *own.shape)))
        found.append(np.asarray(logp)[np.arange(3), 0, answers[:, t]])
        last = np.stack([answers[:, t], answers[:, t] // 2], axis=1)
    np.testing.assert_allclose(np.stack(found, axis=1), made["expected"], atol=TOLERANCE)


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_name(family: str, world: Path, tmp_path: Path) -> None:
    part, kind = REFUSED[family]
    folder = shutil.copytree(world / ("retriever" if part == "encoder" else "generator"), tmp_path / "folder")
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"model_type": kind}))
    with pytest.raises(InputError, match=rf"config\.json: model_type is '{kind}'; expected one of (bert|llama), "):
        open_encoder(folder, "mean", True) if part == "encoder" else open_generator(folder)


def test_the_table_names_every_case() -> None:
    table = TABLE.read_text(encoding="utf-8")
    assert all(f"| {case.family} | " in table and f" | {case.layout} | " in table for case in CASES)
    assert all(f"| {family} | " in table for family in REFUSED)
    assert GOLDEN.stat().st_size < 200_000
