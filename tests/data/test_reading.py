"""Corpora and questions as people have them: every published form and every way of packing is read as it is."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from ragjax.config import Corpus, QuestionColumns, Questions
from ragjax.data.answer_matching import has_answer
from ragjax.data.corpus import CorpusReader, Passage
from ragjax.data.forms.answers import read_answers
from ragjax.data.forms.split_words import WORD, split_words
from ragjax.data.passage_store import PassageStore, shard_folder, write_store
from ragjax.data.questions import Question, read_questions, read_split
from ragjax.data.reading import json_records as module
from ragjax.data.reading.json_records import json_records
from ragjax.data.reading.sources import find_files
from ragjax.errors import InputError

FRANCE, ITALY = Passage("1", "France", "Paris is the capital."), Passage("2", "Italy", "Rome is, too.")
ROWS = [vars(FRANCE), vars(ITALY)]


def lines(*records: dict[str, Any]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def table(header: str, *rows: str) -> bytes:
    return "\n".join([*([header] if header else []), *rows, ""]).encode()


def arrow(write: Callable[[Any, pa.Table], Any], **columns: list) -> bytes:
    sink = pa.BufferOutputStream()
    write(
        sink,
        pa.table({"id": ["1", "2"], "title": ["France", "Italy"], "text": [p.text for p in (FRANCE, ITALY)]} | columns),
    )
    return sink.getvalue().to_pybytes()


def stream(sink: Any, rows: pa.Table) -> None:
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)


def ipc_file(sink: Any, rows: pa.Table) -> None:
    with pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)


def to_parquet(sink: Any, rows: pa.Table) -> None:
    pq.write_table(rows, sink)


def rename(**names: str) -> bytes:
    return lines(*({names.get(key, key): value for key, value in row.items()} for row in ROWS))


def opened(path: Path, content: bytes, **settings: Any) -> CorpusReader:
    path.write_bytes(content)
    return CorpusReader([path], Corpus(source="c", **settings))


SAME = {  # the same two passages
    "beir.jsonl": rename(id="_id"),
    "tevatron.jsonl": rename(id="docid"),
    "capitals.jsonl": rename(id="ID", title="Title", text="TEXT"),
    "whole_numbers.jsonl": lines(*(row | {"id": int(row["id"])} for row in ROWS)),
    "flashrag.jsonl": lines(*({"id": r["id"], "contents": f'"{r["title"]}"\n{r["text"]}'} for r in ROWS)),
    "pyserini.jsonl": lines(*({"id": r["id"], "contents": f"{r['title']}\n{r['text']}"} for r in ROWS)),
    "kilt.jsonl": lines(
        *(
            {"_id": r["id"], "wikipedia_id": "9", "wikipedia_title": r["title"], "text": [f"{r['text']}\n"]}
            for r in ROWS
        )
    ),
    "atlas.jsonl": lines(*(row | {"section": "History"} for row in ROWS)),
    "nested_extra.jsonl": lines(*(row | {"metadata": {"a": [1]}} for row in ROWS)),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "array_under_a_wrong_name.jsonl": json.dumps(ROWS).encode(),
    "pretty.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + rename(),
    "crlf.jsonl": rename().replace(b"\n", b"\r\n"),
    "dpr.tsv": table("id\ttext\ttitle", f"1\t{FRANCE.text}\tFrance", f"2\t{ITALY.text}\tItaly"),
    "other_order.tsv": table("id\ttitle\ttext", f"1\tFrance\t{FRANCE.text}", f"2\tItaly\t{ITALY.text}"),
    "capitals.tsv": table("ID\tText\tTitle", f"1\t{FRANCE.text}\tFrance", f"2\t{ITALY.text}\tItaly"),
    "four.tsv": table("id\ttext\turl\ttitle", f"1\t{FRANCE.text}\t\tFrance", f"2\t{ITALY.text}\thttp://x\tItaly"),
    "no_header.tsv": table("", f"1\t{FRANCE.text}\tFrance", f"2\t{ITALY.text}\tItaly"),
    "no_header_other_order.tsv": table("", f"1\tFrance\t{FRANCE.text}", f"2\tItaly\t{ITALY.text}"),
    "trailing_tab.tsv": table("id\ttext\ttitle", f"1\t{FRANCE.text}\tFrance\t", f"2\t{ITALY.text}\tItaly\t"),
    "blank_lines.tsv": table("id\ttext\ttitle", "", f"1\t{FRANCE.text}\tFrance", "", f"2\t{ITALY.text}\tItaly"),
    "commas.csv": table("id,text,title", f"1,{FRANCE.text},France", f'2,"{ITALY.text}",Italy'),
    "semicolons.csv": table("id;title;text", f"1;France;{FRANCE.text}", f'2;Italy;"{ITALY.text}"'),
    "no_suffix": table("id\ttext\ttitle", f"1\t{FRANCE.text}\tFrance", f"2\t{ITALY.text}\tItaly"),
    "wiki_dpr.parquet": arrow(to_parquet, embeddings=[[0.5, 1.0], [2.0, 3.0]], raw=[b"\xff", b"\xfe"]),
    "parquet_under_a_plain_name": arrow(to_parquet),
    "stream.arrow": arrow(stream),
    "file.arrow": arrow(ipc_file, embeddings=[[0.5], [2.0]]),
}


@pytest.mark.parametrize("name", SAME)
def test_each_form_of_a_corpus(tmp_path: Path, name: str) -> None:
    corpus = opened(tmp_path / name, SAME[name])
    assert list(corpus.read()) == [FRANCE, ITALY] == list(corpus.read()), "as often as asked"
    assert corpus.count() == 2


@pytest.mark.parametrize(
    "pack", [gzip.compress, zstd.compress, lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])]
)
@pytest.mark.parametrize("name", ["beir.jsonl", "array.json", "dpr.tsv", "capitals.jsonl.gz", "dpr.tsv.zst"])
def test_packed_files_whatever_their_names_say(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    data = SAME[name.removesuffix(".gz").removesuffix(".zst")]
    assert list(opened(tmp_path / name, pack(data)).read()) == [FRANCE, ITALY]
    assert list(opened(tmp_path / name, data).read()) == [FRANCE, ITALY], "a plain file under a packed one's name, too"


def texts(content: bytes, path: Path, **settings: Any) -> list[tuple[str, str, str]]:
    return [(p.id, p.title, p.text) for p in opened(path, content, **settings).read()]


def test_other_forms_of_a_corpus(tmp_path: Path) -> None:
    path = tmp_path / "c"
    assert texts(lines({"pid": 7, "passage": "Seven."}), path) == [("7", "", "Seven.")]
    assert texts(lines({"docid": "D1", "url": "u", "title": "t", "body": "b"}), path) == [("D1", "t", "b")]
    assert texts(table("", "7\tSeven are they.", "8\tEight."), path) == [
        ("7", "", "Seven are they."),
        ("8", "", "Eight."),
    ]
    assert texts(lines({"id": "a", "contents": "alone"}), path) == [("a", "", "alone")]
    assert texts(lines({"id": "a", "contents": "one\n"}), path) == [("a", "", "one\n")], "no title without a text"
    body = table("", "1\tIt has a head.\tBody", "2\tIt is long.\tText")
    assert texts(body, path) == [("1", "Body", "It has a head."), ("2", "Text", "It is long.")], "no header"
    assert texts(table(",id,text", "0,a,x", "1,b,y"), path.with_suffix(".csv")) == [("a", "", "x"), ("b", "", "y")]
    kilt = {"_id": "290", "wikipedia_title": "A", "text": ["A\n", "A is the first letter.\n"]}
    assert texts(lines(kilt), path) == [("290", "A", "A\nA is the first letter.")]
    assert texts(lines({"id": "1", "title": None, "text": "x"}, {"id": "2", "text": "y"}), path)[0] == ("1", "", "x")
    odd = "x\u2028y\x85z \x00 👩‍👧 नमस्ते"
    assert (
        texts(lines({"id": "1", "text": odd}), path) == texts(table("id\ttext", f"1\t{odd}"), path) == [("1", "", odd)]
    )


ODD: dict[str, tuple[Any, ...]] = {
    "nul.tsv": (table("id\ttext\ttitle", "1\tPa\x00ris.\tFrance"), ("1", "France", "Pa\x00ris.")),
    "no_id.tsv": (table("title\ttext", "France\tParis."), ("1", "France", "Paris.")),
    "no_title.tsv": (table("id\ttext\ttitle", "1\tParis.\t"), ("1", "", "Paris.")),
    "packed.tsv": (gzip.compress(table("id\ttext", "1\tCafé.")), ("1", "", "Café.")),
    "long.tsv": (table("id\ttext", f"1\t{'word ' * 40_000}"), ("1", "", "word " * 40_000)),
    "joined.jsonl": (b'{"id":"1","text":"x"}{"id":"2","text":"y"}\n', ("1", "", "x"), ("2", "", "y")),
    "escapes.jsonl": (b'{"id": "1", "title": "a\\u0000b", "text": "\\u2028x"}\n', ("1", "a\x00b", "\u2028x")),
    "wiki_dpr.jsonl": (lines({"id": "1", "text": "x", "title": "A", "embeddings": [0.1, 0.2]}), ("1", "A", "x")),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_read(tmp_path: Path, name: str) -> None:
    content, *expected = ODD[name]
    assert texts(content, tmp_path / name) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines({"id": 1.0, "text": "x"}), r"c:1: empty or missing \"id\"; expected a text or a whole number"),
        (b'{"id": "1", "title": NaN, "text": "x"}\n', r'c:1: "title" must be a text'),
        (table("id\ttext\ttitle", "1\tline one", "line two\tTwo"), r"c:2: expected 3 .* found 2; a line break within"),
        (table("id\ttext\ttitle"), r"c: the corpus holds no passages"),
    ],
)
def test_odd_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        texts(content, tmp_path / "c")


def test_what_is_recognised_is_told(tmp_path: Path) -> None:
    def notices(content: bytes, **settings: Any) -> list[str]:
        corpus = opened(tmp_path / "c", content, **settings)
        list(corpus.read())
        return [line.removeprefix(f"{tmp_path / 'c'}: ") for line in corpus.notices()]

    assert notices(SAME["atlas.jsonl"]) == []
    assert notices(SAME["kilt.jsonl"]) == ['id is "_id", title is "wikipedia_title"']
    assert notices(SAME["flashrag.jsonl"]) == ['text is "contents", of which a first line is the title']
    told = notices(SAME["no_header_other_order.tsv"])
    assert told == ['no header: id is "1", title is "2", text is "3"', "2 lines hold 2 records"]
    unnamed = lines({"uuid": "u", "title": "t", "text": "x"}, {"uuid": "v", "title": "t", "text": "y"})
    assert notices(unnamed) == ["no id: passages are numbered; corpus.columns.id may name one"]
    assert [p.id for p in opened(tmp_path / "c", unnamed).read()] == ["1", "2"]
    assert [p.id for p in opened(tmp_path / "c", unnamed, columns={"id": "uuid"}).read()] == ["u", "v"]


def test_columns_are_mapped_by_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    record = lines({"nr": 5, "name": "N", "inhalt": "I", "text": "T", "title": "X"})
    mapped = {"columns": {"id": "nr", "title": "name", "text": "inhalt"}}
    assert texts(record, path, **mapped) == [("5", "N", "I")]
    assert texts(lines({"id": "1", "contents": "a\nb"}), path, columns={"text": "contents"}) == [("1", "", "a\nb")]
    wide = table("", "x\tT\t1\tlong text", "y\tU\t2\tother text")
    columns = {"id": 3, "title": "2", "text": 4}
    assert texts(wide, tmp_path / "c.tsv", columns=columns)[1] == ("2", "U", "other text")
    headed = table("nr\tinhalt", "1\tx")
    assert texts(headed, tmp_path / "c.tsv", columns={"id": "nr", "text": "inhalt"}) == [("1", "", "x")]
    with pytest.raises(
        InputError, match=r"c.jsonl:1: .*no 'Inhalt_', which corpus.columns.text names, among its keys \(id"
    ):
        texts(lines({"id": 1, "text": "T"}), path, columns={"text": "Inhalt_"})


SPEECH = table(
    "id\ttext\ttitle",
    "1\tOslo.\tNorway",
    '2\t"To be or not to be" opens a speech: "to die, to sleep\tHamlet',
    '3\t"The quote that opens here is not closed\tOpen',
    "4\tRome.\tItaly",
    '6\tA 12" single\tMusic',
)


def test_quotes_in_tables(tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    with pytest.raises(InputError, match=r"p.tsv:3: a column opens with .* corpus.quoting=none"):
        texts(SPEECH, path)
    corpus = opened(path, SPEECH, quoting="none")
    assert [p.text for p in corpus.read()][2:] == ['"The quote that opens here is not closed', "Rome.", 'A 12" single']
    assert corpus.notices() == ["6 lines hold 5 records"]
    two_lines = table("id,text,title", '1,"one', "", 'and ""two""",T', "2,x,U")
    with pytest.raises(InputError, match=r"p.csv:2: .*corpus.quoting=multiline"):
        texts(two_lines, tmp_path / "p.csv")
    corpus = opened(tmp_path / "p.csv", two_lines, quoting="multiline")
    assert [p.text for p in corpus.read()] == ['one\n\nand "two"', "x"] and corpus.place(2).endswith("p.csv:5")
    assert corpus.notices() == ["5 lines hold 2 records"]
    with pytest.raises(InputError, match=r"p.tsv:3: a quoted column that opens here is not closed rightly"):
        texts(SPEECH, path, quoting="multiline")
    with pytest.raises(InputError, match=r"p.tsv:2: a quoted column"):
        texts(table("id\ttext", '1\t"x'), path, quoting="multiline")


def test_empty_texts_are_left_out_on_request(tmp_path: Path) -> None:
    content = lines(
        {"id": "1", "text": "x"}, {"id": "2", "text": ""}, {"id": "3", "text": None}, {"id": "4", "text": "z"}
    )
    corpus = opened(tmp_path / "c", content, skip_empty=True)
    assert [p.id for p in corpus.read()] == ["1", "4"] and corpus.place(2).endswith("c:4")
    assert corpus.notices() == ["2 of 4 records have no text and are left out"]
    with pytest.raises(InputError, match=r"c:2: .*no \"text\" among its keys \(id\)"):
        texts(lines({"id": "1", "text": "x"}, {"id": "2"}), tmp_path / "c", skip_empty=True)


# -- several files


def fill(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_folders_and_patterns(tmp_path: Path) -> None:
    parts = {"a__2_jsonl": lines(vars(ITALY)), "a__1_jsonl_gz": gzip.compress(lines(vars(FRANCE)))}
    folder = fill(tmp_path / "c", **parts, README_md=b"#", _hidden_jsonl=b"{", dataset__info_json=b"{}")
    for source in (str(folder), f"{folder}/a/*", f"{folder}/**/*.jsonl*"):
        found = find_files(source)
        assert [path.name for path in found.files][-2:] == ["1.jsonl.gz", "2.jsonl"] and found.revision == "local"
    found = find_files(str(folder))
    corpus = CorpusReader(found.files, Corpus(source="c"))
    assert list(corpus.read()) == [FRANCE, ITALY] and corpus.count() == 2
    before = found.fingerprint
    (folder / "a" / "2.jsonl").write_bytes(lines(vars(ITALY) | {"text": "x"}))
    assert find_files(str(folder)).fingerprint != before
    fill(folder, a__2_jsonl=lines(vars(FRANCE)), a__1_jsonl_gz=lines(vars(ITALY)))
    swapped = find_files(str(folder)).fingerprint
    fill(folder, a__2_jsonl=lines(vars(ITALY)), a__1_jsonl_gz=lines(vars(FRANCE)))
    assert swapped != find_files(str(folder)).fingerprint, "their order counts"


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"expected files such as .*; found none"):
        find_files(str(tmp_path / "none"))
    mixed = fill(tmp_path / "mixed", corpus_jsonl=b"", sub__test_tsv=b"")
    with pytest.raises(
        InputError, match=r"several kinds \(corpus.jsonl, sub/test.tsv\); give one of them, or a pattern"
    ):
        find_files(str(mixed))
    with pytest.raises(InputError, match="no file has such a name"):
        find_files(f"{tmp_path}/*.nothing")
    with pytest.raises(InputError, match="no such file or folder"):
        find_files(f"{tmp_path}/nothing")
    array = fill(tmp_path / "json", a_json=json.dumps(ROWS).encode())
    assert len(find_files(str(array)).files) == 1


def test_of_a_folder_of_beir_the_corpus_is_read(tmp_path: Path) -> None:
    fill(tmp_path / "beir", corpus_jsonl=SAME["beir.jsonl"], queries_jsonl=lines({"_id": "q", "text": "who?"}))
    for _ in range(2):
        found = find_files(str(tmp_path / "beir"))
        assert [path.name for path in found.files] == ["corpus.jsonl"]
        assert list(CorpusReader(found.files, Corpus(source="c")).read()) == [FRANCE, ITALY]
        fill(tmp_path / "beir", qrels__test_tsv=b"query-id\tcorpus-id\tscore\n")
    assert [path.name for path in found.left_out] == ["test.tsv", "queries.jsonl"]
    fill(tmp_path / "own", queries_jsonl=lines(vars(FRANCE)))
    assert not find_files(str(tmp_path / "own")).left_out, "by that name alone nothing is left out"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Paris is the capital of France.\n", r"a:1: is no JSON object; expected JSON, an object a line, or a table"),
        (b"<!DOCTYPE html>\n<html>", r"a:1: is no JSON object; expected JSON"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid x\n",
            r"a: is a pointer of Git LFS and .*; run: git lfs pull",
        ),
        (b"PK\x03\x04", r"a: is a zip archive; unpack it"),
        (b'{"id": "1", "text": "caf\xe9"}\n', r"a:1: not UTF-8 \(.*\); save the file in UTF-8"),
        (b"id\ttext\n1\ta\tb\n", r"a:2: expected 2 columns \(id, text\), found 3; a tab or comma within a column must"),
    ],
)
def test_what_is_no_corpus_says_what_to_do(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(opened(tmp_path / "a", content).read())


def test_a_header_among_columns_given_by_place_is_told(tmp_path: Path) -> None:
    path = tmp_path / "c.tsv"
    by_place = {"id": 1, "text": 2}
    corpus = opened(path, table("nr\tinhalt", "1\tIt is far.", "2\tIt is near."), columns=by_place)
    assert len(list(corpus.read())) == 3
    assert corpus.notices()[0] == (
        f'{path}: no header: id is "1", text is "2"; its first line (nr, inhalt) is read as a record; where it is a '
        "header, name the columns as it does"
    )
    corpus = opened(path, table("", "a\tone", "b\ttwo"), columns=by_place)
    assert len(list(corpus.read())) == 2 and "read as a record" not in corpus.notices()[0], "all could be headers"
    with pytest.raises(
        InputError, match=r"c.tsv:2: .*no '2', which corpus.columns.text names, among its keys \(id, text"
    ):
        texts(table("id\ttext", "1\tx"), path, columns={"text": 2})
    path.write_bytes(table("frage\tantwort", "who is it?\ta b", "why?\tc"))
    split = read_split(path, Questions(columns=QuestionColumns(question="1", answers="2")))
    assert len(split.questions) == 3 and "its first line (frage, antwort) is read as a record" in split.notices[0]


def test_what_is_recognised_of_questions_is_told(tmp_path: Path) -> None:
    path = tmp_path / "q"

    def notices(content: bytes) -> tuple[str, ...]:
        path.write_bytes(content)
        return read_split(path).notices

    kilt = f'{path}: question is "input", answers is "output"'
    assert notices(lines(QUESTIONS["kilt"])) == (kilt,)
    assert notices(lines(QUESTIONS["dpr"])) == ()
    assert notices(table("", "who?\t['a', 'b']")) == (f'{path}: no header: question is "1", answers is "2"',)
    assert read_split(path).notice_lines(Path("out.json")) == list(notices(table("", "who?\ta")))
    fill(tmp_path / "many", a_jsonl=lines(QUESTIONS["kilt"]), b_jsonl=lines(QUESTIONS["kilt"]))
    [told] = read_split(str(tmp_path / "many")).notices
    assert told.startswith(f"{tmp_path}/many/a.jsonl and 1 more files: question is")


def test_quotes_in_tables_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.tsv"
    path.write_bytes(table("question\tanswer", '"Who said "no"?\ta', "why?\tb"))
    with pytest.raises(InputError, match=r"q.tsv:2: .*set questions.quoting=none, .* questions.quoting=multiline"):
        read_split(path)
    questions = read_split(path, Questions(quoting="none")).questions
    assert [q.question for q in questions] == ['"Who said "no"?', "why?"]
    path.write_bytes(table("question\tanswer", '"who\n is it?"\ta'))
    assert read_split(path, Questions(quoting="multiline")).questions[0].question == "who\n is it?"


def test_what_needs_an_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, rows = tmp_path / "a", tmp_path / "b"
    packed.write_bytes(zstd.compress(SAME["beir.jsonl"]))
    rows.write_bytes(SAME["stream.arrow"])
    monkeypatch.delattr("backports.zstd")
    for name in ("backports.zstd", "compression.zstd", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    for path, extra in ((packed, "zstd"), (rows, "parquet")):
        with pytest.raises(InputError, match=rf"pip install 'ragjax\[{extra}\]'"):
            list(CorpusReader([path], Corpus(source="c")).read())


# -- JSON without lines


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.integers() | st.text(), st.lists), max_size=3),
        min_size=1,
    ),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 7),
)
def test_json_values_are_those_that_python_reads(
    records: list[dict], indent: int | None, array: bool, block: int
) -> None:
    """However the file is cut into blocks, in an array or one after the other."""
    texts = [json.dumps(record, indent=indent) for record in records]
    data = json.dumps(records, indent=indent) if array else " ".join(texts)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        path = Path(folder) / "x.json"
        path.write_text(data)
        assert [record.fields for record in json_records(path)] == records


# -- long documents


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.sampled_from(["a", "bb", "Ende.", "So?", "\n\n", "東京。", "京", "x,y"]), max_size=40).map(" ".join),
    st.integers(1, 12),
    st.integers(0, 11),
)
def test_a_document_is_cut_into_all_of_its_words(text: str, longest: int, overlap: int) -> None:
    pieces = split_words(text, longest, overlap if overlap < longest else 0)
    words = WORD.findall(text)
    if len(words) <= longest:
        assert pieces == [text]
        return
    at, seen = 0, 0
    for piece in pieces:
        here = WORD.findall(piece)
        assert 0 < len(here) <= longest and piece in text
        start = max(i for i in range(at, seen + 1) if words[i : i + len(here)] == here)
        assert start + len(here) > seen, "each has something new"
        assert seen - start <= overlap
        at, seen = start, start + len(here)
    assert seen == len(words)


def test_sentences_stay_whole_where_they_can() -> None:
    text = "One two three. Four five!  Six seven eight nine ten eleven. Twelve."
    assert split_words(text, 5) == ["One two three. Four five!", "Six seven eight nine ten", "eleven. Twelve."]
    assert split_words(text, 5, 2) == [
        "One two three. Four five!",
        "Six seven eight nine ten",
        "eleven. Twelve.",
    ], "a repeated sentence must leave room for something new"
    assert split_words("A b. C d. E f. G h.", 4, 2) == ["A b. C d.", "C d. E f.", "E f. G h."]
    assert split_words("東京は首都です。人が多い。", 9) == ["東京は首都です。", "人が多い。"]


def test_long_documents_become_passages(tmp_path: Path) -> None:
    content = lines({"id": "d", "title": "T", "text": "A b. C d. E f."}, {"id": "e", "title": "U", "text": "G h."})
    corpus = opened(tmp_path / "c", content, split_words=2)
    assert [(p.id, p.title, p.text) for p in corpus.read()] == [
        ("d#1", "T", "A b."),
        ("d#2", "T", "C d."),
        ("d#3", "T", "E f."),
        ("e", "U", "G h."),
    ]
    assert corpus.notices() == ["1 of 2 documents were cut: 4 passages"] and corpus.count() is None
    assert corpus.place(4).endswith("c:2")
    assert len(list(opened(tmp_path / "c", content, split_words=2, max_passages=2).read())) == 2


def test_a_label_may_name_a_document_that_was_cut(tmp_path: Path) -> None:
    write_store(
        shard_folder(tmp_path, 0), [Passage(i, "", "x") for i in ("d#1", "d#2", "e", "f#g")], words, lambda p: p.text
    )
    store, ids = PassageStore.open(tmp_path), np.array([0, 1, 2, 3, -1])
    for label, expected in (("d", [1, 1, 0, 0, 0]), ("d#2", [0, 1, 0, 0, 0]), ("e", [0, 0, 1, 0, 0]), ("f", [0] * 5)):
        assert has_answer(store, Question("q", ("y",), "1", (label,)), ids).tolist() == expected


def words(texts: list[str]) -> list[list[int]]:
    return [[1] for _ in texts]


# -- questions

ASKED = [Question("who?", ("a", "b"), "q")]
SQUAD = {"id": "q", "question": "who?", "answers": [{"text": "a", "answer_start": 3}, {"text": "b"}, {"text": "a"}]}
QUESTIONS: dict[str, dict[str, Any]] = {
    "nq_open": {"id": "q", "question": "who?", "answer": ["a", "b"]},
    "dpr": {"id": "q", "question": "who?", "answers": ["a", "b"], "positive_ctxs": [{"title": "t", "passage_id": "1"}]},
    "atlas": {"id": "q", "question": "who?", "target": "a", "answers": ["a", "b"]},
    "flashrag": {"id": "q", "question": "who?", "golden_answers": ["a", "b"]},
    "capitals": {"ID": "q", "Question": "who?", "Answer": ["a", "b"]},
    "list_as_text": {"id": "q", "question": "who?", "answer": "['a', 'b']"},
    "list_as_json": {"id": "q", "question": "who?", "answer": '["a", "b"]'},
    "triviaqa": {"id": "q", "question": "who?", "answer": {"value": "a", "aliases": ["a", "b"], "type": "x"}},
    "hotpot": {"_id": "q", "question": "who?", "answer": ["a", "b"]},
    "squad_hf": {"id": "q", "question": "who?", "answers": {"text": ["a", "b", "a"], "answer_start": [3, 4, 5]}},
    "squad": SQUAD,
    "triviaqa_own": {
        "QuestionId": "q",
        "Question": "who?",
        "Answer": {"Value": "a", "Aliases": ["a", "b"], "Type": "x"},
    },
    "kilt": {
        "id": "q",
        "input": "who?",
        "output": [{"answer": "a"}, {"provenance": [{"wikipedia_id": "1"}]}, {"answer": "b"}],
    },
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_each_form_of_questions(tmp_path: Path, name: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(lines(QUESTIONS[name]))
    assert read_questions(path) == ASKED
    path.write_text(json.dumps([QUESTIONS[name]], indent=1))
    assert read_questions(path) == ASKED


def test_other_forms_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "q"

    def read(content: bytes, **columns: Any) -> list[Question]:
        path.write_bytes(content)
        split = read_split(path, Questions(columns=QuestionColumns(**columns)))
        assert not split.left_out
        return split.questions

    qa = {"question": "who?", "answer": "a"}
    assert read(lines(qa | {"answer": [1997]}, qa | {"answer": 7})) == [
        Question("who?", ("1997",), "1"),
        Question("who?", ("7",), "2"),
    ]
    assert read(lines(qa | {"id": 3, "passages": [1, "b"]})) == [Question("who?", ("a",), "3", ("1", "b"))]
    assert read(lines(qa | {"answer": "[1] a"}))[0].answers == ("[1] a",)
    assert read(table("", "who?\t['a', 'b']", 'why?\t["it\'s"]')) == [
        Question("who?", ("a", "b"), "1"),
        Question("why?", ("it's",), "2"),
    ]
    assert read(table("id\tquestion\tanswer", "q\twho?\ta")) == [Question("who?", ("a",), "q")]
    mapped = {"question": "frage", "answers": "antwort", "id": "nr", "passages": "belege"}
    assert read(lines({"frage": "who?", "antwort": "a", "nr": 1, "belege": ["x"]}), **mapped) == [
        Question("who?", ("a",), "1", ("x",))
    ]
    paragraphs = [{"context": "c", "qas": [SQUAD, SQUAD | {"id": "r"}]}, {"context": "d", "qas": [SQUAD | {"id": "s"}]}]
    squad = {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}
    for indent in (None, 4):
        found = read(json.dumps(squad, indent=indent).encode())
        assert [(q.id, q.line, q.answers) for q in found] == [(i, n, ("a", "b")) for n, i in enumerate("qrs", 1)]
    trivia = {"Data": [QUESTIONS["triviaqa_own"], {"Question": "why?", "Answer": {"Value": "c"}}], "Domain": "Web"}
    for data in (json.dumps(trivia), json.dumps(trivia, indent=4), json.dumps({"Version": 1.0, "No": True} | trivia)):
        assert read(data.encode()) == [*ASKED, Question("why?", ("c",), "2")]
    rows = pa.table({"id": [7], "question": ["who?"], "answers": [{"text": ["a", "b"], "answer_start": [1, 2]}]})
    pq.write_table(rows, path)
    assert read_questions(path) == [Question("who?", ("a", "b"), "7")]


@pytest.mark.parametrize(
    ("written", "answers"),
    [
        ("['Paris' 'City of Light']", ["Paris", "City of Light"]),  # NumPy's, as pandas writes a column of lists
        ("[1997, 1998]", ["1997", "1998"]),
        ("['a' ... 'b']", ["['a' ... 'b']"]),
        ("[1.5]", ["[1.5]"]),
        ([{"answer": "a"}, {"answer": None, "provenance": [1]}, {"answer": ""}], ["a"]),  # KILT's, from Arrow
    ],
)
def test_lists_of_answers(written: Any, answers: list[str]) -> None:
    assert read_answers(written) == answers


def test_many_dots_end_one_sentence_and_take_no_time() -> None:
    text = "." * 200_000 + "x"
    assert split_words(f"{text} y z", 2) == [f"{text} y", "z"]


def test_numbers_beside_questions_are_no_questions(tmp_path: Path) -> None:
    """As MS MARCO's queries.tsv: ids, and no answers."""
    (tmp_path / "q.tsv").write_text("1048585\twhat is it?\n2\twho is he?\n")
    with pytest.raises(InputError, match=r"it is not clear what they hold; say it by questions\.columns"):
        read_split(tmp_path / "q.tsv")


def test_times_that_python_cannot_hold_are_not_looked_at(tmp_path: Path) -> None:
    late = pa.array([2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"id": ["1"], "title": ["A"], "text": ["a"], "fetched": late}), tmp_path / "p.parquet")
    assert list(CorpusReader([tmp_path / "p.parquet"], Corpus(source="p")).read()) == [Passage("1", "A", "a")]


def test_files_without_records_are_told_and_names_given_twice_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "1", "title": "A", "text": "a"}\n')
    (tmp_path / "b.jsonl").write_bytes(b"")
    reader = CorpusReader([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], Corpus(source="c"))
    assert [passage.id for passage in reader.read()] == ["1"]
    assert any("b.jsonl: holds no records" in line for line in reader.notices())
    (tmp_path / "t.csv").write_text("id,title,text,title\n1,A,x,B\n")
    with pytest.raises(InputError, match=r"t\.csv:1: two columns are called title; rename one"):
        list(CorpusReader([tmp_path / "t.csv"], Corpus(source="t")).read())


def test_questions_of_several_files_have_numbers_of_their_own(tmp_path: Path) -> None:
    folder = fill(
        tmp_path / "q",
        a_jsonl=lines({"question": "who?", "answer": "a"}),
        b_jsonl=lines({"question": "why?", "answer": "b"}),
    )
    split = read_split(str(folder))
    assert [(q.id, q.line) for q in split.questions] == [("1", 1), ("2", 2)] and len(split.first(1).questions) == 1
    before = split.fingerprint
    fill(folder, b_jsonl=lines({"question": "how?", "answer": "b"}))
    assert read_split(str(folder)).fingerprint != before


def test_odd_questions(tmp_path: Path) -> None:
    path, qa = tmp_path / "q.jsonl", {"question": "who?", "answer": ["a"]}
    path.write_bytes(lines(qa, qa, qa | {"id": "7"}, {"question": "who?\nreally", "answer": ["a\nb", " a "]}))
    assert [(q.question, q.answers, q.id) for q in read_questions(path)] == [
        ("who?", ("a",), "1"),
        ("who?", ("a",), "2"),
        ("who?", ("a",), "7"),
        ("who?\nreally", ("a\nb", " a "), "4"),
    ]
    path.write_bytes(lines(qa, qa | {"answer": []}))  # as SQuAD 2 has them
    split = read_split(path)
    assert len(split.questions) == 1 and "empty or missing" in str(split.left_out[0])


def test_questions_without_answers_name_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(lines({"_id": "q1", "text": "who?", "metadata": {}}))
    with pytest.raises(
        InputError, match=r"q.jsonl:1: .*no \"question\" among its keys \(_id, text, metadata\).*questions.columns.q"
    ):
        read_questions(path)
