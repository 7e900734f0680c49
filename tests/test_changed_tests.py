"""`make test-changed`: which tests belong to a change."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = "ragjax/models ragjax/answering launch docs configs tests/models".split()
IMPORTS = {"tests/test_answer.py": "from ragjax.answering.answers import Answer\n", "tests/models/test_layers.py": ""}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the same shape."""
    folder = tmp_path_factory.mktemp("clone")
    for part in (*PARTS, ".ci"):
        (folder / part).mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "changed-tests", folder / ".ci")
    for path, text in IMPORTS.items():
        (folder / path).write_text(text)
    me = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*me, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("ragjax/models/layers.py", ["tests/models", "tests/test_layout.py"]),
        ("ragjax/answering/answers.py", ["tests/test_answer.py", "tests/test_layout.py"]),
        ("ragjax/arguments.py", ["tests/test_cli.py", "tests/test_layout.py"]),
        ("ragjax/__init__.py", ["tests/test_layout.py", "tests/test_python_api.py"]),
        ("tests/models/test_rope.py", ["tests/models/test_rope.py"]),
        ("tests/conftest.py", ["tests"]),
        ("pyproject.toml", ["tests"]),
        ("configs/tiny.yaml", ["tests/config/test_config.py"]),
        ("launch/keep.sh", ["tests/test_launch.py"]),
        ("docs/training.md", ["tests/test_docs.py"]),
        ("README.md", ["tests/test_docs.py"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_which_tests_belong_to_a_change(clone: Path, changed: str, tests: list[str]) -> None:
    (clone / changed).write_text("")
    try:
        done = subprocess.run([".ci/changed-tests", "HEAD"], cwd=clone, capture_output=True, text=True)
    finally:
        (clone / changed).unlink()
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, tests, "")


def test_every_module_has_tests() -> None:
    """Without them a change of it would be tested by nothing."""
    for path in (ROOT / "ragjax").glob("*.py"):
        named = f"ragjax.{path.stem}"
        if path.stem not in ("__init__", "arguments"):
            assert any(named in test.read_text(encoding="utf-8") for test in (ROOT / "tests").rglob("test_*.py")), path
