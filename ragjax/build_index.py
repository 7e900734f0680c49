"""`ragjax index`: read the corpus, tokenise it once, embed it, and make it searchable."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ragjax import factbook, factbook_facts
from ragjax.config import Config, Corpus, InputError
from ragjax.hub import Fetched, cache_folder, fetch, fingerprint_files, is_local
from ragjax.index import FAISS_FILE, MANIFEST, check_kind, embed_passages, open_index, write_index
from ragjax.mesh import enable_compilation_cache
from ragjax.passages import FORMATS, Passage, PassageStore, partial_folder, read_passages, write_jsonl, write_store
from ragjax.progress import progress_bar, terminal
from ragjax.rag import Rag, encode, open_rag, passage_text
from ragjax.text import Tokenizer, buckets_up_to


def build_index(config: Config) -> Path:
    """Builds the folder `index.folder`: passages, the generator's tokens, embeddings, search structure, manifest.

    An index of the same contents that is there already stays; another one is replaced only once the new one is whole.
    Raises `InputError` for bad input.
    """
    _check_corpus(config.corpus)
    enable_compilation_cache(cache_folder() / "xla")
    rag = open_rag(config)
    check_kind(config.index.kind, rag.passage_encoder.config.embedding_width)
    corpus = fetch(config.corpus.source)
    content = _content(config, corpus)
    folder = Path(config.index.folder)
    if _is_current(folder, rag, content):
        terminal.print(f"{folder} holds this index already; delete it to build it anew", soft_wrap=True)
        return folder
    with _replacing(folder) as new:
        _build(rag, corpus, content, new)
    return folder


def _check_corpus(corpus: Corpus) -> None:
    """Raises `InputError` for a corpus that should lie on this machine and does not, before any model is fetched."""
    if is_local(corpus.source) and not Path(corpus.source).expanduser().exists():
        raise InputError(f"corpus.source: {corpus.source}: no such file; expected {FORMATS[corpus.format]}")


def _content(config: Config, corpus: Fetched) -> str:
    """What the passages are made from: the files' contents, and the code that turns the Factbook into passages."""
    files = [corpus.path] if corpus.path.is_file() else [p for p in corpus.path.rglob("*") if p.is_file()]
    content = fingerprint_files(files) if corpus.pin == "local" else corpus.pin
    if config.corpus.format != "factbook":
        return content
    return f"{content} {fingerprint_files([Path(str(m.__file__)) for m in (factbook, factbook_facts)])}"


def _is_current(folder: Path, rag: Rag, content: str) -> bool:
    try:
        index = open_index(folder, rag.fingerprints)
        PassageStore.open(folder)
    except InputError:
        return False
    return index.manifest.get("corpus", {}).get("content") == content


def _build(rag: Rag, corpus: Fetched, content: str, folder: Path) -> None:
    config, params = rag.config, rag.passage_encoder.read()
    passages = _passages(config, corpus, folder)

    with progress_bar("tokenise", None, "passages") as advance:
        summary = write_store(
            folder,
            passages,
            rag.generator_tokenizer.encode,
            lambda passage: passage_text(config.generator.passage, passage),
            advance,
        )
    store = PassageStore.open(folder)
    rows = _encoder_rows(rag, store)
    with progress_bar("embed", len(store), "passages") as advance:
        embed_passages(
            lambda tokens, mask: encode(rag.passage_encoder.graph, params, tokens, mask),
            rows,
            width_buckets=buckets_up_to(config.retriever.passage_tokens),
            batch_size=config.index.batch_size,
            pad_id=rag.passage_tokenizer.pad_id,
            dtype=config.index.dtype,
            path=folder / "embeddings.npy",
            progress=advance,
        )
    write_index(
        folder,
        folder / "embeddings.npy",
        config.index.kind,
        config.index.dtype,
        {
            "corpus": {
                "source": corpus.source,
                "pin": corpus.pin,
                "content": content,
                "fingerprint": summary.fingerprint,
            },
            "generator_tokens": summary.tokens,
            "fingerprints": rag.fingerprints,
        },
    )


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`: its files move there once they are all written, and go if anything fails."""
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another index.folder")
    with partial_folder(folder) as new:
        yield new
        for old in (MANIFEST, FAISS_FILE):  # without its manifest a folder is known to be incomplete
            (folder / old).unlink(missing_ok=True)
        for path in sorted(new.rglob("*"), key=lambda path: (path.name == MANIFEST, path)):
            target = folder / path.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                os.replace(path, target)


def _passages(config: Config, corpus: Fetched, folder: Path) -> Iterable[Passage]:
    """The corpus as a stream; the Factbook brings its questions, which are written beside the index."""
    c = config.corpus
    if c.format != "factbook":
        return read_passages(corpus.path, c.format, c.limit)
    passages, questions = factbook.build_factbook(corpus.path, c.passage_words, config.seed, c.categories)
    if c.limit is not None:
        passages = passages[: c.limit]
        kept = {passage.id for passage in passages}
        questions = {
            split: [q for q in records if kept.intersection(q["passages"])] for split, records in questions.items()
        }
    if not passages:
        raise InputError(f"{corpus.path}: no passages were found in this Factbook")
    (folder / "questions").mkdir(parents=True, exist_ok=True)
    for split, records in questions.items():
        write_jsonl(folder / "questions" / f"{split}.jsonl", records)
    return passages


@dataclass(frozen=True)
class TokenRows(Sequence[np.ndarray]):
    """N rows of token ids in one array: lists of Python integers would take some 100 GB for 21 million passages."""

    tokens: np.ndarray
    ends: Int[np.ndarray, " N_plus_1"]

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: Any) -> Any:
        return self.tokens[self.ends[i] : self.ends[i + 1]]


def passage_rows(tokenizer: Tokenizer, template: str, passages: Sequence[Passage], longest: int) -> list[list[int]]:
    """Passages as the retriever reads them, at most `longest` tokens each.

    A special token in the template is one, as in DPR's "{title} [SEP] {text}"; in a passage it never is.
    """
    columns: list[list[list[int]]] = []
    for piece in tokenizer.split_special(template):
        if isinstance(piece, int):
            columns.append([[piece]] * len(passages))
        else:
            columns.append(tokenizer.encode([passage_text(piece, passage) for passage in passages]))
    before, after = tokenizer.frame
    room = longest - len(before) - len(after)
    return [[*before, *[t for part in parts for t in part][:room], *after] for parts in zip(*columns, strict=True)]


def _encoder_rows(rag: Rag, store: PassageStore) -> TokenRows:
    """Every passage as the retriever reads it."""
    settings, tokenizer = rag.config.retriever, rag.passage_tokenizer
    tokens = array("H" if tokenizer.vocab_size <= 2**16 else "i")
    ends = array("q", [0])
    for start in range(0, len(store), 1024):
        chunk = [store[i] for i in range(start, min(start + 1024, len(store)))]
        for row in passage_rows(tokenizer, settings.passage, chunk, settings.passage_tokens):
            tokens.extend(row)
            ends.append(len(tokens))
    return TokenRows(np.frombuffer(tokens, tokens.typecode), np.frombuffer(ends, np.int64))
