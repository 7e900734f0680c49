"""`ragjax evaluate`: thorough, fast and closed-book answers side by side, before and after training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ragjax.answer import Answerer, answer_modes, most_documents
from ragjax.config import Config, InputError
from ragjax.decode import Candidates
from ragjax.hub import fingerprint_files
from ragjax.index import check_k
from ragjax.metrics import bootstrap_interval, exact_match, expected_calibration_error, f1
from ragjax.passages import Question, atomic_write, write_jsonl
from ragjax.progress import progress_bar
from ragjax.rag import Retrieved, log_mass, retrieve
from ragjax.train import has_answer, open_world, read_split, restore_trained

RETRIEVAL_BATCH = 64


def evaluate(config: Config) -> dict[str, Any]:
    """Measures the pretrained models and the newest checkpoint, if there is one.

    Retrieval is measured on every question of the split, answers on the first `evaluate.limit` (before training:
    `evaluate.untrained_limit`). Writes metrics.json
    and predictions.jsonl into `output`, and returns the metrics. Raises `InputError` for bad input.
    """
    questions = read_split(config, config.evaluate.split)
    rag, index, store = open_world(config)
    check_k(most_documents(config), len(index))
    asked_from = Path(getattr(config.questions, config.evaluate.split))
    trained = restore_trained(rag)
    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error.strerror}); choose another output") from None
    report: dict[str, Any] = {
        "split": config.evaluate.split,
        "model": config.model,
        "hf_compatible": config.hf_compatible,
        "exclude_bos": config.train.exclude_bos,
        "decode": dataclasses.asdict(config.decode),
        "fingerprints": rag.fingerprints | {"questions": fingerprint_files([asked_from])},
        "models": {},
    }
    predictions: list[dict[str, Any]] = []
    limit, before = config.evaluate.limit, config.evaluate.untrained_limit
    if before != 0 or trained is None:
        pretrained = Answerer(rag, rag.initial_params(), index, store, None)
        asked = questions[: (before or limit)]
        report["models"]["untrained"], made = _measure(pretrained, questions, asked, "untrained")
        predictions += made
    if trained is not None:
        answerer = Answerer(rag, trained[0], index, store, trained[1])
        report["models"]["trained"], made = _measure(answerer, questions, questions[:limit], "trained")
        predictions += made
    with atomic_write(folder / "metrics.json") as (file,):
        file.write(json.dumps(report, indent=1).encode() + b"\n")
    write_jsonl(folder / "predictions.jsonl", predictions)
    return report


def _measure(
    answerer: Answerer, questions: Sequence[Question], asked: Sequence[Question], name: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    settings = answerer.rag.config.evaluate
    metrics: dict[str, Any] = {"step": answerer.step} | _measure_retrieval(answerer, questions, name)
    predictions: list[dict[str, Any]] = []
    with progress_bar(f"answer ({name})", len(asked), "questions") as advance:
        for start in range(0, len(asked), settings.batch_size):
            batch = list(asked[start : start + settings.batch_size])
            made = _predict(answerer, batch + batch[:1] * (settings.batch_size - len(batch)))
            predictions += made[: len(batch)]
            advance(len(batch))
    metrics |= _summarise(predictions)
    return metrics, [{"model": name} | p for p in predictions]


def _measure_retrieval(answerer: Answerer, questions: Sequence[Question], name: str) -> dict[str, Any]:
    """Recall at 1, 5 and k, and the mean share of the whole corpus's softmax that the top k hold."""
    rag, index, k = answerer.rag, answerer.index, answerer.rag.config.decode.k
    hits, masses = [], []
    with progress_bar(f"retrieve ({name})", len(questions), "questions") as advance:
        for start in range(0, len(questions), RETRIEVAL_BATCH):
            batch = questions[start : start + RETRIEVAL_BATCH]
            texts = [q.question for q in batch] + [batch[0].question] * (RETRIEVAL_BATCH - len(batch))
            found = retrieve(rag, answerer.params, index, texts, max(5, k))
            hits += [has_answer(answerer.store, q, ids) for q, ids in zip(batch, found.ids, strict=False)]
            if index.kind == "exact":
                masses.append(np.exp(log_mass(rag, index, found, k))[: len(batch)])
            advance(len(batch))
    recall = {f"recall@{at}": float(np.mean([row[:at].any() for row in hits])) for at in sorted({1, 5, k})}
    mass = float(np.mean(np.concatenate(masses))) if masses else None
    return {"questions": len(questions)} | recall | {"top_k_mass": mass}


def _predict(answerer: Answerer, batch: list[Question]) -> list[dict[str, Any]]:
    """One batch: thorough and fast share a beam search, the gold answer the documents' memory."""
    texts, gold = [q.question for q in batch], [q.answers[0] for q in batch]
    retrieved = answerer.retrieve(texts)
    found, gold_logp = answerer.candidates(texts, retrieved, "thorough", gold)
    assert gold_logp is not None
    closed: Sequence[Candidates | None] = [None] * len(batch)
    if answerer.rag.config.evaluate.closed_book:
        closed, _ = answerer.candidates(texts, None, "fast")
    return [
        _prediction(answerer, q, b, retrieved, found[b], closed[b], -float(gold_logp[b])) for b, q in enumerate(batch)
    ]


def _prediction(
    answerer: Answerer,
    question: Question,
    b: int,
    retrieved: Retrieved,
    found: Candidates,
    closed: Candidates | None,
    gold_nll: float,
) -> dict[str, Any]:
    """One line of predictions.jsonl; probabilities are those of the thorough answer."""
    assert found.thorough is not None and found.scored is not None and found.posterior is not None
    modes = [mode for mode in answer_modes(answerer.rag.config) if mode != "closed_book"]
    best = {mode: found.best(mode)[0] for mode in modes}
    answers, thorough = {mode: answerer.text(found.tokens[c]) for mode, c in best.items()}, best["thorough"]
    if closed is not None:
        answers["closed_book"] = answerer.text(closed.tokens[closed.best("fast")[0]])
    documents = [
        {
            "id": document.id,
            "title": document.title,
            "prior": document.prior,
            "p_answer": float(np.exp(found.scored[z, thorough])),
            "posterior": float(found.posterior[z, thorough]),
        }
        for z, document in enumerate(answerer.documents(retrieved, b))
    ]
    scores = {
        mode: {"exact_match": exact_match(answer, question.answers), "f1": f1(answer, question.answers)}
        for mode, answer in answers.items()
    }
    return {
        "id": question.id,
        "question": question.question,
        "gold": list(question.answers),
        "answer": answers["thorough"],
        "answers": answers,
        "scores": scores,
        "p_answer": float(np.exp(found.thorough[thorough])),
        "finished": bool(found.finished[thorough]),
        "gold_nll": gold_nll,
        "candidates": len(found.tokens),
        "documents": documents,
    }


def _summarise(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"answered": len(predictions)}
    for mode in predictions[0]["answers"]:
        matches, f1s = (np.array([p["scores"][mode][score] for p in predictions]) for score in ("exact_match", "f1"))
        summary[mode] = {
            "exact_match": float(matches.mean()),
            "exact_match_interval": list(bootstrap_interval(matches, seed=0)),
            "f1": float(f1s.mean()),
        }
    if "fast" in predictions[0]["answers"]:
        differ = [p for p in predictions if p["answers"]["thorough"] != p["answers"]["fast"]]
        summary["thorough_and_fast_differ"] = {
            "questions": len(differ),
            "thorough_right": int(sum(p["scores"]["thorough"]["exact_match"] for p in differ)),
            "fast_right": int(sum(p["scores"]["fast"]["exact_match"] for p in differ)),
        }
    summary["gold_nll"] = float(np.mean([p["gold_nll"] for p in predictions]))
    summary["mean_candidates"] = float(np.mean([p["candidates"] for p in predictions]))
    right = np.array([p["scores"]["thorough"]["exact_match"] == 1 for p in predictions])
    summary["calibration_error"] = expected_calibration_error(np.array([p["p_answer"] for p in predictions]), right)
    return summary


def print_metrics(report: dict[str, Any], as_json: bool) -> None:
    """The metrics as a table, one column for each model; how many questions were answered stands in its head."""
    if as_json:
        print(json.dumps(report))
        return
    models = report["models"]
    first = next(iter(models.values()))
    heads = [
        f"{name}{'' if m['step'] is None else ', step ' + str(m['step'])}\n{m['answered']} answered"
        for name, m in models.items()
    ]
    table = Table(f"{first['questions']} {report['split']} questions", *heads, box=box.SIMPLE_HEAD)

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return " … ".join(map(shown, value))
        return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    def row(label: str, *keys: str) -> None:
        table.add_row(label, *(shown(reduce(getitem, keys, m)) for m in models.values()))

    for key in first:
        if key.startswith("recall@"):
            row(f"{key} (all questions)", key)
    row("prior mass of the top k (all questions)", "top_k_mass")
    for mode in ("thorough", "fast", "closed_book"):
        if mode in first:
            row(f"{mode.replace('_', ' ')}: exact match", mode, "exact_match")
            row("  its 95 % interval", mode, "exact_match_interval")
            row(f"{mode.replace('_', ' ')}: F1", mode, "f1")
    row("−log p(gold answer), nats", "gold_nll")
    row("calibration error of p(answer)", "calibration_error")
    if "fast" in first:
        row("thorough and fast differ", "thorough_and_fast_differ", "questions")
        for mode in ("thorough", "fast"):
            row(f"  of these, {mode} right", "thorough_and_fast_differ", f"{mode}_right")
    Console(highlight=False).print(table)
