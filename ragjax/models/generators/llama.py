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
from ragjax.models.attention import Attended, attend, attend_within
from ragjax.models.fields import Fields
from ragjax.models.kv_cache import Memory, Past
from ragjax.models.layers import Keys, dropout, fold, normalizer, scan_layers, stack, target_logits

# by model_type: how the names of its classes begin
KINDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model; `from_hf` reads Hugging Face's config.json."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    epsilon: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, float], ...] = ()  # Llama 3's: factor, low_freq_factor, high_freq_factor, original
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    longest: int = 2048  # positions, or its sliding window where that is shorter: within it attention is full
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
        width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        kv_heads = fields.count("num_key_value_heads", heads)
        if heads % kv_heads:
            raise InputError(f"num_attention_heads is {heads}, which num_key_value_heads={kv_heads} does not divide")
        if not fields.has("head_dim"):
            fields.check_heads("hidden_size", "num_attention_heads")
        head_width = fields.count("head_dim", width // heads)
        if head_width % 2:
            raise InputError(f"head_dim is {head_width}; rotary positions need an even one")
        return cls(
            vocabulary=fields.count("vocab_size"),
            width=width,
            layers=fields.layers("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            ffn=fields.count("intermediate_size"),
            epsilon=fields.number("rms_norm_eps", 1e-6),
            rope_theta=(rope if rope.has("rope_theta") else fields).number("rope_theta", 10000.0),
            rope_scaling=tuple((name, rope.number(name)) for name in names) if scaling == "llama3" else (),
            tied=fields.flag("tie_word_embeddings", False),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            longest=positions,
            dropout=dropout,
            dtype=dtype,
        )


class LlamaLayer(nnx.Module):
    """One block; `rows` are any leading axes."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)

        def linear(size_in: int, size_out: int, bias: bool = False) -> nnx.Linear:
            return nnx.Linear(size_in, size_out, use_bias=bias, dtype=dtype, rngs=rngs)

        def norm(size: int) -> nnx.RMSNorm:
            return nnx.RMSNorm(size, epsilon=config.epsilon, dtype=dtype, rngs=rngs)

        c = self.config = config
        self.attention_norm, self.ffn_norm = norm(c.width), norm(c.width)
        self.query = linear(c.width, c.heads * c.head_width, c.qkv_bias)
        self.key = linear(c.width, c.kv_heads * c.head_width, c.qkv_bias)
        self.value = linear(c.width, c.kv_heads * c.head_width, c.qkv_bias)
        self.output = linear(c.heads * c.head_width, c.width)
        self.gate, self.up, self.down = linear(c.width, c.ffn), linear(c.width, c.ffn), linear(c.ffn, c.width)
        if c.qk_norm:
            self.query_norm, self.key_norm = norm(c.head_width), norm(c.head_width)

    def project(self, x: Array, rotation: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Normalised, rotated queries [..., H, Dh], keys and values [..., Hkv, Dh]."""
        c, h = self.config, self.attention_norm(x)
        query = self.query(h).reshape(*x.shape[:-1], c.heads, c.head_width)
        key = self.key(h).reshape(*x.shape[:-1], c.kv_heads, c.head_width)
        value = self.value(h).reshape(*x.shape[:-1], c.kv_heads, c.head_width)
        if c.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, rotation), rotate(key, rotation), value

    def finish(self, x: Array, attended: Array, keys: Keys | None) -> Array:
        """The rest of the block, after attention [..., H, Dh]."""
        rate = self.config.dropout
        x = x + dropout(self.output(attended.reshape(*x.shape[:-1], -1)), fold(keys, 0), rate)
        h = self.ffn_norm(x)
        return x + dropout(self.down(jax.nn.silu(self.gate(h)) * self.up(h)), fold(keys, 1), rate)


class Llama(nnx.Module):
    """A generator (`ragjax.models.generator.Generator`): its memory is the key-value cache of the prompt."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocabulary, config.width, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.layers = stack(lambda r: LlamaLayer(config, r), config.layers, rngs)
        self.norm = nnx.RMSNorm(config.width, epsilon=config.epsilon, dtype=jnp.dtype(config.dtype), rngs=rngs)
        if not config.tied:
            self.head = nnx.Embed(config.vocabulary, config.width, rngs=rngs)

    def prefill(
        self, source: Int[Array, "n S"], mask: Bool[Array, "n S"], keys: Keys | None = None, remat: bool = False
    ) -> Memory:
        """Reads all but the last prompt token, which is the start token."""
        c, length = self.config, source.shape[1]
        rotation = rotary(jnp.arange(length)[None], c)  # 1 S 1 Dh/2
        causal = jnp.tril(jnp.ones((1, length, length), bool))

        def step(layer: LlamaLayer, x: Array, number: Array) -> tuple[Array, tuple[Array, Array]]:
            query, key, value = layer.project(x, rotation)
            # right-padding needs no mask of its own: a token never sees what stands after it
            attended = attend_within(query, key, value, causal)
            return layer.finish(x, attended, fold(keys, number)), (key, value)

        numbers = jnp.arange(c.layers)
        _, (memory_keys, memory_values) = scan_layers(self.layers, step, self.embed(source), numbers, remat)
        last = mask.sum(axis=-1) - 1
        before_last = jnp.arange(length)[None] < last[:, None]
        start = jnp.take_along_axis(source, last[:, None], axis=1)[:, 0]
        return Memory(memory_keys, memory_values, before_last, last, start)

    def extend(
        self,
        memory: Memory,
        past: Past | None,
        tokens: Int[Array, "n G M"],
        positions: Int[Array, "#n #G M"],
        visible: Bool[Array, "#n #G M P"],
        keys: Keys | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "n G M D"], Past | None]:
        c, scale = self.config, self.config.head_width**-0.5
        groups, length = tokens.shape[1:]
        rotation = rotary(memory.offset[:, None, None] + positions, c)  # n G M 1 Dh/2

        def step(layer: LlamaLayer, carry: Any, inputs: Any) -> tuple[Any, None]:
            x, pool = carry
            memory_keys, memory_values, number = inputs
            query, key, value = layer.project(x, rotation)
            if pool is not None:
                pool = pool.write(number, key, value)
                key, value = pool.keys[number], pool.values[number]
            document = Attended(memory_keys, memory_values, memory.mask[:, None, None])
            attended = attend(query, [document, Attended(key, value, visible)], scale)
            return (layer.finish(x, attended, fold(keys, c.layers + number)), pool), None

        xs = (memory.keys, memory.values, jnp.arange(c.layers))
        (x, past), _ = scan_layers(self.layers, step, (self.embed(tokens), past), xs, remat)
        return self.norm(x), past if past is None else past.advance(groups * length)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        head = self._head().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)

    def normalizer(self, hidden: Float[Array, "... D"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        return normalizer(hidden, self._head())

    def target_logits(self, hidden: Float[Array, "... D"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
        return target_logits(hidden, self._head(), targets)

    def _head(self) -> Float[Array, "V D"]:
        return self.embed.embedding[...] if self.config.tied else self.head.embedding[...]


def rotary(positions: Int[Array, "..."], config: LlamaConfig) -> tuple[Array, Array]:
    """Cosines and sines [..., 1, Dh/2] of rotary positions (Su et al. 2021), with Llama 3's scaling if it has one."""
    half = config.head_width // 2
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


def rotate(x: Float[Array, "... Dh"], rotation: tuple[Array, Array]) -> Float[Array, "... Dh"]:
    """Turns the pairs (x[i], x[i + Dh/2])."""
    cosine, sine = (part.astype(x.dtype) for part in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
