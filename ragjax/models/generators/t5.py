"""T5 (Raffel et al. 2020), an encoder–decoder: its memory is the keys and values of the decoder's cross-attention.

x += attention(rms(x)); in the decoder x += cross(rms(x), memory); x += down(relu(up(rms(x)))), or gated. Attention is
not scaled; what a token sees of its own side is biased by how far apart the two stand, by one table for all layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.errors import InputError
from ragjax.files import shown
from ragjax.models.attention import Attention, AttentionSource, dot_product_attention
from ragjax.models.hf_config import Fields
from ragjax.models.kv_cache import DocumentMemory, KVCache
from ragjax.models.layers import (
    ACTIVATIONS,
    RowRngs,
    dropout,
    fold_rngs,
    scan_layers,
    stack,
    target_logits,
    vocab_logsumexp,
)


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
    buckets: int = 32
    farthest: int = 128
    norm_eps: float = 1e-6
    dropout: float = 0.0
    dtype: str = "float32"

    @classmethod
    def from_hf(cls, hf: dict[str, Any], dropout: float = 0.0, dtype: str = "float32") -> T5Config:
        """Raises `InputError` for another family or feed-forward layer, or an entry of another type or size."""
        fields = Fields(hf)
        fields.text("model_type", among=("t5",))
        fields.check_class("T5")
        ffn = fields.text("feed_forward_proj", "relu")
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
            scaled=fields.flag("scale_decoder_outputs", tied),  # said apart since transformers 5
            buckets=buckets,
            farthest=fields.count("relative_attention_max_distance", 128, least=buckets // 2 + 1),
            norm_eps=fields.number("layer_norm_epsilon", 1e-6),
            dropout=dropout,
            dtype=dtype,
        )

    encoder_decoder: ClassVar[bool] = True

    @property
    def max_positions(self) -> int:
        """No limit but memory: positions are relative."""
        return 2**20


class T5Layer(nnx.Module):
    """A block of the encoder, or, with cross-attention, of the decoder."""

    def __init__(self, config: T5Config, decoder: bool, rngs: nnx.Rngs):
        c = self.config = config
        dtype = jnp.dtype(c.dtype)

        def linear(size_in: int, size_out: int) -> nnx.Linear:
            return nnx.Linear(size_in, size_out, use_bias=False, dtype=dtype, rngs=rngs)

        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(c.hidden_size, epsilon=c.norm_eps, dtype=dtype, rngs=rngs)

        def attention() -> Attention:
            return Attention(c.hidden_size, c.num_heads, c.head_dim, bias=False, dtype=c.dtype, rngs=rngs)

        self.attention, self.attention_norm = attention(), norm()
        if decoder:
            self.cross, self.cross_norm = attention(), norm()
        self.ffn_norm = norm()
        if c.gated:
            self.gate = linear(c.hidden_size, c.mlp_dim)
        self.up, self.down = linear(c.hidden_size, c.mlp_dim), linear(c.mlp_dim, c.hidden_size)

    def finish(self, x: Array, keys: RowRngs | None) -> Array:
        """The feed-forward half."""
        c, h = self.config, self.ffn_norm(x)
        activation = ACTIVATIONS[c.activation]
        h = activation(self.gate(h)) * self.up(h) if c.gated else activation(self.up(h))
        return x + dropout(self.down(dropout(h, fold_rngs(keys, 2), c.dropout)), fold_rngs(keys, 3), c.dropout)


class T5Stack(nnx.Module):
    """The table of distances, the layers and the last norm of one side."""

    def __init__(self, config: T5Config, decoder: bool, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.dtype)
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
            self.head = nnx.Embed(c.vocab_size, c.hidden_size, rngs=rngs)

    def prefill(
        self, source: Int[Array, "n S"], mask: Bool[Array, "n S"], keys: RowRngs | None = None, remat: bool = False
    ) -> DocumentMemory:
        """Encodes the source and projects it onto the keys and values of every decoder layer."""
        c, (n, length) = self.config, source.shape
        where = jnp.arange(length)
        bias = self._bias(self.encoder, where[:, None], where, both_ways=True)[None, None]
        x = dropout(self.embed(source), fold_rngs(keys, 0), c.dropout)[:, None]  # one group

        def encode(layer: T5Layer, x: Array, number: Array) -> tuple[Array, None]:
            own, part = fold_rngs(keys, number + 1), layer.attention
            h = layer.attention_norm(x)
            key, value = part.memory(h[:, 0])
            attended = dot_product_attention(
                part.queries(h), [AttentionSource(key, value, mask[:, None, None], bias)], 1.0
            )
            x = x + dropout(part.join(attended), fold_rngs(own, 0), c.dropout)
            return layer.finish(x, own), None

        x, _ = scan_layers(self.encoder.layers, encode, x, jnp.arange(c.num_encoder_layers), remat)
        encoded = dropout(self.encoder.norm(x[:, 0]), fold_rngs(keys, c.num_encoder_layers + 1), c.dropout)
        _, (cross_keys, cross_values) = scan_layers(
            self.decoder.layers, lambda layer, nothing, _: (nothing, layer.cross.memory(encoded)), None, None, remat
        )
        return DocumentMemory(cross_keys, cross_values, mask, jnp.zeros(n, jnp.int32), jnp.full(n, c.start, jnp.int32))

    def forward_with_cache(
        self,
        memory: DocumentMemory,
        past: KVCache | None,
        tokens: Int[Array, "n G M"],
        positions: Int[Array, "#n #G M"],
        visible: Bool[Array, "#n #G M P"],
        keys: RowRngs | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "n G M D"], KVCache | None]:
        c, (_, groups, length) = self.config, tokens.shape
        first = c.num_encoder_layers + 2  # dropout keys below are the encoder's
        if past is None:
            seen = positions[:, :, None, :]
        else:
            past = past.place(jnp.broadcast_to(positions, tokens.shape))
            seen = past.positions[:, None, None, :]
        bias = self._bias(self.decoder, positions[..., None], seen, both_ways=False)

        def decode(layer: T5Layer, carry: Any, inputs: Any) -> tuple[Any, None]:
            x, pool = carry
            memory_keys, memory_values, number = inputs
            own = fold_rngs(keys, first + 1 + number)
            h = layer.attention_norm(x)
            key, value = layer.attention.memory(h)
            if pool is not None:
                pool = pool.write(number, key, value)
                key, value = pool.keys[number], pool.values[number]
            attended = dot_product_attention(
                layer.attention.queries(h), [AttentionSource(key, value, visible, bias)], 1.0
            )
            x = x + dropout(layer.attention.join(attended), fold_rngs(own, 0), c.dropout)
            document = AttentionSource(memory_keys, memory_values, memory.mask[:, None, None])
            attended = dot_product_attention(layer.cross.queries(layer.cross_norm(x)), [document], 1.0)
            x = x + dropout(layer.cross.join(attended), fold_rngs(own, 1), c.dropout)
            return (layer.finish(x, own), pool), None

        x = dropout(self.embed(tokens), fold_rngs(keys, first), c.dropout)
        xs = (memory.keys, memory.values, jnp.arange(c.num_decoder_layers))
        (x, past), _ = scan_layers(self.decoder.layers, decode, (x, past), xs, remat)
        hidden = dropout(self.decoder.norm(x), fold_rngs(keys, first + 1 + c.num_decoder_layers), c.dropout)
        return hidden * c.hidden_size**-0.5 if c.scaled else hidden, past if past is None else past.advance(
            groups * length
        )

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        head = self._head().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)

    def vocab_logsumexp(self, hidden: Float[Array, "... D"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        return vocab_logsumexp(hidden, self._head())

    def target_logits(self, hidden: Float[Array, "... D"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
        return target_logits(hidden, self._head(), targets)

    def _head(self) -> Float[Array, "V D"]:
        return self.embed.embedding[...] if self.config.tie_word_embeddings else self.head.embedding[...]

    def _bias(self, side: T5Stack, query: Array, key: Array, both_ways: bool) -> Float[Array, "... M P H"]:
        distance = key - query
        return side.distances(distance_bucket(distance, self.config.buckets, self.config.farthest, both_ways))


def distance_bucket(distance: Int[Array, "..."], buckets: int, farthest: int, both_ways: bool) -> Int[Array, "..."]:
    """The row of the table for a key that stands `distance` tokens after the query: near ones each have their own,
    farther ones share theirs on a logarithmic scale up to `farthest`; without `both_ways` what comes after is 0.
    """
    side = jnp.zeros_like(distance)
    if both_ways:
        buckets //= 2
        side = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(farthest / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return side + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))
