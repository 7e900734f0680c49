"""What a text reads of itself: kernels against all logits in memory, and which of them is compiled where."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from ragjax.models import attention
from ragjax.models.attention import self_attention, splash_attention
from ragjax.parallel.mesh import make_mesh

LENGTH, HEADS, KV_HEADS, WIDTH = 200, 4, 2, 64
# of the kernels' sums, in float32: S terms, at most ten times their size apart
ROUNDING = LENGTH * 1e-6
CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "causal, window, soft cap": {"causal": True, "window": 70, "softcap": 2.0},
    "both ways, padding": {"mask": True},
    "both ways, padding, window": {"mask": True, "window": 150},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks a side, the second one cut short."""
    monkeypatch.setattr(attention, "BLOCK", 128)
    monkeypatch.setattr(attention, "LONG", 100)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"scale": 0.2, "softcap": 0.0, "causal": False, "window": None, "mask": False} | CASES[request.param]


def rows(count: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    shapes = ((count, LENGTH, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    return tuple(jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes)


def with_gradients(attend: Any, masked: bool, count: int = 2, place: Any = None) -> Any:
    """What is attended to, and the gradients of queries, keys and values, where padding counts nothing."""
    *given, weights = jax.device_put(rows(count), place)
    lengths = np.array([LENGTH, 130] * (count // 2))
    mask = jnp.asarray(np.arange(LENGTH) < lengths[:, None]) if masked else None

    def summed(*given: Any) -> Any:
        attended = attend(*given, mask)
        attended = attended if mask is None else attended * mask[..., None, None]
        return (attended * weights).sum(), attended

    return jax.device_get(jax.jit(jax.grad(summed, argnums=(0, 1, 2), has_aux=True))(*given))


def expected(case: dict[str, Any], count: int = 2) -> Any:
    return by_definition(count, **case)


@cache
def by_definition(count: int, mask: bool, window: int | None, causal: bool, scale: float, softcap: float) -> Any:
    """One query and one head after the other."""

    def attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
        k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
        where = jnp.arange(LENGTH)
        seen = jnp.ones((1, LENGTH, LENGTH), bool) if mask is None else mask[:, None]
        if causal:
            seen = seen & (where[:, None] >= where)
        if window:
            seen = seen & (jnp.abs(where[:, None] - where) < window)
        logits = scale * jnp.einsum("nshd,nthd->nhst", q, k)
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)
        weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
        return jnp.einsum("nhst,nthd->nshd", weights, v)

    return with_gradients(attend, mask, count)


def assert_close(found: Any, wanted: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING), found, wanted)


@pytest.mark.parametrize("case", [name for name in CASES if name != "causal"], indirect=True)
def test_the_tpus_kernel(case: dict[str, Any]) -> None:
    """As it is interpreted: rows are filled up to whole blocks, heads share keys and values. On a mesh also causal."""
    masked = case.pop("mask")
    found = with_gradients(partial(splash_attention, interpret=True, **case), masked)
    assert_close(found, expected(case | {"mask": masked}))


def test_all_logits(case: dict[str, Any]) -> None:
    """On CPUs; windows are those of a layer, whose number is known only inside a loop."""
    masked, window = case.pop("mask"), case.pop("window")
    windows = (window or 0, 5 if window else 0)

    def attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
        def layer(number: Any) -> Any:
            return self_attention(q, k, v, mask, windows=windows, layer=number, **case)

        return jax.lax.map(layer, jnp.arange(2))[0]

    assert_close(with_gradients(attend, masked), expected(case | {"mask": masked, "window": window}))


def test_jaxs_own_function(case: dict[str, Any]) -> None:
    """By XLA, with the arguments that cuDNN gets on a GPU."""
    if case["softcap"]:
        q, k, v, _ = rows(2)
        with pytest.raises(AssertionError):
            attention.fused_attention(q, k, v, None, **{k: v for k, v in case.items() if k != "mask"})
        case["softcap"] = 0.0
    masked = case.pop("mask")
    found = with_gradients(partial(attention.fused_attention, implementation="xla", **case), masked)
    assert_close(found, expected(case | {"mask": masked}))


@pytest.mark.devices(8)
@pytest.mark.parametrize("model", [2, 4], ids=["heads over model", "keys cannot be split"])
def test_each_device_has_its_rows_and_heads(model: int) -> None:
    case: dict[str, Any] = {"scale": 0.2, "softcap": 0.0, "causal": True, "window": None}
    mesh = make_mesh(model)
    with use_abstract_mesh(mesh.abstract_mesh):
        attend = partial(attention._splash_on_mesh, interpret=True, **case)
        by_rows = NamedSharding(mesh, PartitionSpec("data"))
        found = with_gradients(attend, masked=False, count=8 // model, place=by_rows)
    assert_close(found, expected(case | {"mask": False}, count=8 // model))


@pytest.mark.parametrize("length", [99, 100])
def test_the_platform_decides_and_the_length(length: int) -> None:
    q, k, v = (jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16) for heads in (4, 2, 2))
    traced = jax.jit(partial(self_attention, causal=True)).trace(q, k, v)
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")}
    assert "tpu_custom_call" not in texts["cpu"]
    assert ("tpu_custom_call" in texts["tpu"]) == (length == 100)
