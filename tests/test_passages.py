import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from ragjax.config import InputError
from ragjax.passages import (
    STORE_FILES,
    Passage,
    PassageStore,
    Question,
    count_passages,
    read_passages,
    read_questions,
    write_jsonl,
    write_store,
)

PASSAGES = [
    Passage("1", "Paris", "Paris ist schön."),
    Passage("b", "", 'a "quoted"\ttab\nline'),
    Passage("3", "T", "x"),
]


def encode(texts: list[str]) -> list[list[int]]:
    return [[len(word) for word in text.split()] for text in texts]


def text_of(passage: Passage) -> str:
    return f"{passage.title}: {passage.text}"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_reads_jsonl(tmp_path, zipped):
    lines = '\ufeff{"id": 1, "title": "Paris", "text": "Paris ist schön.", "extra": 0}\n\n{"id": "b", "text": "y"}\n'
    path = tmp_path / ("c.jsonl.gz" if zipped else "c.jsonl")
    write(path, gzip.compress(lines.encode()) if zipped else lines)
    expected = [PASSAGES[0], Passage("b", "", "y")]
    assert list(read_passages(path, "jsonl")) == expected
    assert count_passages(path, "jsonl") == 2
    assert list(read_passages(tmp_path, "jsonl", limit=1)) == expected[:1]


@pytest.mark.parametrize("zipped", [False, True])
def test_reads_dpr(tmp_path, zipped):
    lines = 'id\ttext\ttitle\n1\t"Aaron ""The"" Aaron\tx"\tAaron\n2\tplain\tB\n'
    path = tmp_path / ("p.tsv.gz" if zipped else "p.tsv")
    write(path, gzip.compress(lines.encode()) if zipped else lines)
    assert list(read_passages(path, "dpr")) == [
        Passage("1", "Aaron", 'Aaron "The" Aaron\tx'),
        Passage("2", "B", "plain"),
    ]
    assert count_passages(path, "dpr") == 2


GOOD = b'{"id": "a", "text": "t"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", GOOD + b"{oops\n", r"c\.jsonl:2: not JSON"),
        ("c.jsonl", GOOD + b"[1]\n", r"c\.jsonl:2: expected a JSON object"),
        ("c.jsonl", GOOD + b'{"id": "b", "text": " "}\n', r'c\.jsonl:2: empty or missing "text"'),
        ("c.jsonl", GOOD + b'{"id": "b", "text": "\\ud83d"}\n', r"c\.jsonl:2: holds half of a"),
        ("c.jsonl", b'{"text": "t"}\n', r'c\.jsonl:1: empty or missing "id"'),
        ("c.jsonl", b'{"id": 1, "text": "t", "title": 3}\n', r'c\.jsonl:1: "title"'),
        ("c.jsonl", GOOD + b'{"id": "b", "text": "\xff"}\n', r"c\.jsonl:2: not UTF-8"),
        ("c.jsonl.gz", gzip.compress(GOOD * 2000, mtime=0)[:40], r"cannot be read"),
        ("c.jsonl.gz", GOOD, r"cannot be read"),
        ("p.tsv", b"id\ttext\ttitle\n1\tx\n", r"p\.tsv:2: expected 3 columns .* found 2"),
        ("p.tsv", b"1\tx\ty\n", r"p\.tsv:1: expected the header"),
        ("p.tsv", b"id\ttext\ttitle\n1\t\ty\n", r'p\.tsv:2: empty or missing "text"'),
    ],
)
def test_bad_lines_are_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        list(read_passages(path, "dpr" if name == "p.tsv" else "jsonl"))


def test_bad_paths(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        list(read_passages(tmp_path / "nothing.jsonl", "jsonl"))
    with pytest.raises(InputError, match="found none"):
        read_passages(tmp_path, "dpr")
    with pytest.raises(InputError, match="unknown corpus format 'xml'"):
        read_passages(tmp_path, "xml")


@pytest.mark.parametrize("batch", [1, 2, 1024])
def test_store_gives_back_what_was_written(tmp_path, batch):
    seen = []
    summary = write_store(tmp_path / "new" / "store", PASSAGES, encode, text_of, seen.append, batch)
    assert (summary.count, summary.tokens, sum(seen)) == (3, 11, 3)
    store = PassageStore.open(tmp_path / "new" / "store")
    assert len(store) == 3
    assert list(store) == PASSAGES
    for i, ids in enumerate(encode([text_of(passage) for passage in PASSAGES])):
        np.testing.assert_array_equal(store.tokens(i), ids)
        assert store.tokens(i).dtype == np.int32
        assert store.tokens(i).base is not None  # a view: nothing was copied
    np.testing.assert_array_equal(np.diff(store.token_offsets), [4, 5, 2])
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            store[wrong]
        with pytest.raises(IndexError):
            store.tokens(wrong)


def test_fingerprint_follows_the_content(tmp_path):
    def fingerprint(passages: list[Passage]) -> str:
        return write_store(tmp_path, passages, encode, text_of).fingerprint

    assert fingerprint(PASSAGES) == fingerprint(PASSAGES)
    assert fingerprint(PASSAGES) != fingerprint(PASSAGES[::-1])
    assert fingerprint(PASSAGES).startswith("sha256:")


def test_passages_without_tokens(tmp_path):
    assert write_store(tmp_path, PASSAGES, lambda texts: [[] for _ in texts], text_of).tokens == 0
    assert PassageStore.open(tmp_path).tokens(1).size == 0


@pytest.mark.parametrize(
    ("passages", "message"),
    [([], "no passages"), ([*PASSAGES, PASSAGES[1]], r"passages 2 and 4 have the same id 'b'")],
)
def test_a_refused_corpus_leaves_the_old_store(tmp_path, passages, message):
    write_store(tmp_path, PASSAGES, encode, text_of)
    with pytest.raises(InputError, match=message):
        write_store(tmp_path, passages, encode, text_of, batch=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(STORE_FILES)
    assert list(PassageStore.open(tmp_path)) == PASSAGES


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", STORE_FILES)
def test_full_disk_removes_the_partial_files(tmp_path, name):
    (tmp_path / f"{name}.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match="disk is full"):
        write_store(tmp_path, PASSAGES, encode, text_of)
    assert list(tmp_path.iterdir()) == []


def test_incomplete_or_damaged_store(tmp_path):
    with pytest.raises(InputError, match="run `ragjax index`"):
        PassageStore.open(tmp_path)
    for name in STORE_FILES:
        write_store(tmp_path, PASSAGES, encode, text_of)
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(InputError, match="damaged"):
            PassageStore.open(tmp_path)
        path.unlink()
        with pytest.raises(InputError, match="missing"):
            PassageStore.open(tmp_path)


def test_questions(tmp_path):
    path = tmp_path / "q.jsonl"
    write_jsonl(path, [{"question": "Où ?", "answer": ["a", "b"], "x": 1}, {"question": "q", "answer": "c", "id": "z"}])
    assert "Où" in path.read_text(encoding="utf-8")
    assert read_questions(path) == [Question("Où ?", ("a", "b"), "1"), Question("q", ("c",), "z")]
    assert [file.name for file in tmp_path.iterdir()] == ["q.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "q.jsonl:2: not JSON"),
        ('{"question": " ", "answer": ["a"]}', 'q.jsonl:2: empty or missing "question"'),
        ('{"question": "q"}', 'q.jsonl:2: empty or missing "answer"'),
        ('{"question": "q", "answer": []}', 'q.jsonl:2: empty or missing "answer"'),
        ('{"question": "q", "answer": ["a", 3]}', "q.jsonl:2: .* must be a list of texts"),
        ('{"question": "q", "answer": [""]}', "q.jsonl:2: .* not empty"),
    ],
)
def test_bad_questions(tmp_path, line, message):
    path = write(tmp_path / "q.jsonl", json.dumps({"question": "q", "answer": "a"}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=message):
        read_questions(path)


def test_no_questions(tmp_path):
    with pytest.raises(InputError, match="holds no questions"):
        read_questions(write(tmp_path / "q.jsonl", "\n"))


def test_write_jsonl_keeps_the_old_file_when_it_fails(tmp_path):
    path = write(tmp_path / "out.jsonl", "old")

    def records():
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, records())
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]
