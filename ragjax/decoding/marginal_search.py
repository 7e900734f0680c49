"""One beam search a question, on the marginal: each prefix has its log p(s|x,z) under all documents that were read.

    P(v|s) = Σ_z p(z|x,s) · p(v|x,z,s)    RAG-Sequence: the documents' posterior after the prefix
    P(v|s) = Σ_z p(z|x) · p(v|x,z,s)      RAG-Token: their prior (Lewis et al. 2020)

An answer that ends has its exact marginal; nothing is scored again.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from ragjax.decoding.beam_search import Beams, BeamSettings, Bound, NextLogp, beam_search, first_bound
from ragjax.decoding.prefix_cache import PrefixCache, beam_step, empty_prefix_cache
from ragjax.marginal import log_posterior, marginal_logp
from ragjax.models.generator import Generator, SpecialTokens, join_ends
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.parallel.by_device import by_device


@struct.dataclass
class MarginalCache:
    """The prefixes read under each of B·K memories, and how likely they are there."""

    prefixes: PrefixCache
    logp: Float[Array, "n E"]  # log p(s|x,z) of the prefix in each slot
    end_logp: Float[Array, "n E"]  # log p(y|x,z) of the answer that ends after it
    documents: int = struct.field(pytree_node=False)  # K

    def take(self, rows: Int[Array, " R"]) -> MarginalCache:
        """What belongs to some questions."""
        of = document_rows(rows, self.documents)
        return MarginalCache(self.prefixes.take(of), self.logp[of], self.end_logp[of], self.documents)

    def put(self, rows: Int[Array, " R"], part: MarginalCache) -> MarginalCache:
        """With what belongs to some questions; the others read nothing meanwhile."""
        of = document_rows(rows, self.documents)
        logp, end_logp = self.logp.at[of].set(part.logp), self.end_logp.at[of].set(part.end_logp)
        return MarginalCache(self.prefixes.put(of, part.prefixes), logp, end_logp, self.documents)


def document_rows(questions: Int[Array, " R"], documents: int) -> Int[Array, " n"]:
    """The rows of the K documents of some questions, question-major."""
    return (questions[:, None] * documents + jnp.arange(documents)).reshape(-1)


@struct.dataclass
class MarginalSearch:
    """What a search on the marginal found for B questions; on the device, or fetched from it."""

    beams: Beams
    doc_logp: Float[Array | np.ndarray, "B K C"]  # log p(y|x,z) of the finished answers
    bound: Bound


@partial(jax.jit, static_argnums=(0, 7, 8, 9))
def search_marginal(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    rows: Int[Array, "B K"],
    log_prior: Float[Array, "B K"],
    rest: Float[Array, " B"],
    floor: Float[Array, " B"],
    settings: BeamSettings,
    special: SpecialTokens,
    by_token: bool,
) -> MarginalSearch:
    """Searches B questions, each of whose K documents is a row of `memory`, for the likeliest answer, with its proof.

    A pure function of whole questions, whose rows lie on the question's device and are counted there. A question whose
    prior is −inf everywhere is not searched; `rest` and `floor` are those of `Bound`. `by_token` stands for RAG-Token.
    """

    def search(
        params: Params, memory: DocumentMemory, rows: Array, log_prior: Array, rest: Array, floor: Array
    ) -> MarginalSearch:
        memory, before = memory.take(rows.reshape(-1)), first_bound(rest, floor)
        beams, cache, bound = _search(graph, params, memory, log_prior, settings, special, by_token, before)
        assert bound is not None
        end_logp = cache.end_logp.reshape(*rows.shape, -1)
        doc_logp = jax.vmap(lambda logp, slots: logp[:, slots])(end_logp, jnp.asarray(beams.slot))
        return MarginalSearch(beams, doc_logp, bound)

    return by_device(search, params, memory, rows, log_prior, rest, floor)


@partial(jax.jit, static_argnums=(0, 4, 5))
def search_rag_token(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    log_prior: Float[Array, "B K"],
    settings: BeamSettings,
    special: SpecialTokens,
) -> tuple[Beams, PrefixCache]:
    """RAG-Token's beam search of B questions without a proof, and the prefixes read under each of the B·K memories."""

    def search(params: Params, memory: DocumentMemory, log_prior: Array) -> tuple[Beams, PrefixCache]:
        beams, cache, _ = _search(graph, params, memory, log_prior, settings, special, True, None)
        return beams, cache.prefixes.closed()

    return by_device(search, params, memory, log_prior)


def _search(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    log_prior: Float[Array, "B K"],
    settings: BeamSettings,
    special: SpecialTokens,
    by_token: bool,
    bound: Bound | None,
) -> tuple[Beams, MarginalCache, Bound | None]:
    generator, documents = nnx.merge(graph, params), log_prior.shape[1]
    prefixes = empty_prefix_cache(generator, memory, settings.max_new_tokens * settings.num_beams)
    nothing = jnp.zeros(prefixes.tokens.shape, jnp.float32)
    cache = MarginalCache(prefixes, nothing, nothing, documents)

    def for_rows(rows: Int[Array, " R"]) -> NextLogp:
        of = memory.take(document_rows(rows, documents))
        return _next_logp(generator, of, log_prior[rows], special, by_token)

    whole = _next_logp(generator, memory, log_prior, special, by_token)
    mass = marginal_logp(
        log_prior, jnp.zeros_like(log_prior)
    )  # of the documents read, the marginal of the empty prefix
    if by_token:
        mass = jnp.where(mass > -jnp.inf, 0.0, mass)
    return beam_search(whole, cache, memory.start[::documents], settings, for_rows, mass, bound)


def _next_logp(
    generator: Generator,
    memory: DocumentMemory,
    log_prior: Float[Array, "B K"],
    special: SpecialTokens,
    by_token: bool,
) -> NextLogp:
    """One step of all beams under all documents, summed over these."""
    questions, documents = log_prior.shape

    def step(tokens: Array, number: Array, mask: Array, cache: MarginalCache) -> tuple[Array, MarginalCache]:
        rows, masks = (jnp.repeat(x, documents, axis=0) for x in (tokens, mask))
        rows = jnp.where(number == 0, memory.start[:, None], rows)  # a prompt's last token: every document has its own
        following, prefixes = beam_step(generator, memory, cache.prefixes, rows, number, masks)
        following = join_ends(following, special)
        first = cache.prefixes.past.filled
        logp = jnp.where(number == 0, 0.0, _prefix_logp(generator, cache, prefixes, rows))

        def write(into: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(into, new, (0, first))

        cache = MarginalCache(
            prefixes, write(cache.logp, logp), write(cache.end_logp, logp + following[..., special.eos]), documents
        )
        weights = log_prior if by_token else log_posterior(log_prior, logp.reshape(questions, documents, -1))
        return marginal_logp(weights, following.reshape(questions, documents, *following.shape[1:])), cache

    return step


def _prefix_logp(
    generator: Generator, cache: MarginalCache, prefixes: PrefixCache, tokens: Int[Array, "n W"]
) -> Float[Array, "n W"]:
    """log p(s|x,z) of the newest prefixes: that of their parents, and of the last token after these.

    A beam's token is never one that ends an answer.
    """
    width, first = tokens.shape[1], cache.prefixes.past.filled
    parent = jax.lax.dynamic_slice_in_dim(prefixes.parent, first, width, axis=1)
    states = jnp.take_along_axis(prefixes.hidden, parent[..., None], axis=1)
    logits = generator.vocab_head().target_logits(states, tokens)
    before, logsumexp = (jnp.take_along_axis(x, parent, axis=1) for x in (cache.logp, prefixes.logsumexp))
    return before + logits - logsumexp
