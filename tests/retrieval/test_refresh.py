"""An index that follows its passage encoder, and documents that are sought a step ahead."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ends, logged, start
from trained import files
from world import open_world, tiny_config

from ragjax.answerer import open_answerer
from ragjax.commands.evaluate import evaluate
from ragjax.commands.train import train
from ragjax.commands.verify import verify
from ragjax.config import Config, load_config
from ragjax.data.passage_store import PassageStore
from ragjax.data.question_batch import question_batch, tokenize_questions
from ragjax.data.question_sampler import QuestionSampler
from ragjax.data.questions import read_questions
from ragjax.errors import InputError
from ragjax.models.layers import Params
from ragjax.parallel.mesh import local_mesh, make_mesh
from ragjax.parallel.sharding import put_global, replicated
from ragjax.rag import RagPipeline, load_pipeline
from ragjax.retrieval.encoder import embed_to_file, encode, passage_batch
from ragjax.retrieval.index import open_index
from ragjax.retrieval.refresh import IndexRefresher, RefreshedIndex, refreshed_index, version_folder
from ragjax.retrieval.retrieve import encode_questions, search
from ragjax.runs.checkpointer import Checkpointer
from ragjax.runs.restore import restore_params, trained_index
from ragjax.training.batch import attach_documents
from ragjax.training.data_loader import BatchBuilder, LoadedBatch, TrainLoader, train_questions
from ragjax.training.loss import passage_params, rag_loss
from ragjax.training.state import abstract_state, init_train_state

KEY = jax.random.key(3)
SLOW = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    "train__steps": 14,
    "train__batch_size": 4,
    "train__num_docs": 2,
    "train__save_every": 4,
    "train__keep_checkpoints": 20,
    "train__passage_encoder": "shared",
    "refresh__every": 5,
    "refresh__steps": 3,
    "refresh__overlap_every": 2,
    "refresh__overlap_questions": 7,
}


def refreshing(world: Path, output: Path, **more: object) -> Config:
    return tiny_config(world, output=str(output), **(SETTINGS | more))


def state_at(config: Config, step: int) -> tuple[Any, dict[str, Any]]:
    """What the checkpoint of a step holds, on one device."""
    rag = load_pipeline(config)
    with Checkpointer(Path(config.output) / "checkpoints", keep=20, writing=False) as checkpoints:
        return checkpoints.restore(step, abstract_state(rag, local_mesh(data=1))), checkpoints.metadata(step)


def encoded(rag: RagPipeline, store: PassageStore, encoder: Params) -> np.ndarray:
    """All passages, each alone."""
    found = []
    for i in range(len(store)):
        tokens, mask = passage_batch(rag, store, np.array([i]))
        found.append(encode(rag.passage_encoder.graphdef, encoder, jnp.asarray(tokens), jnp.asarray(mask))[0])
    return np.stack(found)


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(refreshing(world, tmp_path_factory.mktemp("undisturbed") / "run"))


@pytest.mark.parametrize("encoder", ["shared", pytest.param("own", marks=SLOW)])
def test_the_gradient_reaches_the_passages_too(world: Path, encoder: str) -> None:
    """As if the embeddings were written into the loss as functions of the parameters."""
    config = tiny_config(world, train__passage_encoder=encoder, train__num_docs=2, train__batch_size=4)
    rag, index, store = open_world(config)
    params = rag.initial_params()
    chosen = read_questions(world / "train.jsonl")[:4]
    ids = np.array([[0, 1], [1, 5], [9, -1], [3, 29]], np.int32)
    questions = question_batch(rag.tokenizers, [q.question for q in chosen], [q.answers[0] for q in chosen])
    made = attach_documents(rag, index, store, questions, ids)
    batch = jax.device_put(made)
    assert not batch.passage_mask[2, 1].any()

    def explicit(params: Params) -> jax.Array:
        rows = encode(
            rag.passage_encoder.graphdef,
            passage_params(rag, params),
            batch.passage_tokens.reshape(8, -1),
            batch.passage_mask.reshape(8, -1),
        )
        given = replace(batch, passage_embeddings=rows.reshape(4, 2, -1), passage_tokens=None, passage_mask=None)
        return rag_loss(rag, params, given, KEY)[0]

    found = jax.jit(jax.value_and_grad(lambda params: rag_loss(rag, params, batch, KEY)[0]))(params)
    expected = jax.jit(jax.value_and_grad(explicit))(params)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    own = found[1]["passage_encoder" if encoder == "own" else "retriever"]
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(own)) > 1e-4


def test_an_index_is_what_the_encoder_was_when_it_was_begun(world: Path, undisturbed: Path) -> None:
    """Begun after step 5, spread over 5, 6 and 7, searched from step 8 on; again after 10; and whole after the last."""
    config = refreshing(world, undisturbed)
    rag, index, store = open_world(config)
    searched = {step: state_at(config, step)[1]["refresh"] for step in (4, 8, 12, 14)}
    assert searched[4] == {"searched": None, "building": None, "processes": 1}
    assert searched[8] == {"searched": 5, "building": None, "processes": 1}
    assert searched[12] == {"searched": 10, "building": None, "processes": 1}
    assert searched[14] == {"searched": 10, "building": 14, "processes": 1}  # built once that was saved
    state, _ = state_at(config, 8)
    refreshed = open_index(version_folder(undisturbed, 5), rag.fingerprints)
    assert refreshed.version != index.version and len(refreshed.manifest["shards"]) == 3
    np.testing.assert_allclose(np.asarray(refreshed.embeddings), encoded(rag, store, state.indexed), atol=1e-5)
    last, _ = state_at(config, 14)
    newest = trained_index(rag, index, 14)
    np.testing.assert_allclose(np.asarray(newest.embeddings), encoded(rag, store, last.params["retriever"]), atol=1e-5)
    assert np.abs(np.asarray(newest.embeddings) - np.asarray(index.embeddings)).max() > 1e-3
    ages = {line["step"]: line["index_age"] for line in logged(undisturbed) if "index_age" in line}
    assert [ages[step] for step in range(1, 15)] == [1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6, 2, 3, 4]
    kept = [line["step"] for line in logged(undisturbed) if "index_kept" in line]
    switched = [line["step"] for line in logged(undisturbed) if "index_overlap" in line]
    assert (kept, switched) == ([2, 4, 6, 8, 10, 12, 14], [7, 12, 14])


def test_what_is_encoded_anew_carries_checksums(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    parts = [part for part in verify(undisturbed) if part.what == "refreshed index"]
    assert len(parts) == 3 and all(part.files == 2 * 3 and not part.damage and not part.unknown for part in parts)
    rag, index, _ = open_world(refreshing(world, undisturbed))
    shutil.copytree(version_folder(undisturbed, 14), version_folder(tmp_path, 14))
    path = version_folder(tmp_path, 14) / "shards" / "00001" / "embeddings.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"shards/00001: is damaged .embeddings.npy .*; delete its version"):
        refreshed_index(rag, index, tmp_path, 14).search(np.ones((1, index.embeddings.shape[1]), np.float32), 2)


def test_answers_come_from_the_index_of_the_checkpoint(world: Path, undisturbed: Path) -> None:
    config = refreshing(
        world, undisturbed, evaluate__max_questions=2, evaluate__max_untrained_questions=0, evaluate__split="train"
    )
    rag, _, store = open_world(config)
    answerer = open_answerer(config)
    assert answerer.index.manifest["refreshed"] == 14
    questions = read_questions(world / "train.jsonl")
    restored = restore_params(rag)
    assert restored is not None
    params, _ = restored
    queries = encode_questions(
        rag, params, tokenize_questions(rag.tokenizers, [q.question for q in questions]), local_mesh(data=1)
    )
    best = np.argmax(queries @ encoded(rag, store, params["retriever"]).T, axis=1)
    right = np.mean([q.answers[0] in store[int(i)].text for q, i in zip(questions, best, strict=True)])
    assert evaluate(config)["models"]["trained"]["recall@1"] == pytest.approx(right)


SLOWER = {"refresh__every": 6, "refresh__steps": 4}


@pytest.fixture(scope="module")
def slower(world: Path, tmp_path_factory: pytest.TempPathFactory, seen_devices: int) -> Path:
    return train(refreshing(world, tmp_path_factory.mktemp("slower") / "run", **SLOWER))


@SLOW
@pytest.mark.parametrize(
    ("seen_devices", "stop"), [(2, 11), (4, 6), (2, 8), (1, 9)], indirect=["seen_devices"], scope="module"
)
def test_a_run_killed_in_the_middle_of_a_refresh_resumes(
    world: Path, slower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """After a part was written, or before; the checkpoints are of steps 4, 8 and 12, the second of before a switch."""
    config, reference = refreshing(world, tmp_path / "run", **SLOWER), slower
    advance = IndexRefresher.advance

    def killed(self: IndexRefresher, step: int, indexed: Any) -> bool:
        if step == stop and stop % 2:
            raise RuntimeError("the power went off")
        switched = advance(self, step, indexed)
        if step == stop:
            raise RuntimeError("the power went off")
        return switched

    with monkeypatch.context() as patch:
        patch.setattr(IndexRefresher, "advance", killed)
        with pytest.raises(RuntimeError):
            train(config)
    train(config)
    run = tmp_path / "run"
    assert logged(run) == logged(reference)
    for step in (8, 12, 14):
        one, other = (state_at(config.replace(output=str(of)), step)[0] for of in (run, reference))
        chex.assert_trees_all_equal(one.params, other.params)
    ours, theirs = ({p.relative_to(of): data for p, data in files(of / "refreshed").items()} for of in (run, reference))
    assert ours == theirs and len(ours) > 3


def test_versions_that_no_checkpoint_needs_are_deleted(world: Path, tmp_path: Path) -> None:
    run = train(
        refreshing(world, tmp_path / "run", train__keep_checkpoints=1, refresh__every=3, refresh__overlap_every=None)
    )
    assert {path.name for path in (run / "refreshed").iterdir()} <= {"000009", "000014"}
    config = refreshing(world, run, train__keep_checkpoints=1, refresh__every=3, refresh__overlap_every=None)
    rag, index, _ = open_world(config)
    assert trained_index(rag, index, 14).manifest["refreshed"] == 14


def test_an_index_that_is_gone_is_named(
    world: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "refreshed" / "000014")
    assert open_answerer(refreshing(world, tmp_path / "run")).index.manifest["refreshed"] == 10
    assert "an older one is searched; run: ragjax train CONFIG" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "refreshed" / "000010")
    with pytest.raises(InputError, match="000010: the index that this run searched after step 10 is gone"):
        open_answerer(refreshing(world, tmp_path / "run"))


@SLOW
def test_drift_begins_a_refresh(world: Path, tmp_path: Path) -> None:
    """At the first probe whose share is below, and not while one is going on."""
    settings = {"refresh__every": None, "refresh__min_overlap": 0.999, "refresh__steps": 2, "train__retriever_lr": 1e-2}
    run = train(refreshing(world, tmp_path / "run", **settings, train__steps=8))
    lines = [line for line in logged(run) if "loss" in line]
    below = [line["step"] for line in lines if line.get("index_kept", 1) < 0.999 and line["step"] < 6]
    switched = [line["step"] for line in logged(run) if "index_overlap" in line]
    assert below and switched[0] == below[0] + 1 and switched[-1] == 8
    assert {line["step"]: line["index_age"] for line in lines}[switched[0]] == 1


def test_overlap_is_what_would_stay(world: Path, tmp_path: Path) -> None:
    """With 4k at least N nothing is overlooked: brute force over all passages."""
    config = refreshing(world, tmp_path, train__passage_encoder="own", train__num_docs=8)
    rag, index, store = open_world(config)
    refresh = IndexRefresher(rag, index, store, tmp_path, local_mesh())
    params = put_global(rag.initial_params(), replicated(local_mesh()))
    questions = [question.question for question in read_questions(world / "train.jsonl")[:7]]
    assert refresh.overlap(params, params["passage_encoder"], questions, 8) == 1.0
    noise = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.05 * noise.normal(size=x.shape).astype(np.float32), params["passage_encoder"])
    queries = encode_questions(
        rag, rag.initial_params(), tokenize_questions(rag.tokenizers, questions), local_mesh(data=1)
    )
    before, after = (
        np.argsort(-queries @ vectors.T, axis=1, kind="stable")[:, :8]
        for vectors in (np.asarray(index.embeddings), encoded(rag, store, moved))
    )
    expected = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(before.tolist(), after.tolist(), strict=True)])
    assert 0 < expected < 1
    assert refresh.overlap(params, moved, questions, 8) == pytest.approx(expected)
    refresh.start(1)
    refresh.complete(moved)
    assert refresh.compare(index, params, questions, 8) == pytest.approx(expected)
    assert refresh.state == RefreshedIndex(1, None)


def test_parts_of_another_number_of_processes_are_encoded_again(world: Path, tmp_path: Path) -> None:
    config = refreshing(world, tmp_path / "run")
    rag, index, store = open_world(config)
    encoder = put_global(rag.initial_params()["retriever"], replicated(local_mesh()))

    def parts(saved: dict[str, Any]) -> dict[str, int]:
        again = IndexRefresher(rag, index, store, tmp_path / "run", local_mesh())
        again.restore(saved, 6, encoder)
        assert again.state == RefreshedIndex(None, 5)
        shards = version_folder(tmp_path / "run", 5) / "shards"
        return {path.name: (path / "embeddings.npy").stat().st_mtime_ns for path in sorted(shards.iterdir())}

    refresh = IndexRefresher(rag, index, store, tmp_path / "run", local_mesh())
    refresh.start(5)
    refresh.advance(5, encoder)
    stays, other = {"searched": None, "building": 5, "processes": 1}, {"searched": None, "building": 5, "processes": 2}
    first = parts(stays)
    assert list(first) == ["00000", "00001"] and parts(stays) == first
    again = parts(other)
    assert list(again) == ["00000", "00001"] and all(again[part] > first[part] for part in first)


@SLOW
def test_a_faiss_index_is_built_anew(world: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"index__kind": "HNSW8", "index__path": str(tmp_path / "index")}
    config = refreshing(world, tmp_path / "run", **settings)
    rag, index, store = open_world(config)
    run = train(config)
    state, _ = state_at(config, 14)
    newest = trained_index(rag, index, 14)
    assert newest.kind == "HNSW8" and (version_folder(run, 14) / "faiss.index").exists()
    assert state_at(config, 12)[1]["refresh"]["searched"] is not None, "one that was built meanwhile was searched"
    every = encoded(rag, store, state.params["retriever"])
    scores, ids = newest.search(every[:5], 3)
    np.testing.assert_allclose(scores, np.take_along_axis(every[:5] @ every.T, ids, 1), atol=1e-5)


def test_a_run_killed_while_its_last_index_is_built_goes_on_with_it(
    world: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is repeated, and no part is encoded again that is there."""
    config, embed, made = refreshing(world, tmp_path / "run"), embed_to_file, list[Path]()

    def killed(rag: RagPipeline, params: Params, rows: Any, path: Path, advance: Any) -> None:
        if path.parents[2].name == "000014" and len(made) == 1:
            raise RuntimeError("the power went off")
        embed(rag, params, rows, path, advance)
        made.extend([path] if path.parents[2].name == "000014" else [])

    with monkeypatch.context() as patch:
        patch.setattr("ragjax.retrieval.refresh.embed_to_file", killed)
        with pytest.raises(RuntimeError):
            train(config)
        rag, index, _ = open_world(config)
        assert trained_index(rag, index, 14).manifest["refreshed"] == 10  # that of the last steps, meanwhile
    stamp = made[0].stat().st_mtime_ns
    monkeypatch.setattr("ragjax.commands.train.make_train_step", lambda *_: lambda *_: pytest.fail("no step is left"))
    train(config)
    assert made[0].stat().st_mtime_ns == stamp
    assert logged(tmp_path / "run") == logged(undisturbed)
    ours, theirs = (files(of / "refreshed" / "000014") for of in (tmp_path / "run", undisturbed))
    assert list(ours.values()) == list(theirs.values())
    before = files(tmp_path / "run")
    train(config)  # nothing is left to do
    assert files(tmp_path / "run").keys() == before.keys() and logged(tmp_path / "run") == logged(undisturbed)


@SLOW
def test_a_run_with_more_steps_goes_on_with_the_index_of_its_end(
    world: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where that was not complete: the same is built before the first step."""
    for name in ("one", "two"):
        shutil.copytree(undisturbed, tmp_path / name)
    (tmp_path / "two/refreshed/000014/manifest.json").unlink()
    shutil.rmtree(tmp_path / "two/refreshed/000014/shards/00001")
    for name in ("one", "two"):
        train(refreshing(world, tmp_path / name, train__steps=16))
    ours, theirs = (logged(tmp_path / name) for name in ("one", "two"))
    assert ours == theirs and [line["step"] for line in ours][-3:] == [15, 16, 16]
    assert [line["index_age"] for line in ours[-3:-1]] == [1, 2]
    config = refreshing(world, tmp_path / "one", train__steps=16)
    rag, index, store = open_world(config)
    last, saved = state_at(config, 16)
    assert saved["refresh"] == {"searched": 14, "building": 16, "processes": 1}
    newest = trained_index(rag, index, 16)
    np.testing.assert_allclose(np.asarray(newest.embeddings), encoded(rag, store, last.params["retriever"]), atol=1e-5)
    assert "train.steps was 14 and is 16" in " ".join(capsys.readouterr().err.split())


@SLOW
def test_a_run_that_begins_with_a_trained_encoder_searches_its_index(
    world: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """One that an earlier attempt has left is not trusted: it may be of another encoder."""
    config = refreshing(
        world, tmp_path / "run", train__steps=1, train__start_from=str(undisturbed), refresh__every=None
    )
    left = version_folder(tmp_path / "run", 0) / "shards/00000"
    left.mkdir(parents=True)
    (left / "embeddings.npy").write_bytes(b"?")
    train(config)
    before, _ = state_at(refreshing(world, undisturbed), 14)
    rag, _, store = open_world(config)
    begun = open_index(version_folder(tmp_path / "run", 0), rag.fingerprints)
    expected = encoded(rag, store, before.params["retriever"])
    np.testing.assert_allclose(np.asarray(begun.embeddings), expected, atol=1e-5)
    assert state_at(config, 1)[1]["refresh"] == {"searched": 0, "building": 1, "processes": 1}
    [line] = [line for line in logged(tmp_path / "run") if "index_age" in line]
    assert line["index_age"] == 1


@SLOW
def test_two_processes_switch_at_the_same_step(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    """And each encodes its part; one that resumes alone makes its own parts."""
    settings = [f"{key.replace('__', '.')}={value}" for key, value in SETTINGS.items()]
    arguments = ["train", str(world / "config.yaml"), f"output={tmp_path / 'run'}", *settings]
    for code, err in ends(start(world, 2, *arguments), 240):
        assert code == 0, err
    ours, theirs = (logged(run) for run in (tmp_path / "run", undisturbed))
    assert [line.get("index_age") for line in ours] == [line.get("index_age") for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)
    assert len(list((tmp_path / "run/refreshed/000010/shards").iterdir())) == 6
    embeddings = [
        np.asarray(open_index(version_folder(run, 10), {}).embeddings) for run in (tmp_path / "run", undisturbed)
    ]
    np.testing.assert_allclose(embeddings[0], embeddings[1], atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["refresh.every=5"], "train.passage_encoder=shared or own"),
        (["train.passage_encoder=own", "retriever.prior=corpus"], "use retriever.prior=top_k"),
        (["train.passage_encoder=shared", "retriever.passage_encoder=x"], "leave out retriever.passage_encoder"),
        (["train.passage_encoder=own", "refresh.min_overlap=0.5"], "set refresh.overlap_every"),
        (["train.passage_encoder=own", "refresh.min_overlap=1.5", "refresh.overlap_every=2"], "less than 1"),
        (["train.passage_encoder=own", "refresh.every=5", "refresh.steps=6"], "less than refresh.steps=6"),
        (["train.prefetch_retrieval=true", "train.fused_retrieval=true"], "searches inside the step"),
    ],
)
def test_what_does_not_go_together(world: Path, settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(world / "config.yaml", settings)


def test_more_parts_than_passages(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"refresh\.steps=31 would make 31 parts of 30 passages"):
        train(refreshing(world, tmp_path / "run", refresh__steps=31, refresh__every=None))
    assert not (tmp_path / "run").exists()


# documents sought a step ahead


AHEAD: dict[str, Any] = {
    "train__steps": 6,
    "train__prefetch_retrieval": True,
    "train__save_every": 1,
    "train__keep_checkpoints": 20,
    "index__kind": "Flat",
    "train__retriever_lr": 1e-2,
}


@pytest.fixture(scope="module")
def ahead(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("ahead")
    config = tiny_config(world, output=str(folder / "run"), index__path=str(folder / "index"), **AHEAD)
    open_world(config)
    train(config)
    return config


def test_queries_are_one_step_old(world: Path, ahead: Config) -> None:
    """What a checkpoint keeps for the next step was found by the retriever of the step before."""
    rag, index, _ = open_world(ahead)
    questions = read_questions(world / "train.jsonl")
    stale = 0
    for step in range(2, 6):
        now, about = state_at(ahead, step)
        before, _ = state_at(ahead, step - 1)
        chosen = next_questions(ahead, about["data"], len(questions))
        batch = tokenize_questions(rag.tokenizers, [questions[i].question for i in chosen])
        _, _, expected = search(rag, before.params, index, batch, 3)
        assert about["ahead"] == expected.tolist()
        stale += about["ahead"] != search(rag, now.params, index, batch, 3)[2].tolist()
    assert stale > 0  # else it could not be told which retriever was asked
    assert state_at(ahead, 6)[1]["ahead"] is None


def next_questions(config: Config, position: dict[str, Any], count: int) -> list[int]:
    batches = QuestionSampler([1] * count, config.train.batch_size, config.seed)
    batches.restore(position | {"fingerprint": None})
    return next(batches).questions.tolist()


@pytest.mark.parametrize("stop", [pytest.param(1, marks=SLOW), 4])
def test_a_resumed_run_trains_on_what_was_in_flight(
    world: Path, ahead: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    config = ahead.replace(output=str(tmp_path / "run"))

    def after(function: Callable[..., Any]) -> Callable[..., Any]:
        def save(self: Checkpointer, step: int, *more: Any) -> None:
            function(self, step, *more)
            if step == stop:
                raise RuntimeError("the power went off")

        return save

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", after(Checkpointer.save))
        with pytest.raises(RuntimeError):
            train(config)
    train(config)
    assert logged(tmp_path / "run") == logged(Path(ahead.output))
    chex.assert_trees_all_equal(*(state_at(of, 6)[0].params for of in (config, ahead)))


def test_the_first_step_is_as_without(world: Path, ahead: Config, tmp_path: Path) -> None:
    """Nothing could be sought before it; from the second step on the queries are old, and the numbers others."""
    plain = train(ahead.replace(output=str(tmp_path / "run"), train=ahead.train.replace(prefetch_retrieval=False)))
    ours, theirs = logged(Path(ahead.output)), logged(plain)
    assert ours[0] == theirs[0] and ours[1:] != theirs[1:]


def test_devices_look_ahead_as_faiss_does(world: Path, ahead: Config, tmp_path: Path) -> None:
    index = ahead.index.replace(kind="exact", path=str(world / "index"))
    here = ahead.replace(output=str(tmp_path / "run"), index=index)
    train(here)
    assert logged(tmp_path / "run") == logged(Path(ahead.output))
    ours, theirs = ([state_at(config, step)[1]["ahead"] for step in (1, 5)] for config in (here, ahead))
    assert ours == theirs and None not in ours


@pytest.mark.parametrize("fused", [False, True])
def test_reading_ahead_changes_nothing(
    world: Path, ahead: Config, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    """While a step runs the next batch is read, as it would have been later, or again if the index changed since."""
    config = tiny_config(world, train__fused_retrieval=True) if fused else ahead
    rag, index, store = open_world(config)
    mesh = make_mesh()
    reader, params = BatchBuilder(rag, index, store, mesh, {}), put_global(rag.initial_params(), replicated(mesh))
    asked, reads = train_questions(rag, read_questions(world / "train.jsonl")), 0

    def counted(*given: Any) -> LoadedBatch:
        nonlocal reads
        reads += 1
        return attach(*given)

    attach = reader.attach
    monkeypatch.setattr(reader, "attach", counted)

    def supply() -> TrainLoader:
        return TrainLoader(reader, QuestionSampler([len(a) for a in asked.usable.answers], 8, 0), asked, {})

    with supply() as late, supply() as early:
        for _ in range(3):
            (pairs, expected), given = late.take(params), early.take(params)
            chex.assert_trees_all_equal(given, (pairs, expected))
            if not fused:
                late.look_ahead(params)
                early.look_ahead(params)
            early.read_ahead()
            assert early.state() == late.state()
        assert reads == 3 + 3 + 1
        early.take(params)
        assert reads == 7
        if not fused:
            early.look_ahead(params)
        early.read_ahead()
        reader.index = copy.copy(index)
        early.take(params)
        assert reads == 9


def test_initial_state_copies_the_encoder(world: Path, tmp_path: Path) -> None:
    rag = load_pipeline(refreshing(world, tmp_path))
    state = init_train_state(rag, rag.initial_params())
    chex.assert_trees_all_equal(state.indexed, state.params["retriever"])
    assert init_train_state(load_pipeline(tiny_config(world)), rag.initial_params()).indexed is None
