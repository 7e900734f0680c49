"""The marginal against enumeration, finite differences and the worked example."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from ragjax.marginal import (
    corpus_log_prior,
    fast_marginal,
    log_prior,
    marginal_bounds,
    marginal_logp,
    posterior,
    thorough_marginal,
)

INF = np.inf


def random_case(seed: int, *shape: int) -> tuple[jax.Array, jax.Array]:
    """Scores [B,K] and sequence log-probabilities [B,K,…]."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=shape[:2]) * 3
    return jnp.asarray(scores, jnp.float32), jnp.asarray(-rng.exponential(4, size=shape), jnp.float32)


def all_valid(scores: jax.Array | np.ndarray) -> jax.Array:
    return jnp.asarray(np.ones(scores.shape, bool))


# each a program, where its operations one by one would be many
bounds = jax.jit(marginal_bounds)
fast = jax.jit(fast_marginal)


@jax.jit
def rag_loss(log_prior: jax.Array, logp: jax.Array) -> jax.Array:
    return -marginal_logp(log_prior, logp).mean()


@jax.jit
def loss_and_gradients(scores: jax.Array, logp: jax.Array, valid: jax.Array) -> Any:
    """Of the scores and of log p(y|x,z)."""

    def loss(scores: jax.Array, logp: jax.Array) -> jax.Array:
        return rag_loss(log_prior(scores, valid), logp)

    return jax.value_and_grad(loss, argnums=(0, 1))(scores, logp)


def test_worked_example() -> None:
    candidates = ["Paris", "The city Paris", "Lyon"]
    prior = jnp.asarray(np.log([[0.73, 0.15, 0.12]]))
    p = np.array([[[0.607, 0.301, 0.0], [0.0, 0.0, 0.670], [0.407, 0.0, 0.0]]])
    with np.errstate(divide="ignore"):
        found = np.asarray(fast(prior, np.log(np.maximum(p, 1e-3)), p > 0))
        also = thorough_marginal(prior, jnp.asarray(np.log(p)))
    np.testing.assert_allclose(np.exp(found), [[0.492, 0.220, 0.1005]], atol=5e-4)
    np.testing.assert_allclose(found, also, rtol=1e-6)
    assert candidates[found[0].argmax()] == "Paris"


def test_prior_of_the_example_scores() -> None:
    scores = jnp.asarray(np.array([[14.0, 10.0, 9.0]]))
    prior = log_prior(scores, all_valid(scores))
    np.testing.assert_allclose(np.exp(prior), [[0.976, 0.018, 0.007]], atol=5e-4)


@pytest.mark.parametrize("seed", range(3))
def test_marginal_and_posterior_equal_enumeration(seed: int) -> None:
    scores, logp = random_case(seed, 3, 5, 4)
    prior = log_prior(scores, all_valid(scores))
    marginal, r = np.asarray(marginal_logp(prior, logp)), np.asarray(posterior(prior, logp))
    chex.assert_shape(marginal, (3, 4))
    chex.assert_shape(r, (3, 5, 4))
    exact_scores, exact_logp = (np.asarray(x, np.float64) for x in (scores, logp))
    for b in range(3):
        weights = np.exp(exact_scores[b]) / np.exp(exact_scores[b]).sum()
        for c in range(4):
            terms = [weights[z] * np.exp(exact_logp[b, z, c]) for z in range(5)]
            np.testing.assert_allclose(marginal[b, c], np.log(sum(terms)), rtol=1e-5)
            np.testing.assert_allclose(r[b, :, c], np.array(terms) / sum(terms), rtol=1e-4)


def test_gradient_is_the_posterior_weighted_sum() -> None:
    """∇ −log p(y|x) = −Σ_z r_z ∇[log p_η(z|x) + log p_θ(y|x,z)], each log-probability a function of parameters."""
    rng = np.random.default_rng(0)
    docs, x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), jnp.asarray(rng.normal(size=4), jnp.float32)
    params = {"eta": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32), "theta": jnp.ones((4, 7), jnp.float32)}
    answer = 3

    def terms(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores = (docs @ params["eta"] @ x)[None]
        return log_prior(scores, all_valid(scores)), jax.nn.log_softmax(docs @ params["theta"])[None, :, answer]

    @jax.jit
    def both_ways(params: dict[str, jax.Array]) -> Any:
        r = posterior(*terms(params))[0]
        by_document = jax.jacobian(lambda params: jnp.add(*terms(params))[0])(params)
        expected = jax.tree.map(lambda g: -jnp.einsum("k,k...->...", r, g), by_document)
        return jax.grad(lambda params: rag_loss(*terms(params)))(params), expected

    gradient, expected = both_ways(params)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_gradient_equals_finite_differences() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        scores, logp = rng.normal(size=(2, 4)), -rng.exponential(3, size=(2, 4))
        valid = jnp.array([[True, True, False, True], [True, True, True, True]])

        @jax.jit
        def loss(scores: jax.Array, logp: jax.Array) -> jax.Array:
            return rag_loss(log_prior(scores, valid), logp)

        assert loss(scores, logp).dtype == jnp.float64
        gradients = jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1)))(scores, logp))
        for argument, gradient in enumerate(gradients):
            for at in np.ndindex(2, 4):
                step = np.zeros((2, 4))
                step[at] = 1e-5
                up, down = [scores, logp], [scores, logp]
                up[argument], down[argument] = up[argument] + step, down[argument] - step
                np.testing.assert_allclose(gradient[at], (loss(*up) - loss(*down)) / 2e-5, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_bounds_hold_and_the_whole_corpus_is_exact(seed: int) -> None:
    """The prior normalised over a corpus of N = 40, the top 6 kept; p(y|x) is enumerated over all 40."""
    scores, logp = random_case(seed, 4, 40)
    whole = log_prior(scores, all_valid(scores))
    exact = np.asarray(marginal_logp(whole, logp))
    np.testing.assert_allclose(
        np.exp(exact), np.sum(np.exp(np.float64(whole)) * np.exp(np.float64(logp)), axis=1), rtol=1e-5
    )

    ids = np.argsort(-np.asarray(scores), axis=1)[:, :6]
    top, of_top, expected_prior = (np.take_along_axis(np.asarray(x), ids, axis=1) for x in (scores, logp, whole))
    normalizer = np.logaddexp.reduce(np.asarray(scores), axis=1)
    prior = corpus_log_prior(top, normalizer, all_valid(top))
    chex.assert_trees_all_close(prior, expected_prior, rtol=1e-5, atol=1e-6)
    log_mass = np.logaddexp.reduce(np.asarray(prior), axis=1)
    lower, upper = map(np.asarray, bounds(marginal_logp(prior, of_top), log_mass))
    assert np.all(lower < exact) and np.all(exact < upper) and np.all(upper <= 0)
    expected = np.minimum(1, np.exp(np.float64(lower)) + 1 - np.exp(np.float64(log_mass)))
    np.testing.assert_allclose(np.exp(upper), expected, rtol=1e-5)


def test_bounds_at_the_extremes() -> None:
    of_top, log_mass = np.array([[-2.0, -2.0, -INF, -INF], [0.0, 1e-7, 0.0, -INF]], np.float32)
    lower, upper = bounds(of_top, log_mass)
    chex.assert_trees_all_close(lower, np.array([-2.0, -2.0, -INF, -INF], np.float32))
    chex.assert_trees_all_close(upper, np.array([-2.0, -2.0, -INF, 0.0], np.float32))


@pytest.mark.parametrize("filler", [0.0, 50.0, -INF, INF, np.nan])
def test_masked_documents_change_nothing(filler: float) -> None:
    scores, logp = random_case(7, 3, 4)
    more = np.concatenate([scores, np.full((3, 2), filler, np.float32)], axis=1)
    valid = np.arange(6) < np.full((3, 1), 4)
    more_logp = np.concatenate([logp, np.full((3, 2), -1.0, np.float32)], axis=1)
    value, gradients = loss_and_gradients(scores, logp, all_valid(scores))
    masked_value, masked = jax.device_get(loss_and_gradients(more, more_logp, valid))
    chex.assert_trees_all_close(masked_value, value, rtol=1e-6)
    chex.assert_trees_all_close(tuple(g[:, :4] for g in masked), gradients, rtol=1e-5, atol=1e-7)
    assert not any(g[:, 4:].any() for g in masked)


def test_order_of_documents_changes_nothing() -> None:
    scores, logp = map(np.asarray, random_case(8, 3, 5, 4))
    order = np.array([3, 0, 4, 1, 2])
    prior, permuted = (log_prior(s, all_valid(s)) for s in (scores, scores[:, order]))
    r = np.asarray(posterior(prior, logp))
    chex.assert_trees_all_close(marginal_logp(permuted, logp[:, order]), marginal_logp(prior, logp), rtol=1e-5)
    chex.assert_trees_all_close(posterior(permuted, logp[:, order]), r[:, order], rtol=1e-5)


def test_infinities_give_no_nan() -> None:
    """Question 0 has no document; question 1 has an answer impossible everywhere; question 2 under one document."""
    valid = np.array([[False, False], [True, True], [True, True]])
    scores = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], np.float32)
    logp = np.array([[-1.0, -1.0], [-INF, -INF], [-INF, -1.0]], np.float32)
    prior = log_prior(scores, valid)
    np.testing.assert_array_equal(np.asarray(prior)[0], [-INF, -INF])
    np.testing.assert_array_equal(np.isneginf(marginal_logp(prior, logp)), [True, True, False])
    np.testing.assert_array_equal(posterior(prior, logp), [[0, 0], [0, 0], [0, 1]])

    def each(scores: jax.Array, logp: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(jnp.array([0, 0, 1], bool), marginal_logp(log_prior(scores, valid), logp), 0))

    @jax.jit
    def gradients(scores: jax.Array, logp: jax.Array) -> Any:
        by_posterior = jax.grad(lambda s: posterior(log_prior(s, valid), logp)[2, 1])(scores)
        return jax.grad(each, argnums=(0, 1))(scores, logp), by_posterior

    chex.assert_tree_all_finite(jax.device_get(gradients(scores, logp)))
    chex.assert_tree_all_finite(jax.device_get(loss_and_gradients(scores, logp, valid)[1]))


def test_a_nan_is_not_hidden() -> None:
    logp = np.array([[np.nan, -1.0]], np.float32)
    assert np.isnan(rag_loss(np.log(np.array([[0.5, 0.5]], np.float32)), logp))


def test_half_precision_is_summed_in_float32() -> None:
    scores, logp = (np.asarray(x).astype(jnp.bfloat16) for x in random_case(9, 2, 64))
    prior = log_prior(scores, all_valid(scores))
    marginal = marginal_logp(prior, logp)
    assert prior.dtype == marginal.dtype == jnp.float32
    wide = log_prior(scores.astype(np.float32), all_valid(scores))
    chex.assert_trees_all_equal(marginal, marginal_logp(wide, logp.astype(np.float32)))


def test_fast_never_exceeds_thorough() -> None:
    scores, logp = random_case(10, 4, 3, 6)
    prior = log_prior(scores, all_valid(scores))
    proposed = np.random.default_rng(2).random((4, 3, 6)) < 0.5
    thorough = np.asarray(thorough_marginal(prior, logp))
    assert np.all(np.asarray(fast(prior, logp, proposed)) <= thorough + 1e-6)
    chex.assert_trees_all_close(fast(prior, logp, np.ones_like(proposed)), thorough)
    assert np.all(np.isneginf(fast(prior, logp, np.zeros_like(proposed))))


# whatever the scale: against float64, which is given the same float32 numbers

EPS = float(np.finfo(np.float32).eps)
SHAPES = [(2, 1), (3, 5), (2, 33)]  # B and K; few, since each is compiled


@st.composite
def hard_scores(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [B,K] of any size, equal, apart or impossible, which are valid, and log p(y|x,z) [B,K,2]."""
    shape = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread, offset, cost = (10.0 ** draw(st.integers(-3, 8)) for _ in range(3))
    kind = draw(st.sampled_from(["equal", "apart", "two values"]))
    noise = {"equal": np.ones(shape), "apart": rng.normal(size=shape), "two values": rng.integers(0, 2, shape)}[kind]
    scores = (spread * noise + draw(st.sampled_from([-1, 0, 1])) * offset).astype(np.float32)
    logp = (-cost * rng.exponential(size=(*shape, 2))).astype(np.float32)
    for array in (scores, logp):
        array[rng.random(array.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -np.inf
    return scores, rng.random(shape) >= draw(st.sampled_from([0.0, 0.3, 1.0])), logp


def softmax64(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over axis 1 in float64: the logsumexp, which stays an axis, and log-probabilities; −inf where all are."""
    x = x.astype(np.float64)
    total = np.logaddexp.reduce(x, axis=1, keepdims=True)
    return total, np.where(np.isneginf(x), -np.inf, x - np.where(np.isneginf(total), 0, total))


@jax.jit
def prior_marginal_posterior(scores: jax.Array, valid: jax.Array, logp: jax.Array) -> Any:
    """With what must have gradients: their finite parts, and the posterior."""

    def finite(x: jax.Array) -> jax.Array:
        return jnp.where(x > -jnp.inf, x, 0).sum()

    def total(scores: jax.Array, logp: jax.Array) -> jax.Array:
        prior = log_prior(scores, valid)
        weighed = posterior(prior, logp) * jnp.arange(1.0, 1 + scores.shape[1])[:, None]
        return finite(prior) + finite(marginal_logp(prior, logp)) + weighed.sum()

    prior = log_prior(scores, valid)
    return prior, marginal_logp(prior, logp), posterior(prior, logp), jax.grad(total, argnums=(0, 1))(scores, logp)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(hard_scores())
def test_no_scale_and_no_impossibility_costs_precision(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Probabilities sum to 1 within K·eps, whatever the scores; what is impossible has 0, and nothing is NaN.

    Each step's rounding is half an eps of its result: of log p itself, and of each of K terms of a sum.
    """
    scores, valid, logp = case
    documents = scores.shape[1]
    prior, marginal, r, gradients = jax.device_get(prior_marginal_posterior(scores, valid, logp))
    _, expected = softmax64(np.where(valid, scores, -np.inf))
    np.testing.assert_array_equal(np.isneginf(prior), np.isneginf(expected))
    some = expected > -np.inf
    assert (np.abs(prior[some] - expected[some]) <= EPS * (documents + np.abs(expected[some]))).all()
    sums = np.exp(prior.astype(np.float64)).sum(axis=1)
    assert (np.abs(sums - some.any(axis=1)) <= documents * EPS).all()

    joint = prior[..., None] + logp  # rounded as there: at this magnitude nothing finer is known
    total, expected = softmax64(joint)
    total = total[:, 0]
    np.testing.assert_array_equal(np.isneginf(marginal), np.isneginf(total))
    there = total > -np.inf
    assert (np.abs(marginal[there] - total[there]) <= EPS * (documents + np.abs(total[there]))).all()
    share = np.exp(expected)
    # exp's own error, some units in the last place, and that of x − top, at most eps·|x − top|/2, in the exponent
    below = np.where(np.isneginf(expected), 0, np.abs(expected))
    assert (np.abs(r - share) <= EPS * share * (documents + 4 + below) + 1e-37).all()
    assert (np.abs(r.sum(axis=1, dtype=np.float64) - there) <= documents * EPS).all()
    chex.assert_tree_all_finite(gradients)


def test_three_large_equal_scores() -> None:
    """They used to sum to 0.974: beside 1,000,000 float32 has no third decimal."""
    scores = np.full((1, 3), 1e6, np.float32)
    np.testing.assert_allclose(np.exp(log_prior(scores, all_valid(scores))), np.full((1, 3), 1 / 3), rtol=2e-7)
    joint = posterior(np.zeros((1, 3), np.float32), np.full((1, 3, 1), -1e6, np.float32))
    np.testing.assert_allclose(joint, np.full((1, 3, 1), 1 / 3), rtol=2e-7)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 80.0, 1e4, 1e6])
def test_the_corpus_prior_is_as_certain_as_the_scores(scale: float) -> None:
    """Its normalizer is rounded to eps/2 of itself: so far may the whole corpus's probabilities be from 1, in nats."""
    scores = (scale * np.random.default_rng(0).normal(size=(4, 50))).astype(np.float32)
    normalizer = np.logaddexp.reduce(scores, axis=1)
    prior = np.asarray(corpus_log_prior(scores, normalizer, all_valid(scores)), np.float64)
    uncertain = EPS * (50 + np.abs(scores).max(axis=1))
    assert (np.abs(np.logaddexp.reduce(prior, axis=1)) <= uncertain).all()
    impossible = corpus_log_prior(np.full_like(scores, -INF), np.full_like(normalizer, -INF), all_valid(scores))
    np.testing.assert_array_equal(impossible, np.full_like(scores, -INF))


def test_arrays_are_checked_against_their_annotations() -> None:
    """As conftest.py asks for, in whatever module; else shapes that do not belong together would be broadcast."""
    with pytest.raises(TypeCheckError, match="valid"):
        log_prior(jnp.zeros((2, 3)), jnp.ones((1, 3), bool))
