"""The retriever and the generator put together: both models with their tokenizers, opened and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ragjax.checkpoints.adapters import with_adapters
from ragjax.checkpoints.hub import ResolvedSource, checkpoint_folder, fetch, fingerprint_files
from ragjax.checkpoints.pretrained import PretrainedModel, open_encoder, open_generator
from ragjax.checkpoints.quantization import with_int8_kernels
from ragjax.checkpoints.sentence_transformers import reads_lower_case, resolve_encoding
from ragjax.config import Config, adapted_maps, factbook_seed, structure
from ragjax.data.corpus import Passage
from ragjax.data.prompt import Prompt, make_prompt
from ragjax.data.question_batch import Tokenizers, tokenize_passages
from ragjax.data.tokenizer import Tokenizer
from ragjax.errors import InputError
from ragjax.files import read_json, shown
from ragjax.models.generator import SpecialTokens
from ragjax.models.layers import Params


@dataclass(frozen=True)
class RagModel:
    """The models opened, without their weights: all that the loss and the training step need."""

    config: Config
    retriever: PretrainedModel
    generator: PretrainedModel
    special: SpecialTokens  # the generator's
    prompt: Prompt
    passage_encoder: PretrainedModel  # the retriever itself, unless `retriever.passage_encoder` names another

    @property
    def parts(self) -> dict[str, PretrainedModel]:
        """What has parameters in a training state: a passage encoder with weights of its own, and no idle generator."""
        train = self.config.train
        parts = {"retriever": self.retriever}
        if train.objective == "marginal":
            parts["generator"] = self.generator
        if train.passage_encoder == "own":
            parts["passage_encoder"] = self.passage_encoder
        return parts

    def abstract_params(self) -> Params:
        """The shapes of {"retriever": …, "generator": …}, and float32."""
        return {name: model.abstract_params for name, model in self.parts.items()}

    def untrained_types(self, mesh: Mesh) -> Params:
        """The same in the types of parameters that are not trained, on the devices of a mesh."""
        return {name: model.untrained_types(mesh) for name, model in self.parts.items()}


@dataclass(frozen=True)
class RagPipeline(RagModel):
    """With them the tokenizers, and what identifies all of them."""

    retriever_tokenizer: Tokenizer
    passage_tokenizer: Tokenizer
    generator_tokenizer: Tokenizer
    sources: tuple[ResolvedSource, ...]
    fingerprints: dict[str, str]  # of everything that an index is built from
    question_template: (
        str  # as the retriever reads a question, and its passages, where the configuration is silent, too
    )
    passage_template: str

    @property
    def tokenizers(self) -> Tokenizers:
        """What makes tokens of questions, prompts and answers, under this configuration."""
        framed = self.generator.config.encoder_decoder
        return Tokenizers(
            self.config,
            self.retriever_tokenizer,
            self.generator_tokenizer,
            self.prompt,
            self.special,
            framed,
            self.question_template,
        )

    def tokenize_passages(self, passages: Sequence[Passage]) -> list[np.ndarray]:
        """Passages as their encoder reads them."""
        longest = self.config.retriever.max_passage_tokens
        return tokenize_passages(self.passage_tokenizer, self.passage_template, passages, longest)

    def initial_params(self, like: Params | None = None) -> Params:
        """The pretrained parameters: {"retriever": …, "generator": …}, each with the type and sharding that `like` has.

        By default they are in float32 on this process's first device.
        """
        like = self.abstract_params() if like is None else like
        return {name: self.parts[name].load_params(part) for name, part in like.items()}


def load_pipeline(config: Config) -> RagPipeline:
    """Fetches the models that the configuration names, and opens them.

    Raises `InputError` for a source that cannot be reached or read, for models that do not belong together, and for
    lengths that a model does not have.
    """
    r, g, rate = config.retriever, config.generator, config.train.dropout
    fetched = tuple(fetch(source) for source in (r.source, g.source, r.passage_encoder) if source)
    question_folder, generator_folder, *passage_folders = (checkpoint_folder(f.path) for f in fetched)
    encoding = resolve_encoding(r, question_folder, *(passage_folders or [question_folder]))
    if config.hf_compatible and encoding.question_template != "{question}":
        raise InputError(f"{r.source}: its prompts are not for hf_compatible=true; set retriever.question_template")
    retriever = open_encoder(question_folder, encoding.pooling, encoding.normalize, rate, config.dtype)
    generator = open_generator(generator_folder, rate, config.dtype)
    check_lengths(config, retriever, generator)
    retriever_tokenizer = Tokenizer.load(question_folder, writes=False, lower=reads_lower_case(question_folder))
    generator_tokenizer = Tokenizer.load(generator_folder)
    passage_encoder, passage_tokenizer = retriever, retriever_tokenizer
    for folder in passage_folders:
        passage_encoder = open_encoder(folder, encoding.pooling, encoding.normalize, rate, config.dtype)
        passage_tokenizer = Tokenizer.load(folder, writes=False, lower=reads_lower_case(folder))
        _check_vocabulary(folder, passage_tokenizer, passage_encoder)
    _check_dimensions(config, retriever, passage_encoder)
    _check_vocabulary(question_folder, retriever_tokenizer, retriever)
    _check_vocabulary(generator_folder, generator_tokenizer, generator)
    special = _special_tokens(generator, generator_tokenizer)
    _check_ends(config, special)
    fingerprints = _index_fingerprints(
        config, passage_encoder, passage_tokenizer, encoding.passage_template, generator_tokenizer
    )
    adapted, passage_encoder = adapt(config, "retriever", retriever), adapt_passages(config, retriever, passage_encoder)
    return RagPipeline(
        config=config,
        retriever=adapted,
        passage_encoder=passage_encoder,
        generator=adapt(config, "generator", generator),
        retriever_tokenizer=retriever_tokenizer,
        passage_tokenizer=passage_tokenizer,
        generator_tokenizer=generator_tokenizer,
        special=special,
        prompt=make_prompt(generator_tokenizer, g.prompt_template, framed=generator.config.encoder_decoder),
        sources=fetched,
        fingerprints=fingerprints,
        question_template=encoding.question_template,
        passage_template=encoding.passage_template,
    )


def adapt(config: Config, name: str, model: PretrainedModel) -> PretrainedModel:
    """The model of that name in the type of `generator.quantization`, with the adapters of `train.lora`, if any.

    Raises `InputError`.
    """
    if name == "generator" and config.generator.quantization is not None:
        model = with_int8_kernels(model)
    if (maps := adapted_maps(config, name)) is None:
        return model
    try:
        return with_adapters(model, maps, config.train.lora, config.seed)
    except InputError as error:
        raise InputError(f"train.lora.targets: {name}: {error}") from None


def adapt_passages(config: Config, retriever: PretrainedModel, passage_encoder: PretrainedModel) -> PretrainedModel:
    """The passage encoder with the adapters that it is trained with; where it is not trained, it has none."""
    match config.train.passage_encoder:
        case "shared":
            return adapt(config, "retriever", retriever)
        case "own":
            return adapt(config, "passage_encoder", passage_encoder)
    return passage_encoder


def _index_fingerprints(
    config: Config,
    passage_encoder: PretrainedModel,
    passage_tokenizer: Tokenizer,
    passage_template: str,
    generator_tokenizer: Tokenizer,
) -> dict[str, str]:
    """What an index depends on. It fits only where all of it is the same."""
    r, g, c, encoder = config.retriever, config.generator, config.corpus, passage_encoder.config
    format = "jsonl" if c.format == "auto" else c.format  # what the default was called: older indices stay good
    corpus = f"{c.source} {format} max_passages={c.max_passages}"
    how_read = {"columns", "quoting", "skip_empty", "split_words", "overlap_words"}
    if settings := c.model_dump(include=how_read, exclude_defaults=True):
        corpus += f" {settings}"
    if c.format == "factbook":
        categories = ",".join(c.factbook.categories) or "all"
        corpus += (
            f" max_passage_words={c.factbook.max_passage_words} categories={categories} seed={factbook_seed(config)}"
        )
    return {
        "corpus": corpus,
        "kind": f"{structure(config.index.kind)} {config.index.dtype}",
        "encoder": f"{fingerprint_files(passage_encoder.files)} {encoder.pooling} normalize={encoder.normalize}",
        "encoder_tokenizer": f"{passage_tokenizer.fingerprint} {passage_template!r} {r.max_passage_tokens}",
        "generator_tokenizer": f"{generator_tokenizer.fingerprint} {g.passage_template!r}",
    }


def generation_config(generator: PretrainedModel) -> tuple[Path, dict[str, Any]]:
    """The generation_config.json beside a generator's weights, and what it says; a GGUF file says all itself."""
    path = generator.files[0].parent / "generation_config.json"
    return path, read_json(path) if path.is_file() and generator.files[0].suffix != ".gguf" else {}


def _special_tokens(generator: PretrainedModel, tokenizer: Tokenizer) -> SpecialTokens:
    """The tokenizer's, what the checkpoint's generation_config.json or else its config.json forces, and all their ends.

    Raises `InputError` for what is no token, and for several where one is expected.
    """
    path, generation = generation_config(generator)
    config = generator.files[0] if generator.files[0].suffix == ".gguf" else path.with_name("config.json")

    def entries(key: str) -> list[tuple[Path, list[int]]]:
        files, vocabulary = ((config, generator.hf_config), (path, generation)), generator.config.vocab_size
        return [(f, _token_ids(f, key, values[key], vocabulary)) for f, values in files if key in values]

    def one(key: str, default: int | None = None) -> int | None:
        for file, ids in reversed(entries(key)):
            if len(ids) > 1:
                raise InputError(f"{file}: {key} is {ids}; expected one token")
            return ids[0] if ids else None
        return default

    ends = {tokenizer.eos_id}.union(*(ids for _, ids in entries("eos_token_id")))
    # transformers' BartConfig has this default; older checkpoints leave the key out
    forced_eos = one(
        "forced_eos_token_id", tokenizer.eos_id if generator.hf_config.get("model_type") == "bart" else None
    )
    return SpecialTokens(
        eos=tokenizer.eos_id,
        pad=tokenizer.pad_id,
        bos=one("bos_token_id"),
        forced_bos=one("forced_bos_token_id"),
        forced_eos=tokenizer.eos_id if forced_eos in ends else forced_eos,  # which stands for all of them
        ends=tuple(sorted(ends)),
    )


def _token_ids(file: Path, key: str, value: Any, vocabulary: int) -> list[int]:
    """One token, several or none, as Hugging Face's files name them."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or not 0 <= token < vocabulary for token in ids):
        raise InputError(
            f"{file}: {key} is {shown(value)}; expected numbers of tokens, 0 to {vocabulary - 1}; correct it"
        )
    return ids


def _check_vocabulary(checkpoint: Path, tokenizer: Tokenizer, model: PretrainedModel) -> None:
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{checkpoint}: its tokenizer has {tokenizer.vocab_size} tokens, but the model embeds only "
            f"{model.config.vocab_size}; give the tokenizer that belongs to it"
        )


def _check_dimensions(config: Config, retriever: PretrainedModel, passage_encoder: PretrainedModel) -> None:
    passages, questions = passage_encoder.config.embedding_dim, retriever.config.embedding_dim
    if passages != questions:
        raise InputError(
            f"{config.retriever.passage_encoder}: its embeddings have {passages} dimensions and those of "
            f"{config.retriever.source} {questions}; give two encoders that belong together"
        )


def _check_ends(config: Config, special: SpecialTokens) -> None:
    if config.hf_compatible and special.other_ends:
        raise InputError(
            f"{config.generator.source}: several tokens end an answer ({', '.join(map(str, special.ends))}), and "
            "hf_compatible=true knows one; leave one in eos_token_id of its config.json and generation_config.json"
        )


def check_lengths(config: Config, retriever: PretrainedModel, generator: PretrainedModel) -> None:
    """Raises `InputError` for questions, passages, prompts or answers longer than a model has positions.

    And for a generator with which transformers has no RAG, where its numbers are asked for.
    """
    if config.hf_compatible and not generator.config.encoder_decoder:
        raise InputError(
            f"{config.generator.source}: hf_compatible=true needs BART or T5; transformers has no RAG with others"
        )
    answer = max(config.generator.max_answer_tokens, config.decode.max_new_tokens)
    source, longest = config.generator.max_prompt_tokens, generator.config.max_positions
    both = "generator.max_prompt_tokens + the longest answer"
    lengths = [
        ("retriever.max_question_tokens", config.retriever.max_question_tokens, retriever.config.max_positions),
        ("retriever.max_passage_tokens", config.retriever.max_passage_tokens, retriever.config.max_positions),
    ]
    if generator.config.encoder_decoder:  # each side has positions of its own
        lengths += [("generator.max_prompt_tokens", source, longest), ("the longest answer", answer, longest)]
    else:
        lengths += [(both, source + answer, longest)]
    for key, tokens, most in lengths:
        if tokens > most:
            raise InputError(f"{key} is {tokens}, but the model has {most} positions; lower it")
