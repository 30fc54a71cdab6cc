"""Check of values from Python against their annotations.

A command line gives text, and the run file checks its values; Python gives any object.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from aqlm_cli.errors import UsageError, shortened

P = ParamSpec("P")
Result = TypeVar("Result")


def checked(function: Callable[P, Result]) -> Callable[P, Result]:
    """Return the function with a check: an argument that is not what its annotation says is a UsageError.

    Arguments reach the function as they are. A missing or unknown keyword stays Python's TypeError.
    """
    signature = inspect.signature(function)
    written = {name: kind for name, kind in inspect.get_annotations(function).items() if name != "return"}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        given = signature.bind(*args, **kwargs).arguments
        _refuse_other_types(function.__name__, given, written, function.__globals__)
        return function(*args, **kwargs)

    return call


def check_fields(record: Any) -> None:
    """Raise UsageError where a field of a dataclass is not what its annotation says; for `__post_init__`."""
    given = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    module = vars(inspect.getmodule(type(record)))
    _refuse_other_types(type(record).__name__, given, inspect.get_annotations(type(record)), module)


def _refuse_other_types(
    owner: str, given: Mapping[str, object], written: Mapping[str, Any], names: dict[str, Any]
) -> None:
    types = get_type_hints(SimpleNamespace(__annotations__=dict(written)), names)
    for name, value in given.items():
        if name in types and not _is(value, types[name]):
            raise UsageError(f"{owner}: `{name}` takes {written[name]}, not {shortened(repr(value))}")


def _is(value: object, kind: Any) -> bool:
    if isinstance(value, str | Path) and "\0" in str(value):  # no path, and no name of anything
        return False
    if isinstance(kind, type) and kind not in (int, float):  # True is an int for isinstance
        return isinstance(value, kind)
    try:
        adapter = TypeAdapter[Any](kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True
