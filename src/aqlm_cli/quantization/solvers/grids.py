"""Uniform grids fitted to a metric: steps by search and least squares, levels with error feedback.

Round to nearest spends a grid on the extremes of its group and looks at no other weight. Here, with H the metric of a
row's error and D_i the price of input i in its LDL (hessian.py),

- the grid of a group is shrunk from its extremes to the size of the least sum_i D_i (w_i - v_i)^2;
- levels are chosen column by column with error feedback (GPTQ, arXiv 2210.17323), the most active inputs first; the
  grids are fixed before, so that an order needs no permutation to be stored;
- coordinate descent chooses each level again, and the scales solve their least squares, in turn.

Shapes: `[rows, in]`, n = in/g groups. A row's result depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aqlm_cli.quantization.solvers.hessian import Feedback, block_ldl, damped
from aqlm_cli.quantization.solvers.ldlq import Rounder, sweep

SHRINKS = tuple(1 - 0.02 * step for step in range(25))
"""Sizes of a grid that are tried, as shares of the group's range."""

WHOLE = (1.0,)
"""The size of a grid from the least to the largest weight of its group."""

LARGEST = torch.finfo(torch.float16).max

ROUNDS = 4
"""Rounds of scales and levels in turn."""


@dataclass(frozen=True, eq=False)
class ColumnSweeps:
    """The damped metric in the forms that the choice of levels needs; they serve any number of rows."""

    metric: Tensor  # [in, in]
    order: Tensor  # [in]: inputs as the feedback takes them
    ahead: Feedback  # of the LDL, in that order
    around: Feedback  # of coordinate descent

    @classmethod
    def of(cls, second_moment: Tensor, damping: float, factor_damping: float) -> ColumnSweeps:
        metric = damped(second_moment, damping)
        order = metric.diagonal().argsort(descending=True, stable=True)
        ahead = block_ldl(metric[order][:, order], 1, factor_damping)
        around = Feedback(metric.diagonal()[:, None, None].clone(), metric, forward=False)
        return cls(metric, order, ahead, around)

    @property
    def prices(self) -> Tensor:
        """D `[in]`."""
        return self.ahead.metric[self.order.argsort()].flatten()


@dataclass(frozen=True, eq=False)
class Grids:
    """W[o, j*g + i] = steps[o, j] * (levels[o, j*g + i] - zeros[o, j]); all float32."""

    steps: Tensor  # [rows, n], above 0
    zeros: Tensor  # [rows, n], integers
    levels: Tensor  # [rows, in], integers in [0, top]

    @property
    def centred(self) -> Tensor:
        """Levels less zeros, `[rows, n, g]`."""
        return self.levels.view(*self.steps.shape, -1) - self.zeros[..., None]

    def dequantize(self) -> Tensor:
        return (self.steps[..., None] * self.centred).flatten(1)


def fit(weight: Tensor, bits: int, group: int, sweeps: ColumnSweeps, exponent: Tensor) -> Grids:
    """Grids and levels for W `[rows, in]`; steps are float16 numbers times 2^exponent."""
    top = 2**bits - 1
    groups = weight.view(len(weight), -1, group)
    steps, zeros = shrunk(groups, top, exponent, SHRINKS, sweeps.prices.view(-1, group))
    present = Grids(divisor(steps), zeros, _nearest(groups, divisor(steps), zeros, top).flatten(1))
    present = _ahead(weight, present, sweeps, top)
    present = _around(weight, present, sweeps, top)
    for _ in range(ROUNDS):
        present = _scaled(weight, present, sweeps.metric, exponent)
        present = _around(weight, present, sweeps, top)
    return present


def extremes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of each group `[rows, n, g]`, and zero, which stays exact: `[rows, n]` both."""
    return groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)


def shrunk(
    groups: Tensor,
    top: int,
    exponent: Tensor,
    shares: Sequence[float],
    prices: Tensor | None = None,
    power: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Steps and zeros `[rows, n]` of the grids of least sum_i prices_i |w_i - v_i|^power, of these shares of the range.

    `groups` are `[rows, n, g]`, `prices` `[n, g]`, all 1 where None. Steps are float16 numbers times 2^exponent, and 0
    where these are too small. Errors are in units of a power of two near the range, or they might leave float32.
    """
    low, high = extremes(groups)
    unit = -(high - low).frexp().exponent.clamp(-126, 126)
    ordinary = torch.ldexp(groups, unit[..., None])
    least = torch.full_like(low, torch.inf)
    steps, zeros = torch.zeros_like(low), torch.zeros_like(low)
    for share in shares:
        step = _storable(share * (high - low) / top, exponent)
        zero = (-share * low / divisor(step)).round().clamp_(0, top)
        error = _nearest(groups, divisor(step), zero, top).sub_(zero[..., None])
        error = error.mul_(torch.ldexp(step, unit)[..., None]).sub_(ordinary).abs_().pow_(power)
        error = (error if prices is None else error.mul_(prices)).sum(2)
        better = error < least
        least = torch.where(better, error, least)
        steps, zeros = torch.where(better, step, steps), torch.where(better, zero, zeros)
    return steps, zeros


def _storable(steps: Tensor, exponent: Tensor) -> Tensor:
    """Rounded to what float16 holds, at most its largest number."""
    return torch.ldexp(torch.ldexp(steps, -exponent).clamp_max(LARGEST).half().float(), exponent)


def divisor(steps: Tensor) -> Tensor:
    """The steps, and 1 where there is none, as such a group is zero."""
    return torch.where(steps > 0, steps, 1.0)


def _nearest(groups: Tensor, steps: Tensor, zeros: Tensor, top: int) -> Tensor:
    return (groups / steps[..., None]).add_(zeros[..., None]).round_().clamp_(0, top)


def _ahead(weight: Tensor, present: Grids, sweeps: ColumnSweeps, top: int) -> Grids:
    """Levels from scratch, errors fed to later columns."""
    base = weight[:, sweeps.order]
    levels = torch.empty_like(base)
    sweep(torch.zeros_like(base), base, sweeps.ahead, _rounder(levels, present, sweeps.order, top))
    return replace(present, levels=levels[:, sweeps.order.argsort()])


def _around(weight: Tensor, present: Grids, sweeps: ColumnSweeps, top: int) -> Grids:
    """One sweep of coordinate descent; it never raises the error."""
    base = present.dequantize()
    levels = present.levels.clone()
    everything = torch.arange(weight.shape[1], device=weight.device)
    sweep((weight - base) @ sweeps.metric, base, sweeps.around, _rounder(levels, present, everything, top))
    return replace(present, levels=levels)


def _rounder(levels: Tensor, grids: Grids, columns: Tensor, top: int) -> Rounder:
    """Rounds column `columns[j]` to the grid of its group, and keeps the levels in column j of `levels`."""
    group = levels.shape[1] // grids.steps.shape[1]
    places = (columns // group).tolist()

    def round_column(j: int, metric: Tensor, targets: Tensor) -> Tensor:
        step, zero = grids.steps[:, places[j]], grids.zeros[:, places[j]]
        level = (targets[:, 0] / (metric[0, 0] * step)).add_(zero).round_().clamp_(0, top)
        levels[:, j] = level
        return (step * (level - zero))[:, None]

    return round_column


def _scaled(weight: Tensor, present: Grids, metric: Tensor, exponent: Tensor) -> Grids:
    """Steps by least squares in H, one group of all rows after the other; kept where a step would not be positive."""
    centred, steps = present.centred, present.steps.clone()
    group = centred.shape[2]
    pull = (weight - present.dequantize()) @ metric  # [rows, in]: minus half the gradient by W^
    for j in range(steps.shape[1]):
        inside = slice(j * group, (j + 1) * group)
        q = centred[:, j]  # [rows, g]
        image = q @ metric[inside]  # [rows, in]
        bottom = (image[:, inside] * q).sum(1)
        step = steps[:, j] + (pull[:, inside] * q).sum(1) / bottom.clamp_min(1e-30)
        step = torch.where((bottom > 0) & (step > 0), divisor(_storable(step, exponent)), steps[:, j])
        pull -= (step - steps[:, j])[:, None] * image
        steps[:, j] = step
    return replace(present, steps=steps)
