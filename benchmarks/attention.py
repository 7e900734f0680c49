"""What reading one long prompt takes of a TPU's memory, going forward and backward through one layer's attention.

    python -m benchmarks.attention --topology v5e:2x2

Compiled for TPUs that need not be there (pip install 'ragjax[tpu]'). A compiler that refuses what cannot fit tells what
that would take.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from benchmarks.report import make_console, or_input_error
from ragjax.models import attention
from ragjax.parallel.mesh import make_mesh
from ragjax.planning.plan import _tpu_devices
from ragjax.planning.program_cost import compiled_cost

LENGTHS = (1024, 2048, 4096, 8192)
# (query heads, heads of keys and values, their size), and what is special
MODELS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "Llama 3 8B": ((32, 8, 128), {}),
    "Gemma 2 9B, a layer with a window": ((16, 8, 256), {"softcap": 50.0, "windows": (0, 4096), "layer": 1}),
    "SmolLM2 135M": ((9, 3, 64), {}),
}


def attention_temporaries(mesh: Mesh, heads: tuple[int, int, int], length: int, kernel: bool, **settings: Any) -> int:
    """Bytes of each device for one prompt on each along `data`, in bfloat16: by the kernel, or with all logits."""
    rows, (queries, keys, size) = mesh.shape["data"], heads
    place = NamedSharding(mesh, PartitionSpec("data"))
    given = [
        jax.ShapeDtypeStruct((rows, length, count, size), jnp.bfloat16, sharding=place)
        for count in (queries, keys, keys)
    ]

    def summed(*given: jax.Array) -> jax.Array:
        return partial(attention.self_attention, causal=True, **settings)(*given).astype(jnp.float32).sum()

    longest = attention.LONG
    attention.LONG = 0 if kernel else length + 1
    try:
        with use_abstract_mesh(mesh.abstract_mesh):
            lowered = jax.jit(jax.grad(summed, argnums=(0, 1, 2))).lower(*given)
    finally:
        attention.LONG = longest
    return compiled_cost(lowered, given).temporaries


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--topology", default="v5e:2x2")
    options = parser.parse_args()
    console = make_console()
    mesh = make_mesh(devices=_tpu_devices(options.topology)[:1])
    console.print(f"{mesh.devices.flat[0].device_kind}, bfloat16, one prompt, MiB of temporaries\n")
    for name, (heads, settings) in MODELS.items():
        for length in LENGTHS:
            whole, kernel = (attention_temporaries(mesh, heads, length, by, **settings) for by in (False, True))
            console.print(f"{name}, {length:,} tokens: all logits {whole / 2**20:,.0f}, kernel {kernel / 2**20:,.0f}")


if __name__ == "__main__":
    or_input_error(main)
