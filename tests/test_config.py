"""The configuration: defaults, overrides, and a clear word about everything that is wrong with it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from ragjax.config import Config, dump_config, get_key, load_config
from ragjax.errors import InputError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SMALLEST = """\
output: runs/x
corpus: {source: passages.jsonl}
retriever: {source: some/encoder}
generator: {source: some/decoder}
"""


def written(folder: Path, more: str = "", text: str = SMALLEST) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text + more, encoding="utf-8")
    return path


def test_what_is_not_given_has_its_default(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "train: {k: 7}\n"))
    assert (config.train.k, config.train.batch_size, config.decode.mode) == (7, 8, "thorough")
    assert config.retriever == dataclasses.replace(Config().retriever, source="some/encoder")


def test_paths_follow_the_output_folder(tmp_path: Path) -> None:
    config = load_config(written(tmp_path), ["output=elsewhere"])
    assert config.index.folder == "elsewhere/index"
    assert config.questions.dev == "elsewhere/index/questions/dev.jsonl"
    assert load_config(written(tmp_path), ["index.folder=shared"]).questions.test == "shared/questions/test.jsonl"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_load_and_come_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["train.retriever_lr=1e-5", "generator.prompt=chat"])
    assert config.train.retriever_lr == 1e-5
    assert load_config(written(tmp_path, text=dump_config(config))) == config


def test_there_are_shipped_configurations() -> None:
    assert {"factbook.yaml", "tiny.yaml"} <= {path.name for path in CONFIGS}


def test_overrides_win_and_the_last_of_them_most(tmp_path: Path) -> None:
    config = load_config(
        written(tmp_path, "train: {steps: 5}\n"),
        ["train.steps=6", "train.steps=7", "train.freeze=[retriever,generator.embed]", "evaluate.limit=null"],
    )
    assert (config.train.steps, config.train.freeze) == (7, ["retriever", "generator.embed"])
    assert config.evaluate.limit is None
    assert get_key(config, "train.steps") == 7


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    config = load_config(written(tmp_path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"unknown key 'train\.stepz'; known here: steps, batch_size"),
        ("trian.steps=3", r"unknown key 'trian'; known here: output, model, hf_compatible, seed"),
        ("train.steps=many", r"key 'train\.steps': Value 'many'.* could not be converted to Integer"),
        ("train.remat=maybe", r"key 'train\.remat': .*bool"),
        ("train.clip=[1]", r"train\.clip"),
        ("train=5", r"int is not a subclass of Train"),
        ("train.steps", r"'train\.steps': an override is written key=value"),
        ("train.steps=0", r"train\.steps is 0; expected more than 0"),
        ("train.warmup=-1", r"train\.warmup is -1; expected 0 or more"),
        ("train.dropout=1", r"train\.dropout is 1\.0; expected less than 1"),
        ("train.accumulate=3", r"train\.batch_size 8 is not divisible by train\.accumulate 3"),
        ("dtype=float64", r"dtype is 'float64'; expected one of float32, bfloat16"),
        ("corpus.format=csv", r"corpus\.format is 'csv'; expected one of jsonl, dpr, factbook"),
        ("decode.mode=slow", r"decode\.mode is 'slow'; expected one of thorough, certified, fast"),
        ("model=rag_words", r"model is 'rag_words'; expected one of rag_sequence, rag_token"),
        ("train.label_smoothing=1.0", r"train\.label_smoothing is 1\.0; expected less than 1"),
        ("decode.min_new_tokens=16", r"decode\.min_new_tokens must be smaller"),
        ("generator.prompt='{passage} only'", r"generator\.prompt must contain \{question\} once"),
        ("generator.answer=yes", r"generator\.answer must contain \{answer\}"),
        ("retriever.passage='{title}: {txt}'", r"retriever\.passage must contain \{text\}"),
        ("generator.passage=nothing", r"generator\.passage must contain \{text\}"),
        ("index.folder=${nowhere}", r"nowhere"),
        ("seed=99999999999999999999", r"seed is 99999999999999999999; expected at most 4294967295"),
        ("train.steps=2147483648", r"train\.steps is 2147483648; expected at most 2147483647"),
        ("train.freeze=[[a]]", r"freeze"),
        ("corpus.categories=[{a: 1}]", r"categories"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, override: str, message: str) -> None:
    path = written(tmp_path)
    with pytest.raises(InputError, match=message) as refusal:
        load_config(path, [override])
    assert "\n" not in str(refusal.value)
    assert override == "train.steps" or str(refusal.value).startswith(str(path))


def test_several_impossible_values_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.k is 0.*decode\.beams is -2"):
        load_config(written(tmp_path), ["train.k=0", "decode.beams=-2"])


def test_the_corpus_prior_needs_an_exact_index(tmp_path: Path) -> None:
    assert load_config(written(tmp_path), ["retriever.prior=corpus"]).retriever.prior == "corpus"
    with pytest.raises(InputError, match=r"retriever\.prior=corpus needs every score, which index\.kind=HNSW32"):
        load_config(written(tmp_path), ["retriever.prior=corpus", "index.kind=HNSW32"])


def test_everything_that_must_be_given_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be given") as refusal:
        load_config(written(tmp_path, text="seed: 3\n"))
    assert all(key in str(refusal.value) for key in ("corpus.source", "generator.source", "output", "retriever.source"))


def test_a_yaml_error_tells_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "train: {steps: 3\nseed: 1\n")
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: not readable as YAML: .*line [56]"):
        load_config(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: no such configuration file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.probe_every=10"], r"train\.probe_every measures what train\.backward_documents leaves out"),
        (["model=rag_token", "train.backward_documents=1"], r"train\.backward_documents is for model=rag_sequence"),
        (["model=rag_token", "train.exclude_bos=true"], r"train\.exclude_bos is for model=rag_sequence"),
        (["model=rag_token", "retriever.prior=corpus"], r"retriever\.prior=corpus is for model=rag_sequence"),
        (["model=rag_token", "decode.mode=fast"], r"decode\.mode=fast is for model=rag_sequence"),
        (["hf_compatible=true", "decode.mode=fast"], r"decode\.mode=fast is for .*hf_compatible=false"),
        (["hf_compatible=true", "retriever.prior=corpus"], r"hf_compatible=true normalises over the top k"),
    ],
    ids=str,
)
def test_what_does_not_go_together(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(written(tmp_path), overrides)
