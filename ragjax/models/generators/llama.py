"""The Llama family, decoder only: SmolLM2, Llama, Mistral, Qwen2 and Qwen3 (Touvron et al. 2023).

x += attention(rms(x)); x += down(silu(gate(rms(x))) · up(rms(x))), with rotary positions and grouped key-value heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.errors import InputError
from ragjax.models.attention import dot_product_attention, self_attention
from ragjax.models.hf_config import Fields
from ragjax.models.kv_cache import DocumentMemory, KVCache, LayerCache, decode_layers
from ragjax.models.layers import RowRngs, dropout, fold_rngs, scan_layers, stack
from ragjax.models.vocab_head import VocabHead

# by model_type: how the names of its classes begin
KINDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model; `from_hf` reads Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, float], ...] = ()  # Llama 3's: factor, low_freq_factor, high_freq_factor, original
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 2048  # positions, or its sliding window where that is shorter: within it attention is full
    dropout: float = 0.0
    dtype: str = "float32"
    encoder_decoder: ClassVar[bool] = False

    @classmethod
    def from_hf(cls, hf: dict[str, Any], dropout: float = 0.0, dtype: str = "float32") -> LlamaConfig:
        """Raises `InputError` for what this family does not have (sliding windows, other activations or positions), and
        for an entry of another type or size.
        """
        fields = Fields(hf)
        kind = fields.text("model_type", among=KINDS)
        fields.check_class(KINDS[kind])
        fields.text("hidden_act", "silu", among=("silu",))
        rope = fields.part("rope_parameters", "rope_scaling")
        scaling = rope.text("rope_type" if rope.has("rope_type") else "type", "default", among=("default", "llama3"))
        if fields.flag("mlp_bias", False) or (kind != "qwen2" and fields.flag("attention_bias", False)):
            raise InputError("biases outside Qwen2's query, key and value are not supported")
        positions = fields.count("max_position_embeddings", 2048)
        # as transformers: a Mistral that does not say otherwise has a window
        windowed = kind == "mistral" or fields.flag("use_sliding_window", False)
        if windowed and ("sliding_window" not in hf or hf["sliding_window"] is not None):
            positions = min(positions, fields.count("sliding_window", 4096))
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        hidden_size, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        kv_heads = fields.count("num_key_value_heads", heads)
        if heads % kv_heads:
            raise InputError(f"num_attention_heads is {heads}, which num_key_value_heads={kv_heads} does not divide")
        if not fields.has("head_dim"):
            fields.check_heads("hidden_size", "num_attention_heads")
        head_dim = fields.count("head_dim", hidden_size // heads)
        if head_dim % 2:
            raise InputError(f"head_dim is {head_dim}; rotary positions need an even one")
        return cls(
            vocab_size=fields.count("vocab_size"),
            hidden_size=hidden_size,
            num_layers=fields.layers("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_dim=fields.count("intermediate_size"),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=(rope if rope.has("rope_theta") else fields).number("rope_theta", 10000.0),
            rope_scaling=tuple((name, rope.number(name)) for name in names) if scaling == "llama3" else (),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            max_positions=positions,
            dropout=dropout,
            dtype=dtype,
        )


class LlamaLayer(nnx.Module):
    """One block: attention, then the gated feed-forward half."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)

        def linear(size_in: int, size_out: int, bias: bool = False) -> nnx.Linear:
            return nnx.Linear(size_in, size_out, use_bias=bias, dtype=dtype, rngs=rngs)

        def norm(size: int) -> nnx.RMSNorm:
            return nnx.RMSNorm(size, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)

        c = self.config = config
        self.attention_norm, self.ffn_norm = norm(c.hidden_size), norm(c.hidden_size)
        self.query = linear(c.hidden_size, c.num_heads * c.head_dim, c.qkv_bias)
        self.key = linear(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.value = linear(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.output = linear(c.num_heads * c.head_dim, c.hidden_size)
        self.gate, self.up, self.down = (
            linear(c.hidden_size, c.mlp_dim),
            linear(c.hidden_size, c.mlp_dim),
            linear(c.mlp_dim, c.hidden_size),
        )
        if c.qk_norm:
            self.query_norm, self.key_norm = norm(c.head_dim), norm(c.head_dim)

    def project(self, x: Float[Array, "... D"], angles: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Q [..., H, Dh], K and V [..., Hkv, Dh] of the normalised x; Q and K turned by the `angles` of positions."""
        c, h = self.config, self.attention_norm(x)
        query = self.query(h).reshape(*x.shape[:-1], c.num_heads, c.head_dim)
        key = self.key(h).reshape(*x.shape[:-1], c.num_kv_heads, c.head_dim)
        value = self.value(h).reshape(*x.shape[:-1], c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return apply_rope(query, angles), apply_rope(key, angles), value

    def finish(
        self, x: Float[Array, "n ... D"], attended: Float[Array, "n ... H Dh"], rngs: RowRngs | None
    ) -> Float[Array, "n ... D"]:
        """The rest of the block, after attention."""
        rate = self.config.dropout
        x = x + dropout(self.output(attended.reshape(*x.shape[:-1], -1)), fold_rngs(rngs, 0), rate)
        h = self.ffn_norm(x)
        return x + dropout(self.down(jax.nn.silu(self.gate(h)) * self.up(h)), fold_rngs(rngs, 1), rate)


class Llama(nnx.Module):
    """A generator (`ragjax.models.generator.Generator`): its memory is the key-value cache of the prompt."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.layers = stack(lambda r: LlamaLayer(config, r), config.num_layers, rngs)
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, dtype=jnp.dtype(config.dtype), rngs=rngs)
        if not config.tie_word_embeddings:
            self.head = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)

    def prefill(
        self,
        source: Int[Array, "n S"],
        mask: Bool[Array, "n S"],
        dropout_rngs: RowRngs | None = None,
        remat: bool = False,
    ) -> DocumentMemory:
        """Reads all but the last prompt token, which is the start token."""
        c, length = self.config, source.shape[1]
        angles = rope_angles(jnp.arange(length)[None], c)  # 1 S 1 Dh/2
        causal = jnp.tril(jnp.ones((1, length, length), bool))

        def step(layer: LlamaLayer, x: Array, number: Array) -> tuple[Array, tuple[Array, Array]]:
            query, key, value = layer.project(x, angles)
            # right-padding needs no mask of its own: a token never sees what stands after it
            attended = self_attention(query, key, value, causal)
            return layer.finish(x, attended, fold_rngs(dropout_rngs, number)), (key, value)

        numbers = jnp.arange(c.num_layers)
        _, (memory_keys, memory_values) = scan_layers(self.layers, step, self.embed(source), numbers, remat)
        last = mask.sum(axis=-1) - 1
        before_last = jnp.arange(length)[None] < last[:, None]
        start = jnp.take_along_axis(source, last[:, None], axis=1)[:, 0]
        return DocumentMemory(memory_keys, memory_values, before_last, last, start)

    def forward_with_cache(
        self,
        memory: DocumentMemory,
        past: KVCache | None,
        tokens: Int[Array, "n G M"],
        positions: Int[Array, "#n #G M"],
        attention_mask: Bool[Array, "#n #G M P"],
        dropout_rngs: RowRngs | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "n G M D"], KVCache | None]:
        """As `Generator` says."""
        c = self.config
        angles = rope_angles(memory.offset[:, None, None] + positions, c)  # n G M 1 Dh/2

        def block(layer: LlamaLayer, x: Array, cache: LayerCache) -> tuple[Array, LayerCache]:
            query, key, value = layer.project(x, angles)
            own, cache = cache.append(key, value)
            attended = dot_product_attention(query, [cache.document, own], c.head_dim**-0.5)
            return layer.finish(x, attended, fold_rngs(dropout_rngs, c.num_layers + cache.layer)), cache

        x = self.embed(tokens)
        x, past = decode_layers(self.layers, block, x, memory, past, attention_mask, remat=remat)
        return self.norm(x), past

    def vocab_head(self) -> VocabHead:
        """As `Generator` says."""
        table = self.embed if self.config.tie_word_embeddings else self.head
        return VocabHead(table.embedding[...])


def rope_angles(positions: Int[Array, "..."], config: LlamaConfig) -> tuple[Array, Array]:
    """Cosines and sines [..., 1, Dh/2] of rotary positions (Su et al. 2021), with Llama 3's scaling if it has one."""
    half = config.head_dim // 2
    inverse = config.rope_theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling:
        s = dict(config.rope_scaling)
        original = s["original_max_position_embeddings"]
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = original * inverse / (2 * math.pi)  # how often a dimension turns over the original length
        smooth = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        inverse = inverse * (smooth + (1.0 - smooth) / s["factor"])
    angles = positions[..., None, None].astype(jnp.float32) * inverse
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "... Dh"], angles: tuple[Array, Array]) -> Float[Array, "... Dh"]:
    """Turns the pairs (x[i], x[i + Dh/2]) by `rope_angles`."""
    cosine, sine = (part.astype(x.dtype) for part in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
