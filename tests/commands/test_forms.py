"""Published forms of corpora and questions go through index, train, evaluate and answer without a conversion."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragjax.cli import main
from ragjax.config import load_config
from ragjax.data.passage_store import PassageStore
from ragjax.runs.restore import open_split

Record = dict[str, Any]


def lines(path: Path, records: Iterable[Record]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def table(path: Path, *rows: Iterable[str]) -> str:
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return str(path)


def beir(folder: Path, passages: list[Record]) -> str:
    """A folder as it is unpacked: beside the corpus lie the queries and their judgements."""
    (folder / "scifact" / "qrels").mkdir(parents=True)
    lines(folder / "scifact" / "queries.jsonl", [{"_id": "q1", "text": "who?", "metadata": {}}])
    table(folder / "scifact" / "qrels" / "test.tsv", ["query-id", "corpus-id", "score"], ["q1", "p1", "1"])
    own = ({"_id": p["id"], "title": p["title"], "text": p["text"], "metadata": {}} for p in passages)
    lines(folder / "scifact" / "corpus.jsonl", own)
    return str(folder / "scifact")


def kilt(folder: Path, passages: list[Record]) -> str:
    own = ({"_id": p["id"], "wikipedia_title": p["title"], "text": [p["text"] + "\n"], "history": {}} for p in passages)
    return lines(folder / "kilt_knowledgesource.json", own)


def pyserini(folder: Path, passages: list[Record]) -> str:
    return lines(folder / "p.jsonl", ({"id": p["id"], "contents": f"{p['title']}\n{p['text']}"} for p in passages))


def flashrag(folder: Path, passages: list[Record]) -> str:
    """A folder of two packed files, the second under a plain name."""
    own = [json.dumps({"id": p["id"], "contents": f'"{p["title"]}"\n{p["text"]}'}) + "\n" for p in passages]
    (folder / "wiki").mkdir()
    (folder / "wiki" / "0.jsonl.gz").write_bytes(gzip.compress("".join(own[:17]).encode()))
    (folder / "wiki" / "1.jsonl").write_bytes(gzip.compress("".join(own[17:]).encode()))
    return f"{folder}/wiki/*"


def ms_marco(folder: Path, passages: list[Record]) -> str:
    """collection.tsv: neither header nor titles."""
    return table(folder / "collection.tsv", *((p["id"], f"{p['title']}: {p['text']}") for p in passages))


def ms_marco_documents(folder: Path, passages: list[Record]) -> str:
    own = ({"docid": p["id"], "url": "u", "title": p["title"], "body": p["text"]} for p in passages)
    return lines(folder / "docs.jsonl", own)


def dpr(folder: Path, passages: list[Record]) -> str:
    rows = ((p["id"], f'"{p["text"]}"', p["title"]) for p in passages)
    return table(folder / "psgs_w100.tsv", ("id", "text", "title"), *rows)


def dpr_without_header(folder: Path, passages: list[Record]) -> str:
    return table(folder / "psgs.tsv", *((p["id"], p["title"], p["text"]) for p in passages))


def wiki_dpr(folder: Path, passages: list[Record]) -> str:
    pq.write_table(pa.Table.from_pylist([p | {"embeddings": [0.5, 0.25]} for p in passages]), folder / "wiki.parquet")
    return str(folder / "wiki.parquet")


def nq_open(folder: Path, questions: list[Record]) -> str:
    return lines(folder / "NQ-open.dev.jsonl", questions)


def kilt_questions(folder: Path, questions: list[Record]) -> str:
    def outputs(answers: list[str]) -> list[Record]:
        return [*({"answer": answer} for answer in answers), {"provenance": [{"wikipedia_id": "1"}]}]

    own = ({"id": str(i), "input": q["question"], "output": outputs(q["answer"])} for i, q in enumerate(questions))
    return lines(folder / "nq-dev-kilt.jsonl", own)


def one_text(folder: Path, questions: list[Record]) -> str:
    own = ({"id": i, "question": q["question"], "answer": q["answer"][0]} for i, q in enumerate(questions))
    return lines(folder / "q.jsonl", own)


def golden_answers(folder: Path, questions: list[Record]) -> str:
    own = (
        {"id": f"test_{i}", "question": q["question"], "golden_answers": q["answer"]} for i, q in enumerate(questions)
    )
    return lines(folder / "test.jsonl", own)


def whole_numbers(folder: Path, questions: list[Record]) -> str:
    own = [{"query_id": 7 + i, "query": q["question"], "answers": q["answer"]} for i, q in enumerate(questions)]
    (folder / "dev.json").write_text(json.dumps(own, indent=1))
    return str(folder / "dev.json")


def dpr_questions(folder: Path, questions: list[Record]) -> str:
    contexts = {"positive_ctxs": [{"title": "t", "text": "x", "passage_id": "1"}], "hard_negative_ctxs": []}
    own = [{"question": q["question"], "answers": q["answer"]} | contexts for q in questions]
    (folder / "biencoder-nq-dev.json").write_text(json.dumps(own, indent=4))
    return str(folder / "biencoder-nq-dev.json")


def dpr_table(folder: Path, questions: list[Record]) -> str:
    return table(folder / "nq-test.qa.csv", *((q["question"], repr(q["answer"])) for q in questions))


def squad(folder: Path, questions: list[Record]) -> str:
    qas = [
        {"id": str(i), "question": q["question"], "answers": [{"text": a, "answer_start": 0} for a in q["answer"]]}
        for i, q in enumerate(questions)
    ]
    data = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "", "qas": qas}]}]}
    (folder / "dev-v1.1.json").write_text(json.dumps(data))
    return str(folder / "dev-v1.1.json")


def trivia_qa(folder: Path, questions: list[Record]) -> str:
    own = [
        {
            "QuestionId": f"tc_{i}",
            "Question": q["question"],
            "Answer": {"Value": q["answer"][0], "Aliases": q["answer"]},
        }
        for i, q in enumerate(questions)
    ]
    (folder / "wikipedia-dev.json").write_text(json.dumps({"Data": own, "Domain": "Wikipedia"}, indent=4))
    return str(folder / "wikipedia-dev.json")


@pytest.mark.parametrize(
    ("passages", "questions"),
    [
        (beir, nq_open),
        (kilt, kilt_questions),
        (pyserini, one_text),
        (flashrag, golden_answers),
        (ms_marco, whole_numbers),
        (ms_marco_documents, trivia_qa),
        (dpr, dpr_table),
        (dpr_without_header, dpr_questions),
        (wiki_dpr, squad),
    ],
    ids=lambda form: form.__name__,
)
def test_a_published_form_goes_all_the_way(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    passages: Callable[[Path, list[Record]], str],
    questions: Callable[[Path, list[Record]], str],
) -> None:
    given, asked = (
        [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]
        for name in ("passages", "dev")
    )
    source = questions(tmp_path, asked)
    settings = [f"corpus.source={passages(tmp_path, given)}", *(f"questions.{of}={source}" for of in ("train", "test"))]
    settings += [f"output={tmp_path / 'run'}", f"index.path={tmp_path / 'index'}", "train.steps=1", "train.num_docs=2"]
    settings += ["evaluate.max_questions=2", "evaluate.closed_book=false", "evaluate.max_untrained_questions=0"]
    config = str(world / "config.yaml")
    assert main(["index", config, *settings]) == 0
    left_out = "queries.jsonl: lies beside BEIR's corpus.jsonl and is left out: no passages"
    assert (left_out in capsys.readouterr().err) == (passages is beir)
    kept = [vars(passage) for passage in PassageStore.open(tmp_path / "index")]
    if passages is ms_marco:
        given = [{"id": p["id"], "title": "", "text": f"{p['title']}: {p['text']}"} for p in given]
    assert kept == given, "the very same passages"
    read = open_split(load_config(Path(config), settings), "train")
    assert [(q.question, list(q.answers)) for q in read.questions] == [(q["question"], q["answer"]) for q in asked]
    assert main(["train", config, *settings]) == 0
    assert not (tmp_path / "run" / "left_out.jsonl").exists()
    assert main(["evaluate", config, *settings]) == 0
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["models"]
    about = measured["trained"]
    assert about["step"] == 1 and list(measured) == ["trained"]
    assert about["questions"] == len(asked) and about["answered"] == 2 and "contains" in about["thorough"]
    first = json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0])
    assert (first["question"], first["gold"]) == (asked[0]["question"], asked[0]["answer"])
    capsys.readouterr()
    assert main(["answer", str(tmp_path / "run"), "--json", asked[0]["question"]]) == 0
    assert json.loads(capsys.readouterr().out)["documents"][0].keys() >= {"id", "title", "text", "prior"}
