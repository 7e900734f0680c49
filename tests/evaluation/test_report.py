"""The report of a run: its figures are those of metrics.json, and no text of a corpus is obeyed."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_tree import Element, check_harmless
from trained import refused

from ragjax.cli import main
from ragjax.commands.comparing.report import write_report
from ragjax.errors import InputError
from ragjax.evaluation import report_page
from ragjax.evaluation.metrics_table import metric_rows
from ragjax.evaluation.run_results import answer_json, read_run_results
from ragjax.files import write_jsonl
from ragjax.metrics import calibration_bins, expected_calibration_error

PREDICTIONS = "predictions.jsonl"
FILES = ("config.yaml", "train.jsonl", "metrics.json", PREDICTIONS, "passages.jsonl")


def evaluated(run: Path, output: Path, *settings: str) -> Path:
    output.mkdir()
    (output / "checkpoints").symlink_to(run / "checkpoints")
    shutil.copy(run / "train.jsonl", output)
    common = [
        f"output={output}",
        f"questions.test={run.parent / 'letters.jsonl'}",
        "evaluate.max_untrained_questions=2",
    ]
    assert main(["evaluate", str(run / "config.yaml"), *common, *settings]) == 0
    (output / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(run), str(output)))
    return output


@pytest.fixture(scope="module")
def first(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluated(run, tmp_path_factory.mktemp("report") / "first")


@pytest.fixture(scope="module")
def second(run: Path, first: Path) -> Path:
    return evaluated(run, first.parent / "second", "evaluate.max_questions=6", "decode.num_docs=1")


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name in FILES:
        shutil.copy(folder / name, target)
    return target


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def report(*folders: Path, out: Path) -> list[Element]:
    html = write_report(folders, out).read_text(encoding="utf-8")
    assert len(html.encode()) < 2 << 20
    return check_harmless(html, scripts=1)


def test_predictions_keep_every_candidate_and_each_passage_once(run: Path, first: Path) -> None:
    answering = {line["question"]: line["passages"] for line in lines(run.parent / "letters.jsonl")}
    passages = {line["passage"]: line for line in lines(first / "passages.jsonl")}
    named = set()
    for line in lines(first / "predictions.jsonl"):
        prior = np.array([document["prior"] for document in line["documents"]])
        assert len(line["proposed"]) == line["candidates"] and 0 < line["mass_outside"] < 1
        assert line["proposed"][0]["text"] == line["answer"]
        assert line["proposed"][0]["thorough"] == pytest.approx(line["p_answer"], rel=1e-3)
        for of in line["proposed"]:
            given = np.array(of["given"])
            assert of["thorough"] == pytest.approx(prior @ given, rel=2e-3, abs=1e-9)
            beams = {int(z): p for z, p in of["beams"].items()}
            assert of["fast"] == pytest.approx(sum(prior[z] * p for z, p in beams.items()), rel=2e-3, abs=1e-9)
            assert all(p == pytest.approx(given[z], rel=5e-3, abs=1e-9) for z, p in beams.items())
        for document in line["documents"]:
            kept = passages[document["passage"]]
            assert (kept["id"], kept["title"]) == (document["id"], document["title"])
            assert document["right"] == (document["id"] in answering[line["question"]])
            named.add(document["passage"])
    assert named == passages.keys() and len(lines(first / "passages.jsonl")) == len(passages)


def test_mass_and_recall_over_k(first: Path) -> None:
    for model in json.loads((first / "metrics.json").read_text())["models"].values():
        assert model["mass_over_k"][2] == model["top_k_mass"] and np.all(np.diff(model["mass_over_k"]) > 0)
        assert [model["recall_over_k"][k - 1] for k in (1, 3, 5)] == [model[f"recall@{k}"] for k in (1, 3, 5)]


def test_figures_are_those_of_metrics_json(first: Path, tmp_path: Path) -> None:
    metrics = json.loads((first / "metrics.json").read_text())
    found = report(first, out=tmp_path / "report.html")
    seen = 0
    for cell in (element for element in found if "data-key" in element.attributes):
        value = reduce(getitem, cell.attributes["data-key"].split("."), metrics["models"])
        shown = [float(part) for part in re.findall(r"-?[\d.]+", cell.text)]
        expected = value if isinstance(value, list) else [] if value is None else [value]
        assert shown == pytest.approx(expected, abs=5.01e-4)
        seen += 1
    assert seen == sum(len(row.values) for row in metric_rows(list(metrics["models"].values()))) > 20
    trained = metrics["models"]["trained"]
    exact = {float(e.attributes["value"]) for e in found if e.tag == "data" and "value" in e.attributes}
    assert {trained["thorough"]["exact_match"], trained["gold_nll"], trained["calibration_error"]} <= exact
    titles = [
        e.attributes["aria-label"] for e in found if e.attributes.get("role") == "img" and "viewbox" in e.attributes
    ]
    told = [json.loads(line) for line in (first / "train.jsonl").read_text().splitlines()]
    loss = next(title for title in titles if title.startswith("Loss"))
    assert f"{told[0]['loss']:.4g} at step 1, {told[-1]['loss']:.4g} at {told[-1]['step']}" in loss
    assert [title.split(",")[0].split(".")[0] for title in titles][-3:] == [
        "Calibration",
        "Prior mass over k",
        "Recall over k",
    ]


def test_every_prediction_can_be_found_and_opened(first: Path, tmp_path: Path) -> None:
    found = report(first, out=tmp_path / "report.html")
    trained = [line for line in lines(first / "predictions.jsonl") if line["model"] == "trained"]
    items = [element for element in found if element.tag == "details"]
    assert len(items) == len(trained)
    flags = {
        "wrong": lambda line: line["scores"]["thorough"]["exact_match"] == 0,
        "differ": lambda line: line["answers"]["thorough"] != line["answers"]["fast"],
        "missed": lambda line: not any(document["right"] for document in line["documents"]),
        "low": lambda line: line["p_answer"] < 0.5,
    }
    for item, line in zip(items, trained, strict=True):
        assert item.attributes["data-flags"].split() == [name for name, holds in flags.items() if holds(line)]
        assert line["question"] in item.text and line["answer"] in item.text
        assert all(text in item.cells for text in ("1 Retrieval", "2 Proposals", "3 Marginal", "4 Answer"))
    counts = [element.cells for element in found if element.tag == "label"]
    assert counts[0] == f"wrong {sum(flags['wrong'](line) for line in trained)}"


def test_a_prediction_is_drawn_as_the_answer_it_was(run: Path, first: Path) -> None:
    results = read_run_results(first)
    texts = {line["id"]: line["text"] for line in lines(run.parent / "passages.jsonl")}
    for of in results.predictions["trained"]:
        answer = answer_json(of, results.passages)
        best, prior = answer["candidates"][0], [document["prior"] for document in answer["documents"]]
        assert (best["text"], answer["text"]) == (of.answer, of.answer)
        shares = np.array(prior) * best["doc_probability"]
        np.testing.assert_allclose(best["posterior"], shares / shares.sum(), rtol=5e-3, atol=1e-6)
        assert all(document["text"] == texts[document["id"]] for document in answer["documents"])


def test_calibration_bins_are_those_of_the_error(first: Path) -> None:
    results = read_run_results(first)
    of = results.predictions["trained"]
    confidence, right = np.array([p.p_answer for p in of]), np.array([p.right for p in of])
    bins = calibration_bins(confidence, right)
    error = sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / len(of)
    assert error == expected_calibration_error(confidence, right)
    assert error == pytest.approx(results.metrics["models"]["trained"]["calibration_error"])


def test_two_runs_side_by_side(first: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.html"
    capsys.readouterr()
    assert main(["report", str(first), str(second), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    found = report(first, second, out=out)
    text = next(e.cells for e in found if e.tag == "main")
    assert "6 questions were answered by both" in text and "Only 6 of 8 and 6 questions are the same." in text
    lines_of = [
        {line["id"]: line for line in lines(run / "predictions.jsonl") if line["model"] == "trained"}
        for run in (first, second)
    ]
    pairs = [(lines_of[0][key], line) for key, line in lines_of[1].items()]
    mean = np.mean([b["scores"]["thorough"]["f1"] - a["scores"]["thorough"]["f1"] for a, b in pairs])
    row = next(e.cells for e in found if e.tag == "tr" and e.text.startswith("thorough: F1"))
    assert row.split()[2] == f"{mean:+.3f}"
    assert main(["compare", str(first), str(second), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    of = next(of for of in told["measures"] if of["measure"] == "thorough: F1")
    assert (told["questions"], of["difference"]["mean"]) == (6, pytest.approx(mean))
    assert of["theirs"] - of["ours"] == pytest.approx(mean)
    metrics = [json.loads((run / "metrics.json").read_text())["models"] for run in (first, second)]
    for cell in (e for e in found if e.attributes.get("data-key", "").endswith("recall@1")):
        number, model, key = cell.attributes["data-key"].split(".")
        assert float(cell.text) == pytest.approx(metrics[int(number)][model][key], abs=5.01e-4)
    assert len([e for e in found if e.tag == "details"]) == 8


def test_runs_without_a_question_in_common_say_so(first: Path, tmp_path: Path) -> None:
    other = copied(first, tmp_path / "other")
    write_jsonl(other / PREDICTIONS, ({**line, "id": f"x{line['id']}"} for line in lines(first / PREDICTIONS)))
    found = report(first, other, out=tmp_path / "both.html")
    text = next(e.cells for e in found if e.tag == "main")
    assert "No question was answered by both" in text and "Only 0 of 8 and 8 questions are the same." in text
    assert len([e for e in found if e.tag == "details"]) == 16


def test_several_runs_in_a_folder(
    first: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of runs counts as all of them; one without any, or the same again, is refused."""
    both = tmp_path / "both"
    both.mkdir()
    for folder in (first, second):
        shutil.copytree(folder, both / folder.name, symlinks=True)
    capsys.readouterr()
    assert main(["compare", str(first), str(both)]) == 0
    out = capsys.readouterr().out
    assert "6 questions" in out and "thorough: F1" in out and "Only 6 of 8, 8 and 6 questions" in out
    assert "is the first folder again" in refused(capsys, tmp_path, "compare", str(both), str(both))
    assert "no run here, nor in the folders of it" in refused(capsys, tmp_path, "compare", str(first), str(tmp_path))


def test_hostile_texts_are_shown_and_not_obeyed(first: Path, tmp_path: Path) -> None:
    bad = '</script><script>alert(1)</script>"><img src=x onerror=alert(1)>\u202e\x1b[31m{{ 7*7 }}'
    evil = copied(first, tmp_path / "evil<b>")

    def changed(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: changed(of, name) for name, of in value.items()}
        if isinstance(value, list):
            return [changed(of, key) for of in value]
        return f"{value} {bad}" if isinstance(value, str) and key != "model" else value

    for name in ("predictions.jsonl", "passages.jsonl"):
        write_jsonl(evil / name, changed(lines(evil / name)))
    html = write_report([evil]).read_text(encoding="utf-8")
    found = check_harmless(html, scripts=1)
    assert "49" not in next(e.text for e in found if e.tag == "h1") and html.count("{{ 7*7 }}") > 50
    assert sum("<script>alert(1)</script>" in e.text for e in found if e.tag in ("bdi", "p", "code")) > 50
    assert "\u202e" not in html and "\x1b" not in html


def test_what_does_not_fit_is_left_out_and_told(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(write_report([first], tmp_path / "whole.html").read_bytes())
    monkeypatch.setattr(report_page, "LARGEST", limit := whole - 10_000)
    found = report(first, out=tmp_path / "half.html")
    assert (tmp_path / "half.html").stat().st_size <= limit + 500
    left = 8 - len([e for e in found if e.tag == "details"])
    assert 0 < left < 8 and f"{left} of 8 are left out of this page" in next(e.text for e in found if e.tag == "main")


def damage(folder: Path, name: str, change: Any) -> None:
    records = lines(folder / name)
    change(records[-1])
    write_jsonl(folder / name, records)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("predictions.jsonl", lambda line: line.pop("proposed"), "proposed: field required"),
        ("predictions.jsonl", lambda line: line.update(model="other"), "is about another model"),
        ("predictions.jsonl", lambda line: line["documents"][0].update(prior="much"), "documents.0.prior"),
        (
            "predictions.jsonl",
            lambda line: line["proposed"][0].update(given=[0.5]),
            "candidates and documents disagree",
        ),
        ("predictions.jsonl", lambda line: line["modes"].pop("fast"), "answers, scores, modes"),
        (
            "predictions.jsonl",
            lambda line: line.update(modes={}, answers={}, scores={}),
            "answers, sc",
        ),
        ("predictions.jsonl", lambda line: line["documents"][0].update(passage=10**6), "lacks passage 1000000"),
        ("passages.jsonl", lambda line: line.update(text=None), "text: input should be a valid string"),
        ("train.jsonl", lambda line: line.update(loss="low"), "no line of this log"),
    ],
)
def test_damaged_files_are_refused(first: Path, tmp_path: Path, name: str, change: Any, message: str) -> None:
    broken = copied(first, tmp_path / "broken")
    damage(broken, name, change)
    with pytest.raises(InputError, match=message):
        write_report([broken])
    assert not (broken / "report.html").exists()


def test_bad_arguments(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run here" in refused(capsys, tmp_path, "report", str(tmp_path))
    assert "is the first run again" in refused(capsys, tmp_path, "report", str(first), f"{first}/../{first.name}")
    assert "is a folder; name a file" in refused(capsys, tmp_path, "report", str(first), "--out", str(tmp_path))
    out = str(tmp_path / "none" / "report.html")
    assert "there is no folder" in refused(capsys, tmp_path, "report", str(first), "--out", out)
    unmeasured = copied(first, tmp_path / "unmeasured")
    (unmeasured / "metrics.json").unlink()
    assert "metrics.json: missing; run: ragjax evaluate" in refused(capsys, unmeasured, "report", str(unmeasured))


@pytest.mark.slow
def test_the_intervals_of_three_seeds_are_those_of_brute_force(world: Path, tmp_path: Path) -> None:
    """Each two runs that differ in their seed alone: every interval of the report against resampling by hand."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join((world / f"{split}.jsonl").read_text() for split in ("train", "dev", "test")))
    runs = []
    for seed in (1, 2, 3):
        runs.append(tmp_path / f"seed{seed}")
        settings = [f"output={runs[-1]}", f"seed={seed}", f"questions.test={questions}", "evaluate.max_questions=30"]
        settings += ["train.batch_size=2", "evaluate.max_untrained_questions=0"]
        assert main(["train", str(world / "config.yaml"), *settings]) == 0
        assert main(["evaluate", str(runs[-1])]) == 0
    compared, drawn = 0, np.random.default_rng(7).multinomial(30, np.full(30, 1 / 30), 40_000)  # how often each
    for pair in itertools.combinations(runs, 2):
        ours, theirs = (
            {line["id"]: line for line in lines(run / "predictions.jsonl") if line["model"] == "trained"}
            for run in pair
        )
        rows = [e.cells for e in report(*pair, out=tmp_path / "both.html") if e.tag == "tr"]
        for label, measure in DIFFERENCES.items():
            [shown] = [row.removeprefix(label) for row in rows if re.match(re.escape(label) + r" [+-]", row)]
            mean, low, high = (float(text) for text in re.findall(r"[+-][\d.]+", shown)[:3])
            differences = np.array([measure(theirs[key]) - measure(line) for key, line in ours.items()])
            means = np.sort(drawn @ differences / 30)
            assert mean == pytest.approx(differences.mean(), abs=5.01e-4)
            for share, end in ((0.025, low), (0.975, high)):  # the ranks that 9,999 and 40,000 draws can miss by
                slack = 4 * np.sqrt(share * (1 - share) * (1 / 9999 + 1 / 40_000))
                at_least, at_most = np.quantile(means, [max(0.0, share - slack), min(1.0, share + slack)])
                assert at_least - 5.01e-4 <= end <= at_most + 5.01e-4, shown
            compared += len(np.unique(differences)) > 1
    assert compared >= 6, "there is something to resample"


DIFFERENCES: dict[str, Callable[[dict[str, Any]], float]] = {
    "thorough: exact match": lambda line: line["scores"]["thorough"]["exact_match"],
    "thorough: F1": lambda line: line["scores"]["thorough"]["f1"],
    "closed book: F1": lambda line: line["scores"]["closed_book"]["f1"],
    "log p(gold answer), nats": lambda line: -line["gold_nll"],
    "a right passage is retrieved": lambda line: float(any(of["right"] for of in line["documents"])),
}
