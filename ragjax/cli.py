"""The command line, `ragjax COMMAND --help`. Bad input ends with one line and code 2."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ragjax.arguments import parser, ready_made
from ragjax.config import Config, default_config, dump_config, load_config, schema
from ragjax.errors import InputError
from ragjax.files import shown
from ragjax.signals import guarded, stopped
from ragjax.terminal import visible

# in what JAX, Gloo and the coordination service say when a process is gone
SIGNS_OF_LOSS = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "barrier", "coordination", "peer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.

    With --distributed also 75, when another process has gone: the same command, started again in all, goes on.
    """
    return guarded(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    command_line = parser()
    options, more = command_line.parse_known_args(arguments)
    if more:  # after an option argparse takes no further KEY=VALUE
        if any("=" not in extra or extra.startswith("-") for extra in more) or "overrides" not in options:
            command_line.error(f"unrecognized arguments: {' '.join(more)}")
        options.overrides += more
    return _run_as_one_of_many(options) if getattr(options, "distributed", False) else _run(options)


def _run_as_one_of_many(options: argparse.Namespace) -> int:
    """As `_run`; an error ends the process at once, since JAX's own end waits for others that wait for this one."""
    import jax

    from ragjax.parallel.processes import initialize_distributed

    try:
        initialize_distributed(stop_together=options.command == "train")
        if jax.process_count() > 1:
            options.name = f"ragjax (process {jax.process_index()} of {jax.process_count()})"
        code = _run(options)
    except BaseException as error:
        lost = isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in SIGNS_OF_LOSS)
        if number := stopped():
            code = 128 + number
            print(f"{options.name}: stopped by {signal.Signals(number).name}", file=sys.stderr)
        elif isinstance(error, InputError):
            code = 2
            print(visible(f"ragjax: {error}"), file=sys.stderr)
        elif not isinstance(error, Exception):
            raise
        elif lost:
            code = 75
            print(
                f"{options.name}: lost another process ({str(error).splitlines()[0][:200]}); it may have said why. "
                "Start the same command again in all processes: it goes on",
                file=sys.stderr,
            )
        else:
            code = 1
            traceback.print_exc()
    if code == 0 or options.together:
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + number if (number := stopped()) else code)


def _run(options: argparse.Namespace) -> int:
    try:
        return COMMANDS[options.command](options)
    except InputError as error:
        if stopped():  # it may be what a library made of that
            raise
        print(visible(f"{options.name}: {error}"), file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(visible(f"ragjax: {error.filename or 'output'}: the disk is full; free some space"), file=sys.stderr)
        return 2


def _load(options: argparse.Namespace) -> Config:
    return _load_with(options.config, [*getattr(options, "overrides", []), *options.set])


def _load_with(name: str, overrides: Sequence[str]) -> Config:
    """The configuration that CONFIG names: a file, the folder of a run, or a ready-made one; with its overrides."""
    path, names = Path(name), ready_made()
    if path.is_dir() and ((path / "config.yaml").exists() or name not in names):
        from ragjax.runs.run_dir import load_run_config

        return load_run_config(path, overrides)
    if not path.is_file():
        if name not in names:
            raise InputError(f"{path}: no such configuration file or run; the ready-made ones are {', '.join(names)}")
        path = names[name]
    return load_config(path, overrides)


def _plan(options: argparse.Namespace) -> int:
    from ragjax.commands.plan import print_plan, print_sweep
    from ragjax.planning.plan import capacity, memory_plan, planned_chip, planned_mesh, sweep
    from ragjax.terminal import terminal

    config = _load(options)
    if options.sweep:
        with terminal.status("compiling from shapes alone, for one machine after the other …"):
            machines = list(sweep(config))
        print_sweep(machines, as_json=options.json)
        return 0
    mesh = planned_mesh(config, options.devices, options.topology)
    with terminal.status("compiling from shapes alone, to learn what XLA needs …"):
        plan = memory_plan(config, mesh, planned_chip(mesh, options.peak), stand_ins=options.memory is not None)
    memory = None if options.memory is None else round(options.memory * 2**30)
    print_plan(plan, capacity(config, mesh, memory), as_json=options.json)
    return 0


def _tell(text: str) -> None:
    """On standard output, once where there are several processes."""
    from ragjax.parallel.processes import is_process_zero

    if is_process_zero():
        print(visible(text))


def _index(options: argparse.Namespace) -> int:
    from ragjax.commands.index import build_index

    _tell(f"index: {build_index(_load(options), options.source, options.rebuild)}")
    return 0


def _train(options: argparse.Namespace) -> int:
    from ragjax.commands.train import Interrupted, train

    try:
        _tell(f"run: {train(_load(options))}")
    except Interrupted as stop:
        options.together = True
        print(visible(f"{options.name}: {stop}"), file=sys.stderr)
        return stop.code
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from ragjax.commands.evaluate import evaluate
    from ragjax.evaluation.metrics_table import print_metrics
    from ragjax.parallel.processes import is_process_zero

    try:
        report = evaluate(_load(options))
    except KeyboardInterrupt:
        print(f"{options.name}: what was measured is kept; the same command goes on", file=sys.stderr)
        raise
    if is_process_zero():
        print_metrics(report, as_json=options.json)
    return 0


def _index_report(options: argparse.Namespace) -> int:
    from ragjax.commands.index_report import index_report, print_report

    print_report(index_report(_load(options), options.questions, options.plot), as_json=options.json)
    return 0


def _answer(options: argparse.Namespace) -> int:
    from ragjax.commands.answer import answer_from_command_line

    config = _load(options)
    return answer_from_command_line(
        config, options.questions, options.mode or config.decode.mode, options.untrained, options.json
    )


def _report(options: argparse.Namespace) -> int:
    from ragjax.commands.comparing.report import write_report

    folders = [options.folder] if options.other is None else [options.folder, options.other]
    _tell(f"report: {write_report(folders, options.out)}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from ragjax.commands.comparing.compare import compare_folders, print_comparison

    folders = options.folder, options.other
    print_comparison(compare_folders(*folders), list(map(str, folders)), as_json=options.json)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from ragjax.commands.comparing.sweep import run_sweep

    return run_sweep(partial(_load_with, options.config), options)


def _serve(options: argparse.Namespace) -> int:
    from ragjax.commands.serve import ServeOptions, serve

    serve(
        _load(options),
        ServeOptions(
            host=options.host,
            port=options.port,
            token_file=options.token_file,
            allowed_hosts=tuple(options.allow_host),
            waiting=options.queue,
            batch=options.batch,
            deadline_s=options.deadline,
            warm_up_s=options.warm_up,
            log_questions=options.log_questions,
            untrained=options.untrained,
        ),
    )
    return 0


def _import(options: argparse.Namespace) -> int:
    from ragjax.commands.hugging_face import import_rag

    _tell(f"imported: {import_rag(options.source, Path(options.out), options.base)}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from ragjax.checkpoints.hub import check_push, push
    from ragjax.commands.hugging_face import export_rag

    if options.push:
        check_push(options.push)
    out = export_rag(Path(options.source), Path(options.out), options.merge)
    _tell(f"exported: {out}")
    if options.push:
        _tell(f"pushed: {push(out, options.push)}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ragjax.commands.verify import print_verified, verify

    found = verify(Path(options.folder))
    print_verified(found, as_json=options.json)
    if damaged := sum(len(part.damage) for part in found):
        raise InputError(f"{options.folder}: {damaged} of {sum(part.files for part in found)} files are damaged")
    return 0


def _config(options: argparse.Namespace) -> int:
    if options.config and (options.list or options.schema):
        raise InputError(f"{shown(options.config)}: --list and --schema take no CONFIG; leave it out")
    if options.list:
        for name, path in ready_made().items():
            comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
            print(f"{name:16}  {next(line for line in comments if '$schema=' not in line)[2:]}")
    elif options.schema:
        print(json.dumps(schema(), indent=2, ensure_ascii=False))
    elif options.config:
        print(dump_config(_load(options)), end="")
    elif options.set:
        raise InputError("--set replaces values of a CONFIG; name one, such as configs/factbook.yaml")
    else:
        print(default_config(), end="")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "plan": _plan,
    "index": _index,
    "train": _train,
    "evaluate": _evaluate,
    "index-report": _index_report,
    "answer": _answer,
    "report": _report,
    "compare": _compare,
    "sweep": _sweep,
    "serve": _serve,
    "import": _import,
    "export": _export,
    "verify": _verify,
    "config": _config,
}
