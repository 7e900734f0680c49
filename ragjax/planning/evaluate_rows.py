"""What `ragjax evaluate` takes: each row of the table names the function that computes its number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from ragjax.answering.batch_answerer import read_together
from ragjax.checkpoints.pretrained import PretrainedModel
from ragjax.config import ON_DEVICES, most_documents, rescores_as_hugging_face
from ragjax.decoding.beam_search import likeliest_next
from ragjax.decoding.candidates import pad_answers
from ragjax.decoding.exact.decode import search_settings
from ragjax.decoding.marginal_search import search_marginal, search_rag_token
from ragjax.decoding.prefix_cache import (
    MOST_NEW,
    PrefixCache,
    beam_step,
    empty_prefix_cache,
    extend_prefixes,
    read_width,
)
from ragjax.decoding.propose import beam_search_documents, beam_settings, join_memories, prefill_documents
from ragjax.decoding.rescore import score_tokens
from ragjax.models.kv_cache import DocumentMemory, KVCache
from ragjax.models.layers import Params
from ragjax.parallel.by_device import by_device, on_mesh
from ragjax.parallel.sharding import abstract_with_sharding, heads_spec
from ragjax.planning.inputs import NO_PROMPT, SPECIAL, PlanInputs
from ragjax.planning.program_cost import Cost, bytes_each, program_cost, used_arguments
from ragjax.planning.roofline import Chip, least_seconds
from ragjax.planning.rows import Number, Row, Unknown, make_row
from ragjax.planning.shared_rows import parameters_row, questions_text, search_row
from ragjax.rag import RagModel
from ragjax.retrieval.passage_cache import Pool, join_question
from ragjax.training.fused_retrieval import abstract_corpus
from ragjax.training.state import inference_params

QUESTION_TOKENS = 32  # of a prompt after its passage, for the temporaries of reading through a cache


BATCH_TIME = "time of a batch of questions, at least"


def evaluate_rows(inputs: PlanInputs, chip: Chip | None) -> list[Row]:
    """The rows of `ragjax evaluate`: of answering one batch of questions; with a `chip` also the least time of that."""
    copies = 1 if inputs.config.evaluate.max_untrained_questions == 0 else 2

    @cache
    def costs() -> dict[str, tuple[int, Cost]]:
        return answering_costs(inputs, with_step=chip is not None)

    def row(what: str, number: Callable[[PlanInputs], Number], **how: Any) -> Row:
        return make_row("evaluate", what, "device", lambda: number(inputs), **how)

    return [
        parameters_row(inputs, "evaluate", "retriever", copies),
        parameters_row(inputs, "evaluate", "generator", copies),
        row("documents' keys and values", _documents_memory),
        *([row("passages' keys and values", _passage_cache)] if inputs.config.decode.passage_cache_gib else []),
        row("logits of a step of the beam search", _logits, part=True),
        row("temporaries of answering", lambda inputs: _temporaries(inputs, costs())),
        search_row(inputs, "evaluate"),
        *([row(BATCH_TIME, lambda inputs: _seconds(inputs, costs(), chip), part=True, unit="seconds")] if chip else []),
    ]


def answering_costs(inputs: PlanInputs, with_step: bool) -> dict[str, tuple[int, Cost]]:
    """FLOPs, on all devices, and cost to each of `answering_programs`, and with `with_step` of `search_step`.

    A table of which rows are looked up counts as nothing that is read. Raises `Unknown` or `NotCompiled`.
    """
    mesh = inputs.mesh_of("evaluate")
    with on_mesh(mesh):
        programs = answering_programs(inputs, mesh) | (search_step(inputs, mesh) if with_step else {})
        found = {name: program_cost(*program) for name, program in programs.items()}
        spared = {name: _read_less(inputs, mesh, *program) for name, program in programs.items()}
    placed = _parameters(inputs.placed("generator"), inputs, mesh)
    for name, (flops, cost) in found.items():
        looked_up = "embed" in placed and (name == "reading" or "head" in placed)
        less = spared[name] + (bytes_each(placed["embed"]) if looked_up else 0)
        found[name] = flops, replace(cost, read=cost.read - less)
    reads, (flops, cost) = _reads(inputs, mesh)[0], found["reading"]
    found["reading"] = flops * reads, replace(cost, read=cost.read * reads, written=cost.written * reads)
    if "putting together" in found:  # what is put together lies beside it
        flops, cost = found["putting together"]
        found["putting together"] = flops, replace(cost, temporaries=cost.temporaries + cost.read)
    return found


def _read_less(inputs: PlanInputs, mesh: Mesh, program: Any, *arguments: Any) -> int:
    """Bytes by which the parameters that a program uses are smaller where they will lie than where it was compiled."""
    if not inputs.stand_ins:
        return 0
    compiled, placed = (
        jax.tree.leaves(_parameters(model("generator"), inputs, mesh)) for model in (inputs.model, inputs.placed)
    )
    used = used_arguments(program.trace(*arguments).jaxpr.jaxpr)  # the parameters come first
    pairs = zip(compiled, placed, used, strict=False)
    return sum(bytes_each(one) - bytes_each(other) for one, other, is_used in pairs if is_used)


def _parameters(model: PretrainedModel, inputs: PlanInputs, mesh: Mesh) -> Params:
    """The generator's as they answer: shapes, types and places."""
    return inference_params(RagModel(inputs.config, model, model, SPECIAL, NO_PROMPT, model), mesh)["generator"]


def _reads(inputs: PlanInputs, mesh: Mesh) -> tuple[int, int]:
    """In how many programs the prompts of a batch are read, one after the other, and how many prompts each reads."""
    prompts, width = _prompts(inputs, mesh.shape["data"])[0].shape
    cached = inputs.config.decode.passage_cache_gib and not inputs.model("generator").config.encoder_decoder
    together = read_together(mesh, prompts, width) if inputs.on_cpus and not cached else prompts
    reads = -(-prompts // together)
    return reads, -(-prompts // reads)


def _prompts(inputs: PlanInputs, devices: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Tokens and mask [questions · documents, S] that so many devices read together."""
    rows = devices * inputs.config.evaluate.batch_size * most_documents(inputs.config)
    shape = rows, inputs.config.generator.max_prompt_tokens
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool)


def _searches(inputs: PlanInputs) -> dict[str, int]:
    """By what is searched, the documents whose prefixes a device keeps meanwhile: `candidates` and `marginal`.

    `evaluate.modes` follow one another. Lazy rounds of m documents have as many questions as keep the product.
    """
    config, documents = inputs.config, most_documents(inputs.config)
    questions = config.evaluate.batch_size
    modes = config.evaluate.modes or ("thorough",)
    searches = {}
    if set(modes) - {"exact"} or config.decode.fallback == "thorough":
        searches["candidates"] = questions * documents
    if "exact" in modes:
        lazy = config.decode.lazy and config.model != "rag_token"
        searches["marginal"] = (-(-questions // documents) if lazy else questions) * documents
    return searches


def _documents_memory(inputs: PlanInputs) -> Number:
    """What one device holds of a batch while it is answered."""
    model, config, mesh = inputs.model("generator"), inputs.config, inputs.mesh_of("evaluate")
    searches = _searches(inputs)
    # for Hugging Face's numbers documents are read with the padding unmasked and masked
    copies = 2 if config.hf_compatible and config.model != "rag_token" else 1
    beams = {"candidates": config.decode.num_beams, "marginal": config.decode.max_beams}

    def size_of(search: str) -> int:
        def held(params: Params, *prompts: Any) -> Any:
            generator = nnx.merge(model.graphdef, params)
            memory, slots = generator.prefill(*prompts), config.decode.max_new_tokens * beams[search]
            prefixes = empty_prefix_cache(generator, memory.take(jnp.arange(searches[search])), slots)
            return jax.tree.leaves(([memory] * copies, prefixes))

        size = 0
        for leaf in jax.eval_shape(held, model.abstract_params, *_prompts(inputs, 1)):
            heads = mesh.shape["model"] if leaf.ndim == 5 and leaf.shape[3] % mesh.shape["model"] == 0 else 1
            size += leaf.size * leaf.dtype.itemsize // heads
        return size

    size = max(map(size_of, searches))
    documents, longest = most_documents(config), config.generator.max_prompt_tokens
    how = f"{questions_text(config.evaluate.batch_size)} × {documents} documents × {longest} tokens, and the answers'"
    how += ", read twice" if copies > 1 else ""
    return size, how


def _passage_cache(inputs: PlanInputs) -> Number:
    if inputs.model("generator").config.encoder_decoder:
        return 0, "an encoder–decoder has none"
    return int(inputs.config.decode.passage_cache_gib * 2**30), "at most decode.passage_cache_gib"


def _logits(inputs: PlanInputs) -> Number:
    most = {"candidates": inputs.config.decode.num_beams, "marginal": inputs.config.decode.max_beams}
    beams = max(rows * most[search] for search, rows in _searches(inputs).items())
    vocabulary = inputs.model("generator").config.vocab_size
    how = f"{beams:,} beams × {vocabulary:,} in float32; scoring goes by blocks; part of the temporaries below"
    return beams * vocabulary * 4, how


def _temporaries(inputs: PlanInputs, costs: dict[str, tuple[int, Cost]]) -> Number:
    """The most that one program takes: reading the documents, the beam search, scoring candidates."""
    most = max(cost.temporaries for name, (_, cost) in costs.items() if name != "step")
    count, each = _candidates(inputs), questions_text(inputs.config.evaluate.batch_size)
    return most, f"XLA's analysis ({inputs.device_kind}): {each}, at most {count} distinct candidates each"


def _seconds(inputs: PlanInputs, costs: dict[str, tuple[int, Cost]], chip: Chip) -> Number:
    """Of retrieval's search, of reading, and of as many steps of the search as an answer can have tokens.

    Scoring may find all that it needs in the prefixes read: what it may take is told beside.
    """
    config, mesh = inputs.config, inputs.mesh_of("evaluate")
    if "candidates" not in costs:
        raise Unknown("exact decoding ends with the proof")
    steps = config.decode.max_new_tokens
    parts = {
        what: least_seconds(chip, config.dtype, costs[name][0] / mesh.size, costs[name][1], runs)
        for what, name, runs in (("reading", "reading", 1), ("search", "step", steps), ("scoring", "scoring", 1))
    }
    more, _ = parts.pop("scoring")
    if config.index.kind in ON_DEVICES and chip.bandwidth is not None:
        # each device reads its part once for every process: as much as if each process searched by itself
        index = bytes_each(abstract_corpus(inputs.rag(), mesh, inputs.passages()[0]))
        parts["retrieval"] = index / (chip.bandwidth * 1e9), "memory"
    times = ", ".join(f"{what} {seconds:.2g} s ({binds})" for what, (seconds, binds) in parts.items())
    questions = questions_text(config.evaluate.batch_size * mesh.shape["data"])
    how = f"{questions}, {steps} tokens each: {times}; scoring up to {more:.2g} s more"
    return sum(seconds for seconds, _ in parts.values()), how


def _candidates(inputs: PlanInputs) -> int:
    """The most that a question can have."""
    decode, together = inputs.config.decode, inputs.config.model == "rag_token"
    return decode.num_beams if together else most_documents(inputs.config) * decode.num_beams


def answering_programs(inputs: PlanInputs, mesh: Mesh) -> dict[str, tuple[Any, ...]]:
    """The programs that answer a batch of questions on a mesh, each with its arguments, in shapes and places.

    For use within `on_mesh`. The searches have the names of `_searches`. Raises `Unknown` without a generator.
    """
    config, decode, model = inputs.config, inputs.config.decode, inputs.model("generator")
    graph, questions = model.graphdef, config.evaluate.batch_size * mesh.shape["data"]
    params, prompts, memory = _after_reading(inputs, mesh)

    def rows(tree: Any) -> Any:
        return abstract_with_sharding(mesh, tree, "data")

    candidates = [[((0,) * decode.max_new_tokens, False)] * _candidates(inputs)] * questions
    answers = rows(pad_answers(candidates, SPECIAL, decode.max_new_tokens))

    @jax.jit
    def score(params: Params, memory: list[Any], *answers: Any) -> Any:
        return score_tokens(graph, params, DocumentMemory(*memory), *answers, SPECIAL)

    programs: dict[str, tuple[Any, ...]] = {"scoring": (score, params, memory, *answers)}
    programs |= _reading(inputs, mesh, params, prompts)
    searches = _search_programs(inputs, mesh)
    programs |= {name: (searches[name], params, memory) for name in _searches(inputs)}
    if "candidates" in programs and not rescores_as_hugging_face(config):
        programs["reading more"] = _reading_more(inputs, mesh, params, memory)
    if decode.passage_cache_gib and not model.config.encoder_decoder:
        at = rows(jax.ShapeDtypeStruct(memory[-1].shape, jnp.int32))
        # a slot for each prompt
        programs["joining"] = join_question, graph, params, Pool(*memory[:2]), at, *prompts, at, QUESTION_TOKENS
    return programs


def _after_reading(inputs: PlanInputs, mesh: Mesh) -> tuple[Params, Any, list[Any]]:
    """The generator's parameters, the prompts, and the leaves of the memory that is then there: shapes and places.

    A memory is passed by its leaves: it is checked to hold arrays, which shapes are not.
    """
    model = inputs.model("generator")
    params = _parameters(model, inputs, mesh)
    prompts = abstract_with_sharding(mesh, _prompts(inputs, mesh.shape["data"]), "data")
    return params, prompts, _memory_of(inputs, mesh, params, prompts)


def _memory_of(inputs: PlanInputs, mesh: Mesh, params: Params, prompts: Any) -> list[Any]:
    """The leaves of the memory of some prompts."""
    graph = inputs.model("generator").graphdef

    def read(*given: Any) -> list[Any]:
        return jax.tree.leaves(prefill_documents(graph, *given))

    return [_placed(mesh, leaf) for leaf in jax.eval_shape(read, params, *prompts)]


def _reading(inputs: PlanInputs, mesh: Mesh, params: Params, prompts: Any) -> dict[str, tuple[Any, ...]]:
    """The program that reads prompts, and where it runs more than once, what makes one memory of its results."""
    graph, (reads, each) = inputs.model("generator").graphdef, _reads(inputs, mesh)
    if reads == 1:
        return {"reading": (prefill_documents, graph, params, *prompts)}
    some = abstract_with_sharding(mesh, [jax.ShapeDtypeStruct((each, x.shape[1]), x.dtype) for x in prompts], "data")
    parts = [_memory_of(inputs, mesh, params, some)] * reads
    place = abstract_with_sharding(mesh, jax.ShapeDtypeStruct(prompts[0].shape[:1], jnp.int32), "data")

    @jax.jit
    def join(parts: list[list[Any]], place: Any) -> Any:
        return jax.tree.leaves(join_memories([DocumentMemory(*leaves) for leaves in parts], place))

    return {"reading": (prefill_documents, graph, params, *some), "putting together": (join, parts, place)}


def _placed(mesh: Mesh, leaf: Any) -> Any:
    """A leaf of a memory or of what was read after it, with its place."""
    spec = heads_spec(mesh, leaf.shape[3]) if leaf.ndim == 5 else PartitionSpec(*["data"][: leaf.ndim])
    return abstract_with_sharding(mesh, leaf, *spec)


def _reading_more(inputs: PlanInputs, mesh: Mesh, params: Params, memory: list[Any]) -> tuple[Any, ...]:
    """What scores candidates beside the prefixes that the search has read: as many new ones as are read together."""
    decode, graph = inputs.config.decode, inputs.model("generator").graphdef

    def empty(params: Params, *memory: Any) -> list[Any]:
        slots = decode.max_new_tokens * decode.num_beams
        return jax.tree.leaves(empty_prefix_cache(nnx.merge(graph, params), DocumentMemory(*memory), slots))

    prefixes = [_placed(mesh, leaf) for leaf in jax.eval_shape(empty, params, *memory)]
    longest = decode.max_new_tokens - 1
    most = min((_candidates(inputs) - decode.num_beams) * longest, max(MOST_NEW, longest))
    shape = prefixes[-1].shape[0], read_width(max(1, most), few=not inputs.on_cpus)
    new = abstract_with_sharding(mesh, jax.ShapeDtypeStruct(shape, jnp.int32), "data")

    @jax.jit
    def read(params: Params, memory: list[Any], prefixes: list[Any], tokens: Any, parent: Any) -> Any:
        cache = PrefixCache(KVCache(*prefixes[:4]), *prefixes[4:])
        return extend_prefixes(graph, params, DocumentMemory(*memory), cache, None, tokens, parent)

    return read, params, memory, prefixes, new, new


def search_step(inputs: PlanInputs, mesh: Mesh) -> dict[str, tuple[Any, ...]]:
    """One `step` of all beams over all questions on a mesh, as `answering_programs` gives it; for its least time.

    Of the prefixes read before it counts none: it needs the decoder's weights and all memories, once.
    """
    model, decode = inputs.model("generator"), inputs.config.decode
    params, _, memory = _after_reading(inputs, mesh)

    def best(params: Params, memory: DocumentMemory) -> Any:
        generator = nnx.merge(model.graphdef, params)
        tokens = jnp.broadcast_to(memory.start[:, None], (memory.start.shape[0], decode.num_beams))
        own = jnp.broadcast_to(jnp.eye(decode.num_beams, dtype=bool), (*tokens.shape, decode.num_beams))
        prefixes = empty_prefix_cache(generator, memory, decode.num_beams)
        logp, _ = beam_step(generator, memory, prefixes, tokens, jnp.zeros((), jnp.int32), own)
        return likeliest_next(logp, 2 * decode.num_beams)

    @jax.jit
    def step(params: Params, memory: list[Any]) -> Any:
        return by_device(best, params, DocumentMemory(*memory))

    return {"step": (step, params, memory)}


def _search_programs(inputs: PlanInputs, mesh: Mesh) -> dict[str, Any]:
    """By the names of `_searches`: programs of parameters and of a memory's leaves, for all questions on a mesh."""
    config, decode, graph = inputs.config, inputs.config.decode, inputs.model("generator").graphdef
    together, documents, devices = config.model == "rag_token", most_documents(config), mesh.shape["data"]
    how = beam_settings(decode, SPECIAL, config.hf_compatible)

    @jax.jit
    def search(params: Params, memory: list[Any]) -> Any:
        read = DocumentMemory(*memory)
        if together:
            prior = jnp.zeros((devices * config.evaluate.batch_size, documents))
            return search_rag_token(graph, params, read, prior, how, SPECIAL)
        return beam_search_documents(graph, params, read, how, SPECIAL)

    @jax.jit
    def search_exactly(params: Params, memory: list[Any]) -> Any:
        local = jnp.arange(_searches(inputs)["marginal"]).reshape(-1, documents)  # as each device counts them
        numbers = jnp.tile(local, (devices, 1))
        prior, none = jnp.zeros(numbers.shape), jnp.zeros(len(numbers))
        how, read = search_settings(decode, SPECIAL, decode.max_beams), DocumentMemory(*memory)
        return search_marginal(graph, params, read, numbers, prior, none, none, how, SPECIAL, together)

    return {"candidates": search, "marginal": search_exactly}
