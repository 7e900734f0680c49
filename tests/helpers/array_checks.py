"""The checks of arrays that jaxtyping's import hook puts around every function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from beartype import beartype

_nested: dict[Any, Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype(function)`; of a nested function it is made once, not each time that `def` is run.

    What jaxtyping hands over has a function's signature alone, and nothing of what it closes over.
    """
    if "<locals>" not in function.__qualname__:
        return beartype(function)
    signature = inspect.signature(function)
    parameters = [(of.name, of.kind, of.annotation, of.default is of.empty) for of in signature.parameters.values()]
    key = (function.__module__, function.__qualname__, signature.return_annotation, *parameters)
    try:
        return _nested[key]
    except KeyError:
        return _nested.setdefault(key, beartype(function))
