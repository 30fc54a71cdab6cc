"""Registration with libraries that this package must not import: as soon as somebody else imports them.

`import transformers` takes seconds, and most commands of the program do without it. So the modules that need a library
to register with are imported once that library has been, in whatever order the two come.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def import_after(library: str, module: str) -> None:
    """Import `module` once `library`, a module too, has been imported; now if it has been already."""
    if library in sys.modules:
        importlib.import_module(module)
    else:
        sys.meta_path.insert(0, _After(library, module))


class _After:
    """A finder that finds nothing itself: it adds a step to the import of `library`."""

    def __init__(self, library: str, module: str) -> None:
        self._library, self._module = library, module
        self._asking = False  # the other finders

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._library or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = partial(self._import, loader.exec_module)
        return spec

    def _import(self, execute: Callable[[ModuleType], None], library: ModuleType) -> None:
        execute(library)
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        importlib.import_module(self._module)
