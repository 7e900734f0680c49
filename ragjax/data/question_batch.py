"""Text → tokens: questions, prompts, passages and answers as the models read them. A question is tokenised once.

`QuestionBatch` is made first, for training, evaluation and answering alike. Then the index is searched with it, and
then its documents are attached: here as prompts, and in `training/batch.py` as what a training step reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import Bool, Int

from ragjax.config import Config
from ragjax.data.corpus import Passage
from ragjax.data.passage_store import PassageStore
from ragjax.data.prompt import Prompt, assemble, assemble_closed_book, check_prompt_fits, fill, passage_text
from ragjax.data.questions import Split, text_problem
from ragjax.data.tokenizer import Tokenizer
from ragjax.errors import InputError
from ragjax.models.generator import SpecialTokens
from ragjax.padding import length_buckets, pad_sequences, pick_bucket
from ragjax.terminal import terminal

Rows = Any  # NumPy's arrays until they are sharded, then JAX's


@dataclass(frozen=True)
class Tokenizers:
    """Both models' tokenizers, and how the configuration lays a text out for each of them."""

    config: Config
    retriever: Tokenizer
    generator: Tokenizer
    prompt: Prompt
    special: SpecialTokens  # the generator's
    framed: bool  # an encoder–decoder: its tokenizer's own tokens, such as <s> … </s>, stand around an answer
    question_template: str = "{question}"  # how the retriever reads a question


@struct.dataclass
class QuestionBatch:
    """B questions as both models read them, and an answer to each; leading axes are micro-batches.

    What nobody reads is None: the generator's tokens for a search alone and once the prompts are made, the answers
    unless they are trained on.
    """

    row: Int[Rows, "... B"]  # number in the global batch: keys the dropout
    question: Int[Rows, "... B Q"]  # as the retriever reads it
    question_mask: Bool[Rows, "... B Q"]
    generator_question: Int[Rows, "... B G"] | None = None  # as the generator reads it, without the rest of the prompt
    generator_question_mask: Bool[Rows, "... B G"] | None = None
    answer: Int[Rows, "... B T"] | None = None  # as the generator writes it, the end token included
    answer_mask: Bool[Rows, "... B T"] | None = None

    def take(self, rows: Int[np.ndarray, " n"]) -> QuestionBatch:
        """Some of the questions, which keep their numbers; for host arrays."""
        return jax.tree.map(lambda array: array[rows], self)

    def without_prompts(self) -> QuestionBatch:
        """The same questions, once the generator's prompts hold what it reads of them."""
        return replace(self, generator_question=None, generator_question_mask=None)

    @property
    def for_generator(self) -> tuple[Int[Rows, "... B G"], Bool[Rows, "... B G"]]:
        """The generator's tokens of the questions and their mask. They must be there."""
        assert self.generator_question is not None and self.generator_question_mask is not None
        return self.generator_question, self.generator_question_mask

    @property
    def answers(self) -> tuple[Int[Rows, "... B T"], Bool[Rows, "... B T"]]:
        """The answers' tokens and their mask. They must be there."""
        assert self.answer is not None and self.answer_mask is not None
        return self.answer, self.answer_mask


def tokenize_questions(tokenizers: Tokenizers, questions: Sequence[str], width: int | None = None) -> QuestionBatch:
    """Questions as the retriever alone reads them: host arrays, padded to a bucket or to `width` tokens.

    Of a question longer than `retriever.max_question_tokens` it reads the beginning. Raises `InputError` naming the
    first that is empty or no Unicode text.
    """
    if bad := next(((i, why) for i, text in enumerate(questions) if (why := text_problem(text))), None):
        raise InputError("questions[{}]: {}".format(*bad))
    longest = tokenizers.config.retriever.max_question_tokens
    rows = _retriever_rows(tokenizers, questions, longest)
    width = width or pick_bucket(max(len(row) for row in rows), length_buckets(longest))
    numbers = np.arange(len(questions), dtype=np.int32)
    return QuestionBatch(numbers, *pad_sequences(rows, width, tokenizers.retriever.pad_id))


def _retriever_rows(tokenizers: Tokenizers, questions: Sequence[str], longest: int | None = None) -> list[list[int]]:
    """The tokens of questions in `retriever.question_template`, which the generator does not see."""
    texts = [fill(tokenizers.question_template, question=question) for question in questions]
    return tokenizers.retriever.encode(texts, special=True, longest=longest)


def question_batch(
    tokenizers: Tokenizers, questions: Sequence[str], answers: Sequence[str] | None = None, widest: bool = False
) -> QuestionBatch:
    """Questions as both models read them: host arrays.

    Args:
        tokenizers: those of the retriever and of the generator.
        questions: B texts.
        answers: one to each question, to train on, of at most `generator.max_answer_tokens` tokens each: they are
            padded to so many. None where nothing is trained.
        widest: whether to pad to the most tokens that the configuration allows, so that all batches have the same
            shapes, for a step that retrieves by itself.

    Raises `InputError` as `tokenize_questions` does, and, `widest`, for a question that does not fit into a prompt; a
    prompt made on the host raises it itself.
    """
    r, g = tokenizers.config.retriever, tokenizers.config.generator
    batch = tokenize_questions(tokenizers, questions, r.max_question_tokens if widest else None)
    rows = tokenizers.generator.encode([tokenizers.prompt.before_question + question for question in questions])
    if widest:
        for row in rows:
            check_prompt_fits(tokenizers.prompt, row, g.max_prompt_tokens)
    width = g.max_prompt_tokens if widest else max(len(row) for row in rows)
    tokens, mask = pad_sequences(rows, width, tokenizers.generator.pad_id)
    batch = replace(batch, generator_question=tokens, generator_question_mask=mask)
    if answers is None:
        return batch
    rows = [tokenize_answer(tokenizers, answer) for answer in answers]
    tokens, mask = pad_sequences(rows, g.max_answer_tokens, tokenizers.special.pad)
    return replace(batch, answer=tokens, answer_mask=mask)


def tokenize_answer(tokenizers: Tokenizers, answer: str) -> list[int]:
    """An answer as the generator writes it, the end token included; a decoder's <s>, where BART has one, too."""
    eos = tokenizers.generator.eos_id
    text = fill(tokenizers.config.generator.answer_template, answer=answer)
    [tokens] = tokenizers.generator.encode([text], special=tokenizers.framed)
    return tokens if tokenizers.framed and tokens[-1:] == [eos] else [*tokens, eos]


def tokenize_prompts(
    tokenizers: Tokenizers, store: PassageStore | None, questions: QuestionBatch, ids: Int[np.ndarray, "B K"]
) -> tuple[Int[np.ndarray, "n S"], Bool[np.ndarray, "n S"]]:
    """The n = B·K prompts that the generator reads, question-major, padded to a bucket, and their mask.

    Args:
        tokenizers: those of the retriever and of the generator.
        store: the passages; None for closed-book prompts, one for each id.
        questions: as both models read them.
        ids: the passages of each question by their numbers; a prompt has none where it is -1.

    Raises `InputError` for a question that does not fit into `generator.max_prompt_tokens`.
    """
    longest, pad_id = tokenizers.config.generator.max_prompt_tokens, tokenizers.generator.pad_id
    if tokenizers.config.hf_compatible and store is not None:
        return _tokenize_hf_prompts(tokenizers, store, questions, ids)
    rows = []
    for tokens, mask, documents in zip(*questions.for_generator, ids, strict=True):
        question = tokens[mask].tolist()
        for document in documents:
            if store is None:
                rows.append(assemble_closed_book(tokenizers.prompt, question, longest))
            else:
                passage = store.tokens(int(document)) if document >= 0 else ()
                rows.append(assemble(tokenizers.prompt, passage, question, longest))
    return pad_sequences(rows, pick_bucket(max(map(len, rows)), length_buckets(longest)), pad_id)


def tokens_before_question(
    tokenizers: Tokenizers, questions: QuestionBatch, mask: Bool[np.ndarray, "n S"]
) -> Int[np.ndarray, " n"]:
    """How many tokens of each of n = B·K prompts do not depend on its question, where the passage stands before it.

    `mask` is that of `tokenize_prompts`.
    """
    prompt, (_, question_mask) = tokenizers.prompt, questions.for_generator
    rest = len(prompt.middle) + question_mask.sum(axis=1) + len(prompt.tail)
    return mask.sum(axis=1) - np.repeat(rest, len(mask) // len(rest))


def _tokenize_hf_prompts(
    tokenizers: Tokenizers, store: PassageStore, questions: QuestionBatch, ids: Int[np.ndarray, "B K"]
) -> tuple[Int[np.ndarray, "n S"], Bool[np.ndarray, "n S"]]:
    """As transformers' `RagRetriever.postprocess_docs`: the question as the question encoder's tokenizer spells it, a
    quote before and after the title dropped, double spaces made one, and the end, where the question is, cut off.
    """
    g, texts = tokenizers.config.generator, []
    for tokens, mask, documents in zip(questions.question, questions.question_mask, ids, strict=True):
        question = tokenizers.retriever.decode(tokens[mask])
        for document in documents:
            passage = store[int(document)] if document >= 0 else Passage("", "", "")
            title = passage.title.removeprefix('"').removesuffix('"')
            text = passage_text(g.passage_template, replace(passage, title=title))
            texts.append(fill(g.prompt_template, passage=text, question=question).replace("  ", " "))
    rows = tokenizers.generator.encode(texts, special=True, longest=g.max_prompt_tokens)
    return pad_sequences(rows, g.max_prompt_tokens, tokenizers.special.pad)


def tokenize_passages(
    tokenizer: Tokenizer, template: str, passages: Sequence[Passage], longest: int, batch: int = 1024
) -> list[np.ndarray]:
    """Passages as their encoder reads them, at most `longest` tokens each, `batch` of them tokenised at a time.

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


def prompt_problems(
    tokenizers: Tokenizers, questions: Sequence[str], documents: bool = True, closed_book: bool = False
) -> list[str | None]:
    """Why each question does not fit into `generator.max_prompt_tokens`, or None where it does.

    `documents` and `closed_book` say into which prompts: with a passage, and without any.
    """
    longest, prompt = tokenizers.config.generator.max_prompt_tokens, tokenizers.prompt
    cut = tokenizers.config.hf_compatible  # there the question is
    problems: list[str | None] = []
    for tokens in tokenizers.generator.encode([prompt.before_question + question for question in questions]):
        try:
            if documents and not cut:
                check_prompt_fits(prompt, tokens, longest)
            if closed_book:
                assemble_closed_book(prompt, tokens, longest)
            problems.append(None)
        except InputError as error:
            problems.append(str(error))
    return problems


def drop_unfit_questions(tokenizers: Tokenizers, split: Split, documents: bool, closed_book: bool) -> Split:
    """Without the questions that do not fit into the prompts, before a model runs; see `prompt_problems`.

    Warns of those whose end the retriever does not read. Raises `InputError` as `open_split` does.
    """
    config, texts = tokenizers.config, [question.question for question in split.questions]
    split = split.without(prompt_problems(tokenizers, texts, documents, closed_book)).checked(config.questions.strict)
    kept, longest = [question.question for question in split.questions], config.retriever.max_question_tokens
    if cut := sum(len(row) > longest for row in _retriever_rows(tokenizers, kept)):
        terminal.print(
            f"{split.path}: {cut} questions are longer than retriever.max_question_tokens={longest}: "
            "the retriever reads their beginning, the generator all of them",
            soft_wrap=True,
        )
    return split
