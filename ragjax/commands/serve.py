"""`ragjax serve`: a run answers questions over HTTP, on a page and for programs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ragjax.config import Config
from ragjax.data.questions import read_split
from ragjax.errors import InputError
from ragjax.terminal import terminal

NEEDED = ("prometheus_client", "starlette", "uvicorn")
EXAMPLES = 8
WARM = 64  # questions to warm up with: of all lengths
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says of a server; None where the default of `serving.settings.Limits` holds."""

    host: str = "127.0.0.1"
    port: int = 8000
    token_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    waiting: int | None = None
    batch: int | None = None
    deadline_s: float | None = None
    warm_up_s: float = 30.0  # 0 leaves it out
    log_questions: bool = False
    untrained: bool = False


def serve(config: Config, options: ServeOptions) -> None:
    """Serves until it is stopped. Raises `InputError` for bad input, before models are opened where that can be."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise InputError(f"ragjax serve needs an extra ({', '.join(missing)}): pip install 'ragjax[serve]'")
    from ragjax.answerer import open_answerer
    from ragjax.serving.app import Server, Serving
    from ragjax.serving.server import bind, run_server
    from ragjax.serving.settings import Limits

    token = None if options.token_file is None else read_token(options.token_file)
    given = {"waiting": options.waiting, "batch": options.batch, "deadline_s": options.deadline_s}
    limits = Limits(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    hosts = allowed_hosts(options)
    with bind(options.host, options.port) as listening:
        if options.host not in LOOPBACK and token is None:
            terminal.print(f"{options.host}: others can ask, and there is no token; --token-file sets one")
        together = config.evaluate.replace(batch_size=limits.batch)  # for which there must be room
        answerer = open_answerer(config.replace(evaluate=together), options.untrained)
        name = Path(config.output).name
        serving = Serving(answerer, name, limits, token, hosts, examples(config), options.log_questions)
        server = Server(serving)
        server.warm_up(examples(config, WARM), options.warm_up_s)
        run_server(server, listening)


def allowed_hosts(options: ServeOptions) -> tuple[str, ...]:
    """Names by which the server may be asked for.

    On this machine alone a name of its own is needed: a page from elsewhere whose name now points here is refused.
    """
    for name in options.allowed_hosts:
        if "*" in name[1:] or (name.startswith("*") and name != "*" and not name.startswith("*.")):
            raise InputError(f"--allow-host {name}: expected a name, *.NAME for all below it, or * for any")
    if options.host in LOOPBACK:
        return (*LOOPBACK, *options.allowed_hosts)
    return options.allowed_hosts or ("*",)


def read_token(path: Path) -> str:
    """The one line of a file. Raises `InputError` where it is missing, or short enough to be guessed."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a token ({getattr(error, 'strerror', None) or error})") from None
    if len(token) < 16 or not token.isprintable() or " " in token:
        raise InputError(f"{path}: expected one word of 16 or more characters, such as `openssl rand -hex 32` prints")
    return token


def examples(config: Config, most: int = EXAMPLES) -> list[str]:
    """Some questions from all over the test split, such as to click on; none where it has gone."""
    try:
        questions = read_split(config.questions.test, config.questions).questions
    except InputError:
        return []
    step = max(1, len(questions) // most)
    return [question.question for question in questions[::step][:most]]
