"""Whatever a file holds, its reader raises `InputError` naming it, or reads it: mutated files, by hypothesis.

One kind of mutation works on bytes (flipped, cut, put in, doubled, replaced, in another encoding), the other on the
JSON inside (a value becomes another type, huge, deep, not finite, or goes away). `make test` makes few of each, always
the same; RAGJAX_MUTATIONS=2000 makes so many a reader, other ones each time.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import faiss
import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from ragjax.checkpoints.adapters import merge_peft, peft_base
from ragjax.checkpoints.gguf import read_gguf
from ragjax.checkpoints.pretrained import open_encoder, open_generator
from ragjax.checkpoints.random_init import write_random_checkpoint
from ragjax.checkpoints.safetensors import SafetensorsReader, write_safetensors
from ragjax.checkpoints.sentence_transformers import resolve_encoding
from ragjax.checksums import write_sealed
from ragjax.config import Corpus, Retriever
from ragjax.data import chat_template
from ragjax.data.corpus import CorpusReader, Passage
from ragjax.data.passage_store import PassageStore, shard_folder, write_store
from ragjax.data.prompt import make_prompt
from ragjax.data.questions import read_questions
from ragjax.data.tokenizer import Tokenizer
from ragjax.errors import InputError
from ragjax.evaluation.report_page import report_page
from ragjax.evaluation.run_results import read_run_results
from ragjax.rag import _special_tokens
from ragjax.retrieval import bm25
from ragjax.retrieval.building.made_of import read_made_of
from ragjax.retrieval.index import MADE_OF, open_index, write_index
from ragjax.retrieval.vector_files.source import open_vectors
from ragjax.runs.metrics_log import _lines_until
from ragjax.runs.run_dir import _check_same_inputs

ENCODER = Retriever(source="m")
MUTATIONS = int(os.environ.get("RAGJAX_MUTATIONS", "0"))
MEMORY, SECONDS = 4 << 30, 120  # what a reader of such small files may take beyond what is there, and how long
FINGERPRINTS = {"encoder": "sha256:e"}
BUILT_OF = {"content": "sha256:c"}
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# -- mutations

# of JSON, as it is written: json.dumps could not write some of these
FRAGMENTS = (
    'null true false 0 -1 1 2 3 1.5 -0.5 NaN Infinity 1e999 1e30 4294967296 1000000000 99999999999999999999 "" "x" '
    '"32" "\\ud800" "\\u0000" "{text}" [] {} [1] ["a"] [null] {"a":1} [[[]]] {"content":"x"} {"content":[]}'
).split()
FRAGMENTS += ["9" * 5000, "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, '"' + "x" * 100_000 + '"']
GONE, HERE = "gone", "\x00here\x00"

Dump = Callable[[Any], bytes]
Split = Callable[[bytes], tuple[Any, Callable[[Dump], bytes]]]  # the JSON in a file, and the file around another one


def as_json(data: bytes) -> tuple[Any, Callable[[Dump], bytes]]:
    value = json.loads(data)
    return value, lambda dump: dump(value)


def as_lines(data: bytes) -> tuple[Any, Callable[[Dump], bytes]]:
    values = [json.loads(line) for line in data.splitlines()]
    return values, lambda dump: b"".join(dump(value) + b"\n" for value in values)


def as_safetensors(data: bytes) -> tuple[Any, Callable[[Dump], bytes]]:
    [size] = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])

    def join(dump: Dump) -> bytes:
        text = dump(header)
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return header, join


def as_gguf(data: bytes) -> tuple[Any, Callable[[Dump], bytes]]:
    """Its metadata, which has types of its own; what these cannot hold is left out."""
    metadata = gguf_metadata()

    def join(dump: Dump) -> bytes:
        try:
            given = json.loads(dump(metadata))
            return gguf_bytes(given if isinstance(given, dict) else {})
        except (ValueError, RecursionError, struct.error, OverflowError, TypeError, AttributeError):
            return data

    return metadata, join


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value, those near the top first."""
    found: list[tuple[Any, Any]] = []
    level = [value]
    while level:
        here = [(of, key) for of in level for key in (list(of) if isinstance(of, dict) else range(len(of)))]
        found += here
        level = [of[key] for of, key in here if isinstance(of[key], dict | list)]
    return found


def mutate_json(split: Split, data: bytes, at: float, fragment: str) -> bytes:
    """The file with one value replaced, or taken away."""
    value, join = split(data)
    inside = places(value)
    if not inside:
        return data
    container, key = inside[int(at**2 * len(inside))]  # more often those near the top: there are fewer of them
    if fragment == GONE:
        del container[key]
    else:
        container[key] = HERE
    marker = json.dumps(HERE).encode()
    return join(lambda value: json.dumps(value).encode().replace(marker, fragment.encode()))


@dataclass(frozen=True)
class Edit:
    """Of bytes: what, where (0 … 1), over how many, and with what."""

    kind: str
    at: float
    count: int
    new: bytes

    def apply(self, data: bytes) -> bytes:
        i = int(self.at * len(data))
        match self.kind:
            case "flip":
                return data[:i] + bytes([data[i] ^ 1 << self.count % 8]) + data[i + 1 :] if i < len(data) else data
            case "cut":
                return data[:i]
            case "insert":
                return data[:i] + self.new + data[i:]
            case "remove":
                return data[:i] + data[i + self.count :]
            case "double":
                return data[: i + self.count] + data[i:]
            case "replace":
                return data[:i] + self.new + data[i + len(self.new) :]
            case "run":
                return data[:i] + self.new[:1] * self.count + data[i + self.count :]
            case _:
                return data.decode("utf-8", "replace").encode(self.kind)


EDITS = st.builds(
    Edit,
    st.sampled_from("flip cut insert remove double replace run flip replace utf-16 utf-8-sig".split()),
    st.floats(0, 1) | st.floats(0, 0.05),  # headers are at the beginning
    st.integers(1, 64),
    st.binary(min_size=1, max_size=12)
    | st.sampled_from([b"\xff" * 8, bytes(8), b"\r", b"\x00", b"\n", b'"', b"\t", b"\xed\xa0\x80", b"{{", b"%}"]),
)


# -- valid files


def gguf_metadata() -> dict[str, Any]:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "He"]
    return {
        "general.architecture": "llama",
        "llama.embedding_length": 32,
        "llama.block_count": 1,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.feed_forward_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.context_length": 1024,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT,
        "tokenizer.ggml.merges": ["H e"],
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.tokens": tokens,
    }


def gguf_bytes(metadata: dict[str, Any]) -> bytes:
    """A one-layer Llama with its tokenizer, whatever the metadata say."""
    data = b"GGUF" + struct.pack("<IQQ", 3, 11, len(metadata))
    for key, value in metadata.items():
        data += gguf_text(key) + gguf_value(value)
    shapes = {"token_embd": (260, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_output": (32, 32)} | {f"blk.0.attn_{x}": (16, 32) for x in "kv"}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    offset = 0
    for name, shape in shapes.items():
        data += gguf_text(f"{name}.weight") + struct.pack("<I", len(shape))
        data += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", 0, offset)
        offset += 4 * int(np.prod(shape))
    data += bytes(-len(data) % gguf.GGUF_DEFAULT_ALIGNMENT)
    return data + np.random.default_rng(0).normal(0, 0.02, offset // 4).astype(np.float32).tobytes()


def gguf_text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_value(value: Any) -> bytes:
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        items = [gguf_value(item) for item in value]
        kind = items[0][:4] if items else struct.pack("<I", kinds.UINT32)
        return struct.pack("<I", kinds.ARRAY) + kind + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)
    if isinstance(value, str):
        return struct.pack("<I", kinds.STRING) + gguf_text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", kinds.BOOL, value)
    if isinstance(value, float):
        return struct.pack("<If", kinds.FLOAT32, value)
    return struct.pack("<Ii", kinds.INT32, value)


def write_index_of_two_shards(folder: Path) -> None:
    passages = [Passage(str(i), f"title {i}", f"the text of passage {i}") for i in range(6)]
    for number in range(2):
        shard = shard_folder(folder, number)
        part = passages[3 * number : 3 * number + 3]
        write_store(shard, part, lambda texts: [list(t.encode()) for t in texts], lambda passage: passage.text)
        np.save(shard / "embeddings.npy", np.random.default_rng(number).normal(size=(3, 8)).astype(np.float32))
    about = {"fingerprints": FINGERPRINTS, "corpus": {"fingerprint": "sha256:c"}}
    write_index(folder, "exact", "float32", about)
    assert bm25.build_bm25(folder, "sha256:c")


def write_run(folder: Path) -> None:
    """As an evaluation leaves it, as small as can be."""
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "output: run\ncorpus: {source: c}\nretriever: {source: r}\ngenerator: {source: g}\n"
    )
    (folder / "train.jsonl").write_text('{"step": 1, "loss": 2.5, "recall": 0.5}\n{"step": 2, "loss": 2.25}\n')
    score = {"exact_match": 1.0, "f1": 1.0, "rouge_l": 1.0, "contains": 1.0, "equal_as_nothing": False}
    measured = {
        "step": 2,
        "questions": 1,
        "answered": 1,
        "recall@1": 1.0,
        "top_k_mass": 0.5,
        "mass_over_k": [0.5],
        "recall_over_k": [1.0],
        "gold_nll": 0.5,
        "calibration_error": 0.25,
        "exact": score | {"exact_match_interval": [1.0, 1.0], "equal_as_nothing": 0, "proved": {"top_k": 1.0}},
        "thorough": score | {"exact_match_interval": None, "equal_as_nothing": 0},
        "exact_and_thorough_differ": {"questions": 1, "exact_right": 1, "thorough_right": 0},
    }
    report = {"split": "test", "decode": {"num_docs": 1}, "models": {"trained": measured}}
    (folder / "metrics.json").write_text(json.dumps(report))
    document = {"id": "p", "passage": 0, "title": "T", "right": True, "prior": 1.0, "p_answer": 0.5, "posterior": 1.0}
    proposed = {
        "text": "A",
        "finished": True,
        "thorough": 0.5,
        "bounds": [0.5, 0.75],
        "given": [0.5],
        "beams": {"0": 0.5},
    }
    proof = {
        "proved": {"top_k": True, "corpus": None},
        "documents_read": 1,
        "steps": 2,
        "probability_bounds": [0.5, 0.75],
    }
    modes = {"exact": {"p_answer": 0.5, "finished": True} | proof, "thorough": {"p_answer": 0.5, "finished": True}}
    line = {"model": "trained", "line": 1, "id": "q", "question": "Who?", "gold": ["A"], "answer": "A", "p_answer": 0.5}
    line |= {"answers": {"exact": "A", "thorough": "B"}, "scores": {"exact": score, "thorough": score}, "modes": modes}
    line |= {"gold_nll": 0.5, "mass_outside": 0.5, "proposed": [proposed], "documents": [document]}
    (folder / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "passages.jsonl").write_text('{"passage": 0, "id": "p", "title": "T", "text": "A text"}\n')
    at_k = {"k": 1, "answered": 0.5, "mass": {"mean": 0.5, "median": 0.5}}
    (folder / "index_report.json").write_text(json.dumps({"k": [at_k, at_k | {"k": 2}]}))


def write_all(folder: Path) -> None:
    """One folder for each group of readers."""
    folder.mkdir(exist_ok=True)
    write_run(folder / "run")
    data = folder / "data"
    data.mkdir()
    (data / "passages.jsonl").write_text(
        '{"id": "a", "title": "T", "text": "some \\u00e9 text"}\n{"id": 2, "text": "more", "extra": [1, {"b": null}]}\n'
    )
    (data / "passages.tsv").write_text('id\ttext\ttitle\n1\t"a ""quoted"" word"\tT\n2\tplain text\tTitle\n')
    (data / "questions.jsonl").write_text(
        '{"question": "Who?", "answer": ["A", "B"], "id": "q"}\n{"question": "é?", "answer": "C", "passages": ["a"]}\n'
    )
    rows = [{"id": str(i), "title": "T", "text": f"the text of passage {i}", "year": i} for i in range(3)]
    (data / "array.json").write_text(json.dumps(rows, indent=1))
    (data / "packed.jsonl").write_bytes(gzip.compress(b'{"id": "a", "contents": "T\\nsome text"}\n', mtime=0))
    (data / "packed.tsv").write_bytes(zstd.compress(b"1\tsome text\tT\n2\tother text\tU\n"))
    (data / "lines.csv").write_text('id,text\n1,"two\nlines"\n2,one\n')
    pq.write_table(pa.Table.from_pylist(rows), data / "rows.parquet")
    with pa.ipc.new_stream(str(data / "rows.arrow"), pa.Table.from_pylist(rows).schema) as stream:
        stream.write_table(pa.Table.from_pylist(rows))
    (data / "squad.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": SQUAD}]}]}))
    (data / "qa.tsv").write_text("who?\t['a', \"b\"]\nwhy?\tbecause\n")
    (data / "train.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n')
    (data / "manifest.json").write_text(
        json.dumps({"fingerprints": {"corpus": "c"}, "history": [{"step": 3, "train.steps": [3, 5]}]})
    )
    scan = {"count": 6, "fingerprint": "sha256:f", "size": 100}
    write_sealed(data / MADE_OF, {"made_of": BUILT_OF, "scan": scan, "plan": {"shards": [4, 2]}})
    vectors, ids = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32), np.array(list("abcdef"))
    np.save(data / "vectors.npy", vectors)
    np.save(data / "vectors_ids.npy", ids)
    np.savez(data / "named.npz", embeddings=vectors, ids=ids)
    table = pa.table({"id": ids.tolist(), "embeddings": list(vectors)})
    pq.write_table(table, data / "vectors.parquet", row_group_size=4)
    with pa.ipc.new_stream(str(data / "vectors.arrow"), table.schema) as stream:
        stream.write_table(table)
    for name, kind in (("flat", "IDMap,Flat"), ("clusters", "IDMap,IVF2,Flat")):
        index = faiss.index_factory(8, kind, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add_with_ids(vectors, np.arange(6))
        faiss.write_index(index, str(data / f"{name}.faiss"))
    for family in ("bert", "llama", "bart", "t5"):
        write_random_checkpoint(family, folder / family)
    settings = json.loads((folder / "llama" / "config.json").read_text())
    settings |= {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rope_scaling": None}
    settings |= {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}
    settings["rope_parameters"] |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    (folder / "llama" / "config.json").write_text(json.dumps(settings))
    ends = {"eos_token_id": [2, 0], "bos_token_id": 1, "pad_token_id": 0}
    (folder / "llama" / "generation_config.json").write_text(json.dumps(ends))
    names = {"eos_token": {"content": "<|im_end|>", "special": True}, "pad_token": "<|endoftext|>"}
    (folder / "llama" / "special_tokens_map.json").write_text(json.dumps(names))
    named = json.loads((folder / "llama" / "tokenizer_config.json").read_text())
    named |= {"chat_template": [{"name": "default", "template": CHAT}], "add_bos_token": True}
    (folder / "llama" / "tokenizer_config.json").write_text(json.dumps(named))
    tensors = json.loads((folder / "bart" / "config.json").read_text())
    (folder / "bart" / "config.json").write_text(json.dumps(tensors | {"architectures": ["BartModel"]}))
    header, _ = as_safetensors((folder / "t5" / "model.safetensors").read_bytes())
    weights = {"weight_map": {name: "model.safetensors" for name in header if name != "__metadata__"}}
    (folder / "t5" / "model.safetensors.index.json").write_text(json.dumps(weights))
    peft = folder / "peft"
    peft.mkdir()
    rng, module = np.random.default_rng(0), "base_model.model.model.layers.0.mlp.up_proj"
    shapes = {"A": (2, settings["hidden_size"]), "B": (settings["intermediate_size"], 2)}
    adapters = {f"{module}.lora_{name}.weight": rng.normal(size=of).astype(np.float32) for name, of in shapes.items()}
    write_safetensors(peft / "adapter_model.safetensors", adapters)
    of_adapters = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": True, "use_rslora": False}
    of_adapters |= {"base_model_name_or_path": str(folder / "llama"), "revision": None, "rank_pattern": {}}
    (peft / "adapter_config.json").write_text(json.dumps(of_adapters))
    old = folder / "old"
    old.mkdir()
    (old / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s"]))
    (old / "config.json").write_text(json.dumps({"model_type": "dpr"}))
    (old / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "DPRQuestionEncoderTokenizer", "sep_token": "[SEP]", "pad_token": "[PAD]"})
    )
    chat = folder / "chat"
    chat.mkdir()
    (chat / "tokenizer.json").write_bytes((folder / "llama" / "tokenizer.json").read_bytes())
    (chat / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (chat / "chat_template.jinja").write_text(CHAT)
    (folder / "gguf").mkdir()
    (folder / "gguf" / "model.gguf").write_bytes(gguf_bytes(gguf_metadata()))
    write_index_of_two_shards(folder / "index")
    sentences = folder / "sentences"
    (sentences / "1_Pooling").mkdir(parents=True)
    kinds = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in MODULES.items()]
    (sentences / "2_Dense").mkdir()
    dense = {"in_features": 4, "out_features": 2, "bias": False, "activation_function": "torch.nn.Tanh"}
    (sentences / "2_Dense" / "config.json").write_text(json.dumps(dense))
    (sentences / "modules.json").write_text(json.dumps(kinds))
    pooling = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (sentences / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    about = {"prompts": {"query": "", "document": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    (sentences / "config_sentence_transformers.json").write_text(json.dumps(about))


SQUAD = [
    {"id": 1, "question": "who?", "answers": [{"text": "a", "answer_start": 1}]},
    {"id": "2", "input": "why?", "output": [{"answer": "b"}, {"provenance": []}]},
    {"qid": "3", "query": "where?", "answer": {"value": "c", "aliases": ["d"]}},
]
MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": "3_Normalize"}


# -- readers: each reads what its file is for, as far as it is used


def read_corpus(folder: Path, name: str, **settings: Any) -> None:
    reader = CorpusReader([folder / name], Corpus(source="c", **settings))
    list(reader.read())
    reader.notices(), reader.count()


def read_encoder(folder: Path) -> None:
    open_encoder(folder, "mean", True).load_params()


def read_generator(folder: Path) -> None:
    read_gguf.cache_clear()
    file = folder / "model.gguf"
    checkpoint = file if file.is_file() else folder
    generator = open_generator(checkpoint)
    generator.load_params()
    _special_tokens(generator, read_tokenizer(checkpoint))


def read_adapters(folder: Path) -> None:
    peft_base(folder)
    for _ in merge_peft(folder, SafetensorsReader(folder.parent / "llama")):
        pass


def read_tokenizer(path: Path) -> Tokenizer:
    read_gguf.cache_clear()
    tokenizer = Tokenizer.load(path)
    make_prompt(tokenizer, "{passage}\n\nQuestion: {question}\nAnswer:", framed=True)
    for special in (True, False):
        [ids] = tokenizer.encode(["Hello worlds </s> 1984 東京"], special=special, longest=8)
        tokenizer.decode(ids)
    return tokenizer


def read_chat(folder: Path) -> None:
    make_prompt(read_tokenizer(folder), "chat")


def read_index(folder: Path) -> None:
    index = open_index(folder, FINGERPRINTS)
    assert index.version.startswith("sha256:") and index.embeddings.between(0, len(index)).shape[0] == len(index)
    index.vectors(np.arange(len(index))[None])
    store = PassageStore.open(folder)
    assert len(list(store)) == len(store)
    assert store.token_count >= 0 and store.longest >= 0
    store.token_rows(0, len(store), 5)
    for i in range(len(store)):
        store.tokens(i)


def read_report(folder: Path) -> None:
    """Whatever is read can be drawn, beside another run, too."""
    run = read_run_results(folder)
    report_page([run, run])


def read_bm25(folder: Path) -> None:
    with mock.patch.object(bm25, "CHECKED_AT_ONCE", 0):  # as of large files, whose contents are not compared
        bm25.open_bm25(folder, "sha256:c", 6).search(["the text of title 3"], 3)


def read_vectors(path: Path) -> None:
    source = open_vectors(str(path))
    assert source.ids is not None
    source.read(np.arange(len(source))[::-1]), list(source.ids())


@dataclass(frozen=True)
class Reader:
    file: str  # in the folder of all; its first part is what `read` is given
    read: Callable[[Path], Any]
    split: Split | None = as_json
    few: int = 12  # mutations of each kind in `make test`

    def __str__(self) -> str:
        return self.file


READERS = [
    Reader("data/passages.jsonl", lambda folder: read_corpus(folder, "passages.jsonl"), as_lines, 40),
    Reader("data/passages.tsv", lambda folder: read_corpus(folder, "passages.tsv"), None, 40),
    Reader("data/array.json", lambda folder: read_corpus(folder, "array.json", split_words=2, overlap_words=1), few=40),
    Reader("data/packed.jsonl", lambda folder: read_corpus(folder, "packed.jsonl", skip_empty=True), None, 40),
    Reader("data/packed.tsv", lambda folder: read_corpus(folder, "packed.tsv", quoting="none"), None, 40),
    Reader("data/lines.csv", lambda folder: read_corpus(folder, "lines.csv", quoting="multiline"), None, 40),
    Reader("data/rows.parquet", lambda folder: read_corpus(folder, "rows.parquet"), None, 40),
    Reader("data/rows.arrow", lambda folder: read_corpus(folder, "rows.arrow"), None, 40),
    Reader("data/squad.json", lambda folder: read_questions(folder / "squad.json"), few=40),
    Reader("data/qa.tsv", lambda folder: read_questions(folder / "qa.tsv"), None, 40),
    Reader("data/questions.jsonl", lambda folder: read_questions(folder / "questions.jsonl"), as_lines, 40),
    Reader("data/train.jsonl", lambda folder: _lines_until(folder / "train.jsonl", 9), as_lines, 40),
    Reader("data/manifest.json", lambda folder: _check_same_inputs(folder / "manifest.json", {"corpus": "c"}), few=40),
    *(Reader(f"run/{name}.jsonl", read_report, as_lines) for name in ("predictions", "passages", "train")),
    *(Reader(f"run/{name}.json", read_report) for name in ("metrics", "index_report")),
    Reader("data/vectors.npy", lambda folder: read_vectors(folder / "vectors.npy"), None),
    Reader("data/vectors_ids.npy", lambda folder: read_vectors(folder / "vectors.npy"), None),
    Reader("data/named.npz", lambda folder: read_vectors(folder / "named.npz"), None),
    Reader("data/vectors.parquet", lambda folder: read_vectors(folder / "vectors.parquet"), None),
    Reader("data/vectors.arrow", lambda folder: read_vectors(folder / "vectors.arrow"), None),
    Reader("data/flat.faiss", lambda folder: read_vectors(folder / "flat.faiss"), None),
    Reader("data/clusters.faiss", lambda folder: read_vectors(folder / "clusters.faiss"), None),
    Reader(f"data/{MADE_OF}", lambda folder: read_made_of(folder, BUILT_OF), few=40),
    Reader("bert/config.json", read_encoder),
    Reader("llama/config.json", read_generator),
    Reader("bart/config.json", read_generator),
    Reader("t5/config.json", read_generator),
    Reader("llama/generation_config.json", read_generator, few=6),
    Reader("llama/model.safetensors", read_generator, as_safetensors),
    Reader("t5/model.safetensors.index.json", read_generator),
    Reader("peft/adapter_config.json", read_adapters, few=40),
    Reader("peft/adapter_model.safetensors", read_adapters, as_safetensors),
    Reader("gguf/model.gguf", read_generator, as_gguf),
    Reader("llama/tokenizer.json", read_tokenizer),
    Reader("llama/tokenizer_config.json", read_tokenizer),
    Reader("llama/special_tokens_map.json", read_tokenizer),
    Reader("old/vocab.txt", read_tokenizer, None),
    Reader("chat/chat_template.jinja", read_chat, None, 4),
    Reader("index/manifest.json", read_index),
    Reader("index/shards/00001/embeddings.npy", read_index, None),
    Reader("index/shards/00001/text_offsets.npy", read_index, None),
    Reader("index/shards/00001/token_offsets.npy", read_index, None),
    Reader("index/shards/00000/text.bin", read_index, as_lines),
    Reader("index/shards/00000/tokens.bin", read_index, None),
    Reader("index/bm25/checksums.json", read_bm25),
    Reader("index/bm25/params.index.json", read_bm25),
    Reader("index/bm25/vocab.index.json", read_bm25, few=40),
    Reader("index/bm25/data.csc.index.npy", read_bm25, None),
    Reader("index/bm25/indices.csc.index.npy", read_bm25, None, 40),
    Reader("index/bm25/indptr.csc.index.npy", read_bm25, None, 40),
    Reader("sentences/modules.json", lambda folder: resolve_encoding(ENCODER, folder, folder)),
    Reader("sentences/1_Pooling/config.json", lambda f: resolve_encoding(ENCODER, f, f)),
    Reader("sentences/2_Dense/config.json", lambda f: resolve_encoding(ENCODER, f, f)),
    Reader(
        "sentences/config_sentence_transformers.json",
        lambda f: resolve_encoding(ENCODER, f, f),
    ),
]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of all, with a cache of its own; an endless template ends sooner there."""
    folder = tmp_path_factory.mktemp("valid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAGJAX_CACHE", str(folder / "cache"))
        patch.setattr(chat_template, "CPU_SECONDS", 1)
        write_all(folder)
        yield folder


@contextmanager
def bounds() -> Iterator[None]:
    """No more memory than `MEMORY` beyond what is there, nor more time than `SECONDS`."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"no end within {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def check(reader: Reader, valid: Path, data: bytes) -> None:
    """The reader reads it, or says what is wrong with which file."""
    path, folder = valid / reader.file, valid / reader.file.split("/")[0]
    whole = path.read_bytes()
    path.unlink()  # what is mapped by an earlier reader stays as it was
    path.write_bytes(data)
    try:
        with bounds():
            reader.read(folder)
    except InputError as error:
        assert str(folder) in str(error) or reader.file.startswith("chat/"), error
        str(error).encode()
    finally:
        path.unlink()
        path.write_bytes(whole)


def few(reader: Reader) -> settings:
    return settings(
        max_examples=MUTATIONS or reader.few,
        derandomize=not MUTATIONS,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink) if not MUTATIONS else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_valid_files_are_read(valid: Path, reader: Reader) -> None:
    reader.read(valid / reader.file.split("/")[0])


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_mutated_bytes(valid: Path, reader: Reader) -> None:
    whole = (valid / reader.file).read_bytes()

    @few(reader)
    @given(st.lists(EDITS, min_size=1, max_size=3))
    def mutated(edits: list[Edit]) -> None:
        data = whole
        for edit in edits:
            data = edit.apply(data)
        check(reader, valid, data)

    mutated()


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader.split], ids=str)
def test_mutated_values(valid: Path, reader: Reader) -> None:
    whole, split = (valid / reader.file).read_bytes(), reader.split
    assert split is not None

    @few(reader)
    @given(st.floats(0, 1, exclude_max=True), st.sampled_from([GONE, *FRAGMENTS]))
    def mutated(at: float, fragment: str) -> None:
        check(reader, valid, mutate_json(split, whole, at, fragment))

    mutated()
