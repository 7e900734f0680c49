"""The training step: its gradient, however it is laid out over devices and micro-batches; freezing; the optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gradients import assert_same_gradients, moments, norm
from world import open_world, tiny_config

from ragjax.checkpoints import pretrained
from ragjax.config import Mesh, Train
from ragjax.data.question_batch import question_batch
from ragjax.data.questions import read_questions
from ragjax.errors import InputError
from ragjax.models.generator import answer_hidden
from ragjax.models.layers import Params
from ragjax.parallel.mesh import local_mesh, make_mesh
from ragjax.parallel.sharding import put_global, replicated, shard_batch
from ragjax.planning.memory import check_memory
from ragjax.planning.program_cost import SENT, Cost, NotCompiled, bytes_each, bytes_sent, compiled_cost
from ragjax.rag import RagPipeline, load_pipeline
from ragjax.resources import size_text
from ragjax.retrieval.device_index import DeviceIndex
from ragjax.retrieval.retrieve import retrieve
from ragjax.training.batch import TrainBatch, abstract_batch, attach_documents
from ragjax.training.loss import answer_nll, prior_and_token_logp, rag_loss
from ragjax.training.optimizer import make_optimizer, partition_params
from ragjax.training.state import TrainState, abstract_state, init_train_state, state_shardings, unsplit_modules
from ragjax.training.step import gradients, make_gradient_error, make_train_step, trace_step

KEY = jax.random.fold_in(jax.random.key(0), 0)  # that of step 0 under seed 0
# A shift common to all keys leaves a softmax unchanged: the gradient of BERT's key bias is 0 but for rounding, which
# Adam would blow up to whole steps.
KEY_BIAS = "retriever.layers.key.bias"


@dataclass(frozen=True)
class Setup:
    """One model, its initial parameters, and a batch of 8 questions with 3 documents each."""

    rag: RagPipeline
    params: Params
    batch: TrainBatch
    corpus: DeviceIndex

    def state(self) -> TrainState:
        """Bound to a device, as what a step returns is: else the second step would compile anew."""
        state = init_train_state(self.rag, jax.tree.map(jnp.array, self.params))
        return jax.device_put(state, jax.local_devices()[0])


def setup(world: Path, **overrides: object) -> Setup:
    config = tiny_config(world, **overrides)
    rag, index, store = open_world(config)
    params = rag.initial_params()
    chosen = read_questions(world / "train.jsonl")[: config.train.batch_size]
    questions = question_batch(rag.tokenizers, [q.question for q in chosen], [q.answers[0] for q in chosen])
    ids = retrieve(rag, params, index, questions, config.train.num_docs).ids
    batch = attach_documents(rag, index, store, questions, ids)
    return Setup(rag, params, jax.device_put(batch), index.corpus(local_mesh(data=1)))


@pytest.fixture(scope="module")
def plain(world: Path) -> Setup:
    return setup(world)


@pytest.fixture(scope="module")
def dropping(world: Path) -> Setup:
    return setup(world, train__dropout=0.2, train__frozen_params=[KEY_BIAS], train__max_grad_norm=1e9)


def differentiate(rag: RagPipeline, corpus: DeviceIndex | None = None) -> Callable[[Params, TrainBatch], Any]:
    return jax.jit(lambda params, batch: gradients(rag, params, batch, KEY, corpus))


@pytest.fixture(scope="module")
def plain_gradients(plain: Setup) -> tuple[Any, Any]:
    return jax.device_get(differentiate(plain.rag)(plain.params, plain.batch))


Step = Callable[..., tuple[TrainState, dict[str, Any]]]


@pytest.fixture(scope="module")
def dropping_step(dropping: Setup) -> Step:
    return make_train_step(dropping.rag)


@pytest.fixture(scope="module")
def dropping_stepped(dropping: Setup, dropping_step: Step) -> tuple[TrainState, Any]:
    return dropping_step(dropping.state(), dropping.batch)


@pytest.fixture(scope="module")
def dropping_gradients(dropping_stepped: tuple[TrainState, Any]) -> tuple[Any, Any]:
    """Read off Adam's first moment, which after one step is a tenth of the gradient; nothing was clipped."""
    state, metrics = dropping_stepped
    grads = {path: 10 * moment for path, moment in moments(state.optimizer)["mu"].items()}
    return grads, {name: np.asarray(value) for name, value in metrics.items() if not name.startswith("gradient_norm")}


def flat(params: Params) -> dict[tuple[str, ...], np.ndarray]:
    return nnx.traversals.flatten_mapping(jax.device_get(params))


# the gradient itself


def sequence_logp(rag: RagPipeline, params: Params, batch: TrainBatch, corpus: DeviceIndex | None = None) -> Any:
    """log p(z|x) and log p(y|x,z) [B,K]."""
    prior, scores = prior_and_token_logp(rag, params, batch, KEY, corpus)
    return prior, scores.logp.sum(axis=-1)


def test_gradient_is_the_posterior_weighted_sum(plain: Setup, plain_gradients: tuple[Any, Any]) -> None:
    @jax.jit
    def separately(params: Params) -> tuple[Any, Params]:
        joint, pull_back = jax.vjp(lambda p: sequence_logp(plain.rag, p, plain.batch), params)
        weights = -jax.nn.softmax(sum(joint), axis=1) / len(joint[0])
        return joint, pull_back((weights, weights))[0]

    (prior, logp), expected = jax.device_get(separately(plain.params))
    joint = (prior + logp).astype(np.float64)
    posterior = np.exp(joint - np.logaddexp.reduce(joint, axis=1, keepdims=True))
    assert (posterior.max(axis=1) < 0.999).any(), "one document decides everything: the test would show nothing"
    grads, metrics = plain_gradients
    assert_same_gradients(grads, flat(expected))
    assert metrics["loss"] == pytest.approx(-np.logaddexp.reduce(joint, axis=1).mean(), rel=1e-5)
    entropy = -(posterior * np.log(posterior)).sum(axis=1).mean()
    assert metrics["posterior_entropy"] == pytest.approx(entropy, rel=1e-4)
    assert metrics["prior_top"] == pytest.approx(np.exp(prior.max(axis=1)).mean(), rel=1e-5)
    for part in ("retriever", "generator"):
        assert norm([leaf for path, leaf in grads.items() if path[0] == part]) > 1e-3


def test_gradient_through_the_prior_over_the_corpus(world: Path, plain_gradients: tuple[Any, Any]) -> None:
    s = setup(world, retriever__prior="corpus", train__frozen_params=["generator"])
    every = np.asarray(s.corpus.embeddings, np.float32)
    embeddings = np.asarray(s.batch.passage_embeddings)
    ids = np.abs(embeddings[:, :, None] - every).sum(axis=-1).argmin(axis=-1)  # which passage each document is

    logp = jax.jit(lambda p: sequence_logp(s.rag, p, s.batch, s.corpus)[1])(s.params)

    def explicit(params: Params) -> jax.Array:
        encoder = nnx.merge(s.rag.retriever.graphdef, params)
        queries = encoder(s.batch.questions.question, s.batch.questions.question_mask)
        scores = s.rag.config.retriever.logit_scale * queries @ every.T
        # documents outside the top k contribute nothing to the sum, but take their share of the prior
        logp_of_all = jnp.full(scores.shape, -jnp.inf).at[jnp.arange(len(ids))[:, None], ids].set(logp)
        return -jax.nn.logsumexp(jax.nn.log_softmax(scores, axis=-1) + logp_of_all, axis=-1).mean()

    value, expected = jax.jit(jax.value_and_grad(explicit))(s.params["retriever"])
    grads, metrics = differentiate(s.rag, s.corpus)(s.params, s.batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert_same_gradients(jax.device_get(grads), flat({"retriever": expected}))
    of_question = ("retriever", "norm", "scale")
    top_k = plain_gradients[0][of_question]
    assert np.linalg.norm(grads[of_question] - top_k) > 0.05 * np.linalg.norm(top_k)


@pytest.mark.parametrize("model", ["rag_sequence", "rag_token"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_written_out(plain: Setup, model: str, smoothing: float) -> None:
    """From the probabilities of the whole vocabulary at every place, without any trick."""
    config = plain.rag.config.replace(model=model)
    rag = with_train(replace(plain.rag, config=config), label_smoothing=smoothing)
    batch, (b, k, s) = plain.batch, plain.batch.source.shape

    @jax.jit
    def run(params: Params) -> Any:
        generator = nnx.merge(rag.generator.graphdef, params["generator"])
        memory = generator.prefill(batch.source.reshape(b * k, s), batch.source_mask.reshape(b * k, s))
        hidden = answer_hidden(generator, memory, jnp.repeat(batch.questions.answers[0], k, axis=0)[:, None])
        every = jax.nn.log_softmax(generator.vocab_head().logits(hidden), axis=-1)
        return (
            prior_and_token_logp(rag, params, batch, KEY)[0],
            every.reshape(b, k, *every.shape[2:]),
            rag_loss(rag, params, batch, KEY),
        )

    prior, every, (value, metrics) = jax.device_get(run(plain.params))
    picked = np.take_along_axis(every, np.asarray(batch.questions.answer)[:, None, :, None], axis=-1)[..., 0]
    counted = np.asarray(batch.questions.answer_mask)
    if model == "rag_sequence":
        smoothed = (1 - smoothing) * picked + smoothing * every.mean(axis=-1)
        expected = -np.logaddexp.reduce(prior + (smoothed * counted[:, None]).sum(axis=-1), axis=1)
        nll = -np.logaddexp.reduce(prior + (picked * counted[:, None]).sum(axis=-1), axis=1)
        joint = prior + (picked * counted[:, None]).sum(axis=-1)
        weight = np.exp(joint - np.logaddexp.reduce(joint, axis=1, keepdims=True))
    else:
        marginal = np.logaddexp.reduce(prior[..., None, None] + every, axis=1)
        of_answer = np.take_along_axis(marginal, np.asarray(batch.questions.answer)[..., None], axis=-1)[..., 0]
        smoothed = (1 - smoothing) * of_answer + smoothing * marginal.mean(axis=-1)
        expected, nll = -(smoothed * counted).sum(axis=-1), -(of_answer * counted).sum(axis=-1)
        of_tokens = np.exp(prior[..., None] + picked - of_answer[:, None]) * counted[:, None]
        weight = of_tokens.sum(axis=-1) / counted.sum(axis=-1)[:, None]
    assert value == pytest.approx(expected.mean(), rel=1e-5)
    assert metrics["nll_per_token"] == pytest.approx((nll / counted.sum(axis=-1)).mean(), rel=1e-5)
    entropy = -(weight * np.log(weight)).sum(axis=1).mean()
    assert metrics["posterior_entropy"] == pytest.approx(entropy, rel=1e-3)


def test_an_answer_s_start_token_may_be_left_out_of_the_loss(plain: Setup) -> None:
    """Row by row: whether another row begins with it does not matter, as it does in Hugging Face's."""
    answer = np.asarray(plain.batch.questions.answer).copy()
    bos = int(answer[0, 0])
    answer[1, 0] = bos + 1
    questions = replace(plain.batch.questions, answer=jnp.asarray(answer))
    batch = replace(plain.batch, questions=questions)
    rag = replace(plain.rag, special=replace(plain.rag.special, bos=bos))
    prior, scores = jax.jit(lambda p: prior_and_token_logp(rag, p, batch, KEY))(plain.params)
    logp = np.array(scores.logp)

    def nll(exclude: bool, hf_compatible: bool) -> np.ndarray:
        config = rag.config.replace(hf_compatible=hf_compatible)
        asked = with_train(replace(rag, config=config), exclude_bos=exclude)
        return np.asarray(answer_nll(asked, prior, scores, *batch.questions.answers))

    whole = -np.logaddexp.reduce(prior + logp.sum(axis=-1), axis=1)
    np.testing.assert_allclose(nll(False, False), whole, rtol=1e-5)
    np.testing.assert_allclose(nll(True, True), whole, rtol=1e-5)
    logp[answer[:, 0] == bos, :, 0] = 0.0
    np.testing.assert_allclose(nll(True, False), -np.logaddexp.reduce(prior + logp.sum(axis=-1), axis=1), rtol=1e-5)


@pytest.mark.parametrize(("through", "drops"), [(1, False), pytest.param(2, True, marks=pytest.mark.slow)])
def test_backward_through_the_likeliest_documents(through: int, drops: bool, request: pytest.FixtureRequest) -> None:
    s: Setup = request.getfixturevalue("dropping" if drops else "plain")
    rag = with_train(s.rag, backprop_docs=through)
    grads, metrics = jax.device_get(differentiate(rag)(s.params, s.batch))

    @jax.jit
    def explicit(params: Params) -> tuple[jax.Array, jax.Array, Params]:
        joint, pull_back = jax.vjp(lambda p: sequence_logp(s.rag, p, s.batch), params)
        weights = jax.nn.softmax(sum(joint), axis=1)
        likeliest = weights >= jnp.sort(weights, axis=1)[:, -through][:, None]
        kept = jnp.where(likeliest, weights, 0.0)
        return kept.sum(axis=1), *pull_back((-weights / len(weights), -kept / len(weights)))

    kept, expected = jax.device_get(explicit(s.params))
    assert (kept < 0.98).any(), "nothing was skipped: the test would show nothing"
    assert_same_gradients(grads, {path: leaf for path, leaf in flat(expected).items() if path in grads})
    whole, whole_metrics = request.getfixturevalue("dropping_gradients" if drops else "plain_gradients")
    retriever = [path for path in grads if path[0] == "retriever"]
    assert_same_gradients({path: grads[path] for path in retriever}, {path: whole[path] for path in retriever})
    assert metrics.pop("posterior_skipped") == pytest.approx(1 - kept.mean(), abs=1e-5)
    chex.assert_trees_all_close(metrics, {name: whole_metrics[name] for name in metrics}, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("through", [1, 2])
def test_what_the_generator_misses_is_measured(through: int, dropping: Setup) -> None:
    rag = with_train(dropping.rag, backprop_docs=through)
    state = dropping.state()
    measured = float(make_gradient_error(rag)(state, dropping.batch))

    @jax.jit
    def by_document(params: Params) -> tuple[jax.Array, Params]:
        """The gradient of log p(y|x,z) of every document of every question, one after the other."""
        key = jax.random.fold_in(state.key, state.step)

        def logp(params: Params) -> tuple[jax.Array, jax.Array]:
            prior, scores = prior_and_token_logp(dropping.rag, params, dropping.batch, key)
            return scores.logp.sum(axis=-1), prior

        (scores, prior), pull_back = jax.vjp(lambda p: logp(p), params)
        one_hot = jnp.eye(scores.size).reshape(-1, *scores.shape)
        every = jax.lax.map(lambda which: pull_back((which, jnp.zeros_like(prior)))[0]["generator"], one_hot)
        return jax.nn.softmax(prior + scores, axis=1), every

    weights, every = jax.device_get(by_document(dropping.params))
    trained, _ = partition_params(dropping.params, rag.config.train.frozen_params)
    paths = [path for path in trained if path[0] == "generator"]
    of_documents = np.concatenate(
        [flat({"generator": every})[path].reshape(weights.size, -1) for path in paths], axis=1
    )
    skipped = weights < np.sort(weights, axis=1)[:, -through][:, None]
    assert (np.where(skipped, weights, 0).sum(axis=1) > 0.02).any(), "nothing was skipped: the test would show nothing"
    whole = weights.reshape(-1) @ of_documents / len(weights)
    missed = np.where(skipped, weights, 0).reshape(-1) @ of_documents / len(weights)
    assert measured == pytest.approx(np.linalg.norm(missed) / np.linalg.norm(whole), rel=1e-3)
    largest = np.linalg.norm(of_documents, axis=1)[skipped.reshape(-1)].max()
    mass = np.where(skipped, weights, 0).sum(axis=1).mean()
    assert 0 < measured * np.linalg.norm(whole) <= mass * largest * (1 + 1e-5)


def test_what_a_frozen_generator_misses_is_not_asked(dropping: Setup) -> None:
    rag = with_train(dropping.rag, backprop_docs=1, frozen_params=["generator"])
    with pytest.raises(
        InputError, match=r"train\.gradient_error_every: train\.frozen_params leaves nothing of the generator"
    ):
        make_gradient_error(rag)


# layout


@pytest.mark.devices(8)
@pytest.mark.slow
def test_eight_devices_give_the_gradients_of_one(plain: Setup, plain_gradients: tuple[Any, Any]) -> None:
    mesh = make_mesh()
    grads, metrics = differentiate(plain.rag)(
        put_global(plain.params, replicated(mesh)),
        shard_batch(mesh, jax.device_get(plain.batch), len(plain.batch.source)),
    )
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(grads))
    assert_same_gradients(jax.device_get(grads), plain_gradients[0])
    chex.assert_trees_all_close(metrics, plain_gradients[1], rtol=1e-5)


@pytest.mark.devices(8)
@pytest.mark.slow
def test_a_step_on_eight_devices_equals_one_with_dropout(
    dropping: Setup, dropping_step: Step, dropping_stepped: tuple[TrainState, Any]
) -> None:
    mesh, (one, metrics_one) = make_mesh(), dropping_stepped
    assert mesh.size == 8
    eight, metrics_eight = dropping_step(
        put_global(dropping.state(), replicated(mesh)),
        shard_batch(mesh, jax.device_get(dropping.batch), len(dropping.batch.source)),
    )
    leaf = eight.params["generator"]["embed"]["embedding"]
    assert len(leaf.sharding.device_set) == 8 and leaf.sharding.is_fully_replicated
    chex.assert_trees_all_close(metrics_eight, metrics_one, rtol=1e-5)
    assert_same_gradients(moments(eight.optimizer), moments(one.optimizer))
    difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), eight.params, one.params)
    assert norm(difference) <= 1e-5 * norm(jax.device_get(one.params))


@pytest.mark.devices(8)
@pytest.mark.slow
def test_pmap_with_psum_gives_the_same_gradients(plain: Setup, plain_gradients: tuple[Any, Any]) -> None:
    trained, frozen = partition_params(plain.params, [KEY_BIAS])

    def on_one_device(trained: Any, batch: TrainBatch) -> Any:
        def part(trained: Any) -> jax.Array:
            return rag_loss(plain.rag, nnx.traversals.unflatten_mapping(trained | frozen), batch, KEY)[0]

        summed = jax.lax.psum(jax.value_and_grad(part)(trained), "data")
        return jax.tree.map(lambda x: x / jax.lax.psum(1, "data"), summed)

    rows = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), plain.batch)
    value, grads = jax.tree.map(lambda x: x[0], jax.pmap(on_one_device, "data", in_axes=(None, 0))(trained, rows))
    assert value == pytest.approx(plain_gradients[1]["loss"], rel=1e-5)
    assert_same_gradients(jax.device_get(grads), {path: plain_gradients[0][path] for path in trained})


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("model", "fsdp"),
    [(2, True), pytest.param(1, True, marks=pytest.mark.slow), pytest.param(4, False, marks=pytest.mark.slow)],
)
def test_a_step_on_a_mesh_equals_one_on_a_device(
    model: int, fsdp: bool, dropping: Setup, dropping_stepped: tuple[TrainState, Any]
) -> None:
    """Heads, feed-forward and, with FSDP, the rest of the state split up: the same loss, gradient and parameters."""
    config = dropping.rag.config.replace(mesh=Mesh(model=model, fsdp=fsdp))
    rag, mesh = replace(dropping.rag, config=config), make_mesh(model)
    shardings = state_shardings(rag, mesh, dropping.state())
    state = jax.device_put(dropping.state(), shardings)
    up = state.params["generator"]["layers"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size * (8 if fsdp else model) == up.size
    batch = shard_batch(mesh, jax.device_get(dropping.batch), len(dropping.batch.source))
    (one, metrics_one), (after, metrics) = dropping_stepped, make_train_step(rag, shardings)(state, batch)
    chex.assert_trees_all_close(jax.device_get(metrics), jax.device_get(metrics_one), rtol=1e-4)
    assert float(metrics["loss"]) == pytest.approx(float(metrics_one["loss"]), rel=1e-5)
    ours, theirs = moments(after.optimizer)["mu"], moments(one.optimizer)["mu"]
    assert_same_gradients(jax.device_get(ours), jax.device_get(theirs), relative=1e-4)
    assert jax.tree.map(lambda x: x.sharding, after) == shardings, "the state stays where it lies"


@pytest.mark.devices(8)
def test_what_the_axis_does_not_divide_is_told(dropping: Setup) -> None:
    assert unsplit_modules(dropping.rag, make_mesh(2)) == []
    found = unsplit_modules(dropping.rag, make_mesh(4))
    of_retriever = [f"retriever.layers.{name} (2)" for name in ("key", "output", "query", "value")]
    assert found == ["generator.layers.key (2)", "generator.layers.value (2)", *of_retriever]


@pytest.mark.slow
def test_accumulation_changes_nothing(dropping: Setup, dropping_gradients: tuple[Any, Any]) -> None:
    """In four parts on one device; in two parts below, on several."""
    rag = with_train(dropping.rag, gradient_accumulation=4)
    grads, metrics = jax.device_get(differentiate(rag)(dropping.params, dropping.batch))
    assert_same_gradients(grads, dropping_gradients[0])
    chex.assert_trees_all_close(metrics, dropping_gradients[1], rtol=1e-5)


@pytest.mark.devices(8)
@pytest.mark.parametrize(("model", "drops"), [(1, False), pytest.param(2, True, marks=pytest.mark.slow)])
def test_devices_add_their_gradients_once_a_step(model: int, drops: bool, request: pytest.FixtureRequest) -> None:
    """Not once a micro-batch: what each of four devices sends over `data` is that of one gradient."""
    s: Setup = request.getfixturevalue("dropping" if drops else "plain")
    whole, whole_metrics = request.getfixturevalue("dropping_gradients" if drops else "plain_gradients")
    rag, mesh = (
        with_train(s.rag, gradient_accumulation=2, max_grad_norm=1e9),
        make_mesh(model, jax.devices()[: 4 * model]),
    )
    state = jax.device_put(s.state(), state_shardings(rag, mesh, s.state()))
    batch = shard_batch(mesh, jax.device_get(s.batch), len(s.batch.source))
    step = make_train_step(rag, jax.tree.map(lambda x: x.sharding, state))
    compiled = step.trace(state, batch).lower().compile()
    if model == 1:
        gradient = sum(leaf.size * 4 for leaf in whole.values())
        sent = bytes_sent(compiled.as_text() or "")
        assert sent.keys() == {"all-reduce"}
        assert gradient <= sent["all-reduce"] / SENT["all-reduce"](4) <= gradient + 100, "the rest is metrics"
    after, metrics = compiled(state, batch, None, step.schedule)
    chex.assert_trees_all_close({name: metrics[name] for name in whole_metrics}, whole_metrics, rtol=1e-5)
    assert_same_gradients({path: 10 * moment for path, moment in moments(after.optimizer)["mu"].items()}, whole)


def test_dropout_is_drawn_by_key_and_row(
    dropping: Setup, plain_gradients: tuple[Any, Any], dropping_gradients: tuple[Any, Any]
) -> None:
    value = jax.jit(lambda key, batch: rag_loss(dropping.rag, dropping.params, batch, key)[0])
    first = value(KEY, dropping.batch)
    assert first == pytest.approx(dropping_gradients[1]["loss"], rel=1e-5)
    assert abs(first - plain_gradients[1]["loss"]) > 1e-4
    assert abs(first - value(jax.random.key(8), dropping.batch)) > 1e-4
    questions = replace(dropping.batch.questions, row=dropping.batch.questions.row + 8)
    assert abs(first - value(KEY, replace(dropping.batch, questions=questions))) > 1e-4
    backwards = jax.tree.map(lambda x: x[::-1], dropping.batch)
    np.testing.assert_allclose(value(KEY, backwards), first, rtol=1e-5)


def test_rematerialisation_changes_nothing(plain: Setup, plain_gradients: tuple[Any, Any]) -> None:
    rag = with_train(plain.rag, remat=not plain.rag.config.train.remat, frozen_params=["retriever"])
    grads, metrics = jax.device_get(differentiate(rag)(plain.params, plain.batch))
    assert_same_gradients(
        grads, {path: leaf for path, leaf in plain_gradients[0].items() if path[0] == "generator"}, 1e-6
    )
    chex.assert_trees_all_close(metrics, plain_gradients[1], rtol=1e-6)


def test_bfloat16_keeps_probabilities_and_parameters_in_float32(
    world: Path, plain: Setup, plain_gradients: tuple[Any, Any]
) -> None:
    rag = setup(world, dtype="bfloat16").rag
    grads, metrics = jax.device_get(differentiate(rag)(plain.params, plain.batch))
    chex.assert_type(jax.tree.leaves((metrics, grads)), jnp.float32)
    assert metrics["loss"] == pytest.approx(plain_gradients[1]["loss"], rel=0.02)
    assert metrics["loss"] != plain_gradients[1]["loss"]
    assert 0.8 < norm(grads) / norm(plain_gradients[0]) < 1.25
    logps = jax.eval_shape(lambda p: jax.tree.leaves(prior_and_token_logp(rag, p, plain.batch, KEY)), plain.params)
    assert [x.dtype for x in logps] == [jnp.float32] * 3


def test_frozen_parameters_lie_in_the_type_that_they_are_computed_with(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which changes no bit of the loss nor of a gradient; what is trained stays float32, and so do its moments."""
    monkeypatch.setattr(pretrained, "widens_bfloat16", lambda mesh: False)  # as if these were accelerators
    made = setup(
        world, dtype="bfloat16", train__frozen_params=["generator.layers", "generator.embed", "retriever.words"]
    )
    state, computed = abstract_state(made.rag, local_mesh(data=1)), jax.tree.leaves(made.rag.generator.compute_params)
    trained, frozen = partition_params(state.params, made.rag.config.train.frozen_params)
    assert [leaf.dtype for leaf in computed] == [leaf.dtype for leaf in jax.tree.leaves(state.params["generator"])]
    assert {leaf.dtype for leaf in frozen.values()} == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
    assert frozen["retriever", "words", "embedding"].dtype == jnp.bfloat16
    floats = [leaf for leaf in jax.tree.leaves((trained, state.optimizer)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}
    rounded = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), made.params, state.params)
    run = differentiate(made.rag)
    chex.assert_trees_all_equal(run(rounded, made.batch), run(made.params, made.batch))


# training


@pytest.mark.other_python
def test_training_lowers_the_loss_and_repeats_bit_for_bit(dropping: Setup, dropping_step: Step) -> None:
    def run(steps: int) -> tuple[list[float], TrainState]:
        """The losses, and a copy of the state after the fifth step."""
        state, losses = dropping.state(), list[float]()
        for number in range(steps):
            state, metrics = dropping_step(state, dropping.batch)
            losses.append(float(metrics["loss"]))
            if number == 4:
                fifth = jax.tree.map(jnp.copy, state)
        return losses, fifth

    (some, first), (losses, second) = run(5), run(30)
    assert losses[:5] == some and first.step == 5
    chex.assert_trees_all_equal((first.params, first.optimizer), (second.params, second.optimizer))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_frozen_parts_stay_and_have_no_optimiser_state(plain: Setup) -> None:
    s = replace(plain, rag=with_train(plain.rag, frozen_params=["retriever", "generator.embed"], weight_decay=0.1))
    state, metrics = make_train_step(s.rag)(s.state(), s.batch)
    before, after = flat(s.params), flat(state.params)
    frozen = {path for path in before if path[0] == "retriever" or path[:2] == ("generator", "embed")}
    assert {path for path in before if np.array_equal(before[path], after[path])} == frozen
    held = {path: leaf.shape for path, leaf in moments(state.optimizer)["mu"].items()}
    assert held == {path: leaf.shape for path, leaf in before.items() if path not in frozen}
    assert metrics["gradient_norm_retriever"] == 0 and metrics["gradient_norm_generator"] > 0


def test_a_learning_rate_of_zero_leaves_the_retriever(plain: Setup, plain_gradients: tuple[Any, Any]) -> None:
    rag = with_train(plain.rag, retriever_lr=0.0)
    state, params = init_train_state(rag, plain.params), flat(plain.params)
    update = jax.jit(make_optimizer(rag.config.train).update)
    updates, _ = update(plain_gradients[0], state.optimizer, params)
    largest = {path: np.abs(leaf).max() for path, leaf in updates.items()}
    assert {size for path, size in largest.items() if path[0] == "retriever"} == {0.0}
    assert min(size for path, size in largest.items() if path[0] == "generator") > 1e-4


@pytest.mark.parametrize("prefix", ["retreiver", "generator.emb", "generator.layers.9"])
def test_freezing_what_does_not_exist(plain: Setup, prefix: str) -> None:
    with pytest.raises(InputError, match=rf"no parameters under '{prefix}'.*generator\.embed.*retriever"):
        init_train_state(with_train(plain.rag, frozen_params=[prefix]), plain.params)


def test_freezing_everything(plain: Setup) -> None:
    with pytest.raises(InputError, match="nothing to train"):
        init_train_state(with_train(plain.rag, frozen_params=["retriever", "generator"]), plain.params)


# the optimiser


def with_train(rag: RagPipeline, **changes: Any) -> RagPipeline:
    return replace(rag, config=rag.config.replace(train=rag.config.train.replace(**changes)))


def rates(train: Train, steps: int) -> dict[str, list[float]]:
    """The learning rates, read off the updates: Adam's step on a constant gradient has the size of the rate."""
    params = {("retriever", "scale"): jnp.zeros(()), ("generator", "scale"): jnp.zeros(())}
    optimizer, ones = make_optimizer(train), jax.tree.map(jnp.ones_like, params)
    update = jax.jit(optimizer.update)
    state, taken = optimizer.init(params), {"retriever": [], "generator": []}  # type: ignore[var-annotated]
    for _ in range(steps):
        updates, state = update(ones, state, params)
        for path, change in updates.items():
            taken[path[0]].append(-float(change))
    return taken


@pytest.mark.parametrize(
    ("decay", "after"),
    [
        ("cosine", [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)] + [0.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("constant", [1.0] * 5),
    ],
)
def test_rates_rise_and_fall(decay: str, after: list[float]) -> None:
    train = Train(steps=7, warmup_steps=3).replace(
        lr_schedule=decay, retriever_lr=0.01, generator_lr=0.2, max_grad_norm=100.0
    )
    shape = np.array([1 / 3, 2 / 3, 1.0, *after])
    taken = rates(train, len(shape))
    np.testing.assert_allclose(taken["retriever"], 0.01 * shape, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(taken["generator"], 0.2 * shape, rtol=1e-5, atol=1e-7)


def test_no_warmup_starts_at_the_peak() -> None:
    train = Train(steps=4, warmup_steps=0, lr_schedule="linear", generator_lr=0.1)
    np.testing.assert_allclose(rates(train, 5)["generator"], [0.1, 0.075, 0.05, 0.025, 0.0], rtol=1e-5, atol=1e-8)


def test_runs_with_other_rates_share_their_program(plain: Setup) -> None:
    """Which gets them as an argument; what else differs is compiled anew."""
    here = make_train_step(plain.rag)
    other = make_train_step(with_train(plain.rag, steps=7, warmup_steps=2, retriever_lr=0.0, generator_lr=0.5))
    assert other.program is here.program and not np.array_equal(other.schedule, here.schedule)
    assert make_train_step(with_train(plain.rag, lr_schedule="constant")).program is not here.program


@pytest.mark.parametrize(("clip", "scale"), [(1.0, {"retriever": 1 / 5, "generator": 1 / 50}), (60.0, {})])
def test_each_part_is_clipped_by_its_own_norm(clip: float, scale: dict[str, float]) -> None:
    grads = {
        ("retriever", "scale"): jnp.array([0.0, 3.0]),
        ("retriever", "bias"): jnp.array([4.0]),  # with it, of norm 5
        ("generator", "scale"): jnp.array([50.0]),
    }
    params = jax.tree.map(jnp.zeros_like, grads)
    optimizer = make_optimizer(Train(max_grad_norm=clip))
    _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    expected = {path: 0.1 * scale.get(path[0], 1.0) * grad for path, grad in grads.items()}
    chex.assert_trees_all_close(moments(state)["mu"], expected, rtol=1e-6)


def test_weight_decay_acts_on_matrices_only() -> None:
    leaves = [(part, "layers", name) for part in ("retriever", "generator") for name in ("kernel", "scale", "bias")]
    params = {path: jnp.ones(2) for path in [*leaves, ("generator", "embed", "embedding")]}
    optimizer = make_optimizer(Train(weight_decay=0.5, retriever_lr=0.1, generator_lr=0.1, lr_schedule="constant"))
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    expected = {path: jnp.full(2, -0.05 if path[-1] in ("kernel", "embedding") else 0.0) for path in params}
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


# before a run


@pytest.mark.devices(8)
@pytest.mark.parametrize(("prior", "mesh"), [("top_k", Mesh(fsdp=True)), ("corpus", Mesh(model=2))])
def test_the_abstract_step_is_the_real_one(world: Path, prior: str, mesh: Mesh) -> None:
    """Word for word the same program, where a batch is as wide as can be."""
    config = tiny_config(
        world, retriever__max_question_tokens=24, generator__max_prompt_tokens=80, retriever__prior=prior
    )
    config = config.replace(mesh=mesh)
    rag, index, store = open_world(config)
    texts = [f"What is the capital of land {i}, and why?" for i in range(config.train.batch_size)]
    questions = question_batch(rag.tokenizers, texts, ["x"] * len(texts))
    batch = attach_documents(rag, index, store, questions, np.zeros((len(texts), config.train.num_docs), np.int32))
    chex.assert_trees_all_equal_shapes_and_dtypes(batch, abstract_batch(config, 32))
    devices = make_mesh(mesh.model)
    state = init_train_state(rag, rag.initial_params())
    shardings = state_shardings(rag, devices, state)
    state, corpus = jax.device_put(state, shardings), index.corpus(devices)
    given = state, shard_batch(devices, batch, len(texts)), corpus if prior == "corpus" else None
    real = make_train_step(rag, shardings).trace(*given).lower()
    abstract = trace_step(rag, devices, len(index)).lower()
    assert abstract.as_text() == real.as_text()
    assert bytes_each(abstract_state(rag, devices)) == bytes_each(state)


@pytest.mark.devices(8)
def test_fsdp_sends_parameters_and_gradients_not_activations(world: Path) -> None:
    """Twice gathered, going forward and backward, and once summed: at most 2 + 2 times their bytes, and a little."""
    rag, mesh = load_pipeline(tiny_config(world, mesh__fsdp=True, train__batch_size=64)), make_mesh()
    sent = compiled_cost(trace_step(rag, mesh, 30).lower()).sent
    assert sent is not None
    parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rag.abstract_params()))
    activations = 64 * rag.config.train.num_docs * rag.config.generator.max_prompt_tokens * 32 * 4
    assert 1.5 * parameters < sum(sent.values()) < 4.5 * parameters < activations / 2, "of one layer alone"


@pytest.mark.devices(8)
def test_a_step_that_cannot_be_split_is_refused_as_in_training(world: Path) -> None:
    rag = load_pipeline(tiny_config(world, train__batch_size=12))
    with pytest.raises(InputError, match="12 questions cannot be split over 8 devices"):
        trace_step(rag, make_mesh(), 30)


@pytest.mark.devices(8)
def test_what_does_not_fit_is_refused_with_advice(world: Path) -> None:
    rag, mesh = load_pipeline(tiny_config(world, train__remat=False)), make_mesh()
    analysis = trace_step(rag, mesh, 30).lower().compile().memory_analysis()
    assert analysis is not None
    need = (
        bytes_each(abstract_state(rag, mesh)) + analysis.temp_size_in_bytes + 4 * 32 * 4
    )  # of 30 passages each device has 4
    check_memory(rag, mesh, 30, limit=need)
    with pytest.raises(InputError, match="training does not fit") as refused:
        check_memory(rag, mesh, 30, limit=need - 1)
    message = str(refused.value)
    assert f"it needs {size_text(need)} of a device" in message and "passages 0.5 KiB" in message
    for setting in (
        "index.kind=HNSW32",
        "mesh.fsdp=true",
        "dtype=bfloat16",
        "train.remat=true",
        "train.num_docs below 3",
    ):
        assert setting in message


@pytest.mark.devices(8)
@pytest.mark.slow
def test_a_step_that_measures_must_fit_too(world: Path) -> None:
    """All documents go backward there: they take more than the step's own."""
    mesh = make_mesh()
    few, measuring = (
        load_pipeline(tiny_config(world, train__remat=False, train__backprop_docs=1, train__gradient_error_every=every))
        for every in (None, 10)
    )
    step = compiled_cost(trace_step(few, mesh, 30).lower()).temporaries
    need = bytes_each(abstract_state(few, mesh)) + step + 4 * 32 * 4
    check_memory(few, mesh, 30, limit=need)
    with pytest.raises(InputError, match="training does not fit"):
        check_memory(measuring, mesh, 30, limit=need)


def test_what_the_compiler_refuses_does_not_fit(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rag, mesh = load_pipeline(tiny_config(world)), make_mesh()

    def refuse(*_: object) -> Cost:
        raise NotCompiled("XLA cannot compile it")

    monkeypatch.setattr("ragjax.planning.memory.compiled_cost", refuse)
    check_memory(rag, mesh, 30, limit=1)  # unknown: nothing is refused
    monkeypatch.setattr("ragjax.planning.memory.compiled_cost", lambda *_: Cost(2**34, None))
    with pytest.raises(InputError, match=r"temporaries 16\.00 GiB"):
        check_memory(rag, mesh, 30, limit=2**30)


@pytest.mark.devices(8)
def test_on_a_cpu_the_state_alone_must_fit(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rag, mesh = load_pipeline(tiny_config(world, mesh__fsdp=True)), make_mesh()
    need = 8 * bytes_each(abstract_state(rag, mesh))
    machine = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": need}
    monkeypatch.setattr("os.sysconf", machine.__getitem__)
    monkeypatch.setattr("ragjax.planning.memory.trace_step", lambda *_: pytest.fail("nothing is compiled"))
    check_memory(rag, mesh, 30)
    machine["SC_PHYS_PAGES"] -= 1
    with pytest.raises(
        InputError,
        match=r"and this machine has .*; what would help: train.frozen_params=\[retriever\] .*; smaller models",
    ):
        check_memory(rag, mesh, 30)
