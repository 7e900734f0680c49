"""Numbers and sentences as pages and the terminal print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ragjax.metrics import WORD


def probability(p: float | None) -> str:
    """Three decimals; a smaller one as 4e-5, one that is not known as a dash."""
    if p is None:
        return "–"
    if p == 0 or p >= 0.0005:
        return f"{p:.3f}"
    digits, exponent = f"{p:.0e}".split("e")
    return f"{digits}e{int(exponent)}"


def percent(share: float) -> str:
    """A share as SVG's attributes take it: 12.5%."""
    return f"{100 * min(max(share, 0), 1):.2f}".rstrip("0").rstrip(".") + "%"


def rounded(value: Any) -> str:
    """A metric as the tables print it."""
    if isinstance(value, list | tuple):
        return " … ".join(map(rounded, value))
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def shortened(text: str, longest: int) -> str:
    """At most `longest` characters; … stands for what is cut off."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def proof_text(answer: Mapping[str, Any]) -> str:
    """What was proved of an exact answer (as JSON), in one line."""
    count = len(answer["documents"])
    steps = f"{answer['steps']} step{'' if answer['steps'] == 1 else 's'}"
    read = f"{answer['documents_read']} of {count} document{'' if count == 1 else 's'} read, {steps}"
    if answer["proved"]["corpus"]:
        return f"proved: no other answer is likelier, whatever the other passages of the corpus say ({read})"
    if answer["proved"]["top_k"]:
        return f"proved: no other answer is likelier under these documents ({read})"
    return f"not proved: the likeliest of the answers found, and another one may be likelier ({read})"


def marked(text: str, answers: Sequence[str], longest: int | None = None) -> list[tuple[str, bool]]:
    """A text in pieces, each with whether it says one of the answers; case, articles and punctuation do not count.

    With `longest` so many characters are left, around the first such place; … stands for what is cut.
    """
    text = " ".join(text.split())
    places = _places(text, [words for answer in answers if (words := [word for word, _, _ in _words(answer)])])
    first, last = 0, len(text)
    if longest is not None and len(text) > longest:
        first = max(0, min(places[0][0] - longest // 3, len(text) - longest)) if places else 0
        last = first + longest
    pieces, at = [("…", False)] if first else [], first
    for start, stop in places:
        if start >= at and stop <= last:
            pieces += [(text[at:start], False), (text[start:stop], True)]
            at = stop
    pieces += [(text[at:last], False)] + ([("…", False)] if last < len(text) else [])
    return [piece for piece in pieces if piece[0]]


def _places(text: str, sought: Sequence[list[str]]) -> list[tuple[int, int]]:
    """Where the words of some answer stand next to each other: where each place begins and ends."""
    words = _words(text)
    found = []
    for answer in sought:
        for i in range(len(words) - len(answer) + 1):
            if [word for word, _, _ in words[i : i + len(answer)]] == answer:
                found.append((words[i][1], words[i + len(answer) - 1][2]))
    return sorted(set(found))


def _words(text: str) -> list[tuple[str, int, int]]:
    """Each word, with where it begins and ends, as `metrics.normalized_words` compares them."""
    found = ((m.group().lower().replace(".", "").replace(",", ""), m.start(), m.end()) for m in WORD.finditer(text))
    return [word for word in found if word[0] not in ("a", "an", "the")]
