"""The BERT encoder as a retriever (Devlin et al. 2019): MiniLM and its like (mean pooling), DPR (CLS).

embedding(x) = pool(layers(words + positions + types)), optionally projected and L2-normalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.models.attention import self_attention
from ragjax.models.hf_config import Fields
from ragjax.models.layers import ACTIVATIONS, RowRngs, dropout, fold_rngs, scan_layers, stack


@dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder; `from_hf` reads Hugging Face's config.json (bert or dpr)."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    max_positions: int = 512
    types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    projection: int = 0  # DPR's optional last linear map; 0 means none
    pooling: str = "mean"
    normalize: bool = True
    dropout: float = 0.0
    dtype: str = "float32"

    @classmethod
    def from_hf(
        cls, hf: dict[str, Any], pooling: str, normalize: bool, dropout: float = 0.0, dtype: str = "float32"
    ) -> BertConfig:
        """Raises `InputError` for another family, another kind of positions, or an entry of another type or size."""
        fields = Fields(hf)
        fields.text("model_type", among=("bert", "dpr"))
        fields.text("position_embedding_type", "absolute", among=("absolute",))
        fields.check_class("Bert", "DPR")
        fields.check_heads("hidden_size", "num_attention_heads")
        return cls(
            vocab_size=fields.count("vocab_size"),
            hidden_size=fields.count("hidden_size"),
            num_layers=fields.layers("num_hidden_layers"),
            num_heads=fields.count("num_attention_heads"),
            mlp_dim=fields.count("intermediate_size"),
            max_positions=fields.count("max_position_embeddings"),
            types=fields.count("type_vocab_size", 2),
            activation=fields.text("hidden_act", "gelu", among=ACTIVATIONS),
            norm_eps=fields.number("layer_norm_eps", 1e-12),
            projection=fields.count("projection_dim", 0, least=0),
            pooling=pooling,
            normalize=normalize,
            dropout=dropout,
            dtype=dtype,
        )

    @property
    def embedding_dim(self) -> int:
        """Length of the embeddings."""
        return self.projection or self.hidden_size


class BertLayer(nnx.Module):
    """One block, normalised after each residual."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        c = self.config = config
        dtype = jnp.dtype(c.dtype)
        self.query = nnx.Linear(c.hidden_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(c.hidden_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(c.hidden_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.output = nnx.Linear(c.hidden_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(c.hidden_size, c.mlp_dim, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(c.mlp_dim, c.hidden_size, dtype=dtype, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(c.hidden_size, epsilon=c.norm_eps, dtype=dtype, rngs=rngs)
        self.ffn_norm = nnx.LayerNorm(c.hidden_size, epsilon=c.norm_eps, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "n S D"], mask: Bool[Array, "n S"], rngs: RowRngs | None
    ) -> Float[Array, "n S D"]:
        c = self.config
        heads = (*x.shape[:2], c.num_heads, c.hidden_size // c.num_heads)
        query, key, value = (part(x).reshape(heads) for part in (self.query, self.key, self.value))
        attended = self_attention(query, key, value, mask[:, None])
        x = self.attention_norm(x + dropout(self.output(attended.reshape(x.shape)), fold_rngs(rngs, 0), c.dropout))
        h = self.down(ACTIVATIONS[c.activation](self.up(x)))
        return self.ffn_norm(x + dropout(h, fold_rngs(rngs, 1), c.dropout))


class Bert(nnx.Module):
    """tokens [n,S] → embeddings [n,D]."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        c = self.config = config
        dtype = jnp.dtype(c.dtype)
        self.words = nnx.Embed(c.vocab_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(c.max_positions, c.hidden_size, dtype=dtype, rngs=rngs)
        self.types = nnx.Embed(c.types, c.hidden_size, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(c.hidden_size, epsilon=c.norm_eps, dtype=dtype, rngs=rngs)
        self.layers = stack(lambda r: BertLayer(c, r), c.num_layers, rngs)
        if c.projection:
            self.projection = nnx.Linear(c.hidden_size, c.projection, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "n S"], mask: Bool[Array, "n S"], dropout_rngs: RowRngs | None = None
    ) -> Float[Array, "n D"]:
        """Float32 embeddings of right-padded rows. Dropout acts where one key a row is given."""
        c = self.config
        where = jnp.arange(tokens.shape[1])[None]
        x = self.norm(self.words(tokens) + self.positions(where) + self.types(jnp.zeros_like(tokens)))
        x = dropout(x, fold_rngs(dropout_rngs, c.num_layers), c.dropout)

        def step(layer: BertLayer, x: Array, number: Array) -> tuple[Array, None]:
            return layer(x, mask, fold_rngs(dropout_rngs, number)), None

        x, _ = scan_layers(self.layers, step, x, jnp.arange(c.num_layers))
        if c.pooling == "cls":
            pooled = x[:, 0]
        else:
            weights = mask[:, :, None].astype(x.dtype)
            pooled = (x * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)
        if c.projection:
            pooled = self.projection(pooled)
        pooled = pooled.astype(jnp.float32)
        if c.normalize:
            pooled = pooled * jax.lax.rsqrt(jnp.maximum((pooled**2).sum(axis=-1, keepdims=True), 1e-24))
        return pooled
