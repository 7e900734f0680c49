"""The documentation holds: its commands run, its links lead somewhere, its keys are keys of the configuration.

A block ```bash tested or ```python tested is run, with the tiny models, in one folder, page after page.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from processes import QUICK_TO_COMPILE

from ragjax.cli import COMMANDS, main
from ragjax.config import dump_config, load_config

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
GENERATED = {DOCS / "configuration_reference.md", DOCS / "exactness.svg"}
FIRST = ["README.md", "tutorial.md"]  # the tutorial makes the run that other pages use
PAGES = sorted({README, *DOCS.glob("*.md")} - GENERATED, key=lambda page: (page.name not in FIRST, page.name))
FOLDERS = "ragjax configs launch docs tests benchmarks".split()
SUFFIXES = "gz json jsonl md npy png py safetensors sh tsv yaml".split()
# what train.frozen_params and train.lora.targets may name
PARAMETERS = ("generator.embed", "generator.layers", "generator.query", "generator.value")
COMMAND = re.compile(r"ragjax|launch/\w+\.sh|python -m benchmarks")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its line, the words after the fence, and the text in it."""

    page: Path
    line: int
    info: str
    text: str


def blocks(page: Path) -> list[Block]:
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        if line.startswith("```") and opened is None:
            opened = number
        elif line == "```" and opened is not None:
            info, text = lines[opened].removeprefix("```"), "\n".join(lines[opened + 1 : number])
            found.append(Block(page, opened + 1, info, text))
            opened = None
    assert opened is None, f"{page}:{opened}: this block has no end"
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """What stands between backticks in the prose of a page."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


# fast


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(page)):
        if "://" not in target and (page.parent / target) not in GENERATED:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    named = re.findall(rf"(?<![\w/.@-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w/?", page.read_text(encoding="utf-8"))
    for path in named:
        if path not in ("docs/configuration_reference.md",) and "_build" not in path:
            assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_heading_that_is_linked_is_there(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", prose(page)):
        other = page.parent / target if target else page
        if "://" in target or other in GENERATED:
            continue
        headings = re.findall(r"^#+ (.*)$", prose(other), re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in slugs, f"{page.name}: {other.name} has no heading {anchor}"


def parsed(text: str) -> dict[str, Any]:
    tree = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Every key and every section of the configuration."""
    return set(leaves(parsed(dump_config(load_config(ROOT / "configs/tiny.yaml")))))


def keys_named(page: Path, sections: set[str]) -> Iterator[str]:
    """The keys that a page names: in its YAML, in its commands, and between backticks."""
    dotted = re.compile(rf"(?<![\w/.\"'-])(?:{'|'.join(sorted(sections))})\.[a-z_]\w*(?:\.\w+)*")
    for block in blocks(page):
        if block.info == "yaml":
            yield from leaves(parsed(block.text))
        elif not block.info.startswith("python"):
            for line in block.text.splitlines():
                if COMMAND.match(line.removeprefix("$ ")):
                    yield from re.findall(r"(?<!\S)\"?([a-z_][\w.]*)=", line.split("#")[0])
                yield from dotted.findall(line)
    for span in spans(page):
        yield from dotted.findall(span)
        yield from re.findall(r"^([a-z_]+): [\w\"]", span)  # `hf_compatible: true`
        if COMMAND.match(span) or not re.search(r"[( ]", span):
            yield from re.findall(r"(?<!\S)([a-z_][a-z_.]*)=\w", span)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_is_one_of_the_configuration(page: Path, keys: set[str]) -> None:
    for key in keys_named(page, {key.partition(".")[0] for key in keys if "." in key}):
        if key.rsplit(".", 1)[-1] in SUFFIXES or key.startswith(PARAMETERS):
            continue
        assert key in keys, f"{page.name} names the key {key}"


PARTS = ("reading", "factbook", "vector_files")  # folders that the map names as a whole


def rows(page: Path) -> str:
    """The rows of the tables of a page."""
    return "\n".join(line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| "))


def test_every_module_is_on_the_map() -> None:
    about = rows(ROOT / "CONTRIBUTING.md")
    for path in (ROOT / "ragjax").rglob("*.py"):
        name = path.parent.name + "/" if path.name == "__init__.py" or path.parent.name in PARTS else path.name
        assert name in ("ragjax/", "__main__.py") or f"`{name}" in about or f"/{name}" in about, path


def test_every_folder_is_told_of() -> None:
    told = set(re.findall(r"^\| `ragjax/(\w+)/`", rows(DOCS / "how_it_works.md"), re.MULTILINE))
    assert told == {path.parent.name for path in (ROOT / "ragjax").glob("*/__init__.py")}


def test_every_command_is_in_the_tutorial() -> None:
    told = re.findall(r"^\| `ragjax ([\w-]+) ", rows(DOCS / "tutorial.md"), re.MULTILINE)
    assert sorted(told) == sorted(COMMANDS)


NOTEBOOK = DOCS / "tutorial.ipynb"


def test_the_notebook_has_no_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


# slow


def quick(folder: Path) -> Path:
    """The tiny configuration with a quarter of its batch: each step takes a quarter of the time."""
    folder.mkdir()
    config = load_config(ROOT / "configs/tiny.yaml", ["train.batch_size=2"])
    (folder / "tiny.yaml").write_text(dump_config(config), encoding="utf-8")
    return folder / "tiny.yaml"


def run(block: Block) -> None:
    """Runs a block: lines of ragjax alone in this process, others by bash, Python as it is."""
    if block.info.startswith("python"):
        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {})
    elif all(line.startswith("ragjax ") for line in block.text.splitlines()) and not re.search(r"[|<>;$]", block.text):
        for line in block.text.splitlines():
            try:
                code = main(shlex.split(line)[1:])
            except SystemExit as stop:  # as argparse ends with --version
                code = int(stop.code or 0)
            assert code == 0, f"{block.page.name}: {line}"
    else:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | QUICK_TO_COMPILE | {"PATH": path, "PYTHONPATH": str(ROOT)}
        command = f'set -euo pipefail; ragjax() {{ "{sys.executable}" -m ragjax "$@"; }}\n{block.text}'
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.page}:{block.line}: {done.stderr}"


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    tested = [block for page in PAGES for block in blocks(page) if block.info.endswith(" tested")]
    assert len(tested) >= 8
    for block in tested:
        run(block)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell after cell, each last expression shown as a notebook shows it."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    tiny = quick(tmp_path / "configs")
    monkeypatch.setattr("ragjax.arguments.ready_made", lambda: {"tiny": tiny})
    monkeypatch.chdir(tmp_path)
    names, shown = dict[str, Any](), list[str]()
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code":
            continue
        tree, where = ast.parse("".join(cell["source"])), f"{NOTEBOOK.name}, cell {number}"
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, where, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
            shown += [value._repr_html_()] if hasattr(value, "_repr_html_") else []
    [answer] = shown
    assert [f'<span class="step">{i}</span>' in answer for i in (1, 2, 3, 4)] == [True] * 4
    axes = names["axes"]
    assert len(axes.lines) == 4 and all(line.get_ydata()[-1] == pytest.approx(1) for line in axes.lines[:3])
    matplotlib.pyplot.close("all")
