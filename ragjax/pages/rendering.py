"""Templates made into HTML: nothing that a value holds is obeyed, nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ragjax.errors import InputError
from ragjax.files import atomic_write
from ragjax.pages.wording import percent, probability, rounded, shortened
from ragjax.terminal import visible

TEMPLATES = Path(__file__).parent / "templates"


def _harmless(value: Any) -> Any:
    """Control characters and turns of the writing direction as symbols; the environment escapes what comes out."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_harmless,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "probability": probability,
        "percent": percent,
        "rounded": rounded,
        "shortened": shortened,
    }
    return environment


def render(template: str, **values: Any) -> str:
    """A template of `templates/` as HTML."""
    return _environment().get_template(template).render(values)


@cache
def asset(name: str) -> str:
    """A style sheet or a script of `templates/`, whole."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def page(title: str, content: str, scripts: tuple[str, ...] = ()) -> str:
    """A whole page that works from a file and without a network: styles and scripts are in it, and no others may run.

    Args:
        title: of the browser's window.
        content: HTML made by `render`.
        scripts: their names in `templates/`.
    """
    style, code = asset("style.css"), [asset(name) for name in scripts]
    allowed = " ".join(_hash(text) for text in code) or "'none'"
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {allowed}; base-uri 'none'; form-action 'none'"
    # what is trusted here are our own files, and what `render` escaped
    return render(
        "page.html",
        title=title,
        content=Markup(content),
        style=Markup(style),
        scripts=[Markup(text) for text in code],
        policy=policy,
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def write_html(path: Path, html: str) -> Path:
    """Writes a page, whole or not at all, and returns its path. Raises `InputError` where that fails."""
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.absolute().parent}")
    with atomic_write(path) as (file,):
        file.write(html.encode())
    return path
