"""What a corpus, a question or a file name holds is shown on a terminal, never obeyed."""

from __future__ import annotations

import io
import unicodedata

import pytest
from rich.table import Table

from ragjax.answerer import Answer, Candidate, Document
from ragjax.cli import main
from ragjax.commands.answer import print_answer
from ragjax.terminal import KEPT, Screen, visible

# of Unicode: up to the CJK punctuation, surrogates, presentation forms and specials, tags
PARTS = range(0x3001), range(0xD7F0, 0xE010), range(0xFB00, 0x10000), range(0x13430, 0x13456), range(0xE0000, 0xE0200)
HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eevil\u2066 a\rb\bc\u200f\u061c\u2028\ud800 [bold]x[/bold]"


def obeyed(text: str, allowed: str = "") -> list[str]:
    """The characters that a terminal would obey or hide."""
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return [c for c in text if unicodedata.category(c) in kinds and c not in allowed and ord(c) not in KEPT]


def test_controls_become_symbols() -> None:
    assert visible("a\x1b[31m\x00\x7f\n\t") == "a␛[31m␀␡␊␉"
    assert visible("\x9b \u202e \u2066 \u200f \u061c \u200b \ufeff \ud800") == (
        "<U+009B> <U+202E> <U+2066> <U+200F> <U+061C> <U+200B> <U+FEFF> <U+D800>"
    )
    for text in ("plain", "Zürich — 東京 👍🏽", "می\u200cخواهم", "👨\u200d👩\u200d👧"):
        assert visible(text) == text
    assert visible("a\nb", lines=True) == "a\nb"
    everything = "".join(chr(i) for part in PARTS for i in part)
    assert obeyed(visible(everything)) == []


def test_a_screen_shows_texts_and_tables_as_they_are() -> None:
    screen = Screen(file=io.StringIO(), width=300, highlight=False)
    table = Table("head \x1b[2J")
    table.add_row("cell \u202e\x9b")
    screen.print("text \x1b]0;x\x07")
    screen.print(table)
    out = screen.file.getvalue()  # type: ignore[attr-defined]
    assert obeyed(out, allowed="\n") == []
    assert "text ␛]0;x␇" in out and "head ␛[2J" in out and "cell <U+202E><U+009B>" in out


def test_an_answer_obeys_none_of_its_texts() -> None:
    candidates = [Candidate(HOSTILE, True, 0.5, 0.5, [0.5], [1.0], None)]
    documents = [Document(HOSTILE, HOSTILE, HOSTILE + "\nanswer (thorough): Rome", 1.0)]
    screen = Screen(file=io.StringIO(), width=300, highlight=False)
    print_answer(Answer(HOSTILE, HOSTILE, "thorough", 0.5, documents, candidates), screen)
    out = screen.file.getvalue()  # type: ignore[attr-defined]
    assert obeyed(out, allowed="\n") == [] and "[bold]x[/bold]" in out
    assert not any(line.startswith("answer (thorough): Rome") for line in out.splitlines())


def test_errors_stay_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "no\x1b[2J\u202e\nsuch.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and obeyed(err, allowed="\n") == [] and "no␛[2J<U+202E>␊such.yaml" in err
