"""One pass over the groups of inputs, each rounded while the errors of the others are taken into account.

LDLQ (the vector form of GPTQ) and coordinate descent are the same loop. A state S `[out, in]` says how far the errors
made elsewhere pull at every weight; group j is then rounded to the v that minimises

    v^T D_j v - 2 t.v      with  t = S_j + D_j base_j,

and its error e = base_j - v is spread: S += e (rows j of the coupling).

- LDLQ: base is the weight, S starts at zero, D and the coupling come from the block LDL, which reaches later groups
  only.
- Coordinate descent: base is the present approximation, S = (W - base) H, D_j = H_jj, and the coupling is H itself. S
  stays (W - present) H throughout, so the objective never rises.

How a group is rounded is an argument: the loop serves any method. `sweep_columns` is LDLQ in groups of one input, which
is GPTQ (arXiv 2210.17323): its rounder sees values instead of targets, and those of a span of columns in advance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from aqlm_cli.quantization.solvers.hessian import Feedback

Rounder: TypeAlias = Callable[[int, Tensor, Tensor], Tensor]
"""(group j, metric `[g, g]`, targets t `[out, g]`) -> values v `[out, g]`."""

LAZY_COLUMNS = 128
"""Within so many columns errors are spread at once, to all others by one product when these are done, as in GPTQ."""


class ColumnRounder(Protocol):
    """Rounds one column after the other, and prepares for `span` of them together."""

    @property
    def span(self) -> int:
        """Columns whose values it sees before it rounds the first of them; they divide the matrix evenly."""

    def enter(self, first: int, values: Tensor) -> None:
        """Prepare for the columns from `first` on: `[out, span]`, the values that would leave no error."""

    def column(self, i: int, values: Tensor) -> Tensor:
        """Round column i to the values that are stored: `[out]` of the least error to `[out]` of a grid."""


def sweep(state: Tensor, base: Tensor, feedback: Feedback, round_group: Rounder) -> tuple[Tensor, Tensor]:
    """The rounded matrix and the state after it, both `[out, in]`.

    A forward feedback does not keep up the state of columns that are rounded.
    """
    group = feedback.metric.shape[1]

    def choose(first: int, pulls: Tensor) -> Tensor:
        j, metric = first // group, feedback.metric[first // group]
        return round_group(j, metric, torch.addmm(pulls[:, :group], base[:, first : first + group], metric))

    return _sweep(state, base, feedback, group, choose)


def sweep_columns(base: Tensor, feedback: Feedback, rounder: ColumnRounder) -> Tensor:
    """The rounded matrix `[out, in]` of LDLQ in groups of one.

    A column aims at u_i = W_i + S_i / D_i, which is W_i to the bit where no error pulls at it. The values of a span G
    are those that all of its columns have if none of them is rounded: (u - W) (D_GG + C_GG) = S_G, with C the coupling.
    """
    prices, span = feedback.metric.flatten(), rounder.span  # [in]

    def choose(i: int, pulls: Tensor) -> Tensor:
        if i % span == 0:
            ahead = slice(i, i + span)
            triangle = feedback.coupling[ahead, ahead] + prices[ahead].diag()
            moved = torch.linalg.solve_triangular(triangle, pulls[:, :span], upper=True, left=False)
            rounder.enter(i, base[:, ahead] + moved)
        return rounder.column(i, base[:, i] + pulls[:, 0] / prices[i])[:, None]

    return _sweep(torch.zeros_like(base), base, feedback, span, choose)[0]


def _sweep(
    state: Tensor, base: Tensor, feedback: Feedback, span: int, choose: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """`choose` turns the first column of a group, and the state of at least the span that begins there, into values."""
    state, rounded = state.clone(), base.clone()
    group = feedback.metric.shape[1]
    for block in _blocks(base.shape[1], group, span):
        local = state[:, block].clone()  # [out, width]
        coupling = feedback.coupling[block, block].contiguous()  # [width, width]
        for first in range(0, local.shape[1], group):
            here = slice(block.start + first, block.start + first + group)
            value = choose(here.start, local[:, first:] if first else state[:, block.start :])
            rounded[:, here] = value
            local.addmm_(base[:, here] - value, coupling[first : first + group])
        later = slice(block.stop, None) if feedback.forward else slice(None)
        errors = base[:, block] - rounded[:, block]
        state[:, later].addmm_(errors, feedback.coupling[block, later])
    return rounded, state


def _blocks(features: int, group: int, span: int) -> Iterator[slice]:
    """The columns that errors are spread within at once. A span lies inside of such a block, or begins with one."""
    width, stretch = (max(size, LAZY_COLUMNS // size * size) for size in (group, span))
    for start in range(0, features, stretch):
        stop = min(start + stretch, features)
        for first in range(start, stop, width):
            yield slice(first, min(first + width, stop))
