"""What follows from several keys together."""

from __future__ import annotations

from typing import Any

from ragjax.config.keys import Config, structure
from ragjax.errors import InputError


def drops_out(config: Config) -> bool:
    """Whether a training step draws dropout."""
    return max(config.train.dropout, config.train.lora.dropout if config.train.lora.rank else 0.0) > 0


def adapted_maps(config: Config, model: str) -> tuple[str, ...] | None:
    """The linear maps of a model that get adapters, () for all of its layers'; None where the model has none."""
    if config.train.lora.rank is None:
        return None
    named = [target.partition(".") for target in config.train.lora.targets]
    maps = [name for of, _, name in named if of == model]
    return None if not maps else () if "" in maps else tuple(maps)


def refreshes(config: Config) -> bool:
    """Whether the index is built anew during training, and not only at its end."""
    return config.refresh.every is not None or config.refresh.min_overlap is not None


def reads_corpus(config: Config) -> bool:
    """Whether a training step reads all passages, and not only those that were retrieved."""
    return config.train.fused_retrieval or config.retriever.prior == "corpus"


def answer_modes(config: Config) -> tuple[str, ...]:
    """The ways in which the configuration's model can answer."""
    if config.hf_compatible:
        return ("thorough", "closed_book")
    falls = config.decode.length_penalty == 0  # with every token, as proofs need it
    if config.model == "rag_token":
        return (*(("exact",) if falls else ()), "thorough", "closed_book")
    return (*(("exact", "thorough", "certified") if falls else ("thorough",)), "fast", "closed_book")


def check_mode(config: Config, mode: str | None) -> None:
    """Raises `InputError` for a mode in which the configuration's model cannot answer; None is its own."""
    modes = answer_modes(config)
    if mode is not None and mode not in modes:
        kind = f"model={config.model} hf_compatible={str(config.hf_compatible).lower()}"
        raise InputError(f"mode is {mode!r}; with {kind} expected one of {', '.join(modes)}")


def factbook_seed(config: Config) -> int:
    """What draws the Factbook's questions and their splits."""
    return config.seed if config.corpus.factbook.seed is None else config.corpus.factbook.seed


def index_settings(config: Config) -> dict[str, Any]:
    """What an index is built from; runs that agree in it can share one."""
    r, g = config.retriever, config.generator
    return {
        "corpus": config.corpus.model_dump(),
        "questions": factbook_seed(config) if config.corpus.format == "factbook" else None,
        "kind": (structure(config.index.kind), config.index.dtype),
        "encoder": (r.passage_encoder or r.source, r.pooling, r.normalize, r.passage_template, r.max_passage_tokens),
        "generator": (g.source, g.passage_template),
    }


def most_documents(config: Config) -> int:
    """The documents that answering retrieves for a question, those of BM25 included."""
    if rescores_as_hugging_face(config):
        return max(config.decode.num_docs, config.train.num_docs)
    return config.decode.num_docs + config.retriever.bm25_docs


def train_documents(config: Config) -> int:
    """The documents of each question in a training step, those of BM25 included; in contrastive training passages."""
    return config.train.num_docs + config.retriever.bm25_docs


def rescores_as_hugging_face(config: Config) -> bool:
    """Whether candidates are scored under the documents of training, as transformers' `generate(n_docs=…)` does."""
    return config.hf_compatible and config.model == "rag_sequence"
