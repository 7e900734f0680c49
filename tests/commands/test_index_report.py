"""The report on an index against brute force; its tables, its picture, and what it refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from trained import refused
from world import open_world, tiny_config

from ragjax.cli import main
from ragjax.commands.index_report import exact_by_shards, index_report
from ragjax.data.question_batch import tokenize_questions
from ragjax.data.questions import read_questions
from ragjax.marginal import marginal_bounds
from ragjax.parallel.mesh import local_mesh
from ragjax.retrieval.embeddings import Embeddings
from ragjax.retrieval.index import Index
from ragjax.retrieval.retrieve import encode_questions

Capture = pytest.CaptureFixture[str]


def world_scores(world: Path, **overrides: object) -> tuple[np.ndarray, np.ndarray, list[Any], Any]:
    """Of the training questions: all scores, the queries, the questions, and the index in use."""
    rag, index, _ = open_world(tiny_config(world, **overrides))
    questions = read_questions(world / "train.jsonl")
    batch = tokenize_questions(rag.tokenizers, [question.question for question in questions])
    queries = encode_questions(rag, rag.initial_params(), batch, local_mesh(data=1))
    return queries.astype(np.float64) @ np.asarray(index.embeddings, np.float64).T, queries, questions, index


@pytest.mark.parametrize("kind", ["exact", "PQ4x4"])
def test_the_report_is_brute_force(world: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PQ with 4 bits of 4 parts misses much, and is told so."""
    monkeypatch.setattr("ragjax.retrieval.index.OVERSAMPLE", 1)
    own = {"index__kind": kind, "index__path": str(tmp_path / "index"), "index__shard_size": 7}
    config = tiny_config(world, output=str(tmp_path / "run"), evaluate__split="train", **own)
    scores, queries, questions, index = world_scores(world, **own)
    report = index_report(config, count=1000)
    assert report["questions"] == 20 and report["step"] is None and report["index"]["N"] == 30
    assert [at["k"] for at in report["k"]] == [1, 2, 5, 10, 20]
    order = np.argsort(-scores, axis=1, kind="stable")
    weights = np.exp(config.retriever.logit_scale * scores)
    _, found = index.search(queries, 20)
    _, _, store = open_world(config)
    for at in report["k"]:
        k = at["k"]
        mass = np.take_along_axis(weights, order[:, :k], 1).sum(axis=1) / weights.sum(axis=1)
        assert at["mass"]["mean"] == pytest.approx(mass.mean(), rel=1e-4)
        assert at["mass"]["10 %"] == pytest.approx(np.quantile(mass, 0.1), rel=1e-4)
        assert at["unknown"]["worst"] == pytest.approx(1 - mass.min(), abs=1e-5)
        recall = np.mean(
            [len(set(f[:k]) & set(o[:k])) / k for f, o in zip(found.tolist(), order.tolist(), strict=True)]
        )
        assert at["recall"] == pytest.approx(recall)
        answered = [
            any(i >= 0 and q.answers[0] in store[i].text for i in ids[:k])
            for q, ids in zip(questions, found.tolist(), strict=True)
        ]
        assert at["answered"] == pytest.approx(np.mean(answered))
    recalls = [at["recall"] for at in report["k"]]
    assert recalls == [1.0] * 5 if kind == "exact" else min(recalls) < 1
    for share, k in report["smallest_k"].items():
        enough = [at["k"] for at in report["k"] if at["mass"]["median"] >= float(share)]
        assert k == (enough[0] if enough else None)
    assert json.loads((tmp_path / "run" / "index_report.json").read_text()) == report


def test_the_bound_is_that_of_the_marginal(world: Path, tmp_path: Path) -> None:
    """However an answer is spread over documents, p(y|x) lies within 1 − mass of what the top k give."""
    report = index_report(tiny_config(world, output=str(tmp_path / "run"), evaluate__split="train"), count=5)
    for at in report["k"]:
        mass = 1 - at["unknown"]["worst"]
        low, high = marginal_bounds(jnp.log(jnp.array([0.3 * mass])), jnp.log(jnp.array([mass])))
        assert np.exp(high[0]) - np.exp(low[0]) == pytest.approx(at["unknown"]["worst"], abs=1e-4)


@pytest.mark.parametrize("shard", [1, 7, 64])
def test_shard_by_shard_is_all_at_once(shard: int) -> None:
    """Ties too: few different integers."""
    rng = np.random.default_rng(0)
    vectors = rng.integers(-1, 2, size=(100, 3)).astype(np.float32)
    queries = rng.integers(-1, 2, size=(9, 3)).astype(np.float32)
    parts = Embeddings([vectors[i : i + shard] for i in range(0, 100, shard)])
    scores, ids, normalizer = exact_by_shards(parts, queries, 12, 0.5)
    whole = Index(Embeddings([vectors]), "exact", {})
    for found, expected in zip((scores, ids), whole.search(queries, 12), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(normalizer, np.log(np.exp(0.5 * queries @ vectors.T).sum(axis=1)), rtol=1e-5)


def test_the_command(world: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["index-report", str(world / "config.yaml"), f"output={tmp_path / 'run'}", "--questions", "4"]
    assert main([*command, "--plot", str(tmp_path / "plot.svg")]) == 0
    told = capsys.readouterr().out
    assert "exact, 30 passages, float32; 4 test questions, the pretrained encoder" in told
    for text in ("bytes a passage: embeddings 132", "p(y|x) known", "99 % of the prior", "questions/s"):
        assert text in told
    assert xml.etree.ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
    assert main([*command, "--plot", str(tmp_path / "plot.PNG"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [at["batch"] for at in report["latency"]] == [1, 8, 64]
    assert all(0 < at["median_ms"] <= at["p99_ms"] for at in report["latency"])
    assert (tmp_path / "plot.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_trained_run(run: Path, world: Path, tmp_path: Path) -> None:
    config = tiny_config(world, output=str(run))
    assert index_report(config, count=3)["step"] == 24
    (run / "index_report.json").unlink()


@pytest.mark.parametrize(
    ("plot", "message"),
    [("plot.pdf", "expected a name that ends in .png or .svg"), ("no/plot.png", "there is no folder")],
)
def test_a_plot_that_cannot_be_drawn(world: Path, tmp_path: Path, capsys: Capture, plot: str, message: str) -> None:
    command = ["index-report", str(world / "config.yaml"), f"output={tmp_path / 'run'}", "--plot", str(tmp_path / plot)]
    assert message in refused(capsys, tmp_path, *command)


def test_no_index(world: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["index-report", str(world / "config.yaml"), f"index.path={tmp_path / 'none'}"]
    assert "run: ragjax index CONFIG" in refused(capsys, tmp_path, *command)
