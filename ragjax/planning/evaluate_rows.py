"""What `ragjax evaluate` takes: each row of the table names the function that computes its number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ragjax.config import most_documents
from ragjax.decoding.candidates import pad_answers
from ragjax.decoding.exact.decode import search_settings
from ragjax.decoding.marginal_search import search_marginal, search_rag_token
from ragjax.decoding.propose import beam_search_documents, beam_settings, prefill_documents
from ragjax.decoding.rescore import score_tokens
from ragjax.models.kv_cache import DocumentMemory, empty_kv_cache
from ragjax.models.layers import Params
from ragjax.parallel.sharding import abstract_with_sharding
from ragjax.planning.inputs import SPECIAL, PlanInputs
from ragjax.planning.program_cost import bytes_each, program_temporaries
from ragjax.planning.rows import Number, Row, make_row
from ragjax.planning.shared_rows import parameters_row, questions_text, search_row
from ragjax.retrieval.passage_cache import join_question

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


def _questions(inputs: PlanInputs) -> int:
    """How many questions each device answers together."""
    return -(-inputs.config.evaluate.batch_size // inputs.mesh.shape["data"])


def _prompts(inputs: PlanInputs) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Tokens and mask [questions · documents, S] that a device reads."""
    shape = _questions(inputs) * most_documents(inputs.config), inputs.config.generator.max_prompt_tokens
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool)


def _searches(inputs: PlanInputs) -> dict[str, int]:
    """By what is searched, the documents whose prefixes a device keeps meanwhile: `candidates` and `marginal`.

    `evaluate.modes` follow one another. Lazy rounds of m documents have as many questions as keep the product.
    """
    config, questions, documents = inputs.config, _questions(inputs), most_documents(inputs.config)
    modes = config.evaluate.modes or ("thorough",)
    searches = {}
    if set(modes) - {"exact"} or config.decode.fallback == "thorough":
        searches["candidates"] = questions * documents
    if "exact" in modes:
        lazy = config.decode.lazy and config.model != "rag_token"
        searches["marginal"] = (-(-questions // documents) if lazy else questions) * documents
    return searches


def _documents_memory(inputs: PlanInputs) -> Number:
    model, config, searches = inputs.model("generator"), inputs.config, _searches(inputs)
    # for Hugging Face's numbers documents are read with the padding unmasked and masked
    copies = 2 if config.hf_compatible and config.model != "rag_token" else 1
    beams = {"candidates": config.decode.num_beams, "marginal": config.decode.max_beams}

    def size_of(search: str) -> int:
        def memory_and_cache(*arguments: Any) -> Any:
            memory = prefill_documents(model.graphdef, *arguments)
            searched = memory.take(jnp.arange(searches[search]))
            return jax.tree.leaves((memory, empty_kv_cache(searched, config.decode.max_new_tokens * beams[search])))

        return bytes_each(jax.eval_shape(memory_and_cache, model.abstract_params, *_prompts(inputs)))

    size = max(map(size_of, searches))
    documents, longest = most_documents(config), config.generator.max_prompt_tokens
    how = f"{questions_text(_questions(inputs))} × {documents} documents × {longest} tokens, and the answers'"
    how += ", read twice" if copies > 1 else ""
    how += "; all devices in one process" if inputs.mesh.size > 1 else ""
    return copies * size, how


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


def _temporaries(inputs: PlanInputs) -> Number:
    """The most that one program takes: reading the documents, the beam search, scoring candidates."""
    config, decode, model = inputs.config, inputs.config.decode, inputs.model("generator")
    together = config.model == "rag_token"
    questions, documents = _questions(inputs), most_documents(config)

    def placed(tree: Any) -> Any:
        return abstract_with_sharding(inputs.one_device, tree)

    graph, params, prompts = model.graphdef, placed(model.abstract_params), _prompts(inputs)
    # a memory is passed by its leaves: it is checked to hold arrays, which shapes are not
    memory = placed(jax.eval_shape(lambda *given: jax.tree.leaves(prefill_documents(graph, *given)), params, *prompts))
    count = decode.num_beams if together else documents * decode.num_beams
    candidates = [[((0,) * decode.max_new_tokens, False)] * count] * questions
    answers = placed(pad_answers(candidates, SPECIAL, decode.max_new_tokens))

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

    @jax.jit
    def search_exactly(params: Params, memory: list[Any]) -> Any:
        rows = jnp.arange(searches["marginal"]).reshape(-1, documents)
        prior, none = jnp.zeros(rows.shape), jnp.zeros(len(rows))
        how = search_settings(decode, SPECIAL, decode.max_beams)
        return search_marginal(graph, params, DocumentMemory(*memory), rows, prior, none, none, how, SPECIAL, together)

    searches, most = _searches(inputs), program_temporaries(prefill_documents, graph, params, *placed(prompts))
    most = max(most, program_temporaries(score, params, memory, *answers))
    for name, program in (("candidates", search), ("marginal", search_exactly)):
        if name in searches:
            most = max(most, program_temporaries(program, params, memory))
    if decode.passage_cache_gib and not model.config.encoder_decoder:
        rows = placed(jax.ShapeDtypeStruct((questions * documents,), jnp.int32))
        joined = rows, *placed(prompts), rows, QUESTION_TOKENS
        pool = memory[:2]  # a slot for each prompt
        most = max(most, program_temporaries(join_question, graph, inputs.one_device, params, pool, *joined))
    how = f"{questions_text(questions)}, at most {count} distinct candidates each"
    return most, f"XLA's analysis ({inputs.device_kind}): {how}"
