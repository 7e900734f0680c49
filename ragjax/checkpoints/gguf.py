"""GGUF files: metadata and unquantised tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ragjax.checkpoints.safetensors import Index, require_finite
from ragjax.errors import InputError, library_errors
from ragjax.files import shown


def open_gguf(path: Path) -> tuple[dict[str, Any], GgufReader]:
    """The configuration in Hugging Face's terms, and what reads the tensors. Raises `InputError`."""
    fields = GgufFields(path)
    family = fields.get("general.architecture")
    if not isinstance(family, str):
        raise InputError(f"{path}: does not say of which architecture it is; fetch it again")

    def field(name: str, default: Any = None) -> Any:
        return fields.get(f"{family}.{name}", default)

    tensors = {tensor.name: tensor for tensor in read_gguf(path).tensors}
    if "rope_freqs.weight" in tensors or field("rope.scaling.type", "none") != "none":
        raise InputError(f"{path}: scaled rotary positions in GGUF are not supported; use the Hugging Face folder")
    heads, window = field("attention.head_count"), field("attention.sliding_window")
    embedding = tensors.get("token_embd.weight")
    hf = {
        "model_type": "mistral" if window and family == "llama" else family,  # in GGUF a Mistral is a Llama
        "vocab_size": int(embedding.shape[-1]) if embedding else None,
        "hidden_size": field("embedding_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length"),
        "intermediate_size": field("feed_forward_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": field("rope.freq_base", 10000.0),
        "max_position_embeddings": field("context_length", 2048),
        "tie_word_embeddings": "output.weight" not in tensors,
        "sliding_window": window,
        "use_sliding_window": True if window and family != "llama" else None,
        "max_window_layers": 0 if window else None,
    }
    ids = {kind: fields.take(f"tokenizer.ggml.{kind}_token_id", int) for kind in ("bos", "eos", "eot", "eom")}
    ends = sorted({ids[kind] for kind in ("eos", "eot", "eom")} - {None})  # of a text, a turn and a message
    hf |= {"bos_token_id": ids["bos"], "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}
    groups = {"attn_q.weight": heads, "attn_k.weight": hf["num_key_value_heads"]} if family == "llama" else {}
    return {name: value for name, value in hf.items() if value is not None}, GgufReader(path, tensors, groups)


class GgufReader:
    """A `TensorReader` that dequantises; `groups`: in which tensors how many heads' rotary pairs lie interleaved."""

    def __init__(self, path: Path, tensors: Mapping[str, Any], groups: Mapping[str, Any]) -> None:
        self._path, self._tensors, self._groups = path, tensors, groups

    @property
    def names(self) -> set[str]:
        """As `TensorReader` says."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """As `TensorReader` says."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """As `TensorReader` says; only the rows of a matrix that are in the part are dequantised."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        with library_errors(f"{self._path}: {name} is not readable", "fetch it again"):
            if len(tensor.shape) == 1:
                return self._checked(dequantize(tensor.data, tensor.tensor_type)[index], name)
            rows = np.arange(len(tensor.data))
            if heads := self._groups.get(name.split(".", 2)[-1]):
                rows = rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
            some = dequantize(tensor.data[rows[index[:1]]], tensor.tensor_type)
            return self._checked(some[:, *index[1:]], name)

    def _checked(self, array: np.ndarray, name: str) -> np.ndarray:
        return require_finite(np.asarray(array, np.float32), name, self._path)


MOST_GGUF_PARTS = 2**23  # pieces of metadata: a vocabulary of 256,000 takes a quarter of them


@lru_cache(maxsize=2)
def read_gguf(file: Path) -> Any:
    """The `gguf.GGUFReader` of a file, memory-mapped, and kept. Raises `InputError`."""
    from gguf import GGUFEndian, GGUFReader, GGUFValueType

    class Bounded(GGUFReader):  # type: ignore[misc]  # whose own loops go on behind the end of the file
        parts = 0

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            self._check(offset + int(count) * np.dtype(dtype).itemsize, 1)
            return super()._get(offset, dtype, count, override_order)

        def _check(self, end: int, parts: int) -> None:
            self.parts += parts
            if end > len(self.data):
                raise ValueError("it ends before what it announces")
            if self.parts > MOST_GGUF_PARTS:
                raise ValueError("its metadata has too many entries")

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            """Arrays as views of the file: the library takes seconds for a vocabulary, entry by entry."""
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
            head = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            kind, count, end = GGUFValueType(int(head[0][0])), int(head[1][0]), orig_offs + 12
            if kind == GGUFValueType.STRING:
                values, end = self._strings(end, count)
            elif kind in self.gguf_scalar_to_np:
                values = [self._get(end, self.gguf_scalar_to_np[kind], count)]
                end += values[0].nbytes
            else:
                return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
            places = list(range(len(head), len(head) + len(values)))
            return end - orig_offs, [*head, *values], places, [GGUFValueType.ARRAY, kind]

        def _strings(self, end: int, count: int) -> tuple[list[np.ndarray], int]:
            self._check(end + 8 * count, 2 * count)
            data, texts = self.data.view(np.ndarray), list[np.ndarray]()
            order: Any = "little" if self.endianess == GGUFEndian.LITTLE else "big"
            for _ in range(count):
                begin = end + 8
                end = begin + int.from_bytes(data[end:begin].tobytes(), order)
                self._check(end, 0)
                texts.append(data[begin:end])
            return texts, end

    with library_errors(f"{file}: not readable as a GGUF file", "fetch it again"):
        return Bounded(file)


class GgufFields:
    """The metadata of a GGUF file."""

    def __init__(self, file: Path) -> None:
        self.file, self._fields = file, read_gguf(file).fields

    def get(self, key: str, default: Any = None) -> Any:
        """A value as Python has it, or the default. Raises `InputError` for one that cannot be decoded."""
        with library_errors(f"{self.file}: {shown(key)} is not readable", "fetch it again"):
            return self._fields[key].contents() if key in self._fields else default

    def take(self, key: str, kind: type, item: type | None = None) -> Any:
        """A value of a type, if it is a list with items of a type; or None. Raises `InputError` for another type."""
        value = self.get(key)
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if value is not None and not (fits and (item is None or all(isinstance(one, item) for one in value))):
            expected = kind.__name__ if item is None else f"{kind.__name__} of {item.__name__}"
            raise InputError(f"{self.file}: {key} is {shown(value)}; expected {expected}; fetch it again")
        return value
