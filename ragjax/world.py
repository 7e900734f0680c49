"""What commands open: models, index and passages, and what a run has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ragjax.checkpoint import Checkpoints
from ragjax.config import Config
from ragjax.experiment import check_same_models
from ragjax.hub import cache_folder
from ragjax.index import MANIFEST, Index, check_built, open_index
from ragjax.mesh import enable_compilation_cache, local_mesh, place
from ragjax.models.layers import Params
from ragjax.passages import PassageStore, Question, read_questions
from ragjax.progress import terminal
from ragjax.rag import Rag, open_rag
from ragjax.refresh import refreshed_at, refreshed_index, version_folder
from ragjax.step import abstract_state, for_answering, state_shardings


def read_split(config: Config, split: str) -> list[Question]:
    """The questions of a split. Raises `InputError` where these or the index are missing, before a model is fetched."""
    check_built(Path(config.index.folder))
    return read_questions(Path(getattr(config.questions, split)))


def open_world(config: Config) -> tuple[Rag, Index, PassageStore]:
    """Opens models, index and passages, and checks that they belong together. Raises `InputError`."""
    folder = Path(config.index.folder)
    check_built(folder)  # before models are fetched
    enable_compilation_cache(cache_folder() / "xla")
    rag = open_rag(config)
    recall = config.index.recall if config.index.kind == "approximate" else None
    vocabulary = rag.generator.config.vocabulary
    return rag, open_index(folder, rag.fingerprints, recall), PassageStore.open(folder, vocabulary)


def pretrained(rag: Rag, mesh: Mesh) -> Params:
    """The pretrained parameters for answering, laid out on the mesh."""
    rag = for_answering(rag)
    return place(rag.initial_params(), state_shardings(rag, mesh, rag.abstract_params()))


def trained_index(rag: Rag, index: Index, step: int) -> Index:
    """The index for the checkpoint of `step`: begun after it, or else the one it searched; else the one given."""
    folder = Path(rag.config.output)
    if (version_folder(folder, step) / MANIFEST).is_file():
        index.release()
        return refreshed_index(rag, index, folder, step)
    with Checkpoints(folder / "checkpoints", keep=rag.config.train.keep, writing=False) as checkpoints:
        then = refreshed_at(checkpoints.metadata(step).get("refresh", {}))
    if then.building == step == rag.config.train.steps:
        terminal.print(
            "its index is not complete, and an older one is searched; run: ragjax train CONFIG", soft_wrap=True
        )
    if (searched := then.searched) is None:
        return index
    index.release()
    return refreshed_index(rag, index, folder, searched)


def restore_trained(rag: Rag, mesh: Mesh | None = None, step: int | None = None) -> tuple[Params, int] | None:
    """The parameters of a checkpoint in `output`, on the mesh or one device, and its step: the newest, with
    `train.keep_best` that of lowest dev loss, or `step`.

    None if there is none.

    Raises `InputError` for a checkpoint that is damaged, or was trained with other models than the configuration's.
    """
    folder = Path(rag.config.output) / "checkpoints"
    if not folder.is_dir():
        return None
    check_same_models(rag.config)
    mesh = mesh or local_mesh(data=1)
    answering = for_answering(rag)
    like = {name: of for name, of in abstract_state(answering, mesh).params.items() if name in rag.parts}
    with Checkpoints(folder, keep=rag.config.train.keep, writing=False) as checkpoints:

        def load(step: int) -> Any:
            return checkpoints.restore_params(step, like)

        find = checkpoints.lowest if rag.config.train.keep_best else checkpoints.newest
        found = find(load) if step is None else (step, load(step))
        if found is None:
            return None
    params = found[1]
    if "generator" not in params:  # of contrastive training: it answers as it came
        untrained = {"generator": rag.generator.read()}
        params |= place(untrained, state_shardings(answering, mesh, {"generator": rag.generator.abstract}))
    return params, found[0]
