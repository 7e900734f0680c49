"""What an export tells of itself, and how it comes to the hub."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from push_server import push_server
from trained import files, refused

from ragjax.cli import main
from ragjax.config import load_config
from ragjax.errors import InputError
from ragjax.evaluation.metrics_table import metric_rows
from ragjax.evaluation.model_card import model_card

Capture = pytest.CaptureFixture[str]


def parts(card: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A card's metadata, and its text by heading."""
    _, metadata, text = card.split("---\n", 2)
    sections = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return yaml.safe_load(metadata), dict(zip(sections[1::2], sections[2::2], strict=True))


def test_a_run_is_pushed_with_its_card(run: Path, tmp_path: Path, capsys: Capture) -> None:
    own = tmp_path / "run"  # other tests may have evaluated the shared one
    shutil.copytree(run, own, ignore=shutil.ignore_patterns("metrics.json"))
    with push_server() as hub:
        assert main(["export", str(own), str(tmp_path / "out"), "--push", "hf:org/capitals"]) == 0
        assert capsys.readouterr().out.endswith(f"pushed: {hub.address}/org/capitals\n")
    pushed = hub.repositories["org/capitals"]
    assert pushed == {str(path.relative_to(tmp_path / "out")): data for path, data in files(tmp_path / "out").items()}
    metadata, text = parts(pushed["README.md"].decode())
    assert metadata == {
        "library_name": "ragjax", "tags": ["rag-sequence", "retrieval-augmented-generation"], "base_model": []
    }  # fmt: skip
    assert "30 in the index" in text["Data"] and text["Figures"].strip() == "Not evaluated."
    told = yaml.safe_load(text["Configuration"].strip().removeprefix("```yaml").removesuffix("```"))
    assert told["train"]["steps"] == 24 and told["corpus"]["source"] == "passages.jsonl"
    assert str(run.parent) not in pushed["README.md"].decode()
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_what_is_not_pushed(run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name or a login that will not do is told before anything is exported; what the hub refuses is whole here."""
    out = str(tmp_path / "out")
    assert "expected hf:ORG/NAME" in refused(capsys, tmp_path, "export", str(run), out, "--push", "org/x")
    assert "expected hf:ORG/NAME" in refused(capsys, tmp_path, "export", str(run), out, "--push", "hf:org/x@main")
    assert "cannot be pushed to" in refused(capsys, tmp_path, "export", str(run), out, "--push", "hf:org/x")
    with push_server() as hub:
        monkeypatch.setenv("HF_TOKEN", "hf_of_another")
        assert "`hf auth login`" in refused(capsys, tmp_path, "export", str(run), out, "--push", "hf:org/x")
        monkeypatch.undo()
        hub.forbidden = True
        assert main(["export", str(run), out, "--push", "hf:org/x"]) == 2
        assert f"{out} is whole: `hf upload org/x {out}` sends it" in capsys.readouterr().err
    assert main(["verify", out]) == 0


def test_the_figures_are_those_of_metrics_json(run: Path, tmp_path: Path) -> None:
    letters = f"questions.test={run.parent / 'letters.jsonl'}"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(run / "checkpoints")
    assert main(["evaluate", str(run / "config.yaml"), f"output={tmp_path}/run", letters]) == 0
    config = load_config(run / "config.yaml")
    _, text = parts(model_card(tmp_path / "run", config, 24, ["generator"]))
    models = json.loads((tmp_path / "run" / "metrics.json").read_text())["models"]
    head, _, *rows = [line.strip("| ").split(" | ") for line in text["Figures"].strip().splitlines()]
    assert head == ["8 questions of the test split", "untrained", "trained, step 24"]
    expected = metric_rows(list(models.values()))
    assert len(rows) == len(expected) > 10
    for (label, *cells), row in zip(rows, expected, strict=True):
        assert label == row.label
        for cell, value in zip(cells, row.values, strict=True):
            numbers = value if isinstance(value, list) else [] if value is None else [value]
            assert [float(number) for number in re.findall(r"[\d.]+", cell)] == pytest.approx(numbers, abs=5.01e-4)
    (tmp_path / "run" / "metrics.json").write_text('{"models": {}}')
    with pytest.raises(InputError, match=r"metrics\.json: split"):
        model_card(tmp_path / "run", config, 24, [])
    shutil.copy(run / "manifest.json", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest | {"index": 3}))
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        model_card(tmp_path / "run", config, 24, [])
