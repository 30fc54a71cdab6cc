"""What `--data` says: from which sources text comes, and how many windows of each."""

from __future__ import annotations

from dataclasses import dataclass

from aqlm_cli.errors import DataError
from aqlm_cli.spec.config import DEFAULT_SEQUENCES

SELF = "self"
"""The source that is the model itself: windows sampled from it, which only finetuning asks for."""


@dataclass(frozen=True)
class Source:
    """Where text comes from, and how many windows to cut from it; None: a share of the total."""

    name: str
    windows: int | None


def parse_sources(spec: str) -> tuple[Source, ...]:
    """`c4:96,notes.txt` is 96 windows of c4, and notes.txt without a count; a count follows the last colon."""
    return tuple(_parse_source(part.strip()) for part in spec.split(","))


def _parse_source(part: str) -> Source:
    name, colon, count = part.rpartition(":")
    if not (colon and count.isdecimal()):
        name, count = part, ""
    if not name or (count and int(count) == 0):
        raise DataError(f"text source {part!r} is not understood; write SOURCE or SOURCE:WINDOWS, such as c4:96")
    return Source(name, int(count) if count else None)


def share_sequences(spec: str, sequences: int | None) -> list[tuple[str, int]]:
    """Every source with its number of windows: its own, or an equal share of what the counted ones leave."""
    sources = parse_sources(spec)
    counted = sum(source.windows or 0 for source in sources)
    open_sources = [source for source in sources if source.windows is None]
    if not open_sources:
        if sequences not in (None, counted):
            raise DataError(f"{spec} is {counted} windows, but {sequences} are asked; leave --sequences out")
        return [(source.name, source.windows or 0) for source in sources]
    if sequences is None:
        if counted:
            raise DataError(f"only some sources of {spec} have a count; give each one, or the total with --sequences")
        sequences = DEFAULT_SEQUENCES
    share, extra = divmod(sequences - counted, len(open_sources))
    if share < 1:
        raise DataError(f"{sequences} windows are too few for {spec}; raise --sequences or lower the counts")
    rest = [share + (number < extra) for number in range(len(open_sources))]
    return [(source.name, source.windows or rest.pop(0)) for source in sources]


def sampled_sequences(spec: str | None, sequences: int | None) -> int:
    """How many windows are to be sampled from the model; 0 where `self` is not named."""
    shares = [] if spec is None else share_sequences(spec, sequences)
    return sum(windows for name, windows in shares if name == SELF)
