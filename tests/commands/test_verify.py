"""`ragjax verify` reads all and names what is damaged; what it says is damaged the other commands do not use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from trained import STEPS, files, no_file_larger_than, refused

from ragjax.checksums import CHECKSUMS, files_below
from ragjax.cli import main
from ragjax.commands.verify import verify
from ragjax.retrieval.index import MANIFEST

Capture = pytest.CaptureFixture[str]


def flip(path: Path) -> None:
    content = path.read_bytes()
    at = len(content) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


@pytest.fixture
def own(run: Path, world: Path, tmp_path: Path) -> Path:
    """A run with its index inside."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.copytree(world / "index", folder / "index")
    text = (folder / "config.yaml").read_text(encoding="utf-8").replace(str(world / "index"), str(folder / "index"))
    (folder / "config.yaml").write_text(text.replace(f"output: {run}\n", f"output: {folder}\n"), encoding="utf-8")
    return folder


def test_all_of_a_run_is_read(own: Path, capsys: Capture) -> None:
    assert main(["verify", str(own), "--json"]) == 0
    captured = capsys.readouterr()
    parts = json.loads(captured.out)
    assert [part["what"] for part in parts] == ["checkpoint", "index"]
    assert all(part["files"] > 3 and not part["damage"] and not part["unknown"] for part in parts)
    stored = files(own / "checkpoints", own / "index")
    for seal in (own / "checkpoints" / str(STEPS) / CHECKSUMS, own / "index" / MANIFEST):
        del stored[seal]
    assert sum(part["bytes"] for part in parts) == sum(map(len, stored.values()))
    assert "MiB" in captured.err
    assert main(["verify", str(own)]) == 0
    assert capsys.readouterr().out.count("whole (") == 2


def test_what_is_damaged_is_named_with_its_cure(own: Path, capsys: Capture) -> None:
    checkpoint, index = own / "checkpoints" / str(STEPS), own / "index"
    flip(checkpoint / "state" / "_sharding")
    (index / "shards" / "00000" / "tokens.bin").unlink()
    (index / "notes.txt").write_text("mine")
    assert main(["verify", str(own)]) == 2
    out, err = capsys.readouterr()
    assert "state/_sharding: its contents have changed" in out and "goes on from the one before" in out
    assert "shards/00000/tokens.bin: is missing" in out and "run: ragjax index CONFIG" in out
    assert "not known to it: notes.txt" in out
    assert err.splitlines()[-1].startswith(f"ragjax: {own}: 2 of ")


@pytest.mark.parametrize("file", [MANIFEST, f"shards/00000/{CHECKSUMS}"])
def test_damaged_records_are_damage(world: Path, tmp_path: Path, file: str) -> None:
    index = Path(shutil.copytree(world / "index", tmp_path / "index"))
    flip(index / file)
    [part] = verify(index)
    assert list(part.damage) == [file]
    (index / "shards" / "00000" / "text.bin").write_bytes(b"")
    assert list(verify(index)[0].damage) == ([file, "shards/00000/text.bin"] if file == MANIFEST else [file])


def test_a_checkpoint_without_checksums_is_not_called_damaged(own: Path, capsys: Capture) -> None:
    (own / "checkpoints" / str(STEPS) / CHECKSUMS).unlink()
    assert main(["verify", str(own)]) == 0
    assert f"checkpoints/{STEPS}: has no checksums" in capsys.readouterr().out


def test_exported_models(run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "exported"
    assert main(["export", str(run), str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    assert f"folder {out}: whole ({len(files_below(out))} files" in capsys.readouterr().out
    flip(out / "generator" / "model.safetensors")
    assert main(["verify", str(out)]) == 2
    assert "generator/model.safetensors: its contents have changed" in capsys.readouterr().out


@pytest.mark.parametrize("size", [100, 20_000])
def test_an_export_that_the_disk_does_not_hold_leaves_nothing(
    run: Path, tmp_path: Path, capsys: Capture, size: int
) -> None:
    with no_file_larger_than(size):
        message = refused(capsys, tmp_path, "export", str(run), str(tmp_path / "out"))
    assert "cannot be written" in message and "free some space" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_what_has_no_checksums(tmp_path: Path, capsys: Capture, make) -> None:
    make(tmp_path / "folder")
    assert "expected a run" in refused(capsys, tmp_path, "verify", str(tmp_path / "folder"))


def test_a_damaged_index_is_not_answered_from_until_it_is_mended(own: Path, capsys: Capture) -> None:
    config = str(own / "config.yaml")
    question = ["answer", config, "What is the capital of Arland?", "--json"]
    assert main(question) == 0
    answer = capsys.readouterr().out
    for name in ("embeddings.npy", "text.bin", "tokens.bin"):
        flip(own / "index" / "shards" / "00000" / name)
    message = refused(capsys, own, *question)
    assert "shards/00000: is damaged (embeddings.npy its contents have changed); run: ragjax index CONFIG" in message
    assert main(["index", config]) == 0
    capsys.readouterr()
    assert main(question) == 0
    assert capsys.readouterr().out == answer
