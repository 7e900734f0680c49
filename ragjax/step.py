"""The training state and the step: one global-view function under `jax.jit`, sharded by where its arguments lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh, NamedSharding, use_abstract_mesh
from jaxtyping import Array, Float, Key

from ragjax.config import ON_DEVICES, Config, Train, replace
from ragjax.contrastive import (
    ContrastiveBatch,
    abstract_contrastive,
    contrastive_logp,
    contrastive_loss,
    contrastive_nll,
)
from ragjax.cost import NotCompiled, bytes_each, compiled_cost, host_memory, size_text
from ragjax.errors import InputError
from ragjax.fused import Asked, abstract_asked, abstract_corpus, retrieve_in_step
from ragjax.loss import answer_nll, joint_logp, loss, passage_params
from ragjax.mesh import SPLIT, check_batch, lay, parameter_spec
from ragjax.models.layers import Params
from ragjax.rag import Models, TrainBatch
from ragjax.search import Corpus

AnyBatch = TrainBatch | ContrastiveBatch
Flat = dict[tuple[str, ...], Any]  # parameters by path
AnyModels = TypeVar("AnyModels", bound=Models)


@struct.dataclass
class TrainState:
    """Everything a run needs to go on, the position in the data apart.

    Types are only told, not checked: Orbax fills this tree with leaves of its own.
    """

    step: Any  # Int[Array, ""]
    params: Params
    optimizer: Any  # of the trained parameters only
    key: Any  # Key[Array, ""]
    indexed: Any = None  # with `refresh`: the passage encoder of the index that is being built, or was built last


def split_frozen(params: Params, freeze: Sequence[str]) -> tuple[Flat, Flat]:
    """Trained and frozen parameters by path. A prefix in `freeze` is a dotted path such as `generator.embed`.

    Raises `InputError` for a prefix that names nothing, or when nothing is left to train.
    """
    flat = nnx.traversals.flatten_mapping(params)

    def under(path: tuple[str, ...], prefix: str) -> bool:
        return ".".join(path).startswith(prefix + ".") or ".".join(path) == prefix

    for prefix in freeze:
        if not any(under(path, prefix) for path in flat):
            parts = sorted({".".join(path[:2]) for path in flat} | {path[0] for path in flat})
            raise InputError(f"train.freeze: no parameters under {prefix!r}; there are {', '.join(parts)}")
    frozen = {path: leaf for path, leaf in flat.items() if any(under(path, prefix) for prefix in freeze)}
    trained = {path: leaf for path, leaf in flat.items() if path not in frozen}
    if not trained:
        raise InputError("train.freeze leaves nothing to train")
    return trained, frozen


def make_optimizer(train: Train) -> optax.GradientTransformation:
    """For each model apart: clipping by the global norm, then AdamW with the retriever's or the generator's rate.

    Clipped together, the generator's gradient, several times the larger, would set the scale of the retriever's, and
    another one in every step. Weight decay acts on matrices only. The rates rise linearly over `warmup` steps, then
    fall to zero as `decay` says.
    """

    def schedule(peak: float) -> Callable[[Any], Any]:
        left = max(1, train.steps - train.warmup)
        after = {
            "cosine": optax.cosine_decay_schedule(peak, left),
            "linear": optax.linear_schedule(peak, 0.0, left),
            "constant": optax.constant_schedule(peak),
        }[train.decay]
        # the first step already moves: at step 0 of W warm-up steps the rate is peak / W
        rising = optax.linear_schedule(peak / max(1, train.warmup), peak, max(1, train.warmup - 1))
        return optax.join_schedules([rising, after], [train.warmup]) if train.warmup else after

    def is_matrix(params: Flat) -> dict[tuple[str, ...], bool]:
        return {path: path[-1] in ("kernel", "embedding") for path in params}

    def clipped_adamw(peak: float) -> optax.GradientTransformation:
        adamw = optax.adamw(schedule(peak), weight_decay=train.weight_decay, mask=is_matrix)
        return optax.chain(optax.clip_by_global_norm(train.clip), adamw)

    return optax.partition(
        {
            "retriever": clipped_adamw(train.retriever_lr),
            "passage_encoder": clipped_adamw(train.retriever_lr),
            "generator": clipped_adamw(train.generator_lr),
        },
        lambda params: {path: path[0] for path in params},
    )


def initial_state(rag: Models, params: Params) -> TrainState:
    """Step 0. Raises `InputError` as `split_frozen` does."""
    train = rag.config.train
    trained, _ = split_frozen(params, train.freeze)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=make_optimizer(train).init(trained),
        key=jax.random.key(rag.config.seed),
        indexed=passage_params(rag, params) if refreshes(rag.config) else None,
    )


def refreshes(config: Config) -> bool:
    """Whether the index is built anew during training, and not only at its end."""
    return config.refresh.every is not None or config.refresh.below is not None


def for_answering(rag: AnyModels) -> AnyModels:
    """The same models with a generator, and without FSDP, from which only a training step keeps its activations apart.

    See `split_by_rows`.
    """
    mesh, train = replace(rag.config.mesh, fsdp=False), replace(rag.config.train, objective="marginal")
    return dataclasses.replace(rag, config=replace(rag.config, mesh=mesh, train=train))


def state_shardings(rag: Models, mesh: Mesh, state: Any) -> Any:
    """Where each leaf of a training state, or of its abstract one, lies on the mesh."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [name for key in path for name in _names(key)]
        spec = parameter_spec(mesh, names, leaf.shape, _heads(rag, names), rag.config.mesh.fsdp)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, state)


def whole_on_every_device(rag: Models, mesh: Mesh) -> list[str]:
    """Of what should be split over `model`: the modules whose heads the axis does not divide."""
    found = set()
    for path, leaf in nnx.traversals.flatten_mapping(rag.abstract_params()).items():
        if path[-1] == "kernel" and path[-2] in SPLIT:
            spec = parameter_spec(mesh, path, leaf.shape, _heads(rag, path), fsdp=False)
            if mesh.shape["model"] > 1 and "model" not in spec:
                found.add(f"{'.'.join(path[:-1])} ({_heads(rag, path) or leaf.shape[SPLIT[path[-2]]]})")
    return sorted(found)


def _names(key: Any) -> tuple[str, ...]:
    """The optimiser keeps its moments by whole paths."""
    name = getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))
    return name if isinstance(name, tuple) else (str(name),)


def _heads(rag: Models, names: Sequence[str]) -> int | None:
    """The attention heads of a projection, None for what is none."""
    if len(names) < 2 or names[-2] not in ("query", "key", "value", "output"):
        return None
    if "indexed" in names:
        names = ["passage_encoder", *names]
    config = next((model for name, model in rag.parts.items() if name in names), rag.passage_encoder).config
    heads = getattr(config, "encoder_heads" if "encoder" in names else "decoder_heads", None) or config.heads
    return getattr(config, "kv_heads", heads) if names[-2] in ("key", "value") else heads


def gradients(
    rag: Models, params: Params, batch: AnyBatch, key: Key[Array, ""], corpus: Corpus | None = None
) -> tuple[Flat, dict[str, Any]]:
    """The gradient of the mean loss by the trained parameters, and metrics, over `train.accumulate` micro-batches."""
    trained, frozen = split_frozen(params, rag.config.train.freeze)

    def of_trained(trained: Flat, part: AnyBatch) -> tuple[Array, dict[str, Any]]:
        whole = nnx.traversals.unflatten_mapping(trained | frozen)
        if isinstance(part, ContrastiveBatch):
            return contrastive_loss(rag, whole, part, key)
        return loss(rag, whole, part, key, corpus)

    differentiate = jax.grad(of_trained, has_aux=True)
    count = rag.config.train.accumulate
    if count == 1:
        return differentiate(trained, batch)
    # every count-th row: each device keeps its own rows
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(differentiate, trained, first))

    def add(total: Any, part: AnyBatch) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + x / count, total, differentiate(trained, part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def make_train_step(rag: Models, shardings: Any = None) -> jax.stages.Wrapped:
    """(state, batch, corpus | None) → (state, metrics); the old state's memory is reused, and it stays where it lies.

    `shardings` are those of the state. `gradient_norm_retriever` and the others are before clipping.
    With `train.fused` the batch is an `Asked`, and what it retrieved is among the metrics: `ids` [B,K], and how many
    `tokens` were read.
    """
    train = rag.config.train
    optimizer = make_optimizer(train)

    @partial(jax.jit, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
    def train_step(
        state: TrainState, batch: AnyBatch | Asked, corpus: Corpus | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        with _on_mesh(shardings):
            batch, key, found = _drawn(rag, state, batch, corpus)
            grads, metrics = gradients(rag, state.params, batch, key, corpus)
        metrics |= found
        for part in rag.parts:
            of_part = [leaf for path, leaf in grads.items() if path[0] == part]
            metrics[f"gradient_norm_{part}"] = optax.tree.norm(of_part)
        trained, frozen = split_frozen(state.params, train.freeze)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, trained)
        params = nnx.traversals.unflatten_mapping(optax.apply_updates(trained, updates) | frozen)
        return TrainState(state.step + 1, params, optimizer_state, state.key, state.indexed), metrics

    return train_step


def make_gradient_error(rag: Models, shardings: Any = None) -> jax.stages.Wrapped:
    """(state, batch, corpus | None) → ‖g − g_m‖ / ‖g‖, of the generator's gradient before a step.

    g goes through all K documents of each question and g_m, the step's own, through `train.backward_documents`. With
    r_z the posterior and g_z the gradient of −log p(y|x,z), g − g_m is the mean over the questions of Σ r_z g_z over
    the documents that are left out: at most their mass times the largest norm of a g_z. Raises `InputError` where the
    generator is frozen.
    """
    through_all = replace(rag.config.train, backward_documents=None, probe_every=None)
    every = dataclasses.replace(rag, config=replace(rag.config, train=through_all))
    trained, _ = split_frozen(rag.abstract_params(), rag.config.train.freeze)
    if not any(path[0] == "generator" for path in trained):
        raise InputError("train.probe_every: train.freeze leaves nothing of the generator to train; leave it out")

    @jax.jit
    def gradient_error(state: TrainState, batch: AnyBatch | Asked, corpus: Corpus | None = None) -> Float[Array, ""]:
        with _on_mesh(shardings):
            batch, key, _ = _drawn(rag, state, batch, corpus)
            whole, few = (gradients(models, state.params, batch, key, corpus)[0] for models in (every, rag))
        of_generator = [path for path in whole if path[0] == "generator"]
        missed = optax.tree.norm([whole[path] - few[path] for path in of_generator])
        return missed / jnp.maximum(optax.tree.norm([whole[path] for path in of_generator]), 1e-30)

    return gradient_error


def _on_mesh(shardings: Any) -> AbstractContextManager[Any]:
    return nullcontext() if shardings is None else use_abstract_mesh(shardings.step.mesh.abstract_mesh)


def _drawn(
    rag: Models, state: TrainState, batch: AnyBatch | Asked, corpus: Corpus | None
) -> tuple[AnyBatch, Key[Array, ""], dict[str, Any]]:
    """The documents of a step, its random numbers, and what is to be told of its own retrieval."""
    key = jax.random.fold_in(state.key, state.step)
    if not isinstance(batch, Asked):
        return batch, key, {}
    assert corpus is not None
    read, ids = retrieve_in_step(rag, state.params, batch, corpus)
    return read, key, {"ids": ids, "tokens": read.source_mask.sum() + read.answer_mask.sum() * ids.shape[1]}


def make_nll(rag: Models) -> jax.stages.Wrapped:
    """(params, batch, corpus | None) → −log p(y|x) [B] of each answer, in nats, without dropout and smoothing.

    Of a contrastive batch −log of the positive's probability, NaN where there is none.
    """
    plain = replace(rag.config.train, dropout=0.0, backward_documents=None, probe_every=None)
    without = dataclasses.replace(rag, config=replace(rag.config, train=plain))

    @jax.jit
    def nll(params: Params, batch: AnyBatch, corpus: Corpus | None = None) -> Float[Array, " B"]:
        if isinstance(batch, ContrastiveBatch):
            of_positive = contrastive_nll(batch, contrastive_logp(without, params, batch, jax.random.key(0)))
            return jnp.where(batch.has_positive, of_positive, jnp.nan)
        prior, scores = joint_logp(without, params, batch, jax.random.key(0), corpus)
        return answer_nll(without, prior, scores, batch.answer, batch.answer_mask)

    return nll


# before a run: the same step on abstract arrays


def abstract_state(rag: Models, mesh: Mesh) -> TrainState:
    """The shapes, types and places of a training state. Raises `InputError` as `split_frozen` does."""
    state = jax.eval_shape(lambda params: initial_state(rag, params), rag.abstract_params())
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        state,
        state_shardings(rag, mesh, state),
    )


def abstract_batch(config: Config, width: int) -> TrainBatch:
    """The widest batch of a training step, in shapes and types; D is the embeddings' `width`."""
    questions, documents = config.train.batch_size, config.train.k
    asked = questions, config.retriever.question_tokens
    prompts = questions, documents, config.generator.source_tokens
    answered = questions, config.generator.answer_tokens
    encoded = questions, documents, config.retriever.passage_tokens
    shape = jax.ShapeDtypeStruct
    trained = config.train.passage_encoder != "frozen"
    return TrainBatch(
        row=shape((questions,), jnp.int32),
        question=shape(asked, jnp.int32),
        question_mask=shape(asked, jnp.bool),
        passages=shape((questions, documents, width), jnp.float32),
        valid=shape((questions, documents), jnp.bool),
        source=shape(prompts, jnp.int32),
        source_mask=shape(prompts, jnp.bool),
        answer=shape(answered, jnp.int32),
        answer_mask=shape(answered, jnp.bool),
        passage=shape(encoded, jnp.int32) if trained else None,
        passage_mask=shape(encoded, jnp.bool) if trained else None,
    )


def reads_corpus(config: Config) -> bool:
    """Whether a training step reads all passages, and not only those that were retrieved."""
    return config.train.fused or config.retriever.prior == "corpus"


def trace_step(
    rag: Models, mesh: Mesh, passages: int, make: Callable[..., jax.stages.Wrapped] = make_train_step
) -> jax.stages.Traced:
    """The training step, or what else `make` makes, at its widest; allocates nothing.

    It is traced with every argument where it would lie on the mesh. `passages` is N, which matters where the step reads
    the corpus. Raises `InputError` as training would.
    """
    check_batch(mesh, rag.config.train.batch_size // rag.config.train.accumulate)
    state, width = abstract_state(rag, mesh), rag.retriever.config.embedding_width
    corpus = abstract_corpus(rag, mesh, passages) if reads_corpus(rag.config) else None
    if rag.config.train.fused:
        batch: Any = abstract_asked(rag.config)
    elif rag.config.train.objective == "contrastive":
        batch = abstract_contrastive(rag.config, width)
    else:
        batch = abstract_batch(rag.config, width)
    batch = lay(mesh, batch, "data")
    return make(rag, jax.tree.map(lambda leaf: leaf.sharding, state)).trace(state, batch, corpus)


def programs(train: Train) -> list[Callable[..., jax.stages.Wrapped]]:
    """What makes the programs that training runs, each of which must fit."""
    return [make_train_step, *([] if train.probe_every is None else [make_gradient_error])]


def check_fits(rag: Models, mesh: Mesh, passages: int, limit: int | None = None) -> None:
    """Raises `InputError`, with advice, if training needs more memory of a device than the `limit` (bytes) it has.

    Without a limit it is what the device reports. A CPU reports none: there the state alone, of all its devices, is
    held against the machine's memory, and nothing is compiled. `passages` is N.
    """
    config, state = rag.config, bytes_each(abstract_state(rag, mesh))
    if limit is None:
        limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        memory, need = host_memory(), state * len(mesh.local_devices)
        if memory is not None and need > memory:
            has = f"parameters and optimiser state take {size_text(need)}, and this machine has {size_text(memory)}"
            raise InputError(f"training does not fit: {has}; use smaller models or train.freeze")
        return
    searched = 0
    if config.index.kind in ON_DEVICES:
        searched = bytes_each(abstract_corpus(rag, mesh, passages))
    try:
        temporaries = max(
            compiled_cost(trace_step(rag, mesh, passages, make).lower()).temporaries for make in programs(config.train)
        )
    except NotCompiled:
        return  # then the step itself will tell
    if (need := state + temporaries + searched) > limit:
        parts = f"parameters and optimiser state {size_text(state)}, temporaries {size_text(temporaries)}"
        parts += f", passages {size_text(searched)}" if searched else ""
        raise InputError(
            f"training does not fit: it needs {size_text(need)} of a device that has {size_text(limit)} ({parts}); "
            f"what would help: {'; '.join(memory_advice(rag, mesh))}"
        )


def memory_advice(rag: Models, mesh: Mesh) -> list[str]:
    """Settings that would lower what training needs of each device, the least costly first."""
    config, train, (data, _) = rag.config, rag.config.train, mesh.devices.shape
    found = []
    if config.index.kind in ON_DEVICES and config.retriever.prior == "top_k":
        found.append("index.kind=HNSW32 (the host then searches)")
    if not config.mesh.fsdp and data > 1:
        split = dataclasses.replace(rag, config=replace(config, mesh=replace(config.mesh, fsdp=True)))
        before, after = (size_text(bytes_each(abstract_state(models, mesh))) for models in (rag, split))
        found.append(f"mesh.fsdp=true (parameters and optimiser state {after} instead of {before})")
    if config.dtype == "float32":
        found.append("dtype=bfloat16")
    if not train.remat:
        found.append("train.remat=true")
    if train.objective == "contrastive":
        smaller = [f"train.batch_size below {train.batch_size}", f"train.k below {train.k}"]
        return [*found, *smaller, f"retriever.passage_tokens below {config.retriever.passage_tokens}", "smaller models"]
    # of one micro-batch every device should have as few questions as can be, and at least one
    parts = [
        n for n in range(1, train.batch_size + 1) if train.batch_size % n == 0 and train.batch_size // n % data == 0
    ]
    if parts and train.accumulate not in parts:
        found.append(
            f"train.accumulate={parts[-1]} (now {data} devices share {train.batch_size // train.accumulate} questions)"
        )
    elif more := [n for n in parts if n > train.accumulate]:
        found.append(f"train.accumulate={more[0]}")
    elif train.k > 1:
        found.append(f"train.k below {train.k}")
    found.append(f"generator.source_tokens below {config.generator.source_tokens}")
    if train.backward_documents is None and config.model == "rag_sequence" and train.k > 1:
        found.append("train.backward_documents=1")
    if config.index.kind in ON_DEVICES and config.index.dtype == "float32":
        found.append("index.dtype=bfloat16")
    return [*found, "smaller models"]
