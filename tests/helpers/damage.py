"""Damage: single bits flipped, files cut short and deleted, one at a time, in a checkpoint and in an index.

    python tests/helpers/damage.py --count 200 --seed 1

Each time what is loaded afterwards is compared with what was saved. Damage is either noticed (an InputError, or the
checkpoint before is used) or harmless: every array, number and text is the same to the bit. Anything else is printed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ragjax.data.corpus import Passage
from ragjax.data.passage_store import PassageStore, shard_folder, write_store
from ragjax.data.questions import read_questions
from ragjax.errors import InputError
from ragjax.files import write_jsonl
from ragjax.retrieval.embeddings import EMBEDDINGS, embed_passages
from ragjax.retrieval.index import check_listed, open_index, write_index
from ragjax.runs.checkpointer import Checkpointer

KINDS = ("bit flipped", "cut short", "deleted")


@dataclass
class Tally:
    """How often what was done to files came out how, and where it went unnoticed."""

    counts: Counter[str] = field(default_factory=Counter)
    unnoticed: list[str] = field(default_factory=list)


def harm(file: Path, kind: str, chance: random.Random) -> str:
    """Does one thing to a file, and says what."""
    content = file.read_bytes()
    if kind == "deleted":
        file.unlink()
        return kind
    if kind == "cut short":
        size = chance.randrange(len(content))
        file.write_bytes(content[:size])
        return f"cut to {size} of {len(content)} bytes"
    at, bit = chance.randrange(len(content)), chance.randrange(8)
    file.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
    return f"bit {bit} of byte {at} flipped"


def choose(folder: Path, chance: random.Random) -> Path:
    """A file, each as likely as the others, or, every other time, as likely as it is large."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    weights = [path.stat().st_size for path in files] if chance.random() < 0.5 else None
    return chance.choices(files, weights)[0]


def attack(
    whole: Path, part: str, outcome: Callable[[Path], str], count: int, seed: int, kinds: Sequence[str] = KINDS
) -> Tally:
    """Damages a copy of the folder `whole` in its folder `part`, `count` times anew; `outcome` loads the copy.

    It says "noticed: …", "harmless" or what is wrong.
    """
    chance, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory(prefix="damage-") as temporary:
        for number in range(count):
            copy = Path(temporary) / "copy"
            shutil.copytree(whole, copy)
            file, kind = choose(copy / part, chance), kinds[number % len(kinds)]
            name, done = file.relative_to(copy), harm(file, kind, chance)
            found = outcome(copy)
            tally.counts[f"{kind}: {found.partition(':')[0]}"] += 1
            if not found.startswith(("noticed", "harmless")):
                tally.unnoticed.append(f"{name}: {done}: {found}")
            shutil.rmtree(copy)
    return tally


# checkpoints


def make_state(seed: int) -> dict[str, Any]:
    """Parameters, Adam's moments, a step and a key, as training has them."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "retriever": {"w": jax.random.normal(keys[0], (8, 64, 32)), "b": jax.random.normal(keys[1], (8, 32))},
        "generator": {"w": jax.random.normal(keys[2], (64, 32), jnp.bfloat16)},
    }
    moments = jax.tree.map(jnp.sin, optax.adamw(1e-3).init(params))
    return {"params": params, "optimizer": moments, "step": jnp.int32(seed), "key": jax.random.key(seed)}


def make_checkpoints(folder: Path) -> Path:
    """Two checkpoints, steps 1 and 2, in `folder`/checkpoints."""
    with Checkpointer(folder / "checkpoints", best=True, writing=True) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"data": {"next": step}, "note": "é"}, loss=step / 2)
    return folder


def same_bits(one: Any, other: Any) -> bool:
    """Whether two trees hold the same arrays to the bit."""

    def raw(leaf: Any) -> bytes:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    return jax.tree.all(jax.tree.map(lambda a, b: raw(a) == raw(b), one, other))


def checkpoint_outcome(folder: Path) -> str:
    """What becomes of training, which goes on from the newest checkpoint, and of whoever wants the best or all."""
    try:
        return _checkpoint_outcome(folder)
    except InputError as error:  # though the checkpoint before is there
        return f"ended: {error}"


def _checkpoint_outcome(folder: Path) -> str:
    like = jax.eval_shape(lambda: make_state(1))
    with Checkpointer(folder / "checkpoints", best=True, writing=True) as checkpoints:
        told = checkpoints.every_metadata()
        best = checkpoints.restore_best(lambda step: checkpoints.restore_params(step, like["params"]))
        newest = checkpoints.restore_latest(lambda step: (checkpoints.metadata(step), checkpoints.restore(step, like)))
        assert newest is not None and best is not None
        step, (metadata, state) = newest
        if not same_bits(state, make_state(step)) or metadata != {"data": {"next": step}, "note": "é"}:
            return f"step {step} came back changed"
        if best[0] != 1 or not same_bits(best[1], make_state(1)["params"]):
            return f"of the best, step {best[0]}, other parameters came back"
        if any(of != {"data": {"next": of["data"]["next"]}, "note": "é"} for of in told):
            return f"the metadata read as {told}"
    return "harmless" if step == 2 else "noticed: step 1 was used"


def attack_checkpoint(count: int, seed: int) -> Tally:
    with tempfile.TemporaryDirectory(prefix="damage-") as temporary:
        return attack(make_checkpoints(Path(temporary)), "checkpoints/2", checkpoint_outcome, count, seed)


# indices


def make_index(folder: Path, kind: str) -> Path:
    """An index of 100 passages in three shards, with questions, in `folder`; its vectors are random."""
    generator = np.random.default_rng(0)
    for number, count in enumerate((40, 40, 20)):
        shard = shard_folder(folder, number)
        passages = [Passage(f"p{number}-{i}", f"Title {i}", "é text " * (i % 7 + 1)) for i in range(count)]
        write_store(shard, passages, lambda texts: [list(text.encode()) for text in texts], lambda p: p.text)
        vectors = generator.normal(size=(count, 16)).astype(np.float32)
        embed_passages(
            [(np.arange(count), vectors)], count, dtype="float32", path=shard / EMBEDDINGS, progress=lambda _: None
        )
    (folder / "questions").mkdir()
    questions = [{"question": f"What is {i}?", "answer": [str(i)]} for i in range(20)]
    write_jsonl(folder / "questions" / "dev.jsonl", questions)
    write_index(folder, kind, "float32", {"fingerprints": {"encoder": "sha256:e"}, "corpus": {"fingerprint": "f"}})
    return folder


def read_index(folder: Path) -> list[Any]:
    """All that anything reads of an index: what is found, read and put on devices, and what identifies it."""
    index, store = open_index(folder, {"encoder": "sha256:e"}), PassageStore.open(folder, vocabulary=256)
    queries = np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32)
    path = folder / "questions" / "dev.jsonl"
    check_listed(path)
    found = index.search(queries, 5)
    rows = [*store.token_rows(0, len(store), 8), *found, index.vectors(found[1]), index.embeddings.between(0, 100)]
    tokens = [store.tokens(i).tobytes() for i in range(len(store))]
    facts = [index.version, index.kind, store.longest, store.token_count, read_questions(path), list(store)]
    return [*(np.asarray(row).tobytes() for row in rows), *tokens, *facts]


def index_outcome(whole: list[Any], folder: Path) -> str:
    try:
        return "harmless" if read_index(folder) == whole else "other contents were read"
    except InputError as error:
        return f"noticed: {error}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"


def attack_index(count: int, seed: int, kind: str = "exact") -> Tally:
    with tempfile.TemporaryDirectory(prefix="damage-") as temporary:
        folder = make_index(Path(temporary) / "index", kind)
        return attack(folder, "", partial(index_outcome, read_index(folder)), count, seed)


ATTACKS: dict[str, Callable[[int, int], Tally]] = {
    "checkpoint": attack_checkpoint,
    "index": attack_index,
    "index with a graph": partial(attack_index, kind="HNSW8"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="of each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unnoticed = 0
    for name, attacked in ATTACKS.items():
        tally = attacked(options.count, options.seed)
        print(f"{name}: {options.count} times, {len(tally.unnoticed)} unnoticed")
        for what, times in sorted(tally.counts.items()):
            print(f"  {times:4} {what}")
        for what in tally.unnoticed:
            print(f"  UNNOTICED {what}")
        unnoticed += len(tally.unnoticed)
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
