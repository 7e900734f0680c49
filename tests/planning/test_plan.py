"""The plan against what tiny models and indices really take, and against what cannot be had."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from trained import refused
from world import open_world, tiny_config

from ragjax.answerer import open_answerer
from ragjax.checkpoints.random_init import write_random_checkpoint
from ragjax.cli import main
from ragjax.commands.plan import print_plan
from ragjax.config import Config, dump_config, load_config
from ragjax.config import Mesh as MeshSettings
from ragjax.data.passage_store import STORE_FILES
from ragjax.data.question_batch import question_batch, tokenize_prompts
from ragjax.decoding.candidates import pad_answers
from ragjax.decoding.exact.decode import search_settings
from ragjax.decoding.marginal_search import search_marginal, search_rag_token
from ragjax.decoding.prefix_cache import empty_prefix_cache
from ragjax.decoding.propose import beam_search_documents, beam_settings, prefill_documents
from ragjax.decoding.rescore import score_tokens
from ragjax.errors import InputError
from ragjax.models.kv_cache import DocumentMemory
from ragjax.parallel.by_device import on_mesh
from ragjax.parallel.mesh import command_mesh, make_mesh
from ragjax.planning import evaluate_rows, index_rows, plan, train_rows
from ragjax.planning.evaluate_rows import answering_programs
from ragjax.planning.inputs import SPECIAL, PlanInputs, open_inputs
from ragjax.planning.plan import memory_plan
from ragjax.planning.program_cost import (
    Cost,
    bytes_each,
    bytes_sent,
    compiled_cost,
    flops_text,
    program_cost,
    program_temporaries,
)
from ragjax.planning.roofline import Chip, Machine, chip_of, least_seconds
from ragjax.planning.rows import Row, totals
from ragjax.planning.shared_rows import parameters_row
from ragjax.rag import load_pipeline
from ragjax.resources import size_text
from ragjax.retrieval.retrieve import RetrievalResult
from ragjax.training.optimizer import partition_params
from ragjax.training.state import abstract_state, init_train_state, state_shardings
from ragjax.training.step import trace_step

pytestmark = pytest.mark.devices(8)

CONFIGS = ("rag_sequence_nq", "rag_token_nq", "rag_sequence_t5")
RECOMPUTED, KEPT = "temporaries, activations recomputed", "temporaries, activations kept"
NETWORK, FLOPS = "over the network, a step", "floating-point operations, a step"
LOGITS = "logits of a step of the beam search"
Capture = pytest.CaptureFixture[str]


def by_name(rows: list[Row]) -> dict[tuple[str, str, str], Row]:
    return {(row.command, row.what, row.place): row for row in rows}


def rows_of(config: Config, mesh: Mesh | None = None) -> dict[tuple[str, str, str], Row]:
    return by_name(memory_plan(config, mesh).rows)


def sizes(config: Config, mesh: Mesh | None = None) -> dict[tuple[str, str, str], int]:
    return {name: int(row.size or 0) for name, row in rows_of(config, mesh).items()}


def in_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing and compiling take the most time: only the tests of temporaries do. A step is a product of matrices."""
    product = jax.jit(jnp.dot).trace(jnp.ones((8, 50)), jnp.ones((50, 100)))
    monkeypatch.setattr(train_rows, "trace_step", lambda *_: product)
    monkeypatch.setattr(train_rows, "compiled_cost", lambda *_: Cost(1, {"all-reduce": 2**21}))
    monkeypatch.setattr(index_rows, "program_temporaries", lambda *_: 1)
    monkeypatch.setattr(evaluate_rows, "program_cost", lambda *_: (1, Cost(1, {})))


@pytest.fixture
def compiled(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_rows, "trace_step", trace_step)
    monkeypatch.setattr(train_rows, "compiled_cost", compiled_cost)
    monkeypatch.setattr(index_rows, "program_temporaries", program_temporaries)
    monkeypatch.setattr(evaluate_rows, "program_cost", program_cost)


# what is really taken


def test_parameters_and_state_are_those_of_real_arrays(world: Path) -> None:
    config = tiny_config(world, train__frozen_params=["generator.embed", "retriever.words"], train__keep_checkpoints=4)
    rag, planned = load_pipeline(config), sizes(config)
    params = rag.initial_params()
    state = init_train_state(rag, params)
    for model in ("retriever", "generator"):
        assert planned["train", f"{model} parameters", "device"] == in_bytes(params[model])
        assert planned["evaluate", f"{model} parameters", "device"] == 2 * in_bytes(params[model])
    assert planned["index", "passage encoder parameters", "device"] == in_bytes(params["retriever"])
    assert planned["train", "optimiser state", "device"] == in_bytes(state.optimizer)
    trained, _ = partition_params(params, config.train.frozen_params)
    assert planned["train", "gradients", "device"] == in_bytes(trained)
    assert planned["train", "checkpoints", "disk"] == 5 * in_bytes(state)


def test_kernels_in_int8_are_counted(world: Path) -> None:
    """To train adapters beside them and to answer: a number each, and four for the scale of a channel."""
    lora = {"train__lora__rank": 3}
    plain, int8 = (rows_of(tiny_config(world, generator__quantization=kind, **lora)) for kind in (None, "int8"))
    params = load_pipeline(tiny_config(world)).generator.abstract_params
    kernels = [part["kernel"] for part in params["layers"].values() if "kernel" in part]
    saved = sum(3 * kernel.size - 4 * kernel.size // kernel.shape[1] for kernel in kernels)
    for command, copies in (("train", 1), ("evaluate", 2)):
        name = command, "generator parameters", "device"
        assert (plain[name].size or 0) - (int8[name].size or 0) == copies * saved
        assert f"{sum(kernel.size for kernel in kernels):,} in int8" in int8[name].how
    found = load_pipeline(tiny_config(world, generator__quantization="int8", **lora))
    assert int8["train", "generator parameters", "device"].size == in_bytes(found.generator.load_params())


def test_embeddings_and_passages_are_the_files(world: Path) -> None:
    planned, folder = rows_of(tiny_config(world)), world / "index"
    embeddings = planned["index", "embeddings", "disk"]
    shard = folder / "shards" / "00000"
    assert embeddings.size == (shard / "embeddings.npy").stat().st_size - 128  # the header
    assert embeddings.how == "30 passages × 32 in float32; it is there already"
    assert planned["train", "embeddings, for the search", "device"].size == embeddings.size
    store = planned["index", "passages: text and tokens", "disk"]
    assert store.size == sum((shard / name).stat().st_size for name in STORE_FILES)
    assert not store.counted and not embeddings.counted


def on_each_device(tree: Any) -> set[int]:
    """The bytes that arrays take, on each device."""
    held = dict.fromkeys(jax.devices(), 0)
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


@pytest.mark.parametrize("mesh", [MeshSettings(), MeshSettings(fsdp=True), MeshSettings(model=2, fsdp=True)])
def test_on_several_devices_each_has_its_part(world: Path, mesh: MeshSettings) -> None:
    """Of what `ragjax train`, `evaluate` and `answer` put on eight devices: an eighth of the corpus, and so on."""
    config = tiny_config(world, evaluate__batch_size=1, generator__max_prompt_tokens=80).replace(mesh=mesh)
    rag, devices = load_pipeline(config), command_mesh("train", mesh.model)
    state = init_train_state(rag, rag.initial_params())
    placed = jax.device_put(state, state_shardings(rag, devices, state))
    found = sizes(config, devices)
    for model in ("retriever", "generator"):
        assert {found["train", f"{model} parameters", "device"]} == on_each_device(placed.params[model])
    assert {found["train", "optimiser state", "device"]} == on_each_device(placed.optimizer)
    assert found["train", "checkpoints", "disk"] == 3 * in_bytes(state)  # whole
    assert found["index", "passage encoder parameters", "device"] == in_bytes(state.params["retriever"])
    assert found["train", NETWORK, "device"] == 2**21
    assert found["train", FLOPS, "devices"] == 2 * 8 * 50 * 100

    answerer = open_answerer(config, untrained=True)
    for model in ("retriever", "generator"):
        twice = 2 * int(*on_each_device(answerer.params[model]))  # before and after training
        assert found["evaluate", f"{model} parameters", "device"] == twice
    corpus = answerer.index.corpus(answerer.mesh).embeddings
    assert corpus.shape == (32, 32) and {4 * 32 * 4} == on_each_device(corpus)
    for command in ("train", "evaluate"):
        assert found[command, "embeddings, for the search", "device"] == 4 * 32 * 4
    count = answerer.mesh.shape["data"]
    batch = question_batch(rag.tokenizers, ["What is the capital of the land of lands, and why?"] * count)
    nothing = np.zeros((count, config.decode.num_docs), np.float32)
    with on_mesh(answerer.mesh):
        read, ids, _ = answerer.document_reader(
            batch, RetrievalResult(nothing, nothing.astype(np.int32), nothing, nothing)
        )
        memory = read(np.arange(ids.size))
        held = (
            memory,
            beam_search_documents(
                rag.generator.graphdef,
                answerer.params["generator"],
                memory,
                beam_settings(config.decode, SPECIAL, False),
                SPECIAL,
            )[1],
        )
    [taken] = on_each_device(held)
    assert memory.mask.shape[1] == 80
    assert found["evaluate", "documents' keys and values", "device"] == pytest.approx(taken, rel=0.01)
    # a device has 1 question, 3 documents and 2 beams over 259 tokens, whatever the axis `model`
    assert found["evaluate", LOGITS, "device"] == 3 * 2 * 259 * 4


def test_temporaries_of_answering_do_not_grow_with_the_devices(world: Path) -> None:
    """Each device answers as many questions as one alone would."""
    config, found = tiny_config(world, evaluate__batch_size=2), {}
    for devices in (1, 8):
        mesh = make_mesh(devices=jax.devices()[:devices])
        with on_mesh(mesh):
            programs = answering_programs(open_inputs(config, mesh), mesh)
            found[devices] = program_temporaries(*programs["candidates"])
    assert found[8] == pytest.approx(found[1], rel=0.02)


@pytest.mark.slow
def test_temporaries_and_network_are_those_of_the_compiled_step(
    compiled: None, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(world, mesh__fsdp=True, train__remat=False, train__num_docs=1)
    rag, mesh = load_pipeline(config), make_mesh(devices=jax.devices()[:2])
    monkeypatch.setattr(index_rows, "program_temporaries", lambda *_: 1)  # not the question here
    monkeypatch.setattr(evaluate_rows, "program_cost", lambda *_: (1, Cost(1, {})))
    found = sizes(config, mesh)
    for remat, row in ((False, KEPT), (True, f"{RECOMPUTED} (train.remat=true)")):
        told = replace(rag, config=config.replace(train=config.train.replace(remat=remat)))
        step = trace_step(told, mesh, 30).lower().compile()
        analysis = step.memory_analysis()
        assert analysis is not None
        assert found["train", row, "device"] == analysis.temp_size_in_bytes
        if not remat:
            assert found["train", NETWORK, "device"] == sum(bytes_sent(step.as_text() or "").values()) > 2**16


def test_one_cpu_reads_few_prompts_at_a_time(compiled: None, world: Path) -> None:
    """As answering does, and puts their memories together; accelerators, and several devices, read all at once."""
    lengths = {"generator__max_prompt_tokens": 80, "evaluate__batch_size": 5}
    config = tiny_config(world, **lengths)
    mesh, rows = make_mesh(devices=jax.devices()[:1]), 5 * config.decode.num_docs
    inputs, accelerator = open_inputs(config, mesh), open_inputs(config, mesh, stand_ins=True)
    programs, whole = (answering_programs(of, mesh) for of in (inputs, accelerator))
    assert [x.shape for x in programs["reading"][3:]] == [(5, 80)] * 2  # 15 prompts, and 512 tokens are room for 6
    assert [x.shape for x in whole["reading"][3:]] == [(rows, 80)] * 2 and "putting together" not in whole
    read, together = compiled_costs(inputs), compiled_costs(accelerator)
    assert read["reading"][0] == together["reading"][0]  # floating-point operations, of all prompts
    assert read["reading"][1].temporaries < 0.5 * together["reading"][1].temporaries
    memory = bytes_each(programs["scoring"][2])
    assert read["putting together"][1].temporaries >= memory, "what is put together lies beside it"
    assert read["scoring"] == together["scoring"]
    cached = open_inputs(config.replace(decode=config.decode.replace(passage_cache_gib=0.1)), mesh)
    several = open_inputs(config.replace(train=config.train.replace(batch_size=8)), make_mesh())
    for of in (cached, several):
        assert "putting together" not in answering_programs(of, of.mesh)


def compiled_costs(inputs: PlanInputs) -> dict[str, tuple[int, Cost]]:
    return evaluate_rows.answering_costs(inputs, with_step=False)


def test_cpus_that_stand_for_accelerators_hold_what_these_would(compiled: None, world: Path) -> None:
    """Parameters that are not trained in bfloat16, which CPUs widen: so much less is held, saved and read."""
    lengths = {"evaluate__batch_size": 1, "evaluate__max_untrained_questions": 0, "decode__num_beams": 1}
    config = tiny_config(world, dtype="bfloat16", train__frozen_params=["generator"], **lengths)
    mesh = make_mesh(devices=jax.devices()[:1])
    inputs, accelerator = open_inputs(config, mesh), open_inputs(config, mesh, stand_ins=True)
    model = inputs.model("generator")
    saved = bytes_each(model.abstract_params) - bytes_each(model.compute_params)
    assert saved > 0.4 * bytes_each(model.abstract_params)
    for command in ("train", "evaluate"):
        wide, narrow = (parameters_row(of, command, "generator").size or 0 for of in (inputs, accelerator))
        assert wide - narrow == saved
    wide, narrow = (train_rows._checkpoints(of)[0] for of in (inputs, accelerator))
    assert wide - narrow == (config.train.keep_checkpoints + 1) * saved

    cpu, other = map(compiled_costs, (inputs, accelerator))
    table = 0  # where there is a head, rows of the table alone are looked up
    if "head" in model.abstract_params:
        table = bytes_each(model.abstract_params["embed"]) - bytes_each(model.compute_params["embed"])
    assert cpu["candidates"][1].read - other["candidates"][1].read == saved - table
    assert cpu["candidates"][1].temporaries == other["candidates"][1].temporaries
    (_, wide_step), (_, narrow_step) = (train_rows.compile_step(of, config.train.remat) for of in (inputs, accelerator))
    assert wide_step.read - narrow_step.read == saved


def test_a_fused_step_is_planned_with_all_passages(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It searches inside the step: traced with none of them, there would be nothing to search."""
    monkeypatch.setattr(train_rows, "trace_step", trace_step)
    planned = sizes(tiny_config(world, train__fused_retrieval=True))
    assert planned["train", FLOPS, "devices"] > 2 * 8 * 30 * 32  # of the search alone: 8 questions, 30 passages


def test_the_documents_memory_is_that_of_real_prompts(world: Path) -> None:
    lengths = {"generator__max_prompt_tokens": 80, "evaluate__max_untrained_questions": 0}
    config = tiny_config(world, **lengths, decode__passage_cache_gib=0.5)
    rag, _, store = open_world(config)
    texts = [f"What is the capital of land {i}, and why?" for i in range(config.evaluate.batch_size)]
    questions = question_batch(rag.tokenizers, texts)
    rows = tokenize_prompts(rag.tokenizers, store, questions, np.zeros((len(texts), config.decode.num_docs), np.int32))
    memory = prefill_documents(rag.generator.graphdef, rag.generator.load_params(), *rows)
    slots = config.decode.max_new_tokens * config.decode.num_beams
    generator = nnx.merge(rag.generator.graphdef, rag.generator.load_params())
    prefixes = empty_prefix_cache(generator, memory, slots)
    planned = sizes(config)
    assert planned["evaluate", "documents' keys and values", "device"] == in_bytes(memory) + in_bytes(prefixes)
    assert planned["evaluate", "passages' keys and values", "device"] == 2**29
    # searched alone: so many documents together as questions, and a round of all documents is whole
    only = config.replace(evaluate=config.evaluate.replace(modes=("exact",)))
    only = only.replace(decode=config.decode.replace(fallback="none", max_beams=5))
    together = -(-len(texts) // config.decode.num_docs) * config.decode.num_docs
    prefixes = empty_prefix_cache(generator, memory.take(jnp.arange(together)), config.decode.max_new_tokens * 5)
    exactly = sizes(only)
    assert exactly["evaluate", "documents' keys and values", "device"] == in_bytes(memory) + in_bytes(prefixes)
    assert planned["evaluate", "generator parameters", "device"] == in_bytes(rag.generator.load_params())


@pytest.mark.parametrize("model", ["rag_sequence", "rag_token"])
def test_temporaries_of_answering_are_compiled(
    compiled: None, world: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(train_rows, "trace_step", lambda *_: jax.jit(jnp.sin).trace(1.0))  # not the question here
    config = tiny_config(world, model=model, evaluate__batch_size=1, decode__num_beams=1)
    rag, planned = load_pipeline(config), sizes(config)
    graph, params, settings = rag.generator.graphdef, rag.initial_params()["generator"], config.decode
    source = jnp.zeros((settings.num_docs, 128), jnp.int32), jnp.ones((settings.num_docs, 128), bool)
    memory, prior = prefill_documents(graph, params, *source), jnp.zeros((1, settings.num_docs))
    count = settings.num_beams if model == "rag_token" else settings.num_docs
    answers, lengths = pad_answers(
        [[((0,) * settings.max_new_tokens, False)] * count], SPECIAL, settings.max_new_tokens
    )
    leaves = jax.tree.leaves(memory)

    @jax.jit
    def search(params: Any, prior: jax.Array, *leaves: jax.Array) -> Any:
        if model == "rag_token":
            return search_rag_token(
                graph, params, DocumentMemory(*leaves), prior, beam_settings(settings, SPECIAL, False), SPECIAL
            )
        return beam_search_documents(
            graph, params, DocumentMemory(*leaves), beam_settings(settings, SPECIAL, False), SPECIAL
        )

    @jax.jit
    def score(params: Any, answers: Any, lengths: Any, *leaves: jax.Array) -> Any:
        return score_tokens(graph, params, DocumentMemory(*leaves), answers, lengths, SPECIAL)

    most = max(
        compiled_cost(prefill_documents.lower(graph, params, *source)).temporaries,
        compiled_cost(search.lower(params, prior, *leaves)).temporaries,
        compiled_cost(score.lower(params, answers, lengths, *leaves)).temporaries,
    )
    assert planned["evaluate", "temporaries of answering", "device"] == pytest.approx(most, rel=0.02)
    assert planned["index", "temporaries of embedding", "device"]


def test_temporaries_of_exact_decoding_are_compiled(
    compiled: None, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so many beams that the search on the marginal takes the most."""
    monkeypatch.setattr(train_rows, "trace_step", lambda *_: jax.jit(jnp.sin).trace(1.0))  # not the question here
    config = tiny_config(world, evaluate__batch_size=1, evaluate__modes=["exact"])
    config = config.replace(decode=config.decode.replace(fallback="none", max_beams=64))
    rag, planned, decode = load_pipeline(config), sizes(config), config.decode
    graph, params, k = rag.generator.graphdef, rag.initial_params()["generator"], decode.num_docs
    memory = prefill_documents(graph, params, jnp.zeros((k, 128), jnp.int32), jnp.ones((k, 128), bool))
    nothing, how = jnp.zeros(1), search_settings(decode, SPECIAL, 64)

    @jax.jit
    def search(params: Any, prior: jax.Array, nothing: jax.Array, *leaves: jax.Array) -> Any:
        rows, memory = jnp.arange(k)[None], DocumentMemory(*leaves)
        return search_marginal(graph, params, memory, rows, prior, nothing, nothing, how, SPECIAL, False)

    cost = compiled_cost(search.lower(params, jnp.zeros((1, k)), nothing, *jax.tree.leaves(memory)))
    assert planned["evaluate", "temporaries of answering", "device"] == pytest.approx(cost.temporaries, rel=0.02)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_every_family_and_a_folder_with_config_json_alone(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path / "cache"))
    config = tiny_config(world, generator__source=f"random:{family}", retriever__source=str(tmp_path / "bert"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_bytes((world / "retriever" / "config.json").read_bytes())
    assert all(row.size for row in memory_plan(config).rows)


# how many passages there are


def test_passages_are_counted_by_the_index_the_limit_or_the_lines(world: Path, tmp_path: Path) -> None:
    def embeddings(**overrides: object) -> Row:
        config = tiny_config(world, **({"index__path": str(tmp_path / "none")} | overrides))
        return rows_of(config)["index", "embeddings", "disk"]

    by_index = embeddings(index__path=str(world / "index"), corpus__max_passages=7)
    assert (by_index.size, by_index.how[:11]) == (30 * 128, "30 passages")
    assert embeddings(corpus__max_passages=7, index__dtype="float16").size == 7 * 64
    by_lines = embeddings()
    assert (by_lines.size, by_lines.how) == (30 * 128, "at most 30 passages × 32 in float32")
    assert by_lines.counted
    tsv = tmp_path / "psgs.tsv.gz"
    tsv.write_bytes(gzip.compress(b"id\ttext\ttitle\n1\ta b\tA\n2\tc d\tB\n"))
    assert embeddings(corpus__source=str(tsv), corpus__format="dpr").size == 2 * 128
    absent = embeddings(corpus__source=str(tmp_path / "none.jsonl"))
    assert absent.size is None and "none.jsonl to count" in absent.how
    assert "counted when it is read" in embeddings(corpus__source="hf:org/wiki").how


def test_a_damaged_index_is_not_counted(capsys: Capture, tmp_path: Path, world: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "manifest.json").write_text("{}")
    command = "plan", str(world / "config.yaml"), f"index.path={tmp_path / 'index'}"
    assert "manifest.json: damaged" in refused(capsys, tmp_path, *command)


def test_a_faiss_structure_is_held_by_the_host(world: Path, tmp_path: Path) -> None:
    planned = sizes(tiny_config(world, index__kind="Flat", index__path=str(tmp_path / "none")))
    for command, place in (("index", "disk"), ("index", "host"), ("train", "host"), ("evaluate", "host")):
        assert planned[command, "FAISS structure Flat", place] == 30 * 128
    rare = rows_of(tiny_config(world, index__kind="NSG16,Flat"))["train", "FAISS structure NSG16,Flat", "host"]
    assert rare.size is None and "measured only when it is built" in rare.how


def test_words_for_bm25_are_counted_where_they_are_built(world: Path, tmp_path: Path) -> None:
    config = tiny_config(world, retriever__bm25_docs=2, index__path=str(tmp_path))
    row = rows_of(config)["index", "words for BM25", "disk"]
    assert row.size is None and row.counted
    (tmp_path / "bm25").mkdir()
    (tmp_path / "bm25" / "data.csc.index.npy").write_bytes(bytes(100))
    row = rows_of(config)["index", "words for BM25", "disk"]
    assert row.size == 100 and not row.counted
    assert ("index", "words for BM25", "disk") not in rows_of(tiny_config(world))


# what cannot be had, or cannot be


def test_an_unreachable_model_leaves_the_other_rows(no_hub: None, world: Path) -> None:
    rows = rows_of(tiny_config(world, generator__source="hf:org/bart@main"))
    unknown = {name[1] for name, row in rows.items() if row.size is None}
    assert unknown == {
        "generator parameters",
        "optimiser state",
        "gradients",
        RECOMPUTED,
        f"{KEPT} (train.remat=false)",
        FLOPS,
        "checkpoints",
        "documents' keys and values",
        LOGITS,
        "temporaries of answering",
    }
    why = rows["train", "generator parameters", "device"].how
    assert why == "unknown (hf:org/bart@main: cannot be downloaded)"
    assert rows["train", "optimiser state", "device"].how == "unknown (needs the generator)"


def test_an_unreachable_passage_encoder_leaves_the_other_rows(no_hub: None, world: Path) -> None:
    rows = rows_of(tiny_config(world, retriever__passage_encoder="hf:org/dpr@main"))
    assert rows["train", "optimiser state", "device"].how == "unknown (needs the passage encoder)"
    assert rows["evaluate", "generator parameters", "device"].size


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.frozen_params=[reader]", "no parameters under 'reader'"),
        ("index.kind=HNSW0x", "which FAISS does not accept"),
        ("generator.max_prompt_tokens=5000", "generator.max_prompt_tokens"),
        ("train.keeps=1", "unknown key 'train.keeps'"),
    ],
)
def test_settings_that_do_not_go_together(
    capsys: Capture, tmp_path: Path, world: Path, override: str, message: str
) -> None:
    assert message in refused(capsys, tmp_path, "plan", str(world / "config.yaml"), override)


# which devices


def test_devices_and_memory_are_given(capsys: Capture, world: Path) -> None:
    command = "plan", str(world / "config.yaml"), "--json", "--devices", "4", "--memory", "0.25", "--peak", "0.5"
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {(row["command"], row["what"]): row for row in told["rows"]}
    flops, seconds = rows["train", FLOPS], rows["train", "time of a step, at least"]
    assert (flops["unit"], seconds["unit"]) == ("FLOP", "seconds")
    assert seconds["size"] == flops["size"] / (4 * 0.5e12)
    assert {t["has"] for t in told["totals"] if t["place"] == "device"} == {2**28}
    assert "2 questions, 3 documents" in rows["train", RECOMPUTED]["how"]


def test_devices_of_a_given_memory_are_accelerators(
    capsys: Capture, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They, and those of a sweep, hold weights in bfloat16, where this machine's CPU would have them in float32."""
    monkeypatch.setattr(plan, "MACHINES", (Machine(Chip("small", 1, 1, 1), 1),))
    command = "plan", str(world / "config.yaml"), "dtype=bfloat16", "--json"
    told = []
    for options in ((), ("--memory", "1"), ("--sweep",)):
        assert main([*command, *options]) == 0
        told.append(json.loads(capsys.readouterr().out))
    cpu, given = ({(row["command"], row["what"]): row for row in of["rows"]} for of in told[:2])
    for model in ("retriever parameters", "generator parameters"):
        assert given["evaluate", model]["size"] < 0.6 * cpu["evaluate", model]["size"]
        assert " in bfloat16" in given["evaluate", model]["how"]
        assert given["train", model]["size"] == cpu["train", model]["size"], "what is trained"
    [evaluate] = [total for total in told[1]["totals"] if total["command"] == "evaluate" and total["place"] == "device"]
    assert told[2][0]["needs"]["evaluate"]["size"] == evaluate["size"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "3"], "8 questions cannot be split over 3 devices"),
        (["--devices", "8", "mesh.model=3"], "mesh.model=3 does not divide the 8 devices; choose one of 1, 2, 4, 8"),
        (["--devices", "9"], "--devices 9: this machine can play 8 devices"),
    ],
)
def test_devices_that_cannot_be(capsys: Capture, tmp_path: Path, world: Path, options: list[str], message: str) -> None:
    assert message in refused(capsys, tmp_path, "plan", str(world / "config.yaml"), *options)


def test_numbers_above_zero(capsys: Capture, world: Path) -> None:
    for option, kind in (("--devices", "int"), ("--memory", "float"), ("--peak", "float")):
        with pytest.raises(SystemExit, match="2"):
            main(["plan", str(world / "config.yaml"), option, "0"])
        assert f"argument {option}: invalid {kind} above 0 value: '0'" in capsys.readouterr().err


def test_a_cpu_plays_any_number_of_devices(world: Path, tmp_path: Path) -> None:
    """In a process of its own, as the command line does: JAX must not have started."""
    (tmp_path / "config.json").write_text('{"model_type": "electra"}')  # unknown, so nothing is compiled
    config = tiny_config(world, retriever__source=str(tmp_path), generator__source=str(tmp_path), train__batch_size=48)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    command = [sys.executable, "-m", "ragjax", "plan", str(tmp_path / "config.yaml"), "--devices", "48"]
    ended = subprocess.run([*command, "mesh.model=5"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "mesh.model=5 does not divide the 48 devices" in ended.stderr
    ended = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert {t["has"] for t in json.loads(ended.stdout)["totals"] if t["place"] == "device"} == {None}


def test_a_topology_needs_the_compiler(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: Path
) -> None:
    def absent(*_: object, **__: object) -> None:
        raise RuntimeError("JAX TPU support not installed\nmore")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", absent)
    for variable in plan.NO_TPU:
        monkeypatch.setenv(variable, "")  # restores them afterwards
    command = "plan", str(world / "config.yaml"), "--topology", "v5e:2x4"
    for there, message in ((None, "needs an extra: pip install 'ragjax[tpu]'"), (1, "JAX TPU support not installed; ")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, there=there: there)
        assert f"--topology v5e:2x4{': ' if there else ' '}{message}" in refused(capsys, tmp_path, *command)


# what is printed


def test_totals_and_what_fits() -> None:
    rows = [
        Row("index", "embeddings", "disk", 100, ""),
        Row("index", "tokens", "host", 10, ""),
        Row("train", "parameters", "device", 30, ""),
        Row("train", "gradients", "device", 25, "", counted=False),
        Row("train", "structure", "host", 20, ""),
        Row("train", "checkpoints", "disk", None, "unknown"),
    ]
    summed = {(t.command, t.place): t for t in totals(rows, {"disk": 99, "host": 50})}
    assert {name: (t.size, t.complete, t.fits) for name, t in summed.items()} == {
        ("index", "host"): (10, True, True),
        ("train", "host"): (50, True, True),  # a CPU is the host
        ("all", "disk"): (100, False, False),
    }
    summed = {(t.command, t.place): t for t in totals(rows, {"disk": 101, "host": 19, "device": 29})}
    assert {name: (t.size, t.fits) for name, t in summed.items()} == {
        ("index", "host"): (10, True),
        ("train", "device"): (30, False),
        ("train", "host"): (20, False),
        ("all", "disk"): (100, None),
    }


def test_the_table_says_what_does_not_fit_and_what_would_help(capsys: Capture, world: Path) -> None:
    config = tiny_config(world, train__gradient_accumulation=2, evaluate__batch_size=16)
    told = memory_plan(config, make_mesh(1, jax.devices()[:2]), Chip("", 1.0, 1.0))
    print_plan(told, {"disk": 1, "host": 2**40, "device": 1000}, as_json=False)
    out = capsys.readouterr().out
    assert "this machine has 1,024.00 GiB: fits" in out and "each has 1.0 KiB: DOES NOT FIT" in out
    advice = out[out.index("what would help to train") :]
    state = abstract_state(load_pipeline(config), make_mesh(1, jax.devices()[:2]))
    split = abstract_state(load_pipeline(config.replace(mesh=MeshSettings(fsdp=True))), make_mesh(1, jax.devices()[:2]))
    saved = f"{size_text(bytes_each(split))} instead of {size_text(bytes_each(state))}"
    for setting in (
        "index.kind=HNSW32",
        f"mesh.fsdp=true (parameters and optimiser state {saved})",
        "mesh.model=2 (parameters and optimiser state ",
        "train.frozen_params=[retriever] (parameters and optimiser state ",
        "dtype=bfloat16",
        "train.gradient_accumulation=4;",
        "generator.quantization=int8 with train.lora.rank=16;",
    ):
        assert setting in advice
    assert "train.remat" not in advice
    assert "what would help to evaluate: " in advice and "evaluate.batch_size=1;" in advice
    for setting in ("mesh.model=2", "generator.quantization=int8;"):
        assert setting in advice[advice.index("to evaluate") :]
    with_fsdp = memory_plan(config.replace(mesh=MeshSettings(fsdp=True)), make_mesh(1, jax.devices()[:2]))
    instead = " (mesh.fsdp splits parameters in training only)"
    assert instead not in advice and f"mesh.model=2{instead}" in with_fsdp.advice["evaluate", "device"]
    print_plan(told, {"disk": 1, "host": 2**40, "device": 2**40}, as_json=False)
    assert "what would help" not in capsys.readouterr().out
    assert [size_text(size) for size in (512, 3 * 2**20, 2**31)] == ["0.5 KiB", "3.00 MiB", "2.00 GiB"]
    assert [flops_text(n) for n in (5e5, 2e9, 3.5e12, 1.25e15)] == [
        "0.5 MFLOP",
        "2.00 GFLOP",
        "3.50 TFLOP",
        "1.25 PFLOP",
    ]


def test_json(capsys: Capture, world: Path) -> None:
    assert main(["plan", str(world / "config.yaml"), "--json", "train.num_docs=2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["command"] for row in told["rows"]} == {"index", "train", "evaluate"}
    assert {(t["command"], t["place"]) for t in told["totals"]} == {
        *((command, "host") for command in ("index", "train", "evaluate")),
        ("all", "disk"),
    }
    assert all(t["fits"] is True for t in told["totals"]) and told["advice"] == {}


def test_a_sweep_tells_which_machines_fit(
    capsys: Capture, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small chips of our own, one of which is too small, one together too many for the batch, and one not to be had."""
    small = Chip("small", 1, 0.5, 2**-14, 1, 1)
    large = replace(small, name="large", memory=1)
    machines = (Machine(small, 1), Machine(large, 2), Machine(large, 3), Machine(large, 16))
    monkeypatch.setattr(plan, "MACHINES", machines)
    monkeypatch.setattr(evaluate_rows, "program_cost", lambda *_: (10**9, Cost(1, {}, 10**6, 10**6)))
    config = str(world / "config.yaml")
    assert main(["plan", config, "--sweep", "--json"]) == 0
    alone, two, three, sixteen = json.loads(capsys.readouterr().out)
    assert alone["fits"] == {"train": False, "evaluate": False} and two["fits"] == {"train": True, "evaluate": True}
    assert (alone["questions"], two["questions"]) == (2, 4)
    seconds, how = two["seconds"]["train"]
    assert seconds == 2**21 / 1e9 and how.startswith("network binds"), "what the step sends, at 1 GB/s"
    seconds, how = two["seconds"]["evaluate"]
    # by memory: embeddings; reading, which looks up rows of its table alone; and 6 steps
    steps, reading, retrieval = 6 * 2 * 10**6 / 1e9, (2 * 10**6 - 259 * 32 * 4) / 1e9, 15 * 32 * 4 / 1e9
    assert seconds == pytest.approx(steps + reading + retrieval, rel=1e-6)
    assert "search 0.012 s (memory)" in how and "scoring up to 0.002 s more" in how
    assert "8 questions cannot be split over 3 devices" in three["problem"]
    assert "this machine can play 8 devices" in sixteen["problem"]
    assert main(["plan", config, "--sweep"]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "1 × small" in table and "DOES NOT FIT" in table and "3 × large: 8 questions cannot be split" in table


def test_the_least_time_is_the_longest_of_three() -> None:
    chip = Chip("", peak=2, peak_float32=1, bandwidth=4, network=8)
    assert least_seconds(chip, "bfloat16", 4e12, Cost(0, {}, 10**9, 10**9)) == (2, "arithmetic")
    assert least_seconds(chip, "float32", 4e12, Cost(0, {}, 10**9, 10**9)) == (4, "arithmetic")
    assert least_seconds(chip, "float32", 4e9, Cost(0, {}, 10**9, 10**9), runs=3) == (1.5, "memory")
    sent = {"all-reduce": 10**10, "all-gather": 6 * 10**9}
    assert least_seconds(chip, "float32", 4e9, Cost(0, sent, 10**9)) == (2, "network")
    alone = Chip("", 1, 1)
    assert least_seconds(alone, "float32", 2e12, Cost(0, sent, 10**13)) == (2, "arithmetic")
    kinds = ("TPU v5 lite", "NVIDIA H200", "cpu")
    found = [chip_of(kind) for kind in kinds]
    assert [None if chip is None else chip.name for chip in found] == ["TPU v5e", "H200", None]


# the configurations of the paper


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: the configurations' corpora and runs are relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=CONFIGS)
def paper(request: pytest.FixtureRequest) -> str:
    return str(Path(__file__).parents[2] / "configs" / f"{request.param}.yaml")


def test_the_papers_configurations_are_planned_without_a_network(
    capsys: Capture, no_hub: None, elsewhere: Path, paper: str
) -> None:
    assert load_config(paper).corpus.max_passages == 21_015_324
    assert main(["plan", paper]) == 0
    out = capsys.readouterr().out
    assert "cannot be downloaded" in out and "at most 21,015,324 passages" in out
    assert list(elsewhere.iterdir()) == []


def test_the_papers_configurations_say_what_is_missing(
    capsys: Capture, no_hub: None, elsewhere: Path, paper: str
) -> None:
    message = refused(capsys, elsewhere, "index", paper)
    assert "psgs_w100.tsv.gz: no such file" in message and "https://dl.fbaipublicfiles.com/dpr/" in message
    for command in (("train", paper), ("evaluate", paper), ("answer", paper, "why?")):
        assert "the index does not exist; run: ragjax index CONFIG" in refused(capsys, elsewhere, *command)
    assert list(elsewhere.iterdir()) == []


def test_questions_are_looked_for_before_models(capsys: Capture, no_hub: None, tmp_path: Path, world: Path) -> None:
    config = str(world / "config.yaml"), "retriever.source=hf:org/bert", f"output={tmp_path / 'run'}"
    for command, split in (("train", "train"), ("evaluate", "test")):
        message = refused(capsys, tmp_path, command, *config, f"questions.{split}={tmp_path / 'none.jsonl'}")
        assert "none.jsonl: no such file of questions; expected JSON lines" in message


def test_a_model_of_another_family_is_unknown(world: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "electra"}')
    rows = rows_of(tiny_config(world, retriever__source=str(tmp_path)))
    assert "model_type is 'electra'" in rows["train", "retriever parameters", "device"].how
    with pytest.raises(InputError, match="no such configuration"):
        load_config(tmp_path / "none.yaml")


def test_hugging_face_reads_more_documents_twice(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_rows, "program_cost", program_cost)
    write_random_checkpoint("bart", tmp_path / "bart")
    found = {}
    for hf_compatible in (False, True):
        config = tiny_config(
            world,
            generator__source=str(tmp_path / "bart"),
            hf_compatible=hf_compatible,
            decode__num_docs=2,
            train__num_docs=6,
        )
        found[hf_compatible] = sizes(config)["evaluate", "documents' keys and values", "device"] or 0
    # three times as many documents, each with two memories, of which one has a cache
    assert 5 * found[False] < found[True] < 6 * found[False]
    with pytest.raises(InputError, match="hf_compatible=true needs BART or T5"):
        memory_plan(tiny_config(world, hf_compatible=True))
