"""Without the clone: the source archive, and the wheel made of it, in an environment and a folder of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest
from processes import QUICK_TO_COMPILE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
SPLITS = ("train", "dev", "test")


def call(*command: str | Path, folder: Path, **environment: str) -> str:
    """What a program prints, run in a folder where nothing but installed packages can be imported."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP"))}
    environment = QUICK_TO_COMPILE | environment
    done = subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    folder = tmp_path_factory.mktemp("archive")
    call(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, folder=ROOT)
    with tarfile.open(folder / f"ragjax-{VERSION}.tar.gz") as file:
        file.extractall(folder, filter="data")
    return folder / f"ragjax-{VERSION}"


@pytest.fixture(scope="module")
def programs(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel; all other packages are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, archive, folder=folder)
    call(sys.executable, "-m", "venv", "--without-pip", folder / "env", folder=folder)
    places = sysconfig.get_paths("venv", {name: str(folder / "env") for name in ("base", "platbase", "installed_base")})
    wheel = folder / f"ragjax-{VERSION}-py3-none-any.whl"
    scripts = Path(places["scripts"])
    call(*pip, "--python", scripts / "python", "install", "-q", "--no-deps", "--no-index", wheel, folder=folder)
    Path(places["purelib"], "others.pth").write_text(sysconfig.get_path("purelib"))
    return scripts


def test_the_archive_holds_all_that_git_does(archive: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    names = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(names, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    there = {str(path.relative_to(archive)) for path in archive.rglob("*") if path.is_file()}
    assert there == {name for name in listed if (ROOT / name).is_file()} | {"PKG-INFO"}


def test_tests_run_from_the_archive(archive: Path) -> None:
    some = ["tests/test_layout.py", "tests/test_launch.py", "tests/test_files.py"]
    told = call(sys.executable, "-m", "pytest", "-q", "-x", *some, folder=archive, PYTHONPATH=str(archive))
    assert " passed" in told.splitlines()[-1]


def test_what_is_installed(programs: Path, tmp_path: Path) -> None:
    program = "import ragjax; print(ragjax.__version__, ragjax.__file__)"
    version, file = call(programs / "python", "-c", program, folder=tmp_path).split()
    assert version == VERSION and Path(file).is_relative_to(programs.parent)
    assert (Path(file).parent / "py.typed").is_file()
    assert call(programs / "ragjax", "--version", folder=tmp_path) == f"ragjax {VERSION}\n"
    listed = call(programs / "ragjax", "config", "--list", folder=tmp_path).splitlines()
    assert {line.split()[0] for line in listed} == {path.stem for path in (ROOT / "configs").glob("*.yaml")}


# what each command prints, a line of JSON: importing JAX for each takes longer than what they do
ONE_AFTER_THE_OTHER = """
import io, json, sys
from contextlib import redirect_stdout
from ragjax.cli import main
for arguments in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as printed:
        assert main(arguments) == 0, arguments
    print(json.dumps(printed.getvalue()))
"""


def test_the_four_commands(programs: Path, world: Path, tmp_path: Path) -> None:
    """The tiny configuration, over the tests' passages: the factbook would have to be fetched."""
    for name in ("passages", *SPLITS):
        shutil.copy(world / f"{name}.jsonl", tmp_path)
    settings = ["corpus.source=passages.jsonl", "corpus.format=jsonl", "train.steps=2", "train.batch_size=2"]
    settings += ["evaluate.max_questions=2", *(f"questions.{split}={split}.jsonl" for split in SPLITS)]
    commands = [
        ["index", "tiny", *settings],
        ["train", "tiny", *settings],
        ["evaluate", "runs/tiny", "--json"],
        ["answer", "runs/tiny", "--json", "What is the capital of Arland?"],
        ["report", "runs/tiny"],
    ]
    given = json.dumps(commands)
    cache = str(tmp_path / "cache")
    told = call(programs / "python", "-c", ONE_AFTER_THE_OTHER, given, folder=tmp_path, RAGJAX_CACHE=cache)
    index, train, evaluate, answer, report = map(json.loads, told.splitlines())
    assert (index, train) == ("index: runs/tiny/index\n", "run: runs/tiny\n")
    assert json.loads(evaluate)["models"].keys() == {"untrained", "trained"}
    [answer] = map(json.loads, answer.splitlines())
    assert len(answer["documents"]) == 3
    assert report == "report: runs/tiny/report.html\n"  # its templates came along
