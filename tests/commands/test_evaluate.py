"""Evaluation: the metrics follow from the predictions, and these add up, before and after training."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import STEPS

from ragjax.cli import main
from ragjax.commands import evaluate as evaluate_module
from ragjax.data.questions import read_questions
from ragjax.errors import InputError
from ragjax.evaluation.metrics_table import print_metrics
from ragjax.evaluation.predictions import summarise
from ragjax.files import write_jsonl
from ragjax.metrics import exact_match, expected_calibration_error, f1
from ragjax.parallel.mesh import local_mesh
from ragjax.runs.restore import load_artifacts
from ragjax.runs.run_dir import load_run_config

Capture = pytest.CaptureFixture[str]
MODES = ("thorough", "fast", "closed_book")
FILES = ("metrics.json", "predictions.jsonl", "passages.jsonl")


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
    assert (report["split"], report["decode"]["num_beams"]) == ("train", 2)
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


def test_the_size_of_batches_and_a_cache_change_nothing(
    run: Path, made: dict[str, list[dict[str, Any]]], capsys: Capture
) -> None:
    settings = [
        "evaluate.split=train",
        "evaluate.batch_size=1",
        "evaluate.max_questions=2",
        "evaluate.max_untrained_questions=0",
        "decode.passage_cache_gib=0.01",
    ]
    capsys.readouterr()
    before = {name: (run / name).read_bytes() for name in FILES}
    try:
        assert main(["evaluate", str(run / "config.yaml"), "--json", *settings]) == 0
        alone = predictions(run)
        shown = json.loads(capsys.readouterr().out)
        assert shown == json.loads((run / "metrics.json").read_text())
    finally:
        for name, data in before.items():
            (run / name).write_bytes(data)
    assert shown["models"].keys() == {"trained"}
    assert (shown["models"]["trained"]["questions"], shown["models"]["trained"]["answered"]) == (8, 2)
    cache = shown["models"]["trained"]["passage_cache"]
    # each of the two questions has a device, which keeps its own passages
    distinct = len({(line["line"], document["id"]) for line in alone for document in line["documents"]})
    assert (cache["passages"], cache["hits"], cache["hit_rate"]) == (6, 6 - distinct, 1 - distinct / 6)
    assert cache["tokens_saved"] == 1 - cache["tokens_read"] / cache["tokens"]
    for one, other in zip(alone, made["trained"], strict=False):
        assert (one["id"], one["answers"]) == (other["id"], other["answers"])
        assert [d["id"] for d in one["documents"]] == [d["id"] for d in other["documents"]]
        for name in ("p_answer", "gold_nll"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3)


def test_fewer_questions_may_be_answered_before_training(
    run: Path, report: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    settings = [
        f"output={tmp_path}",
        "evaluate.split=train",
        "evaluate.max_untrained_questions=1",
        "evaluate.max_questions=3",
    ]
    assert main(["evaluate", str(run / "config.yaml"), *settings, "evaluate.closed_book=false"]) == 0
    measured = json.loads((tmp_path / "metrics.json").read_text())["models"]
    assert (measured["untrained"]["answered"], measured["trained"]["answered"]) == (1, 3)
    assert [line["model"] for line in predictions(tmp_path)] == ["untrained"] + ["trained"] * 3
    assert "closed_book" not in measured["trained"]
    for name in ("recall@1", "top_k_mass"):  # these are of all questions
        assert measured["untrained"][name] == report["models"]["untrained"][name]
    assert "closed book" not in capsys.readouterr().out


SETTINGS = [
    "evaluate.split=test",
    "evaluate.max_untrained_questions=2",
    "evaluate.max_questions=10",
    "decode.num_beams=1",
]


def bad_questions(run: Path, folder: Path) -> Path:
    """The eight questions, of which the first is learnt by heart, and four that cannot be asked among them."""
    good = [json.dumps(json.loads(line)).encode() for line in (run.parent / "letters.jsonl").read_text().splitlines()]
    long = json.dumps({"question": "long " * 60, "answer": ["x"], "id": "long"}).encode()
    bad = [long, b'{"question": "caf\xe9?", "answer": ["x"]}', b"", b'{"question": "Where?", "answer": []}', b"{}"]
    (folder / "test.jsonl").write_bytes(b"\n".join([good[0], *bad, *good[1:]]))
    return folder / "test.jsonl"


def evaluated(run: Path, output: Path, *settings: str) -> int:
    """In a folder of its own, which has the checkpoints of `run`."""
    output.mkdir(exist_ok=True)
    if not (output / "checkpoints").exists():
        (output / "checkpoints").symlink_to(run / "checkpoints")
    return main(["evaluate", str(run / "config.yaml"), f"output={output}", *SETTINGS, *settings])


def test_a_bad_question_costs_one_question(run: Path, tmp_path: Path, capsys: Capture) -> None:
    """It counts as wrong and not found; the figures without it stand beside these, and equal those of a clean file."""
    path = bad_questions(run, tmp_path)
    assert evaluated(run, tmp_path / "bad", f"questions.test={path}") == 0
    out, err = capsys.readouterr()
    assert "4 of 12 questions cannot be used and are left out" in err and f"{path}:2: a prompt needs 3" in err
    report = json.loads((tmp_path / "bad" / "metrics.json").read_text())
    assert [of["line"] for of in report["left_out"]] == [2, 3, 5, 6] and report["left_out"][0]["id"] == "long"
    clean = f"questions.test={run.parent / 'letters.jsonl'}"
    assert (
        evaluated(run, tmp_path / "clean", clean, "evaluate.max_questions=6", "evaluate.max_untrained_questions=1") == 0
    )
    theirs = json.loads((tmp_path / "clean" / "metrics.json").read_text())
    assert "left_out" not in theirs and "could be" not in capsys.readouterr().out
    for name, asked, answered in (("trained", 10, 6), ("untrained", 2, 1)):
        ours, without = report["models"][name], theirs["models"][name]
        assert (ours["questions"], ours["answered"], ours["unanswerable"]) == (12, answered, asked - answered)
        for mode in MODES:
            assert ours["answerable"][mode] == without[mode]
            for figure in ("exact_match", "f1"):
                assert ours[mode][figure] == pytest.approx(without[mode][figure] * answered / asked)
            low, high = ours[mode]["exact_match_interval"]
            assert low <= ours[mode]["exact_match"] <= high
        for at in (1, 3, 5):
            assert ours["answerable"][f"recall@{at}"] == without[f"recall@{at}"]
            assert ours[f"recall@{at}"] == pytest.approx(without[f"recall@{at}"] * 8 / 12)
        same = ("gold_nll", "calibration_error", "mean_candidates", "thorough_and_fast_differ", "top_k_mass")
        assert all(ours[key] == without[key] for key in same)
        assert "answerable" not in without and "unanswerable" not in without
    table = " ".join(out.split())
    assert "12 test questions 1 answered, 1 not 6 answered, 4 not" in table
    assert table.count("of those that could be asked") == 3 + 3 * 3
    lines = predictions(tmp_path / "bad")
    assert {line["version"] for line in lines} == {1}
    trained = [line for line in lines if line["model"] == "trained"]
    assert [line["line"] for line in trained] == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert [line["line"] for line in trained if "error" in line] == [2, 3, 5, 6]
    assert trained[1].keys() == {"version", "model", "line", "id", "question", "gold", "error"}


def test_questions_of_which_none_could_be_asked(run: Path, tmp_path: Path) -> None:
    """Of the first `evaluate.max_questions`; what cannot be measured is null, not NaN."""
    path = bad_questions(run, tmp_path)
    first, *others = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*others, first]))
    assert (
        evaluated(
            run,
            tmp_path / "run",
            f"questions.test={path}",
            "evaluate.max_questions=3",
            "evaluate.max_untrained_questions=0",
        )
        == 0
    )
    text = (tmp_path / "run" / "metrics.json").read_text()
    measured = json.loads(text)["models"]["trained"]
    assert (measured["answered"], measured["unanswerable"]) == (0, 3) and "NaN" not in text
    assert measured["thorough"] == {
        "exact_match": 0.0,
        "exact_match_interval": [0.0, 0.0],
        "f1": 0.0,
        "rouge_l": 0.0,
        "contains": 0.0,
        "equal_as_nothing": 0,
        "empty": None,
        "one_token": None,
    }
    assert measured["answerable"]["thorough"]["exact_match"] is None and measured["gold_nll"] is None


def test_a_gold_answer_for_which_there_is_no_room(run: Path, tmp_path: Path) -> None:
    """Is not measured, and costs nothing else."""
    records = [json.loads(line) for line in (run.parent / "letters.jsonl").read_text().splitlines()[:2]]
    records[0]["answer"] = ["x " * 500]
    write_jsonl(tmp_path / "test.jsonl", records)
    settings = [
        f"questions.test={tmp_path / 'test.jsonl'}",
        "evaluate.max_untrained_questions=0",
        "evaluate.closed_book=false",
    ]
    assert evaluated(run, tmp_path / "run", *settings) == 0
    first, second = predictions(tmp_path / "run")
    assert first["gold_nll"] is None and first["answer"] and second["gold_nll"] > 0
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["models"]["trained"]
    assert measured["gold_nll"] == second["gold_nll"]


def test_an_evaluation_goes_on_where_it_was_stopped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """After Ctrl-C, and after a kill in the middle of a line; the files are those of one that was not, to the byte."""
    asked = f"questions.test={bad_questions(run, tmp_path)}"
    made, predict, retrieve = [], evaluate_module._predict, evaluate_module.retrieve

    def counted(*given: Any) -> list[dict[str, Any]]:
        made.append([question.line for question in given[-1]])
        if len(made) == stop:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)  # until its handler has run
        return predict(*given)

    def searched(*given: Any) -> Any:
        searches.append(1)
        return retrieve(*given)

    monkeypatch.setattr(evaluate_module, "_predict", counted)
    monkeypatch.setattr(evaluate_module, "retrieve", searched)
    monkeypatch.setattr(evaluate_module, "command_mesh", lambda *_: local_mesh(data=1))  # so that there are several
    stop, searches = 0, list[int]()
    assert evaluated(run, tmp_path / "whole", asked) == 0
    whole, of_whole = list(made), len(searches)
    made.clear()

    pieces, partial = tmp_path / "pieces", tmp_path / "pieces" / "predictions.0.partial"
    stop = len(whole)
    capsys.readouterr()
    assert evaluated(run, pieces, asked) == 130
    assert "what was measured is kept; the same command goes on" in capsys.readouterr().err
    assert sorted(path.name for path in pieces.iterdir()) == ["checkpoints", partial.name]
    partial.write_bytes(partial.read_bytes()[:-10])
    made.clear()
    searches.clear()
    stop = 0
    assert evaluated(run, pieces, asked) == 0
    assert made == whole[-2:], "the one that was stopped, and the one whose line was cut"
    assert of_whole > 0 and len(searches) == 0
    assert "going on with an evaluation that was stopped" in capsys.readouterr().err
    for name in FILES:
        assert (pieces / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in pieces.iterdir()) == sorted(["checkpoints", *FILES])

    made.clear()
    stop = len(whole)
    assert evaluated(run, pieces, asked) == 130
    before = {name: (pieces / name).read_bytes() for name in ("metrics.json", "predictions.jsonl")}
    made.clear()
    stop = 0
    assert evaluated(run, pieces, asked, "retriever.logit_scale=5.0") == 0, "another one begins anew"
    assert made == whole and not partial.exists()
    assert all((pieces / name).read_bytes() != old for name, old in before.items())


def test_an_evaluation_is_bound_to_its_checkpoint(run: Path, tmp_path: Path) -> None:
    """And to its questions, settings, index and software."""
    rag, _, _ = load_artifacts(load_run_config(run))
    mesh, prints = local_mesh(data=1), {"questions": "x"}
    binding = evaluate_module._evaluation(rag, prints, STEPS, mesh)
    assert binding == evaluate_module._evaluation(rag, prints, STEPS, mesh)
    moved = dataclasses.replace(rag, config=rag.config.replace(output=str(tmp_path)))
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    assert binding == evaluate_module._evaluation(moved, prints, STEPS, mesh)
    saved = tmp_path / "checkpoints" / str(STEPS) / "_CHECKPOINT_METADATA"
    saved.write_bytes(saved.read_bytes() + b" ")
    other = dataclasses.replace(rag, config=rag.config.replace(model="rag_token"))
    others = [(moved, prints, STEPS), (other, prints, STEPS), (rag, {"questions": "y"}, STEPS), (rag, prints, None)]
    assert all(evaluate_module._evaluation(*given, mesh) != binding for given in others)
    assert evaluate_module._evaluation(rag, prints, STEPS, local_mesh(data=2)) != binding


def test_without_a_checkpoint_the_pretrained_models_are_measured(
    run: Path, report: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    settings = [f"output={tmp_path / 'new'}", "evaluate.max_untrained_questions=0", "evaluate.split=train"]
    assert main(["evaluate", str(run / "config.yaml"), *settings]) == 0
    table = capsys.readouterr().out
    assert "untrained" in table and "step " not in table
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(FILES)
    measured = json.loads((tmp_path / "new" / "metrics.json").read_text())["models"]
    assert measured == {"untrained": report["models"]["untrained"]}


def test_the_table_names_every_measure(run: Path, report: dict[str, Any], capsys: Capture) -> None:
    print_metrics(report, as_json=False)
    table = " ".join(capsys.readouterr().out.split())
    named = (
        "recall@1",
        "recall@3",
        "recall@5",
        "prior mass",
        "thorough: exact match",
        "fast: F1",
        "contained",
        "closed book:",
    )
    assert all(name in table for name in (*named, "gold answer", "calibration", "differ", f"trained, step {STEPS}"))
    assert f"{report['models']['trained']['thorough']['exact_match']:.3f}" in table


def test_modes_are_measured_apart(
    run: Path, made: dict[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Exact and thorough, stopped in the second pass: both answer as they do alone, and metrics follow from lines."""
    asked, predict = list[tuple[Any, ...]](), evaluate_module._predict

    def counted(*given: Any) -> list[dict[str, Any]]:
        if len(asked) == stop:
            raise InputError("stopped")
        asked.append((*given[1], given[-1][0].line))
        return predict(*given)

    monkeypatch.setattr(evaluate_module, "_predict", counted)
    monkeypatch.setattr(evaluate_module, "command_mesh", lambda *_: local_mesh(data=1))  # batches of 2
    settings = [
        f"questions.test={run.parent / 'letters.jsonl'}",
        "evaluate.modes=[exact,thorough]",
        "evaluate.max_untrained_questions=0",
        "evaluate.max_questions=4",
        "evaluate.batch_size=2",
        "evaluate.closed_book=false",
        "decode.num_beams=2",
    ]
    output, stop = tmp_path / "run", 3
    assert evaluated(run, output, *settings) == 2
    stop = -1
    assert evaluated(run, output, *settings) == 0
    every = [(*mode, line) for mode in (["exact"], ["thorough"], []) for line in (1, 3)]
    assert asked == every, "what was done is not done again"
    lines = predictions(output)
    measured = json.loads((output / "metrics.json").read_text())["models"]["trained"]
    for line, alone in zip(lines, made["trained"], strict=False):
        exact, thorough = line["modes"]["exact"], line["modes"]["thorough"]
        assert line["answers"]["thorough"] == alone["answer"] and line["answer"] == line["answers"]["exact"]
        np.testing.assert_allclose(thorough["p_answer"], alone["p_answer"], rtol=1e-3)
        np.testing.assert_allclose(line["gold_nll"], alone["gold_nll"], rtol=1e-3)
        assert exact["p_answer"] >= thorough["p_answer"] * (1 - 2e-3) and line["p_answer"] == exact["p_answer"]
        assert 1 <= exact["documents_read"] <= 3 and exact["seconds"] > 0 and "proved" not in thorough
        np.testing.assert_allclose(exact["p_answer"], sum(d["prior"] * d["p_answer"] for d in line["documents"]), 1e-3)
    assert measured["exact"]["proved"]["top_k"] == np.mean(
        [line["modes"]["exact"]["proved"]["top_k"] for line in lines]
    )
    for name in ("documents_read", "steps"):
        assert measured["exact"][name] == np.mean([line["modes"]["exact"][name] for line in lines])
    for mode in ("exact", "thorough"):
        seconds = [line["modes"][mode]["seconds"] for line in lines]
        assert measured[mode]["seconds_per_question"] == pytest.approx(np.median(seconds))
        assert measured[mode]["one_token"] == np.mean([line["modes"][mode]["tokens"] == 1 for line in lines])
        assert measured[mode]["empty"] == np.mean([line["answers"][mode] == "" for line in lines])
    differ = [line for line in lines if line["answers"]["exact"] != line["answers"]["thorough"]]
    assert measured["exact_and_thorough_differ"]["questions"] == len(differ)
    table = " ".join(capsys.readouterr().out.split())
    named = ("exact: exact match", "proved under the top k", "documents read", "seconds a question", "one token")
    assert all(name in table for name in (*named, "exact and thorough differ")) and "fast" not in table


def test_exact_and_thorough_are_compared_where_they_differ() -> None:
    """By what is right, and by the probabilities of both."""
    score = {"exact_match": 1.0, "f1": 1.0, "rouge_l": 1.0, "contains": 1.0, "equal_as_nothing": False}
    wrong = {"exact_match": 0.0, "f1": 0.0, "rouge_l": 0.0, "contains": 0.0, "equal_as_nothing": False}
    proved = {"proved": {"top_k": True, "corpus": None}, "documents_read": 2, "steps": 3}

    def line(exact: str, thorough: str, p: float, right: bool) -> dict[str, Any]:
        return {
            "answers": {"exact": exact, "thorough": thorough},
            "scores": {"exact": score if right else wrong, "thorough": wrong},
            "modes": {"exact": {"p_answer": p, "tokens": 1} | proved, "thorough": {"p_answer": 0.25, "tokens": 2}},
            "p_answer": p,
            "gold_nll": None,
            "candidates": 2,
        }

    made = [line("a", "a", 0.9, False), line("", "b", 0.5, True), line("c", "d", 0.75, False)]
    measured = summarise(made, 0, ["exact", "thorough"])
    assert measured["exact_and_thorough_differ"] == {
        "questions": 2,
        "exact_right": 1,
        "thorough_right": 0,
        "exact_p_answer": 0.625,
        "thorough_p_answer": 0.25,
    }
    assert (measured["exact"]["empty"], measured["exact"]["one_token"], measured["thorough"]["one_token"]) == (
        1 / 3,
        1,
        0,
    )
    assert measured["exact"]["proved"] == {"top_k": 1, "corpus": None}
