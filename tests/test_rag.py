"""The two models put together: retrieval and prompts against brute force, gradients against golden values."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from world import open_world, tiny_config

from ragjax.checkpoints.pretrained import open_encoder, open_generator, save_encoder, save_generator
from ragjax.data.passage_store import PassageStore
from ragjax.data.question_batch import (
    QuestionBatch,
    question_batch,
    tokenize_answer,
    tokenize_prompts,
    tokenize_questions,
)
from ragjax.data.questions import read_questions
from ragjax.errors import InputError
from ragjax.marginal import marginal_logp
from ragjax.models.layers import Params
from ragjax.padding import pad_sequences
from ragjax.rag import RagPipeline, load_pipeline
from ragjax.retrieval.encoder import encode
from ragjax.retrieval.index import Index
from ragjax.retrieval.retrieve import log_prior_mass, retrieve
from ragjax.training.batch import TrainBatch, attach_documents
from ragjax.training.loss import prior_and_token_logp, rag_loss

KEY = jax.random.key(0)
GOLDEN = Path(__file__).parent / "golden" / "llama-tiny"


@dataclass(frozen=True)
class Opened:
    rag: RagPipeline
    index: Index
    store: PassageStore
    params: Params
    questions: list[str]
    answers: list[str]

    @property
    def batch(self) -> QuestionBatch:
        return question_batch(self.rag.tokenizers, self.questions, self.answers)


def opened(world: Path, **overrides: object) -> Opened:
    rag, index, store = open_world(tiny_config(world, **overrides))
    some = read_questions(world / "test.jsonl")
    texts, answers = [q.question for q in some], [q.answers[0] for q in some]
    return Opened(rag, index, store, rag.initial_params(), texts, answers)


@pytest.fixture(scope="module")
def plain(world: Path) -> Opened:
    return opened(world)


def test_an_index_depends_on_how_its_corpus_is_read(world: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"corpus__format": "dpr"},
        {"corpus__max_passages": 9},
        {"corpus__columns": {"id": "_id"}},
        {"corpus__columns": {"text": "_id"}},
        {"corpus__quoting": "none"},
        {"corpus__skip_empty": True},
        {"corpus__split_words": 9},
        {"corpus__split_words": 9, "corpus__overlap_words": 2},
    ]
    prints = [load_pipeline(tiny_config(world, **change)).fingerprints["corpus"] for change in ({}, *changes)]
    assert len({*prints}) == len(prints)
    assert prints[0] == f"{world}/passages.jsonl jsonl max_passages=None", "as before there was more to set"


# retrieval


def brute_force_scores(o: Opened) -> np.ndarray:
    """[B, N] inner products of embeddings computed anew, without the index."""
    texts = [f"{passage.title}: {passage.text}" for passage in o.store]
    rows = o.rag.retriever_tokenizer.encode(texts, special=True)
    passages = encode(
        o.rag.retriever.graphdef, o.params["retriever"], *pad_sequences(rows, 64, o.rag.retriever_tokenizer.pad_id)
    )
    questions = tokenize_questions(o.rag.tokenizers, o.questions)
    queries = encode(o.rag.retriever.graphdef, o.params["retriever"], questions.question, questions.question_mask)
    return np.asarray(queries, np.float64) @ np.asarray(passages, np.float64).T


@pytest.mark.parametrize("prior", ["top_k", "corpus"])
def test_retrieval_equals_brute_force(prior: str, world: Path) -> None:
    o = opened(world, retriever__prior=prior)
    scores = brute_force_scores(o)
    ids = np.argsort(-scores, axis=1)[:, :4]
    best = np.take_along_axis(scores, ids, 1)
    found = retrieve(o.rag, o.params, o.index, o.batch, 4)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.scores, best, rtol=1e-5)
    scale = o.rag.config.retriever.logit_scale
    over = best if prior == "top_k" else scores
    expected = scale * best - np.logaddexp.reduce(scale * over, axis=1, keepdims=True)
    np.testing.assert_allclose(found.log_prior, expected, atol=2e-5)
    mass = np.exp(found.log_prior).sum(axis=1)
    if prior == "top_k":
        np.testing.assert_allclose(mass, 1, rtol=1e-5)
    else:
        assert (mass < 0.99).all() and (mass > 0).all()


def test_the_mass_of_the_best_documents(world: Path) -> None:
    o = opened(world)
    scores = o.rag.config.retriever.logit_scale * brute_force_scores(o)
    best = -np.sort(-scores, axis=1)[:, :2]
    expected = np.logaddexp.reduce(best, axis=1) - np.logaddexp.reduce(scores, axis=1)
    found = retrieve(o.rag, o.params, o.index, o.batch, 4)
    np.testing.assert_allclose(log_prior_mass(o.rag, o.index, found, 2), expected, atol=2e-5)


def test_a_tokenizer_with_more_tokens_than_the_model(world: Path, tmp_path: Path) -> None:
    for part in ("retriever", "generator"):
        folder = Path(shutil.copytree(world / part, tmp_path / part))
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["never seen"] = 1 + max(vocabulary.values())
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(InputError, match=rf"{part}: its tokenizer has \d+ tokens, but the model embeds only"):
            load_pipeline(tiny_config(world, **{f"{part}__source": str(folder)}))


def test_fewer_passages_than_k_change_neither_loss_nor_gradient(world: Path, tmp_path: Path) -> None:
    o = opened(world, corpus__max_passages=3, index__path=str(tmp_path / "small"))
    found = retrieve(o.rag, o.params, o.index, o.batch, 5)
    assert (found.ids[:, 3:] == -1).all() and (np.sort(found.ids[:, :3], axis=1) == np.arange(3)).all()
    assert (found.scores[:, 3:] == -np.inf).all() and (found.log_prior[:, 3:] == -np.inf).all()
    np.testing.assert_allclose(np.exp(found.log_prior).sum(axis=1), 1, rtol=1e-5)

    tokens, mask = tokenize_prompts(o.rag.tokenizers, o.store, o.batch, found.ids)
    empty = o.rag.generator_tokenizer.encode([f" {o.questions[0]}"])[0]
    assert tokens[4][mask[4]].tolist() == empty

    @jax.jit
    def run(params: Params, batch: TrainBatch) -> tuple[Any, Any]:
        prior, scores = prior_and_token_logp(o.rag, params, batch, KEY)
        joint = (prior, scores.logp.sum(axis=-1))
        (_, metrics), grads = jax.value_and_grad(lambda p: rag_loss(o.rag, p, batch, KEY), has_aux=True)(params)
        return (metrics, grads), joint

    batch = attach_documents(o.rag, o.index, o.store, o.batch, found.ids)
    assert (batch.valid == (found.ids >= 0)).all() and not batch.passage_embeddings[:, 3:].any()
    result, (prior, logp) = run(o.params, batch)
    chex.assert_tree_all_finite(result)
    assert (np.asarray(prior)[:, 3:] == -np.inf).all()
    of_three = np.logaddexp.reduce(np.asarray(prior + logp)[:, :3], axis=1)
    np.testing.assert_allclose(result[0]["loss"], -of_three.mean(), rtol=1e-5)
    # whatever stands in the place of the missing documents counts for nothing
    passages, source = batch.passage_embeddings.copy(), batch.source.copy()
    passages[:, 3:], source[:, 3:] = 7.0, 65
    changed, _ = run(o.params, replace(batch, passage_embeddings=passages, source=source))
    chex.assert_trees_all_equal(changed, result)


# batches and lengths


def test_answers_are_padded_and_embeddings_attached(plain: Opened) -> None:
    questions = question_batch(plain.rag.tokenizers, ["Where?"], ["Kesvik"])
    batch = attach_documents(plain.rag, plain.index, plain.store, questions, np.array([[3, 1]]))
    answer, answer_mask = batch.questions.answers
    chex.assert_shape(answer, (1, 12))
    assert answer[answer_mask].tolist() == tokenize_answer(plain.rag.tokenizers, "Kesvik")
    np.testing.assert_array_equal(batch.passage_embeddings[0], plain.index.embeddings[[3, 1]])


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("retriever__max_question_tokens", 513, r"retriever\.max_question_tokens is 513, .* 512 positions"),
        ("retriever__max_passage_tokens", 600, r"retriever\.max_passage_tokens is 600, .* 512 positions"),
        ("generator__max_prompt_tokens", 1013, r"generator\.max_prompt_tokens .* is 1025, .* 1024 positions"),
        ("decode__max_new_tokens", 897, r"the longest answer is 1025, .* 1024 positions"),
    ],
)
def test_lengths_that_a_model_does_not_have(world: Path, key: str, value: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        load_pipeline(tiny_config(world, **{key: value}))
    load_pipeline(tiny_config(world, **{key: value - 1 if value != 600 else 512}))


def test_a_window_may_be_shorter_or_longer_than_prompt_and_answer(world: Path, tmp_path: Path) -> None:
    """Shorter, it is masked; longer, it changes nothing."""
    folder = Path(shutil.copytree(world / "generator", tmp_path / "generator"))
    for window in (20, 140, 4096):  # 128 tokens of a prompt, 12 of an answer
        hf = json.loads((folder / "config.json").read_text())
        hf |= {"model_type": "mistral", "sliding_window": window}
        (folder / "config.json").write_text(json.dumps(hf))
        rag = load_pipeline(tiny_config(world, generator__source=str(folder)))
        assert rag.generator.config.windows == ((window, window) if window < 1024 else ())


# golden values: Hugging Face's models, the paper's formula


@dataclass(frozen=True)
class Golden:
    values: dict[str, np.ndarray]
    prior: np.ndarray
    logp: np.ndarray
    grads: Params  # of the sum over questions
    doc_embeds: np.ndarray  # the gradient by them
    folder: Path


@pytest.fixture(scope="module")
def golden(world: Path) -> Golden:
    with np.load(GOLDEN / "golden.npz") as file:
        g = {name: file[name] for name in file.files if not name.startswith("decode")}
    rag = replace(
        load_pipeline(
            tiny_config(world, retriever__pooling="cls", retriever__normalize=False, retriever__logit_scale=1.0)
        ),
        retriever=open_encoder(GOLDEN / "question_encoder", "cls", False),
        generator=open_generator(GOLDEN / "generator"),
    )
    count, documents, _ = g["in/doc_embeds"].shape
    answer = g["in/answers"][:, 0]
    batch = TrainBatch(
        questions=QuestionBatch(
            row=np.arange(count),
            question=g["in/input_ids"],
            question_mask=g["in/attention_mask"] == 1,
            answer=answer,
            answer_mask=np.arange(answer.shape[1]) < g["in/answer_length"][:, :1],
        ),
        passage_embeddings=g["in/doc_embeds"],
        valid=np.ones((count, documents), bool),
        source=g["in/prompt_ids_right"].reshape(count, documents, -1),
        source_mask=g["in/prompt_mask_right"].reshape(count, documents, -1) == 1,
    )

    batch = jax.device_put(batch)

    def total(params: Params, passages: jax.Array) -> tuple[jax.Array, Any]:
        prior, scores = prior_and_token_logp(rag, params, replace(batch, passage_embeddings=passages), KEY)
        logp = scores.logp.sum(axis=-1)
        return -marginal_logp(prior, logp).sum(), (prior, logp)

    function = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (grads, doc_embeds), (prior, logp) = jax.device_get(function(rag.initial_params(), batch.passage_embeddings))
    return Golden(g, prior, logp, grads, doc_embeds, GOLDEN)


def test_golden_likelihoods(golden: Golden) -> None:
    g = golden.values
    np.testing.assert_allclose(golden.prior, g["score/doc_logprobs"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        golden.prior - golden.prior[:, :1], g["score/doc_scores"] - g["score/doc_scores"][:, :1], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(golden.logp, g["score/answer_logp"][:, 0], rtol=1e-4)
    nll = -np.asarray(marginal_logp(jnp.asarray(golden.prior), jnp.asarray(golden.logp)))
    np.testing.assert_allclose(nll, g["score/nll"][:, 0], rtol=1e-4)


@pytest.mark.parametrize(("part", "ours"), [("question_encoder", "retriever"), ("generator", "generator")])
def test_golden_gradients(golden: Golden, part: str, ours: str, tmp_path: Path) -> None:
    g = golden.values
    save = save_encoder if part == "question_encoder" else save_generator
    save(tmp_path, json.loads((golden.folder / part / "config.json").read_text()), golden.grads[ours])
    ours_by_name = load_file(tmp_path / "model.safetensors")  # under Hugging Face's names, in its layout

    total = float(g[f"grad/{part}/norm"])
    np.testing.assert_allclose(
        np.sqrt(sum((x.astype(float) ** 2).sum() for x in ours_by_name.values())), total, rtol=1e-4
    )
    strip = "question_encoder.bert_model."
    names = [str(name).removeprefix(strip) for name in g[f"grad/{part}/param_names"]]
    assert set(names) == set(ours_by_name)
    norms = [np.linalg.norm(ours_by_name[name]) for name in names]
    np.testing.assert_allclose(norms, g[f"grad/{part}/param_norms"], rtol=1e-4, atol=1e-6 * total)
    arrays = {name: array for name, array in g.items() if name.startswith(f"grad/{part}/array/")}
    assert arrays
    for name, expected in arrays.items():
        found = ours_by_name[name.removeprefix(f"grad/{part}/array/").removeprefix(strip)]
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected), name


def test_golden_gradient_of_the_documents(golden: Golden) -> None:
    expected = golden.values["grad/doc_embeds"]
    assert np.linalg.norm(golden.doc_embeds - expected) <= 1e-4 * np.linalg.norm(expected)
