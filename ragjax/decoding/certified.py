"""Stage 3 with fewer scores: bounds on the marginal that prove which candidate is best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from ragjax.decoding.prefix_cache import PrefixScorer, Tokens
from ragjax.decoding.rescore import score_candidates, thorough_marginals
from ragjax.marginal import TIE


def certify(
    scorer: PrefixScorer,
    answers: Sequence[Sequence[Tokens]],
    finished: Sequence[Bool[np.ndarray, " _"]],
    log_prior: Float[np.ndarray, "B K"],
    count: int,
) -> tuple[Float[np.ndarray, "B 2 C"], Int[np.ndarray, "B 2"]]:
    """Which candidate of each question is best, proved with as few scores as it takes.

    Under a document an answer is never likelier than its prefixes, some of which the beam search has read. Documents
    are scored in rounds, the likeliest first, twice as many a round, for the candidates that can still be the best.

    Args:
        scorer: of the B·K memories, question-major.
        answers: the candidates of each question as they are scored, at most `count` = C of them.
        finished: which of them are.
        log_prior: −inf where there is no document.

    Returns:
        A lower and an upper bound on log p(y|x) of each candidate (nats; −inf for what fills up), and for each question
        the scores computed and the scores that thorough decoding needs.
    """
    questions, documents = log_prior.shape
    logp = np.full((questions, documents, count), -np.inf, np.float32)
    exact = np.full(logp.shape, True)
    rows = np.flatnonzero(log_prior > -np.inf).tolist()
    for row, (at_most, whole) in scorer.bounds({row: answers[row // documents] for row in rows}).items():
        b, z = divmod(row, documents)
        logp[b, z, : len(whole)], exact[b, z, : len(whole)] = at_most, whole
    needed, at_once = (~exact).sum(axis=(1, 2)), 1
    order = np.argsort(-log_prior, axis=1, kind="stable")
    while True:
        chosen = []
        for b, ends in enumerate(finished):
            size = len(ends)
            missing = next_scores(log_prior[b], logp[b, :, :size], exact[b, :, :size], ends if ends.any() else ~ends)
            likeliest = order[b][missing[order[b]].any(axis=1)][:at_once]
            chosen.append(missing & np.isin(np.arange(documents), likeliest)[:, None])
        if not any(by_document.any() for by_document in chosen):
            break
        score_candidates(scorer, answers, chosen, logp)
        for b, by_document in enumerate(chosen):
            exact[b, :, : by_document.shape[1]] |= by_document
        at_once *= 2
    upper, lower = (np.asarray(thorough_marginals(log_prior, x)[0]) for x in (logp, np.where(exact, logp, -np.inf)))
    return np.stack([lower, upper], axis=1), np.stack([needed - (~exact).sum(axis=(1, 2)), needed], axis=1)


def next_scores(
    log_prior: Float[np.ndarray, " K"],
    logp: Float[np.ndarray, "K C"],
    exact: Bool[np.ndarray, "K C"],
    eligible: Bool[np.ndarray, " C"],
) -> Bool[np.ndarray, "K C"]:
    """Which log p(y|x,z) must still be computed to tell the best of the eligible candidates: none once it is certain.

    `logp` is an upper bound on it, and the value itself where it is `exact`. Within `TIE` of the best nothing is
    certain.
    """
    joint = log_prior[:, None].astype(np.float64) + logp
    upper = np.logaddexp.reduce(joint, axis=0)
    lower = np.logaddexp.reduce(np.where(exact, joint, -np.inf), axis=0)
    possible = eligible & (upper > lower[eligible].max() - TIE)
    return ~exact & possible & (possible.sum() > 1)
