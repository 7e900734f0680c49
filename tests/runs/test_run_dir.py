"""The folder of a run: recorded well enough to be repeated."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jax
import pytest
from world import open_world, tiny_config

from ragjax.checkpoints.hub import fingerprint_files
from ragjax.config import Config, Train, dump_config, load_config
from ragjax.errors import InputError
from ragjax.rag import RagPipeline
from ragjax.retrieval.index import Index
from ragjax.runs.run_dir import (
    FREE,
    check_same_models,
    check_same_run,
    git_revision,
    load_run_config,
    read_run_manifest,
    record_changes,
    start_run,
)


def opened(world: Path, folder: Path, **overrides: object) -> tuple[RagPipeline, Index]:
    rag, index, _ = open_world(tiny_config(world, output=str(folder), **overrides))
    return rag, index


def test_what_is_recorded_repeats_the_run(world: Path, tmp_path: Path) -> None:
    rag, index = opened(world, tmp_path / "run", train__retriever_lr=1e-5)
    assert start_run(rag, index) == tmp_path / "run"
    assert load_config(tmp_path / "run" / "config.yaml") == rag.config
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {"python", "ragjax", "jax", "flax", "optax", "orbax-checkpoint"} <= manifest["versions"].keys()
    assert manifest["git_revision"] == git_revision() and len(manifest["devices"]) == len(jax.devices())
    assert [source["source"] for source in manifest["sources"]] == [f"{world}/retriever", f"{world}/generator"]
    assert all(source["pin"] for source in manifest["sources"])
    assert manifest["fingerprints"]["questions.train"] == fingerprint_files([world / "train.jsonl"])
    assert manifest["fingerprints"].keys() >= {
        "encoder",
        "encoder_tokenizer",
        "generator_tokenizer",
        "generator",
        "passages",
    }
    assert manifest["index"]["corpus"]["fingerprint"].startswith("sha256:")


def test_the_same_run_may_go_on_with_what_is_free_changed(world: Path, tmp_path: Path) -> None:
    start_run(*opened(world, tmp_path, train__retriever_lr=1e-5))
    manifest = (tmp_path / "manifest.json").read_bytes()
    again = opened(
        world, tmp_path, train__retriever_lr=1e-5, decode__num_docs=1, evaluate__max_questions=3, train__log_every=7
    )
    start_run(*again)
    assert (tmp_path / "manifest.json").read_bytes() == manifest  # of the start
    assert load_run_config(tmp_path).decode.num_docs == 1
    more = tiny_config(world, output=str(tmp_path), train__retriever_lr=1e-5, train__steps=31, questions__strict=True)
    check_same_run(more)


def test_fewer_steps_than_were_trained_are_refused(world: Path, tmp_path: Path) -> None:
    start_run(*opened(world, tmp_path, train__steps=7))
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    check_same_run(tiny_config(world, output=str(tmp_path), train__steps=7))
    with pytest.raises(InputError, match=r"trained for 7 steps already, and train\.steps is 6; give 7 or more"):
        check_same_run(tiny_config(world, output=str(tmp_path), train__steps=6))


def test_what_was_changed_later_is_recorded_once(world: Path, tmp_path: Path) -> None:
    start_run(*opened(world, tmp_path))
    before = read_run_manifest(tmp_path)
    record_changes(tmp_path, 5, {})
    assert read_run_manifest(tmp_path) == before
    for _ in range(2):
        record_changes(tmp_path, 5, {"train.steps": {"before": 5, "now": 9}})
        record_changes(tmp_path, 7, {})
    assert read_run_manifest(tmp_path)["history"] == [{"step": 5, "train.steps": {"before": 5, "now": 9}}]
    record_changes(tmp_path, 7, {"train.steps": {"before": 9, "now": 8}})
    assert [entry["step"] for entry in read_run_manifest(tmp_path)["history"]] == [5, 7]
    record_changes(tmp_path, 5, {})  # from there on all is trained again, as it was begun
    assert read_run_manifest(tmp_path)["history"] == []


def test_a_run_from_before_a_key_was_there_may_go_on(world: Path, tmp_path: Path) -> None:
    """What its configuration does not say had the value that is the default today."""
    start_run(*opened(world, tmp_path))
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    older = [line for line in lines if line.split(":")[0].strip() not in ("model", "hf_compatible", "label_smoothing")]
    assert len(older) == len(lines) - 4  # mesh.model, too
    (tmp_path / "config.yaml").write_text("\n".join(older))
    config = tiny_config(world, output=str(tmp_path))
    check_same_run(config)
    check_same_models(config)
    with pytest.raises(InputError, match="model was 'rag_sequence' and is 'rag_token'"):
        check_same_models(config.replace(model="rag_token"))


def test_another_run_is_refused_key_by_key(world: Path, tmp_path: Path) -> None:
    start_run(*opened(world, tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    another = tiny_config(world, output=str(tmp_path), seed=1, train__num_docs=2, decode__num_docs=1)
    with pytest.raises(InputError, match=r"seed was 0 and is 1; train\.num_docs was 3 and is 2; go back") as refusal:
        check_same_run(another)
    assert "decode" not in str(refusal.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("changed", "named"), [("generator/model.safetensors", "generator"), ("index", "passages")])
def test_other_inputs_under_the_same_names_are_refused(world: Path, tmp_path: Path, changed: str, named: str) -> None:
    own = Path(shutil.copytree(world, tmp_path / "world", ignore=shutil.ignore_patterns("run")))
    places = {"generator__source": str(own / "generator"), "index__path": str(own / "index")}
    rag, index = opened(world, tmp_path / "run", **places)
    start_run(rag, index)
    if changed == "index":
        index.manifest["corpus"]["fingerprint"] = "sha256:0"
    else:
        data = (own / changed).read_bytes()
        (own / changed).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=rf"started on other inputs: {named} changed since"):
        start_run(rag, index)


def test_a_trained_model_is_not_read_under_other_settings(world: Path, tmp_path: Path) -> None:
    start_run(*opened(world, tmp_path, train__retriever_lr=1e-5))
    check_same_models(tiny_config(world, output=str(tmp_path), decode__num_docs=1, train__steps=3))
    another = tiny_config(
        world, output=str(tmp_path), retriever__logit_scale=5.0, generator__answer_template="{answer}"
    )
    with pytest.raises(
        InputError, match=r"generator\.answer_template was ' \{answer\}'.*retriever\.logit_scale was 10\.0 and is 5\.0"
    ):
        check_same_models(another)


def test_everything_that_training_depends_on_is_held(world: Path) -> None:
    sections = Config.model_fields.keys()
    assert all(key.split(".")[0] in sections for key in FREE)
    train = Train.model_fields.keys()
    free = {key.removeprefix("train.") for key in FREE if key.startswith("train.")}
    assert free <= train and not free & {
        "start_from",
        "batch_size",
        "num_docs",
        "retriever_lr",
        "frozen_params",
        "dropout",
        "gradient_accumulation",
    }


def test_a_folder_of_checkpoints_without_configuration_is_left_alone(world: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match=r"has checkpoints but no config\.yaml"):
        check_same_run(tiny_config(world, output=str(tmp_path)))


def test_a_folder_that_cannot_be(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="run: cannot be created"):
        start_run(*opened(world, tmp_path / "run"))


def test_a_run_that_was_moved(world: Path, tmp_path: Path) -> None:
    start_run(*opened(world, tmp_path / "run"))
    (tmp_path / "run").rename(tmp_path / "moved")
    config = load_run_config(tmp_path / "moved")
    assert config.output == str(tmp_path / "moved")
    check_same_run(config)
    assert (config.index.path, config.questions.test) == (str(world / "index"), str(world / "test.jsonl"))
    with pytest.raises(InputError, match=r"run: no run here"):
        load_run_config(tmp_path / "run")


def test_a_run_that_was_moved_with_its_index_and_questions(world: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "run", tmp_path / "moved"
    inside = {"index__path": str(before / "index"), "questions__train": str(before / "index" / "train.jsonl")}
    (before / "index").mkdir(parents=True)
    (before / "config.yaml").write_text(dump_config(tiny_config(world, output=str(before), **inside)))
    before.rename(after)
    config = load_run_config(after)
    assert (config.index.path, config.questions.train) == (str(after / "index"), str(after / "index" / "train.jsonl"))
    assert config.questions.test == str(world / "test.jsonl")


def test_the_git_revision_is_a_commit_or_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    revision = git_revision()
    assert revision is None or re.fullmatch(r"[0-9a-f]{40,64}(\+changes)?", revision)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() is None
