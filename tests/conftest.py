"""Eight virtual CPU devices (`--devices N`: N), no network and no compilation cache, whatever machine runs the tests.

And what many tests share: a tiny world with its index, and a run that was trained on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax
import pytest
from trained import quick_world, trained_run

jax.config.update("jax_disable_most_optimizations", True)  # tiny models: compiling is what takes the time
if jax.__version_info__ < (0, 11):  # the older way to compile fusions takes 2.5 times less; JAX 0.12 has no choice
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "virtual CPU devices (default: %(default)s); with another number choose -m 'any_devices and not slow'"
    parser.addoption("--devices", type=int, default=8, help=told)


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_num_cpu_devices", config.getoption("devices"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with quick_world(tmp_path_factory) as folder:
        yield folder


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    return trained_run(world)


LONGEST = [f"test_{name}" for name in "processes refresh encoder_decoders step train plan fused soak".split()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers end together if the longest files are not the last ones."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
