"""Checkpoints: bit-exact, sharded on the way back, whole or reported."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from trained import no_file_larger_than

from ragjax import checksums
from ragjax.checksums import CHECKSUMS, checksum
from ragjax.errors import InputError
from ragjax.runs.checkpointer import Checkpointer, DamagedCheckpoint


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "optimizer", "step", "key"], meta_fields=[])
@dataclasses.dataclass
class State:
    params: Any
    optimizer: Any
    step: Any
    key: Any


def make_state(seed: int = 0, width: int = 16) -> State:
    w = jax.random.normal(jax.random.key(seed), (3, width, 5))
    params = {"retriever": {"w": w}, "generator": {"b": jnp.arange(7, dtype=jnp.bfloat16)}}
    return State(params, optax.adamw(1e-3).init(params), jnp.int32(seed), jax.random.key(seed))


def test_what_comes_back_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    state = make_state()
    with Checkpointer(tmp_path / "new" / "checkpoints", writing=True) as checkpoints:
        assert checkpoints.steps() == []
        checkpoints.save(3, state, {"data": {"next": 12}, "note": "é"})
    with Checkpointer(tmp_path / "new" / "checkpoints", writing=True) as checkpoints:
        assert checkpoints.steps()[0] == 3
        assert checkpoints.metadata(3) == {"data": {"next": 12}, "note": "é"}
        chex.assert_trees_all_equal(checkpoints.restore(3, jax.eval_shape(make_state)), state)
        chex.assert_trees_all_equal_dtypes(checkpoints.restore(3, state), state)


def test_parameters_come_back_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    """Rounded to the nearest, ties to even, or widened; but nothing else of a state is converted."""
    state = make_state()
    params = state.params | {"ties": jnp.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3e38, 1e-40])}
    other = {"float32": jnp.bfloat16, "bfloat16": jnp.float32}
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, other[leaf.dtype.name]), params)
    with Checkpointer(tmp_path, writing=True) as checkpoints:
        checkpoints.save(1, {"params": params, "moments": params}, {})
        found = checkpoints.restore_params(1, like)
        chex.assert_trees_all_equal(found, jax.tree.map(lambda leaf, as_: leaf.astype(as_.dtype), params, like))
        assert found["retriever"]["w"].dtype == jnp.bfloat16
        with pytest.raises(InputError, match=r"moments\.\S+ is bfloat16\[7\], not float32\[7\]"):
            checkpoints.restore(1, {"params": like, "moments": like})


def test_only_the_newest_stay(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=2, writing=True) as checkpoints:
        for step in (1, 2, 3, 10):
            checkpoints.save(step, make_state(step), {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "3"]
    with Checkpointer(tmp_path, writing=True) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(3, make_state()), make_state(3))
        with pytest.raises(InputError, match="no such checkpoint; the steps saved are: 3, 10"):
            checkpoints.restore(1, make_state())


def test_the_one_of_lowest_loss_stays_too(tmp_path: Path) -> None:
    """It comes first where the best is asked for; what was saved without a loss, as on a signal, comes last."""
    with Checkpointer(tmp_path, keep=1, best=True, writing=True) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
            checkpoints.save(step, make_state(step), {}, loss)
        checkpoints.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]
    with Checkpointer(tmp_path, keep=1, best=True, writing=True) as checkpoints:
        for find, step in ((checkpoints.restore_best, 2), (checkpoints.restore_latest, 4)):
            found = find(lambda step: checkpoints.restore(step, make_state()))
            assert found is not None and found[0] == step
            chex.assert_trees_all_equal(found[1], make_state(step))
        checkpoints.save(5, make_state(5), {}, 0.5)
        checkpoints.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["5"]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, writing=True) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.save(1, make_state(2), {})
        chex.assert_trees_all_equal(checkpoints.restore(1, make_state()), make_state(2))


def test_the_state_may_be_donated_right_after_save(tmp_path: Path) -> None:
    state = {"params": jnp.arange(300_000.0)}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpointer(tmp_path, writing=True) as checkpoints:
        checkpoints.save(1, state, {})
        jax.block_until_ready(step(state))
        restored = checkpoints.restore(1, {"params": jax.ShapeDtypeStruct((300_000,), jnp.float32)})
    np.testing.assert_array_equal(restored["params"], np.arange(300_000.0))


@pytest.mark.devices(1, 2, 8)
def test_saved_on_one_device_restored_over_all(tmp_path: Path) -> None:
    """Each leaf lies exactly where it was asked for, not only equivalently: the step's `out_shardings` are compared."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = NamedSharding(mesh, PartitionSpec(None, "data")), NamedSharding(mesh, PartitionSpec())
    state = make_state()

    def like(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split if leaf.shape == (3, 16, 5) else whole)

    wanted = jax.tree.map(like, state)
    with Checkpointer(tmp_path, writing=True) as checkpoints:
        checkpoints.save(0, state, {})
        restored = checkpoints.restore(0, wanted)
        assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, wanted)
        assert restored.params["retriever"]["w"].addressable_shards[0].data.shape == (3, 16 // mesh.size, 5)
        assert len(restored.step.sharding.device_set) == mesh.size
        checkpoints.save(1, restored, {})
        back = checkpoints.restore(1, state)
    chex.assert_trees_all_equal(back, state)
    assert len(back.params["retriever"]["w"].sharding.device_set) == 1


def test_parameters_alone(tmp_path: Path) -> None:
    state = make_state()
    with Checkpointer(tmp_path, writing=True) as checkpoints:
        checkpoints.save(0, state, {})
        params = checkpoints.restore_params(0, jax.eval_shape(make_state).params)
        with pytest.raises(InputError, match=r"it has no params\.reader\.w"):
            checkpoints.restore_params(0, {"reader": {"w": jnp.zeros(3)}})
    chex.assert_trees_all_equal(params, state.params)


def test_another_model(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, writing=True) as checkpoints:
        checkpoints.save(0, make_state(), {})
        with pytest.raises(InputError, match=r"another model.*retriever\.w is float32\[3, 16, 5\], not .*\[3, 8, 5\]"):
            checkpoints.restore(0, make_state(width=8))
        with pytest.raises(InputError, match=r"optimizer\.0\.count is not of this model"):
            checkpoints.restore(0, dataclasses.replace(make_state(), optimizer=()))


FILES = {  # each is found whichever is gone, empty, halved or has another bit
    "where training was": "_CHECKPOINT_METADATA",
    "the names of arrays": "state/_METADATA",
    "where arrays lay": "state/_sharding",
    "the list of blocks": "state/manifest.ocdbt",
    "blocks": "state/ocdbt.process_0/d/*",
    "the checksums": CHECKSUMS,
}
DAMAGES = [
    "emptied",
    "no state",
    *(f"{how} {what}" for what in FILES for how in ("no", "empty", "cut", "bit")),
]
DAMAGES.remove("no the checksums")  # as after a kill just then


def do_damage(checkpoint: Path, damage: str) -> None:
    if damage == "emptied":
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
    elif damage == "no state":
        shutil.rmtree(checkpoint / "state")
    else:
        how, what = damage.split(" ", 1)
        for path in (
            [p for p in checkpoint.rglob("*") if p.is_file()] if what == "cut" else checkpoint.glob(FILES[what])
        ):
            content = path.read_bytes()
            at = len(content) // 2
            flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
            path.write_bytes({"no": b"", "empty": b"", "cut": content[:at], "bit": flipped}[how])
            if how == "no":
                path.unlink()


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_incomplete_checkpoint_names_its_folder(tmp_path: Path, damage: str) -> None:
    state = {"params": jax.random.normal(jax.random.key(0), (20, 10))}
    with Checkpointer(tmp_path, writing=True) as checkpoints:
        checkpoints.save(7, state, {})
    do_damage(tmp_path / "7", damage)
    damaged = pytest.raises(DamagedCheckpoint, match=rf"{tmp_path}/7: the checkpoint is incomplete or damaged")
    with Checkpointer(tmp_path, writing=True) as checkpoints, damaged:
        checkpoints.restore(7, state)


@pytest.mark.parametrize("damage", ["emptied", "no where training was", "empty where arrays lay", "bit blocks"])
def test_the_one_before_a_damaged_checkpoint_is_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    """A reader leaves the damaged one; a writer moves it away, or it would be kept in place of newer ones."""
    folder = tmp_path / "checkpoints"

    def state(step: int) -> dict[str, jax.Array]:
        return {"params": jax.random.normal(jax.random.key(step), (20, 10))}

    with Checkpointer(folder, keep=3, writing=True) as checkpoints:
        for step in (5, 6, 7):
            checkpoints.save(step, state(step), {"step": step})
    for step in (6, 7):
        do_damage(folder / str(step), damage)
    for writing in (False, True):
        with Checkpointer(folder, keep=1, writing=writing) as checkpoints:
            found = checkpoints.restore_latest(
                lambda step: (checkpoints.metadata(step), checkpoints.restore(step, state(0)))
            )
            assert found is not None and found[0] == 5 == found[1][0]["step"]
            chex.assert_trees_all_equal(found[1][1], state(5))
            err = " ".join(capsys.readouterr().err.split())
            assert f"{folder}/7: the checkpoint is incomplete or damaged" in err and "going back to step 5" in err
            there = sorted(path.name for path in folder.iterdir())
            assert there == (["5"] if writing else ["5", "6", "7"])
            if writing:
                assert sorted(path.name for path in (tmp_path / "damaged-checkpoints").iterdir()) == ["6-1", "7-1"]
                checkpoints.save(6, state(6), {})
    assert [path.name for path in folder.iterdir()] == ["6"]


def unsummed(folder: Path, step: int) -> None:
    """As a kill leaves a checkpoint right after it was written."""
    with Checkpointer(folder, writing=True) as checkpoints:
        checkpoints.save(step, make_state(step), {"step": step})
    (folder / str(step) / CHECKSUMS).unlink()


@pytest.mark.parametrize("half_written", [False, True])
def test_a_checkpoint_that_a_kill_left_unsummed_is_used_and_summed(tmp_path: Path, half_written: bool) -> None:
    unsummed(tmp_path, 1)
    unsummed(tmp_path, 2)
    if half_written:  # the kill came while its sums were written
        (tmp_path / "2" / f"{CHECKSUMS}.partial").write_text("{")
    for writing in (False, True, True):
        with Checkpointer(tmp_path, writing=writing) as checkpoints:
            found = checkpoints.restore_latest(
                lambda step: (checkpoints.metadata(step), checkpoints.restore(step, make_state()))
            )
            assert found is not None and found[0] == 2 and found[1][0] == {"step": 2}
            chex.assert_trees_all_equal(found[1][1], make_state(2))
        assert (tmp_path / "2" / CHECKSUMS).exists() == writing
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "1" / CHECKSUMS).exists() and not (tmp_path.parent / "damaged-checkpoints").exists()
    do_damage(tmp_path / "2", "bit blocks")
    with Checkpointer(tmp_path, writing=False) as checkpoints, pytest.raises(DamagedCheckpoint, match="have changed"):
        checkpoints.restore(2, make_state())


@pytest.mark.parametrize(
    "file", ["_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "state/d/*", "state"]
)
def test_what_an_unsummed_checkpoint_lacks_is_found_all_the_same(tmp_path: Path, file: str) -> None:
    unsummed(tmp_path, 1)
    unsummed(tmp_path, 2)
    for path in list((tmp_path / "2").glob(file)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with Checkpointer(tmp_path, writing=False) as checkpoints:
        found = checkpoints.restore_latest(lambda step: checkpoints.restore(step, make_state()))
        assert found is not None and found[0] == 1
        assert checkpoints.every_metadata() == [{"step": 1}] or file not in ("_CHECKPOINT_METADATA", "state/_METADATA")


def test_each_file_is_read_once_and_the_last_save_is_summed_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(tmp_path, writing=True) as checkpoints:
        checkpoints.save(1, make_state(), {})
        limit = time.monotonic() + 30
        while not (tmp_path / "1" / CHECKSUMS).exists():
            assert time.monotonic() < limit
            time.sleep(0.01)
    read = Counter[str]()

    def counted(path: Path, *rest: Any) -> Any:
        read[path.name] += 1
        return checksum(path, *rest)

    monkeypatch.setattr(checksums, "checksum", counted)
    with Checkpointer(tmp_path, writing=True) as checkpoints:
        checkpoints.restore_latest(lambda step: (checkpoints.metadata(step), checkpoints.restore(step, make_state())))
        checkpoints.restore_params(1, make_state().params)
    assert sum(read.values()) == len(checksums.files_below(tmp_path / "1"))


def test_a_checkpoint_of_another_model_is_not_passed_over(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, writing=True) as checkpoints:
        checkpoints.save(1, make_state(), {})
        with pytest.raises(InputError, match="a checkpoint of another model"):
            checkpoints.restore_latest(lambda step: checkpoints.restore(step, make_state(width=8)))


def test_what_an_interrupted_save_left_is_no_checkpoint(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, writing=True) as checkpoints:
        checkpoints.save(1, make_state(), {})
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpointer(tmp_path, writing=False) as checkpoints:  # it may be the save of a run that is going on
        assert checkpoints.steps() == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.orbax-checkpoint-tmp"]
    with Checkpointer(tmp_path, writing=True) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.save(2, make_state(2), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_checkpoint_that_does_not_fit_on_the_disk(tmp_path: Path) -> None:
    state = {"params": jax.random.normal(jax.random.key(0), (500, 500))}
    checkpoints = Checkpointer(tmp_path, writing=True)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    with no_file_larger_than(100_000), pytest.raises(InputError, match=r"/2: the checkpoint could not be written"):
        checkpoints.save(2, state, {})
        checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    checkpoints.save(3, state, {})
    chex.assert_trees_all_equal(checkpoints.restore(3, state), state)
    checkpoints.wait()


def test_a_process_that_is_gone_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Orbax says where processes wait for one another, without the error of JAX that it comes from."""

    def lost(*_: object, **__: object) -> None:
        raise TimeoutError("Timeout waiting at barrier 'create_directory'. The original error raised was: UNAVAILABLE")

    with Checkpointer(tmp_path, writing=True) as checkpoints:
        monkeypatch.setattr(checkpoints._ocp, "save_async", lost)
        with pytest.raises(jax.errors.JaxRuntimeError, match="barrier"):
            checkpoints.save(1, make_state(), {})
