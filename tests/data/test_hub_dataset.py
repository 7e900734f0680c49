"""Datasets of the hub, through the `datasets` library, from a hub on this machine."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import hub_server

from ragjax.data.reading.hub_dataset import fetch_dataset
from ragjax.errors import InputError

OLD, NEW = "a" * 40, "b" * 40
CARD = """---
configs:
- config_name: corpus
  data_files: [{split: train, path: corpus/*.parquet}]
- config_name: qa
  data_files: [{split: test, path: qa/test.parquet}, {split: train, path: qa/train.parquet}]
---
"""
PROGRAM = """
import os
import sys
from pathlib import Path

from ragjax.config import Corpus
from ragjax.data.corpus import CorpusReader
from ragjax.data.questions import read_split
from ragjax.data.reading.hub_dataset import fetch_dataset
from ragjax.data.reading.sources import find_files
from ragjax.errors import InputError

for line in sys.stdin:
    kind, source = line.split()
    fetch_dataset.cache_clear()
    try:
        if kind == "corpus":
            found = find_files(source)
            passages = CorpusReader(found.files, Corpus(source="c")).read()
            print(found.fingerprint[0], *(f"{p.id}:{p.title}:{p.text}" for p in passages))
        else:
            print(*(f"{q.id}:{q.question}:{'|'.join(q.answers)}" for q in read_split(source).questions))
    except InputError as error:
        print(f"{error}")
"""


def parquet(*rows: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def dataset(word: str) -> dict[str, bytes]:
    return {
        "README.md": CARD.encode(),
        "corpus/0.parquet": parquet({"_id": "1", "title": "T", "text": word, "emb": [0.5]}),
        "corpus/1.parquet": parquet({"_id": "2", "title": "U", "text": "y", "emb": [1.5]}),
        "qa/train.parquet": parquet(
            {"id": 1, "question": "who?", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}
        ),
        "qa/test.parquet": parquet({"id": 2, "question": "why?", "answers": {"text": ["c"], "answer_start": [0]}}),
    }


def test_a_dataset_is_fetched_once_for_each_commit(tmp_path: Path) -> None:
    """Never another revision than the one that was named; without a network the one that was fetched."""

    def told(address: str, *lines: str) -> list[str]:
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "RAGJAX_CACHE": str(tmp_path / "cache"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        command, given = [sys.executable, "-c", PROGRAM], "\n".join(lines)
        done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    corpus, qa = "corpus hf-dataset:org/name/corpus", "questions hf-dataset:org/name/qa"
    with hub_server("org/name", {OLD: dataset("x"), NEW: dataset("z")}) as (address, asked):
        first = told(
            address,
            f"{corpus}@{OLD}:train",
            f"{corpus}:train",
            f"{qa}:train",
            f"{qa}@{NEW}:test",
            f"{qa}:dev",
            "corpus hf-dataset:org/other:train",
        )
        assert first[:4] == ["a 1:T:x 2:U:y", "b 1:T:z 2:U:y", "1:who?:a|b", "2:why?:c"]
        assert "hf-dataset:org/name/qa:dev: cannot be fetched" in first[4] and "check CONFIG and SPLIT" in first[4]
        assert "hf-dataset:org/other:train: " in first[5]
        assert any(path.endswith("corpus/1.parquet") for path in asked)
    again = told(
        "http://127.0.0.1:9",
        f"{corpus}@{OLD}:train",
        f"{corpus}:train",
        f"{qa}:test",
        "corpus hf-dataset:org/other:train",
    )
    assert again[:3] == [first[0], first[1], first[3]]
    assert "check the network" in again[3]


@pytest.mark.parametrize(
    "source", ["hf-dataset:", "hf-dataset:org/name", "hf-dataset:a/b/c/d:x", "hf-dataset:a/../b:x", "hf-dataset:/etc:x"]
)
def test_malformed_names(source: str) -> None:
    with pytest.raises(InputError, match="expected hf-dataset:ORG/NAME/CONFIG@REVISION:SPLIT"):
        fetch_dataset(source)
