"""Passages read once give the memories that prompts read whole give, whatever came before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from ragjax.checkpoints.pretrained import PretrainedModel, open_generator
from ragjax.checkpoints.random_init import write_random_checkpoint
from ragjax.decoding.propose import prefill_documents
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.padding import pad_sequences
from ragjax.parallel.mesh import make_mesh
from ragjax.parallel.sharding import put_global, replicated
from ragjax.retrieval.passage_cache import PassageCacheStatistics, PassageKVCache

HEAD, TAIL, LONGEST, ROWS = (5, 6), (7,), 20, 8
PASSAGES = [tuple(np.random.default_rng(p).integers(8, 200, 2 + p).tolist()) for p in range(14)]
ATOL = 1e-5  # float32, keys and values below 10

Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # source, mask, passages, lengths


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainedModel, Params]:
    folder = tmp_path_factory.mktemp("llama")
    write_random_checkpoint("llama", folder, seed=3)
    pretrained = open_generator(folder)
    return pretrained, pretrained.load_params()


def beginning(passage: int) -> tuple[int, ...]:
    return HEAD + (PASSAGES[passage] if passage >= 0 else ())


def batch(passages: list[int], questions: list[tuple[int, ...]]) -> Batch:
    """Prompts of at most `LONGEST` tokens, passages cut to fit."""
    rows, lengths = [], []
    for passage, question in zip(passages, questions, strict=True):
        kept = beginning(passage)[: LONGEST - len(question) - len(TAIL)]
        rows.append([*kept, *question, *TAIL])
        lengths.append(len(kept))
    return (*pad_sequences(rows, LONGEST, 0), np.array(passages), np.array(lengths))


def batches(count: int, seed: int = 0) -> Iterator[Batch]:
    """With no passage now and then, one passage for several questions, questions of 1 to 9 tokens."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        questions = [tuple(rng.integers(8, 200, rng.integers(1, 10)).tolist()) for _ in range(ROWS)]
        yield batch(rng.integers(-1, len(PASSAGES), ROWS).tolist(), questions)


def open_cache(model: tuple[PretrainedModel, Params], slots: int, mesh: Mesh | None = None) -> PassageKVCache:
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    params = put_global(model[1], replicated(mesh))
    return PassageKVCache(model[0].graphdef, params, mesh, beginning, LONGEST - len(TAIL) - 1, slots)


def check(model: tuple[PretrainedModel, Params], read: DocumentMemory, source: np.ndarray, mask: np.ndarray) -> None:
    """As the prompts read whole."""
    whole = prefill_documents(model[0].graphdef, model[1], source, mask)
    for name in ("mask", "offset", "start"):
        np.testing.assert_array_equal(getattr(read, name), getattr(whole, name))
    counts = np.asarray(whole.mask)[None, :, :, None, None]
    for name in ("keys", "values"):
        one, other = (np.where(counts, getattr(memory, name), 0) for memory in (read, whole))
        np.testing.assert_allclose(one, other, atol=ATOL)
    assert np.isfinite(read.keys).all() and np.isfinite(read.values).all()


def test_equals_reading_whole(model: tuple[PretrainedModel, Params]) -> None:
    """With so few slots that passages leave and come again; the counts are those of a list, newest last."""
    cache, kept = open_cache(model, ROWS), list[int]()
    expected = PassageCacheStatistics()
    for source, mask, passages, lengths in batches(6):
        check(model, cache.read(source, mask, passages, lengths), source, mask)
        asked = list(dict.fromkeys(passages.tolist()))
        missing = [p for p in asked if p not in kept]
        kept = [p for p in kept if p not in asked] + [p for p in asked if p in kept] + missing
        kept = kept[-ROWS:]
        expected.passages += ROWS
        expected.hits += ROWS - len(missing)
        expected.tokens += mask.sum()
        expected.tokens_read += mask.sum() - lengths.sum()
        expected.tokens_read += sum(min(len(beginning(p)), cache.width) for p in missing)
    assert cache.statistics == expected and 0.2 < (expected.hit_rate or 0) < 0.9


@pytest.mark.devices(4)
def test_devices_keep_what_their_questions_need(model: tuple[PretrainedModel, Params]) -> None:
    """Split over two, each model over two more; what fills up a batch counts nowhere."""
    cache = open_cache(model, ROWS // 2, make_mesh(2, jax.devices()[:4]))
    for source, mask, passages, lengths in batches(3, seed=1):
        check(model, cache.read(source, mask, passages, lengths), source, mask)
    cache.clear()
    cache.statistics = PassageCacheStatistics()
    source, mask, passages, lengths = batch([3] * ROWS, [(9, 9, 9)] * ROWS)
    check(model, cache.read(source, mask, passages, lengths), source, mask)
    tokens = int(mask[0].sum())
    assert cache.statistics == PassageCacheStatistics(passages=1, hits=0, tokens=tokens, tokens_read=tokens)
    assert cache.statistics.sum_over_processes() == cache.statistics
    assert cache.statistics.as_json() == asdict(cache.statistics) | {"hit_rate": 0.0, "tokens_saved": 0.0}


def test_what_does_not_fit_is_read_whole(model: tuple[PretrainedModel, Params]) -> None:
    """More passages than slots, a prompt that ends with its passage, or a passage longer than a slot."""
    cache = open_cache(model, 2)
    source, mask, passages, lengths = batch(list(range(ROWS)), [(9, 9)] * ROWS)
    check(model, cache.read(source, mask, passages, lengths), source, mask)
    check(model, cache.read(source, mask, passages * 0, mask.sum(axis=1)), source, mask)
    longer = open_cache(model, ROWS)  # a question of no tokens leaves a passage more room than a slot has
    longer.width = 10
    source, mask, passages, lengths = batch([13] * ROWS, [()] * ROWS)
    check(model, longer.read(source, mask, passages, lengths), source, mask)
    assert cache.statistics == PassageCacheStatistics() and cache.statistics.hit_rate is None


def test_nothing_is_promised_that_was_not_read(
    model: tuple[PretrainedModel, Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, (source, mask, passages, lengths) = open_cache(model, ROWS), next(batches(1))
    monkeypatch.setattr("ragjax.retrieval.passage_cache.read_passages", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.read(source, mask, passages, lengths)
    monkeypatch.undo()
    check(model, cache.read(source, mask, passages, lengths), source, mask)


def test_the_pool_is_written_in_place(model: tuple[PretrainedModel, Params], tmp_path: Path) -> None:
    cache, found = open_cache(model, ROWS), set()
    for part in batches(3, seed=2):
        cache.read(*part)
        assert cache._pool is not None
        found.add(cache._pool[0].unsafe_buffer_pointer())
    assert len(found) == 1
    layers, heads, head_dim = 2, 2, 8
    assert cache.size == 2 * layers * ROWS * cache.width * heads * head_dim * 4
