"""What commands open: models, index and passages, and what a run has trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ragjax.checkpoints.hub import fingerprint_files
from ragjax.config import Config
from ragjax.data.passage_store import PassageStore
from ragjax.data.questions import Split, read_split
from ragjax.errors import InputError
from ragjax.files import cache_folder
from ragjax.models.layers import Params
from ragjax.parallel.mesh import local_mesh
from ragjax.parallel.sharding import put_global
from ragjax.rag import RagPipeline, load_pipeline
from ragjax.retrieval.index import MANIFEST, Index, check_built, check_listed, open_index
from ragjax.retrieval.refresh import refreshed_at, refreshed_index, version_folder
from ragjax.runs.checkpointer import Checkpointer, fingerprint, newest_step
from ragjax.runs.run_dir import check_same_models, load_run_config, read_manifest
from ragjax.terminal import terminal
from ragjax.training.state import abstract_state, for_inference, state_shardings


def enable_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs, small ones too, under `folder` for later processes; call it before any is compiled.

    A folder that JAX was given already ($JAX_COMPILATION_CACHE_DIR) is used instead.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def open_split(config: Config, split: str) -> Split:
    """The questions of a split, before a model is fetched.

    Raises `InputError` where these or the index are missing or damaged, where none can be used, and, with
    `questions.strict`, for the first that cannot.
    """
    check_built(Path(config.index.folder))
    path = Path(getattr(config.questions, split))
    check_listed(path)
    return read_split(path).checked(config.questions.strict)


def load_artifacts(config: Config) -> tuple[RagPipeline, Index, PassageStore]:
    """Opens models, index and passages, and checks that they belong together. Raises `InputError`."""
    folder = Path(config.index.folder)
    check_built(folder)  # before models are fetched
    enable_compilation_cache(cache_folder() / "xla")
    rag = load_pipeline(config)
    recall = config.index.recall if config.index.kind == "approximate" else None
    vocabulary = rag.generator.config.vocab_size
    return rag, open_index(folder, rag.fingerprints, recall), PassageStore.open(folder, vocabulary)


def pretrained_params(rag: RagPipeline, mesh: Mesh) -> Params:
    """The pretrained parameters for answering, laid out on the mesh."""
    rag = for_inference(rag)
    return put_global(rag.initial_params(), state_shardings(rag, mesh, rag.abstract_params()))


def trained_index(rag: RagPipeline, index: Index, step: int) -> Index:
    """The index for the checkpoint of `step`: begun after it, or else the one it searched; else the one given."""
    folder = Path(rag.config.output)
    if (version_folder(folder, step) / MANIFEST).is_file():
        index.release()
        return refreshed_index(rag, index, folder, step)
    with Checkpointer(folder / "checkpoints", keep=rag.config.train.keep, writing=False) as checkpoints:
        then = refreshed_at(checkpoints.metadata(step).get("refresh", {}))
    if then.building == step == rag.config.train.steps:
        terminal.print(
            "its index is not complete, and an older one is searched; run: ragjax train CONFIG", soft_wrap=True
        )
    if (searched := then.searched) is None:
        return index
    index.release()
    return refreshed_index(rag, index, folder, searched)


def restore_params(rag: RagPipeline, mesh: Mesh | None = None, step: int | None = None) -> tuple[Params, int] | None:
    """The parameters of a checkpoint in `output`, on the mesh or one device, and its step: the newest, with
    `train.keep_best` that of lowest dev loss, or `step`.

    None if there is none.

    Raises `InputError` for a checkpoint that is damaged, or was trained with other models than the configuration's.
    """
    if not (Path(rag.config.output) / "checkpoints").is_dir():
        return None
    check_same_models(rag.config)
    mesh = mesh or local_mesh(data=1)
    answering = for_inference(rag)
    like = {name: of for name, of in abstract_state(answering, mesh).params.items() if name in rag.parts}
    found = _restored(rag.config, like, step)
    if found is None:
        return None
    params = found[1]
    if "generator" not in params:  # of contrastive training: it answers as it came
        untrained = {"generator": rag.generator.load_params()}
        params |= put_global(untrained, state_shardings(answering, mesh, {"generator": rag.generator.abstract_params}))
    return params, found[0]


def _restored(config: Config, like: Params, step: int | None = None) -> tuple[int, Params] | None:
    """The newest parameters in `output`, with `train.keep_best` the best, or those of `step`, laid out as in `like`."""
    folder = Path(config.output) / "checkpoints"
    with Checkpointer(folder, keep=config.train.keep, writing=False) as checkpoints:

        def load(step: int) -> Any:
            return checkpoints.restore_params(step, like)

        find = checkpoints.restore_best if config.train.keep_best else checkpoints.restore_latest
        return find(load) if step is None else (step, load(step))


def check_start(rag: RagPipeline) -> None:
    """Raises `InputError` unless the run `train.start_from`, if there is one, has models that this one can go on with.

    They come from the same pretrained ones, and passages were encoded in the same way.
    """
    if (run := rag.config.train.start_from) is None:
        return
    start, wanted = f"train.start_from: {run}", rag.config.train.passage_encoder
    other = load_run_config(Path(run))
    if (has := other.train.passage_encoder) != wanted:
        raise InputError(
            f"{start} has train.passage_encoder={has}, and this run {wanted}; use the same, or export that run and "
            "give its encoders as sources"
        )
    theirs, ours = read_manifest(Path(run))["fingerprints"], {"encoder": rag.fingerprints["encoder"]}
    ours |= {name: fingerprint_files(getattr(rag, name).files) for name in ("retriever", "generator")}
    if differ := [name for name, value in ours.items() if theirs.get(name) != value]:
        named = ", ".join("encoder of passages" if name == "encoder" else name for name in differ)
        raise InputError(f"{start} was trained from another {named}; give the same sources, or export that run")
    if newest_step(Path(run) / "checkpoints") == 0:
        raise InputError(f"{start} has no checkpoint yet")


def start_params(rag: RagPipeline, like: Params) -> tuple[Params, dict[str, Any]]:
    """The parameters of `train.start_from`, each laid out as `like` says, and what the manifest is to say of them.

    What that run has not trained is as it came. See `check_start`.
    """
    assert rag.config.train.start_from is not None
    run = Path(rag.config.train.start_from)
    other = load_run_config(run)
    parts = replace(rag, config=other).parts.keys() & like.keys()
    found = _restored(other, {name: like[name] for name in parts})
    if found is None:
        raise InputError(f"train.start_from: {run} has no checkpoint yet")
    step, params = found
    untrained = {name: rag.parts[name].load_params() for name in like.keys() - parts}
    params |= put_global(untrained, {name: jax.tree.map(lambda leaf: leaf.sharding, like[name]) for name in untrained})
    return params, {"run": str(run), "step": step, "fingerprint": fingerprint(run / "checkpoints", step)}
