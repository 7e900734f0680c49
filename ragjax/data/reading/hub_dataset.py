"""Datasets of Hugging Face's hub, as the `datasets` library brings them here: Arrow files in our own cache.

A source is written hf-dataset:ORG/NAME/CONFIG@REVISION:SPLIT. Each commit has a cache of its own, so that no other
revision is ever taken for it; what was fetched once needs no network.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ragjax.checkpoints.hub import hub_errors
from ragjax.errors import InputError, library_errors
from ragjax.files import cache_folder, read_json

DATASET = "hf-dataset:"
NAME = r"[A-Za-z0-9][\w.-]*"
SOURCE = re.compile(rf"{DATASET}({NAME}(?:/{NAME})?)(?:/({NAME}))?(?:@([\w./-]+))?:(\w[\w.-]*)")


@cache
def fetch_dataset(source: str) -> tuple[str, tuple[Path, ...]]:
    """The commit of a dataset, and the Arrow files of a split, from the cache when they are there.

    Raises `InputError` for a malformed source, for one that does not exist or cannot be reached, and where the
    `datasets` library is not installed.
    """
    match = SOURCE.fullmatch(source)
    if not match:
        raise InputError(
            f"{source}: expected hf-dataset:ORG/NAME/CONFIG@REVISION:SPLIT, where CONFIG and REVISION may be left out, "
            "such as hf-dataset:BeIR/scifact/corpus:corpus"
        )
    repo, config, revision, split = match[1], match[2], match[3] or "main", match[4]
    commit = _commit(source, repo, revision)
    record = cache_folder() / "datasets" / commit / f"{quote(f'{repo}/{config}:{split}', safe='')}.json"
    if not record.is_file():
        files = _load(source, repo, config, commit, split)
        _write(record, {"files": files})
    listed = read_json(record, "fetch the dataset again").get("files")
    if not (isinstance(listed, list) and listed and all(isinstance(n, str) and Path(n).is_file() for n in listed)):
        record.unlink()
        raise InputError(f"{source}: its files are gone from {record.parent}; run the same command again to fetch them")
    return commit, tuple(Path(name) for name in listed)


def _commit(source: str, repo: str, revision: str) -> str:
    """The commit that a revision names; without a network that which it named last."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    record = cache_folder() / "datasets" / f"{quote(f'{repo}@{revision}', safe='')}.json"
    from huggingface_hub import HfApi

    try:
        with hub_errors(source, repo, revision):
            commit = HfApi().dataset_info(repo, revision=revision).sha
    except InputError:
        if not record.is_file():
            raise
        commit = read_json(record, "fetch the dataset again").get("commit")
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise InputError(f"{source}: no commit of revision {revision} is known; delete {record}, and fetch it again")
    _write(record, {"commit": commit})
    return commit


def _write(record: Path, value: dict[str, Any]) -> None:
    """Several processes may do so at the same time."""
    with library_errors(f"{record}: cannot be written", "free some space, or set RAGJAX_CACHE to another folder"):
        record.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=record.parent, suffix=".partial", delete=False) as file:
            file.write(json.dumps(value).encode())
        os.replace(file.name, record)


def _load(source: str, repo: str, config: str | None, commit: str, split: str) -> list[str]:
    """Downloads and prepares a split; the names of its Arrow files."""
    try:
        from datasets import disable_progress_bars, load_dataset
    except ImportError:
        raise InputError(f"{source}: needs an extra: pip install 'ragjax[datasets]'") from None
    disable_progress_bars()
    folder = cache_folder() / "datasets" / commit
    with library_errors(f"{source}: cannot be fetched", "check CONFIG and SPLIT, and the network"):
        dataset = load_dataset(
            f"hf://datasets/{repo}", config, revision=commit, split=split, cache_dir=str(folder), keep_in_memory=False
        )
    return [file["filename"] for file in dataset.cache_files]
