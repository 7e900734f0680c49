"""Safetensors files, read tensor by tensor and written; and `TensorReader`, what every format of weights is read by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ragjax.errors import InputError, library_errors
from ragjax.files import LFS, read_json, shown

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
HOW_TO_CONVERT = (
    "pickled weights (*.bin) are never loaded. To get safetensors: on the hub, the pull request 'Adding `safetensors` "
    "variant of this model' (see the repository's Community tab; huggingface.co/spaces/safetensors/convert makes one) "
    "can be named as a revision, hf:ORG/NAME@refs/pr/N with its number N. Or, where torch is installed, load the model "
    "with the class of transformers that its config.json names, call save_pretrained(FOLDER), and copy the tokenizer's "
    "files into FOLDER"
)


PRECISIONS = ("F32", "F16", "BF16", "F64")  # safetensors' names of what is read
Index = tuple[slice, ...]  # which part of a tensor: a slice for each of its dimensions, or () for all of it


@runtime_checkable
class TensorReader(Protocol):
    """Reads the tensors of a checkpoint one by one, or parts of them, whatever its format."""

    @property
    def names(self) -> set[str]:
        """Of all its tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, before it is read. Raises `InputError` for what is quantised or damaged."""
        ...

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A tensor, or a part of it, in float32. Raises `InputError` for what is quantised, not finite or damaged."""
        ...


def weight_files(checkpoint: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors: a GGUF file itself, or the safetensors of a folder.

    Raises `InputError` where there are none, or where it is not clear which of them count.
    """
    if checkpoint.is_file():
        return [checkpoint]
    index, single = checkpoint / "model.safetensors.index.json", checkpoint / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f'{index}: has no "weight_map"; fetch it again')
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(f'{index}: "weight_map" names {shown(name)}; expected files beside it; fetch it again')
        files = sorted({checkpoint / name for name in weight_map.values()})
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
    if files[0].name.startswith("adapter_"):
        raise InputError(f"{files[0]}: is an adapter without its model; merge it first (merge_and_unload of peft)")
    return files


class SafetensorsReader:
    """A `TensorReader` of a folder's safetensors files."""

    def __init__(self, checkpoint: Path, only: str | None = None) -> None:
        """Of all files, or of one. Raises `InputError` for a missing or damaged one, and a tensor that two have."""
        self._handles: dict[str, tuple[Path, Any]] = {}
        for path in weight_files(checkpoint) if only is None else [checkpoint / only]:
            if not path.is_file():
                raise InputError(f"{path}: missing; fetch it again")
            with path.open("rb") as beginning:
                if beginning.read(len(LFS)) == LFS:
                    raise InputError(f"{path}: is a pointer of Git LFS and not the file itself; run: git lfs pull")
            with library_errors(f"{path}: not readable as safetensors", "fetch it again"):
                handle = safe_open(path, framework="numpy")
                names = handle.keys()
            for name in names:
                if name in self._handles:
                    raise InputError(f"{path}: has the tensor {shown(name)}, as {self._handles[name][0].name} has")
                self._handles[name] = path, handle

    @property
    def names(self) -> set[str]:
        """As `TensorReader` says."""
        return set(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """As `TensorReader` says."""
        path, handle = self._handles[name]
        with library_errors(f"{path}: {name} is not readable", "fetch it again"):
            header = handle.get_slice(name)
            kind, shape = header.get_dtype(), tuple(header.get_shape())
        if kind not in PRECISIONS:
            raise InputError(
                f"{path}: {name} is stored as {kind}; quantised weights are not read: convert them to one of "
                f"{', '.join(PRECISIONS[:3])} with the library that made them"
            )
        return shape

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """As `TensorReader` says."""
        path, handle = self._handles[name]
        self.shape(name)
        with library_errors(f"{path}: {name} is not readable", "fetch it again"):
            array = np.asarray(handle.get_slice(name)[index or ...], dtype=np.float32)
        return require_finite(array, name, path)


class TensorView(NamedTuple):
    """A tensor of some reader, or a range of its rows."""

    reader: TensorReader
    name: str
    rows: slice = slice(None)


class TensorViews:
    """A `TensorReader` of the tensors of others, under names of their own."""

    def __init__(self, views: Mapping[str, TensorView]) -> None:
        self._views = views

    @property
    def names(self) -> set[str]:
        """As `TensorReader` says."""
        return set(self._views)

    def shape(self, name: str) -> tuple[int, ...]:
        """As `TensorReader` says."""
        view = self._views[name]
        count, *others = view.reader.shape(view.name)
        return len(range(*view.rows.indices(count))), *others

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """As `TensorReader` says."""
        view = self._views[name]
        count, *_ = view.reader.shape(view.name)
        rows, *others = index or (slice(None),)
        within = range(count)[view.rows][rows]
        return view.reader.read(view.name, (slice(within.start, within.stop), *others))


def require_finite(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    """The array itself. Raises `InputError`, naming the file and the tensor, for a NaN or an infinite weight."""
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
