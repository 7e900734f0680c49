"""An index over the devices of two real processes, each of which asks its own questions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from processes import start

from ragjax.parallel.mesh import make_mesh
from ragjax.retrieval.embeddings import Embeddings
from ragjax.retrieval.index import Index

COUNT, WIDTH, QUESTIONS, DEVICES = 61, 8, 5, 4
SEARCH = """
import json, sys
import numpy as np
from ragjax.parallel.mesh import index_mesh
from ragjax.parallel.processes import initialize_distributed
from ragjax.retrieval.embeddings import Embeddings
from ragjax.retrieval.index import Index
import jax

folder, *_ = sys.argv[1:]
initialize_distributed(stop_together=False)
vectors, queries = np.load(f"{folder}/vectors.npy"), np.load(f"{folder}/queries.npy")[jax.process_index()]
embeddings, read = Embeddings([vectors[:10], vectors[10:41], vectors[41:]]), []
between = embeddings.between
embeddings.between = lambda start, stop: read.extend(range(start, stop)) or between(start, stop)
index = Index(embeddings, "exact", {}, together=index_mesh("evaluate"))
found = [[part.tolist() for part in index.search(queries, k)] for k in (1, 9, 70)]
parts = index.corpus(index.together).embeddings.addressable_shards
print(json.dumps({
    "found": found,
    "normalizer": index.log_normalizer(queries, 0.5).tolist(),
    "held": [part.data.shape[0] for part in parts],
    "read": read,
}))
"""


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """Ids, scores and the order of ties; and each process reads its own rows, once."""
    rng = np.random.default_rng(0)
    vectors = rng.integers(-2, 3, (COUNT, WIDTH)).astype(np.float32)  # whole numbers: exact scores, and many ties
    queries = rng.integers(-2, 3, (2, QUESTIONS, WIDTH)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    np.save(tmp_path / "queries.npy", queries)
    processes = start(tmp_path / "world", 2, str(tmp_path), program=[sys.executable, "-c", SEARCH])
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    each, alone = [json.loads(out) for out, _ in told], Index(Embeddings([vectors]), "exact", {})
    rows = -(-COUNT // DEVICES)
    assert [one["held"] for one in each] == [[rows, rows]] * 2
    assert [one["read"] for one in each] == [list(range(2 * rows)), list(range(2 * rows, COUNT))]
    for own, one in zip(queries, each, strict=True):
        scores = own @ vectors.T
        for k, (their_scores, ids) in zip((1, 9, 70), one["found"], strict=True):
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # equal ones by id
            np.testing.assert_array_equal(np.array(ids)[:, :COUNT], best)
            np.testing.assert_array_equal(np.array(their_scores)[:, :COUNT], np.take_along_axis(scores, best, 1))
            assert (np.array(ids)[:, COUNT:] == -1).all()
            for ours, theirs in zip(alone.search(own, k, make_mesh()), (their_scores, ids), strict=True):
                np.testing.assert_array_equal(ours, np.array(theirs, ours.dtype))
        total = np.log(np.exp(0.5 * scores.astype(np.float64)).sum(axis=1))
        np.testing.assert_allclose(one["normalizer"], total, rtol=1e-6)
