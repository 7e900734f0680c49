"""Building the index: repeatable to the byte, equal to embedding each passage by itself, whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from processes import QUICK_TO_COMPILE
from trained import files
from world import build, tiny_config

from ragjax.checksums import CHECKSUMS
from ragjax.commands import index as build_module
from ragjax.config import Config, dump_config
from ragjax.data.corpus import CorpusReader, Passage
from ragjax.data.passage_store import PassageStore, shard_folder
from ragjax.data.prompt import passage_text
from ragjax.data.question_batch import tokenize_passages, tokenize_questions
from ragjax.errors import InputError
from ragjax.files import exclusive_lock
from ragjax.rag import load_pipeline
from ragjax.retrieval import encoder as encoder_module
from ragjax.retrieval import faiss_index as faiss_module
from ragjax.retrieval.building import index_builder as builder_module
from ragjax.retrieval.building import shard_writer as writer_module
from ragjax.retrieval.encoder import encode
from ragjax.retrieval.index import MANIFEST, Index, open_index, read_index_manifest, write_index
from ragjax.retrieval.retrieve import retrieve


def opened(config: Config) -> Index:
    return open_index(Path(config.index.path), load_pipeline(config).fingerprints)


def names(folder: Path) -> set[str]:
    return {path.name for path in files(folder)}


@pytest.fixture(scope="module")
def one_by_one(world: Path) -> np.ndarray:
    """The embedding of each passage, alone and without padding."""
    rag = load_pipeline(tiny_config(world))
    texts = [
        passage_text("{title}: {text}", p)
        for p in CorpusReader([world / "passages.jsonl"], tiny_config(world).corpus).read()
    ]
    rows = [np.array([row]) for row in rag.retriever_tokenizer.encode(texts, special=True, longest=64)]
    params = rag.retriever.load_params()
    found = [encode(rag.retriever.graphdef, params, jnp.asarray(row), jnp.ones(row.shape, bool)) for row in rows]
    return np.concatenate([np.asarray(x) for x in found])


def test_embeddings_are_those_of_each_passage_alone(world: Path, one_by_one: np.ndarray) -> None:
    index = opened(tiny_config(world))
    np.testing.assert_allclose(index.embeddings, one_by_one, atol=1e-5)
    assert (index.manifest["N"], index.manifest["D"], index.kind) == (30, 32, "exact")


def test_special_tokens_in_the_template_are_special(world: Path) -> None:
    """DPR reads [CLS] title [SEP] text [SEP]; what a passage says of itself stays text, and the end is cut."""
    tokenizer = load_pipeline(tiny_config(world)).retriever_tokenizer
    passages = [Passage("a", "One", "two [SEP] three"), Passage("b", "Four", "five " * 40)]
    found = tokenize_passages(tokenizer, "{title} [SEP] {text}", passages, 64)
    whole, cut = (row.tolist() for row in found)
    (cls,), (sep,) = tokenizer.frame
    title, text = tokenizer.encode(["One ", " two [SEP] three"])
    assert whole == [cls, *title, sep, *text, sep] and whole.count(sep) == 2
    assert len(cut) == 64 and cut[:1] == [cls] and cut[-1] == sep and cut.count(sep) == 2
    plain = tokenize_passages(tokenizer, "{title}: {text}", passages, 64, batch=1)
    texts = [passage_text("{title}: {text}", passage) for passage in passages]
    assert [row.tolist() for row in plain] == tokenizer.encode(texts, special=True, longest=64)


def test_retrieval_is_the_largest_inner_products(world: Path, one_by_one: np.ndarray) -> None:
    rag, texts = load_pipeline(tiny_config(world)), ["What is the capital of Arland?"]
    params = rag.initial_params()
    [row] = rag.retriever_tokenizer.encode(texts, special=True, longest=64)
    [query] = encode(rag.retriever.graphdef, params["retriever"], jnp.asarray([row]), jnp.ones((1, len(row)), bool))
    found = retrieve(rag, params, opened(rag.config), tokenize_questions(rag.tokenizers, texts), 4)
    scores = one_by_one @ np.asarray(query)
    np.testing.assert_array_equal(found.ids[0], np.argsort(-scores, kind="stable")[:4])
    np.testing.assert_allclose(found.scores[0], np.sort(scores)[::-1][:4], atol=1e-5)


def test_text_and_tokens_are_kept(world: Path) -> None:
    store, rag = PassageStore.open(world / "index"), load_pipeline(tiny_config(world))
    passages = list(CorpusReader([world / "passages.jsonl"], tiny_config(world).corpus).read())
    assert list(store) == passages
    expected = rag.generator_tokenizer.encode([f"{p.title}: {p.text}" for p in passages])
    assert [store.tokens(i).tolist() for i in range(30)] == expected
    assert opened(rag.config).manifest["generator_tokens"] == sum(map(len, expected))


def test_passages_are_stored_whole_whatever_a_prompt_holds(world: Path, tmp_path: Path) -> None:
    build(tiny_config(world, index__path=str(tmp_path), generator__max_prompt_tokens=20))
    assert PassageStore.open(tmp_path).token_count == PassageStore.open(world / "index").token_count


@pytest.mark.parametrize("kind", ["exact", "Flat"])
def test_built_again_it_is_the_same_to_the_byte(world: Path, tmp_path: Path, kind: str) -> None:
    config = tiny_config(world, index__path=str(tmp_path / "index"), index__kind=kind)
    assert build(config) == tmp_path / "index"
    first = files(tmp_path)
    shutil.rmtree(tmp_path / "index")
    build(config)
    assert files(tmp_path) == first
    if kind == "exact":
        assert {path.name: content for path, content in first.items()} == {
            path.name: content for path, content in files(world / "index").items()
        }


def test_an_index_of_the_same_contents_stays(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = Path(shutil.copy(world / "passages.jsonl", tmp_path))
    config = tiny_config(world, index__path=str(tmp_path / "index"), corpus__source=str(corpus))
    build(config)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    build(config)
    assert "holds this index already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()} == stamps
    corpus.write_text(corpus.read_text().replace("capital", "Capital"))
    build(config)
    assert "Capital" in PassageStore.open(tmp_path / "index")[0].text


def test_a_link_to_nothing_and_a_folder_for_a_file(world: Path, tmp_path: Path) -> None:
    (tmp_path / "index").symlink_to(tmp_path / "large disk" / "index")
    config = tiny_config(world, index__path=str(tmp_path / "index"))
    build(config)
    assert (tmp_path / "index").is_symlink()
    expected = files(world / "index")
    assert {path.name for path in files(tmp_path / "large disk")} == {path.name for path in expected}
    (tmp_path / "index" / MANIFEST).unlink()
    (tmp_path / "index" / MANIFEST).mkdir()
    (tmp_path / "index" / "made_of.json").unlink()
    build(config)
    read_index_manifest(tmp_path / "index")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(world: Path, tmp_path: Path, one_by_one: np.ndarray, dtype: str) -> None:
    config = tiny_config(world, index__path=str(tmp_path), index__dtype=dtype)
    build(config)
    stored = np.asarray(opened(config).embeddings)
    assert stored.dtype == np.dtype(dtype)
    np.testing.assert_allclose(stored.astype(np.float32), one_by_one, atol=2e-3 if dtype == "bfloat16" else 3e-4)


def test_another_kind_leaves_nothing_of_the_old_one(world: Path, tmp_path: Path) -> None:
    folder, queries = str(tmp_path), np.eye(32, dtype=np.float32)[:4]
    build(tiny_config(world, index__path=folder, index__kind="HNSW8"))
    assert "faiss.index" in names(tmp_path)
    approximate = opened(tiny_config(world, index__path=folder, index__kind="HNSW8")).search(queries, 5)
    build(tiny_config(world, index__path=folder))
    assert "faiss.index" not in names(tmp_path)
    exact = opened(tiny_config(world, index__path=folder)).search(queries, 5)
    np.testing.assert_array_equal(approximate[1], exact[1])  # of thirty passages, it finds all
    np.testing.assert_allclose(approximate[0], exact[0], atol=1e-6)


def test_a_build_that_fails_at_its_end_leaves_the_old_index_and_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "index"
    build(tiny_config(world, index__path=str(folder)))
    (folder / "notes.txt").write_text("mine")
    before = files(folder)
    monkeypatch.setattr(builder_module, "write_index", fail)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_config(world, index__path=str(folder), corpus__max_passages=7))
    assert files(folder) == before
    assert "index.partial stays: run the same command again to go on" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(build_module, "scan_passages", fail)  # nothing is read or embedded again
    monkeypatch.setattr(builder_module, "ShardWriter", fail)
    build(tiny_config(world, index__path=str(folder), corpus__max_passages=7))
    assert "going on with the index: 7 of 7 passages are there" in capsys.readouterr().err
    assert len(PassageStore.open(folder)) == 7 and (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_dpr_files_gzipped(world: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "psgs.tsv.gz"
    corpus.write_bytes(gzip.compress(b"id\ttext\ttitle\n1\tIts capital is Kesbourg.\tArland\n2\tA land.\tBelland\n"))
    settings = {"corpus__source": str(corpus), "corpus__format": "dpr"}
    build(tiny_config(world, index__path=str(tmp_path / "index"), **settings))
    store = PassageStore.open(tmp_path / "index")
    assert (len(store), store[0]) == (2, Passage("1", "Arland", "Its capital is Kesbourg."))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("IVF64,Flat", "cannot be trained on the 30 passages there are"),
        ("IDMap,Flat", "which FAISS does not accept for width 32"),
        ("NSG32,Flat", "cannot be built over the 30 passages there are"),
    ],
)
def test_a_kind_that_cannot_be_built_is_refused_before_anything_is_embedded(
    world: Path, tmp_path: Path, kind: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "embed_passages", lambda *_, **__: pytest.fail("nothing is embedded"))
    with pytest.raises(InputError, match=f"index.kind.*{kind}.*{why}") as refusal:
        build(tiny_config(world, index__path=str(tmp_path / "index"), index__kind=kind))
    assert "\n" not in str(refusal.value) and list(tmp_path.iterdir()) == []


# shards


def same_files(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same files, to the byte."""
    ours, theirs = ({p.relative_to(f): content for p, content in files(f).items()} for f in (folder, other))
    return ours == theirs


@pytest.fixture(scope="module")
def sharded(world: Path) -> Path:
    """The world's index in shards of 7, 7, 7, 7 and 2 passages, with a graph: built without disturbance."""
    return build(by_shards(world, world / "sharded"))


@pytest.fixture(scope="module")
def of_another_encoder(world: Path) -> Path:
    """Nothing of it serves an index by the world's encoder."""
    return build(tiny_config(world, index__path=str(world / "other"), retriever__pooling="cls"))


def by_shards(world: Path, folder: Path, **settings: object) -> Config:
    return tiny_config(
        world, **({"index__path": str(folder), "index__shard_size": 7, "index__kind": "HNSW8"} | settings)
    )


def test_shards_are_one_index(world: Path, sharded: Path) -> None:
    one, many = opened(tiny_config(world)), opened(by_shards(world, sharded))
    assert many.manifest["shards"] == [7, 7, 7, 7, 2] and one.manifest["shards"] == [30]
    assert many.manifest["corpus"] == one.manifest["corpus"]
    assert many.manifest["generator_tokens"] == one.manifest["generator_tokens"]
    np.testing.assert_allclose(many.embeddings, one.embeddings, atol=1e-6)
    stores = PassageStore.open(sharded), PassageStore.open(world / "index")
    assert list(stores[0]) == list(stores[1])
    for i in range(30):
        np.testing.assert_array_equal(stores[0].tokens(i), stores[1].tokens(i))
    queries = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    for found, expected in zip(many.search(queries, 6), one.search(queries, 6), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_shard_depends_on_its_own_passages_only(world: Path, sharded: Path, tmp_path: Path) -> None:
    fewer = build(by_shards(world, tmp_path / "index", corpus__max_passages=21))
    for number in range(3):
        assert same_files(shard_folder(fewer, number), shard_folder(sharded, number))


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_a_build_that_was_interrupted_goes_on(
    world: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    """Within a shard, after so many whole ones."""
    written: list[Path] = []
    embed = writer_module.embed_passages

    def interrupted(batches: Any, count: int, *, path: Path, **others: Any) -> None:
        if len(written) == whole:
            raise KeyboardInterrupt
        embed(batches, count, path=path, **others)
        written.append(path)

    config = by_shards(world, tmp_path / "index")
    monkeypatch.setattr(writer_module, "embed_passages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(config)
    assert not (tmp_path / "index").exists()
    if whole == 0:  # nothing to go on with
        assert list(tmp_path.iterdir()) == []
        return
    shards = {p: p.stat().st_mtime_ns for p in files(tmp_path / "index.partial" / "shards")}
    assert {path.parent.name for path in shards} == {f"{number:05d}" for number in range(whole)}
    whole = -1
    monkeypatch.setattr(build_module, "scan_passages", None)  # is not needed again
    build(config)
    assert same_files(tmp_path / "index", sharded) and len(written) == 5
    for path, stamp in shards.items():  # the very files
        assert (tmp_path / "index" / path.relative_to(tmp_path / "index.partial")).stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


HARM = {  # a file of an index, and which shards are made anew
    "shards/00001/text.bin": [1],
    "shards/00003/embeddings.npy": [3],
    "shards/00004/tokens.bin": [4],
    "shards/00000/checksums.json": [0],
    "shards/00002": [2],
    "faiss.index": [],
    "made_of.json": [],
    MANIFEST: [],
}


@pytest.mark.parametrize(
    ("file", "gone"), [(file, False) for file in HARM] + [("shards/00001/text.bin", True), (MANIFEST, True)]
)
def test_only_what_is_damaged_is_made_anew(
    world: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, gone: bool
) -> None:
    """It comes out the same to the byte, and what is whole stays as it is."""
    folder = Path(shutil.copytree(sharded, tmp_path / "index"))
    whole, path = files(folder), folder / file
    if path.is_dir():
        shutil.rmtree(path)
    elif gone:
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:100] + bytes([content[100] ^ 4]) + content[101:])
    stamps = {path: path.stat().st_mtime_ns for path in files(folder)}
    written, embed = list[str](), writer_module.embed_passages

    def counted(batches: Any, count: int, *, path: Path, **others: Any) -> None:
        written.append(path.parent.name)
        embed(batches, count, path=path, **others)

    monkeypatch.setattr(writer_module, "embed_passages", counted)
    build(by_shards(world, folder, index__shard_size=7 if file in (MANIFEST, "made_of.json") else 5))
    assert files(folder) == whole
    assert written == [f"{number:05d}.partial" for number in HARM[file]]
    same = {path for path, stamp in stamps.items() if path.stat().st_mtime_ns == stamp}
    new = {f"{number:05d}" for number in HARM[file]}
    assert {p for p in stamps if "shards" in p.parts and p.parent.name not in new} <= same
    assert file in ("faiss.index", "made_of.json", MANIFEST) or folder / "faiss.index" in same
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_mending_that_was_killed_goes_on(
    world: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "index"))
    whole = files(folder)
    for number in (1, 2):
        (shard_folder(folder, number) / "text.bin").write_bytes(b"?")
    with monkeypatch.context() as patch:  # between the two moves
        moves, replace = iter([os.replace]), os.replace
        target = str(shard_folder(folder, 0).parent)
        patch.setattr(os, "replace", lambda a, b: next(moves)(a, b) if str(b).startswith(target) else replace(a, b))
        with pytest.raises(StopIteration):
            build(by_shards(world, folder))
    assert "shards/00001/text.bin has 1 bytes and not" in capsys.readouterr().err
    monkeypatch.setattr(writer_module, "embed_passages", lambda *_, **__: pytest.fail("both are there"))
    build(by_shards(world, folder))
    assert files(folder) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_where_a_shard_comes_out_otherwise_the_structure_follows(world: Path, sharded: Path, tmp_path: Path) -> None:
    """As with another JAX or device; here the index had other embeddings, and was summed with them."""
    folder = Path(shutil.copytree(sharded, tmp_path / "index"))
    shard, manifest = shard_folder(folder, 2), read_index_manifest(folder)
    vectors = np.load(shard / "embeddings.npy")
    np.save(shard / "embeddings.npy", vectors[::-1])
    (shard / CHECKSUMS).unlink()
    write_index(
        folder, "HNSW8", "float32", {key: manifest[key] for key in ("corpus", "generator_tokens", "fingerprints")}
    )
    (shard / "tokens.bin").unlink()
    build(by_shards(world, folder))
    assert same_files(folder, sharded)


def start(config: Config, tmp_path: Path) -> subprocess.Popen[bytes]:
    """`ragjax index` in a process of its own, on one device, compiled as the tests' programs are."""
    (tmp_path / "own.yaml").write_text(dump_config(config), encoding="utf-8")
    environment = os.environ | QUICK_TO_COMPILE
    command = [sys.executable, "-m", "ragjax", "index", str(tmp_path / "own.yaml")]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on(world: Path, sharded: Path, tmp_path: Path) -> None:
    """Killed at any moment, again and again; each process has one device, and the undisturbed one had two."""
    folder, generator = tmp_path / "index", np.random.default_rng()
    finished = build(by_shards(world, tmp_path / "undisturbed", index__shard_size=1))
    for shards in np.sort(generator.integers(0, 30, 3)):
        with start(by_shards(world, folder, index__shard_size=1), tmp_path) as process:
            while process.poll() is None:
                if len(list((tmp_path / "index.partial" / "shards").glob("[0-9]*[0-9]"))) >= shards:
                    time.sleep(generator.uniform(0, 0.02))
                    process.kill()
                    break
                time.sleep(0.002)
    build(by_shards(world, folder, index__shard_size=1))
    assert same_files(folder, finished)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "own.yaml", "undisturbed"]


class Killed(BaseException):
    """Stands for a kill: nothing is tidied up."""


@pytest.mark.parametrize("moves", [0, 1, 2, 7, 8, 9, 10, 11, 12])  # seven files are deleted, then four things moved
@pytest.mark.parametrize("before", ["nothing", "another encoder's", "flat files"])
def test_a_build_that_was_killed_in_the_swap_goes_on(
    world: Path,
    sharded: Path,
    of_another_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moves: int,
    before: str,
) -> None:
    folder = tmp_path / "index"
    if before == "another encoder's":
        shutil.copytree(of_another_encoder, folder)
    if before == "flat files":  # as before there were shards
        shutil.copytree(shard_folder(world / "index", 0), folder)
        (folder / CHECKSUMS).unlink()
        (folder / MANIFEST).write_text("{}")
    done = 0

    def counted(move: Any) -> Any:
        def act(*arguments: Any, **more: Any) -> Any:
            nonlocal done
            if str(folder) + "/" in f"{arguments[-1]}/":
                if done == moves:
                    raise Killed
                done += 1
            return move(*arguments, **more)

        return act

    config = by_shards(world, folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        with contextlib.suppress(Killed):
            build(config)
    monkeypatch.setattr(builder_module, "ShardWriter", None)  # nothing is embedded again
    build(config)
    assert same_files(folder, sharded)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize(
    "settings", [{"index__shard_size": 5}, {"index__batch_size": 3}, {"retriever__pooling": "cls"}]
)
def test_with_other_settings_a_build_starts_anew(
    world: Path, tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    leave_shards(by_shards(world, tmp_path / "index"))
    config = by_shards(world, tmp_path / "index", **settings)
    build(config)
    assert "going on" not in capsys.readouterr().err
    build(by_shards(world, tmp_path / "other", **settings))
    assert same_files(tmp_path / "index", tmp_path / "other")


def leave_shards(config: Config) -> None:
    """What a build leaves that is interrupted before its manifest is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder_module, "write_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(config)


def test_a_corpus_that_changed_is_embedded_anew(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = Path(shutil.copy(world / "passages.jsonl", tmp_path))
    config = by_shards(world, tmp_path / "index", corpus__source=str(corpus))
    leave_shards(config)
    corpus.write_text(corpus.read_text().replace("capital", "Capital"))
    build(config)
    assert "going on" not in capsys.readouterr().err
    assert all("Capital" in passage.text for passage in PassageStore.open(tmp_path / "index"))


def test_a_second_build_of_the_same_index_is_refused(world: Path, tmp_path: Path) -> None:
    config = by_shards(world, tmp_path / "index")
    with exclusive_lock(tmp_path / "index.partial", "builds"), pytest.raises(InputError) as refusal:
        build(config)
    assert "index.partial: another process builds this index; wait for it, or choose another" in str(refusal.value)
    build(config)


def test_embeddings_that_are_no_numbers(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(params: Any, tokens: Any, mask: Any) -> np.ndarray:
        return np.where(np.arange(32) == 3, np.nan, np.ones((len(tokens), 32)))

    monkeypatch.setattr(encoder_module, "_sharded_encode", lambda *_: broken)
    with pytest.raises(InputError, match=r"an embedding is not finite in index\.dtype=float32"):
        build(by_shards(world, tmp_path / "index"))
    assert list(tmp_path.iterdir()) == []


def test_no_more_than_a_shard_of_passages_is_held(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Passage] = weakref.WeakSet()
    most = 0

    read = CorpusReader.read

    def counted(reader: CorpusReader) -> Iterator[Passage]:
        nonlocal most
        for passage in read(reader):
            alive.add(passage)
            most = max(most, len(alive))
            yield passage

    monkeypatch.setattr(CorpusReader, "read", counted)
    build(by_shards(world, tmp_path / "index", index__shard_size=4))
    assert 4 <= most <= 2 * 4


def test_the_encoder_is_compiled_once_for_all_shards(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, on_each_device = [], encoder_module.map_per_device

    def count(*given: Any) -> Any:
        made.append(given)
        return on_each_device(*given)

    encoder_module._sharded_encode.cache_clear()
    monkeypatch.setattr(encoder_module, "map_per_device", count)
    build(by_shards(world, tmp_path / "index"))
    assert len(made) == 1


@pytest.mark.parametrize("kind", ["exact", "HNSW8"])
def test_what_it_will_take_is_told_first(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The disk to the byte but for the tokens, of which the first thousand passages tell, here all; and the memory."""
    folder = build(tiny_config(world, index__path=str(tmp_path / "index"), index__kind=kind, index__shard_size=7))
    told = capsys.readouterr().err
    stored = {path: len(data) for path, data in files(folder).items() if path.suffix in (".bin", ".npy", ".index")}
    headers = 128 * sum(path.suffix == ".npy" for path in stored)
    found = re.search(r"30 passages will take ([0-9.]+) KiB of disk \((.*)\)", told)
    assert found is not None and told.index("will take") < told.index("embed:")
    assert float(found[1]) * 1024 == pytest.approx(sum(stored.values()) - headers, abs=600 if kind == "HNSW8" else 60)
    assert "3.8 KiB embeddings" in found[2] and "about " in found[2] and (kind in found[2]) == (kind != "exact")
    assert ("all devices together" if kind == "exact" else "each host's") in told


def test_a_disk_that_is_too_small_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_module, "free_disk", lambda folder: 8000)
    monkeypatch.setattr(writer_module, "embed_passages", lambda *_, **__: pytest.fail("nothing is embedded"))
    config = tiny_config(world, index__path=str(tmp_path / "index"))
    with pytest.raises(InputError, match=r"has 7\.8 KiB free, and the index needs .* more; .*index\.dtype=bfloat16"):
        build(config)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_needs_no_room(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = by_shards(world, tmp_path / "index")
    monkeypatch.setattr(builder_module, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(config)
    monkeypatch.undo()
    monkeypatch.setattr(build_module, "free_disk", lambda folder: 5000)  # all of it takes more
    build(config)


def test_a_structure_that_memory_cannot_hold_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what only cannot be searched here is built: it may be meant for other machines."""
    monkeypatch.setattr(build_module, "host_memory", lambda: 3000)
    config = tiny_config(world, index__path=str(tmp_path / "index"), index__kind="HNSW32")
    with pytest.raises(InputError, match=r"building it takes .* and this machine has 2\.9 KiB; kinds .*OPQ"):
        build(config)
    assert list(tmp_path.iterdir()) == []
    build(tiny_config(world, index__path=str(tmp_path / "index")))
    assert "it can be built here, but not searched" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["HNSW8", "IVF2,PQ4x4"])
def test_a_killed_pass_of_faiss_starts_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Nothing is embedded again, and what comes out is what an undisturbed build makes."""
    undisturbed = build(tiny_config(world, index__path=str(tmp_path / "undisturbed"), index__kind=kind))
    config = tiny_config(world, index__path=str(tmp_path / "index"), index__kind=kind)
    monkeypatch.setattr(faiss_module, "_search_widely", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(config)
    monkeypatch.undo()
    monkeypatch.setattr(writer_module, "embed_passages", lambda *_, **__: pytest.fail("the shards are there"))
    assert same_files(build(config), undisturbed)
    assert json.loads((tmp_path / "index" / "manifest.json").read_text())["faiss"]["add_batch"] == 65_536


def test_an_index_of_before_there_were_shards_is_built_anew(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    shutil.copytree(shard_folder(world / "index", 0), folder)
    (folder / CHECKSUMS).unlink()
    manifest = json.loads((world / "index" / MANIFEST).read_text()) | {"embeddings": "embeddings.npy"}
    del manifest["shards"], manifest["xxh3"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="older ragjax; run: ragjax index CONFIG"):
        opened(tiny_config(world, index__path=str(folder)))
    build(tiny_config(world, index__path=str(folder)))
    assert same_files(folder, world / "index")
