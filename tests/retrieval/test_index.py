import contextlib
import errno
import json
import os
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from trained import files

from ragjax.data.passage_store import shard_folder
from ragjax.errors import InputError
from ragjax.files import atomic_write
from ragjax.parallel.mesh import make_mesh
from ragjax.retrieval import embeddings as embeddings_module
from ragjax.retrieval import faiss_index as faiss_module
from ragjax.retrieval.embeddings import Embeddings, embed_passages, encoded_batches
from ragjax.retrieval.faiss_index import check_kind, faiss_bytes, smaller_kinds
from ragjax.retrieval.index import Index, check_k, open_index, write_index

FINGERPRINTS = {"corpus": "sha256:c", "encoder": "sha256:e", "passage_tokenizer": "sha256:p"}


def brute_force(embeddings, queries, k):
    scores = np.asarray(queries, np.float64) @ np.asarray(embeddings, np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def random_vectors(n, width=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def table_encode(tokens, mask):
    """An embedding that depends on every token and on nothing that is padding."""
    kept = np.where(mask, tokens, 0).astype(np.float32)
    places = np.arange(1, tokens.shape[1] + 1)
    return np.stack([kept.sum(1), (kept * places).sum(1), mask.sum(1)], 1)


def embed(rows, path, dtype="float32", encode=table_encode, progress=lambda n: None, devices=1):
    batches = encoded_batches(encode, rows, width_buckets=(4, 8), batch_size=3, pad_id=9, devices=devices)
    embed_passages(batches, len(rows), dtype=dtype, path=path, progress=progress)


def save(folder, embeddings, dtype="float32", shard=1000):
    for start in range(0, len(embeddings), shard):
        path = shard_folder(folder, start // shard)
        path.mkdir(parents=True, exist_ok=True)
        stored = embeddings[start : start + shard].astype(dtype)
        np.save(path / "embeddings.npy", stored.view(np.uint16) if dtype == "bfloat16" else stored)


def build(folder, embeddings, kind, dtype="float32", shard=1000):
    save(folder, embeddings, dtype, shard)
    write_index(folder, kind, dtype, {"fingerprints": FINGERPRINTS, "corpus": {"fingerprint": "sha256:c"}})
    return open_index(folder, FINGERPRINTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scores_are_those_of_the_stored_embeddings(tmp_path, dtype):
    embeddings, queries = random_vectors(50), random_vectors(4, seed=1)
    index = build(tmp_path, embeddings, "exact", dtype)
    assert index.embeddings.dtype == np.dtype(dtype)
    scores, ids = index.search(queries, 6)
    assert (scores.dtype, ids.dtype) == (np.float32, np.int32)
    expected_scores, expected_ids = brute_force(embeddings.astype(dtype).astype(np.float32), queries, 6)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)
    unrounded = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]
    np.testing.assert_allclose(scores, brute_force(embeddings, queries, 6)[0], atol=unrounded)


def test_vectors_are_zero_where_there_is_no_passage():
    embeddings = random_vectors(5)
    found = Index(Embeddings([embeddings]), "exact", {}).vectors(np.array([[4, -1]], np.int32))
    np.testing.assert_array_equal(found, [[embeddings[4], np.zeros(16)]])


def test_faiss_flat_equals_exact(tmp_path):
    embeddings, queries = random_vectors(300), random_vectors(8, seed=1)
    embeddings[100] = embeddings[200]
    exact, flat = (build(tmp_path / kind, embeddings, kind) for kind in ("exact", "Flat"))
    for k in (1, 7, 300):
        scores, ids = exact.search(queries, k)
        flat_scores, flat_ids = flat.search(queries, k)
        np.testing.assert_array_equal(flat_ids, ids)
        np.testing.assert_allclose(flat_scores, scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["HNSW16", "IVF2,Flat", "IVF16,Flat", "OPQ4,IVF4,PQ8x4", "PCA8,HNSW16"])
def test_approximate_kinds_find_nearly_all_with_exact_scores(tmp_path, kind):
    basis = random_vectors(6, seed=2)  # real embeddings lie near few directions, noise does not
    embeddings = random_vectors(1000, width=6) @ basis + 0.01 * random_vectors(1000, seed=3)
    queries = random_vectors(20, width=6, seed=1) @ basis
    index = build(tmp_path, embeddings, kind)
    scores, ids = index.search(queries, 10)
    expected = brute_force(embeddings, queries, 10)[1]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, expected, strict=True)]) >= 0.9
    np.testing.assert_allclose(scores, np.einsum("BD,BKD->BK", queries, embeddings[ids]), rtol=1e-4, atol=1e-4)
    assert np.all(np.diff(scores, axis=1) <= 0)


@pytest.mark.parametrize("kind", ["Flat", "HNSW8", "IVF2,Flat"])
def test_faiss_with_fewer_hits_than_k_never_wraps(tmp_path, kind):
    index = build(tmp_path, random_vectors(4), kind)
    scores, ids = index.search(random_vectors(3, seed=1), 6)
    np.testing.assert_array_equal(np.sort(ids, axis=1), [[-1, -1, 0, 1, 2, 3]] * 3)
    np.testing.assert_array_equal(ids == -1, np.isneginf(scores))
    np.testing.assert_array_equal(ids[:, 4:], -1)


@pytest.mark.parametrize("kind", ["exact", "HNSW8", "IVF4,Flat"])
def test_an_index_built_twice_is_the_same(tmp_path, kind):
    for name in ("a", "b"):
        build(tmp_path / name, random_vectors(500), kind)
    assert os.listdir(tmp_path / "a") == os.listdir(tmp_path / "b")
    for file in files(tmp_path / "a"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.parametrize("kind", ["HNSW8", "IVF4,Flat", "OPQ4,IVF4,PQ4x4"])
def test_a_faiss_structure_depends_on_neither_shards_nor_threads(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(faiss_module, "ADD_BATCH", 300)
    for threads, shard in ((1, 1000), (2, 77), (8, 999)):
        monkeypatch.setattr(faiss_module, "cores", lambda threads=threads: threads)
        build(tmp_path / str(shard), random_vectors(1000), kind, shard=shard)
    one, *others = ((tmp_path / str(shard) / "faiss.index").read_bytes() for shard in (1000, 77, 999))
    assert all(other == one for other in others)


@pytest.mark.parametrize("kind", ["nonsense", "IVF", "", "PQ5"])
def test_a_bad_kind_is_named(tmp_path, kind):
    with pytest.raises(InputError, match=f"index.kind is '{kind}'"):
        check_kind(kind, 16)
    with pytest.raises(InputError, match=f"index.kind is '{kind}'"):
        build(tmp_path, random_vectors(20), kind)
    assert os.listdir(tmp_path) == ["shards"]


def test_a_good_kind_passes():
    check_kind("exact", 16)
    check_kind("IVF256,PQ4", 16)


@pytest.mark.parametrize("kind", ["Flat", "HNSW8", "HNSW32", "SQ8", "IVF16,Flat", "PCA8,HNSW32_SQ8"])
def test_the_bytes_of_a_faiss_structure_are_foretold(tmp_path, kind):
    build(tmp_path, random_vectors(3000), kind)
    assert faiss_bytes(kind, 16, 3000) == pytest.approx((tmp_path / "faiss.index").stat().st_size, rel=0.02)


def test_a_rare_kind_is_not_foretold():
    assert faiss_bytes("NSG32,Flat", 16, 3000) is None
    with pytest.raises(InputError, match="FAISS does not accept"):
        faiss_bytes("nonsense", 16, 3000)


def test_too_few_passages_to_train(tmp_path):
    with pytest.raises(InputError, match=r"IVF64,Flat cannot be trained on the 20 passages"):
        build(tmp_path, random_vectors(20), "IVF64,Flat")
    assert os.listdir(tmp_path) == ["shards"]


def test_check_k():
    check_k(3, 3)
    with pytest.raises(InputError, match="k is 4 but the corpus has only 3 passages"):
        check_k(4, 3)


def test_an_index_by_another_encoder_says_so(tmp_path):
    build(tmp_path, random_vectors(5), "exact")
    with pytest.raises(InputError, match=r"by another encoder: sha256:e, .*sha256:new.*another folder"):
        open_index(tmp_path, FINGERPRINTS | {"encoder": "sha256:new"})
    with pytest.raises(InputError, match="by another generator tokenizer: None"):
        open_index(tmp_path, {"generator_tokenizer": "sha256:g"})


def test_a_missing_or_incomplete_index_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match=r"does not exist; run: ragjax index CONFIG"):
        open_index(tmp_path / "none", {})
    build(tmp_path, random_vectors(5), "exact")
    (tmp_path / "manifest.json").rename(tmp_path / "kept.json")
    with pytest.raises(InputError, match=r"is not complete; run: ragjax index CONFIG"):
        open_index(tmp_path, {})


@pytest.mark.parametrize("file", ["manifest.json", "shards/00001/embeddings.npy", "faiss.index"])
@pytest.mark.parametrize("keep", [0, 0.5, None])
def test_a_damaged_index_is_named(tmp_path, file, keep):
    build(tmp_path, random_vectors(200), "Flat", shard=80)
    path = tmp_path / file
    if keep is None and file != "manifest.json":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * (keep or 0))])
    with pytest.raises(InputError, match=f"damaged.*{file if file != 'manifest.json' else ''}.*run: ragjax index"):
        open_index(tmp_path, {})


def test_a_structure_that_is_read_whole_is_checked_and_a_mapped_one_finds_no_other_passages(tmp_path, monkeypatch):
    """As of large files: only lists that FAISS maps are not read when an index is opened."""
    monkeypatch.setattr(faiss_module, "CHECKED_AT_ONCE", 0)
    build(tmp_path / "graph", random_vectors(50), "HNSW8")
    path = tmp_path / "graph" / "faiss.index"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match=r"faiss\.index its contents have changed"):
        open_index(tmp_path / "graph", FINGERPRINTS)
    build(tmp_path / "lists", random_vectors(50), "IVF2,Flat")
    path = tmp_path / "lists" / "faiss.index"
    whole, seventh = path.read_bytes(), (7).to_bytes(8, "little")
    assert whole.count(seventh) == 1
    path.write_bytes(whole.replace(seventh, (57).to_bytes(8, "little")))
    with pytest.raises(InputError, match="it finds passages that are not there; run: ragjax index CONFIG"):
        open_index(tmp_path / "lists", FINGERPRINTS).search(random_vectors(1), 12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (random_vectors(79), r"shards/00001: embeddings of shape \(79, 16\), not \(80, 16\)"),
        (random_vectors(80, width=8), r"shards/00001: embeddings of shape \(80, 8\), not \(80, 16\)"),
        (random_vectors(80)[0], "shards/00001/embeddings.npy is no 2-dimensional array of float32"),
        (random_vectors(80).astype(np.float16), "shards/00001/embeddings.npy is no 2-dimensional array of float32"),
    ],
)
def test_a_shard_that_does_not_belong_is_named(tmp_path, wrong, message):
    build(tmp_path, random_vectors(200), "exact", shard=80)
    np.save(shard_folder(tmp_path, 1) / "embeddings.npy", wrong)
    with pytest.raises(
        InputError, match=f"damaged.*{message}.*run: ragjax index CONFIG, which builds anew what is damaged, alone"
    ):
        open_index(tmp_path, {})


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_shard_is_named(tmp_path, number):
    build(tmp_path, random_vectors(200), "exact", shard=80)
    shutil.rmtree(shard_folder(tmp_path, number))
    with pytest.raises(InputError, match=f"damaged .shards/0000{number}/embeddings.npy is missing"):
        open_index(tmp_path, {})


@pytest.mark.parametrize("kind", ["exact", "Flat"])
def test_a_stored_embedding_that_is_no_number(tmp_path, kind):
    """Found where it is put on a device, or into a FAISS structure; it would be in every answer, or in none."""
    embeddings = random_vectors(20)
    embeddings[13, 5] = np.nan
    with pytest.raises(InputError, match=r"embedding of passages .* is not finite; delete its folder"):
        build(tmp_path, embeddings, kind).search(random_vectors(1), 2)


def test_kinds_that_fit_are_named():
    def kinds(room):
        return [advice.split(" ")[0].removeprefix("index.kind=") for advice in smaller_kinds(768, 21_015_324, room)]

    assert kinds(2**40) == ["HNSW32", "IVF16384,SQ8", "OPQ128,IVF16384,PQ128"]
    assert kinds(20 * 2**30) == ["IVF16384,SQ8", "OPQ128,IVF16384,PQ128"]
    assert kinds(5 * 2**30) == ["OPQ128,IVF16384,PQ128"] and kinds(2**20) == []
    for width in (1, 7, 32, 384):  # whatever the width, FAISS takes them
        assert len(smaller_kinds(width, 1000, 2**40)) == 3


def test_an_index_of_before_there_were_shards(tmp_path):
    np.save(tmp_path / "embeddings.npy", random_vectors(5))
    manifest = {"kind": "exact", "dtype": "float32", "N": 5, "D": 16, "embeddings": "embeddings.npy"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"fingerprints": FINGERPRINTS}))
    with pytest.raises(InputError, match="built by an older ragjax; run: ragjax index CONFIG"):
        open_index(tmp_path, FINGERPRINTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard", [1, 7, 30, 64])
def test_shards_are_one_array(tmp_path, dtype, shard):
    vectors = random_vectors(30).astype(dtype)
    index = build(tmp_path, random_vectors(30), "exact", dtype, shard)
    assert (index.embeddings.shape, index.embeddings.dtype, len(index)) == ((30, 16), np.dtype(dtype), 30)
    ids = np.array([[29, 0, 7], [6, 7, 0]])
    np.testing.assert_array_equal(index.embeddings[ids], vectors[ids])
    np.testing.assert_array_equal(np.asarray(index.embeddings), vectors)
    on_devices = index.corpus(make_mesh()).embeddings
    assert on_devices.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(on_devices)[:30], vectors)
    one = Index(Embeddings([vectors]), "exact", {})
    queries = random_vectors(4, seed=1)
    for found, expected in zip(index.search(queries, 9), one.search(queries, 9), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_manifest_describes_the_index(tmp_path):
    manifest = build(tmp_path, random_vectors(20), "Flat", "bfloat16").manifest
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("kind", "dtype", "N", "D", "shards", "fingerprints")} == {
        "kind": "Flat",
        "dtype": "bfloat16",
        "N": 20,
        "D": 16,
        "shards": [20],
        "fingerprints": FINGERPRINTS,
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("count", [1, 3, 11])
@pytest.mark.parametrize("devices", [1, 2, 5])
def test_embedding_in_batches_equals_one_by_one(tmp_path, count, dtype, devices):
    rng = np.random.default_rng(count)
    rows = [rng.integers(1, 9, size=rng.integers(1, 9)).tolist() for _ in range(count)]
    shapes, done = [], []

    def encode(tokens, mask):
        shapes.append(tokens.shape)
        return jnp.asarray(table_encode(tokens, mask))

    path = shard_folder(tmp_path, 0) / "embeddings.npy"
    path.parent.mkdir(parents=True)
    embed(rows, path, dtype, encode, done.append, devices)
    write_index(tmp_path, "exact", dtype, {"fingerprints": {}, "corpus": {"fingerprint": "sha256:c"}})
    one_by_one = np.concatenate([table_encode(np.array([row]), np.ones((1, len(row)), bool)) for row in rows])
    np.testing.assert_array_equal(open_index(tmp_path, {}).embeddings, one_by_one.astype(dtype))
    assert sum(done) == count and len(shapes) <= -(-count // (3 * devices)) + 1  # once more where the width changes
    assert shapes == sorted(shapes, reverse=True)  # longest first
    assert set(shapes) <= {(3 * devices, 4), (3 * devices, 8)}


def test_a_device_is_given_the_same_batches_whatever_their_number(tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 9, size=rng.integers(1, 9)).tolist() for _ in range(50)]
    given = []
    for devices in (1, 3, 4):
        batches = set()

        def encode(tokens, mask, batches=batches, devices=devices):
            batches |= {part.tobytes() for part in np.split(np.where(mask, tokens, 0), devices)}
            return table_encode(tokens, mask)

        embed(rows, tmp_path / "embeddings.npy", encode=encode, devices=devices)
        given.append(batches)
    assert given[0] <= given[1] and given[0] <= given[2]  # and there, copies of the last row fill what is left


def test_embeddings_that_the_type_cannot_hold(tmp_path):
    with pytest.raises(InputError, match=r"not finite in index\.dtype=float16"):
        embed([[1]], tmp_path / "embeddings.npy", "float16", lambda tokens, mask: np.full((3, 2), 1e6))
    assert os.listdir(tmp_path) == []


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_no_embeddings(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings_module, "_reserve", full_disk)
    with pytest.raises(InputError, match="disk is full"):
        embed([[1, 2], [3]], tmp_path / "embeddings.npy")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_no_faiss_file(tmp_path, monkeypatch):
    class FullDisk:
        write = full_disk

    @contextlib.contextmanager
    def on_full_disk(*paths):
        with atomic_write(*paths):
            yield (FullDisk(),)

    save(tmp_path, random_vectors(50))
    monkeypatch.setattr(faiss_module, "atomic_write", on_full_disk)
    with pytest.raises(InputError, match="disk is full"):
        write_index(tmp_path, "Flat", "float32", {"fingerprints": {}, "corpus": {"fingerprint": "sha256:c"}})
    assert os.listdir(tmp_path) == ["shards"]


def test_bfloat16_is_stored_in_two_bytes(tmp_path):
    embed([[1, 2], [3]], tmp_path / "embeddings.npy", "bfloat16")
    stored = np.load(tmp_path / "embeddings.npy")
    assert stored.dtype == np.uint16
    np.testing.assert_array_equal(stored.view(ml_dtypes.bfloat16), [[3, 5, 2], [3, 3, 1]])
