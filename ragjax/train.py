"""`ragjax train`: retrieve with the current question encoder, then one step of −log Σ_z p_η(z|x) p_θ(y|x,z)."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import reached_preemption_sync_point
from jax.sharding import Mesh

from ragjax.checkpoint import Checkpoints
from ragjax.config import Config, InputError
from ragjax.data import Batch, QuestionBatches, UsableAnswers, usable_answers
from ragjax.experiment import check_processes_agree, check_same_experiment, check_same_models, start_experiment
from ragjax.hub import cache_folder
from ragjax.index import Index, check_built, check_k, open_index
from ragjax.mesh import (
    check_batch,
    enable_compilation_cache,
    first_says,
    is_first,
    local_mesh,
    make_mesh,
    on_first,
    on_host,
    place,
    rows_here,
    shard_batch,
)
from ragjax.metrics import contains_answer
from ragjax.models.layers import Params
from ragjax.passages import PassageStore, Question, alone, atomic_write, read_questions
from ragjax.progress import progress_bar, terminal
from ragjax.rag import Rag, TrainBatch, answer_tokens, open_rag, search, train_batch, widen
from ragjax.step import (
    TrainState,
    abstract_state,
    check_fits,
    for_answering,
    initial_state,
    make_nll,
    make_train_step,
    split_frozen,
    state_shardings,
    whole_on_every_device,
)


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
    with _Signals() as signals:
        return _train(config, signals)


def _train(config: Config, signals: _Signals) -> Path:
    check_processes_agree(config)
    check_same_experiment(config)
    if config.train.tensorboard and find_spec("tensorboardX") is None:
        raise InputError("train.tensorboard needs an extra: pip install 'ragjax[tensorboard]'")
    questions = read_split(config, "train")
    rag, index, store = open_world(config)
    check_k(config.train.k, len(index))
    dev = read_questions(Path(config.questions.dev))[: config.train.dev_questions] if config.train.dev_questions else []
    usable, usable_dev = _usable(rag, questions), _usable(rag, dev) if dev else None
    batches = QuestionBatches([len(a) for a in usable.answers], config.train.batch_size, config.seed)
    mesh = make_mesh(config.mesh.model)
    check_batch(mesh, config.train.batch_size // config.train.accumulate)
    split_frozen(rag.abstract_params(), config.train.freeze)
    check_fits(rag, mesh, len(index))
    folder = start_experiment(rag, index)

    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(alone(folder, "trains here; wait for it, or choose another output")))
        keep, best = config.train.keep, config.train.keep_best
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", keep, best=best, writing=True))
        state = _start(rag, checkpoints, batches, index, mesh)
        corpus = index.corpus(mesh) if config.retriever.prior == "corpus" else None
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step_fn, nll_fn, done = make_train_step(rag, shardings), make_nll(rag), int(state.step)
        with (
            _log(folder, done, config) as log,
            progress_bar("train", config.train.steps, "steps", done) as advance,
        ):
            signals.saving, saved = True, time.monotonic()
            for step in range(done, config.train.steps):
                started = time.perf_counter()
                chosen = next(batches)
                batch, shown, tokens = _assemble(rag, state, index, store, questions, usable, chosen, mesh)
                state, measured = step_fn(state, batch, corpus)
                metrics = {name: float(value) for name, value in jax.device_get(measured).items()} | shown
                _check_finite(step, metrics, [questions[usable.questions[i]].id for i in chosen.questions])
                seconds = time.perf_counter() - started
                rates = {"examples_per_second": len(batch.row) / seconds, "tokens_per_second": tokens / seconds}
                log(step + 1, metrics | rates)
                advance(1, f"loss {metrics['loss']:.3f}  recall@{config.train.k} {metrics['recall']:.2f}")
                last, stop, minutes = step + 1 == config.train.steps, signals.stop(step + 1), config.train.save_minutes
                due = minutes is not None and first_says(time.monotonic() - saved >= 60 * minutes)
                if last or stop or due or (step + 1) % config.train.save_every == 0:
                    dev_loss = None
                    if usable_dev and not stop:  # what is taken away has no time for this
                        dev_loss = _dev_loss(rag, nll_fn, state, index, store, dev, usable_dev, corpus, mesh)
                        log(step + 1, {"dev_loss": dev_loss})
                    about = {"data": batches.state(), "index": index.version, "config": dataclasses.asdict(config)}
                    checkpoints.save(step + 1, state, about, dev_loss)
                    saved = time.monotonic()
                if stop and not last:
                    checkpoints.wait()
                    message = f"stopped and saved at step {step + 1}; run the same command again to go on"
                    raise Interrupted(message, 128 + stop)
    return folder


def read_split(config: Config, split: str) -> list[Question]:
    """The questions of a split. Raises `InputError` where these or the index are missing, before a model is fetched."""
    check_built(Path(config.index.folder))
    return read_questions(Path(getattr(config.questions, split)))


def open_world(config: Config) -> tuple[Rag, Index, PassageStore]:
    """Opens models, index and passages, and checks that they belong together. Raises `InputError`."""
    folder = Path(config.index.folder)
    check_built(folder)  # before models are fetched
    enable_compilation_cache(cache_folder() / "xla")
    rag = open_rag(config)
    recall = config.index.recall if config.index.kind == "approximate" else None
    return rag, open_index(folder, rag.fingerprints, recall), PassageStore.open(folder)


def has_answer(store: PassageStore, question: Question, ids: np.ndarray) -> np.ndarray:
    """Which retrieved documents answer a question [K]: the passages it names, or else those that contain an answer."""
    found = [store[int(i)] if i >= 0 else None for i in ids]
    if question.passages:
        return np.array([p is not None and p.id in question.passages for p in found])
    return np.array([p is not None and contains_answer(f"{p.title} {p.text}", question.answers) for p in found])


def _usable(rag: Rag, questions: Sequence[Question]) -> UsableAnswers:
    longest = rag.config.generator.answer_tokens
    usable = usable_answers(questions, lambda answer: answer_tokens(rag, answer), longest)
    if usable.answers_dropped:
        terminal.print(
            f"{usable.answers_dropped} answers are longer than generator.answer_tokens={longest} and are not trained "
            f"on, for example {usable.example!r}; {usable.questions_dropped} questions have no other",
            soft_wrap=True,
        )
    return usable


def _start(rag: Rag, checkpoints: Checkpoints, batches: QuestionBatches, index: Index, mesh: Mesh) -> TrainState:
    """The newest saved state, or step 0; restores the position in the data."""
    if whole := whole_on_every_device(rag, mesh):
        terminal.print(f"not split over mesh.model={mesh.shape['model']}: {', '.join(whole)}", soft_wrap=True)
    like = abstract_state(rag, mesh)
    newest = checkpoints.newest(lambda step: (checkpoints.metadata(step), checkpoints.restore(step, like)))
    if newest is None:
        params = place(rag.initial_params(), jax.tree.map(lambda leaf: leaf.sharding, like.params))
        # moments are born where they will lie: no device ever holds the whole state
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        return jax.jit(lambda params: initial_state(rag, params), out_shardings=shardings)(params)
    step, (metadata, state) = newest
    if metadata.get("index", index.version) != index.version:
        raise InputError(
            f"{rag.config.output}: step {step} was trained with another index than {rag.config.index.folder} is now; "
            "bring that one back, or choose another output"
        )
    batches.restore(metadata["data"])
    terminal.print(f"going on from step {step}")
    return state


def _assemble(
    rag: Rag,
    state: TrainState,
    index: Index,
    store: PassageStore,
    questions: Sequence[Question],
    usable: UsableAnswers,
    chosen: Batch,
    mesh: Mesh,
) -> tuple[TrainBatch, dict[str, float], int]:
    """Retrieves for one batch, and lays it out on the mesh; also what retrieval alone tells, and how many tokens.

    Each process tokenises the rows on its own devices; widths are agreed, since all run one program.
    """
    batch = [questions[usable.questions[i]] for i in chosen.questions]
    answers = [q.answers[usable.answers[i][a]] for q, i, a in zip(batch, chosen.questions, chosen.answers, strict=True)]
    texts = [q.question for q in batch]
    _, _, ids = search(rag, state.params, index, texts, rag.config.train.k, mesh)
    mine = rows_here(mesh, len(batch))
    arrays = train_batch(rag, index, store, [texts[i] for i in mine], [answers[i] for i in mine], ids[mine], mine)
    hits = [has_answer(store, batch[i], ids[i]).any() for i in mine]
    tokens = arrays.source_mask.sum(axis=(1, 2)) + arrays.answer_mask.sum(axis=1) * ids.shape[1]
    widths = [np.full(len(mine), width) for width in (arrays.question.shape[-1], arrays.source.shape[-1])]
    of_rows = on_host(shard_batch(mesh, np.stack([hits, tokens, *widths], axis=1).astype(np.int32), len(batch)))
    valid = ids[ids >= 0]
    shown = {"recall": float(of_rows[:, 0].mean()), "distinct_documents": len(np.unique(valid)) / max(1, valid.size)}
    widest = widen(arrays, *(int(width) for width in of_rows[:, 2:].max(axis=0)))
    return shard_batch(mesh, widest, len(batch)), shown, int(of_rows[:, 1].sum())


def _dev_loss(
    rag: Rag,
    nll_fn: Callable[..., Any],
    state: TrainState,
    index: Index,
    store: PassageStore,
    questions: Sequence[Question],
    usable: UsableAnswers,
    corpus: Any,
    mesh: Mesh,
) -> float:
    """The mean of −log p(y|x), in nats, of the first usable answer to each question."""
    # as many at once as the step does
    size, count = rag.config.train.batch_size // rag.config.train.accumulate, len(usable.questions)
    losses = []
    for start in range(0, count, size):
        part = np.arange(start, start + size) % count  # filled up with questions that are not counted
        chosen = Batch(part, np.zeros(size, np.int64))
        batch, _, _ = _assemble(rag, state, index, store, questions, usable, chosen, mesh)
        losses.append(on_host(nll_fn(state.params, batch, corpus))[: count - start])
    return float(np.concatenate(losses).mean())


def _check_finite(step: int, metrics: dict[str, float], ids: Sequence[str]) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise InputError(
            f"step {step + 1}: {', '.join(bad)} is not finite; the questions of this batch: {', '.join(ids)}; "
            "the last checkpoint is kept: look at these questions, or lower the learning rates with another output"
        )


@contextmanager
def _log(folder: Path, done: int, config: Config) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Writes OUTPUT/train.jsonl (steps after a resumed checkpoint are written anew) and TensorBoard on demand."""
    if not is_first():
        yield lambda step, metrics: None
        return
    path = folder / "train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    writer: Any = None
    if config.train.tensorboard:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
    with atomic_write(path) as (kept,):
        kept.writelines(line.encode() for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done)
    with path.open("a", encoding="utf-8") as file:

        def log(step: int, metrics: dict[str, float]) -> None:
            if step % config.train.log_every and step != config.train.steps and "dev_loss" not in metrics:
                return
            file.write(json.dumps({"step": step} | {k: float(f"{v:.6g}") for k, v in metrics.items()}) + "\n")
            file.flush()
            if writer:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, step)

        try:
            yield log
        finally:
            if writer:
                writer.close()


class _Signals:
    """Which signal, Ctrl-C or SIGTERM, asks to stop; as a context, from the start of a command to its end.

    Until `saving` is set Ctrl-C ends it at once, as ever, but is remembered: Python loses it where it falls into a
    finalizer. Then either lets the step end, and a second Ctrl-C stops without saving. Machines that are taken away
    send SIGTERM some time before. Of several processes any may get it: JAX listens for SIGTERM, and names a step after
    which all of them stop.
    """

    def __init__(self) -> None:
        self.came = 0
        self.saving = False
        self._several = jax.process_count() > 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        listened = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
        with suppress(ValueError):  # not in the main thread, as under some notebooks
            self._before = {number: signal.signal(number, self._handle) for number in listened}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = number
        if not self.saving:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        terminal.print("finishing this step, then saving; Ctrl-C stops at once")
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(self, step: int) -> int:
        """After each step: the signal that asks to stop now, or 0."""
        if self._several:
            return (self.came or signal.SIGTERM) if reached_preemption_sync_point(step) else 0
        return self.came


def pretrained(rag: Rag, mesh: Mesh) -> Params:
    """The pretrained parameters for answering, laid out on the mesh."""
    return place(rag.initial_params(), state_shardings(for_answering(rag), mesh, rag.abstract_params()))


def restore_trained(rag: Rag, mesh: Mesh | None = None, step: int | None = None) -> tuple[Params, int] | None:
    """The parameters of a checkpoint in `output`, on the mesh or one device, and its step: the newest, with
    `train.keep_best` that of lowest dev loss, or `step`.

    None if there is none.

    Raises `InputError` for a checkpoint that is damaged, or was trained with other models than the configuration's.
    """
    folder = Path(rag.config.output) / "checkpoints"
    if not folder.is_dir():
        return None
    check_same_models(rag.config)
    like = abstract_state(for_answering(rag), mesh or local_mesh(data=1)).params
    with Checkpoints(folder, keep=rag.config.train.keep, writing=False) as checkpoints:

        def load(step: int) -> Any:
            return checkpoints.restore_params(step, like)

        find = checkpoints.lowest if rag.config.train.keep_best else checkpoints.newest
        found = find(load) if step is None else (step, load(step))
        return None if found is None else (found[1], found[0])
