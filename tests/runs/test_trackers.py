"""What each tracker shows of a run: the steps and their metrics, also of a run that goes on; all without a network."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from ragjax.config import Config, load_config
from ragjax.errors import InputError
from ragjax.runs.trackers import RUN_ID, check_tracker, tracking

ROOT = Path(__file__).parents[2]
STEPS = {1: {"loss": 2.5, "recall": 0.25}, 2: {"loss": 1.25, "recall": 0.5}, 3: {"loss": 0.625, "recall": 0.75}}
# the first two steps, and then the third one as a run that was resumed; in a process of its own, since these libraries
# read the environment when they are imported and leave threads behind
PROGRAM = f"""
import sys
from pathlib import Path
from ragjax.config import load_config
from ragjax.runs.trackers import tracking

config, steps = load_config({str(ROOT / "configs/tiny.yaml")!r}, [f"train.tracker={{sys.argv[1]}}"]), {STEPS}
for some in ((1, 2), (3,)):
    with tracking(config, Path(sys.argv[2])) as track:
        for step in some:
            track(step, steps[step])
"""


def config(tracker: str) -> Config:
    return load_config(ROOT / "configs/tiny.yaml", [f"train.tracker={tracker}"])


def tracked(tracker: str, tmp_path: Path, code: str = "") -> str:
    """The output of some code that is run after the steps were tracked in RUN, a folder below `tmp_path`."""
    (tmp_path / "RUN").mkdir()
    own = {"WANDB_MODE": "offline", "TRACKIO_DIR": f"{tmp_path}/trackio", "HOME": str(tmp_path)}
    environment = os.environ | own | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM + code, tracker, str(tmp_path / "RUN")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tensorboard(tmp_path: Path) -> None:
    for some in ((1, 2), (3,)):
        with tracking(config("tensorboard"), tmp_path) as track:
            for step in some:
                track(step, STEPS[step])
    shown: dict[int, dict[str, float]] = {}
    for path in (tmp_path / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:  # records: length, checksum, event, checksum
            length = struct.unpack("<Q", data[:8])[0]
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                shown.setdefault(event.step, {})[value.tag] = value.simple_value
    assert shown == STEPS


def test_wandb(tmp_path: Path) -> None:
    """Without a network it keeps a file for `wandb sync`: records in blocks of 32 KiB, as LevelDB's logs have them."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    tracked("wandb", tmp_path)
    shown, ids = dict[int, dict[str, float]](), set()
    for path in (tmp_path / "RUN" / "wandb").glob("offline-run-*/*.wandb"):
        data, at, record = path.read_bytes(), 7, b""
        while at < len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768  # the rest of a block is empty
                continue
            length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
            record += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or its last part
                of, record = Record.FromString(record), b""
                ids |= {of.run.run_id} - {""}
                for item in of.history.item:
                    if not (name := item.key or item.nested_key[0]).startswith("_"):
                        shown.setdefault(of.history.step.num, {})[name] = json.loads(item.value_json)
    assert shown == STEPS
    assert ids == {(tmp_path / "RUN" / RUN_ID).read_text()}, "one run, which goes on"


def test_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    told = tracked(
        "trackio",
        tmp_path,
        "import json, trackio\nfrom trackio.sqlite_storage import SQLiteStorage\n"
        "runs = [run.name for run in trackio.Api().runs('ragjax')]\n"
        "print(json.dumps([runs, *(SQLiteStorage.get_logs('ragjax', run) for run in runs)]))",
    )
    names, *logs = json.loads(told)  # nothing else is on standard output
    assert names == [f"RUN-{(tmp_path / 'RUN' / RUN_ID).read_text()}"], "one run, which goes on"
    assert {line["step"]: {name: line[name] for name in ("loss", "recall")} for line in logs[0]} == STEPS


def test_what_cannot_be_opened_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with (
        pytest.raises(InputError, match=r"train\.tracker=tensorboard: cannot be opened: .*choose train\.tracker=none"),
        tracking(config("tensorboard"), tmp_path),
    ):
        pass
    monkeypatch.setattr("ragjax.runs.trackers.find_spec", lambda name: None)
    check_tracker("none")
    for tracker in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(InputError, match=rf"needs an extra: pip install 'ragjax\[{tracker}\]'"):
            check_tracker(tracker)
    with pytest.raises(InputError, match=r"it is now train\.tracker"):
        load_config(ROOT / "configs/tiny.yaml", ["train.tensorboard=true"])
