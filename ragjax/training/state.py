"""The training state, and where each of its leaves lies on the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ragjax.checkpoints.adapters import adapters_only, without_adapters
from ragjax.config import refreshes
from ragjax.models.layers import Params
from ragjax.parallel.mesh import make_mesh
from ragjax.parallel.sharding import SPLIT, parameter_spec
from ragjax.rag import RagModel
from ragjax.training.loss import passage_params
from ragjax.training.optimizer import frozen_paths, make_optimizer, partition_params

AnyModels = TypeVar("AnyModels", bound=RagModel)


@struct.dataclass
class TrainState:
    """Everything a run needs to go on, the position in the data apart.

    Types are in comments, not checked: Orbax fills this tree with leaves of its own. Checkpoints have these names.
    """

    step: Any  # Int[Array, ""]
    params: Params
    optimizer: Any  # of the trained parameters only
    key: Any  # Key[Array, ""]: the random numbers of all steps
    indexed: Any = None  # with `refresh`: the passage encoder of the index that is being built, or was built last


def init_train_state(rag: RagModel, params: Params) -> TrainState:
    """Step 0. Raises `InputError` as `partition_params` does."""
    train = rag.config.train
    trained, _ = partition_params(params, train.frozen_params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=make_optimizer(train).init(trained),
        key=jax.random.key(rag.config.seed),
        indexed=passage_params(rag, params) if refreshes(rag.config) else None,
    )


def saved_part(state: TrainState) -> TrainState:
    """What a checkpoint holds of a state: of models that have adapters these alone, without the weights beside them."""
    params = {name: adapters_only(part) for name, part in state.params.items()}
    indexed = None if state.indexed is None else adapters_only(state.indexed)
    return state.replace(params=params, indexed=indexed)  # type: ignore[attr-defined]


def base_part(state: TrainState) -> TrainState:
    """What `saved_part` leaves out, as a state whose other fields are None."""
    params = {name: without_adapters(part) for name, part in state.params.items()}
    indexed = None if state.indexed is None else without_adapters(state.indexed)
    return TrainState(None, {name: part for name, part in params.items() if part}, None, None, indexed)


def for_inference(rag: AnyModels) -> AnyModels:
    """The same models with a generator, and without FSDP, from which only a training step keeps its activations apart.

    See `split_by_rows`.
    """
    mesh, train = rag.config.mesh.replace(fsdp=False), rag.config.train.replace(objective="marginal")
    return replace(rag, config=rag.config.replace(mesh=mesh, train=train))


def state_shardings(rag: RagModel, mesh: Mesh, state: Any) -> Any:
    """Where each leaf of a training state, or of its abstract one, lies on the mesh."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [name for entry in path for name in _names(entry)]
        if {"v_row", "v_col"} & {*names} or leaf.shape == (1,):  # of Adafactor, which are no larger than a bias
            return NamedSharding(mesh, PartitionSpec())
        spec = parameter_spec(mesh, names, leaf.shape, _heads(rag, names), rag.config.mesh.fsdp)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, state)


def unsplit_modules(rag: RagModel, mesh: Mesh) -> list[str]:
    """Of what should be split over `model`: the modules whose heads the axis does not divide."""
    modules = set()
    for path, leaf in nnx.traversals.flatten_mapping(rag.abstract_params()).items():
        if path[-1] == "kernel" and path[-2] in SPLIT:
            spec = parameter_spec(mesh, path, leaf.shape, _heads(rag, path), fsdp=False)
            if mesh.shape["model"] > 1 and "model" not in spec:
                modules.add(f"{'.'.join(path[:-1])} ({_heads(rag, path) or leaf.shape[SPLIT[path[-2]]]})")
    return sorted(modules)


def larger_model_axis(rag: RagModel, mesh: Mesh) -> int | None:
    """The next length of the axis `model` over which every layer can be split; None if there is none."""
    lengths = (n for n in range(mesh.shape["model"] + 1, mesh.size + 1) if mesh.size % n == 0)
    fitting = (n for n in lengths if not unsplit_modules(rag, make_mesh(n, list(mesh.devices.flat))))
    return next(fitting, None)


def _names(entry: Any) -> tuple[str, ...]:
    """The names in one entry of a path. The optimiser keeps its moments by whole paths."""
    name = getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", "")))
    return name if isinstance(name, tuple) else (str(name),)


def _heads(rag: RagModel, names: Sequence[str]) -> int | None:
    """The attention heads of a projection, None for what is none."""
    if len(names) < 2 or names[-2] not in ("query", "key", "value", "output"):
        return None
    if "indexed" in names:
        names = ["passage_encoder", *names]
    config = next((model for name, model in rag.parts.items() if name in names), rag.passage_encoder).config
    heads = (
        getattr(config, "num_encoder_heads" if "encoder" in names else "num_decoder_heads", None) or config.num_heads
    )
    return getattr(config, "num_kv_heads", heads) if names[-2] in ("key", "value") else heads


def abstract_state(rag: RagModel, mesh: Mesh) -> TrainState:
    """The shapes, types and places of a training state. Raises `InputError` as `partition_params` does."""
    return with_shardings(
        rag, mesh, jax.eval_shape(lambda params: init_train_state(rag, params), training_types(rag, mesh))
    )


def training_types(rag: RagModel, mesh: Mesh) -> Params:
    """The shapes and types of parameters in training: float32, but those that are frozen as `untrained_types` says."""
    untrained = nnx.traversals.flatten_mapping(rag.untrained_types(mesh))
    types = nnx.traversals.flatten_mapping(rag.abstract_params())
    frozen = frozen_paths(types, rag.config.train.frozen_params)
    return nnx.traversals.unflatten_mapping(types | {path: untrained[path] for path in frozen})


def inference_params(rag: RagModel, mesh: Mesh) -> Params:
    """The shapes, types and places of parameters that answer: those of `for_inference`, as `untrained_types` says."""
    rag = for_inference(rag)
    return with_shardings(rag, mesh, rag.untrained_types(mesh))


def with_shardings(rag: RagModel, mesh: Mesh, tree: Any) -> Any:
    """The shapes and types of a state, or of a part of it, with the places of `state_shardings`."""
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        tree,
        state_shardings(rag, mesh, tree),
    )
