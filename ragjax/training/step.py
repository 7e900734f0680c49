"""The training step: one global-view function under `jax.jit`, sharded by where its arguments lie."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec, use_abstract_mesh
from jaxtyping import Array, Float, Key

from ragjax.config import (
    Config,
    Corpus,
    Decode,
    Evaluate,
    Index,
    Questions,
    Refresh,
    Train,
    reads_corpus,
    refreshes,
)
from ragjax.data.question_batch import QuestionBatch
from ragjax.errors import InputError
from ragjax.models.layers import Params
from ragjax.parallel.mesh import check_batch
from ragjax.parallel.sharding import abstract_with_sharding
from ragjax.rag import RagModel
from ragjax.retrieval.device_index import DeviceIndex
from ragjax.training.batch import ContrastiveBatch, DocumentBatch, abstract_batch
from ragjax.training.contrastive import contrastive_logp, contrastive_loss, contrastive_nll
from ragjax.training.fused_retrieval import abstract_corpus, retrieve_in_step
from ragjax.training.loss import answer_nll, prior_and_token_logp, rag_loss
from ragjax.training.optimizer import FlatParams, join_params, make_optimizer, partition_params, schedule_numbers
from ragjax.training.state import TrainState, abstract_state


def gradients(
    rag: RagModel, params: Params, batch: DocumentBatch, rng: Key[Array, ""], corpus: DeviceIndex | None = None
) -> tuple[FlatParams, dict[str, Any]]:
    """The gradient of the mean loss by the trained parameters, and metrics, over its micro-batches.

    The arguments are those of `prior_and_token_logp`.
    """
    count, mesh = rag.config.train.gradient_accumulation, jax.sharding.get_abstract_mesh()
    if count == 1 or mesh.shape.get("data", 1) == 1 or not sums_once(rag.config):
        return _accumulate(rag, count, params, batch, rng, corpus)

    def on_device(params: Params, batch: DocumentBatch, rng: Key[Array, ""]) -> tuple[FlatParams, dict[str, Any]]:
        return jax.lax.pmean(_accumulate(rag, count, params, batch, rng, None), "data")

    everywhere, by_rows = PartitionSpec(), PartitionSpec("data")
    specs = (everywhere, by_rows, everywhere)
    return jax.shard_map(
        on_device, mesh=mesh, axis_names={"data"}, in_specs=specs, out_specs=everywhere, check_vma=False
    )(params, batch, rng)


def _accumulate(
    rag: RagModel, count: int, params: Params, batch: DocumentBatch, rng: Key[Array, ""], corpus: DeviceIndex | None
) -> tuple[FlatParams, dict[str, Any]]:
    """The same of rows that are in one place, in `count` micro-batches, one after the other."""
    trained, frozen = partition_params(params, rag.config.train.frozen_params)

    def mean_loss(trained: FlatParams, part: DocumentBatch) -> tuple[Array, dict[str, Any]]:
        whole = join_params(trained, frozen, rag.config.train.frozen_params)
        if isinstance(part, ContrastiveBatch):
            return contrastive_loss(rag, whole, part, rng)
        return rag_loss(rag, whole, part, rng, corpus)

    differentiate = jax.grad(mean_loss, has_aux=True)
    if count == 1:
        return differentiate(trained, batch)
    # every count-th row: each device keeps its own rows
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(differentiate, trained, first))

    def add(total: Any, part: DocumentBatch) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + x / count, total, differentiate(trained, part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def sums_once(config: Config) -> bool:
    """Whether the devices add their gradients once a step, and not after each of its micro-batches.

    So they do where a question's gradient needs neither another's nor another device's parameters or passages.
    """
    whole_batch = config.hf_compatible and config.train.exclude_bos
    return not (config.mesh.fsdp or reads_corpus(config) or whole_batch)


# what a run does around its steps: no program depends on it
_OF_THE_LOOP = (
    *("start_from", "save_every", "save_minutes", "keep_checkpoints", "dev_questions", "keep_best"),
    *("log_every", "tracker", "prefetch_retrieval"),
)
_ARGUMENTS = ("steps", "warmup_steps", "retriever_lr", "generator_lr")  # a step has them as `schedule_numbers`


def _compiled_once(make: Callable[..., jax.stages.Wrapped]) -> Callable[..., jax.stages.Wrapped]:
    """Runs of one process with the same networks and settings share their programs, wherever their files lie."""

    @lru_cache(maxsize=16)
    def make_once(rag: RagModel, tree: Any, leaves: tuple[Any, ...]) -> jax.stages.Wrapped:
        return make(rag, *jax.tree.unflatten(tree, leaves))

    @wraps(make)
    def find_or_make(rag: RagModel, *shardings: Any) -> jax.stages.Wrapped:
        c = rag.config
        config = c.replace(
            output="-",
            seed=0,
            corpus=Corpus(source="-"),
            questions=Questions(),
            index=c.index.replace(path="-") if reads_corpus(c) else Index(path="-"),
            train=c.train.replace(**{key: getattr(Train(), key) for key in (*_OF_THE_LOOP, *_ARGUMENTS)}),
            refresh=Refresh(every=Refresh().steps if refreshes(c) else None),
            decode=Decode(),
            evaluate=Evaluate(),
        )
        model = RagModel(config, rag.retriever, rag.generator, rag.special, rag.prompt, rag.passage_encoder)
        leaves, tree = jax.tree.flatten(shardings)
        return make_once(model, tree, tuple(leaves))

    return find_or_make


@dataclass(frozen=True)
class TrainStep:
    """(state, batch, corpus | None) → (state, metrics); the old state's memory is reused, and it stays where it lies.

    `gradient_norm_retriever` and the others are before clipping. With `train.fused_retrieval` the batch is a
    `QuestionBatch`, and what it retrieved is among the metrics: `ids` [B,K], and how many `tokens` were read.
    """

    program: jax.stages.Wrapped  # which runs with other learning rates share
    schedule: Float[np.ndarray, "2 6"]  # its last argument: `schedule_numbers`

    def __call__(self, state: TrainState, batch: Any, corpus: DeviceIndex | None = None) -> Any:
        return self.program(state, batch, corpus, self.schedule)

    def trace(self, state: TrainState, batch: Any, corpus: DeviceIndex | None = None) -> jax.stages.Traced:
        """The program before it is compiled, for what counts its cost."""
        return self.program.trace(state, batch, corpus, self.schedule)


def make_train_step(rag: RagModel, shardings: Any = None) -> TrainStep:
    """The step of a run; `shardings` are those of the state."""
    return TrainStep(_make_step_program(rag, shardings), schedule_numbers(rag.config.train))


@_compiled_once
def _make_step_program(rag: RagModel, shardings: Any) -> jax.stages.Wrapped:
    train = rag.config.train

    @partial(jax.jit, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
    def train_step(
        state: TrainState,
        batch: DocumentBatch | QuestionBatch,
        corpus: DeviceIndex | None,
        schedule: Float[Array, "2 6"],
    ) -> tuple[TrainState, dict[str, Any]]:
        with _use_mesh(shardings):
            batch, rng, retrieval = _attach_documents(rag, state, batch, corpus)
            grads, metrics = gradients(rag, state.params, batch, rng, corpus)
        metrics |= retrieval
        for part in rag.parts:
            leaves = [leaf for path, leaf in grads.items() if path[0] == part]
            metrics[f"gradient_norm_{part}"] = optax.tree.norm(leaves)
        trained, frozen = partition_params(state.params, train.frozen_params)
        updates, optimizer_state = make_optimizer(train, schedule).update(grads, state.optimizer, trained)
        params = join_params(optax.apply_updates(trained, updates), frozen, train.frozen_params)
        return TrainState(state.step + 1, params, optimizer_state, state.key, state.indexed), metrics

    return train_step


@_compiled_once
def make_gradient_error(rag: RagModel, shardings: Any = None) -> jax.stages.Wrapped:
    """(state, batch, corpus | None) → ‖g − g_m‖ / ‖g‖, of the generator's gradient before a step.

    g goes through all K documents of each question and g_m, the step's own, through `train.backprop_docs`. With
    r_z the posterior and g_z the gradient of −log p(y|x,z), g − g_m is the mean over the questions of Σ r_z g_z over
    the documents that are left out: at most their mass times the largest norm of a g_z. Raises `InputError` where the
    generator is frozen.
    """
    through_all = rag.config.train.replace(backprop_docs=None, gradient_error_every=None)
    every = replace(rag, config=rag.config.replace(train=through_all))
    trained, _ = partition_params(rag.abstract_params(), rag.config.train.frozen_params)
    if not any(path[0] == "generator" for path in trained):
        raise InputError(
            "train.gradient_error_every: train.frozen_params leaves nothing of the generator to train; leave it out"
        )

    @jax.jit
    def gradient_error(
        state: TrainState, batch: DocumentBatch | QuestionBatch, corpus: DeviceIndex | None = None
    ) -> Float[Array, ""]:
        with _use_mesh(shardings):
            batch, rng, _ = _attach_documents(rag, state, batch, corpus)
            whole, few = (gradients(models, state.params, batch, rng, corpus)[0] for models in (every, rag))
        paths = [path for path in whole if path[0] == "generator"]
        missed = optax.tree.norm([whole[path] - few[path] for path in paths])
        return missed / jnp.maximum(optax.tree.norm([whole[path] for path in paths]), 1e-30)

    return gradient_error


def _use_mesh(shardings: Any) -> AbstractContextManager[Any]:
    return nullcontext() if shardings is None else use_abstract_mesh(shardings.step.mesh.abstract_mesh)


def _attach_documents(
    rag: RagModel, state: TrainState, batch: DocumentBatch | QuestionBatch, corpus: DeviceIndex | None
) -> tuple[DocumentBatch, Key[Array, ""], dict[str, Any]]:
    """The batch with its documents, the step's random numbers, and, where it retrieves by itself, metrics of that."""
    rng = jax.random.fold_in(state.key, state.step)
    if not isinstance(batch, QuestionBatch):
        return batch, rng, {}
    assert corpus is not None
    whole, ids = retrieve_in_step(rag, state.params, batch, corpus)
    _, answer_mask = batch.answers
    return whole, rng, {"ids": ids, "tokens": whole.source_mask.sum() + answer_mask.sum() * ids.shape[1]}


@_compiled_once
def make_nll(rag: RagModel) -> jax.stages.Wrapped:
    """(params, batch, corpus | None) → −log p(y|x) [B] of each answer, in nats, without dropout and smoothing.

    Of a contrastive batch −log of the positive's probability, NaN where there is none.
    """
    lora = rag.config.train.lora.replace(dropout=0.0)
    plain = rag.config.train.replace(dropout=0.0, lora=lora, backprop_docs=None, gradient_error_every=None)
    without = replace(rag, config=rag.config.replace(train=plain))

    @jax.jit
    def nll(params: Params, batch: DocumentBatch, corpus: DeviceIndex | None = None) -> Float[Array, " B"]:
        if isinstance(batch, ContrastiveBatch):
            logp = contrastive_logp(without, params, batch, jax.random.key(0))
            return jnp.where(batch.has_positive, contrastive_nll(batch, logp), jnp.nan)
        prior, scores = prior_and_token_logp(without, params, batch, jax.random.key(0), corpus)
        return answer_nll(without, prior, scores, *batch.questions.answers)

    return nll


def trace_step(
    rag: RagModel, mesh: Mesh, passages: int, make: Callable[..., TrainStep | jax.stages.Wrapped] = make_train_step
) -> jax.stages.Traced:
    """The training step, or what else `make` makes, at its widest; allocates nothing.

    It is traced with `step_arguments`. Raises `InputError` as training would.
    """
    check_batch(mesh, rag.config.train.batch_size // rag.config.train.gradient_accumulation)
    state, batch, corpus = step_arguments(rag, mesh, passages)
    return make(rag, jax.tree.map(lambda leaf: leaf.sharding, state)).trace(state, batch, corpus)


def step_arguments(rag: RagModel, mesh: Mesh, passages: int) -> tuple[TrainState, Any, DeviceIndex | None]:
    """State, batch and corpus in shapes, each where it would lie on the mesh.

    `passages` is N, which matters where the step reads the corpus; elsewhere there is none.
    """
    corpus = abstract_corpus(rag, mesh, passages) if reads_corpus(rag.config) else None
    batch = abstract_with_sharding(mesh, abstract_batch(rag.config, rag.retriever.config.embedding_dim), "data")
    return abstract_state(rag, mesh), batch, corpus


def train_programs(train: Train) -> list[Callable[..., TrainStep | jax.stages.Wrapped]]:
    """What makes the programs that training runs, each of which must fit."""
    return [make_train_step, *([] if train.gradient_error_every is None else [make_gradient_error])]
