"""A tokenizer's chat template, rendered where it can do no harm: by render_chat.py in a child process, and kept."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ragjax.errors import InputError
from ragjax.files import cache_folder, parse_json

RENDERER = Path(__file__).with_name("render_chat.py")
CPU_SECONDS, MEMORY = 5, 512 << 20  # of the child, bytes; a usual template takes 0.1 s and 40 MiB
PATIENCE = 60  # seconds by the clock, on a machine that is busy or has no limit of processor time


def render_chat_template(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a chat template makes of `variables`, which are JSON.

    Raises `InputError` for a template that fails, does not end, or takes too much memory.
    """
    request = {"template": template, "variables": dict(variables), "jinja2": importlib.metadata.version("jinja2")}
    content = json.dumps(request, sort_keys=True).encode() + RENDERER.read_bytes()
    kept = cache_folder() / "chat" / f"{hashlib.sha256(content).hexdigest()}.json"
    with suppress(OSError, InputError):
        if isinstance(text := parse_json(kept.read_bytes(), kept), str):
            return text
    text = _render(template, dict(variables))
    with suppress(OSError):  # a cache that cannot be written is none
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".partial", delete=False) as file:
            file.write(json.dumps(text).encode())
        os.replace(file.name, kept)
    return text


def _render(template: str, variables: Mapping[str, Any]) -> str:
    """By a child that imports Jinja and nothing else: without this environment, and without site-packages' hooks."""
    paths = [
        str(Path(str(spec.origin)).parents[1])
        for name in ("jinja2", "markupsafe")
        if (spec := importlib.util.find_spec(name))
    ]
    limits = {"paths": paths, "seconds": CPU_SECONDS, "memory": MEMORY}
    request = json.dumps({**limits, "template": template, "variables": variables}).encode()
    command = [sys.executable, "-I", "-S", str(RENDERER)]
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise InputError(f"it did not end within {PATIENCE} s") from None
    except OSError as error:
        raise InputError(f"{sys.executable} cannot be started ({error.strerror or error})") from None
    if done.returncode or not done.stdout:  # killed by a limit, or out of memory before anything could be said
        raise InputError(f"it took more than {CPU_SECONDS} s or {MEMORY >> 20} MiB of memory")
    answer = parse_json(done.stdout, "its renderer's answer")
    if "text" not in answer:
        raise InputError(answer["error"])
    return answer["text"]
