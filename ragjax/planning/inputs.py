"""What a plan is computed from: the configuration, the devices, the models' shapes and the number of passages.

Of a model only config.json is read; its parameters are shapes without values.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from jax.sharding import Mesh

from ragjax.checkpoints.hub import fetch_config, is_local
from ragjax.checkpoints.pretrained import PretrainedModel, encoder_shape, generator_shape, open_generator
from ragjax.checkpoints.sentence_transformers import resolve_encoding
from ragjax.config import Config
from ragjax.data.corpus import CorpusReader
from ragjax.data.prompt import Prompt
from ragjax.data.reading.sources import find_files, is_missing
from ragjax.errors import InputError
from ragjax.files import read_json
from ragjax.models.generator import SpecialTokens
from ragjax.parallel.mesh import Command, check_batch, command_mesh, index_mesh, make_mesh
from ragjax.planning.rows import Unknown
from ragjax.rag import RagModel, adapt, adapt_passages, check_lengths
from ragjax.retrieval.faiss_index import check_kind
from ragjax.retrieval.index import MANIFEST
from ragjax.training.optimizer import partition_params

SPECIAL = SpecialTokens(eos=0, pad=0)  # which tokens they are changes no size
NO_PROMPT = Prompt((), (), (), question_first=False, closed_book=((), ()))  # nor do those around a passage


@dataclass(frozen=True)
class PlanInputs:
    """A model that cannot be had is the `InputError` that says why, and a number of passages likewise `Unknown`."""

    config: Config
    mesh: Mesh  # of training
    retriever: PretrainedModel | InputError
    passage_encoder: PretrainedModel | InputError
    generator: PretrainedModel | InputError
    count: tuple[int, str] | Unknown  # N, and the same in words
    stand_ins: bool = False  # whether its CPU devices stand for accelerators

    def mesh_of(self, command: Command) -> Mesh:
        """Where a command's arrays lie, were it started on these devices."""
        return command_mesh(command, self.config.mesh.model, list(self.mesh.devices.flat))

    def index_mesh_of(self, command: Command) -> Mesh:
        """Where its index lies then."""
        return index_mesh(command, self.config.mesh.model, list(self.mesh.devices.flat))

    @property
    def one_device(self) -> Mesh:
        """For what runs on one device, or on each by itself."""
        return make_mesh(devices=[self.mesh.devices.flat[0]])

    @property
    def on_cpus(self) -> bool:
        """Whether CPUs are what it is planned for."""
        return self.mesh.devices.flat[0].platform == "cpu" and not self.stand_ins

    @property
    def device_kind(self) -> str:
        """Such as "TPU v5 lite": for which device XLA compiles."""
        return self.mesh.devices.flat[0].device_kind

    def model(self, name: str) -> PretrainedModel:
        """The retriever, passage encoder or generator, by that name. Raises `Unknown`."""
        model: PretrainedModel | InputError = getattr(self, name.replace(" ", "_"))
        if isinstance(model, InputError):
            raise Unknown(f"needs the {name}")
        return model

    def placed(self, name: str) -> PretrainedModel:
        """A model with the types in which its parameters will lie; a program is compiled with those of `model`."""
        return replace(self.model(name), widened_on_cpus=not self.stand_ins)

    def placed_rag(self) -> RagModel:
        """All models, as `placed` gives them. Raises `Unknown` where one is missing."""
        names = ("retriever", "generator", "passage encoder")
        retriever, generator, passage_encoder = (self.placed(name) for name in names)
        return replace(self.rag(), retriever=retriever, generator=generator, passage_encoder=passage_encoder)

    def rag(self) -> RagModel:
        """All models together. Raises `Unknown` where one is missing."""
        retriever, generator = self.model("retriever"), self.model("generator")
        return RagModel(self.config, retriever, generator, SPECIAL, NO_PROMPT, self.model("passage encoder"))

    def passages(self) -> tuple[int, str]:
        """N, the number of passages, and the same in words. Raises `Unknown`."""
        if isinstance(self.count, Unknown):
            raise self.count
        return self.count


def open_inputs(config: Config, mesh: Mesh, stand_ins: bool = False) -> PlanInputs:
    """Reads the models' config.json and counts the passages. Raises `InputError` for settings that do not fit.

    With `stand_ins` CPU devices of the mesh stand for accelerators.
    """
    check_batch(mesh, config.train.batch_size // config.train.gradient_accumulation)
    count = _count(config)
    r, g, dropout = config.retriever, config.generator, config.train.dropout
    sources = {r.source, g.source, r.passage_encoder or r.source}
    with ThreadPoolExecutor() as pool:  # a hub that cannot be reached is asked several times before it is given up
        fetched = dict(zip(sources, pool.map(_fetch, sources), strict=True))

    def encoder(source: str, dropout: float) -> PretrainedModel | InputError:
        def open_shape(path: Path) -> PretrainedModel:
            encoding = resolve_encoding(r, path.parent, path.parent)
            return encoder_shape(path, encoding.pooling, encoding.normalize, dropout, config.dtype)

        return _open(fetched[source], open_shape)

    def generator_of(path: Path) -> PretrainedModel:
        return (open_generator if path.suffix == ".gguf" else generator_shape)(path, dropout, config.dtype)

    retriever = encoder(r.source, dropout)
    passage_encoder = encoder(r.passage_encoder, 0.0) if r.passage_encoder else retriever
    generator = _open(fetched[g.source], generator_of)
    if isinstance(retriever, PretrainedModel):
        if isinstance(passage_encoder, PretrainedModel):
            passage_encoder = adapt_passages(config, retriever, passage_encoder)
        retriever = adapt(config, "retriever", retriever)
    if isinstance(generator, PretrainedModel):
        generator = adapt(config, "generator", generator)
    inputs = PlanInputs(config, mesh, retriever, passage_encoder, generator, count, stand_ins)
    if isinstance(retriever, PretrainedModel) and isinstance(generator, PretrainedModel):
        check_lengths(config, retriever, generator)
    with suppress(Unknown):  # where a model cannot be had
        partition_params(inputs.rag().abstract_params(), config.train.frozen_params)
    if isinstance(passage_encoder, PretrainedModel):
        check_kind(config.index.kind, passage_encoder.config.embedding_dim)
    return inputs


def _fetch(source: str) -> Path | InputError:
    try:
        return fetch_config(source)
    except InputError as error:
        return error


def _open(path: Path | InputError, open_shape: Callable[[Path], PretrainedModel]) -> PretrainedModel | InputError:
    if isinstance(path, InputError):
        return path
    try:
        return open_shape(path)
    except InputError as error:
        return error


def _count(config: Config) -> tuple[int, str] | Unknown:
    """N: from the index if there is one, else the limit, else the lines of the file."""
    corpus, manifest = config.corpus, Path(config.index.path) / MANIFEST
    if manifest.is_file():
        count = read_json(manifest, "run: ragjax index CONFIG").get("N")
        if type(count) is not int or not 0 < count < 2**31:
            raise InputError(f"{manifest}: damaged; delete its folder and run: ragjax index CONFIG")
        return count, f"{count:,} passages"
    if corpus.max_passages is not None:
        return corpus.max_passages, f"at most {corpus.max_passages:,} passages"
    if not is_local(corpus.source) or corpus.format == "factbook":
        return Unknown("the corpus is counted when it is read")
    if is_missing(corpus.source):
        return Unknown(f"no file {corpus.source} to count")
    count = CorpusReader(find_files(corpus.source).files, corpus).count()
    if count is None:
        return Unknown("the documents are cut when they are read")
    return count, f"at most {count:,} passages"
