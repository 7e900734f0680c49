"""T5, mT5 and UMT5 (Raffel et al. 2020, Xue et al. 2021, Chung et al. 2023), encoder–decoders: their memory is the keys
and values of the decoder's cross-attention.

x += attention(rms(x)); in the decoder x += cross(rms(x), memory); x += down(relu(up(rms(x)))), or gated. Attention is
not scaled; what a token sees of its own side is biased by how far apart the two stand, by one table for all layers, or
in UMT5 by one for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.errors import InputError
from ragjax.files import shown
from ragjax.models.attention import Attention, AttentionSource, distance_bucket, dot_product_attention
from ragjax.models.hf_config import Fields
from ragjax.models.kv_cache import DocumentMemory, KVCache, LayerCache, cross_attention_memory, decode_layers
from ragjax.models.layers import ACTIVATIONS, ADAPT_PROMPT, Linear, RowRngs, dropout, fold_rngs, scan_layers, stack
from ragjax.models.vocab_head import VocabHead

# by model_type: how the names of its classes begin
KINDS = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}


@dataclass(frozen=True)
class T5Config:
    """The shape of a model; `from_hf` reads Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    head_dim: int
    num_heads: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    start: int  # the token from which every answer begins
    activation: str = "relu"
    gated: bool = False
    tie_word_embeddings: bool = True  # the head is the embedding table
    scaled: bool = True  # the logits, by width**-0.5
    buckets: int = 32  # rows of the table of distances
    farthest: int = 128  # tokens: all that are farther share the last row
    own_distances: bool = False  # each layer has a table of distances
    norm_eps: float = 1e-6
    dropout: float = 0.0
    dtype: str = "float32"
    encoder_decoder: ClassVar[bool] = True

    @classmethod
    def from_hf(cls, hf: dict[str, Any], dropout: float = 0.0, dtype: str = "float32") -> T5Config:
        """Raises `InputError` for another family or feed-forward layer, or an entry of another type or size."""
        fields = Fields(hf)
        kind = fields.text("model_type", among=KINDS)
        fields.check_class(KINDS[kind])
        ffn = fields.text("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
        gate, _, activation = ffn.rpartition("-")
        activation = "gelu_new" if (gate, activation) == ("gated", "gelu") else activation
        if gate not in ("", "gated") or activation not in ACTIVATIONS:
            raise InputError(f"feed_forward_proj is {shown(ffn)}; expected an activation, or gated- before one")
        vocabulary, layers = fields.count("vocab_size"), fields.layers("num_layers")
        buckets = fields.count("relative_attention_num_buckets", 32, least=4)
        return cls(
            vocab_size=vocabulary,
            hidden_size=fields.count("d_model"),
            head_dim=fields.count("d_kv"),
            num_heads=fields.count("num_heads"),
            mlp_dim=fields.count("d_ff"),
            num_encoder_layers=layers,
            num_decoder_layers=fields.layers("num_decoder_layers", layers),
            start=fields.count(
                "decoder_start_token_id" if fields.has("decoder_start_token_id") else "pad_token_id",
                0,
                least=0,
                most=vocabulary - 1,
            ),
            activation=activation,
            gated=gate == "gated",
            tie_word_embeddings=(tied := fields.flag("tie_word_embeddings", True)),
            # said apart since transformers 5, whose mT5 never is
            scaled=kind != "mt5" and fields.flag("scale_decoder_outputs", tied),
            buckets=buckets,
            farthest=fields.count("relative_attention_max_distance", 128, least=buckets // 2 + 1),
            own_distances=kind == "umt5",
            norm_eps=fields.number("layer_norm_epsilon", 1e-6),
            dropout=dropout,
            dtype=dtype,
        )

    @property
    def max_positions(self) -> int:
        """No limit but memory: positions are relative."""
        return 2**20


class T5Layer(nnx.Module):
    """A block of the encoder, or, with cross-attention, of the decoder."""

    def __init__(self, config: T5Config, decoder: bool, rngs: nnx.Rngs):
        c = self.config = config
        dtype = jnp.dtype(c.dtype)

        def linear(size_in: int, size_out: int) -> Linear:
            return Linear(size_in, size_out, use_bias=False, dtype=dtype, rngs=rngs)

        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(c.hidden_size, epsilon=c.norm_eps, dtype=dtype, rngs=rngs)

        def attention() -> Attention:
            return Attention(c.hidden_size, c.num_heads, c.head_dim, bias=False, dtype=c.dtype, rngs=rngs)

        self.attention, self.attention_norm = attention(), norm()
        if decoder:
            self.cross, self.cross_norm = attention(), norm()
        self.ffn_norm = norm()
        if c.own_distances:
            self.distances = nnx.Embed(c.buckets, c.num_heads, rngs=rngs)
        if c.gated:
            self.gate = linear(c.hidden_size, c.mlp_dim)
        self.up, self.down = linear(c.hidden_size, c.mlp_dim), linear(c.mlp_dim, c.hidden_size)

    def feed_forward(self, x: Float[Array, "n ... D"], rngs: RowRngs | None) -> Float[Array, "n ... D"]:
        """The second half of the block."""
        c, h = self.config, self.ffn_norm(x)
        activation = ACTIVATIONS[c.activation]
        h = activation(self.gate(h)) * self.up(h) if c.gated else activation(self.up(h))
        return x + dropout(self.down(dropout(h, fold_rngs(rngs, 2), c.dropout)), fold_rngs(rngs, 3), c.dropout)


class T5Stack(nnx.Module):
    """The table of distances, the layers and the last norm of one side."""

    def __init__(self, config: T5Config, decoder: bool, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.dtype)
        if not c.own_distances:
            self.distances = nnx.Embed(c.buckets, c.num_heads, rngs=rngs)
        count = c.num_decoder_layers if decoder else c.num_encoder_layers
        self.layers = stack(lambda r: T5Layer(c, decoder, r), count, rngs)
        self.norm = nnx.RMSNorm(c.hidden_size, epsilon=c.norm_eps, dtype=dtype, rngs=rngs)


class T5(nnx.Module):
    """A generator (`ragjax.models.generator.Generator`) whose answers begin with `decoder_start_token_id`."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = nnx.Embed(c.vocab_size, c.hidden_size, dtype=jnp.dtype(c.dtype), rngs=rngs)
        self.encoder, self.decoder = T5Stack(c, False, rngs), T5Stack(c, True, rngs)
        if not c.tie_word_embeddings:
            self.head = nnx.Embed(c.vocab_size, c.hidden_size, dtype=jnp.dtype(c.dtype), rngs=rngs)

    def prefill(
        self,
        source: Int[Array, "n S"],
        mask: Bool[Array, "n S"],
        dropout_rngs: RowRngs | None = None,
        remat: bool = False,
    ) -> DocumentMemory:
        """Encodes the source and projects it onto the keys and values of every decoder layer."""
        c, where = self.config, jnp.arange(source.shape[1])
        buckets = distance_bucket(where - where[:, None], c.buckets, c.farthest, both_ways=True)[None, None]
        shared = None if c.own_distances else self.encoder.distances(buckets)
        x = dropout(self.embed(source), fold_rngs(dropout_rngs, 0), c.dropout)[:, None]  # one group

        def encode(layer: T5Layer, x: Array, number: Array) -> tuple[Array, None]:
            rngs, h = fold_rngs(dropout_rngs, number + 1), layer.attention_norm(x)
            keys, values = layer.attention.keys_and_values(h[:, 0])
            bias = layer.distances(buckets) if shared is None else shared
            own = AttentionSource(keys, values, mask[:, None, None], bias)
            attended = dot_product_attention(layer.attention.queries(h), [own], 1.0)
            x = x + dropout(layer.attention.project_back(attended), fold_rngs(rngs, 0), c.dropout)
            return layer.feed_forward(x, rngs), None

        adapter_rngs = fold_rngs(dropout_rngs, ADAPT_PROMPT)
        x, _ = scan_layers(self.encoder.layers, encode, x, jnp.arange(c.num_encoder_layers), remat, adapter_rngs)
        last = fold_rngs(dropout_rngs, c.num_encoder_layers + 1)
        encoded = dropout(self.encoder.norm(x[:, 0]), last, c.dropout)
        return cross_attention_memory(self.decoder.layers, encoded, mask, c.start, remat, dropout_rngs)

    def forward_with_cache(
        self,
        memory: DocumentMemory,
        past: KVCache | None,
        tokens: Int[Array, "n G M"],
        positions: Int[Array, "#n #G M"],
        attention_mask: Bool[Array, "#n #G M E"],
        dropout_rngs: RowRngs | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "n G M D"], KVCache | None]:
        """As `Generator` says."""
        c = self.config
        first = c.num_encoder_layers + 2  # the encoder's dropout has the numbers below
        if past is None:
            key_positions = positions[:, :, None, :]
        else:
            past = past.place(jnp.broadcast_to(positions, tokens.shape))
            key_positions = past.positions[:, None, None, :]
        buckets = distance_bucket(key_positions - positions[..., None], c.buckets, c.farthest, both_ways=False)
        shared = None if c.own_distances else self.decoder.distances(buckets)

        def decode(layer: T5Layer, x: Array, cache: LayerCache) -> tuple[Array, LayerCache]:
            rngs, h = fold_rngs(dropout_rngs, first + 1 + cache.layer), layer.attention_norm(x)
            own, cache = cache.append(*layer.attention.keys_and_values(h))
            if shared is None:
                own = own._replace(bias=layer.distances(buckets))
            attended = dot_product_attention(layer.attention.queries(h), [own], 1.0)
            x = x + dropout(layer.attention.project_back(attended), fold_rngs(rngs, 0), c.dropout)
            attended = dot_product_attention(layer.cross.queries(layer.cross_norm(x)), [cache.document], 1.0)
            x = x + dropout(layer.cross.project_back(attended), fold_rngs(rngs, 1), c.dropout)
            return layer.feed_forward(x, rngs), cache

        x = dropout(self.embed(tokens), fold_rngs(dropout_rngs, first), c.dropout)
        x, past = decode_layers(
            self.decoder.layers, decode, x, memory, past, attention_mask, shared, remat, dropout_rngs
        )
        last = fold_rngs(dropout_rngs, first + 1 + c.num_decoder_layers)
        hidden = dropout(self.decoder.norm(x), last, c.dropout)
        return hidden * c.hidden_size**-0.5 if c.scaled else hidden, past

    def vocab_head(self) -> VocabHead:
        """As `Generator` says."""
        table = self.embed if self.config.tie_word_embeddings else self.head
        return VocabHead(table.embedding[...])
