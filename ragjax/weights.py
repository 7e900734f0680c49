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
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ragjax.errors import InputError, library_errors
from ragjax.files import atomic_write, read_json, shown
from ragjax.models.bart import Bart, BartConfig
from ragjax.models.bert import Bert, BertConfig
from ragjax.models.fields import naming
from ragjax.models.layers import Params, split_parameters
from ragjax.models.llama import Llama, LlamaConfig
from ragjax.models.t5 import T5, T5Config
from ragjax.text import GgufFields, read_gguf

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
    return _t5((hf.get("feed_forward_proj") or "relu").startswith("gated")) if family == "t5" else LLAMA


# by model_type; the Llama family has several, and refuses whatever else there is
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

PRECISIONS = ("F32", "F16", "BF16", "F64")  # safetensors' names of what is read
# what may stand before the names of a BERT encoder's tensors; a RoBERTa's, say, are called alike but for this
BERT_PREFIXES = {"bert", "bert_model", "model", "module", "rag", "question_encoder", "ctx_encoder", "encoder"}


@runtime_checkable
class Read(Protocol):
    """Reads a tensor by its name, in float32; knows its shape and where it lies before."""

    def __call__(self, name: str) -> np.ndarray:
        """Raises `InputError` for what is quantised, not finite or damaged."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises as reading does."""
        ...


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
    with naming(path):
        config = BertConfig.from_hf(hf, pooling, normalize, dropout, dtype)
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
    shape, module = GENERATORS.get(str(hf.get("model_type")), GENERATORS["llama"])
    tied = {"tie_word_embeddings": False} if own_head else {}
    with naming(path):
        config = shape.from_hf(hf | tied, dropout, dtype)
    return _unread(config, lambda: module(config, nnx.Rngs(0)), hf)


def _unread(config: Any, make: Callable[[], nnx.Module], hf: dict[str, Any]) -> Pretrained:
    def read() -> Params:
        raise InputError("of this model only its config.json was read")

    graph, abstract = split_parameters(nnx.eval_shape(make))
    return Pretrained(config, graph, abstract, (), hf, read)


def _with_weights(
    shape: Pretrained, checkpoint: Path, table: Mapping[str, str], names: set[str], read: Read
) -> Pretrained:
    _check_fit(shape.abstract, table, names, read, checkpoint)
    files = tuple(weight_files(checkpoint))
    return replace(shape, files=files, read=lambda: _fill(shape.abstract, table, names, read))


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
    index, single = checkpoint / "model.safetensors.index.json", checkpoint / "model.safetensors"
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise InputError(f'{index}: has no "weight_map"; fetch it again')
        for name in named.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(f'{index}: "weight_map" names {shown(name)}; expected files beside it; fetch it again')
        files = sorted({checkpoint / name for name in named.values()})
        if single.is_file() and single not in files:
            raise InputError(
                f"{checkpoint}: has {single.name} and, by {index.name}, other files; remove one of the two"
            )
        return files
    if single.is_file():
        return [single]
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise InputError(f"{checkpoint}: no *.safetensors here; {HOW_TO_CONVERT}")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8]) + (", …" if len(files) > 8 else "")
        raise InputError(f"{checkpoint}: has {names}, but no {index.name} that says which count; fetch it, too")
    return files


def open_safetensors(checkpoint: Path) -> tuple[set[str], Read]:
    """The names of a folder's tensors, and what reads one in float32. Raises `InputError` for a damaged file."""
    read = _Safetensors(weight_files(checkpoint))
    return set(read.where), read


class _Safetensors:
    """The tensors of some files, by name; see `Read`."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.where: dict[str, tuple[Path, Any]] = {}
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path}: missing; fetch it again")
            with library_errors(f"{path}: not readable as safetensors", "fetch it again"):
                handle = safe_open(path, framework="flax")  # unlike numpy's, it reads bfloat16
                names = handle.keys()
            for name in names:
                if name in self.where:
                    raise InputError(f"{path}: has the tensor {shown(name)}, as {self.where[name][0].name} has")
                self.where[name] = path, handle

    def shape(self, name: str) -> tuple[int, ...]:
        path, handle = self.where[name]
        with library_errors(f"{path}: {name} is not readable", "fetch it again"):
            of = handle.get_slice(name)
            kind, shape = of.get_dtype(), tuple(of.get_shape())
        if kind not in PRECISIONS:
            raise InputError(
                f"{path}: {name} is stored as {kind}; quantised weights are not read: convert them to one of "
                f"{', '.join(PRECISIONS[:3])} with the library that made them"
            )
        return shape

    def __call__(self, name: str) -> np.ndarray:
        path, handle = self.where[name]
        self.shape(name)
        with library_errors(f"{path}: {name} is not readable", "fetch it again"):
            array = np.asarray(handle.get_tensor(name), dtype=np.float32)
        return _finite(array, name, path)


def _finite(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    if not np.isfinite(array).all():
        bad = "NaN" if np.isnan(array).any() else "infinite"
        raise InputError(f"{path}: {name} holds weights that are {bad}; fetch it again, or give another checkpoint")
    return array


def _open_gguf(path: Path) -> tuple[dict[str, Any], set[str], Read]:
    """The configuration in Hugging Face's terms, the tensor names, and a reader that dequantises."""
    reader, fields = read_gguf(path), GgufFields(path)
    family = fields.get("general.architecture")
    if not isinstance(family, str):
        raise InputError(f"{path}: does not say of which architecture it is; fetch it again")

    def field(name: str, default: Any = None) -> Any:
        return fields.get(f"{family}.{name}", default)

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "rope_freqs.weight" in tensors or field("rope.scaling.type", "none") != "none":
        raise InputError(f"{path}: scaled rotary positions in GGUF are not supported; use the Hugging Face folder")
    heads, window = field("attention.head_count"), field("attention.sliding_window")
    embedding = tensors.get("token_embd.weight")
    hf = {
        "model_type": "mistral" if window and family == "llama" else family,  # in GGUF a Mistral is a Llama
        "vocab_size": int(embedding.shape[-1]) if embedding else None,
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
    ids = {kind: fields.take(f"tokenizer.ggml.{kind}_token_id", int) for kind in ("bos", "eos", "eot", "eom")}
    ends = sorted({ids[kind] for kind in ("eos", "eot", "eom")} - {None})  # of a text, a turn and a message
    hf |= {"bos_token_id": ids["bos"], "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}
    groups = {"attn_q.weight": heads, "attn_k.weight": hf["num_key_value_heads"]} if family == "llama" else {}
    given = {name: value for name, value in hf.items() if value is not None}
    return given, set(tensors), _Gguf(path, tensors, groups)


class _Gguf:
    """The tensors of a GGUF file, dequantised; `groups` says how many heads' rotary pairs lie interleaved in which."""

    def __init__(self, path: Path, tensors: Mapping[str, Any], groups: Mapping[str, Any]) -> None:
        self.path, self.tensors, self.groups = path, tensors, groups

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def __call__(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        with library_errors(f"{self.path}: {name} is not readable", "fetch it again"):
            array = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if heads := self.groups.get(name.split(".", 2)[-1]):
            array = array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        return _finite(array, name, self.path)


def _prefix(names: Iterable[str], anchor: str, checkpoint: Path) -> str:
    found = [name.removesuffix(anchor) for name in names if name.endswith(anchor)]
    if len(found) != 1:
        raise InputError(f"{checkpoint}: {len(found)} tensors are called …{anchor}; expected one BERT encoder")
    if other := set(found[0].split(".")[:-1]) - BERT_PREFIXES:
        raise InputError(
            f"{checkpoint}: its tensors are called {shown(found[0] + anchor)}, those of another model ({min(other)}) "
            "than the BERT that its config.json names; give a BERT encoder"
        )
    return found[0]


def _layer_names(name: str, count: int) -> list[str]:
    return [name.format(i) for i in range(count)] if "{}" in name else [name]


def _check_fit(abstract: Params, table: Mapping[str, str], names: set[str], read: Read, checkpoint: Path) -> None:
    """Raises `InputError` for tensors that are missing, unknown or misshapen, together; reads headers only."""
    problems, used = [], set()
    for path, leaf in nnx.traversals.flatten_mapping(abstract).items():
        stacked = "layers" in path
        wanted = _layer_names(table[".".join(path)], leaf.shape[0] if stacked else 1)
        used |= set(wanted)
        if ZERO.issuperset(wanted) and not names.intersection(wanted):
            continue
        shape = leaf.shape[1:] if stacked else leaf.shape
        for name in wanted:
            if name not in names:
                problems.append(f"missing {name}")
            elif (found := read.shape(name)[:: -1 if path[-1] == "kernel" else 1]) != shape:
                problems.append(f"{name} has shape {found}, expected {shape} (as we lay it out)")
    unknown = [name for name in names - used if not any(part in name for part in UNUSED)]
    problems += [f"unknown {name}" for name in sorted(unknown)]
    if problems:
        listed = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise InputError(f"{checkpoint}: its tensors do not fit its config.json: {listed}")


def _fill(abstract: Params, table: Mapping[str, str], names: set[str], read: Read) -> Params:
    """Reads every leaf of an abstract tree, whose tensors fit."""
    filled = {}
    for path, leaf in nnx.traversals.flatten_mapping(abstract).items():
        stacked = "layers" in path
        wanted = _layer_names(table[".".join(path)], leaf.shape[0] if stacked else 1)
        if ZERO.issuperset(wanted) and not names.intersection(wanted):
            filled[path] = jnp.zeros(leaf.shape, jnp.float32)
            continue
        target = np.empty(leaf.shape, np.float32)
        for i, name in enumerate(wanted):
            array = read(name)
            target[i if stacked else ...] = array.T if path[-1] == "kernel" else array
        filled[path] = jnp.asarray(target)
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
