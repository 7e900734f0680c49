"""The retriever and the generator put together: what a question retrieves, and what the generator reads of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from ragjax.checkpoints.hub import ResolvedSource, checkpoint_folder, fetch, fingerprint_files
from ragjax.checkpoints.pretrained import PretrainedModel, open_bert, open_generator
from ragjax.checkpoints.sentence_transformers import check_sentence_transformers
from ragjax.config import Config, structure
from ragjax.data.corpus import Passage
from ragjax.data.passage_store import PassageStore
from ragjax.data.prompt import (
    Prompt,
    assemble,
    assemble_closed_book,
    check_prompt_fits,
    fill,
    make_prompt,
    passage_text,
)
from ragjax.data.questions import Split, text_problem
from ragjax.data.tokenizer import Tokenizer
from ragjax.errors import InputError
from ragjax.files import read_json, shown
from ragjax.models.generator import SpecialTokens
from ragjax.models.layers import Params
from ragjax.padding import length_buckets, pad_sequences, pick_bucket
from ragjax.terminal import terminal


@dataclass(frozen=True)
class RagModel:
    """The models opened (not read): all that the loss and the training step are made of."""

    config: Config
    retriever: PretrainedModel
    generator: PretrainedModel
    special: SpecialTokens  # the generator's
    prompt: Prompt
    passage_encoder: PretrainedModel  # the retriever itself, unless `retriever.passage_source` names another

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
        """The shapes and types of {"retriever": …, "generator": …}."""
        return {name: model.abstract_params for name, model in self.parts.items()}


@dataclass(frozen=True)
class RagPipeline(RagModel):
    """With them the tokenizers, and what pins all of them."""

    retriever_tokenizer: Tokenizer
    passage_tokenizer: Tokenizer
    generator_tokenizer: Tokenizer
    sources: tuple[ResolvedSource, ...]
    fingerprints: dict[str, str]  # of everything that an index is built from

    def initial_params(self) -> Params:
        """The pretrained parameters: {"retriever": …, "generator": …}."""
        params = {name: model.load_params() for name, model in self.parts.items()}
        # bound to a device, as restored ones are: JAX would compile everything twice for one of each
        return jax.device_put(params, jax.local_devices()[0])


def load_pipeline(config: Config) -> RagPipeline:
    """Fetches what the configuration names and opens it.

    Raises `InputError` for a source that cannot be reached or read, or lengths that a model does not have.
    """
    r, g, rate = config.retriever, config.generator, config.train.dropout
    fetched = tuple(fetch(source) for source in (r.source, g.source, r.passage_source) if source)
    encoder, decoder, *others = (checkpoint_folder(f.path) for f in fetched)
    check_sentence_transformers(encoder, r, questions=True, passages=not others)
    for other in others:
        check_sentence_transformers(other, r, questions=False, passages=True)
    retriever = open_bert(encoder, r.pooling, r.normalize, rate, config.dtype)
    generator = open_generator(decoder, rate, config.dtype)
    check_lengths(config, retriever, generator)
    retriever_tokenizer, generator_tokenizer = Tokenizer.load(encoder), Tokenizer.load(decoder)
    passage_encoder, passage_tokenizer = retriever, retriever_tokenizer
    for other in others:
        passage_encoder = open_bert(other, r.pooling, r.normalize, rate, config.dtype)
        passage_tokenizer = Tokenizer.load(other)
        _check_vocabulary(other, passage_tokenizer, passage_encoder)
    if passage_encoder.config.embedding_dim != retriever.config.embedding_dim:
        raise InputError(
            f"{r.passage_source}: its embeddings have {passage_encoder.config.embedding_dim} dimensions and those of "
            f"{r.source} {retriever.config.embedding_dim}; give two encoders that belong together"
        )
    _check_vocabulary(encoder, retriever_tokenizer, retriever)
    _check_vocabulary(decoder, generator_tokenizer, generator)
    c = config.corpus
    corpus = f"{c.source} {c.format} limit={c.limit}"
    if c.format == "factbook":
        corpus += f" passage_words={c.passage_words} categories={','.join(c.categories) or 'all'} seed={config.seed}"
    fingerprints = {
        "corpus": corpus,
        "kind": f"{structure(config.index.kind)} {config.index.dtype}",
        "encoder": f"{fingerprint_files(passage_encoder.files)} {r.pooling} normalize={r.normalize}",
        "encoder_tokenizer": f"{passage_tokenizer.fingerprint} {r.passage!r} {r.passage_tokens}",
        "generator_tokenizer": f"{generator_tokenizer.fingerprint} {g.passage!r}",
    }
    prompt = make_prompt(generator_tokenizer, g.prompt, framed=generator.config.encoder_decoder)
    special = _special_tokens(generator, generator_tokenizer)
    if config.hf_compatible and special.other_ends:
        raise InputError(
            f"{g.source}: several tokens end an answer ({', '.join(map(str, special.ends))}), and hf_compatible=true "
            "knows one; leave one in eos_token_id of its config.json and generation_config.json"
        )
    return RagPipeline(
        config=config,
        retriever=retriever,
        passage_encoder=passage_encoder,
        generator=generator,
        retriever_tokenizer=retriever_tokenizer,
        passage_tokenizer=passage_tokenizer,
        generator_tokenizer=generator_tokenizer,
        special=special,
        prompt=prompt,
        sources=fetched,
        fingerprints=fingerprints,
    )


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

    def named(key: str) -> list[tuple[Path, list[int]]]:
        files = (config, generator.hf_config), (path, generation)
        return [(f, _token_ids(f, key, of[key], generator.config.vocab_size)) for f, of in files if key in of]

    def one(key: str, default: int | None = None) -> int | None:
        for file, ids in reversed(named(key)):
            if len(ids) > 1:
                raise InputError(f"{file}: {key} is {ids}; expected one token")
            return ids[0] if ids else None
        return default

    ends = {tokenizer.eos_id}.union(*(ids for _, ids in named("eos_token_id")))
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


def _token_ids(file: Path, key: str, given: Any, vocabulary: int) -> list[int]:
    """One token, several or none, as Hugging Face's files name them."""
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if any(type(token) is not int or not 0 <= token < vocabulary for token in ids):
        raise InputError(
            f"{file}: {key} is {shown(given)}; expected numbers of tokens, 0 to {vocabulary - 1}; correct it"
        )
    return ids


def _check_vocabulary(checkpoint: Path, tokenizer: Tokenizer, model: PretrainedModel) -> None:
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{checkpoint}: its tokenizer has {tokenizer.vocab_size} tokens, but the model embeds only "
            f"{model.config.vocab_size}; give the tokenizer that belongs to it"
        )


def check_lengths(config: Config, retriever: PretrainedModel, generator: PretrainedModel) -> None:
    """Raises `InputError` for questions, passages, prompts or answers longer than a model has positions.

    And for a generator with which transformers has no RAG, where its numbers are asked for.
    """
    if config.hf_compatible and not generator.config.encoder_decoder:
        raise InputError(
            f"{config.generator.source}: hf_compatible=true needs BART or T5; transformers has no RAG with others"
        )
    answer = max(config.generator.answer_tokens, config.decode.max_new_tokens)
    source, longest = config.generator.source_tokens, generator.config.max_positions
    both = "generator.source_tokens + the longest answer"
    checked = [
        ("retriever.question_tokens", config.retriever.question_tokens, retriever.config.max_positions),
        ("retriever.passage_tokens", config.retriever.passage_tokens, retriever.config.max_positions),
    ]
    if generator.config.encoder_decoder:  # each side has positions of its own
        checked += [("generator.source_tokens", source, longest), ("the longest answer", answer, longest)]
    else:
        checked += [(both, source + answer, longest)]
    for key, wanted, most in checked:
        if wanted > most:
            window = " (or a sliding window of so many)" if key == both else ""
            raise InputError(f"{key} is {wanted}, but the model has {most} positions{window}; lower it")


def prompt_problems(
    rag: RagPipeline, questions: Sequence[str], documents: bool = True, closed_book: bool = False
) -> list[str | None]:
    """Why each question does not fit into `generator.source_tokens`, or None where it does.

    `documents` and `closed_book` say into which prompts: with a passage, and without any.
    """
    longest, prompt = rag.config.generator.source_tokens, rag.prompt
    cut = rag.config.hf_compatible  # there the question is
    problems: list[str | None] = []
    for tokens in rag.generator_tokenizer.encode([prompt.before_question + question for question in questions]):
        try:
            if documents and not cut:
                check_prompt_fits(prompt, tokens, longest)
            if closed_book:
                assemble_closed_book(prompt, tokens, longest)
            problems.append(None)
        except InputError as error:
            problems.append(str(error))
    return problems


def tokenize_questions(
    rag: RagPipeline, questions: Sequence[str], width: int | None = None
) -> tuple[Int[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
    """Questions as the retriever reads them, padded to a bucket or to `width`.

    Raises `InputError` naming the first that is empty or no Unicode text.
    """
    if bad := next(((i, why) for i, text in enumerate(questions) if (why := text_problem(text))), None):
        raise InputError("questions[{}]: {}".format(*bad))
    longest = rag.config.retriever.question_tokens
    rows = rag.retriever_tokenizer.encode(questions, special=True, longest=longest)
    width = width or pick_bucket(max(len(row) for row in rows), length_buckets(longest))
    return pad_sequences(rows, width, rag.retriever_tokenizer.pad_id)


def tokenize_prompts(
    rag: RagPipeline, store: PassageStore | None, questions: Sequence[str], ids: Int[np.ndarray, "B K"]
) -> tuple[Int[np.ndarray, "n S"], Bool[np.ndarray, "n S"]]:
    """The B·K prompts that the generator reads, question-major, padded to a bucket; without a store, closed-book."""
    longest, tokenizer = rag.config.generator.source_tokens, rag.generator_tokenizer
    if rag.config.hf_compatible and store is not None:
        return _tokenize_hf_prompts(rag, store, questions, ids)
    rows = []
    texts = [rag.prompt.before_question + question for question in questions]
    for question, of_question in zip(tokenizer.encode(texts), ids, strict=True):
        for document in of_question:
            if store is None:
                rows.append(assemble_closed_book(rag.prompt, question, longest))
            else:
                passage = store.tokens(int(document)) if document >= 0 else ()
                rows.append(assemble(rag.prompt, passage, question, longest))
    return pad_sequences(rows, pick_bucket(max(map(len, rows)), length_buckets(longest)), tokenizer.pad_id)


def _tokenize_hf_prompts(
    rag: RagPipeline, store: PassageStore, questions: Sequence[str], ids: Int[np.ndarray, "B K"]
) -> tuple[Int[np.ndarray, "n S"], Bool[np.ndarray, "n S"]]:
    """As transformers' `RagRetriever.postprocess_docs`: the question as the question encoder's tokenizer spells it, a
    quote before and after the title dropped, double spaces made one, and the end, where the question is, cut off.
    """
    g, longest = rag.config.generator, rag.config.retriever.question_tokens
    heard = rag.retriever_tokenizer.encode(questions, special=True, longest=longest)
    texts = []
    for question, of_question in zip(map(rag.retriever_tokenizer.decode, heard), ids, strict=True):
        for document in of_question:
            passage = store[int(document)] if document >= 0 else Passage("", "", "")
            title = passage.title.removeprefix('"').removesuffix('"')
            told = passage_text(g.passage, replace(passage, title=title))
            texts.append(fill(g.prompt, passage=told, question=question).replace("  ", " "))
    rows = rag.generator_tokenizer.encode(texts, special=True, longest=g.source_tokens)
    return pad_sequences(rows, g.source_tokens, rag.special.pad)


def tokenize_answer(rag: RagPipeline, answer: str) -> list[int]:
    """An answer as the generator writes it, the end token included; a decoder's <s>, where BART has one, too."""
    framed, eos = rag.generator.config.encoder_decoder, rag.generator_tokenizer.eos_id
    text = fill(rag.config.generator.answer, answer=answer)
    [tokens] = rag.generator_tokenizer.encode([text], special=framed)
    return tokens if framed and tokens[-1:] == [eos] else [*tokens, eos]


def tokenize_passages(
    tokenizer: Tokenizer, template: str, passages: Sequence[Passage], longest: int, batch: int = 1024
) -> list[np.ndarray]:
    """Passages as the retriever reads them, at most `longest` tokens each.

    A special token in the template is one, as in DPR's "{title} [SEP] {text}"; in a passage it never is.
    """
    pieces, (before, after) = tokenizer.split_special(template), tokenizer.frame
    room, rows = longest - len(before) - len(after), []
    for start in range(0, len(passages), batch):  # as arrays: lists of Python's integers take ten times the room
        chunk = passages[start : start + batch]
        columns: list[list[list[int]]] = []
        for piece in pieces:
            if isinstance(piece, int):
                columns.append([[piece]] * len(chunk))
            else:
                columns.append(tokenizer.encode([passage_text(piece, passage) for passage in chunk]))
        for parts in zip(*columns, strict=True):
            rows.append(np.array([*before, *[t for part in parts for t in part][:room], *after], np.int32))
    return rows


def drop_unfit_questions(rag: RagPipeline, split: Split, documents: bool, closed_book: bool) -> Split:
    """Without the questions that do not fit into the prompts, before a model runs; see `prompt_problems`.

    Tells of those whose end the retriever does not read. Raises `InputError` as `open_split` does.
    """
    texts, longest = [question.question for question in split.questions], rag.config.retriever.question_tokens
    split = split.without(prompt_problems(rag, texts, documents, closed_book)).checked(rag.config.questions.strict)
    kept = [question.question for question in split.questions]
    if cut := sum(len(row) > longest for row in rag.retriever_tokenizer.encode(kept, special=True)):
        terminal.print(
            f"{split.path}: {cut} questions are longer than retriever.question_tokens={longest}: "
            "the retriever reads their beginning, the generator all of them",
            soft_wrap=True,
        )
    return split
