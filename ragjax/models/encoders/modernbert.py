"""ModernBERT as a retriever (Warner et al. 2024): rotary positions, gated feed-forward halves, normalised first.

x = norm(words); x += attention(norm(x)), which the first layer does not normalise; x += down(gelu(gate(norm(x))) ·
up(norm(x))); states(x) = norm(x). Most layers see only so many tokens to either side, and turn them by other angles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.errors import InputError
from ragjax.models.attention import self_attention
from ragjax.models.encoders.pooling import Dense, Encoder
from ragjax.models.hf_config import Fields
from ragjax.models.layers import ACTIVATIONS, ADAPT_PROMPT, Linear, RowRngs, dropout, fold_rngs, scan_layers, stack
from ragjax.models.rope import Rope, apply_rope, rope_angles

LAYER_TYPES = GLOBAL, LOCAL = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModernBertConfig:
    """The shape of an encoder; `from_hf` reads Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    rope: Rope
    local_rope: Rope
    local: tuple[bool, ...]  # by layer, whether it sees the tokens near by only
    reach: int  # how many to either side
    max_positions: int = 8192
    activation: str = "gelu"
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_eps: float = 1e-5
    pooling: str = "mean"
    normalize: bool = True
    dense: tuple[Dense, ...] = ()
    dropout: float = 0.0
    dtype: str = "float32"

    @classmethod
    def from_hf(
        cls,
        hf: dict[str, Any],
        pooling: str,
        normalize: bool,
        dense: tuple[Dense, ...] = (),
        dropout: float = 0.0,
        dtype: str = "float32",
    ) -> ModernBertConfig:
        """Raises `InputError` for another family, or an entry of another type or size."""
        fields = Fields(hf)
        fields.text("model_type", among=("modernbert",))
        fields.check_class("ModernBert")
        fields.check_heads("hidden_size", "num_attention_heads")
        layers, heads = fields.layers("num_hidden_layers"), fields.count("num_attention_heads")
        if fields.has("layer_types"):
            types = fields.texts("layer_types", layers, LAYER_TYPES)
        else:
            every = fields.count("global_attn_every_n_layers", 3)
            types = [LOCAL if i % every else GLOBAL for i in range(layers)]
        position = fields.part("rope_parameters")
        thetas = fields.number("global_rope_theta", 160000.0), fields.number("local_rope_theta", 10000.0)
        if fields.has("rope_scaling"):
            raise InputError("rope_scaling in a ModernBERT is not supported; give one without")
        ropes = [
            Rope.from_hf(fields, position.part(kind), fields.count("hidden_size") // heads, theta)
            for kind, theta in zip((GLOBAL, LOCAL), thetas, strict=True)
        ]
        return cls(
            vocab_size=fields.count("vocab_size"),
            hidden_size=fields.count("hidden_size"),
            num_layers=layers,
            num_heads=heads,
            mlp_dim=fields.count("intermediate_size"),
            rope=ropes[0],
            local_rope=ropes[1],
            local=tuple(kind == LOCAL for kind in types),
            reach=fields.count("local_attention", 128) // 2,
            max_positions=fields.count("max_position_embeddings", 8192),
            activation=fields.text("hidden_activation", "gelu", among=ACTIVATIONS),
            **{key: fields.flag(key, False) for key in ("norm_bias", "attention_bias", "mlp_bias")},
            norm_eps=fields.number("norm_eps", 1e-5),
            pooling=pooling,
            normalize=normalize,
            dense=dense,
            dropout=dropout,
            dtype=dtype,
        )

    @property
    def windows(self) -> tuple[int, ...]:
        """By layer, how many tokens one sees to a side, itself included; 0 means all."""
        return tuple(self.reach + 1 if local else 0 for local in self.local)

    @property
    def embedding_dim(self) -> int:
        """Length of the embeddings."""
        return self.dense[-1].size_out if self.dense else self.hidden_size


def _norm(c: ModernBertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(c.hidden_size, epsilon=c.norm_eps, use_bias=c.norm_bias, dtype=jnp.dtype(c.dtype), rngs=rngs)


class ModernBertLayer(nnx.Module):
    """One block: attention, then the gated feed-forward half."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        c = self.config = config

        def linear(size_in: int, size_out: int, bias: bool) -> Linear:
            return Linear(size_in, size_out, use_bias=bias, dtype=jnp.dtype(c.dtype), rngs=rngs)

        self.attention_norm, self.ffn_norm = _norm(c, rngs), _norm(c, rngs)
        self.query, self.key, self.value, self.output = (
            linear(c.hidden_size, c.hidden_size, c.attention_bias) for _ in range(4)
        )
        self.gate, self.up = (linear(c.hidden_size, c.mlp_dim, c.mlp_bias) for _ in range(2))
        self.down = linear(c.mlp_dim, c.hidden_size, c.mlp_bias)

    def __call__(
        self,
        x: Float[Array, "n S D"],
        h: Float[Array, "n S D"],
        mask: Bool[Array, "n S"],
        number: Int[Array, ""],
        angles: tuple[Array, Array],
        rngs: RowRngs | None,
    ) -> Float[Array, "n S D"]:
        """The block of that number, where its attention reads `h`, the x that is normalised or not."""
        c = self.config
        heads = (*x.shape[:2], c.num_heads, -1)
        query, key, value = (part(h).reshape(heads) for part in (self.query, self.key, self.value))
        query, key = apply_rope(query, angles), apply_rope(key, angles)
        attended = self_attention(query, key, value, mask, windows=c.windows, layer=number)
        x = x + dropout(self.output(attended.reshape(x.shape)), fold_rngs(rngs, 0), c.dropout)
        h = self.ffn_norm(x)
        h = self.down(ACTIVATIONS[c.activation](self.gate(h)) * self.up(h))
        return x + dropout(h, fold_rngs(rngs, 1), c.dropout)


class ModernBert(Encoder):
    """tokens [n,S] → embeddings [n,D]."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        c = self.config = config
        self.words = nnx.Embed(c.vocab_size, c.hidden_size, dtype=jnp.dtype(c.dtype), rngs=rngs)
        self.norm = _norm(c, rngs)
        self.layers = stack(lambda r: ModernBertLayer(c, r), c.num_layers, rngs)
        self.last_norm = _norm(c, rngs)
        self.add_dense(rngs)

    def states(
        self, tokens: Int[Array, "n S"], mask: Bool[Array, "n S"], dropout_rngs: RowRngs | None = None
    ) -> Float[Array, "n S D"]:
        """As `Encoder` says."""
        c, where = self.config, jnp.arange(tokens.shape[1])
        x = dropout(self.norm(self.words(tokens)), fold_rngs(dropout_rngs, c.num_layers), c.dropout)
        both = [rope_angles(where[None], rope) for rope in (c.rope, c.local_rope)]

        def step(layer: ModernBertLayer, x: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
            number, local = inputs
            angles = jax.tree.map(lambda whole, part: jnp.where(local, part, whole), *both)
            h = jnp.where(number == 0, x, layer.attention_norm(x))
            return layer(x, h, mask, number, angles, fold_rngs(dropout_rngs, number)), None

        numbers, adapter_rngs = jnp.arange(c.num_layers), fold_rngs(dropout_rngs, ADAPT_PROMPT)
        x, _ = scan_layers(self.layers, step, x, (numbers, jnp.array(c.local)), adapter_rngs=adapter_rngs)
        return self.last_norm(x)
