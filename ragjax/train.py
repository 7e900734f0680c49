"""`ragjax train`: retrieve with the current question encoder, then one step of −log Σ_z p_η(z|x) p_θ(y|x,z)."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import reached_preemption_sync_point
from jax.sharding import Mesh
from jaxtyping import Int

from ragjax.checkpoint import Checkpoints
from ragjax.config import Config, InputError
from ragjax.contrastive import ContrastiveBatch, choose_passages, contrastive_batch, label_positions
from ragjax.data import Batch, QuestionBatches, UsableAnswers, usable_answers
from ragjax.experiment import check_processes_agree, check_same_experiment, check_same_models, start_experiment
from ragjax.fused import Asked, asked_batch, corpus_with_tokens
from ragjax.hub import cache_folder
from ragjax.index import MANIFEST, Index, check_built, check_k, open_index
from ragjax.loss import passage_params
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
from ragjax.metrics import has_answer
from ragjax.models.layers import Params
from ragjax.passages import PassageStore, Question, alone, atomic_write, read_questions
from ragjax.progress import progress_bar, terminal
from ragjax.rag import (
    Rag,
    TrainBatch,
    answer_tokens,
    encode_questions,
    from_all_rows,
    open_rag,
    search,
    train_batch,
    widen,
    widths,
)
from ragjax.refresh import Refresh, refreshed_at, refreshed_index, version_folder
from ragjax.step import (
    TrainState,
    abstract_state,
    check_fits,
    for_answering,
    initial_state,
    make_nll,
    make_train_step,
    reads_corpus,
    split_frozen,
    state_shardings,
    whole_on_every_device,
)

Pair = tuple[Question, str]  # and the answer to train on


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
    asked, asked_dev = _answerable(rag, questions), _answerable(rag, dev) if dev else None
    batches = QuestionBatches([len(a) for a in asked.usable.answers], config.train.batch_size, config.seed)
    mesh = make_mesh(config.mesh.model)
    check_batch(mesh, config.train.batch_size // config.train.accumulate)
    split_frozen(rag.abstract_params(), config.train.freeze)
    check_fits(rag, mesh, len(index))
    positions = label_positions(store, [*questions, *dev]) if config.train.objective == "contrastive" else {}
    reader = Reader(rag, index, store, mesh, positions)
    refresh = None
    if config.train.passage_encoder != "frozen":
        refresh = Refresh(rag, index, store, Path(config.output), mesh)
    probe = [question.question for question in questions[: config.refresh.probe_questions]]
    folder = start_experiment(rag, index)

    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(alone(folder, "trains here; wait for it, or choose another output")))
        keep, best = config.train.keep, config.train.keep_best
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", keep, best=best, writing=True))
        state, saved = _start(rag, checkpoints, index, mesh)
        supply = stack.enter_context(Supply(reader, batches, asked, saved))
        done = int(state.step)
        if refresh is not None:
            refresh.restore(saved.get("refresh", {}), done, state.indexed)
            reader.index = refresh.index
        corpus = None
        if config.train.fused:
            corpus = corpus_with_tokens(rag, index, store, mesh)
        elif reads_corpus(config):
            corpus = index.corpus(mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step_fn, nll_fn = make_train_step(rag, shardings), make_nll(rag)
        log = stack.enter_context(_log(folder, done, config))
        with progress_bar("train", config.train.steps, "steps", done) as advance:
            signals.saving, last_save = True, time.monotonic()
            for step in range(done, config.train.steps):
                started = time.perf_counter()
                pairs, ids = supply.take(state.params)
                batch, shown, tokens = reader.read(pairs, ids)
                last = step + 1 == config.train.steps
                if config.train.search_ahead and not last:
                    supply.look_ahead(state.params)
                state, measured = step_fn(state, batch, corpus)
                measured = on_host(measured)
                if config.train.fused:
                    shown, tokens = reader.shown(pairs, measured.pop("ids")), int(measured.pop("tokens"))
                metrics = {name: float(value) for name, value in measured.items()} | shown
                _check_finite(step, metrics, [question.id for question, _ in pairs])
                seconds = time.perf_counter() - started
                rates = {"examples_per_second": len(pairs) / seconds, "tokens_per_second": tokens / seconds}
                if refresh is not None:
                    state, told = _refresh(refresh, reader, state, step + 1, probe)
                    metrics |= told
                log(step + 1, metrics | rates)
                advance(1, f"loss {metrics['loss']:.3f}  recall@{config.train.k} {metrics['recall']:.2f}")
                stop, minutes = signals.stop(step + 1), config.train.save_minutes
                due = minutes is not None and first_says(time.monotonic() - last_save >= 60 * minutes)
                if last or stop or due or (step + 1) % config.train.save_every == 0:
                    dev_loss = None
                    if asked_dev and not stop:  # what is taken away has no time for this
                        dev_loss = _dev_loss(reader, nll_fn, state, asked_dev, corpus)
                        log(step + 1, {} if dev_loss is None else {"dev_loss": dev_loss})
                    about = supply.state() | {"index": index.version, "config": dataclasses.asdict(config)}
                    about |= {"refresh": refresh.saved()} if refresh else {}
                    if refresh is not None:
                        refresh.keep_only(refreshed_at(of.get("refresh", {})) for of in checkpoints.every_metadata())
                    checkpoints.save(step + 1, state, about, dev_loss)
                    last_save = time.monotonic()
                if stop and not last:
                    checkpoints.wait()
                    message = f"stopped and saved at step {step + 1}; run the same command again to go on"
                    raise Interrupted(message, 128 + stop)
        if refresh is not None and not refresh.is_there(config.train.steps):
            checkpoints.wait()  # what comes now may take long, and goes on where it was stopped
            signals.saving = False
            before = refresh.index
            refresh.finish(passage_params(rag, state.params))
            log(config.train.steps, {"index_overlap": refresh.compare(before, state.params, probe, config.train.k)})
    return folder


def _refresh(
    refresh: Refresh, reader: Reader, state: TrainState, step: int, probe: Sequence[str]
) -> tuple[TrainState, dict[str, float]]:
    """What is to be done about the index after a step, and what is worth logging of it.

    `index_age` counts the steps since the index was encoded. Of the probe questions' top k, `index_kept` is the share
    that would stay if it were encoded now, and `index_overlap` the share that stayed when it was.
    """
    rag, told, kept = refresh.rag, {}, None
    settings, k, before = rag.config.refresh, rag.config.train.k, refresh.index
    if settings.probe_every is not None and step % settings.probe_every == 0:
        kept = told["index_kept"] = refresh.overlap(state.params, passage_params(rag, state.params), probe, k)
    if refresh.begins(step, kept):
        refresh.begin(step)
        state = replace(state, indexed=jax.tree.map(jnp.copy, passage_params(rag, state.params)))
    if step == rag.config.train.steps:
        refresh.begin(step)
    else:
        refresh.go_on(step, state.indexed)
    if refresh.index is not before:
        told["index_overlap"] = refresh.compare(before, state.params, probe, k)
        before.release()
        reader.index = refresh.index
    return state, told | {"index_age": float(step - (refresh.state.searched or 0))}


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


@dataclass(frozen=True)
class Answerable:
    """Questions, and which of them and of their answers can be trained on."""

    questions: Sequence[Question]
    usable: UsableAnswers

    def pairs(self, chosen: Batch) -> list[Pair]:
        of = self.usable
        return [
            (question := self.questions[of.questions[i]], question.answers[of.answers[i][a]])
            for i, a in zip(chosen.questions, chosen.answers, strict=True)
        ]


def _answerable(rag: Rag, questions: Sequence[Question]) -> Answerable:
    # what is not generated may be as long as it likes
    longest = rag.config.generator.answer_tokens if rag.config.train.objective == "marginal" else sys.maxsize
    usable = usable_answers(questions, lambda answer: answer_tokens(rag, answer), longest)
    if usable.answers_dropped:
        terminal.print(
            f"{usable.answers_dropped} answers are longer than generator.answer_tokens={longest} and are not trained "
            f"on, for example {usable.example!r}; {usable.questions_dropped} questions have no other",
            soft_wrap=True,
        )
    return Answerable(questions, usable)


def _start(rag: Rag, checkpoints: Checkpoints, index: Index, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
    """The newest saved state with its metadata, or step 0 without any."""
    if whole := whole_on_every_device(rag, mesh):
        terminal.print(f"not split over mesh.model={mesh.shape['model']}: {', '.join(whole)}", soft_wrap=True)
    like = abstract_state(rag, mesh)
    newest = checkpoints.newest(lambda step: (checkpoints.metadata(step), checkpoints.restore(step, like)))
    if newest is None:
        params = place(rag.initial_params(), jax.tree.map(lambda leaf: leaf.sharding, like.params))
        # moments are born where they will lie: no device ever holds the whole state
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        return jax.jit(lambda params: initial_state(rag, params), out_shardings=shardings)(params), {}
    step, (metadata, state) = newest
    if metadata.get("index", index.version) != index.version:
        raise InputError(
            f"{rag.config.output}: step {step} was trained with another index than {rag.config.index.folder} is now; "
            "bring that one back, or choose another output"
        )
    terminal.print(f"going on from step {step}")
    return state, metadata


@dataclass
class Reader:
    """Makes batches on the mesh of questions and what is found for them. Each process reads for its own devices."""

    rag: Rag
    index: Index
    store: PassageStore
    mesh: Mesh
    positions: dict[str, int]  # for contrastive training, of the passages that questions name

    @property
    def depth(self) -> int:
        """How many documents are retrieved for a question: those to train on, or among which to look for them."""
        train = self.rag.config.train
        return min(train.mined, len(self.index)) if train.objective == "contrastive" else train.k

    def search(self, params: Params, pairs: Sequence[Pair]) -> Int[np.ndarray, "B M"]:
        texts = [question.question for question, _ in pairs]
        return search(self.rag, params, self.index, texts, self.depth, self.mesh)[2]

    def read(
        self, pairs: Sequence[Pair], ids: Int[np.ndarray, "B M"] | None
    ) -> tuple[TrainBatch | ContrastiveBatch | Asked, dict[str, float], int]:
        """A batch, what retrieval alone tells, and how many tokens; without ids the step retrieves, and tells."""
        mine = rows_here(self.mesh, len(pairs))
        texts, answers = [pairs[i][0].question for i in mine], [pairs[i][1] for i in mine]
        if ids is None:
            return shard_batch(self.mesh, asked_batch(self.rag, texts, answers, mine), len(pairs)), {}, 0
        arrays: TrainBatch | ContrastiveBatch
        if self.rag.config.train.objective == "contrastive":
            arrays = self._contrast([pairs[i][0] for i in mine], ids, mine)
            tokens = arrays.question_mask.sum(axis=1)
            if arrays.passage_mask is not None:
                tokens = tokens + arrays.passage_mask.sum(axis=(1, 2))
        else:
            arrays = train_batch(self.rag, self.index, self.store, texts, answers, ids[mine], mine)
            tokens = arrays.source_mask.sum(axis=(1, 2)) + arrays.answer_mask.sum(axis=1) * ids.shape[1]
        # widths are agreed, since all run one program
        of_rows = np.stack([tokens, *(np.full(len(mine), width) for width in widths(arrays))], axis=1).astype(np.int32)
        of_rows = from_all_rows(self.mesh, of_rows, len(pairs))
        widest = widen(arrays, of_rows[:, 1:].max(axis=0).tolist())
        return shard_batch(self.mesh, widest, len(pairs)), self.shown(pairs, ids), int(of_rows[:, 0].sum())

    def _contrast(
        self, questions: Sequence[Question], ids: Int[np.ndarray, "B M"], mine: Int[np.ndarray, " n"]
    ) -> ContrastiveBatch:
        """What these questions learn from is chosen here, and known to all: it counts for every question."""
        k = self.rag.config.train.k
        chosen = [
            choose_passages(self.store, question, ids[i], k, self.positions)
            for question, i in zip(questions, mine, strict=True)
        ]
        of_all = from_all_rows(self.mesh, np.stack(chosen), len(ids))
        return contrastive_batch(self.rag, self.index, self.store, questions, of_all, mine)

    def shown(self, pairs: Sequence[Pair], ids: Int[np.ndarray, "B M"]) -> dict[str, float]:
        """How many questions found a document that answers among the top k, and how many of these differ."""
        mine, ids = rows_here(self.mesh, len(pairs)), ids[:, : self.rag.config.train.k]
        hits = np.array([has_answer(self.store, pairs[i][0], ids[i]).any() for i in mine])
        valid = ids[ids >= 0]
        return {
            "recall": float(from_all_rows(self.mesh, hits, len(pairs)).mean()),
            "distinct_documents": len(np.unique(valid)) / max(1, valid.size),
        }


class Supply:
    """The questions of one step after the other, with their documents, unless the step itself retrieves.

    With `train.search_ahead` FAISS looks for the next step's documents in a thread while a step runs. Checkpoints keep
    what it found, so that a resumed run goes on with the very same. Use as a context manager.
    """

    def __init__(self, reader: Reader, batches: QuestionBatches, asked: Answerable, saved: Mapping[str, Any]) -> None:
        """`saved` is a checkpoint's metadata, with what `state` gave."""
        self.reader, self.batches, self.asked = reader, batches, asked
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[list[Pair], Future[Any] | np.ndarray] | None = None
        self._position: dict[str, Any] | None = None  # in the data, before what was looked ahead for
        if saved:
            batches.restore(saved["data"])
        if saved.get("ahead") is not None:
            self._position = saved["data"]
            self._ahead = asked.pairs(next(batches)), np.array(saved["ahead"], np.int32)

    def __enter__(self) -> Supply:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def take(self, params: Params) -> tuple[list[Pair], Int[np.ndarray, "B K"] | None]:
        """The next questions, and the ids of their documents, by the retriever's `params` if not sought before."""
        if self._ahead is not None:
            pairs, ids = self._ahead[0], self._found()
            self._ahead = None
            return pairs, ids
        pairs = self.asked.pairs(next(self.batches))
        return pairs, None if self.reader.rag.config.train.fused else self.reader.search(params, pairs)

    def look_ahead(self, params: Params) -> None:
        """Begins to search for what `take` gives next."""
        reader, self._position = self.reader, self.batches.state()
        pairs = self.asked.pairs(next(self.batches))
        queries = encode_questions(reader.rag, params, [question.question for question, _ in pairs], reader.mesh)
        mine = queries[rows_here(reader.mesh, len(pairs))]
        self._ahead = pairs, self._pool.submit(lambda: reader.index.search(mine, reader.depth)[1])

    def state(self) -> dict[str, Any]:
        """As JSON, what a run needs to go on with the next step."""
        if self._ahead is None:
            return {"data": self.batches.state(), "ahead": None}
        return {"data": self._position, "ahead": self._found().tolist()}

    def _found(self) -> Int[np.ndarray, "B K"]:
        assert self._ahead is not None
        pairs, ids = self._ahead
        if isinstance(ids, Future):
            ids = from_all_rows(self.reader.mesh, ids.result(), len(pairs))
            self._ahead = pairs, ids
        return ids


def _dev_loss(
    reader: Reader, nll_fn: Callable[..., Any], state: TrainState, asked: Answerable, corpus: Any
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
        pairs = asked.pairs(Batch(part, np.zeros(size, np.int64)))
        batch, _, _ = reader.read(pairs, reader.search(state.params, pairs))
        losses.append(on_host(nll_fn(state.params, batch, corpus))[: count - start])
    every = np.concatenate(losses)
    known = every[~np.isnan(every)]
    return float(known.mean()) if known.size else None


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
            if not metrics:
                return
            rare = metrics.keys() & {"dev_loss", "index_kept", "index_overlap"}
            if step % config.train.log_every and step != config.train.steps and not rare:
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
    rag = for_answering(rag)
    return place(rag.initial_params(), state_shardings(rag, mesh, rag.abstract_params()))


def trained_index(rag: Rag, index: Index, step: int) -> Index:
    """The index for the checkpoint of `step`: begun after it, or else the one it searched; else the one given."""
    folder = Path(rag.config.output)
    if (version_folder(folder, step) / MANIFEST).is_file():
        index.release()
        return refreshed_index(rag, index, folder, step)
    with Checkpoints(folder / "checkpoints", keep=rag.config.train.keep, writing=False) as checkpoints:
        then = refreshed_at(checkpoints.metadata(step).get("refresh", {}))
    if then.building == step == rag.config.train.steps:
        terminal.print(
            "its index is not complete, and an older one is searched; run: ragjax train CONFIG", soft_wrap=True
        )
    if (searched := then.searched) is None:
        return index
    index.release()
    return refreshed_index(rag, index, folder, searched)


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
    mesh = mesh or local_mesh(data=1)
    answering = for_answering(rag)
    like = {name: of for name, of in abstract_state(answering, mesh).params.items() if name in rag.parts}
    with Checkpoints(folder, keep=rag.config.train.keep, writing=False) as checkpoints:

        def load(step: int) -> Any:
            return checkpoints.restore_params(step, like)

        find = checkpoints.lowest if rag.config.train.keep_best else checkpoints.newest
        found = find(load) if step is None else (step, load(step))
        if found is None:
            return None
    params = found[1]
    if "generator" not in params:  # of contrastive training: it answers as it came
        untrained = {"generator": rag.generator.read()}
        params |= place(untrained, state_shardings(answering, mesh, {"generator": rag.generator.abstract}))
    return params, found[0]
