"""Building the index: repeatable to the byte, equal to embedding each passage by itself, whole or not at all."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from trained import files
from world import build, tiny_config

from ragjax import build_index as build_module
from ragjax.config import Config, InputError
from ragjax.index import MANIFEST, Index, open_index
from ragjax.passages import Passage, PassageStore, read_passages
from ragjax.rag import encode, open_rag, passage_text, retrieve


def opened(config: Config) -> Index:
    return open_index(Path(config.index.folder), open_rag(config).fingerprints)


def names(folder: Path) -> set[str]:
    return {path.name for path in files(folder)}


@pytest.fixture(scope="module")
def one_by_one(world: Path) -> np.ndarray:
    """The embedding of each passage, alone and without padding."""
    rag = open_rag(tiny_config(world))
    texts = [passage_text("{title}: {text}", p) for p in read_passages(world / "passages.jsonl", "jsonl")]
    rows = [np.array([row]) for row in rag.retriever_tokenizer.encode(texts, special=True, longest=64)]
    params = rag.retriever.read()
    found = [encode(rag.retriever.graph, params, jnp.asarray(row), jnp.ones(row.shape, bool)) for row in rows]
    return np.concatenate([np.asarray(x) for x in found])


def test_embeddings_are_those_of_each_passage_alone(world: Path, one_by_one: np.ndarray) -> None:
    index = opened(tiny_config(world))
    np.testing.assert_allclose(index.embeddings, one_by_one, atol=1e-5)
    assert (index.manifest["N"], index.manifest["D"], index.kind) == (30, 32, "exact")


def test_special_tokens_in_the_template_are_special(world: Path) -> None:
    """DPR reads [CLS] title [SEP] text [SEP]; what a passage says of itself stays text, and the end is cut."""
    tokenizer = open_rag(tiny_config(world)).retriever_tokenizer
    passages = [Passage("a", "One", "two [SEP] three"), Passage("b", "Four", "five " * 40)]
    whole, cut = build_module.passage_rows(tokenizer, "{title} [SEP] {text}", passages, 64)
    (cls,), (sep,) = tokenizer.frame
    title, text = tokenizer.encode(["One ", " two [SEP] three"])
    assert whole == [cls, *title, sep, *text, sep] and whole.count(sep) == 2
    assert len(cut) == 64 and cut[:1] == [cls] and cut[-1] == sep and cut.count(sep) == 2
    plain = build_module.passage_rows(tokenizer, "{title}: {text}", passages, 64)
    texts = [passage_text("{title}: {text}", passage) for passage in passages]
    assert plain == tokenizer.encode(texts, special=True, longest=64)


def test_retrieval_is_the_largest_inner_products(world: Path, one_by_one: np.ndarray) -> None:
    rag, texts = open_rag(tiny_config(world)), ["What is the capital of Arland?"]
    params = rag.initial_params()
    [row] = rag.retriever_tokenizer.encode(texts, special=True, longest=64)
    [query] = encode(rag.retriever.graph, params["retriever"], jnp.asarray([row]), jnp.ones((1, len(row)), bool))
    found = retrieve(rag, params, opened(rag.config), texts, 4)
    scores = one_by_one @ np.asarray(query)
    np.testing.assert_array_equal(found.ids[0], np.argsort(-scores, kind="stable")[:4])
    np.testing.assert_allclose(found.scores[0], np.sort(scores)[::-1][:4], atol=1e-5)


def test_text_and_tokens_are_kept(world: Path) -> None:
    store, rag = PassageStore.open(world / "index"), open_rag(tiny_config(world))
    passages = list(read_passages(world / "passages.jsonl", "jsonl"))
    assert list(store) == passages
    expected = rag.generator_tokenizer.encode([f"{p.title}: {p.text}" for p in passages])
    assert [store.tokens(i).tolist() for i in range(30)] == expected
    assert opened(rag.config).manifest["generator_tokens"] == sum(map(len, expected))


def test_passages_are_stored_whole_whatever_a_prompt_holds(world: Path, tmp_path: Path) -> None:
    build(tiny_config(world, index__folder=str(tmp_path), generator__source_tokens=20))
    assert (PassageStore.open(tmp_path).token_offsets == PassageStore.open(world / "index").token_offsets).all()


@pytest.mark.parametrize("kind", ["exact", "Flat"])
def test_built_again_it_is_the_same_to_the_byte(world: Path, tmp_path: Path, kind: str) -> None:
    config = tiny_config(world, index__folder=str(tmp_path / "index"), index__kind=kind)
    assert build(config) == tmp_path / "index"
    first = files(tmp_path)
    (tmp_path / "index" / MANIFEST).unlink()
    build(config)
    assert files(tmp_path) == first
    if kind == "exact":
        assert {path.name: content for path, content in first.items()} == {
            path.name: content for path, content in files(world / "index").items()
        }


def test_an_index_of_the_same_contents_stays(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = Path(shutil.copy(world / "passages.jsonl", tmp_path))
    config = tiny_config(world, index__folder=str(tmp_path / "index"), corpus__source=str(corpus))
    build(config)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    build(config)
    assert "holds this index already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()} == stamps
    corpus.write_text(corpus.read_text().replace("capital", "Capital"))
    build(config)
    assert "Capital" in PassageStore.open(tmp_path / "index")[0].text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(world: Path, tmp_path: Path, one_by_one: np.ndarray, dtype: str) -> None:
    config = tiny_config(world, index__folder=str(tmp_path), index__dtype=dtype)
    build(config)
    stored = opened(config).embeddings
    assert stored.dtype == np.dtype(dtype)
    np.testing.assert_allclose(stored.astype(np.float32), one_by_one, atol=2e-3 if dtype == "bfloat16" else 3e-4)


def test_another_kind_leaves_nothing_of_the_old_one(world: Path, tmp_path: Path) -> None:
    folder, queries = str(tmp_path), np.eye(32, dtype=np.float32)[:4]
    build(tiny_config(world, index__folder=folder, index__kind="HNSW8"))
    assert "faiss.index" in names(tmp_path)
    approximate = opened(tiny_config(world, index__folder=folder, index__kind="HNSW8")).search(queries, 5)
    build(tiny_config(world, index__folder=folder))
    assert "faiss.index" not in names(tmp_path)
    exact = opened(tiny_config(world, index__folder=folder)).search(queries, 5)
    np.testing.assert_array_equal(approximate[1], exact[1])  # of thirty passages, it finds all
    np.testing.assert_allclose(approximate[0], exact[0], atol=1e-6)


def test_a_build_that_fails_at_its_end_leaves_the_old_index_and_other_files(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "index"
    build(tiny_config(world, index__folder=str(folder)))
    (folder / "notes.txt").write_text("mine")
    before = files(tmp_path)
    monkeypatch.setattr(build_module, "write_index", fail)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_config(world, index__folder=str(folder), corpus__limit=7))
    assert files(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["index"]
    monkeypatch.undo()
    build(tiny_config(world, index__folder=str(folder), corpus__limit=7))
    assert len(PassageStore.open(folder)) == 7 and (folder / "notes.txt").read_text() == "mine"


def test_dpr_files_gzipped(world: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "psgs.tsv.gz"
    corpus.write_bytes(gzip.compress(b"id\ttext\ttitle\n1\tIts capital is Kesbourg.\tArland\n2\tA land.\tBelland\n"))
    settings = {"corpus__source": str(corpus), "corpus__format": "dpr"}
    build(tiny_config(world, index__folder=str(tmp_path / "index"), **settings))
    store = PassageStore.open(tmp_path / "index")
    assert (len(store), store[0]) == (2, Passage("1", "Arland", "Its capital is Kesbourg."))


def test_too_few_passages_for_a_kind(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"index\.kind=IVF64,Flat cannot be trained on the 30 passages"):
        build(tiny_config(world, index__folder=str(tmp_path / "index"), index__kind="IVF64,Flat"))
    assert list(tmp_path.iterdir()) == []
