"""Text that is shown, not obeyed: what a corpus, a question or a file name brings must not steer a terminal."""

from __future__ import annotations

import unicodedata

# these only join or part letters, and Persian, Hindi and many emoji need them
KEPT = {0x200C, 0x200D}  # zero-width non-joiner and joiner


class _Symbols(dict[int, str]):
    """For `str.translate`: ␛ for ESC and the like, <U+202E> for controls that have no picture."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if code < 0x20 or code == 0x7F:
            symbol = chr(0x2421 if code == 0x7F else 0x2400 + code)
        elif unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and code not in KEPT:
            symbol = f"<U+{code:04X}>"
        else:
            symbol = character
        self[code] = symbol
        return symbol


_SYMBOLS = _Symbols()
_WITHIN_LINES = _Symbols({ord("\n"): "\n"})


def visible(text: str, lines: bool = False) -> str:
    """The text with symbols for what a terminal would obey or hide; on one line, unless `lines` keeps its breaks.

    That is: control characters (line breaks and tabs among them), those that turn the direction of writing, and those
    without width. Halves of surrogate pairs, which cannot be printed, are among them.
    """
    if text.isascii() and text.isprintable():
        return text
    return text.translate(_WITHIN_LINES if lines else _SYMBOLS)
