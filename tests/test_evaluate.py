"""Evaluation: the metrics follow from the predictions, and these add up, before and after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import STEPS

from ragjax.cli import main
from ragjax.evaluate import print_metrics
from ragjax.metrics import exact_match, expected_calibration_error, f1
from ragjax.questions import read_questions

Capture = pytest.CaptureFixture[str]
MODES = ("thorough", "fast", "closed_book")


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    """Measured on the eight questions that were trained on."""
    assert main(["evaluate", str(run / "config.yaml"), "evaluate.split=train"]) == 0
    return json.loads((run / "metrics.json").read_text())


@pytest.fixture(scope="module")
def made(run: Path, report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    lines = predictions(run)
    return {name: [line for line in lines if line["model"] == name] for name in report["models"]}


def test_before_and_after_stand_side_by_side(report: dict[str, Any]) -> None:
    untrained, trained = report["models"]["untrained"], report["models"]["trained"]
    assert (report["split"], report["decode"]["beams"]) == ("train", 2)
    assert (untrained["step"], trained["step"]) == (None, STEPS)
    assert (trained["questions"], trained["answered"]) == (8, 8)
    assert trained["thorough"]["exact_match"] >= 0.75 > 0.25 >= untrained["thorough"]["exact_match"]
    assert trained["gold_nll"] < 0.2 * untrained["gold_nll"]


def test_predictions_are_complete(run: Path, made: dict[str, list[dict[str, Any]]]) -> None:
    questions = read_questions(run.parent / "letters.jsonl")
    for lines in made.values():
        assert [line["question"] for line in lines] == [q.question for q in questions]
        assert [line["gold"] for line in lines] == [list(q.answers) for q in questions]
        for line in lines:
            assert line["answers"].keys() == set(MODES) and line["answer"] == line["answers"]["thorough"]
            assert len({document["id"] for document in line["documents"]}) == 3
            assert all(document["title"] for document in line["documents"])


def test_probabilities_add_up(made: dict[str, list[dict[str, Any]]]) -> None:
    for line in (line for lines in made.values() for line in lines):
        prior, given, posterior = (
            np.array([document[name] for document in line["documents"]]) for name in ("prior", "p_answer", "posterior")
        )
        np.testing.assert_allclose(prior.sum(), 1, rtol=1e-5)
        np.testing.assert_allclose(posterior.sum(), 1, rtol=1e-4)
        np.testing.assert_allclose(line["p_answer"], prior @ given, rtol=1e-4)
        np.testing.assert_allclose(posterior, prior * given / (prior @ given), rtol=1e-3, atol=1e-6)
        if line["finished"] and line["answer"] == line["gold"][0]:
            assert line["gold_nll"] == pytest.approx(-np.log(line["p_answer"]), rel=1e-2, abs=1e-4)


def test_metrics_follow_from_the_predictions(
    run: Path, report: dict[str, Any], made: dict[str, list[dict[str, Any]]]
) -> None:
    right = {q.question: q.passages for q in read_questions(run.parent / "letters.jsonl")}
    for name, lines in made.items():
        measured = report["models"][name]
        for mode in MODES:
            answers = [(line["answers"][mode], line["gold"]) for line in lines]
            assert measured[mode]["exact_match"] == pytest.approx(np.mean([exact_match(*pair) for pair in answers]))
            assert measured[mode]["f1"] == pytest.approx(np.mean([f1(*pair) for pair in answers]))
        for at in (1, 3):
            hits = [any(d["id"] in right[line["question"]] for d in line["documents"][:at]) for line in lines]
            assert measured[f"recall@{at}"] == pytest.approx(np.mean(hits))
        assert measured["recall@3"] <= measured["recall@5"] <= 1
        assert 3 / 30 * 0.5 < measured["top_k_mass"] < 1
        assert measured["gold_nll"] == pytest.approx(np.mean([line["gold_nll"] for line in lines]))
        assert measured["mean_candidates"] == np.mean([line["candidates"] for line in lines])
        differ = [line for line in lines if line["answers"]["thorough"] != line["answers"]["fast"]]
        assert measured["thorough_and_fast_differ"]["questions"] == len(differ)
        hit = [line["scores"]["thorough"]["exact_match"] for line in lines]
        error = expected_calibration_error(np.array([line["p_answer"] for line in lines]), np.array(hit, bool))
        assert measured["calibration_error"] == pytest.approx(error)


def test_the_size_of_batches_changes_nothing(run: Path, made: dict[str, list[dict[str, Any]]], capsys: Capture) -> None:
    settings = ["evaluate.split=train", "evaluate.batch_size=1", "evaluate.limit=2", "evaluate.untrained_limit=0"]
    capsys.readouterr()
    whole, lines = (run / "metrics.json").read_bytes(), (run / "predictions.jsonl").read_bytes()
    try:
        assert main(["evaluate", str(run / "config.yaml"), "--json", *settings]) == 0
        alone = predictions(run)
        shown = json.loads(capsys.readouterr().out)
        assert shown == json.loads((run / "metrics.json").read_text())
    finally:
        (run / "metrics.json").write_bytes(whole)
        (run / "predictions.jsonl").write_bytes(lines)
    assert shown["models"].keys() == {"trained"}
    assert (shown["models"]["trained"]["questions"], shown["models"]["trained"]["answered"]) == (8, 2)
    for one, other in zip(alone, made["trained"], strict=False):
        assert (one["id"], one["answers"]) == (other["id"], other["answers"])
        assert [d["id"] for d in one["documents"]] == [d["id"] for d in other["documents"]]
        for name in ("p_answer", "gold_nll"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3)


def test_fewer_questions_may_be_answered_before_training(
    run: Path, report: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    settings = [f"output={tmp_path}", "evaluate.split=train", "evaluate.untrained_limit=1", "evaluate.limit=3"]
    assert main(["evaluate", str(run / "config.yaml"), *settings, "evaluate.closed_book=false"]) == 0
    measured = json.loads((tmp_path / "metrics.json").read_text())["models"]
    assert (measured["untrained"]["answered"], measured["trained"]["answered"]) == (1, 3)
    assert [line["model"] for line in predictions(tmp_path)] == ["untrained"] + ["trained"] * 3
    assert "closed_book" not in measured["trained"]
    for name in ("recall@1", "top_k_mass"):  # these are of all questions
        assert measured["untrained"][name] == report["models"]["untrained"][name]
    assert "closed book" not in capsys.readouterr().out


def test_without_a_checkpoint_the_pretrained_models_are_measured(
    run: Path, report: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    settings = [f"output={tmp_path / 'new'}", "evaluate.untrained_limit=0", "evaluate.split=train"]
    assert main(["evaluate", str(run / "config.yaml"), *settings]) == 0
    table = capsys.readouterr().out
    assert "untrained" in table and "step " not in table
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["metrics.json", "predictions.jsonl"]
    measured = json.loads((tmp_path / "new" / "metrics.json").read_text())["models"]
    assert measured == {"untrained": report["models"]["untrained"]}


def test_the_table_names_every_measure(run: Path, report: dict[str, Any], capsys: Capture) -> None:
    print_metrics(report, as_json=False)
    table = " ".join(capsys.readouterr().out.split())
    named = ("recall@1", "recall@3", "recall@5", "prior mass", "thorough: exact match", "fast: F1", "closed book:")
    assert all(name in table for name in (*named, "gold answer", "calibration", "differ", f"trained, step {STEPS}"))
    assert f"{report['models']['trained']['thorough']['exact_match']:.3f}" in table
