"""RAG-Sequence decoding: beam search per document, then the marginal of every candidate, then arg max.

Each document is read once (`read`). Its memory serves the beam search that proposes candidates and, in thorough
decoding, the one padded pass that scores every distinct candidate of a question under all its K documents.

RAG-Token decoding is one beam search a question, whose every step sums over the documents. And `RagSequenceFor-
Generation.generate` of transformers is here to the letter, for who must have its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

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
from ragjax.models.generator import Memory, SpecialTokens, answer_hidden, event_logits, join_ends
from ragjax.models.layers import Params
from ragjax.prefixes import Known, Prefixes, Tokens, few_sizes, no_prefixes, read_step

Answer = tuple[Tokens, bool]  # its tokens without the end token, and whether it was finished
TIE = 1e-3  # nats: two marginals are the same for all that rounding can tell


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
    bounds: Float[np.ndarray, "2 C"] | None = None  # certified: log p(y|x), thorough, is at least and at most this
    needed: tuple[int, int] | None = None  # certified: the scores that were computed, of how many for thorough

    def marginal(self, mode: str) -> Float[np.ndarray, " C"]:
        """log p(y|x) of every candidate, `thorough` or `fast`, or what `certified` has proved it to be at least."""
        certified = None if self.bounds is None else self.bounds[0]
        marginal = {"thorough": self.thorough, "fast": self.fast, "certified": certified}[mode]
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
) -> tuple[Beams, Prefixes]:
    """Beam search under every document at once, in one program, and what it read."""
    generator = nnx.merge(graph, params)

    def step_after(memory: Memory) -> NextLogp:
        def step(tokens: Array, number: Array, visible: Array, prefixes: Prefixes) -> tuple[Array, Prefixes]:
            logp, prefixes = read_step(generator, memory, prefixes, tokens, number, visible)
            return join_ends(logp, special), prefixes

        return step

    nothing = no_prefixes(generator, memory, settings.max_new_tokens * settings.beams)
    step, for_rows = step_after(memory), lambda rows: step_after(memory.take(rows))
    return _search(step, nothing, memory.start, settings, special, hugging_face, for_rows)


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def propose_together(
    graph: nnx.GraphDef,
    params: Params,
    memory: Memory,
    log_prior: Float[Array, "B K"],
    settings: Decode,
    special: SpecialTokens,
    hugging_face: bool = False,
) -> tuple[Beams, Prefixes]:
    """RAG-Token's beam search: B rows, each step's log-probabilities summed over the K documents; and what was read."""
    generator, (questions, documents) = nnx.merge(graph, params), log_prior.shape

    def step(tokens: Array, number: Array, visible: Array, prefixes: Prefixes) -> tuple[Array, Prefixes]:
        rows, seen = (jnp.repeat(x, documents, axis=0) for x in (tokens, visible))
        rows = jnp.where(number == 0, memory.start[:, None], rows)  # a prompt's last token: every document has its own
        logp, prefixes = read_step(generator, memory, prefixes, rows, number, seen)
        logp = join_ends(logp, special).reshape(questions, documents, *logp.shape[1:])
        return marginal_logp(log_prior, logp), prefixes

    nothing = no_prefixes(generator, memory, settings.max_new_tokens * settings.beams)
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


@partial(jax.jit, static_argnums=(0, 5))
def score_tokens(
    graph: nnx.GraphDef,
    params: Params,
    memory: Memory,
    answers: Int[Array, "B C T"],
    lengths: Int[Array, "B C"],
    special: SpecialTokens,
) -> Float[Array, "B K C T"]:
    """log p(y_t|y_<t,x,z) of C answers a question under all K documents, in one padded pass over B·K memories.

    That of `special.eos` is that the answer ends, whichever token writes it.
    """
    questions, count, longest = answers.shape
    documents = memory.start.shape[0] // questions
    rows, generator = jnp.repeat(answers, documents, axis=0), nnx.merge(graph, params)
    hidden = answer_hidden(generator, memory, rows)
    logp = event_logits(generator, hidden, rows, special) - generator.normalizer(hidden)[0]
    logp = logp.reshape(questions, documents, count, longest)
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

    The fast marginal is always there. With `settings.mode` `thorough` the thorough one is, too; with `certified` bounds
    on it, as tight as it takes to know the best. Documents whose prior is −inf propose nothing.
    """
    beams, prefixes = propose(graph, params, memory, settings, special)
    beams = jax.device_get(beams)
    documents = log_prior.shape[1]
    found = [_distinct(beams, b * documents, prior) for b, prior in enumerate(log_prior)]
    width = few_sizes(max(map(len, found)))
    proposed = np.full((len(found), documents, width), -np.inf, np.float32)
    for b, of_question in enumerate(found):
        for c, by_document in enumerate(of_question.values()):
            for document, logp in by_document.items():
                proposed[b, document, c] = logp
    fast = np.asarray(_fast(log_prior, proposed))
    scored = thorough = responsibility = bounds = None
    needed = np.zeros((len(found), 2), int)
    known = Known(graph, params, memory, prefixes, special)
    answers = [with_end(list(of_question), special) for of_question in found]
    if settings.mode == "thorough":
        scored = np.full_like(proposed, -np.inf)
        every = [(log_prior[b] > -np.inf)[:, None] & np.full(len(of), True) for b, of in enumerate(answers)]
        _score(known, answers, every, scored)
        thorough, responsibility = (np.asarray(x) for x in _thorough(log_prior, scored))
    elif settings.mode == "certified":
        finished = [np.array([ends for _, ends in of_question]) for of_question in found]
        bounds, needed = _certify(known, answers, finished, log_prior, width)
    return [
        Candidates(
            tokens=[tokens for tokens, _ in of_question],
            finished=np.array([ends for _, ends in of_question], bool),
            proposed=proposed[b, :, : len(of_question)],
            fast=fast[b, : len(of_question)],
            scored=None if scored is None else scored[b, :, : len(of_question)],
            thorough=None if thorough is None else thorough[b, : len(of_question)],
            posterior=None if responsibility is None else responsibility[b, :, : len(of_question)],
            bounds=None if bounds is None else bounds[:, b, : len(of_question)],
            needed=None if bounds is None else (int(needed[b, 0]), int(needed[b, 1])),
        )
        for b, of_question in enumerate(found)
    ]


def _score(
    known: Known, answers: Sequence[Sequence[Tokens]], wanted: Sequence[Bool[np.ndarray, "K _"]], into: np.ndarray
) -> None:
    """Scores the wanted candidates of every question in one pass, `into` log p(y|x,z) [B,K,C]."""
    documents = into.shape[1]
    chosen = {
        b * documents + z: np.flatnonzero(of_document).tolist()
        for b, of_question in enumerate(wanted)
        for z, of_document in enumerate(of_question)
        if of_document.any()
    }
    found = known.score({row: [answers[row // documents][c] for c in which] for row, which in chosen.items()})
    for row, of_row in found.items():
        into[row // documents, row % documents, chosen[row]] = [logp.sum() for logp in of_row]


def _certify(
    known: Known,
    answers: Sequence[Sequence[Tokens]],
    finished: Sequence[Bool[np.ndarray, " _"]],
    log_prior: Float[np.ndarray, "B K"],
    width: int,
) -> tuple[Float[np.ndarray, "2 B C"], Int[np.ndarray, "B 2"]]:
    """Bounds on log p(y|x) that tell which candidate is best, and the scores it took, of how many for all.

    Under a document an answer is never likelier than its prefixes, some of which the beam search has read. Documents
    are scored in rounds, the likeliest first, twice as many a round, for the candidates that can still be the best.
    """
    questions, documents = log_prior.shape
    logp, exact = (
        np.full((questions, documents, width), -np.inf, np.float32),
        np.full((questions, documents, width), True),
    )
    there = log_prior > -np.inf
    rows = np.flatnonzero(there).tolist()
    for row, (at_most, whole) in known.bounds({row: answers[row // documents] for row in rows}).items():
        b, z = divmod(row, documents)
        logp[b, z, : len(whole)], exact[b, z, : len(whole)] = at_most, whole
    unknown, count = (~exact).sum(axis=(1, 2)), 1
    order = np.argsort(-log_prior, axis=1, kind="stable")
    while True:
        wanted = []
        for b, ends in enumerate(finished):
            size = len(ends)
            missing = next_scores(log_prior[b], logp[b, :, :size], exact[b, :, :size], ends if ends.any() else ~ends)
            of_next = order[b][missing[order[b]].any(axis=1)][:count]
            wanted.append(missing & np.isin(np.arange(documents), of_next)[:, None])
        if not any(of_question.any() for of_question in wanted):
            break
        _score(known, answers, wanted, logp)
        for b, of_question in enumerate(wanted):
            exact[b, :, : of_question.shape[1]] |= of_question
        count *= 2
    upper, lower = (np.asarray(_thorough(log_prior, x)[0]) for x in (logp, np.where(exact, logp, -np.inf)))
    return np.stack([lower, upper]), np.stack([unknown - (~exact).sum(axis=(1, 2)), unknown], axis=1)


def next_scores(
    log_prior: Float[np.ndarray, " K"],
    logp: Float[np.ndarray, "K C"],
    exact: Bool[np.ndarray, "K C"],
    eligible: Bool[np.ndarray, " C"],
) -> Bool[np.ndarray, "K C"]:
    """Which log p(y|x,z) are missing to tell the best of the eligible candidates: none once it is certain.

    `logp` is what it is at most, and, where it is `exact`, what it is. Within `TIE` of the best nothing is certain.
    """
    joint = log_prior[:, None].astype(np.float64) + logp
    upper = np.logaddexp.reduce(joint, axis=0)
    lower = np.logaddexp.reduce(np.where(exact, joint, -np.inf), axis=0)
    possible = eligible & (upper > lower[eligible].max() - TIE)
    return ~exact & possible & (possible.sum() > 1)


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
    beams, prefixes = propose_together(graph, params, memory, prior, settings, special, hugging_face)
    beams = jax.device_get(beams)
    found = [list(_distinct(beams, b, np.zeros(1))) for b in range(len(log_prior))]
    answers, lengths = pad_answers(found, special, settings.max_new_tokens)
    # every prefix of a beam was read under every document
    documents, rows = log_prior.shape[1], [with_end(of_question, special) for of_question in found]
    known = Known(graph, params, memory, prefixes, special).score(
        {b * documents + z: of_question for b, of_question in enumerate(rows) for z in range(documents)}
    )
    tokens = np.zeros((len(found), documents, *answers.shape[1:]), np.float32)
    for row, of_row in known.items():
        for c, logp in enumerate(of_row):
            tokens[*divmod(row, documents), c, : len(logp)] = logp
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
    beams = jax.device_get(propose(graph, params, unmasked, settings, special, True)[0])
    documents, (questions, scoring) = proposing.shape[1], log_prior.shape
    found = [_as_returned(beams, b * documents, proposing[b], special) for b in range(questions)]
    count, longest = few_sizes(max(map(len, found))), settings.max_new_tokens
    targets = np.full((questions, count, longest), special.pad, np.int32)
    for b, of_question in enumerate(found):
        for c, row in enumerate(of_question):
            targets[b, c, : len(row)] = row
    lengths = np.full((questions, count), longest, np.int32)
    logp = score_tokens(graph, params, memory, targets, lengths, special)[:, :scoring]
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
    rows = [with_end(of_question, special) for of_question in answers]
    width = few_sizes(max([1, *map(len, rows)]))
    needed = max((len(y) for of_question in rows for y in of_question), default=1)
    depth = next(size for size in (-(-longest // 4), -(-longest // 2), longest, needed) if size >= needed)
    tokens = np.full((len(rows), width, depth), special.pad, np.int32)
    lengths = np.zeros((len(rows), width), np.int32)
    for b, of_question in enumerate(rows):
        for c, y in enumerate(of_question):
            tokens[b, c, : len(y)] = y
            lengths[b, c] = len(y)
    return tokens, lengths


def with_end(answers: Sequence[Answer], special: SpecialTokens) -> list[tuple[int, ...]]:
    """Answers as they are scored."""
    return [(*tokens, special.eos) if ends else tokens for tokens, ends in answers]


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


@jax.jit
def _together(log_prior: Array, logp: Array, lengths: Array) -> tuple[Array, Array]:
    """RAG-Token's log p(y|x) [B,C], and the mean responsibility of each document [B,K,C]."""
    counts = jnp.arange(logp.shape[-1]) < lengths[..., None]
    marginal = jnp.where(counts, marginal_logp(log_prior, logp), 0.0).sum(axis=-1)
    return marginal, token_posterior(log_prior, logp, counts)
