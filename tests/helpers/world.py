"""A tiny made-up world for the tests: random models, thirty passages about capitals, and questions about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ragjax.checkpoints.random_init import write_random_checkpoint
from ragjax.commands.index import build_index
from ragjax.config import Config, load_config
from ragjax.data.passage_store import PassageStore
from ragjax.files import write_jsonl
from ragjax.rag import RagPipeline, load_pipeline
from ragjax.retrieval.index import MANIFEST, Index, open_index

LANDS = [first + last for first in "Ar Bel Cor Dun Es Fal".split() for last in "land mark nia ria stan".split()]
CAPITALS = [first + last for first in "Kes Lor Mar Nov Or Pel".split() for last in "bourg ton vik dam polis".split()]
SPLITS = {"train": slice(0, 20), "dev": slice(20, 25), "test": slice(25, 30)}

CONFIG = """\
output: {world}/run
corpus: {{source: {world}/passages.jsonl}}
questions: {{train: {world}/train.jsonl, dev: {world}/dev.jsonl, test: {world}/test.jsonl}}
retriever: {{source: {world}/retriever, logit_scale: 10.0, max_question_tokens: 64, max_passage_tokens: 64}}
index: {{path: {world}/index, batch_size: 16}}
generator: {{source: {world}/generator, max_prompt_tokens: 128, max_answer_tokens: 12,
  prompt_template: "{{passage}} {{question}}"}}
train: {{steps: 30, batch_size: 8, num_docs: 3, retriever_lr: 1e-3, generator_lr: 1e-3}}
decode: {{num_docs: 3, num_beams: 2, max_new_tokens: 6}}
evaluate: {{batch_size: 2}}
"""


def make_world(folder: Path) -> Path:
    """Writes both models, the passages, the questions and config.yaml into `folder`, and returns it."""
    write_random_checkpoint("bert", folder / "retriever", seed=1)
    write_random_checkpoint("llama", folder / "generator", seed=2)
    pairs = list(zip(LANDS, CAPITALS, strict=True))
    write_jsonl(
        folder / "passages.jsonl",
        ({"id": f"p{i}", "title": land, "text": f"Capital: {city}."} for i, (land, city) in enumerate(pairs)),
    )
    for split, part in SPLITS.items():
        questions = ({"question": f"Capital of {land}?", "answer": [city]} for land, city in pairs[part])
        write_jsonl(folder / f"{split}.jsonl", questions)
    (folder / "config.yaml").write_text(CONFIG.format(world=folder), encoding="utf-8")
    return folder


def shared_world(temporary: pytest.TempPathFactory) -> Path:
    """The one world of a test session, made when it is first asked for."""
    folder = temporary.getbasetemp() / "world"
    return folder if folder.exists() else make_world(folder)


def tiny_config(world: Path, **overrides: object) -> Config:
    """The world's configuration; `train__num_docs=2` overrides `train.num_docs`."""
    dotted = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    return load_config(world / "config.yaml", dotted)


def build(config: Config) -> Path:
    """Builds the index and returns its folder."""
    return build_index(config)


def open_world(config: Config) -> tuple[RagPipeline, Index, PassageStore]:
    """The models, the index, which is built where there is none, and the passages."""
    rag, folder = load_pipeline(config), Path(config.index.path)
    if not (folder / MANIFEST).exists():
        build(config)
    return rag, open_index(folder, rag.fingerprints), PassageStore.open(folder)
