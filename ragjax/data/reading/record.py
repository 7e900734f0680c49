"""One record of a file, whatever its format."""

from __future__ import annotations

from typing import Any, NamedTuple


class Record(NamedTuple):
    """Its fields by their names, and where it stands."""

    number: int  # its line; its place among the records where these are no lines; from 1
    fields: dict[str, Any]
    problem: str | None = None  # why its bytes are no text
