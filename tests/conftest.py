"""Eight virtual CPU devices (`--devices N`: N), no network, and programs compiled once for both workers and later runs.

And what many tests share: a tiny world with its index, and a run that was trained on it.
"""

from __future__ import annotations

import gc
import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis  # noqa: F401  # first imported at the end of a session it can fail under Python 3.11
import jax
import jaxlib
import pytest
from trained import quick_world, trained_run

jax.config.update("jax_disable_most_optimizations", True)  # tiny models: compiling is what takes the time
if jax.__version_info__ < (0, 11):  # the older way to compile fusions takes 2.5 times less; JAX 0.12 has no choice
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"


COMPILED_BYTES = 500_000_000  # one run of all tests leaves less than a fifth


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "virtual CPU devices (default: %(default)s); with another number choose -m 'any_devices and not slow'"
    parser.addoption("--devices", type=int, default=8, help=told)


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_num_cpu_devices", config.getoption("devices"))
    keep_compiled_programs(config)


def keep_compiled_programs(config: pytest.Config) -> None:
    """XLA's cache in .pytest_cache: for the other worker and later runs with this JAX on such a processor."""
    cpuinfo = Path("/proc/cpuinfo")
    features = [line for line in cpuinfo.read_text().splitlines() if "flags" in line][:1] if cpuinfo.exists() else []
    made_with = (jax.__version__, jaxlib.__version__, os.environ.get("XLA_FLAGS"), platform.machine(), *features)
    folder = config.cache.mkdir(f"xla-{hashlib.sha256(repr(made_with).encode()).hexdigest()[:12]}")
    if not hasattr(config, "workerinput") and sum(path.stat().st_size for path in folder.iterdir()) > COMPILED_BYTES:
        shutil.rmtree(folder)  # most of them are of code that is no more
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # child processes, which tests kill, would leave half an entry


def pytest_keyboard_interrupt() -> None:
    """What was being written to the cache when Ctrl-C came may be half of it."""
    shutil.rmtree(jax.config.values["jax_compilation_cache_dir"], ignore_errors=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with quick_world(tmp_path_factory) as folder:
        yield folder


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    return trained_run(world)


def pytest_collection_finish() -> None:
    """The many objects of imports and traces are not looked through again and again: a tenth of all the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


LONGEST = [f"test_{name}" for name in "refresh train step processes encoder_decoders plan soak fused_retrieval".split()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers end together if the longest files are not the last ones."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
