"""The folder of a run, which is the key `output`: its settings, and everything needed to repeat it.

RUN/config.yaml      the resolved configuration
RUN/manifest.json    versions, git revision, devices, sources and fingerprints; `history`: what was changed later
RUN/left_out.jsonl   the questions that training leaves out, each with its file, line and reason
RUN/checkpoints/     one folder a step (checkpointer.py)
RUN/train.jsonl      one line of metrics a logged step
RUN/refreshed/       the index, encoded again, where the passage encoder is trained (retrieval/refresh.py)
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ragjax.checkpoints.hub import fingerprint_files
from ragjax.config import Config, dump_config, get_key, load_config
from ragjax.config.reading import escaped
from ragjax.data.questions import LeftOut, Split, as_json
from ragjax.data.reading.sources import find_files
from ragjax.errors import InputError
from ragjax.files import atomic_write, read_json, write_jsonl
from ragjax.parallel.processes import allgather_text, run_on_process_zero
from ragjax.rag import RagPipeline
from ragjax.retrieval.index import MANIFEST, Index
from ragjax.runs.checkpointer import newest_step
from ragjax.terminal import terminal

# what may change between two commands on one run: nothing that the training of a step depends on, but for the number
# of steps and the questions, whose changes are printed and recorded
FREE = (
    "output",
    "questions",
    "train.steps",
    "mesh",
    "index.shard_size",
    "decode",
    "evaluate",
    "train.save_every",
    "train.save_minutes",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.dev_questions",
    "train.log_every",
    "train.tracker",
)
ADAPTERS = tuple(f"train.lora.{key}" for key in ("rank", "alpha", "targets"))
MODELS = ("retriever", "generator", "model", *ADAPTERS)  # what a trained model means nothing without
# but these, in which answering may differ: as `decode.num_docs` and as `dtype`
FOR_ANSWERING = ("retriever.bm25_docs", "generator.quantization")
LEFT_OUT = "left_out.jsonl"
PACKAGES = "ragjax jax jaxlib flax optax orbax-checkpoint grain transformers tokenizers faiss-cpu numpy".split()


def start_run(rag: RagPipeline, index: Index, left_out: Sequence[LeftOut] = ()) -> Path:
    """Creates the folder of a run, or checks that it holds this very run, with the very same inputs.

    `left_out` are the questions that training leaves out. Raises `InputError` naming the keys or inputs that differ, if
    the folder cannot be written, or if another process has other inputs or does not see it.
    """
    folder, inputs = Path(rag.config.output), _inputs(rag, index)
    check_same_run(rag.config)
    _check_agreement({name: repr(value) for name, value in inputs.items()})

    def write() -> None:
        make_folder(folder)
        if (folder / "config.yaml").exists():
            _check_same_inputs(folder / "manifest.json", inputs)
        else:
            _write_json(folder / "manifest.json", _manifest(rag, index, inputs) | {"left_out": len(left_out)})
        if left_out:
            write_jsonl(folder / LEFT_OUT, as_json(left_out))
        else:
            (folder / LEFT_OUT).unlink(missing_ok=True)
        _write(folder / "config.yaml", dump_config(rag.config))

    run_on_process_zero(write)
    if not (folder / "config.yaml").exists():
        raise InputError(
            f"{folder}: process {jax.process_index()} does not see what process 0 has written there; "
            "choose an output that all processes share"
        )
    return folder


def make_folder(folder: Path) -> None:
    """Creates the folder of a run where there is none. Raises `InputError` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error.strerror}); choose another output") from None


def check_processes_agree(config: Config) -> None:
    """Raises `InputError` naming in what a process differs: configuration, software, or the files that it sees."""
    if jax.process_count() == 1:
        return
    settings = {key: repr(value) for key, value in _leaves(config.model_dump(mode="json")).items()}
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    shared = (Path(config.output, "checkpoints"), Path(config.index.path, MANIFEST))
    seen = {str(path): "there" if path.exists() else "missing" for path in shared}
    _check_agreement(settings | versions | seen)


def _check_agreement(settings: dict[str, str]) -> None:
    """Between processes; each says in what it differs from process 0, and process 0 what the first other one says."""
    every = [json.loads(text) for text in allgather_text(json.dumps(settings))]
    here = jax.process_index()
    others = [here] if here else range(1, len(every))
    for other in others:
        theirs = every[other]
        if differ := sorted(key for key in every[0].keys() | theirs.keys() if every[0].get(key) != theirs.get(key)):
            named = "; ".join(
                f"{key} is {every[0].get(key)} in process 0 and {theirs.get(key)} there" for key in differ
            )
            raise InputError(
                f"process {other} differs: {named}; start all with the same command and versions, and on shared storage"
            )
    if any(theirs != every[0] for theirs in every):
        raise InputError("other processes differ from process 0; their messages tell in what")


def check_same_run(config: Config) -> None:
    """Raises `InputError` if the folder holds a run with another configuration."""
    path = Path(config.output) / "config.yaml"
    if not path.exists():
        if Path(config.output, "checkpoints").exists():
            raise InputError(f"{config.output}: has checkpoints but no config.yaml; choose another output folder")
        return
    if differ := [d for key, d in _differences(path, config).items() if not key.startswith(FREE)]:
        raise InputError(
            f"{config.output}: holds another run: {'; '.join(differ)}; "
            "go back to its settings, or choose another folder with output=…"
        )
    if (done := newest_step(Path(config.output) / "checkpoints")) > config.train.steps:
        raise InputError(
            f"{config.output}: trained for {done} steps already, and train.steps is {config.train.steps}; give "
            f"{done} or more, or choose another folder with output=…"
        )


def check_same_models(config: Config) -> None:
    """Raises `InputError` if the run in the folder was trained with other models, prompts or priors.

    How many documents a question has, of the encoder and of BM25, is free.
    """
    path = Path(config.output) / "config.yaml"
    if not path.exists():
        return
    found = _differences(path, config).items()
    if differ := [difference for key, difference in found if key.startswith(MODELS) and key not in FOR_ANSWERING]:
        raise InputError(
            f"{config.output}: its checkpoints were trained with other settings: {'; '.join(differ)}; "
            "go back to them, or choose another folder with output=…"
        )


def _differences(path: Path, config: Config) -> dict[str, str]:
    """For each key whose value is another in a saved configuration: what it was and is."""
    before, now = _leaves(load_config(path).model_dump(mode="json")), _leaves(config.model_dump(mode="json"))
    return {
        key: f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def changes_since(
    config: Config, step: int, saved: Mapping[str, Any], split: Split, fingerprint: str, same_questions: bool
) -> dict[str, Any]:
    """What was different until the checkpoint of `step`, whose metadata are `saved`: number of steps, questions.

    `split` holds the questions to train on, with the `fingerprint` of their file; `same_questions` says whether those
    that can be used are the same. Prints the changes, too; `record_changes` keeps them.
    """
    steps, changes = config.train.steps, dict[str, Any]()
    steps_before = saved.get("config", {}).get("train", {}).get("steps", steps)
    if steps_before != steps:
        changes["train.steps"] = {"before": steps_before, "now": steps}
        terminal.print(
            f"train.steps was {steps_before} and is {steps}: from here on the learning rates are those of {steps} "
            "steps, unlike before: a run that begins with so many ends elsewhere",
            soft_wrap=True,
        )
    first = read_run_manifest(Path(config.output))["fingerprints"].get("questions.train")
    if (before := saved.get("questions", first)) != fingerprint:
        changes["questions.train"] = {"before": before, "now": fingerprint, "left_out": len(split.left_out)}
        then = "the order of those trained on stays" if same_questions else "a new epoch begins with them"
        terminal.print(f"{split.path}: other questions than before step {step}; {then}", soft_wrap=True)
    return changes


def record_changes(folder: Path, step: int, changes: dict[str, Any]) -> None:
    """Keeps in the manifest's `history` what is other from `step` on, {} where nothing is: what was before, and is now.

    What was recorded of later steps is dropped: they are about to be trained again.
    """

    def write() -> None:
        manifest = read_run_manifest(folder)
        before = manifest.get("history", [])
        now = [entry for entry in before if entry["step"] < step] + ([{"step": step} | changes] if changes else [])
        if now != before:
            _write_json(folder / "manifest.json", manifest | {"history": now})

    run_on_process_zero(write)


def record_start(folder: Path, start: dict[str, Any]) -> None:
    """Adds to the manifest from which run's parameters this one began."""
    run_on_process_zero(
        lambda: _write_json(folder / "manifest.json", read_run_manifest(folder) | {"start_from": start})
    )


def read_run_manifest(folder: Path) -> dict[str, Any]:
    """The contents of RUN/manifest.json. Raises `InputError` where it is missing or damaged."""
    path = folder / "manifest.json"
    manifest = read_json(path, "choose another output folder")
    history = manifest.get("history", [])
    whole = isinstance(manifest.get("fingerprints"), dict) and isinstance(history, list)
    if not whole or not all(isinstance(entry, dict) and type(entry.get("step")) is int for entry in history):
        raise InputError(f"{path}: damaged; choose another output folder")
    return manifest


def _check_same_inputs(manifest: Path, inputs: dict[str, str]) -> None:
    """A configuration names its files; whether these are still the same, the fingerprints tell.

    Other questions are a change that `record_changes` tells of.
    """
    saved = read_run_manifest(manifest.parent)["fingerprints"]
    held = inputs.keys() - {"questions.train"}
    if differ := [name for name in inputs if name in held and saved.get(name) != inputs[name]]:
        raise InputError(
            f"{manifest.parent}: this run was started on other inputs: {', '.join(differ)} changed since; "
            "bring the old ones back, or choose another folder with output=…"
        )


def load_run_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the run in `folder`, which may have been moved, with overrides such as `decode.num_docs=5`.

    Raises `InputError` if there is none.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{folder}: no run here (config.yaml is missing); run: ragjax train CONFIG")
    config = load_config(path)
    before, paths = Path(config.output), {"output": str(folder)}
    for key in ("index.path", "questions.train", "questions.dev", "questions.test"):
        if (named := Path(str(get_key(config, key)))).is_relative_to(before):
            paths[key] = str(folder / named.relative_to(before))
    moved = [f"{key}={json.dumps(escaped(value), ensure_ascii=False)}" for key, value in paths.items()]
    return load_config(path, [*moved, *overrides])


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as (file,):
        file.write(text.encode())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _manifest(rag: RagPipeline, index: Index, inputs: dict[str, str]) -> dict[str, object]:
    return {
        "versions": {"python": sys.version.split()[0]} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "git_revision": git_revision(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "sources": [{"source": f.source, "pin": f.revision} for f in rag.sources],
        "fingerprints": inputs,
        "index": {key: value for key, value in index.manifest.items() if key != "files"},
    }


def _inputs(rag: RagPipeline, index: Index) -> dict[str, str]:
    """Fingerprints of everything that training reads."""
    return rag.fingerprints | {
        "retriever": fingerprint_files(rag.retriever.files),
        "generator": fingerprint_files(rag.generator.files),
        "passages": index.manifest["corpus"]["fingerprint"],
        "questions.train": fingerprint_files(find_files(rag.config.questions.train).files),
    }


def git_revision() -> str | None:
    """The commit of this source tree, with `+changes` if files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
