"""The command line, `ragjax COMMAND --help`. Bad input ends with one line and code 2."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ragjax.config import Config, default_config, dump_config, load_config, schema
from ragjax.errors import InputError
from ragjax.files import shown
from ragjax.signals import guarded, stopped
from ragjax.terminal import visible

# in what JAX, Gloo and the coordination service say when a process is gone
SIGNS_OF_LOSS = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "barrier", "coordination", "peer")
# how shells complete CONFIG: with files, and bash with the ready-made names, too
COMPLETED = {"bash": "_ragjax_configs", "zsh": "_files", "fish": "(__fish_complete_path (commandline -ct))"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.

    With --distributed also 75, when another process has gone: the same command, started again in all, goes on.
    """
    return guarded(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if more:  # after an option argparse takes no further KEY=VALUE
        if any("=" not in extra or extra.startswith("-") for extra in more) or "overrides" not in options:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
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
        return options.run(options)
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(visible(message))


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: object, shell: Any, option: object = None) -> None:
        import shtab

        names = " ".join(ready_made())
        configs = f'_ragjax_configs() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}'
        print(shtab.complete(parser, shell, preamble={"bash": configs}))  # type: ignore[arg-type]  # shtab takes one for each shell
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ragjax",
        description="RAG-Sequence and RAG-Token in JAX: index a corpus, train end to end, decode, evaluate.",
        epilog="example:\n  ragjax train configs/factbook.yaml train.steps=100 output=runs/mine\n\n"
        "`ragjax COMMAND --help` tells more about each command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ragjax {importlib.metadata.version('ragjax')}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=COMPLETED,
        help="print what makes a shell complete commands, options and configurations; in bash, put into ~/.bashrc: "
        'eval "$(ragjax --print-completion bash)"',
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: object, summary: str, example: str, config: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if config:
            config_argument(sub)
        sub.set_defaults(run=run, name="ragjax", together=False)
        return sub

    def config_argument(sub: argparse.ArgumentParser, **settings: Any) -> None:
        help = "a YAML file, the folder of a run, or the name of a ready-made one, such as factbook"
        argument = sub.add_argument("config", metavar="CONFIG", help=help, **settings)
        argument.complete = COMPLETED  # type: ignore[attr-defined] # for shtab

    def overrides(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replaces a value, such as train.steps=100")
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="the same")

    def distributed(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--distributed",
            action="store_true",
            help="as one of several processes, each started with this same command: on TPU pods, SLURM, Open MPI and "
            "Kubernetes JAX finds the others by itself; elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID (launch/processes.sh does)",
        )

    json_help = "print JSON for programs instead of tables"
    plan = command(
        "plan",
        _plan,
        "tell what a run needs of disk, memory, network and arithmetic, before anything is built",
        "ragjax plan configs/rag_sequence_nq.yaml --devices 8 --memory 16 index.kind=HNSW32 mesh.fsdp=true",
    )
    overrides(plan)
    plan.add_argument("--devices", type=_positive(int), metavar="N", help="plan for so many; default: this machine's")
    plan.add_argument("--memory", type=_positive(float), metavar="GIB", help="of each device; default: what it reports")
    plan.add_argument("--peak", type=_positive(float), metavar="TFLOPS", help="of each device, to tell a step's time")
    plan.add_argument(
        "--topology", metavar="TPU", help="compile for a TPU that is not there, such as v5e:2x4 (an extra)"
    )
    plan.add_argument("--sweep", action="store_true", help="plan for TPUs and GPUs of several kinds and numbers")
    plan.add_argument("--json", action="store_true", help=json_help)
    index = command("index", _index, "build the index of a corpus", "ragjax index configs/factbook.yaml")
    train = command(
        "train",
        _train,
        "train, going on from the newest checkpoint in `output`",
        "ragjax train configs/factbook.yaml train.steps=100 output=runs/mine",
    )
    evaluate = command(
        "evaluate",
        _evaluate,
        "measure answers and retrieval, before and after training, going on where the same evaluation was stopped",
        "ragjax evaluate configs/factbook.yaml evaluate.max_questions=20",
    )
    for sub in (index, train, evaluate):
        overrides(sub)
        distributed(sub)
    evaluate.add_argument("--json", action="store_true", help=json_help)
    report = command(
        "index-report",
        _index_report,
        "measure an index: what it misses, its speed and size, and what share of the prior the top k hold",
        "ragjax index-report configs/factbook.yaml --questions 200 --plot report.png",
    )
    overrides(report)
    report.add_argument("--questions", type=_positive(int), default=200, metavar="N", help="of evaluate.split, drawn")
    report.add_argument("--plot", type=Path, metavar="FILE", help="mass and recall over k, as .png or .svg (an extra)")
    report.add_argument("--json", action="store_true", help=json_help)
    answer = command(
        "answer",
        _answer,
        "answer questions, with documents and probabilities; exit code 2 if there was one that cannot be answered",
        'ragjax answer configs/factbook.yaml "What is the capital of France?" --set decode.num_docs=5',
    )
    answer.add_argument("questions", nargs="+", metavar="QUESTION", help="a question; - reads one a line from input")
    answer.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a value")
    answer.add_argument(
        "--mode", choices=("exact", "thorough", "certified", "fast", "closed_book"), help="instead of decode.mode"
    )
    answer.add_argument("--untrained", action="store_true", help="with the pretrained models")
    answer.add_argument("--json", action="store_true", help="print one JSON object a line for programs")
    summary = "split a Hugging Face RAG checkpoint into what ragjax reads, or merge PEFT's adapters into their model"
    importing = command("import", _import, summary, "ragjax import hf:ORG/RAG rag", config=False)
    importing.add_argument("source", metavar="SOURCE", help="a folder or hf:ORG/NAME@REVISION")
    importing.add_argument("--base", metavar="SOURCE", help="the model that adapters belong to")
    summary = "write a run as Hugging Face checkpoints"
    exporting = command("export", _export, summary, "ragjax export runs/factbook exported", config=False)
    exporting.add_argument("source", metavar="RUN", help="the output folder of a run")
    exporting.add_argument("--merge", action="store_true", help="models with adapters as whole models")
    for sub in (importing, exporting):
        sub.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    summary = "compare all files of a run, an index or an exported folder with their checksums"
    verifying = command("verify", _verify, summary, "ragjax verify runs/factbook", config=False)
    verifying.add_argument("folder", metavar="RUN|INDEX|EXPORTED", help="its folder")
    verifying.add_argument("--json", action="store_true", help=json_help)
    summary = "print the resolved configuration; without a CONFIG all keys with their defaults and meanings"
    config = command("config", _config, summary, "ragjax config configs/factbook.yaml", config=False)
    config_argument(config, nargs="?")
    overrides(config)
    config.add_argument("--list", action="store_true", help="list the ready-made configurations, with a line on each")
    config.add_argument("--schema", action="store_true", help="print the JSON Schema of a CONFIG, for editors")
    return parser


def _positive(number: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse: an int or a float above 0."""

    def above_zero(text: str) -> Any:
        if (value := number(text)) <= 0:
            raise ValueError
        return value

    above_zero.__name__ = f"{number.__name__} above 0"
    return above_zero


def ready_made() -> dict[str, Path]:
    """The configurations that come with ragjax, by name: in the package, or beside it in a clone."""
    package = Path(__file__).parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _load(options: argparse.Namespace) -> Config:
    """The configuration that CONFIG names: a file, the folder of a run, or a ready-made one; with its overrides."""
    overrides, path, known = [*getattr(options, "overrides", []), *options.set], Path(options.config), ready_made()
    if path.is_dir() and ((path / "config.yaml").exists() or options.config not in known):
        from ragjax.runs.run_dir import load_run_config

        return load_run_config(path, overrides)
    if not path.is_file():
        if options.config not in known:
            raise InputError(f"{path}: no such configuration file or run; the ready-made ones are {', '.join(known)}")
        path = known[options.config]
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
        plan = memory_plan(config, mesh, planned_chip(mesh, options.peak))
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

    _tell(f"index: {build_index(_load(options))}")
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
    from ragjax.commands.metrics_table import print_metrics
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


def _import(options: argparse.Namespace) -> int:
    from ragjax.commands.hugging_face import import_rag

    _tell(f"imported: {import_rag(options.source, Path(options.out), options.base)}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from ragjax.commands.hugging_face import export_rag

    _tell(f"exported: {export_rag(Path(options.source), Path(options.out), options.merge)}")
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
