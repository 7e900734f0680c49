"""What a program costs, read from its own text: floating-point operations, and bytes between devices.

XLA's `cost_analysis` counts a loop's body once, and the layers run in a loop: so both are counted here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


class NotCompiled(Exception):
    """XLA cannot compile a program, or does not tell what it needs; the message says why."""


@dataclass(frozen=True)
class Cost:
    """What a compiled program takes of each device, in bytes."""

    temporaries: int  # set aside beside its arguments and results
    sent: dict[str, int] | None  # as `bytes_sent`; None where XLA refuses to compile what cannot fit
    read: int = 0  # its arguments
    written: int = 0  # its results


def compiled_cost(lowered: jax.stages.Lowered, arguments: Any = ()) -> Cost:
    """Compiles a program and asks XLA. Raises `NotCompiled`.

    `arguments` are those with which it was lowered, with their places: a refusal tells their sum with the temporaries.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # the TPU's compiler knows how much memory there is, and gives up where a program needs more; what it calls
        # temporaries are these and the arguments
        if match := re.search(r"HLO temporaries \(([\d.]+)([KMG])\)", str(error)):
            together = round(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[match[2]])
            return Cost(max(0, together - (read := bytes_each(arguments))), None, read)
        raise NotCompiled(f"XLA cannot compile it: {str(error).splitlines()[0]}") from None
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotCompiled("XLA has no analysis for this device")
    temporaries, read, written = (
        int(getattr(analysis, f"{what}_size_in_bytes")) for what in ("temp", "argument", "output")
    )
    return Cost(temporaries, bytes_sent(compiled.as_text() or ""), read, written)


def program_cost(program: jax.stages.Wrapped, *arguments: Any) -> tuple[int, Cost]:
    """The `matmul_flops` of a jitted function with these arguments, abstract ones too, and its cost to each device.

    Raises `NotCompiled`.
    """
    traced = program.trace(*arguments)
    return matmul_flops(traced.jaxpr.jaxpr), compiled_cost(traced.lower(), arguments)


def program_temporaries(program: jax.stages.Wrapped, *arguments: Any) -> int:
    """Bytes of each device that a jitted function sets aside for these arguments, abstract ones too.

    Raises `NotCompiled`.
    """
    return compiled_cost(program.lower(*arguments), arguments).temporaries


def bytes_each(tree: Any) -> int:
    """What the arrays of a tree, abstract ones too, take on each device that holds a part of them."""

    def part(leaf: Any) -> tuple[int, ...]:
        sharding = getattr(leaf, "sharding", None)
        return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)

    arrays = (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))
    return sum(math.prod(part(leaf)) * leaf.dtype.itemsize for leaf in arrays)


def matmul_flops(jaxpr: Jaxpr) -> int:
    """Floating-point operations of a program's matrix products and convolutions, 2 each multiplication, on all devices.

    A `scan` counts as often as it runs, the body of a `shard_map` as often as devices run it, the dearest branch of a
    `cond` once, the body of a `while` once (its number of turns is not in the program). What a backward pass recomputes
    is counted again.
    """
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        read: list[Any] = [x.aval for x in equation.invars]
        made: list[Any] = [x.aval for x in equation.outvars]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * made[0].size * math.prod(read[0].shape[d] for d in contracted)
        elif name == "conv_general_dilated":
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * made[0].size * read[1].size // read[1].shape[features]
        else:
            inside = [matmul_flops(inner) for inner in _jaxprs(equation.params.values())] or [0]
            times = equation.params.get("length", 1)
            if name == "shard_map":  # its body is what one device does
                times = math.prod(equation.params["mesh"].shape[axis] for axis in equation.params["newly_manual_axes"])
            total += max(inside) if name == "cond" else sum(inside) * times
    return total


def used_arguments(jaxpr: Jaxpr) -> list[bool]:
    """Which arguments of a program, leaf by leaf, it uses at all: a compiled one is not given the others."""
    used = {id(x) for x in jaxpr.outvars}
    for equation in jaxpr.eqns:
        inner = equation.params["jaxpr"].jaxpr if equation.primitive.name in ("jit", "pjit") else None
        there = [True] * len(equation.invars) if inner is None else used_arguments(inner)
        used |= {id(x) for x, is_used in zip(equation.invars, there, strict=True) if is_used}
    return [id(x) in used for x in jaxpr.invars]


def _jaxprs(values: Any) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)


# what each of n devices sends, as a share of the bytes of the operation's result, when they pass parts around a ring
SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
# a started operation returns its operand, too
STARTED = {"all-gather-start": lambda n: n / (n + 1), "collective-permute-start": lambda n: 1 / 2}


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = (\S.*?) ([a-z][a-z-]*)\((.*)")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|(?:true|false)_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LIMIT = re.compile(r" = [su]\d+\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


def bytes_sent(hlo: str) -> dict[str, int]:
    """Bytes that each device sends in one run of a compiled program (its HLO text), by the kind of operation.

    It receives as many. A loop counts as often as it turns: XLA tells, or else the number with which its condition
    compares the turns, as `scan` does. An operation that XLA has cut into stages stands in several computations, under
    one channel, and counts once.
    """
    devices = int(match[1]) if (match := re.search(r"num_partitions=(\d+)", hlo)) else 1
    called: dict[str, list[tuple[str, int | str]]] = {}  # by each computation, and how often, or the loop's condition
    limit: dict[str, int] = {}  # the largest constant of each computation
    sent: dict[str, dict[tuple[str, ...], float]] = {}  # bytes by operation
    entry = name = ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            entry = name if head[1] else entry
            called[name], sent[name], limit[name] = [], {}, 1
        elif instruction := _INSTRUCTION.match(line):
            shape, operation, rest = instruction.groups()
            kind = operation.removesuffix("-start")
            if operation.endswith(("-done", "-update")):
                continue
            if kind in SENT:
                n = _group(rest, devices)
                size = _bytes(shape) * STARTED.get(operation, lambda n: 1)(n)
                one = _operation(kind, shape, rest) or (kind, f"{name} {len(sent[name])}")
                sent[name][one] = sent[name].get(one, 0.0) + SENT[kind](n) * size
            if constant := _LIMIT.search(line):
                limit[name] = max(limit[name], int(constant[1]))
            callees = _CALLED.findall(rest) + [
                b for some in _BRANCHES.findall(rest) for b in re.findall(r"[\w.-]+", some)
            ]
            turns: int | str = 1
            if operation == "while":
                turns = (
                    int(match[1]) if (match := _TURNS.search(rest)) else re.findall(r"condition=%?([\w.-]+)", rest)[0]
                )
            called[name] += [(callee, turns) for callee in callees]

    most: dict[tuple[str, ...], float] = {}

    def visit(name: str, times: int) -> None:
        for one, size in sent.get(name, {}).items():
            most[one] = max(most.get(one, 0.0), times * size)
        for callee, turns in called.get(name, []):
            visit(callee, times * (turns if isinstance(turns, int) else limit[turns]))

    visit(entry, 1)
    totals: dict[str, int] = {}
    for (kind, *_), size in most.items():
        totals[kind] = totals.get(kind, 0) + round(size)
    return totals


def _operation(kind: str, shape: str, rest: str) -> tuple[str, ...] | None:
    """What the stages of one operation have in common, if it has a channel. `shard_map` uses one channel for many."""
    channel, source = re.search(r"channel_id=(\d+)", rest), re.search(r'op_name="([^"]*)"', rest)
    return (kind, channel[1], shape, source[1] if source else "") if channel else None


def _bytes(shape: str) -> int:
    """Of an HLO shape, tuples and all, such as (f32[8,3]{1,0}, pred[])."""
    bits = 0
    for letters, width, dimensions in _ARRAY.findall(shape):
        each = 8 if letters == "pred" else int(width or 0)  # a token has none
        bits += each * math.prod(int(d) for d in dimensions.split(",") if d)
    return bits // 8


def _group(rest: str, devices: int) -> int:
    """How many devices work together, in any of the three ways in which XLA writes groups."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", match[1]))
        # an axis may be named in part: 'axis_0':(2)4 are 4 of its devices
        return math.prod(
            int(part or sizes[axis]) for axis, part in re.findall(r"'([\w.]+)'(?::\(\d+\)(\d+))?", match[2])
        )
    return devices


def flops_text(count: int | float) -> str:
    """Floating-point operations as people read them."""
    for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count / 1e6:.1f} MFLOP"
