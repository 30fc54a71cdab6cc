"""The result of a stage: one frozen record that can be shown in two ways.

`as_json()` is for programs and `table()` for people. No number in a record stands alone: a perplexity carries its data,
sequences and standard error, a speed its spread and the error of what was computed.
"""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from aqlm_cli.formatting import plain


@dataclass(frozen=True)
class Record(abc.ABC):
    """The result of one stage."""

    def as_json(self) -> dict[str, Any]:
        """The fields by name, in JSON types."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @abc.abstractmethod
    def table(self) -> Table | Group:
        """The fields as a table for the console."""
