"""Rows and numbers that several commands have: a model's parameters, the embeddings, what is searched."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ragjax.config import ON_DEVICES
from ragjax.errors import InputError
from ragjax.models.layers import Params
from ragjax.parallel.mesh import Command
from ragjax.planning.inputs import NO_PROMPT, SPECIAL, PlanInputs
from ragjax.planning.program_cost import bytes_each
from ragjax.planning.rows import Number, Row, Unknown, make_row
from ragjax.rag import RagModel
from ragjax.retrieval.faiss_index import faiss_bytes
from ragjax.training.fused_retrieval import abstract_corpus
from ragjax.training.loss import passage_params
from ragjax.training.state import inference_params, training_types, with_shardings


def parameters_row(inputs: PlanInputs, command: Command, name: str, copies: int = 1, indexed: bool = False) -> Row:
    """A model's parameters on each device, in the types that the command gives them.

    With `indexed` they are the passage encoder's as it was when the index was begun that is being built.
    """
    what = f"{name} parameters{', of the index being built' if indexed else ''}"
    return make_row(command, what, "device", lambda: _parameters(inputs, command, name, copies, indexed))


def _parameters(inputs: PlanInputs, command: Command, name: str, copies: int, indexed: bool) -> Number:
    field = name.replace(" ", "_")
    if isinstance(why := getattr(inputs, field), InputError):
        raise Unknown(str(why).split(";")[0])
    model, twice = inputs.placed(name), ", before and after training" if copies > 1 else ""
    if command == "index":
        params = model.untrained_types(inputs.mesh)
        return bytes_each(params), _types_text(params)
    # the other models take no part in it: they may be unknown
    alone = RagModel(inputs.config, model, model, SPECIAL, NO_PROMPT, model)
    mesh = inputs.mesh_of(command)
    if command == "evaluate":
        params = inference_params(alone, mesh)[field]
        return copies * bytes_each(params), f"{_types_text(params)}{split_text(mesh, fsdp=False)}{twice}"
    types = training_types(alone, mesh)
    tree = {"indexed": passage_params(alone, types)} if indexed else {field: types[field]}
    params = with_shardings(alone, mesh, tree)
    return bytes_each(params), f"{_types_text(params)}{split_text(mesh, inputs.config.mesh.fsdp)}"


def _types_text(params: Params) -> str:
    """How many numbers there are in each type."""
    counts = Counter[str]()
    for leaf in jax.tree.leaves(params):
        counts[leaf.dtype.name] += leaf.size
    return " and ".join(f"{count:,} in {dtype}" for dtype, count in counts.most_common())


def search_row(inputs: PlanInputs, command: Command) -> Row:
    """What is searched: all embeddings on the devices, or the FAISS structure (its embeddings stay on the disk)."""
    if inputs.config.index.kind not in ON_DEVICES:
        return make_row(command, f"FAISS structure {inputs.config.index.kind}", "host", lambda: faiss(inputs))
    tokens = command == "train" and inputs.config.train.fused_retrieval
    what = f"embeddings{' and tokens' if tokens else ', for the search'}"
    return make_row(command, what, "device", lambda: _device_index(inputs, command, tokens))


def _device_index(inputs: PlanInputs, command: Command, tokens: bool) -> Number:
    """The embeddings, and with `tokens` those of the passages, on each device."""
    mesh = inputs.index_mesh_of(command)
    (count, _), (_, how) = inputs.passages(), embeddings(inputs)
    encoder = inputs.model("passage encoder")
    generator = inputs.model("generator") if tokens else encoder  # only it knows how a token is stored
    config = inputs.config.replace(train=inputs.config.train.replace(fused_retrieval=tokens))
    rag = RagModel(config, encoder, generator, SPECIAL, NO_PROMPT, encoder)
    how += f", and at most {config.generator.max_prompt_tokens} tokens each" if tokens else ""
    how = how if mesh.size == 1 else f"split over all devices: {how}"
    return bytes_each(abstract_corpus(rag, mesh, count)), how


def embeddings(inputs: PlanInputs) -> tuple[int, str]:
    """N × D numbers in `index.dtype`. Raises `Unknown`."""
    width, dtype = inputs.model("passage encoder").config.embedding_dim, inputs.config.index.dtype
    count, passages = inputs.passages()
    return count * width * jnp.dtype(dtype).itemsize, f"{passages} × {width} in {dtype}"


def faiss(inputs: PlanInputs) -> tuple[int, str]:
    """What the FAISS structure takes, on disk and in memory alike. Raises `Unknown`."""
    width = inputs.model("passage encoder").config.embedding_dim
    count, passages = inputs.passages()
    size = faiss_bytes(inputs.config.index.kind, width, count)
    if size is None:
        raise Unknown("this kind is measured only when it is built")
    return size, f"{passages}, {size / count:.0f} bytes each"


def split_text(mesh: Mesh, fsdp: bool) -> str:
    """How parameters and optimiser state lie on several devices, in words."""
    if mesh.size == 1:
        return ""
    axes = ["data"] if fsdp else []
    axes += ["model"] if mesh.shape["model"] > 1 else []
    return f", split over {' and '.join(axes)}" if axes else ", whole on each"


def questions_text(count: int) -> str:
    """So many questions, in words."""
    return "1 question" if count == 1 else f"{count} questions"
