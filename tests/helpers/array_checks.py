"""The checks that jaxtyping's import hook puts around every function that takes or returns an array.

mypy sees to all others, as to the modules that have no arrays: to look at each of their calls as well, and to put the
check around a nested function each time that its `def` is run, would take a tenth of all the time.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import CodeType
from typing import Any

import jaxtyping
from beartype import beartype

_nested: dict[Any, Callable[..., Any]] = {}
_of_arrays: dict[CodeType, bool] = {}
_jaxtyped = jaxtyping.jaxtyped


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


def names_array(function: Callable[..., Any]) -> bool:
    """Whether an annotation is of arrays, or has a name that its module gives to such a type."""
    found = _of_arrays.get(function.__code__)
    if found is None:
        names = set(re.findall(r"\w+", " ".join(map(str, function.__annotations__.values()))))
        types = [str(function.__globals__.get(name, "")) for name in names]
        found = any("Array" in text or "ndarray" in text for text in (*names, *types))
        _of_arrays[function.__code__] = found
    return found


def jaxtyped(*given: Any, **told: Any) -> Any:
    """jaxtyping's own, which its hook puts around all; classes are as they were."""
    if given:
        return _jaxtyped(*given, **told)

    def decorate(of: Any) -> Any:
        function = getattr(of, "__func__", None) or getattr(of, "fget", None) or of
        return _jaxtyped(of, **told) if inspect.isclass(of) or names_array(function) else of

    return decorate


jaxtyping.jaxtyped = jaxtyped
