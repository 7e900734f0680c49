"""The one interface that decoding and training know of a generator, and what follows from it for every family.

A document is read once, by `prefill`; all that is ever generated or scored after it shares that memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ragjax.models.kv_cache import DocumentMemory, KVCache
from ragjax.models.layers import RowRngs


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
    """Families: `llama.py`, `bart.py`, `t5.py`. Positions count from the start token, which is 0."""

    config: Any

    def prefill(
        self, source: Int[Array, "n S"], mask: Bool[Array, "n S"], keys: RowRngs | None = None, remat: bool = False
    ) -> DocumentMemory:
        """Reads right-padded sources [n,S]."""
        ...

    def forward_with_cache(
        self,
        memory: DocumentMemory,
        past: KVCache | None,
        tokens: Int[Array, "n G M"],
        positions: Int[Array, "#n #G M"],
        visible: Bool[Array, "#n #G M P"],
        keys: RowRngs | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "n G M D"], KVCache | None]:
        """G groups of M tokens after each memory.

        Without a past a token sees, of its own group, what `visible` [n|1,G|1,M,M] says. With one, the new tokens
        are written to the next G·M slots of the pool, and `visible` [n,G,M,P] says which slots each sees.
        """
        ...

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits."""
        ...

    def vocab_logsumexp(self, hidden: Float[Array, "... D"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The logsumexp of the logits and their mean over the vocabulary, never all of them at once."""
        ...

    def target_logits(self, hidden: Float[Array, "... D"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
        """The logits of the targets alone."""
        ...


def token_logp(
    generator: Generator, hidden: Float[Array, "... D"], targets: Int[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Log-probability of each target and the mean over the vocabulary, in nats."""
    normalizer, mean = generator.vocab_logsumexp(hidden)
    return generator.target_logits(hidden, targets) - normalizer, mean - normalizer


def join_ends(logp: Float[Array, "*n V"], special: SpecialTokens) -> Float[Array, "*n V"]:
    """Log-probabilities of what follows, the end one event: `special.eos` has the sum of all ends, the others none."""
    if not special.other_ends:
        return logp
    together = jax.nn.logsumexp(logp[..., jnp.array([special.eos, *special.other_ends])], axis=-1, keepdims=True)
    token = jnp.arange(logp.shape[-1])
    without = jnp.where(jnp.isin(token, jnp.array(special.other_ends)), -jnp.inf, logp)
    return jnp.where(token == special.eos, together, without)


def event_logits(
    generator: Generator, hidden: Float[Array, "*n D"], targets: Int[Array, "*n"], special: SpecialTokens
) -> Float[Array, "*n"]:
    """The logits of the targets; where one is `special.eos`, the logsumexp of those of all ends."""
    logits = generator.target_logits(hidden, targets)
    if not special.other_ends:
        return logits
    others = [generator.target_logits(hidden, jnp.full_like(targets, other)) for other in special.other_ends]
    together = jax.nn.logsumexp(jnp.stack([logits, *others]), axis=0)
    return jnp.where(targets == special.eos, together, logits)


def score(
    generator: Generator,
    memory: DocumentMemory,
    answers: Int[Array, "n C T"],
    keys: RowRngs | None = None,
    remat: bool = False,
) -> Float[Array, "n C T"]:
    """log p(answers[t] | answers[<t], x, z) for C answers that share each memory; callers mask padding and sum."""
    return token_logp(generator, answer_hidden(generator, memory, answers, keys, remat), answers)[0]


def answer_hidden(
    generator: Generator,
    memory: DocumentMemory,
    answers: Int[Array, "n C T"],
    keys: RowRngs | None = None,
    remat: bool = False,
) -> Float[Array, "n C T D"]:
    """The states from which each answer token is predicted, its predecessors given."""
    n, count, length = answers.shape
    start = jnp.broadcast_to(memory.start[:, None, None], (n, count, 1))
    inputs = jnp.concatenate([start, answers[:, :, :-1]], axis=-1)
    causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
    return generator.forward_with_cache(memory, None, inputs, jnp.arange(length)[None, None], causal, keys, remat)[0]


def next_logp(
    generator: Generator,
    memory: DocumentMemory,
    past: KVCache,
    tokens: Int[Array, "n W"],
    step: Int[Array, ""],
    visible: Bool[Array, "n W P"],
) -> tuple[Float[Array, "n W V"], KVCache]:
    """One step of W beams: log-probabilities of the token after `tokens`, which stand at position `step`."""
    positions = jnp.broadcast_to(step, (1, tokens.shape[1], 1))
    hidden, past_after = generator.forward_with_cache(
        memory, past, tokens[:, :, None], positions, visible[:, :, None, :]
    )
    assert past_after is not None
    return jax.nn.log_softmax(generator.logits(hidden[:, :, 0]), axis=-1), past_after
