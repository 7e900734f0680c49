"""transformers' `RagSequenceForGeneration.generate` to the letter, for who must have its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from ragjax.config import Decode
from ragjax.decoding.beam_search import Beams
from ragjax.decoding.candidates import Candidates
from ragjax.decoding.prefix_cache import Tokens
from ragjax.decoding.propose import beam_search_documents, beam_settings
from ragjax.decoding.rescore import score_tokens
from ragjax.marginal import hugging_face_nll, posterior
from ragjax.models.generator import SpecialTokens
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.padding import bucket_size


def decode_hf_compatible(
    graph: nnx.GraphDef,
    params: Params,
    unmasked: DocumentMemory,
    memory: DocumentMemory,
    log_prior: Float[np.ndarray, "B M"],
    proposing: Bool[np.ndarray, "B K"],
    settings: Decode,
    special: SpecialTokens,
) -> list[Candidates]:
    """The candidates of each question, best first, as `RagSequenceForGeneration.generate` has them.

    A candidate is all that `generate` returns after the start token, and what fills it up counts unless it is the
    padding token. `thorough_logp` is −NLL (nats): above 0, even, where an answer of one token has lost its prior.

    Args:
        graph: the generator's, as `params`.
        params: the generator's.
        unmasked: memories that were read without a mask, padding and all; under these candidates are searched.
        memory: of the B·K documents, question-major; under the first M of each question candidates are scored.
        log_prior: log p(z|x) of these M; −inf where there is no document.
        proposing: which documents propose candidates.
        settings: the beam search.
        special: the tokens that end an answer, and those that are forced.
    """
    search = beam_settings(settings, special, hugging_face=True)
    beams = jax.device_get(beam_search_documents(graph, params, unmasked, search, special)[0])
    documents, (questions, scoring) = proposing.shape[1], log_prior.shape
    answers = [_as_returned(beams, b * documents, proposing[b], special) for b in range(questions)]
    count, longest = bucket_size(max(map(len, answers))), settings.max_new_tokens
    targets = np.full((questions, count, longest), special.pad, np.int32)
    for b, by_answer in enumerate(answers):
        for c, y in enumerate(by_answer):
            targets[b, c, : len(y)] = y
    lengths = np.full((questions, count), longest, np.int32)
    scored = np.asarray(score_tokens(graph, params, memory, targets, lengths, special))[:, :scoring]
    logp = np.where((log_prior > -np.inf)[..., None, None], scored, -np.inf)  # documents that are not there
    excluded = np.array([special.bos is not None and all(y[0] == special.bos for y in ys) for ys in answers])
    counted = targets != special.pad
    nll = np.array(hugging_face_nll(log_prior, logp, counted, excluded))
    for b, by_answer in enumerate(answers):
        nll[b, [c for c, by in enumerate(by_answer.values()) if not by]] = np.inf  # where nothing could be answered
    counted = counted & ~(excluded[:, None, None] & (np.arange(longest) == 0))
    doc_logp = jnp.asarray(np.where(counted[:, None], logp, 0.0)).sum(axis=-1)
    shares = np.asarray(posterior(log_prior, doc_logp))
    return [
        _ranked(by_answer, nll[b, : len(by_answer)], np.asarray(doc_logp)[b], shares[b], documents, special)
        for b, by_answer in enumerate(answers)
    ]


def _ranked(
    answers: Mapping[Tokens, Mapping[int, float]],
    nll: Float[np.ndarray, " C"],
    doc_logp: Float[np.ndarray, "M _"],
    shares: Float[np.ndarray, "M _"],
    documents: int,
    special: SpecialTokens,
) -> Candidates:
    """The candidates of one question of K documents, best first, a document that was not scored with probability 0."""
    order = np.argsort(nll, kind="stable")
    ranked = [list(answers.items())[c] for c in order]
    return Candidates(
        tokens=[tuple(takewhile(lambda token: token != special.eos, y)) for y, _ in ranked],
        finished=np.array([special.eos in y for y, _ in ranked], bool),
        beam_logp=np.array([[by.get(z, -np.inf) for _, by in ranked] for z in range(documents)], np.float32),
        doc_logp=_fill_up(doc_logp[:, order], documents, -np.inf),
        thorough_logp=-nll[order],
        posterior=_fill_up(shares[:, order], documents, 0.0),
        ranked=True,
    )


def _as_returned(
    beams: Beams, first_row: int, proposing: Bool[np.ndarray, " K"], special: SpecialTokens
) -> dict[Tokens, dict[int, float]]:
    """Distinct answers as transformers returns them, and the beam's score for each document that proposed one.

    With one beam what follows the end token is padding; with more, if the padding token's id is 0, the end token.
    Without any document there is only the empty answer.
    """
    rows = slice(first_row, first_row + len(proposing))
    there = (beams.logp[rows] > -np.inf) & proposing[:, None]
    longest, fill = int(beams.length[rows][there].max(initial=1)), special.pad
    if beams.tokens.shape[1] > 1:
        fill = special.pad or special.eos
    answers: dict[Tokens, dict[int, float]] = {}
    for document, beam in np.argwhere(there):
        at = (first_row + document, beam)
        tokens = [int(t) for t in beams.tokens[at][: beams.length[at]]]
        answer = (*tokens, *[fill] * (longest - len(tokens)))
        answers.setdefault(answer, {})[int(document)] = float(beams.logp[at])
    return answers or {(special.pad,): {}}


def _fill_up(rows: np.ndarray, count: int, value: float) -> np.ndarray:
    """With rows of `value` for the documents that were not scored."""
    more = np.full((count - len(rows), *rows.shape[1:]), value, rows.dtype)
    return np.concatenate([rows, more])
