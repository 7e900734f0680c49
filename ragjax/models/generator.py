"""The one interface that decoding and training know of a generator, and what follows from it for every family.

A document is read once, by `prefill`; all that is ever generated or scored after it shares that memory:

    log p(y|x,z) = Σ_t log softmax(vocab_head(forward_with_cache(memory(x,z), y_<t)))[y_t]

A new family is one file in `generators/`, its rows in `checkpoints/name_tables.py`, and its tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ragjax.models.kv_cache import DocumentMemory, KVCache
from ragjax.models.layers import RowRngs
from ragjax.models.vocab_head import VocabHead


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that end an answer, pad it, and that a checkpoint wants at its start and at the length limit.

    Where several `ends` end an answer, the end is one event, whose probability is the sum of theirs; `eos` stands for
    it in an answer's tokens, and is what training teaches.
    """

    eos: int  # the tokenizer's own
    pad: int
    bos: int | None = None
    forced_bos: int | None = None  # BART's and T5's `forced_bos_token_id`
    forced_eos: int | None = None
    ends: tuple[int, ...] = ()  # all that end an answer, `eos` among them or not

    @property
    def other_ends(self) -> tuple[int, ...]:
        """What ends an answer besides `eos`."""
        return tuple(sorted({*self.ends} - {self.eos}))


@runtime_checkable
class Generator(Protocol):
    """Families: `llama.py`, `gemma.py`, `bart.py`, `t5.py`. Positions count from the start token, which is 0."""

    config: Any

    def prefill(
        self,
        source: Int[Array, "n S"],
        mask: Bool[Array, "n S"],
        dropout_rngs: RowRngs | None = None,
        remat: bool = False,
    ) -> DocumentMemory:
        """Reads right-padded sources. Dropout acts where one PRNG key a row is given; for `remat` see `scan_layers`."""
        ...

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
        """The states after G groups of M tokens that follow each memory, and the pool that holds these tokens, too.

        Without a past a token sees, of its own group, what `attention_mask` [n|1,G|1,M,M] says. With one, the new
        tokens are written to the next G·M slots of the pool, and `attention_mask` [n,G,M,E] says which slots each sees.
        """
        ...

    def vocab_head(self) -> VocabHead:
        """What turns states into logits."""
        ...


def token_logp(
    generator: Generator, hidden: Float[Array, "... D"], targets: Int[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Log-probability of each target and the mean over the vocabulary, in nats."""
    head = generator.vocab_head()
    logsumexp, mean = head.logsumexp_and_mean(hidden)
    return head.target_logits(hidden, targets) - logsumexp, mean - logsumexp


def join_ends(logp: Float[Array, "*n V"], special: SpecialTokens) -> Float[Array, "*n V"]:
    """Log-probabilities of what follows, the end one event: `special.eos` has the sum of all ends, the others none."""
    if not special.other_ends:
        return logp
    together = jax.nn.logsumexp(logp[..., jnp.array([special.eos, *special.other_ends])], axis=-1, keepdims=True)
    token = jnp.arange(logp.shape[-1])
    without = jnp.where(jnp.isin(token, jnp.array(special.other_ends)), -jnp.inf, logp)
    return jnp.where(token == special.eos, together, without)


def event_logits(
    head: VocabHead, hidden: Float[Array, "*n D"], targets: Int[Array, "*n"], special: SpecialTokens
) -> Float[Array, "*n"]:
    """The logits of the targets; where one is `special.eos`, the logsumexp of those of all ends."""
    logits = head.target_logits(hidden, targets)
    if not special.other_ends:
        return logits
    others = [head.target_logits(hidden, jnp.full_like(targets, other)) for other in special.other_ends]
    together = jax.nn.logsumexp(jnp.stack([logits, *others]), axis=0)
    return jnp.where(targets == special.eos, together, logits)


def score(
    generator: Generator,
    memory: DocumentMemory,
    answers: Int[Array, "n C T"],
    dropout_rngs: RowRngs | None = None,
    remat: bool = False,
) -> Float[Array, "n C T"]:
    """log p(answers[t] | answers[<t], x, z) of C answers that share each memory; callers mask padding and sum."""
    return token_logp(generator, answer_hidden(generator, memory, answers, dropout_rngs, remat), answers)[0]


def answer_hidden(
    generator: Generator,
    memory: DocumentMemory,
    answers: Int[Array, "n C T"],
    dropout_rngs: RowRngs | None = None,
    remat: bool = False,
) -> Float[Array, "n C T D"]:
    """The states from which each answer token is predicted, its predecessors given."""
    n, count, length = answers.shape
    start = jnp.broadcast_to(memory.start[:, None, None], (n, count, 1))
    inputs = jnp.concatenate([start, answers[:, :, :-1]], axis=-1)
    causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
    positions = jnp.arange(length)[None, None]
    return generator.forward_with_cache(memory, None, inputs, positions, causal, dropout_rngs, remat)[0]
