"""Hugging Face's config.json: its entries, each checked when it is taken."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ragjax.errors import InputError
from ragjax.files import shown

MOST = 2**24  # of anything that is counted: no model has a larger table or layer
MOST_LAYERS = 2**12
LARGEST = 1e30  # of any number


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file before what an error says of its entries."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


class Fields:
    """Takes entries by name: null counts as not there, and one that is not there has its default or is refused.

    Every method raises `InputError`, naming the key, what stands there and what was expected.
    """

    def __init__(self, hf: Mapping[str, Any]) -> None:
        self._hf = hf

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = MOST) -> int:
        """A whole number of something, from `least` to `most`."""
        value = self._take(key, default)
        if isinstance(value, float) and value.is_integer():  # 512.0
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def layers(self, key: str, default: int | None = None) -> int:
        """How many layers there are."""
        return self.count(key, default, most=MOST_LAYERS)

    def number(self, key: str, default: float | None = None, least: float | None = None) -> float:
        """A number that is finite and above 0, or at least `least`."""
        value = self._take(key, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        # whole numbers may be larger than any float
        if not fits or not (value > 0 if least is None else value >= least) or not abs(value) < LARGEST:
            raise _wrong(key, value, "a number above 0" if least is None else f"a number from {least}")
        return float(value)

    def numbers(self, key: str, count: int) -> list[float]:
        """A list of so many numbers above 0."""
        values = self._take(key, None)
        if not isinstance(values, list) or len(values) != count:
            raise _wrong(key, values, f"a list of {count} numbers")
        return [Fields({key: value}).number(key) for value in values]

    def texts(self, key: str, count: int, among: Collection[str]) -> list[str]:
        """A list of so many texts, each one of those `among` which they must be."""
        values = self._take(key, None)
        if not isinstance(values, list) or len(values) != count:
            raise _wrong(key, values, f"a list of {count} texts")
        return [Fields({key: value}).text(key, among=among) for value in values]

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise _wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None, among: Collection[str] | None = None) -> str:
        """A text, one of those `among` which it must be."""
        value = self._take(key, default)
        if not isinstance(value, str) or (among is not None and value not in among):
            raise _wrong(key, value, f"one of {', '.join(among)}" if among else "a text")
        return value

    def part(self, *keys: str) -> Fields:
        """The entries of the first object among `keys`; of none, where all are null or not there."""
        for key in keys:
            value = self._hf.get(key)
            if value is not None and not isinstance(value, dict):
                raise _wrong(key, value, "an object")
            if value:
                return Fields(value)
        return Fields({})

    def has(self, key: str) -> bool:
        """Whether there is such an entry, and not null."""
        return self._hf.get(key) is not None

    def check_heads(self, width: str, heads: str) -> None:
        """Heads divide a layer's width between them."""
        if self.count(width) % self.count(heads):
            raise InputError(f"{width} is {self.count(width)}, which {heads}={self.count(heads)} does not divide")

    def check_class(self, *beginnings: str) -> None:
        """`architectures`, where it is there, names classes that begin so: else the weights are another model's."""
        classes = self._hf.get("architectures")
        if classes is None:
            return
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise _wrong("architectures", classes, "a list of texts")
        if classes and not any(name.startswith(beginnings) for name in classes):
            raise InputError(
                f"architectures is {shown(classes)}, which is not of model_type {shown(self._hf.get('model_type'))}; "
                "give a checkpoint whose config.json belongs to its weights"
            )

    def _take(self, key: str, default: Any) -> Any:
        value = self._hf.get(key)
        if value is not None:
            return value
        if default is None:
            raise InputError(f"has no {key!r}, which the model's shape needs; fetch it again")
        return default


def _wrong(key: str, value: object, expected: str) -> InputError:
    return InputError(f"{key} is {shown(value)}; expected {expected}")
