"""The vectors in a FAISS index, where it holds them as they were: flat ones, alone or in clusters or a graph."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from ragjax.errors import InputError

READER = Path(__file__).with_name("read_faiss.py")
CURE = "write it again with faiss.write_index"


class FaissVectors:
    """What `reconstruct` gives of an index, whose file is read by a process of its own, since damage may end that.

    Raises `InputError` for a file that is damaged, or keeps its vectors compressed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        command = [sys.executable, "-I", str(READER), json.dumps(sys.path), str(path)]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        try:  # in a session of its own Ctrl-C does not reach it
            self._process = subprocess.Popen(command, **pipes, stderr=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            raise InputError(f"{sys.executable} cannot be started ({error.strerror or error})") from None
        weakref.finalize(self, _end, self._process)
        about, numbers = self._answer()
        if (kind := about.get("compressed")) is not None:
            raise InputError(
                f"{path}: keeps its vectors compressed ({kind}), and they do not come out as they went in; give those "
                "that it was built from, as .npy, or a flat index"
            )
        self.count, self.width, self.dtype = about["count"], about["width"], about["dtype"]
        self._numbers = np.frombuffer(numbers, np.int64) if numbers else None
        if not self.count:
            raise InputError(f"{path}: holds no vectors")

    def read(self, rows: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n D"]:
        """Some rows, in any order, not to be written to."""
        _, vectors = self._answer(np.array([len(rows), *rows], np.int64).tobytes())
        return np.frombuffer(vectors, np.float32).reshape(len(rows), self.width)

    def ids(self) -> Iterator[str] | None:
        """The numbers that the index has for its vectors; None where these are their places."""
        return None if self._numbers is None else map(str, self._numbers.tolist())

    def _answer(self, request: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """What the process says, and the bytes that follow. Raises `InputError` where it cannot, or is no more."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        try:
            requests.write(request)
            requests.flush()
        except BrokenPipeError:
            pass  # what it says, or does not say, tells why
        line = answers.readline()
        about = json.loads(line) if line.endswith(b"\n") else {}
        if "bytes" in about and len(data := answers.read(about["bytes"])) == about["bytes"]:
            return about, data
        code = self._process.wait()
        ended = f"the process that reads it ended, by {signal.strsignal(-code) if code < 0 else code}"
        why = " ".join(about.get("error", ended).split())[:200]
        raise InputError(f"{self._path}: FAISS cannot read it ({why}); {CURE}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()
