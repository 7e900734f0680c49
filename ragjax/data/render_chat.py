"""Renders one chat template, in a process of its own: run by its path, with a request on standard input.

A template comes from the net and may loop for ever or fill the memory; Jinja's sandbox bounds neither. So this file
imports nothing of ragjax, starts in a fraction of a second, and limits itself where the system can.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from typing import Any

LONGEST = 1 << 20  # characters of a rendered prompt


def limit(seconds: int, size: int) -> None:
    """At most so much processor time and so many bytes of memory, where the system has such limits."""
    try:
        import resource
    except ImportError:  # Windows: the caller's clock alone
        return
    for kind, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, size), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # a lower one is set, or macOS does not know it
            resource.setrlimit(kind, (most, most))


def render(template: str, variables: dict[str, Any]) -> str:
    """What the template makes of its variables, in Jinja's sandbox, as transformers sets it up."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(reason: str) -> None:
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    # A prompt must not change from day to day: the date is the one that Llama 3's templates fall back on.
    environment.globals["strftime_now"] = datetime.date(2024, 7, 26).strftime
    pieces, size = [], 0
    for piece in environment.from_string(template).generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > LONGEST:
            raise ValueError(f"more than {LONGEST} characters")
    text = "".join(pieces)
    text.encode()  # half of a surrogate pair is no text
    return text


def main() -> None:
    """Reads {"paths", "seconds", "memory", "template", "variables"}; writes {"text"} or {"error"}."""
    request = json.loads(sys.stdin.buffer.read())
    sys.path += request["paths"]
    limit(request["seconds"], request["memory"])
    try:
        answer = {"text": render(request["template"], request["variables"])}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except Exception as error:  # templates fail in many ways
        answer = {"error": " ".join(f"{error}".split())[:300] or type(error).__name__}
    sys.stdout.buffer.write(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
