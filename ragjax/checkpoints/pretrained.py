"""Checkpoints ↔ parameter trees, through the name tables: opened, checked, read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ragjax.checkpoints.gguf import open_gguf
from ragjax.checkpoints.name_tables import LLAMA, EncoderFamily, Fused, encoder_family, generator_family
from ragjax.checkpoints.parameter_loader import LeafSource, load_leaves
from ragjax.checkpoints.safetensors import (
    Index,
    SafetensorsReader,
    TensorReader,
    TensorView,
    TensorViews,
    weight_files,
    write_safetensors,
)
from ragjax.checkpoints.sentence_transformers import read_sentence_modules
from ragjax.errors import InputError
from ragjax.files import atomic_write, read_json, shown
from ragjax.models.encoders.pooling import Dense
from ragjax.models.hf_config import naming
from ragjax.models.layers import Params, computation_types, split_parameters
from ragjax.parallel.sharding import widens_bfloat16

HEAD = "lm_head.weight"
DENSE = "dense_"  # begins the paths of what sentence-transformers puts after an encoder
# copies of the one embedding table
TIED = {f"{part}.embed_tokens.weight" for part in ("encoder", "decoder", "model.encoder", "model.decoder")}
# tensors that carry nothing we need: heads of other tasks, and buffers that older exports wrote down
UNUSED = (
    "embeddings.position_ids",
    "rotary_emb.inv_freq",
    "masked_bias",
    "attn.bias",
    "EncDecAttention.relative_attention_bias",
)
# ends of the names of what may be missing, and is 0 then; ModernBERT's first layer has no such norm
ABSENT = ("final_logits_bias", "layers.0.attn_norm.weight", "layers.0.attn_norm.bias")
# what may stand before the names of any encoder's tensors; a RoBERTa's and a BERT's are called alike but for their own
ENCODER_PREFIXES = {"model", "module", "rag", "question_encoder", "ctx_encoder", "encoder"}
OLDER_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # of TensorFlow's BERT


@dataclass(frozen=True)
class PretrainedModel:
    """A checkpoint opened but not yet read: a run's own checkpoint may hold newer parameters.

    Two are equal that are the same network, whatever their weights.
    """

    config: Any  # that of its family, such as `BertConfig` or `LlamaConfig`
    graphdef: nnx.GraphDef
    abstract_params: Params = field(compare=False)  # shapes, and float32: as they are trained
    compute_params: Params = field(compare=False)  # shapes, and the types that it computes with
    files: tuple[Path, ...] = field(compare=False)  # that hold the weights
    hf_config: dict[str, Any] = field(compare=False)  # its config.json
    # (like) → parameters of its shapes, types and shardings (see `load_leaves`), by default `abstract_params`; raises
    # `InputError` for tensors that are damaged, quantised or not finite
    load_params: Callable[..., Params] = field(compare=False)
    widened_on_cpus: bool = field(default=True, compare=False)  # False in a plan whose CPUs stand for accelerators

    def untrained_types(self, mesh: Mesh) -> Params:
        """The shapes and types of parameters that are not trained: the narrowest in which no number changes.

        Where bfloat16 is widened they stay float32, else there would be two copies.
        """
        return self.abstract_params if self.widened_on_cpus and widens_bfloat16(mesh) else self.compute_params


def open_encoder(
    checkpoint: Path, pooling: str, normalize: bool, dropout: float = 0.0, dtype: str = "float32"
) -> PretrainedModel:
    """An encoder in a Hugging Face folder, with the Dense layers of its sentence-transformers folder if it has any.

    Raises `InputError` for a missing or unreadable file, another family, and tensors that do not fit.
    """
    modules = read_sentence_modules(checkpoint)
    dense = modules.dense if modules else ()
    shape = _encoder_shape(checkpoint / "config.json", pooling, normalize, dense, dropout, dtype)
    family, whole = encoder_family(shape.hf_config), SafetensorsReader(checkpoint)
    views = {_newer_name(name): TensorView(whole, name) for name in whole.names}
    table = _encoder_table(family, _encoder_prefix(family, set(views), checkpoint))
    for folder, _ in dense:
        part = SafetensorsReader(folder)
        views |= {f"{folder.name}/{name}": TensorView(part, name) for name in part.names}
    table |= _dense_table(dense)
    reader = _split_fused(TensorViews(views), family.fused, shape.abstract_params, table, checkpoint)
    model = _with_weights(shape, checkpoint, table, reader, family.unused)
    return replace(model, files=(*model.files, *(file for folder, _ in dense for file in weight_files(folder))))


def encoder_shape(
    path: Path, pooling: str, normalize: bool, dropout: float = 0.0, dtype: str = "float32"
) -> PretrainedModel:
    """An encoder of which only the config.json at `path` is there: shapes, and nothing to read. Raises `InputError`."""
    modules = read_sentence_modules(path.parent)
    return _encoder_shape(path, pooling, normalize, modules.dense if modules else (), dropout, dtype)


def _encoder_shape(
    path: Path, pooling: str, normalize: bool, dense: Sequence[tuple[Path, Dense]], dropout: float, dtype: str
) -> PretrainedModel:
    hf = read_json(path)
    with naming(path):
        family = encoder_family(hf)
        config = family.config.from_hf(hf, pooling, normalize, tuple(shape for _, shape in dense), dropout, dtype)
    return _without_weights(config, family.module, hf)


def _newer_name(name: str) -> str:
    stem, dot, leaf = name.rpartition("LayerNorm.")
    return stem + OLDER_NAMES.get(dot + leaf, dot + leaf)


def open_generator(checkpoint: Path, dropout: float = 0.0, dtype: str = "float32") -> PretrainedModel:
    """A generator in a Hugging Face folder, of the family that its config.json names, or a Llama-family GGUF file.

    Raises `InputError` as `open_encoder` does, and for tensors that do not fit the configuration.
    """
    reader: TensorReader
    gguf = checkpoint.suffix == ".gguf"
    if gguf:
        hf, reader = open_gguf(checkpoint)
    else:
        hf, reader = read_json(checkpoint / "config.json"), SafetensorsReader(checkpoint)
    path = checkpoint if gguf else checkpoint / "config.json"
    with naming(path):
        family, names = generator_family(hf), reader.names
    if gguf and (family.fused or family.names(hf) is not LLAMA):
        raise InputError(f"{path}: a {hf['model_type']} in GGUF is not supported; use the Hugging Face folder")
    shape = _generator_shape(hf | _own_head(hf, names), path, dropout, dtype)
    shape = replace(shape, hf_config=hf)
    tied = TIED | ({HEAD, "output.weight"} if getattr(shape.config, "tie_word_embeddings", True) else set())
    copies, names = names & tied, names - tied
    rows = family.names(hf)
    table = {ours: name for ours, hf_name, gguf_name in rows if (name := gguf_name if gguf else hf_name)}
    if hf.get("model_type") == "bart" and not any(name.startswith("model.") for name in names):
        table = {ours: name.removeprefix("model.") for ours, name in table.items()}  # saved without its head
    if copies and table["embed.embedding"] not in names:  # of tied tables any one may be the one that was saved
        table["embed.embedding"] = min(copies)
        names = names | {min(copies)}
    if family.fused:
        reader = _split_fused(reader, family.fused, shape.abstract_params, table, checkpoint)
        names = reader.names - tied
    if copies - {table["embed.embedding"]}:
        may_differ = HEAD if hasattr(shape.config, "tie_word_embeddings") else None
        reader = _TiedTables(reader, checkpoint, table["embed.embedding"], copies, may_differ)
    return _with_weights(shape, checkpoint, table, reader, names=names)


def _own_head(hf: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """What config.json should say of a T5's head: transformers 5 writes that all are tied, even one with its own."""
    if hf.get("model_type") == "mt5":
        return {"tie_word_embeddings": HEAD not in names}
    return {"tie_word_embeddings": False} if hf.get("scale_decoder_outputs") is False and HEAD in names else {}


class _TiedTables:
    """A `TensorReader` of tensors among which one table is written down several times: its copies are read beside it.

    What a process does not read of the table it does not compare either.
    """

    def __init__(
        self, reader: TensorReader, checkpoint: Path, used: str, copies: set[str], may_differ: str | None
    ) -> None:
        self._reader, self._checkpoint, self._used, self._may_differ = reader, checkpoint, used, may_differ
        self._copies = sorted(copies - {used})

    @property
    def names(self) -> set[str]:
        """As `TensorReader` says."""
        return self._reader.names

    def shape(self, name: str) -> tuple[int, ...]:
        """As `TensorReader` says."""
        return self._reader.shape(name)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """As `TensorReader` says. Raises `InputError` for a copy of the table that holds something else, too."""
        array = self._reader.read(name, index)
        for copy in self._copies if name == self._used else ():
            same_shape = self.shape(copy) == self.shape(name)
            if not same_shape or not np.array_equal(array, self._reader.read(copy, index)):
                raise InputError(self._difference(copy))
        return array

    def _difference(self, copy: str) -> str:
        cure = "ragjax has no such model with a table of its own there"
        if copy == self._may_differ:
            cure = "give tie_word_embeddings: false there if the head is the model's own, else leave the tensor out"
        return f"{self._checkpoint}: {copy} differs from {self._used}, but by config.json they are one table; {cure}"


def generator_shape(path: Path, dropout: float = 0.0, dtype: str = "float32") -> PretrainedModel:
    """A generator of which only the config.json at `path` is there, as `encoder_shape`."""
    return _generator_shape(read_json(path), path, dropout, dtype)


def _generator_shape(hf: dict[str, Any], path: Path, dropout: float, dtype: str) -> PretrainedModel:
    with naming(path):
        family = generator_family(hf)
        config = family.config.from_hf(hf, dropout, dtype)
    return _without_weights(config, family.module, hf)


def _without_weights(config: Any, make: Callable[..., nnx.Module], hf: dict[str, Any]) -> PretrainedModel:
    def load_params(like: Params | None = None) -> Params:
        raise InputError("of this model only its config.json was read")

    graph, *types = _network(config, make)
    abstract, computed = (jax.tree.map(lambda leaf: leaf, tree) for tree in types)  # dictionaries of its own
    return PretrainedModel(config, graph, abstract, computed, (), hf, load_params)


@lru_cache(maxsize=32)
def _network(config: Any, make: Callable[..., nnx.Module]) -> tuple[nnx.GraphDef, Params, Params]:
    """The static graph, `abstract_params` and `compute_params` of `make(config, rngs)`, traced once a process."""
    module = nnx.eval_shape(lambda: make(config, nnx.Rngs(0)))
    return *split_parameters(module), computation_types(module)


def _with_weights(
    shape: PretrainedModel,
    checkpoint: Path,
    table: Mapping[str, str],
    reader: TensorReader,
    unused: tuple[str, ...] = (),
    names: set[str] | None = None,
) -> PretrainedModel:
    """With the weights that `names`, else all that the reader has, are, by a table from our paths to these names."""
    names = reader.names if names is None else names
    _check_fit(shape.abstract_params, table, names, reader, checkpoint, UNUSED + unused)
    sources = _leaf_sources(shape.abstract_params, table, names)

    def load_params(like: Params | None = None) -> Params:
        return load_leaves(like or shape.abstract_params, sources, reader)

    return replace(shape, files=tuple(weight_files(checkpoint)), load_params=load_params)


def save_encoder(folder: Path, config: Mapping[str, Any], params: Params) -> None:
    """Writes config.json and model.safetensors as Hugging Face lays them out for the family that `config` names."""
    _save(folder, config, encoder_tensors(config, params))


def save_generator(folder: Path, config: Mapping[str, Any], params: Params) -> None:
    """Writes config.json and model.safetensors as Hugging Face lays them out for the family that `config` names."""
    _save(folder, config, generator_tensors(config, params))


def encoder_tensors(config: Mapping[str, Any], params: Params, prefix: str = "") -> dict[str, np.ndarray]:
    """An encoder's tensors under the Hugging Face names of the family that `config` (a config.json) names.

    `prefix` is what DPR puts before its encoder's. Without the Dense layers of sentence-transformers.
    """
    family = encoder_family(config)
    own = {name: value for name, value in params.items() if not name.startswith(DENSE)}
    tensors = _tensors(own, _encoder_table(family, prefix), family.fused)
    return {name: value for name, value in tensors.items() if not name.endswith(ABSENT)}


def generator_tensors(config: Mapping[str, Any], params: Params) -> dict[str, np.ndarray]:
    """A generator's tensors under the Hugging Face names of the family that `config` (a config.json) names."""
    family = generator_family(config)
    return _tensors(params, {ours: name for ours, name, _ in family.names(config)}, family.fused)


def _encoder_table(family: EncoderFamily, prefix: str) -> dict[str, str]:
    """Our paths → the names of an encoder's tensors; DPR keeps its projection under the prefix's parent."""
    parent = prefix.removesuffix("bert_model.")
    return {ours: (parent if "encode_proj" in name else prefix) + name for ours, name, _ in family.names}


def _dense_table(dense: Sequence[tuple[Path, Dense]]) -> dict[str, str]:
    leaves = {"kernel": "weight", "bias": "bias"}
    return {
        f"{DENSE}{number}.{ours}": f"{folder.name}/linear.{theirs}"
        for number, (folder, _) in enumerate(dense)
        for ours, theirs in leaves.items()
    }


def _encoder_prefix(family: EncoderFamily, names: set[str], checkpoint: Path) -> str:
    """What stands before the names of the one encoder among a checkpoint's tensors. Raises `InputError`."""
    anchor = family.names[0][1]
    prefixes = [name.removesuffix(anchor) for name in names if name.endswith(anchor)]
    if len(prefixes) != 1:
        raise InputError(f"{checkpoint}: {len(prefixes)} tensors are called …{anchor}; expected one encoder")
    if other := set(prefixes[0].split(".")[:-1]) - ENCODER_PREFIXES - {*family.prefixes}:
        raise InputError(
            f"{checkpoint}: its tensors are called {shown(prefixes[0] + anchor)}, those of another model "
            f"({min(other)}) than its config.json names; give an encoder whose config.json belongs to it"
        )
    return prefixes[0]


def _layer_names(name: str, count: int) -> list[str]:
    return [name.format(i) for i in range(count)] if "{}" in name else [name]


def _check_fit(
    abstract: Params,
    table: Mapping[str, str],
    names: set[str],
    reader: TensorReader,
    checkpoint: Path,
    unneeded: tuple[str, ...],
) -> None:
    """Raises `InputError` for tensors that are missing, unknown or misshapen, together; reads headers only."""
    problems, used = [], set()
    for path, leaf in nnx.traversals.flatten_mapping(abstract).items():
        stacked = "layers" in path
        needed = _layer_names(table[".".join(path)], leaf.shape[0] if stacked else 1)
        used |= set(needed)
        shape = leaf.shape[1:] if stacked else leaf.shape
        for name in needed:
            if name not in names:
                problems += [] if name.endswith(ABSENT) else [f"missing {name}"]
            elif (stored := reader.shape(name)[:: -1 if path[-1] == "kernel" else 1]) != shape:
                problems.append(f"{name} has shape {stored}, expected {shape} (as we lay it out)")
    unknown = [name for name in names - used if not any(part in name for part in unneeded)]
    problems += [f"unknown {name}" for name in sorted(unknown)]
    if problems:
        listed = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise InputError(f"{checkpoint}: its tensors do not fit its config.json: {listed}")


def _leaf_sources(abstract: Params, table: Mapping[str, str], names: set[str]) -> dict[tuple[str, ...], LeafSource]:
    """By path, the tensors of each leaf; of those that `names` has not (see `ABSENT`) none."""
    sources = {}
    for path, leaf in nnx.traversals.flatten_mapping(abstract).items():
        stacked = "layers" in path
        needed = _layer_names(table[".".join(path)], leaf.shape[0] if stacked else 1)
        there = tuple(name if name in names else None for name in needed)
        sources[path] = LeafSource(there, stacked, transposed=path[-1] == "kernel")
    return sources


def _split_fused(
    reader: TensorReader, fused: Fused, abstract: Params, table: Mapping[str, str], checkpoint: Path
) -> TensorReader:
    """The same tensors, where those that hold several are several. Raises `InputError` for one of another height."""
    rows = {
        name: leaf.shape[-1]
        for path, leaf in nnx.traversals.flatten_mapping(abstract).items()
        for name in _layer_names(table[".".join(path)], leaf.shape[0])
    }
    views: dict[str, TensorView] = {}
    for name in reader.names:
        whole, others = next(((whole, parts) for whole, parts in fused if whole in name), ("", ()))
        parts = [name.replace(whole, part) for part in others]
        ends = list(accumulate((rows.get(part, 0) for part in parts), initial=0))
        if whole and (height := reader.shape(name)[0]) != ends[-1]:
            raise InputError(f"{checkpoint}: {name} has {height} rows, but by config.json it has {ends[-1]}")
        views |= {part: TensorView(reader, name, slice(*ab)) for part, ab in zip(parts, pairwise(ends), strict=True)}
        if not whole:
            views[name] = TensorView(reader, name)
    return TensorViews(views)


def _tensors(params: Params, table: Mapping[str, str], fused: Fused) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in nnx.traversals.flatten_mapping(jax.device_get(params)).items():
        stacked, transposed = "layers" in path, path[-1] == "kernel"
        rows = list(leaf) if stacked else [leaf]
        for name, row in zip(_layer_names(table[".".join(path)], len(rows)), rows, strict=True):
            tensors[name] = np.ascontiguousarray(row.T if transposed else row)
    for whole, (first, *others) in fused:
        for name in [name for name in tensors if first in name]:
            parts = [tensors.pop(name.replace(first, part)) for part in (first, *others)]
            tensors[name.replace(first, whole)] = np.concatenate(parts)
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
