"""The arguments of all commands, and their help."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ragjax.terminal import visible

# how shells complete CONFIG: with files, and bash with the ready-made names, too
COMPLETED = {"bash": "_ragjax_configs", "zsh": "_files", "fish": "(__fish_complete_path (commandline -ct))"}


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


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    whole = _Parser(
        prog="ragjax",
        description="RAG-Sequence and RAG-Token in JAX: index a corpus, train end to end, decode, evaluate.",
        epilog="example:\n  ragjax train configs/factbook.yaml train.steps=100 output=runs/mine\n\n"
        "`ragjax COMMAND --help` tells more about each command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"ragjax {importlib.metadata.version('ragjax')}")
    whole.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=COMPLETED,
        help="print what makes a shell complete commands, options and configurations; in bash, put into ~/.bashrc: "
        'eval "$(ragjax --print-completion bash)"',
    )
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, example: str, config: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if config:
            config_argument(sub)
        sub.set_defaults(name="ragjax", together=False)
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
        "tell what a run needs of disk, memory, network and arithmetic, before anything is built",
        "ragjax plan configs/rag_sequence_nq.yaml --devices 8 --memory 16 index.kind=HNSW32 mesh.fsdp=true",
    )
    overrides(plan)
    plan.add_argument("--devices", type=_positive(int), metavar="N", help="plan for so many; default: this machine's")
    memory_help = "of each device, which is an accelerator; default: what it reports"
    plan.add_argument("--memory", type=_positive(float), metavar="GIB", help=memory_help)
    plan.add_argument("--peak", type=_positive(float), metavar="TFLOPS", help="of each device, to tell a step's time")
    plan.add_argument(
        "--topology", metavar="TPU", help="compile for a TPU that is not there, such as v5e:2x4 (an extra)"
    )
    plan.add_argument("--sweep", action="store_true", help="plan for TPUs and GPUs of several kinds and numbers")
    plan.add_argument("--json", action="store_true", help=json_help)
    index = command("index", "build the index of a corpus", "ragjax index configs/factbook.yaml")
    train = command(
        "train",
        "train, going on from the newest checkpoint in `output`",
        "ragjax train configs/factbook.yaml train.steps=100 output=runs/mine",
    )
    evaluate = command(
        "evaluate",
        "measure answers and retrieval, before and after training, going on where the same evaluation was stopped",
        "ragjax evaluate configs/factbook.yaml evaluate.max_questions=20",
    )
    for sub in (index, train, evaluate):
        overrides(sub)
        distributed(sub)
    sweep = command(
        "sweep",
        "index, train and evaluate every combination of values, one after the other, and tell mean, spread and "
        "intervals; goes on where it was stopped",
        "ragjax sweep configs/factbook.yaml train.lora.rank=8,16 seed=1,2,3 output=runs/ranks",
    )
    sweep.add_argument("overrides", nargs="*", metavar="KEY=VALUE,VALUE", help="the values of a key, or its only one")
    sweep.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a value that may have commas")
    sweep.add_argument(
        "--dry-run", action="store_true", help="print a line of commands for each run that is unfinished"
    )
    sweep.add_argument("--launcher", metavar="COMMAND", help="what runs each run instead, such as 'launch/keep.sh tpu'")
    sweep.add_argument("--json", action="store_true", help=json_help)
    index.add_argument(
        "--from",
        dest="source",
        metavar="SOURCE",
        help="take embeddings over instead of computing them: .npy or .npz with ids, Parquet or Arrow with a column of "
        "vectors, a Pyserini folder, a FAISS index",
    )
    index.add_argument(
        "--rebuild", action="store_true", help="train a FAISS kind anew, with the embeddings that are there"
    )
    evaluate.add_argument("--json", action="store_true", help=json_help)
    report = command(
        "index-report",
        "measure an index: what it misses, its speed and size, and what share of the prior the top k hold",
        "ragjax index-report configs/factbook.yaml --questions 200 --plot report.png",
    )
    overrides(report)
    report.add_argument("--questions", type=_positive(int), default=200, metavar="N", help="of evaluate.split, drawn")
    report.add_argument("--plot", type=Path, metavar="FILE", help="mass and recall over k, as .png or .svg (an extra)")
    report.add_argument("--json", action="store_true", help=json_help)
    answer = command(
        "answer",
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
    serve = command(
        "serve",
        "answer questions over HTTP, on a page that shows the four stages and for programs (an extra)",
        "ragjax serve runs/factbook --port 8000",
    )
    serve.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a value")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen; default: %(default)s, this machine alone")
    serve.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0 takes a free one")
    serve.add_argument("--token-file", type=Path, metavar="FILE", help="a bearer token that is asked for")
    serve.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name it is reached by")
    serve.add_argument("--queue", type=_positive(int), metavar="N", help="questions that may wait; default: 64")
    serve.add_argument("--batch", type=_positive(int), metavar="N", help="questions answered together; default: 8")
    serve.add_argument("--deadline", type=_positive(float), metavar="SECONDS", help="of an answer; default: 60")
    warm_up_help = "before it listens, lets batches of every size be compiled, and begins none after this; 0: none"
    serve.add_argument("--warm-up", type=_from_0, default=30.0, metavar="SECONDS", help=f"{warm_up_help}; default: 30")
    serve.add_argument("--log-questions", action="store_true", help="else no question is logged")
    serve.add_argument("--untrained", action="store_true", help="with the pretrained models")
    summary = "split a Hugging Face RAG checkpoint into what ragjax reads, or merge PEFT's adapters into their model"
    importing = command("import", summary, "ragjax import hf:ORG/RAG rag", config=False)
    importing.add_argument("source", metavar="SOURCE", help="a folder or hf:ORG/NAME@REVISION")
    importing.add_argument("--base", metavar="SOURCE", help="the model that adapters belong to")
    summary = "write a run as Hugging Face checkpoints"
    exporting = command("export", summary, "ragjax export runs/factbook exported", config=False)
    exporting.add_argument("source", metavar="RUN", help="the output folder of a run")
    exporting.add_argument("--merge", action="store_true", help="models with adapters as whole models")
    exporting.add_argument("--push", metavar="hf:ORG/NAME", help="upload it to Hugging Face's hub, with a model card")
    for sub in (importing, exporting):
        sub.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    summary = "compare all files of a run, an index or an exported folder with their checksums"
    verifying = command("verify", summary, "ragjax verify runs/factbook", config=False)
    verifying.add_argument("folder", metavar="RUN|INDEX|EXPORTED", help="its folder")
    verifying.add_argument("--json", action="store_true", help=json_help)
    summary = "write a run, or two side by side, as one page: curves, figures, and every answer in its four stages"
    page = command("report", summary, "ragjax report runs/factbook", config=False)
    page.add_argument("folder", type=Path, metavar="RUN", help="the folder of a run that was evaluated")
    page.add_argument("other", type=Path, nargs="?", metavar="RUN2", help="another one, to be compared with it")
    summary = "test whether a run, or several of other seeds, answers better than another: paired differences"
    comparing = command("compare", summary, "ragjax compare runs/full runs/lora", config=False)
    for name, metavar in (("folder", "A"), ("other", "B")):
        about = "the folder of a run that was evaluated, or of several"
        comparing.add_argument(name, type=Path, metavar=metavar, help=about)
    comparing.add_argument("--json", action="store_true", help=json_help)
    page.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the folder of RUN")
    summary = "print the resolved configuration; without a CONFIG all keys with their defaults and meanings"
    config = command("config", summary, "ragjax config configs/factbook.yaml", config=False)
    config_argument(config, nargs="?")
    overrides(config)
    config.add_argument("--list", action="store_true", help="list the ready-made configurations, with a line on each")
    config.add_argument("--schema", action="store_true", help="print the JSON Schema of a CONFIG, for editors")
    return whole


def _positive(number: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse: an int or a finite float above 0."""

    def above_zero(text: str) -> Any:
        if not 0 < (value := number(text)) < math.inf:
            raise ValueError
        return value

    above_zero.__name__ = f"{number.__name__} above 0"
    return above_zero


def _from_0(text: str) -> float:
    """For argparse: a finite float of 0 or more."""
    if not 0 <= (value := float(text)) < math.inf:
        raise ValueError
    return value


_from_0.__name__ = "float of 0 or more"


def ready_made() -> dict[str, Path]:
    """The configurations that come with ragjax, by name: in the package, or beside it in a clone."""
    package = Path(__file__).parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
