"""GGUF metadata, read as the `gguf` library reads them, and refused where they are not whole."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from ragjax.checkpoints.gguf import read_gguf
from ragjax.errors import InputError

ARRAYS = {
    "texts": ["", "two words", "Ġé漢🦆", "a" * 300],
    "integers": [3, 2**30, 0],
    "negatives": [-1, -(2**20)],
    "floats": [0.5, -2.0],
    "booleans": [True, False, True],
}


def written(path: Path, endianness: gguf.GGUFEndian) -> Path:
    writer = gguf.GGUFWriter(path, "llama", endianess=endianness)
    for name, values in ARRAYS.items():
        writer.add_array(name, values)
    writer.add_string("last", "text")
    writer.add_tensor("weight", np.arange(8, dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


@pytest.mark.parametrize("endianness", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_metadata_are_those_of_the_library(tmp_path: Path, endianness: gguf.GGUFEndian) -> None:
    path = written(tmp_path / "model.gguf", endianness)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    contents = {name: field.contents() for name, field in ours.fields.items()}
    assert contents == {name: field.contents() for name, field in theirs.fields.items()}
    assert {name: contents[name] for name in ARRAYS} == ARRAYS
    assert (contents["general.architecture"], contents["last"]) == ("llama", "text")
    np.testing.assert_array_equal(ours.tensors[0].data, theirs.tensors[0].data)


def test_metadata_that_end_early_or_are_too_long_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", gguf.GGUFEndian.LITTLE)
    data, end = path.read_bytes(), gguf.GGUFReader(path).fields["last"].offset
    for cut in range(4, end, 5):
        (short := tmp_path / f"{cut}.gguf").write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"\.gguf: not readable as a GGUF file"):
            read_gguf(short)
    first = data.index(b"two words")
    for at in (first - 8, data.index(b"texts") + 5 + 4 + 4):  # how long a text is, and how many there are
        for huge in (2**24, 2**63, 2**64 - 1):
            (wrong := tmp_path / f"{at}-{huge}.gguf").write_bytes(
                data[:at] + huge.to_bytes(8, "little") + data[at + 8 :]
            )
            with pytest.raises(InputError, match="ends before what it announces"):
                read_gguf(wrong)
