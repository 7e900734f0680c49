"""Prompts: the tokens around a passage and a question."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from ragjax.data.chat_template import render_chat_template
from ragjax.data.corpus import Passage
from ragjax.data.tokenizer import Tokenizer
from ragjax.errors import InputError
from ragjax.padding import Ids

CHAT_MESSAGE = "{passage}\n\nQuestion: {question}\nAnswer briefly."
CHAT_MESSAGE_CLOSED_BOOK = "Question: {question}\nAnswer briefly."


def fill(template: str, **slots: str) -> str:
    """A template with a text for each {slot}; what such a text holds is never a slot."""
    return re.sub(r"\{(" + "|".join(slots) + r")\}", lambda match: slots[match[1]], template)


@dataclass(frozen=True)
class Prompt:
    """The tokens around a passage and a question: head, passage, middle, question, tail.

    `question_first` swaps the two; `closed_book` is what stands around a question without a passage. A space before
    {question} belongs to the question, as in the text that models were trained on: `before_question` holds it.
    """

    head: tuple[int, ...]
    middle: tuple[int, ...]
    tail: tuple[int, ...]
    question_first: bool
    closed_book: tuple[tuple[int, ...], tuple[int, ...]]
    before_question: str = ""


def make_prompt(tokenizer: Tokenizer, template: str, framed: bool = False) -> Prompt:
    """Tokenises a template with {passage} and {question}; `chat` stands for the tokenizer's own chat template.

    `framed` puts what the tokenizer itself puts around a text, such as <s> … </s>, around the whole: an encoder expects
    it. Closed-book prompts lose the line on which the passage stands. Raises `InputError`.
    """
    if template == "chat":
        open_book = _render_chat(tokenizer, CHAT_MESSAGE)
        closed_book = _render_chat(tokenizer, CHAT_MESSAGE_CLOSED_BOOK)
    else:
        for part in ("{passage}", "{question}"):
            if template.count(part) != 1:
                raise InputError(f"prompt {template!r}: must contain {part} once (or be the word chat)")
        open_book, closed_book = template, _without_passage(template)

    starts = (tokenizer.bos_id,) if tokenizer.adds_bos and tokenizer.bos_id is not None else ()
    start, end = tokenizer.frame if framed else (starts, ())

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode_markup(text))

    def encode_start(text: str) -> tuple[int, ...]:
        ids = encode(text)
        return ids if start and ids[: len(start)] == start else start + ids

    before_question = " " if " {question}" in open_book and " {question}" in closed_book else ""
    if before_question:
        open_book, closed_book = (text.replace(" {question}", "{question}") for text in (open_book, closed_book))
    question_first = open_book.index("{question}") < open_book.index("{passage}")
    first, second = ("{question}", "{passage}") if question_first else ("{passage}", "{question}")
    head, _, rest = open_book.partition(first)
    middle, _, tail = rest.partition(second)
    before, _, after = closed_book.partition("{question}")
    around = encode_start(before), encode(after) + end
    return Prompt(encode_start(head), encode(middle), encode(tail) + end, question_first, around, before_question)


def _without_passage(template: str) -> str:
    before, _, after = template.partition("{passage}")
    question_end = before.find("{question}") + len("{question}") if "{question}" in before else 0
    kept = before[: max(before.rfind("\n") + 1, question_end)]
    return kept + (after if kept and not kept.endswith("\n") else after.lstrip())


def _render_chat(tokenizer: Tokenizer, message: str) -> str:
    """One user message in the model's chat template, up to where the answer starts; the slots stay in the text."""
    if tokenizer.chat_template is None:
        raise InputError("prompt chat: this generator's tokenizer has no chat template; write the prompt out")
    names = {f"{kind}_token": tokenizer.token(getattr(tokenizer, f"{kind}_id")) for kind in ("bos", "eos", "pad")}
    messages = [{"role": "user", "content": message}]
    try:
        text = render_chat_template(
            tokenizer.chat_template, {"messages": messages, "add_generation_prompt": True, **names}
        )
    except InputError as error:
        raise InputError(f"prompt chat: the chat template fails: {error}; write the prompt out") from None
    for part in ("{passage}", "{question}"):
        if text.count(part) != message.count(part):
            raise InputError(f"prompt chat: the chat template does not keep {part} once; write the prompt out")
    return text


def assemble(prompt: Prompt, passage: Ids, question: Ids, longest: int) -> Int[np.ndarray, " S"]:
    """The tokens of one prompt, at most `longest`: the passage is cut to fit, the question never.

    Raises `InputError` when the prompt does not fit even without its passage.
    """
    cut = list(passage[: longest - check_prompt_fits(prompt, question, longest)])
    first, second = (list(question), cut) if prompt.question_first else (cut, list(question))
    return np.array([*prompt.head, *first, *prompt.middle, *second, *prompt.tail], np.int32)


def check_prompt_fits(prompt: Prompt, question: Ids, longest: int) -> int:
    """The tokens of a prompt without its passage. Raises `InputError` when these alone are more than `longest`."""
    fixed = len(prompt.head) + len(prompt.middle) + len(prompt.tail) + len(question)
    if fixed > longest:
        raise InputError(_too_long(fixed, len(question), longest))
    return fixed


def assemble_closed_book(prompt: Prompt, question: Ids, longest: int) -> Int[np.ndarray, " S"]:
    """The tokens of the prompt without any passage, at most `longest`. Raises `InputError` when it does not fit."""
    before, after = prompt.closed_book
    tokens = np.array([*before, *question, *after], np.int32)
    if len(tokens) > longest:
        raise InputError(_too_long(len(tokens), len(question), longest))
    return tokens


def _too_long(needed: int, question: int, longest: int) -> str:
    return (
        f"a prompt needs {needed} tokens before any passage (its question has {question}) but "
        f"generator.max_prompt_tokens is {longest}; shorten the question or raise generator.max_prompt_tokens"
    )


def passage_text(template: str, passage: Passage) -> str:
    """A passage as `retriever.passage_template` or `generator.passage_template` lays it out."""
    return fill(template, title=passage.title, text=passage.text)
