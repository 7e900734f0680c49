"""Contrastive training of the retriever against the formula written out; what is mined against brute force."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import assert_same_gradients, moments
from processes import ends, logged, start
from world import open_world, tiny_config

from ragjax.answerer import open_answerer
from ragjax.checksums import CHECKSUMS
from ragjax.cli import main
from ragjax.commands.evaluate import evaluate
from ragjax.commands.train import train
from ragjax.config import Config, load_config
from ragjax.data.passage_store import PassageStore
from ragjax.data.question_batch import tokenize_questions
from ragjax.data.questions import Question, read_questions
from ragjax.errors import InputError
from ragjax.files import write_jsonl
from ragjax.models.layers import Params
from ragjax.parallel.mesh import make_mesh
from ragjax.parallel.sharding import put_global, shard_batch
from ragjax.planning.program_cost import Cost
from ragjax.rag import RagPipeline, load_pipeline
from ragjax.retrieval.encoder import encode
from ragjax.retrieval.index import Index
from ragjax.runs.checkpointer import Checkpointer
from ragjax.runs.restore import restore_params
from ragjax.training.batch import ContrastiveBatch, abstract_batch
from ragjax.training.contrastive import (
    attach_passages,
    choose_passages,
    contrastive_loss,
    count_passages,
    label_positions,
)
from ragjax.training.loss import passage_params
from ragjax.training.state import init_train_state, state_shardings
from ragjax.training.step import make_train_step, trace_step

KEY = jax.random.key(0)
SETTINGS: dict[str, Any] = {
    "train__objective": "contrastive",
    "train__steps": 12,
    "train__num_docs": 3,
    "train__mined_negatives": 8,
    "train__retriever_lr": 3e-3,
    "train__passage_encoder": "shared",
}


def contrasting(world: Path, output: Path, **more: object) -> Config:
    return tiny_config(world, output=str(output), **(SETTINGS | more))


def attached(
    rag: RagPipeline, index: Index, store: PassageStore, questions: Sequence[Question], ids: np.ndarray
) -> ContrastiveBatch:
    """The batch of all these questions."""
    batch = tokenize_questions(rag.tokenizers, [question.question for question in questions])
    return attach_passages(rag, index, store, questions, batch, ids)


def chosen_ids() -> np.ndarray:
    """One question has no positive, another lacks a negative; one's positive is another's negative."""
    return np.array([[0, 5, 6], [1, 0, -1], [-1, 7, 8], [3, 9, 5]], np.int32)


@pytest.mark.parametrize("encoder", ["frozen", "shared", "own"])
def test_loss_and_gradient_are_the_formula(world: Path, tmp_path: Path, encoder: str) -> None:
    config = contrasting(world, tmp_path, train__passage_encoder=encoder, train__batch_size=4)
    rag, index, store = open_world(config)
    questions = read_questions(world / "train.jsonl")[:4]
    ids = chosen_ids()
    made = attached(rag, index, store, questions, ids)
    batch = jax.device_put(made)
    params, scale = rag.initial_params(), config.retriever.logit_scale
    assert set(params) == {"retriever"} | ({"passage_encoder"} if encoder == "own" else set())

    def explicit(params: Params) -> jax.Array:
        """−log of e^(s·q·d⁺) over the sum of it and of what does not answer, one question after the other."""
        tokens, mask = batch.questions.question, batch.questions.question_mask
        queries = encode(rag.retriever.graphdef, params["retriever"], tokens, mask)
        vectors = jnp.asarray(index.vectors(ids)).reshape(12, -1)
        if encoder != "frozen":
            tokens, mask = batch.passage_tokens.reshape(12, -1), batch.passage_mask.reshape(12, -1)
            vectors = encode(rag.passage_encoder.graphdef, passage_params(rag, params), tokens, mask)
        terms = []
        for b, question in enumerate(questions):
            if ids[b, 0] < 0:
                continue
            own, others = scale * queries[b] @ vectors[3 * b], []
            for n, i in enumerate(ids.reshape(-1)):
                if i >= 0 and not any(answer in store[int(i)].text for answer in question.answers):
                    others.append(scale * queries[b] @ vectors[n])
            terms.append(jnp.log(jnp.exp(own) + sum(jnp.exp(other) for other in others)) - own)
        assert len(terms) == 3
        return sum(terms) / 3  # type: ignore[return-value]

    def loss(params: Params) -> Any:
        return contrastive_loss(rag, params, batch, KEY)

    (found, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    expected = jax.jit(jax.value_and_grad(explicit))(params)
    chex.assert_trees_all_close((found, gradient), expected, rtol=1e-4, atol=1e-5)
    assert metrics["without_positive"] == pytest.approx(0.25) and 0 <= metrics["accuracy"] <= 1


def test_a_batch_without_positives_teaches_nothing(world: Path, tmp_path: Path) -> None:
    rag, index, store = open_world(contrasting(world, tmp_path))
    questions = read_questions(world / "train.jsonl")[:2]
    ids = np.array([[-1, 4, 5], [-1, -1, -1]], np.int32)
    batch = jax.device_put(attached(rag, index, store, questions, ids))
    differentiate = jax.value_and_grad(lambda params: contrastive_loss(rag, params, batch, KEY), has_aux=True)
    (value, metrics), gradient = jax.jit(differentiate)(rag.initial_params())
    assert value == 0 and metrics["without_positive"] == 1 and metrics["accuracy"] == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_what_is_chosen(world: Path, tmp_path: Path) -> None:
    """By answer: Arland's capital stands in passage 0 alone. By label: whatever the text says."""
    _, _, store = open_world(tiny_config(world))
    [plain, *_] = read_questions(world / "train.jsonl")
    labelled = dataclasses.replace(plain, passages=("p7", "p3"))
    positions = label_positions(store, [labelled])
    assert positions == {"p3": 3, "p7": 7}

    def choose(question: Question, ids: list[int], k: int) -> list[int]:
        return choose_passages(store, question, [(np.array(ids, np.int32), k - 1)], positions).tolist()

    assert choose(plain, [4, 0, 7, 2], 3) == [0, 4, 7]
    assert choose(plain, [4, 0, 7, 2], 1) == [0]
    assert choose(plain, [4, 0, -1, -1], 4) == [0, 4, -1, -1]
    assert choose(plain, [4, 7, 2, 1], 3) == [-1, 4, 7]
    assert choose(labelled, [4, 0, 7, 3], 4) == [7, 4, 0, -1]  # the better ranked of the two that are named
    assert choose(labelled, [4, 0, 2, 1], 3) == [7, 4, 0]  # the first that is named, though it was not found


def test_what_counts_is_what_does_not_answer(world: Path) -> None:
    _, _, store = open_world(tiny_config(world))
    questions = read_questions(world / "train.jsonl")[:4]
    ids = chosen_ids()
    every = count_passages(store, questions, np.arange(4), ids)
    for b, c, k in np.ndindex(every.shape):
        i = int(ids[c, k])
        answers = i >= 0 and any(answer in store[i].text for answer in questions[b].answers)
        assert every[b, c, k] == (((b, 0) == (c, k) and i >= 0) or (i >= 0 and not answers))
    assert not every[0, 1, 1] and every[2, 1, 1]  # passage 0 is the positive of question 0
    np.testing.assert_array_equal(count_passages(store, questions[2:], np.array([2, 3]), ids), every[2:])


def test_a_label_that_is_not_there(world: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "q.jsonl", [{"question": "Who?", "answer": ["x"], "id": "q1", "passages": ["p1", "gone"]}])
    config = contrasting(world, tmp_path / "run", questions__train=str(tmp_path / "q.jsonl"))
    with pytest.raises(InputError, match="question q1 names passage 'gone', which is not in the corpus"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def learnt(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("contrastive")
    config = contrasting(
        world, folder / "run", train__steps=24, train__dev_questions=5, train__mined_negatives=30, train__save_every=12
    )
    train(config)
    return config


def test_it_learns(world: Path, learnt: Config) -> None:
    steps = [line for line in logged(Path(learnt.output)) if "loss" in line]
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert np.mean([line["accuracy"] for line in steps[-5:]]) > np.mean([line["accuracy"] for line in steps[:5]])
    dev = [line["dev_loss"] for line in logged(Path(learnt.output)) if "dev_loss" in line]
    assert len(dev) == 2 and all(math.isfinite(loss) for loss in dev)
    assert "index_overlap" in logged(Path(learnt.output))[-1]  # encoded anew, for what is asked afterwards


def test_evaluation_and_answers_after_it(learnt: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """The retriever as trained, its own index, and the generator as it came."""
    config = learnt.replace(evaluate=learnt.evaluate.replace(split="train", max_questions=2, max_untrained_questions=2))
    models = evaluate(config)["models"]
    assert models["trained"]["recall@1"] > models["untrained"]["recall@1"]
    rag = load_pipeline(config)
    restored = restore_params(rag)
    assert restored is not None
    chex.assert_trees_all_equal(restored[0]["generator"], rag.generator.load_params())
    assert open_answerer(config).index.manifest["refreshed"] == 24


def test_the_way_on(learnt: Config, tmp_path: Path) -> None:
    """`ragjax export` gives what `retriever.source` takes, and end-to-end training begins there."""
    assert main(["export", learnt.output, str(tmp_path / "exported")]) == 0
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {"question_encoder", "README.md", CHECKSUMS}
    source = str(tmp_path / "exported" / "question_encoder")
    config = load_config(Path(learnt.output) / "config.yaml", ["output=" + str(tmp_path / "run")])
    config = config.replace(
        train=config.train.replace(objective="marginal", passage_encoder="frozen", steps=1, dev_questions=0),
        retriever=config.retriever.replace(source=source),
        index=config.index.replace(path=str(tmp_path / "index")),
    )
    rag, index, _ = open_world(config)
    trained = restore_params(load_pipeline(learnt))
    assert trained is not None
    chex.assert_trees_all_equal(rag.retriever.load_params(), jax.device_get(trained[0]["retriever"]))
    before = open_answerer(learnt).index
    np.testing.assert_allclose(np.asarray(index.embeddings), np.asarray(before.embeddings), atol=1e-5)
    train(config)


def test_its_own_passage_encoder_is_exported(world: Path, tmp_path: Path) -> None:
    run = train(contrasting(world, tmp_path / "run", train__passage_encoder="own", train__steps=2))
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {
        "question_encoder",
        "passage_encoder",
        "README.md",
        CHECKSUMS,
    }
    rag = load_pipeline(
        contrasting(
            world,
            run,
            retriever__source=str(tmp_path / "exported/question_encoder"),
            retriever__passage_encoder=str(tmp_path / "exported/passage_encoder"),
            train__passage_encoder="own",
        )
    )
    trained = restore_params(load_pipeline(contrasting(world, run, train__passage_encoder="own")))
    assert trained is not None
    for part in ("retriever", "passage_encoder"):
        chex.assert_trees_all_equal(rag.initial_params()[part], jax.device_get(trained[0][part]))


@pytest.mark.devices(8)
def test_eight_devices_are_one(world: Path, tmp_path: Path) -> None:
    # without the bias of keys, whose gradient is 0 but for rounding
    rag, index, store = open_world(contrasting(world, tmp_path, train__frozen_params=["retriever.layers.key.bias"]))
    questions = read_questions(world / "train.jsonl")[:8]
    ids = np.array([[i, (i + 3) % 30, (i + 11) % 30] for i in range(8)], np.int32)
    batch = attached(rag, index, store, questions, ids)
    results = []
    for devices in (1, 8):
        mesh = make_mesh(devices=jax.devices()[:devices])
        state = init_train_state(rag, rag.initial_params())
        shardings = state_shardings(rag, mesh, state)
        new, metrics = make_train_step(rag, shardings)(put_global(state, shardings), shard_batch(mesh, batch, 8))
        results.append((jax.device_get(metrics), moments(new.optimizer)["mu"]))
    chex.assert_trees_all_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert_same_gradients(results[1][1], results[0][1])


@pytest.mark.devices(8)
def test_the_abstract_step_is_the_real_one(world: Path, tmp_path: Path) -> None:
    config = contrasting(world, tmp_path, retriever__max_question_tokens=24, retriever__max_passage_tokens=32)
    rag, index, store = open_world(config.replace(index=config.index.replace(path=str(tmp_path / "index"))))
    questions = [Question(f"What is the capital of land {i}, and why?", ("x",), str(i)) for i in range(8)]
    batch = attached(rag, index, store, questions, np.zeros((8, 3), np.int32))
    chex.assert_trees_all_equal_shapes_and_dtypes(batch, abstract_batch(config, 32))
    mesh = make_mesh()
    state = init_train_state(rag, rag.initial_params())
    shardings = state_shardings(rag, mesh, state)
    real = make_train_step(rag, shardings).trace(put_global(state, shardings), shard_batch(mesh, batch, 8))
    assert trace_step(rag, mesh, len(index)).lower().as_text() == real.lower().as_text()


@pytest.mark.slow
def test_a_run_resumes_and_mines_from_an_index_that_follows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"refresh__every": 4, "refresh__steps": 2, "train__save_every": 3}
    reference = train(contrasting(world, tmp_path / "reference", **settings))
    save = Checkpointer.save

    def killed(self: Checkpointer, step: int, *more: Any) -> None:
        save(self, step, *more)
        if step == 6:
            raise RuntimeError("the power went off")

    config = contrasting(world, tmp_path / "run", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", killed)
        with pytest.raises(RuntimeError):
            train(config)
    train(config)
    assert logged(tmp_path / "run") == logged(reference)
    assert [line["step"] for line in logged(reference) if "index_overlap" in line] == [5, 9, 12]


@pytest.mark.slow
def test_two_processes_mine_together(world: Path, tmp_path: Path) -> None:
    """With dropout, which is drawn for each row."""
    dropping = {"train__dropout": 0.1}
    settings = [f"{key.replace('__', '.')}={value}" for key, value in (SETTINGS | dropping).items()]
    alone = train(contrasting(world, tmp_path / "alone", **dropping))
    arguments = ["train", str(world / "config.yaml"), f"output={tmp_path / 'together'}", *settings]
    for code, err in ends(start(world, 2, *arguments), 240):
        assert code == 0, err
    for one, other in zip(logged(tmp_path / "together"), logged(alone), strict=True):
        assert one.keys() == other.keys()
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.fused_retrieval=true", "train.fused_retrieval is for train.objective=marginal"),
        ("train.backprop_docs=1", "train.backprop_docs is for"),
        ("train.label_smoothing=0.1", "train.label_smoothing is for"),
        ("train.gradient_accumulation=2", "needs the whole batch at once"),
        ("retriever.prior=corpus", "no prior over the corpus"),
        ("train.mined_negatives=2", "train.mined_negatives=2 is less than train.num_docs=3"),
    ],
)
def test_what_does_not_go_together(world: Path, setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(world / "config.yaml", ["train.objective=contrastive", setting])


def test_answers_may_be_long_where_none_is_generated(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begins(*_: object) -> None:
        raise RuntimeError("the first step")

    monkeypatch.setattr("ragjax.commands.train.run_steps", begins)
    with pytest.raises(RuntimeError, match="the first step"):
        train(contrasting(world, tmp_path / "run", generator__max_answer_tokens=1))
    assert "are not trained on" not in capsys.readouterr().err


def test_a_plan_without_a_generator(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ragjax.planning.index_rows.program_temporaries", lambda *_: 1)  # not the question here
    monkeypatch.setattr("ragjax.planning.evaluate_rows.program_cost", lambda *_: (1, Cost(1, {})))
    settings = ["train.objective=contrastive", "train.passage_encoder=own", "refresh.every=20"]
    assert main(["plan", str(world / "config.yaml"), "--json", *settings]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    sizes = {row["what"]: row["size"] for row in rows if row["command"] == "train"}
    assert "generator parameters" not in sizes
    encoder = sizes["retriever parameters"]
    assert sizes["passage encoder parameters"] == encoder
    assert sizes["passage encoder parameters, of the index being built"] == encoder
    assert 4 * encoder <= sizes["optimiser state"] <= 4 * encoder + 100


def test_shards_of_the_store_give_labels(world: Path, tmp_path: Path) -> None:
    config = tiny_config(world, index__shard_size=7, index__path=str(tmp_path / "index"))
    _, _, store = open_world(config)
    asked = [Question("?", ("x",), "1", ("p29", "p0")), Question("?", ("x",), "2", ("p7",))]
    assert isinstance(store, PassageStore) and label_positions(store, asked) == {"p29": 29, "p0": 0, "p7": 7}
