"""Gemma 2 and the text part of Gemma 3, decoder only (Gemma Team 2024, 2025): a Llama with norms on both sides.

x += rms(attention(rms(x))); x += rms(down(gelu(gate(rms(x))) · up(rms(x)))). Embeddings are multiplied by sqrt(D), and
norms by 1 + their weights. Most layers see a window only; Gemma 2 caps its logits, Gemma 3 normalises queries and keys,
and turns those of layers with a window by other angles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ragjax.errors import InputError
from ragjax.models.generators.llama import GLOBAL, LAYER_TYPES, LOCAL, Llama, LlamaConfig, LlamaLayer, decoder_shape
from ragjax.models.hf_config import Fields
from ragjax.models.layers import ACTIVATIONS, RowRngs, dropout, fold_rngs
from ragjax.models.rope import Rope, rope_angles
from ragjax.models.vocab_head import VocabHead

# by model_type: how the names of its classes begin
KINDS = {"gemma2": "Gemma2", "gemma3_text": "Gemma3"}


@dataclass(frozen=True)
class GemmaConfig(LlamaConfig):
    """The shape of a model; `from_hf` reads Hugging Face's config.json."""

    local_rope: Rope | None = None  # Gemma 3's, of layers with a window
    query_scalar: float = 256.0  # queries are multiplied by its inverse root
    final_softcap: float = 0.0  # of the logits of the vocabulary; 0 means none

    @classmethod
    def from_hf(cls, hf: dict[str, Any], dropout: float = 0.0, dtype: str = "float32") -> GemmaConfig:
        """Raises `InputError` for another family, attention both ways, biases, or an entry of another type or size."""
        fields = Fields(hf)
        kind = fields.text("model_type", among=KINDS)
        fields.check_class(KINDS[kind])
        for key in ("attention_bias", "use_bidirectional_attention"):
            if fields.flag(key, False):
                raise InputError(f"{key} is true, which is not supported")
        if not fields.has("head_dim"):
            hf = hf | {"head_dim": 256}
        second = kind == "gemma2"
        shape = decoder_shape(Fields(hf))
        rope, local = _ropes(fields, shape["head_dim"], second)
        return cls(
            **shape,
            rope=rope,
            local_rope=local,
            windows=_windows(hf, shape["num_layers"], second),
            query_scalar=fields.number("query_pre_attn_scalar", 256.0),
            # transformers' Gemma 3 does not use it
            softcap=_softcap(hf, "attn_logit_softcapping", 50.0) if second else 0.0,
            final_softcap=_softcap(hf, "final_logit_softcapping", 30.0 if second else 0.0),
            activation=fields.text("hidden_activation", "gelu_pytorch_tanh", among=ACTIVATIONS),
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            qk_norm=not second,
            max_positions=fields.count("max_position_embeddings", 8192 if second else 131072),
            dropout=dropout,
            dtype=dtype,
        )

    @property
    def scale(self) -> float:
        """What queries are multiplied by."""
        return self.query_scalar**-0.5


class GemmaNorm(nnx.Module):
    """x / rms(x) · (1 + scale), computed in float32."""

    def __init__(self, size: int, epsilon: float, dtype: str):
        self.scale, self.epsilon, self.dtype = nnx.Param(jnp.zeros(size)), epsilon, dtype

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt((x**2).mean(axis=-1, keepdims=True) + self.epsilon)
        return (x * (1.0 + self.scale[...])).astype(self.dtype)


class GemmaLayer(LlamaLayer):
    """One block, normalised before and after each of its halves."""

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.attention_out_norm, self.ffn_out_norm = (
            self.make_norm(config, config.hidden_size, rngs),
            self.make_norm(config, config.hidden_size, rngs),
        )

    @staticmethod
    def make_norm(config: LlamaConfig, size: int, rngs: nnx.Rngs) -> Any:
        """A norm of so many numbers."""
        return GemmaNorm(size, config.norm_eps, config.dtype)

    def finish(
        self, x: Float[Array, "n ... D"], attended: Float[Array, "n ... H Dh"], rngs: RowRngs | None
    ) -> Float[Array, "n ... D"]:
        """The rest of the block, after attention."""
        rate = self.config.dropout
        h = self.attention_out_norm(self.output(attended.reshape(*x.shape[:-1], -1)))
        x = x + dropout(h, fold_rngs(rngs, 0), rate)
        h = self.ffn_out_norm(self.feed_forward(self.ffn_norm(x)))
        return x + dropout(h, fold_rngs(rngs, 1), rate)


class Gemma(Llama):
    """A generator (`ragjax.models.generator.Generator`): its memory is the key-value cache of the prompt."""

    config: GemmaConfig
    layer_class: ClassVar[type[LlamaLayer]] = GemmaLayer

    def vocab_head(self) -> VocabHead:
        """As `Generator` says."""
        return super().vocab_head()._replace(softcap=self.config.final_softcap)

    def embed_tokens(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """What the first layer reads."""
        x = self.embed(tokens)
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)

    def _angles(self, positions: Int[Array, "..."]) -> Callable[[Array], tuple[Array, Array]]:
        c, whole = self.config, super()._angles(positions)
        if c.local_rope is None:
            return whole
        local = rope_angles(positions, c.local_rope)
        windowed = jnp.array([window > 0 for window in c.windows])
        return lambda number: jax.tree.map(lambda a, b: jnp.where(windowed[number], a, b), local, whole(number))


def _softcap(hf: dict[str, Any], key: str, usual: float) -> float:
    """Where it is not there the usual one, where it is null none."""
    return Fields(hf).number(key, 0.0 if key in hf else usual, least=0.0)


def _windows(hf: dict[str, Any], layers: int, second: bool) -> tuple[int, ...]:
    """The window of each layer: every second one of Gemma 2 sees all, every sixth of Gemma 3; else as the file says."""
    fields = Fields(hf)
    if fields.has("layer_types"):
        types = fields.texts("layer_types", layers, LAYER_TYPES)
    else:
        pattern = 2 if second else fields.count("sliding_window_pattern", 6)
        types = [LOCAL if (i + 1) % pattern else GLOBAL for i in range(layers)]
    window = fields.count("sliding_window", 4096)
    return tuple(window if kind == LOCAL else 0 for kind in types)


def _ropes(fields: Fields, head_dim: int, second: bool) -> tuple[Rope, Rope | None]:
    """The rotary positions of layers that see all, and of those with a window where these have others."""
    rope = fields.part("rope_parameters", "rope_scaling")
    if second:
        return Rope.from_hf(fields, rope, head_dim, fields.number("rope_theta", 10000.0)), None
    nested = rope.has(LOCAL) or rope.has(GLOBAL)
    theta, local_theta = fields.number("rope_theta", 1e6), fields.number("rope_local_base_freq", 1e4)
    return (
        Rope.from_hf(fields, rope.part(GLOBAL) if nested else rope, head_dim, theta),
        Rope.from_hf(fields, rope.part(LOCAL) if nested else Fields({}), head_dim, local_theta),
    )
