"""A run of the tiny world that has learnt its questions by heart, and the command line called in this process."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from world import shared_world

from ragjax.cli import main
from ragjax.data.questions import read_questions
from ragjax.files import write_jsonl
from ragjax.retrieval.index import MANIFEST

STEPS = 24


@contextmanager
def quick_world(temporary: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny world with its index; compiled programs are cached among the tests' own files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAGJAX_CACHE", str(temporary.getbasetemp() / "cache"))
        world = shared_world(temporary)
        if not (world / "index" / MANIFEST).exists():
            assert main(["index", str(world / "config.yaml")]) == 0
        yield world


def trained_run(world: Path) -> Path:
    """The output folder of a run on eight questions whose answers are one letter; made when first asked for."""
    run = world / "run"
    if not (run / "checkpoints" / str(STEPS)).exists():
        shutil.rmtree(run, ignore_errors=True)
        some = read_questions(world / "train.jsonl")[:8]
        records = [
            {"question": q.question, "answer": [q.answers[0][0]], "passages": [f"p{i}"]} for i, q in enumerate(some)
        ]
        write_jsonl(world / "letters.jsonl", records)
        settings = [f"train.steps={STEPS}", "train.num_docs=2", "train.generator_lr=1e-2", "train.retriever_lr=3e-3"]
        questions = [f"questions.{split}={world}/letters.jsonl" for split in ("train", "dev")]
        assert main(["train", str(world / "config.yaml"), *settings, *questions]) == 0
    return run


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As a full disk does, this makes writing fail, for root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(*folders: Path) -> dict[Path, bytes]:
    """Every file below some folders, and what is in it."""
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], untouched: Path, *arguments: str) -> str:
    """Runs a command that must end with one line on standard error and code 2, and change no file; the line.

    Training may say before that it has many epochs.
    """
    before = files(untouched)
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *notes, line = err.splitlines(keepends=True)
    assert line.startswith("ragjax: ") and all(" epochs over " in note for note in notes), err
    assert files(untouched) == before
    return line
