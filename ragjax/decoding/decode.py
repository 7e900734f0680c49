"""RAG-Sequence decoding: stage 2 proposes candidates, stage 3 computes their marginals. RAG-Token's is `rag_token`."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from ragjax.config import Decode
from ragjax.decoding.candidates import Candidates, as_candidates, distinct_answers, with_end
from ragjax.decoding.certified import certify
from ragjax.decoding.prefix_cache import PrefixScorer
from ragjax.decoding.propose import beam_search_documents, beam_settings
from ragjax.decoding.rescore import fast_marginals, score_candidates, thorough_marginals
from ragjax.models.generator import SpecialTokens
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.padding import bucket_size


def decode_rag_sequence(
    graph: nnx.GraphDef,
    params: Params,
    memory: DocumentMemory,
    log_prior: Float[np.ndarray, "B K"],
    settings: Decode,
    special: SpecialTokens,
) -> list[Candidates]:
    """The candidates of B questions (Lewis et al. 2020, section 2.5); `Candidates.best` chooses among them.

    Args:
        graph: the generator's, as `params`.
        params: the generator's.
        memory: of the B·K documents, question-major.
        log_prior: log p(z|x) in nats; a document with −inf proposes nothing.
        settings: the beam search, and the `mode`: the fast marginal is always computed; with `thorough` the thorough
            one, too; with `certified` bounds on it, as tight as it takes to know the best.
        special: the tokens that end an answer, and those that are forced.
    """
    search = beam_settings(settings, special, hugging_face=False)
    beams, prefixes = beam_search_documents(graph, params, memory, search, special)
    beams, documents = jax.device_get(beams), log_prior.shape[1]
    proposals = [distinct_answers(beams, b * documents, prior) for b, prior in enumerate(log_prior)]
    answers = [with_end(list(by_answer), special) for by_answer in proposals]
    count = bucket_size(max(map(len, answers)))
    beam_logp = np.full((len(answers), documents, count), -np.inf, np.float32)
    for b, by_answer in enumerate(proposals):
        for c, by_document in enumerate(by_answer.values()):
            for document, logp in by_document.items():
                beam_logp[b, document, c] = logp
    arrays = {"beam_logp": beam_logp, "fast_logp": np.asarray(fast_marginals(log_prior, beam_logp))}
    scorer, needed = PrefixScorer(graph, params, memory, prefixes, special), None
    if settings.mode == "thorough":
        arrays["doc_logp"] = np.full_like(beam_logp, -np.inf)
        every = [(log_prior[b] > -np.inf)[:, None] & np.full(len(ys), True) for b, ys in enumerate(answers)]
        score_candidates(scorer, answers, every, arrays["doc_logp"])
        marginal, posterior = thorough_marginals(log_prior, arrays["doc_logp"])
        arrays |= {"thorough_logp": np.asarray(marginal), "posterior": np.asarray(posterior)}
    elif settings.mode == "certified":
        finished = [np.array([ends for _, ends in by_answer]) for by_answer in proposals]
        arrays["bounds"], needed = certify(scorer, answers, finished, log_prior, count)
    candidates = as_candidates([list(by_answer) for by_answer in proposals], arrays)
    if needed is None:
        return candidates
    return [replace(own, needed=(int(n[0]), int(n[1]))) for own, n in zip(candidates, needed, strict=True)]
