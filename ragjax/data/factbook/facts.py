"""What is asked about a country of the CIA World Factbook: the field, the accepted answers of its value, the wordings.

An answer function gives the accepted answers of a value, the canonical one first, or none where it is not plain.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

TAKES_THE = re.compile(
    r"^(United |Republic |Democratic Republic |Central African |British |Netherlands$|Philippines$|Maldives$|Comoros$|"
    r"Seychelles$|Gaza Strip|West Bank|Isle of|Czech Republic|French Southern|Dominican Republic)|"
    r"(?<!McDonald )(?<!Sandwich )Islands$|Lands$"
)


@dataclass(frozen=True)
class Fact:
    """A field that is asked about; `answers` gives the accepted answers of its value, the canonical one first."""

    name: str
    path: tuple[str, str, str]  # category, field, sub-field or ""
    answers: Callable[[str], list[str]]
    wordings: tuple[str, ...]


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


def in_sentence(country: str) -> str:
    """The country as it stands in a question: with "the" where English wants it."""
    name = country.removeprefix("The ")
    return f"the {name}" if name != country or TAKES_THE.search(country) else name
