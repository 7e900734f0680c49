"""Low-rank adapters of a pretrained model: given to it, written as PEFT writes them, and read from PEFT's folders.

A PEFT folder holds adapter_config.json and adapter_model.safetensors, and names the model that it belongs to.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from ragjax.checkpoints.name_tables import encoder_family, generator_family
from ragjax.checkpoints.pretrained import UNUSED, PretrainedModel
from ragjax.checkpoints.safetensors import SafetensorsReader, require_finite
from ragjax.config import Lora
from ragjax.errors import InputError
from ragjax.files import read_json, shown
from ragjax.models.hf_config import Fields, naming
from ragjax.models.layers import ADAPTERS, Params, add_adapters, computation_types, is_adapter, split_parameters

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # begins the names of PEFT's tensors
LEAVES = {"lora_a": "lora_A", "lora_b": "lora_B"}
# entries of adapter_config.json that change what adapters do, and their values where they do nothing
UNSUPPORTED: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "lora_bias": False,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
# the ways to begin after which W is what the base model has; others, such as pissa, change W, too
BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def with_adapters(model: PretrainedModel, maps: Collection[str], lora: Lora, seed: int) -> PretrainedModel:
    """The same model with adapters of its layers' linear maps, of all where `maps` is empty.

    B is 0 at first, so that nothing changes; A is drawn as PEFT draws it, uniform within 1/√in. Raises `InputError`
    for a map that the model has not.
    """
    assert lora.rank is not None
    module = nnx.merge(model.graphdef, model.abstract_params)
    add_adapters(module, maps, lora.rank, lora.alpha, lora.dropout)
    graph, abstract = split_parameters(module)

    def load_params(like: Params | None = None) -> Params:
        leaves = nnx.traversals.flatten_mapping(abstract if like is None else like)
        base = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
        few = {path: _first_value(path, leaf, seed) for path, leaf in leaves.items() if is_adapter(path)}
        loaded = model.load_params(nnx.traversals.unflatten_mapping(base)) if base else {}
        return join_trees(loaded, nnx.traversals.unflatten_mapping(few))

    return replace(
        model,
        graphdef=graph,
        abstract_params=abstract,
        compute_params=computation_types(module),
        load_params=load_params,
    )


def _first_value(path: tuple[str, ...], leaf: Any, seed: int) -> jax.Array:
    """The same for a seed on every mesh."""
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    whole = np.zeros(leaf.shape, leaf.dtype)
    if path[-1] == "lora_a":
        rng, within = np.random.default_rng([seed, zlib.crc32(".".join(path).encode())]), leaf.shape[1] ** -0.5
        whole = rng.uniform(-within, within, leaf.shape).astype(leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index], dtype=leaf.dtype)


def adapters_only(params: Params) -> Params:
    """Of the parameters of a model that has adapters these alone; of any other all."""
    leaves = nnx.traversals.flatten_mapping(params)
    few = {path: leaf for path, leaf in leaves.items() if is_adapter(path)}
    return nnx.traversals.unflatten_mapping(few) if few else params


def without_adapters(params: Params) -> Params:
    """What `adapters_only` leaves out."""
    leaves = nnx.traversals.flatten_mapping(params)
    has_some = any(map(is_adapter, leaves))
    return nnx.traversals.unflatten_mapping(
        {path: leaf for path, leaf in leaves.items() if has_some and not is_adapter(path)}
    )


def join_trees(one: Params, other: Params) -> Params:
    """Two trees that have no leaf in common as one."""
    flatten = nnx.traversals.flatten_mapping
    return nnx.traversals.unflatten_mapping(dict(flatten(one)) | dict(flatten(other)))


def merged(params: Params, scale: float) -> Params:
    """On the host: W + scale · A · B instead of each W that has adapters, in float32."""
    leaves = dict(nnx.traversals.flatten_mapping(jax.device_get(params)))
    for path in [path for path in leaves if path[-1] == "lora_a"]:
        a, b = (leaves.pop((*path[:-1], name)) for name in ADAPTERS)
        leaves[*path[:-1], "kernel"] = leaves[*path[:-1], "kernel"] + scale * (a @ b)
    return nnx.traversals.unflatten_mapping(leaves)


def peft_tensors(model: PretrainedModel, params: Params) -> dict[str, np.ndarray]:
    """Adapters under PEFT's names. Raises `InputError` for a family whose own tensors hold several maps."""
    names, tensors = _weight_names(model), dict[str, np.ndarray]()
    for path, leaf in nnx.traversals.flatten_mapping(jax.device_get(adapters_only(params))).items():
        theirs = names[".".join((*path[:-1], "kernel"))].removesuffix(".weight")
        for layer, row in enumerate(leaf):
            name = f"{PREFIX}{theirs.format(layer)}.{LEAVES[path[-1]]}.weight"
            tensors[name] = np.ascontiguousarray(row.T, np.float32)
    return tensors


def _weight_names(model: PretrainedModel) -> dict[str, str]:
    """Our paths → the names that a model's own class has for its tensors, `{}` for the layer."""
    hf = model.hf_config
    if not _is_encoder(model):
        generator = generator_family(hf)
        names, fused = generator.names(hf), generator.fused
    else:
        encoder = encoder_family(hf)
        prefix = dpr_prefix(hf) if hf.get("model_type") == "dpr" else ""
        names, fused = tuple((ours, prefix + theirs, None) for ours, theirs, _ in encoder.names), encoder.fused
    if fused:
        raise InputError(f"a {hf['model_type']} keeps several linear maps in one tensor, whose adapters PEFT has not")
    return {ours: theirs for ours, theirs, _ in names}


def _is_encoder(model: PretrainedModel) -> bool:
    """Decoders may be either."""
    return hasattr(model.config, "pooling")


def dpr_prefix(hf: Mapping[str, Any]) -> str:
    """What DPR's classes put before the names of its encoder's tensors."""
    context = "DPRContextEncoder" in (hf.get("architectures") or ())
    return f"{'ctx_encoder' if context else 'question_encoder'}.bert_model."


def peft_config(model: PretrainedModel, lora: Lora, base: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json for adapters of `tensors`; `base` is the source of the model that they belong to."""
    source, _, revision = base.partition("@") if base.startswith("hf:") else (base, "", "")
    maps = sorted({_module(name) for name in tensors})
    kind = "FEATURE_EXTRACTION"
    if not _is_encoder(model):
        kind = "SEQ_2_SEQ_LM" if model.config.encoder_decoder else "CAUSAL_LM"
    targets: Any = sorted({name.rpartition(".")[2] for name in maps})
    if kind == "FEATURE_EXTRACTION":  # there the last part of a name does not tell one map from another
        targets = "|".join(sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in maps}))
    return {
        "peft_type": "LORA",
        "task_type": kind,
        "base_model_name_or_path": source.removeprefix("hf:"),
        "revision": revision or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _module(name: str) -> str:
    """The module to which one of PEFT's tensors belongs."""
    return name.removeprefix(PREFIX).rpartition(".lora_")[0]


def peft_base(folder: Path) -> str:
    """The source of the model that a PEFT folder names. Raises `InputError` where there is no such model."""
    path = folder / ADAPTER_CONFIG
    fields = Fields(read_json(path))
    with naming(path):
        base, revision = fields.text("base_model_name_or_path", ""), fields.text("revision", "")
        if base.startswith(("hf:", "pypi:", "random:")) or (base and os.path.exists(base)):
            return base
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            raise InputError(
                f"base_model_name_or_path is {shown(base)}, which is neither here nor ORG/NAME of the hub; name the "
                "model that they were trained with: --base SOURCE"
            )
    return f"hf:{base}" + (f"@{revision}" if revision else "")


def merge_peft(folder: Path, base: SafetensorsReader) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a model, those that a PEFT folder has adapters for as W + s·B·A, in float32.

    Raises `InputError` for adapters of another kind, damaged ones, and those of another model.
    """
    (rank, scale), reader = _peft_scale(folder), SafetensorsReader(folder, ADAPTER_WEIGHTS)
    pairs: dict[str, dict[str, str]] = {}
    for name in sorted(reader.names):
        module, leaf = _module(name), name.rpartition(".lora_")[2]
        if not module or leaf not in ("A.weight", "B.weight"):
            raise InputError(f"{folder / ADAPTER_WEIGHTS}: {shown(name)} is no adapter of a linear map; expected LoRA")
        pairs.setdefault(module, {})[leaf[0]] = name
    if not pairs:
        raise InputError(f"{folder / ADAPTER_WEIGHTS}: holds no adapters; fetch it again")
    found: dict[str, dict[str, str]] = {}
    for module, pair in pairs.items():
        weights = [name for name in base.names if f".{name}".endswith(f".{module}.weight")]
        weights = weights or [name for name in base.names if f".{module}.weight".endswith(f".{name}")]
        if len(weights) != 1 or len(pair) != 2 or weights[0] in found:
            raise InputError(
                f"{folder / ADAPTER_WEIGHTS}: its adapters of {shown(module)} do not belong to the base model; name "
                "the model that they were trained with: --base SOURCE"
            )
        found[weights[0]] = pair
    for name in sorted(name for name in base.names if not name.endswith(UNUSED)):
        weight = base.read(name)
        if name in found:
            a, b = (reader.read(found[name][leaf]) for leaf in "AB")
            if weight.ndim != 2 or (b.shape, a.shape) != ((weight.shape[0], rank), (rank, weight.shape[1])):
                raise InputError(
                    f"{folder / ADAPTER_WEIGHTS}: B {list(b.shape)} and A {list(a.shape)} do not fit {name} "
                    f"{list(weight.shape)} of the base model, with r = {rank} in {ADAPTER_CONFIG}"
                )
            with np.errstate(over="ignore", invalid="ignore"):
                weight = require_finite(weight + scale * (b @ a), name, folder / ADAPTER_WEIGHTS)
        yield name, weight


def _peft_scale(folder: Path) -> tuple[int, float]:
    """The rank, and what B·A is multiplied by. Raises `InputError` for what is not plain LoRA."""
    hf = read_json(folder / ADAPTER_CONFIG)
    with naming(folder / ADAPTER_CONFIG):
        fields = Fields(hf)
        fields.text("peft_type", among=("LORA",))
        wrong = [key for key, off in UNSUPPORTED.items() if hf.get(key, off) not in (off, None)]
        if hf.get("init_lora_weights", True) not in (*BEGINNINGS, None):
            wrong.append("init_lora_weights")
        for key in wrong:
            raise InputError(f"{key} is {json.dumps(hf[key])[:80]}, which is not supported; merge it with PEFT")
        rank, alpha = fields.count("r"), fields.number("lora_alpha", 8.0)
        return rank, alpha / (math.sqrt(rank) if fields.flag("use_rslora", False) else rank)
