"""How much less the generator reads with a passage cache, and whether the answers stay the same.

    python -m benchmarks.passage_cache configs/factbook.yaml decode.passage_cache_gib=1 --questions 60

The first questions of the test split are answered thoroughly in batches, as `ragjax evaluate` does. Each batch is read
whole, and then through the cache. There are two passes over the questions: the cache begins the first with nothing in
it, and the second with all passages that it has room for. Programs are compiled before.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from rich.progress import track

from benchmarks.report import Stage, make_console, or_input_error, peak, show, timed, write
from ragjax.answerer import Answerer, open_answerer
from ragjax.answering.batch_answerer import repeat_to_size
from ragjax.config import load_config
from ragjax.data.question_batch import question_batch, tokenize_prompts, tokens_before_question
from ragjax.data.questions import read_questions
from ragjax.decoding.decode import decode_rag_sequence
from ragjax.decoding.propose import prefill_documents
from ragjax.models.kv_cache import DocumentMemory
from ragjax.parallel.sharding import shard_batch
from ragjax.resources import size_text
from ragjax.retrieval.passage_cache import PassageCacheStatistics, PassageKVCache
from ragjax.retrieval.retrieve import RetrievalResult

PASSES = ("first pass", "second pass")


class Batch:
    """Questions with their documents, ready to be read."""

    def __init__(self, answerer: Answerer, cache: PassageKVCache, questions: list[str], size: int) -> None:
        """Filled up to `size`."""
        rag, graph, params = answerer.rag, answerer.rag.generator.graphdef, answerer.params["generator"]
        texts = repeat_to_size(questions, size)
        batch = question_batch(rag.tokenizers, texts)
        self.answerer, self.count = answerer, len(questions)
        self.retrieved: RetrievalResult = answerer.retrieve(batch, texts)
        source, mask = tokenize_prompts(rag.tokenizers, answerer.store, batch, self.retrieved.ids)
        lengths = tokens_before_question(rag.tokenizers, batch, mask)
        prompts = shard_batch(answerer.mesh, (source, mask), len(source))
        self.whole: Callable[[], DocumentMemory] = lambda: prefill_documents(graph, params, *prompts)
        self.cached = lambda: cache.read(source, mask, self.retrieved.ids.reshape(-1), lengths)

    def answers(self, memory: DocumentMemory) -> list[tuple[tuple[int, ...], float]]:
        """The thorough answers, and log p(y|x) of each, nats."""
        rag, params = self.answerer.rag, self.answerer.params["generator"]
        settings = rag.config.decode.replace(mode="thorough")
        graph, prior = rag.generator.graphdef, self.retrieved.log_prior
        found = decode_rag_sequence(graph, params, memory, prior, settings, rag.special)
        best = [candidates.best("thorough")[0] for candidates in found]
        return [(f.tokens[c], float(f.marginal("thorough")[c])) for f, c in zip(found, best, strict=True)][: self.count]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.passage_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--questions", type=int, default=60, help="of the test split")
    parser.add_argument("--folder", type=Path, help="where to write passage_cache.md and passage_cache.png")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, ["decode.passage_cache_gib=1", *options.overrides])
    answerer, console = open_answerer(config), make_console()
    cache = answerer.passage_cache
    if cache is None:
        parser.error("with this model or prompt there is no passage cache")
    texts = [question.question for question in read_questions(Path(config.questions.test))][: options.questions]
    size = config.evaluate.batch_size
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    batches = [Batch(answerer, cache, part, size) for part in parts]
    for batch in track(batches, "compile", console=None, disable=not console.is_terminal):
        for read in (batch.whole, batch.cached, batch.cached):
            batch.answers(read())
    cache.clear()
    stages = {name: Stage() for name in ("thorough", "thorough without reading", "reading whole", *PASSES)}
    counts, same, apart = {}, 0, 0.0
    for name in PASSES:
        cache.statistics = PassageCacheStatistics()
        for batch in track(batches, name, console=None, disable=not console.is_terminal):
            reading, memory = timed(batch.whole)
            stages["reading whole"].seconds.append(reading)
            decoding, answers = timed(batch.answers, memory)
            stages["thorough without reading"].seconds.append(decoding)
            stages["thorough"].seconds.append(reading + decoding)
            reading, memory = timed(batch.cached)
            stages[name].seconds.append(reading)
            for (one, logp), (other, again) in zip(answers, batch.answers(memory), strict=True):
                same, apart = same + (one == other), max(apart, abs(logp - again))
        counts[name] = dataclasses.replace(cache.statistics)
    d = config.decode
    console.print(
        f"{config.generator.source}, step {answerer.step}: k = {d.num_docs}, {d.num_beams} beams, {len(texts)} "
        f"questions in batches of {size}; {jax.devices()[0]}, {config.dtype}; a cache of {cache.slots} passages of "
        f"{cache.width} tokens, {size_text(cache.size)}\n",
        soft_wrap=True,
    )
    show(console, "a batch", stages, "reading whole", peak(config.dtype))
    whole, rest = (np.array(stages[name].seconds) for name in ("reading whole", "thorough without reading"))
    for i, name in enumerate(PASSES):
        here, own, of = slice(i * len(batches), (i + 1) * len(batches)), np.array(stages[name].seconds), counts[name]
        reading, answering = np.median(whole[here] / own), np.median((whole + rest)[here] / (own + rest[here]))
        console.print(
            f"{name}: {of.hit_rate:.1%} of {of.passages} passages were there, {of.tokens_saved:.1%} of {of.tokens} "
            f"tokens not read; reading is {reading:.2f} times as fast, answering {answering:.2f} times (medians)",
            soft_wrap=True,
        )
    console.print(f"the same answers: {same} of {2 * len(texts)}; at most {apart:.1e} nats apart")
    write(console, options.folder, "passage_cache", {"a batch": stages})


if __name__ == "__main__":
    or_input_error(main)
