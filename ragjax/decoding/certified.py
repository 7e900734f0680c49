"""Stage 3 with fewer scores: bounds on the marginal that prove which candidate is best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from ragjax.decoding.prefix_cache import PrefixScorer, Tokens
from ragjax.decoding.rescore import score_candidates, thorough_marginals

TIE = 1e-3  # nats: two marginals are the same for all that rounding can tell


def certify(
    known: PrefixScorer,
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
        score_candidates(known, answers, wanted, logp)
        for b, of_question in enumerate(wanted):
            exact[b, :, : of_question.shape[1]] |= of_question
        count *= 2
    upper, lower = (np.asarray(thorough_marginals(log_prior, x)[0]) for x in (logp, np.where(exact, logp, -np.inf)))
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
