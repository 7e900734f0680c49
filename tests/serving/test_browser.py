"""The page and the report in Chromium: asked by hand, read by axe, and hostile texts that do nothing.

`make test-browser` installs what this needs and runs it; Debian's chromium is used where it is installed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from http_server import Running, running
from world import LANDS

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

import ragjax
from ragjax.answerer import Answerer, open_answerer
from ragjax.cli import main
from ragjax.commands.serve import ServeOptions, allowed_hosts
from ragjax.config import load_config
from ragjax.files import write_jsonl
from ragjax.serving.app import Serving
from ragjax.serving.settings import Limits

QUESTION = f"Capital of {LANDS[0]}?"
BAD = "<script>document.title='owned'</script>", '"><img src=x onerror="document.title=\'owned\'">'
OURS = ("http://127.0.0.1:", "file:///", "about:")
SIZES = [(width, scheme) for width in (400, 1400) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        made = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def answerer(run: Path) -> Answerer:
    return ragjax.load(run)


def serving(answerer: Answerer) -> Serving:
    return Serving(answerer, "tiny", Limits(), None, allowed_hosts(ServeOptions()), [QUESTION], False)


@pytest.fixture(scope="module")
def here(answerer: Answerer) -> Iterator[Running]:
    with running(serving(answerer)) as server:
        yield server


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on which nothing may go wrong, and that may ask nobody else."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    made, problems = context.new_page(), list[str]()
    made.on("console", lambda message: problems.append(message.text))
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("dialog", lambda dialog: problems.append(dialog.message))
    made.on("request", lambda request: problems.extend([] if request.url.startswith(OURS) else [request.url]))
    yield made
    context.close()
    assert problems == []


def values(page: Any) -> list[float]:
    return [float(of.get_attribute("value")) for of in page.query_selector_all("#result data")]


def test_a_question_by_hand(here: Running, answerer: Answerer, page: Any) -> None:
    """Its four stages with the numbers of Python, another mode, and the link."""
    page.goto(f"http://127.0.0.1:{here.port}/")
    page.keyboard.press("Tab")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_selector("#result[aria-busy=false] .answer")
    assert page.locator(".stage").count() == 4
    [alone] = answerer.answer(QUESTION)
    assert values(page)[-1] == pytest.approx(alone.probability, rel=1e-4)
    assert page.inner_text(".answer strong") == alone.text
    assert [of.inner_text() for of in page.query_selector_all(".documents code")] == [d.id for d in alone.documents]
    shown = [of.inner_text() for of in page.query_selector_all(".heat tr.chosen .cell")]
    best = alone.candidates[0].doc_probability or []
    assert [float(text) for text in shown] == pytest.approx(best, abs=6e-4)
    page.select_option("select[name=mode]", "fast")
    page.wait_for_selector("#result[aria-busy=false] .stage:last-child small:has-text('fast')")
    [fast] = answerer.answer(QUESTION, "fast")
    assert values(page)[-1] == pytest.approx(fast.probability, rel=1e-4)
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    assert values(page)[-1] == pytest.approx(fast.probability, rel=1e-4)
    assert page.locator("select[name=mode]").input_value() == "fast"
    page.click("#examples summary")
    page.click(".example")
    page.wait_for_selector(".answer")
    assert page.inner_text(".asked") == QUESTION


def test_hostile_passages_do_nothing(world: Path, tmp_path: Path, page: Any) -> None:
    evil = [f"{land} {BAD[0]} {BAD[1]}" for land in LANDS]
    records = ({"id": f"{BAD[1]}{i}", "title": BAD[i % 2], "text": text} for i, text in enumerate(evil))
    write_jsonl(tmp_path / "passages.jsonl", records)
    changed = [f"corpus.source={tmp_path}/passages.jsonl", f"index.path={tmp_path}/index", f"output={tmp_path}/run"]
    assert main(["index", str(world / "config.yaml"), *changed]) == 0
    with running(serving(open_answerer(load_config(world / "config.yaml", changed), untrained=True))) as here:
        page.goto(f"http://127.0.0.1:{here.port}/")
        page.fill("input[name=question]", BAD[1])
        page.keyboard.press("Enter")
        page.wait_for_selector("#result[aria-busy=false] .answer")
        assert BAD[0] in page.inner_text(".documents") and BAD[1] in page.inner_text(".asked")
        assert page.title() == f"{BAD[1]} – ragjax" and page.locator("#result img, #result script").count() == 0
        page.reload()
        assert page.title() != "owned" and page.locator("#result img, #result script").count() == 0


@pytest.fixture(scope="module")
def report(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two runs, which differ in how they were evaluated."""
    runs = []
    for name, docs in (("one", 3), ("two", 2)):
        runs.append(output := tmp_path_factory.mktemp("runs") / name)
        output.mkdir()
        (output / "checkpoints").symlink_to(run / "checkpoints")
        shutil.copy(run / "train.jsonl", output)
        settings = [f"output={output}", f"decode.num_docs={docs}", f"questions.test={run.parent / 'letters.jsonl'}"]
        assert main(["evaluate", str(run / "config.yaml"), *settings]) == 0
        (output / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(run), str(output)))
    assert main(["report", *map(str, runs)]) == 0
    return runs[0] / "report.html"


def test_the_report_without_a_network(report: Path, page: Any) -> None:
    page.context.set_offline(True)
    page.goto(report.as_uri())
    rows = page.locator("#list > details")
    assert rows.count() == 8 and page.inner_text("#filters output") == "8 shown"
    page.check("input[value=low]")
    low = page.locator("#list > details[data-flags~=low]").count()
    assert page.inner_text("#filters output") == f"{low} shown"
    page.uncheck("input[value=low]")
    page.fill("input[type=search]", LANDS[3])
    assert page.inner_text("#filters output") == "1 shown"
    page.locator("#list > details:visible summary").click()
    assert page.locator("#list > details:visible .stage:visible").count() == 8


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_nothing_stands_in_the_way(browser: Any, here: Running, report: Path, width: int, scheme: str) -> None:
    """Of those who use a screen reader or a keyboard; and no page is wider than its window."""
    link = f"http://127.0.0.1:{here.port}/?question={QUESTION.replace(' ', '+')}"
    for address in (f"http://127.0.0.1:{here.port}/", link, f"{link}&num_docs=20", report.as_uri()):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
        page = context.new_page()
        page.goto(address)
        for summary in page.query_selector_all("#list > details summary")[:2]:
            summary.click()
        response = axe.Axe().run(page).response
        assert len(response["passes"]) > 10, "axe has looked"
        assert [(of["id"], of["nodes"][0]["html"][:200]) for of in response["violations"]] == [], address
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        context.close()


def test_a_server_with_a_token(answerer: Answerer, page: Any) -> None:
    with running(replace(serving(answerer), token="correct-horse-battery")) as here:
        page.goto(f"http://127.0.0.1:{here.port}/")
        page.fill("input[name=question]", QUESTION)
        page.fill("#token", "correct-horse-battery")
        page.keyboard.press("Enter")
        page.wait_for_selector("#result[aria-busy=false] .answer")
        assert "correct-horse" not in page.url
