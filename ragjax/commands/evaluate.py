"""`ragjax evaluate`: the answers of several modes side by side, before and after training."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ragjax.answerer import Answerer
from ragjax.checkpoints.hub import fingerprint_files
from ragjax.config import Config, answer_modes, most_documents
from ragjax.data.answer_matching import has_answer
from ragjax.data.question_batch import (
    QuestionBatch,
    drop_unfit_questions,
    question_batch,
    tokenize_answer,
    tokenize_questions,
)
from ragjax.data.questions import Question, Split, as_json
from ragjax.evaluation.predictions import (
    METRICS,
    PASSAGES,
    PREDICTIONS,
    chosen_answer,
    document_shares,
    passage_lines,
    prediction_line,
    proposed_answers,
    score_modes,
    summarise,
    unanswered_line,
)
from ragjax.evaluation.progress import EvaluationProgress
from ragjax.files import atomic_write, check_writable, write_jsonl
from ragjax.parallel.mesh import command_mesh, index_mesh
from ragjax.parallel.processes import run_on_process_zero
from ragjax.rag import RagPipeline
from ragjax.retrieval.index import check_k
from ragjax.retrieval.passage_cache import check_passage_cache
from ragjax.retrieval.retrieve import RetrievalResult, log_prior_mass, retrieve
from ragjax.runs.checkpointer import fingerprint, newest_step
from ragjax.runs.restore import (
    check_answering_fits,
    load_artifacts,
    open_split,
    pretrained_params,
    restore_params,
    trained_index,
)
from ragjax.runs.run_dir import PACKAGES, check_processes_agree, make_folder
from ragjax.terminal import terminal

RETRIEVAL_BATCH = 64
VERSION = 1  # of predictions.jsonl: changes with the meaning of a key


def evaluate(config: Config) -> dict[str, Any]:
    """Measures the pretrained models and the newest checkpoint (with `train.keep_best` the best), if there is one.

    Retrieval is measured on every question of the split, answers on the first `evaluate.max_questions` (before
    training: `evaluate.max_untrained_questions`), each of `evaluate.modes` in a pass of its own. Questions are split
    over the devices of each process, and batches of them over the processes, each of which holds the models; the
    devices of all hold the index, and search for the documents of all before any question is answered. Writes
    metrics.json, predictions.jsonl and passages.jsonl into `output`, and returns the metrics. A question that cannot be
    asked counts as wrong, and as not found; `answerable` has the figures without such.

    The results of each batch are kept in predictions.N.partial, N the process, until all is done: the same evaluation,
    begun again, goes on. Raises `InputError` for bad input.
    """
    check_processes_agree(config)
    split, folder = open_split(config, config.evaluate.split), Path(config.output)
    run_on_process_zero(lambda: check_writable(folder))
    rag, index, store = load_artifacts(config)
    check_k(most_documents(config), len(index))
    split = drop_unfit_questions(rag.tokenizers, split, documents=True, closed_book=config.evaluate.closed_book)
    mesh = command_mesh("evaluate", config.mesh.model)
    if index.on_devices and (everywhere := index_mesh("evaluate")).is_multi_process:
        index.together = everywhere
    both = config.evaluate.max_untrained_questions != 0 and newest_step(folder / "checkpoints") > 0
    check_answering_fits(rag, mesh, untrained=both)
    check_passage_cache(rag, store, mesh)
    trained = restore_params(rag, mesh)
    run_on_process_zero(lambda: make_folder(folder))
    for line in split.notice_lines(folder / METRICS):
        terminal.print(line, soft_wrap=True)
    report = _about(rag, split)
    predictions: list[dict[str, Any]] = []
    limit, before = config.evaluate.max_questions, config.evaluate.max_untrained_questions
    evaluation = _evaluation(rag, report["fingerprints"], trained[1] if trained else None, mesh)
    with EvaluationProgress(folder, evaluation) as progress:
        if before != 0 or trained is None:
            answerer = Answerer(rag, pretrained_params(rag, mesh), index, store, None, mesh)
            report["models"]["untrained"], lines = _measure(answerer, split, before or limit, "untrained", progress)
            predictions += lines
        if trained is not None:
            index = trained_index(rag, index, trained[1])
            answerer = Answerer(rag, trained[0], index, store, trained[1], mesh)
            report["models"]["trained"], lines = _measure(answerer, split, limit, "trained", progress)
            predictions += lines

        def write() -> None:
            with atomic_write(folder / METRICS) as (file,):
                file.write(json.dumps(report, indent=1).encode() + b"\n")
            write_jsonl(folder / PASSAGES, passage_lines(store, predictions))
            write_jsonl(folder / PREDICTIONS, ({"version": VERSION} | line for line in predictions))
            progress.delete()

        run_on_process_zero(write)
    return report


def _about(rag: RagPipeline, split: Split) -> dict[str, Any]:
    """What metrics.json says beside the metrics: what was measured, and how."""
    config = rag.config
    about = {
        "split": config.evaluate.split,
        "model": config.model,
        "hf_compatible": config.hf_compatible,
        "exclude_bos": config.train.exclude_bos,
        "decode": config.decode.model_dump(mode="json"),
        "evaluate": config.evaluate.model_dump(mode="json"),
        "trained_steps": newest_step(Path(config.output) / "checkpoints"),
        "bm25_docs": config.retriever.bm25_docs,
        "fingerprints": rag.fingerprints | {"questions": split.fingerprint},
        "models": {},
    }
    return about | ({"left_out": as_json(split.left_out)} if split.left_out else {})


def _evaluation(rag: RagPipeline, fingerprints: dict[str, str], step: int | None, mesh: Mesh) -> dict[str, Any]:
    """All that the numbers of an evaluation depend on, so that nothing of another one is taken for its own."""
    models = {name: fingerprint_files(getattr(rag, name).files) for name in ("retriever", "generator")}
    devices = [f"{device.platform}:{device.device_kind}" for device in mesh.devices.flat]
    about = {
        "version": VERSION,
        "config": rag.config.model_dump(mode="json", exclude={"output"}),
        "fingerprints": fingerprints | models,
        "checkpoint": None if step is None else fingerprint(Path(rag.config.output) / "checkpoints", step),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "source": fingerprint_files(Path(__file__).parents[1].rglob("*.py")),
        "devices": devices,
    }
    return json.loads(json.dumps(about))


def _measure(
    answerer: Answerer, split: Split, limit: int | None, name: str, progress: EvaluationProgress
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics, and the lines of predictions.jsonl: of the first `limit` questions, in the order of the file."""
    config, first = answerer.rag.config, split.first(limit)
    metrics: dict[str, Any] = {"step": answerer.step} | _measure_retrieval(answerer, split, name, progress)
    closed = ["closed_book"] if config.evaluate.closed_book else []
    if config.evaluate.modes is None:
        modes = [mode for mode in answer_modes(config) if mode in ("thorough", "fast")] + closed
        passes = [(f"answer ({name})", modes, True)]
    else:  # each by itself; the gold answers, which read every document, cost none of them anything
        modes = [*config.evaluate.modes, *closed]
        passes = [*((f"{mode} ({name})", [mode], False) for mode in modes), (f"gold answers ({name})", [], True)]
    results, caches = [], dict[str, Any]()
    for what, together, gold in passes:
        alone = dataclasses.replace(answerer)  # with a passage cache of its own
        find = partial(_find, alone, together, gold)
        predict = partial(_predict, alone, together, gold, config.evaluate.modes is not None)
        results.append(progress.measure(what, alone, first.questions, config.evaluate.batch_size, find, predict))
        if together and together != closed and alone.passage_cache is not None:
            # an evaluation that went on counts what it has read since
            caches[together[0]] = alone.passage_cache.statistics.sum_over_processes().as_json()
    by_question = zip(first.questions, zip(*results, strict=True), strict=True)
    predictions = [prediction_line(answerer, question, of) for question, of in by_question]
    metrics |= summarise(predictions, len(first.left_out), modes)
    if caches:
        metrics |= {"passage_cache": caches[modes[0]]}
        if config.evaluate.modes is not None:
            for mode, statistics in caches.items():
                metrics[mode]["passage_cache"] = statistics
    if split.left_out:
        metrics["answerable"] |= score_modes(predictions, 0, modes)
    lines = sorted([*predictions, *map(unanswered_line, first.left_out)], key=lambda line: line["line"])
    return metrics, [{"model": name} | line for line in lines]


def _measure_retrieval(answerer: Answerer, split: Split, name: str, progress: EvaluationProgress) -> dict[str, Any]:
    """Recall of the encoder at 1, 5 and k, and the mean share of the whole corpus's softmax of the top 1, 2, … k.

    With `retriever.bm25_docs` the recall of BM25, too, and of the K documents of both, whose share it is then.
    """
    rag, index, store, settings = answerer.rag, answerer.index, answerer.store, answerer.rag.config
    k, more = settings.decode.num_docs, settings.retriever.bm25_docs
    ranks = sorted({1, 5, k, k + more})

    def hits_and_mass(batch: list[Question]) -> list[tuple[dict[str, list[bool]], list[float] | None]]:
        texts = [q.question for q in batch]
        questions = tokenize_questions(rag.tokenizers, texts)
        retrieval = retrieve(rag, answerer.params, index, questions, ranks[-1], answerer.mesh)
        found = {"": retrieval.ids}
        if more and index.bm25 is not None:
            retrieval = retrieve(rag, answerer.params, index, questions, k, answerer.mesh, texts)
            found |= {"bm25_": index.bm25.search(texts, ranks[-1])[1], "hybrid_": retrieval.ids}
        hits = [
            {by: has_answer(store, question, ids[b]).tolist() for by, ids in found.items()}
            for b, question in enumerate(batch)
        ]
        if not index.on_devices:
            return [(by, None) for by in hits]
        mass = np.exp(log_prior_mass(rag, index, retrieval, answerer.mesh)).astype(np.float64)
        return list(zip(hits, mass.tolist(), strict=True))

    what = f"retrieve ({name})"
    measured = progress.measure(what, answerer, split.questions, RETRIEVAL_BATCH, hits_and_mass, lambda found, _: found)
    keys = [("", at) for at in ranks] + ([("bm25_", at) for at in ranks] + [("hybrid_", k + more)] if more else [])
    recall = {f"{by}recall@{at}": sum(any(hits[by][:at]) for hits, _ in measured) for by, at in keys}
    metrics: dict[str, Any] = {"questions": len(split)} | {key: count / len(split) for key, count in recall.items()}
    mass_over_k = np.mean([mass for _, mass in measured], axis=0).tolist() if index.on_devices else None
    metrics["top_k_mass"] = None if mass_over_k is None else mass_over_k[k + more - 1]
    found = np.logical_or.accumulate([hits[""] for hits, _ in measured], axis=1)
    metrics |= {"recall_over_k": (found.sum(axis=0) / len(split)).tolist(), "mass_over_k": mass_over_k}
    if split.left_out:
        metrics["answerable"] = {key: count / len(measured) for key, count in recall.items()}
    return metrics


@dataclass(frozen=True)
class _RetrievedBatch:
    """A batch of questions with their documents."""

    questions: QuestionBatch
    retrieval: RetrievalResult | None  # None for closed-book answers
    outside: np.ndarray | None  # the prior mass of other passages, where gold answers are measured and it is known
    seconds: float  # that it took to find them


def _find(answerer: Answerer, modes: Sequence[str], with_gold: bool, batch: list[Question]) -> _RetrievedBatch:
    """The documents of a batch, where a mode or the gold answers read them."""
    began, texts = time.perf_counter(), [q.question for q in batch]
    questions = question_batch(answerer.rag.tokenizers, texts)
    reads = with_gold or any(mode != "closed_book" for mode in modes)
    retrieval = answerer.retrieve(questions, texts) if reads else None
    seconds = time.perf_counter() - began
    outside = answerer.mass_outside(retrieval) if with_gold and retrieval is not None else None
    return _RetrievedBatch(questions, retrieval, outside, seconds)


def _predict(
    answerer: Answerer,
    modes: Sequence[str],
    with_gold: bool,
    timed: bool,
    retrieved: _RetrievedBatch,
    batch: list[Question],
) -> list[dict[str, Any]]:
    """One batch: thorough and fast share a beam search, the gold answer the documents' memory.

    Args:
        answerer: with the models.
        modes: what to decode: one mode, or thorough, fast and closed_book together.
        with_gold: whether to measure the gold answers.
        timed: whether to tell the seconds a question, of finding its documents and of decoding.
        retrieved: the questions with their documents.
        batch: the questions.
    """
    began, tokenizers = time.perf_counter(), answerer.rag.tokenizers
    questions, retrieval = retrieved.questions, retrieved.retrieval
    reading = [mode for mode in modes if mode != "closed_book"]
    results: list[dict[str, Any]] = [{"modes": {}} for _ in batch]
    golds = [_gold(answerer.rag, q) for q in batch] if with_gold else []
    gold = [tokenize_answer(tokenizers, "") if answer is None else answer for answer in golds] or None
    gold_logp = None
    if reading:
        assert retrieval is not None
        candidates, gold_logp = answerer.candidates(questions, retrieval, reading[0], gold)
        for b, (result, own) in enumerate(zip(results, candidates, strict=True)):
            result["modes"] |= {mode: chosen_answer(answerer, own, mode) for mode in reading}
            right = has_answer(answerer.store, batch[b], retrieval.ids[b])
            result["documents"] = document_shares(answerer, retrieval, b, own, reading[0], right)
            result["candidates"] = len(own.tokens)
            result["proposed"] = proposed_answers(answerer, own, reading[0], len(result["documents"]))
    elif retrieval is not None and gold is not None:
        gold_logp = answerer.gold_logp(questions, retrieval, gold)
    if "closed_book" in modes:
        closed, _ = answerer.candidates(questions, None, "fast")
        for result, own in zip(results, closed, strict=True):
            result["modes"]["closed_book"] = chosen_answer(answerer, own, "closed_book")
    seconds = (retrieved.seconds + time.perf_counter() - began) / len(batch)
    for b, result in enumerate(results):
        if retrieved.outside is not None:
            result["mass_outside"] = float(retrieved.outside[b])
        if gold_logp is not None:
            result["gold_nll"] = None if golds[b] is None else -float(gold_logp[b])
        for mode in modes if timed else []:
            result["modes"][mode]["seconds"] = seconds
    return results


def _gold(rag: RagPipeline, question: Question) -> list[int] | None:
    """The tokens of the first answer whose probability can be measured.

    It is no longer than a prompt, and the generator has positions for it.
    """
    g = rag.config.generator
    room = rag.generator.config.max_positions - (0 if rag.generator.config.encoder_decoder else g.max_prompt_tokens)
    longest = min(room, max(g.max_prompt_tokens, g.max_answer_tokens))
    rows = (tokenize_answer(rag.tokenizers, answer) for answer in question.answers)
    return next((row for row in rows if len(row) <= longest), None)
