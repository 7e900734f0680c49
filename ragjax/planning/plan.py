"""`ragjax plan`: what an experiment needs of disk and memory, from each model's config.json, before anything is built.

The sizes of parameters, of the training state and of embeddings are exact. Temporaries, and the bytes that devices send
to each other, are what XLA says of the very programs that `ragjax train` and `ragjax evaluate` run, compiled here from
shapes alone: for virtual CPU devices as many as asked for, or for a TPU that need not be there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ragjax.checkpoints.hub import fetch_config, is_local
from ragjax.checkpoints.pretrained import PretrainedModel, bert_shape, generator_shape, open_generator
from ragjax.config import ON_DEVICES, Config, most_documents, refreshes
from ragjax.data.corpus import count_passages
from ragjax.data.passage_store import STORE_FILES, shard_folders
from ragjax.data.prompt import Prompt
from ragjax.decoding.candidates import pad_answers
from ragjax.decoding.propose import beam_search_documents, prefill_documents
from ragjax.decoding.rag_token import beam_search_rag_token
from ragjax.decoding.rescore import score_tokens
from ragjax.errors import InputError
from ragjax.files import read_json
from ragjax.models.generator import SpecialTokens
from ragjax.models.kv_cache import DocumentMemory, empty_kv_cache
from ragjax.models.layers import Params
from ragjax.parallel.mesh import check_batch, make_mesh
from ragjax.parallel.sharding import abstract_with_sharding
from ragjax.planning.memory import memory_advice
from ragjax.planning.program_cost import Cost, NotCompiled, bytes_each, compiled_cost, flops_text, matmul_flops
from ragjax.rag import RagModel, check_lengths
from ragjax.resources import free_disk, host_memory, size_text
from ragjax.retrieval.encoder import encode
from ragjax.retrieval.faiss_index import check_kind, faiss_bytes
from ragjax.retrieval.index import MANIFEST
from ragjax.training.fused_retrieval import abstract_corpus
from ragjax.training.optimizer import partition_params
from ragjax.training.state import abstract_state, for_inference, state_shardings
from ragjax.training.step import trace_step, train_programs

ID_BYTES = 8  # a hash of each passage's id
# for the TPU's compiler where there is none: else it asks, at length, which machine this is
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process is refused, as if both wanted the TPU
}
SMALL_FAISS = "IVF16384,SQ8"  # a byte for each number
PLACES = {"device": "each device", "devices": "all devices"}  # as the table has them
SPECIAL = SpecialTokens(eos=0, pad=0)  # which tokens they are changes no size
NO_PROMPT = Prompt((), (), (), question_first=False, closed_book=((), ()))  # nor do those around a passage


@dataclass(frozen=True)
class Row:
    """One thing that takes room, or work; `size` is None where it is unknown, and then `how` says why."""

    command: str  # index, train or evaluate
    what: str
    place: str  # disk, host, device: each one, and the host itself where there is only a CPU; devices: all together
    size: int | float | None
    how: str
    counted: bool = True  # in the totals: not what is there already, nor a part of another row, nor another setting's
    unit: str = "bytes"  # or FLOP, seconds


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


@dataclass(frozen=True)
class Plan:
    rows: list[Row]
    advice: dict[tuple[str, str], list[str]]  # for each command and place, settings that would lower what it needs


class Unknown(Exception):
    """Why a size cannot be told."""


def memory_plan(config: Config, mesh: Mesh | None = None, peak: int | float | None = None) -> Plan:
    """What `ragjax index`, `train` and `evaluate` will need. Of a model on the hub only its config.json is fetched.

    The mesh, by default one device, may be of devices that are not there; `peak` is what each can compute, in TFLOP/s.
    A model or a corpus that cannot be had makes the rows that depend on it unknown. Raises `InputError` for settings
    that do not go together.
    """
    plan = _Plan(config, mesh or make_mesh(config.mesh.model, jax.devices()[:1]), peak)
    return Plan([*plan.index_rows(), *plan.train_rows(), *plan.evaluate_rows()], plan.advice())


def planned_mesh(config: Config, devices: int | None, topology: str | None) -> Mesh:
    """The mesh to plan for: a TPU topology such as v5e:2x4, or so many devices, which a CPU can play.

    By default the devices of this machine, and one where it has only a CPU. Call it before JAX is used.
    Raises `InputError` where there are none such.
    """
    if topology is not None:
        return make_mesh(config.mesh.model, _topology(topology))
    if devices is not None:
        with suppress(RuntimeError):  # JAX has started: then there are as many as there are
            jax.config.update("jax_num_cpu_devices", devices)
    found = jax.devices()
    count = devices or (1 if jax.default_backend() == "cpu" else len(found))
    if len(found) < count:
        with suppress(RuntimeError):  # an accelerator alone may have been allowed
            found = jax.devices("cpu")
    if len(found) < count:
        raise InputError(f"--devices {count}: this machine can play {len(found)} devices; try JAX_PLATFORMS=cpu")
    return make_mesh(config.mesh.model, found[:count])


def _topology(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU that need not be there, by its compiler alone."""
    for variable, value in NO_TPU.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, "tpu").devices
    except RuntimeError as error:
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(f"--topology {name} needs an extra: pip install 'ragjax[tpu]'") from None
        raise InputError(f"--topology {name}: {str(error).splitlines()[0]}; an example: v5e:2x4") from None


class _Plan:
    """What the rows are computed from. A model that cannot be had is the `InputError` that says why."""

    def __init__(self, config: Config, mesh: Mesh, peak: int | float | None):
        r, g, rate = config.retriever, config.generator, config.train.dropout
        self.config, self.mesh, self.peak = config, mesh, peak
        check_batch(mesh, config.train.batch_size // config.train.accumulate)
        self.one = make_mesh(devices=[mesh.devices.flat[0]])  # for what runs on one device, or on each by itself
        self.kind = mesh.devices.flat[0].device_kind
        self.count = _count(config)
        sources = {r.source, g.source, r.passage_source or r.source}
        with ThreadPoolExecutor() as pool:  # a hub that cannot be reached is asked several times before it is given up
            found = dict(zip(sources, pool.map(_fetched, sources), strict=True))

        def encoder(source: str, dropout: float) -> PretrainedModel | InputError:
            return _opened(found[source], lambda path: bert_shape(path, r.pooling, r.normalize, dropout, config.dtype))

        self.retriever = encoder(r.source, rate)
        self.passage_encoder = encoder(r.passage_source, 0.0) if r.passage_source else self.retriever
        self.generator = _opened(found[g.source], lambda path: _open_generator(path, rate, config.dtype))
        if isinstance(self.retriever, PretrainedModel) and isinstance(self.generator, PretrainedModel):
            check_lengths(config, self.retriever, self.generator)
            partition_params(self.models().abstract_params(), config.train.freeze)
        if isinstance(self.passage_encoder, PretrainedModel):
            check_kind(config.index.kind, self.passage_encoder.config.embedding_dim)

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
            size = self.temporaries(
                encode, model.graphdef, *abstract_with_sharding(self.one, (model.abstract_params, *tokens))
            )
            return size, f"XLA's analysis ({self.kind}): one device, {batch} passages of {longest} tokens"

        rows = [
            _row("index", "passages: text and tokens", "disk", store, there=built),
            _row("index", "embeddings", "disk", self.embeddings, there=built),
            _row("index", "passages' ids", "host", ids),
            _row("index", "passages' tokens for the encoder", "host", tokens),
            self.parameters("index", "passage encoder"),
            _row("index", "temporaries of embedding", "device", embedding),
        ]
        if settings.kind not in ON_DEVICES:
            rows += [
                _row("index", f"FAISS structure {settings.kind}", "disk", self.faiss, there=built),
                _row("index", f"FAISS structure {settings.kind}", "host", self.faiss),
            ]
        return rows

    def train_rows(self) -> list[Row]:
        train, (data, _) = self.config.train, self.mesh.devices.shape
        used, other = train.remat, not train.remat

        @cache
        def step(remat: bool) -> tuple[int, Cost]:
            """FLOPs and cost of the step. Both ways are compiled: what recomputing saves is the question."""
            models, passages = self.models(), 0
            if self.config.retriever.prior == "corpus":
                passages, _ = self.passages()
            config = self.config.replace(train=train.replace(remat=remat))
            traced = [
                trace_step(replace(models, config=config), self.mesh, passages, make) for make in train_programs(train)
            ]
            costs = [_cost(program.lower()) for program in traced]
            most = max(cost.temporaries for cost in costs)
            return matmul_flops(traced[0].jaxpr.jaxpr), replace(costs[0], temporaries=most)

        def gradients() -> tuple[int, str]:
            trained, _ = partition_params(abstract_state(self.models(), self.mesh).params, train.freeze)
            return bytes_each(trained), "float32, of what is trained; part of the temporaries below"

        def optimizer() -> tuple[int, str]:
            state = abstract_state(self.models(), self.mesh)
            return bytes_each(state.optimizer), f"AdamW: two float32 moments of what is trained{self.split}"

        def temporaries(remat: bool) -> tuple[int, str]:
            _, cost = step(remat)
            batch = f"{_questions(train.batch_size // data)}, {train.k} documents each"
            if train.accumulate > 1:
                batch += f", in {train.accumulate} parts"
            refused = "; the compiler refuses" if cost.sent is None else ""
            return cost.temporaries, f"XLA's analysis ({self.kind}): {batch}{refused}"

        def network() -> tuple[int, str]:
            _, cost = step(used)
            if cost.sent is None:
                raise Unknown("the compiler refuses what does not fit")
            kinds = ", ".join(f"{kind} {size_text(size)}" for kind, size in sorted(cost.sent.items()) if size >= 2**20)
            return sum(cost.sent.values()), f"sent by each, and received, around a ring: {kinds or 'next to nothing'}"

        def flops() -> tuple[int, str]:
            whole, _ = step(used)
            each = f", {flops_text(whole / self.mesh.size)} for each" if self.mesh.size > 1 else ""
            return whole, f"matrix products alone{', what is recomputed too' if used else ''}{each}"

        def seconds() -> tuple[float, str]:
            assert self.peak is not None
            whole, _ = step(used)
            return whole / (self.mesh.size * self.peak * 1e12), f"at {self.peak:g} TFLOP/s each, nothing waiting"

        def checkpoints() -> tuple[int, str]:
            size, kept = bytes_each(abstract_state(self.models(), self.one)), train.keep + 1
            return kept * size, f"at most: {train.keep} kept and one being written, {size_text(size)} each"

        def recomputing(remat: bool) -> str:
            return "activations recomputed" if remat else "activations kept"

        instead = f" (train.remat={str(other).lower()})"
        rows = [
            self.parameters("train", "retriever"),
            *([] if train.objective == "contrastive" else [self.parameters("train", "generator")]),
            *([self.parameters("train", "passage encoder")] if train.passage_encoder == "own" else []),
            *([self.parameters("train", "passage encoder", indexed=True)] if refreshes(self.config) else []),
            _row("train", "optimiser state", "device", optimizer),
            _row("train", "gradients", "device", gradients, part=True),
            _row("train", f"temporaries, {recomputing(used)}", "device", lambda: temporaries(used)),
            _row(
                "train", f"temporaries, {recomputing(other)}{instead}", "device", lambda: temporaries(other), part=True
            ),
            self.searched("train"),
            _row("train", "checkpoints", "disk", checkpoints),
        ]
        if self.mesh.size > 1:
            rows.append(_row("train", "over the network, a step", "device", network, part=True))
        rows.append(_row("train", "floating-point operations, a step", "devices", flops, part=True, unit="FLOP"))
        if self.peak is not None:
            rows.append(_row("train", "time of a step, at least", "devices", seconds, part=True, unit="seconds"))
        return rows

    def evaluate_rows(self) -> list[Row]:
        decode, settings = self.config.decode, self.config.evaluate
        questions, longest = -(-settings.batch_size // self.mesh.shape["data"]), self.config.generator.source_tokens
        together, hugging_face = self.config.model == "rag_token", self.config.hf_compatible
        documents = most_documents(self.config)
        copies = 2 if hugging_face and not together else 1  # with the padding unmasked and masked
        shape = questions * documents, longest
        sources = _shape(jnp.int32, *shape), _shape(jnp.bool, *shape)

        def memory() -> tuple[int, str]:
            model = _known(self.generator, "generator")

            def kept(*given: Any) -> Any:
                whole = prefill_documents(model.graphdef, *given)
                return jax.tree.leaves((whole, empty_kv_cache(whole, decode.max_new_tokens * decode.beams)))

            how = f"{_questions(questions)} × {documents} documents × {longest} tokens, and the answers'"
            how += ", read twice" if copies > 1 else ""
            how += "; all devices in one process" if self.mesh.size > 1 else ""
            return copies * bytes_each(jax.eval_shape(kept, model.abstract_params, *sources)), how

        def logits() -> tuple[int, str]:
            rows, vocabulary = shape[0] * decode.beams, _known(self.generator, "generator").config.vocab_size
            how = f"{rows:,} beams × {vocabulary:,} in float32; scoring goes by blocks; part of the temporaries below"
            return rows * vocabulary * 4, how

        def temporaries() -> tuple[int, str]:
            model = _known(self.generator, "generator")
            graph, params = model.graphdef, abstract_with_sharding(self.one, model.abstract_params)
            # a memory is passed by its leaves: it is checked to hold arrays, which shapes are not
            whole = jax.eval_shape(lambda *given: jax.tree.leaves(prefill_documents(graph, *given)), params, *sources)
            whole = abstract_with_sharding(self.one, whole)
            count = decode.beams if together else documents * decode.beams
            candidates = [[((0,) * decode.max_new_tokens, False)] * count] * questions
            answers = abstract_with_sharding(self.one, pad_answers(candidates, SPECIAL, decode.max_new_tokens))

            @jax.jit
            def search(params: Params, whole: list[Any]) -> Any:
                if together:
                    prior = jnp.zeros((questions, documents))
                    return beam_search_rag_token(
                        graph, params, DocumentMemory(*whole), prior, decode, SPECIAL, hugging_face
                    )
                return beam_search_documents(graph, params, DocumentMemory(*whole), decode, SPECIAL, hugging_face)

            @jax.jit
            def score(params: Params, whole: list[Any], *answers: Any) -> Any:
                return score_tokens(graph, params, DocumentMemory(*whole), *answers, SPECIAL)

            most = max(
                self.temporaries(prefill_documents, graph, params, *abstract_with_sharding(self.one, sources)),
                self.temporaries(search, params, whole),
                self.temporaries(score, params, whole, *answers),
            )
            how = f"XLA's analysis ({self.kind}): {_questions(questions)}, at most {count} distinct candidates each"
            return most, how

        models = 1 if settings.untrained_limit == 0 else 2
        return [
            self.parameters("evaluate", "retriever", models),
            self.parameters("evaluate", "generator", models),
            _row("evaluate", "documents' keys and values", "device", memory),
            _row("evaluate", "logits of a step of the beam search", "device", logits, part=True),
            _row("evaluate", "temporaries of answering", "device", temporaries),
            self.searched("evaluate"),
        ]

    def searching(self, with_tokens: bool) -> RagModel:
        """What tells how an embedding is stored; how a token is, only the generator knows."""
        encoder = _known(self.passage_encoder, "passage encoder")
        generator = _known(self.generator, "generator") if with_tokens else encoder
        config = self.config.replace(train=self.config.train.replace(fused=with_tokens))
        return RagModel(config, encoder, generator, SPECIAL, NO_PROMPT, encoder)

    def models(self) -> RagModel:
        retriever, generator = _known(self.retriever, "retriever"), _known(self.generator, "generator")
        encoder = _known(self.passage_encoder, "passage encoder")
        return RagModel(self.config, retriever, generator, SPECIAL, NO_PROMPT, encoder)

    @property
    def split(self) -> str:
        """How parameters and optimiser state lie on several devices, for people."""
        if self.mesh.size == 1:
            return ""
        axes = ["data"] if self.config.mesh.fsdp else []
        axes += ["model"] if self.mesh.shape["model"] > 1 else []
        return f", split over {' and '.join(axes)}" if axes else ", whole on each"

    def parameters(self, command: str, name: str, copies: int = 1, indexed: bool = False) -> Row:
        """`indexed` is the encoder as it was when the index was begun that is being built."""

        def size() -> tuple[int, str]:
            model: PretrainedModel | InputError = getattr(self, name.replace(" ", "_"))
            if isinstance(model, InputError):
                raise Unknown(str(model).split(";")[0])
            twice = ", before and after training" if copies > 1 else ""
            count = f"{bytes_each(model.abstract_params) // 4:,} in float32{twice}"
            if command == "index":
                return bytes_each(model.abstract_params), count
            # the other model's configuration is not asked for: it may be unknown
            alone = RagModel(self.config, model, model, SPECIAL, NO_PROMPT, model)
            alone = for_inference(alone) if command == "evaluate" else alone
            part = "indexed" if indexed else name.replace(" ", "_")
            at = state_shardings(alone, self.mesh, {part: model.abstract_params})[part]
            placed = jax.tree.map(
                lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), model.abstract_params, at
            )
            return copies * bytes_each(placed), count if command == "evaluate" else f"{count}{self.split}"

        of_which = ", of the index being built" if indexed else ""
        return _row(command, f"{name} parameters{of_which}", "device", size)

    def temporaries(self, jitted: Any, *arguments: Any) -> int:
        return _cost(jitted.lower(*arguments)).temporaries

    def advice(self) -> dict[tuple[str, str], list[str]]:
        """For each command and place, settings that would lower what it needs there."""
        index, settings, exact = self.config.index, self.config.evaluate, self.config.index.kind in ON_DEVICES
        evaluate = ["index.kind=HNSW32 (the host then searches)"] if exact else []
        if exact and index.dtype == "float32":
            evaluate.append("index.dtype=bfloat16")
        if settings.batch_size > self.mesh.shape["data"]:
            evaluate.append(f"evaluate.batch_size={self.mesh.shape['data']}")
        if settings.untrained_limit != 0:
            evaluate.append("evaluate.untrained_limit=0")
        evaluate.append("smaller decode.k or decode.beams")
        found = {("index", "device"): ["a smaller index.batch_size"], ("evaluate", "device"): evaluate}
        with suppress(Unknown):
            found["train", "device"] = memory_advice(self.models(), self.mesh)
        with suppress(Unknown):
            (count, _), model = self.passages(), _known(self.passage_encoder, "passage encoder")
            size = faiss_bytes(SMALL_FAISS, model.config.embedding_dim, count)
            if not exact and size and size < self.faiss()[0]:
                for command in ("index", "train", "evaluate"):
                    found[command, "host"] = [f"index.kind={SMALL_FAISS} ({size_text(size)})"]
        return found

    def searched(self, command: str) -> Row:
        """What is searched: all embeddings on the devices, or the FAISS structure (its embeddings stay on the disk)."""
        with_tokens = command == "train" and self.config.train.fused
        if self.config.index.kind in ON_DEVICES:

            def size() -> tuple[int, str]:
                (count, _), (_, how) = self.passages(), self.embeddings()
                size = bytes_each(abstract_corpus(self.searching(with_tokens), self.mesh, count))
                how += f", and at most {self.config.generator.source_tokens} tokens each" if with_tokens else ""
                return size, how if self.mesh.size == 1 else f"split over all devices: {how}"

            return _row(command, f"embeddings{' and tokens' if with_tokens else ', for the search'}", "device", size)
        return _row(command, f"FAISS structure {self.config.index.kind}", "host", self.faiss)

    def passages(self) -> tuple[int, str]:
        if isinstance(self.count, Unknown):
            raise self.count
        return self.count

    def embeddings(self) -> tuple[int, str]:
        width = _known(self.passage_encoder, "passage encoder").config.embedding_dim
        (count, counted), dtype = self.passages(), self.config.index.dtype
        return count * width * jnp.dtype(dtype).itemsize, f"{counted} × {width} in {dtype}"

    def faiss(self) -> tuple[int, str]:
        width = _known(self.passage_encoder, "passage encoder").config.embedding_dim
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


def _opened(found: Path | InputError, open_shape: Callable[[Path], PretrainedModel]) -> PretrainedModel | InputError:
    if isinstance(found, InputError):
        return found
    try:
        return open_shape(found)
    except InputError as error:
        return error


def _open_generator(path: Path, dropout: float, dtype: str) -> PretrainedModel:
    return (open_generator if path.suffix == ".gguf" else generator_shape)(path, dropout, dtype)


def _known(model: PretrainedModel | InputError, name: str) -> PretrainedModel:
    if isinstance(model, InputError):
        raise Unknown(f"needs the {name}")
    return model


def _count(config: Config) -> tuple[int, str] | Unknown:
    """N and where it is from: the index if there is one, else the limit, else the lines of the file."""
    corpus, manifest = config.corpus, Path(config.index.folder) / MANIFEST
    if manifest.is_file():
        count = read_json(manifest, "run: ragjax index CONFIG").get("N")
        if type(count) is not int or not 0 < count < 2**31:
            raise InputError(f"{manifest}: damaged; delete its folder and run: ragjax index CONFIG")
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
    size: Callable[[], tuple[int | float, str]],
    *,
    there: bool = False,
    part: bool = False,
    unit: str = "bytes",
) -> Row:
    counted = not (there or part)
    try:
        number, how = size()
    except Unknown as why:
        return Row(command, what, place, None, f"unknown ({why})", counted, unit)
    return Row(command, what, place, number, f"{how}; it is there already" if there else how, counted, unit)


def _questions(count: int) -> str:
    return "1 question" if count == 1 else f"{count} questions"


def _shape(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _cost(lowered: jax.stages.Lowered) -> Cost:
    try:
        return compiled_cost(lowered)
    except NotCompiled as why:
        raise Unknown(str(why)) from None


def capacity(config: Config, mesh: Mesh, memory: int | None = None) -> dict[str, int | None]:
    """Bytes that this machine has: free where `index.folder` will lie, of the host, and of each device, or `memory`.

    Where the one device is this machine's CPU there is no entry for it: it is the host.
    """
    has: dict[str, int | None] = {"disk": free_disk(Path(config.index.folder)), "host": host_memory()}
    if memory is not None or mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        has["device"] = memory
        if memory is None and mesh.devices.flat[0] in jax.local_devices():
            has["device"] = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    return has


def totals(rows: Sequence[Row], has: dict[str, int | None]) -> list[Total]:
    """What each command needs in memory, and all of them on the disk; `has` is of `capacity`."""
    sums: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        place = "host" if row.place == "device" and "device" not in has else row.place
        if row.counted:
            sums.setdefault(("all" if place == "disk" else row.command, place), []).append(row)
    return [
        Total(command, place, sum(int(r.size or 0) for r in of), all(r.size is not None for r in of), has[place])
        for (command, place), of in sorted(sums.items(), key=lambda item: item[0][0] == "all")
    ]
