"""What `ragjax evaluate` takes: each row of the table names the function that computes its number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from ragjax.config import most_documents
from ragjax.decoding.candidates import pad_answers
from ragjax.decoding.marginal_search import search_rag_token
from ragjax.decoding.prefix_cache import empty_prefix_cache
from ragjax.decoding.propose import beam_search_documents, beam_settings, prefill_documents
from ragjax.decoding.rescore import score_tokens
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.parallel.by_device import on_mesh
from ragjax.parallel.sharding import abstract_with_sharding, heads_spec
from ragjax.planning.inputs import NO_PROMPT, SPECIAL, PlanInputs
from ragjax.planning.program_cost import program_temporaries
from ragjax.planning.rows import Number, Row, make_row
from ragjax.planning.shared_rows import parameters_row, questions_text, search_row
from ragjax.rag import RagModel
from ragjax.retrieval.passage_cache import Pool, join_question
from ragjax.training.state import for_inference, state_shardings

QUESTION_TOKENS = 32  # of a prompt after its passage, for the temporaries of reading through a cache


def evaluate_rows(inputs: PlanInputs) -> list[Row]:
    """The rows of `ragjax evaluate`: of answering one batch of questions."""
    copies = 1 if inputs.config.evaluate.max_untrained_questions == 0 else 2

    def row(what: str, number: Callable[[PlanInputs], Number], **how: Any) -> Row:
        return make_row("evaluate", what, "device", lambda: number(inputs), **how)

    return [
        parameters_row(inputs, "evaluate", "retriever", copies),
        parameters_row(inputs, "evaluate", "generator", copies),
        row("documents' keys and values", _documents_memory),
        *([row("passages' keys and values", _passage_cache)] if inputs.config.decode.passage_cache_gib else []),
        row("logits of a step of the beam search", _logits, part=True),
        row("temporaries of answering", _temporaries),
        search_row(inputs, "evaluate"),
    ]


def _prompts(inputs: PlanInputs, devices: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Tokens and mask [questions · documents, S] that so many devices read together."""
    rows = devices * inputs.config.evaluate.batch_size * most_documents(inputs.config)
    shape = rows, inputs.config.generator.max_prompt_tokens
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool)


def _documents_memory(inputs: PlanInputs) -> Number:
    """What one device holds of a batch while it is answered."""
    model, config, mesh = inputs.model("generator"), inputs.config, inputs.mesh_of("evaluate")
    # for Hugging Face's numbers documents are read with the padding unmasked and masked
    copies = 2 if config.hf_compatible and config.model != "rag_token" else 1

    def held(params: Params, *prompts: Any) -> Any:
        generator = nnx.merge(model.graphdef, params)
        memory = generator.prefill(*prompts)
        slots = config.decode.max_new_tokens * config.decode.num_beams
        return jax.tree.leaves([memory] * copies), jax.tree.leaves(empty_prefix_cache(generator, memory, slots))

    size = 0
    for leaf in jax.tree.leaves(jax.eval_shape(held, model.abstract_params, *_prompts(inputs, 1))):
        heads = mesh.shape["model"] if leaf.ndim == 5 and leaf.shape[3] % mesh.shape["model"] == 0 else 1
        size += leaf.size * leaf.dtype.itemsize // heads
    documents, longest = most_documents(config), config.generator.max_prompt_tokens
    how = f"{questions_text(config.evaluate.batch_size)} × {documents} documents × {longest} tokens, and the answers'"
    how += ", read twice" if copies > 1 else ""
    return size, how


def _passage_cache(inputs: PlanInputs) -> Number:
    if inputs.model("generator").config.encoder_decoder:
        return 0, "an encoder–decoder has none"
    return int(inputs.config.decode.passage_cache_gib * 2**30), "at most decode.passage_cache_gib"


def _logits(inputs: PlanInputs) -> Number:
    beams = inputs.config.evaluate.batch_size * most_documents(inputs.config) * inputs.config.decode.num_beams
    vocabulary = inputs.model("generator").config.vocab_size
    how = f"{beams:,} beams × {vocabulary:,} in float32; scoring goes by blocks; part of the temporaries below"
    return beams * vocabulary * 4, how


def _temporaries(inputs: PlanInputs) -> Number:
    """The most that one program takes: reading the documents, the beam search, scoring candidates."""
    mesh = inputs.mesh_of("evaluate")
    with on_mesh(mesh):
        most = max(program_temporaries(*program) for program in answering_programs(inputs, mesh))
    count, each = _candidates(inputs), questions_text(inputs.config.evaluate.batch_size)
    return most, f"XLA's analysis ({inputs.device_kind}): {each}, at most {count} distinct candidates each"


def _candidates(inputs: PlanInputs) -> int:
    """The most that a question can have."""
    decode, together = inputs.config.decode, inputs.config.model == "rag_token"
    return decode.num_beams if together else most_documents(inputs.config) * decode.num_beams


def answering_programs(inputs: PlanInputs, mesh: Mesh) -> list[tuple[Any, ...]]:
    """The programs that answer a batch of questions on a mesh, each with its arguments, in shapes and places.

    For use within `on_mesh`. First reading, then the search, then scoring. Raises `Unknown` without a generator.
    """
    config, decode, model = inputs.config, inputs.config.decode, inputs.model("generator")
    together, graph, documents = config.model == "rag_token", model.graphdef, most_documents(config)
    rag = RagModel(config, model, model, SPECIAL, NO_PROMPT, model)
    shardings = state_shardings(for_inference(rag), mesh, {"generator": model.abstract_params})["generator"]
    params = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), model.abstract_params, shardings
    )
    questions = config.evaluate.batch_size * mesh.shape["data"]

    def rows(tree: Any) -> Any:
        return abstract_with_sharding(mesh, tree, "data")

    prompts = rows(_prompts(inputs, mesh.shape["data"]))

    def place(leaf: Any) -> Any:
        spec = heads_spec(mesh, leaf.shape[3]) if leaf.ndim == 5 else PartitionSpec("data")
        return abstract_with_sharding(mesh, leaf, *spec)

    # a memory is passed by its leaves: it is checked to hold arrays, which shapes are not
    memory = [*map(place, jax.eval_shape(lambda *of: jax.tree.leaves(prefill_documents(graph, *of)), params, *prompts))]
    candidates = [[((0,) * decode.max_new_tokens, False)] * _candidates(inputs)] * questions
    answers = rows(pad_answers(candidates, SPECIAL, decode.max_new_tokens))

    @jax.jit
    def search(params: Params, memory: list[Any]) -> Any:
        read = DocumentMemory(*memory)
        if together:
            prior = jnp.zeros((questions, documents))
            how = beam_settings(decode, SPECIAL, config.hf_compatible)
            return search_rag_token(graph, params, read, prior, how, SPECIAL)
        return beam_search_documents(graph, params, read, decode, SPECIAL, config.hf_compatible)

    @jax.jit
    def score(params: Params, memory: list[Any], *answers: Any) -> Any:
        return score_tokens(graph, params, DocumentMemory(*memory), *answers, SPECIAL)

    programs = [
        (prefill_documents, graph, params, *prompts),
        (search, params, memory),
        (score, params, memory, *answers),
    ]
    if decode.passage_cache_gib and not model.config.encoder_decoder:
        at = rows(jax.ShapeDtypeStruct((questions * documents,), jnp.int32))
        # a slot for each prompt
        programs.append((join_question, graph, params, Pool(*memory[:2]), at, *prompts, at, QUESTION_TOKENS))
    return programs
