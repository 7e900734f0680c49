"""Retrieval inside the training step against the host's: FAISS's Flat index, the same documents, the same numbers."""

from __future__ import annotations

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import assert_same_gradients, moments
from jax import Array
from processes import RATES, logged
from world import build, open_world, tiny_config

from ragjax.commands.train import train
from ragjax.config import load_config
from ragjax.data.prompt import Prompt, assemble
from ragjax.data.question_batch import question_batch
from ragjax.data.questions import read_questions
from ragjax.errors import InputError
from ragjax.parallel.mesh import local_mesh, make_mesh
from ragjax.parallel.sharding import put_global, replicated, shard_batch
from ragjax.retrieval.retrieve import search
from ragjax.training.batch import attach_documents, widen
from ragjax.training.fused_retrieval import corpus_with_tokens, prompt_on_device, retrieve_in_step
from ragjax.training.state import TrainState, init_train_state, state_shardings
from ragjax.training.step import make_train_step


@pytest.mark.parametrize("question_first", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_prompts_are_those_of_the_host(question_first: bool, empty: bool) -> None:
    """Passages of every length, cut or whole, and questions of two lengths; some pieces of the prompt are empty."""
    rng = np.random.default_rng(0)
    head, middle, tail = ((), (7,), ()) if empty else ((1, 2), (3,), (4, 5, 6))
    prompt, longest = Prompt(head, middle, tail, question_first, ((), ())), 14
    questions = [[11, 12, 13], [14] * 7]
    lengths = np.array([[0, 1, 5, 9], [2, 0, 1, 9]], np.int32)
    passages = rng.integers(20, 90, (2, 4, 9)).astype(np.int32)
    told, mask = np.zeros((2, 10), np.int32), np.zeros((2, 10), bool)
    for b, question in enumerate(questions):
        told[b, : len(question)], mask[b, : len(question)] = question, True
    given = jnp.asarray(passages), jnp.asarray(lengths), jnp.asarray(told), jnp.asarray(mask)

    @jax.jit
    def assembled(passages: Array, lengths: Array, told: Array, mask: Array) -> tuple[Array, Array]:
        return prompt_on_device(prompt, passages, lengths, told, mask, longest, 99)

    source, source_mask = assembled(*given)
    for b, question in enumerate(questions):
        for k in range(4):
            expected = assemble(prompt, passages[b, k, : lengths[b, k]], question, longest)
            assert source[b, k][source_mask[b, k]].tolist() == expected.tolist()
            assert source[b, k][~source_mask[b, k]].tolist() == [99] * (longest - len(expected))


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("devices", "prior"),
    [
        (8, "corpus"),
        pytest.param(1, "top_k", marks=pytest.mark.slow),
        pytest.param(1, "corpus", marks=pytest.mark.slow),
        pytest.param(8, "top_k", marks=pytest.mark.slow),
    ],
)
def test_the_step_retrieves_what_the_host_does(world: Path, tmp_path: Path, devices: int, prior: str) -> None:
    """The batch made inside is the batch of the host with FAISS; one step from it has the same gradient."""
    config = tiny_config(world, retriever__prior=prior, train__fused_retrieval=True)
    rag, index, store = open_world(config)
    flat_rag, flat, _ = open_world(tiny_config(world, index__kind="Flat", index__path=str(tmp_path / "flat")))
    chosen = read_questions(world / "train.jsonl")[: config.train.batch_size]
    texts, answers = [q.question for q in chosen], [q.answers[0] for q in chosen]
    params, mesh = rag.initial_params(), make_mesh(devices=jax.devices()[:devices])
    questions = question_batch(rag.tokenizers, texts, answers)
    _, _, ids = search(flat_rag, params, flat, questions, config.train.num_docs)
    on_host = attach_documents(rag, flat, store, questions, ids)

    corpus = corpus_with_tokens(rag, index, store, mesh)
    assert corpus.tokens.dtype == jnp.uint16
    asked = shard_batch(mesh, question_batch(rag.tokenizers, texts, answers, widest=True), len(texts))
    batch, found = jax.jit(lambda p, a, c: retrieve_in_step(rag, p, a, c))(
        put_global(params, replicated(mesh)), asked, corpus
    )
    np.testing.assert_array_equal(found, ids)
    wide = widen(on_host, [batch.source.shape[2], 0])
    np.testing.assert_array_equal(batch.source_mask, wide.source_mask)
    np.testing.assert_array_equal(
        np.where(batch.source_mask, batch.source, 0), np.where(wide.source_mask, wide.source, 0)
    )
    chex.assert_trees_all_equal(batch.passage_embeddings, wide.passage_embeddings)
    chex.assert_trees_all_equal((batch.questions.answers, batch.valid), (wide.questions.answers, wide.valid))

    outside_given = shard_batch(mesh, on_host, len(texts)), corpus if prior == "corpus" else None
    shardings = state_shardings(rag, mesh, init_train_state(rag, params))

    def start() -> TrainState:
        return jax.device_put(init_train_state(rag, rag.initial_params()), shardings)

    fused, inside = make_train_step(rag, shardings)(start(), asked, corpus)
    apart, outside = make_train_step(rag, shardings)(start(), *outside_given)
    np.testing.assert_array_equal(inside.pop("ids"), ids)
    _, answer_mask = questions.answers
    assert inside.pop("tokens") == on_host.source_mask.sum() + answer_mask.sum() * config.train.num_docs
    chex.assert_trees_all_close(inside, outside, rtol=1e-5, atol=1e-5)
    assert_same_gradients(moments(fused.optimizer)["mu"], moments(apart.optimizer)["mu"])


@pytest.mark.devices(8)
def test_nothing_comes_back_to_the_host(world: Path) -> None:
    """The whole step is one program without callbacks; given what lies on the devices, JAX transfers nothing."""
    config = tiny_config(world, train__fused_retrieval=True)
    rag, index, store = open_world(config)
    mesh = make_mesh()
    state = init_train_state(rag, rag.initial_params())
    shardings = state_shardings(rag, mesh, state)
    chosen = read_questions(world / "train.jsonl")[: config.train.batch_size]
    asked = question_batch(rag.tokenizers, [q.question for q in chosen], [q.answers[0] for q in chosen], widest=True)
    given = (
        jax.device_put(state, shardings),
        shard_batch(mesh, asked, len(chosen)),
        corpus_with_tokens(rag, index, store, mesh),
    )
    step = make_train_step(rag, shardings)
    schedule = jax.device_put(step.schedule, shardings.step)
    compiled = step.program.trace(*given, schedule).lower().compile()
    assert "callback" not in (compiled.as_text() or "")
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(compiled(*given, schedule))


@pytest.mark.slow
def test_fused_training_is_training(world: Path, tmp_path: Path) -> None:
    """Run from the command's function: the same losses and recall as with the host's search, to rounding."""
    settings = {"train__steps": 4, "train__save_every": 100, "train__dev_questions": 3}
    apart, fused = (
        train(tiny_config(world, output=str(tmp_path / name), train__fused_retrieval=name == "fused", **settings))
        for name in ("apart", "fused")
    )
    for one, other in zip(logged(apart), logged(fused), strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - RATES:
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), key


def test_short_passages_take_little_room(world: Path) -> None:
    rag, index, store = open_world(tiny_config(world, train__fused_retrieval=True))
    corpus = corpus_with_tokens(rag, index, store, local_mesh(data=1))
    longest = max(len(store.tokens(i)) for i in range(len(store)))
    assert corpus.tokens.shape == (30, longest) and longest < rag.config.generator.max_prompt_tokens
    for i in range(30):
        assert corpus.tokens[i, : int(corpus.lengths[i])].tolist() == store.tokens(i).tolist()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("index.kind=Flat", "train.fused_retrieval=true searches on the devices, and index.kind=Flat on the host"),
        ("train.passage_encoder=shared", "no texts to encode anew"),
        ("hf_compatible=true", "which are texts"),
    ],
)
def test_what_does_not_go_together(world: Path, setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(world / "config.yaml", ["train.fused_retrieval=true", setting])


def test_built_once(world: Path) -> None:
    """The same index serves both: nothing is built anew."""
    exact, approximate = tiny_config(world), tiny_config(world, index__kind="approximate")
    folder = build(exact)
    before = (folder / "manifest.json").read_bytes()
    assert build(approximate) == folder and (folder / "manifest.json").read_bytes() == before
