"""BM25 beside the encoder: against both formulas written out, in training, evaluation and answers."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from trained import files, refused
from world import LANDS, open_world, tiny_config

from ragjax.answerer import open_answerer
from ragjax.cli import main
from ragjax.commands.evaluate import evaluate
from ragjax.commands.index import build_index
from ragjax.commands.train import build_loader, load_data, train
from ragjax.config import Config
from ragjax.data.corpus import Passage
from ragjax.data.passage_store import PassageStore, shard_folder, write_store
from ragjax.data.question_batch import question_batch, tokenize_questions
from ragjax.data.questions import read_questions
from ragjax.errors import InputError
from ragjax.evaluation.metrics_table import print_metrics
from ragjax.metrics import normalized_words
from ragjax.parallel.mesh import make_mesh
from ragjax.parallel.sharding import put_global, replicated
from ragjax.retrieval.bm25 import BM25, Bm25Index, build_bm25, open_bm25
from ragjax.retrieval.index import Index
from ragjax.retrieval.retrieve import encode_questions, mass_outside, retrieve
from ragjax.runs.restore import load_artifacts
from ragjax.runs.run_dir import load_run_config
from ragjax.training.batch import ContrastiveBatch, TrainBatch
from ragjax.training.contrastive import choose_passages
from ragjax.training.data_loader import BatchBuilder

K1, B = 0.9, 0.4
WORDS = "oslo rome bern the a of who river north south 東 京 1,100 don't".split()


def brute_force(passages: list[str], question: str) -> list[float]:
    """Σ over the question's words of ln(1 + (N − n + ½) / (n + ½)) · f / (f + k₁(1 − b + b · length / mean length))."""
    bags = [Counter(normalized_words(text).split()) for text in passages]
    mean, scores = sum(bag.total() for bag in bags) / len(bags), []
    for bag in bags:
        score = 0.0
        for word in normalized_words(question).split():
            holding = sum(word in other for other in bags)
            idf = math.log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))
            score += idf * bag[word] / (bag[word] + K1 * (1 - B + B * bag.total() / mean)) if bag[word] else 0.0
        scores.append(score)
    return scores


def built(folder: Path, passages: list[Passage]) -> Bm25Index:
    half = len(passages) // 2
    for number, some in enumerate((passages[:half], passages[half:])):
        write_store(shard_folder(folder, number), some, lambda texts: [[1] for _ in texts], lambda p: p.text)
    assert build_bm25(folder, "sha256:p")
    return open_bm25(folder, "sha256:p", len(passages))


def test_scores_and_ranks_are_the_formula(tmp_path: Path) -> None:
    """Passages that tie, that have no word of the question, or no word at all."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(0, 9))) for _ in range(60)] + ["!?", "Oslo.", "Oslo."]
    bm25 = built(tmp_path, [Passage(str(i), "North" if i % 7 == 0 else "", text) for i, text in enumerate(texts)])
    whole = [f"{'North' if i % 7 == 0 else ''} {text}" for i, text in enumerate(texts)]
    questions = [" ".join(rng.choice(WORDS, size=size)) for size in (1, 2, 4, 8)] + ["oslo", "nowhere", "", "The? 東京"]
    scores, ids = bm25.search(questions, 20)
    for b, question in enumerate(questions):
        expected = np.array(brute_force(whole, question))
        order = [i for i in np.lexsort((np.arange(len(expected)), -expected.round(5))) if expected[i] > 0][:20]
        there = ids[b] >= 0
        assert np.allclose(scores[b, there], expected[ids[b, there]], rtol=1e-5), question
        assert np.allclose(expected[ids[b, there]], expected[order], rtol=1e-5), "the best of all, in their order"
        assert (
            there.tolist() == [True] * len(order) + [False] * (20 - len(order)) and (scores[b, ~there] == -np.inf).all()
        )
        ties = [(s, i) for s, i in zip(-scores[b, there], ids[b, there], strict=True)]
        assert ties == sorted(ties), "equal ones by id"
        fewer = bm25.search([question], 3)
        assert np.array_equal(fewer[1][0], ids[b, :3]) and np.array_equal(fewer[0][0], scores[b, :3])


def test_passages_without_words(tmp_path: Path) -> None:
    bm25 = built(tmp_path, [Passage("1", "", "!"), Passage("2", "", "?")])
    assert (bm25.search(["who?"], 2)[1] == -1).all()


# -- with the encoder's


@pytest.fixture(scope="module")
def words_index(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's index, with BM25 added."""
    folder = tmp_path_factory.mktemp("words") / "index"
    shutil.copytree(world / "index", folder)
    before = files(folder)
    assert main(["index", str(world / "config.yaml"), f"index.path={folder}", "retriever.bm25_docs=3"]) == 0
    assert before.items() <= files(folder).items(), "nothing is embedded anew"
    assert sorted(path.name for path in (folder / BM25).iterdir()) == [
        "checksums.json",
        "data.csc.index.npy",
        "indices.csc.index.npy",
        "indptr.csc.index.npy",
        "params.index.json",
        "vocab.index.json",
    ]
    return folder


def hybrid(world: Path, index: Path, output: Path, **more: object) -> Config:
    """Two documents of the encoder and one of BM25: programs for three are compiled for other tests, too."""
    settings = {"retriever__bm25_docs": 1, "train__num_docs": 2, "decode__num_docs": 2} | more
    return tiny_config(world, index__path=str(index), output=str(output), **settings)


def oracle(index: Index, queries: np.ndarray, passages: list[str], texts: list[str], k: int, m: int) -> list[list[int]]:
    """The documents of each question: the k largest inner products, and BM25's m best of all others."""
    documents = []
    for query, text in zip(queries, texts, strict=True):
        dense = np.argsort(-np.asarray(index.embeddings, np.float32) @ query, kind="stable")[:k].tolist()
        bm25 = np.array(brute_force(passages, text))
        ranked = [i for i in np.argsort(-bm25, kind="stable").tolist() if bm25[i] > 0 and i not in dense]
        documents.append(dense + ranked[:m])
    return documents


@pytest.mark.parametrize("prior", ["top_k", "corpus"])
def test_documents_and_prior_are_brute_force(world: Path, words_index: Path, tmp_path: Path, prior: str) -> None:
    config = hybrid(world, words_index, tmp_path, retriever__prior=prior, retriever__bm25_docs=3)
    rag, index, store = load_artifacts(config)
    texts = [question.question for question in read_questions(world / "dev.jsonl")] + [
        "Its capital?",
        "zzz",
        *LANDS[:9],
    ]
    whole = [f"{p.title} {p.text}" for p in store]
    found = retrieve(rag, rag.initial_params(), index, tokenize_questions(rag.tokenizers, texts), 4, texts=texts)
    expected = oracle(index, found.queries, whole, texts, 4, 3)
    every = config.retriever.logit_scale * found.queries.astype(np.float64) @ np.asarray(index.embeddings, np.float64).T
    assert {len(documents) for documents in expected} == {4, 5, 7}, "BM25 finds all, one or none"
    for b, documents in enumerate(expected):
        ids, count = found.ids[b], len(documents)
        assert sorted(ids[:count].tolist()) == sorted(documents) and (ids[count:] == -1).all()
        scores = every[b, ids[:count]]
        assert (np.diff(scores) <= 1e-4).all(), "best first, whoever found it"
        over = scores if prior == "top_k" else every[b]
        expected_prior = scores - np.logaddexp.reduce(over)
        assert np.allclose(found.log_prior[b, :count], expected_prior, atol=1e-4)
        assert (found.log_prior[b, count:] == -np.inf).all()
        if prior == "corpus":
            outside = 1 - np.exp(expected_prior).sum()
            assert found.outside is not None and outside <= found.outside[b] <= outside + 1e-3
    if prior == "corpus":
        assert found.outside is not None
        normalizer = index.log_normalizer(found.queries, config.retriever.logit_scale)
        assert (mass_outside(found.log_prior[:, :4], normalizer)[:5] > found.outside[:5]).all(), (
            "they take mass from it"
        )
    alone = retrieve(rag, rag.initial_params(), index, tokenize_questions(rag.tokenizers, texts), 4)
    assert alone.ids.shape == (len(texts), 4), "without texts the encoder's alone"


def test_it_is_evaluated_and_answered(world: Path, words_index: Path, tmp_path: Path, capsys: Any) -> None:
    fast = {"evaluate__modes": ["fast"], "evaluate__closed_book": False, "decode__mode": "fast"}
    config = hybrid(world, words_index, tmp_path, evaluate__max_questions=2, **fast)
    report = evaluate(config)["models"]["untrained"]
    answerer = open_answerer(config)
    store, questions = answerer.store, read_questions(world / "test.jsonl")
    texts = [question.question for question in questions]
    tokens = tokenize_questions(answerer.rag.tokenizers, texts)
    queries = retrieve(answerer.rag, jax.device_get(answerer.params), answerer.index, tokens, 3).queries
    whole = [f"{p.title} {p.text}" for p in store]
    dense, both, words = (oracle(answerer.index, queries, whole, texts, *of) for of in ((3, 0), (2, 1), (0, 5)))

    def recall(documents: list[list[int]], at: int) -> float:
        pairs = zip(questions, documents, strict=True)
        return sum(any(q.answers[0] in store[i].text for i in of[:at]) for q, of in pairs) / len(questions)

    assert report["recall@3"] == recall(dense, 3) < report["hybrid_recall@3"] == recall(both, 3) == 1
    for at in (1, 2, 3, 5):
        assert report[f"bm25_recall@{at}"] == recall(words, at) == 1, "the land's name is in its passage alone"
    line = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    answers = answerer.answer(texts[:2])
    for documents in (line["documents"], [vars(document) for document in answers[0].documents]):
        assert {document["id"] for document in documents} == {f"p{i}" for i in both[0]} and len(documents) == 3
        assert sum(document["prior"] for document in documents) == pytest.approx(1, abs=1e-5)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["bm25_docs"] == 1
    print_metrics(metrics, as_json=False)
    shown = capsys.readouterr().out
    assert "BM25 alone: recall@3 (all questions)" in shown
    assert "with BM25's documents: recall@3 (all questions)" in shown


@pytest.mark.parametrize("kind", ["exact", "Flat"])
def test_training_reads_them(world: Path, words_index: Path, tmp_path: Path, kind: str) -> None:
    """The documents of a batch are the oracle's; those that are looked for ahead are the same ones."""
    folder = words_index if kind == "exact" else tmp_path / "index"
    ahead = {"train__prefetch_retrieval": True, "train__steps": 2}
    config = hybrid(world, folder, tmp_path / "run", index__kind=kind, **ahead)
    build_index(config)
    data = load_data(config)
    builder = BatchBuilder(data.rag, data.index, data.store, make_mesh(), {})
    params = put_global(data.rag.initial_params(), replicated(builder.mesh))
    with build_loader(data, builder, {}) as loader, build_loader(data, builder, {}) as other:
        loader.look_ahead(params)
        ids = np.array(loader.state()["ahead"])
        pairs, (batch, metrics, _) = loader.take(params)
        again, (same, _, _) = other.take(params)
    texts = [question.question for question, _ in pairs]
    queries = encode_questions(data.rag, params, builder.tokenize(pairs), builder.mesh)
    expected = oracle(data.index, queries, [f"{p.title} {p.text}" for p in data.store], texts, 2, 1)
    assert np.sort(ids).tolist() == [sorted(documents) for documents in expected]
    assert isinstance(batch, TrainBatch) and isinstance(same, TrainBatch) and again == pairs
    assert batch.passage_embeddings.shape[1] == 3 and metrics["recall"] == 1, "BM25 finds what the encoder does not"
    assert np.array_equal(batch.passage_embeddings, same.passage_embeddings)
    if kind == "Flat":
        run = train(config)
        logged = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
        assert [line["recall"] for line in logged] == [1, 1]
        for m in (0, 2):
            check_answered_with(m, run)
        with pytest.raises(InputError, match=r"holds another run: retriever\.bm25_docs was 1 and is 2"):
            train(load_run_config(run, ["retriever.bm25_docs=2"]))


def check_answered_with(m: int, run: Path) -> None:
    """A run is asked with m documents of BM25, and was trained with one: the prior is over those that there are."""
    answerer = open_answerer(load_run_config(run, [f"retriever.bm25_docs={m}"]))
    assert answerer.step == 2
    texts = [f"Capital of {land}?" for land in LANDS[:6]]
    found = answerer.retrieve(question_batch(answerer.rag.tokenizers, texts), texts)
    whole = [f"{p.title} {p.text}" for p in answerer.store]
    assert found.ids.shape == (6, 2 + m)
    for b, documents in enumerate(oracle(answerer.index, found.queries, whole, texts, 2, m)):
        there = found.ids[b] >= 0
        assert sorted(found.ids[b, there].tolist()) == sorted(documents)
        scores = 10.0 * np.asarray(answerer.index.embeddings, np.float64)[found.ids[b, there]] @ found.queries[b]
        assert np.allclose(found.log_prior[b, there], scores - np.logaddexp.reduce(scores), atol=1e-4)
        assert (found.log_prior[b, ~there] == -np.inf).all()


def test_negatives_of_contrastive_training(world: Path) -> None:
    """The positive is the encoder's best, else BM25's; a negative comes once; each ranking brings its own number."""
    _, _, store = open_world(tiny_config(world))
    question = read_questions(world / "train.jsonl")[4]

    def choose(dense: list[int], words: list[int], negatives: tuple[int, int] = (2, 1)) -> list[int]:
        rankings = [np.array(ids, np.int32) for ids in (dense, words)]
        return choose_passages(store, question, list(zip(rankings, negatives, strict=True)), {}).tolist()

    assert choose([7, 4, 8, 9], [4, 8, 7, 3]) == [4, 7, 8, 3]
    assert choose([7, 8, 9], [8, 4, 5]) == [4, 7, 8, 5]
    assert choose([7], [4, 7, -1]) == [4, 7, -1, -1]
    assert choose([4, 7], [4, 6, 5], (0, 1)) == [4, 6], "as DPR: one of BM25's alone"


def test_a_contrastive_batch_has_them(world: Path, words_index: Path, tmp_path: Path) -> None:
    config = hybrid(world, words_index, tmp_path, train__objective="contrastive", train__mined_negatives=6)
    rag, index, store = load_artifacts(config)
    builder = BatchBuilder(rag, index, store, make_mesh(), {})
    pairs = [(question, question.answers[0]) for question in read_questions(world / "train.jsonl")[:8]]
    params = put_global({"retriever": rag.retriever.load_params()}, replicated(builder.mesh))
    batch, _, _ = builder.load(params, pairs)
    assert isinstance(batch, ContrastiveBatch) and batch.passage_embeddings.shape[1] == 3
    assert np.asarray(batch.has_positive).all(), "BM25 finds what the encoder does not"
    bm25 = [brute_force([f"{p.title} {p.text}" for p in store], question.question) for question, _ in pairs]
    for b, (question, _) in enumerate(pairs):
        last = np.asarray(batch.passage_embeddings)[b, 2]
        [chosen] = np.flatnonzero((np.asarray(index.embeddings) == last).all(axis=1))
        wrong = [i for i, p in enumerate(store) if question.answers[0] not in p.text]
        ranked = sorted(wrong, key=lambda i: (-np.float32(bm25[b][i]), i))
        assert chosen in ranked[:2], "the best but for the encoder's own negative"


# -- on disk


def test_it_is_whole_or_built_anew(world: Path, words_index: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "index"
    shutil.copytree(words_index, folder)
    config = hybrid(world, folder, tmp_path / "run")
    written = files(folder)
    assert main(["verify", str(folder)]) == 0
    assert "BM25" in (told := capsys.readouterr().out) and "not known" not in told
    for name, content in (("data.csc.index.npy", b"\x93NUMPY"), ("vocab.index.json", b"{}"), ("checksums.json", b"{")):
        (folder / BM25 / name).write_bytes(content)
        with pytest.raises(InputError, match=r"bm25.*builds anew what is damaged"):
            load_artifacts(config)
        assert main(["verify", str(folder)]) != 0 and name in capsys.readouterr().out
        build_index(config)
        assert files(folder) == written, "the same to the byte"
    shutil.rmtree(folder / BM25)
    message = refused(
        capsys, folder, "evaluate", str(world / "config.yaml"), f"index.path={folder}", "retriever.bm25_docs=1"
    )
    assert "needs BM25, which this index lacks; run: ragjax index CONFIG, which adds it" in message
    assert build_bm25(folder, "sha256:other")
    with pytest.raises(InputError, match="is of other passages, or of another ragjax; run: ragjax index CONFIG"):
        load_artifacts(config)


def test_a_build_that_fails_leaves_what_was_there(words_index: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import bm25s

    folder = tmp_path / "index"
    shutil.copytree(words_index, folder)
    before = files(folder)

    def full(self: Any, folder: Path, **how: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "half").touch()
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bm25s.BM25, "save", full)
        with pytest.raises(InputError, match=r"bm25: cannot be written \(No space left on device\); free some space"):
            build_bm25(folder, "sha256:changed")
    assert files(folder) == before
    assert not build_bm25(folder, json.loads((folder / BM25 / "checksums.json").read_text())["passages"]), "it is there"


def test_what_it_does_not_go_with(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, message in (
        (
            {"train__fused_retrieval": True},
            "train.fused_retrieval=true searches on the devices, and retriever.bm25_docs",
        ),
        ({"hf_compatible": True}, "hf_compatible=true has no documents of BM25; leave out retriever.bm25_docs"),
    ):
        with pytest.raises(InputError, match=message):
            tiny_config(world, retriever__bm25_docs=1, **setting)
    config = tiny_config(world, retriever__bm25_docs=1)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    for open_it in (load_artifacts, build_index):
        with pytest.raises(InputError, match=r"retriever.bm25_docs needs an extra: pip install 'ragjax\[bm25\]'"):
            open_it(config)
    assert PassageStore.open(world / "index")[0].id == "p0"
