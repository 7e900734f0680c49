"""Embedding passages for an index beside transformers on torch: the same weights and passages.

    python -m benchmarks.encoding configs/factbook.yaml

The configuration's retriever and passages, texts to embeddings, tokenizers included. transformers takes batches of the
same size in the order of the corpus, each padded to its longest passage, and again sorted by length, as ragjax does.
All take turns. Needs the index and the extra `bench`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from benchmarks.report import (
    Stage,
    flops_of,
    make_console,
    or_input_error,
    peak,
    show,
    timed,
    times_as_fast,
    torch_place,
    write,
)
from ragjax.checkpoints.hub import checkpoint_folder, fetch
from ragjax.config import load_config
from ragjax.data.prompt import passage_text
from ragjax.errors import InputError
from ragjax.parallel.mesh import local_mesh
from ragjax.parallel.sharding import put_global, replicated
from ragjax.retrieval.encoder import embed_in_memory, encode
from ragjax.runs.restore import load_artifacts

os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--passages", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write encoding.md and encoding.png")
    options = parser.parse_intermixed_args()
    import torch
    from transformers import AutoModel, AutoTokenizer

    config = load_config(options.config, options.overrides)
    settings, size = config.retriever, config.index.batch_size
    rag, _, store = load_artifacts(config)
    if (rag.passage_encoder.config.pooling, rag.passage_encoder.config.normalize) != ("mean", True):
        raise InputError("retriever.pooling and normalize: here they are compared as mean and true")
    passages = [store[int(i)] for i in np.linspace(0, len(store) - 1, options.passages).astype(int)]
    params = put_global(rag.passage_encoder.load_params(), replicated(local_mesh()))
    folder = checkpoint_folder(fetch(settings.source).path)
    place_there = torch_place(config.dtype)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval().to(**place_there)
    texts = [passage_text(rag.passage_template, passage) for passage in passages]

    def rows() -> list:
        return rag.tokenize_passages(passages)

    def by_ragjax() -> np.ndarray:
        return embed_in_memory(rag, params, rows())

    def by_transformers(by_length: bool) -> np.ndarray:
        order = np.argsort([-len(text) for text in texts], kind="stable") if by_length else np.arange(len(texts))
        found = np.zeros((len(texts), rag.passage_encoder.config.embedding_dim), np.float32)
        with torch.no_grad():
            for start in range(0, len(order), size):
                ids = order[start : start + size]
                given = tokenizer(
                    [texts[i] for i in ids],
                    padding=True,
                    truncation=True,
                    max_length=settings.max_passage_tokens,
                    return_tensors="pt",
                ).to(place_there["device"])
                states, mask = model(**given).last_hidden_state, given["attention_mask"][..., None]
                pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
                found[ids] = torch.nn.functional.normalize(pooled, dim=1).float().cpu().numpy()
        return found

    programs: dict[str, Callable[[], np.ndarray]] = {
        "ragjax": by_ragjax,
        "transformers": partial(by_transformers, False),
        "transformers, sorted": partial(by_transformers, True),
    }
    values = {name: program() for name, program in programs.items()}  # compiles
    stages = {name: Stage() for name in programs}
    for _ in range(options.repeats):
        for name, program in programs.items():
            stages[name].seconds.append(timed(program)[0])
    width, count = settings.max_passage_tokens, sum(map(len, rows()))
    shape = jax.ShapeDtypeStruct((1, width), np.int32), jax.ShapeDtypeStruct((1, width), np.bool_)
    flops = flops_of(partial(encode, rag.passage_encoder.graphdef), params, *shape) / width * count
    for stage in stages.values():
        stage.flops = flops
    console, most = make_console(), peak(config.dtype)
    console.print(
        f"{settings.source}: {len(passages)} passages of {count / len(passages):.0f} tokens, batches of {size}; "
        f"{jax.devices()[0]}, {config.dtype}, {most / 1e9:.0f} GFLOP/s\n",
        soft_wrap=True,
    )
    show(console, "embedding passages", stages, "ragjax", most)
    apart = max(np.abs(of - values["ragjax"]).max() for of in values.values())
    console.print(f"largest difference of a number: {apart:.1e}")
    for name in list(programs)[1:]:
        console.print(f"ragjax: {times_as_fast(stages[name], stages['ragjax']):.1f} times as fast as {name}")
    write(console, options.folder, "encoding", {"embedding passages": stages})


if __name__ == "__main__":
    or_input_error(main)
