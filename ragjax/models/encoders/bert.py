"""BERT as a retriever (Devlin et al. 2019), and what differs from it by little: DPR, RoBERTa, XLM-RoBERTa, CamemBERT,
DistilBERT and MPNet.

states(x) = layers(norm(words + positions + types)). RoBERTa's positions begin after its padding token's number;
DistilBERT and MPNet have no types; MPNet's attention is biased by how far apart two tokens stand (Song et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.models.attention import distance_bucket, self_attention
from ragjax.models.encoders.pooling import Dense, Encoder
from ragjax.models.hf_config import Fields
from ragjax.models.layers import ACTIVATIONS, ADAPT_PROMPT, Linear, RowRngs, dropout, fold_rngs, scan_layers, stack

# by model_type: how the names of its classes begin
KINDS = {
    "bert": ("Bert", "DPR"),
    "dpr": ("Bert", "DPR"),
    "roberta": ("Roberta",),
    "xlm-roberta": ("XLMRoberta",),
    "camembert": ("Camembert",),
    "distilbert": ("DistilBert",),
    "mpnet": ("MPNet",),
}
LIKE_ROBERTA = ("roberta", "xlm-roberta", "camembert", "mpnet")
DISTILBERT = {  # its names of the usual entries
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}
FARTHEST = 128  # tokens: MPNet's distances that are longer share the last row of its table


@dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder; `from_hf` reads Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    max_positions: int = 512
    first_position: int = 0  # the row of the position table for the first token
    types: int = 2  # 0 means no table of them
    distances: int = 0  # rows of MPNet's table of distances; 0 means none
    activation: str = "gelu"
    norm_eps: float = 1e-12
    projection: int = 0  # DPR's optional last linear map; 0 means none
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
    ) -> BertConfig:
        """Raises `InputError` for another family, another kind of positions, or an entry of another type or size."""
        fields = Fields(hf)
        kind = fields.text("model_type", among=KINDS)
        fields.text("position_embedding_type", "absolute", among=("absolute",))
        fields.check_class(*KINDS[kind])

        def key(name: str) -> str:
            return DISTILBERT[name] if kind == "distilbert" else name

        fields.check_heads(key("hidden_size"), key("num_attention_heads"))
        padding = 1 if kind == "mpnet" else fields.count("pad_token_id", 1, least=0) if kind in LIKE_ROBERTA else -1
        return cls(
            vocab_size=fields.count("vocab_size"),
            hidden_size=fields.count(key("hidden_size")),
            num_layers=fields.layers(key("num_hidden_layers")),
            num_heads=fields.count(key("num_attention_heads")),
            mlp_dim=fields.count(key("intermediate_size")),
            max_positions=fields.count("max_position_embeddings", least=padding + 2) - padding - 1,
            first_position=padding + 1,
            types=0 if kind in ("distilbert", "mpnet") else fields.count("type_vocab_size", 2),
            # transformers' numbers of buckets, whatever the configuration says
            distances=fields.count("relative_attention_num_buckets", 32, least=32, most=32) if kind == "mpnet" else 0,
            activation=fields.text(key("hidden_act"), "gelu", among=ACTIVATIONS),
            norm_eps=1e-12 if kind == "distilbert" else fields.number("layer_norm_eps", 1e-12),
            projection=fields.count("projection_dim", 0, least=0) if kind in ("bert", "dpr") else 0,
            pooling=pooling,
            normalize=normalize,
            dense=dense,
            dropout=dropout,
            dtype=dtype,
        )

    @property
    def embedding_dim(self) -> int:
        """Length of the embeddings."""
        return self.dense[-1].size_out if self.dense else self.projection or self.hidden_size


class BertLayer(nnx.Module):
    """One block, normalised after each residual."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        c = self.config = config
        dtype = jnp.dtype(c.dtype)
        self.query = Linear(c.hidden_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.key = Linear(c.hidden_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.value = Linear(c.hidden_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.output = Linear(c.hidden_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.up = Linear(c.hidden_size, c.mlp_dim, dtype=dtype, rngs=rngs)
        self.down = Linear(c.mlp_dim, c.hidden_size, dtype=dtype, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(c.hidden_size, epsilon=c.norm_eps, dtype=dtype, rngs=rngs)
        self.ffn_norm = nnx.LayerNorm(c.hidden_size, epsilon=c.norm_eps, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "n S D"],
        mask: Bool[Array, "n S"],
        bias: Float[Array, "S S H"] | None,
        rngs: RowRngs | None,
    ) -> Float[Array, "n S D"]:
        c = self.config
        heads = (*x.shape[:2], c.num_heads, c.hidden_size // c.num_heads)
        query, key, value = (part(x).reshape(heads) for part in (self.query, self.key, self.value))
        attended = self_attention(query, key, value, mask, bias)
        x = self.attention_norm(x + dropout(self.output(attended.reshape(x.shape)), fold_rngs(rngs, 0), c.dropout))
        h = self.down(ACTIVATIONS[c.activation](self.up(x)))
        return self.ffn_norm(x + dropout(h, fold_rngs(rngs, 1), c.dropout))


class Bert(Encoder):
    """tokens [n,S] → embeddings [n,D]."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        c = self.config = config
        dtype = jnp.dtype(c.dtype)
        self.words = nnx.Embed(c.vocab_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(c.first_position + c.max_positions, c.hidden_size, dtype=dtype, rngs=rngs)
        if c.types:
            self.types = nnx.Embed(c.types, c.hidden_size, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(c.hidden_size, epsilon=c.norm_eps, dtype=dtype, rngs=rngs)
        self.layers = stack(lambda r: BertLayer(c, r), c.num_layers, rngs)
        if c.distances:
            self.distances = nnx.Embed(c.distances, c.num_heads, rngs=rngs)
        if c.projection:
            self.projection = Linear(c.hidden_size, c.projection, dtype=dtype, rngs=rngs)
        self.add_dense(rngs)

    def states(
        self, tokens: Int[Array, "n S"], mask: Bool[Array, "n S"], dropout_rngs: RowRngs | None = None
    ) -> Float[Array, "n S D"]:
        """As `Encoder` says."""
        c, where = self.config, jnp.arange(tokens.shape[1])
        x = self.words(tokens) + self.positions(where[None] + c.first_position)
        if c.types:
            x = x + self.types(jnp.zeros_like(tokens))
        x = dropout(self.norm(x), fold_rngs(dropout_rngs, c.num_layers), c.dropout)
        bias = None
        if c.distances:
            bias = self.distances(distance_bucket(where[None] - where[:, None], c.distances, FARTHEST, both_ways=True))

        def step(layer: BertLayer, x: Array, number: Array) -> tuple[Array, None]:
            return layer(x, mask, bias, fold_rngs(dropout_rngs, number)), None

        adapter_rngs = fold_rngs(dropout_rngs, ADAPT_PROMPT)
        return scan_layers(self.layers, step, x, jnp.arange(c.num_layers), adapter_rngs=adapter_rngs)[0]

    def project(self, pooled: Float[Array, "n D"]) -> Float[Array, "n E"]:
        """As `Encoder` says."""
        return self.projection(pooled) if self.config.projection else pooled
