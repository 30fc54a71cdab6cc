"""The base of every section of a run file, and the types of its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from aqlm_cli.errors import UsageError

LARGEST = 10**9
"""More than any count of this program can be, and small enough for sums and products of counts to fit where they go."""

Positive: TypeAlias = Annotated[int, Field(ge=1, le=LARGEST)]
Count: TypeAlias = Annotated[int, Field(ge=0)]
Beam: TypeAlias = Literal[2, 4, 8, 16, 32, 64, 128, 256]
# Not strict, as YAML 1.1 reads 1e-4 (without a dot) as a string; pydantic makes a number of it.
Rate: TypeAlias = Annotated[float, Field(strict=False, gt=0, allow_inf_nan=False)]
# Not strict, as YAML has lists and a frozen record has tuples.
Distance: TypeAlias = Annotated[float, Field(strict=False, ge=0, allow_inf_nan=False)]
Names: TypeAlias = Annotated[tuple[str, ...], Field(strict=False)]


class Section(BaseModel):
    """A frozen record of settings that takes no other keys than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """The sections inside it, by key."""
        types = {name: field.annotation for name, field in cls.model_fields.items()}
        return {name: kind for name, kind in types.items() if isinstance(kind, type) and issubclass(kind, Section)}


def understood(parse: Callable[[str], object], text: str) -> str:
    """`text` as it is, if it can be parsed; pydantic wants a ValueError where not."""
    try:
        parse(text)
    except UsageError as error:
        raise ValueError(str(error)) from error
    return text
