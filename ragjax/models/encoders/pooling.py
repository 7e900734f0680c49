"""From an encoder's last layer to one embedding: pooling, Dense layers, unit length, as in sentence-transformers.

embedding(x) = normalize(dense(pool(states(x)))), of which any part but the pooling may be missing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.models.layers import ACTIVATIONS, RowRngs

POOLINGS = ("mean", "cls", "max", "last")


class Dense(NamedTuple):
    """The shape of a Dense module: activation(W x + b)."""

    size_in: int
    size_out: int
    bias: bool
    activation: str  # of `ACTIVATIONS`, or identity


class Encoder(nnx.Module):
    """tokens [n,S] → embeddings [n,D]. A family has `states`, and its configuration `pooling`, `normalize`, `dense`."""

    config: Any

    def states(
        self, tokens: Int[Array, "n S"], mask: Bool[Array, "n S"], dropout_rngs: RowRngs | None = None
    ) -> Float[Array, "n S D"]:
        """The last layer of right-padded rows."""
        raise NotImplementedError

    def __call__(
        self, tokens: Int[Array, "n S"], mask: Bool[Array, "n S"], dropout_rngs: RowRngs | None = None
    ) -> Float[Array, "n D"]:
        """Float32 embeddings of right-padded rows. Dropout acts where one key a row is given."""
        c = self.config
        pooled = self.project(pool(self.states(tokens, mask, dropout_rngs), mask, c.pooling))
        for number, dense in enumerate(c.dense):
            pooled = getattr(self, f"dense_{number}")(pooled)
            pooled = pooled if dense.activation == "identity" else ACTIVATIONS[dense.activation](pooled)
        pooled = pooled.astype(jnp.float32)
        if c.normalize:
            pooled = pooled * jax.lax.rsqrt(jnp.maximum((pooled**2).sum(axis=-1, keepdims=True), 1e-24))
        return pooled

    def project(self, pooled: Float[Array, "n D"]) -> Float[Array, "n E"]:
        """A last linear map that belongs to the encoder itself, as DPR has one."""
        return pooled

    def add_dense(self, rngs: nnx.Rngs) -> None:
        """Makes the Dense layers of the configuration: `dense_0` and so on."""
        for number, dense in enumerate(self.config.dense):
            layer = nnx.Linear(
                dense.size_in, dense.size_out, use_bias=dense.bias, dtype=jnp.dtype(self.config.dtype), rngs=rngs
            )
            setattr(self, f"dense_{number}", layer)


def pool(states: Float[Array, "n S D"], mask: Bool[Array, "n S"], pooling: str) -> Float[Array, "n D"]:
    """The mean or the maximum over a row's tokens, or its first (cls) or last token; see `POOLINGS`."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        last = jnp.maximum(mask.sum(axis=1) - 1, 0)
        return jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
    if pooling == "max":
        return jnp.where(mask[:, :, None], states, jnp.finfo(states.dtype).min).max(axis=1)
    weights = mask[:, :, None].astype(states.dtype)
    return (states * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)
