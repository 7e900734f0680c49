"""The Llama family, decoder only: SmolLM2, Llama, Mistral, Qwen2, Qwen3, Phi-3 and Phi-4 (Touvron et al. 2023).

x += attention(rms(x)); x += down(silu(gate(rms(x))) · up(rms(x))), with rotary positions and grouped key-value heads.
In some layers a token may see a window of the tokens before it only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.errors import InputError
from ragjax.models.attention import AttentionSource, dot_product_attention, self_attention
from ragjax.models.hf_config import MOST, Fields
from ragjax.models.kv_cache import DocumentMemory, KVCache, LayerCache, decode_layers
from ragjax.models.layers import ACTIVATIONS, ADAPT_PROMPT, Linear, RowRngs, dropout, fold_rngs, scan_layers, stack
from ragjax.models.rope import Rope, apply_rope, rope_angles
from ragjax.models.vocab_head import VocabHead

# by model_type: how the names of its classes begin
KINDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3"}
LAYER_TYPES = GLOBAL, LOCAL = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model; `from_hf` reads Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope: Rope
    windows: tuple[int, ...] = ()  # by layer, how many tokens one sees, itself included; 0 means all, () so everywhere
    activation: str = "silu"
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    softcap: float = 0.0  # of the attention's logits; 0 means none
    max_positions: int = 2048
    dropout: float = 0.0
    dtype: str = "float32"
    encoder_decoder: ClassVar[bool] = False

    @classmethod
    def from_hf(cls, hf: dict[str, Any], dropout: float = 0.0, dtype: str = "float32") -> LlamaConfig:
        """Raises `InputError` for what this family does not have (other activations, positions or biases), and for an
        entry of another type or size.
        """
        fields = Fields(hf)
        kind = fields.text("model_type", among=KINDS)
        fields.check_class(KINDS[kind])
        if fields.flag("mlp_bias", False) or (kind != "qwen2" and fields.flag("attention_bias", False)):
            raise InputError("biases outside Qwen2's query, key and value are not supported")
        shape = decoder_shape(fields)
        position = fields.part("rope_parameters", "rope_scaling")
        partial = (position if position.has("partial_rotary_factor") else fields).number("partial_rotary_factor", 1.0)
        if partial > 1 or (kind != "phi3" and partial != 1):
            raise InputError(f"partial_rotary_factor is {partial}; expected 1, or less of a Phi-3")
        rope = Rope.from_hf(fields, position, shape["head_dim"], fields.number("rope_theta", 10000.0), partial)
        positions = fields.count("max_position_embeddings", 2048)
        return cls(
            **shape,
            rope=rope,
            windows=_windows(kind, hf, shape["num_layers"], positions),
            activation=fields.text("hidden_act", "silu", among=("silu",)),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            max_positions=min(positions, rope.longest or positions),
            dropout=dropout,
            dtype=dtype,
        )

    @property
    def scale(self) -> float:
        """What queries are multiplied by."""
        return self.head_dim**-0.5


def decoder_shape(fields: Fields) -> dict[str, Any]:
    """The sizes that all decoders have, under the names of `LlamaConfig`. Raises `InputError`."""
    hidden_size, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise InputError(f"num_attention_heads is {heads}, which num_key_value_heads={kv_heads} does not divide")
    if not fields.has("head_dim"):
        fields.check_heads("hidden_size", "num_attention_heads")
    return {
        "vocab_size": fields.count("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": fields.layers("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": fields.count("head_dim", hidden_size // heads),
        "mlp_dim": fields.count("intermediate_size"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
    }


def _windows(kind: str, hf: dict[str, Any], layers: int, positions: int) -> tuple[int, ...]:
    """The window of each layer, as transformers has it; () where none is shorter than the model's positions."""
    fields = Fields(hf)
    # a Mistral that does not say otherwise has one, and so have Qwens that say that they use it
    windowed = kind == "mistral" or (kind.startswith("qwen") and fields.flag("use_sliding_window", False))
    if kind == "phi3":
        windowed = fields.has("sliding_window")
    if not windowed or ("sliding_window" in hf and hf["sliding_window"] is None):
        return ()
    window = fields.count("sliding_window", 4096)
    if window >= positions:
        return ()
    if not kind.startswith("qwen"):
        return (window,) * layers
    if fields.has("layer_types"):
        local = [kind == LOCAL for kind in fields.texts("layer_types", layers, LAYER_TYPES)]
    else:
        first = fields.count("max_window_layers", 28, least=0)
        local = [number >= first for number in range(layers)]
    return tuple(window if one else 0 for one in local) if any(local) else ()


class LlamaLayer(nnx.Module):
    """One block: attention, then the gated feed-forward half."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)

        def linear(size_in: int, size_out: int, bias: bool = False) -> Linear:
            return Linear(size_in, size_out, use_bias=bias, dtype=dtype, rngs=rngs)

        def norm(size: int) -> nnx.Module:
            return self.make_norm(config, size, rngs)

        c = self.config = config
        self.attention_norm, self.ffn_norm = norm(c.hidden_size), norm(c.hidden_size)
        self.query = linear(c.hidden_size, c.num_heads * c.head_dim, c.qkv_bias)
        self.key = linear(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.value = linear(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.output = linear(c.num_heads * c.head_dim, c.hidden_size)
        self.gate, self.up, self.down = (
            linear(c.hidden_size, c.mlp_dim),
            linear(c.hidden_size, c.mlp_dim),
            linear(c.mlp_dim, c.hidden_size),
        )
        if c.qk_norm:
            self.query_norm, self.key_norm = norm(c.head_dim), norm(c.head_dim)

    @staticmethod
    def make_norm(config: LlamaConfig, size: int, rngs: nnx.Rngs) -> Any:
        """A norm of so many numbers."""
        return nnx.RMSNorm(size, epsilon=config.norm_eps, dtype=jnp.dtype(config.dtype), rngs=rngs)

    def project(self, x: Float[Array, "... D"], angles: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Q [..., H, Dh], K and V [..., Hkv, Dh] of the normalised x; Q and K turned by the `angles` of positions."""
        c, h = self.config, self.attention_norm(x)
        query = self.query(h).reshape(*x.shape[:-1], c.num_heads, c.head_dim)
        key = self.key(h).reshape(*x.shape[:-1], c.num_kv_heads, c.head_dim)
        value = self.value(h).reshape(*x.shape[:-1], c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return apply_rope(query, angles), apply_rope(key, angles), value

    def finish(
        self, x: Float[Array, "n ... D"], attended: Float[Array, "n ... H Dh"], rngs: RowRngs | None
    ) -> Float[Array, "n ... D"]:
        """The rest of the block, after attention."""
        rate = self.config.dropout
        x = x + dropout(self.output(attended.reshape(*x.shape[:-1], -1)), fold_rngs(rngs, 0), rate)
        return x + dropout(self.feed_forward(self.ffn_norm(x)), fold_rngs(rngs, 1), rate)

    def feed_forward(self, h: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The gated feed-forward half."""
        return self.down(ACTIVATIONS[self.config.activation](self.gate(h)) * self.up(h))


class Llama(nnx.Module):
    """A generator (`ragjax.models.generator.Generator`): its memory is the key-value cache of the prompt."""

    layer_class: ClassVar[type[LlamaLayer]] = LlamaLayer

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.layers = stack(lambda r: self.layer_class(config, r), config.num_layers, rngs)
        self.norm = self.layer_class.make_norm(config, config.hidden_size, rngs)
        if not config.tie_word_embeddings:
            self.head = nnx.Embed(config.vocab_size, config.hidden_size, dtype=jnp.dtype(config.dtype), rngs=rngs)

    def prefill(
        self,
        source: Int[Array, "n S"],
        mask: Bool[Array, "n S"],
        dropout_rngs: RowRngs | None = None,
        remat: bool = False,
    ) -> DocumentMemory:
        """Reads all but the last prompt token, which is the start token."""
        _, (memory_keys, memory_values) = self.read(source, dropout_rngs, remat)
        last = mask.sum(axis=-1) - 1
        before_last = jnp.arange(source.shape[1])[None] < last[:, None]
        start = jnp.take_along_axis(source, last[:, None], axis=1)[:, 0]
        return DocumentMemory(memory_keys, memory_values, before_last, last, start)

    def read(
        self, tokens: Int[Array, "n S"], dropout_rngs: RowRngs | None = None, remat: bool = False
    ) -> tuple[Float[Array, "n S D"], tuple[Array, Array]]:
        """The states of right-padded rows after all layers but the last norm, and the keys and values of each layer.

        Padding needs no mask of its own: a token never sees what stands after it.
        """
        c, angles_of = self.config, self._angles(jnp.arange(tokens.shape[1])[None])

        def step(layer: LlamaLayer, x: Array, number: Array) -> tuple[Array, tuple[Array, Array]]:
            query, key, value = layer.project(x, angles_of(number))
            attended = self_attention(
                query, key, value, scale=c.scale, softcap=c.softcap, causal=True, windows=c.windows, layer=number
            )
            return layer.finish(x, attended, fold_rngs(dropout_rngs, number)), (key, value)

        x, numbers = self.embed_tokens(tokens), jnp.arange(c.num_layers)
        return scan_layers(self.layers, step, x, numbers, remat, fold_rngs(dropout_rngs, ADAPT_PROMPT))

    def forward_with_cache(
        self,
        memory: DocumentMemory,
        past: KVCache | None,
        tokens: Int[Array, "n G M"],
        positions: Int[Array, "#n #G M"],
        attention_mask: Bool[Array, "#n #G M E"],
        dropout_rngs: RowRngs | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "n G M D"], KVCache | None]:
        """As `Generator` says."""
        c = self.config
        absolute = memory.offset[:, None, None] + positions
        angles_of = self._angles(absolute)  # n G M 1 R
        key_positions = positions[:, :, None, :]
        if c.windows and past is not None:
            past = past.place(jnp.broadcast_to(positions, tokens.shape))
            key_positions = past.positions[:, None, None, :]
        to_document = absolute[..., None] - jnp.arange(memory.keys.shape[2])
        to_new = positions[..., None] - key_positions

        def block(layer: LlamaLayer, x: Array, cache: LayerCache) -> tuple[Array, LayerCache]:
            query, key, value = layer.project(x, angles_of(cache.layer))
            own, cache = cache.append(key, value)
            attended = self._attend(query, [(cache.document, to_document), (own, to_new)], cache.layer)
            return layer.finish(x, attended, fold_rngs(dropout_rngs, c.num_layers + cache.layer)), cache

        x = self.embed_tokens(tokens)
        x, past = decode_layers(
            self.layers, block, x, memory, past, attention_mask, remat=remat, dropout_rngs=dropout_rngs
        )
        return self.norm(x), past

    def vocab_head(self) -> VocabHead:
        """As `Generator` says."""
        table = self.embed if self.config.tie_word_embeddings else self.head
        return VocabHead(table.embedding[...])

    def embed_tokens(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """What the first layer reads."""
        return self.embed(tokens)

    def _angles(self, positions: Int[Array, "..."]) -> Callable[[Array], tuple[Array, Array]]:
        """By the number of a layer, the angles at these positions."""
        angles = rope_angles(positions, self.config.rope)
        return lambda number: angles

    def _attend(
        self, query: Float[Array, "n G M H Dh"], sources: Sequence[tuple[AttentionSource, Array]], number: Array
    ) -> Float[Array, "n G M H Dh"]:
        """Attention in a layer, within its window; with each source, how far before the query its tokens stand."""
        c, seen = self.config, [source for source, _ in sources]
        if c.windows:
            window = jnp.array([window or MOST for window in c.windows])[number]
            seen = [source.within(distance, window) for source, distance in sources]
        return dot_product_attention(query, seen, c.scale, c.softcap)
