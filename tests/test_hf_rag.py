"""Hugging Face's RAG checkpoints: what is imported computes its numbers, and comes back as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from trained import refused

from ragjax.cli import main
from ragjax.config import dump_config, load_config
from ragjax.experiment import load_experiment
from ragjax.hf_rag import import_rag
from ragjax.rag import open_rag
from ragjax.random_checkpoint import write_random_checkpoint
from ragjax.train import restore_trained
from ragjax.weights import open_bert, open_generator, read_json

Capture = pytest.CaptureFixture[str]
GOLDEN = Path(__file__).parent / "golden"
RAG = {"model_type": "rag", "n_docs": 3, "max_combined_length": 99}
RAG |= {"title_sep": " | ", "doc_sep": " ? ", "prefix": "ask: "}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RAG checkpoint of a random DPR encoder and a random BART, with their tokenizers."""
    folder = tmp_path_factory.mktemp("rag")
    tensors: dict[str, np.ndarray] = {}
    hf: dict[str, Any] = dict(RAG)
    parts = ("question_encoder", "bert", "question_encoder.bert_model."), ("generator", "bart", "")
    for part, family, prefix in parts:
        write_random_checkpoint(family, folder / "parts" / part)
        own = load_file(folder / "parts" / part / "model.safetensors")
        tensors |= {f"rag.{part}.{prefix}{name}": value for name, value in own.items()}
        hf[part] = read_json(folder / "parts" / part / "config.json")
        (folder / f"{part}_tokenizer").mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / "parts" / part / name, folder / f"{part}_tokenizer")
    shutil.rmtree(folder / "parts")
    hf["question_encoder"]["model_type"] = "dpr"
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


def configured(folder: Path) -> list[str]:
    """What an imported configuration leaves open."""
    splits = [f"questions.{split}={folder}/{split}.jsonl" for split in ("train", "dev", "test")]
    return ["corpus.source=none", "corpus.format=jsonl", f"retriever.passage_source={folder}/question_encoder", *splits]


@pytest.mark.parametrize("name", ["bart-tiny", "t5-tiny"])
def test_golden_values_of_an_imported_checkpoint(name: str, tmp_path: Path) -> None:
    folder = import_rag(str(GOLDEN / name / "rag"), tmp_path / "out")
    values = np.load(GOLDEN / name / "golden.npz")
    encoder = open_bert(folder / "question_encoder", "cls", normalize=False)
    tokens, mask = (jnp.asarray(values[f"in/{key}"], jnp.int32) for key in ("input_ids", "attention_mask"))
    questions = nnx.merge(encoder.graph, encoder.read())(tokens, mask == 1)
    np.testing.assert_allclose(questions, values["score/labels/question_embeds"], rtol=1e-4, atol=1e-5)
    scores = jnp.einsum("bd,bkd->bk", questions, values["in/doc_embeds"])
    np.testing.assert_allclose(scores, values["score/labels/doc_scores"], rtol=1e-4)
    log_prior = jax.nn.log_softmax(scores, axis=-1)
    np.testing.assert_allclose(log_prior, values["score/labels/doc_logprobs"], rtol=1e-4, atol=1e-4)
    assert open_generator(folder / "generator").read()


def test_import_export_import_is_the_identity(checkpoint: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert main(["import", str(checkpoint), str(first)]) == 0
    config = load_config(first / "config.yaml", configured(first))
    assert (config.train.k, config.decode.k, config.generator.source_tokens) == (3, 3, 99)
    assert config.generator.prompt == "ask: {passage} ? {question}"
    assert config.generator.passage == "{title} | {text}"
    rag = open_rag(config)
    assert rag.prompt.head[0] == rag.generator_tokenizer.bos_id and rag.prompt.tail == (rag.special.eos,)

    run = tmp_path / "run"
    run.mkdir()
    text = (first / "config.yaml").read_text().replace(f"{first}/run", str(run))
    (run / "config.yaml").write_text(text)
    saved = load_config(run / "config.yaml", configured(first))
    (run / "config.yaml").write_text(dump_config(saved))
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "exported", checkpoint))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    ours_config, theirs_config = (read_json(f / "config.json") for f in (tmp_path / "exported", checkpoint))
    assert theirs_config.items() <= ours_config.items()

    second = import_rag(str(tmp_path / "exported"), tmp_path / "second")
    for part in ("question_encoder", "generator"):
        chex.assert_trees_all_equal(*(load_file(f / part / "model.safetensors") for f in (first, second)))
        assert read_json(first / part / "config.json") == read_json(second / part / "config.json")
    again = open_rag(load_config(second / "config.yaml", configured(second)))
    one, two = (r.generator_tokenizer.encode(["Paris"], special=True) for r in (rag, again))
    assert one == two


def test_a_decoder_only_run_becomes_two_folders(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    restored = restore_trained(open_rag(load_experiment(run)))
    assert restored is not None
    encoder = open_bert(tmp_path / "out" / "question_encoder", "mean", normalize=True)
    chex.assert_trees_all_equal(encoder.read(), restored[0]["retriever"])
    chex.assert_trees_all_equal(open_generator(tmp_path / "out" / "generator").read(), restored[0]["generator"])
    from transformers import AutoTokenizer

    ours = open_rag(load_experiment(run)).generator_tokenizer
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "out" / "generator"))
    assert theirs("What is it?")["input_ids"] == ours.encode(["What is it?"])[0]
    assert theirs.eos_token_id == ours.eos_id


def test_what_cannot_be_imported(capsys: Capture, checkpoint: Path, tmp_path: Path) -> None:
    def damaged(name: str, config: dict[str, Any] | None, **more: np.ndarray) -> Path:
        folder = Path(shutil.copytree(checkpoint, tmp_path / name))
        tensors = load_file(folder / "model.safetensors") | more
        save_file(tensors, folder / "model.safetensors")
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    out = str(tmp_path / "out")
    no_rag = damaged("a", {"model_type": "bart"})
    message = refused(capsys, tmp_path, "import", str(no_rag), out)
    assert "not a RAG checkpoint: its config.json has model_type 'bart'" in message
    strangers = damaged("b", None, **{"reader.w": np.ones(3), "rag.reader.v": np.ones(3)})
    message = refused(capsys, tmp_path, "import", str(strangers), out)
    assert "rag.reader.v" in message and "reader.w" in message
    assert "exists already" in refused(capsys, tmp_path, "import", str(checkpoint), str(tmp_path / "a"))
    only = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    kept = {k: v for k, v in load_file(only / "model.safetensors").items() if "generator" in k}
    save_file(kept, only / "model.safetensors")
    assert "no tensors of question_encoder" in refused(capsys, tmp_path, "import", str(only), out)


def test_what_cannot_be_exported(capsys: Capture, world: Path, tmp_path: Path) -> None:
    write_random_checkpoint("bart", tmp_path / "bart")
    (tmp_path / "run").mkdir()
    text = (world / "config.yaml").read_text().replace(f"{world}/generator", str(tmp_path / "bart"))
    (tmp_path / "run" / "config.yaml").write_text(text)
    message = refused(capsys, tmp_path, "export", str(tmp_path / "run"), str(tmp_path / "out"))
    assert "RAG needs a DPR question encoder, not a 'bert'" in message
    assert "no run here" in refused(capsys, tmp_path, "export", str(tmp_path / "none"), str(tmp_path / "out"))


def test_passages_may_have_an_encoder_of_their_own(world: Path, tmp_path: Path, capsys: Capture) -> None:
    write_random_checkpoint("bert", tmp_path / "passages", seed=9)
    own = [f"retriever.passage_source={tmp_path}/passages", f"index.folder={tmp_path}/index", f"output={tmp_path}/run"]
    assert main(["index", str(world / "config.yaml"), *own]) == 0
    ours, shared = (np.load(folder / "embeddings.npy") for folder in (tmp_path / "index", world / "index"))
    assert ours.shape == shared.shape and np.abs(ours - shared).max() > 0.1
    assert "built by another encoder" in refused(
        capsys, tmp_path, "answer", str(world / "config.yaml"), "why?", "--set", f"index.folder={tmp_path}/index"
    )
    assert main(["answer", str(world / "config.yaml"), "why?", *(f"--set={setting}" for setting in own)]) == 0
