"""RAG-Sequence decoding: beam search per document, then the marginal of every candidate, then arg max.

Each document is read once (`read`). Its memory serves the beam search that proposes candidates and, in thorough
decoding, the one padded pass that scores every distinct candidate of a question under all its K documents.

RAG-Token decoding is one beam search a question, whose every step sums over the documents. And `RagSequenceFor-
Generation.generate` of transformers is here to the letter, for who must have its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ragjax.beam import Beams, NextLogp, beam_search
from ragjax.config import Decode
from ragjax.marginal import (
    fast_marginal,
    hugging_face_nll,
    marginal_logp,
    posterior,
    thorough_marginal,
    token_posterior,
)
from ragjax.models.generator import Memory, Past, SpecialTokens, empty_past, next_logp, score
from ragjax.models.layers import Params

Answer = tuple[tuple[int, ...], bool]  # its tokens without the end token, and whether it was finished


@dataclass(frozen=True)
class Candidates:
    """What the K documents of one question proposed, C distinct answers, and what each is worth (nats).

    A marginal that was not computed is None; with RAG-Token no document proposes alone, and `posterior` is the mean
    over the tokens.
    """

    tokens: list[tuple[int, ...]]  # without the end token
    finished: Bool[np.ndarray, " C"]
    proposed: Float[np.ndarray, "K C"]  # log p(y|x,z) by the beam search; −inf where z did not propose y
    fast: Float[np.ndarray, " C"] | None = None  # log p(y|x), other documents contributing 0
    scored: Float[np.ndarray, "K C"] | None = None  # log p(y|x,z) under every document
    thorough: Float[np.ndarray, " C"] | None = None
    posterior: Float[np.ndarray, "K C"] | None = None  # p(z|x,y), from `scored`
    ranked: bool = False  # the candidates stand in the order of choice

    def marginal(self, mode: str) -> Float[np.ndarray, " C"]:
        """log p(y|x) of every candidate, `thorough` or `fast`."""
        marginal = self.thorough if mode == "thorough" else self.fast
        assert marginal is not None, f"these candidates have no {mode} marginal"
        return marginal

    def best(self, mode: str, count: int = 1) -> list[int]:
        """The best candidates; an unfinished one only where no finished one is left. The first proposed wins ties."""
        if self.ranked:
            return list(range(min(count, len(self.tokens))))
        order = np.lexsort((-self.marginal(mode), ~self.finished))
        return [int(i) for i in order[:count]]


@partial(jax.jit, static_argnums=0)
def read(graph: nnx.GraphDef, params: Params, source: Int[Array, "n S"], mask: Bool[Array, "n S"]) -> Memory:
    """The memory of n right-padded prompts; `params` are the generator's."""
    return nnx.merge(graph, params).prefill(source, mask)


@partial(jax.jit, static_argnums=(0, 3, 4, 5))
def propose(
    graph: nnx.GraphDef,
    params: Params,
    memory: Memory,
    settings: Decode,
    special: SpecialTokens,
    hugging_face: bool = False,
) -> Beams:
    """Beam search under every document at once, in one program."""
    generator = nnx.merge(graph, params)

    def step(tokens: Array, number: Array, visible: Array, past: Past) -> tuple[Array, Past]:
        return next_logp(generator, memory, past, tokens, number, visible)

    return _search(step, memory, memory.start, settings, special, hugging_face)


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def propose_together(
    graph: nnx.GraphDef,
    params: Params,
    memory: Memory,
    log_prior: Float[Array, "B K"],
    settings: Decode,
    special: SpecialTokens,
    hugging_face: bool = False,
) -> Beams:
    """RAG-Token's beam search: B rows, each step's log-probabilities summed over the K documents."""
    generator, (questions, documents) = nnx.merge(graph, params), log_prior.shape

    def step(tokens: Array, number: Array, visible: Array, past: Past) -> tuple[Array, Past]:
        rows, seen = (jnp.repeat(x, documents, axis=0) for x in (tokens, visible))
        logp, past = next_logp(generator, memory, past, rows, number, seen)
        return marginal_logp(log_prior, logp.reshape(questions, documents, *logp.shape[1:])), past

    return _search(step, memory, memory.start[::documents], settings, special, hugging_face)


def _search(
    step: NextLogp, memory: Memory, start: Array, settings: Decode, special: SpecialTokens, hugging_face: bool
) -> Beams:
    return beam_search(
        step,
        empty_past(memory, settings.max_new_tokens * settings.beams),
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
    )


@partial(jax.jit, static_argnums=0)
def score_tokens(
    graph: nnx.GraphDef,
    params: Params,
    memory: Memory,
    answers: Int[Array, "B C T"],
    lengths: Int[Array, "B C"],
) -> Float[Array, "B K C T"]:
    """log p(y_t|y_<t,x,z) of C answers a question under all K documents, in one padded pass over B·K memories."""
    questions, count, longest = answers.shape
    documents = memory.start.shape[0] // questions
    rows = jnp.repeat(answers, documents, axis=0)
    logp = score(nnx.merge(graph, params), memory, rows).reshape(questions, documents, count, longest)
    return jnp.where(jnp.arange(longest) < lengths[:, None, :, None], logp, 0.0)


def decode(
    graph: nnx.GraphDef,
    params: Params,
    memory: Memory,
    log_prior: Float[np.ndarray, "B K"],
    settings: Decode,
    special: SpecialTokens,
) -> list[Candidates]:
    """Candidates of B questions whose B·K documents are in `memory`, question-major.

    With `settings.mode` `thorough` both marginals are there, from one beam search; with `fast`, only the fast one.
    Documents whose prior is −inf propose nothing.
    """
    beams = jax.device_get(propose(graph, params, memory, settings, special))
    documents = log_prior.shape[1]
    found = [_distinct(beams, b * documents, prior) for b, prior in enumerate(log_prior)]
    answers, lengths = pad_answers([list(of) for of in found], special, settings.max_new_tokens)
    proposed = np.full((len(found), documents, answers.shape[1]), -np.inf, np.float32)
    for b, of_question in enumerate(found):
        for c, by_document in enumerate(of_question.values()):
            for document, logp in by_document.items():
                proposed[b, document, c] = logp
    fast = np.asarray(_fast(log_prior, proposed))
    scored = thorough = responsibility = None
    if settings.mode == "thorough":
        scored = np.asarray(score_tokens(graph, params, memory, answers, lengths).sum(axis=-1))
        thorough, responsibility = (np.array(x) for x in _thorough(log_prior, scored))
        thorough[~(proposed > -np.inf).any(axis=1)] = -np.inf  # where nothing could be answered
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


def decode_together(
    graph: nnx.GraphDef,
    params: Params,
    memory: Memory,
    log_prior: Float[np.ndarray, "B K"],
    settings: Decode,
    special: SpecialTokens,
    hugging_face: bool = False,
) -> list[Candidates]:
    """RAG-Token: the beams of each question, best first, and what each is worth; `memory` as for `decode`."""
    prior = jnp.asarray(log_prior)
    beams = jax.device_get(propose_together(graph, params, memory, prior, settings, special, hugging_face))
    found = [list(_distinct(beams, b, np.zeros(1))) for b in range(len(log_prior))]
    answers, lengths = pad_answers(found, special, settings.max_new_tokens)
    tokens = score_tokens(graph, params, memory, answers, lengths)
    marginal, responsibility = (np.array(x) for x in _together(prior, tokens, lengths))
    marginal[lengths == 0] = -np.inf  # where nothing could be answered
    scored = np.asarray(tokens.sum(axis=-1))
    return [
        Candidates(
            tokens=[tokens for tokens, _ in of_question],
            finished=np.array([ends for _, ends in of_question], bool),
            proposed=np.full((log_prior.shape[1], len(of_question)), -np.inf, np.float32),
            scored=scored[b, :, : len(of_question)],
            thorough=marginal[b, : len(of_question)],
            posterior=responsibility[b, :, : len(of_question)],
            ranked=True,
        )
        for b, of_question in enumerate(found)
    ]


def decode_as_hugging_face(
    graph: nnx.GraphDef,
    params: Params,
    unmasked: Memory,
    memory: Memory,
    log_prior: Float[np.ndarray, "B M"],
    proposing: Bool[np.ndarray, "B K"],
    settings: Decode,
    special: SpecialTokens,
) -> list[Candidates]:
    """transformers' `RagSequenceForGeneration.generate`, to the letter, over the K documents of each question.

    The documents `proposing` are searched through `unmasked`, memories that were read without a mask, padding and all;
    the candidates are scored under the first M. A candidate is all that `generate` returns after the start token, and
    what fills it up counts unless it is the padding token. `thorough` is −NLL: above 0, even, where an answer of one
    token has lost its prior.
    """
    beams = jax.device_get(propose(graph, params, unmasked, settings, special, True))
    documents, (questions, scoring) = proposing.shape[1], log_prior.shape
    found = [_as_returned(beams, b * documents, proposing[b], special) for b in range(questions)]
    count, longest = _few_sizes(max(map(len, found))), settings.max_new_tokens
    targets = np.full((questions, count, longest), special.pad, np.int32)
    for b, of_question in enumerate(found):
        for c, row in enumerate(of_question):
            targets[b, c, : len(row)] = row
    logp = score_tokens(graph, params, memory, targets, np.full((questions, count), longest, np.int32))[:, :scoring]
    logp = jnp.where((log_prior > -np.inf)[..., None, None], logp, -jnp.inf)  # documents that are not there
    first_is_bos = [special.bos is not None and all(row[0] == special.bos for row in rows) for rows in found]
    counted, excluded = jnp.asarray(targets != special.pad), np.array(first_is_bos)
    nll = np.array(hugging_face_nll(jnp.asarray(log_prior), logp, counted, jnp.asarray(excluded)))
    for b, of_question in enumerate(found):
        nll[b, [c for c, by in enumerate(of_question.values()) if not by]] = np.inf  # where nothing could be answered
    counts = counted & ~(excluded[:, None, None] & (np.arange(longest) == 0))
    scored = np.asarray(jnp.where(counts[:, None], logp, 0.0).sum(axis=-1))
    joint = np.asarray(posterior(jnp.asarray(log_prior), jnp.asarray(scored)))
    made = []
    for b, of_question in enumerate(found):
        order = np.argsort(nll[b, : len(of_question)], kind="stable")
        rows = [(row, of_question[row]) for row in (list(of_question)[c] for c in order)]
        made.append(
            Candidates(
                tokens=[tuple(takewhile(lambda token: token != special.eos, row)) for row, _ in rows],
                finished=np.array([special.eos in row for row, _ in rows], bool),
                proposed=np.array([[by.get(z, -np.inf) for _, by in rows] for z in range(documents)], np.float32),
                scored=_fill_up(scored[b][:, order], documents, -np.inf),
                thorough=-nll[b, order],
                posterior=_fill_up(joint[b][:, order], documents, 0.0),
                ranked=True,
            )
        )
    return made


def _as_returned(
    beams: Beams, first_row: int, proposing: Bool[np.ndarray, " K"], special: SpecialTokens
) -> dict[tuple[int, ...], dict[int, float]]:
    """Distinct rows as transformers returns them, and the beam's score for each document that proposed one.

    With one beam what follows the end token is padding; with more, if the padding token's id is 0, the end token.
    """
    rows = slice(first_row, first_row + len(proposing))
    there = (beams.logp[rows] > -np.inf) & proposing[:, None]
    width, fill = int(beams.length[rows][there].max(initial=1)), special.pad
    if beams.tokens.shape[1] > 1:
        fill = special.pad or special.eos
    found: dict[tuple[int, ...], dict[int, float]] = {}
    for document, beam in np.argwhere(there):
        at = (first_row + document, beam)
        tokens = [int(t) for t in beams.tokens[at][: beams.length[at]]]
        row = (*tokens, *[fill] * (width - len(tokens)))
        found.setdefault(row, {})[int(document)] = float(beams.logp[at])
    return found or {(special.pad,): {}}  # without any document there is only the empty answer


def _fill_up(rows: np.ndarray, count: int, value: float) -> np.ndarray:
    """With rows of `value` for the documents that were not scored."""
    more = np.full((count - len(rows), *rows.shape[1:]), value, rows.dtype)
    return np.concatenate([rows, more])


def pad_answers(
    answers: Sequence[Sequence[Answer]], special: SpecialTokens, longest: int
) -> tuple[Int[np.ndarray, "B C T"], Int[np.ndarray, "B C"]]:
    """Answers with their end tokens, C padded to 1, 2, 3, 4, 6, 8, 12, 16, …, T to a quarter, half or all of `longest`.

    Few shapes, so that few programs are compiled; padding every question to K·W would undo deduplication.
    """
    rows = [[(*tokens, special.eos) if ends else tokens for tokens, ends in of_question] for of_question in answers]
    width = _few_sizes(max([1, *map(len, rows)]))
    needed = max((len(y) for of_question in rows for y in of_question), default=1)
    depth = next(size for size in (-(-longest // 4), -(-longest // 2), longest, needed) if size >= needed)
    tokens = np.full((len(rows), width, depth), special.pad, np.int32)
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


def _few_sizes(count: int) -> int:
    """1, 2, 3, 4, 6, 8, 12, 16, …"""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


@jax.jit
def _fast(log_prior: Array, proposed: Array) -> Array:
    return fast_marginal(log_prior, proposed, proposed > -jnp.inf)


@jax.jit
def _thorough(log_prior: Array, scored: Array) -> tuple[Array, Array]:
    return thorough_marginal(log_prior, scored), posterior(log_prior, scored)


@jax.jit
def _together(log_prior: Array, logp: Array, lengths: Array) -> tuple[Array, Array]:
    """RAG-Token's log p(y|x) [B,C], and the mean responsibility of each document [B,K,C]."""
    counts = jnp.arange(logp.shape[-1]) < lengths[..., None]
    marginal = jnp.where(counts, marginal_logp(log_prior, logp), 0.0).sum(axis=-1)
    return marginal, token_posterior(log_prior, logp, counts)
