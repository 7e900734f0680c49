"""Decoding on eight devices: each has whole questions, answers them as one device does, and never waits for another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from compiling import one_loop
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from reference import log_softmax, random_llama, rounding
from tables import SPECIAL, T, V, marginals, node_of, random_tables, table_generator

from ragjax.config import Decode
from ragjax.decoding import decode as decode_module
from ragjax.decoding import prefix_cache as prefixes_module
from ragjax.decoding import rag_token as rag_token_module
from ragjax.decoding.beam_search import likeliest_next
from ragjax.decoding.candidates import Candidates
from ragjax.decoding.decode import decode_rag_sequence
from ragjax.decoding.exact import decode as exact_module
from ragjax.decoding.exact import document_reader as reader_module
from ragjax.decoding.exact.decode import decode_exact
from ragjax.decoding.propose import beam_search_documents, beam_settings, prefill_documents
from ragjax.decoding.rag_token import decode_rag_token
from ragjax.models.generator import SpecialTokens
from ragjax.models.kv_cache import DocumentMemory
from ragjax.models.layers import Params
from ragjax.parallel.by_device import by_device, group_by_device, on_mesh
from ragjax.parallel.mesh import make_mesh
from ragjax.parallel.sharding import parameter_spec, shard_batch
from ragjax.planning.program_cost import bytes_sent

pytestmark = pytest.mark.devices(8)

B, K, S, W = 16, 2, 8, 2
SETTINGS = Decode(num_docs=K, num_beams=W, max_new_tokens=T, start_beams=2, max_beams=2)
LLAMA_ENDS = SpecialTokens(eos=2, pad=0)


@dataclass(frozen=True)
class Case:
    """A generator, and the prompts of B questions with K documents each."""

    graph: nnx.GraphDef
    params: Params
    source: np.ndarray  # [B·K,S]
    mask: np.ndarray
    special: SpecialTokens

    def place(self, path: tuple[Any, ...], leaf: Any, mesh: Mesh) -> jax.Array:
        """A parameter as `state_shardings` lays out a generator's."""
        names = [entry.key for entry in path]
        heads = {"query": 4, "output": 4, "key": 2, "value": 2}.get(names[-2]) if len(names) > 1 else None
        spec = parameter_spec(mesh, names, leaf.shape, heads, fsdp=False)
        return jax.device_put(leaf, NamedSharding(mesh, spec))


@pytest.fixture(scope="module")
def tables() -> Case:
    """A generator made of tables: programs that compile quickly."""
    graph, params = table_generator(random_tables(np.random.default_rng(5), B, K))
    return Case(graph, params, np.arange(B * K, dtype=np.int32)[:, None], np.ones((B * K, 1), bool), SPECIAL)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    small = random_llama(tmp_path_factory.mktemp("llama"), seed=3, vocab_size=12)
    rng = np.random.default_rng(0)
    source = rng.integers(3, 12, size=(B * K, S)).astype(np.int32)
    mask = np.arange(S) < rng.integers(2, S + 1, size=(B * K, 1))
    return Case(small.graphdef, small.params, source, mask, LLAMA_ENDS)


def prior() -> np.ndarray:
    """log p(z|x) [B,K]: some documents are missing, of one question all."""
    logits = np.random.default_rng(2).normal(size=(B, K)).astype(np.float32) * 2
    logits[[1, 6, 15], 1:] = -np.inf
    found = log_softmax(logits).astype(np.float32)
    found[9] = -np.inf
    return found


PROGRAMS = {
    decode_module: ["beam_search_documents"],
    prefixes_module: ["extend_prefixes", "edge_logp"],
    rag_token_module: ["search_rag_token"],
    exact_module: ["search_marginal", "score_tokens"],
    reader_module: ["_write", "_take"],
}
Sent = dict[str, list[dict[str, int]]]
COMPILED: dict[Any, Any] = {}  # each program once for all tests


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What each program of decoding that runs sends between devices, by its name; see `bytes_sent`."""
    found: Sent = {}

    def counted(name: str, program: Any) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            leaves, tree = jax.tree.flatten(given)
            at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

            def whole(arrays: list[Any]) -> Any:
                traced = dict(zip(at, arrays, strict=True))
                return program(*jax.tree.unflatten(tree, [traced.get(i, leaf) for i, leaf in enumerate(leaves)]))

            arrays = [leaves[i] for i in at]
            static = [None if i in at else leaf for i, leaf in enumerate(leaves)]
            types = [(x.shape, x.dtype, getattr(x, "sharding", None)) for x in arrays]
            key = (name, tree, *static, *types, jax.sharding.get_abstract_mesh())
            if key not in COMPILED:
                COMPILED[key] = jax.jit(whole).lower(arrays).compile()
            compiled = COMPILED[key]
            found.setdefault(name, []).append(bytes_sent(hlo := compiled.as_text() or ""))
            if found[name][-1]:
                groups = set(re.findall(r"replica_groups=(.+?), ", hlo))
                assert groups <= PAIRS, f"{name} talks to others than its pair along the axis model"
            return compiled(arrays)

        return run

    for module, names in PROGRAMS.items():
        for name in names:
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    monkeypatch.setitem(globals(), "prefill_documents", counted("prefill_documents", prefill_documents))
    return found


# each two neighbours of the eight devices, as XLA writes it, that of JAX 0.12 at the end
PAIRS = {"{{0,1},{2,3},{4,5},{6,7}}", "[4,2]<=[8]", "mesh['data'=4,'model'=2] {'model'}"}


def decoded(case: Case, mesh: Mesh, how: str, settings: Decode = SETTINGS) -> list[Candidates]:
    params = jax.tree_util.tree_map_with_path(partial(case.place, mesh=mesh), case.params)

    def read(rows: np.ndarray) -> DocumentMemory:
        batch = shard_batch(mesh, (case.source[rows], case.mask[rows]), len(rows))
        memory = prefill_documents(case.graph, params, *batch)
        shape = list(memory.keys.shape)
        shape[1] //= mesh.shape["data"]
        shape[3] //= mesh.shape["model"]
        assert list(memory.keys.sharding.shard_shape(memory.keys.shape)) == shape
        return memory

    with on_mesh(mesh):
        if how == "exact":
            return decode_exact(case.graph, params, read, prior(), None, settings.replace(mode=how), case.special)
        decode, mode = (decode_rag_token, "thorough") if how == "rag_token" else (decode_rag_sequence, how)
        memory = read(np.arange(B * K))
        return decode(case.graph, params, memory, prior(), settings.replace(mode=mode), case.special)


CASES = [("thorough", 2), ("certified", 2), ("rag_token", 1)]


@pytest.fixture(scope="module")
def alone(tables: Case, llama: Case) -> dict[str, list[Candidates]]:
    """What one device finds; before `sent` counts."""
    one = make_mesh(devices=jax.devices()[:1])
    with one_loop():
        found = {how: decoded(tables, one, how, SETTINGS.replace(num_beams=beams)) for how, beams in CASES}
        return found | {"llama": decoded(llama, one, "thorough")}


@pytest.mark.parametrize(("how", "beams"), CASES)
def test_answers_are_those_of_one_device(
    tables: Case, how: str, beams: int, alone: dict[str, list[Candidates]], sent: Sent
) -> None:
    """Also with missing documents, and with one beam; and no program sends anything."""
    spread = decoded(tables, make_mesh(), how, SETTINGS.replace(num_beams=beams))
    assert len(sent) >= 3 and not any(any(of) for of in sent.values()), sent
    assert_same(alone[how], spread, how)


def test_exact_answers_are_those_of_all(tables: Case, sent: Sent) -> None:
    """On eight devices in rounds: against the marginals of all answers; and no program sends anything."""
    found = decoded(tables, make_mesh(), "exact")
    assert len(sent) >= 6 and not any(any(of) for of in sent.values()), sent
    truth = marginals(prior(), np.asarray(tables.params["tables"]).reshape(B, K, -1, V), by_token=False)
    proved = 0
    for own, logp in zip(found, truth, strict=True):
        assert own.proof is not None and own.thorough_logp is not None
        nodes = [node_of(tokens) for tokens, ends in zip(own.tokens, own.finished, strict=True) if ends]
        np.testing.assert_allclose(own.thorough_logp[: len(nodes)], logp[nodes], atol=1e-4)
        proved += (top := own.proof.in_order(len(nodes))["top_k"] or 0) > 0
        np.testing.assert_allclose(logp[nodes[:top]], np.sort(logp)[::-1][:top], atol=1e-4)
    assert B / 2 < proved < B


def assert_same(alone: list[Candidates], spread: list[Candidates], how: str) -> None:
    assert [own.tokens for own in spread] == [own.tokens for own in alone]
    assert sum(len(own.tokens) for own in alone) >= B
    for one, eight in zip(alone, spread, strict=True):
        np.testing.assert_array_equal(eight.finished, one.finished)
        assert eight.proof == one.proof
        for name in ("beam_logp", "fast_logp", "doc_logp", "thorough_logp", "bounds"):
            expected, found = getattr(one, name), getattr(eight, name)
            if how == "certified" and name == "bounds":  # as tight as what the rows of a device have read makes them
                assert (np.maximum(expected[0], found[0]) <= np.minimum(expected[1], found[1]) + 1e-4).all()
                assert one.best(how) == eight.best(how)
            elif expected is not None:
                np.testing.assert_allclose(found, expected, atol=rounding(20.0), err_msg=name)


def test_the_axis_model_alone_communicates(llama: Case, alone: dict[str, list[Candidates]], sent: Sent) -> None:
    """Eight devices as 4 × 2: sums over the pairs, of what lies there in halves, and a step's best continuations."""
    assert_same(alone["llama"], decoded(llama, make_mesh(2), "thorough"), "thorough")
    # bytes a token: 32 numbers of its embedding, and in each of two layers after attention and after feed-forward
    token, rows = (1 + 2 * 2) * 32 * 4, B * K // 4
    logsumexp, best = 2 * 4, 2 * 8  # the largest and the sum; of 2W continuations a row log p and number
    assert sent["prefill_documents"] == [{"all-reduce": token * rows * S}]
    # what stands in the loops over all rows, a half of them and a quarter
    tokens = (rows + rows // 2 + rows // 4) * W
    step = {"all-reduce": (token + logsumexp) * tokens, "all-gather": best * tokens}
    assert sent["beam_search_documents"] == [step]
    assert sent["extend_prefixes"] == [{"all-reduce": (token + logsumexp) * rows * 16}]
    assert [set(of) for of in sent["edge_logp"]] == [{"all-reduce"}], "of the rows of the vocabulary"


@pytest.mark.devices(2)
def test_two_devices_share_each_model(llama: Case, alone: dict[str, list[Candidates]]) -> None:
    """With nothing to split over `data`."""
    with one_loop():
        spread = decoded(llama, make_mesh(2), "thorough")
    assert_same(alone["llama"], spread, "thorough")


def rows_of_loops(jaxpr: Jaxpr) -> Iterator[int]:
    """Of each loop that ends when its rows do: how many these are."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            shapes = [var.aval.shape for var in equation.outvars]  # type: ignore[attr-defined]
            yield max(shape[0] for shape in shapes if len(shape) == 1)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, ClosedJaxpr | Jaxpr):
                    yield from rows_of_loops(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def test_finished_rows_leave_each_device(tables: Case) -> None:
    """64 rows on eight devices: 8 on each, then 4, then 2."""
    source = np.resize(tables.source, (64, 1))
    memory = prefill_documents(tables.graph, tables.params, source, np.ones_like(source, bool))
    with on_mesh(make_mesh()):
        traced = beam_search_documents.trace(
            tables.graph, tables.params, memory, beam_settings(SETTINGS, SPECIAL, False), SPECIAL
        )
    assert list(rows_of_loops(traced.jaxpr.jaxpr)) == [8, 4, 2]


def test_rows_are_grouped_by_device() -> None:
    """Every row asked for stands on its device, once; what fills up lies there, too."""
    rng = np.random.default_rng(1)
    for devices, each in ((8, 5), (1, 7)):
        with on_mesh(make_mesh(devices=jax.devices()[:devices])):
            for count in (1, 3, devices * each):
                rows = rng.permutation(devices * each)[:count]
                group = group_by_device(rows, devices * each)
                assert group.count % devices == 0 and group.count <= devices * each
                np.testing.assert_array_equal(group.rows[group.place], rows)
                assert len(set(group.place.tolist())) == count
                np.testing.assert_array_equal(group.source[group.place], np.arange(count))
                device = np.arange(group.count) // (group.count // devices)
                np.testing.assert_array_equal(group.rows, device * each + group.local)
                whole = group.expanded(3)
                np.testing.assert_array_equal(whole.rows[whole.place], (rows[:, None] * 3 + np.arange(3)).ravel())


@pytest.mark.parametrize("model", [2, 8])
def test_devices_that_share_the_vocabulary_send_its_best_alone(model: int) -> None:
    """As `top_k` of all continuations finds them, ties and all; of a vocabulary that is not split, too."""
    mesh, rng, count = make_mesh(model), np.random.default_rng(model), 5
    for vocabulary in (24, 21):
        total = -np.round(rng.exponential(3.0, (8, W, vocabulary))).astype(np.float32)
        total[rng.random(total.shape) < 0.4] = -np.inf
        split = NamedSharding(mesh, PartitionSpec("data", None, "model" if vocabulary % model == 0 else None))
        with on_mesh(mesh):
            given = jax.device_put(total, split)
            spread = jax.jit(lambda total: by_device(lambda _, own: likeliest_next(own, count), None, total))
            program = spread.lower(given).compile()
        expected, at = jax.lax.top_k(total.reshape(8, -1), count)
        best, number = program(given)
        np.testing.assert_array_equal(best, expected)
        np.testing.assert_array_equal(number, at)
        if vocabulary % model == 0:  # from each of the others its best, and their numbers
            assert bytes_sent(program.as_text() or "") == {"all-gather": (model - 1) * model * count * 8}
