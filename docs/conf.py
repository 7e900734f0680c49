"""The site: `make docs` builds docs/*.md and the docstrings into docs/_build/html, without a network."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import ragjax
from ragjax import config

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from benchmarks.exactness import draw  # noqa: E402  # the repository's root must be found first

project = "ragjax"
copyright = "the authors of ragjax, Apache-2.0"
version = release = importlib.metadata.version("ragjax")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "ragjax"
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # [text](page.md#heading) finds headings, as on GitHub
highlight_language = "none"  # a block says its language; else it is what a terminal shows
default_role = "literal"  # `code` in docstrings
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

REFERENCE = HERE / "configuration_reference.md"  # generated, and not in git
ABOUT_KEYS = """\
# Configuration reference

Every key of a configuration file, with its default. `ragjax config CONFIG` shows the values of a file. On the
command line a key is written `section.key=value`.

"""
REFERENCE.write_text(ABOUT_KEYS + config.reference(), encoding="utf-8")

# the picture of what `python -m benchmarks.exactness` has recorded: drawn here, and not in git
draw(json.loads((HERE / "exactness.json").read_text(encoding="utf-8")), HERE / "exactness.svg")


def add_fields(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """A dataclass says what each field is in a comment beside it: these comments belong to its documentation."""
    if what != "class" or not dataclasses.is_dataclass(of):
        return
    source = inspect.getsource(of)
    for field in dataclasses.fields(of):
        comment = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.MULTILINE)
        lines += ["", f"- ``{field.name}``: {field.type}" + (f": {comment[1]}" if comment else "")]


def shorten(app: Any, what: str, name: str, of: Any, options: Any, signature: str, returns: str) -> tuple[Any, Any]:
    """Arrays under the name that everybody knows, whatever module JAX defines them in."""
    return tuple(text and re.sub(r"\bjaxlib\.\w+\.Array\b", "Array", text) for text in (signature, returns))


def setup(app: Any) -> None:
    assert ragjax.load  # JAX and the package are imported before autodoc looks for members
    app.connect("autodoc-process-docstring", add_fields)
    app.connect("autodoc-process-signature", shorten)
