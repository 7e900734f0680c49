"""`ragjax plan`: what an experiment needs of disk and memory, from each model's config.json, before anything is built.

The sizes of parameters, of the training state and of embeddings are exact. Temporaries are what XLA says of the very
programs that `ragjax train` and `ragjax evaluate` run, compiled here from shapes alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from ragjax.answer import most_documents
from ragjax.config import Config, InputError
from ragjax.decode import pad_answers, propose, propose_together, read, score_tokens
from ragjax.hub import fetch_config, is_local
from ragjax.index import MANIFEST, check_kind, faiss_bytes
from ragjax.models.generator import Memory, SpecialTokens, empty_past
from ragjax.models.layers import Params
from ragjax.passages import STORE_FILES, count_passages, shard_folders
from ragjax.rag import Models, TrainBatch, check_lengths, encode
from ragjax.step import TrainState, initial_state, make_train_step, split_frozen
from ragjax.weights import Pretrained, bert_shape, generator_shape, open_generator

ID_BYTES = 8  # a hash of each passage's id
SPECIAL = SpecialTokens(eos=0, pad=0)  # which tokens they are changes no size


@dataclass(frozen=True)
class Row:
    """One thing that takes room; `size` is in bytes, None where it is unknown, and then `how` says why."""

    command: str  # index, train or evaluate
    what: str
    place: str  # disk, host, or device: each one, and the host itself where there is only a CPU
    size: int | None
    how: str
    counted: bool = True  # in the totals: not what is there already, nor a part of another row


@dataclass(frozen=True)
class Total:
    """What a command needs in a place and what this machine has there, both in bytes; `has` is None if unknown."""

    command: str
    place: str
    size: int
    complete: bool  # False where a row is unknown: more than `size` is needed
    has: int | None

    @property
    def fits(self) -> bool | None:
        """None where it cannot be told."""
        if self.has is None or (self.size <= self.has and not self.complete):
            return None
        return self.size <= self.has


class Unknown(Exception):
    """Why a size cannot be told."""


def memory_plan(config: Config) -> list[Row]:
    """What `ragjax index`, `train` and `evaluate` will need. Of a model on the hub only its config.json is fetched.

    A model or a corpus that cannot be had makes the rows that depend on it unknown. Raises `InputError` for settings
    that do not go together.
    """
    plan = _Plan(config)
    return [*plan.index_rows(), *plan.train_rows(), *plan.evaluate_rows()]


def abstract_batch(config: Config, width: int) -> TrainBatch:
    """The widest batch of a training step, in shapes and types; D is the embeddings' `width`."""
    questions, documents = config.train.batch_size, config.train.k
    asked = questions, config.retriever.question_tokens
    prompts = questions, documents, config.generator.source_tokens
    answered = questions, config.generator.answer_tokens
    return TrainBatch(
        row=_shape(jnp.int32, questions),
        question=_shape(jnp.int32, *asked),
        question_mask=_shape(jnp.bool, *asked),
        passages=_shape(jnp.float32, questions, documents, width),
        valid=_shape(jnp.bool, questions, documents),
        source=_shape(jnp.int32, *prompts),
        source_mask=_shape(jnp.bool, *prompts),
        answer=_shape(jnp.int32, *answered),
        answer_mask=_shape(jnp.bool, *answered),
    )


def step_temporaries(models: Models, batch: TrainBatch, corpus: Any = None) -> int:
    """Bytes that XLA sets aside for one training step beside its arguments, whose memory the new state takes over."""
    return _temporaries(make_train_step(models), _abstract_state(models), batch, corpus)


class _Plan:
    """What the rows are computed from. A model that cannot be had is the `InputError` that says why."""

    def __init__(self, config: Config):
        r, g, rate = config.retriever, config.generator, config.train.dropout
        self.config = config
        self.count = _count(config)
        sources = {r.source, g.source, r.passage_source or r.source}
        with ThreadPoolExecutor() as pool:  # a hub that cannot be reached is asked several times before it is given up
            found = dict(zip(sources, pool.map(_fetched, sources), strict=True))

        def encoder(source: str, dropout: float) -> Pretrained | InputError:
            return _opened(found[source], lambda path: bert_shape(path, r.pooling, r.normalize, dropout, config.dtype))

        self.retriever = encoder(r.source, rate)
        self.passage_encoder = encoder(r.passage_source, 0.0) if r.passage_source else self.retriever
        self.generator = _opened(found[g.source], lambda path: _open_generator(path, rate, config.dtype))
        if isinstance(self.retriever, Pretrained) and isinstance(self.generator, Pretrained):
            check_lengths(config, self.retriever, self.generator)
            split_frozen(self.models().abstract_params(), config.train.freeze)
        if isinstance(self.passage_encoder, Pretrained):
            check_kind(config.index.kind, self.passage_encoder.config.embedding_width)

    def index_rows(self) -> list[Row]:
        settings, folder = self.config.index, Path(self.config.index.folder)
        built = (folder / MANIFEST).is_file()

        def store() -> tuple[int, str]:
            if not built:
                raise Unknown("the corpus as JSON and 4 bytes a token: known once it is read")
            files = (shard / name for shard in shard_folders(folder) for name in STORE_FILES)
            return sum(file.stat().st_size for file in files), "as measured"

        def tokens() -> tuple[int, str]:
            count, longest = min(self.passages()[0], settings.shard), self.config.retriever.passage_tokens
            return count * 4 * longest, f"a shard of {count:,} passages, at most {longest} tokens of 4 bytes"

        def ids() -> tuple[int, str]:
            count, counted = self.passages()
            return count * ID_BYTES, f"{counted}, {ID_BYTES} bytes each"

        def embedding() -> tuple[int, str]:
            model = _known(self.passage_encoder, "passage encoder")
            batch, longest = settings.batch_size, self.config.retriever.passage_tokens
            tokens = _shape(jnp.int32, batch, longest), _shape(jnp.bool, batch, longest)
            size = _temporaries(encode, model.graph, model.abstract, *tokens)
            return size, f"XLA's analysis ({_backend()}): {batch} passages of {longest} tokens"

        rows = [
            _row("index", "passages: text and tokens", "disk", store, there=built),
            _row("index", "embeddings", "disk", self.embeddings, there=built),
            _row("index", "passages' ids", "host", ids),
            _row("index", "passages' tokens for the encoder", "host", tokens),
            self.parameters("index", "passage encoder"),
            _row("index", "temporaries of embedding", "device", embedding),
        ]
        if settings.kind != "exact":
            rows += [
                _row("index", f"FAISS structure {settings.kind}", "disk", self.faiss, there=built),
                _row("index", f"FAISS structure {settings.kind}", "host", self.faiss),
            ]
        return rows

    def train_rows(self) -> list[Row]:
        train = self.config.train

        def gradients() -> tuple[int, str]:
            trained, _ = split_frozen(self.models().abstract_params(), train.freeze)
            return _bytes(trained), "float32, of what is trained; part of the temporaries below"

        def optimizer() -> tuple[int, str]:
            return _bytes(_abstract_state(self.models()).optimizer), "AdamW: two float32 moments of what is trained"

        def temporaries() -> tuple[int, str]:
            models, corpus = self.models(), None
            width = models.retriever.config.embedding_width
            if self.config.retriever.prior == "corpus":
                corpus = _shape(self.config.index.dtype, self.passages()[0], width)
            batch = f"{train.batch_size} questions, {train.k} documents each"
            if train.accumulate > 1:
                batch += f", in {train.accumulate} parts"
            size = step_temporaries(models, abstract_batch(self.config, width), corpus)
            return size, f"XLA's analysis ({_backend()}): one device with the whole batch, {batch}"

        def checkpoints() -> tuple[int, str]:
            size, kept = _bytes(_abstract_state(self.models())), train.keep + 1
            return kept * size, f"at most: {train.keep} kept and one being written, {size_text(size)} each"

        return [
            self.parameters("train", "retriever"),
            self.parameters("train", "generator"),
            _row("train", "optimiser state", "device", optimizer),
            _row("train", "gradients", "device", gradients, part=True),
            _row("train", "temporaries of a step", "device", temporaries),
            self.searched("train"),
            _row("train", "checkpoints", "disk", checkpoints),
        ]

    def evaluate_rows(self) -> list[Row]:
        decode, settings = self.config.decode, self.config.evaluate
        questions, longest = settings.batch_size, self.config.generator.source_tokens
        together, hugging_face = self.config.model == "rag_token", self.config.hf_compatible
        documents = most_documents(self.config)
        copies = 2 if hugging_face and not together else 1  # with the padding unmasked and masked
        shape = questions * documents, longest
        sources = _shape(jnp.int32, *shape), _shape(jnp.bool, *shape)

        def memory() -> tuple[int, str]:
            model = _known(self.generator, "generator")

            def kept(*given: Any) -> Any:
                whole = read(model.graph, *given)
                return jax.tree.leaves((whole, empty_past(whole, decode.max_new_tokens * decode.beams)))

            how = f"{questions} questions × {documents} documents × {longest} tokens, and the answers'"
            how += ", read twice" if copies > 1 else ""
            return copies * _bytes(jax.eval_shape(kept, model.abstract, *sources)), how

        def temporaries() -> tuple[int, str]:
            model = _known(self.generator, "generator")
            graph, params = model.graph, model.abstract
            # a memory is passed by its leaves: it is checked to hold arrays, which shapes are not
            whole = jax.eval_shape(lambda *given: jax.tree.leaves(read(graph, *given)), params, *sources)
            count = decode.beams if together else documents * decode.beams
            candidates = [[((0,) * decode.max_new_tokens, False)] * count] * questions
            answers = [_shape(x.dtype, *x.shape) for x in pad_answers(candidates, SPECIAL, decode.max_new_tokens)]

            @jax.jit
            def search(params: Params, whole: list[Any]) -> Any:
                if together:
                    prior = jnp.zeros((questions, documents))
                    return propose_together(graph, params, Memory(*whole), prior, decode, SPECIAL, hugging_face)
                return propose(graph, params, Memory(*whole), decode, SPECIAL, hugging_face)

            @jax.jit
            def score(params: Params, whole: list[Any], *answers: Any) -> Any:
                return score_tokens(graph, params, Memory(*whole), *answers)

            most = max(
                _temporaries(read, graph, params, *sources),
                _temporaries(search, params, whole),
                _temporaries(score, params, whole, *answers),
            )
            return most, f"XLA's analysis ({_backend()}): at most {count} distinct candidates a question"

        models = 1 if settings.untrained_limit == 0 else 2
        return [
            self.parameters("evaluate", "retriever", models),
            self.parameters("evaluate", "generator", models),
            _row("evaluate", "documents' keys and values", "device", memory),
            _row("evaluate", "temporaries of answering", "device", temporaries),
            self.searched("evaluate"),
        ]

    def models(self) -> Models:
        retriever, generator = _known(self.retriever, "retriever"), _known(self.generator, "generator")
        return Models(self.config, retriever, generator, SPECIAL)

    def parameters(self, command: str, name: str, copies: int = 1) -> Row:
        def size() -> tuple[int, str]:
            model: Pretrained | InputError = getattr(self, name.replace(" ", "_"))
            if isinstance(model, InputError):
                raise Unknown(str(model).split(";")[0])
            each = _bytes(model.abstract)
            twice = ", before and after training" if copies > 1 else ""
            return copies * each, f"{each // 4:,} in float32{twice}"

        return _row(command, f"{name} parameters", "device", size)

    def searched(self, command: str) -> Row:
        """What is searched: all embeddings on a device, or the FAISS structure (its embeddings stay on the disk)."""
        if self.config.index.kind == "exact":
            where = "on every device" if self.config.retriever.prior == "corpus" else "on one device"

            def size() -> tuple[int, str]:
                bytes_, how = self.embeddings()
                return bytes_, f"{where}: {how}"

            return _row(command, "embeddings, for the exact search", "device", size)
        return _row(command, f"FAISS structure {self.config.index.kind}", "host", self.faiss)

    def passages(self) -> tuple[int, str]:
        if isinstance(self.count, Unknown):
            raise self.count
        return self.count

    def embeddings(self) -> tuple[int, str]:
        width = _known(self.passage_encoder, "passage encoder").config.embedding_width
        (count, counted), dtype = self.passages(), self.config.index.dtype
        return count * width * jnp.dtype(dtype).itemsize, f"{counted} × {width} in {dtype}"

    def faiss(self) -> tuple[int, str]:
        width = _known(self.passage_encoder, "passage encoder").config.embedding_width
        count, counted = self.passages()
        size = faiss_bytes(self.config.index.kind, width, count)
        if size is None:
            raise Unknown("this kind is measured only when it is built")
        return size, f"{counted}, {size / count:.0f} bytes each"


def _fetched(source: str) -> Path | InputError:
    try:
        return fetch_config(source)
    except InputError as error:
        return error


def _opened(found: Path | InputError, open_shape: Callable[[Path], Pretrained]) -> Pretrained | InputError:
    if isinstance(found, InputError):
        return found
    try:
        return open_shape(found)
    except InputError as error:
        return error


def _open_generator(path: Path, dropout: float, dtype: str) -> Pretrained:
    return (open_generator if path.suffix == ".gguf" else generator_shape)(path, dropout, dtype)


def _known(model: Pretrained | InputError, name: str) -> Pretrained:
    if isinstance(model, InputError):
        raise Unknown(f"needs the {name}")
    return model


def _count(config: Config) -> tuple[int, str] | Unknown:
    """N and where it is from: the index if there is one, else the limit, else the lines of the file."""
    corpus, manifest = config.corpus, Path(config.index.folder) / MANIFEST
    if manifest.is_file():
        try:
            count = int(json.loads(manifest.read_text(encoding="utf-8"))["N"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{manifest}: damaged; delete its folder and run: ragjax index CONFIG") from None
        return count, f"{count:,} passages"
    if corpus.limit is not None:
        return corpus.limit, f"at most {corpus.limit:,} passages"
    path = Path(corpus.source).expanduser()
    if not is_local(corpus.source) or corpus.format == "factbook":
        return Unknown("the corpus is counted when it is read")
    if not path.exists():
        return Unknown(f"no file {corpus.source} to count")
    count = count_passages(path, corpus.format)
    return count, f"at most {count:,} passages"


def _row(
    command: str,
    what: str,
    place: str,
    size: Callable[[], tuple[int, str]],
    *,
    there: bool = False,
    part: bool = False,
) -> Row:
    counted = not (there or part)
    try:
        number, how = size()
    except Unknown as why:
        return Row(command, what, place, None, f"unknown ({why})", counted)
    return Row(command, what, place, number, f"{how}; it is there already" if there else how, counted)


def _shape(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _abstract_state(models: Models) -> TrainState:
    return jax.eval_shape(lambda params: initial_state(models, params), models.abstract_params())


def _temporaries(jitted: Any, *arguments: Any) -> int:
    try:
        analysis = jitted.lower(*arguments).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        raise Unknown(f"XLA cannot compile it: {str(error).splitlines()[0]}") from None
    if analysis is None:
        raise Unknown(f"XLA has no analysis for {_backend()}")
    return int(analysis.temp_size_in_bytes)


def _backend() -> str:
    return jax.local_devices()[0].device_kind


def capacity(config: Config) -> dict[str, int | None]:
    """Bytes that this machine has: free where `index.folder` will lie, of the host, and of a device (None on a CPU)."""
    folder = Path(config.index.folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    device = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return {"disk": shutil.disk_usage(existing).free, "host": host, "device": device}


def totals(rows: Sequence[Row], has: dict[str, int | None]) -> list[Total]:
    """What each command needs in memory, and all of them on the disk; a CPU's device is the host."""
    on_host = jax.default_backend() == "cpu"
    sums: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        place = "host" if on_host and row.place == "device" else row.place
        if row.counted:
            sums.setdefault(("all" if place == "disk" else row.command, place), []).append(row)
    return [
        Total(command, place, sum(r.size or 0 for r in of), all(r.size is not None for r in of), has[place])
        for (command, place), of in sorted(sums.items(), key=lambda item: item[0][0] == "all")
    ]


def size_text(size: int) -> str:
    """Bytes as people read them."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size / 2**10:.1f} KiB"


def print_plan(rows: Sequence[Row], has: dict[str, int | None], as_json: bool) -> None:
    """The rows and their totals beside what the machine `has` (see `capacity`), as a table or as one JSON object."""
    sums = totals(rows, has)
    if as_json:
        summed = [dataclasses.asdict(total) | {"fits": total.fits} for total in sums]
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], "totals": summed}, ensure_ascii=False))
        return
    table = Table("command", "what", "where", "size", "how", box=box.SIMPLE_HEAD)
    table.columns[3].justify = "right"
    for before, row in zip([None, *rows], rows, strict=False):
        first = before is None or before.command != row.command
        if first and before is not None:
            table.add_section()
        size = "?" if row.size is None else size_text(row.size)
        size = size if row.counted else f"({size})"
        place = "each device" if row.place == "device" else row.place
        table.add_row(row.command if first else "", row.what, place, size, row.how)
    for total in sums:
        table.add_section() if total is sums[0] else None
        table.add_row("", *_verdict(total))
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 132).print(table)


def _verdict(total: Total) -> tuple[str, str, str, str]:
    place = "each device" if total.place == "device" else total.place
    words = {True: "fits", False: "DOES NOT FIT", None: "whether it fits is unknown"}
    there = "what there is is unknown" if total.has is None else f"this machine has {size_text(total.has)}"
    size = ("" if total.complete else "≥ ") + size_text(total.size)
    name = "in all, on the disk" if total.command == "all" else f"in all, to {total.command}"
    return name, place, size, f"{there}: {words[total.fits]}"
