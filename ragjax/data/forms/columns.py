"""Which field of a record holds what: recognised by the names of published files, or as the configuration has it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ragjax.errors import InputError
from ragjax.files import shown

IDS = ("id", "_id", "pid", "docid", "doc_id", "passage_id")
NAMES = {  # of BEIR, KILT, Pyserini, FlashRAG, Tevatron, MS MARCO, DPR, SQuAD, TriviaQA, NQ-open; earlier ones win
    "corpus": {
        "id": IDS,
        "title": ("title", "wikipedia_title"),
        "text": ("text", "contents", "passage", "body"),
    },
    "questions": {
        "id": ("id", "_id", "qid", "question_id", "query_id", "questionid"),
        "question": ("question", "query", "input"),
        "answers": ("answers", "golden_answers", "answer", "output", "target"),
        "passages": ("passages",),
    },
}
SAMPLE = 100  # rows by which the columns of a table without a header are known


@dataclass(frozen=True)
class Columns:
    """The names to look for in a file of `kind`, "corpus" or "questions"; `given` are those of the configuration."""

    kind: str
    given: Mapping[str, str | None]

    def find(self, part: str, keys: Collection[str]) -> str | None:
        """The key of a part; whether its letters are capital does not matter. None where it is not there."""
        by_name = {key.lower(): key for key in keys} | {key: key for key in keys}
        given = self.given.get(part)
        names = NAMES[self.kind][part] if given is None else (given, given.lower())
        return next((by_name[name] for name in names if name in by_name), None)

    def need(self, part: str, keys: Collection[str], where: str) -> str:
        """The key of a part. Raises `InputError` naming the keys that are there where it is not among them."""
        key = self.find(part, keys)
        if key is None:
            raise InputError(f"{where}: {self.lack(part, keys)}")
        return key

    def lack(self, part: str, keys: Iterable[str]) -> str:
        """What is said of a record without a part: the keys that are there, and the setting that maps them."""
        given = self.given.get(part)
        listed = ", ".join(shown(key)[1:-1] for key in list(keys)[:12]) or "none"
        setting = f"{self.kind}.columns.{part}"
        name = f'no "{part}"' if given is None else f"no {shown(given)}, which {setting} names,"
        return f'empty or missing "{part}": {name} among its keys ({listed}); name it by {setting}'

    def notice(self, parts: Mapping[str, str | None], names: Sequence[str]) -> str:
        """What is recognised otherwise than by our own names: "id is "_id"", …; "" where there is nothing to tell.

        Args:
            parts: the key of each part.
            names: the keys of all fields, which are numbers in a table without a header.
        """
        said = [f'{part} is "{key}"' for part, key in parts.items() if key not in (None, part, part.removesuffix("s"))]
        return ("no header: " if "".join(names).isdigit() else "") + ", ".join(said)

    def doubt(self, rows: Sequence[Sequence[str]]) -> str:
        """A doubt to tell of a table without a header whose columns the configuration gives by their places."""
        first, others = rows[0], rows[1:]
        if not any(self.given.values()) or not _are_names(first) or not others or any(map(_are_names, others)):
            return ""
        cells = ", ".join(cell.strip() for cell in first)
        return f"its first line ({cells}) is read as a record; where it is a header, name the columns as it does"

    def is_header(self, row: Sequence[str]) -> bool:
        """Whether the first row of a table holds names: one that the configuration gives, or that of the text or the
        question among cells that all could be names. A title may be called "Body", but then an id stands beside it.
        """
        cells = {cell.strip().lower() for cell in row}
        given = {name.lower() for name in self.given.values() if name is not None and not name.isdigit()}
        if not cells.isdisjoint(given):
            return True
        names = NAMES[self.kind]["text" if self.kind == "corpus" else "question"]
        return not cells.isdisjoint(names) and all(len(cell) <= 64 and not cell[:1].isdigit() for cell in cells)

    def headless(self, rows: Sequence[Sequence[str]], where: str) -> Mapping[str, str | None]:
        """The places of the parts, in a table without a header, from its first rows; as the configuration gives them.

        A table of questions has two columns. In one of passages the text is the longest column, and the id that which
        never holds the same twice nor a space: of two columns, or of three, where the last one is the title. Raises
        `InputError` where that leaves a doubt.
        """
        if any(self.given.values()):
            return self.given
        width, setting = len(rows[0]), f"{self.kind}.columns"
        if _are_names(rows[0]):
            names = ", ".join(cell.strip() for cell in rows[0])
            raise InputError(f"{where}: its columns are called {names}, of which none is known; name them by {setting}")
        if self.kind == "questions" and width == 2 and not all(row[0].strip().isdigit() for row in rows):
            return {"question": "1", "answers": "2"}
        if self.kind == "corpus" and width in (2, 3):
            columns = list(zip(*rows, strict=True))
            text = max(range(width), key=lambda i: sum(map(len, columns[i])))
            others = [i for i in range(width) if i != text]
            ids = [i for i in others if _are_ids(columns[i])]
            if ids:
                places = {"id": ids[0], "title": next((i for i in others if i != ids[0]), None), "text": text}
                return {part: None if i is None else str(i + 1) for part, i in places.items()}
        raise InputError(
            f"{where}: has no header, and {width} columns of which it is not clear what they hold; say it by {setting}"
            ', as in {id: "1", text: "2"}'
        )


def by_file(notices: Mapping[str, Sequence[Path]]) -> list[str]:
    """A line for each notice, which names the first of the files that it is about."""
    lines = []
    for text, files in notices.items():
        others = f" and {len(files) - 1} more files" if len(files) > 1 else ""
        lines.append(f"{files[0]}{others}: {text}")
    return lines


def _are_names(cells: Sequence[str]) -> bool:
    """Whether a row could be a header."""
    return all(re.fullmatch(r"[A-Za-z_]\w*", cell.strip()) for cell in cells)


def _are_ids(cells: Sequence[str]) -> bool:
    return len({*cells}) == len(cells) and all(cell and not re.search(r"\s", cell) for cell in cells)
