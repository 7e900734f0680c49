"""`RagSequenceForGeneration.generate` of transformers to the letter, for who must have its numbers."""

from __future__ import annotations

from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from ragjax.config import Decode
from ragjax.decoding.beam_search import Beams
from ragjax.decoding.candidates import Candidates
from ragjax.decoding.propose import beam_search_documents
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
    """transformers' `RagSequenceForGeneration.generate`, to the letter, over the K documents of each question.

    The documents `proposing` are searched through `unmasked`, memories that were read without a mask, padding and all;
    the candidates are scored under the first M. A candidate is all that `generate` returns after the start token, and
    what fills it up counts unless it is the padding token. `thorough` is −NLL: above 0, even, where an answer of one
    token has lost its prior.
    """
    beams = jax.device_get(beam_search_documents(graph, params, unmasked, settings, special, True)[0])
    documents, (questions, scoring) = proposing.shape[1], log_prior.shape
    found = [_as_returned(beams, b * documents, proposing[b], special) for b in range(questions)]
    count, longest = bucket_size(max(map(len, found))), settings.max_new_tokens
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
                beam_logp=np.array([[by.get(z, -np.inf) for _, by in rows] for z in range(documents)], np.float32),
                doc_logp=_fill_up(scored[b][:, order], documents, -np.inf),
                thorough_logp=-nll[b, order],
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
