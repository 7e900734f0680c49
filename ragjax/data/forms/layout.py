"""Where the records of a file have the id, the title and the text of a passage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ragjax.data.forms.columns import Columns
from ragjax.data.reading.record import Record
from ragjax.errors import InputError
from ragjax.files import is_unicode

TITLED = "contents"  # of Pyserini and FlashRAG: a first line of several is the title


@dataclass(frozen=True)
class PassageLayout:
    """The keys of one file's records; a title may stand in some records alone."""

    columns: Columns
    id: str | None  # None: there is none, and passages are numbered
    title: str | None
    text: str
    titled: bool  # whether the first line of the text may be the title
    notice: str | None  # what is not as a newcomer would expect

    @classmethod
    def find(cls, columns: Columns, sample: Sequence[Record], is_table: bool, where: str) -> PassageLayout:
        """The layout of a file by its first records, which `where` names. Raises `InputError` where it is not known."""
        keys = list(dict.fromkeys(key for record in sample for key in record.fields))
        doubt = ""
        if is_table and "".join(keys).isdigit():
            rows = [list(record.fields.values()) for record in sample]
            doubt = columns.doubt(rows)
            columns = replace(columns, given=columns.headless(rows, where))
        text = columns.need("text", keys, where)
        id_ = columns.need("id", keys, where) if columns.given.get("id") else columns.find("id", keys)
        title = columns.need("title", keys, where) if columns.given.get("title") else columns.find("title", keys)
        titled = text.lower() == TITLED and title is None and columns.given.get("text") is None
        parts = {"id": id_, "title": title, "text": text}
        said = columns.notice(parts, keys) + (", of which a first line is the title" if titled else "")
        numbered = "" if id_ else "no id: passages are numbered; corpus.columns.id may name one"
        notice = "; ".join(part for part in (said, numbered, doubt) if part)
        return cls(columns, id_, title, text, titled, notice or None)

    def read(self, record: Record, where: str, number: int) -> tuple[str, str, str]:
        """The id, the title and the text, perhaps empty, of a record; `number` is the id where the file has none.

        Raises `InputError` for a record that has not what the first ones have.
        """
        if record.problem:
            raise InputError(f"{where}: {record.problem}")
        fields = record.fields
        text, title = self._text(fields, where), self._title(fields, where)
        if self.titled and not title:
            head, _, rest = text.strip().partition("\n")
            if rest.strip():
                title, text = head.strip().strip('"'), rest.strip()
        passage = (self._id(fields, where, number), title, text)
        if not is_unicode("".join(passage)):
            raise InputError(f"{where}: holds half of a \\ud800-\\udfff pair, which is no Unicode text")
        return passage

    def _id(self, fields: dict, where: str, number: int) -> str:
        if self.id is None:
            if (key := self.columns.find("id", fields)) is not None:
                raise InputError(f'{where}: has the id "{key}", and the first records have none; give all of them one')
            return str(number)
        value = fields.get(self.id)
        if self.id not in fields:
            raise InputError(f"{where}: {self.columns.lack('id', fields)}")
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise InputError(f'{where}: empty or missing "{self.id}"; expected a text or a whole number')
        return str(value)

    def _title(self, fields: dict, where: str) -> str:
        key = self.title if self.title in fields else self.columns.find("title", fields)
        value = None if key is None else fields[key]
        if value is not None and not isinstance(value, str):
            raise InputError(f'{where}: "{key}" must be a text')
        return value or ""

    def _text(self, fields: dict, where: str) -> str:
        """A text, or KILT's list of paragraphs as one."""
        if self.text not in fields:
            raise InputError(f"{where}: {self.columns.lack('text', fields)}")
        value = fields[self.text]
        if isinstance(value, list) and all(isinstance(paragraph, str) for paragraph in value):
            return "\n".join(paragraph.rstrip("\n") for paragraph in value)
        if value is not None and not isinstance(value, str):
            raise InputError(f'{where}: "{self.text}" must be a text, or a list of paragraphs')
        return value or ""
