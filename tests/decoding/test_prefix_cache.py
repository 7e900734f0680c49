"""What beam searches have read answers for any candidate; only the rest is read, each prefix once."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from compiling import one_loop
from flax import nnx
from reference import draw

import ragjax.decoding.prefix_cache as prefixes_module
from ragjax.checkpoints.name_tables import GENERATORS
from ragjax.checkpoints.random_init import FAMILIES
from ragjax.config import Decode
from ragjax.decoding.prefix_cache import PrefixScorer, read_width
from ragjax.decoding.propose import beam_search_documents, beam_settings, prefill_documents
from ragjax.models.generator import SpecialTokens, score
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import split_parameters
from ragjax.padding import bucket_size, pad_sequences
from ragjax.planning.program_cost import matmul_flops

ROWS, BEAMS, LONGEST = 4, 3, 5
SPECIAL = SpecialTokens(eos=2, pad=0)


class Read:
    """A generator of one family after its beam search under four documents."""

    def __init__(self, family: str) -> None:
        kind, hf = GENERATORS[family], {**FAMILIES[family][0], "vocab_size": 260}
        make = partial(kind.module, kind.config.from_hf(hf))
        self.graph, shapes = split_parameters(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        self.params = draw(shapes, seed=3)
        rng = np.random.default_rng(0)
        source = [rng.integers(5, 200, length).tolist() for length in (5, 9, 7, 3)]
        self.source, mask = pad_sequences(source, 12, 0)
        self.memory: DocumentMemory = prefill_documents(self.graph, self.params, self.source, mask)
        settings = beam_settings(Decode(num_docs=ROWS, num_beams=BEAMS, max_new_tokens=LONGEST), SPECIAL, False)
        beams, prefixes = beam_search_documents(self.graph, self.params, self.memory, settings, SPECIAL)
        self.beams = jax.device_get(beams)
        self.scorer = PrefixScorer(self.graph, self.params, self.memory, prefixes, SPECIAL)
        # all that is proposed, and what nobody does
        proposed = {y for row in range(ROWS) for y in self.proposals(row)}
        self.candidates = sorted(proposed | {(2,), (7, 2), (7, 9, 2), (7, 9, 11, 2), (7, 9, 12, 13, 14)})
        padded = np.stack([np.resize((*y, *[0] * LONGEST), LONGEST) for y in self.candidates])
        every = np.broadcast_to(padded, (ROWS, *padded.shape))
        self._logp = np.asarray(_score(self.graph, self.params, self.memory, every))

    def proposals(self, row: int) -> list[tuple[int, ...]]:
        rows = zip(self.beams.tokens[row].tolist(), self.beams.length[row].tolist(), strict=True)
        return [tuple(tokens[:length]) for tokens, length in rows]

    def plain(self, row: int, answer: tuple[int, ...]) -> np.ndarray:
        """log p of each token, by the pass without a cache; what follows an answer there changes nothing."""
        return self._logp[row, self.candidates.index(answer), : len(answer)]


@partial(jax.jit, static_argnums=0)
def _score(graph: nnx.GraphDef, params: Any, memory: DocumentMemory, answers: jax.Array) -> jax.Array:
    return score(nnx.merge(graph, params), memory, answers)


@pytest.fixture(scope="module", params=["llama", "bart", "t5"])
def world(request: pytest.FixtureRequest) -> Read:
    with one_loop() if request.param == "bart" else nullcontext():  # the other families' rows leave
        return Read(request.param)


def test_padding_is_not_read(world: Read) -> None:
    """As wide as the longest prompt the same is read, with fewer operations; what is added counts nowhere."""
    graph, mask = world.graph, np.arange(12) < np.array([[5], [9], [7], [3]])
    program = prefill_documents.trace(graph, world.params, world.source, mask, 9)
    whole = prefill_documents.trace(graph, world.params, world.source, mask)
    assert matmul_flops(program.jaxpr.jaxpr) < 0.8 * matmul_flops(whole.jaxpr.jaxpr)
    memory = program.lower().compile()(world.params, world.source, mask)
    for name in ("mask", "offset", "start"):
        np.testing.assert_array_equal(getattr(memory, name), getattr(world.memory, name))
    counts = np.asarray(memory.mask)[None, :, :, None, None]
    for name in ("keys", "values"):
        mine, other = (np.asarray(getattr(of, name)) for of in (memory, world.memory))
        assert mine.shape == other.shape and np.isfinite(mine).all()
        np.testing.assert_allclose(np.where(counts, mine, 0), np.where(counts, other, 0), atol=1e-5)


def test_equals_scoring_without_a_cache(world: Read) -> None:
    """All rows, and some of them in another order, each with answers of its own."""
    every = world.candidates
    for wanted in ({row: every for row in range(ROWS)}, {2: every[::2], 0: every[1:4], 3: every[-1:]}):
        found = world.scorer.score(wanted)
        assert list(found) == list(wanted)
        for row, answers in wanted.items():
            for logp, answer in zip(found[row], answers, strict=True):
                np.testing.assert_allclose(logp[: len(answer)], world.plain(row, answer), atol=2e-5, rtol=1e-5)
                assert (logp[len(answer) :] == 0).all()
    assert world.scorer.score({}) == {} == world.scorer.bounds({})


def test_an_answer_may_be_empty(world: Read) -> None:
    """And a memory may have none."""
    found = world.scorer.score({3: [], 1: [(), (7, 9, 2)], 0: [()]})
    assert [steps.shape for steps in found.values()] == [(0, 3), (2, 3), (1, 3)]
    np.testing.assert_allclose(found[1][1], world.plain(1, (7, 9, 2)), atol=2e-5, rtol=1e-5)
    assert not found[1][0].any() and not found[0].any()
    nothing = world.scorer.bounds({2: [()], 0: []})
    assert [(at_most.tolist(), whole.tolist()) for at_most, whole in nothing.values()] == [([0.0], [True]), ([], [])]


def test_nothing_is_read_twice(world: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a document proposed costs no reading there; of what others did, only prefixes that it has not seen."""
    reads: list[np.ndarray] = []
    original = prefixes_module.extend_prefixes

    def counted(*given: Any) -> Any:
        reads.append(np.asarray(given[-1]))
        return original(*given)

    monkeypatch.setattr(prefixes_module, "extend_prefixes", counted)
    own = world.scorer.score({row: world.proposals(row) for row in range(ROWS)})
    assert not reads
    for row in range(ROWS):
        sums = [logp.sum() for logp in own[row]]
        np.testing.assert_allclose(sums, world.beams.logp[row], atol=2e-5, rtol=1e-5)
    every = world.candidates
    world.scorer.score({0: every})
    searched, parents = (np.asarray(x)[0] for x in (world.scorer.prefixes.tokens, world.scorer.prefixes.parent))
    seen: set[tuple[int, ...]] = {()}
    for slot in range(int(world.scorer.prefixes.past.filled)):
        prefix, at = [], slot
        while parents[at] >= 0:
            prefix.append(int(searched[at]))
            at = parents[at]
        seen.add(tuple(prefix[::-1]))
    missing = {y[:t] for y in every for t in range(1, len(y))} - seen
    [parent] = reads
    used = parent[0] >= 0  # of what fills up it is none
    assert 0 < used.sum() == len(missing) < sum(len(y) - 1 for y in every)


def test_many_prefixes_are_read_in_passes(world: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory is bounded: of few at once, but no answer is cut. The scores are the same."""
    reads: list[np.ndarray] = []
    original = prefixes_module.extend_prefixes

    def counted(*given: Any) -> Any:
        reads.append((np.asarray(given[-1]) >= 0).sum(axis=-1))
        return original(*given)

    every = world.candidates
    wanted = {0: every, 2: every[3:], 1: [every[0]]}
    whole = world.scorer.score(wanted)
    monkeypatch.setattr(prefixes_module, "extend_prefixes", counted)
    monkeypatch.setattr(prefixes_module, "MOST_NEW", 3)
    found = world.scorer.score(wanted)
    assert list(found) == list(wanted)
    for row in wanted:
        np.testing.assert_allclose(found[row], whole[row], atol=2e-5, rtol=1e-5)
    assert len(reads) > 2 and max(map(max, reads)) <= max(3, LONGEST - 1)


def test_bounds_are_the_longest_prefix_read(world: Read) -> None:
    every = world.candidates
    found = world.scorer.bounds({row: every for row in (1, 3)})
    for row in (1, 3):
        at_most, whole = found[row]
        for bound, is_whole, answer in zip(at_most, whole, every, strict=True):
            logp = world.plain(row, answer)
            sums = logp.cumsum()
            assert np.abs(sums - bound).min() < 1e-4, "the probability of one of its prefixes"
            assert bound >= sums[-1] - 1e-4
            if is_whole:
                assert bound == pytest.approx(sums[-1], abs=1e-4)
        assert whole[[every.index(y) for y in world.proposals(row)]].all()
        assert not whole[every.index((7, 9, 11, 2))]


def test_few_sizes() -> None:
    assert [bucket_size(count) for count in range(1, 18)] == [1, 2, 3, 4, 6, 6, 8, 8] + [12] * 4 + [16] * 4 + [24]
    assert [bucket_size(count, 8) for count in (0, 1, 8, 9)] == [8, 8, 8, 12]
    for most in (*range(1, 300), 1000, 1025):
        narrow, few = read_width(most, few=False), read_width(most, few=True)
        assert most <= narrow < most + max(16, most // 4 + 1) and most <= few < max(17, 2 * most)
    assert len({read_width(most, few=True) for most in range(1, 4097)}) == 9, "16, 32, … 4,096"
