import gzip
import hashlib
import resource
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from backports import zstd

from ragjax.checksums import write_checksums
from ragjax.config import Corpus
from ragjax.data.corpus import CorpusReader, CorpusStats, Passage, scan_passages
from ragjax.data.passage_store import STORE_FILES, PassageStore, shard_folder, write_store
from ragjax.errors import InputError
from ragjax.files import write_jsonl

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


def reader(*paths: Path, **settings) -> CorpusReader:
    return CorpusReader(paths, Corpus(source="c", **settings))


def read(*paths: Path, **settings) -> list[Passage]:
    return list(reader(*paths, **settings).read())


@pytest.mark.parametrize("zipped", [False, True])
def test_reads_jsonl(tmp_path, zipped):
    lines = '\ufeff{"id": 1, "title": "Paris", "text": "Paris ist schön.", "extra": 0}\n\n{"id": "b", "text": "y"}\n'
    path = tmp_path / ("c.jsonl.gz" if zipped else "c.jsonl")
    write(path, gzip.compress(lines.encode()) if zipped else lines)
    expected = [PASSAGES[0], Passage("b", "", "y")]
    assert read(path) == read(path, format="jsonl") == expected
    assert reader(path).count() == 2 and reader(path).notices() == []
    assert read(path, max_passages=1) == expected[:1]


@pytest.mark.parametrize("zipped", [False, True])
def test_reads_dpr(tmp_path, zipped):
    lines = 'id\ttext\ttitle\n1\t"Aaron ""The"" Aaron\tx"\tAaron\n2\tplain\tB\n'
    path = tmp_path / ("p.tsv.gz" if zipped else "p.tsv")
    write(path, gzip.compress(lines.encode()) if zipped else lines)
    corpus = reader(path, format="dpr")
    assert list(corpus.read()) == [Passage("1", "Aaron", 'Aaron "The" Aaron\tx'), Passage("2", "B", "plain")]
    assert corpus.count() == 2 and corpus.notices() == ["3 lines hold 2 records"]


GOOD, HEADER = b'{"id": "a", "text": "t"}\n', b"id\ttext\ttitle\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", GOOD + b"{oops\n", r"c\.jsonl:2: not JSON"),
        ("c.jsonl", GOOD + b"[1]\n", r"c\.jsonl:2: expected a JSON object"),
        (
            "c.jsonl",
            GOOD + b'{"id": "b", "text": " "}\n',
            r'c\.jsonl:2: empty or missing "text".*corpus\.skip_empty=true',
        ),
        ("c.jsonl", GOOD + b'{"id": "b", "text": "\\ud83d"}\n', r"c\.jsonl:2: holds half of a"),
        ("c.jsonl", GOOD + b'{"text": "t"}\n', r'c\.jsonl:2: empty or missing "id": no "id" among its keys \(text\)'),
        ("c.jsonl", b'{"text": "t"}\n' + GOOD, r'c\.jsonl:1: empty or missing "id"'),
        (
            "c.jsonl",
            b'{"id": 1.0, "text": "t"}\n',
            r'c\.jsonl:1: empty or missing "id"; expected a text or a whole num',
        ),
        (
            "c.jsonl",
            b'{"id": 1, "Text_": "t"}\n',
            r'c\.jsonl:1: .*no "text" among its keys \(id, Text_\).*corpus\.columns',
        ),
        ("c.jsonl", b'{"id": 1, "text": "t", "title": 3}\n', r'c\.jsonl:1: "title"'),
        ("c.jsonl", b'{"id": 1, "text": [1]}\n', r'c\.jsonl:1: "text" must be a text, or a list of paragraphs'),
        ("c.jsonl", GOOD + b'{"id": "b", "text": "\xff"}\n', r"c\.jsonl:2: not UTF-8"),
        ("c.jsonl.gz", gzip.compress(GOOD * 2000, mtime=0)[:40], r"cannot be read"),
        ("c.jsonl", zstd.compress(GOOD * 2000)[:20], r"cannot be read"),
        ("c.zip", b"PK\x03\x04", r"c\.zip: is a zip archive; unpack it"),
        ("c.parquet", b"PAR1\x15\x04\xff\xfe" + bytes(50), r"c\.parquet: cannot be read"),
        ("c.arrow", b"ARROW1" + bytes(50), r"c\.arrow: cannot be read"),
        ("c.json", b'[{"id": 1, "text": "t"}, 7]', r"c\.json:2: expected a JSON object, not '7\]'"),
        ("c.json", b'[{"id": 1, "text": "t"}', r"c\.json:2: not JSON: the file ends within"),
        ("c.json", b'[{"id": 1, "text": "t"}] x', r"c\.json:2: expected a JSON object, not 'x'"),
        ("c.json", b'[{"id": 1, oops' + b" " * 40 + b"]", r"c\.json:1: not JSON \(Expecting property name"),
        ("c.json", b'[{"id": ' + b"[" * 200 + b"]" * 200 + b"}]", r"c\.json:1: not JSON: nested too deeply"),
        ("c.json", b'[{"id": ' + b"9" * 5000 + b"}]", r"c\.json:1: not JSON: a number has thousands"),
        ("c.json", b'[{"id": "\xff"}]', r"c\.json:1: not UTF-8"),
        ("p.tsv", b"id\ttext\ttitle\n1\tx\n", r"p\.tsv:2: expected 3 columns .* found 2"),
        ("p.tsv", b"id\ttext\ttitle\n1\tx\ty\tz\n", r"p\.tsv:2: expected 3 columns .* found 4"),
        ("p.tsv", b"nr\tinhalt\tname\n1\tx\ty\n", r"p\.tsv:1: its columns are called nr, inhalt, name"),
        (
            "p.tsv",
            b"1\tx\ty\tz\n",
            r'p\.tsv:1: has no header, and 4 columns .*corpus\.columns, as in {id: "1", text: "2"}',
        ),
        ("p.tsv", b"id\ttext\ttitle\r1\tx\ty\r", r"p\.tsv:1: its lines end in carriage returns"),
        ("p.tsv", b"id\ttext\ttitle\n1\t\ty\n", r'p\.tsv:2: empty or missing "text"'),
        ("p.tsv", HEADER + b'1\tx\ty\n2\t"open\tT\n3\tz"\tU\n', r'p\.tsv:3: a column opens with " and does not end'),
        ("p.tsv", HEADER + b'1\t"To be" opens a speech: "to die\tHamlet\n', r"p\.tsv:2: .*corpus\.quoting=none"),
        ("p.tsv", HEADER + b'1\t"two\nlines"\tT\n', r"p\.tsv:2: .* a record is one line.*corpus\.quoting=multiline"),
        ("p.tsv", HEADER, r"p\.tsv: the corpus holds no passages; expected passages as JSON"),
        ("c.jsonl", b"\n", r"c\.jsonl: the corpus holds no passages; expected passages as JSON"),
        ("c.jsonl", GOOD + b"[" * 5000 + b"]" * 5000, r"c\.jsonl:2: not JSON: nested too deeply"),
        ("c.jsonl", GOOD + b'{"id": ' + b"9" * 5000 + b"}", r"c\.jsonl:2: not JSON: a number has thousands"),
        ("c.jsonl", '{"id": "a", "text": "t"}'.encode("utf-16"), r"c\.jsonl:1: not UTF-8"),
    ],
)
def test_bad_records_are_named(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / name, content))


def test_dpr_quotes_that_do_not_open_a_column_are_text_and_columns_may_be_long(tmp_path):
    long = "word " * 60_000  # 300 KB
    path = write(tmp_path / "p.tsv", f'id\ttext\ttitle\n6\tA 12" single\tMusic\r\n7\t"{long}"\tB\n8\t{long}\tC\n')
    assert read(path) == [Passage("6", "Music", 'A 12" single'), Passage("7", "B", long), Passage("8", "C", long)]


def test_two_passages_with_one_id_are_named_by_their_lines(tmp_path):
    first = write(tmp_path / "a.jsonl", '\n{"id": "1", "text": "x"}\n')
    second = write(tmp_path / "b.jsonl", '\n\n{"id": 1, "text": "y"}\n')
    both = reader(first, second)
    with pytest.raises(InputError, match=r"a\.jsonl:2 and .*b\.jsonl:3 have the same id '1'"):
        scan_passages(both.read, place=both.place)


@pytest.mark.parametrize(
    "line", [b'{"id": "b", "text": "%b"}\n', b'[{"id": "a", "text": "t"}, {"id": "b", "text": "%b"}]']
)
def test_a_record_has_a_longest_length(tmp_path, monkeypatch, line):
    for module in ("byte_stream", "json_records"):
        monkeypatch.setattr(f"ragjax.data.reading.{module}.LONGEST_LINE", 1 << 20)
    path = write(tmp_path / "c.jsonl", (GOOD if line.startswith(b"{") else b"") + line % (b"x" * (3 << 20)))
    with pytest.raises(InputError, match=r"c\.jsonl:2: longer than 1 MiB"):
        read(path)


def test_what_a_file_must_hold(tmp_path):
    lines, table = write(tmp_path / "a", GOOD), write(tmp_path / "b", HEADER + b"1\tx\ty\n")
    assert read(lines, format="jsonl") and read(table, format="dpr")
    for path, format in ((lines, "dpr"), (table, "jsonl")):
        with pytest.raises(InputError, match=r"leave out corpus\.format"):
            read(path, format=format)
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "nothing.jsonl")


def write_shards(folder: Path, *shards: list[Passage]) -> Path:
    for number, passages in enumerate(shards):
        write_store(shard_folder(folder, number), passages, encode, text_of)
    return folder


@pytest.mark.parametrize("batch", [1, 2, 1024])
def test_store_gives_back_what_was_written(tmp_path, batch):
    write_store(shard_folder(tmp_path / "new", 0), PASSAGES, encode, text_of, batch)
    store = PassageStore.open(tmp_path / "new")
    assert (len(store), store.token_count) == (3, 11)
    assert list(store) == PASSAGES
    for i, ids in enumerate(encode([text_of(passage) for passage in PASSAGES])):
        np.testing.assert_array_equal(store.tokens(i), ids)
        assert store.tokens(i).dtype == np.int32
        assert store.tokens(i).base is not None  # a view: nothing was copied
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            store[wrong]
        with pytest.raises(IndexError):
            store.tokens(wrong)


@pytest.mark.parametrize("sizes", [(7,), (3, 3, 1), (1,) * 7, (6, 1)])
def test_shards_read_as_one_store(tmp_path, sizes):
    passages = [Passage(f"{i}", "T" * i, "x " * (i + 1)) for i in range(7)]
    ends = np.cumsum(sizes)
    store = PassageStore.open(write_shards(tmp_path, *(passages[e - n : e] for e, n in zip(ends, sizes, strict=True))))
    assert list(store) == passages and store[6] == passages[6]
    assert [store.tokens(i).tolist() for i in range(7)] == encode([text_of(passage) for passage in passages])


def scan(passages: list[Passage], **settings) -> CorpusStats:
    return scan_passages(lambda: iter(passages), **settings)


def test_a_scan_counts_and_fingerprints(tmp_path):
    seen: list[int] = []
    first = scan(PASSAGES, progress=seen.append)
    write_shards(tmp_path, PASSAGES)
    text = (shard_folder(tmp_path, 0) / "text.bin").read_bytes()
    assert first == CorpusStats(3, f"sha256:{hashlib.sha256(text).hexdigest()}", len(text)) and sum(seen) == 3
    assert scan(PASSAGES) == first != scan(PASSAGES[::-1])


def test_a_scan_refuses():
    with pytest.raises(InputError, match="no passages"):
        scan([])
    with pytest.raises(InputError, match=r"passage 2 and passage 4 have the same id 'b'"):
        scan([*PASSAGES, PASSAGES[1]])


@pytest.mark.parametrize("key", [len, lambda identity: 0, lambda identity: -(2**63)])
def test_ids_whose_hashes_collide(key):
    assert scan(PASSAGES, key=key) == scan(PASSAGES)
    with pytest.raises(InputError, match=r"passage 1 and passage 4 have the same id '1'"):
        scan([*PASSAGES, PASSAGES[0], PASSAGES[2]], key=key)


def test_a_scan_keeps_no_passages():
    """A corpus as a stream, whose passages are gone once they were read."""
    alive: weakref.WeakSet[Passage] = weakref.WeakSet()

    def read():
        for i in range(5000):
            passage = Passage(f"{i}", "t", "x")
            alive.add(passage)
            assert len(alive) <= 2
            yield passage

    assert scan_passages(read).count == 5000


def test_passages_without_tokens(tmp_path):
    write_store(shard_folder(tmp_path, 0), PASSAGES, lambda texts: [[] for _ in texts], text_of)
    store = PassageStore.open(tmp_path)
    assert store.token_count == 0 and store.tokens(1).size == 0


def test_passages_that_fail_leave_the_old_store(tmp_path):
    def broken():
        yield PASSAGES[0]
        raise KeyboardInterrupt

    write_shards(tmp_path, PASSAGES)
    with pytest.raises(KeyboardInterrupt):
        write_store(shard_folder(tmp_path, 0), broken(), encode, text_of, batch=1)
    assert sorted(file.name for file in shard_folder(tmp_path, 0).iterdir()) == sorted(STORE_FILES)
    assert list(PassageStore.open(tmp_path)) == PASSAGES


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", STORE_FILES)
def test_full_disk_removes_the_partial_files(tmp_path, name):
    (tmp_path / f"{name}.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match="disk is full"):
        write_store(tmp_path, PASSAGES, encode, text_of)
    assert list(tmp_path.iterdir()) == []


def test_incomplete_or_damaged_store(tmp_path):
    with pytest.raises(InputError, match="run: ragjax index CONFIG"):
        PassageStore.open(tmp_path)
    for name in STORE_FILES:
        write_shards(tmp_path, PASSAGES[:2], PASSAGES[2:])
        path = shard_folder(tmp_path, 1) / name
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(InputError, match=r"shards/00001: .*damaged"):
            PassageStore.open(tmp_path)
        path.unlink()
        with pytest.raises(InputError, match=r"shards/00001: .*missing"):
            PassageStore.open(tmp_path)
    shutil.rmtree(shard_folder(tmp_path, 0))
    with pytest.raises(InputError, match="shards/00000 is missing"):
        PassageStore.open(tmp_path)


def test_files_are_mapped_beyond_the_usual_limit(tmp_path):
    """Each map holds a descriptor; a shell allows 1,024 of them."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    write_shards(tmp_path, *([passage] for passage in PASSAGES * 40))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
    try:
        assert len(list(PassageStore.open(tmp_path))) == 120
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_write_jsonl_keeps_the_old_file_when_it_fails(tmp_path):
    path = write(tmp_path / "out.jsonl", "old")

    def records():
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, records())
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def damaged_shard(tmp_path, name, change):
    """A store whose first shard has no checksums, and one file changed."""
    write_shards(tmp_path, PASSAGES[:2], PASSAGES[2:])
    path = shard_folder(tmp_path, 0) / name
    if path.suffix == ".npy":
        values = np.load(path)
        change(values)
        np.save(path, values)
    else:
        path.write_bytes(change(path.read_bytes()))
    return PassageStore.open(tmp_path, vocabulary=300)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokens.bin", lambda _: np.full(1000, -1, np.int32).tobytes(), "holds tokens from -1"),
        ("tokens.bin", lambda _: np.full(1000, 300, np.int32).tobytes(), "to 300, of 300"),
        ("text.bin", lambda text: b"\xff" + text[1:], "not UTF-8"),
        ("text.bin", lambda text: b"[" + text[1:], "not JSON"),
        ("text.bin", lambda text: text.replace(b'"id"', b'"ID"'), "has no id, title and text"),
        ("text_offsets.npy", lambda ends: ends.__setitem__(1, ends[-1] + 1), "do not rise"),
        ("token_offsets.npy", lambda ends: ends.__setitem__(1, -1), "do not rise"),
    ],
)
def test_what_cannot_be_is_refused_even_without_checksums(tmp_path, name, change, message):
    """Never the last passage for a negative number, never a token that no vocabulary has."""
    if name == "tokens.bin":
        size, make = (np.load(_offsets(tmp_path))[-1], change)
        change = lambda _: make(_)[: 4 * size]  # noqa: E731
    store = damaged_shard(tmp_path, name, change)
    with pytest.raises(InputError, match=f"shards/00000.*{message}"):
        store[0], store.tokens(0), store.longest
    with pytest.raises(InputError, match=message):
        list(store), store.token_rows(0, len(store), 8)
    store[2], store.tokens(2)


def _offsets(tmp_path):
    write_shards(tmp_path, PASSAGES[:2], PASSAGES[2:])
    return shard_folder(tmp_path, 0) / "token_offsets.npy"


def test_a_shard_is_checked_when_it_is_first_read(tmp_path):
    write_shards(tmp_path, PASSAGES[:2], PASSAGES[2:])
    for number in range(2):
        write_checksums(shard_folder(tmp_path, number), number=number)
    path = shard_folder(tmp_path, 1) / "text.bin"
    path.write_bytes(path.read_bytes().replace(b"e", b"a", 1))
    store = PassageStore.open(tmp_path)
    assert store[0] == PASSAGES[0] and store.tokens(2).size
    with pytest.raises(InputError, match=r"shards/00001: is damaged \(text.bin its contents have changed\); run"):
        store[2]
    shutil.move(shard_folder(tmp_path, 1), tmp_path / "1")
    shutil.move(shard_folder(tmp_path, 0), shard_folder(tmp_path, 1))
    shutil.move(tmp_path / "1", shard_folder(tmp_path, 0))
    with pytest.raises(InputError, match=r"shards/00001: is damaged \(it is number 0\)"):
        PassageStore.open(tmp_path)[len(PASSAGES) - 1]
