"""transformers' RAG to the letter: likelihoods, candidates, choices and RAG-Token's beams, against golden values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from compiling import one_loop
from flax import nnx
from gradients import norm
from reference import rounding
from world import tiny_config

from ragjax.checkpoints.adapters import dpr_prefix
from ragjax.checkpoints.pretrained import encoder_tensors, generator_tensors, open_encoder, open_generator
from ragjax.commands.hugging_face import import_rag
from ragjax.config import Decode
from ragjax.data.corpus import Passage
from ragjax.data.passage_store import PassageStore, shard_folder, write_store
from ragjax.data.prompt import passage_text
from ragjax.data.question_batch import QuestionBatch, question_batch, tokenize_prompts
from ragjax.data.tokenizer import Tokenizer
from ragjax.decoding.candidates import Candidates
from ragjax.decoding.hf_compat import decode_hf_compatible
from ragjax.decoding.marginal_search import search_rag_token
from ragjax.decoding.propose import beam_settings, prefill_documents
from ragjax.decoding.rag_token import decode_rag_token
from ragjax.marginal import hugging_face_nll, log_prior, marginal_logp
from ragjax.models.generator import SpecialTokens, answer_hidden, token_logp
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.rag import load_pipeline
from ragjax.training.batch import TrainBatch
from ragjax.training.loss import rag_loss

GOLDEN = Path(__file__).parents[1] / "golden"
LABELS = ("labels", "labels_nobos", "labels_nostart", "labels_short")
LONGEST = 9  # of these: so wide are all padded, that they are one program
VARIANTS = ("default", "lp0", "forcedbos", "earlystop")
BEAMS = (1, 2, 4)
# each other pair is one more program
QUICK = {("default", 4), ("forcedbos", 2), ("earlystop", 4)}
SEARCHES = [
    pytest.param(variant, beams, marks=() if (variant, beams) in QUICK else pytest.mark.slow)
    for variant in VARIANTS
    for beams in BEAMS
]
ALL = np.ones((4, 3), bool)  # documents propose


@dataclass(frozen=True)
class Golden:
    """The generator of a Hugging Face RAG checkpoint, its inputs, and what Hugging Face computes."""

    folder: Path  # imported
    graphdef: nnx.GraphDef
    params: Params
    values: dict[str, np.ndarray]
    variants: dict[str, dict[str, Any]]
    special: SpecialTokens
    vocabulary: int

    def memory(self, masked: bool = True) -> DocumentMemory:
        source, mask = self.values["in/context_input_ids"], self.values["in/context_attention_mask"] == 1
        mask = mask if masked else np.ones_like(mask)
        return prefill_documents(self.graphdef, self.params, source.astype(np.int32), mask)

    @property
    def prior(self) -> jax.Array:
        scores = jnp.asarray(self.values["score/labels/doc_scores"])
        return log_prior(scores, jnp.asarray(np.ones(scores.shape, bool)))

    def settings(self, variant: str, beams: int) -> tuple[Decode, SpecialTokens]:
        """As Hugging Face's `generate` got them; its BART forces the end token unless told otherwise."""
        given = self.variants[variant]
        forced_eos = self.special.eos if self.special.bos is not None else None
        forced_eos = None if "forced_eos_token_id" in given else forced_eos
        decode = Decode(
            num_beams=beams,
            max_new_tokens=11,
            length_penalty=given.get("length_penalty", 1.0),
            early_stopping=given.get("early_stopping", False),
        )
        return decode, replace(self.special, forced_bos=given.get("forced_bos_token_id"), forced_eos=forced_eos)


@pytest.fixture(scope="module", params=["bart-tiny", "t5-tiny"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    folder = import_rag(str(GOLDEN / request.param / "rag"), tmp_path_factory.mktemp("golden") / request.param)
    generator = open_generator(folder / "generator")
    meta = json.loads((GOLDEN / request.param / "meta.json").read_text())
    tokens = meta["special_tokens"]
    return Golden(
        folder=folder,
        graphdef=generator.graphdef,
        params=generator.load_params(),
        values=dict(np.load(GOLDEN / request.param / "golden.npz")),
        variants=meta["variants"],
        special=SpecialTokens(tokens["eos"], tokens["pad"], tokens["bos"]),
        vocabulary=generator.config.vocab_size,
    )


@partial(jax.jit, static_argnums=0)
def _scores(
    graph: nnx.GraphDef, params: Params, memory: DocumentMemory, answers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    generator = nnx.merge(graph, params)
    return token_logp(generator, answer_hidden(generator, memory, answers), answers)


@pytest.fixture
def one_size() -> Iterator[None]:
    with one_loop():
        yield


@pytest.fixture
def quick(variant: str, golden: Golden) -> Iterator[None]:
    """Rows that are done leave in one variant of T5 alone, whose pool has positions, too."""
    with nullcontext() if variant == "default" and golden.special.bos is None else one_loop():
        yield


@pytest.mark.parametrize("name", LABELS)
def test_likelihoods(golden: Golden, name: str) -> None:
    """With and without the prior, <s>, smoothing and the reduction, on whole, empty and one-token answers."""
    if f"in/{name}" not in golden.values:
        pytest.skip(f"{name} is recorded for BART only")
    labels, pad = golden.values[f"in/{name}"], golden.special.pad
    # what follows each label is the next one, and a padding token at the end
    targets = np.full((4, LONGEST), pad, np.int32)
    targets[:, : labels.shape[1] - 1] = labels[:, 1:]
    memory = replace(golden.memory(), start=jnp.asarray(np.repeat(labels[:, 0], 3), jnp.int32))
    scores = _scores(golden.graphdef, golden.params, memory, np.repeat(targets, 3, axis=0)[:, None])
    logp, mean = (np.asarray(x).reshape(4, 3, -1) for x in scores)
    counted = targets != pad
    all_bos = golden.special.bos is not None and bool((targets[:, 0] == golden.special.bos).all())

    def nll(exclude: bool, smoothing: float) -> np.ndarray:
        drop = np.full(4, exclude and all_bos)
        return np.asarray(hugging_face_nll(golden.prior, logp, counted, drop, smoothing, mean, golden.vocabulary))

    expected = {key: golden.values[f"score/{name}/{key}"] for key in ("nll", "nll_exclude_bos", "smooth_0.1")}
    np.testing.assert_allclose(nll(False, 0.0), expected["nll"], rtol=1e-4)
    np.testing.assert_allclose(nll(True, 0.0), expected["nll_exclude_bos"], rtol=1e-4)
    np.testing.assert_allclose(nll(False, 0.1), expected["smooth_0.1"], rtol=1e-4)
    both = golden.values[f"score/{name}/smooth_0.1_exclude_bos"]
    np.testing.assert_allclose(nll(True, 0.1), both, rtol=1e-4)
    np.testing.assert_allclose(nll(False, 0.0).sum(), golden.values[f"score/{name}/loss_reduced"], rtol=1e-4)
    np.testing.assert_allclose(nll(False, 0.1).sum(), golden.values[f"score/{name}/smooth_0.1_reduced"], rtol=1e-4)
    clean = -np.asarray(marginal_logp(golden.prior, np.where(counted[:, None], logp, 0.0).sum(axis=-1)))
    np.testing.assert_allclose(clean, golden.values[f"score/{name}/clean_nll"], rtol=1e-4)
    of_tokens = -np.where(counted, marginal_logp(golden.prior, logp), 0.0).sum(axis=-1)
    np.testing.assert_allclose(of_tokens, golden.values[f"score/{name}/rag_token_nll"], rtol=1e-4)


@pytest.mark.parametrize("smoothing", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_the_reduced_loss_and_its_gradients(golden: Golden, smoothing: float, world: Path) -> None:
    """By every parameter of both parts, and by the documents' embeddings, through the loss that training uses."""
    values, start = golden.values, "grad/" if smoothing == 0.0 else "grad_smooth_0.1/"
    config = tiny_config(world, retriever__pooling="cls", retriever__normalize=False, retriever__logit_scale=1.0)
    train = config.train.replace(label_smoothing=smoothing)
    rag = replace(
        load_pipeline(config),
        config=config.replace(hf_compatible=True, train=train),
        retriever=open_encoder(golden.folder / "question_encoder", "cls", normalize=False),
        generator=open_generator(golden.folder / "generator"),
        special=golden.special,
    )
    labels, mask = values["in/labels"], values["in/context_attention_mask"] == 1
    answer = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], golden.special.pad)], axis=1)
    batch = TrainBatch(
        questions=QuestionBatch(
            row=np.arange(4),
            question=values["in/input_ids"],
            question_mask=values["in/attention_mask"] == 1,
            answer=answer,
            answer_mask=answer != golden.special.pad,
        ),
        passage_embeddings=values["in/doc_embeds"],
        valid=np.ones((4, 3), bool),
        source=values["in/context_input_ids"].reshape(4, 3, -1),
        source_mask=mask.reshape(4, 3, -1),
    )
    batch = jax.device_put(batch)

    def total(params: Params, passages: jax.Array) -> jax.Array:
        mean, _ = rag_loss(rag, params, replace(batch, passage_embeddings=passages), jax.random.key(0))
        return mean * 4

    function = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    value, (grads, doc_embeds) = jax.device_get(function(rag.initial_params(), batch.passage_embeddings))
    np.testing.assert_allclose(value, values[f"{start}loss"], rtol=1e-4)
    # every gradient is weighed by shares, each as uncertain as the logarithm that it is exp of; smoothing's, to the
    # letter, counts the whole vocabulary, so that it is V times as large
    nll, smooth = values["score/labels/nll"], values["score/labels/smooth_0.1"] - 0.9 * values["score/labels/nll"]
    share = rounding(nll, 1) + (rounding(golden.vocabulary * smooth, 1) if smoothing else 0.0)
    apart = share * np.abs(values["score/labels/question_embeds"]).max()
    np.testing.assert_allclose(doc_embeds, values[f"{start}doc_embeds"], rtol=1e-4, atol=apart)
    named = {
        "question_encoder": encoder_tensors({"model_type": "dpr"}, grads["retriever"], dpr_prefix({})),
        "generator": generator_tensors(rag.generator.hf_config, grads["generator"]),
    }
    for part, ours in named.items():
        theirs = f"{start}{part}/"
        of_part = float(values[f"{theirs}norm"])
        np.testing.assert_allclose(norm(ours), of_part, rtol=1e-4 + share)
        names = [str(name) for name in values[f"{theirs}param_names"]]
        norms = [np.linalg.norm(ours[name]) for name in names]
        np.testing.assert_allclose(norms, values[f"{theirs}param_norms"], rtol=1e-4, atol=share * of_part)
        recorded = [key for key in values if key.startswith(f"{theirs}array/")]
        assert recorded
        largest = max(np.abs(values[key]).max() for key in recorded)
        for key in recorded:
            expected = values[key]
            found = ours[key.removeprefix(f"{theirs}array/")]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=share * largest, err_msg=key)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("mode", ["hf", "masked"])
@pytest.mark.parametrize(("variant", "beams"), SEARCHES)
def test_thorough_decoding(golden: Golden, variant: str, beams: int, mode: str) -> None:
    """The same distinct candidates, negative log-likelihoods and choices, candidate by candidate."""
    if variant not in golden.variants:
        pytest.skip(f"{variant} is recorded for BART only")
    decode, special = golden.settings(variant, beams)
    memory, prior = golden.memory(), np.asarray(golden.prior)
    searched = memory if mode == "masked" else golden.memory(masked=False)
    found = decode_hf_compatible(golden.graphdef, golden.params, searched, memory, prior, ALL, decode, special)
    expected = {k: v for k, v in golden.values.items() if k.startswith(f"decode/{variant}/b{beams}/{mode}/")}
    expected = {key.rpartition("/")[2]: value for key, value in expected.items()}
    for question, ours in enumerate(found):
        check_candidates(ours, {key: value[question] for key, value in expected.items()}, special)


def check_candidates(found: Candidates, theirs: dict[str, np.ndarray], special: SpecialTokens) -> None:
    """A candidate is what stands before the end token, and whether there is one."""
    count, length = theirs["num_candidates"], theirs["length"]
    returned = [[int(t) for t in row[1:length]] for row in theirs["candidates"][:count]]
    rows = [(tuple(takewhile(lambda t: t != special.eos, row)), special.eos in row) for row in returned]
    ours = list(zip(found.tokens, found.finished.tolist(), strict=True))
    assert sorted(ours) == sorted(rows)
    place = [ours.index(row) for row in rows]
    assert found.thorough_logp is not None and found.doc_logp is not None
    np.testing.assert_allclose(-found.thorough_logp[place], theirs["nll"][:count], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.doc_logp[:, place].T, theirs["doc_logp"][:count], rtol=1e-4, atol=1e-4)
    assert ours[found.best("thorough")[0]] == rows[theirs["chosen_index"]]
    first = [int(np.flatnonzero(found.beam_logp[:, c] > -np.inf)[0]) for c in place]
    assert first == theirs["first_doc"][:count].tolist()


@pytest.mark.usefixtures("one_size")
@pytest.mark.parametrize(("variant", "beams"), SEARCHES)
def test_rag_token_decoding(golden: Golden, variant: str, beams: int) -> None:
    if variant not in golden.variants:
        pytest.skip(f"{variant} is recorded for BART only")
    decode, special = golden.settings(variant, beams)
    memory, prior = golden.memory(), golden.prior
    found = jax.device_get(
        search_rag_token(golden.graphdef, golden.params, memory, prior, beam_settings(decode, special, True), special)[
            0
        ]
    )
    sequences = golden.values[f"rag_token/{variant}/b{beams}/sequences"]
    for question, row in enumerate(sequences):
        length = found.length[question, 0]
        ours, fill = found.tokens[question, 0, :length], row[1 + length :]
        np.testing.assert_array_equal(ours, row[1 : 1 + length])
        assert set(fill.tolist()) <= {special.pad, special.eos}
    if beams > 1:
        scores = found.logp[:, 0] / found.length[:, 0] ** decode.length_penalty
        np.testing.assert_allclose(scores, golden.values[f"rag_token/{variant}/b{beams}/scores"], rtol=1e-4)
    candidates = decode_rag_token(golden.graphdef, golden.params, memory, np.asarray(prior), decode, special, True)
    for question, of_question in enumerate(candidates):
        [best] = of_question.best("thorough")
        tokens = found.tokens[question, 0, : found.length[question, 0]].tolist()
        assert list(of_question.tokens[best]) == [t for t in tokens if t != special.eos]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("variant", ["default", pytest.param("lp0", marks=pytest.mark.slow)])
def test_other_documents_propose_than_score(golden: Golden, variant: str) -> None:
    """`generate(n_docs=…)` above the configuration's n_docs: all propose, the first n_docs score."""
    decode, special = golden.settings(variant, 4)
    memory, prior = golden.memory(), np.asarray(golden.prior)
    few = prior[:, :2] - np.logaddexp.reduce(prior[:, :2], axis=1, keepdims=True)
    whole = decode_hf_compatible(golden.graphdef, golden.params, memory, memory, prior, ALL, decode, special)
    part = decode_hf_compatible(golden.graphdef, golden.params, memory, memory, few, ALL, decode, special)
    first = decode_hf_compatible(
        golden.graphdef, golden.params, memory, memory, prior, ALL & (np.arange(3) < 1), decode, special
    )
    for question, (all_three, two, one) in enumerate(zip(whole, part, first, strict=True)):
        assert sorted(all_three.tokens) == sorted(two.tokens)
        assert set(one.tokens) == {
            y for y, by in zip(all_three.tokens, all_three.beam_logp[0], strict=True) if by > -np.inf
        }
        assert two.doc_logp is not None and two.thorough_logp is not None and two.posterior is not None
        assert (two.doc_logp[2] == -np.inf).all() and (two.posterior[2] == 0).all()
        expected = np.logaddexp.reduce(few[question][:, None] + two.doc_logp[:2], axis=0)
        longer = [len(y) > 0 or not ends for y, ends in zip(two.tokens, two.finished, strict=True)]
        np.testing.assert_allclose(
            two.thorough_logp[longer], expected[longer], rtol=1e-4
        )  # one token alone loses its prior
        assert (np.diff(two.thorough_logp) <= 0).all()


# prompts


TEXTS = (
    'The capital of Côte d\'Ivoire is Yamoussoukro; its largest city is "Abidjan".',
    "Paris (French: [paʁi]) is the capital of France, on the Seine; it had 2,102,650 people in 2023.",
    "Who wrote 'War and Peace'? Leo Tolstoy, between 1863 and 1869.",
)
QUESTIONS = (
    "What's the capital of Côte d'Ivoire?",
    "who wrote  war and peace ?",
    "How many people live in Paris -- 2023?",
)


def tokenizer_folder(kind: str, folder: Path) -> Path:
    """A tokenizer of BERT's, BART's or T5's kind, trained on a few sentences."""
    special = {"bert": "[PAD] [UNK] [CLS] [SEP] [MASK]", "bart": "<s> <pad> </s> <unk>", "t5": "<pad> </s> <unk>"}[kind]
    names = special.split()
    training: dict[str, Any] = {"special_tokens": names, "vocab_size": 300, "show_progress": False}
    if kind == "bert":
        backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = tokenizers.normalizers.BertNormalizer()
        backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        backend.decoder = tokenizers.decoders.WordPiece()
        trainer: Any = tokenizers.trainers.WordPieceTrainer(**training)
        frame, given = "[CLS] $A [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    elif kind == "bart":
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(**training | {"vocab_size": 500}, initial_alphabet=alphabet)
        frame, given = "<s> $A </s>", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    else:
        backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        backend.decoder = tokenizers.decoders.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(**training, unk_token="<unk>")
        frame, given = "$A </s>", {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    backend.train_from_iterator([*TEXTS, *QUESTIONS, *map(str.lower, QUESTIONS), " / // "] * 3, trainer)
    used = [(token, backend.token_to_id(token)) for token in names if token in frame]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=frame, special_tokens=used)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return folder


@pytest.mark.parametrize(("kind", "prefix", "longest"), [("bart", " ", 300), ("bart", None, 40), ("t5", "ask:  ", 140)])
def test_prompts_have_the_token_ids_of_rag_retriever(
    kind: str, prefix: str | None, longest: int, world: Path, tmp_path: Path
) -> None:
    """transformers' own `RagRetriever`, its search replaced, against ours: quotes, double spaces, cut questions."""
    from transformers import PreTrainedTokenizerFast, RagRetriever

    folders = {name: tokenizer_folder(name, tmp_path / name) for name in ("bert", kind)}
    documents = [
        Passage("a", '"Heroes" (album)', TEXTS[0]),
        Passage("b", '"Paris"', TEXTS[1] * 4),
        Passage("c", "War  and   Peace", f"{TEXTS[2]}  Twice."),
    ]
    ids = np.array([[0, 1], [2, 0], [1, 2]])

    theirs: Any = RagRetriever.__new__(RagRetriever)
    for name, part in (("question_encoder", "bert"), ("generator", kind)):
        named = json.loads((folders[part] / "tokenizer_config.json").read_text())
        fast = PreTrainedTokenizerFast(tokenizer_file=str(folders[part] / "tokenizer.json"), **named)
        setattr(theirs, f"{name}_tokenizer", fast)
    theirs.config = SimpleNamespace(title_sep=" / ", doc_sep=" // ", max_combined_length=longest, generator=None)
    theirs.n_docs, theirs.return_tokenized_docs = 2, False
    found = [{"title": [documents[z].title for z in row], "text": [documents[z].text for z in row]} for row in ids]
    theirs.retrieve = lambda states, k: (np.zeros((3, 2, 4)), ids, found)
    asked = theirs.question_encoder_tokenizer(list(QUESTIONS), padding=True)["input_ids"]
    expected = theirs(asked, np.zeros((3, 4)), prefix=prefix or "", return_tensors="np")

    config = tiny_config(world)
    before, of_passage = ("", prefix or "") if not (prefix or "").strip() else (prefix, "")
    generator = config.generator.replace(
        prompt_template=f"{before}{{passage}} // {{question}}",
        passage_template=f"{of_passage}{{title}} / {{text}}",
        max_prompt_tokens=longest,
    )
    tokenizer = Tokenizer.load(folders[kind])
    rag = replace(
        load_pipeline(config),
        config=config.replace(hf_compatible=True, generator=generator),
        retriever_tokenizer=Tokenizer.load(folders["bert"]),
        generator_tokenizer=tokenizer,
        special=SpecialTokens(tokenizer.eos_id, tokenizer.pad_id),
    )
    write_store(
        shard_folder(tmp_path, 0), documents, tokenizer.encode, lambda p: passage_text(generator.passage_template, p)
    )
    tokens, mask = tokenize_prompts(
        rag.tokenizers, PassageStore.open(tmp_path), question_batch(rag.tokenizers, QUESTIONS), ids
    )
    np.testing.assert_array_equal(tokens, expected["context_input_ids"])
    np.testing.assert_array_equal(mask, expected["context_attention_mask"] == 1)
    cut = mask.all(axis=1)
    assert cut.any() == (longest < 300) and not cut.all()
