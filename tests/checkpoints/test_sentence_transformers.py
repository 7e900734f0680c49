"""What a sentence-transformers folder says is what counts, unless the configuration says otherwise, which is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import Small, bert_hidden, random_bert
from safetensors.numpy import save_file
from world import tiny_config

from ragjax.checkpoints.hub import checkpoint_folder
from ragjax.checkpoints.pretrained import encoder_shape, open_encoder, save_encoder
from ragjax.checkpoints.sentence_transformers import (
    Encoding,
    read_sentence_modules,
    reads_lower_case,
    resolve_encoding,
    write_sentence_modules,
)
from ragjax.config import Retriever
from ragjax.data.corpus import Passage
from ragjax.data.question_batch import question_batch
from ragjax.data.tokenizer import Tokenizer
from ragjax.errors import InputError
from ragjax.rag import load_pipeline

OLD, NEW = "sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules.pooling."
SILENT = Retriever(source="m")
USUAL = Encoding("mean", True, "{question}", "{title}: {text}")
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
MAX = {"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}
LAST = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True, "include_prompt": True}
E5: dict[str, Any] = {"prompts": {"query": "query: ", "document": "passage: "}}
DENSE = {"in_features": 32, "out_features": 6, "activation_function": "torch.nn.modules.activation.Tanh"}


def write(
    folder: Path, pooling: Any = MEAN, dense: Any = None, normalize: bool = True, prefix: str = OLD, **about: Any
) -> Path:
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules += [("Dense", "2_Dense")] * bool(dense) + [("Normalize", "9_Normalize")] * normalize
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if dense:
        (folder / "2_Dense").mkdir()
        (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    write_modules(folder, modules, prefix)
    if about:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(about))
    return folder


def write_modules(folder: Path, modules: list[tuple[str, str]], prefix: str = OLD) -> None:
    listed = [{"idx": i, "name": str(i), "path": path, "type": prefix + kind} for i, (kind, path) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))


def resolved(folder: Path, settings: Retriever = SILENT) -> Encoding:
    return resolve_encoding(settings, folder, folder)


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ({}, USUAL),
        ({"pooling": {"pooling_mode": "cls"}, "prefix": NEW}, USUAL._replace(pooling="cls")),
        ({"pooling": {"pooling_mode": ["mean"]}}, USUAL),
        ({"pooling": CLS}, USUAL._replace(pooling="cls")),
        ({"pooling": MAX}, USUAL._replace(pooling="max")),
        ({"pooling": LAST}, USUAL._replace(pooling="last")),
        ({"normalize": False}, USUAL),  # it does not say by what its embeddings are compared
        ({"normalize": False, "similarity_fn_name": "cosine"}, USUAL),
        ({"normalize": False, "similarity_fn_name": "dot"}, USUAL._replace(normalize=False)),
        ({"prompts": {"query": "", "document": ""}, "default_prompt_name": None}, USUAL),
        ({"prompts": {"clustering": "cluster: "}}, USUAL),
        (E5, Encoding("mean", True, "query: {question}", "passage: {title}: {text}")),
        ({"prompts": {"passage": "p: "}}, USUAL._replace(passage_template="p: {title}: {text}")),
        (
            {"prompts": {"x": "q: "}, "default_prompt_name": "x"},
            Encoding("mean", True, "q: {question}", "q: {title}: {text}"),
        ),
    ],
)
def test_a_folder_gives_the_defaults(
    tmp_path: Path, folder: dict[str, Any], expected: Encoding, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolved(write(tmp_path / "m", **folder)) == expected
    given = SILENT.replace(**expected._asdict())
    assert resolved(tmp_path / "m", given) == expected
    assert capsys.readouterr() == ("", ""), "nothing contradicts"


@pytest.mark.parametrize(
    ("folder", "settings", "told"),
    [
        ({"pooling": CLS}, {"pooling": "mean"}, "modules.json: says pooling 'cls'; retriever.pooling='mean' is what"),
        ({}, {"normalize": False}, "modules.json: says normalize True; retriever.normalize=False is what counts"),
        (E5, {"question_template": "{question}"}, "says prompt 'query: '; retriever.question_template='{question}' is"),
        (E5, {"passage_template": "{text}"}, "says prompt 'passage: '; retriever.passage_template='{text}' is what"),
    ],
)
def test_what_contradicts_is_told(
    tmp_path: Path, folder: dict[str, Any], settings: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = resolved(write(tmp_path / "m", **folder), SILENT.replace(**settings))
    assert settings.items() <= found._asdict().items()
    out = capsys.readouterr()
    assert told in out.out + out.err


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ({"pooling": {"pooling_mode": ["cls", "mean"]}}, "it pools by"),
        (
            {"pooling": {"pooling_mode_weightedmean_tokens": True}},
            r"by \['weightedmean'\]; supported are mean, cls",
        ),
        ({"pooling": MEAN | {"include_prompt": False}, **E5}, "include_prompt is false"),
        (
            {"dense": DENSE | {"activation_function": "torch.nn.Softmax"}},
            r"2_Dense/config\.json: activation_fun",
        ),
        ({"dense": DENSE | {"out_features": "6"}}, r"2_Dense/config\.json: out_features is '6'"),
        ({"dense": DENSE | {"module_input_name": "token_embeddings"}}, "module_input_name is 'token_embeddings'"),
        ({"prompts": ["query: "]}, "expected texts by name"),
        ({"normalize": False, "similarity_fn_name": "euclidean"}, "similarity_fn_name is 'euclidean', which inner"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, folder: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolved(write(tmp_path / "m", **folder))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["Transformer", "WordWeights"], r"modules\.json: a WordWeights module is not supported"),
        (["Transformer", "Pooling", "Normalize", "Dense"], "its modules are Transformer, .*; expected the order"),
        (["Transformer", "Pooling", "Pooling"], "expected the order Transformer, Pooling, Dense, Normalize"),
    ],
)
def test_modules_that_are_unknown_or_in_another_order(tmp_path: Path, modules: list[str], message: str) -> None:
    write_modules(write(tmp_path / "m"), [(kind, "") for kind in modules])
    with pytest.raises(InputError, match=message):
        resolved(tmp_path / "m")


@pytest.mark.parametrize("said", [None, {}, {"do_lower_case": False}, {"do_lower_case": True, "max_seq_length": 128}])
def test_texts_are_lowered_where_the_folder_says_so(world: Path, tmp_path: Path, said: dict[str, Any] | None) -> None:
    shutil.copytree(world / "retriever", tmp_path / "m")
    if said is not None:
        (tmp_path / "m" / "sentence_bert_config.json").write_text(json.dumps(said))
    rag = load_pipeline(tiny_config(world, retriever__source=str(tmp_path / "m")))
    batch = question_batch(rag.tokenizers, ["WHERE is É?"])
    [passage] = rag.tokenize_passages([Passage("1", "The TITLE", "A Text")])
    lowered = bool(said and said.get("do_lower_case"))
    asked, read = "where is é?" if lowered else "WHERE is É?", "the title: a text" if lowered else "The TITLE: A Text"
    plain = load_pipeline(tiny_config(world)).retriever_tokenizer
    assert [batch.question[batch.question_mask].tolist(), passage.tolist()] == plain.encode([asked, read], special=True)
    assert (rag.retriever_tokenizer.fingerprint == plain.fingerprint) is not lowered, "an index depends on it"
    rag.retriever_tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path, writes=False).encode([asked.upper()]) == rag.retriever_tokenizer.encode(
        [asked.upper()]
    )


def test_what_lowers_must_be_true_or_false(tmp_path: Path) -> None:
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": "yes"}')
    with pytest.raises(InputError, match=r"sentence_bert_config.json: do_lower_case is 'yes'; expected true or false"):
        reads_lower_case(tmp_path)


def test_two_encoders_that_differ(tmp_path: Path) -> None:
    """What passages are begun with is in their own encoder's folder; how both are pooled must be one."""
    questions, passages = write(tmp_path / "q", **E5), write(tmp_path / "p", CLS, **E5)
    with pytest.raises(InputError, match=r"differ: pooling is 'mean' in .*/q/.* and 'cls' in .*set retriever\.pooling"):
        resolve_encoding(SILENT, questions, passages)
    found = resolve_encoding(SILENT, questions, tmp_path)
    assert found == Encoding("mean", True, "query: {question}", "{title}: {text}")


def test_an_older_layout_has_its_encoder_in_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", CLS, dense=DENSE)
    modules = ("Transformer", "0_Transformer"), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")
    write_modules(folder, list(modules))
    for place in ("0_Transformer", "2_Dense"):
        (folder / place).mkdir(exist_ok=True)
        (folder / place / "model.safetensors").touch()
    (folder / "0_Transformer" / "config.json").touch()
    assert checkpoint_folder(folder) == folder / "0_Transformer"
    assert resolved(folder / "0_Transformer").pooling == "cls"
    assert read_sentence_modules(folder / "another") is None and read_sentence_modules(tmp_path / "plain") is None


# embeddings


def dense_encoder(folder: Path, pooling: dict[str, Any], **dense: Any) -> tuple[Small, dict[str, np.ndarray]]:
    """A folder with a Dense module, and the module's tensors."""
    small = random_bert(folder, "cls", False)
    rng, settings = np.random.default_rng(5), DENSE | dense
    tensors = {"linear.weight": rng.normal(size=(6, 32)).astype(np.float32) / 4}
    if settings.get("bias", True):
        tensors["linear.bias"] = rng.normal(size=6).astype(np.float32)
    write(folder / "other", pooling, settings)
    for part in (folder / "other").iterdir():
        part.rename(folder / part.name)
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    return small, tensors


@pytest.mark.parametrize(
    ("mode", "pooling", "dense"),
    [
        ("max", MAX, {}),
        ("last", LAST, {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}),
    ],
)
def test_pooling_and_dense_equal_numpy(
    mode: str, pooling: dict[str, Any], dense: dict[str, Any], tmp_path: Path
) -> None:
    small, tensors = dense_encoder(tmp_path / "m", pooling, **dense)
    encoding = resolved(checkpoint_folder(tmp_path / "m"))
    model = open_encoder(tmp_path / "m", encoding.pooling, encoding.normalize)
    rows = [[5, 6, 7, 8, 9], [10, 11]]
    tokens = jnp.array([row + [33] * (5 - len(row)) for row in rows])
    found = nnx.merge(model.graphdef, model.load_params())(tokens, jnp.array([[True] * 5, [True] * 2 + [False] * 3]))
    assert model.config.embedding_dim == 6 and [file.parent.name for file in model.files] == ["m", "2_Dense"]
    assert encoder_shape(tmp_path / "m" / "config.json", mode, True).config == model.config
    for row, embedding in zip(rows, found, strict=True):
        hidden = bert_hidden(small.tensors, small.hf_config, row)
        pooled = hidden.max(axis=0) if mode == "max" else hidden[-1]
        expected = tensors["linear.weight"] @ pooled + tensors.get("linear.bias", 0.0)
        expected = expected if dense else np.tanh(expected)
        np.testing.assert_allclose(embedding, expected / np.linalg.norm(expected), atol=1e-4)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    dense_encoder(tmp_path / "m", LAST)
    model = open_encoder(tmp_path / "m", "last", True)
    params, again = model.load_params(), tmp_path / "again"
    save_encoder(again, model.hf_config, params)
    encoding = Encoding("last", True, "query: {question}", "passage: {title}: {text}")
    write_sentence_modules(again, model.config, params, encoding.question_template, encoding.passage_template)
    assert resolved(again) == encoding
    reread = open_encoder(again, "last", True)
    assert reread.config == model.config
    chex.assert_trees_all_equal(reread.load_params(), params)


def test_a_dense_module_that_is_pickled_or_does_not_fit(tmp_path: Path) -> None:
    dense_encoder(tmp_path / "m", MEAN)
    save_file({"linear.weight": np.zeros((5, 32), np.float32)}, tmp_path / "m" / "2_Dense" / "model.safetensors")
    with pytest.raises(InputError, match=r"missing 2_Dense/linear\.bias; 2_Dense/linear\.weight has shape"):
        open_encoder(tmp_path / "m", "mean", True)
    (tmp_path / "m" / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"2_Dense: no \*\.safetensors here; pickled weights"):
        open_encoder(tmp_path / "m", "mean", True)


def test_a_prompt_reaches_the_encoder_alone(world: Path) -> None:
    plain = load_pipeline(tiny_config(world))
    prompted = load_pipeline(tiny_config(world, retriever__question_template="query: {question}"))
    before, after = (question_batch(rag.tokenizers, ["Where?"], ["There"]) for rag in (plain, prompted))
    spelt = after.question[after.question_mask].tolist()
    assert [spelt] == plain.retriever_tokenizer.encode(["query: Where?"], special=True)
    np.testing.assert_array_equal(before.generator_question, after.generator_question)
    np.testing.assert_array_equal(before.answer, after.answer)
    with pytest.raises(InputError, match="hf_compatible=true reads questions as they are"):
        tiny_config(world, hf_compatible=True, retriever__question_template="q: {question}")
