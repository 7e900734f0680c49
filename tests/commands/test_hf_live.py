"""transformers' own RAG models, side by side: fresh random ones of several sizes. Needs torch: `make test-torch`."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hugging_face import write_rag_checkpoint
from world import open_world, tiny_config

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
torch = pytest.importorskip("torch", reason="a comparison with torch, which is not installed: make test-torch")

import transformers
from families import CASES as FAMILIES
from families import TOLERANCE, Case, make, opened, ours, theirs, write
from flax import nnx
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DPRConfig,
    DPRQuestionEncoder,
    RagConfig,
    RagSequenceForGeneration,
    RagTokenForGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from ragjax.answering.given_passages import embed_given
from ragjax.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, peft_config, peft_tensors, with_adapters
from ragjax.checkpoints.pretrained import open_encoder, open_generator, save_encoder, save_generator
from ragjax.checkpoints.safetensors import write_safetensors
from ragjax.cli import main
from ragjax.commands.hugging_face import import_rag
from ragjax.config import Config, Decode, Lora, dump_config, load_config
from ragjax.data.corpus import Passage
from ragjax.data.question_batch import QuestionBatch, question_batch, tokenize_questions
from ragjax.data.questions import read_questions
from ragjax.decoding.hf_compat import decode_hf_compatible
from ragjax.decoding.marginal_search import search_rag_token
from ragjax.decoding.propose import beam_settings, prefill_documents
from ragjax.marginal import log_prior
from ragjax.models.generator import SpecialTokens
from ragjax.parallel.mesh import local_mesh
from ragjax.rag import RagPipeline, load_pipeline
from ragjax.retrieval.retrieve import encode_questions, retrieve
from ragjax.runs.restore import restore_params
from ragjax.training.batch import TrainBatch, attach_documents
from ragjax.training.loss import rag_loss

CASES = [  # family, seed, documents, longest source, longest answer, how the models differ
    ("bart", 0, 2, 17, 5, {"d_model": 24, "encoder_layers": 1, "decoder_layers": 3, "scale_embedding": True}),
    ("bart", 1, 5, 41, 11, {"d_model": 40, "encoder_attention_heads": 2, "decoder_ffn_dim": 24}),
    ("bart", 2, 3, 9, 2, {"activation_function": "relu", "vocab_size": 211}),
    ("t5", 3, 4, 33, 7, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 3}),
    ("t5", 4, 2, 150, 13, {"d_kv": 5, "num_heads": 3, "relative_attention_num_buckets": 16}),
]
# of each way in which tensors are named one family
ADAPTED = [
    next(case for case in FAMILIES if case.kind == kind)
    for kind in (
        *("BertModel", "DPRQuestionEncoder", "DistilBertModel", "MPNetModel", "Qwen3Model"),
        *("LlamaForCausalLM", "Gemma2ForCausalLM", "BartForConditionalGeneration", "MT5ForConditionalGeneration"),
    )
]


def draw(model: Any, generator: Any) -> None:
    """Wide random weights, so that documents disagree and ties are rare."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                spread = 0.5 if "embed" in name or "shared" in name else 1.5 / parameter.shape[1] ** 0.5
                parameter.copy_(noise * spread)
            else:
                parameter.copy_(0.3 * noise + (name.endswith("weight")))


def hugging_face_model(family: str, seed: int, documents: int, shape: dict[str, Any], smoothing: float) -> Any:
    encoder = DPRConfig(
        vocab_size=90, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=40, projection_dim=16 if seed % 2 else 0,
    )  # fmt: skip
    small = {"vocab_size": 120, "d_model": 32}
    if family == "bart":
        sides = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
        small |= {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sides.items()}
        generator = BartConfig(**small | {"max_position_embeddings": 160} | shape)
        made: Any = BartForConditionalGeneration(generator)
    else:
        small |= {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        generator = T5Config(**small | shape | {"bos_token_id": None})
        made = T5ForConditionalGeneration(generator)
    config = RagConfig(
        question_encoder=encoder.to_dict(),
        generator=generator.to_dict(),
        n_docs=documents,
        label_smoothing=smoothing,
        **{f"{kind}_token_id": getattr(generator, f"{kind}_token_id") for kind in ("bos", "eos", "pad")},
        decoder_start_token_id=generator.decoder_start_token_id,
    )
    model = RagSequenceForGeneration(config=config, question_encoder=DPRQuestionEncoder(encoder), generator=made).eval()
    draw(model, torch.Generator().manual_seed(seed))
    return model


def padded(rng: np.random.Generator, rows: int, longest: int, vocabulary: int, pad: int) -> tuple[Any, Any]:
    """Rows of odd lengths, most of them mostly padding, one of full length."""
    lengths = np.maximum(1, (longest * rng.random(rows) ** 3).astype(int))
    lengths[rng.integers(rows)] = longest
    mask = np.arange(longest) < lengths[:, None]
    return np.where(mask, rng.integers(4, vocabulary, (rows, longest)), pad), mask


@pytest.mark.parametrize(("family", "seed", "documents", "source", "answer", "shape"), CASES, ids=str)
def test_fresh_models(
    family: str, seed: int, documents: int, source: int, answer: int, shape: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    smoothing = (0.0, 0.1)[seed % 2]
    model = hugging_face_model(family, seed, documents, shape, smoothing)
    model.save_pretrained(tmp_path / "rag")
    folder = import_rag(str(tmp_path / "rag"), tmp_path / "out")
    hf, rng = model.config.generator, np.random.default_rng(seed)
    special = SpecialTokens(hf.eos_token_id, hf.pad_token_id, hf.bos_token_id)
    config = tiny_config(world, retriever__pooling="cls", retriever__normalize=False, retriever__logit_scale=1.0)
    config = config.replace(hf_compatible=True, train=config.train.replace(label_smoothing=smoothing))
    rag = replace(
        load_pipeline(config.replace(hf_compatible=False)),
        config=config,
        retriever=open_encoder(folder / "question_encoder", "cls", normalize=False),
        generator=open_generator(folder / "generator"),
        special=special,
    )
    count = 3
    question, question_mask = padded(rng, count, 13, 90, 0)
    context, context_mask = padded(rng, count * documents, source, hf.vocab_size, special.pad)
    body, _ = padded(rng, count, answer, hf.vocab_size, special.pad)
    labels = np.full((count, answer + 3), special.pad)
    for row, tokens in zip(labels, body, strict=True):
        framed = [
            hf.decoder_start_token_id,
            *([0] if family == "bart" else []),
            *tokens[tokens != special.pad],
            special.eos,
        ]
        row[: len(framed)] = framed
    with torch.no_grad():
        embedded = model.question_encoder(torch.tensor(question), attention_mask=torch.tensor(question_mask).long())[0]
    passages = rng.normal(size=(count, documents, embedded.shape[1])).astype(np.float32)
    scores = torch.bmm(embedded[:, None], torch.tensor(passages).transpose(1, 2))[:, 0]
    given = {
        "context_input_ids": torch.tensor(context),
        "context_attention_mask": torch.tensor(context_mask).long(),
        "doc_scores": scores,
    }
    targets = np.concatenate([labels[:, 1:], np.full((count, 1), special.pad)], axis=1)
    batch = TrainBatch(
        questions=QuestionBatch(
            row=np.arange(count),
            question=question,
            question_mask=question_mask,
            answer=targets,
            answer_mask=targets != special.pad,
        ),
        passage_embeddings=passages,
        valid=np.ones((count, documents), bool),
        source=context.reshape(count, documents, -1),
        source_mask=context_mask.reshape(count, documents, -1),
    )
    batch = jax.device_put(batch)
    params = rag.initial_params()

    def ours(asked: Config) -> float:
        return (
            float(jax.jit(lambda p: rag_loss(replace(rag, config=asked), p, batch, jax.random.key(0))[0])(params))
            * count
        )

    token_model = RagTokenForGeneration(config=model.config).eval()
    token_model.load_state_dict(model.state_dict())
    with torch.no_grad():
        for exclude in (False, True):
            theirs = model(**given, labels=torch.tensor(labels), exclude_bos_score=exclude, reduce_loss=True).loss
            asked = config.replace(train=config.train.replace(exclude_bos=exclude))
            assert ours(asked) == pytest.approx(float(theirs), rel=1e-4)
        # without decoder inputs of its own RAG-Token's would be shifted once more
        of_token = token_model(
            **given, labels=torch.tensor(labels), decoder_input_ids=torch.tensor(labels), reduce_loss=True
        ).loss
    assert ours(config.replace(model="rag_token")) == pytest.approx(float(of_token), rel=1e-4)

    prior = log_prior(jnp.asarray(scores.numpy()), jnp.ones(scores.shape, bool))
    graph, weights = rag.generator.graphdef, params["generator"]
    tokens, mask = jnp.asarray(context, jnp.int32), jnp.asarray(context_mask)
    memory, unmasked = (
        prefill_documents(graph, weights, tokens, mask),
        prefill_documents(graph, weights, tokens, jnp.ones_like(mask)),
    )
    for beams in (1, 3):
        settings = Decode(num_beams=beams, max_new_tokens=8, length_penalty=1.0)
        forced = replace(special, forced_eos=special.eos if family == "bart" else None)
        chosen = model.generate(**given, num_beams=beams, max_length=9).numpy()
        found = decode_hf_compatible(
            graph, weights, unmasked, memory, np.asarray(prior), np.ones(prior.shape, bool), settings, forced
        )
        for b, candidates in enumerate(found):
            ours_are = [
                (*y, special.eos) if ends else y for y, ends in zip(candidates.tokens, candidates.finished, strict=True)
            ]
            returned = tuple(int(token) for token in chosen[b, 1:])
            place = max((c for c, y in enumerate(ours_are) if returned[: len(y)] == y), key=lambda c: len(ours_are[c]))
            assert candidates.thorough_logp is not None
            assert candidates.thorough_logp[place] == pytest.approx(candidates.thorough_logp[0], abs=1e-3), (
                "their choice is ours"
            )
        sequences = token_model.generate(
            **given, num_beams=beams, max_length=9, forced_eos_token_id=forced.forced_eos
        ).numpy()
        together = jax.device_get(
            search_rag_token(graph, weights, memory, prior, beam_settings(settings, forced, True), forced)[0]
        )
        for b, generated in enumerate(sequences):
            length = together.length[b, 0]
            np.testing.assert_array_equal(together.tokens[b, 0, :length], generated[1 : 1 + length])


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("kind", ["RagSequenceForGeneration", "RagTokenForGeneration"])
def test_transformers_loads_what_was_trained_and_exported(family: str, kind: str, world: Path, tmp_path: Path) -> None:
    """Imported, trained for three steps on the tiny world, exported: its loss is ours."""
    (tmp_path / "rag").mkdir()
    write_rag_checkpoint(tmp_path / "rag", family, kind)
    first = import_rag(str(tmp_path / "rag"), tmp_path / "first")
    settings = [f"output={tmp_path}/run", f"index.path={tmp_path}/index", f"corpus.source={world}/passages.jsonl"]
    settings += [f"questions.{split}={world}/{split}.jsonl" for split in ("train", "dev", "test")]
    settings += [
        "corpus.format=jsonl",
        f"retriever.passage_encoder={first}/question_encoder",
        "train.exclude_bos=false",
    ]
    settings += ["train.steps=3", "train.batch_size=8", "train.generator_lr=1e-2", "retriever.max_passage_tokens=64"]
    settings += ["generator.max_prompt_tokens=128", "train.label_smoothing=0.0"]
    for command in ("index", "train"):
        assert main([command, str(first / "config.yaml"), *settings]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0

    rag, index, store = open_world(load_config(tmp_path / "run" / "config.yaml"))
    restored = restore_params(rag)
    assert restored is not None
    batch, mean = evaluate_batch(rag, restored[0], index, store, world)
    model = {"RagSequenceForGeneration": RagSequenceForGeneration, "RagTokenForGeneration": RagTokenForGeneration}[kind]
    theirs = model.from_pretrained(tmp_path / "exported").eval()
    start = rag.generator.config.start
    labels = torch.tensor(np.concatenate([np.full((8, 1), start), batch.questions.answer], axis=1)).long()
    with torch.no_grad():
        mask = torch.tensor(batch.questions.question_mask).long()
        embedded = theirs.question_encoder(torch.tensor(batch.questions.question).long(), attention_mask=mask)[0]
        scores = torch.einsum("bd,bkd->bk", embedded, torch.tensor(batch.passage_embeddings))
        nll = theirs(
            context_input_ids=torch.tensor(batch.source).long().flatten(0, 1),
            context_attention_mask=torch.tensor(batch.source_mask).long().flatten(0, 1),
            doc_scores=scores,
            decoder_input_ids=labels,
            labels=labels,
            n_docs=3,
        ).loss
    assert float(nll) == pytest.approx(8 * mean, rel=1e-4)
    shutil.rmtree(tmp_path / "run")


def evaluate_batch(rag: RagPipeline, params: Any, index: Any, store: Any, world: Path) -> tuple[Any, float]:
    chosen = read_questions(world / "train.jsonl")[:8]
    questions = question_batch(rag.tokenizers, [q.question for q in chosen], [q.answers[0] for q in chosen])
    batch = attach_documents(rag, index, store, questions, retrieve(rag, params, index, questions, 3).ids)
    arrays = jax.device_put(batch)
    return batch, float(jax.jit(lambda p: rag_loss(rag, p, arrays, jax.random.key(0))[0])(params))


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_a_fresh_checkpoint_of_every_family(case: Case, tmp_path: Path) -> None:
    """Every parameter random: equal to transformers, and transformers reads what is saved of it."""
    if sentences := case.files in ("sentence", "dense"):
        pytest.importorskip("sentence_transformers")
    folder = write(tmp_path / "folder", case, *make(case, tmp_path / "made"), seed="fresh")
    model = opened(case, folder)
    found = ours(case, model)
    np.testing.assert_allclose(found, theirs(case, folder), atol=TOLERANCE)
    if not sentences and not case.kind.startswith("DPR"):  # whose names have a prefix, which an export knows
        save = save_encoder if case.pooling else save_generator
        save(tmp_path / "saved", model.hf_config, model.load_params())
        np.testing.assert_allclose(found, theirs(case, tmp_path / "saved"), atol=TOLERANCE)


@pytest.mark.parametrize("case", ADAPTED, ids=lambda case: case.name)
def test_peft_reads_our_adapters_and_we_read_its(case: Case, tmp_path: Path) -> None:
    """Its model with our adapters computes what ours does, and so does ours with those that it has saved."""
    peft = pytest.importorskip("peft", reason="make test-torch installs it")
    folder = write(tmp_path / "folder", case, *make(case, tmp_path / "made"), seed="fresh")
    lora = Lora(rank=3, alpha=6.0)
    model = with_adapters(opened(case, folder), (), lora, 0)
    leaves, rng = nnx.traversals.flatten_mapping(model.load_params()), np.random.default_rng(0)
    some = {
        path: jnp.asarray(rng.normal(scale=0.2, size=x.shape), x.dtype)
        for path, x in leaves.items()
        if "lora_b" in path
    }
    params = nnx.traversals.unflatten_mapping(leaves | some)
    found, tensors = ours(case, model, params), peft_tensors(model, params)
    assert np.abs(found - ours(case, model)).max() > 0.01
    (tmp_path / "ours").mkdir()
    write_safetensors(tmp_path / "ours" / ADAPTER_WEIGHTS, tensors)
    (tmp_path / "ours" / ADAPTER_CONFIG).write_text(json.dumps(peft_config(model, lora, str(folder), tensors)))
    cls = transformers.AutoModel if case.pooling else getattr(transformers, case.kind)
    loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(folder, dtype=torch.float32), tmp_path / "ours")
    assert {name.replace(".default", "") for name in loaded.state_dict() if ".lora_" in name} == set(tensors)
    loaded.save_pretrained(tmp_path / "theirs")
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(found, theirs(case, tmp_path / "merged"), atol=TOLERANCE)
    again = opened(case, import_rag(str(tmp_path / "theirs"), tmp_path / "again"))
    np.testing.assert_allclose(found, ours(case, again), atol=TOLERANCE)


def test_sentence_transformers_loads_the_encoder_that_was_exported(run: Path, tmp_path: Path) -> None:
    """A trained one, and one that reads prompts: its embeddings of questions and passages are ours."""
    sentence = pytest.importorskip("sentence_transformers", reason="make test-torch installs it")
    prompted = tmp_path / "prompted"
    prompted.mkdir()
    changed = ["retriever.question_template='query: {question}'", "retriever.passage_template='text: {title}: {text}'"]
    changed += [f"output={prompted}", "retriever.pooling=cls"]
    (prompted / "config.yaml").write_text(dump_config(load_config(run / "config.yaml", changed)))
    questions, passages = (
        ["Capital of Arland?", "And of Bel?"],
        [Passage("0", "Ar", "Kes."), Passage("1", "B", "Or.")],
    )
    for folder in (run, prompted):
        exported = tmp_path / f"exported-{folder.name}"
        assert main(["export", str(folder), str(exported)]) == 0
        theirs = sentence.SentenceTransformer(str(exported / "question_encoder"), device="cpu")
        rag = load_pipeline(load_config(folder / "config.yaml"))
        restored = restore_params(rag)
        params = restored[0] if restored else rag.initial_params()
        assert bool(restored) == (folder == run)
        asked = encode_questions(rag, params, tokenize_questions(rag.tokenizers, questions), local_mesh(data=1))
        np.testing.assert_allclose(theirs.encode(questions, prompt_name="query"), asked, atol=TOLERANCE)
        if folder == prompted:  # a trained question encoder is not the one of the passages
            texts = [f"{passage.title}: {passage.text}" for passage in passages]
            found = theirs.encode(texts, prompt_name="document")
            np.testing.assert_allclose(found, embed_given(rag, params["retriever"], passages), atol=TOLERANCE)
