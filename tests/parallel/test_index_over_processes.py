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

WIDTH, QUESTIONS, DEVICES, KS = 8, 5, 4, (1, 9, 70)
SEARCH = """
import json, sys
import jax
import numpy as np
from ragjax.parallel.mesh import index_mesh
from ragjax.parallel.processes import initialize_distributed
from ragjax.retrieval.embeddings import Embeddings
from ragjax.retrieval.index import Index

folder, *_ = sys.argv[1:]
initialize_distributed(stop_together=False)
told = {}
for name in ("ties", "rounded"):
    vectors, queries = (np.load(f"{folder}/{name}-{what}.npy") for what in ("vectors", "queries"))
    embeddings, read = Embeddings([vectors[:10], vectors[10:41], vectors[41:]]), []
    between = embeddings.between
    embeddings.between = lambda start, stop: read.extend(range(start, stop)) or between(start, stop)
    index, own = Index(embeddings, "exact", {}, together=index_mesh("evaluate")), queries[jax.process_index()]
    told[name] = {
        "found": [[part.tolist() for part in index.search(own, k)] for k in (1, 9, 70)],
        "normalizer": index.log_normalizer(own, 0.5).tolist(),
        "held": [part.data.shape[0] for part in index.corpus(index.together).embeddings.addressable_shards],
        "read": read,
    }
print(json.dumps(told))
"""


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """Ids, scores to the bit and the order of ties; and each process reads its own rows, once."""
    rng, given = np.random.default_rng(0), dict[str, tuple[np.ndarray, np.ndarray]]()
    shapes = {"ties": (61, WIDTH), "rounded": (256, WIDTH)}  # of 256 every device has whole groups, in either case
    for name, shape in shapes.items():
        tables = rng.normal(size=shape), rng.normal(size=(2, QUESTIONS, WIDTH))
        if name == "ties":
            tables = tables[0].round(), tables[1].round()  # whole numbers: exact scores, of which many are equal
        given[name] = vectors, queries = tables[0].astype(np.float32), tables[1].astype(np.float32)
        np.save(tmp_path / f"{name}-vectors.npy", vectors)
        np.save(tmp_path / f"{name}-queries.npy", queries)
    processes = start(tmp_path / "world", 2, str(tmp_path), program=[sys.executable, "-c", SEARCH])
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    each = [json.loads(out) for out, _ in told]
    for name, (vectors, queries) in given.items():
        count = len(vectors)
        rows, alone = -(-count // DEVICES), Index(Embeddings([vectors]), "exact", {})
        assert [one[name]["held"] for one in each] == [[rows, rows]] * 2
        assert [one[name]["read"] for one in each] == [list(range(2 * rows)), list(range(2 * rows, count))]
        for own, one in zip(queries, each, strict=True):
            scores = own.astype(np.float64) @ vectors.T.astype(np.float64)
            for k, found in zip(KS, one[name]["found"], strict=True):
                best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # equal ones by id
                np.testing.assert_array_equal(np.array(found[1])[:, :count], best)
                for ours, theirs in zip(alone.search(own, k, make_mesh()), found, strict=True):
                    np.testing.assert_array_equal(ours, np.array(theirs, ours.dtype))
            total = np.log(np.exp(0.5 * scores).sum(axis=1))
            np.testing.assert_allclose(one[name]["normalizer"], total, rtol=1e-6)
