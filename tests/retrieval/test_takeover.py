"""Ready vectors: whatever they come in, the index is the one that the encoder would have made, or they are refused."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trained import files
from world import tiny_config

from ragjax.cli import main
from ragjax.commands.index import build_index
from ragjax.config import Config
from ragjax.data.passage_store import PassageStore
from ragjax.errors import InputError
from ragjax.files import write_jsonl
from ragjax.rag import load_pipeline
from ragjax.retrieval.building import shard_writer as writer_module
from ragjax.retrieval.building import takeover as takeover_module
from ragjax.retrieval.index import Index, open_index
from ragjax.retrieval.vector_files.source import open_vectors

Write = Callable[[Path, np.ndarray, list[str]], Path]


@pytest.fixture(scope="module")
def vectors(world: Path) -> np.ndarray:
    """What the world's encoder makes of its thirty passages."""
    index = open_index(world / "index", load_pipeline(tiny_config(world)).fingerprints)
    return np.asarray(index.embeddings)


@pytest.fixture(scope="module")
def ids(world: Path) -> list[str]:
    return [passage.id for passage in PassageStore.open(world / "index")]


def config_for(world: Path, folder: Path, **settings: object) -> Config:
    return tiny_config(world, **({"index__path": str(folder / "index"), "index__shard_size": 7} | settings))


def opened(config: Config) -> Index:
    return open_index(Path(config.index.path), load_pipeline(config).fingerprints)


def write_ids(path: Path, ids: list[str]) -> None:
    path.write_text("".join(f"{id_}\n" for id_ in ids))


def npy(folder: Path, vectors: np.ndarray, ids: list[str], beside: str = "ids.txt") -> Path:
    np.save(folder / "vectors.npy", vectors)
    write_ids(folder / beside, ids)
    return folder / "vectors.npy"


def npy_ids(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    np.save(folder / "vectors.npy", np.asfortranarray(vectors.astype(">f8")))
    np.save(folder / "vectors_ids.npy", np.array(ids))
    return folder / "vectors.npy"


def npz(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    np.savez(folder / "vectors.npz", ids=np.array(ids), embeddings=vectors)
    return folder / "vectors.npz"


def many_npy(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    for number, part in enumerate(np.array_split(np.arange(len(ids)), 3)):
        np.save(folder / f"part{number}.npy", vectors[part])
        write_ids(folder / f"part{number}.ids.txt", [ids[i] for i in part])
    return folder / "part*.npy"


def folder_of_npy(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    many_npy(folder, vectors, ids)
    return folder


def table(vectors: np.ndarray, ids: list[str], kind: pa.DataType) -> pa.Table:
    return pa.table(
        {
            "_id": ids,
            "text": ["…"] * len(ids),
            "scores": [[0.5]] * len(ids),
            "embeddings": pa.array(list(vectors), kind),
        }
    )


def parquet(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    pq.write_table(table(vectors, ids, pa.list_(pa.float32())), folder / "a.parquet", row_group_size=4)
    return folder / "a.parquet"


def two_parquet(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    kind = pa.list_(pa.float64(), vectors.shape[1])
    for name, part in (("a", slice(0, 11)), ("b", slice(11, None))):
        pq.write_table(table(vectors[part], ids[part], kind), folder / f"{name}.parquet", row_group_size=5)
    return folder


def arrow_stream(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    whole = table(vectors, ids, pa.list_(pa.float32()))
    with pa.ipc.new_stream(folder / "data.arrow", whole.schema) as writer:
        writer.write_table(whole, max_chunksize=4)
    return folder / "data.arrow"


def arrow_file(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    whole = table(vectors, ids, pa.large_list(pa.float32()))
    with pa.ipc.new_file(folder / "data.arrow", whole.schema) as writer:
        writer.write_table(whole, max_chunksize=7)
    return folder / "data.arrow"


def pyserini(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    return faiss_file("Flat")(folder, vectors, ids).parent


def faiss_file(kind: str) -> Write:
    def write(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
        import faiss

        index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        index.train(np.random.default_rng(0).normal(size=(700, vectors.shape[1])).astype(np.float32))
        if kind.startswith("IDMap"):
            index.add_with_ids(vectors, np.array([int(id_[1:]) for id_ in ids]))
        else:
            index.add(vectors)
        faiss.write_index(index, str(folder / "index"))
        write_ids(folder / "docid", ids)
        return folder / "index"

    return write


FORMS: dict[str, Write] = {
    "npy": npy,
    "npy of float64 of other machines, by columns, ids in npy": npy_ids,
    "npz": npz,
    "several npy": many_npy,
    "folder of npy": folder_of_npy,
    "parquet": parquet,
    "folder of parquet": two_parquet,
    "arrow stream": arrow_stream,
    "arrow file": arrow_file,
    "pyserini": pyserini,
    "HNSW": faiss_file("HNSW8"),
    "IVF": faiss_file("IVF2,Flat"),
    "rotated": faiss_file("OPQ4,Flat"),
    "rotated clusters": faiss_file("OPQ4,IVF2,Flat"),
    "refined": faiss_file("Flat,RFlat"),
}


@pytest.mark.parametrize(
    ("form", "order"),
    [(form, "the corpus' order") for form in FORMS]
    + [(form, "another order") for form in ("npy", "several npy", "folder of parquet", "arrow stream", "IVF")],
)
def test_every_form_gives_the_index_that_the_encoder_makes(
    world: Path,
    tmp_path: Path,
    vectors: np.ndarray,
    ids: list[str],
    form: str,
    order: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = np.arange(30) if order == "the corpus' order" else np.random.default_rng(0).permutation(30)
    (tmp_path / "source").mkdir()
    source = FORMS[form](tmp_path / "source", vectors[rows], [ids[row] for row in rows])
    monkeypatch.setattr(writer_module, "embed_batches", lambda *_: pytest.fail("nothing is embedded but the sample"))
    monkeypatch.setattr(takeover_module, "TOGETHER", 3)
    config = config_for(world, tmp_path)
    build_index(config, str(source))
    told = " ".join(capsys.readouterr().err.split())
    assert "30 vectors × 32, float" in told and "by the ids" in told
    assert "30 passages embedded anew agree, by a cosine of 1.00000 or more" in told
    index = opened(config)
    np.testing.assert_allclose(index.embeddings, vectors, atol=1e-5 if form.startswith("rotated") else 0, rtol=0)
    assert index.manifest["vectors"]["by_id"] == (order == "another order")
    assert (
        index.manifest["vectors"]["source"] == str(source) and index.manifest["vectors"]["agreement"]["least"] > 0.999
    )
    assert list(PassageStore.open(tmp_path / "index")) == list(PassageStore.open(world / "index"))
    assert index.version != opened(tiny_config(world)).version
    build_index(config)
    assert "holds this index already" in capsys.readouterr().err


def test_without_ids_the_rows_are_the_corpus_in_its_order(
    world: Path, tmp_path: Path, vectors: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "v.npy", vectors.astype(np.float16))
    config = config_for(world, tmp_path, index__dtype="float16")
    assert main(["index", *as_arguments(config, world), "--from", str(tmp_path / "v.npy")]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "30 vectors × 32, float16, its rows taken in the corpus' order" in told
    np.testing.assert_array_equal(np.asarray(opened(config).embeddings), vectors.astype(np.float16))
    before = files(tmp_path)
    assert main(["index", *as_arguments(config, world), "--from", f"{tmp_path}/v.npy"]) == 0, "it is there"
    np.save(tmp_path / "w.npy", vectors)
    assert main(["index", *as_arguments(config, world), "--from", f"{tmp_path}/w.npy"]) == 2
    assert f"with other embeddings than {tmp_path}/w.npy has now; delete it to take" in capsys.readouterr().err
    (tmp_path / "w.npy").unlink()
    assert files(tmp_path) == before
    np.save(tmp_path / "v.npy", vectors[:29])
    before = files(tmp_path)
    assert main(["index", *as_arguments(config, world, "x"), "--from", f"{tmp_path}/v.npy"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert files(tmp_path) == before
    assert "there are 29 vectors, and 30 passages in the corpus; without ids there must be one for each" in line
    assert "v.ids.txt" in line


def as_arguments(config: Config, world: Path, more: str = "") -> list[str]:
    return [
        str(world / "config.yaml"),
        f"index.path={config.index.path}{more}",
        f"index.shard_size={config.index.shard_size}",
        f"index.dtype={config.index.dtype}",
    ]


def test_numbers_of_a_faiss_index_are_ids(world: Path, tmp_path: Path, vectors: np.ndarray) -> None:
    corpus = [json.loads(line) for line in (world / "passages.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "corpus.jsonl", (record | {"id": record["id"][1:]} for record in corpus))
    rows = np.random.default_rng(1).permutation(30)
    (tmp_path / "source").mkdir()
    source = faiss_file("IDMap,Flat")(tmp_path / "source", vectors[rows], [f"p{row}" for row in rows])
    config = config_for(world, tmp_path, corpus__source=str(tmp_path / "corpus.jsonl"))
    build_index(config, str(source))
    np.testing.assert_array_equal(np.asarray(opened(config).embeddings), vectors)


@pytest.mark.parametrize("ids_there", [True, False])
def test_with_fewer_passages_the_first_vectors_serve(
    world: Path, tmp_path: Path, vectors: np.ndarray, ids: list[str], ids_there: bool
) -> None:
    source = npy(tmp_path, vectors, ids)
    if not ids_there:
        (tmp_path / "ids.txt").unlink()
    config = config_for(world, tmp_path, corpus__max_passages=12)
    build_index(config, str(source))
    np.testing.assert_array_equal(np.asarray(opened(config).embeddings), vectors[:12])


def test_bfloat16_as_numpy_writes_it(world: Path, tmp_path: Path, vectors: np.ndarray) -> None:
    np.save(tmp_path / "v.npy", vectors.astype(ml_dtypes.bfloat16))
    config = config_for(world, tmp_path, index__dtype="bfloat16")
    build_index(config, f"{tmp_path}/v.npy")
    np.testing.assert_array_equal(np.asarray(opened(config).embeddings), vectors.astype(ml_dtypes.bfloat16))


def test_they_get_length_one_where_the_encoder_gives_it(world: Path, tmp_path: Path, vectors: np.ndarray) -> None:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(tmp_path / "v.npy", 3 * unit)
    config = config_for(world, tmp_path, retriever__normalize=True)
    build_index(config, f"{tmp_path}/v.npy")
    np.testing.assert_allclose(opened(config).embeddings, unit, atol=1e-6)


WRONG: dict[str, tuple[dict[str, object], Callable[[np.ndarray], np.ndarray], str]] = {
    "another pooling": ({"retriever__pooling": "cls"}, lambda v: v, "the cosine is"),
    "another order": ({}, lambda v: np.roll(v, 1, axis=0), "are nearer to the vector of another passage"),
    "another model": ({}, lambda v: np.random.default_rng(0).normal(size=v.shape), "the cosine is"),
    "some of another model": (
        {},
        lambda v: np.where(np.arange(30)[:, None] == 17, -v, v),
        "the cosine is -1.0000 at least and 1.0000 in the median",
    ),
    "another length": ({"retriever__normalize": False}, lambda v: 2 * v, "same way, but are 0."),
    "another width": ({}, lambda v: v[:, :16], "have 16 dimensions, and those of the encoder of passages 32"),
    "a zero": ({}, lambda v: v * (np.arange(30)[:, None] != 3), "the vector of passage 'p3' is zero or not finite"),
    "no number": ({}, lambda v: np.where(np.arange(30)[:, None] == 3, np.nan, v), "passage 'p3' is zero or not finite"),
}


@pytest.mark.parametrize("what", WRONG)
def test_vectors_of_another_encoder_are_refused(
    world: Path, tmp_path: Path, vectors: np.ndarray, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, change, why = WRONG[what]
    np.save(tmp_path / "v.npy", change(vectors).astype(np.float32))
    with pytest.raises(InputError) as refusal:
        build_index(config_for(world, tmp_path, **settings), f"{tmp_path}/v.npy")
    assert why in str(refusal.value)
    if "cosine" in why:
        for check in ("retriever.pooling (", "retriever.normalize (", "retriever.passage_template (", "is the model"):
            assert check in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]


def test_the_sample_is_drawn_by_the_seed_from_all(world: Path, tmp_path: Path, vectors: np.ndarray) -> None:
    """A wrong vector is found about as often as it is drawn, and each seed decides for itself, always alike."""
    rag = load_pipeline(config_for(world, tmp_path))
    np.save(tmp_path / "v.npy", vectors)
    drawn = np.zeros(30, int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(takeover_module, "CHECKED", 6)
        for seed in range(400):
            samples = []
            for _ in range(2):
                config = rag.config.replace(seed=seed)
                takeover = takeover_module.Takeover(
                    type(rag)(**vars(rag) | {"config": config}), open_vectors(f"{tmp_path}/v.npy")
                )
                for passage in PassageStore.open(world / "index"):
                    takeover.visit(passage, b"")
                samples.append([position for position, _ in takeover._sample])
            assert samples[0] == samples[1] and len(set(samples[0])) == 6
            drawn[samples[0]] += 1
    assert drawn.sum() == 2400 and (np.abs(drawn - 80) < 5 * np.sqrt(80 * 0.8)).all()


IDS: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "one too few": (lambda i: i[:29], "there are 30 vectors, and 29 ids in ids.txt"),
    "twice": (lambda i: [*i[:29], i[3]], "1 ids stand twice ('p3'); delete one of the vectors"),
    "missing": (lambda i: [*i[:26], *"abcd"], "4 of 30 passages have no vector ('p26', 'p27', 'p28', …)"),
}


@pytest.mark.parametrize("what", IDS)
def test_ids_that_do_not_fit_are_named_and_counted(
    world: Path, tmp_path: Path, vectors: np.ndarray, ids: list[str], what: str
) -> None:
    change, why = IDS[what]
    source = npy(tmp_path, vectors, change(ids))
    with pytest.raises(InputError, match=r"vectors\.npy") as refusal:
        build_index(config_for(world, tmp_path), str(source))
    assert why in str(refusal.value) and not (tmp_path / "index").exists()


def test_vectors_of_unknown_passages_are_named_and_counted(
    world: Path, tmp_path: Path, vectors: np.ndarray, ids: list[str]
) -> None:
    source = npy(tmp_path, np.vstack([vectors[:2], vectors]), ["x", "y\x1b[31m", *ids])
    with pytest.raises(InputError, match="2 of 32 vectors are of passages that the corpus does not have") as refusal:
        build_index(config_for(world, tmp_path), str(source))
    assert r"('x', 'y\x1b[31m')" in str(refusal.value)


def stopped_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    write, done = writer_module.ShardWriter.write, list[Any]()

    def stop(writer: Any, *given: Any) -> None:
        if len(done) == shards:
            raise KeyboardInterrupt
        done.append(given)
        write(writer, *given)

    monkeypatch.setattr(writer_module.ShardWriter, "write", stop)


@pytest.mark.parametrize("order", ["the corpus' order", "another order"])
def test_a_takeover_that_was_stopped_goes_on(
    world: Path, tmp_path: Path, vectors: np.ndarray, ids: list[str], order: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.arange(30) if order == "the corpus' order" else np.arange(30)[::-1]
    source = parquet(tmp_path, vectors[rows], [ids[row] for row in rows])
    undisturbed = build_index(config_for(world, tmp_path), str(source))
    whole = {p.relative_to(undisturbed): data for p, data in files(undisturbed).items()}
    config = config_for(world, tmp_path, index__path=str(tmp_path / "again"))
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            build_index(config, str(source))
    assert not (tmp_path / "again").exists()
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ragjax.commands.index.scan_passages", None)  # neither read nor checked again
        patch.setattr(takeover_module, "embed_in_memory", None)
        build_index(config, str(source))
    assert "going on with the index: 14 of 30 passages are there" in capsys.readouterr().err
    assert {p.relative_to(tmp_path / "again"): data for p, data in files(tmp_path / "again").items()} == whole


def test_another_source_starts_anew(
    world: Path, tmp_path: Path, vectors: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "v.npy", vectors)
    config = config_for(world, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            build_index(config, f"{tmp_path}/v.npy")
    np.save(tmp_path / "v.npy", vectors)
    os.utime(tmp_path / "v.npy", ns=(1, 1))
    build_index(config, f"{tmp_path}/v.npy")
    told = capsys.readouterr().err
    assert "going on" not in told and "begun anew" in " ".join(told.split())
    np.testing.assert_array_equal(np.asarray(opened(config).embeddings), vectors)


def test_what_was_taken_over_grows_and_is_mended_by_the_encoder(
    world: Path, tmp_path: Path, vectors: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = [json.loads(line) for line in (world / "passages.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "corpus.jsonl", corpus)
    np.save(tmp_path / "v.npy", vectors)
    config = config_for(world, tmp_path, corpus__source=str(tmp_path / "corpus.jsonl"))
    build_index(config, f"{tmp_path}/v.npy")
    write_jsonl(tmp_path / "corpus.jsonl", [*corpus, {"id": "n", "title": "New", "text": "A new land."}])
    build_index(config)
    index = opened(config)
    assert len(index) == 31 and index.manifest["vectors"]["source"] == f"{tmp_path}/v.npy"
    np.testing.assert_array_equal(np.asarray(index.embeddings)[:30], vectors)
    (tmp_path / "index" / "shards" / "00001" / "embeddings.npy").unlink()
    capsys.readouterr()
    build_index(config)
    assert "were taken from" in " ".join(capsys.readouterr().err.split())
    mended = opened(config)
    np.testing.assert_allclose(np.asarray(mended.embeddings)[:30], vectors, atol=1e-6)
    assert mended.manifest["vectors"] == index.manifest["vectors"]


# files that are refused


def pickled(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    with (folder / "wikipedia_passages_0").open("wb") as file:
        pickle.dump(list(zip(ids, vectors, strict=True)), file)
    return folder / "wikipedia_passages_0"


def test_pickles_are_refused_with_what_converts_them(
    world: Path, tmp_path: Path, vectors: np.ndarray, ids: list[str]
) -> None:
    source = pickled(tmp_path, vectors, ids)
    with pytest.raises(InputError, match="is a pickle, which may run any program") as refusal:
        build_index(config_for(world, tmp_path), str(source))
    command = shlex.split(str(refusal.value).partition("outside of ragjax: ")[2])
    assert command[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    config = config_for(world, tmp_path)
    build_index(config, str(tmp_path / "embeddings.npy"))
    np.testing.assert_array_equal(np.asarray(opened(config).embeddings), vectors)


def objects(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    np.save(folder / "v.npy", np.array([list(v) for v in vectors] + [None], object), allow_pickle=True)
    return folder / "v.npy"


def whole_numbers(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    np.save(folder / "v.npy", np.ones((30, 32), np.int64))
    return folder / "v.npy"


def packed(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    np.savez_compressed(folder / "v.npz", vectors)
    return folder / "v.npz"


def no_arrays(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    import zipfile

    with zipfile.ZipFile(folder / "v.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    return folder / "v.pt"


def no_vectors(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    pq.write_table(pa.table({"id": ids, "text": ids}), folder / "v.parquet")
    return folder / "v.parquet"


def ragged(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    rows = [list(map(float, v)) for v in vectors]
    rows[4] = rows[4][:-1]
    pq.write_table(pa.table({"id": ids, "embeddings": rows}), folder / "v.parquet")
    return folder / "v.parquet"


def several_kinds(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    npy(folder, vectors, ids)
    parquet(folder, vectors, ids)
    return folder


def cut_short(kind: str, size: int) -> Write:
    def write(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
        path = faiss_file(kind)(folder, vectors, ids)
        path.write_bytes(path.read_bytes()[:size])
        return path

    return write


def with_byte(kind: str, at: int, value: int) -> Write:
    def write(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
        path = faiss_file(kind)(folder, vectors, ids)
        data = bytearray(path.read_bytes())
        data[at] = value
        path.write_bytes(data)
        return path

    return write


BAD: dict[str, tuple[Write, str]] = {
    "objects": (objects, "holds pickled Python objects"),
    "whole numbers": (whole_numbers, "expected vectors .* it holds int64"),
    "packed": (packed, "is compressed, and cannot be read in pieces; unzip v.npz"),
    "torch": (no_arrays, "without arrays, as torch.save writes pickles"),
    "text alone": (no_vectors, "no column holds vectors"),
    "ragged": (ragged, "a vector is missing, or has another length"),
    "several kinds": (several_kinds, "all of one kind; found a.parquet, vectors.npy"),
    "PQ": (faiss_file("PQ4x4"), r"compressed \(IndexPQ\)"),
    "SQ8": (faiss_file("IVF2,SQ8"), r"compressed \(IndexIVFScalarQuantizer\)"),
    "PCA": (faiss_file("PCA8,Flat"), r"compressed \(PCAMatrix\)"),
    "cut short": (cut_short("Flat", 500), "FAISS cannot read it"),
    # FAISS itself dies of these
    "cut in its header": (cut_short("Flat", 27), "FAISS cannot read it"),
    "cut in its inner header": (cut_short("IDMap,Flat", 63), "FAISS cannot read it"),
    "clusters cut": (cut_short("IDMap,IVF2,Flat", 84), "FAISS cannot read it"),
    "too many vectors": (with_byte("IVF2,Flat", 13, 1), r"FAISS cannot read it \(\d+ vectors of 128 bytes are not in"),
    "another width": (with_byte("Flat,RFlat", 6, 1), "FAISS cannot read it"),
    "text": (lambda f, v, i: Path(__file__), "begins with"),
    "nothing": (lambda f, v, i: f / "none.npy", "no such file or folder"),
    "a device": (lambda f, v, i: Path(os.devnull), "is neither a file nor a folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_other_files_are_refused_with_the_reason(
    tmp_path: Path, vectors: np.ndarray, ids: list[str], what: str
) -> None:
    write, why = BAD[what]
    with pytest.raises(InputError, match=why) as refusal:
        source = open_vectors(str(write(tmp_path, vectors, ids)))
        source.read(np.arange(len(source)))
    assert "\n" not in str(refusal.value)
