"""Answers of a decoder-only RAG-Sequence on real questions, beside plain torch and transformers written straightforwardly.

    python -m benchmarks.plain_torch configs/factbook.yaml decode.k=10 decode.beams=5 --questions 20

Both have the same weights, those of the configuration's newest checkpoint or else the pretrained ones, and the same
retrieved documents. On torch `generate` searches with beams under every document, then every distinct candidate is
scored under every document as a whole sequence, a candidate at a time. Answers are compared, and where they differ the
margin between the two is told. All take turns. Needs the extra `bench`, and the index.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.answering import or_input_error
from ragjax.answer import Answerer, open_answerer
from ragjax.config import load_config
from ragjax.decode import Candidates
from ragjax.passages import read_questions
from ragjax.rag import Retrieved, prompt_rows
from ragjax.weights import generator_tensors

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
MODES = ("thorough", "certified", "fast")
Answer = tuple[int, ...]  # with the end token


def on_torch(answerer: Answerer) -> Any:
    """The same generator as transformers has it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = dict(answerer.rag.generator.hf)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(hf.pop("model_type"), **hf)).eval()
    tensors = generator_tensors(answerer.rag.generator.hf, jax.device_get(answerer.params["generator"]))
    missing, unexpected = model.load_state_dict(
        {name: torch.tensor(np.asarray(value)) for name, value in tensors.items()}, strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def answer_on_torch(model: Any, answerer: Answerer, prompts: list[list[int]], prior: np.ndarray) -> dict[Answer, float]:
    """Every candidate and its log p(y|x), nats."""
    import torch

    settings, special = answerer.rag.config.decode, answerer.rag.special
    longest = max(map(len, prompts))
    rows = torch.tensor([[special.pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        found = model.generate(
            rows,
            attention_mask=mask,
            num_beams=settings.beams,
            num_return_sequences=settings.beams,
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
            whole = torch.cat([rows, torch.tensor([y] * len(prompts))], dim=1)
            seen = torch.cat([mask, torch.ones(len(prompts), len(y), dtype=torch.long)], dim=1)
            places = (seen.cumsum(dim=1) - 1).clamp(min=0)
            logits = model(whole, attention_mask=seen, position_ids=places).logits[:, longest - 1 : -1]
            logp = torch.log_softmax(logits, dim=-1).gather(2, whole[:, longest:, None])[..., 0].sum(dim=1)
            candidates[y] = float(torch.logsumexp(torch.tensor(prior) + logp, dim=0))
    return candidates


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plain_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--questions", type=int, default=3, help="of the test split, spread over it")
    parser.add_argument("--without-torch", action="store_true", help="ragjax's own modes only, which take seconds")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    answerer = open_answerer(config)
    every = [question.question for question in read_questions(Path(config.questions.test))]
    questions = [every[i] for i in np.linspace(0, len(every) - 1, options.questions).astype(int)]
    special, console = answerer.rag.special, Console(highlight=False)
    model = None if options.without_torch else on_torch(answerer)

    def answer(found: Candidates, mode: str) -> Answer:
        best = found.best(mode)[0]
        return (*found.tokens[best], *([special.eos] if found.finished[best] else []))

    def by_ragjax(retrieved: Retrieved, question: str, mode: str) -> tuple[float, Candidates]:
        started = time.perf_counter()
        [found], _ = answerer.candidates([question], retrieved, mode)
        return time.perf_counter() - started, found

    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    seconds |= {} if model is None else {"torch": []}
    differ, skipped, counts = [], [], []
    for question in questions:
        retrieved = answerer.retrieve([question])
        prior = retrieved.log_prior[0]
        for mode in MODES:  # compiles what this question is the first to need
            by_ragjax(retrieved, question, mode)
        found = {}
        for mode in MODES:
            took, found[mode] = by_ragjax(retrieved, question, mode)
            seconds[mode].append(took)
        thorough, certified = answer(found["thorough"], "thorough"), answer(found["certified"], "certified")
        if certified != thorough:
            differ.append(f"certified, {question}")
        computed, needed = found["certified"].needed or (0, 0)
        skipped.append(1 - computed / max(1, needed))
        counts.append(len(found["thorough"].tokens))
        if model is None:
            continue
        source, mask = prompt_rows(answerer.rag, answerer.store, [question], retrieved.ids)
        prompts = [row[shown].tolist() for row, shown in zip(source, mask, strict=True)]
        started = time.perf_counter()
        theirs = answer_on_torch(model, answerer, prompts, prior)
        seconds["torch"].append(time.perf_counter() - started)
        ended = {y: logp for y, logp in theirs.items() if y[-1] == special.eos} or theirs
        best = max(ended, key=ended.__getitem__)
        if best != thorough:
            margin = ended[best] - theirs.get(thorough, -np.inf)
            differ.append(f"torch, {question}: {answerer.text(best[:-1])!r}, {margin:.1e} nats apart on torch")

    base = float(np.median(seconds["thorough"]))
    table = Table(f"{len(questions)} questions", "median s", "min … max s", "of thorough", box=box.SIMPLE_HEAD)
    for name, of in seconds.items():
        median = float(np.median(of))
        table.add_row(name, f"{median:.2f}", f"{min(of):.2f} … {max(of):.2f}", f"{median / base:.2f}")
    d = config.decode
    console.print(
        f"{config.generator.source}, step {answerer.step}: k = {d.k}, {d.beams} beams, {d.max_new_tokens} new tokens, "
        f"{np.median(counts):.0f} candidates; {jax.devices()[0]}"
    )
    console.print(table)
    for mode in ("thorough", "certified"):
        more = np.array(seconds[mode]) - np.array(seconds["fast"])
        console.print(f"rescoring's share, {mode}: {np.median(more / np.array(seconds[mode])):.0%} (median)")
    tenth, median = np.percentile(skipped, [10, 50])
    console.print(f"scores that certified skips: {np.mean(skipped):.0%}; a tenth of the questions under {tenth:.0%}")
    if model is not None:
        ratio = np.median(np.array(seconds["torch"]) / np.array(seconds["thorough"]))
        console.print(f"thorough: {ratio:.1f} times as fast as plain torch")
    console.print(f"other answers than thorough's: {len(differ)}")
    for line in differ:
        console.print(f"  {line}")


if __name__ == "__main__":
    or_input_error(main)
