"""Generators whose layers' kernels lie in int8: W ≈ Q · scale, with one scale for each output channel (W8A16).

They are not trained: beside adapters they are the base, and for answering a quarter of float32's memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx

from ragjax.checkpoints.pretrained import PretrainedModel
from ragjax.models.layers import (
    SCALE,
    Params,
    channel_scale,
    computation_types,
    quantize_kernels,
    split_parameters,
    to_int8,
)


def with_int8_kernels(model: PretrainedModel) -> PretrainedModel:
    """The same model, its layers' kernels in int8: each is quantised while it is read."""
    module = nnx.merge(model.graphdef, model.abstract_params)
    quantize_kernels(module)
    graph, abstract = split_parameters(module)

    def load_params(like: Params | None = None) -> Params:
        return model.load_params(abstract if like is None else like)

    types = computation_types(module)
    return replace(model, graphdef=graph, abstract_params=abstract, compute_params=types, load_params=load_params)


def before_quantization(like: Params, dtype: str) -> Params:
    """The shapes and places that abstract parameters have without quantisation, kernels in a type."""
    leaves = dict(nnx.traversals.flatten_mapping(like))
    for path in [path for path in leaves if path[-1] == SCALE]:
        del leaves[path]
        kernel = *path[:-1], "kernel"
        leaves[kernel] = leaves[kernel].update(dtype=dtype)
    return nnx.traversals.unflatten_mapping(leaves)


def quantized(params: Params, like: Params) -> Params:
    """Parameters on devices with kernels in int8, one after the other, wherever those of `like` are."""
    leaves = dict(nnx.traversals.flatten_mapping(params))
    for path, leaf in nnx.traversals.flatten_mapping(like).items():
        if path[-1] == SCALE:
            kernel = leaves[*path[:-1], "kernel"]
            leaves[path] = jax.jit(channel_scale, out_shardings=leaf.sharding)(kernel)
            leaves[*path[:-1], "kernel"] = jax.jit(to_int8, out_shardings=kernel.sharding)(kernel, leaves[path])
            kernel.delete()
    return nnx.traversals.unflatten_mapping(leaves)


def dequantized(params: Params) -> Params:
    """On the host: Q · scale instead of each Q, in float32."""
    leaves: dict[tuple[str, ...], Any] = dict(nnx.traversals.flatten_mapping(params))
    for path in [path for path in leaves if path[-1] == SCALE]:
        scale, kernel = leaves.pop(path), (*path[:-1], "kernel")
        leaves[kernel] = leaves[kernel].astype(np.float32) * scale[..., None, :]
    return nnx.traversals.unflatten_mapping(leaves)
