"""How long one question takes, models loaded and programs compiled, where the time goes, and whether modes agree.

    python -m benchmarks.answering configs/factbook.yaml decode.num_docs=10 decode.num_beams=5 --torch --compare 180

Questions of the test split are answered one by one by every mode in turn, with the configuration's newest checkpoint,
or else the pretrained models. The stages of thorough decoding are timed apart: retrieval, reading the documents, the
beam search, and scoring what the beam search has not; beside it every candidate as a whole under every document, which
must choose the same. `--torch` (extra `bench`) adds plain torch and transformers, written straightforwardly, with the
same weights and documents: `generate` searches with beams under every document, then every distinct candidate is scored
under every document as a whole sequence, a candidate at a time. Where answers differ the margin between them is told.
`--compare` takes further questions on which only the choices are compared. In `--folder` every question's numbers are
in answering.jsonl as soon as they are known.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import track

from benchmarks.report import (
    Stage,
    count_read,
    count_unread,
    flops_of,
    flops_of_search,
    make_console,
    or_input_error,
    peak,
    show,
    timed,
    times_as_fast,
    torch_place,
    write,
)
from ragjax.answerer import Answerer, open_answerer
from ragjax.checkpoints.pretrained import generator_tensors
from ragjax.config import load_config
from ragjax.data.question_batch import question_batch, tokenize_prompts
from ragjax.data.questions import read_questions
from ragjax.decoding.candidates import Candidates, pad_answers, with_end
from ragjax.decoding.decode import decode_rag_sequence
from ragjax.decoding.prefix_cache import PrefixScorer
from ragjax.decoding.propose import beam_search_documents, beam_settings, prefill_documents
from ragjax.decoding.rescore import score_tokens
from ragjax.models.kv_cache import DocumentMemory
from ragjax.resources import size_text
from ragjax.retrieval.retrieve import RetrievalResult

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
WARMING = 8  # questions
MODES = ("exact", "thorough", "certified", "fast")
STAGES = ("retrieval", "reading", "beam search", "scoring what is unread", "scoring all, whole")
Answer = tuple[int, ...]  # with the end token


def on_torch(answerer: Answerer) -> Any:
    """The same generator as transformers has it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = dict(answerer.rag.generator.hf_config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(hf.pop("model_type"), **hf)).eval()
    tensors = generator_tensors(answerer.rag.generator.hf_config, jax.device_get(answerer.params["generator"]))
    missing, unexpected = model.load_state_dict(
        {name: torch.tensor(np.asarray(value)) for name, value in tensors.items()}, strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.to(**torch_place(answerer.rag.config.dtype))


def answer_on_torch(model: Any, answerer: Answerer, prompts: list[list[int]], prior: np.ndarray) -> dict[Answer, float]:
    """Every candidate and its log p(y|x), nats."""
    import torch

    settings, special = answerer.rag.config.decode, answerer.rag.special
    longest = max(map(len, prompts))
    rows = torch.tensor([[special.pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.no_grad():
        found = model.generate(
            rows,
            attention_mask=mask,
            num_beams=settings.num_beams,
            num_return_sequences=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens,
            length_penalty=0.0,
            early_stopping=False,
            do_sample=False,
            eos_token_id=special.eos,
            pad_token_id=special.pad,
        )[:, longest:].tolist()
        candidates = {}
        for row in found:
            end = row.index(special.eos) + 1 if special.eos in row else len(row)
            candidates[tuple(row[:end])] = 0.0
        for y in candidates:
            whole = torch.cat([rows, rows.new_tensor([y] * len(prompts))], dim=1)
            seen = torch.cat([mask, mask.new_ones(len(prompts), len(y))], dim=1)
            places = (seen.cumsum(dim=1) - 1).clamp(min=0)
            logits = model(whole, attention_mask=seen, position_ids=places).logits[:, longest - 1 : -1]
            logp = torch.log_softmax(logits.float(), dim=-1).gather(2, whole[:, longest:, None])[..., 0].sum(dim=1)
            candidates[y] = float(torch.logsumexp(torch.tensor(prior) + logp.cpu(), dim=0))
    return candidates


@dataclasses.dataclass
class Measured:
    """Of one question."""

    seconds: dict[str, float]
    found: dict[str, Candidates]  # by mode
    whole: dict[Answer, float]  # every candidate scored as a whole under every document: log p(y|x), nats
    flops: dict[str, float]
    memory: int | None  # bytes by which scoring what is unread lets the process grow; on CPUs
    prompts: list[list[int]]
    retrieved: RetrievalResult


def score_whole(
    answerer: Answerer, memory: DocumentMemory, found: Candidates, prior: np.ndarray
) -> dict[Answer, float]:
    """Brute force: every candidate scored as a whole under every document, and its log p(y|x), nats."""
    rag, special = answerer.rag, answerer.rag.special
    of_question = list(zip(found.tokens, found.finished.tolist(), strict=True))
    padded = pad_answers([of_question], special, rag.config.decode.max_new_tokens)
    tokens = score_tokens(rag.generator.graphdef, answerer.params["generator"], memory, *padded, special)
    joint = prior[:, None].astype(np.float64) + np.asarray(tokens, np.float64)[0].sum(axis=-1)[:, : len(of_question)]
    return dict(zip(with_end(of_question, special), np.logaddexp.reduce(joint, axis=0).tolist(), strict=True))


def measure(answerer: Answerer, question: str, costs: dict[tuple[int, ...], tuple[int, float]]) -> Measured:
    """`costs` keeps the operations of reading and of a prefix in the beam search for each shape of prompts."""
    rag, params, settings = answerer.rag, answerer.params["generator"], answerer.rag.config.decode
    graph, special, seconds = rag.generator.graphdef, rag.special, {}
    tokenizing, batch = timed(question_batch, rag.tokenizers, [question])
    seconds["retrieval"], retrieved = timed(answerer.retrieve, batch, [question])
    seconds["retrieval"] += tokenizing
    prior = retrieved.log_prior[0]
    source, mask = tokenize_prompts(rag.tokenizers, answerer.store, batch, retrieved.ids)
    seconds["reading"], memory = timed(prefill_documents, graph, params, source, mask)
    seconds["beam search"], (_, prefixes) = timed(
        beam_search_documents, graph, params, memory, beam_settings(settings, special, False), special
    )
    found = {}
    for mode in MODES:
        seconds[mode], ([found[mode]], _) = timed(answerer.candidates, batch, retrieved, mode)
        seconds[mode] += seconds["retrieval"]
    seconds["scoring all, whole"], whole = timed(score_whole, answerer, memory, found["thorough"], prior)
    wanted = {z: list(whole) for z in np.flatnonzero(prior > -np.inf).tolist()}
    on_host = jax.default_backend() == "cpu"
    if on_host:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as free
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = _status("VmRSS")
    seconds["scoring what is unread"], _ = timed(
        lambda: PrefixScorer(graph, params, memory, prefixes, special).score(wanted)
    )
    grown = _status("VmHWM") - before if on_host else None
    if source.shape not in costs:
        of_prefix = flops_of_search(graph, params, memory, settings, special)
        costs[source.shape] = flops_of(partial(prefill_documents, graph), params, source, mask), of_prefix
    reading, of_prefix = costs[source.shape]
    flops = {"reading": reading * mask.mean()}
    flops["beam search"] = of_prefix * count_read(prefixes, settings.num_beams)
    # of each prefix the same is computed as in the beam search
    flops["scoring what is unread"] = of_prefix * count_unread(prefixes, wanted)
    flops["thorough"] = sum(flops.values())
    flops["fast"] = flops["reading"] + flops["beam search"]
    return Measured(
        seconds,
        found,
        whole,
        flops,
        grown,
        [row[shown].tolist() for row, shown in zip(source, mask, strict=True)],
        retrieved,
    )


def warm(answerer: Answerer, questions: list[str]) -> None:
    """Compiles what exact decoding needs: how many documents it reads at a time depends on the question."""
    for question in questions:
        batch = question_batch(answerer.rag.tokenizers, [question])
        answerer.candidates(batch, answerer.retrieve(batch, [question]), "exact")


def choose(answerer: Answerer, question: str) -> tuple[dict[str, Candidates], dict[str, dict[Answer, float]]]:
    """By the modes, and by brute force, for `compare`."""
    rag, params, settings = answerer.rag, answerer.params["generator"], answerer.rag.config.decode
    batch = question_batch(rag.tokenizers, [question])
    retrieved = answerer.retrieve(batch, [question])
    memory = prefill_documents(
        rag.generator.graphdef, params, *tokenize_prompts(rag.tokenizers, answerer.store, batch, retrieved.ids)
    )
    [exact], _ = answerer.candidates(batch, retrieved, "exact")
    found = {"exact": exact}
    for mode in ("thorough", "certified"):
        by_mode = settings.replace(mode=mode)
        [found[mode]] = decode_rag_sequence(
            rag.generator.graphdef, params, memory, retrieved.log_prior, by_mode, rag.special
        )
    return found, {"brute force": score_whole(answerer, memory, found["thorough"], retrieved.log_prior[0])}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def spread(questions: list[str], count: int) -> list[str]:
    return [questions[i] for i in np.linspace(0, len(questions) - 1, count).astype(int)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answering",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--questions", type=int, default=20, help="of the test split, spread over it")
    parser.add_argument("--torch", action="store_true", help="plain torch, too: on CPUs a minute or two a question")
    parser.add_argument("--compare", type=int, default=0, help="further questions on which only choices are compared")
    parser.add_argument("--folder", type=Path, help="where to write answering.md, answering.png and answering.jsonl")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    answerer, console = open_answerer(config), make_console()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        (options.folder / "answering.jsonl").write_text("")
    every = [question.question for question in read_questions(Path(config.questions.test))]
    questions = spread(every, options.questions)
    others = spread([question for question in every if question not in questions], options.compare)
    model = on_torch(answerer) if options.torch else None
    eos = answerer.rag.special.eos

    def answer(found: Candidates, mode: str) -> Answer:
        best = found.best(mode)[0]
        return (*found.tokens[best], *([eos] if found.finished[best] else []))

    def text(y: Answer) -> str:
        return answerer.text(y[: -1 if y[-1] == eos else None])

    stages = {name: Stage() for name in (*MODES, *STAGES, *(["plain torch"] if model else []))}
    differ: list[str] = []
    skipped: list[float] = []
    behind: list[float] = []  # by how much proved answers are less likely than thorough's
    proofs: list[tuple[bool, int, int]] = []  # whether the best was proved, documents read, steps

    def compare(
        question: str, found: dict[str, Candidates], scored: dict[str, dict[Answer, float]], **more: Any
    ) -> None:
        """Whether all candidates together, of which each has its log p(y|x), choose what thorough decoding chose."""
        chosen = answer(found["thorough"], "thorough")
        choices = {"certified": (answer(found["certified"], "certified"), scored["brute force"])}
        proved = found["exact"].proof
        assert proved is not None
        proofs.append((proved.best, proved.documents_read, proved.steps))
        exact = answer(found["exact"], "exact")
        # what it is at least, where thorough decoding did not find it, too
        known = {exact: float(found["exact"].marginal("exact")[0])} | scored["brute force"]
        choices["exact"] = exact, known
        if proved.best:
            behind.append(np.exp(known[chosen]) - np.exp(known[exact]))
        for name, theirs in scored.items():
            ended = {y: logp for y, logp in theirs.items() if y[-1] == eos} or theirs
            choices[name] = max(ended, key=ended.__getitem__), theirs
        differing = [
            f"{name} {text(best)!r}, {theirs[best] - theirs.get(chosen, -np.inf):.1e} nats apart"
            for name, (best, theirs) in choices.items()
            if best != chosen
        ]
        differ.extend(f"{question} {text(chosen)!r}: {name}" for name in differing)
        computed, needed = found["certified"].needed or (0, 0)
        skipped.append(1 - computed / max(1, needed))
        if options.folder:
            line = {"question": question, "answer": text(chosen), "differ": differing, "skipped": skipped[-1]}
            line |= {"proved": proved.best, "documents_read": proved.documents_read, "steps": proved.steps} | more
            with (options.folder / "answering.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    measured: list[Measured] = []
    costs: dict[tuple[int, ...], tuple[int, float]] = {}
    for question in questions[:: max(1, len(questions) // WARMING)]:
        measure(answerer, question, costs)  # compiles; a shape yet to come shows in the longest time, not in the median
    warm(answerer, questions)
    for question in track(questions, "answer", console=None, disable=not console.is_terminal):
        measured.append(of := measure(answerer, question, costs))
        for name, took in of.seconds.items():
            stages[name].seconds.append(took)
        scored = {"brute force": of.whole}
        if model is not None:
            took, scored["plain torch"] = timed(answer_on_torch, model, answerer, of.prompts, of.retrieved.log_prior[0])
            stages["plain torch"].seconds.append(took)
        compare(question, of.found, scored, seconds={name: stage.seconds[-1] for name, stage in stages.items()})
    for name in measured[0].flops:
        stages[name].flops = float(np.mean([of.flops[name] for of in measured]))

    d, most = config.decode, peak(config.dtype)
    count = np.median([len(of.whole) for of in measured])
    console.print(
        f"{config.generator.source}, step {answerer.step}: k = {d.num_docs}, {d.num_beams} beams, "
        f"{d.max_new_tokens} new tokens, {count:.0f} candidates; "
        f"{jax.devices()[0]}, {config.dtype}, {most / 1e9:.0f} GFLOP/s\n",
        soft_wrap=True,
    )
    show(console, f"{len(questions)} questions", stages, "thorough", most)
    thorough, certified, fast, scoring = (
        np.array(stages[name].seconds) for name in ("thorough", "certified", "fast", "scoring what is unread")
    )
    console.print(
        f"rescoring's share: {np.median(scoring / thorough):.0%} of thorough decoding, "
        f"{np.median((certified - fast) / certified):.0%} of certified (medians)"
    )
    exact = np.array(stages["exact"].seconds)
    console.print(
        f"exact: {np.median(thorough) / np.median(exact):.2f} times as fast as thorough (medians), "
        f"{thorough.mean() / exact.mean():.2f} times (means)"
    )
    if grown := [of.memory for of in measured if of.memory is not None]:
        console.print(f"scoring what is unread takes at most {size_text(max(grown))} of memory")
    if model is not None:
        ratio = times_as_fast(stages["plain torch"], stages["thorough"])
        console.print(f"thorough: {ratio:.1f} times as fast as plain torch")
        console.print(f"questions answered by plain torch, too: {len(questions)}")
    for question in track(others, "compare", console=None, disable=not console.is_terminal):
        compare(question, *choose(answerer, question))
    shares = ", ".join(f"{q} %: {np.percentile(skipped, q):.0%}" for q in (1, 10, 25, 50))
    console.print(
        f"scores that certified skips: {np.mean(skipped):.0%} in the mean; percentiles over questions {shares}"
    )
    share, read, steps = np.mean(proofs, axis=0)
    console.print(f"exact: proved {share:.1%}, {read:.1f} of {d.num_docs} documents read, {steps:.1f} steps (means)")
    if behind:
        console.print(f"exact: p(y|x) of proved answers is below thorough's by at most {max(behind):.1e}")
    console.print(f"answers other than thorough's, on {len(skipped)} questions: {len(differ)}")
    for line in differ:
        console.print(f"  {line}", soft_wrap=True)
    write(console, options.folder, "answering", {"one question": stages})


if __name__ == "__main__":
    or_input_error(main)
