"""BART and T5 against Hugging Face's golden values; memory, pool, groups, padding, dropout, and their name tables."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
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

from ragjax.checkpoints.pretrained import PretrainedModel, open_generator, save_generator
from ragjax.checkpoints.random_init import write_random_checkpoint
from ragjax.cli import main
from ragjax.data.questions import read_questions
from ragjax.decoding.prefix_cache import beam_step, empty_prefix_cache
from ragjax.errors import InputError
from ragjax.files import read_json, write_jsonl
from ragjax.marginal import log_prior, marginal_logp
from ragjax.models.attention import distance_bucket
from ragjax.models.generator import Generator, score
from ragjax.models.generators.bart import BartConfig
from ragjax.models.generators.t5 import T5Config
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import row_rngs

Capture = pytest.CaptureFixture[str]
GOLDEN = Path(__file__).parents[1] / "golden"
PREFIX = "rag.generator."
SLOW = pytest.mark.slow
LABELS = ("labels", "labels_nobos", "labels_nostart", "labels_short")
LONGEST = 9  # of these: so wide are all padded, that they are one program


@dataclass(frozen=True)
class Golden:
    """A generator cut out of a Hugging Face RAG checkpoint, and what Hugging Face computes with it."""

    folder: Path
    pretrained: PretrainedModel
    params: Any
    values: dict[str, np.ndarray]
    pad: int

    @property
    def model(self) -> Any:
        return nnx.merge(self.pretrained.graphdef, self.params)

    @property
    def memory(self) -> DocumentMemory:
        return _read(self.pretrained.graphdef, self.params, *self.source)

    @property
    def source(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [12,24] of four questions' three documents, and their mask."""
        return self.values["in/context_input_ids"].astype(np.int32), self.values["in/context_attention_mask"] == 1

    @property
    def prior(self) -> jax.Array:
        scores = jnp.asarray(self.values["score/labels/doc_scores"])
        return log_prior(scores, jnp.asarray(np.ones(scores.shape, bool)))


@partial(jax.jit, static_argnums=0)
def _read(graph: nnx.GraphDef, params: Any, source: jax.Array, mask: jax.Array) -> DocumentMemory:
    return nnx.merge(graph, params).prefill(source, mask)


@partial(jax.jit, static_argnums=0)
def _score(graph: nnx.GraphDef, params: Any, memory: DocumentMemory, answers: jax.Array) -> jax.Array:
    return score(nnx.merge(graph, params), memory, answers)


@pytest.fixture(scope="module", params=["bart-tiny", "t5-tiny"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    rag, folder = GOLDEN / request.param / "rag", tmp_path_factory.mktemp(request.param)
    tensors = load_file(rag / "model.safetensors")
    save_file({k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}, folder / "w.safetensors")
    hf = read_json(rag / "config.json")["generator"]
    (folder / "config.json").write_text(json.dumps(hf))
    pretrained = open_generator(folder)
    values = dict(np.load(GOLDEN / request.param / "golden.npz"))
    return Golden(folder, pretrained, pretrained.load_params(), values, hf["pad_token_id"])


def label_rows(golden: Golden, name: str) -> np.ndarray:
    """[12,1,LONGEST], where Hugging Face's decoder inputs are the labels: what follows each, and pads."""
    labels = golden.values[f"in/{name}"]
    following = np.full((len(labels), LONGEST), golden.pad, np.int32)
    following[:, : labels.shape[1] - 1] = labels[:, 1:]
    return np.repeat(following, 3, axis=0)[:, None]


def golden_logp(golden: Golden, memory: DocumentMemory, name: str, score_rows: Any) -> jax.Array:
    """log p [B,K,T] of each label after the one before, 0 where it is padding."""
    rows = label_rows(golden, name)
    # labels need not begin with the start token: it is whatever the first label is
    memory = replace(memory, start=jnp.asarray(np.repeat(golden.values[f"in/{name}"][:, 0].astype(np.int32), 3)))
    return score_rows(memory, rows).reshape(4, 3, -1) * (rows[:, 0] != golden.pad).reshape(4, 3, -1)


def label_logp(golden: Golden, name: str) -> np.ndarray:
    """[B,K,T] as `golden_logp` has them."""

    def score_rows(memory: DocumentMemory, rows: np.ndarray) -> np.ndarray:
        return np.asarray(_score(golden.pretrained.graphdef, golden.params, memory, rows))

    return np.asarray(golden_logp(golden, golden.memory, name, score_rows))


@pytest.mark.parametrize("name", LABELS)
def test_token_log_probabilities(golden: Golden, name: str) -> None:
    if f"in/{name}" not in golden.values:
        pytest.skip(f"{name} is recorded for BART only")
    expected = golden.values[f"score/{name}/token_logp"]
    np.testing.assert_allclose(label_logp(golden, name)[..., : expected.shape[2]], expected, rtol=1e-4, atol=1e-4)


def test_the_loss_and_its_gradient(golden: Golden) -> None:
    prior, source = golden.prior, tuple(map(jnp.asarray, golden.source))

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(golden.pretrained.graphdef, params)

        def score_rows(memory: DocumentMemory, rows: np.ndarray) -> jax.Array:
            return score(model, memory, jnp.asarray(rows))

        logp = golden_logp(golden, model.prefill(*source), "labels", score_rows)
        nll = -marginal_logp(prior, logp.sum(axis=-1))
        return nll.sum(), nll

    (_, nll), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(golden.params)
    np.testing.assert_allclose(nll, golden.values["score/labels/clean_nll"], rtol=1e-4)
    save_generator(golden.folder / "gradient", read_json(golden.folder / "config.json"), grads)
    named = load_file(golden.folder / "gradient" / "model.safetensors")
    norms = dict(
        zip(golden.values["grad/generator/param_names"], golden.values["grad/generator/param_norms"], strict=True)
    )
    largest = max(norms.values())
    ours = {name: np.linalg.norm(named[name]) for name in norms}
    assert ours == pytest.approx(norms, rel=1e-4, abs=1e-5 * largest)
    start = "grad/generator/array/"
    recorded = {key.removeprefix(start): value for key, value in golden.values.items() if key.startswith(start)}
    assert recorded
    # weighed by shares, each as uncertain as the logarithm that it is exp of
    apart = rounding(nll, 1) * max(np.abs(value).max() for value in recorded.values())
    for name, value in recorded.items():
        np.testing.assert_allclose(named[name], value, rtol=1e-4, atol=apart, err_msg=name)


def test_rag_token_sums_over_the_documents_at_every_token(golden: Golden) -> None:
    """The marginal takes tokens where it takes candidates: RAG-Token's p(y|x) is the product of theirs."""
    of_tokens = np.asarray(marginal_logp(golden.prior, jnp.asarray(label_logp(golden, "labels"))))
    nll = -np.where(label_rows(golden, "labels")[::3, 0] == golden.pad, 0.0, of_tokens).sum(axis=-1)
    np.testing.assert_allclose(nll, golden.values["score/labels/rag_token_nll"], rtol=1e-4)


def test_beams_in_a_pool_score_as_whole_answers(golden: Golden) -> None:
    """Two beams go their own ways through the pool, each seeing its own slots, the second from the first's first."""
    graph, params, memory = golden.pretrained.graphdef, golden.params, golden.memory
    assert isinstance(golden.model, Generator)
    n, beams, longest = memory.start.shape[0], 2, 5
    rng = np.random.default_rng(0)
    answers = rng.integers(4, 100, (n, beams, longest)).astype(np.int32)
    answers[:, 1, 0] = answers[:, 0, 0]
    expected = _score(graph, params, memory, answers)
    read = jax.jit(lambda memory: empty_prefix_cache(golden.model, memory, beams * longest))(memory)
    read = jax.device_put(read, memory.start.sharding)  # else the first step would be another program
    follow = jax.jit(lambda params, *given: beam_step(nnx.merge(graph, params), *given))
    tokens, found = np.repeat(np.asarray(memory.start)[:, None], beams, axis=1), []
    visible = np.zeros((n, beams, longest, beams), bool)
    for step in range(longest):
        visible[:, 0, step, 0] = visible[:, 1, step, min(step, 1)] = True
        logp, read = follow(params, memory, read, tokens, np.int32(step), visible.reshape(n, beams, -1).copy())
        tokens = answers[:, :, step]
        found.append(np.take_along_axis(np.asarray(logp), tokens[..., None], -1)[..., 0])
    np.testing.assert_allclose(np.stack(found, axis=-1), expected, rtol=1e-4, atol=1e-4)


def test_groups_do_not_see_each_other_and_padding_changes_nothing(golden: Golden) -> None:
    memory = golden.memory
    answers = np.random.default_rng(1).integers(4, 100, (memory.start.shape[0], 3, 4)).astype(np.int32)
    graph, params = golden.pretrained.graphdef, golden.params
    together = np.asarray(_score(graph, params, memory, answers))
    for group in range(3):
        alone = np.asarray(_score(graph, params, memory, answers[:, group : group + 1]))
        np.testing.assert_allclose(alone[:, 0], together[:, group], atol=rounding(together))
    source, mask = (
        np.pad(x, ((0, 0), (0, 9)), constant_values=fill) for x, fill in zip(golden.source, (7, False), strict=True)
    )
    wider = _read(graph, params, source, mask)
    np.testing.assert_allclose(_score(graph, params, wider, answers), together, atol=rounding(together))


def test_dropout_is_drawn_by_row(golden: Golden) -> None:
    dropping = open_generator(golden.folder, dropout=0.3)
    source, mask = golden.source
    answers = np.random.default_rng(2).integers(4, 100, (len(source), 1, 4)).astype(np.int32)

    @jax.jit
    def run(source: jax.Array, mask: jax.Array, answers: jax.Array, rngs: Any) -> jax.Array:
        model = nnx.merge(dropping.graphdef, golden.params)
        return score(model, model.prefill(source, mask, rngs, remat=True), answers, rngs, remat=True)

    rngs = jax.jit(row_rngs)(jax.random.key(0), np.arange(len(source)))
    first = np.asarray(run(source, mask, answers, rngs))
    without = np.asarray(_score(golden.pretrained.graphdef, golden.params, golden.memory, answers))
    assert np.abs(first - without).min(axis=-1).max() > 1e-3
    backwards = np.asarray(run(source[::-1], mask[::-1], answers[::-1], rngs[::-1]))
    np.testing.assert_allclose(backwards[::-1], first, atol=rounding(first))


def test_every_tensor_comes_back(golden: Golden) -> None:
    save_generator(golden.folder / "again", read_json(golden.folder / "config.json"), golden.params)
    ours, theirs = load_file(golden.folder / "again" / "model.safetensors"), load_file(golden.folder / "w.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def renamed(golden: Golden, change: Any, folder: Path) -> Any:
    """The parameters read from the golden file after a change to its tensors, and the golden ones."""
    folder.mkdir()
    tensors = load_file(golden.folder / "w.safetensors")
    save_file(change(dict(tensors)), folder / "w.safetensors")
    shutil.copy(golden.folder / "config.json", folder)
    return open_generator(folder).load_params()


def test_files_named_as_on_the_hub(golden: Golden, tmp_path: Path) -> None:
    """Without the head's prefix and buffer (facebook/bart-large), another copy of the embeddings, an unused table."""
    embedding = "model.shared.weight" if "model.shared.weight" in load_file(golden.folder / "w.safetensors") else None

    def without_head(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        del tensors["final_logits_bias"]
        return {name.removeprefix("model."): value for name, value in tensors.items()}

    def another_copy(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        table = tensors.pop(embedding or "shared.weight")
        return tensors | {f"{'model.' if embedding else ''}decoder.embed_tokens.weight": table}

    def unused_table(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors | {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((2, 2))}

    chex.assert_trees_all_equal(renamed(golden, another_copy, tmp_path / "copy"), golden.params)
    chex.assert_trees_all_equal(renamed(golden, unused_table, tmp_path / "unused"), golden.params)
    if embedding:
        found = renamed(golden, without_head, tmp_path / "base")
        assert not found.pop("logits_bias").any()
        chex.assert_trees_all_equal(found, {k: v for k, v in golden.params.items() if k != "logits_bias"})


def test_bfloat16_keeps_log_probabilities_in_float32(golden: Golden) -> None:
    half = open_generator(golden.folder, dtype="bfloat16")
    memory = golden.memory
    answers = np.random.default_rng(3).integers(4, 100, (memory.start.shape[0], 1, 4)).astype(np.int32)
    expected = np.asarray(_score(golden.pretrained.graphdef, golden.params, memory, answers))
    read = _read(half.graphdef, golden.params, *golden.source)
    assert read.keys.dtype == jnp.bfloat16
    found = np.asarray(_score(half.graphdef, golden.params, read, answers))
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).mean() < 0.2


def test_distances_share_rows() -> None:
    """By hand for 8 buckets up to a distance of 16: 0 to 3 alone, then 4 and 5, 6 to 7, 8 to 11, 12 and more."""
    expected = [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7]
    bucket = jax.jit(partial(distance_bucket, buckets=8, farthest=16), static_argnames="both_ways")
    behind = bucket(-np.arange(len(expected)), both_ways=False).tolist()
    exact = [d if d < 4 else min(7, int(4 + 4 * np.log(d / 4) / np.log(4))) for d in range(len(expected))]
    assert behind == exact
    ahead = np.array([3, 1, -1, *[0] * (len(expected) - 3)])
    assert int(np.asarray(bucket(ahead, both_ways=False))[0]) == 0
    assert np.asarray(bucket(ahead, both_ways=True))[1:3].tolist() == [5, 1]


@SLOW
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("bart", []),
        ("t5", []),
        ("bart", ["model=rag_token", "train.label_smoothing=0.1"]),
        ("bart", ["hf_compatible=true", "train.exclude_bos=true", "decode.num_docs=3", "decode.length_penalty=1.0"]),
        ("t5", ["hf_compatible=true", "model=rag_token"]),
    ],
    ids=str,
)
def test_from_training_to_an_answer(family: str, more: list[str], world: Path, tmp_path: Path, capsys: Capture) -> None:
    """Random models learn eight questions by heart, in two pieces as in one, are evaluated and answer."""
    write_random_checkpoint(family, tmp_path / "generator")
    some = read_questions(world / "train.jsonl")[:8]
    records = [{"question": q.question, "answer": [q.answers[0][0]], "passages": [f"p{i}"]} for i, q in enumerate(some)]
    write_jsonl(tmp_path / "letters.jsonl", records)
    settings = [
        f"generator.source={tmp_path}/generator",
        f"index.path={tmp_path}/index",
        "generator.answer_template='{answer}'",
    ]
    settings += [f"questions.{split}={tmp_path}/letters.jsonl" for split in ("train", "dev", "test")]
    settings += [
        "train.steps=16",
        "train.num_docs=2",
        "train.generator_lr=2e-2",
        "train.retriever_lr=3e-3",
        "decode.num_beams=2",
    ]
    settings += more

    def run(command: str, folder: str, *more: str) -> list[str]:
        capsys.readouterr()
        output = f"output={tmp_path / folder}"
        assert main([command, str(world / "config.yaml"), *more, "--set", output, *settings]) == 0
        return capsys.readouterr().out.splitlines()

    run("index", "whole")
    run("train", "whole", "train.save_every=8", "train.keep_checkpoints=9")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    shutil.copytree(tmp_path / "whole", tmp_path / "pieces")
    shutil.rmtree(tmp_path / "pieces" / "checkpoints" / "16")
    run("train", "pieces", "train.save_every=8", "train.keep_checkpoints=9")
    resumed = [json.loads(line) for line in (tmp_path / "pieces" / "train.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in resumed] == [line["loss"] for line in lines]
    report = json.loads(run("evaluate", "whole", "--json")[-1])["models"]
    assert report["trained"]["gold_nll"] < 0.5 * report["untrained"]["gold_nll"]
    assert main(["answer", str(tmp_path / "whole" / "config.yaml"), some[0].question, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    prior = np.array([document["prior"] for document in answer["documents"]])
    assert len(prior) == 3 and answer["probability"] == answer["candidates"][0]["thorough"]
    assert main(["answer", str(tmp_path / "whole" / "config.yaml"), some[0].question]) == 0
    shown = capsys.readouterr().out
    assert ("proposes" in shown) == ("model=rag_token" not in more)
    for candidate in answer["candidates"]:
        given = np.array(candidate["doc_probability"])
        if "hf_compatible=true" not in more:
            proposed = zip(candidate["beam_probability"], given, strict=True)
            assert all(beam in (0.0, pytest.approx(scored, rel=1e-3)) for beam, scored in proposed)
        elif "model=rag_token" not in more:
            assert given[2] == 0 == candidate["posterior"][2], "the training's two documents score"
            shares = prior[:2] / prior[:2].sum()
            assert candidate["thorough"] == pytest.approx(shares @ given[:2], rel=1e-3) or not candidate["text"]
        assert sum(candidate["posterior"]) == pytest.approx(1, rel=1e-3)


@SLOW
@pytest.mark.parametrize(("family", "model"), [("bart", "rag_sequence"), ("t5", "rag_token")])
def test_on_the_real_factbook(family: str, model: str, tmp_path: Path, capsys: Capture) -> None:
    """The path of the configurations for Natural Questions, with random models: the loss falls and runs resume."""
    config = str(Path(__file__).parents[2] / "configs" / "factbook.yaml")
    settings = [f"model={model}", "retriever.source=random:bert", f"generator.source=random:{family}"]
    settings += ["corpus.max_passages=400", f"index.path={tmp_path}/index", "generator.answer_template='{answer}'"]
    settings += ["generator.max_prompt_tokens=256", "generator.max_answer_tokens=48", "train.backprop_docs=null"]
    settings += [
        "train.steps=12",
        "train.batch_size=8",
        "train.frozen_params=[]",
        "train.generator_lr=1e-2",
        "train.save_every=6",
        "train.keep_checkpoints=9",
    ]

    def run(command: str, folder: str, *more: str) -> list[dict[str, Any]]:
        assert main([command, config, *settings, f"output={tmp_path / folder}", *more]) == 0
        log = tmp_path / folder / "train.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    run("index", "whole")
    lines = run("train", "whole")
    perplexity = [line["nll_per_token"] for line in lines]
    assert np.mean(perplexity[-3:]) < 0.8 * np.mean(perplexity[:3])
    shutil.copytree(tmp_path / "whole", tmp_path / "pieces")
    shutil.rmtree(tmp_path / "pieces" / "checkpoints" / "12")
    assert [line["loss"] for line in run("train", "pieces")] == [line["loss"] for line in lines]
    run("evaluate", "whole", "evaluate.max_questions=4", "evaluate.batch_size=4", "evaluate.max_untrained_questions=4")
    report = json.loads((tmp_path / "whole" / "metrics.json").read_text())["models"]
    assert report["trained"]["gold_nll"] < report["untrained"]["gold_nll"]
    assert main(["answer", str(tmp_path / "whole" / "config.yaml"), "What is the capital of France?", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(answer["documents"]) == 3 and answer["candidates"][0]["thorough"] == answer["probability"] > 0


BART = {"vocab_size": 9, "d_model": 8, "decoder_start_token_id": 2} | {
    f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")
}


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        (BartConfig, {"model_type": "mbart"}, "model_type is 'mbart'; expected one of bart"),
        (BartConfig, {"normalize_before": True}, "normalize_before"),
        (BartConfig, {"activation_function": "snake"}, "activation_function is 'snake'"),
        (T5Config, {"model_type": "longt5"}, "model_type is 'longt5'; expected one of t5, mt5, umt5"),
        (T5Config, {"feed_forward_proj": "gated-snake"}, "feed_forward_proj is 'gated-snake'"),
        (T5Config, {"feed_forward_proj": "twice-relu"}, "feed_forward_proj is 'twice-relu'"),
    ],
)
def test_other_shapes_are_refused(shape: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        shape.from_hf({**BART, "model_type": "t5" if shape is T5Config else "bart", **change})
