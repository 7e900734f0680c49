"""RAG-Sequence side by side with Hugging Face's on torch: the same weights, documents, beams and lengths.

    python -m benchmarks.hugging_face --model bart-small        # or bart-base

BART with wide random weights, so that documents disagree; documents and priors are drawn, too, and given to both, so
that neither searches an index. Decoding, where `RagSequenceForGeneration.generate` must choose what ragjax's thorough
decoding chooses, with exact decoding at equal beams beside it; then training steps with AdamW of both models, where the
losses are compared. Both take turns. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks.report import (
    Stage,
    count_read,
    count_unread,
    flops_of,
    flops_of_search,
    make_console,
    peak,
    show,
    timed,
    times_as_fast,
    torch_place,
    write,
)
from ragjax.checkpoints.pretrained import open_encoder, open_generator
from ragjax.config import Config, Corpus, Decode, Generator, Retriever, Train
from ragjax.data.prompt import Prompt
from ragjax.data.question_batch import QuestionBatch
from ragjax.decoding.candidates import with_end
from ragjax.decoding.decode import decode_rag_sequence
from ragjax.decoding.exact.decode import decode_exact
from ragjax.decoding.propose import beam_search_documents, beam_settings, prefill_documents
from ragjax.files import cache_folder
from ragjax.marginal import log_prior
from ragjax.models.generator import SpecialTokens
from ragjax.models.kv_cache import DocumentMemory
from ragjax.planning.program_cost import matmul_flops
from ragjax.rag import RagModel
from ragjax.runs.restore import enable_compilation_cache
from ragjax.training.batch import TrainBatch
from ragjax.training.state import init_train_state
from ragjax.training.step import make_train_step

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
SHAPES = {
    "bart-small": {"d_model": 256, "layers": 3, "attention_heads": 4, "ffn_dim": 1024},
    "bart-base": {"d_model": 768, "layers": 6, "attention_heads": 12, "ffn_dim": 3072},
}
SPECIAL = SpecialTokens(eos=2, pad=1)


def hugging_face(shape: dict[str, int], documents: int) -> Any:
    """A RAG-Sequence model on torch, its BART drawn so wide that documents disagree and answers end."""
    import torch
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        DPRConfig,
        DPRQuestionEncoder,
        RagConfig,
        RagSequenceForGeneration,
    )

    torch.manual_seed(0)
    sides = {
        f"{side}_{key}": size for side in ("encoder", "decoder") for key, size in shape.items() if key != "d_model"
    }
    bart = BartConfig(d_model=shape["d_model"], **sides, forced_eos_token_id=None)
    encoder = DPRConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = RagConfig(
        question_encoder=encoder.to_dict(),
        generator=bart.to_dict(),
        n_docs=documents,
        **{f"{kind}_token_id": getattr(bart, f"{kind}_token_id") for kind in ("eos", "pad", "decoder_start")},
    )
    generator = BartForConditionalGeneration(bart).eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if parameter.ndim > 1:
                spread = 1.0 / shape["d_model"] ** 0.5 * (1.5 if "embed" not in name and "shared" not in name else 1.0)
                parameter.copy_(torch.randn(parameter.shape) * spread)
        generator.final_logits_bias[0, SPECIAL.eos] = 4.0
    return RagSequenceForGeneration(
        config=config, question_encoder=DPRQuestionEncoder(encoder), generator=generator
    ).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hugging_face",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=SHAPES, default="bart-small")
    parser.add_argument("--parts", nargs="+", choices=("decoding", "training"), default=("decoding", "training"))
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--source-tokens", type=int, default=160)
    parser.add_argument("--target-tokens", type=int, default=16)
    parser.add_argument("--questions", type=int, default=3)
    parser.add_argument("--train-documents", type=int, default=5)
    parser.add_argument("--train-questions", type=int, default=2, help="in a training step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both")
    parser.add_argument("--folder", type=Path, help="where to write MODEL.md and MODEL.png")
    options = parser.parse_args()
    console, most = make_console(), peak(options.dtype)
    console.print(f"{options.model} on {jax.devices()[0]}, {options.dtype}, {most / 1e9:.0f} GFLOP/s\n")
    parts = {"decoding": decoding, "training": training}
    write(console, options.folder, options.model, {part: parts[part](options, console, most) for part in options.parts})


def decoding(options: argparse.Namespace, console: Console, most: float) -> dict[str, Stage]:
    import torch

    enable_compilation_cache(cache_folder() / "xla")
    k, longest, questions = options.documents, options.target_tokens, options.questions
    theirs = hugging_face(SHAPES[options.model], k)
    with tempfile.TemporaryDirectory() as folder:
        theirs.generator.save_pretrained(folder)
        ours = open_generator(Path(folder), dtype=options.dtype)
        params = jax.tree.map(jnp.asarray, ours.load_params())
    there = torch_place(options.dtype)
    theirs.to(**there)
    rng = np.random.default_rng(0)
    sources = rng.integers(4, ours.config.vocab_size, (questions, k, options.source_tokens)).astype(np.int32)
    scores = rng.normal(size=(questions, k)).astype(np.float32)
    settings = Decode(num_docs=k, num_beams=options.beams, max_new_tokens=longest, min_new_tokens=2)
    one_search = {"start_beams": options.beams, "max_beams": options.beams, "lazy": False, "fallback": "none"}
    exactly = settings.replace(mode="exact", **one_search)

    def by_hugging_face(b: int) -> tuple[int, ...]:
        with torch.no_grad():
            found = theirs.generate(
                context_input_ids=torch.tensor(sources[b], dtype=torch.long, device=there["device"]),
                context_attention_mask=torch.ones(sources[b].shape, dtype=torch.long, device=there["device"]),
                doc_scores=torch.tensor(scores[b : b + 1], **there),
                n_docs=k,
                num_beams=options.beams,
                max_length=longest + 1,
                min_length=3,
                length_penalty=0.0,
                early_stopping=False,
            )
        return tuple(int(token) for token in found[0, 1:])

    def by_ragjax(mode: str, b: int) -> Any:
        prior = np.asarray(log_prior(jnp.asarray(scores[b : b + 1]), jnp.ones((1, k), bool)))
        memory = prefill_documents(ours.graphdef, params, sources[b], np.ones(sources[b].shape, bool))
        [found] = decode_rag_sequence(ours.graphdef, params, memory, prior, settings.replace(mode=mode), SPECIAL)
        return found

    def by_exact(b: int) -> Any:
        """With all documents and as many beams as thorough decoding has: nothing but the search on the marginal."""
        prior = np.asarray(log_prior(jnp.asarray(scores[b : b + 1]), jnp.ones((1, k), bool)))

        def read(rows: np.ndarray) -> DocumentMemory:
            return prefill_documents(ours.graphdef, params, sources[b, rows], np.ones(sources[b, rows].shape, bool))

        [found] = decode_exact(ours.graphdef, params, read, prior, None, exactly, SPECIAL)
        return found

    def answer(found: Any, mode: str) -> tuple[int, ...]:
        best = found.best(mode)[0]
        return (*found.tokens[best], *([SPECIAL.eos] if found.finished[best] else []))

    programs: dict[str, Callable[[int], Any]] = {
        mode: partial(by_ragjax, mode) for mode in ("thorough", "certified", "fast")
    }
    programs["exact"] = by_exact
    programs["reading"] = lambda b: prefill_documents(
        ours.graphdef, params, sources[b], np.ones(sources[b].shape, bool)
    )
    search = beam_settings(settings, SPECIAL, hugging_face=False)
    programs["beam search"] = lambda b: beam_search_documents(ours.graphdef, params, memories[b], search, SPECIAL)
    memories = [programs["reading"](b) for b in range(questions)]
    for b in range(questions):  # compiles
        for program in programs.values():
            program(b)
    stages = {name: Stage() for name in ["Hugging Face", *programs, "rescoring"]}
    same = dict.fromkeys(("Hugging Face", "certified"), 0)
    candidates, skipped, flops, gained, proved = [], [], [], [], 0
    of_reading = flops_of(
        lambda p, s, m: prefill_documents(ours.graphdef, p, s, m), params, sources[0], np.ones(sources[0].shape, bool)
    )
    of_prefix = flops_of_search(ours.graphdef, params, memories[0], settings, SPECIAL)
    for b in range(questions):
        took, chosen = timed(by_hugging_face, b)
        stages["Hugging Face"].seconds.append(took)
        found = {}
        for name, program in programs.items():
            took, found[name] = timed(program, b)
            stages[name].seconds.append(took)
        best = answer(found["thorough"], "thorough")
        same["Hugging Face"] += chosen[: len(best)] == best and set(chosen[len(best) :]) <= {SPECIAL.pad, SPECIAL.eos}
        same["certified"] += answer(found["certified"], "certified") == best
        proved += found["exact"].proof.best
        gained.append(float(found["exact"].thorough_logp[0] - found["thorough"].thorough_logp.max()))
        candidates.append(len(found["thorough"].tokens))
        computed, needed = found["certified"].needed
        skipped.append(1 - computed / max(1, needed))
        prefixes = found["beam search"][1]
        answers = with_end(
            list(zip(found["thorough"].tokens, found["thorough"].finished.tolist(), strict=True)), SPECIAL
        )
        unread = count_unread(prefixes, dict.fromkeys(range(k), answers))
        flops.append((of_reading, of_prefix * count_read(prefixes, options.beams), of_prefix * unread))
    stages["rescoring"].seconds = [
        thorough - fast for thorough, fast in zip(stages["thorough"].seconds, stages["fast"].seconds, strict=True)
    ]
    reading, searching, rescoring = np.mean(flops, axis=0)
    stages["reading"].flops, stages["beam search"].flops, stages["rescoring"].flops = reading, searching, rescoring
    stages["fast"].flops, stages["thorough"].flops = reading + searching, reading + searching + rescoring
    title = (
        f"decoding: {questions} questions, {k} documents of {options.source_tokens} tokens, {options.beams} beams, "
        f"{longest} new tokens, {np.median(candidates):.0f} candidates"
    )
    show(console, title, stages, "thorough", most)
    for name, count in same.items():
        console.print(f"{name} chooses what thorough does: {count} of {questions}")
    console.print(f"scores that certified skips: {np.mean(skipped):.0%} (least {min(skipped):.0%})")
    ratio = times_as_fast(stages["Hugging Face"], stages["thorough"])
    console.print(f"thorough: {ratio:.1f} times as fast as Hugging Face")
    ratios = [times_as_fast(stages[name], stages["exact"]) for name in ("Hugging Face", "thorough")]
    console.print("exact: {:.1f} times as fast as Hugging Face, {:.2f} times as thorough".format(*ratios))
    console.print(
        f"exact: proved {proved} of {questions}; its log p(y|x) minus thorough's, nats: "
        f"median {np.median(gained):+.2f}, least {min(gained):+.2f}, most {max(gained):+.2f}\n",
        soft_wrap=True,
    )
    return stages


def training(options: argparse.Namespace, console: Console, most: float) -> dict[str, Stage]:
    import torch

    k, count, longest, rate = options.train_documents, options.train_questions, options.target_tokens, 1e-5
    theirs = hugging_face(SHAPES[options.model], k)
    settings = Train(
        batch_size=count, num_docs=k, retriever_lr=rate, generator_lr=rate, lr_schedule="constant", remat=False
    )
    with tempfile.TemporaryDirectory() as folder:
        theirs.generator.save_pretrained(Path(folder) / "generator")
        theirs.question_encoder.save_pretrained(Path(folder) / "retriever")
        retriever = open_encoder(Path(folder) / "retriever", "cls", normalize=False, dtype=options.dtype)
        generator = open_generator(Path(folder) / "generator", dtype=options.dtype)
        config = Config(
            output=folder,
            dtype=options.dtype,
            corpus=Corpus(source=folder),
            retriever=Retriever(source=f"{folder}/retriever"),
            generator=Generator(source=f"{folder}/generator"),
            train=settings,
        )
        models = RagModel(config, retriever, generator, SPECIAL, Prompt((), (), (), False, ((), ())), retriever)
        params = jax.tree.map(jnp.asarray, {name: model.load_params() for name, model in models.parts.items()})
    there = torch_place(options.dtype)
    theirs.to(there["device"])
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=rate, weight_decay=0.0)
    rng = np.random.default_rng(0)
    width, state, step = retriever.config.embedding_dim, init_train_state(models, params), make_train_step(models)

    def draw() -> TrainBatch:
        def tokens(*shape: int) -> np.ndarray:
            return rng.integers(4, generator.config.vocab_size, shape).astype(np.int32)

        question = rng.integers(4, 1000, (count, 20)).astype(np.int32)
        source, answer = tokens(count, k, options.source_tokens), tokens(count, longest)
        return TrainBatch(
            questions=QuestionBatch(
                row=np.arange(count, dtype=np.int32),
                question=question,
                question_mask=np.ones_like(question, bool),
                answer=answer,
                answer_mask=np.ones_like(answer, bool),
            ),
            passage_embeddings=rng.normal(size=(count, k, width)).astype(np.float32),
            valid=np.ones((count, k), bool),
            source=source,
            source_mask=np.ones_like(source, bool),
        )

    def by_hugging_face(batch: TrainBatch) -> float:
        def placed(array: np.ndarray) -> Any:
            return torch.tensor(array, device=there["device"])

        answer, _ = batch.questions.answers
        labels = np.concatenate([np.full((count, 1), SPECIAL.eos), answer], axis=1)  # the start token before
        # the parameters stay float32, as in ragjax
        with torch.autocast(there["device"], there["dtype"], enabled=options.dtype != "float32"):
            query = theirs.question_encoder(placed(batch.questions.question).long())[0]
            loss = theirs(
                context_input_ids=placed(batch.source.reshape(count * k, -1)).long(),
                context_attention_mask=placed(batch.source_mask.reshape(count * k, -1)).long(),
                doc_scores=torch.einsum("bd,bkd->bk", query, placed(batch.passage_embeddings)),
                labels=placed(labels).long(),
                reduce_loss=True,
            ).loss
        optimizer.zero_grad()
        (loss / count).backward()
        for part in (theirs.question_encoder, theirs.generator):
            torch.nn.utils.clip_grad_norm_(part.parameters(), settings.max_grad_norm)
        optimizer.step()
        return loss.item() / count

    stages = {"Hugging Face": Stage(), "ragjax": Stage()}
    stages["ragjax"].flops = matmul_flops(step.trace(state, draw(), None).jaxpr.jaxpr)
    losses = []
    for number in range(options.steps + 1):  # the first one compiles
        # in turn, two steps each, the second of which counts: the first one gets its memory back from the other library
        batches = draw(), draw()
        theirs_are = []
        for batch in batches:
            took, found = timed(by_hugging_face, batch)
            theirs_are.append(found)
        in_turn = {"Hugging Face": took}
        for batch, theirs_is in zip(batches, theirs_are, strict=True):
            took, (state, metrics) = timed(step, state, batch, None)
            losses.append((theirs_is, float(metrics["loss"])))
        in_turn["ragjax"] = took
        for name, took in in_turn.items() if number else ():
            stages[name].seconds.append(took)
    title = f"a training step: {count} questions, {k} documents of {options.source_tokens} tokens, answers of {longest}"
    show(console, title, stages, "ragjax", most)
    apart = max(abs(ours / theirs_is - 1) for theirs_is, ours in losses)
    console.print(f"largest relative difference of a loss over {len(losses)} steps: {apart:.1e}")
    ratio = times_as_fast(stages["Hugging Face"], stages["ragjax"])
    console.print(f"a training step: {ratio:.1f} times as fast as Hugging Face")
    return stages


if __name__ == "__main__":
    main()
