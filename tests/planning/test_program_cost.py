"""Floating-point operations and bytes between devices, against what is counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from world import tiny_config

from ragjax.parallel.mesh import make_mesh
from ragjax.parallel.sharding import abstract_with_sharding
from ragjax.planning.program_cost import (
    Cost,
    NotCompiled,
    bytes_each,
    bytes_sent,
    compiled_cost,
    matmul_flops,
    program_cost,
    used_arguments,
)
from ragjax.rag import load_pipeline
from ragjax.retrieval.encoder import encode

pytestmark = pytest.mark.devices(8)

L, B, D = 10, 8, 16
X, W = jax.ShapeDtypeStruct((B, D), jnp.float32), jax.ShapeDtypeStruct((L, D, D), jnp.float32)
PRODUCT = 2 * B * D * D


def layers(x: Any, w: Any, remat: bool = False) -> Any:
    """L layers in a loop."""

    def layer(x: Any, w: Any) -> tuple[Any, None]:
        return jnp.tanh(x @ w), None

    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)[0].sum()


def flops(function: Callable[..., Any], *arguments: Any) -> int:
    return matmul_flops(jax.jit(function).trace(*arguments).jaxpr.jaxpr)


def by_rows(of_device: Callable[..., Any]) -> Callable[..., Any]:
    """Each of four devices has a quarter of the rows."""
    specs = {"in_specs": PartitionSpec("data"), "out_specs": PartitionSpec()}
    return jax.shard_map(of_device, mesh=make_mesh(2), axis_names={"data"}, check_vma=False, **specs)


def both_gradients(remat: bool) -> Callable[..., Any]:
    return jax.grad(lambda x, w: layers(x, w, remat), argnums=(0, 1))


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (layers, L),
        (both_gradients(False), 3 * L),  # forward, by x, by w
        (both_gradients(True), 4 * L),  # and forward again
        (lambda x, w: jax.vmap(lambda row: row @ w[0])(x), 1),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: (x @ w[0]) @ w[1], lambda: x @ w[0]), 2),
        (lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w[0], x), 1),
        (lambda x, w: jnp.einsum("BD,LDE->LBE", x, w), L),
        (lambda x, w: jax.lax.conv(x[None, None], w[0][None, None], (1, 1), "SAME"), D),  # each element: D·D times
        (lambda x, w: x + 1, 0),
        (lambda x, w: by_rows(lambda x: layers(x, w))(x), L),
    ],
)
def test_matrix_products_are_counted_as_often_as_they_run(function: Callable[..., Any], products: int) -> None:
    assert flops(function, X, W) == products * PRODUCT


def test_a_model_by_its_formula(world: Path) -> None:
    """BERT, of each token: four projections and two feed-forward maps a layer, and attention to all S tokens."""
    rag = load_pipeline(tiny_config(world))
    config, rows, tokens = rag.retriever.config, 5, 24
    inputs = jnp.zeros((rows, tokens), jnp.int32), jnp.ones((rows, tokens), bool)
    weights = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.mlp_dim
    counted = 2 * rows * tokens * config.num_layers * (weights + 2 * tokens * config.hidden_size)
    found = matmul_flops(encode.trace(rag.retriever.graphdef, rag.retriever.abstract_params, *inputs).jaxpr.jaxpr)
    assert found == counted


def test_arguments_that_a_program_does_not_use_are_not_given_to_it() -> None:
    """Whether one is not used here, or handed on to what does not use it."""

    @jax.jit
    def first(x: Any, w: Any) -> Any:
        return x[0]

    def whole(x: Any, w: Any, y: Any, z: Any) -> Any:
        return first(x, w), layers(y, w), z

    for function, used in ((first, [True, False]), (whole, [True] * 4), (lambda *of: first(*of[::-1]), [False, True])):
        arguments = [X, W, X, X][: len(used)] if used[0] else [W, X]
        program = jax.jit(function)
        assert used_arguments(program.trace(*arguments).jaxpr.jaxpr) == used
        given = [argument for argument, is_used in zip(arguments, used, strict=True) if is_used]
        assert program_cost(program, *arguments)[1].read == bytes_each(given)


def compiled(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    return jax.jit(function, **options).lower(*arguments).compile().as_text() or ""


def test_data_parallel_gradients_are_all_reduced() -> None:
    mesh = make_mesh()
    gradient = jax.grad(lambda w, x: jnp.tanh(x @ w).sum())
    w, x = (
        abstract_with_sharding(mesh, jax.ShapeDtypeStruct((D, D), jnp.float32)),
        abstract_with_sharding(mesh, X, "data"),
    )
    assert bytes_sent(compiled(gradient, w, x, out_shardings=w.sharding)) == {"all-reduce": 2 * 7 * D * D * 4 // 8}
    alone = make_mesh(devices=jax.devices()[:1])
    assert bytes_sent(compiled(gradient, abstract_with_sharding(alone, w), abstract_with_sharding(alone, x))) == {}


def test_layers_split_over_devices_are_gathered_in_every_turn() -> None:
    mesh = make_mesh(2)  # 4 devices along data
    x, w = abstract_with_sharding(mesh, X, "data"), abstract_with_sharding(mesh, W, None, "data")
    matrix = D * D * 4
    assert bytes_sent(compiled(layers, x, w)) == {"all-gather": L * matrix * 3 // 4, "all-reduce": 2 * 4 * 3 // 4}
    gradient = compiled(jax.grad(layers, argnums=1), x, w, out_shardings=w.sharding)
    # gathered forward and backward; where XLA does not scatter what it sums, the gradient is summed whole
    sent = bytes_sent(gradient)
    assert sent["all-gather"] == 2 * L * matrix * 3 // 4
    assert sent.get("all-reduce", 0) + 2 * sent.get("reduce-scatter", 0) == L * 2 * matrix * 3 // 4


HLO = """HloModule jit_step, is_scheduled=true, num_partitions=8

%condition (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %p = (s32[], f32[4]) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]) parameter(0)
  %fused = f32[4] fusion(%p), kind=kCustom, calls=%stage
  ROOT %t = (s32[], f32[4]) tuple(%p)
}

%stage (p: f32[4]) -> f32[4] {
  ROOT %g = OPERATION
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %again = f32[4] fusion(%x), kind=kCustom, calls=%stage
  ROOT %w = (s32[], /*index=1*/f32[4]) while(%x), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("operation", "kind", "once"),
    [
        (
            "bf16[8,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1, replica_groups=[4,2]<=[8]",
            "all-gather",
            512,
        ),
        ("f32[16] all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", "all-reduce", 96),
        ("(f32[8], /*index=1*/pred[8]) all-reduce-start(%p), channel_id=1, replica_groups={}", "all-reduce", 70),
        ("f32[4] all-reduce-done(%p)", "", 0),
        ("f32[4] reduce-scatter(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}", "reduce-scatter", 48),
        ("s8[32] all-to-all(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a','b'}", "all-to-all", 28),
        ("u4[32] all-gather(%p), channel_id=1, replica_groups=mesh['a'=8] {'a':(2)4}", "all-gather", 12),
        ("(f32[2], f32[16]) all-gather-start(%p), channel_id=1, replica_groups=[1,8]<=[8]", "all-gather", 56),
        ("(f32[8], f32[8]) collective-permute-start(%p), channel_id=1", "collective-permute", 32),
    ],
)
def test_operations_as_xla_writes_them(operation: str, kind: str, once: int) -> None:
    """Under one channel: that in the loop of 12 turns counts, the other is a stage of the same."""
    assert bytes_sent(HLO.replace("OPERATION", operation)) == ({kind: 12 * once} if kind else {})


def test_other_channels_count_apart_and_loops_say_how_often() -> None:
    with_count = HLO.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert bytes_sent(with_count.replace("OPERATION", "f32[8] all-reduce(%p), channel_id=1")) == {"all-reduce": 3 * 56}
    assert bytes_sent(HLO.replace("OPERATION", "f32[8] all-reduce(%p)")) == {"all-reduce": 12 * 56}
    apart = HLO.replace("calls=%stage\n  ROOT %w", "calls=%other\n  ROOT %w").replace(
        "%stage (p", "%other (p: f32[4]) -> f32[4] {\n  ROOT %g = f32[4] all-reduce(%p), channel_id=2\n}\n\n%stage (p"
    )
    assert bytes_sent(apart.replace("OPERATION", "f32[8] all-reduce(%p), channel_id=1")) == {"all-reduce": 12 * 56 + 28}


def test_what_shares_a_channel_is_counted_as_often_as_it_stands_in_a_computation() -> None:
    """As `jax.shard_map` writes what it sums: of other shapes or of one, all in channel 1."""
    line = "  ROOT %g = OPERATION\n"
    more = "".join(f"  %{n} = f32[{n}] all-reduce(%p), channel_id=1\n" for n in (8, 16))
    hlo = HLO.replace(line, more + line).replace("OPERATION", "f32[8] all-reduce(%p), channel_id=1")
    assert bytes_sent(hlo) == {"all-reduce": 12 * (56 + 56 + 112)}


def test_bytes_of_a_part() -> None:
    mesh = make_mesh(2)
    at = NamedSharding(mesh, PartitionSpec("model", "data"))
    tree = {"split": jax.ShapeDtypeStruct((4, 8), jnp.bfloat16, sharding=at), "whole": jnp.zeros(3)}
    assert bytes_each(tree) == 4 * 8 * 2 // 8 + 12


def test_what_the_compiler_says(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = jax.jit(jnp.sin).lower(X)
    assert compiled_cost(lowered) == Cost(0, {}, bytes_each(X), bytes_each(X))

    def fail(error: str) -> Callable[..., None]:
        def compile(_: object) -> None:
            raise jax.errors.JaxRuntimeError(error)

        return compile

    refused = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (25.75G)"
    monkeypatch.setattr(jax.stages.Lowered, "compile", fail(refused + " exceeds available HBM (15.75G)."))
    assert compiled_cost(lowered) == Cost(int(25.75 * 2**30), None)
    arguments = jax.ShapeDtypeStruct((2**28,), jnp.float32), 7  # which the compiler counts among its temporaries
    assert compiled_cost(lowered, arguments) == Cost(int(24.75 * 2**30), None, 2**30)
    monkeypatch.setattr(jax.stages.Lowered, "compile", fail("INTERNAL: no\nmore"))
    with pytest.raises(NotCompiled, match=r"^XLA cannot compile it: INTERNAL: no$"):
        compiled_cost(lowered)
    silent = SimpleNamespace(memory_analysis=lambda: None)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda _: silent)
    with pytest.raises(NotCompiled, match="no analysis"):
        compiled_cost(lowered)
