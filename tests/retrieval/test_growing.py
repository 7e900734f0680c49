"""An index that grows: only what is new is embedded, and what it finds is what an index built from nothing finds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import files
from world import build, tiny_config

from ragjax.checksums import CHECKSUMS
from ragjax.cli import main
from ragjax.commands.index import build_index
from ragjax.config import Config
from ragjax.data.corpus import Passage, passage_record
from ragjax.data.passage_store import PassageStore, shard_folder
from ragjax.errors import InputError
from ragjax.files import write_jsonl
from ragjax.rag import load_pipeline
from ragjax.retrieval import faiss_index as faiss_module
from ragjax.retrieval.building import earlier_index as earlier_module
from ragjax.retrieval.building import shard_writer as writer_module
from ragjax.retrieval.building.shard_plan import PassageKeys, plan_growth
from ragjax.retrieval.index import MANIFEST, Index, open_index, read_index_manifest

Corpus = list[dict[str, str]]


def passages(world: Path) -> Corpus:
    return [json.loads(line) for line in (world / "passages.jsonl").read_text().splitlines()]


def config_for(world: Path, folder: Path, corpus: Corpus, **settings: object) -> Config:
    """The world's configuration with another corpus, in shards of 8; `name` is that of the index."""
    write_jsonl(folder / "corpus.jsonl", corpus)
    name = settings.pop("name", "index")
    places = {"corpus__source": str(folder / "corpus.jsonl"), "index__path": f"{folder}/{name}"}
    return tiny_config(world, **(places | {"index__shard_size": 8} | settings))


def opened(config: Config) -> Index:
    return open_index(Path(config.index.path), load_pipeline(config).fingerprints)


@pytest.fixture(scope="module")
def base(world: Path) -> Path:
    """The world's index in shards of 8, 8, 8 and 6 passages."""
    return build(tiny_config(world, index__path=str(world / "base"), index__shard_size=8))


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many passages went through the encoder, call by call."""
    counts, embed = list[int](), writer_module.embed_batches

    def counted(rag: Any, params: Any, token_rows: Sequence[Any]) -> Iterator[Any]:
        counts.append(len(token_rows))
        return embed(rag, params, token_rows)

    monkeypatch.setattr(writer_module, "embed_batches", counted)
    return counts


def new_passage(number: int) -> dict[str, str]:
    return {"id": f"n{number}", "title": f"Newland {number}", "text": f"Its capital is Newbourg {number}."}


def edited(corpus: Corpus, number: int) -> dict[str, str]:
    return corpus[number] | {"text": f"Its capital was {corpus[number]['title']}."}


EDITS: dict[str, tuple[Callable[[Corpus], Corpus], tuple[int, int, int], int, list[int]]] = {
    # the corpus after, (added, changed, removed), how many are embedded, the shards that stay
    "one at the end": (lambda c: [*c, new_passage(0)], (1, 0, 0), 1, [0, 1, 2, 3]),
    "one at the beginning": (lambda c: [new_passage(0), *c], (1, 0, 0), 1, [0, 1, 2, 3]),
    "one changed": (lambda c: [*c[:9], edited(c, 9), *c[10:]], (0, 1, 0), 1, [0, 2, 3]),
    "one gone": (lambda c: c[:20] + c[21:], (0, 0, 1), 0, [0, 1, 3]),
    "the last gone": (lambda c: c[:29], (0, 0, 1), 0, [0, 1, 2]),
    "another order": (lambda c: c[8:] + c[:8], (0, 0, 0), 0, [1, 2, 3, 0]),
    "reversed": (lambda c: c[::-1], (0, 0, 0), 0, []),
    "another id": (lambda c: [c[0] | {"id": "other"}, *c[1:]], (1, 0, 1), 0, [1, 2, 3]),
    "two with one text": (lambda c: [*c, c[3] | {"id": "twin"}], (1, 0, 0), 0, [0, 1, 2, 3]),
    "everything": (
        lambda c: [new_passage(1), *c[1:12], edited(c, 12), *c[13:25], new_passage(2), new_passage(3), *c[26:]],
        (3, 1, 2),
        4,
        [2],
    ),
    "none as before": (lambda c: [new_passage(i) for i in range(9)], (9, 0, 30), 9, []),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_grown_index_finds_what_a_fresh_one_finds(
    world: Path, base: Path, tmp_path: Path, name: str, embedded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    edit, counts, new, stay = EDITS[name]
    before = passages(world)
    shutil.copytree(base, tmp_path / "index")
    embedded.clear()
    inodes = {p.name: (p / "embeddings.npy").stat().st_ino for p in (tmp_path / "index" / "shards").iterdir()}
    after = edit(before)
    capsys.readouterr()
    config = config_for(world, tmp_path, after)
    build(config)
    told = capsys.readouterr().err
    assert sum(embedded) == new
    added, changed, removed = counts
    assert f"{added} added, {changed} changed, {removed} removed, {len(before) - changed - removed} unchanged" in told
    assert f"{len(stay)} of its 4 shards stay" in told
    now = [(p / "embeddings.npy").stat().st_ino for p in sorted((tmp_path / "index" / "shards").iterdir())]
    assert [inode for inode in now if inode in inodes.values()] == [inodes[f"{number:05d}"] for number in stay]
    embedded.clear()
    fresh = build(config_for(world, tmp_path, after, name="fresh"))
    assert sum(embedded) == len(after)
    assert list(PassageStore.open(tmp_path / "index")) == list(PassageStore.open(fresh))
    queries = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    ours, theirs = opened(config), opened(config_for(world, tmp_path, after, name="fresh"))
    for found, expected in zip(ours.search(queries, 7), theirs.search(queries, 7), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert ours.manifest["corpus"] == theirs.manifest["corpus"] and ours.version == theirs.version
    assert ours.manifest["generator_tokens"] == theirs.manifest["generator_tokens"]
    build(config_for(world, tmp_path, after))
    assert "holds this index already" in capsys.readouterr().err


def test_plans_keep_what_stays_whatever_was_edited() -> None:
    """Against an oracle on lists: each kept shard is those passages, all others are cut small, nothing is lost."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = int(rng.integers(1, 7))
        before = [(int(i), int(rng.integers(3))) for i in rng.permutation(40)[: rng.integers(1, 30)]]
        counts = list[int]()
        while sum(counts) < len(before):
            counts.append(min(int(rng.integers(1, size + 1)), len(before) - sum(counts)))
        after = [p if rng.random() < 0.9 else (p[0], p[1] + 1) for p in before if rng.random() < 0.95]
        for number in range(rng.integers(0, 4)):
            after.insert(int(rng.integers(len(after) + 1)), (100 + number, 0))
        if rng.random() < 0.2 and after:
            cut = int(rng.integers(len(after)))
            after = after[cut:] + after[:cut]
        if not after:
            continue
        plan, changes = plan_growth("x", keys(before), dict(enumerate(counts)), keys(after), size)
        assert sum(plan.counts) == len(after) and min(plan.counts) >= 1 and max(plan.counts) <= max(size, *counts)
        starts = np.cumsum([0, *counts])
        shards = [before[start : start + count] for start, count in zip(starts, counts, strict=False)]
        for here, there in plan.kept.items():
            assert after[plan.starts[here] :][: plan.counts[here]] == shards[there]
        follow = [s for s in shards if any(after[i : i + len(s)] == s for i in range(len(after)))]
        large = sum(2 * len(s) >= size for s in follow)
        assert large <= len(plan.kept) <= len(follow)
        assert plan.appended == (after[: len(before)] == before)
        ids = dict(before)
        assert changes.added == sum(i not in ids for i, _ in after)
        assert changes.changed == sum(i in ids and ids[i] != text for i, text in after)
        assert changes.removed == len(ids.keys() - dict(after).keys())
        assert changes.unchanged == sum(ids.get(i) == text for i, text in after)


def keys(some: Sequence[tuple[int, int]]) -> PassageKeys:
    found = PassageKeys()
    for number, text in some:
        found.add(passage_record(Passage(str(number), "", str(text))))
    return found


def test_an_index_that_grows_often_does_not_end_in_crumbs(world: Path, tmp_path: Path, embedded: list[int]) -> None:
    corpus = passages(world)[:5]
    for number in range(9):
        corpus = [*corpus, new_passage(number)]
        build(config_for(world, tmp_path, corpus))
    assert read_index_manifest(tmp_path / "index")["shards"] == [6, 4, 4]  # half of the size or more
    assert sum(embedded) == 14


def test_equal_keys_are_not_enough(world: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two texts had one key, each would still get its own embedding: bytes are compared."""
    monkeypatch.setattr("ragjax.retrieval.building.shard_plan.xxh3_64_intdigest", len)
    before = passages(world)
    shutil.copytree(base, tmp_path / "index")
    after = [*before[:9], before[9] | {"text": before[9]["text"][:-2] + "x."}, *before[10:]]
    config = config_for(world, tmp_path, after)
    build(config)
    fresh = config_for(world, tmp_path, after, name="fresh")
    build(fresh)
    np.testing.assert_allclose(opened(config).embeddings, opened(fresh).embeddings, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "new", "stay"),
    [
        ({"index__kind": "HNSW8"}, 1, 4),
        ({"generator__passage_template": "{text}"}, 1, 0),  # other tokens for the generator, the same embeddings
        ({"retriever__pooling": "cls"}, 31, None),
        ({"retriever__max_passage_tokens": 60}, 31, None),
        ({"index__dtype": "bfloat16"}, 31, None),
        ({"dtype": "bfloat16"}, 31, None),
        ({"corpus__max_passages": 16}, 0, 2),
    ],
)
def test_other_settings_embed_only_what_they_must(
    world: Path,
    base: Path,
    tmp_path: Path,
    settings: dict[str, object],
    new: int,
    stay: int | None,
    embedded: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(base, tmp_path / "index")
    config = config_for(world, tmp_path, [*passages(world), new_passage(0)], **settings)
    build(config)
    told = capsys.readouterr().err
    assert sum(embedded) == new
    assert f"{stay} of its 4 shards stay" in told if stay is not None else "shards stay" not in told
    if stay == 0:
        store, rag = PassageStore.open(tmp_path / "index"), load_pipeline(config)
        assert store.tokens(0).tolist() == rag.generator_tokenizer.encode([store[0].text])[0]


def test_damaged_shards_do_not_serve(world: Path, base: Path, tmp_path: Path, embedded: list[int]) -> None:
    before = passages(world)
    shutil.copytree(base, tmp_path / "index")
    path = shard_folder(tmp_path / "index", 1) / "embeddings.npy"
    content = path.read_bytes()
    path.write_bytes(content[:300] + bytes([content[300] ^ 4]) + content[301:])
    embedded.clear()
    after = [*before, new_passage(0)]
    config = config_for(world, tmp_path, after)
    build(config)
    assert sum(embedded) == 9
    fresh = config_for(world, tmp_path, after, name="fresh")
    build(fresh)
    np.testing.assert_allclose(opened(config).embeddings, opened(fresh).embeddings, atol=1e-6)


def test_disks_without_links_get_copies(
    world: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    before = passages(world)
    shutil.copytree(base, tmp_path / "index")
    old = {path.name: path.read_bytes() for path in shard_folder(tmp_path / "index", 0).iterdir()}
    monkeypatch.setattr(earlier_module.os, "link", refuse)
    build(config_for(world, tmp_path, [*before, new_passage(0)]))
    assert {path.name: path.read_bytes() for path in shard_folder(tmp_path / "index", 0).iterdir()} == old


# structures of FAISS


@pytest.mark.parametrize("kind", ["IVF2,Flat", "PCA16,IVF2,Flat", "HNSW8", "SQ8"])
@pytest.mark.parametrize("appended", [True, False])
def test_trained_structures_stay_trained(
    world: Path,
    tmp_path: Path,
    kind: str,
    appended: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import faiss

    before = passages(world)
    settings: dict[str, object] = {"index__kind": kind}
    build(config_for(world, tmp_path, before, **settings))
    old = faiss.read_index(str(tmp_path / "index" / "faiss.index"))
    added, add = list[int](), faiss_module._add
    after = [*before, *map(new_passage, range(4))] if appended else [new_passage(0), *before[:28]]
    config = config_for(world, tmp_path, after, **settings)

    def counted(index: Any, kind: str, vectors: np.ndarray) -> None:
        added.append(len(vectors))
        add(index, kind, vectors)

    with monkeypatch.context() as patch:
        patch.setattr(faiss_module, "_train", lambda *_: pytest.fail("it is trained"))
        patch.setattr(faiss_module, "_add", counted)
        patch.setattr("ragjax.commands.index.check_kind", lambda *_: None)  # it trains on random vectors
        build(config)
    assert added == [4 if appended else 29]
    told = " ".join(capsys.readouterr().err.split())
    assert "was trained when there were 30 passages; recall@10, passages as questions: " in told
    assert "--rebuild trains it anew" in told
    index = opened(config)
    assert index.manifest["trained_on"] == 30 and index.faiss_index.ntotal == len(after)
    if (clusters := faiss.try_extract_index_ivf(old)) is not None:
        ours = faiss.try_extract_index_ivf(index.faiss_index)
        assert ours is not None
        np.testing.assert_array_equal(
            ours.quantizer.reconstruct_n(0, clusters.nlist), clusters.quantizer.reconstruct_n(0, clusters.nlist)
        )
    _, ids = index.search(np.asarray(index.embeddings), 3)  # each finds itself where others are not its equals
    assert np.mean([i in row for i, row in enumerate(ids)]) >= 0.9
    if not appended:
        return
    assert build_index(config, rebuild=True) == tmp_path / "index"
    rebuilt = opened(config)
    assert "trained_on" not in rebuilt.manifest and rebuilt.version != index.version
    fresh = build(config_for(world, tmp_path, after, name="fresh", **settings))
    assert rebuilt.version == opened(config_for(world, tmp_path, after, name="fresh", **settings)).version
    assert len({(folder / "faiss.index").stat().st_size for folder in (tmp_path / "index", fresh)}) == 1


def test_recall_is_measured_against_the_exact_search(world: Path, tmp_path: Path) -> None:
    config = config_for(world, tmp_path, passages(world), index__kind="IVF8,Flat", index__dtype="bfloat16")
    build(config)
    index = opened(config)
    queries = np.asarray(index.embeddings[np.arange(9)], np.float32)
    index.faiss_index.nprobe = 1
    scores = queries @ np.asarray(index.embeddings).astype(np.float32).T
    exact, (_, found) = np.argsort(-scores, axis=1, kind="stable")[:, :4], index.search(queries, 4)
    expected = np.mean([len(set(a) & set(b)) / 4 for a, b in zip(exact.tolist(), found.tolist(), strict=True)])
    assert index.measured_recall(queries, 4) == pytest.approx(expected) and expected < 1


def test_there_is_nothing_to_train_in_an_exact_index(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(world / "index")
    assert main(["index", str(world / "config.yaml"), "--rebuild"]) == 2
    assert "--rebuild trains a FAISS kind anew, and index.kind=exact has nothing to train" in capsys.readouterr().err
    assert files(world / "index") == before


# stops


class Killed(BaseException):
    """Stands for a kill: nothing is tidied up."""


WRITES = [(os, "replace"), (os, "link"), (shutil, "rmtree"), (Path, "unlink"), (Path, "rename"), (Path, "mkdir")]


@pytest.mark.parametrize(
    ("kind", "every"),
    [
        ("exact", 17),
        pytest.param("exact", 1, marks=pytest.mark.slow),
        pytest.param("IVF2,Flat", 1, marks=pytest.mark.slow),
    ],
)
def test_stopped_anywhere_it_is_the_old_index_or_the_new_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, every: int
) -> None:
    """After each write that a growing build makes, or some: what opens is one of the two, or between them nothing, and
    the same command ends with the new one.
    """
    before = passages(world)
    after = [*before[:9], edited(before, 9), *before[10:], *map(new_passage, range(3))]
    settings: dict[str, object] = {"index__kind": kind}
    config = config_for(world, tmp_path, before, name="old", **settings)
    old = build(config)
    config = config_for(world, tmp_path, after, **settings)
    shutil.copytree(old, tmp_path / "index")
    build(config)
    new = contents(tmp_path / "index")
    rag, states = load_pipeline(config), set[str]()
    monkeypatch.setattr("ragjax.commands.index.load_pipeline", lambda _: rag)
    for stop in range(0, 1000, every):
        shutil.rmtree(tmp_path / "index")
        shutil.copytree(old, tmp_path / "index")
        with monkeypatch.context() as patch:
            if not stopped_after(patch, stop, lambda: build(config)):
                break
        states.add(state := which(tmp_path / "index", contents(old), new))
        assert state in ("old", "none", "new")
        build(config)
        assert contents(tmp_path / "index") == new
        assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "index", "old"]
    assert stop > 40 and (every > 1 or states == {"old", "none", "new"})


def contents(folder: Path) -> dict[str, bytes]:
    """The files of an index but made_of.json."""
    return {str(p.relative_to(folder)): data for p, data in files(folder).items() if p.name != "made_of.json"}


def which(folder: Path, old: dict[str, bytes], new: dict[str, bytes]) -> str:
    if not (folder / MANIFEST).is_file():
        return "none"
    return "old" if contents(folder) == old else "new" if contents(folder) == new else "a mixture"


def stopped_after(patch: pytest.MonkeyPatch, writes: int, action: Callable[[], Any]) -> bool:
    """Runs something that is killed when it is about to write once more than so often; False where it ends before."""
    done = 0

    def counted(write: Any) -> Any:
        def act(*given: Any, **more: Any) -> Any:
            nonlocal done
            if done == writes:
                raise Killed
            done += 1
            return write(*given, **more)

        return act

    for of, name in WRITES:
        patch.setattr(of, name, counted(getattr(of, name)))
    try:
        action()
    except Killed:
        return True
    return False


def test_a_corpus_that_changes_again_grows_from_what_was_built(
    world: Path, base: Path, tmp_path: Path, embedded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the new index was moved to its place, with the old one gone already."""
    before = passages(world)
    shutil.copytree(base, tmp_path / "index")
    config = config_for(world, tmp_path, [*before, new_passage(0)])
    replace = os.replace

    def stop_at_the_manifest(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "index" / MANIFEST:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_manifest)
        with pytest.raises(Killed):
            build(config)
    with pytest.raises(InputError, match="not complete"):
        read_index_manifest(tmp_path / "index")
    embedded.clear()
    build(config_for(world, tmp_path, [*before, new_passage(0), new_passage(1)]))
    assert sum(embedded) == 1
    assert len(PassageStore.open(tmp_path / "index")) == 32
    assert not (tmp_path / "index.partial").exists()


def test_checksums_of_a_shard_that_stays_name_its_new_place(world: Path, base: Path, tmp_path: Path) -> None:
    before = passages(world)
    shutil.copytree(base, tmp_path / "index")
    build(config_for(world, tmp_path, [*map(new_passage, range(8)), *before]))
    numbers = [json.loads((shard / CHECKSUMS).read_text())["number"] for shard in shards(tmp_path / "index")]
    assert numbers == [0, 1, 2, 3, 4]
    assert main(["verify", str(tmp_path / "index")]) == 0


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "shards").iterdir())
