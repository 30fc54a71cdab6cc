"""Estimates from a sample of sequences: a perplexity and a divergence, each with its standard error.

A perplexity is exp(sum a / sum b): a unit of the text, mostly a sequence, has the loss a and counts b, in tokens, words
or bytes (protocols.py). Its standard error takes the n units for independent: by the delta method exp(r), with
r = sum a / sum b, is uncertain by exp(r) times sqrt(n / (n-1) sum (a - r b)^2) / sum b. Not covered: that neighbouring
sequences of one document are alike. Of two models on the same sequences the same formula holds for the difference of
their losses, which is far more certain than each of them: so the ratio of their perplexities has an error of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_cli.errors import DataError
from aqlm_cli.evaluation.scoring import Scored

EDGES = tuple(10 ** (exponent / 2) for exponent in range(-12, 4))
"""Edges of the histogram of divergences, in nats: half decades."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, or a ratio of two, with the standard error that the spread over the units gives it."""

    perplexity: float
    stderr: float


@dataclass(frozen=True)
class Divergence:
    """KL(base || model) over the scored tokens, in nats: its mean with a standard error, quantiles and maximum.

    `agreement`: the share of tokens for which both models hold the same one for the likeliest. `histogram`: tokens
    below EDGES[0], between each edge and the next, and from the last on.
    """

    mean: float
    stderr: float
    median: float
    percentile_99: float
    maximum: float
    agreement: float
    histogram: tuple[int, ...] = ()


def estimate(losses: Tensor, counts: Tensor) -> Perplexity:
    """exp(sum a / sum b) of losses a `[units]` in nats and counts b `[units]`, with its standard error."""
    units, total = len(losses), counts.sum()
    mean = losses.sum() / total
    spread = (losses - mean * counts).square().sum() * units / (units - 1)
    perplexity = perplexity_of(float(mean))
    return Perplexity(perplexity, perplexity * float(spread.sqrt() / total))


def perplexity_of(loss: float) -> float:
    """exp of a mean loss in nats. Raises DataError where no number is as large: a text may have hardly any words."""
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise DataError(
            f"a mean loss of {loss:.0f} nats is no perplexity that a number holds: the weights are damaged, or the "
            "text has too few words for a protocol that counts them; take one that counts tokens, such as gptq-2048"
        ) from error


def divergence_of(scores: Sequence[Scored]) -> Divergence:
    """The divergence over the tokens of sequences that two models read; its error takes these for independent."""
    parts = [scored.divergence for scored in scores if scored.divergence is not None]
    agreed = torch.cat([scored.agreed for scored in scores if scored.agreed is not None])
    tokens = torch.cat(parts)
    sums = torch.stack([part.sum() for part in parts])
    counts = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    mean = sums.sum() / counts.sum()
    spread = (sums - mean * counts).square().sum() * len(parts) / (len(parts) - 1)
    ordered = tokens.sort().values
    return Divergence(
        mean=float(mean),
        stderr=float(spread.sqrt() / counts.sum()),
        median=float(ordered[(len(ordered) - 1) // 2]),
        percentile_99=float(ordered[math.ceil(0.99 * len(ordered)) - 1]),
        maximum=float(ordered[-1]),
        agreement=float(agreed.double().mean()),
        histogram=tuple(
            torch.bucketize(tokens, torch.tensor(EDGES, dtype=tokens.dtype), right=True)
            .bincount(minlength=len(EDGES) + 1)
            .tolist()
        ),
    )
