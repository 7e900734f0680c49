"""Checkpoints ↔ parameter trees: safetensors and GGUF, by one name table a family.

A row of a table is (our path, Hugging Face name, GGUF name). `{}` is the layer, which we stack on a leading axis.
A leaf called `kernel` is the transpose of Hugging Face's `weight`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ragjax.errors import InputError
from ragjax.files import atomic_write, read_json
from ragjax.models.bart import Bart, BartConfig
from ragjax.models.bert import Bert, BertConfig
from ragjax.models.layers import Params, split_parameters
from ragjax.models.llama import Llama, LlamaConfig
from ragjax.models.t5 import T5, T5Config
from ragjax.text import read_gguf

Config = TypeVar("Config")
NameTable = tuple[tuple[str, str, str | None], ...]


def _affine(ours: str, theirs: str, weight: str = "kernel") -> NameTable:
    return ((f"{ours}.{weight}", f"{theirs}.weight", None), (f"{ours}.bias", f"{theirs}.bias", None))


BERT: NameTable = (
    ("words.embedding", "embeddings.word_embeddings.weight", None),
    ("positions.embedding", "embeddings.position_embeddings.weight", None),
    ("types.embedding", "embeddings.token_type_embeddings.weight", None),
    *_affine("norm", "embeddings.LayerNorm", "scale"),
    *_affine("layers.query", "encoder.layer.{}.attention.self.query"),
    *_affine("layers.key", "encoder.layer.{}.attention.self.key"),
    *_affine("layers.value", "encoder.layer.{}.attention.self.value"),
    *_affine("layers.output", "encoder.layer.{}.attention.output.dense"),
    *_affine("layers.up", "encoder.layer.{}.intermediate.dense"),
    *_affine("layers.down", "encoder.layer.{}.output.dense"),
    *_affine("layers.attention_norm", "encoder.layer.{}.attention.output.LayerNorm", "scale"),
    *_affine("layers.ffn_norm", "encoder.layer.{}.output.LayerNorm", "scale"),
    ("projection.kernel", "encode_proj.weight", None),
    ("projection.bias", "encode_proj.bias", None),
)

LLAMA: NameTable = (
    ("embed.embedding", "model.embed_tokens.weight", "token_embd.weight"),
    ("head.embedding", "lm_head.weight", "output.weight"),
    ("norm.scale", "model.norm.weight", "output_norm.weight"),
    ("layers.attention_norm.scale", "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    ("layers.ffn_norm.scale", "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    ("layers.query.kernel", "model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    ("layers.query.bias", "model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    ("layers.query_norm.scale", "model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
    ("layers.key.kernel", "model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    ("layers.key.bias", "model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    ("layers.key_norm.scale", "model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
    ("layers.value.kernel", "model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    ("layers.value.bias", "model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
    ("layers.output.kernel", "model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    ("layers.gate.kernel", "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    ("layers.up.kernel", "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    ("layers.down.kernel", "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
)


def _bart_attention(ours: str, theirs: str) -> NameTable:
    parts = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "out_proj"))
    return tuple(row for part, name in parts for row in _affine(f"{ours}.{part}", f"{theirs}.{name}"))


def _bart_side(side: str) -> NameTable:
    ours, theirs = f"{side}.layers", f"model.{side}.layers.{{}}"
    return (
        (f"{side}.positions.embedding", f"model.{side}.embed_positions.weight", None),
        *_affine(f"{side}.norm", f"model.{side}.layernorm_embedding", "scale"),
        *_bart_attention(f"{ours}.attention", f"{theirs}.self_attn"),
        *_affine(f"{ours}.attention_norm", f"{theirs}.self_attn_layer_norm", "scale"),
        *_bart_attention(f"{ours}.cross", f"{theirs}.encoder_attn"),
        *_affine(f"{ours}.cross_norm", f"{theirs}.encoder_attn_layer_norm", "scale"),
        *_affine(f"{ours}.up", f"{theirs}.fc1"),
        *_affine(f"{ours}.down", f"{theirs}.fc2"),
        *_affine(f"{ours}.ffn_norm", f"{theirs}.final_layer_norm", "scale"),
    )


BART: NameTable = (
    ("embed.embedding", "model.shared.weight", None),
    ("logits_bias", "final_logits_bias", None),
    *_bart_side("encoder"),
    *_bart_side("decoder"),
)


def _t5_attention(ours: str, theirs: str, name: str) -> NameTable:
    parts = (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))
    kernels = tuple((f"{ours}.{part}.kernel", f"{theirs}.{name}.{letter}.weight", None) for part, letter in parts)
    return ((f"{ours}_norm.scale", f"{theirs}.layer_norm.weight", None), *kernels)


def _t5_side(side: str, gated: bool) -> NameTable:
    ours, theirs = f"{side}.layers", f"{side}.block.{{}}.layer"
    ffn = f"{theirs}.{2 if side == 'decoder' else 1}"
    names = (("gate", "wi_0"), ("up", "wi_1")) if gated else (("up", "wi"),)
    return (
        (f"{side}.distances.embedding", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", None),
        (f"{side}.norm.scale", f"{side}.final_layer_norm.weight", None),
        *_t5_attention(f"{ours}.attention", f"{theirs}.0", "SelfAttention"),
        *_t5_attention(f"{ours}.cross", f"{theirs}.1", "EncDecAttention"),
        (f"{ours}.ffn_norm.scale", f"{ffn}.layer_norm.weight", None),
        *((f"{ours}.{part}.kernel", f"{ffn}.DenseReluDense.{name}.weight", None) for part, name in names),
        (f"{ours}.down.kernel", f"{ffn}.DenseReluDense.wo.weight", None),
    )


def _t5(gated: bool) -> NameTable:
    head = ("embed.embedding", "shared.weight", None), ("head.embedding", "lm_head.weight", None)
    return (*head, *_t5_side("encoder", gated), *_t5_side("decoder", gated))


def _generator_table(hf: Mapping[str, Any]) -> NameTable:
    family = hf.get("model_type")
    if family == "bart":
        return BART
    return _t5(hf.get("feed_forward_proj", "relu").startswith("gated")) if family == "t5" else LLAMA


# by model_type; whatever else there is belongs to the Llama family, or is refused by it
GENERATORS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, Llama),
    "bart": (BartConfig, Bart),
    "t5": (T5Config, T5),
}
HEAD = "lm_head.weight"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
HOW_TO_CONVERT = (
    "pickled weights (*.bin) are never loaded. To get safetensors: on the hub, the pull request 'Adding `safetensors` "
    "variant of this model' (see the repository's Community tab; huggingface.co/spaces/safetensors/convert makes one) "
    "can be named as a revision, hf:ORG/NAME@refs/pr/N with its number N. Or, where torch is installed, load the model "
    "with the class of transformers that its config.json names, call save_pretrained(FOLDER), and copy the tokenizer's "
    "files into FOLDER"
)
# copies of the one embedding table
TIED = {f"{part}.embed_tokens.weight" for part in ("encoder", "decoder", "model.encoder", "model.decoder")}
# tensors that carry nothing we need: heads of other tasks, and buffers that older exports wrote down
UNUSED = (
    "pooler.",
    "cls.",
    "embeddings.position_ids",
    "rotary_emb.inv_freq",
    "masked_bias",
    "attn.bias",
    "EncDecAttention.relative_attention_bias",
)
ZERO = {"final_logits_bias"}  # where it is missing

Read = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint opened but not yet read: a run's own checkpoint may hold newer parameters."""

    config: Any  # `BertConfig`, `LlamaConfig`, `BartConfig` or `T5Config`
    graph: nnx.GraphDef
    abstract: Params  # shapes and types
    files: tuple[Path, ...]  # that hold the weights
    hf: dict[str, Any]  # its config.json
    read: Callable[[], Params]  # raises `InputError` for tensors that are missing, unknown or of another shape


def open_bert(
    checkpoint: Path, pooling: str, normalize: bool, dropout: float = 0.0, dtype: str = "float32"
) -> Pretrained:
    """A BERT or DPR encoder in a Hugging Face folder. Raises `InputError` for a missing or unreadable file."""
    shape = bert_shape(checkpoint / "config.json", pooling, normalize, dropout, dtype)
    names, read = open_safetensors(checkpoint)
    prefix = _prefix(names, BERT[0][1], checkpoint)
    # DPR keeps its projection beside the encoder, under the parent's prefix
    parent = prefix.removesuffix("bert_model.")
    table = {ours: (parent if "encode_proj" in name else prefix) + name for ours, name, _ in BERT}
    return _with_weights(shape, checkpoint, table, names, read)


def bert_shape(path: Path, pooling: str, normalize: bool, dropout: float = 0.0, dtype: str = "float32") -> Pretrained:
    """An encoder of which only the config.json at `path` is there: shapes, and nothing to read. Raises `InputError`."""
    hf = read_json(path)
    config = _shape(lambda: BertConfig.from_hf(hf, pooling, normalize, dropout, dtype), path)
    return _unread(config, lambda: Bert(config, nnx.Rngs(0)), hf)


def open_generator(checkpoint: Path, dropout: float = 0.0, dtype: str = "float32") -> Pretrained:
    """A generator in a Hugging Face folder, of the family that its config.json names, or a Llama-family GGUF file.

    Raises as `open_bert`.
    """
    gguf = checkpoint.suffix == ".gguf"
    if gguf:
        hf, names, read = _open_gguf(checkpoint)
    else:
        hf = read_json(checkpoint / "config.json")
        names, read = open_safetensors(checkpoint)
    # transformers 5 writes that every T5 is tied, even one with a head of its own
    own_head = hf.get("scale_decoder_outputs") is False and HEAD in names
    shape = _generator_shape(hf, checkpoint if gguf else checkpoint / "config.json", dropout, dtype, own_head)
    tied = TIED | ({HEAD, "output.weight"} if getattr(shape.config, "tied", True) else set())
    copies, names = names & tied, names - tied
    rows = _generator_table(hf)
    table = {ours: theirs for ours, name, other in rows if (theirs := other if gguf else name)}
    if hf.get("model_type") == "bart" and not any(name.startswith("model.") for name in names):
        table = {ours: name.removeprefix("model.") for ours, name in table.items()}  # saved without its head
    if copies and table["embed.embedding"] not in names:  # of tied tables any one may be the one that was saved
        table["embed.embedding"] = min(copies)
        names = names | {min(copies)}
    model = _with_weights(shape, checkpoint, table, names, read)

    def read_checked() -> Params:
        _check_copies(model, checkpoint, table["embed.embedding"], copies, read)
        return model.read()

    return replace(model, read=read_checked)


def _check_copies(model: Pretrained, checkpoint: Path, used: str, copies: set[str], read: Read) -> None:
    """Raises `InputError` for a copy of the one embedding table that holds something else."""
    table = read(used) if copies - {used} else np.zeros(0)
    for copy in sorted(copies - {used}):
        if not np.array_equal(table, read(copy)):
            cure = "ragjax has no such model with a table of its own there"
            if copy == HEAD and hasattr(model.config, "tied"):
                cure = "give tie_word_embeddings: false there if the head is the model's own, else leave the tensor out"
            raise InputError(f"{checkpoint}: {copy} differs from {used}, but by config.json they are one table; {cure}")


def generator_shape(path: Path, dropout: float = 0.0, dtype: str = "float32") -> Pretrained:
    """A generator of which only the config.json at `path` is there, as `bert_shape`."""
    return _generator_shape(read_json(path), path, dropout, dtype)


def _generator_shape(hf: dict[str, Any], path: Path, dropout: float, dtype: str, own_head: bool = False) -> Pretrained:
    shape, module = GENERATORS.get(hf.get("model_type", ""), GENERATORS["llama"])
    tied = {"tie_word_embeddings": False} if own_head else {}
    config = _shape(lambda: shape.from_hf(hf | tied, dropout, dtype), path)
    return _unread(config, lambda: module(config, nnx.Rngs(0)), hf)


def _unread(config: Any, make: Callable[[], nnx.Module], hf: dict[str, Any]) -> Pretrained:
    def read() -> Params:
        raise InputError("of this model only its config.json was read")

    graph, abstract = split_parameters(nnx.eval_shape(make))
    return Pretrained(config, graph, abstract, (), hf, read)


def _with_weights(
    shape: Pretrained, checkpoint: Path, table: Mapping[str, str], names: set[str], read: Read
) -> Pretrained:
    files = tuple(weight_files(checkpoint))
    return replace(shape, files=files, read=lambda: _fill(shape.abstract, table, names, read, checkpoint))


def save_bert(folder: Path, config: Mapping[str, Any], params: Params) -> None:
    """Writes config.json and model.safetensors as Hugging Face lays them out."""
    _save(folder, config, bert_tensors(params))


def save_generator(folder: Path, config: Mapping[str, Any], params: Params) -> None:
    """Writes config.json and model.safetensors as Hugging Face lays them out for the family that `config` names."""
    _save(folder, config, generator_tensors(config, params))


def bert_tensors(params: Params, prefix: str = "") -> dict[str, np.ndarray]:
    """An encoder's tensors under Hugging Face's names; `prefix` is what DPR puts before its encoder's."""
    parent = prefix.removesuffix("bert_model.")
    names = {ours: (parent if "encode_proj" in name else prefix) + name for ours, name, _ in BERT}
    return _tensors(params, names)


def generator_tensors(config: Mapping[str, Any], params: Params) -> dict[str, np.ndarray]:
    """A generator's tensors under the Hugging Face names of the family that `config` (a config.json) names."""
    return _tensors(params, {ours: name for ours, name, _ in _generator_table(config)})


def weight_files(checkpoint: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors: a GGUF file itself, or the safetensors of a folder."""
    if checkpoint.is_file():
        return [checkpoint]
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise InputError(f'{index}: has no "weight_map"; fetch it again')
        return sorted({checkpoint / str(name) for name in named.values()})
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise InputError(f"{checkpoint}: no *.safetensors here; {HOW_TO_CONVERT}")
    return files


def _shape(make: Callable[[], Config], path: Path) -> Config:
    try:
        return make()
    except KeyError as error:
        raise InputError(f"{path}: has no {error}, which the model's shape needs; fetch it again") from None


def open_safetensors(checkpoint: Path) -> tuple[set[str], Read]:
    """The names of a folder's tensors, and what reads one in float32. Raises `InputError` for a damaged file."""
    where: dict[str, Any] = {}
    for path in weight_files(checkpoint):
        try:
            handle = safe_open(path, framework="flax")  # unlike numpy's, it reads bfloat16
        except Exception as error:
            raise InputError(f"{path}: not readable as safetensors ({error}); fetch it again") from None
        where |= dict.fromkeys(handle.keys(), handle)

    def read(name: str) -> np.ndarray:
        return np.asarray(where[name].get_tensor(name), dtype=np.float32)

    return set(where), read


def _open_gguf(path: Path) -> tuple[dict[str, Any], set[str], Read]:
    """The configuration in Hugging Face's terms, the tensor names, and a reader that dequantises."""
    from gguf.quants import dequantize

    reader = read_gguf(path)
    if "general.architecture" not in reader.fields:
        raise InputError(f"{path}: does not say of which architecture it is; fetch it again")
    family = str(reader.fields["general.architecture"].contents())

    def field(name: str, default: Any = None) -> Any:
        found = reader.fields.get(f"{family}.{name}")
        return found.contents() if found else default

    def token_id(kind: str) -> Any:
        found = reader.fields.get(f"tokenizer.ggml.{kind}_token_id")
        return found.contents() if found else None

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "rope_freqs.weight" in tensors or field("rope.scaling.type", "none") != "none":
        raise InputError(f"{path}: scaled rotary positions in GGUF are not supported; use the Hugging Face folder")
    heads, window = field("attention.head_count"), field("attention.sliding_window")
    hf = {
        "model_type": "mistral" if window and family == "llama" else family,  # in GGUF a Mistral is a Llama
        "vocab_size": int(embedding.shape[1]) if (embedding := tensors.get("token_embd.weight")) else None,
        "hidden_size": field("embedding_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length"),
        "intermediate_size": field("feed_forward_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": field("rope.freq_base", 10000.0),
        "max_position_embeddings": field("context_length", 2048),
        "tie_word_embeddings": "output.weight" not in tensors,
        "sliding_window": window,
        "use_sliding_window": True if window and family != "llama" else None,
    }
    ends = sorted({token_id(kind) for kind in ("eos", "eot", "eom")} - {None})  # of a text, a turn and a message
    hf |= {"bos_token_id": token_id("bos"), "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        array = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if family == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            count = heads if "attn_q" in name else hf["num_key_value_heads"]
            array = array.reshape(count, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        return array

    return {name: value for name, value in hf.items() if value is not None}, set(tensors), read


def _prefix(names: Iterable[str], anchor: str, checkpoint: Path) -> str:
    found = [name.removesuffix(anchor) for name in names if name.endswith(anchor)]
    if len(found) != 1:
        raise InputError(f"{checkpoint}: {len(found)} tensors are called …{anchor}; expected one BERT encoder")
    return found[0]


def _layer_names(name: str, count: int) -> list[str]:
    return [name.format(i) for i in range(count)] if "{}" in name else [name]


def _fill(abstract: Params, table: Mapping[str, str], names: set[str], read: Read, checkpoint: Path) -> Params:
    """Reads every leaf of an abstract tree; missing, unknown and misshapen tensors are reported together."""
    problems, used, filled = [], set(), {}
    for path, leaf in nnx.traversals.flatten_mapping(abstract).items():
        ours = ".".join(path)
        stacked = "layers" in path
        wanted = _layer_names(table[ours], leaf.shape[0] if stacked else 1)
        used |= set(wanted)
        if ZERO.issuperset(wanted) and not names.intersection(wanted):
            filled[path] = jnp.zeros(leaf.shape, jnp.float32)
            continue
        if missing := [name for name in wanted if name not in names]:
            problems += [f"missing {name}" for name in missing]
            continue
        shape = leaf.shape[1:] if stacked else leaf.shape
        target = np.empty(leaf.shape, np.float32)
        for i, name in enumerate(wanted):
            array = read(name)
            array = array.T if path[-1] == "kernel" else array
            if array.shape != shape:
                problems.append(f"{name} has shape {array.shape}, expected {shape} (as we lay it out)")
                continue
            target[i if stacked else ...] = array
        filled[path] = jnp.asarray(target)
    unknown = [name for name in names - used if not any(part in name for part in UNUSED)]
    problems += [f"unknown {name}" for name in sorted(unknown)]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise InputError(f"{checkpoint}: its tensors do not fit its config.json: {shown}")
    return nnx.traversals.unflatten_mapping(filled)


def _tensors(params: Params, table: Mapping[str, str]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in nnx.traversals.flatten_mapping(jax.device_get(params)).items():
        stacked, transposed = "layers" in path, path[-1] == "kernel"
        rows = list(leaf) if stacked else [leaf]
        for name, row in zip(_layer_names(table[".".join(path)], len(rows)), rows, strict=True):
            tensors[name] = np.ascontiguousarray(row.T if transposed else row)
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a file that transformers reads as PyTorch's. Raises `InputError` where it cannot, as on a full disk."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:  # the first is what safetensors makes of a full disk
        raise InputError(f"{path}: cannot be written ({error}); free some space, or choose another folder") from None


def _save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".partial"
    try:
        write_safetensors(temporary, tensors)
        os.replace(temporary, folder / "model.safetensors")
    finally:
        temporary.unlink(missing_ok=True)
    with atomic_write(folder / "config.json") as (file,):
        file.write(json.dumps(dict(config), indent=1, sort_keys=True).encode() + b"\n")
