"""Search on eight virtual devices: the brute force is NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from reference import EPS, rounding

from ragjax.parallel.mesh import local_mesh, make_mesh
from ragjax.retrieval.device_index import (
    DeviceIndex,
    block_log_normalizer,
    blockwise_top_k,
    gather_rows,
    inner_products,
    log_normalizer,
    place_rows,
    sharded_top_k,
)

pytestmark = pytest.mark.devices(8)


def vectors(n: int, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def brute_force(embeddings: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = np.asarray(queries, np.float64) @ np.asarray(embeddings, np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def place_corpus(embeddings: np.ndarray, mesh: Mesh) -> DeviceIndex:
    return DeviceIndex(
        place_rows(mesh, len(embeddings), lambda start, stop: embeddings[start:stop]), len(embeddings), mesh
    )


def integers(n: int, width: int, seed: int) -> np.ndarray:
    """Few different ones, so that many scores are equal, and every sum exact."""
    return np.random.default_rng(seed).integers(-2, 3, size=(n, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("count", "block", "group", "k"),
    [
        (1, 1, 64, 1),
        (7, 7, 64, 3),
        (7, 4, 2, 5),
        (64, 16, 4, 10),
        (64, 32, 4, 3),
        (65, 16, 2, 7),
        (100, 33, 11, 2),
        (100, 33, 11, 100),
        (300, 128, 8, 9),
    ],
)
def test_search_by_blocks_and_groups_is_brute_force(count: int, block: int, group: int, k: int) -> None:
    embeddings, queries = vectors(count), vectors(5, seed=1)
    scores, ids = blockwise_top_k(jnp.asarray(embeddings), jnp.asarray(queries), k, block=block, group=group)
    expected_scores, expected_ids = brute_force(embeddings, queries, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("block", "group", "k"),
    [(2, 1, 9), (5, 1, 4), (12, 3, 1), (12, 3, 9), (64, 8, 4), (64, 16, 1), (64, 16, 9), (100, 5, 4), (100, 5, 9)],
)
def test_equal_scores_come_by_lower_id(block: int, group: int, k: int) -> None:
    embeddings, queries = integers(150, 3, seed=2), integers(20, 3, seed=3)
    _, ids = blockwise_top_k(jnp.asarray(embeddings), jnp.asarray(queries), k, block=block, group=group)
    np.testing.assert_array_equal(ids, brute_force(embeddings, queries, k)[1])


@pytest.mark.parametrize("block", [1, 2, 3])
def test_fewer_passages_than_asked_for(block: int) -> None:
    embeddings, queries = vectors(3), vectors(2, seed=1)
    found = blockwise_top_k(jnp.asarray(embeddings), jnp.asarray(queries), 5, block=block)
    scores, ids = map(np.asarray, found)
    np.testing.assert_array_equal(ids[:, :3], brute_force(embeddings, queries, 3)[1])
    np.testing.assert_array_equal(ids[:, 3:], -1)
    assert np.all(np.isneginf(scores[:, 3:]))


@pytest.mark.parametrize(
    ("model", "count", "k"), [(1, 3, 2), (2, 3, 5), (1, 8, 3), (1, 61, 10), (2, 61, 10), (2, 200, 61)]
)
def test_search_over_a_mesh_is_brute_force(model: int, count: int, k: int) -> None:
    """Also where some devices hold nothing but what fills them up, which would score higher than all passages."""
    embeddings, queries = -np.abs(vectors(count)), np.abs(vectors(4, seed=1))
    corpus = place_corpus(embeddings, make_mesh(model))
    assert {shard.data.shape for shard in corpus.embeddings.addressable_shards} == {(-(-count // 8), 16)}
    scores, ids = map(np.asarray, sharded_top_k(corpus, jnp.asarray(queries), k))
    expected_scores, expected_ids = brute_force(embeddings, queries, k)
    np.testing.assert_array_equal(ids[:, :count], expected_ids)
    np.testing.assert_allclose(scores[:, :count], expected_scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ids[:, count:], -1)


def test_equal_scores_come_by_lower_id_over_a_mesh() -> None:
    embeddings, queries = integers(150, 3, seed=2), integers(20, 3, seed=3)
    _, ids = sharded_top_k(place_corpus(embeddings, make_mesh()), jnp.asarray(queries), 9)
    np.testing.assert_array_equal(ids, brute_force(embeddings, queries, 9)[1])


@pytest.mark.parametrize("over_a_mesh", [False, True])
def test_the_approximate_search_is_exact_on_a_cpu(over_a_mesh: bool) -> None:
    """Where JAX's own falls back on sorting, as in one array here; over a mesh it is not even asked."""
    embeddings, queries = vectors(500), vectors(6, seed=1)
    if over_a_mesh:
        scores, ids = sharded_top_k(place_corpus(embeddings, make_mesh()), jnp.asarray(queries), 20, recall=0.9)
    else:
        given = jnp.asarray(embeddings), jnp.asarray(queries)
        scores, ids = blockwise_top_k(*given, 20, block=128, recall=0.9, total=500)
    expected_scores, expected_ids = brute_force(embeddings, queries, 20)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scores_are_float32_of_what_is_stored(dtype: str) -> None:
    embeddings, queries = vectors(100).astype(dtype), vectors(4, seed=1)
    scores, ids = sharded_top_k(place_corpus(embeddings, make_mesh()), jnp.asarray(queries), 7)
    expected_scores, expected_ids = brute_force(embeddings, queries, 7)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)


def test_three_passes_are_float32_of_bfloat16_rows() -> None:
    """As near to the products in float64 as one in float32; two passes would be 2^-16 of the largest away."""
    embeddings, queries = vectors(200).astype("bfloat16"), vectors(4, seed=1) * np.array([[1e-3], [1], [1], [1e4]])
    queries = queries.astype(np.float32)
    exact = embeddings.astype(np.float64) @ queries.astype(np.float64).T
    sizes = np.abs(embeddings.astype(np.float64)) @ np.abs(queries.astype(np.float64)).T
    given, products = (jnp.asarray(embeddings), jnp.asarray(queries)), jax.jit(inner_products, static_argnums=2)
    for three_passes in (False, True):
        assert (np.abs(products(*given, three_passes) - exact) <= 16 * EPS * sizes).all()
    assert 16 * EPS < 2.0**-18
    scores, ids = blockwise_top_k(*given, 7, block=64, three_passes=True)
    expected_scores, expected_ids = brute_force(embeddings, queries, 7)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)

    def gradient(three_passes: bool) -> jax.Array:
        normalizer = partial(block_log_normalizer, scale=0.1, block=64, three_passes=three_passes)
        return jax.jit(jax.grad(lambda q: normalizer(given[0], q).sum()))(given[1])

    np.testing.assert_allclose(gradient(True), gradient(False), rtol=1e-5, atol=1e-6)


def test_memory_does_not_grow_with_queries_times_passages() -> None:
    def temporaries(count: int) -> int:
        corpus = DeviceIndex(jax.ShapeDtypeStruct((count, 8), jnp.float32), count, local_mesh(data=1))
        compiled = sharded_top_k.lower(corpus, jax.ShapeDtypeStruct((64, 8), jnp.float32), 10).compile()
        return compiled.memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]

    few, many = temporaries(20_000), temporaries(200_000)
    assert many - few < 64 * 180_000  # bytes; scores would be four times as much


@pytest.mark.parametrize("count", [3, 61, 200])
def test_the_normaliser_and_its_gradient(count: int) -> None:
    """Over a mesh, by blocks, and in float64, whatever fills up the devices."""
    embeddings, queries, scale = vectors(count), jnp.asarray(vectors(4, seed=1)), 3.0
    scores = scale * np.asarray(queries, np.float64) @ embeddings.T.astype(np.float64)
    total, weights = np.logaddexp.reduce(scores, axis=1), np.arange(1.0, 5.0)
    gradient = weights[:, None] * scale * np.exp(scores - total[:, None]) @ embeddings.astype(np.float64)
    apart = rounding(scores, terms=16)  # so far may the logarithm of each share of the gradient be
    corpus = place_corpus(embeddings, make_mesh(2))

    def by_blocks(queries: jax.Array) -> jax.Array:
        return block_log_normalizer(jnp.asarray(embeddings), queries, scale, block=7)

    def weighted(normalizer: Callable[[jax.Array], jax.Array], queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = normalizer(queries)
        return jnp.asarray(weights, jnp.float32) @ values, values

    for normalizer in (lambda q: log_normalizer(corpus, q, scale), by_blocks):
        both = jax.jit(jax.value_and_grad(partial(weighted, normalizer), has_aux=True))
        (_, values), found = both(queries)
        np.testing.assert_allclose(values, total, atol=apart)
        np.testing.assert_allclose(found, gradient, atol=apart * weights.max() * scale * np.abs(embeddings).max())


def test_rows_come_from_the_devices_that_hold_them() -> None:
    embeddings = vectors(61).astype("bfloat16")
    tokens = np.arange(61 * 3, dtype=np.uint16).reshape(61, 3)
    mesh = make_mesh(2)
    corpus = place_corpus(embeddings, mesh)
    table = place_rows(mesh, 61, lambda start, stop: tokens[start:stop])
    ids = np.array([[0, 60, -1], [7, 8, 8]], np.int32)
    taken = jax.jit(
        lambda corpus, table, ids: (gather_rows(corpus, corpus.embeddings, ids), gather_rows(corpus, table, ids))
    )
    of_embeddings, of_tokens = taken(corpus, table, ids)
    assert (of_embeddings.dtype, of_tokens.dtype) == (jnp.float32, jnp.int32)
    there = (ids >= 0)[:, :, None]
    np.testing.assert_array_equal(of_embeddings, np.where(there, embeddings[ids].astype(np.float32), 0))
    np.testing.assert_array_equal(of_tokens, np.where(there, tokens[ids], 0))


def test_a_corpus_is_placed_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ragjax.retrieval.device_index.UPLOAD", 5)
    asked, embeddings = [], vectors(61)

    def read(start: int, stop: int) -> np.ndarray:
        asked.append(stop - start)
        return embeddings[start:stop]

    placed = np.asarray(place_rows(make_mesh(), 61, read))
    assert max(asked) == 5 and placed.shape == (64, 16)
    np.testing.assert_array_equal(placed[:61], embeddings)
    np.testing.assert_array_equal(placed[61:], 0)
