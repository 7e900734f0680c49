"""Safetensors files: read lazily tensor by tensor, and written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ragjax.errors import InputError, library_errors
from ragjax.files import read_json, shown

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
HOW_TO_CONVERT = (
    "pickled weights (*.bin) are never loaded. To get safetensors: on the hub, the pull request 'Adding `safetensors` "
    "variant of this model' (see the repository's Community tab; huggingface.co/spaces/safetensors/convert makes one) "
    "can be named as a revision, hf:ORG/NAME@refs/pr/N with its number N. Or, where torch is installed, load the model "
    "with the class of transformers that its config.json names, call save_pretrained(FOLDER), and copy the tokenizer's "
    "files into FOLDER"
)


PRECISIONS = ("F32", "F16", "BF16", "F64")  # safetensors' names of what is read


@runtime_checkable
class Read(Protocol):
    """Reads a tensor by its name, in float32; knows its shape and where it lies before."""

    def __call__(self, name: str) -> np.ndarray:
        """Raises `InputError` for what is quantised, not finite or damaged."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises as reading does."""
        ...


def weight_files(checkpoint: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors: a GGUF file itself, or the safetensors of a folder."""
    if checkpoint.is_file():
        return [checkpoint]
    index, single = checkpoint / "model.safetensors.index.json", checkpoint / "model.safetensors"
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise InputError(f'{index}: has no "weight_map"; fetch it again')
        for name in named.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(f'{index}: "weight_map" names {shown(name)}; expected files beside it; fetch it again')
        files = sorted({checkpoint / name for name in named.values()})
        if single.is_file() and single not in files:
            raise InputError(
                f"{checkpoint}: has {single.name} and, by {index.name}, other files; remove one of the two"
            )
        return files
    if single.is_file():
        return [single]
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise InputError(f"{checkpoint}: no *.safetensors here; {HOW_TO_CONVERT}")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8]) + (", …" if len(files) > 8 else "")
        raise InputError(f"{checkpoint}: has {names}, but no {index.name} that says which count; fetch it, too")
    return files


def open_safetensors(checkpoint: Path) -> tuple[set[str], Read]:
    """The names of a folder's tensors, and what reads one in float32. Raises `InputError` for a damaged file."""
    read = _Safetensors(weight_files(checkpoint))
    return set(read.where), read


class _Safetensors:
    """The tensors of some files, by name; see `Read`."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.where: dict[str, tuple[Path, Any]] = {}
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path}: missing; fetch it again")
            with library_errors(f"{path}: not readable as safetensors", "fetch it again"):
                handle = safe_open(path, framework="flax")  # unlike numpy's, it reads bfloat16
                names = handle.keys()
            for name in names:
                if name in self.where:
                    raise InputError(f"{path}: has the tensor {shown(name)}, as {self.where[name][0].name} has")
                self.where[name] = path, handle

    def shape(self, name: str) -> tuple[int, ...]:
        path, handle = self.where[name]
        with library_errors(f"{path}: {name} is not readable", "fetch it again"):
            of = handle.get_slice(name)
            kind, shape = of.get_dtype(), tuple(of.get_shape())
        if kind not in PRECISIONS:
            raise InputError(
                f"{path}: {name} is stored as {kind}; quantised weights are not read: convert them to one of "
                f"{', '.join(PRECISIONS[:3])} with the library that made them"
            )
        return shape

    def __call__(self, name: str) -> np.ndarray:
        path, handle = self.where[name]
        self.shape(name)
        with library_errors(f"{path}: {name} is not readable", "fetch it again"):
            array = np.asarray(handle.get_tensor(name), dtype=np.float32)
        return require_finite(array, name, path)


def require_finite(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    if not np.isfinite(array).all():
        bad = "NaN" if np.isnan(array).any() else "infinite"
        raise InputError(f"{path}: {name} holds weights that are {bad}; fetch it again, or give another checkpoint")
    return array


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a file that transformers reads as PyTorch's. Raises `InputError` where it cannot, as on a full disk."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:  # the first is what safetensors makes of a full disk
        raise InputError(f"{path}: cannot be written ({error}); free some space, or choose another folder") from None
