"""Sensitivities: the divergence of a whole model from the errors of its layers, learnt from a few whole models.

A mix is the base model with some matrices replaced. Its load in a group of layers, those of one name in a third of the
depth, is the sum of their sensitivities, by gradients, times their relative errors. The divergence of a mix is taken as

    KL = (sum over groups g of factor_g load_g) ^ (1 / power)        factor_g >= 0

Small effects add up, and the power is 1; where the whole is more than its parts, as at 2 bits, it is less. The factors
solve a least-squares problem in the relative error of KL^power that draws them towards one common factor: with fewer
mixes than groups the gradients decide what the mixes leave open. Power and draw are those that foretell a mix best that
was left out of the fit. Whole models are measured near the target, and not layers one by one, since that is where the
effects have to be known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aqlm_cli.spec.scores import Effects

POWERS = (1.5, 1.25, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
DRAWS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Weights of the squared relative distance to the common factor, beside the squared relative error of each mix."""

CONTRAST = 2.0
"""Factor by which a mix takes a group for more, or for less, sensitive than it is expected to be."""


def fit_effects(mixes: Sequence[Mapping[str, float]], divergences: Sequence[float]) -> Effects:
    """The effects from the loads of at least one mix, by group, and its divergence in nats a token.

    A mix without a load or a divergence tells nothing and is left out; without any left, every factor is 1.
    """
    groups = sorted({group for loads in mixes for group in loads})
    telling = [(loads, kl) for loads, kl in zip(mixes, divergences, strict=True) if kl > 0 and any(loads.values())]
    if not telling:
        return Effects(dict.fromkeys(groups, 1.0), 1.0, math.nan)
    loads = torch.tensor([[one.get(group, 0.0) for group in groups] for one, _ in telling], dtype=torch.float64)
    measured = torch.tensor([kl for _, kl in telling], dtype=torch.float64)
    settings = [(power, draw) for power in POWERS for draw in DRAWS]
    if len(telling) < 3:  # too few to leave one out
        power, draw, error = 1.0, 1.0, math.nan
    else:
        error, (power, draw) = min((_left_out_error(loads, measured, *one), one) for one in settings)
    factors = _factors(loads, measured**power, draw)
    return Effects({group: float(factor) for group, factor in zip(groups, factors, strict=True)}, power, error)


def _left_out_error(loads: Tensor, measured: Tensor, power: float, draw: float) -> float:
    """Mean relative error of the divergence of each mix, foretold by all others."""
    errors = []
    for left_out in range(len(measured)):
        others = torch.arange(len(measured)) != left_out
        factors = _factors(loads[others], measured[others] ** power, draw)
        foretold = (loads[left_out] @ factors).clamp_min(0) ** (1 / power)
        errors.append(float((foretold / measured[left_out] - 1).abs()))
    return sum(errors) / len(errors)


def _factors(loads: Tensor, sums: Tensor, draw: float) -> Tensor:
    """Factors `[groups]` for loads `[mixes, groups]` and KL^power `[mixes]`."""
    relative = loads / sums[:, None]
    whole = relative.sum(1)
    common = whole.sum() / whole.square().sum()  # the best single factor
    pull = math.sqrt(draw) * torch.eye(loads.shape[1], dtype=loads.dtype)
    matrix = torch.cat([relative * common, pull])
    wanted = torch.cat([torch.ones_like(sums), pull.diagonal()])
    return common * nonnegative_least_squares(matrix, wanted)


def nonnegative_least_squares(matrix: Tensor, wanted: Tensor) -> Tensor:
    """The x >= 0 `[n]` that minimises |A x - b|^2 for A `[m, n]` of full rank and b `[m]` (Lawson and Hanson, 1974)."""
    gram, image = matrix.T @ matrix, matrix.T @ wanted
    x = torch.zeros_like(image)
    free = torch.zeros(len(x), dtype=torch.bool)
    tolerance = 1e-12 * float(image.abs().max())
    for _ in range(3 * len(x)):
        gradient = (image - gram @ x).masked_fill(free, -math.inf)
        if bool(free.all()) or float(gradient.max()) <= tolerance:
            break
        free[gradient.argmax()] = True
        while True:
            target = torch.zeros_like(x)
            target[free] = torch.linalg.solve(gram[free][:, free], image[free])
            leaving = free & (target <= 0)
            if not bool(leaving.any()):
                x = target
                break
            step = (x / (x - target))[leaving].min()
            x = x + step * (target - x)
            free &= x > tolerance
            x = x.masked_fill(~free, 0)
            if not bool(free.any()):
                break
    return x


def contrasts(groups: Sequence[str], mixes: int, rng: torch.Generator) -> list[dict[str, float]]:
    """Factors by which each mix changes the sensitivity that it expects of each group, by draws of its own.

    The first mix expects what the gradients say. Of any other, half of the groups are taken for more sensitive, half
    for less: solved for the same target, such mixes lie near it and differ in where their bits are.
    """
    signs = torch.arange(len(groups)) % 2 * 2 - 1
    drawn = [signs[torch.randperm(len(groups), generator=rng)].tolist() for _ in range(mixes - 1)]
    return [
        {group: CONTRAST**sign for group, sign in zip(groups, row, strict=True)} for row in [[0] * len(groups), *drawn]
    ]
