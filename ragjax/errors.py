"""The one exception that a user is meant to see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Something the user gave us is wrong; the message says what and how to mend it (exit code 2)."""


@contextmanager
def library_errors(what: str, cure: str) -> Iterator[None]:
    """Turns whatever a library raises over a file into `InputError`, "WHAT (its reason); CURE".

    Libraries in Rust raise bare Exceptions, and panic, which is no Exception in Python.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{what} ({reason}); {cure}") from None
