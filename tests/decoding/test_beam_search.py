"""Beam search against exhaustive enumeration and against beam search on Python lists.

The toy model rebuilds each beam's whole prefix from the pool through `mask`, so that a wrong ancestry gives NaN or
another distribution.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from reference import log_softmax

from ragjax.decoding.beam_search import Beams, BeamSettings, beam_search, likeliest, likeliest_by_blocks

V, T = 4, 4
EOS, PAD, START = 2, 0, 9
Table = np.ndarray  # [(V+1)^(T−1), V]: what follows each prefix
Found = list[tuple[tuple[int, ...], float, bool]]


def random_tables(rows: int, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(rows, (V + 1) ** (T - 1), V)) * 1.5
    return log_softmax(logits).astype(np.float32)


def place(prefix: tuple[int, ...]) -> int:
    return sum((token + 1) * (V + 1) ** t for t, token in enumerate(prefix))


@struct.dataclass
class Pool:
    tokens: jax.Array  # [n, E]
    steps: jax.Array  # [n], how often a row was asked for

    def take(self, rows: jax.Array) -> Pool:
        return Pool(self.tokens[rows], self.steps[rows])

    def put(self, rows: jax.Array, part: Pool) -> Pool:
        return Pool(self.tokens.at[rows].set(part.tokens), self.steps.at[rows].set(part.steps))


def empty_pool(rows: int, slots: int) -> Pool:
    return Pool(jnp.full((rows, slots), -1000, jnp.int32), jnp.zeros(rows, jnp.int32))


def toy_next_logp(
    tables: jax.Array, tokens: jax.Array, step: jax.Array, mask: jax.Array, cache: Pool
) -> tuple[jax.Array, Pool]:
    """The distribution after a prefix is looked up by the prefix; NaN where `mask` shows no proper prefix."""
    n, width = tokens.shape
    depth = cache.tokens.shape[1] // width
    pool = jax.lax.dynamic_update_slice(cache.tokens, tokens, (0, step * width))
    seen = mask.reshape(n, width, depth, width)
    prefix = (seen * pool.reshape(n, 1, depth, width)).sum(axis=-1)
    used = jnp.arange(depth) <= step
    proper = (seen.sum(axis=-1) == used).all(axis=-1) & (prefix[..., 0] == START)
    proper &= jnp.where(jnp.arange(depth) == step, prefix, 0).sum(axis=-1) == tokens
    powers = jnp.array([0, *((V + 1) ** np.arange(depth - 1))])
    where = (jnp.where(used, prefix + 1, 0) * powers).sum(axis=-1)
    logp = tables[jnp.arange(n)[:, None], where]
    return jnp.where(proper[..., None], logp, jnp.nan), Pool(pool, cache.steps + 1)


@partial(jax.jit, static_argnums=(1, 2))
def search_and_pool(tables: jax.Array, how: BeamSettings, leave: bool = True) -> tuple[Beams, Pool]:
    """With `leave` rows that are finished do; without, the program has one loop in place of three."""
    n = tables.shape[0]
    pool, start = empty_pool(n, how.max_new_tokens * how.num_beams), jnp.full(n, START, jnp.int32)

    def for_rows(rows: jax.Array) -> Any:
        return partial(toy_next_logp, tables[rows])

    return beam_search(partial(toy_next_logp, tables), pool, start, how, for_rows if leave else None)[:2]


# with which rows leave here; in each other way to search one more program
LEAVING: tuple[dict[str, Any], ...] = ({}, {"length_penalty": 1.0}, {"early_stopping": True, "length_penalty": 1.0})


def settings_of(beams: int, max_new_tokens: int = T, **settings: Any) -> BeamSettings:
    return BeamSettings(num_beams=beams, max_new_tokens=max_new_tokens, eos=EOS, pad=PAD, **settings)


def search(tables: Table, beams: int, leave: bool | None = None, **settings: Any) -> Beams:
    leave = beams == 2 and settings in LEAVING if leave is None else leave
    return jax.device_get(search_and_pool(tables, settings_of(beams, **settings), leave)[0])


def plain_search(
    table: Table,
    beams: int,
    max_new_tokens: int = T,
    min_new_tokens: int = 0,
    length_penalty: float = 0.0,
    early_stopping: bool = False,
    forced_bos: int | None = None,
    forced_eos: int | None = None,
) -> Found:
    """Hugging Face's rules on lists, stopping early only if asked to."""

    def allowed(v: int, step: int) -> bool:
        forced = {max_new_tokens - 1: forced_eos}.get(step, {0: forced_bos}.get(step))
        return v == forced if forced is not None else v != EOS or step >= min_new_tokens

    def best(found: Found) -> Found:
        return sorted(found, key=lambda found: (not found[2], -found[1] / len(found[0]) ** length_penalty))[:beams]

    running: list[tuple[tuple[int, ...], np.float32]] = [((), np.float32(0))]
    done: Found = []
    for step in range(max_new_tokens):
        longer = [
            ((*prefix, v), total + table[place(prefix), v])
            for prefix, total in running
            for v in range(V)
            if allowed(v, step)
        ]
        longer = sorted(longer, key=lambda found: -found[1])[: 2 * beams]
        done += [(y, float(total), True) for y, total in longer[:beams] if y[-1] == EOS]
        running = [(y, total) for y, total in longer if y[-1] != EOS][:beams]
        if early_stopping and len(done) >= beams:
            return best(done)
    return best(done + [(y, float(total), False) for y, total in running])


def as_lists(beams: Beams) -> list[Found]:
    rows = []
    for tokens, lengths, logps, finished in zip(beams.tokens, beams.length, beams.logp, beams.finished, strict=True):
        found = zip(tokens, lengths, logps, finished, strict=True)
        rows.append(
            [
                (tuple(int(t) for t in y[:length]), float(logp), bool(ends))
                for y, length, logp, ends in found
                if logp != -np.inf
            ]
        )
    return rows


def assert_same(found: list[Found], expected: list[Found]) -> None:
    assert [[(y, ends) for y, _, ends in row] for row in found] == [
        [(y, ends) for y, _, ends in row] for row in expected
    ]
    for row, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose([logp for _, logp, _ in row], [logp for _, logp, _ in wanted], rtol=1e-5)


def all_answers(table: Table, longest: int) -> Found:
    """Every finished answer and every prefix of full length, best first."""
    found: Found = []
    for length in range(1, longest + 1):
        for y in product(range(V), repeat=length):
            ends = y[-1] == EOS
            if EOS not in y[:-1] and (ends or length == longest):
                logp = sum(table[place(y[:t]), y[t]] for t in range(length))
                found.append((y, float(logp), ends))
    return sorted(found, key=lambda answer: (not answer[2], -answer[1]))


def test_wide_beams_find_everything() -> None:
    tables, longest = random_tables(3), 3
    found = search(tables, beams=64, max_new_tokens=longest)
    assert_same(as_lists(found), [all_answers(table, longest) for table in tables])
    # finished answers and full prefixes share out the whole probability
    np.testing.assert_allclose(np.exp(found.logp).sum(axis=1), 1.0, rtol=1e-5)


def test_one_beam_is_greedy() -> None:
    tables = random_tables(16, seed=1)
    greedy: list[Found] = []
    for table in tables:
        y: tuple[int, ...] = ()
        while len(y) < T and EOS not in y:
            y = (*y, int(table[place(y)].argmax()))
        greedy.append([(y, float(sum(table[place(y[:t]), y[t]] for t in range(len(y)))), y[-1] == EOS)])
    assert {len(row[0][0]) for row in greedy} == {1, 2, 3, 4}
    assert_same(as_lists(search(tables, beams=1, leave=True)), greedy)


@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_new_tokens": 2},
        {"length_penalty": 1.0},
        {"length_penalty": -0.5},
        {"early_stopping": True, "length_penalty": 1.0},
        {"forced_bos": 3},
        {"forced_eos": EOS, "length_penalty": 1.0},
        {"forced_bos": 1, "forced_eos": EOS},
    ],
    ids=str,
)
def test_equals_beam_search_on_lists(beams: int, settings: dict[str, Any]) -> None:
    """The lists never stop early unasked, so stopping early changes nothing; a forced token has its probability."""
    tables = random_tables(40, seed=2)
    found = search(tables, beams, **settings)
    assert_same(as_lists(found), [plain_search(table, beams, **settings) for table in tables])
    assert (np.exp(found.logp).sum(axis=1) <= 1 + 1e-5).all(), "distinct answers share one unit of probability"


def test_length_penalty_changes_the_order() -> None:
    tables = random_tables(40, seed=2)
    ways: list[dict[str, Any]] = [{"length_penalty": -0.5}, {}, {"length_penalty": 1.0}]
    short, none, long = (as_lists(search(tables, beams=2, **way)) for way in ways)
    lengths = [np.mean([len(row[0][0]) for row in found]) for found in (short, none, long)]
    assert lengths[0] < lengths[1] < lengths[2]


def test_early_stopping_takes_the_first_answers() -> None:
    """Here a longer answer, found later, is the better one per token."""
    table = np.full((1, (V + 1) ** (T - 1), V), -50.0, np.float32)
    table[0, place(()), [EOS, 3]] = -1.0, -0.9
    table[0, place((3,)), 3] = table[0, place((3, 3)), EOS] = 0.0
    better = as_lists(search(table, beams=1, length_penalty=1.0))
    assert better[0][0][0] == (3, 3, EOS)
    table[0, place(()), [EOS, 3]] = -0.9, -1.0
    assert as_lists(search(table, beams=1, length_penalty=1.0))[0][0][0] == (3, 3, EOS)
    assert as_lists(search(table, beams=1, length_penalty=1.0, early_stopping=True))[0][0][0] == (EOS,)


def test_forced_tokens_win_over_everything() -> None:
    found = search(random_tables(40, seed=8), beams=2, forced_bos=1, forced_eos=EOS)
    assert (np.asarray(found.tokens)[..., 0] == 1).all() and np.asarray(found.finished).all()
    both = search(random_tables(20, seed=8), beams=1, max_new_tokens=1, forced_bos=1, forced_eos=EOS)
    assert (np.asarray(both.tokens) == EOS).all() and (np.asarray(both.logp) > -np.inf).all()


def test_stops_early() -> None:
    """Once no running beam can enter the best W, the model is not asked again."""
    table = np.full((1, (V + 1) ** (T - 1), V), -9.0, np.float32)
    table[:, place(()), EOS] = 0.0
    asked: list[int] = []

    def counting(tokens: jax.Array, step: jax.Array, mask: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        jax.debug.callback(lambda number: asked.append(int(number)), step)
        return toy_next_logp(jnp.asarray(table), tokens, step, mask, cache)

    @jax.jit
    def run() -> Beams:
        return beam_search(counting, empty_pool(1, T), jnp.full(1, START, jnp.int32), settings_of(1))[0]

    found = jax.device_get(run())
    jax.effects_barrier()
    assert asked == [0]
    assert as_lists(found) == [[((EOS,), 0.0, True)]]


def test_finished_rows_leave() -> None:
    """Half of the rows end at once, a quarter after a token: they are not asked for longer than the company needs."""
    tables = random_tables(16, seed=6).copy()
    tables[8:, ..., EOS] = -20.0
    tables[:8, place(())] = tables[8:12, 1 : V + 1] = np.log([0.001, 0.001, 0.997, 0.001])
    order = np.random.default_rng(0).permutation(16)
    found, pool = jax.device_get(search_and_pool(tables[order], settings_of(1)))
    steps = np.empty(16, int)
    steps[order] = np.asarray(pool.steps)
    assert steps.tolist() == [1] * 8 + [2] * 4 + [4] * 4
    assert_same(as_lists(found), [plain_search(table, 1) for table in tables[order]])


def test_min_new_tokens_forbids_the_empty_answer() -> None:
    tables = random_tables(40, seed=3)
    assert any((EOS,) in [y for y, _, _ in row] for row in as_lists(search(tables, beams=2)))
    assert all(EOS not in y[:1] for row in as_lists(search(tables, beams=2, min_new_tokens=1)) for y, _, _ in row)


def test_unfinished_prefixes_come_last_and_are_padded_after_the_end() -> None:
    found = search(random_tables(40, seed=4), beams=5)
    finished, tokens, length = np.asarray(found.finished), np.asarray(found.tokens), np.asarray(found.length)
    assert (finished[:, :-1] >= finished[:, 1:]).all()
    assert finished.any(axis=1).any() and not finished.all()
    real = np.asarray(found.logp) > -np.inf
    assert (length[real & ~finished] == T).all()
    after = np.arange(T) >= length[..., None]
    assert (tokens[after & finished[..., None]] == PAD).all()
    last = np.take_along_axis(tokens, length[..., None] - 1, axis=-1)[..., 0]
    assert (last[finished] == EOS).all() and (tokens[real & ~finished] != EOS).all()


def test_batch_equals_rows_one_at_a_time() -> None:
    tables = random_tables(40, seed=5)
    alone = [search(tables[i : i + 1], beams=2) for i in range(len(tables))]
    joined = jax.tree.map(lambda *rows: np.concatenate(rows), *alone)
    chex.assert_trees_all_equal(search(tables, beams=2), joined)


def test_ties_go_to_the_lower_index() -> None:
    """Whole numbers add up exactly, so that ties are real; a stable sort keeps the lower beam and token."""
    shape = (40, (V + 1) ** (T - 1), V)
    tables = -np.random.default_rng(6).integers(1, 3, shape).astype(np.float32)
    found = search(tables, beams=2)
    expected = [plain_search(table, 2) for table in tables]
    assert as_lists(found) == expected
    assert any(row[0][1] == row[1][1] and row[0][2] == row[1][2] for row in expected)


def test_fewer_answers_than_beams() -> None:
    """With one new token there are only V answers; the other places are empty."""
    tables = random_tables(2, seed=7)
    found = search(tables, beams=8, max_new_tokens=1)
    assert_same(as_lists(found), [plain_search(table, 8, 1) for table in tables])
    assert [len(row) for row in as_lists(found)] == [V, V]
    assert not found.finished[:, 1:].any()


@pytest.mark.parametrize("shape", [(400, 24, 6), (3, 20, 1), (2, 3 * 4096, 64), (2, 5 * 4021, 9)], ids=str)
def test_blocks_find_what_top_k_finds(shape: tuple[int, int, int]) -> None:
    """To the bit, with ties within and between blocks, and with fewer possible continuations than asked for."""
    rows, length, count = shape
    rng = np.random.default_rng(length)
    logp = rng.normal(size=(rows, length)) * rng.choice([0.0, 1.0, 100.0], size=(rows, 1))
    logp = -np.abs(np.round(logp)) - 1.0
    logp = np.where(rng.random((rows, length)) < rng.choice([0.0, 0.5, 1.0], size=(rows, 1)), -np.inf, logp)
    logp = jnp.asarray(logp, jnp.float32)
    ways: list[Any] = [likeliest] + ([partial(likeliest_by_blocks, size=4)] if length < 100 else [])
    run = jax.jit(lambda logp: [way(logp, count) for way in (jax.lax.top_k, *ways)])
    (expected, at), *found = jax.device_get(run(logp))
    for best, index in found:
        np.testing.assert_array_equal(best, expected)
        np.testing.assert_array_equal(index, at)


def test_blocks_are_for_large_vocabularies() -> None:
    """A gather shows them: BART's and SmolLM2's shapes have them, a tiny one and one of a prime length do not."""

    def gathers(length: int) -> bool:
        shape = jax.ShapeDtypeStruct((2, length), jnp.float32)
        return "gather" in str(jax.make_jaxpr(lambda x: likeliest(x, 8))(shape))

    assert [gathers(length) for length in (50265, 4 * 49152, 4 * 64, 50257)] == [True, True, False, False]
