"""Of what happens to the files of checkpoints and indices nothing goes unnoticed; the long version is damage.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from damage import ATTACKS, KINDS, attack, checkpoint_outcome, make_checkpoints

from ragjax.runs import checkpointer as checkpoint


@pytest.mark.parametrize(("name", "count"), [("checkpoint", 15), ("index", 60), ("index with a graph", 60)])
def test_damage_is_noticed_or_harmless(name: str, count: int) -> None:
    tally = ATTACKS[name](count, 5)
    assert tally.unnoticed == [] and sum(tally.counts.values()) == count
    assert all(tally.counts[f"{kind}: noticed"] > count / 4 for kind in KINDS)


def test_without_checksums_some_would_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax does not see most bits that flip in an array: it is the checksums that do, and the attack tells."""
    make_checkpoints(tmp_path)
    monkeypatch.setattr(checkpoint, "damages", lambda *_: {})
    arrays = "checkpoints/2/state/ocdbt.process_0/d"
    tally = attack(tmp_path, arrays, checkpoint_outcome, 2, 1, ["bit flipped"])
    assert tally.counts == {"bit flipped: step 2 came back changed": 2}
