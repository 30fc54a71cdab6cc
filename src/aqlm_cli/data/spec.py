"""The grammar of `--data`: text sources, and the number of sequences from each."""

from __future__ import annotations

from dataclasses import dataclass

from aqlm_cli.errors import DataError
from aqlm_cli.spec.config import DEFAULT_SEQUENCES
from aqlm_cli.spec.section import LARGEST

SELF = "self"
"""Name of the source that is the model itself: sequences sampled from it, for finetuning only."""


@dataclass(frozen=True)
class Source:
    """A text source, and the number of sequences to cut from it; None: a share of the total."""

    name: str
    sequences: int | None


def parse_sources(spec: str) -> tuple[Source, ...]:
    """`c4:96,notes.txt`: 96 sequences of c4, and notes.txt without a count; a count follows the last colon."""
    return tuple(_parse_source(part.strip()) for part in spec.split(","))


def _parse_source(part: str) -> Source:
    name, colon, count = part.rpartition(":")
    if not (colon and count.isdecimal()):
        name, count = part, ""
    if not name or (count and not (len(count) <= 10 and 1 <= int(count) <= LARGEST)):
        raise DataError(f"invalid text source {part!r}; write SOURCE or SOURCE:SEQUENCES, such as c4:96")
    return Source(name, int(count) if count else None)


def share_sequences(spec: str, sequences: int | None) -> list[tuple[str, int]]:
    """Every source with its number of sequences: its own, or an equal share of the rest of the total."""
    sources = parse_sources(spec)
    counted = sum(source.sequences or 0 for source in sources)
    open_sources = [source for source in sources if source.sequences is None]
    if not open_sources:
        if sequences not in (None, counted):
            raise DataError(f"{spec} has {counted} sequences, but --sequences is {sequences}; leave --sequences out")
        return [(source.name, source.sequences or 0) for source in sources]
    if sequences is None:
        if counted:
            raise DataError(f"only some sources of {spec} have a count; give each one, or the total with --sequences")
        sequences = DEFAULT_SEQUENCES
    share, extra = divmod(sequences - counted, len(open_sources))
    if share < 1:
        raise DataError(f"{sequences} sequences are too few for {spec}; raise --sequences or lower the counts")
    rest = [share + (number < extra) for number in range(len(open_sources))]
    return [(source.name, source.sequences or rest.pop(0)) for source in sources]


def sampled_sequences(spec: str | None, sequences: int | None) -> int:
    """Number of sequences to sample from the model; 0 if `self` is not named."""
    shares = [] if spec is None else share_sequences(spec, sequences)
    return sum(count for name, count in shares if name == SELF)
