"""The least time that a program takes: by arithmetic, by memory or by the network, whichever is longest.

The roofline of Williams et al. (2009), per device. Memory is counted as what a program must read and write: its
arguments and its results, each once; what it keeps on the way may never leave the chip. So no program is faster, and a
good one may well be slower.
"""

from __future__ import annotations

from dataclasses import dataclass

from ragjax.planning.program_cost import Cost


@dataclass(frozen=True)
class Chip:
    """A device as its vendor's data sheet has it; None where that is not known."""

    name: str
    peak: int | float  # TFLOP/s of matrix products in bfloat16
    peak_float32: int | float  # the same in float32, by JAX's default precision
    memory: int | float | None = None  # GiB
    bandwidth: int | float | None = None  # GB/s, of its memory
    network: int | float | None = None  # GB/s, to the other devices of a machine or a TPU's slice

    def tflops(self, dtype: str) -> int | float:
        """What it can compute in a `dtype` of the configuration."""
        return self.peak_float32 if dtype == "float32" else self.peak


V5E = Chip("TPU v5e", 197, 197, 15.75, 819, 200)  # of 16 GiB XLA may use 15.75
V6E = Chip("TPU v6e", 918, 918, 31.25, 1640, 448)
H100 = Chip("H100", 989, 494, 79.6, 3350, 450)  # SXM; float32 as TF32
H200 = Chip("H200", 989, 494, 140.4, 4800, 450)
_KINDS = {"TPU v5 lite": V5E, "TPU v6 lite": V6E, "H100": H100, "H200": H200}


@dataclass(frozen=True)
class Machine:
    """Some chips together: as XLA's TPU compiler names them, or GPUs, in whose place CPU devices are compiled for."""

    chip: Chip
    devices: int
    topology: str | None = None


MACHINES = (
    Machine(V5E, 1, "v5e:1x1"),
    Machine(V5E, 4, "v5e:2x2"),
    Machine(V5E, 8, "v5e:2x4"),
    Machine(V5E, 16, "v5e:4x4"),
    Machine(V6E, 8, "v6e:2x4"),
    *(Machine(chip, devices) for chip in (H100, H200) for devices in (1, 8)),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for a CPU and what is not in the table."""
    return next((chip for kind, chip in _KINDS.items() if kind in device_kind), None)


def least_seconds(chip: Chip, dtype: str, flops: int | float, cost: Cost, runs: int = 1) -> tuple[float, str]:
    """The seconds that a program takes at least on each device, and what takes them: arithmetic, memory or network.

    Args:
        chip: the device.
        dtype: in which matrices are multiplied.
        flops: of one run, on one device.
        cost: of the compiled program.
        runs: how often it runs.
    """
    times = {"arithmetic": flops / (chip.tflops(dtype) * 1e12)}
    if chip.bandwidth is not None:
        times["memory"] = (cost.read + cost.written) / (chip.bandwidth * 1e9)
    if chip.network is not None and cost.sent is not None:
        times["network"] = sum(cost.sent.values()) / (chip.network * 1e9)
    binds = max(times, key=times.__getitem__)
    return runs * times[binds], binds


def roofline_text(chip: Chip, dtype: str, binds: str) -> str:
    """What a least time was computed from, in words."""
    parts = [f"{chip.tflops(dtype):g} TFLOP/s"]
    parts += [] if chip.bandwidth is None else [f"{chip.bandwidth:g} GB/s of memory"]
    parts += [] if chip.network is None else [f"{chip.network:g} GB/s between devices"]
    return f"{binds} binds: at {', '.join(parts)} each, nothing waiting"
