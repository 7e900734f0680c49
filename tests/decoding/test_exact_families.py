"""Exact decoding with every family of generators: all answers of two tokens enumerated, and thorough decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from compiling import one_loop
from flax import nnx

from ragjax.checkpoints.pretrained import open_generator
from ragjax.commands.hugging_face import import_rag
from ragjax.config import Decode
from ragjax.decoding.candidates import Candidates, with_end
from ragjax.decoding.decode import decode_rag_sequence
from ragjax.decoding.exact.decode import decode_exact
from ragjax.decoding.propose import prefill_documents
from ragjax.decoding.rescore import score_tokens
from ragjax.marginal import TIE, log_prior
from ragjax.models.generator import SpecialTokens
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params

GOLDEN = Path(__file__).parents[1] / "golden"
ROUNDING = 1e-3  # nats, as TIE: two ways to compute float32 sums of a tiny model
FAMILIES = {
    "llama-tiny": SpecialTokens(eos=2, pad=0),
    "bart-tiny": SpecialTokens(eos=2, pad=1, bos=0),
    "t5-tiny": SpecialTokens(eos=1, pad=0, ends=(1, 5)),  # two tokens end an answer
}


@dataclass(frozen=True)
class Family:
    """A generator, four questions of three documents, and their prior."""

    graphdef: nnx.GraphDef
    params: Params
    special: SpecialTokens
    source: np.ndarray
    mask: np.ndarray
    prior: np.ndarray
    vocabulary: int

    def exact(self, settings: Decode, by_token: bool = False) -> list[Candidates]:
        def read(rows: np.ndarray) -> DocumentMemory:
            return prefill_documents(self.graphdef, self.params, self.source[rows], self.mask[rows])

        return decode_exact(self.graphdef, self.params, read, self.prior, None, settings, self.special, by_token)

    def thorough(self, settings: Decode) -> list[Candidates]:
        memory = prefill_documents(self.graphdef, self.params, self.source, self.mask)
        how = settings.replace(mode="thorough")
        return decode_rag_sequence(self.graphdef, self.params, memory, self.prior, how, self.special)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with one_loop():
        yield


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    name = request.param
    values = dict(np.load(GOLDEN / name / "golden.npz"))
    if name == "llama-tiny":
        folder = GOLDEN / name / "generator"
        source, prior = values["in/prompt_ids_right"], values["score/doc_logprobs"]
        mask = np.arange(source.shape[1]) < values["in/prompt_length"][:, None]
    else:
        folder = import_rag(str(GOLDEN / name / "rag"), tmp_path_factory.mktemp("exact") / name) / "generator"
        source, mask = values["in/context_input_ids"], values["in/context_attention_mask"] == 1
        scores = values["score/labels/doc_scores"]
        prior = np.asarray(log_prior(scores, np.ones(scores.shape, bool)))
    pretrained = open_generator(folder)
    return Family(
        pretrained.graphdef,
        pretrained.load_params(),
        FAMILIES[name],
        source.astype(np.int32),
        mask,
        prior.astype(np.float32),
        pretrained.config.vocab_size,
    )


ONE_TOKEN = Decode(mode="exact", num_docs=3, max_new_tokens=2, start_beams=8, max_beams=8, fallback="none")


def enumerated(family: Family) -> tuple[list[int], np.ndarray]:
    """The words, and log p(y_t|y_<t,x,z) of the empty answer and of that of each word: of all of at most one token."""
    special, questions = family.special, len(family.prior)
    words = [v for v in range(family.vocabulary) if v not in {special.eos, *special.ends}]
    answers = np.array([[special.eos, special.pad], *[[v, special.eos] for v in words]], np.int32)
    lengths = np.array([1, *[2] * len(words)], np.int32)
    memory = prefill_documents(family.graphdef, family.params, family.source, family.mask)
    everywhere = (np.tile(x[None], (questions, *[1] * x.ndim)) for x in (answers, lengths))
    by_step = score_tokens(family.graphdef, family.params, memory, *everywhere, special)
    return words, np.asarray(by_step, np.float64)


@pytest.mark.parametrize("by_token", [False, True])
def test_every_answer_enumerated(family: Family, by_token: bool) -> None:
    """Answers of at most one token and the end: all are scored, under every document."""
    special, (words, by_step), prior = family.special, enumerated(family), family.prior[..., None]
    truth = np.logaddexp.reduce(prior + by_step.sum(axis=-1), axis=1)
    if by_token:
        truth = np.logaddexp.reduce(prior[..., None] + by_step, axis=1)
        truth[:, 0, 1] = 0  # the empty answer has one token, its end
        truth = truth.sum(axis=-1)
    proved = 0
    in_rounds = family.special.bos is None  # with few documents and then more: a program each
    for b, found in enumerate(family.exact(ONE_TOKEN.replace(lazy=in_rounds), by_token)):
        assert found.proof is not None and found.thorough_logp is not None and found.doc_logp is not None
        where = [0 if len(y) == 1 else 1 + words.index(y[0]) for y in with_end_of(found, special)]
        np.testing.assert_allclose(found.thorough_logp, truth[b, where], atol=ROUNDING)
        np.testing.assert_allclose(found.doc_logp, by_step[b].sum(axis=-1)[:, where], atol=ROUNDING)
        for i in found.proof.top_k:
            assert truth[b, where[:i]].min() >= np.delete(truth[b], where[:i]).max() - TIE
        proved += found.proof.best
    assert proved >= 1


@pytest.mark.parametrize("family", ["llama-tiny"], indirect=True)
def test_in_bfloat16_the_proof_is_about_its_own_numbers(family: Family) -> None:
    """Scored in float32 a proved answer is behind another one by no more than rounding takes from one and adds to one.

    Both ways to compute in bfloat16, prefix by prefix and at once, are off by about the same for likely answers.
    """
    rounded = open_generator(GOLDEN / "llama-tiny" / "generator", dtype="bfloat16")
    rough, prior = replace(family, graphdef=rounded.graphdef), family.prior[..., None]
    words, by_step = enumerated(family)
    whole, other = (np.logaddexp.reduce(prior + s.sum(axis=-1), axis=1) for s in (by_step, enumerated(rough)[1]))
    likely = whole >= whole.max(axis=1, keepdims=True) - 1
    rounding, proved = 2 * np.abs(whole - other).max(where=likely, initial=0), 0  # few are likely: of all questions
    assert rounding > 0
    for b, found in enumerate(rough.exact(ONE_TOKEN.replace(lazy=False))):  # one program
        best = next(0 if len(y) == 1 else 1 + words.index(y[0]) for y in with_end_of(found, family.special))
        assert likely[b, best]
        np.testing.assert_allclose(found.marginal("exact")[0], whole[b, best], atol=rounding)
        if found.proof is not None and found.proof.best:
            assert whole[b, best] >= whole[b].max() - 2 * rounding - TIE
            proved += 1
    assert proved


def with_end_of(found: Candidates, special: SpecialTokens) -> list[tuple[int, ...]]:
    return with_end(list(zip(found.tokens, found.finished.tolist(), strict=True)), special)


def test_never_below_thorough(family: Family) -> None:
    """Longer answers: whether proved or not, none is below thorough decoding's; each has its probability."""
    settings = Decode(mode="exact", num_docs=3, max_new_tokens=6, start_beams=2, max_beams=2, lazy=False)
    for found, thorough in zip(family.exact(settings), family.thorough(settings), strict=True):
        best, scored = thorough.best("thorough")[0], thorough.marginal("thorough")
        assert found.proof is not None and found.thorough_logp is not None
        assert found.finished[0] or not thorough.finished.any()
        if thorough.finished[best]:
            assert found.thorough_logp[0] >= scored[best] - TIE
        known = {y: logp for y, logp, ends in zip(thorough.tokens, scored, thorough.finished, strict=True) if ends}
        shared = [c for c, y in enumerate(found.tokens) if y in known and found.finished[c]]
        assert shared
        again = [known[found.tokens[c]] for c in shared]
        np.testing.assert_allclose(found.thorough_logp[shared], again, atol=ROUNDING)
