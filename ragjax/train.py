"""`ragjax train`: retrieve with the current question encoder, then one step of −log Σ_z p_η(z|x) p_θ(y|x,z)."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from ragjax.checkpoint import Checkpoints
from ragjax.config import Config, InputError
from ragjax.data import Batch, QuestionBatches, UsableAnswers, usable_answers
from ragjax.experiment import check_same_experiment, check_same_models, start_experiment
from ragjax.hub import cache_folder
from ragjax.index import Index, check_built, check_k, open_index
from ragjax.mesh import enable_compilation_cache, make_mesh, replicate, shard_batch
from ragjax.metrics import contains_answer
from ragjax.passages import PassageStore, Question, alone, atomic_write, read_questions
from ragjax.progress import progress_bar, terminal
from ragjax.rag import Rag, answer_tokens, open_rag, retrieve, train_batch
from ragjax.step import (
    TrainState,
    initial_state,
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
    check_same_experiment(config)
    questions = read_split(config, "train")
    rag, index, store = open_world(config)
    check_k(config.train.k, len(index))
    usable = _usable(rag, questions)
    batches = QuestionBatches([len(a) for a in usable.answers], config.train.batch_size, config.seed)
    mesh = make_mesh(config.mesh.model)
    shard_batch(mesh, np.zeros(config.train.batch_size))  # these two raise before anything is written
    split_frozen(rag.abstract_params(), config.train.freeze)
    folder = start_experiment(rag, index)

    with (
        alone(folder, "trains here; wait for it, or choose another output"),
        Checkpoints(folder / "checkpoints", keep=config.train.keep, writing=True) as checkpoints,
    ):
        state = _start(rag, checkpoints, batches, mesh)
        corpus = replicate(mesh, index.on_device) if config.retriever.prior == "corpus" else None
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step_fn, done = make_train_step(rag, shardings), int(state.step)
        with (
            _log(folder, done, config) as log,
            _stop_on_signals() as stopping,
            progress_bar("train", config.train.steps, "steps", done) as advance,
        ):
            saved = time.monotonic()
            for step in range(done, config.train.steps):
                started = time.perf_counter()
                chosen = next(batches)
                arrays, shown = _assemble(rag, state, index, store, questions, usable, chosen)
                state, measured = step_fn(state, shard_batch(mesh, arrays), corpus)
                metrics = {name: float(value) for name, value in jax.device_get(measured).items()} | shown
                _check_finite(step, metrics, [questions[usable.questions[i]].id for i in chosen.questions])
                seconds = time.perf_counter() - started
                log(step + 1, metrics | _rates(arrays, seconds))
                advance(1, f"loss {metrics['loss']:.3f}  recall@{config.train.k} {metrics['recall']:.2f}")
                last, stop, minutes = step + 1 == config.train.steps, stopping(), config.train.save_minutes
                due = minutes is not None and time.monotonic() - saved >= 60 * minutes
                if last or stop or due or (step + 1) % config.train.save_every == 0:
                    checkpoints.save(step + 1, state, {"data": batches.state()})
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
    return rag, open_index(folder, rag.fingerprints), PassageStore.open(folder)


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


def _start(rag: Rag, checkpoints: Checkpoints, batches: QuestionBatches, mesh: jax.sharding.Mesh) -> TrainState:
    """The newest saved state, or step 0; restores the position in the data."""
    abstract = jax.eval_shape(lambda params: initial_state(rag, params), rag.abstract_params())
    shardings = state_shardings(rag, mesh, abstract)
    if whole := whole_on_every_device(rag, mesh):
        terminal.print(f"not split over mesh.model={mesh.shape['model']}: {', '.join(whole)}", soft_wrap=True)
    like = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract, shardings)
    newest = checkpoints.newest(lambda step: (checkpoints.metadata(step), checkpoints.restore(step, like)))
    if newest is None:
        return jax.device_put(initial_state(rag, rag.initial_params()), shardings)
    step, (metadata, state) = newest
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
) -> tuple[Any, dict[str, float]]:
    """Retrieves for one batch; returns the step's host arrays and what retrieval alone tells."""
    batch = [questions[usable.questions[i]] for i in chosen.questions]
    answers = [q.answers[usable.answers[i][a]] for q, i, a in zip(batch, chosen.questions, chosen.answers, strict=True)]
    texts = [q.question for q in batch]
    retrieved = retrieve(rag, state.params, index, texts, rag.config.train.k)
    arrays = train_batch(rag, index, store, texts, answers, retrieved.ids)
    hits = [has_answer(store, q, ids).any() for q, ids in zip(batch, retrieved.ids, strict=True)]
    valid = retrieved.ids[retrieved.ids >= 0]
    return arrays, {"recall": float(np.mean(hits)), "distinct_documents": len(np.unique(valid)) / max(1, valid.size)}


def _rates(arrays: Any, seconds: float) -> dict[str, float]:
    tokens = int(arrays.source_mask.sum()) + int(arrays.answer_mask.sum()) * arrays.source.shape[1]
    return {"examples_per_second": len(arrays.row) / seconds, "tokens_per_second": tokens / seconds}


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
    path = folder / "train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    writer: Any = None
    if config.train.tensorboard:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise InputError("train.tensorboard needs an extra: pip install 'ragjax[tensorboard]'") from None
        writer = SummaryWriter(str(folder / "tensorboard"))
    with atomic_write(path) as (kept,):
        kept.writelines(line.encode() for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done)
    with path.open("a", encoding="utf-8") as file:

        def log(step: int, metrics: dict[str, float]) -> None:
            if step % config.train.log_every and step != config.train.steps:
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


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], int]]:
    """Yields a function that tells which signal, Ctrl-C or SIGTERM, asks to stop, or 0.

    A second Ctrl-C stops at once, without saving. Machines that are taken away send SIGTERM some time before.
    """
    came = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it by default
        terminal.print("finishing this step, then saving; Ctrl-C stops at once")

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, as under some notebooks
        yield lambda: 0
        return
    try:
        yield lambda: came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def restore_trained(rag: Rag, step: int | None = None) -> tuple[Any, int] | None:
    """The parameters of the newest checkpoint (or of `step`) in `output`, and its step; None if there is none.

    Raises `InputError` for a checkpoint that is damaged, or was trained with other models than the configuration's.
    """
    folder = Path(rag.config.output) / "checkpoints"
    if not folder.is_dir():
        return None
    check_same_models(rag.config)
    with Checkpoints(folder, keep=rag.config.train.keep, writing=False) as checkpoints:

        def load(step: int) -> Any:
            return checkpoints.restore_params(step, rag.abstract_params())

        found = checkpoints.newest(load) if step is None else (step, load(step))
        return None if found is None else (found[1], found[0])
