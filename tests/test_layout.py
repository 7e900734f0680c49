"""A file imports only from files above it, and nothing that is banned."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ragjax"
ORDER = (
    "render_chat errors files terminal_text journal signals checksums config_reading config progress marginal mesh "
    "cost chat_template text models.fields models.layers models.generator models.bert models.llama models.bart "
    "models.t5 weights random_checkpoint hub sentence_transformers passages questions factbook_facts factbook "
    "search embeddings faiss_index index data rag fused loss beam prefixes decode metrics contrastive checkpoint "
    "experiment step refresh world supply train answer evaluate build_index index_report plan hf_rag verify cli"
).split()
ENTRIES = {"__init__", "__main__", "models.__init__"}  # they may import what they offer
BANNED = {"torch", "pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
INSIDE_FUNCTIONS = {"faiss", "gguf", "huggingface_hub", "matplotlib", "tensorboardX", "transformers"}  # slow to import
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names; `from a import b` gives both a and a.b, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: from ragjax.config import InputError"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_start(tree: ast.Module) -> Iterator[ast.stmt]:
    """What runs on import; `if TYPE_CHECKING:` does not."""
    for statement in tree.body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement


def test_every_file_has_its_place() -> None:
    assert FILES.keys() - set(ORDER) - ENTRIES == set(), "enter the new file in ORDER"


@pytest.mark.parametrize("name", sorted(FILES.keys() - ENTRIES))
def test_imports_point_upwards(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)])
    ours = {found.removeprefix("ragjax.") for found in imports(ast.parse(FILES[name].read_text()))}
    assert (ours & set(ORDER)) - above == set()


@pytest.mark.parametrize("name", FILES)
def test_banned_imports(name: str) -> None:
    tree = ast.parse(FILES[name].read_text())
    packages = {found.split(".")[0] for found in imports(tree)}
    assert packages & BANNED == set()
    assert "orbax" not in packages or name == "checkpoint"
    early = {found.split(".")[0] for statement in at_start(tree) for found in imports(statement)}
    assert early & INSIDE_FUNCTIONS == set()
