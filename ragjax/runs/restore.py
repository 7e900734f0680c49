"""What commands open: the models, index and passages of a configuration, and the parameters that a run has trained."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ragjax.checkpoints.adapters import adapters_only, join_trees, merged, without_adapters
from ragjax.checkpoints.hub import fingerprint_files
from ragjax.checkpoints.quantization import before_quantization, dequantized, quantized
from ragjax.config import Config, adapted_maps
from ragjax.data.passage_store import PassageStore
from ragjax.data.questions import Split, read_split
from ragjax.errors import InputError
from ragjax.files import cache_folder
from ragjax.models.layers import Params
from ragjax.parallel.mesh import local_mesh, make_mesh
from ragjax.rag import RagModel, RagPipeline, load_pipeline
from ragjax.resources import size_text
from ragjax.retrieval.bm25 import check_bm25, open_bm25
from ragjax.retrieval.index import MANIFEST, Index, check_built, check_listed, open_index
from ragjax.retrieval.refresh import refreshed_at, refreshed_index, version_folder
from ragjax.runs.checkpointer import Checkpointer, fingerprint, newest_step
from ragjax.runs.run_dir import check_same_models, load_run_config, read_run_manifest, record_start
from ragjax.terminal import terminal
from ragjax.training.state import (
    TrainState,
    abstract_state,
    base_part,
    for_inference,
    inference_params,
    init_train_state,
    larger_model_axis,
    saved_part,
    unsplit_modules,
)


def enable_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs, small ones too, under `folder` for later processes; call it before any is compiled.

    A folder that JAX was given already ($JAX_COMPILATION_CACHE_DIR) is used instead.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def open_split(config: Config, split: str) -> Split:
    """The questions of a split, before a model is fetched.

    Raises `InputError` where these or the index are missing or damaged, where none can be used, and, with
    `questions.strict`, for the first that cannot.
    """
    check_built(Path(config.index.path))
    source = getattr(config.questions, split)
    check_listed(Path(source))
    return read_split(source, config.questions).checked(config.questions.strict)


def load_artifacts(config: Config) -> tuple[RagPipeline, Index, PassageStore]:
    """Opens models, index and passages, and checks that they belong together. Raises `InputError`."""
    folder = Path(config.index.path)
    check_built(folder)  # before models are fetched
    check_bm25(config.retriever.bm25_docs)
    enable_compilation_cache(cache_folder() / "xla")
    rag = load_pipeline(config)
    recall = config.index.recall_target if config.index.kind == "approximate" else None
    vocabulary = rag.generator.config.vocab_size
    index = open_index(folder, rag.fingerprints, recall)
    if config.retriever.bm25_docs:
        index.bm25 = open_bm25(folder, index.manifest["corpus"]["fingerprint"], len(index))
    return rag, index, PassageStore.open(folder, vocabulary)


def pretrained_params(rag: RagPipeline, mesh: Mesh) -> Params:
    """The pretrained parameters for answering, laid out on the mesh, in the types of `inference_params`."""
    return for_inference(rag).initial_params(inference_params(rag, mesh))


def check_answering_fits(rag: RagModel, mesh: Mesh, limit: int | None = None, untrained: bool = False) -> None:
    """Raises `InputError`, with advice, if a device cannot hold its part of what answers: FSDP does not split that.

    The `limit`, in bytes, is by default what the device reports; a CPU reports none. With `untrained` the models before
    training lie beside those after.
    """
    if limit is None:
        limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")

    def each(on: Mesh) -> int:
        leaves = jax.tree.leaves(inference_params(rag, on))
        once = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        return 2 * once if untrained else once

    if limit is None or (need := each(mesh)) <= limit:
        return
    helps = ["evaluate.max_untrained_questions=0"] if untrained else []
    helps += [] if rag.config.dtype == "bfloat16" else ["dtype=bfloat16"]
    if (model := larger_model_axis(for_inference(rag), mesh)) is not None:
        wider = make_mesh(model, list(mesh.devices.flat))
        helps.append(f"mesh.model={model} ({size_text(each(wider))}; mesh.fsdp splits them in training only)")
    which = "parameters, before and after training," if untrained else "parameters"
    raise InputError(
        f"answering does not fit: the models' {which} take {size_text(need)} of a device that has "
        f"{size_text(limit)}; what would help: {'; '.join([*helps, 'a smaller generator'])}"
    )


def trained_index(rag: RagPipeline, index: Index, step: int) -> Index:
    """The index that belongs to the checkpoint of `step`.

    That is the one begun after that step where it is complete, else the one that this step searched, else `index`.
    """
    folder = Path(rag.config.output)
    if (version_folder(folder, step) / MANIFEST).is_file():
        index.release()
        return refreshed_index(rag, index, folder, step)
    with Checkpointer(folder / "checkpoints", keep=rag.config.train.keep_checkpoints, writing=False) as checkpoints:
        then = refreshed_at(checkpoints.metadata(step).get("refresh", {}))
    if then.building == step == rag.config.train.steps:
        terminal.print(
            "its index is not complete, and an older one is searched; run: ragjax train CONFIG", soft_wrap=True
        )
    if (searched := then.searched) is None:
        return index
    index.release()
    return refreshed_index(rag, index, folder, searched)


def restore_params(
    rag: RagPipeline, mesh: Mesh | None = None, step: int | None = None, exact: bool = False
) -> tuple[Params, int] | None:
    """The parameters of a checkpoint in `output`, on `mesh` or else one device, and its step; None if there is none.

    `step` says which; by default it is the newest, with `train.keep_best` that of lowest dev loss. They have the types
    of `inference_params`, whatever `dtype` the run had, or, if `exact`, float32 as they were trained. Raises
    `InputError` for a checkpoint that is damaged, or was trained with other models than the configuration's.
    """
    if not (Path(rag.config.output) / "checkpoints").is_dir():
        return None
    check_same_models(rag.config)
    abstract = inference_params(rag, mesh or local_mesh(data=1))
    if exact:
        abstract = jax.tree.map(
            lambda leaf: leaf.update(dtype=jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, abstract
        )
    restored = _restore(rag, {name: part for name, part in abstract.items() if name in rag.parts}, step)
    if restored is None:
        return None
    step, params = restored
    # contrastive training leaves the generator as it came
    models = for_inference(rag).parts
    return params | {name: models[name].load_params(abstract[name]) for name in abstract.keys() - params.keys()}, step


def export_params(rag: RagPipeline, merge: bool) -> tuple[Params, int]:
    """The parameters of a run's newest checkpoint in float32, on the host, or else the pretrained ones; and its step.

    Of a model that has adapters these alone, or, to `merge`, its weights with them. What is in int8 is multiplied by
    its scales, which is printed.
    """
    lora = rag.config.train.lora
    if lora.rank is None or merge:
        restored = restore_params(rag, exact=True)
        params = dequantized(jax.device_get(restored[0] if restored else rag.initial_params()))
        if rag.config.generator.quantization is not None and "generator" in rag.parts:
            terminal.print("the generator's kernels are those of int8, in float32", soft_wrap=True)
        whole = {name: merged(part, lora.alpha / (lora.rank or 1)) for name, part in params.items()}
        return whole, restored[1] if restored else 0
    few, trained = {name: adapters_only(part) for name, part in rag.abstract_params().items()}, None
    if (Path(rag.config.output) / "checkpoints").is_dir():
        check_same_models(rag.config)
        trained = _restore_saved(rag, few, None)
    step, params = trained or (0, rag.initial_params(few))
    return jax.device_get(params), step


def _restore(rag: RagPipeline, abstract_params: Params, step: int | None = None) -> tuple[int, Params] | None:
    """As `restore_params`, of any configuration; each parameter gets the type and sharding of `abstract_params`."""
    saved = {name: adapters_only(part) for name, part in abstract_params.items()}
    quantizes = _quantizes(rag.config)
    restored = _restore_saved(rag, before_quantization(saved, rag.config.dtype) if quantizes else saved, step)
    if restored is None:
        return None
    step, params = restored
    params = quantized(params, saved) if quantizes else params
    parts = {name: without_adapters(part) for name, part in abstract_params.items()}
    base = {name: part for name, part in parts.items() if part}
    return step, join_trees(params, rag.initial_params(base)) if base else params


def _quantizes(config: Config) -> bool:
    """Whether the configuration has kernels in int8 that its run did not have in training."""
    run = Path(config.output)
    return config.generator.quantization is not None and load_run_config(run).generator.quantization is None


def _restore_saved(rag: RagPipeline, saved: Params, step: int | None) -> tuple[int, Params] | None:
    """What a checkpoint holds of the parameters. Raises `InputError` where its adapters belong to other weights."""
    config, base = rag.config, base_fingerprints(rag)
    folder = Path(config.output) / "checkpoints"
    with Checkpointer(folder, keep=config.train.keep_checkpoints, writing=False) as checkpoints:

        def load(step: int) -> Any:
            params = checkpoints.restore_params(step, saved)
            before = checkpoints.metadata(step).get("base", {})
            if differ := sorted(name for name in base if before.get(name) != base[name]):
                raise InputError(
                    f"{folder / str(step)}: its adapters were trained beside other weights than those of the "
                    f"{' and '.join(differ)} are now; bring the old ones back"
                )
            return params

        restore = checkpoints.restore_best if config.train.keep_best else checkpoints.restore_latest
        return restore(load) if step is None else (step, load(step))


def base_fingerprints(rag: RagModel) -> dict[str, str]:
    """Of each model that has adapters, that of the files of the weights beside them."""
    adapted = (name for name in rag.parts if adapted_maps(rag.config, name) is not None)
    return {name: fingerprint_files(rag.parts[name].files) for name in adapted}


def check_start(rag: RagPipeline) -> None:
    """Raises `InputError` unless this run can go on with the models of the run `train.start_from`, if that is set.

    Both must come from the same pretrained models, and their passages from the same encoder.
    """
    if (start_from := rag.config.train.start_from) is None:
        return
    start, ours = f"train.start_from: {start_from}", rag.config.train.passage_encoder
    other = load_run_config(Path(start_from)).train
    theirs = other.passage_encoder
    if theirs != ours:
        raise InputError(
            f"{start} has train.passage_encoder={theirs}, and this run {ours}; use the same, or export that run and "
            "give its encoders as sources"
        )
    shapes = [
        None if one.rank is None else (one.rank, one.alpha, one.targets) for one in (other.lora, rag.config.train.lora)
    ]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{start} has another train.lora than this run; use the same, or export that run, merged, and give its "
            "models as sources"
        )
    before, now = read_run_manifest(Path(start_from))["fingerprints"], {"encoder": rag.fingerprints["encoder"]}
    now |= {name: fingerprint_files(getattr(rag, name).files) for name in ("retriever", "generator")}
    if differ := [name for name, fingerprint in now.items() if before.get(name) != fingerprint]:
        named = ", ".join("encoder of passages" if name == "encoder" else name for name in differ)
        raise InputError(f"{start} was trained from another {named}; give the same sources, or export that run")
    if newest_step(Path(start_from) / "checkpoints") == 0:
        raise InputError(f"{start} has no checkpoint yet")


def start_params(rag: RagPipeline, abstract_params: Params) -> tuple[Params, dict[str, Any]]:
    """The parameters of the run `train.start_from`, and what the manifest records of that run.

    Each gets the type and sharding of `abstract_params`. What that run did not train comes from the pretrained model.
    Raises `InputError` where it has no checkpoint; call `check_start` first.
    """
    assert rag.config.train.start_from is not None
    run = Path(rag.config.train.start_from)
    other = load_run_config(run)
    theirs = replace(rag, config=other)
    trained = theirs.parts.keys() & abstract_params.keys()
    restored = _restore(theirs, {name: abstract_params[name] for name in trained})
    if restored is None:
        raise InputError(f"train.start_from: {run} has no checkpoint yet")
    step, params = restored
    params |= {name: rag.parts[name].load_params(abstract_params[name]) for name in abstract_params.keys() - trained}
    return params, {"run": str(run), "step": step, "fingerprint": fingerprint(run / "checkpoints", step)}


def restore_or_initialize(
    rag: RagPipeline, checkpoints: Checkpointer, index: Index, mesh: Mesh
) -> tuple[TrainState, dict[str, Any]]:
    """The state of the newest checkpoint, with its metadata; where there is none the state of step 0, and {}."""
    if whole := unsplit_modules(rag, mesh):
        terminal.print(f"not split over mesh.model={mesh.shape['model']}: {', '.join(whole)}", soft_wrap=True)
    abstract = abstract_state(rag, mesh)
    saved = saved_part(abstract)
    newest = checkpoints.restore_latest(lambda step: (checkpoints.metadata(step), checkpoints.restore(step, saved)))
    if newest is None:
        return _initialize(rag, abstract), {}
    step, (metadata, state) = newest
    if metadata.get("index", index.version) != index.version:
        raise InputError(
            f"{rag.config.output}: step {step} was trained with another index than {rag.config.index.path} is now; "
            "bring that one back, or choose another output"
        )
    terminal.print(f"going on from step {step}")
    return with_base(rag, state, base_part(abstract)), metadata


def with_base(rag: RagPipeline, saved: TrainState, base: TrainState) -> TrainState:
    """A whole state from what a checkpoint holds of it, and the models' files; `base` is the `base_part`, abstract."""
    if not base.params and not base.indexed:
        return saved
    params, indexed = join_trees(saved.params, rag.initial_params(base.params)), saved.indexed
    if base.indexed:
        name = "passage_encoder" if rag.config.train.passage_encoder == "own" else "retriever"
        indexed = join_trees(indexed, rag.initial_params({name: base.indexed})[name])
    return replace(saved, params=params, indexed=indexed)


def _initialize(rag: RagPipeline, abstract: TrainState) -> TrainState:
    """The state of step 0, with the pretrained parameters, or those of the run `train.start_from`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if rag.config.train.start_from is None:
        params = rag.initial_params(abstract.params)
    else:
        params, start = start_params(rag, abstract.params)
        record_start(Path(rag.config.output), start)
        terminal.print(f"beginning with the parameters of {start['run']}, step {start['step']}", soft_wrap=True)
    # moments are born where they will lie: no device ever holds the whole state, nor the parameters twice
    return jax.jit(lambda params: init_train_state(rag, params), out_shardings=shardings, donate_argnums=0)(params)
