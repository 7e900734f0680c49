"""How long until the first answer: imports, index and models, and programs compiled or found in the cache.

    python -m benchmarks.starting configs/factbook.yaml

New processes answer a question of the test split twice each: first with no compiled programs in the cache, then with
what the first one left there. What is downloaded stays where it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ONE = "import json, sys; from benchmarks.starting import start; print(json.dumps(start(*sys.argv[1:])))"


def start(config: str, *overrides: str) -> dict[str, float]:
    """Seconds of each stage, in this process, which has imported nothing of JAX or ragjax so far."""
    marks = [time.perf_counter()]
    from ragjax.answerer import open_answerer
    from ragjax.config import load_config
    from ragjax.data.questions import read_questions

    marks.append(time.perf_counter())
    settings = load_config(config, overrides)
    answerer = open_answerer(settings)
    question = next(iter(read_questions(Path(settings.questions.test)))).question
    marks.append(time.perf_counter())
    for _ in range(2):
        answerer.answer([question])
        marks.append(time.perf_counter())
    stages = ("imports", "index and models", "first answer", "second answer")
    return {stage: after - before for stage, before, after in zip(stages, marks, marks[1:], strict=False)}


def main() -> None:
    from benchmarks.report import Stage, make_console, peak, show, write
    from ragjax.config import load_config
    from ragjax.errors import InputError
    from ragjax.files import cache_folder

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.starting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write starting.md and starting.png")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    tables: dict[str, dict[str, Stage]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.repeats):
            for title in ("no programs in the cache", "programs in the cache"):
                cache = Path(folder) / str(number)
                if not cache.exists():
                    cache.mkdir()
                    for kept in cache_folder().iterdir() if cache_folder().exists() else ():
                        if kept.name != "xla":
                            (cache / kept.name).symlink_to(kept)
                started = time.perf_counter()
                child = subprocess.run(
                    [sys.executable, "-c", ONE, options.config, *options.overrides],
                    env=os.environ | {"RAGJAX_CACHE": str(cache)},
                    stdout=subprocess.PIPE,
                    text=True,
                )
                if child.returncode:
                    raise InputError("the process that was to answer failed; what it said stands above")
                seconds = json.loads(child.stdout) | {"the whole process": time.perf_counter() - started}
                for stage, took in seconds.items():
                    tables.setdefault(title, {}).setdefault(stage, Stage()).seconds.append(took)
    console, most = make_console(), peak(config.dtype)
    console.print(
        f"{config.retriever.source}, {config.generator.source}, k = {config.decode.num_docs}\n", soft_wrap=True
    )
    for title, stages in tables.items():
        show(console, title, stages, "the whole process", most)
    write(console, options.folder, "starting", tables)


if __name__ == "__main__":
    from benchmarks.report import or_input_error

    or_input_error(main)
