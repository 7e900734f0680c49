"""BART (Lewis et al. 2019), an encoder–decoder: its memory is the keys and values of the decoder's cross-attention.

x = norm(x + attention(x)); in the decoder x = norm(x + cross(x, memory)); x = norm(x + down(gelu(up(x)))).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.errors import InputError
from ragjax.models.attention import Attention, dot_product_attention, self_attention
from ragjax.models.hf_config import Fields
from ragjax.models.kv_cache import DocumentMemory, KVCache, LayerCache, cross_attention_memory, decode_layers
from ragjax.models.layers import ACTIVATIONS, ADAPT_PROMPT, Linear, RowRngs, dropout, fold_rngs, scan_layers, stack
from ragjax.models.vocab_head import VocabHead

OFFSET = 2  # the first rows of the position tables are unused
EPSILON = 1e-5


@dataclass(frozen=True)
class BartConfig:
    """The shape of a model; `from_hf` reads Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_encoder_heads: int
    num_decoder_heads: int
    encoder_mlp_dim: int
    decoder_mlp_dim: int
    start: int  # the token from which every answer begins
    max_positions: int = 1024
    activation: str = "gelu"
    scale_embedding: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    encoder_decoder: ClassVar[bool] = True

    @classmethod
    def from_hf(cls, hf: dict[str, Any], dropout: float = 0.0, dtype: str = "float32") -> BartConfig:
        """Raises `InputError` for another family, layers normalised first, several tables or a wrong entry."""
        fields = Fields(hf)
        fields.text("model_type", among=("bart",))
        fields.check_class("Bart")
        mbart = fields.flag("normalize_before", False) or fields.flag("add_final_layer_norm", False)
        if mbart or not fields.flag("normalize_embedding", True):
            raise InputError(
                "normalize_before, add_final_layer_norm or no normalize_embedding, as in mBART, is not BART"
            )
        if not fields.flag("tie_word_embeddings", True):
            raise InputError("tie_word_embeddings false (three tables) is not BART; where they are equal, say true")
        vocabulary = fields.count("vocab_size")
        fields.check_heads("d_model", "encoder_attention_heads")
        fields.check_heads("d_model", "decoder_attention_heads")
        return cls(
            vocab_size=vocabulary,
            hidden_size=fields.count("d_model"),
            num_encoder_layers=fields.layers("encoder_layers"),
            num_decoder_layers=fields.layers("decoder_layers"),
            num_encoder_heads=fields.count("encoder_attention_heads"),
            num_decoder_heads=fields.count("decoder_attention_heads"),
            encoder_mlp_dim=fields.count("encoder_ffn_dim"),
            decoder_mlp_dim=fields.count("decoder_ffn_dim"),
            start=fields.count("decoder_start_token_id", least=0, most=vocabulary - 1),
            max_positions=fields.count("max_position_embeddings", 1024),
            activation=fields.text("activation_function", "gelu", among=ACTIVATIONS),
            scale_embedding=fields.flag("scale_embedding", False),
            dropout=dropout,
            dtype=dtype,
        )


class BartLayer(nnx.Module):
    """A block of the encoder, or, with cross-attention, of the decoder."""

    def __init__(self, config: BartConfig, decoder: bool, rngs: nnx.Rngs):
        c = self.config = config
        heads, mlp = (c.num_decoder_heads, c.decoder_mlp_dim) if decoder else (c.num_encoder_heads, c.encoder_mlp_dim)
        dtype = jnp.dtype(c.dtype)

        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(c.hidden_size, epsilon=EPSILON, dtype=dtype, rngs=rngs)

        def attention() -> Attention:
            return Attention(c.hidden_size, heads, c.hidden_size // heads, bias=True, dtype=c.dtype, rngs=rngs)

        self.attention, self.attention_norm = attention(), norm()
        if decoder:
            self.cross, self.cross_norm = attention(), norm()
        self.up = Linear(c.hidden_size, mlp, dtype=dtype, rngs=rngs)
        self.down = Linear(mlp, c.hidden_size, dtype=dtype, rngs=rngs)
        self.ffn_norm = norm()

    def feed_forward(self, x: Float[Array, "n ... D"], rngs: RowRngs | None) -> Float[Array, "n ... D"]:
        """The second half of the block."""
        h = self.down(ACTIVATIONS[self.config.activation](self.up(x)))
        return self.ffn_norm(x + dropout(h, fold_rngs(rngs, 2), self.config.dropout))


class BartStack(nnx.Module):
    """The positions, the first norm and the layers of one side."""

    def __init__(self, config: BartConfig, decoder: bool, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.dtype)
        self.positions = nnx.Embed(c.max_positions + OFFSET, c.hidden_size, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(c.hidden_size, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        count = c.num_decoder_layers if decoder else c.num_encoder_layers
        self.layers = stack(lambda r: BartLayer(c, decoder, r), count, rngs)


class Bart(nnx.Module):
    """A generator (`ragjax.models.generator.Generator`) whose answers begin with `decoder_start_token_id`."""

    def __init__(self, config: BartConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.encoder, self.decoder = BartStack(config, False, rngs), BartStack(config, True, rngs)
        self.logits_bias = nnx.Param(jnp.zeros((1, config.vocab_size)))

    def prefill(
        self,
        source: Int[Array, "n S"],
        mask: Bool[Array, "n S"],
        dropout_rngs: RowRngs | None = None,
        remat: bool = False,
    ) -> DocumentMemory:
        """Encodes the source and projects it onto the keys and values of every decoder layer."""
        c = self.config
        x = self._embed(self.encoder, source, jnp.arange(source.shape[1])[None], fold_rngs(dropout_rngs, 0))

        def encode(layer: BartLayer, x: Array, number: Array) -> tuple[Array, None]:
            rngs, attention = fold_rngs(dropout_rngs, number + 1), layer.attention
            attended = self_attention(attention.queries(x), *attention.keys_and_values(x), mask)
            x = layer.attention_norm(x + dropout(attention.project_back(attended), fold_rngs(rngs, 0), c.dropout))
            return layer.feed_forward(x, rngs), None

        adapter_rngs = fold_rngs(dropout_rngs, ADAPT_PROMPT)
        encoded, _ = scan_layers(self.encoder.layers, encode, x, jnp.arange(c.num_encoder_layers), remat, adapter_rngs)
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
        scale = (c.hidden_size // c.num_decoder_heads) ** -0.5
        first = c.num_encoder_layers + 1  # the encoder's dropout has the numbers below

        def decode(layer: BartLayer, x: Array, cache: LayerCache) -> tuple[Array, LayerCache]:
            rngs = fold_rngs(dropout_rngs, first + 1 + cache.layer)
            own, cache = cache.append(*layer.attention.keys_and_values(x))
            attended = dot_product_attention(layer.attention.queries(x), [own], scale)
            x = layer.attention_norm(x + dropout(layer.attention.project_back(attended), fold_rngs(rngs, 0), c.dropout))
            attended = dot_product_attention(layer.cross.queries(x), [cache.document], scale)
            x = layer.cross_norm(x + dropout(layer.cross.project_back(attended), fold_rngs(rngs, 1), c.dropout))
            return layer.feed_forward(x, rngs), cache

        x = self._embed(self.decoder, tokens, positions, fold_rngs(dropout_rngs, first))
        return decode_layers(
            self.decoder.layers, decode, x, memory, past, attention_mask, remat=remat, dropout_rngs=dropout_rngs
        )

    def vocab_head(self) -> VocabHead:
        """As `Generator` says."""
        bias = jax.lax.stop_gradient(self.logits_bias[0])  # Hugging Face keeps it as a constant
        return VocabHead(self.embed.embedding[...], bias)

    def _embed(self, side: BartStack, tokens: Array, positions: Array, rngs: RowRngs | None) -> Array:
        scale = self.config.hidden_size**0.5 if self.config.scale_embedding else 1.0
        x = side.norm(self.embed(tokens) * scale + side.positions(positions + OFFSET))
        return dropout(x, rngs, self.config.dropout)
