"""Eight virtual CPU devices, of which a test sees two; no network; programs compiled once for both workers and later.

And what many tests share: a tiny world with its index, and a run that was trained on it.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis  # noqa: F401  # first imported at the end of a session it can fail under Python 3.11
import jax
import jaxlib
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_disable_most_optimizations", True)  # tiny models: compiling is what takes the time
jax.config.update("jax_traceback_in_locations_limit", 0)  # a tenth less to lower and compile; the program is the same
if jax.__version_info__ < (0, 11):  # the older way to compile fusions takes 2.5 times less; JAX 0.12 has no choice
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"


os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=1"

PACKAGE = Path(__file__).parents[1] / "ragjax"
COMPILED_BYTES = 500_000_000  # one run of all tests leaves less than a fifth
MAPPINGS = 40_000
SEEN_DEVICES = 2  # every device runs its part of a program: eight take three times as long


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "virtual CPU devices that there are (default: %(default)s); tests that ask for more are left out"
    parser.addoption("--devices", type=int, default=8, help=told)


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_num_cpu_devices", config.getoption("devices"))
    keep_compiled_programs(config)
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):  # else workers import and run all
        check_arrays()


def check_arrays() -> None:
    """Every array that crosses a function is checked against its annotation.

    mypy sees to the modules that have no arrays, where looking at each call as well would take a sixth of all the time.
    """
    assert not any(name.startswith("ragjax") for name in sys.modules)
    files = [path for path in PACKAGE.rglob("*.py") if "\nfrom jaxtyping import" in path.read_text(encoding="utf-8")]
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in files]
    install_import_hook(names, "array_checks.checked")


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


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A worker that has told all its results ends at once: to free each program would take it eight seconds."""
    if hasattr(config, "workerinput"):
        os._exit(0)


def pytest_keyboard_interrupt() -> None:
    """What was being written to the cache when Ctrl-C came may be half of it."""
    shutil.rmtree(jax.config.values["jax_compilation_cache_dir"], ignore_errors=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `devices(1, 8, slow=[2])` runs with one device and with eight, and in the slow group with two."""
    if marker := metafunc.definition.get_closest_marker("devices"):
        there, slow = metafunc.config.getoption("devices"), marker.kwargs.get("slow", [])
        marks = dict.fromkeys(marker.args, ()) | dict.fromkeys(slow, pytest.mark.slow)
        counts = [pytest.param(count, marks=mark) for count, mark in marks.items() if count <= there]
        metafunc.parametrize("seen_devices", counts, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def seen_devices(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many devices JAX tells of; what trains or searches takes all that it sees."""
    count = getattr(request, "param", min(SEEN_DEVICES, request.config.getoption("devices")))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("devices", "local_devices"):
            every = getattr(jax, name)
            patch.setattr(jax, name, lambda *kind, every=every, **of: every(*kind, **of)[:count])
        for name in ("device_count", "local_device_count"):
            patch.setattr(jax, name, lambda *_, **__: count)
        yield count


@pytest.fixture(scope="session", autouse=True)
def shuffled_once() -> Iterator[None]:
    """Grain takes up to four milliseconds for a position among eight questions, and many runs draw the same ones."""
    from grain._src.python.dataset.transformations import shuffle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle.index_shuffle, "index_shuffle", functools.cache(shuffle.index_shuffle.index_shuffle))
        yield


@pytest.fixture(scope="module", autouse=True)
def few_mappings() -> Iterator[None]:
    """Linux gives a process 65,530 mappings of memory, and each compiled program takes some; beyond them it crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from trained import quick_world

    with quick_world(tmp_path_factory) as folder:
        yield folder


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    from trained import trained_run

    return trained_run(world)


def pytest_collection_finish() -> None:
    """The many objects of imports and traces are not looked through again and again: a tenth of all the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


LONGEST = [
    *("test_processes", "test_soak", "test_train", "test_step", "test_refresh", "test_exact", "test_lora"),
    *("test_contrastive", "test_hf_numbers", "test_evaluate", "test_answer", "test_plan", "test_encoder_decoders"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers end together if the longest files are not the last ones."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
