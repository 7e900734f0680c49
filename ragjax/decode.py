"""RAG-Sequence decoding: beam search per document, then the marginal of every candidate, then arg max.

Each document is read once (`read`). Its memory serves the beam search that proposes candidates and, in thorough
decoding, the one padded pass that scores every distinct candidate of a question under all its K documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.beam import Beams, beam_search
from ragjax.config import Decode
from ragjax.marginal import fast_marginal, posterior, thorough_marginal
from ragjax.models.generator import Ending, Memory, Past, empty_past, next_logp, score
from ragjax.models.layers import Params

Answer = tuple[tuple[int, ...], bool]  # its tokens without the end token, and whether it was finished


@dataclass(frozen=True)
class Candidates:
    """What the K documents of one question proposed, C distinct answers, and what each is worth (nats)."""

    tokens: list[tuple[int, ...]]  # without the end token
    finished: Bool[np.ndarray, " C"]
    proposed: Float[np.ndarray, "K C"]  # log p(y|x,z) by the beam search; −inf where z did not propose y
    fast: Float[np.ndarray, " C"]  # log p(y|x), other documents contributing 0
    scored: Float[np.ndarray, "K C"] | None = None  # log p(y|x,z) under every document
    thorough: Float[np.ndarray, " C"] | None = None
    posterior: Float[np.ndarray, "K C"] | None = None  # p(z|x,y), from `scored`

    def marginal(self, mode: str) -> Float[np.ndarray, " C"]:
        """log p(y|x) of every candidate, `thorough` or `fast`."""
        marginal = self.thorough if mode == "thorough" else self.fast
        assert marginal is not None, "these candidates were not scored under every document"
        return marginal

    def best(self, mode: str, count: int = 1) -> list[int]:
        """The best candidates; an unfinished one only where no finished one is left. The first proposed wins ties."""
        order = np.lexsort((-self.marginal(mode), ~self.finished))
        return [int(i) for i in order[:count]]


@partial(jax.jit, static_argnums=0)
def read(graph: nnx.GraphDef, params: Params, source: Int[Array, "n S"], mask: Bool[Array, "n S"]) -> Memory:
    """The memory of n right-padded prompts; `params` are the generator's."""
    return nnx.merge(graph, params).prefill(source, mask)


@partial(jax.jit, static_argnums=(0, 3, 4))
def propose(graph: nnx.GraphDef, params: Params, memory: Memory, settings: Decode, ending: Ending) -> Beams:
    """Beam search under every document at once, in one program."""
    generator = nnx.merge(graph, params)

    def step(tokens: Array, number: Array, visible: Array, past: Past) -> tuple[Array, Past]:
        return next_logp(generator, memory, past, tokens, number, visible)

    return beam_search(
        step,
        empty_past(memory, settings.max_new_tokens * settings.beams),
        memory.start,
        beams=settings.beams,
        max_new_tokens=settings.max_new_tokens,
        eos=ending.eos,
        pad=ending.pad,
        min_new_tokens=settings.min_new_tokens,
        length_penalty=settings.length_penalty,
    )


@partial(jax.jit, static_argnums=0)
def score_answers(
    graph: nnx.GraphDef,
    params: Params,
    memory: Memory,
    answers: Int[Array, "B C T"],
    lengths: Int[Array, "B C"],
) -> Float[Array, "B K C"]:
    """log p(y|x,z) of C answers a question under all K documents, in one padded pass over B·K memories."""
    questions, count, longest = answers.shape
    documents = memory.start.shape[0] // questions
    rows = jnp.repeat(answers, documents, axis=0)
    logp = score(nnx.merge(graph, params), memory, rows).reshape(questions, documents, count, longest)
    counts = jnp.arange(longest) < lengths[:, None, :, None]
    return jnp.where(counts, logp, 0.0).sum(axis=-1)


def decode(
    graph: nnx.GraphDef,
    params: Params,
    memory: Memory,
    log_prior: Float[np.ndarray, "B K"],
    settings: Decode,
    ending: Ending,
) -> list[Candidates]:
    """Candidates of B questions whose B·K documents are in `memory`, question-major.

    With `settings.mode` `thorough` both marginals are there, from one beam search; with `fast`, only the fast one.
    Documents whose prior is −inf propose nothing.
    """
    beams = jax.device_get(propose(graph, params, memory, settings, ending))
    documents = log_prior.shape[1]
    found = [_distinct(beams, b * documents, prior) for b, prior in enumerate(log_prior)]
    answers, lengths = pad_answers([list(of) for of in found], ending, settings.max_new_tokens)
    proposed = np.full((len(found), documents, answers.shape[1]), -np.inf, np.float32)
    for b, of_question in enumerate(found):
        for c, by_document in enumerate(of_question.values()):
            for document, logp in by_document.items():
                proposed[b, document, c] = logp
    fast = np.asarray(_fast(log_prior, proposed))
    scored = thorough = responsibility = None
    if settings.mode == "thorough":
        scored = np.asarray(score_answers(graph, params, memory, answers, lengths))
        thorough, responsibility = (np.asarray(x) for x in _thorough(log_prior, scored))
    return [
        Candidates(
            tokens=[tokens for tokens, _ in of_question],
            finished=np.array([ends for _, ends in of_question], bool),
            proposed=proposed[b, :, : len(of_question)],
            fast=fast[b, : len(of_question)],
            scored=None if scored is None else scored[b, :, : len(of_question)],
            thorough=None if thorough is None else thorough[b, : len(of_question)],
            posterior=None if responsibility is None else responsibility[b, :, : len(of_question)],
        )
        for b, of_question in enumerate(found)
    ]


def pad_answers(
    answers: Sequence[Sequence[Answer]], ending: Ending, longest: int
) -> tuple[Int[np.ndarray, "B C T"], Int[np.ndarray, "B C"]]:
    """Answers with their end tokens, C padded to 1, 2, 3, 4, 6, 8, 12, 16, …, T to a quarter, half or all of `longest`.

    Few shapes, so that few programs are compiled; padding every question to K·W would undo deduplication.
    """
    rows = [[(*tokens, ending.eos) if ends else tokens for tokens, ends in of_question] for of_question in answers]
    most = max([1, *map(len, rows)])
    power = 1 << (most - 1).bit_length()
    width = power * 3 // 4 if most <= power * 3 // 4 else power
    needed = max((len(y) for of_question in rows for y in of_question), default=1)
    depth = next(size for size in (-(-longest // 4), -(-longest // 2), longest, needed) if size >= needed)
    tokens = np.full((len(rows), width, depth), ending.pad, np.int32)
    lengths = np.zeros((len(rows), width), np.int32)
    for b, of_question in enumerate(rows):
        for c, y in enumerate(of_question):
            tokens[b, c, : len(y)] = y
            lengths[b, c] = len(y)
    return tokens, lengths


def _distinct(beams: Beams, first_row: int, log_prior: Float[np.ndarray, " K"]) -> dict[Answer, dict[int, float]]:
    """The distinct answers of one question in the order proposed, and for each: document → log p(y|x,z)."""
    found: dict[Answer, dict[int, float]] = {}
    for document in np.flatnonzero(log_prior > -np.inf):
        row = first_row + document
        for beam in np.flatnonzero(beams.logp[row] > -np.inf):
            ends = bool(beams.finished[row, beam])
            tokens = tuple(int(t) for t in beams.tokens[row, beam, : beams.length[row, beam] - ends])
            found.setdefault((tokens, ends), {})[int(document)] = float(beams.logp[row, beam])
    return found or {((), False): {}}  # without any document there is only the empty answer, of probability 0


@jax.jit
def _fast(log_prior: Array, proposed: Array) -> Array:
    return fast_marginal(log_prior, proposed, proposed > -jnp.inf)


@jax.jit
def _thorough(log_prior: Array, scored: Array) -> tuple[Array, Array]:
    return thorough_marginal(log_prior, scored), posterior(log_prior, scored)
