"""What a server may be asked, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from ragjax.config import Config, answer_modes
from ragjax.errors import InputError

DOCUMENTS = (1, 2, 3, 5, 10, 20)  # what may be chosen besides the run's own: each has programs that are compiled
BEAMS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Limits:
    """Bounds on each request and on all together."""

    body_bytes: int = 256 << 10
    question_characters: int = 2_000
    questions: int = 32  # of one request
    passages: int = 20  # given with a question
    waiting: int = 64  # questions in the queue; more are told to come again
    batch: int = 8  # questions that the device answers together
    deadline_s: float = 60.0  # from the request to its answer
    receive_s: float = 10.0  # for the head of a request, and for its body

    @property
    def together(self) -> int:
        """Questions that one request may have: no more than the queue ever has room for."""
        return min(self.questions, self.waiting)


@dataclass(frozen=True)
class Decoding:
    """How a question is to be answered; questions of the same are answered together."""

    mode: str
    num_docs: int
    num_beams: int


@dataclass(frozen=True)
class Choices:
    """The ways to decode that may be asked for; the first of each is the run's own."""

    modes: tuple[str, ...]
    num_docs: tuple[int, ...]
    num_beams: tuple[int, ...]

    def decoding(self, mode: str | None, num_docs: int | None, num_beams: int | None) -> Decoding:
        """One of them; what is None is the run's own. Raises `InputError` naming what is none."""
        values = {"mode": (mode, self.modes), "num_docs": (num_docs, self.num_docs)}
        values |= {"num_beams": (num_beams, self.num_beams)}
        for name, (value, offered) in values.items():
            if value is not None and value not in offered:
                raise InputError(f"{name}: is {value!r}; expected one of {', '.join(map(str, offered))}")
        return Decoding(mode or self.modes[0], num_docs or self.num_docs[0], num_beams or self.num_beams[0])


def choices(config: Config, passages: int) -> Choices:
    """What a run of this configuration can be asked; its index has so many passages."""
    decode = config.decode
    docs, beams = decode.num_docs, decode.num_beams
    free = not config.hf_compatible  # which ties the documents to those of training
    return Choices(
        tuple(dict.fromkeys((decode.mode, *answer_modes(config)))),
        (docs, *(k for k in DOCUMENTS if free and k != docs and k <= passages)),
        (beams, *(w for w in BEAMS if w != beams)),
    )
