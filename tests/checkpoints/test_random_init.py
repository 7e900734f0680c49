"""Random checkpoints load as any other, and are the same bytes for the same seed."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from ragjax.checkpoints.pretrained import open_encoder, open_generator
from ragjax.checkpoints.random_init import FAMILIES, write_random_checkpoint
from ragjax.data.prompt import make_prompt
from ragjax.data.tokenizer import Tokenizer
from ragjax.errors import InputError
from ragjax.files import read_json


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_and_repeats(family: str, tmp_path: Path) -> None:
    write_random_checkpoint(family, tmp_path / "a")
    write_random_checkpoint(family, tmp_path / "b")
    write_random_checkpoint(family, tmp_path / "c", seed=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    changed = [name for name, data in contents(tmp_path / "c").items() if data != contents(tmp_path / "a")[name]]
    assert changed == ["model.safetensors"]
    assert sorted(contents(tmp_path / "a")) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    pretrained = open_encoder(tmp_path / "a", "mean", True) if family == "bert" else open_generator(tmp_path / "a")
    assert all(np.isfinite(leaf).all() and leaf.size for leaf in jax.tree.leaves(pretrained.load_params()))
    tokenizer = Tokenizer.load(tmp_path / "a")
    assert tokenizer.vocab_size == pretrained.config.vocab_size
    text = "zürich is 2 km away, 東京 is not"
    (ids,) = tokenizer.encode([text])
    assert len(ids) == len(text.encode()), "one token a byte"
    assert tokenizer.decode(ids) == text
    if family == "bert":
        assert tokenizer.encode(["A"], special=True) == [[1, *tokenizer.encode(["a"])[0], 2]]
        return
    hf = read_json(tmp_path / "a" / "config.json")
    assert (tokenizer.pad_id, tokenizer.eos_id) == (hf["pad_token_id"], hf["eos_token_id"])
    assert make_prompt(tokenizer, "{passage} Question: {question}").middle
    framed = make_prompt(tokenizer, "{passage} Question: {question}", framed=True)
    around = {"llama": ((), ()), "bart": ((0,), (2,)), "t5": ((), (1,))}[family]
    assert (framed.head, framed.tail) == around
    assert (framed.closed_book[0][:1], framed.closed_book[1]) == around or family != "bart"


def test_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="random:gpt: expected random:bert or random:llama or random:bart"):
        write_random_checkpoint("gpt", tmp_path / "a")
    assert not (tmp_path / "a").exists()
