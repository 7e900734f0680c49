"""Published forms of corpora and questions go through index, train, evaluate and answer without a conversion."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragjax.cli import main
from ragjax.retrieval.index import read_index_manifest

Records = list[dict[str, Any]]


def flashrag(folder: Path, passages: Records, questions: Records) -> tuple[str, str]:
    """A folder of two packed files, the second under a plain name; questions with golden answers."""
    (folder / "wiki").mkdir()
    lines = [json.dumps({"id": p["id"], "contents": f'"{p["title"]}"\n{p["text"]}'}) + "\n" for p in passages]
    (folder / "wiki" / "0.jsonl.gz").write_bytes(gzip.compress("".join(lines[:17]).encode()))
    (folder / "wiki" / "1.jsonl").write_bytes(gzip.compress("".join(lines[17:]).encode()))
    asked = [
        {"id": f"test_{i}", "question": q["question"], "golden_answers": q["answer"]} for i, q in enumerate(questions)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))
    return f"{folder}/wiki/*", str(folder / "q.jsonl")


def parquet_and_squad(folder: Path, passages: Records, questions: Records) -> tuple[str, str]:
    """wiki_dpr's columns, and one JSON object of SQuAD's form."""
    pq.write_table(pa.Table.from_pylist([p | {"embeddings": [0.5, 0.25]} for p in passages]), folder / "wiki.parquet")
    qas = [
        {"id": str(i), "question": q["question"], "answers": [{"text": a, "answer_start": 0} for a in q["answer"]]}
        for i, q in enumerate(questions)
    ]
    squad = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "", "qas": qas}]}]}
    (folder / "train-v1.1.json").write_text(json.dumps(squad, indent=1))
    return str(folder / "wiki.parquet"), str(folder / "train-v1.1.json")


@pytest.mark.parametrize("form", [flashrag, parquet_and_squad])
def test_a_published_form_goes_all_the_way(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: Callable[..., tuple[str, str]]
) -> None:
    read = [
        [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]
        for name in ("passages", "dev")
    ]
    corpus, questions = form(tmp_path, *read)
    sources = [f"corpus.source={corpus}", *(f"questions.{split}={questions}" for split in ("train", "dev", "test"))]
    paths = [f"output={tmp_path / 'run'}", f"index.path={tmp_path / 'index'}"]
    settings = [*sources, *paths, "train.steps=1", "train.num_docs=2", "evaluate.normalization=mlqa"]
    config = str(world / "config.yaml")
    assert main(["index", config, *settings]) == 0
    ours, theirs = (read_index_manifest(folder)["corpus"] for folder in (tmp_path / "index", world / "index"))
    assert ours["fingerprint"] == theirs["fingerprint"], "the very same passages"
    assert main(["train", config, *settings]) == 0
    assert main(["evaluate", config, *settings, "evaluate.max_untrained_questions=0", "evaluate.max_questions=2"]) == 0
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["models"]["trained"]
    assert measured["questions"] == len(read[1]) and measured["answered"] == 2 and "contains" in measured["thorough"]
    capsys.readouterr()
    assert main(["answer", str(tmp_path / "run"), "--json", read[1][0]["question"]]) == 0
    assert json.loads(capsys.readouterr().out)["documents"]
