"""Answers of 256 tokens: every way to decode gives them, in the memory that the plan tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from world import build, tiny_config

from ragjax.answerer import Answerer, open_answerer
from ragjax.answering import batch_answerer
from ragjax.config import Config
from ragjax.data.question_batch import question_batch
from ragjax.decoding import decode as decode_module
from ragjax.decoding import hf_compat, prefix_cache, rag_token
from ragjax.decoding.candidates import Candidates, pad_answers
from ragjax.decoding.exact import decode as exact_module
from ragjax.decoding.rescore import MOST_TOKENS, score_tokens
from ragjax.parallel.by_device import on_mesh
from ragjax.planning import train_rows
from ragjax.planning.plan import memory_plan

pytestmark = pytest.mark.slow

LONGEST, SHORTEST = 256, 250
QUESTIONS = ["Capital of Arland?", "Capital of Belmark?"]  # one on each of two devices
GOLD = [[5 + i % 90 for i in range(200)]] * 2
PROGRAMS = {
    batch_answerer: ["prefill_documents", "score_tokens"],
    decode_module: ["beam_search_documents"],
    hf_compat: ["beam_search_documents", "score_tokens"],
    prefix_cache: ["extend_prefixes", "edge_logp"],
    rag_token: ["search_rag_token"],
    exact_module: ["search_marginal", "score_tokens"],
}


def long(world: Path, **settings: object) -> Config:
    return tiny_config(
        world,
        decode__max_new_tokens=LONGEST,
        decode__min_new_tokens=SHORTEST,
        generator__max_answer_tokens=LONGEST,
        evaluate__batch_size=1,
        **settings,
    )


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The temporaries of each program of answering that runs, on each device, by its name."""
    found: dict[str, int] = {}
    programs: dict[Any, Any] = {}  # a search calls some of them in every round

    def measured(name: str, program: Any) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            leaves, tree = jax.tree.flatten(given)
            at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

            def whole(arrays: list[Any]) -> Any:
                traced = dict(zip(at, arrays, strict=True))
                return program(*jax.tree.unflatten(tree, [traced.get(i, leaf) for i, leaf in enumerate(leaves)]))

            arrays = [leaves[i] for i in at]
            kinds = [(jax.typeof(array), getattr(array, "sharding", None)) for array in arrays]
            others = [leaf for i, leaf in enumerate(leaves) if i not in at]
            key = program, tree, *kinds, *others
            if key not in programs:
                programs[key] = jax.jit(whole).lower(arrays).compile()
                analysis = programs[key].memory_analysis()
                assert analysis is not None
                found[name] = max(found.get(name, 0), analysis.temp_size_in_bytes)
            return programs[key](arrays)

        return run

    for module, names in PROGRAMS.items():
        for name in names:
            monkeypatch.setattr(module, name, measured(name, getattr(module, name)))
    return found


def planned(config: Config, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(train_rows, "trace_step", lambda *_: jax.jit(jnp.sin).trace(1.0))  # not the question here
    rows = {(row.command, row.what): row.size for row in memory_plan(config).rows}
    return int(rows["evaluate", "temporaries of answering"] or 0)


def answered(answerer: Answerer, mode: str) -> list[Candidates]:
    batch = question_batch(answerer.rag.tokenizers, QUESTIONS)
    candidates, gold = answerer.candidates(batch, answerer.retrieve(batch, QUESTIONS), mode, GOLD)
    assert gold is not None and (gold < 0).all()
    for own in candidates:
        assert all(SHORTEST <= len(tokens) <= LONGEST for tokens in own.tokens)
        assert answerer.text(own.tokens[own.best(mode)[0]])
    return candidates


def test_rag_sequence(world: Path, taken: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores from the prefix cache, in passes, are those of whole answers; certified chooses the same."""
    config = long(world, decode__max_beams=2, evaluate__modes=["thorough", "certified", "fast", "exact"])
    build(config)
    answerer = open_answerer(config, untrained=True)
    candidates = {mode: answered(answerer, mode) for mode in ("thorough", "certified", "fast", "exact")}
    batch = question_batch(answerer.rag.tokenizers, QUESTIONS)
    read, ids, _ = answerer.document_reader(batch, answerer.retrieve(batch, QUESTIONS))
    special, params = answerer.rag.special, answerer.params["generator"]
    answers = [[*zip(own.tokens, own.finished.tolist(), strict=True)] for own in candidates["thorough"]]
    tokens, lengths = pad_answers(answers, special, LONGEST)
    assert tokens.shape[1] * LONGEST > MOST_TOKENS
    with on_mesh(answerer.mesh):
        memory = read(np.arange(ids.size))
        logp = np.asarray(score_tokens(answerer.rag.generator.graphdef, params, memory, tokens, lengths, special))
    for b, own in enumerate(candidates["thorough"]):
        assert own.doc_logp is not None
        np.testing.assert_allclose(own.doc_logp, logp[b, :, : len(own.tokens)].sum(axis=-1), rtol=2e-5)
        best = own.best("thorough")[0]
        assert candidates["certified"][b].tokens[candidates["certified"][b].best("certified")[0]] == own.tokens[best]
    told = planned(config, monkeypatch)
    assert 0.5 * told <= max(taken.values()) <= 1.02 * told, taken


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({"model": "rag_token", "decode__max_beams": 2}, ("thorough", "exact")),
        ({"hf_compatible": True, "generator__source": "random:bart"}, ("thorough",)),
    ],
)
def test_other_models(
    world: Path,
    tmp_path: Path,
    taken: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, object],
    modes: tuple[str, ...],
) -> None:
    config = long(world, evaluate__modes=list(modes), index__path=str(tmp_path / "index"), **settings)
    build(config)
    answerer = open_answerer(config, untrained=True)
    for mode in modes:
        answered(answerer, mode)
    assert max(taken.values()) <= 1.02 * planned(config, monkeypatch), taken
