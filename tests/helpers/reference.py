"""Models written again in plain NumPy (float64, one unpadded row at a time) and small random ones to compare with.

They read Hugging Face's tensor names, so that they check the name tables too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float
from safetensors.numpy import load_file

from ragjax.checkpoints.pretrained import open_encoder, open_generator, save_encoder, save_generator
from ragjax.checkpoints.random_init import BERT, LLAMA
from ragjax.models.encoders.bert import Bert, BertConfig
from ragjax.models.generators.llama import Llama, LlamaConfig
from ragjax.models.layers import Params, split_parameters
from ragjax.parallel.sharding import parameter_spec

Tensors = Mapping[str, np.ndarray]
erf = np.vectorize(math.erf)
GOLDEN = Path(__file__).parents[1] / "golden" / "llama-tiny"
EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Small:
    """A checkpoint on disk, and what was read from it by us and by the plain safetensors reader."""

    folder: Path
    hf_config: dict[str, Any]
    graphdef: nnx.GraphDef
    params: Params
    tensors: Tensors

    @property
    def model(self) -> Any:
        return nnx.merge(self.graphdef, self.params)


def random_llama(folder: Path, seed: int = 0, dropout: float = 0.0, **changes: Any) -> Small:
    """A Llama of 2 layers with `changes` to its config.json, weights drawn wide."""
    hf = {**LLAMA, "vocab_size": 40, **changes}
    _, params = split_parameters(nnx.eval_shape(lambda: Llama(LlamaConfig.from_hf(hf), nnx.Rngs(0))))
    save_generator(folder, hf, draw(params, seed))
    pretrained = open_generator(folder, dropout)
    return Small(folder, hf, pretrained.graphdef, pretrained.load_params(), load_file(folder / "model.safetensors"))


def random_bert(
    folder: Path, pooling: str, normalize: bool, seed: int = 0, dropout: float = 0.0, **changes: Any
) -> Small:
    """A BERT of 2 layers with `changes` to its config.json, weights drawn wide."""
    hf = {**BERT, "vocab_size": 40, **changes}
    _, params = split_parameters(nnx.eval_shape(lambda: Bert(BertConfig.from_hf(hf, pooling, normalize), nnx.Rngs(0))))
    save_encoder(folder, hf, draw(params, seed))
    pretrained = open_encoder(folder, pooling, normalize, dropout)
    return Small(folder, hf, pretrained.graphdef, pretrained.load_params(), load_file(folder / "model.safetensors"))


def spread(params: Params, mesh: Mesh) -> Params:
    """The shapes and types, split over both axes of the mesh as far as they can be."""

    def place(path: tuple[str, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, parameter_spec(mesh, path, leaf.shape, None, fsdp=True))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    flat = nnx.traversals.flatten_mapping(params)
    return nnx.traversals.unflatten_mapping({path: place(path, leaf) for path, leaf in flat.items()})


def draw(params: Params, seed: int) -> Params:
    """Wide random values for parameters of these shapes: biases are not 0, norms not 1, predictions are sharp."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for path, leaf in nnx.traversals.flatten_mapping(params).items():
        noise = rng.normal(size=leaf.shape)
        drawn[path] = {
            "kernel": noise * 1.5 / math.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 1),
            "embedding": noise * 0.5,
            "scale": 1 + 0.3 * noise,
            "bias": 0.3 * noise,
            "logits_bias": 0.3 * noise,
        }[path[-1]].astype(np.float32)
    return nnx.traversals.unflatten_mapping(drawn)


def rounding(values: Any, terms: int = 32) -> float:
    """How far apart two float32 computations of the same values may be, which sum `terms` numbers as large as they.

    Each sum is rounded to half an eps of the largest; so many add up as a random walk does. Eight deviations of it:
    none of thousands of comparisons is then expected to be farther off, whatever the seed and the order of the sums.
    """
    sizes = np.abs(np.asarray(values, np.float64))
    return 4 * EPS * math.sqrt(terms) * float(sizes[np.isfinite(sizes)].max(initial=0.0))


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def softmax(x: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    return np.exp(log_softmax(x))


def llama_logp(tensors: Tensors, hf: Mapping[str, Any], tokens: list[int]) -> Float[np.ndarray, "S V"]:
    """log p(next token | tokens up to here) at every place of one row, everything computed anew."""
    w = {name: array.astype(np.float64) for name, array in tensors.items()}
    heads, kv = hf["num_attention_heads"], hf["num_key_value_heads"]
    size = hf.get("head_dim") or hf["hidden_size"] // heads
    length = len(tokens)
    causal = np.where(np.tril(np.ones((length, length), bool)), 0.0, -np.inf)

    def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + hf["rms_norm_eps"]) * scale

    def split(name: str, h: np.ndarray, count: int, norm: str | None) -> np.ndarray:
        x = (h @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)).reshape(length, count, size)
        return rms(x, w[norm]) if norm in w else x

    def turn(x: np.ndarray) -> np.ndarray:
        angle = np.arange(length)[:, None] * rope_frequencies(hf, size)
        pairs = x[..., : size // 2] + 1j * x[..., size // 2 :]
        pairs = pairs * np.exp(1j * angle)[:, None]
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(hf["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = rms(x, w[f"{at}.input_layernorm.weight"])
        q = turn(split(f"{at}.self_attn.q_proj", h, heads, f"{at}.self_attn.q_norm.weight"))
        k = turn(split(f"{at}.self_attn.k_proj", h, kv, f"{at}.self_attn.k_norm.weight"))
        v = split(f"{at}.self_attn.v_proj", h, kv, None)
        attended = []
        for head in range(heads):
            own = head * kv // heads
            attended.append(softmax(q[:, head] @ k[:, own].T / math.sqrt(size) + causal) @ v[:, own])
        x = x + np.concatenate(attended, axis=-1) @ w[f"{at}.self_attn.o_proj.weight"].T
        h = rms(x, w[f"{at}.post_attention_layernorm.weight"])
        gate = h @ w[f"{at}.mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"{at}.mlp.up_proj.weight"].T)) @ w[f"{at}.mlp.down_proj.weight"].T
    output = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return log_softmax(rms(x, w["model.norm.weight"]) @ output.T)


def rope_frequencies(hf: Mapping[str, Any], size: int) -> np.ndarray:
    """The angle by which each pair turns from one place to the next, Llama 3's three bands spelled out."""
    frequencies = hf["rope_theta"] ** -(np.arange(0, size, 2) / size)
    scaling = hf.get("rope_scaling")
    if not scaling:
        return frequencies
    low, high, original = (
        scaling[name] for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    out = []
    for f in frequencies:
        wavelength = 2 * math.pi / f
        if wavelength < original / high:
            out.append(f)
        elif wavelength > original / low:
            out.append(f / scaling["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append((1 - smooth) * f / scaling["factor"] + smooth * f)
    return np.array(out)


def answer_logp(
    tensors: Tensors, hf: Mapping[str, Any], prompt: list[int], answer: list[int]
) -> Float[np.ndarray, " T"]:
    """log p of each token of one answer after one prompt."""
    logp = llama_logp(tensors, hf, [*prompt, *answer[:-1]])[len(prompt) - 1 :]
    return logp[np.arange(len(answer)), answer]


def bert_hidden(tensors: Tensors, hf: Mapping[str, Any], tokens: list[int]) -> Float[np.ndarray, "S D"]:
    """The last layer of one row; tensors without a prefix."""
    w = {name: array.astype(np.float64) for name, array in tensors.items()}
    heads, length = hf["num_attention_heads"], len(tokens)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + hf.get("layer_norm_eps", 1e-12))
        return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    words = w["embeddings.word_embeddings.weight"][tokens]
    places, types = w["embeddings.position_embeddings.weight"], w["embeddings.token_type_embeddings.weight"]
    x = norm("embeddings.LayerNorm", words + places[:length] + types[0])
    for i in range(hf["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        q, k, v = (
            linear(f"{at}.attention.self.{part}", x).reshape(length, heads, -1).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        attended = softmax(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])) @ v
        attended = attended.swapaxes(0, 1).reshape(length, -1)
        x = norm(f"{at}.attention.output.LayerNorm", x + linear(f"{at}.attention.output.dense", attended))
        h = linear(f"{at}.intermediate.dense", x)
        x = norm(f"{at}.output.LayerNorm", x + linear(f"{at}.output.dense", h * (1 + erf(h / math.sqrt(2))) / 2))
    return x


def bert_embedding(
    tensors: Tensors, hf: Mapping[str, Any], tokens: list[int], pooling: str, normalize: bool
) -> Float[np.ndarray, " D"]:
    """The embedding of one row."""
    hidden = bert_hidden(tensors, hf, tokens)
    pooled = hidden[0] if pooling == "cls" else hidden.mean(axis=0)
    if hf.get("projection_dim"):
        pooled = pooled @ tensors["encode_proj.weight"].T + tensors["encode_proj.bias"]
    return pooled / np.linalg.norm(pooled) if normalize else pooled
