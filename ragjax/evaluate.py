"""`ragjax evaluate`: thorough, fast and closed-book answers side by side, before and after training."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ragjax.answer import Answerer, answer_modes, most_documents
from ragjax.config import Config
from ragjax.decode import Candidates
from ragjax.experiment import check_processes_agree, make_folder
from ragjax.files import atomic_write, write_jsonl
from ragjax.hub import fingerprint_files
from ragjax.index import check_k
from ragjax.mesh import from_all, local_mesh, on_first
from ragjax.metrics import bootstrap_interval, exact_match, expected_calibration_error, f1, has_answer
from ragjax.passages import Question
from ragjax.progress import progress_bar
from ragjax.rag import Retrieved, log_mass, retrieve
from ragjax.world import open_world, pretrained, read_split, restore_trained, trained_index

RETRIEVAL_BATCH = 64


def evaluate(config: Config) -> dict[str, Any]:
    """Measures the pretrained models and the newest checkpoint (with `train.keep_best` the best), if there is one.

    Retrieval is measured on every question of the split, answers on the first `evaluate.limit` (before training:
    `evaluate.untrained_limit`). Questions are split over the devices of each process, and batches of them over the
    processes, each of which holds the models. Writes metrics.json and predictions.jsonl into `output`, and returns
    the metrics. Raises `InputError` for bad input.
    """
    check_processes_agree(config)
    questions = read_split(config, config.evaluate.split)
    rag, index, store = open_world(config)
    check_k(most_documents(config), len(index))
    asked_from = Path(getattr(config.questions, config.evaluate.split))
    # more devices than questions in a batch would only repeat some
    mesh, folder = local_mesh(config.mesh.model, data=config.evaluate.batch_size), Path(config.output)
    trained = restore_trained(rag, mesh)
    on_first(lambda: make_folder(folder))
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
        answerer = Answerer(rag, pretrained(rag, mesh), index, store, None, mesh)
        asked = questions[: (before or limit)]
        report["models"]["untrained"], made = _measure(answerer, questions, asked, "untrained")
        predictions += made
    if trained is not None:
        index = trained_index(rag, index, trained[1])
        answerer = Answerer(rag, trained[0], index, store, trained[1], mesh)
        report["models"]["trained"], made = _measure(answerer, questions, questions[:limit], "trained")
        predictions += made

    def write() -> None:
        with atomic_write(folder / "metrics.json") as (file,):
            file.write(json.dumps(report, indent=1).encode() + b"\n")
        write_jsonl(folder / "predictions.jsonl", predictions)

    on_first(write)
    return report


def _batches(answerer: Answerer, questions: Sequence[Question], size: int) -> list[tuple[list[Question], int]]:
    """This process's share of the batches: filled up so that the devices divide them, and how many are counted."""
    size = -(-size // (devices := answerer.mesh.shape["data"])) * devices
    parts = [list(questions[start : start + size]) for start in range(0, len(questions), size)]
    mine = parts[jax.process_index() :: jax.process_count()]
    return [(part + part[:1] * (size - len(part)), len(part)) for part in mine]


def _from_all_batches(made: list[list[Any]]) -> list[Any]:
    """What all processes made of their batches, JSON, one item a question, in the order of the questions."""
    of_processes = [json.loads(text) for text in from_all(json.dumps(made))]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*of_processes, fillvalue=[]))
    return list(itertools.chain.from_iterable(in_turn))


def _measure(
    answerer: Answerer, questions: Sequence[Question], asked: Sequence[Question], name: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    settings = answerer.rag.config.evaluate
    metrics: dict[str, Any] = {"step": answerer.step} | _measure_retrieval(answerer, questions, name)
    made: list[list[dict[str, Any]]] = []
    batches = _batches(answerer, asked, settings.batch_size)
    with progress_bar(f"answer ({name})", sum(count for _, count in batches), "questions") as advance:
        for batch, count in batches:
            made.append(_predict(answerer, batch)[:count])
            advance(count)
    predictions = _from_all_batches(made)
    metrics |= _summarise(predictions)
    return metrics, [{"model": name} | p for p in predictions]


def _measure_retrieval(answerer: Answerer, questions: Sequence[Question], name: str) -> dict[str, Any]:
    """Recall at 1, 5 and k, and the mean share of the whole corpus's softmax that the top k hold."""
    rag, index, k = answerer.rag, answerer.index, answerer.rag.config.decode.k
    made: list[list[tuple[list[bool], float | None]]] = []
    batches = _batches(answerer, questions, RETRIEVAL_BATCH)
    with progress_bar(f"retrieve ({name})", sum(count for _, count in batches), "questions") as advance:
        for batch, count in batches:
            found = retrieve(rag, answerer.params, index, [q.question for q in batch], max(5, k), answerer.mesh)
            hits = [has_answer(answerer.store, q, ids).tolist() for q, ids in zip(batch, found.ids, strict=True)]
            masses = (
                np.exp(log_mass(rag, index, found, k, answerer.mesh)).tolist()
                if index.on_devices
                else [None] * len(batch)
            )
            made.append(list(zip(hits, masses, strict=True))[:count])
            advance(count)
    told = _from_all_batches(made)
    recall = {f"recall@{at}": float(np.mean([any(hits[:at]) for hits, _ in told])) for at in sorted({1, 5, k})}
    mass = float(np.mean([mass for _, mass in told])) if index.on_devices else None
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
    modes = [mode for mode in answer_modes(answerer.rag.config) if mode in ("thorough", "fast")]
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
