"""A generator made of tables, small enough that every answer can be enumerated: the oracle of exact decoding.

Under each document a table says what follows each prefix. Answers are sequences of WORDS that EOS ends within T tokens,
so that there is one for each node of a tree: the root is node 0, and word i leads from a node to 3 · node + 1 + i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float
from reference import log_softmax

from ragjax.models.generator import SpecialTokens
from ragjax.models.kv_cache import DocumentMemory, KVCache
from ragjax.models.layers import Params, split_parameters
from ragjax.models.vocab_head import VocabHead

V, T, EOS = 4, 4, 1
WORDS = (0, 2, 3)
Rows = dict[tuple[int, ...], dict[int, float]]  # the probabilities of what follows some prefixes
NODES = (3**T - 1) // 2
SPECIAL = SpecialTokens(eos=EOS, pad=0)
LEAST = -60.0  # the log-probability that stands for impossible: logits are finite


@dataclass(frozen=True)
class TableConfig:
    """What decoding wants to know of a generator."""

    hidden_size: int = V
    dtype: str = "float32"


class TableGenerator(nnx.Module):
    """`ragjax.models.generator.Generator`: a source's first token is the number of its table.

    A prefix is put together from the slots that the mask shows: a wrong one gives NaN or another distribution.
    """

    config = TableConfig()

    def __init__(self, tables: Float[Array, "N nodes V"]):
        self.tables = nnx.Param(tables)

    def prefill(self, source: Array, mask: Array, dropout_rngs: Any = None, remat: bool = False) -> DocumentMemory:
        nothing = jnp.zeros((1, len(source), 1, 1, 1))
        start = jnp.zeros(len(source), jnp.int32)
        return DocumentMemory(nothing, nothing, mask[:, :1], source[:, 0], start)

    def forward_with_cache(
        self,
        memory: DocumentMemory,
        past: KVCache | None,
        tokens: Array,
        positions: Array,
        attention_mask: Array,
        dropout_rngs: Any = None,
        remat: bool = False,
    ) -> tuple[Array, KVCache | None]:
        positions = jnp.broadcast_to(positions, tokens.shape)
        if past is None:
            before, places = tokens[:, :, None], positions[:, :, None]
        else:
            keys = tokens[..., None, None].astype(jnp.float32)
            past = past.place(positions).write(jnp.zeros((), jnp.int32), keys, keys).advance(tokens[0].size)
            before = past.keys[0, :, None, None, :, 0, 0].astype(jnp.int32)
            places = past.positions[:, None, None]
        ahead = jnp.clip(positions[..., None] - places, 0, T)
        digits = (before - (before > EOS)) * 3**ahead
        code = jnp.where(attention_mask & (places > 0), digits, 0).sum(axis=-1)
        proper = jnp.broadcast_to(attention_mask, (*tokens.shape, before.shape[-1])).sum(axis=-1) == positions + 1
        logp = self.tables[...][memory.offset[:, None, None], (3**positions - 1) // 2 + code]
        return jnp.where(proper[..., None], logp, jnp.nan), past

    def vocab_head(self) -> VocabHead:
        return VocabHead(jnp.eye(V))


def table_generator(tables: Float[np.ndarray, "*n nodes V"]) -> tuple[nnx.GraphDef, Params]:
    """As decoding takes a generator; the number of a table is that of its row."""
    return split_parameters(TableGenerator(jnp.asarray(tables.reshape(-1, *tables.shape[-2:]))))


def random_tables(rng: np.random.Generator, cases: int, documents: int) -> Float[np.ndarray, "B K nodes V"]:
    """Flat and sharp ones, documents that agree or do not, ties and near-ties."""
    shape = (cases, documents, NODES, V)

    def one_of(*values: float) -> np.ndarray:
        return rng.choice(values, size=(cases, 1, 1, 1))

    logits = rng.normal(size=shape) * one_of(0.3, 1.0, 3.0, 8.0)
    together = rng.normal(size=(cases, 1, NODES, V)) * one_of(0.0, 2.0, 6.0)
    logits = logits * one_of(0.0, 0.3, 1.0) + together
    ends = np.arange(V) == EOS
    logits = logits + ends * one_of(-4.0, -1.0, 0.0, 2.0)
    whole = rng.random((cases, 1, 1, 1)) < 0.2  # whole numbers tie
    logits = np.where(whole, np.round(logits / 2) * 2, logits)
    twins = rng.random((cases, 1, 1)) < 0.2  # the words 2 and 3 lead to the same, or nearly
    near = rng.choice([0.0, 0.0, 2e-4, 2e-3], size=(cases, 1, 1))
    logits[..., 3] = np.where(twins, logits[..., 2] - near, logits[..., 3])
    for depth in range(T - 1):
        for node in range((3**depth - 1) // 2, (3 ** (depth + 1) - 1) // 2):
            subtree(logits, 3 * node + 2, 3 * node + 3, depth + 1, twins)
    return np.maximum(log_softmax(logits), LEAST).astype(np.float32)


def subtree(logits: np.ndarray, of: int, to: int, depth: int, where: np.ndarray) -> None:
    """Copies what follows one node to another, in the cases `where` says."""
    logits[:, :, to] = np.where(where, logits[:, :, of], logits[:, :, to])
    if depth < T - 1:
        for i in range(3):
            subtree(logits, 3 * of + 1 + i, 3 * to + 1 + i, depth + 1, where)


def table(rows: Rows) -> Float[np.ndarray, "nodes V"]:
    """A table written out: the probabilities after each prefix; after one that is not given, the end is certain."""
    found = np.full((NODES, V), LEAST, np.float32)
    found[:, EOS] = 0.0
    for prefix, after in rows.items():
        found[node_of(prefix)] = [max(float(np.log(after[v])), LEAST) if after.get(v) else LEAST for v in range(V)]
    return found


def node_of(prefix: tuple[int, ...]) -> int:
    """The node of a prefix, and so of the answer that ends there."""
    node = 0
    for token in prefix:
        node = 3 * node + 1 + WORDS.index(token)
    return node


def prefix_logp(tables: Float[np.ndarray, "*n nodes V"]) -> Float[np.ndarray, "*n nodes"]:
    """log p of every prefix, in float64."""
    logp = np.zeros(tables.shape[:-1])
    for node in range((3 ** (T - 1) - 1) // 2):
        for i, word in enumerate(WORDS):
            logp[..., 3 * node + 1 + i] = logp[..., node] + tables[..., node, word]
    return logp


def answer_logp(tables: Float[np.ndarray, "*n nodes V"]) -> Float[np.ndarray, "*n nodes"]:
    """log p of every answer: that the end follows the prefix of its node."""
    return prefix_logp(tables) + tables[..., EOS]


def marginals(
    log_prior: Float[np.ndarray, "B K"], tables: Float[np.ndarray, "B K nodes V"], by_token: bool
) -> Float[np.ndarray, "B nodes"]:
    """log p(y|x) of every answer: RAG-Sequence's, or, `by_token`, RAG-Token's."""
    prior = log_prior.astype(np.float64)
    if by_token:
        return answer_logp(np.logaddexp.reduce(prior[..., None, None] + tables, axis=1))
    return np.logaddexp.reduce(prior[..., None] + answer_logp(tables), axis=1)
