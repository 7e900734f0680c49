"""The mathematics of RAG-Sequence on plain arrays, in log space.

    p(y|x) = Σ_z p_η(z|x) · p_θ(y|x,z)

Everything is computed in float32 (float64 stays), whatever the models' precision. A probability of 0 is −inf, which
gives neither NaN values nor NaN gradients; a NaN that comes in goes out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def log_prior(scores: Float[Array, "B K"], valid: Bool[Array, "B K"]) -> Float[Array, "B K"]:
    """log p(z|x), normalised over the valid ones of the K documents; −inf for the others.

    A question without any valid document gets −inf everywhere.
    """
    scores = _mask(scores, valid)
    return _mask(_at_least_float32(scores) - _logsumexp(scores)[:, None], valid)


def corpus_log_prior(
    scores: Float[Array, "B K"], log_normalizer: Float[Array, " B"], valid: Bool[Array, "B K"]
) -> Float[Array, "B K"]:
    """log p(z|x), normalised over the corpus: `log_normalizer` is the logsumexp of the scores of all N passages.

    `exp` of a row sums to the prior mass that the K documents hold, at most 1.
    """
    return _mask(_at_least_float32(scores) - _at_least_float32(log_normalizer)[:, None], valid)


def marginal_logp(log_prior: Float[Array, "B K"], logp: Float[Array, "B K *C"]) -> Float[Array, "B *C"]:
    """log p(y|x) = logsumexp_z(log p(z|x) + log p(y|x,z)), for one answer a question or for C candidates.

    With K = N and the prior over the whole corpus this is the exact marginal.
    """
    return _logsumexp(_joint(log_prior, logp))


def posterior(log_prior: Float[Array, "B K"], logp: Float[Array, "B K *C"]) -> Float[Array, "B K *C"]:
    """p(z|x,y), the responsibility of each document for the answer; all 0 where p(y|x) is 0."""
    joint = _joint(log_prior, logp)
    possible = joint != -jnp.inf
    total = jnp.expand_dims(_logsumexp(joint), 1)
    return jnp.where(possible, jnp.exp(jnp.where(possible, joint - jnp.where(possible, total, 0), 0)), 0)


def thorough_marginal(log_prior: Float[Array, "B K"], logp: Float[Array, "B K C"]) -> Float[Array, "B C"]:
    """log p(y|x) of each candidate, scored under every document."""
    return marginal_logp(log_prior, logp)


def fast_marginal(
    log_prior: Float[Array, "B K"], logp: Float[Array, "B K C"], proposed: Bool[Array, "B K C"]
) -> Float[Array, "B C"]:
    """log p(y|x) of each candidate, a document that did not propose it contributing 0; never above the thorough one."""
    return marginal_logp(log_prior, _mask(logp, proposed))


def marginal_bounds(
    marginal_topk_logp: Float[Array, " B"], log_mass_topk: Float[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Log-space bounds that the top-k leaves on the exact marginal: p_topk ≤ p ≤ min(1, p_topk + 1 − mass).

    Both arguments are under the prior normalised over the corpus, `log_mass_topk` the logsumexp of that prior.
    """
    lower = _at_least_float32(marginal_topk_logp)
    log_mass = jnp.minimum(_at_least_float32(log_mass_topk), 0)  # rounding may push the mass above 1
    log_rest = jnp.where(log_mass > -jnp.log(2.0), jnp.log(-jnp.expm1(log_mass)), jnp.log1p(-jnp.exp(log_mass)))
    return lower, jnp.minimum(jnp.logaddexp(lower, log_rest), 0)


def rag_loss(log_prior: Float[Array, "B K"], logp: Float[Array, "B K"]) -> Float[Array, ""]:
    """The mean over questions of −log p(y|x), in nats; +inf if an answer is impossible under every document.

    Its gradient is the mean of −Σ_z p(z|x,y) ∇[log p_η(z|x) + log p_θ(y|x,z)].
    """
    return jnp.mean(-marginal_logp(log_prior, logp))


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _mask(x: Array, keep: Array) -> Array:
    return jnp.where(keep, x, -jnp.inf)


def _joint(log_prior: Array, logp: Array) -> Array:
    prior = _at_least_float32(log_prior)
    return prior.reshape(prior.shape + (1,) * (logp.ndim - 2)) + _at_least_float32(logp)


def _logsumexp(x: Array) -> Array:
    """Over axis 1. `jax.nn.logsumexp` has NaN gradients where all the terms are −inf."""
    x = _at_least_float32(x)
    possible = x != -jnp.inf
    top = jax.lax.stop_gradient(jnp.max(x, axis=1, keepdims=True, initial=-jnp.inf))
    top = jnp.where(top == -jnp.inf, 0, top)
    total = jnp.sum(jnp.where(possible, jnp.exp(jnp.where(possible, x - top, 0)), 0), axis=1)
    some = jnp.any(possible, axis=1)
    return jnp.where(some, jnp.log(jnp.where(some, total, 1)) + jnp.squeeze(top, 1), -jnp.inf)
