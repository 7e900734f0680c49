"""The journal of a long piece of work: what was kept is there again, and nothing else."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from ragjax.errors import InputError
from ragjax.runs.journal import Journal, read_journal

HEADER = {"work": 1}
RECORDS: list[Any] = [{"made": [0.1, None, "é"]}, [float("inf")], "line\nbreak\u2028"]


def kept(path: Path, records: list[Any] = RECORDS, header: Any = HEADER) -> Path:
    with Journal(path, header) as journal:
        for record in records:
            journal.add(record)
    return path


def test_what_was_added_is_there_again_and_more_can_be(tmp_path: Path) -> None:
    path = kept(kept(tmp_path / "j"), ["later"])
    assert read_journal(path, HEADER) == [*RECORDS, "later"]


def test_another_header_begins_anew(tmp_path: Path) -> None:
    path = kept(tmp_path / "j")
    assert read_journal(path, {"work": 2}) == []
    kept(path, ["other"], {"work": 2})
    assert read_journal(path, {"work": 2}) == ["other"] and read_journal(path, HEADER) == []


def test_without_a_record_there_is_no_file(tmp_path: Path) -> None:
    kept(tmp_path / "j", [])
    assert read_journal(tmp_path / "j", HEADER) == [] and list(tmp_path.iterdir()) == []


def test_what_a_kill_cut_short_or_a_bit_has_changed_is_dropped_with_all_after_it(tmp_path: Path) -> None:
    """Every length to which the file can be cut, and a bit in every byte."""
    whole = kept(tmp_path / "j").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole)):
        (tmp_path / "j").write_bytes(whole[:size])
        assert read_journal(tmp_path / "j", HEADER) == RECORDS[: max(0, sum(end <= size for end in ends) - 1)]
    for at in range(len(whole)):
        (tmp_path / "j").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert read_journal(tmp_path / "j", HEADER) == RECORDS[: max(0, sum(end <= at for end in ends) - 1)]
    (tmp_path / "j").write_bytes(whole[:-3])
    kept(tmp_path / "j", ["again"])
    assert read_journal(tmp_path / "j", HEADER) == [*RECORDS[:-1], "again"]


def test_one_at_a_time(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "j", HEADER) as first,
        pytest.raises(InputError, match="j: another process does this work"),
        Journal(tmp_path / "j", HEADER),
    ):
        pass
    first.path.write_bytes(b"")


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    path = kept(tmp_path / "j")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with Journal(path, HEADER) as journal, pytest.raises(InputError, match=r"j: cannot be written .*: it goes on"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
            journal.add("much " * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_journal(path, HEADER) == RECORDS


@pytest.mark.parametrize("place", ["/proc/ragjax/j", "/proc/j"])
def test_where_nothing_can_be_written(place: str) -> None:
    with pytest.raises(InputError, match="cannot be written"), Journal(Path(place), HEADER):
        pass
