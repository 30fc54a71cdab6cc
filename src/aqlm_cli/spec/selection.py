"""Selection: which layers are quantized and how, as the settings ask for it, before any model is known.

For one layer, in this order, the first that says something counts:

1. a module that cannot be quantized stays as it is;
2. the rules (`quantize.layers`, `--layer`), the first that matches the whole path;
3. the allocation that a target makes (scores.py), for the layers that it decides about;
4. `quantize.embeddings` and `quantize.head`, for what lies outside the blocks: without them that stays in 16 bits;
5. `skip`, `only`, and the scheme of all other layers.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from aqlm_cli.errors import PlanError, UsageError
from aqlm_cli.spec.treatment import Treatment

HEAD = "lm_head"
"""The name of the output head in most models: to skip it is right for every model."""


MATCHING_SECONDS = 5.0
"""Processor time for the matches of one pattern: some, such as (.*)*x, would take longer than the universe is old."""


@dataclass(frozen=True)
class Rule:
    """The layers whose whole path `match` matches get the treatment; None: they stay in 16 bits."""

    match: str
    treatment: Treatment | None


@dataclass(frozen=True)
class Selection:
    """`default` is the treatment of the layers in the blocks; `skip` and `only` are regular expressions for those."""

    default: Treatment
    skip: Sequence[str] = ()
    only: Sequence[str] = ()
    rules: Sequence[Rule] = ()
    embeddings: Treatment | None = None
    head: Treatment | None = None
    allocated: Mapping[str, Treatment | None] = field(default_factory=dict)  # by path; None: 16 bits

    def of_table(self, path: str) -> Treatment | None:
        """The treatment of a matrix that is embedding and head. PlanError where the two settings differ."""
        if self.embeddings and self.head and self.embeddings != self.head:
            raise PlanError(
                f"{path} is both embedding and head of this model, so --embeddings {self.embeddings} and "
                f"--head {self.head} must be the same; give one of them"
            )
        return self.embeddings or self.head


@dataclass(frozen=True)
class Pattern:
    """A regular expression, and those of the paths it was asked about that it matches as a whole."""

    pattern: str
    matched: frozenset[str]

    def matches(self, path: str) -> bool:
        return path in self.matched


def compiled(pattern: str, paths: Sequence[str], flag: str) -> Pattern:
    """The pattern and its matches among the paths.

    Raises UsageError where it is no regular expression, or takes longer than MATCHING_SECONDS, and PlanError where it
    matches none of the paths: a misspelling.
    """
    try:
        expression = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"--{flag} '{pattern}' is not a regular expression: {error}") from error
    with _within(UsageError(f"--{flag} '{pattern}' takes too long to match; write it without repeats inside repeats")):
        matched = frozenset(path for path in paths if expression.fullmatch(path))
    if not matched:
        tied = " (a tied head goes by the name of the embeddings)" if expression.fullmatch(HEAD) else ""
        raise PlanError(f"--{flag} '{pattern}' matches no layer; it must match a whole path, such as {paths[0]}{tied}")
    return Pattern(pattern, matched)


@contextmanager
def _within(refusal: UsageError) -> Iterator[None]:
    """Raise the refusal after MATCHING_SECONDS of processor time; in the main thread, as no other gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise refusal

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, MATCHING_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
