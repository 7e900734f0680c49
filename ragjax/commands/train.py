"""`ragjax train`: retriever and generator learn together, by −log p(y|x) = −log Σ_z p_η(z|x) p_θ(y|x,z).

A run is built in four parts, and `train` puts them together:

    load_data      models, index, passages, and the questions to train on
    build_loader   batch after batch: questions, their answers, and the K documents retrieved for each
    make_step      one update of the parameters by one batch
    run_steps      step after step, with metrics and checkpoints, until `train.steps` or a signal
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import reached_preemption_sync_point
from jax.sharding import Mesh

from ragjax.config import Config, reads_corpus, train_documents
from ragjax.data.passage_store import PassageStore
from ragjax.data.question_sampler import QuestionSampler, SampledQuestions
from ragjax.data.questions import Split
from ragjax.files import exclusive_lock
from ragjax.parallel.mesh import check_batch, command_mesh
from ragjax.parallel.processes import run_on_process_zero
from ragjax.parallel.sharding import gather_to_host
from ragjax.planning.memory import check_memory
from ragjax.rag import RagPipeline
from ragjax.retrieval.device_index import DeviceIndex
from ragjax.retrieval.index import Index, check_k
from ragjax.retrieval.refresh import IndexRefresher, refreshed_at
from ragjax.runs.checkpointer import Checkpointer, newest_step
from ragjax.runs.metrics_log import check_finite_metrics, log_steps
from ragjax.runs.restore import base_fingerprints, check_start, load_artifacts, open_split, restore_or_initialize
from ragjax.runs.run_dir import (
    LEFT_OUT,
    changes_since,
    check_processes_agree,
    check_same_run,
    record_changes,
    start_run,
)
from ragjax.runs.save_timer import SaveTimer
from ragjax.runs.trackers import check_tracker
from ragjax.signals import Signals, listening
from ragjax.terminal import progress_bar, terminal
from ragjax.training.contrastive import label_positions
from ragjax.training.data_loader import BatchBuilder, Pair, TrainLoader, TrainQuestions, trainable_questions
from ragjax.training.fused_retrieval import corpus_with_tokens
from ragjax.training.index_refresh import complete_index, refresh_index, restore_index
from ragjax.training.optimizer import partition_params
from ragjax.training.state import TrainState, abstract_state, saved_part
from ragjax.training.step import make_gradient_error, make_nll, make_train_step

MANY_EPOCHS = 20  # above which a run may learn its questions by heart


class Interrupted(Exception):
    """A signal has stopped the run, which saved before; `code` is the exit code, 128 + the signal's number."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class TrainData:
    """What a run reads."""

    rag: RagPipeline
    index: Index
    store: PassageStore
    train: TrainQuestions
    dev: TrainQuestions | None  # whose loss is measured at every save
    splits: list[Split]  # the files of both
    fingerprint: str  # of the first one, when it was read

    def epochs(self, steps: int) -> float:
        """How often so many steps go through the questions."""
        return steps * self.rag.config.train.batch_size / len(self.train.usable.questions)


@dataclass
class Run:
    """A run while it trains: what it reads, what it writes, and the state, which every step replaces."""

    data: TrainData
    corpus: DeviceIndex | None  # all passages, where a step itself reads them
    builder: BatchBuilder
    loader: TrainLoader
    refresher: IndexRefresher | None  # where the passage encoder is trained
    checkpoints: Checkpointer
    log: Callable[[int, dict[str, float]], None]
    state: TrainState
    base: dict[str, str]  # fingerprints of the weights beside adapters

    @property
    def rag(self) -> RagPipeline:
        """The models, the tokenizers and the configuration."""
        return self.data.rag

    @property
    def probe_questions(self) -> list[str]:
        """The questions by whose documents the drift of the index is measured."""
        some = self.data.splits[0].questions[: self.rag.config.refresh.overlap_questions]
        return [question.question for question in some]


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
    data, mesh = load_data(config), command_mesh("train", config.mesh.model)
    check_settings(data.rag, mesh, len(data.index))
    builder = BatchBuilder(data.rag, data.index, data.store, mesh, _label_positions(data))
    refresher = None
    if config.train.passage_encoder != "frozen":
        refresher = IndexRefresher(data.rag, data.index, data.store, Path(config.output), mesh)
    folder = start_run(data.rag, data.index, [question for split in data.splits for question in split.left_out])
    print_questions(data, folder)
    with ExitStack() as stack:
        run_on_process_zero(
            lambda: stack.enter_context(exclusive_lock(folder, "trains here; wait for it, or choose another output"))
        )
        keep, best = config.train.keep_checkpoints, config.train.keep_best
        checkpoints = stack.enter_context(Checkpointer(folder / "checkpoints", keep, best=best, writing=True))
        state, saved = restore_or_initialize(data.rag, checkpoints, data.index, mesh)
        loader = stack.enter_context(build_loader(data, builder, saved))
        done = int(state.step)
        changes = changes_since(config, done, saved, data.splits[0], data.fingerprint, loader.same_questions)
        record_changes(folder, done, changes)
        if refresher is not None:
            restore_index(refresher, state, saved)
            builder.index = refresher.index
        corpus = place_corpus(data, mesh)
        log = stack.enter_context(log_steps(folder, done, config))
        run = Run(data, corpus, builder, loader, refresher, checkpoints, log, state, base_fingerprints(data.rag))
        run_steps(run, signals)
        if refresher is not None and not refresher.is_complete(config.train.steps):
            checkpoints.wait()
            signals.instead = None  # what follows may take long; a signal stops it, and the same command goes on
            log(config.train.steps, complete_index(refresher, run.state, run.probe_questions))
    return folder


# data: what a run reads


def load_data(config: Config) -> TrainData:
    """Opens the models, the index, the passages and the questions. Raises `InputError`, and writes nothing."""
    check_tracker(config.train.tracker)
    split = open_split(config, "train")
    dev_split = open_split(config, "dev") if config.train.dev_questions else None
    rag, index, store = load_artifacts(config)
    check_k(train_documents(config), len(index))
    if newest_step(Path(config.output) / "checkpoints") == 0:
        check_start(rag)
    questions, split = trainable_questions(rag, split)
    dev, splits = None, [split]
    if dev_split is not None:
        dev, dev_split = trainable_questions(rag, dev_split.first(config.train.dev_questions))
        splits.append(dev_split)
    return TrainData(rag, index, store, questions, dev, splits, split.fingerprint)


def check_settings(rag: RagPipeline, mesh: Mesh, passages: int) -> None:
    """Raises `InputError` now for what would fail only when training has begun; `passages` is N."""
    train = rag.config.train
    check_batch(mesh, train.batch_size // train.gradient_accumulation)
    partition_params(rag.abstract_params(), train.frozen_params)
    if train.gradient_error_every is not None:
        make_gradient_error(rag)  # refuses a frozen generator
    check_memory(rag, mesh, passages)


def print_questions(data: TrainData, folder: Path) -> None:
    """Prints which questions are left out, and a warning where the steps mean more than `MANY_EPOCHS` epochs."""
    for split in data.splits:
        for line in split.notice_lines(folder / LEFT_OUT):
            terminal.print(line, soft_wrap=True)
    steps, count = data.rag.config.train.steps, len(data.train.usable.questions)
    if (epochs := data.epochs(steps)) > MANY_EPOCHS:
        terminal.print(
            f"train.steps={steps} means {epochs:.0f} epochs over {count} questions; more than {MANY_EPOCHS} tend to "
            "learn them by heart: lower train.steps, or set train.dev_questions and watch dev_loss",
            soft_wrap=True,
        )


# loader: batch after batch


def build_loader(data: TrainData, builder: BatchBuilder, saved: dict[str, Any]) -> TrainLoader:
    """Loads the batches of the steps to come; `saved` is the metadata of the checkpoint that the run goes on from."""
    config = data.rag.config
    num_answers = [len(answers) for answers in data.train.usable.answers]
    sampler = QuestionSampler(num_answers, config.train.batch_size, config.seed, data.train.fingerprint)
    return TrainLoader(builder, sampler, data.train, saved)


def _label_positions(data: TrainData) -> dict[str, int]:
    """Where the passages lie that questions name as their answer: only contrastive training asks for them."""
    if data.rag.config.train.objective != "contrastive":
        return {}
    return label_positions(data.store, [question for split in data.splits for question in split.questions])


def place_corpus(data: TrainData, mesh: Mesh) -> DeviceIndex | None:
    """All passages on the devices of the mesh, where a training step itself reads them."""
    if data.rag.config.train.fused_retrieval:
        return corpus_with_tokens(data.rag, data.index, data.store, mesh)
    return data.index.corpus(mesh) if reads_corpus(data.rag.config) else None


# step: one update


def make_step(run: Run) -> Callable[[int, TrainState, Any], tuple[TrainState, dict[str, Any]]]:
    """(number of the step from 1, state, batch) → (state, metrics on the devices); the old state's memory is reused."""
    rag, probe_every = run.rag, run.rag.config.train.gradient_error_every
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(rag, run.builder.mesh))
    train_step = make_train_step(rag, shardings)
    gradient_error = make_gradient_error(rag, shardings) if probe_every else None

    def step(number: int, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        probed = {}
        if probe_every and gradient_error and number % probe_every == 0:
            probed = {"gradient_error_generator": gradient_error(state, batch, run.corpus)}
        state, metrics = train_step(state, batch, run.corpus)
        return state, metrics | probed

    return step


# run: step after step


def run_steps(run: Run, signals: Signals) -> None:
    """Trains until `train.steps`. Raises `Interrupted` after a signal, once the step is done and saved."""
    train, done = run.rag.config.train, int(run.state.step)
    signals.check()
    if done == train.steps:
        terminal.print(f"trained already: all {done} steps of train.steps are done; with more of them it goes on")
        return
    step, nll, extra = make_step(run), make_nll(run.rag), lambda number: f"epoch {run.data.epochs(number):.1f}"
    with progress_bar("train", train.steps, "steps", done, first="compiling …", extra=extra) as advance:
        signals.check()
        signals.instead, timer, reporter = _finish_the_step, SaveTimer(train.save_minutes, done), Reporter(run, advance)
        for number in range(done + 1, train.steps + 1):
            reporter.begun(take_step(run, step, number))
            if run.refresher is not None:
                run.state, about_index = refresh_index(run.refresher, run.state, number, run.probe_questions)
                run.builder.index = run.refresher.index
                reporter.flush(about_index)
            stop, last = _signal_to_stop(number - done, signals), number == train.steps
            if last or stop or timer.due(number) or number % train.save_every == 0:
                reporter.flush()
                # a machine that is taken away leaves no time for the dev loss
                save(run, number, None if stop else measure_dev_loss(run, nll, number))
                timer.restart(number)
            if stop and not last:
                run.checkpoints.wait()
                message = f"stopped and saved at step {number}; run the same command again to go on"
                raise Interrupted(message, 128 + stop)


@dataclass(frozen=True)
class StepTaken:
    """A step that the devices have begun, and perhaps not ended."""

    number: int
    pairs: list[Pair]
    metrics: dict[str, Any]  # on the devices
    retrieval: dict[str, float]
    tokens: int


def take_step(run: Run, step: Callable[..., Any], number: int) -> StepTaken:
    """Begins a step. The host prepares the next batch while the devices work."""
    train = run.rag.config.train
    last = number == train.steps
    pairs, (batch, retrieval, tokens) = run.loader.take(run.state.params)
    if train.prefetch_retrieval and not last:
        run.loader.look_ahead(run.state.params)
    run.state, metrics = step(number, run.state, batch)
    if not last:
        run.loader.read_ahead()
    return StepTaken(number, pairs, metrics, retrieval, tokens)


class Reporter:
    """Logs each step when the next one has begun: the devices need not wait until the host has read its metrics."""

    def __init__(self, run: Run, advance: Callable[..., None]) -> None:
        self.run, self.advance = run, advance
        self._taken: StepTaken | None = None
        self._ended = time.perf_counter()

    def begun(self, taken: StepTaken) -> None:
        """Logs the step before. Raises as `flush`."""
        self.flush()
        self._taken = taken

    def flush(self, about_index: dict[str, float] | None = None) -> None:
        """Waits for the step that was begun, and logs it. Raises `InputError` where a metric is not finite."""
        run, taken, self._taken = self.run, self._taken, None
        if taken is None:
            return
        measured, retrieval, tokens = gather_to_host(taken.metrics), taken.retrieval, taken.tokens
        if run.rag.config.train.fused_retrieval:
            retrieval = run.builder.retrieval_metrics(taken.pairs, measured.pop("ids"))
            tokens = int(measured.pop("tokens"))
        metrics = {name: float(value) for name, value in measured.items()} | retrieval | (about_index or {})
        check_finite_metrics(taken.number, metrics, [question.id for question, _ in taken.pairs])
        seconds, self._ended = time.perf_counter() - self._ended, time.perf_counter()
        rates = {"examples_per_second": len(taken.pairs) / seconds, "tokens_per_second": tokens / seconds}
        run.log(taken.number, metrics | rates)
        documents = run.rag.config.train.num_docs if run.builder.contrastive else train_documents(run.rag.config)
        self.advance(1, f"loss {metrics['loss']:.3f}  recall@{documents} {metrics['recall']:.2f}")


def save(run: Run, number: int, dev_loss: float | None) -> None:
    """Begins to save the state after a step, with all that is needed to go on from there."""
    metadata = run.loader.state() | {
        "index": run.data.index.version,
        "config": run.rag.config.model_dump(mode="json"),
        "questions": run.data.fingerprint,
    }
    if run.base:
        metadata["base"] = run.base
    if run.refresher is not None:
        metadata["refresh"] = run.refresher.saved()
        run.refresher.keep_only(refreshed_at(other.get("refresh", {})) for other in run.checkpoints.every_metadata())
    run.checkpoints.save(number, saved_part(run.state), metadata, dev_loss)


def measure_dev_loss(run: Run, nll: Callable[..., Any], number: int) -> float | None:
    """Logs and returns the mean of −log p(y|x), in nats, over the first usable answer to each dev question.

    With the contrastive objective it is that loss, over the questions that have a positive. None where there is none.
    """
    if (questions := run.data.dev) is None:
        return None
    train, count = run.rag.config.train, len(questions.usable.questions)
    size = train.batch_size // train.gradient_accumulation  # as many at once as the step does
    losses = []
    for start in range(0, count, size):
        chosen = np.arange(start, start + size) % count  # filled up with questions that are not counted
        pairs = questions.pairs(SampledQuestions(chosen, np.zeros(size, np.int64)))
        batch, _, _ = run.builder.load(run.state.params, pairs)
        losses.append(gather_to_host(nll(run.state.params, batch, run.corpus))[: count - start])
    every = np.concatenate(losses)
    counted = every[~np.isnan(every)]
    if not counted.size:
        return None
    run.log(number, {"dev_loss": float(counted.mean())})
    return float(counted.mean())


# signals


def _finish_the_step() -> None:
    """What Ctrl-C or SIGTERM does while steps run; machines that are taken away send SIGTERM some time before.

    Of several processes any may get it: JAX listens for SIGTERM, and names a step after which all of them stop.
    """
    terminal.print("finishing this step, then saving; Ctrl-C stops at once")
    if jax.process_count() > 1:
        os.kill(os.getpid(), signal.SIGTERM)


def _signal_to_stop(count: int, signals: Signals) -> int:
    """After each step, the `count`-th since this process began: the signal that asks to stop now, or 0."""
    # JAX stops all one step after the furthest; one that has taken none is at 0, wherever its run goes on
    if jax.process_count() > 1:
        return (signals.came or signal.SIGTERM) if reached_preemption_sync_point(count) else 0
    return signals.came
