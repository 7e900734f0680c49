"""Checkpoints ↔ parameter trees, through the name tables: opened, checked, read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ragjax.checkpoints.gguf import open_gguf
from ragjax.checkpoints.name_tables import BERT, generator_family
from ragjax.checkpoints.safetensors import SafetensorsReader, TensorReader, weight_files, write_safetensors
from ragjax.errors import InputError
from ragjax.files import atomic_write, read_json, shown
from ragjax.models.encoders.bert import Bert, BertConfig
from ragjax.models.hf_config import naming
from ragjax.models.layers import Params, split_parameters

HEAD = "lm_head.weight"
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
# what may stand before the names of a BERT encoder's tensors; a RoBERTa's, say, are called alike but for this
BERT_PREFIXES = {"bert", "bert_model", "model", "module", "rag", "question_encoder", "ctx_encoder", "encoder"}


@dataclass(frozen=True)
class PretrainedModel:
    """A checkpoint opened but not yet read: a run's own checkpoint may hold newer parameters.

    Two are equal that are the same network, whatever their weights.
    """

    config: Any  # `BertConfig`, `LlamaConfig`, `BartConfig` or `T5Config`
    graphdef: nnx.GraphDef
    abstract_params: Params = field(compare=False)  # shapes and types
    files: tuple[Path, ...] = field(compare=False)  # that hold the weights
    hf_config: dict[str, Any] = field(compare=False)  # its config.json
    # raises `InputError` for tensors that are missing, unknown or of another shape
    load_params: Callable[[], Params] = field(compare=False)


def open_bert(
    checkpoint: Path, pooling: str, normalize: bool, dropout: float = 0.0, dtype: str = "float32"
) -> PretrainedModel:
    """A BERT or DPR encoder in a Hugging Face folder. Raises `InputError` for a missing or unreadable file."""
    shape = bert_shape(checkpoint / "config.json", pooling, normalize, dropout, dtype)
    reader = SafetensorsReader(checkpoint)
    table = _bert_table(_bert_prefix(reader.names, checkpoint))
    return _with_weights(shape, checkpoint, table, reader.names, reader)


def bert_shape(
    path: Path, pooling: str, normalize: bool, dropout: float = 0.0, dtype: str = "float32"
) -> PretrainedModel:
    """An encoder of which only the config.json at `path` is there: shapes, and nothing to read. Raises `InputError`."""
    hf = read_json(path)
    with naming(path):
        config = BertConfig.from_hf(hf, pooling, normalize, dropout, dtype)
    return _without_weights(config, lambda: Bert(config, nnx.Rngs(0)), hf)


def open_generator(checkpoint: Path, dropout: float = 0.0, dtype: str = "float32") -> PretrainedModel:
    """A generator in a Hugging Face folder, of the family that its config.json names, or a Llama-family GGUF file.

    Raises `InputError` as `open_bert` does, and for tensors that do not fit the configuration.
    """
    reader: TensorReader
    gguf = checkpoint.suffix == ".gguf"
    if gguf:
        hf, reader = open_gguf(checkpoint)
    else:
        hf, reader = read_json(checkpoint / "config.json"), SafetensorsReader(checkpoint)
    names = reader.names
    # transformers 5 writes that every T5 is tied, even one with a head of its own
    own_head = hf.get("scale_decoder_outputs") is False and HEAD in names
    shape = _generator_shape(hf, checkpoint if gguf else checkpoint / "config.json", dropout, dtype, own_head)
    tied = TIED | ({HEAD, "output.weight"} if getattr(shape.config, "tie_word_embeddings", True) else set())
    copies, names = names & tied, names - tied
    rows = generator_family(hf).names(hf)
    table = {ours: name for ours, hf_name, gguf_name in rows if (name := gguf_name if gguf else hf_name)}
    if hf.get("model_type") == "bart" and not any(name.startswith("model.") for name in names):
        table = {ours: name.removeprefix("model.") for ours, name in table.items()}  # saved without its head
    if copies and table["embed.embedding"] not in names:  # of tied tables any one may be the one that was saved
        table["embed.embedding"] = min(copies)
        names = names | {min(copies)}
    model = _with_weights(shape, checkpoint, table, names, reader)

    def load_params() -> Params:
        _check_copies(model, checkpoint, table["embed.embedding"], copies, reader)
        return model.load_params()

    return replace(model, load_params=load_params)


def _check_copies(model: PretrainedModel, checkpoint: Path, used: str, copies: set[str], reader: TensorReader) -> None:
    """Raises `InputError` for a copy of the one embedding table that holds something else."""
    table = reader.read(used) if copies - {used} else np.zeros(0)
    for copy in sorted(copies - {used}):
        if not np.array_equal(table, reader.read(copy)):
            cure = "ragjax has no such model with a table of its own there"
            if copy == HEAD and hasattr(model.config, "tie_word_embeddings"):
                cure = "give tie_word_embeddings: false there if the head is the model's own, else leave the tensor out"
            raise InputError(f"{checkpoint}: {copy} differs from {used}, but by config.json they are one table; {cure}")


def generator_shape(path: Path, dropout: float = 0.0, dtype: str = "float32") -> PretrainedModel:
    """A generator of which only the config.json at `path` is there, as `bert_shape`."""
    return _generator_shape(read_json(path), path, dropout, dtype)


def _generator_shape(
    hf: dict[str, Any], path: Path, dropout: float, dtype: str, own_head: bool = False
) -> PretrainedModel:
    family = generator_family(hf)
    tied = {"tie_word_embeddings": False} if own_head else {}
    with naming(path):
        config = family.config.from_hf(hf | tied, dropout, dtype)
    return _without_weights(config, lambda: family.module(config, nnx.Rngs(0)), hf)


def _without_weights(config: Any, make: Callable[[], nnx.Module], hf: dict[str, Any]) -> PretrainedModel:
    def load_params() -> Params:
        raise InputError("of this model only its config.json was read")

    graph, abstract = split_parameters(nnx.eval_shape(make))
    return PretrainedModel(config, graph, abstract, (), hf, load_params)


def _with_weights(
    shape: PretrainedModel, checkpoint: Path, table: Mapping[str, str], names: set[str], reader: TensorReader
) -> PretrainedModel:
    """With the weights that `names` are, by a table from our paths to these names."""
    _check_fit(shape.abstract_params, table, names, reader, checkpoint)
    files = tuple(weight_files(checkpoint))
    return replace(shape, files=files, load_params=lambda: _fill(shape.abstract_params, table, names, reader))


def save_bert(folder: Path, config: Mapping[str, Any], params: Params) -> None:
    """Writes config.json and model.safetensors as Hugging Face lays them out."""
    _save(folder, config, bert_tensors(params))


def save_generator(folder: Path, config: Mapping[str, Any], params: Params) -> None:
    """Writes config.json and model.safetensors as Hugging Face lays them out for the family that `config` names."""
    _save(folder, config, generator_tensors(config, params))


def bert_tensors(params: Params, prefix: str = "") -> dict[str, np.ndarray]:
    """An encoder's tensors under Hugging Face's names; `prefix` is what DPR puts before its encoder's."""
    return _tensors(params, _bert_table(prefix))


def generator_tensors(config: Mapping[str, Any], params: Params) -> dict[str, np.ndarray]:
    """A generator's tensors under the Hugging Face names of the family that `config` (a config.json) names."""
    return _tensors(params, {ours: name for ours, name, _ in generator_family(config).names(config)})


def _bert_table(prefix: str) -> dict[str, str]:
    """Our paths → the names of an encoder's tensors; DPR keeps its projection under the prefix's parent."""
    parent = prefix.removesuffix("bert_model.")
    return {ours: (parent if "encode_proj" in name else prefix) + name for ours, name, _ in BERT}


def _bert_prefix(names: set[str], checkpoint: Path) -> str:
    """What stands before the names of the one BERT encoder among a checkpoint's tensors. Raises `InputError`."""
    anchor = BERT[0][1]
    prefixes = [name.removesuffix(anchor) for name in names if name.endswith(anchor)]
    if len(prefixes) != 1:
        raise InputError(f"{checkpoint}: {len(prefixes)} tensors are called …{anchor}; expected one BERT encoder")
    if other := set(prefixes[0].split(".")[:-1]) - BERT_PREFIXES:
        raise InputError(
            f"{checkpoint}: its tensors are called {shown(prefixes[0] + anchor)}, those of another model "
            f"({min(other)}) than the BERT that its config.json names; give a BERT encoder"
        )
    return prefixes[0]


def _layer_names(name: str, count: int) -> list[str]:
    return [name.format(i) for i in range(count)] if "{}" in name else [name]


def _check_fit(
    abstract: Params, table: Mapping[str, str], names: set[str], reader: TensorReader, checkpoint: Path
) -> None:
    """Raises `InputError` for tensors that are missing, unknown or misshapen, together; reads headers only."""
    problems, used = [], set()
    for path, leaf in nnx.traversals.flatten_mapping(abstract).items():
        stacked = "layers" in path
        needed = _layer_names(table[".".join(path)], leaf.shape[0] if stacked else 1)
        used |= set(needed)
        if ZERO.issuperset(needed) and not names.intersection(needed):
            continue
        shape = leaf.shape[1:] if stacked else leaf.shape
        for name in needed:
            if name not in names:
                problems.append(f"missing {name}")
            elif (stored := reader.shape(name)[:: -1 if path[-1] == "kernel" else 1]) != shape:
                problems.append(f"{name} has shape {stored}, expected {shape} (as we lay it out)")
    unknown = [name for name in names - used if not any(part in name for part in UNUSED)]
    problems += [f"unknown {name}" for name in sorted(unknown)]
    if problems:
        listed = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise InputError(f"{checkpoint}: its tensors do not fit its config.json: {listed}")


def _fill(abstract: Params, table: Mapping[str, str], names: set[str], reader: TensorReader) -> Params:
    """Reads every leaf of an abstract tree, whose tensors fit."""
    filled = {}
    for path, leaf in nnx.traversals.flatten_mapping(abstract).items():
        stacked = "layers" in path
        needed = _layer_names(table[".".join(path)], leaf.shape[0] if stacked else 1)
        if ZERO.issuperset(needed) and not names.intersection(needed):
            filled[path] = jnp.zeros(leaf.shape, jnp.float32)
            continue
        target = np.empty(leaf.shape, np.float32)
        for i, name in enumerate(needed):
            array = reader.read(name)
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
