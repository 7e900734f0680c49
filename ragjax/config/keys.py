"""The configuration: what each key means, its default and bounds, and what must fit together.

Each section is a frozen pydantic model of hashable values, so that it can be a static argument of `jax.jit`. YAML and
overrides are read by `reading.py`; whatever is wrong with them is an `InputError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import AfterValidator, Field, model_validator

from ragjax.config.answer_keys import Decode, Evaluate
from ragjax.config.data_keys import Corpus, Questions
from ragjax.config.reading import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
    Text,
    Texts,
    default_yaml,
    escaped,
    json_schema,
    read_model,
    reference_page,
    template,
)
from ragjax.config.train_keys import Lora, Mesh

ON_DEVICES = ("exact", "approximate")  # an index.kind that the devices search; any other is FAISS's

PassageTemplate = Annotated[Text, AfterValidator(template("{text}", also="{title}"))]
AnswerTemplate = Annotated[Text, AfterValidator(template("{answer}"))]
QuestionTemplate = Annotated[Text, AfterValidator(template("{question}"))]
PromptTemplate = Annotated[Text, AfterValidator(template("{passage}", "{question}", or_word="chat"))]


class Retriever(Section):
    """An encoder, whose inner products make the prior; what is null is as its sentence-transformers folder says."""

    source: Text = Field(description="A folder, hf:ORG/NAME@REVISION or pypi:PACKAGE==VERSION.")
    passage_encoder: Text | None = Field(None, description="The encoder of passages; null means the same.")
    pooling: Literal["mean", "cls", "max", "last"] | None = Field(
        None, description="The mean or maximum over tokens, the first (cls) or the last; else mean."
    )
    normalize: bool | None = Field(None, description="Scale embeddings to unit length; else true.")
    logit_scale: PositiveFloat = Field(1.0, description="Multiplies the inner products; about 20 with normalize.")
    prior: Literal["top_k", "corpus"] = Field(
        "top_k", description="Whether p(z|x) sums to 1 over the top k or over the whole corpus (not with FAISS)."
    )
    bm25_docs: NonNegativeInt = Field(
        0, description="So many documents more, the best that BM25 alone finds; in contrastive training negatives."
    )
    question_template: QuestionTemplate | None = Field(
        None, description='How the encoder alone reads a question, such as "query: {question}"; else as it is.'
    )
    passage_template: PassageTemplate | None = Field(
        None, description='How the encoder reads a passage; else "{title}: {text}", after its prompt for passages.'
    )
    max_question_tokens: PositiveInt = Field(64, description="The longest question, in tokens.")
    max_passage_tokens: PositiveInt = Field(256, description="The longest passage, in tokens.")


class Index(Section):
    """Embeddings, passages and tokens on disk."""

    path: Text = Field("${output}/index", description="Where the index is.")
    kind: Text = Field(
        "exact",
        description="Search on the devices, exact or approximate, or on each host by a FAISS string such as HNSW32.",
    )
    recall_target: Annotated[float, Field(gt=0, le=1)] = Field(
        0.95, description="With kind approximate: the share of the k best that a TPU finds; other devices find all."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="How embeddings are stored.")
    batch_size: PositiveInt = Field(64, description="Passages encoded together, on each device.")
    shard_size: PositiveInt = Field(16384, description="Passages in a file; a stopped build goes on after the last.")


class Generator(Section):
    """The model that writes the answers: a decoder, such as Llama or Gemma, BART or T5."""

    source: Text = Field(description="A folder, hf:ORG/NAME@REVISION or pypi:PACKAGE==VERSION.")
    prompt_template: PromptTemplate = Field(
        "{passage}\n\nQuestion: {question}\nAnswer:",
        description="What the generator reads; the word chat means the model's own chat template.",
    )
    passage_template: PassageTemplate = Field("{title}: {text}", description="How a passage stands in the prompt.")
    answer_template: AnswerTemplate = Field(" {answer}", description="How an answer follows the prompt.")
    max_prompt_tokens: PositiveInt = Field(256, description="The longest prompt; the passage is cut to fit.")
    max_answer_tokens: PositiveInt = Field(16, description="The longest answer, the end token included.")
    quantization: Literal["int8"] | None = Field(
        None, description="Keep the kernels of its layers, which are not trained then, in int8; null means as they are."
    )


class Train(Section):
    """How the models are trained."""

    steps: PositiveInt = Field(1000, description="Optimizer steps.")
    batch_size: PositiveInt = Field(8, description="Questions in a step, over all devices.")
    gradient_accumulation: PositiveInt = Field(1, description="Micro-batches in a step.")
    num_docs: PositiveInt = Field(5, description="Documents retrieved for a question.")
    objective: Literal["marginal", "contrastive"] = Field(
        "marginal",
        description="Train both models on the answers' likelihood, or the retriever alone on positives and negatives.",
    )
    mined_negatives: PositiveInt = Field(50, description="Contrastive: documents to seek positives and negatives in.")
    fused_retrieval: bool = Field(False, description="Search and learn in one program; devices hold all tokens, too.")
    backprop_docs: PositiveInt | None = Field(
        None, description="The generator learns from so many of the likeliest documents; null means from all."
    )
    gradient_error_every: PositiveInt | None = Field(
        None,
        description="Steps between measurements of the gradient that backprop_docs leaves out; null means never.",
    )
    retriever_lr: NonNegativeFloat = Field(3e-5, description="The retriever's highest learning rate.")
    generator_lr: NonNegativeFloat = Field(3e-5, description="The generator's highest learning rate.")
    warmup_steps: NonNegativeInt = Field(0, description="Steps in which learning rates rise from 0.")
    lr_schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="How learning rates fall.")
    optimizer: Literal["adamw", "adamw_bfloat16", "adafactor"] = Field(
        "adamw",
        description="AdamW, the same with first moments in bfloat16, or Adafactor, whose second moments are factored.",
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="The share of a weight that goes, times the learning rate.")
    weight_decay_on: Literal["matrices", "all"] = Field("matrices", description="Whether norms and biases decay, too.")
    max_grad_norm: PositiveFloat = Field(1.0, description="The largest gradient norm of each model.")
    passage_encoder: Literal["frozen", "shared", "own"] = Field(
        "frozen", description="Whether fixed weights, the trained retriever, or weights of its own encode passages."
    )
    prefetch_retrieval: bool = Field(
        False, description="Search for the next step before a step ends, with queries that are one step old."
    )
    frozen_params: Texts = Field((), description="What not to train, such as generator.embed or generator.layers.0-11.")
    lora: Lora = Lora()
    dropout: Probability = Field(0.0, description="The share of activations that are set to 0.")
    label_smoothing: Probability = Field(0.0, description="The weight of the uniform distribution in targets.")
    exclude_bos: bool = Field(False, description="Do not count the <s> with which BART's answers begin.")
    remat: bool = Field(True, description="Compute activations again in the backward pass, to save memory.")
    start_from: Text | None = Field(None, description="The output folder of a run to begin from.")
    save_every: PositiveInt = Field(500, description="Steps between checkpoints.")
    save_minutes: PositiveFloat | None = Field(None, description="Minutes between checkpoints, at most.")
    keep_checkpoints: PositiveInt = Field(2, description="How many of the newest checkpoints to keep.")
    dev_questions: NonNegativeInt = Field(0, description="Dev questions whose loss is measured at each save.")
    keep_best: bool = Field(False, description="Keep the checkpoint of lowest dev loss, too, and answer with it.")
    log_every: PositiveInt = Field(1, description="Steps between lines of the log.")
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = Field("none", description="Shows the metrics, too.")


class Refresh(Section):
    """How the index follows a passage encoder that is trained; at the end of training it always does.

    The index is encoded again every `every` steps, or when it has drifted. This is spread over `steps` steps, after
    which the new index is searched.
    """

    every: PositiveInt | None = Field(None, description="Steps between re-encodings; null means never.")
    min_overlap: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Re-encode when less than this share of the top k would stay under today's encoder."
    )
    steps: PositiveInt = Field(10, description="Steps over which a re-encoding is spread.")
    overlap_every: PositiveInt | None = Field(
        None, description="Steps between measurements of the drift; null means never."
    )
    overlap_questions: PositiveInt = Field(64, description="Training questions on which the drift is measured.")


class Config(Section):
    """One run: its models, its data, how it is trained, and how it answers."""

    output: Text = Field(description="The folder of the run.")
    model: Literal["rag_sequence", "rag_token"] = Field(
        "rag_sequence", description="Whether documents are summed over once for a whole answer, or at every token."
    )
    hf_compatible: bool = Field(False, description="Compute what transformers does, its mistakes included.")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(0, description="The seed of all that is drawn at random.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="The number format of the models' computations, and on accelerators of parameters that are not "
        "trained; log-probabilities are float32.",
    )
    corpus: Corpus
    questions: Questions = Questions()
    retriever: Retriever
    index: Index = Index()
    generator: Generator
    mesh: Mesh = Mesh()
    train: Train = Train()
    refresh: Refresh = Refresh()
    decode: Decode = Decode()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        problems = _check_corpus(self.corpus) + _check_lengths(self) + _check_search(self) + _check_refresh(self)
        problems += _check_contrastive(self) + _check_model(self) + _check_modes(self) + _check_lora(self.train)
        if problems:
            raise ValueError("; ".join(problems))
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies overrides such as `train.steps=10`.

    Raises `InputError` for a missing file, an unknown or missing key, a wrong type or an impossible value.
    """
    return read_model(Config, Path(path), overrides)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal value."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(config.model_dump(mode="json"))))


def default_config() -> str:
    """All keys as YAML, with their defaults and meanings; ??? stands for what must be given."""
    return default_yaml(Config) + "\n"


def schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file, with which editors complete and check it."""
    return json_schema(Config)


def reference() -> str:
    """All keys as a Markdown page: for each section a table of key, value, default and meaning."""
    return reference_page(schema())


def get_key(config: Config, key: str) -> object:
    """The value at a dotted key."""
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def structure(kind: str) -> str:
    """What an index of this kind consists of: `exact`, embeddings alone, for all that the devices search."""
    return "exact" if kind in ON_DEVICES else kind


def _check_corpus(corpus: Corpus) -> list[str]:
    """How long documents are cut."""
    if corpus.split_words is None and corpus.overlap_words:
        return ["corpus.overlap_words is for documents that are cut; set corpus.split_words, too"]
    if corpus.split_words is not None and corpus.overlap_words >= corpus.split_words:
        return [f"corpus.overlap_words={corpus.overlap_words} must be smaller than corpus.split_words"]
    return []


def _check_lengths(config: Config) -> list[str]:
    """What concerns numbers, and settings that one section's other settings must allow."""
    problems, train, decode = [], config.train, config.decode
    if train.batch_size % train.gradient_accumulation:
        problems.append(
            f"train.batch_size {train.batch_size} is not divisible by train.gradient_accumulation "
            f"{train.gradient_accumulation}"
        )
    if train.keep_best and train.dev_questions == 0:
        problems.append("train.keep_best=true needs a dev_loss; set train.dev_questions, such as 200")
    if train.gradient_error_every is not None and train.backprop_docs is None:
        problems.append("train.gradient_error_every measures what train.backprop_docs leaves out; set that, too")
    if decode.min_new_tokens >= decode.max_new_tokens:
        problems.append("decode.min_new_tokens must be smaller than decode.max_new_tokens")
    if decode.start_beams > decode.max_beams:
        problems.append("decode.start_beams must be at most decode.max_beams")
    if decode.prove == "corpus" and config.retriever.prior != "corpus":
        problems.append("decode.prove=corpus needs retriever.prior=corpus")
    return problems


def _check_search(config: Config) -> list[str]:
    """What the devices must search, and what only a host can."""
    problems, on_devices = [], config.index.kind in ON_DEVICES
    if config.retriever.prior == "corpus" and not on_devices:
        problems.append(
            f"retriever.prior=corpus needs every score, which index.kind={config.index.kind} does not give; "
            "use index.kind=exact or retriever.prior=top_k"
        )
    if config.train.fused_retrieval and not on_devices:
        problems.append(
            f"train.fused_retrieval=true searches on the devices, and index.kind={config.index.kind} on the host; "
            "use index.kind=exact or approximate"
        )
    if config.train.fused_retrieval and config.retriever.bm25_docs:
        problems.append(
            "train.fused_retrieval=true searches on the devices, and retriever.bm25_docs on the host; leave out one"
        )
    if config.hf_compatible and config.retriever.bm25_docs:
        problems.append("hf_compatible=true has no documents of BM25; leave out retriever.bm25_docs")
    if config.train.fused_retrieval and config.hf_compatible:
        problems.append(
            "train.fused_retrieval=true cannot make transformers' prompts, which are texts; set it to false"
        )
    if config.train.fused_retrieval and config.train.passage_encoder != "frozen":
        problems.append("train.fused_retrieval=true has no texts to encode anew; use train.passage_encoder=frozen")
    if config.train.prefetch_retrieval and config.train.fused_retrieval:
        problems.append("train.fused_retrieval=true searches inside the step; leave out train.prefetch_retrieval")
    return problems


def _check_refresh(config: Config) -> list[str]:
    """What goes together with a passage encoder that is trained, or is not."""
    problems, refresh, trained = [], config.refresh, config.train.passage_encoder
    if trained == "frozen":
        for key in ("refresh.every", "refresh.min_overlap", "refresh.overlap_every"):
            if get_key(config, key) is not None:
                problems.append(f"{key} is for a passage encoder that is trained: train.passage_encoder=shared or own")
    elif config.retriever.prior == "corpus":
        problems.append(
            f"train.passage_encoder={trained} with retriever.prior=corpus would divide new scores by a sum over old "
            "embeddings; use retriever.prior=top_k"
        )
    if trained == "shared" and config.retriever.passage_encoder is not None:
        problems.append("train.passage_encoder=shared has one encoder; leave out retriever.passage_encoder, or use own")
    if refresh.min_overlap is not None and refresh.overlap_every is None:
        problems.append("refresh.min_overlap needs the drift to be measured; set refresh.overlap_every, such as 20")
    if refresh.every is not None and refresh.every < refresh.steps:
        problems.append(f"refresh.every={refresh.every} is less than refresh.steps={refresh.steps} that each one takes")
    return problems


def _check_contrastive(config: Config) -> list[str]:
    """What contrastive training, which has neither prior nor generator, has no use for."""
    train, problems = config.train, []
    if train.objective != "contrastive":
        return []
    for key in ("fused_retrieval", "backprop_docs", "gradient_error_every", "label_smoothing", "exclude_bos"):
        if getattr(train, key) != Train.model_fields[key].default:
            problems.append(f"train.{key} is for train.objective=marginal; leave it out")
    if train.gradient_accumulation != 1:
        problems.append(
            "train.objective=contrastive needs the whole batch at once; leave out train.gradient_accumulation"
        )
    if config.retriever.prior == "corpus":
        problems.append("train.objective=contrastive has no prior over the corpus; use retriever.prior=top_k")
    if train.mined_negatives < train.num_docs:
        problems.append(
            f"train.mined_negatives={train.mined_negatives} is less than train.num_docs={train.num_docs}, of which all "
            "but one are sought there"
        )
    return problems


def _check_lora(train: Train) -> list[str]:
    """What has adapters must be trained."""
    trained = ["retriever", *(["generator"] if train.objective == "marginal" else [])]
    trained += ["passage_encoder"] if train.passage_encoder == "own" else []
    wrong = [target for target in train.lora.targets if target.partition(".")[0] not in trained]
    if train.lora.rank is None or (train.lora.targets and not wrong):
        return []
    named = f"names {', '.join(wrong)}" if wrong else "names nothing"
    return [f"train.lora.targets {named}; this run trains {', '.join(trained)}"]


def _check_model(config: Config) -> list[str]:
    """What only RAG-Sequence can do, and only without Hugging Face's arithmetic."""
    problems = []
    if config.model == "rag_token":
        for key, value in (("train.backprop_docs", None), ("train.exclude_bos", False)):
            if get_key(config, key) != value:
                problems.append(f"{key} is for model=rag_sequence; leave it out with model=rag_token")
        if config.retriever.prior == "corpus":  # each token would lose the mass outside the top k
            problems.append("retriever.prior=corpus is for model=rag_sequence; use retriever.prior=top_k")
    if config.hf_compatible and config.generator.prompt_template == "chat":
        problems.append("hf_compatible=true needs a generator.prompt_template written out, not the word chat")
    if config.hf_compatible and config.retriever.question_template not in (None, "{question}"):
        problems.append("hf_compatible=true reads questions as they are; leave out retriever.question_template")
    if config.hf_compatible and config.retriever.prior == "corpus":
        problems.append("hf_compatible=true normalises over the top k; use retriever.prior=top_k")
    return problems


def _check_modes(config: Config) -> list[str]:
    """What the ways to answer need."""
    named = [("decode.mode", config.decode.mode)] + [("evaluate.modes", mode) for mode in config.evaluate.modes or ()]
    problems = []
    for key, mode in named:
        if mode in ("certified", "exact") and config.decode.length_penalty != 0:
            problems.append(f"{key}={mode} needs decode.length_penalty=0")
        if mode != "thorough" and (config.hf_compatible or (mode != "exact" and config.model == "rag_token")):
            also = "" if mode == "exact" else "model=rag_sequence with "
            problems.append(f"{key}={mode} is for {also}hf_compatible=false")
    return problems
