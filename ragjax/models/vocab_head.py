"""The last linear map of a generator, from hidden states to the logits of the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ragjax.models.attention import NEGATIVE
from ragjax.models.layers import gather_table
from ragjax.parallel.by_device import axis_length

LOGIT_BUDGET = 2**24  # at most so many logits at once, on a device, when they are summed over the vocabulary


class VocabHead(NamedTuple):
    """logits = cap(hidden · tableᵀ + bias), in float32 whatever the precision of `hidden`.

    On a mesh each device along `model` has a part of the vocabulary, where the axis divides V.
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
        parts = gather_table(self.table.astype(hidden.dtype))
        rows = parts.reshape(self.table.shape)[targets]
        logits = jnp.einsum("...d,...d->...", hidden, rows, preferred_element_type=jnp.float32)
        return self._capped(logits if self.bias is None else logits + self.bias[targets])

    def logsumexp_and_mean(self, hidden: Float[Array, "... D"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The logsumexp of the logits, which normalises them, and their mean over the vocabulary (for smoothing).

        The vocabulary is visited in blocks, forward and backward, so that memory does not grow with rows times V.
        """
        flat, vocabulary = hidden.reshape(-1, hidden.shape[-1]), self.table.shape[0]
        rows = flat.shape[0]
        table = gather_table(self.table.astype(hidden.dtype))  # once, not for every block
        shards, each = table.shape[:2]
        bias = None if self.bias is None else self.bias.reshape(shards, each)
        blocks = -(-each // max(1024, LOGIT_BUDGET * axis_length("data") // max(1, rows)))
        block = -(-each // blocks)

        def visit(carry: tuple[Array, Array, Array], number: Array) -> tuple[tuple[Array, Array, Array], None]:
            top, total, summed = carry
            first = jnp.minimum(number * block, each - block)  # the last block overlaps the one before
            part = jax.lax.dynamic_slice_in_dim(table, first, block, axis=1)
            logits = _product(flat, part)
            if bias is not None:
                logits += jax.lax.dynamic_slice_in_dim(bias, first, block, axis=1)
            logits = self._capped(logits)
            fresh = first + jnp.arange(block) >= number * block
            masked = jnp.where(fresh, logits, -jnp.inf)
            new_top = jax.lax.stop_gradient(jnp.maximum(top, masked.max(axis=-1)))
            total = total * jnp.exp(top - new_top) + jnp.exp(masked - new_top[..., None]).sum(axis=-1)
            summed += jnp.where(fresh, logits, 0.0).sum(axis=-1)
            return (new_top, total, summed), None

        zero = jnp.zeros((rows, shards), jnp.float32)
        start = (jnp.full_like(zero, NEGATIVE), zero, zero)
        # logits that are few enough to be kept are not computed again going backward
        step = visit if blocks == 1 else jax.checkpoint(visit)
        (top, total, summed), _ = jax.lax.scan(step, start, jnp.arange(blocks))
        shape, logsumexp = hidden.shape[:-1], top + jnp.log(total)
        logsumexp = logsumexp[:, 0] if shards == 1 else jax.nn.logsumexp(logsumexp, axis=1)
        return logsumexp.reshape(shape), (summed.sum(axis=1) / vocabulary).reshape(shape)

    def _capped(self, logits: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits


def _product(hidden: Float[Array, "r D"], parts: Float[Array, "m v D"]) -> Float[Array, "r m v"]:
    """hidden · partsᵀ, of a table that is whole by two matrices: with a third axis XLA would, on CPUs, copy it."""
    if parts.shape[0] > 1:
        return jnp.einsum("rd,mvd->rmv", hidden, parts, preferred_element_type=jnp.float32)
    return jnp.einsum("rd,vd->rv", hidden, parts[0], preferred_element_type=jnp.float32)[:, None]
