"""Repetition in a text, and where two texts part, by token ids."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3
LARGEST_PERIOD = 32


def distinct_share(ids: Sequence[int], n: int = NGRAM) -> float:
    """The share of n-grams that are not among those before them; 1 for a text without any."""
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_loop(ids: Sequence[int], largest: int = LARGEST_PERIOD) -> int:
    """The most tokens in a row of which each is that `period` before it, for a period of at most `largest`.

    A repetition counts from its second round, and only where that is complete.
    """
    best = 0
    for period in range(1, min(largest, len(ids) // 2) + 1):
        run = 0
        for place in range(period, len(ids)):
            run = run + 1 if ids[place] == ids[place - period] else 0
            if run >= period:
                best = max(best, run)
    return best


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first difference."""
    for number, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return number
    return min(len(one), len(other))
