"""Cuts a long text into passages, between sentences where it can."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right

from ragjax.metrics import UNSPACED

WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？]+[」』”’]*|\n\s*\n")


def split_words(text: str, longest: int, overlap: int = 0) -> list[str]:
    """The text, where it has at most `longest` words; else pieces of it of at most so many, in their order.

    A piece ends with the last sentence that fits, or after `longest` words where none does. The next one begins with
    the last whole sentences of it that have at most `overlap` words together, unless no other would fit beside them. In
    scripts without spaces each character is a word.
    """
    words = [match.span() for match in WORD.finditer(text)]
    if len(words) <= longest:
        return [text]
    begins = [start for start, _ in words]
    sentences = sorted({bisect_left(begins, match.end()) for match in SENTENCE_END.finditer(text)})

    def piece_end(first: int) -> int:
        """After the last word of a piece that begins with the word `first`."""
        if first + longest >= len(words):
            return len(words)
        last = bisect_right(sentences, first + longest) - 1
        return sentences[last] if last >= 0 and sentences[last] > first else first + longest

    pieces, first, end = [], 0, 0
    while end < len(words):
        if piece_end(first) <= end:
            first = end
        end = piece_end(first)
        pieces.append(text[words[first][0] : words[end - 1][1]])
        again = bisect_left(sentences, max(first + 1, end - overlap))
        first = sentences[again] if again < len(sentences) and sentences[again] < end else end
    return pieces
