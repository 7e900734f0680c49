"""Decoders as encoders: Qwen3-Embedding and other models of the Llama family, whose last token has read the whole text.

states(x) = norm(layers(embed(x))), where a token sees those before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.errors import InputError
from ragjax.models.encoders.pooling import Dense, Encoder
from ragjax.models.generators.llama import Llama, LlamaConfig
from ragjax.models.hf_config import Fields
from ragjax.models.layers import RowRngs


@dataclass(frozen=True)
class DecoderConfig(LlamaConfig):
    """The shape of an encoder; `from_hf` reads Hugging Face's config.json."""

    pooling: str = "last"
    normalize: bool = True
    dense: tuple[Dense, ...] = ()

    @classmethod
    def from_hf(  # type: ignore[override]  # an encoder's also says what comes after the last layer
        cls,
        hf: dict[str, Any],
        pooling: str,
        normalize: bool,
        dense: tuple[Dense, ...] = (),
        dropout: float = 0.0,
        dtype: str = "float32",
    ) -> DecoderConfig:
        """Raises `InputError` as `LlamaConfig.from_hf` does, and for a model with code of its own."""
        if Fields(hf).has("auto_map"):
            raise InputError("auto_map names code of the model's own, which is not run; give an encoder without")
        decoder = LlamaConfig.from_hf(hf | {"tie_word_embeddings": True}, dropout, dtype)  # it needs no head
        return cls(**vars(decoder), pooling=pooling, normalize=normalize, dense=dense)

    @property
    def embedding_dim(self) -> int:
        """Length of the embeddings."""
        return self.dense[-1].size_out if self.dense else self.hidden_size


class Decoder(Encoder):
    """tokens [n,S] → embeddings [n,D]."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config, self.decoder = config, Llama(config, rngs)
        self.add_dense(rngs)

    def states(
        self, tokens: Int[Array, "n S"], mask: Bool[Array, "n S"], dropout_rngs: RowRngs | None = None
    ) -> Float[Array, "n S D"]:
        """As `Encoder` says."""
        return self.decoder.norm(self.decoder.read(tokens, dropout_rngs)[0])
