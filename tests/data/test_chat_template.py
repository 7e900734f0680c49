"""Chat templates are rendered in a child process, which may neither run for ever nor fill the memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ragjax.data import chat_template
from ragjax.data.chat_template import RENDERER, render_chat_template
from ragjax.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    return tmp_path / "chat"


def test_a_template_is_rendered_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m['content'] | tojson }} {{ strftime_now('%Y') }}{% endfor %}"
    variables = {"messages": [{"content": 'é "x"'}]}
    assert render_chat_template(template, variables) == '"é \\"x\\"" 2024'
    [kept] = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "_render", None)  # not asked again
        assert render_chat_template(template, variables) == '"é \\"x\\"" 2024'
    kept.write_bytes(b"{")  # damaged: made anew
    assert render_chat_template(template, variables) == '"é \\"x\\"" 2024'
    render_chat_template(template, {"messages": []})
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s or 512 MiB"),
        ("{{ 'a' * 10**10 }}", "too much memory"),
        ("{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}", "more than 1048576 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('roles must\nalternate') }}", "^roles must alternate$"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for", "unexpected 'end of template'"),
        ("{{ 'x' | nothing }}", "No filter named 'nothing'"),
        ("{{ '\ud800' }}", "surrogates"),
    ],
)
def test_what_does_no_good_is_told_in_a_line(cache: Path, template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render_chat_template(template, {})
    assert not cache.exists()


def test_without_limits_of_the_system_the_clock_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, which has no `resource`."""
    program = (
        f"import runpy, sys; sys.modules['resource'] = None; runpy.run_path({str(RENDERER)!r}, run_name='__main__')"
    )
    (tmp_path / "render.py").write_text(program)
    monkeypatch.setattr(chat_template, "RENDERER", tmp_path / "render.py")
    assert render_chat_template("{{ a + 1 }}", {"a": 1}) == "2"
    monkeypatch.setattr(chat_template, "PATIENCE", 1)
    with pytest.raises(InputError, match="did not end within 1 s"):
        render_chat_template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {})


def test_the_child_imports_jinja_and_nothing_of_ours(tmp_path: Path) -> None:
    code = f"import json, runpy, sys; runpy.run_path({str(RENDERER)!r}); print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert "datetime" in loaded and loaded & {"ragjax", "jax", "numpy", "jinja2", "tokenizers"} == set()


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path / "file"))
    assert render_chat_template("{{ 1 + 1 }}", {}) == "2"
