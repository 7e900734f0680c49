"""The configurations of 8-billion-parameter generators, end to end with a tiny Qwen3: eight devices are as one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import pytest
from processes import ROOT, logged
from reference import random_llama

from ragjax.answerer import Answerer
from ragjax.checkpoints.random_init import write_random_checkpoint
from ragjax.cli import main
from ragjax.commands import answer as answer_module
from ragjax.commands import evaluate as evaluate_module
from ragjax.commands import train as train_module
from ragjax.config import load_config
from ragjax.parallel.mesh import command_mesh
from ragjax.planning.inputs import open_inputs
from ragjax.planning.shared_rows import parameters_row, search_row
from ragjax.planning.train_rows import optimizer_row

pytestmark = [pytest.mark.devices(8), pytest.mark.slow]

QUESTION = "What is the capital of Arland?"
SETTINGS = """
corpus.format=jsonl corpus.max_passages=null retriever.max_question_tokens=128 index.batch_size=8 dtype=float32
train.steps=3 train.batch_size=8 train.gradient_accumulation=2 train.num_docs=3 train.warmup_steps=0
train.retriever_lr=1e-3 decode.num_docs=3 decode.num_beams=2 decode.max_new_tokens=6
evaluate.max_questions=5 evaluate.max_untrained_questions=0 evaluate.closed_book=false
""".split()
ONE_DEVICE = ["mesh.model=1", "mesh.fsdp=false"]
Placed = dict[str, set[int]]


@pytest.fixture(scope="module")
def settings(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A Qwen3 whose heads and vocabulary four devices can share, the tiny world, and its index for such questions."""
    generator, index = tmp_path_factory.mktemp("qwen3"), tmp_path_factory.mktemp("index")
    write_random_checkpoint("llama", generator)  # its tokenizer
    random_llama(generator, 3, model_type="qwen3", vocab_size=264, num_key_value_heads=4, tie_word_embeddings=False)
    sources = [f"corpus.source={world}/passages.jsonl", f"index.path={index}/index"]
    sources += [f"questions.{split}={world}/{split}.jsonl" for split in ("train", "dev", "test")]
    sources += [f"retriever.source={world}/retriever", f"generator.source={generator}"]
    return [*SETTINGS, *sources]


def run(config: Path, folder: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> dict[str, Any]:
    """What training logs, evaluation measures and answering prints."""
    common = [str(config), f"output={folder}", *settings]
    assert main(["index", *common]) == main(["train", *common]) == main(["evaluate", *common]) == 0
    capsys.readouterr()
    assert main(["answer", str(config), QUESTION, "--json", *(f"--set={of}" for of in common[1:])]) == 0
    return {
        "log": [line for line in logged(folder) if "loss" in line],
        "metrics": json.loads((folder / "metrics.json").read_text())["models"]["trained"],
        "predictions": [json.loads(line) for line in (folder / "predictions.jsonl").open()],
        "answer": json.loads(capsys.readouterr().out),
    }


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> Placed:
    """The bytes that each command has put on each device, by command and row of the plan."""
    found: Placed = {}

    def note(command: str, row: str, tree: Any) -> None:
        held = dict.fromkeys(jax.devices(), 0)
        for array in jax.tree.leaves(tree):
            for shard in array.addressable_shards:
                held[shard.device] += shard.data.nbytes
        found[f"{command}: {row}"] = set(held.values())

    def answers(command: str, answerer: Answerer) -> Answerer:
        for model in ("retriever", "generator"):
            note(command, f"{model} parameters", answerer.params[model])
        note(command, "embeddings, for the search", answerer.index.corpus(answerer.mesh).embeddings)
        return answerer

    make_step, measure, open_answerer = train_module.make_step, evaluate_module._measure, answer_module.open_answerer

    def trains(run: train_module.Run) -> Any:
        for model in ("retriever", "generator"):
            note("train", f"{model} parameters", run.state.params[model])
        note("train", "optimiser state", run.state.optimizer)
        note("train", "embeddings, for the search", run.data.index.corpus(run.builder.mesh).embeddings)
        return make_step(run)

    monkeypatch.setattr(train_module, "make_step", trains)
    monkeypatch.setattr(evaluate_module, "_measure", lambda own, *rest: measure(answers("evaluate", own), *rest))
    monkeypatch.setattr(answer_module, "open_answerer", lambda *given: answers("answer", open_answerer(*given)))
    return found


def planned(config: Path, settings: list[str]) -> Iterator[tuple[str, int]]:
    """The same rows of the plan."""
    loaded = load_config(config, settings)
    inputs = open_inputs(loaded, command_mesh("train", loaded.mesh.model))
    places: list[tuple[Literal["train", "evaluate"], str]]
    places = [("train", "train"), ("evaluate", "evaluate"), ("evaluate", "answer")]
    for plans, command in places:
        rows = [parameters_row(inputs, plans, model) for model in ("retriever", "generator")]
        rows += [search_row(inputs, plans), *([optimizer_row(inputs)] if plans == "train" else [])]
        yield from ((f"{command}: {row.what}", int(row.size or 0)) for row in rows)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3_8b_tpu", []),  # frozen, and four devices share it
        ("llama3_8b_lora", ["mesh.fsdp=true", "mesh.model=2"]),
    ],
)
def test_eight_devices_are_as_one_and_as_planned(
    name: str,
    layout: list[str],
    settings: list[str],
    tmp_path: Path,
    placed: Placed,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses, metrics and answers are one device's; and each command puts on each device what the plan says."""
    config, given = ROOT / "configs" / f"{name}.yaml", [*settings, *layout]
    ours = run(config, tmp_path / "eight", capsys, *given)
    expected = dict(planned(config, [*given, f"output={tmp_path}/eight"]))
    assert placed.keys() == expected.keys()
    for row, size in expected.items():
        assert [size] == [pytest.approx(of, rel=0.01) for of in placed[row]], row

    for function in ("devices", "local_devices"):
        every = getattr(jax, function)
        monkeypatch.setattr(jax, function, lambda *kind, every=every, **of: every(*kind, **of)[:1])
    theirs = run(config, tmp_path / "one", capsys, *given, *ONE_DEVICE)
    for one, other in zip(ours["log"], theirs["log"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for a, b in zip(ours["predictions"], theirs["predictions"], strict=True):
        assert (a["id"], a["answers"]) == (b["id"], b["answers"])
        assert a["p_answer"] == pytest.approx(b["p_answer"], rel=1e-3)
    assert ours["metrics"].keys() == theirs["metrics"].keys()
    numbers = [jax.tree.leaves(of["metrics"]) for of in (ours, theirs)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)
    assert ours["answer"]["text"] == theirs["answer"]["text"]
    assert ours["answer"]["probability"] == pytest.approx(theirs["answer"]["probability"], rel=1e-3)
