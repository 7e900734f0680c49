"""The plan against what tiny models and indices really take, and against what cannot be had."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trained import refused
from world import open_world, tiny_config

from ragjax import plan
from ragjax.cli import main
from ragjax.config import Config, InputError, load_config
from ragjax.decode import pad_answers, propose, propose_together, read, score_tokens
from ragjax.models.generator import Memory, empty_past
from ragjax.passages import STORE_FILES
from ragjax.plan import SPECIAL, Row, abstract_batch, memory_plan, print_plan, size_text, step_temporaries, totals
from ragjax.rag import open_rag, prompt_rows, train_batch
from ragjax.random_checkpoint import write_random_checkpoint
from ragjax.step import initial_state, make_train_step, split_frozen

CONFIGS = ("rag_sequence_nq", "rag_token_nq", "rag_sequence_t5")
TEMPORARIES = plan._temporaries
Capture = pytest.CaptureFixture[str]


def by_name(rows: list[Row]) -> dict[tuple[str, str, str], Row]:
    return {(row.command, row.what, row.place): row for row in rows}


def sizes(config: Config) -> dict[tuple[str, str, str], int | None]:
    return {name: row.size for name, row in by_name(memory_plan(config)).items()}


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
    """Compiling takes the most time: only the tests of temporaries do."""
    monkeypatch.setattr(plan, "_temporaries", lambda *_: 1)


@pytest.fixture
def compiled(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_temporaries", TEMPORARIES)


# what is really taken


def test_parameters_and_state_are_those_of_real_arrays(world: Path) -> None:
    config = tiny_config(world, train__freeze=["generator.embed", "retriever.words"], train__keep=4)
    rag, planned = open_rag(config), sizes(config)
    params = rag.initial_params()
    state = initial_state(rag, params)
    for model in ("retriever", "generator"):
        assert planned["train", f"{model} parameters", "device"] == in_bytes(params[model])
        assert planned["evaluate", f"{model} parameters", "device"] == 2 * in_bytes(params[model])
    assert planned["index", "passage encoder parameters", "device"] == in_bytes(params["retriever"])
    assert planned["train", "optimiser state", "device"] == in_bytes(state.optimizer)
    trained, _ = split_frozen(params, config.train.freeze)
    assert planned["train", "gradients", "device"] == in_bytes(trained)
    assert planned["train", "checkpoints", "disk"] == 5 * in_bytes(state)


def test_embeddings_and_passages_are_the_files(world: Path) -> None:
    planned, folder = by_name(memory_plan(tiny_config(world))), world / "index"
    embeddings = planned["index", "embeddings", "disk"]
    shard = folder / "shards" / "00000"
    assert embeddings.size == (shard / "embeddings.npy").stat().st_size - 128  # the header
    assert embeddings.how == "30 passages × 32 in float32; it is there already"
    assert planned["train", "embeddings, for the exact search", "device"].size == embeddings.size
    store = planned["index", "passages: text and tokens", "disk"]
    assert store.size == sum((shard / name).stat().st_size for name in STORE_FILES)
    assert not store.counted and not embeddings.counted


def test_temporaries_are_those_of_the_real_step(compiled: None, world: Path) -> None:
    config = tiny_config(world, retriever__question_tokens=24, generator__source_tokens=80, train__remat=False)
    rag, index, store = open_world(config)
    texts = [f"What is the capital of land {i}, and why?" for i in range(config.train.batch_size)]
    batch = train_batch(rag, index, store, texts, ["x"] * len(texts), np.zeros((len(texts), config.train.k), np.int32))
    batch = jax.tree.map(jnp.asarray, batch)
    abstract = abstract_batch(config, 32)
    chex.assert_trees_all_equal_shapes_and_dtypes(batch, abstract)
    state = initial_state(rag, rag.initial_params())
    analysis = make_train_step(rag).lower(state, batch, None).compile().memory_analysis()
    assert analysis is not None
    assert step_temporaries(rag, abstract) == analysis.temp_size_in_bytes > in_bytes(state.params)
    assert analysis.alias_size_in_bytes >= in_bytes(state) - 64  # the new state lies where the old one did


def test_the_step_is_planned_at_its_widest(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[Any, ...]] = []

    def compile_nothing(*arguments: Any) -> int:
        compiled.append(arguments)
        return len(compiled)

    monkeypatch.setattr(plan, "_temporaries", compile_nothing)
    config = tiny_config(world, retriever__prior="corpus")
    planned = sizes(config)["train", "temporaries of a step", "device"]
    assert planned is not None
    _, state, batch, corpus = compiled[planned - 1]
    chex.assert_trees_all_equal_shapes_and_dtypes(batch, abstract_batch(config, 32))
    assert state.step.shape == () and corpus == jax.ShapeDtypeStruct((30, 32), jnp.float32)


def test_the_documents_memory_is_that_of_real_prompts(world: Path) -> None:
    config = tiny_config(world, generator__source_tokens=80, evaluate__untrained_limit=0)
    rag, _, store = open_world(config)
    texts = [f"What is the capital of land {i}, and why?" for i in range(config.evaluate.batch_size)]
    rows = prompt_rows(rag, store, texts, np.zeros((len(texts), config.decode.k), np.int32))
    memory = read(rag.generator.graph, rag.generator.read(), *rows)
    past = empty_past(memory, config.decode.max_new_tokens * config.decode.beams)
    planned = sizes(config)
    assert planned["evaluate", "documents' keys and values", "device"] == in_bytes(memory) + in_bytes(past)
    assert planned["evaluate", "generator parameters", "device"] == in_bytes(rag.generator.read())


@pytest.mark.parametrize("model", ["rag_sequence", "rag_token"])
def test_temporaries_of_answering_are_compiled(
    compiled: None, world: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(plan, "step_temporaries", lambda *_: 1)
    config = tiny_config(world, model=model, evaluate__batch_size=1, decode__beams=1)
    rag, planned = open_rag(config), sizes(config)
    graph, params, settings = rag.generator.graph, rag.initial_params()["generator"], config.decode
    source = jnp.zeros((settings.k, 128), jnp.int32), jnp.ones((settings.k, 128), bool)
    memory, prior = read(graph, params, *source), jnp.zeros((1, settings.k))
    count = settings.beams if model == "rag_token" else settings.k
    answers, lengths = pad_answers(
        [[((0,) * settings.max_new_tokens, False)] * count], SPECIAL, settings.max_new_tokens
    )
    leaves = jax.tree.leaves(memory)

    @jax.jit
    def search(params: Any, prior: jax.Array, *leaves: jax.Array) -> Any:
        if model == "rag_token":
            return propose_together(graph, params, Memory(*leaves), prior, settings, SPECIAL)
        return propose(graph, params, Memory(*leaves), settings, SPECIAL)

    @jax.jit
    def score(params: Any, answers: Any, lengths: Any, *leaves: jax.Array) -> Any:
        return score_tokens(graph, params, Memory(*leaves), answers, lengths)

    most = max(
        TEMPORARIES(read, graph, params, *source),
        TEMPORARIES(search, params, prior, *leaves),
        TEMPORARIES(score, params, answers, lengths, *leaves),
    )
    assert planned["evaluate", "temporaries of answering", "device"] == pytest.approx(most, rel=0.02)
    assert planned["index", "temporaries of embedding", "device"]


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_every_family_and_a_folder_with_config_json_alone(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path / "cache"))
    config = tiny_config(world, generator__source=f"random:{family}", retriever__source=str(tmp_path / "bert"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_bytes((world / "retriever" / "config.json").read_bytes())
    assert all(row.size for row in memory_plan(config))


# how many passages there are


def test_passages_are_counted_by_the_index_the_limit_or_the_lines(world: Path, tmp_path: Path) -> None:
    def embeddings(**overrides: object) -> Row:
        config = tiny_config(world, **({"index__folder": str(tmp_path / "none")} | overrides))
        return by_name(memory_plan(config))["index", "embeddings", "disk"]

    by_index = embeddings(index__folder=str(world / "index"), corpus__limit=7)
    assert (by_index.size, by_index.how[:11]) == (30 * 128, "30 passages")
    assert embeddings(corpus__limit=7, index__dtype="float16").size == 7 * 64
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
    command = "plan", str(world / "config.yaml"), f"index.folder={tmp_path / 'index'}"
    assert "manifest.json: damaged" in refused(capsys, tmp_path, *command)


def test_a_faiss_structure_is_held_by_the_host(world: Path, tmp_path: Path) -> None:
    planned = sizes(tiny_config(world, index__kind="Flat", index__folder=str(tmp_path / "none")))
    for command, place in (("index", "disk"), ("index", "host"), ("train", "host"), ("evaluate", "host")):
        assert planned[command, "FAISS structure Flat", place] == 30 * 128
    rare = by_name(memory_plan(tiny_config(world, index__kind="IDMap,Flat")))[
        "train", "FAISS structure IDMap,Flat", "host"
    ]
    assert rare.size is None and "measured only when it is built" in rare.how


# what cannot be had, or cannot be


def test_an_unreachable_model_leaves_the_other_rows(no_hub: None, world: Path) -> None:
    rows = by_name(memory_plan(tiny_config(world, generator__source="hf:org/bart@main")))
    unknown = {name[1] for name, row in rows.items() if row.size is None}
    assert unknown == {
        "generator parameters",
        "optimiser state",
        "gradients",
        "temporaries of a step",
        "checkpoints",
        "documents' keys and values",
        "temporaries of answering",
    }
    why = rows["train", "generator parameters", "device"].how
    assert why == "unknown (hf:org/bart@main: cannot be downloaded)"
    assert rows["train", "optimiser state", "device"].how == "unknown (needs the generator)"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.freeze=[reader]", "no parameters under 'reader'"),
        ("index.kind=HNSW0x", "which FAISS does not accept"),
        ("generator.source_tokens=5000", "generator.source_tokens"),
        ("train.keeps=1", "unknown key 'train.keeps'"),
    ],
)
def test_settings_that_do_not_go_together(
    capsys: Capture, tmp_path: Path, world: Path, override: str, message: str
) -> None:
    assert message in refused(capsys, tmp_path, "plan", str(world / "config.yaml"), override)


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
    summed = {(t.command, t.place): t for t in totals(rows, {"disk": 99, "host": 50, "device": None})}
    assert {name: (t.size, t.complete, t.fits) for name, t in summed.items()} == {
        ("index", "host"): (10, True, True),
        ("train", "host"): (50, True, True),  # a CPU is the host
        ("all", "disk"): (100, False, False),
    }
    [unsure] = [t for t in totals(rows, {"disk": 101, "host": 1, "device": 1}) if t.place == "disk"]
    assert unsure.fits is None


def test_the_table_says_what_does_not_fit(capsys: Capture, world: Path) -> None:
    print_plan(memory_plan(tiny_config(world)), {"disk": 1, "host": 2**40, "device": None}, as_json=False)
    out = capsys.readouterr().out
    assert "this machine has 1,024.00 GiB: fits" in out and "DOES NOT FIT" in out
    assert [size_text(size) for size in (512, 3 * 2**20, 2**31)] == ["0.5 KiB", "3.00 MiB", "2.00 GiB"]


def test_json(capsys: Capture, world: Path) -> None:
    assert main(["plan", str(world / "config.yaml"), "--json", "train.k=2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["command"] for row in told["rows"]} == {"index", "train", "evaluate"}
    assert {(t["command"], t["place"]) for t in told["totals"]} == {
        *((command, "host") for command in ("index", "train", "evaluate")),
        ("all", "disk"),
    }
    assert all(t["fits"] is True for t in told["totals"])


# the configurations of the paper


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: the configurations' corpora and runs are relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=CONFIGS)
def paper(request: pytest.FixtureRequest) -> str:
    return str(Path(__file__).parents[1] / "configs" / f"{request.param}.yaml")


def test_the_papers_configurations_are_planned_without_a_network(
    capsys: Capture, no_hub: None, elsewhere: Path, paper: str
) -> None:
    assert load_config(paper).corpus.limit == 21_015_324
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
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    rows = by_name(memory_plan(tiny_config(world, retriever__source=str(tmp_path))))
    assert "model_type 'roberta' is not bert or dpr" in rows["train", "retriever parameters", "device"].how
    with pytest.raises(InputError, match="no such configuration"):
        load_config(tmp_path / "none.yaml")


def test_hugging_face_reads_more_documents_twice(compiled: None, world: Path, tmp_path: Path) -> None:
    write_random_checkpoint("bart", tmp_path / "bart")
    found = {}
    for hf_compatible in (False, True):
        config = tiny_config(
            world, generator__source=str(tmp_path / "bart"), hf_compatible=hf_compatible, decode__k=2, train__k=6
        )
        found[hf_compatible] = sizes(config)["evaluate", "documents' keys and values", "device"] or 0
    assert found[True] == pytest.approx(6 * found[False], rel=1e-3)
    with pytest.raises(InputError, match="hf_compatible=true needs BART or T5"):
        memory_plan(tiny_config(world, hf_compatible=True))
