"""RAG-Sequence decoding against Hugging Face's golden values, one-by-one scoring and exhaustive enumeration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import jax
import numpy as np
import pytest
from compiling import one_loop
from reference import GOLDEN, Small, answer_logp, log_softmax, random_llama, rounding
from safetensors.numpy import load_file
from world import shared_world, tiny_config

from ragjax.checkpoints.pretrained import open_generator
from ragjax.config import Decode
from ragjax.data.question_batch import QuestionBatch
from ragjax.decoding import decode as decode_module
from ragjax.decoding.candidates import Candidates, pad_answers
from ragjax.decoding.decode import decode_rag_sequence
from ragjax.decoding.prefix_cache import PrefixScorer
from ragjax.decoding.propose import prefill_documents
from ragjax.decoding.rag_token import decode_rag_token
from ragjax.files import read_json
from ragjax.models.generator import SpecialTokens
from ragjax.padding import pad_sequences
from ragjax.rag import load_pipeline
from ragjax.training.batch import TrainBatch
from ragjax.training.loss import prior_and_token_logp
from ragjax.training.step import make_nll

ENDING = SpecialTokens(eos=2, pad=0)
# the second end is the padding token, as in Llama 3; a third is no word of the tokenizer's
SEVERAL = SpecialTokens(eos=2, pad=4, ends=(2, 4, 0))
SETTINGS = Decode(num_docs=3, num_beams=2, max_new_tokens=12)
V, T = 6, 3


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """How rows leave is seen in test_by_device.py."""
    with one_loop():
        yield


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "golden.npz"))


@pytest.fixture(scope="module")
def generator() -> Small:
    folder = GOLDEN / "generator"
    pretrained = open_generator(folder)
    tensors = load_file(folder / "model.safetensors")
    hf = {**read_json(folder / "config.json"), "rope_theta": 10000.0}
    return Small(folder, hf, pretrained.graphdef, pretrained.load_params(), tensors)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A vocabulary so small that every answer can be tried."""
    return random_llama(tmp_path_factory.mktemp("tiny"), seed=1, vocab_size=V)


def prompts_of(golden: dict[str, np.ndarray]) -> list[list[int]]:
    found = zip(golden["in/prompt_ids_right"], golden["in/prompt_length"], strict=True)
    return [[int(t) for t in ids[:length]] for ids, length in found]


def decoded(
    small: Small,
    prompts: list[list[int]],
    prior: np.ndarray,
    settings: Decode = SETTINGS,
    width: int = 24,
    special: SpecialTokens = ENDING,
) -> list[Candidates]:
    tokens, mask = pad_sequences(prompts, width, 0)
    memory = prefill_documents(small.graphdef, small.params, tokens, mask)
    return decode_rag_sequence(small.graphdef, small.params, memory, np.asarray(prior, np.float32), settings, special)


def all_answers(special: SpecialTokens) -> list[tuple[int, ...]]:
    """Every answer of at most T tokens; `special.eos` is the end, whichever token writes it."""
    return [
        y
        for length in range(1, T + 1)
        for y in product(range(V), repeat=length)
        if not {special.eos, *special.ends} & {*y[:-1]}
        and y[-1] not in special.other_ends
        and (y[-1] == special.eos or length == T)
    ]


def event_logp(small: Small, prompt: list[int], answer: tuple[int, ...], special: SpecialTokens) -> np.ndarray:
    """log p of each token [T], the last one summed over all ends if it is one."""
    logp = answer_logp(small.tensors, small.hf_config, prompt, list(answer))
    if answer[-1] == special.eos:
        ways = [
            answer_logp(small.tensors, small.hf_config, prompt, [*answer[:-1], end])[-1] for end in special.other_ends
        ]
        logp[-1] = np.logaddexp.reduce([logp[-1], *ways])
    return logp


def with_end(found: Candidates) -> list[tuple[int, ...]]:
    """Candidates as Hugging Face writes them."""
    return [(*y, ENDING.eos) if ends else y for y, ends in zip(found.tokens, found.finished, strict=True)]


def one_by_one(small: Small, prompts: list[list[int]], answers: list[tuple[int, ...]]) -> np.ndarray:
    """log p(y|x,z) [K,C], each pair in a row of its own without padding or sharing."""
    return np.array([[answer_logp(small.tensors, small.hf_config, x, list(y)).sum() for y in answers] for x in prompts])


def assert_equal_candidates(found: Candidates, expected: Candidates) -> None:
    assert with_end(found) == with_end(expected)
    apart = rounding(expected.doc_logp)  # so far may a share of 1 be, too, whose logarithm is
    for name in ("beam_logp", "fast_logp", "doc_logp", "thorough_logp", "posterior"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=apart, err_msg=name)


@pytest.fixture(scope="module")
def golden_candidates(generator: Small, golden: dict[str, np.ndarray]) -> dict[int, list[Candidates]]:
    """By beams: what each of the 4 questions with its 3 documents gives."""
    prompts, prior = prompts_of(golden), golden["score/doc_logprobs"]
    return {beams: decoded(generator, prompts, prior, SETTINGS.replace(num_beams=beams)) for beams in (1, 2, 4)}


@pytest.mark.other_python
@pytest.mark.parametrize("beams", [1, 2, 4])
def test_equals_hugging_face(
    beams: int, golden: dict[str, np.ndarray], golden_candidates: dict[int, list[Candidates]]
) -> None:
    """The same candidates in the same order, the same marginals, the same choice, but for one known difference.

    At the length limit Hugging Face lets an unfinished prefix push a finished answer out of the beam (4 beams, question
    2); here finished answers come first.
    """
    name = f"decode/lp0/b{beams}"
    for question, found in enumerate(golden_candidates[beams]):
        count = golden[f"{name}/num_candidates"][question]
        rows = zip(golden[f"{name}/candidates"][question], golden[f"{name}/candidate_length"][question], strict=True)
        theirs = [tuple(int(t) for t in y[:length]) for y, length in rows][:count]
        ours, nll = with_end(found), golden[f"{name}/nll"][question, :count]
        if (beams, question) == (4, 2):
            (dropped,), (kept,) = set(theirs) - set(ours), set(ours) - set(theirs)
            assert dropped[:3] == (29, 30, 30) and len(dropped) == 12 and ENDING.eos not in dropped
            assert kept == (17, 73, 5, 2)
        else:
            assert ours == theirs
        shared = [y for y in theirs if y in ours]
        assert found.thorough_logp is not None
        np.testing.assert_allclose(
            [-found.thorough_logp[ours.index(y)] for y in shared],
            [nll[theirs.index(y)] for y in shared],
            atol=rounding(nll),
        )
        assert ours[found.best("thorough")[0]] == theirs[golden[f"{name}/chosen_index"][question]]


def test_equals_scoring_one_by_one(
    generator: Small, golden: dict[str, np.ndarray], golden_candidates: dict[int, list[Candidates]]
) -> None:
    prompts, prior = prompts_of(golden), golden["score/doc_logprobs"]
    for question, found in enumerate(golden_candidates[2]):
        scored = one_by_one(generator, prompts[3 * question : 3 * question + 3], with_end(found))
        joint = prior[question][:, None] + scored
        marginal = np.logaddexp.reduce(joint, axis=0)
        assert found.doc_logp is not None and found.posterior is not None
        np.testing.assert_allclose(found.doc_logp, scored, atol=rounding(scored))
        np.testing.assert_allclose(found.marginal("thorough"), marginal, atol=rounding(scored))
        np.testing.assert_allclose(found.posterior, np.exp(joint - marginal), atol=rounding(scored))
        assert found.best("thorough")[0] == marginal.argmax()
        proposed = found.beam_logp > -np.inf
        np.testing.assert_allclose(found.beam_logp[proposed], scored[proposed], atol=rounding(scored))


def test_fast_marginal_counts_the_documents_that_proposed(
    golden: dict[str, np.ndarray], golden_candidates: dict[int, list[Candidates]]
) -> None:
    partly = 0
    for question, found in enumerate(golden_candidates[4]):
        for c in range(len(found.tokens)):
            total = 0.0
            for k in range(3):
                if found.beam_logp[k, c] > -np.inf:
                    total += np.exp(golden["score/doc_logprobs"][question, k] + found.beam_logp[k, c])
            assert found.marginal("fast")[c] == pytest.approx(np.log(total), abs=1e-4)
            partly += 0 < (found.beam_logp[:, c] > -np.inf).sum() < 3
        assert (found.marginal("fast") <= found.marginal("thorough") + 1e-4).all()
        order = found.best("fast", len(found.tokens))
        assert found.finished[order].tolist() == sorted(found.finished, reverse=True)
        assert order[0] == np.where(found.finished, found.marginal("fast"), -np.inf).argmax()
    assert partly > 10


def test_fast_mode_scores_nothing_more(
    generator: Small, golden: dict[str, np.ndarray], golden_candidates: dict[int, list[Candidates]]
) -> None:
    found = decoded(generator, prompts_of(golden), golden["score/doc_logprobs"], SETTINGS.replace(mode="fast"))
    for fast, thorough in zip(found, golden_candidates[2], strict=True):
        assert with_end(fast) == with_end(thorough)
        np.testing.assert_allclose(fast.marginal("fast"), thorough.marginal("fast"), atol=1e-5)
        assert fast.doc_logp is None and fast.thorough_logp is None and fast.posterior is None
        with pytest.raises(AssertionError, match="no thorough marginal"):
            fast.best("thorough")


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_certified_is_thorough_with_fewer_scores(
    beams: int, generator: Small, golden: dict[str, np.ndarray], golden_candidates: dict[int, list[Candidates]]
) -> None:
    settings = SETTINGS.replace(mode="certified", num_beams=beams)
    found = decoded(generator, prompts_of(golden), golden["score/doc_logprobs"], settings)
    computed = needed = 0
    for certified, thorough in zip(found, golden_candidates[beams], strict=True):
        assert with_end(certified) == with_end(thorough)
        assert certified.best("certified") == thorough.best("thorough")
        assert certified.bounds is not None and certified.needed is not None and certified.doc_logp is None
        assert (certified.bounds[0] - 1e-4 <= thorough.marginal("thorough")).all()
        assert (thorough.marginal("thorough") <= certified.bounds[1] + 1e-4).all()
        assert (thorough.beam_logp == -np.inf).sum() >= certified.needed[1]
        computed, needed = computed + certified.needed[0], needed + certified.needed[1]
    assert computed < 0.7 * needed if beams > 1 else computed <= needed


class Told(PrefixScorer):
    """Stands for the generator: log p(y_t|y_<t,x,z) [B,K,C,T] of every answer, the first tokens of which are known."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int, int], sharpness: float) -> None:
        self.tokens = -sharpness * rng.gamma(0.5, size=shape).astype(np.float32)
        if rng.random() < 0.5:  # some answers are worth the same, or nearly
            twin = rng.integers(0, shape[2], shape[2])
            self.tokens = self.tokens[:, :, twin]
            self.tokens[..., -1] -= rng.choice([0, 0, 5e-4, 2e-3], size=shape[2]).astype(np.float32)
        self.depth = rng.integers(1, shape[3] + 1, shape[:3])
        self.logp, self.scored = self.tokens.sum(axis=-1), 0
        self.answers = [[(c,) for c in range(shape[2])] for _ in range(shape[0])]

    def bounds(self, wanted: Any) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        found = {}
        for row in wanted:
            tokens, depth = (x.reshape(-1, *x.shape[2:])[row] for x in (self.tokens, self.depth))
            known = np.arange(tokens.shape[1]) < depth[:, None]
            found[row] = np.where(known, tokens, 0).sum(axis=1), known.all(axis=1)
        return found

    def score(self, wanted: Any) -> dict[int, np.ndarray]:
        self.scored += sum(map(len, wanted.values()))
        rows = self.tokens.reshape(-1, *self.tokens.shape[2:])
        return {row: rows[row][[c for (c,) in answers]] for row, answers in wanted.items()}


def test_certified_never_chooses_otherwise() -> None:
    """Thousands of random cases against brute force, ties, absent documents and unfinished answers among them."""
    rng = np.random.default_rng(0)
    computed = needed = cases = 0
    for _ in range(500):
        # few shapes, as each is a program: what is absent or unfinished makes them smaller
        questions, documents, count = 5, int(rng.choice([1, 3, 6])), int(rng.choice([1, 2, 4, 8]))
        longest = int(rng.integers(1, 5))
        told = Told(rng, (questions, documents, count, longest), float(rng.choice([0.3, 1.0, 4.0])))
        prior = log_softmax(rng.normal(size=(questions, documents)) * rng.choice([0.1, 1.0, 3.0])).astype(np.float32)
        prior[rng.random(prior.shape) < 0.1] = -np.inf
        finished = [rng.random(count) < 0.8 for _ in range(questions)]
        answers = told.answers
        bounds, needs = decode_module.certify(told, answers, finished, prior, count)
        truth = np.asarray(decode_module.thorough_marginals(prior, told.logp)[0])
        assert (bounds[:, 0] <= truth + 1e-5).all() and (truth <= bounds[:, 1] + 1e-5).all()
        for b in range(questions):
            shared: dict[str, Any] = {"tokens": answers[b], "finished": finished[b], "beam_logp": told.logp[b]}
            certified = Candidates(**shared, bounds=bounds[b])
            assert certified.best("certified") == Candidates(**shared, thorough_logp=truth[b]).best("thorough")
        assert needs[:, 0].sum() == told.scored and (needs[:, 0] <= needs[:, 1]).all()
        computed, needed, cases = computed + told.scored, needed + int(needs[:, 1].sum()), cases + questions
    assert cases > 2000 and 0 < computed < 0.5 * needed


PROMPTS = [[5, 1, 4], [3, 3, 1, 5, 1], [1, 5, 5, 3], [4, 1, 1, 5]]  # 2 questions of 2 documents


@pytest.mark.parametrize("special", [ENDING, SEVERAL])
def test_exhaustive_decoding(tiny: Small, special: SpecialTokens) -> None:
    """With beams for every answer of at most T tokens, the choice is the arg max of the true marginal."""
    prompts = PROMPTS
    prior = log_softmax(np.array([[0.3, -0.2], [-0.5, 0.5]]))
    answers = all_answers(special)
    settings = Decode(num_docs=2, num_beams=len(answers), max_new_tokens=T)
    for question, found in enumerate(decoded(tiny, prompts, prior, settings, width=8, special=special)):
        of_documents = prompts[2 * question : 2 * question + 2]
        logp = np.array([[event_logp(tiny, x, y, special).sum() for y in answers] for x in of_documents])
        marginal = dict(zip(answers, np.logaddexp.reduce(prior[question][:, None] + logp, axis=0), strict=True))
        ours = with_end(found)
        assert sorted(ours) == sorted(answers)
        np.testing.assert_allclose(found.marginal("thorough"), [marginal[y] for y in ours], atol=1e-4)
        np.testing.assert_allclose(found.marginal("fast"), found.marginal("thorough"), atol=1e-4)
        np.testing.assert_allclose(np.exp(found.marginal("thorough")).sum(), 1.0, rtol=1e-4)
        finished = [y for y in answers if y[-1] == ENDING.eos]
        assert ours[found.best("thorough")[0]] == max(finished, key=marginal.__getitem__)


def test_other_questions_change_nothing(
    generator: Small, golden: dict[str, np.ndarray], golden_candidates: dict[int, list[Candidates]]
) -> None:
    """A batch of one question again and again: nobody else is there."""
    prompts, prior = prompts_of(golden), golden["score/doc_logprobs"]
    for question in range(2):
        own = slice(3 * question, 3 * question + 3)
        for alone in decoded(generator, prompts[own] * 4, np.repeat(prior[question : question + 1], 4, axis=0)):
            assert_equal_candidates(alone, golden_candidates[2][question])


def test_wider_padding_changes_nothing(
    generator: Small, golden: dict[str, np.ndarray], golden_candidates: dict[int, list[Candidates]]
) -> None:
    """Nor does a smaller batch."""
    wider = decoded(generator, prompts_of(golden)[:3], golden["score/doc_logprobs"][:1], width=31)
    assert_equal_candidates(wider[0], golden_candidates[2][0])


def test_impossible_documents_change_nothing(
    generator: Small, golden: dict[str, np.ndarray], golden_candidates: dict[int, list[Candidates]]
) -> None:
    """Fewer hits than k: their rows are there, their prior is −inf. A question without any hit has none."""
    prompts = prompts_of(golden)
    prior = golden["score/doc_logprobs"].copy()
    prior[0, 1] = prior[1] = -np.inf
    prior[0] -= np.logaddexp.reduce(prior[0])
    masked, nothing, *_ = decoded(generator, prompts, prior)
    (without,) = decoded(generator, [prompts[0], prompts[2]], prior[:1, [0, 2]])
    assert set(with_end(masked)) < set(with_end(golden_candidates[2][0]))
    assert with_end(masked) == with_end(without)
    assert (masked.beam_logp[1] == -np.inf).all() and masked.posterior is not None
    np.testing.assert_array_equal(masked.posterior[1], 0)
    apart = rounding(without.doc_logp)
    for name in ("beam_logp", "doc_logp", "posterior"):
        np.testing.assert_allclose(getattr(masked, name)[[0, 2]], getattr(without, name), atol=apart, err_msg=name)
    for name in ("fast_logp", "thorough_logp"):
        np.testing.assert_allclose(getattr(masked, name), getattr(without, name), atol=apart, err_msg=name)
    assert nothing.tokens == [()] and not nothing.finished.any()
    assert nothing.best("thorough") == [0] == nothing.best("fast")
    assert nothing.marginal("thorough") == -np.inf == nothing.marginal("fast")


def test_answers_have_the_least_length(generator: Small, golden: dict[str, np.ndarray]) -> None:
    settings = Decode(num_docs=3, num_beams=3, max_new_tokens=6, min_new_tokens=3)
    [found] = decoded(generator, prompts_of(golden)[:3], golden["score/doc_logprobs"][:1], settings)
    assert min(len(y) for y in found.tokens) >= 3


def test_unfinished_answers_come_last() -> None:
    tokens: list[tuple[int, ...]] = [(5, 5), (6,), (7, 7), (8,)]
    logp = np.log([0.5, 0.1, 0.6, 0.2])
    found = Candidates(
        tokens, np.array([False, True, False, True]), logp[None], fast_logp=logp, thorough_logp=logp[::-1]
    )
    assert found.best("fast", 4) == [3, 1, 2, 0]
    assert found.best("thorough", 4) == [1, 3, 0, 2]
    cut = Candidates(tokens[:3:2], np.array([False, False]), logp[None, :2], fast_logp=logp[:2])
    assert cut.best("fast", 2) == [0, 1]


def test_ties_go_to_the_first_proposed() -> None:
    found = Candidates([(5,), (6,)], np.array([True, True]), np.zeros((1, 2)), fast_logp=np.zeros(2))
    assert found.best("fast") == [0]


@pytest.mark.parametrize("special", [ENDING, SEVERAL])
def test_rag_token_sums_over_documents_at_every_token(tiny: Small, special: SpecialTokens) -> None:
    """With beams for every answer, the choice is the arg max of Π_t Σ_z p(z|x) p(y_t|y_<t,x,z).

    The documents end differently: each answer begins from each document's own last token.
    """
    prompts = PROMPTS
    prior = log_softmax(np.array([[0.3, -0.2], [-0.5, 0.5]]))
    answers = all_answers(special)
    tokens, mask = pad_sequences(prompts, 8, 0)
    memory = prefill_documents(tiny.graphdef, tiny.params, tokens, mask)
    settings = Decode(num_docs=2, num_beams=len(answers), max_new_tokens=T)
    found = decode_rag_token(tiny.graphdef, tiny.params, memory, np.asarray(prior, np.float32), settings, special)
    for question, of_question in enumerate(found):
        of_documents = prompts[2 * question : 2 * question + 2]
        logp = {y: np.array([event_logp(tiny, x, y, special) for x in of_documents]) for y in answers}
        joint = {y: prior[question][:, None] + by_token for y, by_token in logp.items()}
        marginal = {y: np.logaddexp.reduce(x, axis=0).sum() for y, x in joint.items()}
        ours = with_end(of_question)
        assert sorted(ours) == sorted(answers)
        np.testing.assert_allclose(of_question.marginal("thorough"), [marginal[y] for y in ours], atol=1e-4)
        np.testing.assert_allclose(np.exp(of_question.marginal("thorough")).sum(), 1.0, rtol=1e-4)
        assert of_question.doc_logp is not None and of_question.posterior is not None
        np.testing.assert_allclose(of_question.doc_logp, np.array([logp[y].sum(axis=1) for y in ours]).T, atol=1e-4)
        shares = [np.exp(joint[y] - np.logaddexp.reduce(joint[y], axis=0)).mean(axis=1) for y in ours]
        np.testing.assert_allclose(of_question.posterior, np.array(shares).T, atol=1e-4)
        finished = [y for y in answers if y[-1] == ENDING.eos]
        assert ours[of_question.best("thorough")[0]] == max(finished, key=marginal.__getitem__)
        assert of_question.fast_logp is None and (of_question.beam_logp == -np.inf).all()


def test_the_end_is_forbidden_and_forced_as_one_event(tiny: Small) -> None:
    """No end token at first, and any of them at the limit: answers of one token, each as likely as that says."""
    special, settings = (
        replace(SEVERAL, forced_eos=2),
        Decode(num_docs=2, num_beams=16, max_new_tokens=2, min_new_tokens=1),
    )
    prior = log_softmax(np.array([[0.3, -0.2]]))
    [found] = decoded(tiny, PROMPTS[:2], prior, settings, width=8, special=special)
    assert found.doc_logp is not None and found.thorough_logp is not None and found.finished.all()
    assert sorted(found.tokens) == [(1,), (3,), (5,)]
    logp = np.array([[event_logp(tiny, x, (*y, 2), special).sum() for y in found.tokens] for x in PROMPTS[:2]])
    np.testing.assert_allclose(found.doc_logp, logp, atol=1e-4)
    np.testing.assert_allclose(found.beam_logp, logp, atol=1e-4)
    np.testing.assert_allclose(found.thorough_logp, np.logaddexp.reduce(prior.T + logp, axis=0), atol=1e-4)


def test_rag_token_is_what_training_has(
    generator: Small, golden: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """An answer's log p is minus the training loss of it, though each document's prompt ends with another token."""
    rng = np.random.default_rng(0)
    source = rng.integers(3, 60, (2, 3, 12)).astype(np.int32)
    assert all(len({*ends}) == 3 for ends in source[..., -1].tolist())
    config = tiny_config(shared_world(tmp_path_factory), model="rag_token", retriever__logit_scale=1.0)
    rag = load_pipeline(config)
    rag = replace(rag, generator=open_generator(generator.folder), special=ENDING)
    params = rag.initial_params()
    questions = rng.integers(3, 200, (2, 8)).astype(np.int32)
    batch = TrainBatch(
        questions=QuestionBatch(
            row=np.arange(2),
            question=questions,
            question_mask=np.ones((2, 8), bool),
            answer=np.zeros((2, 6), np.int32),
            answer_mask=np.zeros((2, 6), bool),
        ),
        passage_embeddings=rng.normal(size=(2, 3, rag.retriever.config.embedding_dim)).astype(np.float32) / 4,
        valid=np.ones((2, 3), bool),
        source=source,
        source_mask=np.ones(source.shape, bool),
    )
    key = jax.random.key(0)
    of_batch = jax.jit(lambda params, batch: prior_and_token_logp(rag, params, batch, key)[0])
    prior = np.asarray(of_batch(params, jax.device_put(batch)))
    assert np.exp(prior).max() < 0.9
    graph = rag.generator.graphdef
    memory = prefill_documents(graph, params["generator"], source.reshape(6, 12), np.ones((6, 12), bool))
    settings = Decode(num_docs=3, num_beams=3, max_new_tokens=6)
    found = decode_rag_token(graph, params["generator"], memory, prior, settings, ENDING)
    nll = make_nll(rag)
    for c in range(settings.num_beams):
        answer, mask = pad_sequences([with_end(of_question)[c] for of_question in found], 6, 0)
        one = replace(batch, questions=replace(batch.questions, answer=answer, answer_mask=mask))
        trained = nll(params, one)
        decided = [of_question.marginal("thorough")[c] for of_question in found]
        np.testing.assert_allclose(decided, -np.asarray(trained), rtol=1e-5, atol=1e-5)


def test_pad_answers() -> None:
    """C grows in steps of a third or a half, T by a quarter, a half and all of the longest answer."""
    one, long = ((5,), True), ((5, 6, 7), True)
    tokens, lengths = pad_answers([[one, long, ((8, 9), False)], [one]], ENDING, 8)
    assert tokens[0].tolist() == [[5, 2, 0, 0], [5, 6, 7, 2], [8, 9, 0, 0]]
    assert tokens[1].tolist() == [[5, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert lengths.tolist() == [[2, 4, 2], [2, 0, 0]]
    assert pad_answers([[one], [one]], ENDING, 8)[0].shape == (2, 1, 2)
    widths = [pad_answers([[one] * count], ENDING, 3)[0].shape[1] for count in range(1, 18)]
    assert widths == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24]
    assert pad_answers([[long]], ENDING, 3)[0].shape == (1, 1, 4), "longer than the limit: room for all of it"
    assert pad_answers([[((), True)], []], ENDING, 8)[0].tolist() == [[[2, 0]], [[0, 0]]]
    assert pad_answers([[]], ENDING, 8)[0].shape == (1, 1, 2)
    assert pad_answers([], ENDING, 8)[0].shape[0] == 0
