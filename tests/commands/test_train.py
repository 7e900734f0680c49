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

from ragjax.checkpoints.hub import fingerprint_files
from ragjax.cli import main
from ragjax.commands import train as train_module
from ragjax.commands.train import train
from ragjax.data.question_batch import question_batch
from ragjax.data.questions import read_questions
from ragjax.errors import InputError
from ragjax.files import write_jsonl
from ragjax.models.layers import Params
from ragjax.rag import RagPipeline, load_pipeline
from ragjax.retrieval.retrieve import retrieve
from ragjax.runs.checkpointer import Checkpointer
from ragjax.runs.restore import restore_params
from ragjax.runs.run_dir import load_run_config
from ragjax.terminal import progress_bar
from ragjax.training.batch import attach_documents
from ragjax.training.data_loader import TrainQuestions
from ragjax.training.loss import rag_loss
from ragjax.training.state import TrainState, init_train_state

Capture = pytest.CaptureFixture[str]
PIECES = ["train.steps=5", "train.num_docs=2"]
DROPPING = "train.dropout=0.1"
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
    rag = load_pipeline(tiny_config(world, **overrides))
    like = jax.eval_shape(lambda params: init_train_state(rag, params), rag.abstract_params())
    with Checkpointer(folder / "checkpoints", writing=False) as checkpoints:
        assert checkpoints.steps()[0] == step
        return checkpoints.restore(step, like), checkpoints.metadata(step)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, happen: Callable[[], None]) -> None:
    """Lets something happen when a step is told, which the next one has begun by then."""

    @contextmanager
    def watched(name: str, total: int, unit: str, done: int = 0, **beside: Any) -> Iterator[Callable[..., None]]:
        count = done
        with progress_bar(name, total, unit, done, **beside) as advance:

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
    rag = load_pipeline(tiny_config(world))
    restored = restore_params(rag)
    assert restored is not None and restored[1] == STEPS
    before = rag.initial_params()
    chex.assert_trees_all_equal_shapes_and_dtypes(restored[0], before)
    # both lie on a device of their own, or evaluating them side by side would compile everything twice
    assert all(leaf.committed for leaf in jax.tree.leaves((before, restored[0])))
    for part in ("retriever", "generator"):
        changes = jax.tree.map(
            lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), restored[0][part], before[part]
        )
        assert max(jax.tree.leaves(changes)) > 1e-4


@pytest.mark.parametrize(("steps", "warned"), [(5, False), (6, True)])
def test_more_than_twenty_epochs_are_warned_of_before_the_first_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, steps: int, warned: bool
) -> None:
    """With 2 questions and 8 a step, 5 steps are 20 epochs: for one more the warning comes."""
    write_jsonl(
        tmp_path / "two.jsonl", [{"question": "Where?", "answer": ["A"]}, {"question": "Who?", "answer": ["B"]}]
    )
    monkeypatch.setattr(train_module, "run_steps", lambda *_: crash())
    own = {"questions__train": str(tmp_path / "two.jsonl"), "output": str(tmp_path / "run")}
    with pytest.raises(RuntimeError, match="power"):
        train(tiny_config(world, train__steps=steps, **own))
    line = f"train.steps={steps} means {4 * steps} epochs over 2 questions; more than 20 tend to learn them by heart"
    assert (line in " ".join(capsys.readouterr().err.split())) == warned


def trainer(world: Path, runs: Path) -> Callable[..., int]:
    """Trains five steps in a folder of `runs`, with more settings, and returns the exit code."""
    return lambda folder, *more: main(["train", str(world / "config.yaml"), f"output={runs / folder}", *PIECES, *more])


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory, seen_devices: int) -> Path:
    """Five steps, undisturbed."""
    runs = tmp_path_factory.mktemp("whole")
    assert trainer(world, runs)("run") == 0
    return runs / "run"


@pytest.fixture(scope="module")
def dropping(world: Path, tmp_path_factory: pytest.TempPathFactory, seen_devices: int) -> Path:
    """The same with dropout."""
    runs = tmp_path_factory.mktemp("dropping")
    assert trainer(world, runs)("run", DROPPING) == 0
    return runs / "run"


@pytest.mark.other_python
@pytest.mark.devices(1, 8, slow=[2])
def test_a_run_in_pieces_equals_the_whole_one_bit_for_bit(
    world: Path, dropping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    trains, whole = trainer(world, tmp_path), dropping

    def go(*arguments: str) -> int:
        return trains(*arguments, DROPPING)

    at_step(monkeypatch, 2, crash)
    with pytest.raises(RuntimeError, match="power"):
        go("pieces", "train.save_every=1")  # step 2 is logged, and lost
    assert [line["step"] for line in logged(tmp_path / "pieces")] == [1, 2]
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    capsys.readouterr()
    assert go("pieces") == 130
    err = capsys.readouterr().err
    assert "going on from step 1" in err
    assert err.splitlines()[-1] == "ragjax: stopped and saved at step 4; run the same command again to go on"
    at_step(monkeypatch, 0, crash)
    assert go("pieces") == 0

    overrides: dict[str, Any] = {"train__steps": 5, "train__num_docs": 2, "train__dropout": 0.1}
    (expected, position), (state, same) = (
        saved_state(world, folder, 5, **overrides) for folder in (whole, tmp_path / "pieces")
    )
    chex.assert_trees_all_equal(jax.tree.map(raw, expected), jax.tree.map(raw, state))
    assert (position["data"], position["index"]) == (same["data"], same["index"])
    assert losses(whole) == losses(tmp_path / "pieces")

    def started(*_: object) -> None:
        raise AssertionError("a finished run trains no more")

    monkeypatch.setattr(train_module.BatchBuilder, "attach", started)
    capsys.readouterr()
    assert go("pieces") == 0
    err = capsys.readouterr().err
    assert "trained already: all 5 steps of train.steps are done" in err and "steps/s" not in err


def raw(leaf: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def test_a_machine_that_is_taken_away(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """SIGTERM saves and ends with 143; a save that is damaged later costs the steps since the one before, no more."""

    go = trainer(world, tmp_path)
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    often = ["train.save_minutes=1e-9", "train.keep_checkpoints=9"]
    assert go("pieces", *often) == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    checkpoints = tmp_path / "pieces" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["1", "2", "3", "4"], "one a step, by the clock"
    shutil.rmtree(checkpoints / "4")
    (checkpoints / "4").mkdir()
    at_step(monkeypatch, 0, crash)
    capsys.readouterr()
    assert go("pieces", *often) == 0
    assert "going on from step 3" in capsys.readouterr().err
    assert losses(whole) == losses(tmp_path / "pieces")


@pytest.mark.slow
@pytest.mark.devices(1, 8)
def test_a_run_goes_on_over_another_mesh(
    world: Path, dropping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """On one device only the layout of FSDP is another; test_processes has other numbers of devices."""
    go, model = trainer(world, tmp_path), min(4, jax.device_count())
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    assert go("pieces", DROPPING) == 143
    at_step(monkeypatch, 0, crash)
    capsys.readouterr()
    assert go("pieces", DROPPING, f"mesh.model={model}", "mesh.fsdp=true") == 0
    err, two_heads = " ".join(capsys.readouterr().err.split()), "generator.layers.key (2), generator.layers.value (2)"
    assert (f"not split over mesh.model=4: {two_heads}" in err) == (model == 4)
    of_steps = zip(losses(tmp_path / "pieces"), losses(dropping), strict=True)
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
    params = RagPipeline.initial_params

    def broken(rag: RagPipeline, like: Params) -> Params:
        read = params(rag, like)
        return {**read, "generator": jax.tree.map(lambda x: x * jnp.nan, read["generator"])}

    some = read_questions(run.parent / "letters.jsonl")
    records = [{"id": f"q{i}", "question": q.question, "answer": list(q.answers)} for i, q in enumerate(some)]
    write_jsonl(tmp_path / "named.jsonl", records)
    monkeypatch.setattr(RagPipeline, "initial_params", broken)
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
    assert "9 answers are longer than generator.max_answer_tokens=12 and are not trained on" in err
    assert "for example 'a city of many words'; questions that have no other: 1" in err


LONG = {"question": "long " * 60, "answer": ["x"]}
WITHOUT_ANSWER = {"question": "Where?", "answer": ["nowhere in particular"]}


def test_bad_questions_are_left_out_and_listed(world: Path, tmp_path: Path, capsys: Capture) -> None:
    """For more than an epoch none of them is drawn; of the dev questions they are counted, too."""
    good = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()[:6]]
    path, dev = tmp_path / "bad.jsonl", tmp_path / "dev.jsonl"
    write_jsonl(path, [good[0], LONG, *good[1:], {"question": "", "answer": ["x"]}, WITHOUT_ANSWER])
    write_jsonl(dev, [LONG, good[0]])
    settings = [
        f"questions.train={path}",
        f"questions.dev={dev}",
        "train.dev_questions=2",
        f"output={tmp_path / 'run'}",
    ]
    assert main(["train", str(world / "config.yaml"), *PIECES, *settings]) == 0
    err = capsys.readouterr().err
    assert "3 of 9 questions cannot be used and are left out" in err and f"{path}:8: empty or missing" in err
    assert "1 of 2 questions cannot be used" in err
    listed = [json.loads(line) for line in (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()]
    assert [(of["file"], of["line"]) for of in listed] == [
        (str(path), 2),
        (str(path), 8),
        (str(path), 9),
        (str(dev), 1),
    ]
    assert listed[0]["reason"].startswith("a prompt needs 3") and "every answer is longer" in listed[2]["reason"]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["left_out"] == 4
    assert math.isfinite([line for line in logged(tmp_path / "run") if "dev_loss" in line][-1]["dev_loss"])


def test_a_contrastive_run_reads_questions_of_any_length(world: Path, tmp_path: Path, capsys: Capture) -> None:
    """No generator reads them, and the retriever their beginning, which is told."""
    good = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()[:7]]
    write_jsonl(tmp_path / "q.jsonl", [*good, LONG | {"answer": ["Kesbourg"]}])
    settings = ["train.objective=contrastive", "train.mined_negatives=5", "train.steps=2", f"output={tmp_path / 'run'}"]
    assert main(["train", str(world / "config.yaml"), *settings, f"questions.train={tmp_path / 'q.jsonl'}"]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "1 questions are longer than retriever.max_question_tokens=64" in err and "left out" not in err
    assert not (tmp_path / "run" / "left_out.jsonl").exists()


def test_a_run_goes_on_with_cleaned_questions(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Without those that were left out all stays as it was; others have their turn from the next epoch on."""
    go, path = trainer(world, tmp_path), tmp_path / "q.jsonl"
    good = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()[:12]]
    asked = f"questions.train={path}"
    write_jsonl(path, [good[0], LONG, *good[1:]])
    assert go("whole", asked) == 0
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    assert go("cleaned", asked) == 130
    shutil.copytree(tmp_path / "cleaned", tmp_path / "fewer")
    at_step(monkeypatch, 0, crash)
    capsys.readouterr()

    cleaned = tmp_path / "cleaned.jsonl"
    write_jsonl(cleaned, good)
    assert go("cleaned", f"questions.train={cleaned}", "questions.strict=true") == 0
    err = " ".join(capsys.readouterr().err.split())
    assert f"{cleaned}: other questions than before step 2; the order of those trained on stays" in err
    assert losses(tmp_path / "cleaned") == losses(tmp_path / "whole")
    manifest = json.loads((tmp_path / "cleaned" / "manifest.json").read_text())
    [entry] = manifest["history"]
    assert entry["step"] == 2 and entry["questions.train"] == {
        "before": manifest["fingerprints"]["questions.train"],
        "now": fingerprint_files([cleaned]),
        "left_out": 0,
    }
    assert not (tmp_path / "cleaned" / "left_out.jsonl").exists()

    write_jsonl(cleaned, good[2:])
    drawn: list[str] = []
    pairs = TrainQuestions.pairs

    def watched(asked: TrainQuestions, chosen: Any) -> Any:
        found = pairs(asked, chosen)
        drawn.extend(question.question for question, _ in found)
        return found

    monkeypatch.setattr(TrainQuestions, "pairs", watched)
    assert go("fewer", f"questions.train={cleaned}") == 0
    assert "a new epoch begins with them" in " ".join(capsys.readouterr().err.split())
    assert set(drawn[:10]) == {question["question"] for question in good[2:]}
    [entry] = json.loads((tmp_path / "fewer" / "manifest.json").read_text())["history"]
    assert entry["step"] == 2
    assert [line["step"] for line in logged(tmp_path / "fewer")] == [1, 2, 3, 4, 5]


def test_a_run_goes_on_with_more_steps(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """It says so, follows the rates of the new number, and is the same however often it is stopped from there on."""
    go = trainer(world, tmp_path)
    assert go("run", "train.steps=3") == 0
    shutil.copytree(tmp_path / "run", tmp_path / "pieces")
    capsys.readouterr()
    assert go("run", "train.steps=5") == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "going on from step 3 train.steps was 3 and is 5: from here on the learning rates are those of 5" in err
    assert [line["step"] for line in losses(tmp_path / "run")] == [1, 2, 3, 4, 5]
    history = [{"step": 3, "train.steps": {"before": 3, "now": 5}}]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["history"] == history
    at_step(monkeypatch, 5, crash)
    with pytest.raises(RuntimeError, match="power"):
        go("pieces", "train.save_every=1")
    at_step(monkeypatch, 0, crash)
    assert go("pieces") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "pieces")
    assert json.loads((tmp_path / "pieces" / "manifest.json").read_text())["history"] == history
    assert go("run", "train.steps=4") == 2
    assert "trained for 5 steps already, and train.steps is 4" in capsys.readouterr().err


def test_a_run_begins_with_the_parameters_of_another(
    world: Path, run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rates of zero they stay what they were; sharded, too. Once there is a checkpoint, that run may be gone."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.yaml", "manifest.json"):
        shutil.copy(run / name, other / name)
    shutil.copytree(run / "checkpoints", other / "checkpoints")
    still = ["train.retriever_lr=0", "train.generator_lr=0", f"train.start_from={other}"]
    still += ["train.steps=1", "mesh.fsdp=true", "mesh.model=2"]
    go = trainer(world, tmp_path)
    monkeypatch.setattr(RagPipeline, "initial_params", lambda *_: pytest.fail("the pretrained ones are read"))
    assert go("new", *still) == 0
    assert f"beginning with the parameters of {other}, step {STEPS}" in " ".join(capsys.readouterr().err.split())
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert (manifest["start_from"]["run"], manifest["start_from"]["step"]) == (str(other), STEPS)
    assert manifest["start_from"]["fingerprint"].startswith("sha256:")
    theirs, ours = (
        restore_params(load_pipeline(tiny_config(world, output=str(of)))) for of in (other, tmp_path / "new")
    )
    assert theirs is not None and ours is not None and (theirs[1], ours[1]) == (STEPS, 1)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, ours[0]), jax.tree.map(np.asarray, theirs[0]))
    shutil.rmtree(other)
    assert go("new", *still) == 0
    assert "beginning with" not in capsys.readouterr().err
    assert go("third", *still) == 2
    assert "no run here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.passage_encoder=own"], "has train.passage_encoder=frozen, and this run own; use the same, or export"),
        (["generator.source=random:llama"], "was trained from another generator; give the same sources"),
    ],
)
def test_a_run_does_not_begin_with_what_is_not_its_own(
    run: Path, tmp_path: Path, capsys: Capture, settings: list[str], message: str
) -> None:
    more = [f"output={tmp_path}/run", f"index.path={tmp_path}/index", f"train.start_from={run}", *settings]
    assert main(["index", str(run / "config.yaml"), *more]) == 0
    assert main(["train", str(run / "config.yaml"), *more]) == 2
    assert f"train.start_from: {run} {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tensorboard_and_rare_logging(world: Path, tmp_path: Path) -> None:
    settings = ["train.tracker=tensorboard", "train.log_every=2", *PIECES, f"output={tmp_path}"]
    assert main(["train", str(world / "config.yaml"), *settings]) == 0
    assert [line["step"] for line in logged(tmp_path)] == [2, 4, 5]
    [events] = (tmp_path / "tensorboard").iterdir()
    assert b"distinct_documents" in events.read_bytes()


def test_the_work_is_split_over_all_devices(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shardings: list[Any] = []
    make = train_module.make_train_step

    def watched(rag: RagPipeline, of_state: Any) -> Callable[..., Any]:
        step = make(rag, of_state)

        def watch(state: TrainState, batch: Any, corpus: Any) -> Any:
            shardings.append(batch.source.sharding.shard_shape(batch.source.shape))
            return step(state, batch, corpus)

        return watch

    monkeypatch.setattr(train_module, "make_train_step", watched)
    at_step(monkeypatch, 1, crash)
    with pytest.raises(RuntimeError, match="power"):
        train(load_run_config(run).replace(output=str(tmp_path)))
    assert len(jax.devices()) == 2 and shardings[0][:2] == (4, 2)  # of 8 questions with 2 documents each


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_the_corpus_prior_is_trained_and_what_the_generator_misses_is_logged(
    world: Path, tmp_path: Path, fused: bool
) -> None:
    settings: dict[str, Any] = {"train__backprop_docs": 1, "train__gradient_error_every": 2}
    settings |= {"train__log_every": 10, "train__steps": 5, "retriever__prior": "corpus"}
    lines = logged(train(tiny_config(world, train__fused_retrieval=fused, output=str(tmp_path), **settings)))
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert all(0 < line["gradient_error_generator"] < 1 for line in lines[:2])
    assert "gradient_error_generator" not in lines[2]
    assert all(line["gradient_norm_retriever"] > 0 and math.isfinite(line["loss"]) for line in lines)
    assert lines[0]["prior_top"] < 1 / 3  # of the mass of all thirty passages


def test_a_frozen_generator_is_not_measured(world: Path, tmp_path: Path) -> None:
    settings = {"train__backprop_docs": 1, "train__gradient_error_every": 2, "train__frozen_params": ["generator"]}
    with pytest.raises(
        InputError, match=r"train\.gradient_error_every: train\.frozen_params leaves nothing of the generator"
    ):
        train(tiny_config(world, output=str(tmp_path / "run"), **settings))
    assert not (tmp_path / "run").exists()


def test_without_a_run_nothing_is_restored(world: Path, tmp_path: Path) -> None:
    rag = load_pipeline(tiny_config(world, output=str(tmp_path / "none")))
    assert restore_params(rag) is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "none" / "checkpoints").mkdir(parents=True)
    assert restore_params(rag) is None


def test_bad_input_is_an_input_error_in_python_too(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="k is 31"):
        train(tiny_config(world, train__num_docs=31, output=str(tmp_path / "run")))


@pytest.mark.devices(1)  # as above: one program
def test_the_loss_on_dev_questions_at_every_save(world: Path, tmp_path: Path) -> None:
    """It is what the loss function says of the models saved; dropout plays no part."""
    settings: dict[str, Any] = {"train__steps": 5, "train__save_every": 2, "train__dev_questions": 3}
    settings |= {"train__keep_best": True}
    settings |= {"train__num_docs": 2, "train__dropout": 0.1}
    config = tiny_config(world, **settings, output=str(tmp_path))
    train(config)
    measured = {int(line["step"]): line["dev_loss"] for line in logged(tmp_path) if "dev_loss" in line}
    assert list(measured) == [2, 4, 5]
    rag, index, store = train_module.load_artifacts(config)
    restored = restore_params(rag)
    assert restored is not None and restored[1] == min(measured, key=lambda step: measured[step])
    plain, losses = dataclasses.replace(rag, config=tiny_config(world)), []
    once = jax.jit(lambda params, batch: rag_loss(plain, params, batch, jax.random.key(0))[0])
    for question in read_questions(world / "dev.jsonl")[:3]:
        questions = question_batch(plain.tokenizers, [question.question], [question.answers[0]])
        ids = retrieve(plain, restored[0], index, questions, config.train.num_docs).ids
        batch = attach_documents(plain, index, store, questions, ids)
        losses.append(float(once(restored[0], jax.device_put(batch))))
    assert measured[restored[1]] == pytest.approx(np.mean(losses), rel=1e-4)
