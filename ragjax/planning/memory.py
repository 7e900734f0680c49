"""Whether training fits into the memory of its devices, and what would help."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jax.sharding import Mesh

from ragjax.config import ON_DEVICES
from ragjax.errors import InputError
from ragjax.parallel.mesh import make_mesh
from ragjax.planning.program_cost import NotCompiled, bytes_each, compiled_cost
from ragjax.rag import RagModel
from ragjax.resources import host_memory, size_text
from ragjax.training.fused_retrieval import abstract_corpus
from ragjax.training.state import abstract_state, larger_model_axis
from ragjax.training.step import step_arguments, trace_step, train_programs


def check_memory(rag: RagModel, mesh: Mesh, passages: int, limit: int | None = None) -> None:
    """Raises `InputError`, with advice, if training needs more memory of a device than the `limit` (bytes) it has.

    Without a limit it is what the device reports. A CPU reports none: there the state alone, of all its devices, is
    held against the machine's memory, and nothing is compiled. `passages` is N.
    """
    config, state = rag.config, bytes_each(abstract_state(rag, mesh))
    if limit is None:
        limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        memory, need = host_memory(), state * len(mesh.local_devices)
        if memory is not None and need > memory:
            has = f"parameters and optimiser state take {size_text(need)}, and this machine has {size_text(memory)}"
            helps = "; ".join([*_state_advice(rag, mesh), "smaller models"])
            raise InputError(f"training does not fit: {has}; what would help: {helps}")
        return
    searched = 0
    if config.index.kind in ON_DEVICES:
        searched = bytes_each(abstract_corpus(rag, mesh, passages))
    try:
        arguments = step_arguments(rag, mesh, passages)
        temporaries = max(
            compiled_cost(trace_step(rag, mesh, passages, make).lower(), arguments).temporaries
            for make in train_programs(config.train)
        )
    except NotCompiled:
        return  # then the step itself will tell
    if (need := state + temporaries + searched) > limit:
        parts = f"parameters and optimiser state {size_text(state)}, temporaries {size_text(temporaries)}"
        parts += f", passages {size_text(searched)}" if searched else ""
        raise InputError(
            f"training does not fit: it needs {size_text(need)} of a device that has {size_text(limit)} ({parts}); "
            f"what would help: {'; '.join(memory_advice(rag, mesh))}"
        )


def memory_advice(rag: RagModel, mesh: Mesh) -> list[str]:
    """Settings that would lower what training needs of each device, the least costly first."""
    config, train, (data, _) = rag.config, rag.config.train, mesh.devices.shape
    advice: list[str] = []
    if config.index.kind in ON_DEVICES and config.retriever.prior == "top_k":
        advice.append("index.kind=HNSW32 (the host then searches)")
    advice += _state_advice(rag, mesh)
    if config.dtype == "float32":
        advice.append("dtype=bfloat16")
    if not train.remat:
        advice.append("train.remat=true")
    if train.objective == "contrastive":
        smaller = [f"train.batch_size below {train.batch_size}", f"train.num_docs below {train.num_docs}"]
        return [
            *advice,
            *smaller,
            f"retriever.max_passage_tokens below {config.retriever.max_passage_tokens}",
            "smaller models",
        ]
    # of one micro-batch every device should have as few questions as can be, and at least one
    parts = [
        n for n in range(1, train.batch_size + 1) if train.batch_size % n == 0 and train.batch_size // n % data == 0
    ]
    if parts and train.gradient_accumulation not in parts:
        advice.append(
            f"train.gradient_accumulation={parts[-1]} (now {data} devices share "
            f"{train.batch_size // train.gradient_accumulation} questions)"
        )
    elif more := [n for n in parts if n > train.gradient_accumulation]:
        advice.append(f"train.gradient_accumulation={more[0]}")
    elif train.num_docs > 1:
        advice.append(f"train.num_docs below {train.num_docs}")
    advice.append(f"generator.max_prompt_tokens below {config.generator.max_prompt_tokens}")
    if config.generator.quantization is None:
        adapted = train.lora.rank and any(target.split(".")[0] == "generator" for target in train.lora.targets)
        kept = adapted or {"generator", "generator.layers"} & set(train.frozen_params)
        advice.append("generator.quantization=int8" + ("" if kept else " with train.lora.rank=16"))
    if train.backprop_docs is None and config.model == "rag_sequence" and train.num_docs > 1:
        advice.append("train.backprop_docs=1")
    if config.index.kind in ON_DEVICES and config.index.dtype == "float32":
        advice.append("index.dtype=bfloat16")
    return [*advice, "smaller models"]


def _state_advice(rag: RagModel, mesh: Mesh) -> list[str]:
    """Settings that lower what parameters and optimiser state take of each device, and to what."""
    config, now = rag.config, bytes_each(abstract_state(rag, mesh))

    def state(on: Mesh, **changes: Any) -> int:
        return bytes_each(abstract_state(replace(rag, config=config.replace(**changes)), on))

    settings: dict[str, int] = {}
    if not config.mesh.fsdp:
        if mesh.shape["data"] > 1:
            settings["mesh.fsdp=true"] = state(mesh, mesh=config.mesh.replace(fsdp=True))
        if (model := larger_model_axis(rag, mesh)) is not None:
            wider = make_mesh(model, list(mesh.devices.flat))
            settings[f"mesh.model={model}"] = state(wider, mesh=config.mesh.replace(model=model))
    frozen = config.train.frozen_params
    if len(rag.parts) > 1 and not frozen:
        [largest] = sorted(rag.parts, key=lambda name: -bytes_each(rag.parts[name].abstract_params))[:1]
        settings[f"train.frozen_params=[{largest}]"] = state(mesh, train=config.train.replace(frozen_params=(largest,)))
    return [
        f"{setting} (parameters and optimiser state {size_text(size)} instead of {size_text(now)})"
        for setting, size in settings.items()
        if size < now
    ]
