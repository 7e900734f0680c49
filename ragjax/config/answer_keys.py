"""The keys of decoding and of evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict

from ragjax.config.reading import NonNegativeFloat, NonNegativeInt, PositiveInt, Section

Mode = Literal["exact", "thorough", "certified", "fast"]


def _each_once(modes: tuple[Mode, ...]) -> tuple[Mode, ...]:
    if not modes or len(set(modes)) < len(modes):
        raise ValueError("must name a mode, and each once")
    return modes


class Decode(Section):
    """How answers are found."""

    mode: Mode = Field(
        "thorough",
        description="Prove the best answer of all, score all candidates, prove the best of them, or add up beams.",
    )
    num_docs: PositiveInt = Field(5, description="Documents retrieved for a question.")
    num_beams: PositiveInt = Field(4, description="Beams of the search under each document.")
    max_new_tokens: PositiveInt = Field(16, description="The longest answer, the end token included.")
    min_new_tokens: NonNegativeInt = Field(0, description="The shortest answer; 1 forbids the empty one, 2 with BART.")
    length_penalty: float = Field(0.0, description="Beams are ranked by score / length**length_penalty.")
    early_stopping: bool = Field(
        False, description="End a beam search with the first answers that are complete, though better ones may follow."
    )
    start_beams: PositiveInt = Field(2, description="Exact: beams of the first search on the marginal.")
    max_beams: PositiveInt = Field(8, description="Exact: beams are doubled up to so many for the proof.")
    lazy: bool = Field(True, description="Exact: read documents by prior, until the others cannot matter.")
    prove: Literal["top_k", "corpus"] = Field("top_k", description="Exact: the best under the top k, or all passages.")
    probability: Literal["full", "interval"] = Field("full", description="Exact: p(y|x), or bounds from what was read.")
    fallback: Literal["thorough", "none"] = Field("thorough", description="Exact: how to decode the unproved, too.")
    passage_cache_gib: NonNegativeFloat = Field(
        0.0,
        description="Memory on each device for passages that a decoder-only generator has read, so that it reads them "
        "once for many questions; in GiB, 0 for none.",
    )


class Evaluate(Section):
    """What is measured, and on which questions."""

    split: Literal["train", "dev", "test"] = Field("test", description="The questions to evaluate on.")
    batch_size: PositiveInt = Field(8, description="Questions decoded together, on each device.")
    max_questions: PositiveInt | None = Field(None, description="Questions to answer; recall is measured on all.")
    max_untrained_questions: NonNegativeInt | None = Field(None, description="The same before training; 0: none.")
    modes: Annotated[tuple[Mode, ...], Strict(False), AfterValidator(_each_once)] | None = Field(
        None,
        description="The modes to measure and to time, each apart; the first one's answers count. Null: thorough, and "
        "fast from the same beam searches, untimed.",
    )
    closed_book: bool = Field(True, description="Measure the generator without documents, too.")
    normalization: Literal["squad", "mlqa", "none"] = Field(
        "squad", description="How answers are made equal before they are compared: as SQuAD, as MLQA, or not at all."
    )
    language: Literal["ar", "de", "en", "es", "hi", "vi", "zh", "other"] = Field(
        "en", description="With normalization mlqa: whose articles do not count; other has none."
    )
