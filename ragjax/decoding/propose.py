"""Stage 2: documents are read once, and a beam search under each proposes candidates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.config import Decode
from ragjax.decoding.beam_search import Beams, NextLogp, beam_search
from ragjax.decoding.prefix_cache import PrefixCache, beam_step, empty_prefix_cache
from ragjax.marginal import marginal_logp
from ragjax.models.generator import SpecialTokens, join_ends
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params


@partial(jax.jit, static_argnums=0)
def prefill_documents(
    graph: nnx.GraphDef, params: Params, source: Int[Array, "n S"], mask: Bool[Array, "n S"]
) -> DocumentMemory:
    """The memory of n right-padded prompts; `params` are the generator's."""
    return nnx.merge(graph, params).prefill(source, mask)


@partial(jax.jit, static_argnums=(0, 3, 4, 5))
def beam_search_documents(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    settings: Decode,
    special: SpecialTokens,
    hugging_face: bool = False,
) -> tuple[Beams, PrefixCache]:
    """Beam search under every document at once, in one program, and what it read."""
    generator = nnx.merge(graph, params)

    def step_after(memory: DocumentMemory) -> NextLogp:
        def step(tokens: Array, number: Array, visible: Array, prefixes: PrefixCache) -> tuple[Array, PrefixCache]:
            logp, prefixes = beam_step(generator, memory, prefixes, tokens, number, visible)
            return join_ends(logp, special), prefixes

        return step

    nothing = empty_prefix_cache(generator, memory, settings.max_new_tokens * settings.beams)
    step, for_rows = step_after(memory), lambda rows: step_after(memory.take(rows))
    return _search(step, nothing, memory.start, settings, special, hugging_face, for_rows)


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def beam_search_marginal(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    log_prior: Float[Array, "B K"],
    settings: Decode,
    special: SpecialTokens,
    hugging_face: bool = False,
) -> tuple[Beams, PrefixCache]:
    """RAG-Token's beam search: B rows, each step's log-probabilities summed over the K documents; and what was read."""
    generator, (questions, documents) = nnx.merge(graph, params), log_prior.shape

    def step(tokens: Array, number: Array, visible: Array, prefixes: PrefixCache) -> tuple[Array, PrefixCache]:
        rows, seen = (jnp.repeat(x, documents, axis=0) for x in (tokens, visible))
        rows = jnp.where(number == 0, memory.start[:, None], rows)  # a prompt's last token: every document has its own
        logp, prefixes = beam_step(generator, memory, prefixes, rows, number, seen)
        logp = join_ends(logp, special).reshape(questions, documents, *logp.shape[1:])
        return marginal_logp(log_prior, logp), prefixes

    nothing = empty_prefix_cache(generator, memory, settings.max_new_tokens * settings.beams)
    return _search(step, nothing, memory.start[::documents], settings, special, hugging_face)


def _search(
    step: NextLogp,
    cache: Any,
    start: Array,
    settings: Decode,
    special: SpecialTokens,
    hugging_face: bool,
    for_rows: Callable[[Array], NextLogp] | None = None,
) -> tuple[Beams, Any]:
    return beam_search(
        step,
        cache,
        start,
        beams=settings.beams,
        max_new_tokens=settings.max_new_tokens,
        eos=special.eos,
        pad=special.pad,
        min_new_tokens=settings.min_new_tokens,
        length_penalty=settings.length_penalty,
        early_stopping=settings.early_stopping,
        forced_bos=special.forced_bos,
        forced_eos=special.forced_eos,
        hugging_face=hugging_face,
        for_rows=for_rows,
    )
