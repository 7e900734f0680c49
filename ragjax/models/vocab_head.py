"""The last linear map of a generator, from hidden states to the logits of the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ragjax.models.attention import NEGATIVE
from ragjax.models.layers import gather

LOGIT_BUDGET = 2**24  # at most so many logits at once when they are summed over the vocabulary


class VocabHead(NamedTuple):
    """logits = cap(hidden · tableᵀ + bias), in float32 whatever the precision of `hidden`.

    `softcap`, where it is not 0, is that of Gemma 2 (2024): cap(x) = softcap · tanh(x / softcap).
    """

    table: Float[Array, "V D"]
    bias: Float[Array, " V"] | None = None
    softcap: float = 0.0

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """All logits: for few states only."""
        table = self.table.astype(hidden.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        return self._capped(logits if self.bias is None else logits + self.bias)

    def target_logits(self, hidden: Float[Array, "... D"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
        """The logits of the targets alone."""
        rows = gather(self.table.astype(hidden.dtype))[targets]
        logits = jnp.einsum("...d,...d->...", hidden, rows, preferred_element_type=jnp.float32)
        return self._capped(logits if self.bias is None else logits + self.bias[targets])

    def logsumexp_and_mean(self, hidden: Float[Array, "... D"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The logsumexp of the logits, which normalises them, and their mean over the vocabulary (for smoothing).

        The vocabulary is visited in blocks, forward and backward, so that memory does not grow with rows times V.
        """
        flat, vocabulary = hidden.reshape(-1, hidden.shape[-1]), self.table.shape[0]
        rows = flat.shape[0]
        blocks = -(-vocabulary // max(1024, LOGIT_BUDGET // max(1, rows)))
        block = -(-vocabulary // blocks)
        table = gather(self.table.astype(hidden.dtype))  # once, not for every block

        def visit(carry: tuple[Array, Array, Array], number: Array) -> tuple[tuple[Array, Array, Array], None]:
            top, total, summed = carry
            first = jnp.minimum(number * block, vocabulary - block)  # the last block overlaps the one before
            part = jax.lax.dynamic_slice_in_dim(table, first, block)
            logits = jnp.einsum("rd,vd->rv", flat, part, preferred_element_type=jnp.float32)
            if self.bias is not None:
                logits += jax.lax.dynamic_slice_in_dim(self.bias, first, block)
            logits = self._capped(logits)
            fresh = first + jnp.arange(block) >= number * block
            masked = jnp.where(fresh, logits, -jnp.inf)
            new_top = jax.lax.stop_gradient(jnp.maximum(top, masked.max(axis=-1)))
            total = total * jnp.exp(top - new_top) + jnp.exp(masked - new_top[:, None]).sum(axis=-1)
            summed += jnp.where(fresh, logits, 0.0).sum(axis=-1)
            return (new_top, total, summed), None

        zero = jnp.zeros(rows, jnp.float32)
        start = (jnp.full(rows, NEGATIVE, jnp.float32), zero, zero)
        # logits that are few enough to be kept are not computed again going backward
        step = visit if blocks == 1 else jax.checkpoint(visit)
        (top, total, summed), _ = jax.lax.scan(step, start, jnp.arange(blocks))
        shape = hidden.shape[:-1]
        return (top + jnp.log(total)).reshape(shape), (summed / vocabulary).reshape(shape)

    def _capped(self, logits: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits
