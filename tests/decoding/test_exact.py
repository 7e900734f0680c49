"""Exact decoding against the enumeration of all answers, over generators made of tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from compiling import one_loop
from reference import log_softmax
from tables import (
    EOS,
    NODES,
    SPECIAL,
    WORDS,
    Rows,
    T,
    answer_logp,
    marginals,
    node_of,
    random_tables,
    table,
    table_generator,
)

from ragjax.config import Decode
from ragjax.decoding import beam_search as beam_search_module
from ragjax.decoding.beam_search import BeamSettings, batch_sizes
from ragjax.decoding.candidates import Candidates
from ragjax.decoding.decode import decode_rag_sequence
from ragjax.decoding.exact.decode import decode_exact
from ragjax.decoding.exact.question import QuestionSearch
from ragjax.decoding.marginal_search import MarginalSearch, search_marginal
from ragjax.decoding.propose import prefill_documents
from ragjax.decoding.rag_token import decode_rag_token
from ragjax.marginal import TIE, is_best
from ragjax.models.generator import SpecialTokens
from ragjax.models.kv_cache import DocumentMemory

A, B, C = [(word,) for word in WORDS]
SEARCH = BeamSettings(2, T, EOS, 0, num_answers=5, most_beams=4)
CASES = 400
ROUNDING = 1e-4  # nats: of sums of at most T + 1 float32 log-probabilities that are below 60


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with one_loop():
        yield


def random_prior(rng: np.random.Generator, cases: int, documents: int) -> np.ndarray:
    """Best first, some alike, some documents missing, some questions without any."""
    prior = log_softmax(rng.normal(size=(cases, documents)) * rng.choice([0.0, 1.0, 3.0], size=(cases, 1)))
    prior = -np.sort(-prior, axis=1)
    missing = np.arange(documents) >= rng.choice([0, 1, *[documents] * 8], size=(cases, 1))
    prior = np.where(missing, -np.inf, prior)
    total = np.logaddexp.reduce(prior, axis=1, keepdims=True)
    return (prior - np.where(total == -np.inf, 0, total)).astype(np.float32)


def searched(tables: np.ndarray, prior: np.ndarray, settings: BeamSettings, by_token: bool) -> MarginalSearch:
    """One search of all cases together."""
    graph, params = table_generator(tables)
    rows = np.arange(prior.size, dtype=np.int32)
    memory = prefill_documents(graph, params, rows[:, None], np.ones((prior.size, 1), bool))
    nothing = np.full(len(tables), -np.inf, np.float32)
    given = (memory, rows.reshape(prior.shape), prior, nothing, nothing, settings, SPECIAL, by_token)
    return jax.device_get(search_marginal(graph, params, *given))


def nodes_of(found: MarginalSearch, b: int) -> list[int]:
    """The finished answers found for a question."""
    beams, nodes = found.beams, []
    for c in np.flatnonzero(beams.finished[b]):
        tokens = beams.tokens[b, c, : beams.length[b, c]]
        assert tokens[-1] == EOS
        nodes.append(node_of(tuple(int(t) for t in tokens[:-1])))
    return nodes


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("width", [1, 2])
def test_search_is_exact_and_its_bound_holds(width: int, by_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 questions, each with its own answers and priors: ties, near-ties, missing documents."""
    if width == 2 and not by_token:  # finished rows leave
        monkeypatch.setattr(beam_search_module, "batch_sizes", batch_sizes)
    rng = np.random.default_rng(width)
    tables, prior = random_tables(rng, 2000, 3), random_prior(rng, 2000, 3)
    truth = marginals(prior, tables, by_token)
    found = searched(tables, prior, replace(SEARCH, num_beams=width), by_token)
    proved = 0
    for b, logp in enumerate(found.beams.logp):
        nodes, unfinished = nodes_of(found, b), float(found.bound.unfinished[b])
        assert len(set(nodes)) == len(nodes)
        np.testing.assert_allclose(logp[: len(nodes)], truth[b, nodes], atol=ROUNDING)
        kept = float(logp[-1]) if len(nodes) == len(logp) else -np.inf
        assert np.delete(truth[b], nodes).max(initial=-np.inf) <= max(unfinished, kept) + ROUNDING
        if is_best(float(logp[0]), unfinished, -np.inf):
            assert truth[b, nodes[0]] >= truth[b].max() - TIE
            proved += 1
        there = prior[b] > -np.inf
        if not there.any():
            assert not nodes and found.bound.steps[b] == 0
        elif not by_token:
            under = answer_logp(tables[b, there])[:, nodes]
            np.testing.assert_allclose(found.doc_logp[b, there, : len(nodes)], under, atol=ROUNDING)
    assert proved > 1000
    assert (found.bound.steps <= T).all() and (found.bound.steps[prior[:, 0] > -np.inf] < T).any()


@pytest.mark.parametrize("by_token", [False, True])
def test_forbidden_tokens_only_take_probability_away(by_token: bool) -> None:
    """A least length, a forced first token, and a forced end at the limit."""
    rng = np.random.default_rng(3)
    tables, prior = random_tables(rng, 500, 3), random_prior(rng, 500, 3)
    how = replace(SEARCH, min_new_tokens=2, forced_bos=2, forced_eos=EOS)
    found, proved = searched(tables, prior, how, by_token), 0
    allowed = [node_of(B + y) for y in [(v,) for v in WORDS] + [(v, w) for v in WORDS for w in WORDS]]
    truth = np.full((500, NODES), -np.inf)
    truth[:, allowed] = marginals(prior, tables, by_token)[:, allowed]
    for b, logp in enumerate(found.beams.logp):
        nodes, unfinished = nodes_of(found, b), float(found.bound.unfinished[b])
        np.testing.assert_allclose(logp[: len(nodes)], truth[b, nodes], atol=ROUNDING)
        if is_best(float(logp[0]), unfinished, -np.inf):
            assert truth[b, nodes[0]] >= truth[b].max() - TIE
            proved += 1
    assert proved > 200


def decoded(
    tables: np.ndarray,
    prior: np.ndarray,
    by_token: bool = False,
    outside: np.ndarray | None = None,
    special: SpecialTokens = SPECIAL,
    **settings: Any,
) -> list[Candidates]:
    """All cases as one batch; document z of question b has table [b, z]."""
    graph, params = table_generator(tables)
    sources = np.arange(prior.size, dtype=np.int32)[:, None]
    how = Decode(mode="exact", num_docs=prior.shape[1], **{"num_beams": 2, "max_new_tokens": T, **settings})

    def read(rows: np.ndarray) -> DocumentMemory:
        return prefill_documents(graph, params, sources[rows], np.ones((len(rows), 1), bool))

    return decode_exact(graph, params, read, prior, outside, how, special, by_token)


def thoroughly(tables: np.ndarray, prior: np.ndarray, by_token: bool) -> list[Candidates]:
    graph, params = table_generator(tables)
    sources = np.arange(prior.size, dtype=np.int32)[:, None]
    memory = prefill_documents(graph, params, sources, np.ones(sources.shape, bool))
    decode = decode_rag_token if by_token else decode_rag_sequence
    settings = Decode(num_docs=prior.shape[1], max_new_tokens=T, num_beams=2)
    return decode(graph, params, memory, prior, settings, SPECIAL)


def answer_nodes(found: Candidates) -> list[int]:
    """The answers found, finished ones, best first."""
    return [node_of(y) for y, ends in zip(found.tokens, found.finished, strict=True) if ends]


def check(found: Candidates, prior: np.ndarray, tables: np.ndarray, truth: np.ndarray) -> bool:
    """One question against the enumeration: whether its best answer is proved.

    What is proved of the n best holds: whatever is not among the first i is no likelier than any of them.
    """
    nodes, proof, there = answer_nodes(found), found.proof, prior > -np.inf
    assert proof is not None and found.bounds is not None and proof.documents_read <= there.sum()
    for i in proof.top_k:
        assert truth[nodes[:i]].min() >= np.delete(truth, nodes[:i]).max(initial=-np.inf) - TIE
    for most in (1, 2, len(nodes)):
        ordered, together = proof.in_order(most)["top_k"], proof.as_set(most)["top_k"]
        assert ordered is not None and together is not None and ordered <= together <= most
        assert together == 0 or together in proof.top_k
        for i in range(ordered):
            assert truth[nodes[i]] >= np.delete(truth, nodes[: i + 1]).max(initial=-np.inf) - TIE
    lower, upper = found.bounds[:, : len(nodes)]
    assert (lower <= truth[nodes] + ROUNDING).all() and (truth[nodes] <= upper + ROUNDING).all()
    if found.doc_logp is not None and found.posterior is not None:
        under = answer_logp(tables[there])[:, nodes]
        np.testing.assert_allclose(found.doc_logp[there][:, : len(nodes)], under, atol=ROUNDING)
        assert (found.posterior[~there] == 0).all()
    return proof.best


@pytest.fixture(scope="module")
def cases() -> tuple[np.ndarray, np.ndarray]:
    """Tables and priors of `CASES` questions, their documents in any order."""
    rng = np.random.default_rng(7)
    tables, prior = random_tables(rng, CASES, 3), random_prior(rng, CASES, 3)
    order = rng.permuted(np.tile(np.arange(3), (CASES, 1)), axis=1)
    return tables, np.take_along_axis(prior, order, axis=1)


@pytest.fixture(scope="module")
def full(cases: tuple[np.ndarray, np.ndarray]) -> list[Candidates]:
    return decoded(*cases, start_beams=1, max_beams=2)


@pytest.mark.parametrize("by_token", [False, True])
def test_decoding_is_exact(cases: tuple[np.ndarray, np.ndarray], full: list[Candidates], by_token: bool) -> None:
    """Proved answers are the likeliest of all, no other is ever below thorough decoding's; few documents are read."""
    tables, prior = cases
    truth = marginals(prior, tables, by_token)
    exact = decoded(tables, prior, True, start_beams=1, max_beams=2) if by_token else full
    thorough = thoroughly(tables, prior, by_token)
    proved = read = there = 0
    for b, found in enumerate(exact):
        proved += check(found, prior[b], tables[b], truth[b])
        assert found.proof is not None and found.thorough_logp is not None
        if prior[b].max() == -np.inf:
            assert found.tokens == [()] and not found.finished.any() and found.marginal("exact") == -np.inf
            assert not found.proof.top_k and found.proof.documents_read == found.proof.steps == 0
            continue
        read, there = read + found.proof.documents_read, there + (prior[b] > -np.inf).sum()
        best = thorough[b].best("thorough")[0]
        if thorough[b].finished[best]:
            assert truth[b, answer_nodes(found)[0]] >= truth[b, node_of(thorough[b].tokens[best])] - TIE
        np.testing.assert_allclose(found.thorough_logp, truth[b, answer_nodes(found)], atol=ROUNDING)
    assert proved > CASES / 2
    assert read == there if by_token else read < 0.9 * there


def test_intervals_hold(cases: tuple[np.ndarray, np.ndarray], full: list[Candidates]) -> None:
    """Nothing is read for the probability alone; the choice is the same."""
    tables, prior = cases
    truth, wide = marginals(prior, tables, False), 0
    for b, found in enumerate(decoded(tables, prior, probability="interval", start_beams=1, max_beams=2)):
        check(found, prior[b], tables[b], truth[b])
        whole = full[b].proof
        assert found.proof is not None and whole is not None and found.bounds is not None
        assert (found.proof.documents_read, found.proof.steps) == (whole.documents_read, whole.steps)
        # what is known under all documents can only prove more: here of the best, elsewhere of as many as it holds
        assert whole.best or not found.proof.best
        if found.proof.best:
            assert truth[b, answer_nodes(found)[0]] >= truth[b, answer_nodes(full[b])[0]] - TIE
        known = found.proof.documents_read == (prior[b] > -np.inf).sum()
        assert (found.doc_logp is not None) == (found.thorough_logp is not None) == known
        wide += found.bounds[1, 0] > found.bounds[0, 0]
    assert wide > CASES / 8


def test_the_proof_over_the_corpus_counts_what_was_not_retrieved(cases: tuple[np.ndarray, np.ndarray]) -> None:
    """The documents outside are there in the truth, with tables of their own; where they hold too much, only top k."""
    tables, prior = cases
    rng = np.random.default_rng(8)
    share = rng.choice([0.0, 0.01, 0.2, 0.6], size=len(prior))
    inside = (prior + np.log1p(-share)[:, None]).astype(np.float32)
    whole = np.concatenate([inside, np.where(share > 0, np.log(np.maximum(share, 1e-9)), -np.inf)[:, None]], axis=1)
    truth = marginals(whole, np.concatenate([tables, random_tables(rng, len(tables), 1)], axis=1), False)
    truth_of_top_k = marginals(inside, tables, False)
    found = decoded(tables, inside, outside=share, prove="corpus", start_beams=1, max_beams=2)
    proved, only_top_k = dict.fromkeys(share, 0), 0
    for b, of_question in enumerate(found):
        nodes, proof = answer_nodes(of_question), of_question.proof
        assert proof is not None and proof.corpus is not None and set(proof.corpus) <= set(proof.top_k)
        for i in proof.corpus:
            assert truth[b, nodes[:i]].min() >= np.delete(truth[b], nodes[:i]).max() - TIE
        check(of_question, inside[b], tables[b], truth_of_top_k[b])
        proved[share[b]] += 1 in proof.corpus
        only_top_k += proof.best and 1 not in proof.corpus
        lower, upper = of_question.bounds[:, : len(nodes)]  # type: ignore[index]
        assert (lower <= truth[b, nodes] + ROUNDING).all() and (truth[b, nodes] <= upper + ROUNDING).all()
    assert proved[0.0] > proved[0.2] > CASES / 80 and proved[0.01] > CASES / 16 and proved[0.6] == 0
    assert only_top_k > CASES / 16


def test_other_questions_change_nothing(cases: tuple[np.ndarray, np.ndarray], full: list[Candidates]) -> None:
    """In another order each question has other neighbours, in other rounds."""
    order = np.random.default_rng(9).permutation(CASES)
    tables, prior = (x[order] for x in cases)
    for b, found in zip(order, decoded(tables, prior, start_beams=1, max_beams=2), strict=True):
        assert (found.tokens, found.proof) == (full[b].tokens, full[b].proof)
        np.testing.assert_allclose(found.marginal("exact"), full[b].marginal("exact"), atol=TIE)


HALVES = np.log(np.array([[0.5, 0.5]], np.float32))


def test_a_bound_belongs_to_the_documents_read() -> None:
    """z1 alone "proves" a with P = .3: what it dropped has .1. But under both documents P(b) = .6."""
    tables = np.stack([table({(): {0: 0.6, 2: 0.2, EOS: 0.2}}), table({(): {2: 1.0}})])[None]
    for lazy in (True, False):
        [found] = decoded(tables, HALVES, start_beams=1, max_beams=1, lazy=lazy, fallback="none")
        assert found.tokens[0] == B and found.proof is not None and found.proof.best
        np.testing.assert_allclose(np.exp(found.marginal("exact")[0]), 0.6, rtol=1e-5)


def test_a_set_is_proved_without_its_order() -> None:
    """z1 has .45 a, .225 b, .216 c: what z2 holds, .1, can turn b and c round, and bring nothing else before them."""
    z1 = table({(): {0: 0.5, 2: 0.25, 3: 0.24, EOS: 0.01}})
    prior = np.log(np.array([[0.9, 0.1]], np.float32))
    for z2 in (table({(): {3: 1.0}}), table({(): {EOS: 1.0}})):
        settings: dict[str, Any] = {"num_beams": 4, "start_beams": 3, "max_beams": 3, "fallback": "none"}
        tables = np.stack([z1, z2])[None]
        truth = np.argsort(-marginals(prior, tables, by_token=False)[0])
        [found] = decoded(tables, prior, probability="interval", **settings)
        assert found.tokens[:3] == [A, B, C] and found.proof is not None and found.proof.documents_read == 1
        assert found.proof.top_k == (1, 3) and set(truth[:3]) == {node_of(y) for y in (A, B, C)}
        assert found.proof.in_order(4) == {"top_k": 1, "corpus": None}
        assert [found.proof.as_set(most)["top_k"] for most in (1, 2, 3, 4)] == [1, 1, 3, 3]
        [full] = decoded(tables, prior, **settings)  # all four are known under both: in order
        assert [node_of(y) for y in full.tokens[:3]] == truth[:3].tolist() and full.proof is not None
        assert full.proof.in_order(3)["top_k"] == 3


@pytest.mark.parametrize("probability", ["full", "interval"])
def test_an_answer_found_with_fewer_documents_is_not_lost(probability: str) -> None:
    """The first search finds A, P = .275; that under both documents, one beam wide, follows B and never ends A.

    The second one dropped nothing likelier, so that A, scored under both, is proved.
    """
    third = {0: 0.34, 2: 0.33, 3: 0.33}
    tables = np.stack([table({(): {0: 0.55, 2: 0.45}, B: third}), table({(): {2: 1.0}, B: third})])[None]
    alone: dict[str, Any] = {"start_beams": 1, "max_beams": 1, "fallback": "none", "probability": probability}
    [found] = decoded(tables, HALVES, **alone)
    assert found.tokens[0] == A and found.finished[0] and found.proof is not None and found.proof.best
    assert marginals(HALVES, tables, by_token=False)[0].argmax() == node_of(A)
    assert np.exp(found.marginal("exact")[0]) == pytest.approx(0.275, rel=1e-5)
    assert found.bounds is not None and np.exp(found.bounds[1, 0]) == pytest.approx(0.275, rel=1e-5)


def test_what_did_not_end_is_no_rival() -> None:
    """At most one token: the empty answer is the only one, and so proved."""
    tables, prior = table({(): {0: 0.7, EOS: 0.3}})[None, None], np.zeros((1, 1), np.float32)
    [found] = decoded(tables, prior, max_new_tokens=1, start_beams=1, max_beams=1, fallback="none")
    assert found.tokens[0] == () and found.proof is not None and found.proof.top_k == (1,)


@pytest.mark.parametrize("by_token", [False, True])
def test_what_never_ends_is_unfinished_and_unproved(by_token: bool) -> None:
    """The one token there may be is forced: nothing ends, and the likeliest prefix is told as what it is."""
    tables, forced = table({(): {2: 0.25, EOS: 0.75}})[None, None], replace(SPECIAL, forced_bos=2)
    for settings in ({"fallback": "none", "probability": "interval"}, {"fallback": "thorough"}):
        how: dict[str, Any] = {"max_new_tokens": 1, "by_token": by_token, "special": forced, **settings}
        [found] = decoded(tables, np.zeros((1, 1), np.float32), start_beams=1, max_beams=1, **how)
        assert found.tokens == [B] and not found.finished.any() and found.proof is not None
        assert found.proof.top_k == () and found.proof.steps > 0
        np.testing.assert_allclose(np.exp(found.marginal("exact")), 0.25, rtol=1e-5)
    assert not is_best(-np.inf, -np.inf, -np.inf), "nor is an answer of probability 0"


def test_what_is_left_of_the_prior_is_nothing_when_all_is_read() -> None:
    """Not what a float32 sum leaves of 1."""
    left = 0
    for seed in range(20):
        scores = np.random.default_rng(seed).normal(size=10)
        prior = -np.sort(-log_softmax(scores)).astype(np.float32)
        question = QuestionSearch(0, prior, None, Decode())
        assert question.rest(False, 10) == -np.inf and np.exp(question.rest(False, 9)) == np.exp(
            prior[9:].sum(dtype=float)
        )
        left += 1 - np.exp(prior).cumsum()[-1] != 0
    assert left > 0


@pytest.mark.parametrize("probability", ["full", "interval"])
def test_no_probability_is_above_one(probability: str) -> None:
    """What is outside is told with its rounding: beside a certain answer that is more than is left of 1."""
    tables = np.stack([table({(): {0: 1.0}})] * 2)[None]
    alone: dict[str, Any] = {"start_beams": 1, "max_beams": 1, "fallback": "none", "probability": probability}
    for inside, outside in ((0.0, 1e-4), (float(np.log(np.float32(0.7))), 0.3 + 1e-4)):
        given, rest = np.array([[inside, -np.inf]], np.float32), np.array([outside])
        [found] = decoded(tables, given, outside=rest, prove="corpus", **alone)
        assert found.bounds is not None and found.tokens[0] == A
        lower, upper = np.exp(found.bounds[:, 0])
        assert lower <= upper <= 1 and lower == pytest.approx(np.exp(inside), rel=1e-5)
        assert upper == pytest.approx(1, rel=1e-5)


def test_every_end_is_an_answer() -> None:
    """Three tokens are likelier than the end: the empty answer is one all the same."""
    halves: Rows = {A: {0: 0.5, 2: 0.5}, B: {0: 0.5, 3: 0.5}, C: {2: 0.5, 3: 0.5}}
    tables = np.stack([table({(): {0: 0.3, 2: 0.25, 3: 0.25, EOS: 0.2}, **halves})] * 2)[None]
    prior = np.array([[0.0, -np.inf]], np.float32)
    [found] = decoded(tables, prior, num_beams=4, start_beams=3, max_beams=3, fallback="none")
    assert found.tokens[0] == () and found.proof is not None and found.proof.best
    np.testing.assert_allclose(np.exp(found.marginal("exact")[0]), 0.2, rtol=1e-5)


def test_rag_token_reads_all_documents() -> None:
    """With z1 alone a has .407, b and the rest of the prior .349: yet under both P(b) = .442."""
    certain: Rows = {prefix: {prefix[-1]: 1.0} for prefix in (A, A * 2, B, B * 2)}
    z1 = table({(): {0: 0.62, 2: 0.38}, **certain})
    z2 = table({(): {2: 1.0}, **certain, A: {2: 1.0}, A * 2: {2: 1.0}, A * 3: {2: 1.0}})
    prior = np.log(np.array([[0.9, 0.1]], np.float32))
    truth = marginals(prior, np.stack([z1, z2])[None], by_token=True)[0]
    [found] = decoded(np.stack([z1, z2])[None], prior, by_token=True, start_beams=2, max_beams=4, fallback="none")
    assert found.tokens[0] == B * 3 and found.proof is not None
    assert found.proof.best and found.proof.documents_read == 2
    np.testing.assert_allclose(np.exp([truth[node_of(A * 3)], truth[node_of(B * 3)]]), [0.407, 0.442], atol=1e-3)
