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
from reference import rounding
from safetensors.numpy import load_file, save_file
from trained import refused

from ragjax.checkpoints.pretrained import open_encoder, open_generator
from ragjax.checkpoints.random_init import write_random_checkpoint
from ragjax.cli import main
from ragjax.commands.hugging_face import import_rag
from ragjax.config import dump_config, load_config
from ragjax.errors import InputError
from ragjax.files import read_json
from ragjax.rag import load_pipeline
from ragjax.runs.restore import restore_params
from ragjax.runs.run_dir import load_run_config

Capture = pytest.CaptureFixture[str]
GOLDEN = Path(__file__).parents[1] / "golden"
RAG = {"model_type": "rag", "n_docs": 3, "max_combined_length": 99}
RAG |= {"title_sep": " | ", "doc_sep": " ? ", "prefix": "ask: ", "label_smoothing": 0.1, "exclude_bos_score": True}
RAG |= {"do_marginalize": True, "do_deduplication": False, "reduce_loss": True, "dataset": "wiki_dpr"}
SEARCH = {"num_beams": 4, "max_length": 30, "min_length": 3, "length_penalty": 0.5, "early_stopping": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rag_checkpoint(tmp_path_factory.mktemp("rag"), "bart", "RagSequenceForGeneration")


def write_rag_checkpoint(folder: Path, family: str, kind: str) -> Path:
    """A RAG checkpoint of a random DPR encoder and a random BART or T5, with their tokenizers."""
    tensors: dict[str, np.ndarray] = {}
    hf: dict[str, Any] = RAG | {"architectures": [kind]}
    parts = ("question_encoder", "bert", "question_encoder.bert_model."), ("generator", family, "")
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
    splits = [f"questions.{split}='{folder}/{split}.jsonl'" for split in ("train", "dev", "test")]
    return [
        "corpus.source=none",
        "corpus.format=jsonl",
        f"retriever.passage_encoder='{folder}/question_encoder'",
        *splits,
    ]


@pytest.mark.parametrize("name", ["bart-tiny", "t5-tiny"])
def test_golden_values_of_an_imported_checkpoint(name: str, tmp_path: Path) -> None:
    folder = import_rag(str(GOLDEN / name / "rag"), tmp_path / "out")
    values = np.load(GOLDEN / name / "golden.npz")
    encoder = open_encoder(folder / "question_encoder", "cls", normalize=False)
    tokens, mask = (jnp.asarray(values[f"in/{key}"], jnp.int32) for key in ("input_ids", "attention_mask"))
    questions = nnx.merge(encoder.graphdef, encoder.load_params())(tokens, mask == 1)
    np.testing.assert_allclose(questions, values["score/labels/question_embeds"], rtol=1e-4, atol=1e-5)
    scores = jnp.einsum("bd,bkd->bk", questions, values["in/doc_embeds"])
    products = np.asarray(questions)[:, None] * values["in/doc_embeds"]  # a score near 0 is their difference
    np.testing.assert_allclose(scores, values["score/labels/doc_scores"], atol=rounding(products, products.shape[-1]))
    log_prior = jax.nn.log_softmax(scores, axis=-1)
    np.testing.assert_allclose(log_prior, values["score/labels/doc_logprobs"], rtol=1e-4, atol=1e-4)
    assert open_generator(folder / "generator").load_params()


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("kind", ["RagSequenceForGeneration", "RagTokenForGeneration"])
def test_import_export_import_is_the_identity(family: str, kind: str, tmp_path: Path) -> None:
    checkpoint, first, token = tmp_path / "rag", tmp_path / "first", kind == "RagTokenForGeneration"
    checkpoint.mkdir()
    write_rag_checkpoint(checkpoint, family, kind)
    assert main(["import", str(checkpoint), str(first)]) == 0
    config = load_config(first / "config.yaml", configured(first))
    assert config.model == ("rag_token" if token else "rag_sequence") and not config.hf_compatible
    assert (config.train.num_docs, config.decode.num_docs, config.generator.max_prompt_tokens) == (3, 3, 99)
    assert (config.train.label_smoothing, config.train.exclude_bos) == (0.1, not token)
    assert config.generator.prompt_template == "ask: {passage} ? {question}"
    assert config.generator.passage_template == "{title} | {text}"
    rag = load_pipeline(config)
    if family == "bart":
        assert rag.prompt.head[0] == rag.generator_tokenizer.bos_id
    assert rag.prompt.tail == (rag.special.eos,)

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
    theirs_config["generator"] = {"bos_token_id": None} | theirs_config["generator"]
    assert theirs_config.items() <= ours_config.items()

    second = import_rag(str(tmp_path / "exported"), tmp_path / "second")
    for part in ("question_encoder", "generator"):
        chex.assert_trees_all_equal(*(load_file(f / part / "model.safetensors") for f in (first, second)))
        assert read_json(first / part / "config.json").items() <= read_json(second / part / "config.json").items()
    again = load_pipeline(load_config(second / "config.yaml", configured(second)))
    one, two = (r.generator_tokenizer.encode(["Paris"], special=True) for r in (rag, again))
    assert one == two


def test_how_transformers_would_generate_is_carried_over(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "rag"))
    hf = read_json(folder / "config.json")
    hf["generator"] |= {**SEARCH, "prefix": " ", "no_repeat_ngram_size": 3, "forced_bos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(hf))
    import_rag(str(folder), tmp_path / "out")
    config = load_config(tmp_path / "out" / "config.yaml", configured(tmp_path / "out"))
    decode = config.decode
    # the number of beams is the RAG's own, which says nothing
    assert (decode.num_docs, decode.num_beams, decode.max_new_tokens, decode.min_new_tokens) == (3, 1, 29, 2)
    assert decode.length_penalty == 0.5 and decode.early_stopping and config.generator.max_answer_tokens == 29
    # a space is tokenised with the passage that follows it
    assert (config.generator.prompt_template, config.generator.passage_template) == (
        "{passage} ? {question}",
        " {title} | {text}",
    )
    assert "# Not carried over" in (tmp_path / "out" / "config.yaml").read_text().splitlines()[0]
    special = load_pipeline(config).special
    assert (special.bos, special.forced_bos, special.forced_eos) == (0, 0, special.eos)


def test_what_rag_token_generates_by_is_in_a_file_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    folder, out = Path(shutil.copytree(checkpoint, tmp_path / "rag")), tmp_path / "an : odd #name"
    hf = read_json(folder / "config.json") | {"architectures": ["RagTokenForGeneration"], "num_beams": 3}
    hf["generator"] |= SEARCH
    (folder / "config.json").write_text(json.dumps(hf))
    given = {"num_beams": 5, "min_length": 56, "forced_bos_token_id": [0], "forced_eos_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(given))
    assert main(["import", str(folder), str(out)]) == 0
    config = load_config(out / "config.yaml", configured(out))
    assert (config.decode.num_beams, config.decode.max_new_tokens, config.decode.min_new_tokens) == (5, 29, 28)
    rag = load_pipeline(config)
    assert (rag.special.forced_bos, rag.special.forced_eos) == (0, None)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    exported = read_json(tmp_path / "exported" / "config.json")["generator"]
    assert (exported["forced_bos_token_id"], exported["forced_eos_token_id"]) == (0, None)
    (out / "generator" / "generation_config.json").write_text('{"forced_bos_token_id": [0, 2]}')
    with pytest.raises(InputError, match=r"forced_bos_token_id is \[0, 2\]; expected one token"):
        load_pipeline(config)
    (out / "generator" / "generation_config.json").write_text(json.dumps({"eos_token_id": [rag.special.eos, 9]}))
    assert load_pipeline(config).special.ends == (rag.special.eos, 9)
    with pytest.raises(InputError, match="several tokens end an answer"):
        load_pipeline(config.replace(hf_compatible=True))


def test_what_was_changed_in_a_run_is_exported(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    first, run = import_rag(str(checkpoint), tmp_path / "first"), tmp_path / "run"
    run.mkdir()
    changed = ["model=rag_token", "train.exclude_bos=false", "train.num_docs=7", "train.label_smoothing=0.2"]
    changed += [
        f"output={run}",
        "generator.passage_template='{title}: {text}'",
        "generator.prompt_template='{passage}; {question}?'",
    ]
    config = load_config(first / "config.yaml", [*configured(first), *changed])
    (run / "config.yaml").write_text(dump_config(config))
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "the prompt '{passage}; {question}?' with passages '{title}: {text}'" in capsys.readouterr().err
    hf = read_json(tmp_path / "out" / "config.json")
    assert hf["architectures"] == ["RagTokenForGeneration"] and hf["dataset"] == "wiki_dpr"
    assert (hf["n_docs"], hf["label_smoothing"], hf["title_sep"], hf["doc_sep"]) == (7, 0.2, " / ", " // ")
    assert hf["generator"]["prefix"] == ""
    changed = ["generator.prompt_template='read: {passage}; {question}'"]
    (run / "config.yaml").write_text(dump_config(load_config(run / "config.yaml", changed)))
    assert main(["export", str(run), str(tmp_path / "expressible")]) == 0
    assert "is lost" not in capsys.readouterr().err
    hf = read_json(tmp_path / "expressible" / "config.json")
    assert (hf["generator"]["prefix"], hf["title_sep"], hf["doc_sep"]) == ("read: ", ": ", "; ")
    (run / "config.yaml").write_text(dump_config(load_config(run / "config.yaml", ["retriever.logit_scale=2.0"])))
    message = refused(capsys, tmp_path, "export", str(run), str(tmp_path / "again"))
    assert "this run has cls, false, 2.0 and top_k" in message


def test_a_decoder_only_run_becomes_two_folders(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    restored = restore_params(load_pipeline(load_run_config(run)))
    assert restored is not None
    encoder = open_encoder(tmp_path / "out" / "question_encoder", "mean", normalize=True)
    chex.assert_trees_all_equal(encoder.load_params(), restored[0]["retriever"])
    chex.assert_trees_all_equal(open_generator(tmp_path / "out" / "generator").load_params(), restored[0]["generator"])
    from transformers import AutoTokenizer

    ours = load_pipeline(load_run_config(run)).generator_tokenizer
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
    short = Path(shutil.copytree(checkpoint, tmp_path / "d"))
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:-100])
    assert "not readable as safetensors" in refused(capsys, tmp_path, "import", str(short), out)
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
    own = [f"retriever.passage_encoder={tmp_path}/passages", f"index.path={tmp_path}/index", f"output={tmp_path}/run"]
    assert main(["index", str(world / "config.yaml"), *own]) == 0
    ours, shared = (np.load(folder / "shards/00000/embeddings.npy") for folder in (tmp_path / "index", world / "index"))
    assert ours.shape == shared.shape and np.abs(ours - shared).max() > 0.1
    assert "built by another encoder" in refused(
        capsys, tmp_path, "answer", str(world / "config.yaml"), "why?", "--set", f"index.path={tmp_path}/index"
    )
    assert main(["answer", str(world / "config.yaml"), "why?", *(f"--set={setting}" for setting in own)]) == 0
