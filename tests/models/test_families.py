"""Small checkpoints of every family against what transformers computed of them (tests/helpers/families.py)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import CASES, GOLDEN, TABLE, TOLERANCE, Case, opened, ours, write


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(gzip.decompress(GOLDEN.read_bytes()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_family_equals_transformers(case: Case, golden: dict[str, Any], tmp_path: Path) -> None:
    made = golden[case.name]
    found = ours(case, opened(case, write(tmp_path / "folder", case, made["config"], made["shapes"])))
    np.testing.assert_allclose(found, made["expected"], atol=TOLERANCE)


def test_the_table_names_every_case() -> None:
    table = TABLE.read_text(encoding="utf-8")
    assert all(f"| {case.family} | " in table and f" | {case.layout} | " in table for case in CASES)
    assert GOLDEN.stat().st_size < 200_000
