"""RAG-Sequence side by side with Hugging Face's on torch: the same weights, documents, beams and lengths.

    python -m benchmarks.hugging_face --model bart-small        # or bart-base

BART with wide random weights, so that documents disagree; documents and priors are drawn, too, and given to both, so
that neither searches an index. Decoding, where `RagSequenceForGeneration.generate` must choose what ragjax's thorough
decoding chooses; then training steps with AdamW of both models, where the losses are compared. Both take turns. Needs
the extra `bench`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ragjax.config import Config, Decode, Retriever, Train
from ragjax.decode import decode, propose, read
from ragjax.hub import cache_folder
from ragjax.marginal import log_prior
from ragjax.mesh import enable_compilation_cache
from ragjax.models.generator import SpecialTokens
from ragjax.rag import Models, TrainBatch
from ragjax.step import initial_state, make_train_step
from ragjax.text import Prompt
from ragjax.weights import open_bert, open_generator

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


def timed(program: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    found = jax.block_until_ready(program(*given))
    return time.perf_counter() - started, found


def peak() -> float:
    """This machine's floating-point operations a second in a matrix product of XLA, float32."""
    square = jnp.ones((4096, 4096))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(square, square))
    return 2 * 4096**3 / min(timed(product, square, square)[0] for _ in range(3))


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
    options = parser.parse_args()
    console = Console(highlight=False)
    for part in options.parts:
        {"decoding": decoding, "training": training}[part](options, console)


def decoding(options: argparse.Namespace, console: Console) -> None:
    import torch

    enable_compilation_cache(cache_folder() / "xla")
    k, longest, questions = options.documents, options.target_tokens, options.questions
    theirs = hugging_face(SHAPES[options.model], k)
    with tempfile.TemporaryDirectory() as folder:
        theirs.generator.save_pretrained(folder)
        ours = open_generator(Path(folder))
        params = jax.tree.map(jnp.asarray, ours.read())
    rng = np.random.default_rng(0)
    sources = rng.integers(4, ours.config.vocabulary, (questions, k, options.source_tokens)).astype(np.int32)
    scores = rng.normal(size=(questions, k)).astype(np.float32)
    settings = Decode(k=k, beams=options.beams, max_new_tokens=longest, min_new_tokens=2)

    def by_hugging_face(b: int) -> tuple[int, ...]:
        with torch.no_grad():
            found = theirs.generate(
                context_input_ids=torch.tensor(sources[b]).long(),
                context_attention_mask=torch.ones(sources[b].shape, dtype=torch.long),
                doc_scores=torch.tensor(scores[b : b + 1]),
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
        memory = read(ours.graph, params, sources[b], np.ones(sources[b].shape, bool))
        [found] = decode(ours.graph, params, memory, prior, dataclasses.replace(settings, mode=mode), SPECIAL)
        return found

    def answer(found: Any, mode: str) -> tuple[int, ...]:
        best = found.best(mode)[0]
        return (*found.tokens[best], *([SPECIAL.eos] if found.finished[best] else []))

    programs: dict[str, Callable[[int], Any]] = {
        mode: partial(by_ragjax, mode) for mode in ("thorough", "certified", "fast")
    }
    programs["reading"] = lambda b: read(ours.graph, params, sources[b], np.ones(sources[b].shape, bool))
    programs["beam search"] = lambda b: propose(ours.graph, params, memories[b], settings, SPECIAL)
    memories = [programs["reading"](b) for b in range(questions)]
    for b in range(questions):  # compiles
        for program in programs.values():
            program(b)
    seconds: dict[str, list[float]] = {name: [] for name in ["Hugging Face", *programs]}
    same = dict.fromkeys(("Hugging Face", "certified"), 0)
    flops = peak()
    candidates, skipped = [], []
    for b in range(questions):
        took, chosen = timed(by_hugging_face, b)
        seconds["Hugging Face"].append(took)
        found = {}
        for name, program in programs.items():
            took, found[name] = timed(program, b)
            seconds[name].append(took)
        best = answer(found["thorough"], "thorough")
        same["Hugging Face"] += chosen[: len(best)] == best and set(chosen[len(best) :]) <= {SPECIAL.pad, SPECIAL.eos}
        same["certified"] += answer(found["certified"], "certified") == best
        candidates.append(len(found["thorough"].tokens))
        computed, needed = found["certified"].needed
        skipped.append(1 - computed / max(1, needed))
    seconds["rescoring"] = [t - f for t, f in zip(seconds["thorough"], seconds["fast"], strict=True)]
    whole = float(np.median(seconds["thorough"]))
    table = Table("decoding", "median s", "min … max s", "of thorough", box=box.SIMPLE_HEAD)
    for name, of in seconds.items():
        median = float(np.median(of))
        table.add_row(name, f"{median:.3f}", f"{min(of):.3f} … {max(of):.3f}", f"{median / whole:.2f}")
    console.print(
        f"{options.model}: {questions} questions, {k} documents of {options.source_tokens} tokens, "
        f"{options.beams} beams, {longest} new tokens, "
        f"{np.median(candidates):.0f} candidates; {jax.devices()[0]}, {flops / 1e9:.0f} GFLOP/s"
    )
    console.print(table)
    for name, count in same.items():
        console.print(f"{name} chooses what thorough does: {count} of {questions}")
    console.print(f"scores that certified skips: {np.mean(skipped):.0%} (least {min(skipped):.0%})")
    ratio = float(np.median(np.array(seconds["Hugging Face"]) / np.array(seconds["thorough"])))
    console.print(f"thorough: {ratio:.1f} times as fast as Hugging Face\n")


def training(options: argparse.Namespace, console: Console) -> None:
    import torch

    k, count, longest, rate = options.train_documents, options.train_questions, options.target_tokens, 1e-5
    theirs = hugging_face(SHAPES[options.model], k)
    settings = Train(batch_size=count, k=k, retriever_lr=rate, generator_lr=rate, decay="constant", remat=False)
    with tempfile.TemporaryDirectory() as folder:
        theirs.generator.save_pretrained(Path(folder) / "generator")
        theirs.question_encoder.save_pretrained(Path(folder) / "retriever")
        retriever = open_bert(Path(folder) / "retriever", "cls", normalize=False)
        generator = open_generator(Path(folder) / "generator")
        config = Config(output="", train=settings, retriever=Retriever(source="", scale=1.0))
        models = Models(config, retriever, generator, SPECIAL, Prompt((), (), (), False, ((), ())), retriever)
        params = jax.tree.map(jnp.asarray, {name: model.read() for name, model in models.parts.items()})
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=rate, weight_decay=0.0)
    rng = np.random.default_rng(0)
    width, state, step = retriever.config.embedding_width, initial_state(models, params), make_train_step(models)

    def draw() -> TrainBatch:
        def tokens(*shape: int) -> np.ndarray:
            return rng.integers(4, generator.config.vocabulary, shape).astype(np.int32)

        question = rng.integers(4, 1000, (count, 20)).astype(np.int32)
        source, answer = tokens(count, k, options.source_tokens), tokens(count, longest)
        return TrainBatch(
            row=np.arange(count, dtype=np.int32),
            question=question,
            question_mask=np.ones_like(question, bool),
            passages=rng.normal(size=(count, k, width)).astype(np.float32),
            valid=np.ones((count, k), bool),
            source=source,
            source_mask=np.ones_like(source, bool),
            answer=answer,
            answer_mask=np.ones_like(answer, bool),
        )

    def by_hugging_face(batch: TrainBatch) -> float:
        query = theirs.question_encoder(torch.tensor(batch.question).long())[0]
        labels = np.concatenate([np.full((count, 1), SPECIAL.eos), batch.answer], axis=1)  # the start token before
        loss = theirs(
            context_input_ids=torch.tensor(batch.source.reshape(count * k, -1)).long(),
            context_attention_mask=torch.ones(count * k, options.source_tokens, dtype=torch.long),
            doc_scores=torch.einsum("bd,bkd->bk", query, torch.tensor(batch.passages)),
            labels=torch.tensor(labels).long(),
            reduce_loss=True,
        ).loss
        optimizer.zero_grad()
        (loss / count).backward()
        for part in (theirs.question_encoder, theirs.generator):
            torch.nn.utils.clip_grad_norm_(part.parameters(), settings.clip)
        optimizer.step()
        return loss.item() / count

    seconds: dict[str, list[float]] = {"Hugging Face": [], "ragjax": []}
    losses = []
    for _ in range(options.steps + 1):  # the first one compiles
        # in turn, two steps each, the second of which counts: the first one gets its memory back from the other library
        batches = draw(), draw()
        theirs_are = []
        for batch in batches:
            took, found = timed(by_hugging_face, batch)
            theirs_are.append(found)
        seconds["Hugging Face"].append(took)
        for batch, theirs_is in zip(batches, theirs_are, strict=True):
            took, (state, metrics) = timed(step, state, batch, None)
            losses.append((theirs_is, float(metrics["loss"])))
        seconds["ragjax"].append(took)
    flops = peak()
    table = Table("training step", "median s", "min … max s", box=box.SIMPLE_HEAD)
    for name, of in seconds.items():
        table.add_row(name, f"{np.median(of[1:]):.3f}", f"{min(of[1:]):.3f} … {max(of[1:]):.3f}")
    console.print(
        f"{options.model}: {count} questions a step, {k} documents of {options.source_tokens} tokens, "
        f"answers of {longest}; {jax.devices()[0]}, {flops / 1e9:.0f} GFLOP/s"
    )
    console.print(table)
    apart = max(abs(ours / theirs_is - 1) for theirs_is, ours in losses)
    console.print(f"largest relative difference of a loss over {len(losses)} steps: {apart:.1e}")
    ratio = np.median(np.array(seconds["Hugging Face"][1:]) / np.array(seconds["ragjax"][1:]))
    console.print(f"a training step: {ratio:.1f} times as fast as Hugging Face")


if __name__ == "__main__":
    main()
