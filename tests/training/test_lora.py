"""Adapters in training: their gradient, whatever the layout; what is saved of them, and what is given to others."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gradients import assert_same_gradients, moments
from trained import refused
from world import open_world, tiny_config

from ragjax.checkpoints.adapters import adapters_only, merged, peft_config, peft_tensors, with_adapters
from ragjax.checkpoints.hub import checkpoint_folder, fingerprint_files
from ragjax.checkpoints.pretrained import open_encoder, open_generator
from ragjax.checkpoints.safetensors import write_safetensors
from ragjax.checkpoints.sentence_transformers import resolve_encoding, write_sentence_modules
from ragjax.cli import main
from ragjax.commands.train import train
from ragjax.config import Config, Lora, Retriever
from ragjax.data.question_batch import question_batch
from ragjax.data.questions import read_questions
from ragjax.data.tokenizer import Tokenizer
from ragjax.errors import InputError
from ragjax.models.layers import Linear, Params, fold_rngs, is_adapter, row_rngs, scan_layers, stack
from ragjax.parallel.mesh import local_mesh, make_mesh
from ragjax.parallel.sharding import put_global, replicated, shard_batch
from ragjax.planning.program_cost import bytes_each
from ragjax.rag import RagPipeline, load_pipeline
from ragjax.retrieval.encoder import encode, passage_batch
from ragjax.retrieval.retrieve import search
from ragjax.runs.checkpointer import Checkpointer
from ragjax.runs.restore import restore_params, trained_index
from ragjax.training.batch import TrainBatch, attach_documents
from ragjax.training.fused_retrieval import corpus_with_tokens, retrieve_in_step
from ragjax.training.loss import rag_loss
from ragjax.training.state import abstract_state, init_train_state, state_shardings
from ragjax.training.step import gradients, make_train_step

KEY, SCALE, READER = jax.random.key(5), 2.0, Retriever(source="m")
LORA: dict[str, Any] = {
    "train__lora__rank": 3,
    "train__lora__alpha": 3 * SCALE,
    "train__lora__targets": ["generator", "retriever"],
    "train__max_grad_norm": 1e9,
}


@dataclass(frozen=True)
class Setup:
    """The tiny models with adapters that are not 0, the same without, and a batch."""

    rag: RagPipeline
    plain: RagPipeline
    params: Params
    batch: TrainBatch


def flat(params: Params) -> dict[tuple[str, ...], np.ndarray]:
    return nnx.traversals.flatten_mapping(jax.device_get(params))


def learnt(params: Params) -> Params:
    """With a B that is not 0."""
    rng, leaves = np.random.default_rng(0), flat(params)
    some = {p: rng.normal(scale=0.1, size=x.shape).astype(x.dtype) for p, x in leaves.items() if p[-1] == "lora_b"}
    return jax.tree.map(jnp.asarray, nnx.traversals.unflatten_mapping(leaves | some))


@pytest.fixture(scope="module")
def lora(world: Path) -> Setup:
    config = tiny_config(world, train__backprop_docs=2, **LORA)
    rag, index, store = open_world(config)
    chosen = read_questions(world / "train.jsonl")[:8]
    questions = question_batch(rag.tokenizers, [q.question for q in chosen], [q.answers[0] for q in chosen])
    ids = (7 * np.arange(24).reshape(8, 3) % 30).astype(np.int32)
    batch = jax.tree.map(jnp.asarray, attach_documents(rag, index, store, questions, ids))
    plain = load_pipeline(tiny_config(world, train__backprop_docs=2))
    return Setup(rag, plain, learnt(rag.initial_params()), batch)


@pytest.fixture(scope="module")
def whole_gradients(lora: Setup) -> tuple[Any, Any]:
    """By whole weights, at those that adapters stand for."""
    params = {name: merged(part, SCALE) for name, part in lora.params.items()}
    return jax.device_get(jax.jit(lambda p, b: gradients(lora.plain, p, b, KEY))(params, lora.batch))


@pytest.fixture(scope="module")
def expected(lora: Setup, whole_gradients: tuple[Any, Any]) -> dict[tuple[str, ...], np.ndarray]:
    """By the chain rule: with G that of W, s·G·Bᵀ is that of A, and s·Aᵀ·G that of B."""
    params, found = flat(lora.params), {}
    for path in params:
        whole = whole_gradients[0].get((*path[:-1], "kernel"))
        if path[-1] == "lora_a":
            found[path] = SCALE * whole @ params[*path[:-1], "lora_b"].swapaxes(1, 2)
        if path[-1] == "lora_b":
            found[path] = SCALE * params[*path[:-1], "lora_a"].swapaxes(1, 2) @ whole
    return found


def test_at_first_nothing_changes(lora: Setup) -> None:
    """To the bit, and with the dropout of the model itself, though the adapters have their own."""
    config = lora.plain.config
    few_maps = ("generator.query", "generator.down", "retriever.query")  # each one that drops out takes long to compile
    settings = lora.rag.config.train.lora.replace(dropout=0.5, targets=few_maps)
    dropping = config.replace(train=config.train.replace(dropout=0.2))
    adapted = load_pipeline(dropping.replace(train=dropping.train.replace(lora=settings)))
    params, few = lora.plain.initial_params(), adapted.initial_params()
    chex.assert_trees_all_equal(adapters_only(params["generator"]), params["generator"])
    assert all((leaf == 0).all() == (path[-1] == "lora_b") for path, leaf in flat(few).items() if is_adapter(path))
    losses = [
        jax.jit(lambda p, rag=rag: rag_loss(rag, p, lora.batch, KEY)[0])(p)
        for rag, p in ((load_pipeline(dropping), params), (adapted, few))
    ]
    assert losses[0] == losses[1]


def test_gradients_are_those_of_the_whole_weights(
    lora: Setup, whole_gradients: tuple[Any, Any], expected: dict[tuple[str, ...], np.ndarray]
) -> None:
    """And the loss is that of W + s·A·B; `train.backprop_docs` leaves one document of three out of both."""
    found, metrics = jax.device_get(jax.jit(lambda p, b: gradients(lora.rag, p, b, KEY))(lora.params, lora.batch))
    assert_same_gradients(found, expected, 1e-4)
    np.testing.assert_allclose(metrics["loss"], whole_gradients[1]["loss"], rtol=1e-5)
    assert metrics["posterior_skipped"] > 0


@pytest.mark.parametrize(
    ("model", "fsdp", "accumulation"), [pytest.param(1, True, 1, marks=pytest.mark.slow), (2, False, 2)]
)
def test_layouts(
    lora: Setup, expected: dict[tuple[str, ...], np.ndarray], model: int, fsdp: bool, accumulation: int
) -> None:
    """Eight devices: split over `data`; split over `model`, where they add the gradients of two parts once."""
    config = lora.rag.config
    settings = config.train.replace(gradient_accumulation=accumulation)
    rag = replace(lora.rag, config=config.replace(mesh=config.mesh.replace(model=model, fsdp=fsdp), train=settings))
    mesh = make_mesh(model)
    state = init_train_state(rag, jax.tree.map(jnp.array, lora.params))
    shardings = state_shardings(rag, mesh, state)
    batch = shard_batch(mesh, jax.device_get(lora.batch), 8)
    stepped, _ = make_train_step(rag, shardings)(put_global(state, shardings), batch)
    found = moments(stepped.optimizer)["mu"]
    assert_same_gradients({path: 10 * leaf for path, leaf in found.items()}, expected, 1e-4)
    before, after = flat(lora.params), flat(stepped.params)
    assert {path for path in before if not np.array_equal(before[path], after[path])} <= expected.keys()
    spec = shardings.params["generator"]["layers"]["down"]["lora_a"].spec
    assert tuple(spec) == ((None, "data", None) if fsdp else (None, "model", None))


def test_the_step_searches_with_adapters(world: Path) -> None:
    """The ids that a fused step finds are those of the host's search with the same question encoder."""
    rag, index, store = open_world(tiny_config(world, train__fused_retrieval=True, **LORA))
    params, mesh = learnt(rag.initial_params()), local_mesh(data=1)
    chosen = read_questions(world / "train.jsonl")[:8]
    texts, answers = [q.question for q in chosen], [q.answers[0] for q in chosen]
    _, _, found = search(rag, params, index, question_batch(rag.tokenizers, texts, answers), 3)
    asked = shard_batch(mesh, question_batch(rag.tokenizers, texts, answers, widest=True), 8)
    corpus = corpus_with_tokens(rag, index, store, mesh)
    _, ids = jax.jit(lambda p, a, c: retrieve_in_step(rag, p, a, c))(
        put_global(params, replicated(mesh)), asked, corpus
    )
    np.testing.assert_array_equal(ids, found)


def test_dropout_of_adapters_is_by_row_and_layer() -> None:
    """As if written out: each layer's own keys, folded with the map's place in it."""
    layers: Any = stack(lambda rngs: Linear(4, 4, rngs=rngs), 2, nnx.Rngs(0))
    rng = np.random.default_rng(1)
    layers.lora_a = nnx.Param(jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32))
    layers.lora_b = nnx.Param(jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32))
    layers.lora_scale, layers.lora_dropout = SCALE, 0.5
    rows, x = row_rngs(KEY, jnp.arange(6)), jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)

    def run(x: jax.Array, rngs: Any) -> jax.Array:
        return scan_layers(layers, lambda layer, x, _: (layer(x), None), x, adapter_rngs=rngs)[0]

    expected = x
    for number in range(2):
        keys = fold_rngs(fold_rngs(rows, number), 0)
        assert keys is not None
        keep = np.stack([np.asarray(jax.random.bernoulli(key, 0.5, (4,))) for key in keys])
        a, b, w = (np.asarray(part[...])[number] for part in (layers.lora_a, layers.lora_b, layers.kernel))
        expected = expected @ w + SCALE * ((np.where(keep, expected / 0.5, 0) @ a) @ b)
    np.testing.assert_allclose(run(x, rows), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(x[3:], rows[3:]), run(x, rows)[3:], rtol=1e-5)


# runs


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """A run whose encoder is shared, so that its index is encoded anew with adapters."""
    config = tiny_config(
        world,
        output=str(tmp_path_factory.mktemp("lora") / "run"),
        train__steps=4,
        train__save_every=2,
        train__keep_checkpoints=9,
        train__passage_encoder="shared",
        train__weight_decay=0.1,
        refresh__every=2,
        refresh__steps=2,
        **(LORA | {"train__max_grad_norm": 1.0}),
    )
    open_world(config)
    train(config)
    yield config


def saved(config: Config, step: int) -> Any:
    with Checkpointer(Path(config.output) / "checkpoints", writing=False) as checkpoints:
        rag = load_pipeline(config)
        state = abstract_state(rag, local_mesh(data=1))
        few = replace(
            state,
            params={name: adapters_only(part) for name, part in state.params.items()},
            indexed=adapters_only(state.indexed),
        )
        return jax.device_get(checkpoints.restore(step, few)), checkpoints.metadata(step)


def test_a_checkpoint_holds_adapters(trained: Config) -> None:
    """And their moments, and nothing of the weights beside them but their fingerprint."""
    rag = load_pipeline(trained)
    state, metadata = saved(trained, 4)
    assert metadata["base"] == {
        "retriever": fingerprint_files(rag.retriever.files),
        "generator": fingerprint_files(rag.generator.files),
    }
    adapters = set(flat(state.params))
    assert adapters and all(map(is_adapter, adapters)) and set(moments(state.optimizer)["mu"]) == adapters
    numbers = sum(leaf.size for leaf in flat(state.params).values())
    planned = abstract_state(rag, local_mesh(data=1))
    assert 0 <= bytes_each(planned.optimizer) - 8 * numbers <= 64  # two float32 moments, and the counts of steps
    restored = restore_params(rag)
    assert restored is not None
    found, base = flat(restored[0]), flat(rag.initial_params())
    chex.assert_trees_all_equal({path: found[path] for path in adapters}, flat(state.params))
    assert all(np.array_equal(found[path], base[path]) == (path not in adapters) for path in base)


def test_a_run_goes_on_to_the_bit(trained: Config, tmp_path: Path) -> None:
    again = trained.replace(output=str(tmp_path / "again"))
    shutil.copytree(trained.output, again.output)
    shutil.rmtree(Path(again.output) / "checkpoints" / "4")
    train(again)
    chex.assert_trees_all_equal(saved(again, 4)[0], saved(trained, 4)[0])


def test_the_index_follows_the_adapters(trained: Config) -> None:
    """At the end it holds the passages as W + s·A·B embeds them, which W alone does not."""
    rag, index, store = open_world(trained)
    restored = restore_params(rag)
    assert restored is not None
    tokens, mask = passage_batch(rag, store, np.arange(len(store)))
    plain = load_pipeline(trained.replace(train=trained.train.replace(lora=trained.train.lora.replace(rank=None))))
    whole = merged(restored[0]["retriever"], SCALE)
    expected = np.asarray(encode(plain.retriever.graphdef, whole, tokens, mask))
    found = np.asarray(trained_index(rag, index, restored[1]).embeddings[np.arange(len(store))])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - np.asarray(index.embeddings[np.arange(len(store))])).max() > 1e-3


def test_other_weights_are_refused(trained: Config, world: Path) -> None:
    rag = load_pipeline(trained)
    other = replace(rag, generator=replace(rag.generator, files=(world / "train.jsonl",)))
    with pytest.raises(InputError, match="trained beside other weights than those of the generator are now; bring"):
        restore_params(other)


def test_adapters_go_out_and_come_back(trained: Config, world: Path, tmp_path: Path) -> None:
    """As PEFT's folder, merged into its base, they are the model that `--merge` writes: W + s·A·B."""
    assert main(["export", trained.output, str(tmp_path / "peft")]) == 0
    assert main(["export", trained.output, str(tmp_path / "whole"), "--merge"]) == 0
    folder = tmp_path / "peft" / "generator"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {f.name for f in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    hf = json.loads((folder / "adapter_config.json").read_text())
    assert (hf["r"], hf["lora_alpha"], hf["task_type"]) == (3, 6.0, "CAUSAL_LM")
    assert hf["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert hf["base_model_name_or_path"] == str(world / "generator")
    assert main(["import", str(folder), str(tmp_path / "merged")]) == 0
    ours, theirs = (open_generator(path).load_params() for path in (tmp_path / "whole/generator", tmp_path / "merged"))
    chex.assert_trees_all_close(ours, theirs, rtol=0, atol=1e-6)
    restored = restore_params(load_pipeline(trained))
    assert restored is not None
    chex.assert_trees_all_close(ours, merged(restored[0]["generator"], SCALE), rtol=0, atol=1e-6)
    encoder = json.loads((tmp_path / "peft/question_encoder/adapter_config.json").read_text())
    assert encoder["task_type"] == "FEATURE_EXTRACTION"
    assert re.fullmatch(encoder["target_modules"], "encoder.layer.1.output.dense")
    assert not re.fullmatch(encoder["target_modules"], "pooler.dense")


def test_adapters_that_are_not_taken(
    trained: Config, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", trained.output, str(tmp_path / "peft")]) == 0
    folder, out = tmp_path / "peft" / "generator", str(tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (
        ({"use_dora": True}, "adapter_config.json: use_dora is true, which is not supported"),
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type is 'IA3'; expected one of LORA"),
        ({"r": "3"}, "adapter_config.json: r is '3'; expected a whole number"),
        ({"r": 4}, "of the base model, with r = 4 in adapter_config.json"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa", which is not supported; merge it with PEFT'),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is [1], which is not supported"),
        ({"base_model_name_or_path": "/no/model"}, "neither here nor ORG/NAME of the hub; name the model that they"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is ''"),
        ({"base_model_name_or_path": str(world / "retriever")}, "do not belong to the base model"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        assert message in refused(capsys, tmp_path, "import", str(folder), out)
    message = refused(capsys, tmp_path, "import", str(world / "generator"), out, "--base", "x")
    assert "--base is for PEFT's adapters" in message


@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_what_stands_beside_the_base_comes_along(world: Path, tmp_path: Path, place: str) -> None:
    """Chat template, tokenizer, and what follows an encoder of sentence-transformers, which then reads as before."""
    base, adapters, out = tmp_path / "base", tmp_path / "peft", tmp_path / "out"
    shutil.copytree(world / "retriever", base / place)
    (base / place / "chat_template.jinja").write_text("{{ messages }}")
    plain = open_encoder(base / place, "cls", False)
    write_sentence_modules(base / place, plain.config, {}, "ask: {question}", "{title}: {text}")
    if place:
        for name in ("modules.json", "1_Pooling", "config_sentence_transformers.json"):
            (base / place / name).rename(base / name)
        listed = (base / "modules.json").read_text().replace('"path": ""', f'"path": "{place}"')
        (base / "modules.json").write_text(listed)
    assert resolve_encoding(READER, base / place, base / place).pooling == "cls"
    lora = Lora(rank=2)
    model = with_adapters(plain, (), lora, 0)
    tensors = peft_tensors(model, model.load_params())
    adapters.mkdir()
    write_safetensors(adapters / "adapter_model.safetensors", tensors)
    (adapters / "adapter_config.json").write_text(json.dumps(peft_config(model, lora, str(base), tensors)))
    assert main(["import", str(adapters), str(out)]) == 0
    assert (out / "chat_template.jinja").is_file() and Tokenizer.load(out, writes=False).vocab_size
    assert resolve_encoding(READER, out, out) == resolve_encoding(READER, base / place, base / place)
    chex.assert_trees_all_equal(open_encoder(checkpoint_folder(out), "cls", False).load_params(), plain.load_params())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("[generator.quary]", "train.lora.targets: generator: no linear map is called quary; there are down, gate"),
        ("[reader]", "train.lora.targets names reader; this run trains retriever, generator"),
        ("[]", "train.lora.targets names nothing"),
    ],
)
def test_targets_that_are_not_there(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    settings = ["train.lora.rank=2", f"train.lora.targets={setting}", f"output={tmp_path}/run"]
    assert message in refused(capsys, tmp_path, "train", str(world / "config.yaml"), *settings)
