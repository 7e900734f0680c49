"""The mathematics of RAG-Sequence and RAG-Token (Lewis et al. 2020) on plain arrays, in log space (nats).

    p(y|x) = Σ_z p_η(z|x) · p_θ(y|x,z)

Everything is computed in float32 (float64 stays), whatever the models' precision. A probability of 0 is −inf, which
gives neither NaN values nor NaN gradients; a NaN that comes in goes out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

TIE = 1e-3  # nats: two marginals are the same for all that rounding can tell

# Called from the host they are one program each, not one for each operation; within a larger one nothing changes.
_one_program = partial(jax.jit, inline=True)


@_one_program
def log_prior(scores: Float[Array, "B K"], valid: Bool[Array, "B K"]) -> Float[Array, "B K"]:
    """log p(z|x), normalised over the valid ones of the K documents (section 2.2); −inf for the others.

    A score of −inf is a document of probability 0. A question without any possible document gets −inf everywhere.
    However large the scores, the probabilities sum to 1 but for rounding.
    """
    scores = _at_least_float32(scores)
    possible = valid & (scores != -jnp.inf)
    below = scores - _top(_mask(scores, possible))  # the largest is 0: nothing is rounded away beside it
    return _mask(below - _logsumexp(_mask(below, possible))[:, None], possible)


@_one_program
def corpus_log_prior(
    scores: Float[Array, "B K"], log_normalizer: Float[Array, " B"], valid: Bool[Array, "B K"]
) -> Float[Array, "B K"]:
    """log p(z|x), normalised over the corpus: `log_normalizer` is the logsumexp of the scores of all N passages.

    `exp` of a row sums to the prior mass that the K documents hold, at most 1 but for rounding: the normalizer is
    rounded as the scores are, so that each log p(z|x) is as uncertain as a score, by 1e-7 of the largest one.
    """
    scores = _at_least_float32(scores)
    possible = valid & (scores != -jnp.inf)
    return _mask(scores - _at_least_float32(log_normalizer)[:, None], possible)


@_one_program
def marginal_logp(log_prior: Float[Array, "B K *W"], logp: Float[Array, "B K *C"]) -> Float[Array, "B *C"]:
    """log p(y|x) = logsumexp_z(log p(z|x) + log p(y|x,z)), for one answer a question or for C candidates (section 2.1).

    With K = N and the prior over the whole corpus this is the exact marginal. Given log p(y_t|y_<t,x,z) of T tokens
    [B,K,T] it gives RAG-Token's log p(y_t|y_<t,x) [B,T], whose sum over t is its log p(y|x). Given
    `log_posterior` [B,K,W] in place of the prior, and what follows W prefixes [B,K,W,V], it gives what follows each
    under RAG-Sequence.
    """
    return _logsumexp(_joint(log_prior, logp))


@_one_program
def log_posterior(log_prior: Float[Array, "B K"], logp: Float[Array, "B K *C"]) -> Float[Array, "B K *C"]:
    """log p(z|x,s) of each document for what was read so far, s; −inf where p(s|x) is 0."""
    joint = _joint(log_prior, logp)
    total = jnp.expand_dims(_logsumexp(joint), 1)
    return _mask(joint - jnp.where(total == -jnp.inf, 0, total), joint != -jnp.inf)


def is_best(
    best: Float[Array | np.ndarray, "*#n"] | float,
    rival: Float[Array | np.ndarray, "*#n"] | float,
    rest: Float[Array | np.ndarray, "*#n"] | float,
) -> Any:
    """Whether an answer is the likeliest: p(best) ≥ p(rival) + p(rest), in logs, but for half of `TIE`.

    `rest` is what documents that were not read can add to any answer; the other half of `TIE` is left to rounding. An
    answer of probability 0 is never the likeliest.
    """
    logaddexp = jnp.logaddexp if isinstance(best, Array) else np.logaddexp
    return (best > -np.inf) & (best + TIE / 2 >= logaddexp(rival, rest))


@_one_program
def posterior(log_prior: Float[Array, "B K"], logp: Float[Array, "B K *C"]) -> Float[Array, "B K *C"]:
    """p(z|x,y), the responsibility of each document for the answer; all 0 where p(y|x) is 0."""
    joint = _joint(log_prior, logp)
    shares = _from_top(joint)
    total = shares.sum(axis=1, keepdims=True)
    return shares / jnp.where(total == 0, 1, total)


@_one_program
def token_posterior(
    log_prior: Float[Array, "B K"], logp: Float[Array, "B K *C T"], counted: Bool[Array, "B *C T"]
) -> Float[Array, "B K *C"]:
    """RAG-Token's responsibility of each document: every token has its own; the mean over the tokens that count."""
    by_token = jnp.where(jnp.expand_dims(counted, 1), posterior(log_prior, logp), 0.0)
    return by_token.sum(axis=-1) / jnp.expand_dims(jnp.maximum(counted.sum(axis=-1), 1), 1)


def thorough_marginal(log_prior: Float[Array, "B K"], logp: Float[Array, "B K C"]) -> Float[Array, "B C"]:
    """log p(y|x) of each candidate, scored under every document (section 2.5, "thorough decoding")."""
    return marginal_logp(log_prior, logp)


def fast_marginal(
    log_prior: Float[Array, "B K"], logp: Float[Array, "B K C"], proposed: Bool[Array, "B K C"]
) -> Float[Array, "B C"]:
    """log p(y|x) of each candidate, a document that did not propose it contributing 0 (section 2.5, "fast decoding").

    Never above the thorough one.
    """
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


@partial(jax.jit, inline=True, static_argnames=("smoothing", "vocabulary"))
def hugging_face_nll(
    log_prior: Float[Array, "B K"],
    logp: Float[Array, "B K *C T"],
    counted: Bool[Array, "B *C T"],
    drop_first: Bool[Array, " B"],
    smoothing: float = 0.0,
    mean_logp: Float[Array, "B K *C T"] | None = None,
    vocabulary: int = 1,
) -> Float[Array, "B *C"]:
    """−log p(y|x) in nats as transformers' `RagSequenceForGeneration.get_nll` has it, to the letter.

    `logp` is that of each token and `counted` says which are no padding. log p(z|x) is added to the second token, and
    lost if there is none; `drop_first` leaves out the first one (<s>). `mean_logp` is the mean over the vocabulary of
    size V, which smoothing multiplies by V, log p(z|x) included, before it takes the logsumexp over documents.
    """
    second = jnp.arange(logp.shape[-1]) == 1
    prior = jnp.where(second, log_prior.reshape(*log_prior.shape, *[1] * (logp.ndim - 2)), 0.0)
    first = (jnp.arange(logp.shape[-1]) == 0) & drop_first.reshape(-1, *[1] * (counted.ndim - 1))

    def marginal(scores: Array, keep: Array) -> Array:
        return -_logsumexp(jnp.where(jnp.expand_dims(keep, 1), scores, 0.0).sum(axis=-1))

    nll = marginal(_at_least_float32(logp) + prior, counted & ~first)
    if smoothing == 0.0:
        return nll
    assert mean_logp is not None
    smooth = marginal(vocabulary * (_at_least_float32(mean_logp) + prior), counted)
    return (1.0 - smoothing) * nll + smoothing / vocabulary * smooth


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _mask(x: Array, keep: Array) -> Array:
    return jnp.where(keep, x, -jnp.inf)


def _joint(log_prior: Array, logp: Array) -> Array:
    prior = _at_least_float32(log_prior)
    return prior.reshape(prior.shape + (1,) * (logp.ndim - prior.ndim)) + _at_least_float32(logp)


def _top(x: Array) -> Array:
    """The largest over axis 1, which stays; 0 where all are −inf. No gradient goes through it."""
    top = jax.lax.stop_gradient(jnp.max(x, axis=1, keepdims=True, initial=-jnp.inf))
    return jnp.where(top == -jnp.inf, 0, top)


def _from_top(x: Array) -> Array:
    """exp(x − the largest over axis 1)."""
    possible = x != -jnp.inf
    return jnp.where(possible, jnp.exp(jnp.where(possible, x - _top(x), 0)), 0)


def _logsumexp(x: Array) -> Array:
    """Over axis 1. `jax.nn.logsumexp` has NaN gradients where all the terms are −inf."""
    x = _at_least_float32(x)
    total, some = _from_top(x).sum(axis=1), jnp.any(x != -jnp.inf, axis=1)
    return jnp.where(some, jnp.log(jnp.where(some, total, 1)) + jnp.squeeze(_top(x), 1), -jnp.inf)
