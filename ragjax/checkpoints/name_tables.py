"""Which tensor of a checkpoint is which of our parameters: one table a family.

A row is (our path, Hugging Face name, GGUF name). `{}` is the layer, which we stack on a leading axis.
A leaf called `kernel` is the transpose of Hugging Face's `weight`. `GENERATORS` lists the families of generators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ragjax.models.generators.bart import Bart, BartConfig
from ragjax.models.generators.llama import Llama, LlamaConfig
from ragjax.models.generators.t5 import T5, T5Config

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


def _t5(hf: Mapping[str, Any]) -> NameTable:
    gated = (hf.get("feed_forward_proj") or "relu").startswith("gated")
    head = ("embed.embedding", "shared.weight", None), ("head.embedding", "lm_head.weight", None)
    return (*head, *_t5_side("encoder", gated), *_t5_side("decoder", gated))


class GeneratorFamily(NamedTuple):
    """What it takes to open the checkpoints of a family."""

    config: Any  # a class with `from_hf`
    module: Callable[..., Any]  # (config, rngs) → a `ragjax.models.generator.Generator`
    names: Callable[[Mapping[str, Any]], NameTable]  # by config.json


# by model_type
GENERATORS = {
    "bart": GeneratorFamily(BartConfig, Bart, lambda hf: BART),
    "t5": GeneratorFamily(T5Config, T5, _t5),
    "llama": GeneratorFamily(LlamaConfig, Llama, lambda hf: LLAMA),
}


def generator_family(hf: Mapping[str, Any]) -> GeneratorFamily:
    """The family that a config.json names; the Llama family has several names, and refuses whatever else there is."""
    return GENERATORS.get(str(hf.get("model_type")), GENERATORS["llama"])
