"""The one exception that a user is meant to see."""

from __future__ import annotations


class InputError(Exception):
    """Something the user gave us is wrong; the message says what and how to mend it (exit code 2)."""
