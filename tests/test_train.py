"""Training as a whole: it learns, it says how, it stops when asked or broken, and goes on as if nothing had been."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trained import STEPS
from world import tiny_config

from ragjax import train as train_module
from ragjax.checkpoint import Checkpoints
from ragjax.cli import main
from ragjax.errors import InputError
from ragjax.experiment import load_experiment
from ragjax.files import write_jsonl
from ragjax.loss import loss
from ragjax.models.layers import Params
from ragjax.progress import progress_bar
from ragjax.questions import read_questions
from ragjax.rag import Rag, open_rag, retrieve, train_batch
from ragjax.step import TrainState, initial_state
from ragjax.train import train
from ragjax.world import restore_trained

Capture = pytest.CaptureFixture[str]
PIECES = ["train.steps=5", "train.k=2", "train.dropout=0.1"]
RATES = {"examples_per_second", "tokens_per_second"}
METRICS = RATES | {
    "loss", "nll_per_token", "recall", "distinct_documents", "posterior_entropy", "posterior_skipped", "prior_top",
    "gradient_norm_retriever", "gradient_norm_generator",
}  # fmt: skip


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[dict[str, float]]:
    """What was logged, speed apart."""
    return [{name: value for name, value in line.items() if name not in RATES} for line in logged(folder)]


def saved_state(world: Path, folder: Path, step: int, **overrides: object) -> tuple[TrainState, dict[str, Any]]:
    rag = open_rag(tiny_config(world, **overrides))
    like = jax.eval_shape(lambda params: initial_state(rag, params), rag.abstract_params())
    with Checkpoints(folder / "checkpoints", writing=False) as checkpoints:
        assert checkpoints.latest() == step
        return checkpoints.restore(step, like), checkpoints.metadata(step)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, happen: Callable[[], None]) -> None:
    """Lets something happen when the progress of the training reaches a step."""

    @contextmanager
    def watched(name: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
        count = done
        with progress_bar(name, total, unit, done) as advance:

            def watch(more: int = 1, note: str = "") -> None:
                nonlocal count
                count += more
                advance(more, note)
                if count == step:
                    happen()

            yield watch

    monkeypatch.setattr(train_module, "progress_bar", watched)


def crash() -> None:
    raise RuntimeError("the power went off")


def test_it_learns_its_questions(run: Path) -> None:
    first, last = logged(run)[0], logged(run)[-1]
    assert last["loss"] < 0.1 * first["loss"]
    assert last["nll_per_token"] < 0.1 * first["nll_per_token"]


def test_every_step_is_logged_with_all_its_metrics(run: Path) -> None:
    lines = logged(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line.keys() == METRICS | {"step"}
        assert all(math.isfinite(value) for value in line.values())
        assert 0 <= line["posterior_entropy"] <= math.log(2) + 1e-5
        assert 1 / 2 - 1e-5 <= line["prior_top"] <= 1
        assert 0 <= line["recall"] <= 1 and 1 / 8 - 1e-5 <= line["distinct_documents"] <= 1
        assert line["gradient_norm_retriever"] > 0 and line["gradient_norm_generator"] > 0
        assert all(line[rate] > 0 for rate in RATES)


def test_both_parts_have_changed(world: Path, run: Path) -> None:
    rag = open_rag(tiny_config(world))
    restored = restore_trained(rag)
    assert restored is not None and restored[1] == STEPS
    before = rag.initial_params()
    chex.assert_trees_all_equal_shapes_and_dtypes(restored[0], before)
    # both lie on a device of their own, or evaluating them side by side would compile everything twice
    assert all(leaf.committed for leaf in jax.tree.leaves((before, restored[0])))
    for part in ("retriever", "generator"):
        changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), restored[0][part], before[part])
        assert max(jax.tree.leaves(changes)) > 1e-4


def trainer(world: Path, runs: Path) -> Callable[..., int]:
    """Trains five steps in a folder of `runs`, with more settings, and returns the exit code."""
    return lambda folder, *more: main(["train", str(world / "config.yaml"), f"output={runs / folder}", *PIECES, *more])


def test_a_run_in_pieces_equals_the_whole_one_bit_for_bit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    go = trainer(world, tmp_path)
    assert go("whole") == 0
    at_step(monkeypatch, 2, crash)
    with pytest.raises(RuntimeError, match="power"):
        go("pieces", "train.save_every=1")  # step 2 is logged, and lost
    assert [line["step"] for line in logged(tmp_path / "pieces")] == [1, 2]
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    capsys.readouterr()
    assert go("pieces") == 130
    err = capsys.readouterr().err
    assert "going on from step 1" in err
    assert err.splitlines()[-1] == "ragjax: stopped and saved at step 3; run the same command again to go on"
    at_step(monkeypatch, 0, crash)
    assert go("pieces") == 0

    overrides: dict[str, Any] = {"train__steps": 5, "train__k": 2, "train__dropout": 0.1}
    (whole, position), (pieces, same) = (
        saved_state(world, tmp_path / folder, 5, **overrides) for folder in ("whole", "pieces")
    )
    chex.assert_trees_all_equal(jax.tree.map(raw, whole), jax.tree.map(raw, pieces))
    assert (position["data"], position["index"]) == (same["data"], same["index"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "pieces")

    def started(*_: object) -> None:
        raise AssertionError("a finished run trains no more")

    monkeypatch.setattr(train_module.Reader, "read", started)
    assert go("whole") == 0


def raw(leaf: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def test_a_machine_that_is_taken_away(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """SIGTERM saves and ends with 143; a save that is damaged later costs the steps since the one before, no more."""

    go = trainer(world, tmp_path)
    assert go("whole") == 0
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    often = ["train.save_minutes=1e-9", "train.keep=9"]
    assert go("pieces", *often) == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    checkpoints = tmp_path / "pieces" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["1", "2", "3"], "one a step, by the clock"
    shutil.rmtree(checkpoints / "3")
    (checkpoints / "3").mkdir()
    at_step(monkeypatch, 0, crash)
    capsys.readouterr()
    assert go("pieces", *often) == 0
    assert "going on from step 2" in capsys.readouterr().err
    assert losses(tmp_path / "whole") == losses(tmp_path / "pieces")


def test_a_run_goes_on_over_another_mesh(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    go = trainer(world, tmp_path)
    assert go("whole") == 0
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    assert go("pieces") == 143
    at_step(monkeypatch, 0, crash)
    capsys.readouterr()
    assert go("pieces", "mesh.model=4", "mesh.fsdp=true") == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "not split over mesh.model=4: generator.layers.key (2), generator.layers.value (2)" in err
    of_steps = zip(losses(tmp_path / "pieces"), losses(tmp_path / "whole"), strict=True)
    assert all(ours == pytest.approx(theirs, rel=1e-4) for ours, theirs in of_steps)


def test_two_processes_do_not_train_in_one_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = ["train", str(world / "config.yaml"), f"output={tmp_path}", *PIECES]
    found = []

    def another() -> None:
        found.append(main(command))
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 1, another)
    assert main(command) == 130 and found == [2]
    assert f"{tmp_path}: another process trains here" in " ".join(capsys.readouterr().err.split())


def test_the_second_ctrl_c_stops_at_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)  # until its handler has run

    at_step(monkeypatch, 1, twice)
    handler = signal.getsignal(signal.SIGINT)
    assert main(["train", str(run / "config.yaml"), f"output={tmp_path}"]) == 130
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is handler


def test_what_is_not_a_number_stops_with_the_step_and_the_questions(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    params = Rag.initial_params

    def broken(rag: Rag) -> Params:
        read = params(rag)
        return {**read, "generator": jax.tree.map(lambda x: x * jnp.nan, read["generator"])}

    some = read_questions(run.parent / "letters.jsonl")
    records = [{"id": f"q{i}", "question": q.question, "answer": ["Kes"]} for i, q in enumerate(some)]
    write_jsonl(tmp_path / "named.jsonl", records)
    monkeypatch.setattr(Rag, "initial_params", broken)
    output = tmp_path / "run"
    settings = [f"output={output}", f"questions.train={tmp_path / 'named.jsonl'}"]
    assert main(["train", str(run / "config.yaml"), *settings]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("ragjax: step 1: ") and "loss" in message and "is not finite" in message
    assert all(f"q{i}" in message for i in range(8))
    assert (output / "train.jsonl").read_text() == "" and list((output / "checkpoints").iterdir()) == []


def test_answers_that_are_too_long_are_counted_and_not_cut(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    some = read_questions(run.parent / "letters.jsonl")
    records = [{"question": q.question, "answer": [*q.answers, "a city of many words"]} for q in some]
    write_jsonl(tmp_path / "train.jsonl", [*records, {"question": "Where?", "answer": "nowhere in particular"}])
    settings = [f"output={tmp_path / 'run'}", f"questions.train={tmp_path / 'train.jsonl'}"]
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    assert main(["train", str(run / "config.yaml"), *settings]) == 130  # it was trained on the others
    err = " ".join(capsys.readouterr().err.split())
    assert "9 answers are longer than generator.answer_tokens=12 and are not trained on" in err
    assert "for example 'a city of many words'; 1 questions have no other" in err


def test_tensorboard_and_rare_logging(world: Path, tmp_path: Path) -> None:
    settings = ["train.tensorboard=true", "train.log_every=2", *PIECES, f"output={tmp_path}"]
    assert main(["train", str(world / "config.yaml"), *settings]) == 0
    assert [line["step"] for line in logged(tmp_path)] == [2, 4, 5]
    [events] = (tmp_path / "tensorboard").iterdir()
    assert b"distinct_documents" in events.read_bytes()


def test_the_work_is_split_over_all_devices(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shardings: list[Any] = []
    make = train_module.make_train_step

    def watched(rag: Rag, of_state: Any) -> Callable[..., Any]:
        step = make(rag, of_state)

        def watch(state: TrainState, batch: Any, corpus: Any) -> Any:
            shardings.append(batch.source.sharding.shard_shape(batch.source.shape))
            return step(state, batch, corpus)

        return watch

    monkeypatch.setattr(train_module, "make_train_step", watched)
    at_step(monkeypatch, 1, crash)
    with pytest.raises(RuntimeError, match="power"):
        train(dataclasses.replace(load_experiment(run), output=str(tmp_path)))
    assert len(jax.devices()) == 8 and shardings[0][:2] == (1, 2)  # of 8 questions with 2 documents each


def test_the_corpus_prior_is_trained(world: Path, tmp_path: Path) -> None:
    config = tiny_config(world, retriever__prior="corpus", train__steps=2, output=str(tmp_path))
    first, second = logged(train(config))
    assert first["gradient_norm_retriever"] > 0 and math.isfinite(second["loss"])
    assert first["prior_top"] < 1 / 3  # of the mass of all thirty passages


@pytest.mark.parametrize("fused", [False, True])
def test_what_the_generator_misses_is_logged(world: Path, tmp_path: Path, fused: bool) -> None:
    settings = {"train__backward_documents": 1, "train__probe_every": 2, "train__log_every": 10, "train__steps": 5}
    lines = logged(train(tiny_config(world, train__fused=fused, output=str(tmp_path), **settings)))
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert all(0 < line["gradient_error_generator"] < 1 for line in lines[:2])
    assert "gradient_error_generator" not in lines[2]


def test_a_frozen_generator_is_not_measured(world: Path, tmp_path: Path) -> None:
    settings = {"train__backward_documents": 1, "train__probe_every": 2, "train__freeze": ["generator"]}
    with pytest.raises(InputError, match=r"train\.probe_every: train\.freeze leaves nothing of the generator"):
        train(tiny_config(world, output=str(tmp_path / "run"), **settings))
    assert not (tmp_path / "run").exists()


def test_without_a_run_nothing_is_restored(world: Path, tmp_path: Path) -> None:
    rag = open_rag(tiny_config(world, output=str(tmp_path / "none")))
    assert restore_trained(rag) is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "none" / "checkpoints").mkdir(parents=True)
    assert restore_trained(rag) is None


def test_bad_input_is_an_input_error_in_python_too(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="k is 31"):
        train(tiny_config(world, train__k=31, output=str(tmp_path / "run")))


def test_the_loss_on_dev_questions_at_every_save(world: Path, tmp_path: Path) -> None:
    """It is what the loss function says of the models saved; dropout plays no part."""
    settings = {"train__steps": 4, "train__save_every": 2, "train__dev_questions": 3, "train__keep_best": True}
    config = tiny_config(world, **settings, train__dropout=0.1, output=str(tmp_path))
    train(config)
    measured = {int(line["step"]): line["dev_loss"] for line in logged(tmp_path) if "dev_loss" in line}
    assert list(measured) == [2, 4]
    rag, index, store = train_module.open_world(config)
    restored = restore_trained(rag)
    assert restored is not None and restored[1] == min(measured, key=lambda step: measured[step])
    plain, losses = dataclasses.replace(rag, config=tiny_config(world)), []
    for question in read_questions(world / "dev.jsonl")[:3]:
        found = retrieve(plain, restored[0], index, [question.question], config.train.k)
        batch = train_batch(plain, index, store, [question.question], [question.answers[0]], found.ids)
        losses.append(float(loss(plain, restored[0], jax.tree.map(jnp.asarray, batch), jax.random.key(0))[0]))
    assert measured[restored[1]] == pytest.approx(np.mean(losses), rel=1e-4)
