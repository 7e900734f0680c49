"""Tables in text: a row a line, columns apart by tabs, commas or semicolons, with a header or without."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ragjax.data.reading.byte_stream import LONGEST_LINE, text_lines
from ragjax.data.reading.record import Record
from ragjax.errors import InputError


def table_records(
    path: Path, quoting: str, is_header: Callable[[Sequence[str]], bool], section: str
) -> Iterator[Record]:
    """The rows of a table. Their fields are called as the header calls them, or else "1", "2", … by their places.

    Args:
        path: of the file. Its first line says what separates the columns: a tab where there is one.
        quoting: `line`: a column may stand in quotes, which end on its line; `multiline`: it may go on over several
            lines; `none`: a quote is a character as any other.
        is_header: whether the cells of the first row are names.
        section: "corpus" or "questions", where the configuration says how to read them.

    Raises `InputError` naming file and line for a row that has not as many columns as the first one.
    """
    names: list[str] = []
    for number, row in _rows(path, quoting, f"{section}.quoting"):
        if not names:
            if "\r" in "".join(row):
                raise InputError(f"{path}:{number}: its lines end in carriage returns alone; let them end in \\n")
            if is_header(row):
                names = [name.strip() for name in row]
                if twice := sorted({name for name in names if name and names.count(name) > 1}):
                    raise InputError(f"{path}:{number}: two columns are called {', '.join(twice)}; rename one of them")
                continue
            names = [str(place) for place in range(1, len(row) + 1)]
        if len(row) < len(names) or any(row[len(names) :]):
            listed = ", ".join(names[:12])
            cause = "a tab or comma within a column must be in quotes"
            if len(row) < len(names):
                cause = f"a line break within a column must be in quotes, and {section}.quoting=multiline"
            raise InputError(f"{path}:{number}: expected {len(names)} columns ({listed}), found {len(row)}; {cause}")
        yield Record(number, dict(zip(names, row, strict=False)))


def _rows(path: Path, quoting: str, setting: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its first line."""
    csv.field_size_limit(LONGEST_LINE)  # else 128 KiB
    delimiter = None
    lines = text_lines(path)
    for number, line in lines:
        if not line.strip():
            continue
        if delimiter is None:
            delimiter = "\t" if "\t" in line else max(",;", key=line.count)
        if quoting == "none" or '"' not in line:
            yield number, line.rstrip("\r\n").split(delimiter)
        elif quoting == "line":
            yield number, _one_row(line.rstrip("\r\n"), delimiter, f"{path}:{number}", setting)
        else:
            yield number, _row_of_lines(line, lines, delimiter, f"{path}:{number}", setting)


def _one_row(line: str, delimiter: str, where: str, setting: str) -> list[str]:
    """A line is a row: a quote that is not closed on it would swallow the rows after it."""
    try:
        [row] = csv.reader([line], delimiter=delimiter, strict=True)
    except (csv.Error, ValueError):
        raise InputError(
            f'{where}: a column opens with " and does not end with one on this line; in a quoted column quotes are '
            'doubled, as in "a ""quoted"" word", and a record is one line; where quotes are plain text, set '
            f"{setting}=none, and where columns go on over several lines, {setting}=multiline"
        ) from None
    return row


def _row_of_lines(line: str, more: Iterator[tuple[int, str]], delimiter: str, where: str, setting: str) -> list[str]:
    """A row that begins with a line and takes as many more as its quotes say."""

    def lines() -> Iterator[str]:
        yield line
        yield from (text for _, text in more)

    try:
        return next(csv.reader(lines(), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise InputError(
            f"{where}: a quoted column that opens here is not closed rightly ({error}); where quotes are plain text, "
            f"set {setting}=none"
        ) from None
    except StopIteration:
        raise InputError(
            f"{where}: a quoted column opens here, and the file ends within it; where quotes are plain text, set "
            f"{setting}=none"
        ) from None


def is_table_name(name: str) -> bool:
    """Whether a file that is called so, packed or not, should hold a table."""
    return name.lower().removesuffix(".gz").removesuffix(".zst").endswith((".tsv", ".csv"))
