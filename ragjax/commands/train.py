"""`ragjax train`: retrieve with the current question encoder, then one step of −log Σ_z p_η(z|x) p_θ(y|x,z)."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import reached_preemption_sync_point
from jax.sharding import Mesh

from ragjax.checkpoints.hub import fingerprint_files
from ragjax.config import Config, reads_corpus
from ragjax.data.question_sampler import QuestionSampler, SampledQuestions
from ragjax.data.questions import Split
from ragjax.errors import InputError
from ragjax.files import exclusive_lock
from ragjax.parallel.mesh import check_batch, make_mesh
from ragjax.parallel.processes import broadcast_from_process_zero, run_on_process_zero
from ragjax.parallel.sharding import gather_to_host, put_global
from ragjax.planning.memory import check_memory
from ragjax.rag import RagPipeline
from ragjax.retrieval.index import Index, check_k
from ragjax.retrieval.refresh import IndexRefresher, refreshed_at
from ragjax.runs.checkpointer import Checkpointer, newest_step
from ragjax.runs.metrics_log import check_finite_metrics, log_steps
from ragjax.runs.restore import check_start, load_artifacts, open_split, start_params
from ragjax.runs.run_dir import (
    LEFT_OUT,
    check_processes_agree,
    check_same_run,
    read_manifest,
    record_changes,
    record_start,
    start_run,
)
from ragjax.signals import Signals, listening
from ragjax.terminal import progress_bar, terminal
from ragjax.training.contrastive import label_positions
from ragjax.training.data_loader import BatchBuilder, TrainLoader, TrainQuestions, trainable_questions
from ragjax.training.fused_retrieval import corpus_with_tokens
from ragjax.training.loss import passage_params
from ragjax.training.optimizer import partition_params
from ragjax.training.state import TrainState, abstract_state, init_train_state, unsplit_modules
from ragjax.training.step import make_gradient_error, make_nll, make_train_step


class Interrupted(Exception):
    """The run was asked to stop by a signal, and saved before it did; `code` is what to exit with, 128 + the signal."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def train(config: Config) -> Path:
    """Trains until `train.steps`, going on from the newest checkpoint in `output`; returns that folder.

    Raises `InputError` for bad input (before anything long starts), a loss that is no number, or a disk that is full,
    and `Interrupted` after Ctrl-C or SIGTERM.
    """
    with listening(sigterm=jax.process_count() == 1) as signals:
        before = signals.instead
        try:
            return _train(config, signals)
        finally:
            signals.instead = before


def _train(config: Config, signals: Signals) -> Path:
    check_processes_agree(config)
    check_same_run(config)
    if config.train.tensorboard and find_spec("tensorboardX") is None:
        raise InputError("train.tensorboard needs an extra: pip install 'ragjax[tensorboard]'")
    split, dev = open_split(config, "train"), open_split(config, "dev") if config.train.dev_questions else None
    rag, index, store = load_artifacts(config)
    check_k(config.train.k, len(index))
    if newest_step(Path(config.output) / "checkpoints") == 0:
        check_start(rag)
    asked, split = trainable_questions(rag, split)
    asked_dev, dev = trainable_questions(rag, dev.first(config.train.dev_questions)) if dev else (None, None)
    answers = [len(of_question) for of_question in asked.usable.answers]
    batches = QuestionSampler(answers, config.train.batch_size, config.seed, asked.fingerprint)
    mesh = make_mesh(config.mesh.model)
    check_batch(mesh, config.train.batch_size // config.train.accumulate)
    partition_params(rag.abstract_params(), config.train.freeze)
    if config.train.probe_every is not None:
        make_gradient_error(rag)  # refuses a frozen generator now, and not later
    check_memory(rag, mesh, len(index))
    every = [*split.questions, *(dev.questions if dev else [])]
    positions = label_positions(store, every) if config.train.objective == "contrastive" else {}
    reader = BatchBuilder(rag, index, store, mesh, positions)
    refresh = None
    if config.train.passage_encoder != "frozen":
        refresh = IndexRefresher(rag, index, store, Path(config.output), mesh)
    probe = [question.question for question in split.questions[: config.refresh.probe_questions]]
    folder = start_run(rag, index, [*split.left_out, *(dev.left_out if dev else [])])
    for line in [told for of in (split, dev) if of for told in of.told(folder / LEFT_OUT)]:
        terminal.print(line, soft_wrap=True)
    read_from = fingerprint_files([split.path])

    with ExitStack() as stack:
        run_on_process_zero(
            lambda: stack.enter_context(exclusive_lock(folder, "trains here; wait for it, or choose another output"))
        )
        keep, best = config.train.keep, config.train.keep_best
        checkpoints = stack.enter_context(Checkpointer(folder / "checkpoints", keep, best=best, writing=True))
        state, saved = _start(rag, checkpoints, index, mesh)
        supply = stack.enter_context(TrainLoader(reader, batches, asked, saved))
        done = int(state.step)
        record_changes(folder, done, _changes(rag, folder, done, saved, supply, read_from, split))
        if refresh is not None:
            ended = done > 0 and saved.get("config", {}).get("train", {}).get("steps") == done < config.train.steps
            refresh.restore(saved.get("refresh", {}), done, None if ended else state.indexed)
            if ended or (config.train.start_from and done == 0):  # its index is that of its encoder as it is now
                refresh.begin_anew(done, passage_params(rag, state.params))
            reader.index = refresh.index
        corpus = None
        if config.train.fused:
            corpus = corpus_with_tokens(rag, index, store, mesh)
        elif reads_corpus(config):
            corpus = index.corpus(mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(rag, mesh))
        step_fn, nll_fn = make_train_step(rag, shardings), make_nll(rag)
        probe_every = config.train.probe_every
        error_fn = make_gradient_error(rag, shardings) if probe_every else None
        log = stack.enter_context(log_steps(folder, done, config))
        with progress_bar("train", config.train.steps, "steps", done) as advance:
            signals.check()
            signals.instead, last_save = _finish_the_step, time.monotonic()
            for step in range(done, config.train.steps):
                started = time.perf_counter()
                pairs, (batch, shown, tokens) = supply.take(state.params)
                last = step + 1 == config.train.steps
                if config.train.search_ahead and not last:
                    supply.look_ahead(state.params)
                missed = {}
                if probe_every and error_fn and (step + 1) % probe_every == 0:
                    missed = {"gradient_error_generator": error_fn(state, batch, corpus)}
                state, measured = step_fn(state, batch, corpus)
                if not last:
                    supply.read_ahead()
                measured = gather_to_host(measured | missed)
                if config.train.fused:
                    shown, tokens = reader.retrieval_metrics(pairs, measured.pop("ids")), int(measured.pop("tokens"))
                metrics = {name: float(value) for name, value in measured.items()} | shown
                check_finite_metrics(step, metrics, [question.id for question, _ in pairs])
                seconds = time.perf_counter() - started
                rates = {"examples_per_second": len(pairs) / seconds, "tokens_per_second": tokens / seconds}
                if refresh is not None:
                    state, told = _refresh(refresh, reader, state, step + 1, probe)
                    metrics |= told
                log(step + 1, metrics | rates)
                advance(1, f"loss {metrics['loss']:.3f}  recall@{config.train.k} {metrics['recall']:.2f}")
                stop, minutes = _stop_after(step + 1, signals), config.train.save_minutes
                due = minutes is not None and broadcast_from_process_zero(time.monotonic() - last_save >= 60 * minutes)
                if last or stop or due or (step + 1) % config.train.save_every == 0:
                    dev_loss = None
                    if asked_dev and not stop:  # what is taken away has no time for this
                        dev_loss = _dev_loss(reader, nll_fn, state, asked_dev, corpus)
                        log(step + 1, {} if dev_loss is None else {"dev_loss": dev_loss})
                    about = supply.state() | {"index": index.version, "config": dataclasses.asdict(config)}
                    about["questions"] = read_from
                    about |= {"refresh": refresh.saved()} if refresh else {}
                    if refresh is not None:
                        refresh.keep_only(refreshed_at(of.get("refresh", {})) for of in checkpoints.every_metadata())
                    checkpoints.save(step + 1, state, about, dev_loss)
                    last_save = time.monotonic()
                if stop and not last:
                    checkpoints.wait()
                    message = f"stopped and saved at step {step + 1}; run the same command again to go on"
                    raise Interrupted(message, 128 + stop)
        if refresh is not None and not refresh.is_complete(config.train.steps):
            checkpoints.wait()  # what comes now may take long, and goes on where it was stopped
            signals.instead = None
            before = refresh.index
            refresh.begin_anew(config.train.steps, passage_params(rag, state.params))
            log(config.train.steps, {"index_overlap": refresh.compare(before, state.params, probe, config.train.k)})
    return folder


def _refresh(
    refresh: IndexRefresher, reader: BatchBuilder, state: TrainState, step: int, probe: Sequence[str]
) -> tuple[TrainState, dict[str, float]]:
    """What is to be done about the index after a step, and what is worth logging of it.

    `index_age` counts the steps since the index was encoded. Of the probe questions' top k, `index_kept` is the share
    that would stay if it were encoded now, and `index_overlap` the share that stayed when it was.
    """
    rag, told, kept = refresh.rag, {}, None
    settings, k, before = rag.config.refresh, rag.config.train.k, refresh.index
    if settings.probe_every is not None and step % settings.probe_every == 0:
        kept = told["index_kept"] = refresh.overlap(state.params, passage_params(rag, state.params), probe, k)
    if refresh.should_start(step, kept):
        refresh.start(step)
        state = replace(state, indexed=jax.tree.map(jnp.copy, passage_params(rag, state.params)))
    if step == rag.config.train.steps:
        refresh.start(step)
    else:
        refresh.advance(step, state.indexed)
    if refresh.index is not before:
        told["index_overlap"] = refresh.compare(before, state.params, probe, k)
        before.release()
        reader.index = refresh.index
    return state, told | {"index_age": float(step - (refresh.state.searched or 0))}


def _start(rag: RagPipeline, checkpoints: Checkpointer, index: Index, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
    """The newest saved state with its metadata, or step 0 without any."""
    if whole := unsplit_modules(rag, mesh):
        terminal.print(f"not split over mesh.model={mesh.shape['model']}: {', '.join(whole)}", soft_wrap=True)
    like = abstract_state(rag, mesh)
    newest = checkpoints.restore_latest(lambda step: (checkpoints.metadata(step), checkpoints.restore(step, like)))
    if newest is None:
        if rag.config.train.start_from is None:
            params = put_global(rag.initial_params(), jax.tree.map(lambda leaf: leaf.sharding, like.params))
        else:
            params, start = start_params(rag, like.params)
            record_start(Path(rag.config.output), start)
            terminal.print(f"beginning with the parameters of {start['run']}, step {start['step']}", soft_wrap=True)
        # moments are born where they will lie: no device ever holds the whole state
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        return jax.jit(lambda params: init_train_state(rag, params), out_shardings=shardings)(params), {}
    step, (metadata, state) = newest
    if metadata.get("index", index.version) != index.version:
        raise InputError(
            f"{rag.config.output}: step {step} was trained with another index than {rag.config.index.folder} is now; "
            "bring that one back, or choose another output"
        )
    terminal.print(f"going on from step {step}")
    return state, metadata


def _changes(
    rag: RagPipeline, folder: Path, done: int, saved: dict[str, Any], supply: TrainLoader, read_from: str, split: Split
) -> dict[str, Any]:
    """What is other than before step `done`: the number of steps, the questions. Tells of it, too."""
    steps, changes = rag.config.train.steps, {}
    before = saved.get("config", {}).get("train", {}).get("steps", steps)
    if before != steps:
        changes["train.steps"] = {"before": before, "now": steps}
        terminal.print(
            f"train.steps was {before} and is {steps}: from here on the learning rates are those of {steps} steps, "
            "unlike before: a run that begins with so many ends elsewhere",
            soft_wrap=True,
        )
    read_before = saved.get("questions", read_manifest(folder)["fingerprints"].get("questions.train"))
    if read_before != read_from:
        changes["questions.train"] = {"before": read_before, "now": read_from, "left_out": len(split.left_out)}
        then = "the order of those trained on stays" if supply.same_questions else "a new epoch begins with them"
        terminal.print(f"{split.path}: other questions than before step {done}; {then}", soft_wrap=True)
    return changes


def _dev_loss(
    reader: BatchBuilder, nll_fn: Callable[..., Any], state: TrainState, asked: TrainQuestions, corpus: Any
) -> float | None:
    """The mean of −log p(y|x), in nats, of the first usable answer to each question.

    Or the contrastive loss, of the questions that have a positive; None where none has.
    """
    # as many at once as the step does
    train, count = reader.rag.config.train, len(asked.usable.questions)
    size = train.batch_size // train.accumulate
    losses = []
    for start in range(0, count, size):
        part = np.arange(start, start + size) % count  # filled up with questions that are not counted
        pairs = asked.pairs(SampledQuestions(part, np.zeros(size, np.int64)))
        batch, _, _ = reader.load(state.params, pairs)
        losses.append(gather_to_host(nll_fn(state.params, batch, corpus))[: count - start])
    every = np.concatenate(losses)
    known = every[~np.isnan(every)]
    return float(known.mean()) if known.size else None


def _finish_the_step() -> None:
    """What Ctrl-C or SIGTERM does while steps run; machines that are taken away send SIGTERM some time before.

    Of several processes any may get it: JAX listens for SIGTERM, and names a step after which all of them stop.
    """
    terminal.print("finishing this step, then saving; Ctrl-C stops at once")
    if jax.process_count() > 1:
        os.kill(os.getpid(), signal.SIGTERM)


def _stop_after(step: int, signals: Signals) -> int:
    """After each step: the signal that asks to stop now, or 0."""
    if jax.process_count() > 1:
        return (signals.came or signal.SIGTERM) if reached_preemption_sync_point(step) else 0
    return signals.came
