"""Which tensor of a checkpoint is which of our parameters: one table a family.

A row is (our path, Hugging Face name, GGUF name). `{}` is the layer, which we stack on a leading axis.
A leaf called `kernel` is the transpose of Hugging Face's `weight`. `ENCODERS` and `GENERATORS` list the families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

from ragjax.models.encoders.bert import Bert, BertConfig
from ragjax.models.encoders.decoder import Decoder, DecoderConfig
from ragjax.models.encoders.modernbert import ModernBert, ModernBertConfig
from ragjax.models.generators.bart import Bart, BartConfig
from ragjax.models.generators.gemma import Gemma, GemmaConfig
from ragjax.models.generators.llama import Llama, LlamaConfig
from ragjax.models.generators.t5 import T5, T5Config
from ragjax.models.hf_config import Fields

Fused = tuple[
    tuple[str, tuple[str, ...]], ...
]  # part of the name of a tensor that holds several: the parts for each of them
NameTable = tuple[tuple[str, str, str | None], ...]


def _affine(ours: str, theirs: str, weight: str = "kernel") -> NameTable:
    return ((f"{ours}.{weight}", f"{theirs}.weight", None), (f"{ours}.bias", f"{theirs}.bias", None))


def _bert(layer: str, names: Mapping[str, str], types: bool = True) -> NameTable:
    """BERT and its like: `layer` stands before the names of a layer's tensors."""
    scales = {"attention_norm": "scale", "ffn_norm": "scale"}
    rows = (_affine(f"layers.{part}", f"{layer}.{name}", scales.get(part, "kernel")) for part, name in names.items())
    return (
        ("words.embedding", "embeddings.word_embeddings.weight", None),
        ("positions.embedding", "embeddings.position_embeddings.weight", None),
        *((("types.embedding", "embeddings.token_type_embeddings.weight", None),) if types else ()),
        *_affine("norm", "embeddings.LayerNorm", "scale"),
        *chain.from_iterable(rows),
        ("distances.embedding", "encoder.relative_attention_bias.weight", None),
        *_affine("projection", "encode_proj"),
    )


_BERT_OUTPUTS = {
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
BERT = _bert(
    "encoder.layer.{}",
    {
        **{part: f"attention.self.{part}" for part in ("query", "key", "value")},
        "output": "attention.output.dense",
        **_BERT_OUTPUTS,
    },
)
MPNET = _bert(
    "encoder.layer.{}",
    {
        **{part: f"attention.attn.{part[0]}" for part in ("query", "key", "value", "output")},
        **_BERT_OUTPUTS,
        "attention_norm": "attention.LayerNorm",
    },
    types=False,
)
DISTILBERT = _bert(
    "transformer.layer.{}",
    {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "output": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "ffn_norm": "output_layer_norm",
    },
    types=False,
)
MODERNBERT: NameTable = (
    ("words.embedding", "embeddings.tok_embeddings.weight", None),
    *_affine("norm", "embeddings.norm", "scale"),
    *_affine("last_norm", "final_norm", "scale"),
    *_affine("layers.attention_norm", "layers.{}.attn_norm", "scale"),
    *_affine("layers.ffn_norm", "layers.{}.mlp_norm", "scale"),
    *_affine("layers.query", "layers.{}.attn.Wq"),
    *_affine("layers.key", "layers.{}.attn.Wk"),
    *_affine("layers.value", "layers.{}.attn.Wv"),
    *_affine("layers.output", "layers.{}.attn.Wo"),
    *_affine("layers.gate", "layers.{}.mlp.Wgate"),
    *_affine("layers.up", "layers.{}.mlp.Wup"),
    *_affine("layers.down", "layers.{}.mlp.Wo"),
)
MODERNBERT_FUSED = (("attn.Wqkv", ("attn.Wq", "attn.Wk", "attn.Wv")), ("mlp.Wi", ("mlp.Wgate", "mlp.Wup")))
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
PHI3_FUSED = (
    ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
)
_GEMMA_NORMS = {
    "layers.attention_out_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.ffn_norm.scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers.ffn_out_norm.scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
GEMMA: NameTable = (
    *((ours, theirs, None) for ours, theirs, _ in LLAMA if ours not in _GEMMA_NORMS),
    *((ours, theirs, None) for ours, theirs in _GEMMA_NORMS.items()),
)
# as an encoder: without a head, and without what stands before all names of a generator
DECODER: NameTable = tuple(
    (f"decoder.{ours}", theirs.removeprefix("model."), None) for ours, theirs, _ in LLAMA if ours != "head.embedding"
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
        (f"{ours}.distances.embedding", f"{theirs}.0.SelfAttention.relative_attention_bias.weight", None),
        (f"{side}.norm.scale", f"{side}.final_layer_norm.weight", None),
        *_t5_attention(f"{ours}.attention", f"{theirs}.0", "SelfAttention"),
        *_t5_attention(f"{ours}.cross", f"{theirs}.1", "EncDecAttention"),
        (f"{ours}.ffn_norm.scale", f"{ffn}.layer_norm.weight", None),
        *((f"{ours}.{part}.kernel", f"{ffn}.DenseReluDense.{name}.weight", None) for part, name in names),
        (f"{ours}.down.kernel", f"{ffn}.DenseReluDense.wo.weight", None),
    )


def _t5(hf: Mapping[str, Any]) -> NameTable:
    usual = "relu" if hf.get("model_type") == "t5" else "gated-gelu"
    gated = (hf.get("feed_forward_proj") or usual).startswith("gated")
    head = ("embed.embedding", "shared.weight", None), ("head.embedding", "lm_head.weight", None)
    return (*head, *_t5_side("encoder", gated), *_t5_side("decoder", gated))


class EncoderFamily(NamedTuple):
    """What it takes to open the checkpoints of a family of encoders."""

    config: Any  # a class with `from_hf`
    module: Callable[..., Any]  # (config, rngs) → a `ragjax.models.encoders.pooling.Encoder`
    names: NameTable  # without what stands before them; the first row is the table of words
    prefixes: tuple[str, ...]  # what its own classes put there, such as bert.
    unused: tuple[str, ...]  # parts of the names of heads that an encoder does not need
    fused: Fused = ()


# by model_type
ENCODERS = {
    kind: EncoderFamily(BertConfig, Bert, names, prefixes, ("pooler.", head))
    for kind, names, prefixes, head in (
        ("bert", BERT, ("bert", "bert_model"), "cls."),
        ("dpr", BERT, ("bert", "bert_model"), "cls."),
        ("roberta", BERT, ("roberta",), "lm_head."),
        ("xlm-roberta", BERT, ("roberta",), "lm_head."),
        ("camembert", BERT, ("roberta",), "lm_head."),
        ("mpnet", MPNET, ("mpnet",), "lm_head."),
        ("distilbert", DISTILBERT, ("distilbert",), "vocab_"),
    )
}
ENCODERS["modernbert"] = EncoderFamily(
    ModernBertConfig, ModernBert, MODERNBERT, (), ("head.", "decoder."), MODERNBERT_FUSED
)
ENCODERS |= {
    kind: EncoderFamily(DecoderConfig, Decoder, DECODER, (), ("lm_head.",))
    for kind in ("qwen3", "qwen2", "mistral", "llama")
}


def encoder_family(hf: Mapping[str, Any]) -> EncoderFamily:
    """The family that a config.json names. Raises `InputError` for another one."""
    return ENCODERS[Fields(hf).text("model_type", among=ENCODERS)]


class GeneratorFamily(NamedTuple):
    """What it takes to open the checkpoints of a family."""

    config: Any  # a class with `from_hf`
    module: Callable[..., Any]  # (config, rngs) → a `ragjax.models.generator.Generator`
    names: Callable[[Mapping[str, Any]], NameTable]  # by config.json
    fused: Fused = ()


_LLAMA = GeneratorFamily(LlamaConfig, Llama, lambda hf: LLAMA)
_GEMMA = GeneratorFamily(GemmaConfig, Gemma, lambda hf: GEMMA)
_T5 = GeneratorFamily(T5Config, T5, _t5)
# by model_type
GENERATORS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "phi3": _LLAMA._replace(fused=PHI3_FUSED),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "bart": GeneratorFamily(BartConfig, Bart, lambda hf: BART),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
}


def generator_family(hf: Mapping[str, Any]) -> GeneratorFamily:
    """The family that a config.json names. Raises `InputError` for another one."""
    return GENERATORS[Fields(hf).text("model_type", among=GENERATORS)]
