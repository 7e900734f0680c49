"""The house: which folder may import from which, how full they may be, and what is banned."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ragjax"
# a file imports from its own folder and from those before it
ORDER = (
    "errors files signals terminal checksums resources padding metrics marginal config parallel models checkpoints "
    "decoding data rag retrieval training runs pages answering answerer planning evaluation serving commands "
    "arguments cli"
).split()
ENTRIES = {"__init__", "__main__"}  # they may import what they offer
BANNED = {"torch", "pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
INSIDE_FUNCTIONS = set(  # slow to import
    "bm25s datasets faiss gguf huggingface_hub matplotlib pyarrow tensorboardX trackio transformers wandb".split()
)
MOST_FILES_AT_THE_TOP, MOST_FILES_IN_A_FOLDER = 13, 10
MOST_LINES, MOST_OF_A_FUNCTION = 400, 60
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: path for name, path in FILES.items() if path.stem not in ENTRIES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names; `from a import b` gives both a and a.b, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: from ragjax.errors import InputError"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(name: str) -> set[str]:
    """The modules of ragjax that a module imports."""
    return {found.removeprefix("ragjax.") for found in imports(ast.parse(FILES[name].read_text()))} & MODULES.keys()


def at_start(tree: ast.Module) -> Iterator[ast.stmt]:
    """What runs on import; `if TYPE_CHECKING:` does not."""
    for statement in tree.body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_backwards(name: str) -> None:
    floor = ORDER.index(name.split(".")[0])
    assert [other for other in ours(name) if ORDER.index(other.split(".")[0]) > floor] == []


def test_there_is_no_circle() -> None:
    TopologicalSorter({name: ours(name) for name in MODULES}).prepare()


def test_no_folder_is_crowded() -> None:
    files = Counter(name.rpartition(".")[0] for name in MODULES)
    assert files.pop("") <= MOST_FILES_AT_THE_TOP
    assert max(files.values()) <= MOST_FILES_IN_A_FOLDER


@pytest.mark.parametrize("name", FILES)
def test_banned_imports(name: str) -> None:
    tree = ast.parse(FILES[name].read_text())
    packages = {found.split(".")[0] for found in imports(tree)}
    assert packages & BANNED == set()
    assert "orbax" not in packages or name == "runs.checkpointer"
    early = {found.split(".")[0] for statement in at_start(tree) for found in imports(statement)}
    assert early & INSIDE_FUNCTIONS == set()


JAX = set("jax jaxlib numpy".split())
MODELS = set("faiss flax gguf grain huggingface_hub optax orbax safetensors tokenizers transformers".split())
SETTINGS = set("omegaconf pydantic rich".split())


@pytest.mark.parametrize(
    ("program", "not_needed"),
    [
        ("import ragjax.__main__", {"enum", "re", "signal", "typing"}),  # until then Ctrl-C shows a traceback
        ("import ragjax.marginal", MODELS | SETTINGS),
        ("import ragjax; ragjax.__version__", JAX | MODELS | SETTINGS),
        ("from ragjax.cli import main; main(['config', 'tiny'])", JAX | MODELS),
        ("from ragjax.cli import main; main(['train', '--help'])", JAX | MODELS),
    ],
)
def test_what_starts_quickly_imports_little(program: str, not_needed: set[str]) -> None:
    tell = f"import sys\ntry: {program}\nfinally: print(*{not_needed} & sys.modules.keys(), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True)
    assert done.stderr == "\n"


@pytest.mark.parametrize("name", FILES)
def test_no_file_or_function_is_long(name: str) -> None:
    text = FILES[name].read_text()
    assert len(text.splitlines()) <= MOST_LINES
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    long = {node.name for node in functions if node.end_lineno and node.end_lineno - node.lineno >= MOST_OF_A_FUNCTION}
    assert long <= {"parser"}, "cut it where a name can say what a part does"


def public(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """The functions, classes and methods that others may use."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not part.name.startswith("_"):
            yield part
            if isinstance(part, ast.ClassDef):
                yield from public(part)


@pytest.mark.parametrize("name", FILES)
def test_what_is_public_is_documented(name: str) -> None:
    tree = ast.parse(FILES[name].read_text())
    assert ast.get_docstring(tree)
    assert [f"{part.lineno}: {part.name}" for part in public(tree) if not ast.get_docstring(part)] == []


NO_NOUNS = re.compile(r"of_.*|told|asked|wanted|known")


@pytest.mark.parametrize("name", FILES)
def test_names_are_nouns(name: str) -> None:
    names = set[str]()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.arg():
                names.add(node.arg)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
    assert [word for word in names if NO_NOUNS.fullmatch(word)] == []
