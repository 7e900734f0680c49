"""Stage 2: documents are read once, and a beam search under each proposes candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from ragjax.config import Decode
from ragjax.decoding.beam_search import Beams, BeamSettings, NextLogp, beam_search
from ragjax.decoding.prefix_cache import PrefixCache, beam_step, empty_prefix_cache
from ragjax.models.generator import SpecialTokens, join_ends
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.parallel.by_device import by_device, split_heads


@partial(jax.jit, static_argnums=(0, 4))
def prefill_documents(
    graph: nnx.GraphDef,
    params: Params,
    source: Int[Array, "n S"],
    mask: Bool[Array, "n S"],
    width: int | None = None,
) -> DocumentMemory:
    """Each of n right-padded prompts read once; `params` are the generator's.

    With a `width` only so many of the S tokens are read: no prompt may be longer. The memory has room for S all the
    same, so that the programs that use it do not depend on it.
    """

    def read(params: Params, source: Array, mask: Array) -> DocumentMemory:
        memory = nnx.merge(graph, params).prefill(source[:, :width], mask[:, :width]).widen(source.shape[1])
        return replace(memory, keys=split_heads(memory.keys), values=split_heads(memory.values))

    return by_device(read, params, source, mask)


@jax.jit
def join_memories(parts: Sequence[DocumentMemory], place: Int[Array, " n"]) -> DocumentMemory:
    """The memories of several reads as one on one device: row i is row `place[i]` of all of them, in turn."""
    join = lambda *leaves: jnp.concatenate(leaves, axis=1 if leaves[0].ndim == 5 else 0)  # noqa: E731
    return jax.tree.map(join, *parts).take(place)


@partial(jax.jit, static_argnums=(0, 3, 4))
def beam_search_documents(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    settings: BeamSettings,
    special: SpecialTokens,
) -> tuple[Beams, PrefixCache]:
    """Beam search under each of n documents, all at once in one program; and the prefixes that it read.

    A score is log p(y|x,z) in nats.
    """

    def search(params: Params, memory: DocumentMemory) -> tuple[Beams, PrefixCache]:
        generator = nnx.merge(graph, params)

        def next_logp(memory: DocumentMemory) -> NextLogp:
            def step(tokens: Array, number: Array, mask: Array, prefixes: PrefixCache) -> tuple[Array, PrefixCache]:
                logp, prefixes = beam_step(generator, memory, prefixes, tokens, number, mask)
                return join_ends(logp, special), prefixes

            return step

        cache = empty_prefix_cache(generator, memory, settings.max_new_tokens * settings.num_beams)
        for_rows = lambda rows: next_logp(memory.take(rows))  # noqa: E731
        beams, cache, _ = beam_search(next_logp(memory), cache, memory.start, settings, for_rows)
        return beams, cache.closed()

    return by_device(search, params, memory)


def beam_settings(settings: Decode, special: SpecialTokens, hugging_face: bool) -> BeamSettings:
    """What the configuration and the checkpoint's special tokens say of a beam search.

    `hugging_face` repeats transformers' beam search to the letter.
    """
    return BeamSettings(
        num_beams=settings.num_beams,
        max_new_tokens=settings.max_new_tokens,
        eos=special.eos,
        pad=special.pad,
        min_new_tokens=settings.min_new_tokens,
        length_penalty=settings.length_penalty,
        early_stopping=settings.early_stopping,
        forced_bos=special.forced_bos,
        forced_eos=special.forced_eos,
        hugging_face=hugging_face,
    )
