"""One pass over the groups of inputs, each rounded while the errors of the others are taken into account.

LDLQ (the vector form of GPTQ) and coordinate descent are the same loop. A state S `[out, in]` says how far the errors
made elsewhere pull at every weight; group j is then rounded to the v that minimises

    v^T D_j v - 2 t.v      with  t = S_j + D_j base_j,

and its error e = base_j - v is spread: S += e (rows j of the coupling).

- LDLQ: base is the weight, S starts at zero, D and the coupling come from the block LDL, which reaches later groups
  only.
- Coordinate descent: base is the present approximation, S = (W - base) H, D_j = H_jj, and the coupling is H itself. S
  stays (W - present) H throughout, so the objective never rises.

How a group is rounded is an argument: the loop serves any method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from aqlm_cli.quantization.solvers.hessian import Feedback

Rounder: TypeAlias = Callable[[int, Tensor, Tensor], Tensor]
"""(group j, metric `[g, g]`, targets t `[out, g]`) -> values v `[out, g]`."""

LAZY_COLUMNS = 128
"""Within so many columns errors are spread at once, to all others by one product when these are done, as in GPTQ."""


def sweep(state: Tensor, base: Tensor, feedback: Feedback, round_group: Rounder) -> tuple[Tensor, Tensor]:
    """The rounded matrix and the state after it, both `[out, in]`; a forward feedback leaves the state resume_state."""
    state, rounded = state.clone(), base.clone()
    group = feedback.metric.shape[1]
    width = max(group, LAZY_COLUMNS // group * group)
    for start in range(0, base.shape[1], width):
        block = slice(start, min(start + width, base.shape[1]))
        local = state[:, block].clone()  # [out, width]
        coupling = feedback.coupling[block, block].contiguous()  # [width, width]
        for first in range(0, local.shape[1], group):
            inside = slice(first, first + group)
            j, metric = (start + first) // group, feedback.metric[(start + first) // group]
            before = base[:, start + first : start + first + group]
            value = round_group(j, metric, torch.addmm(local[:, inside], before, metric))
            rounded[:, start + first : start + first + group] = value
            local.addmm_(before - value, coupling[inside])
        later = slice(block.stop, None) if feedback.forward else slice(None)
        errors = base[:, block] - rounded[:, block]
        state[:, later].addmm_(errors, feedback.coupling[block, later])
    return rounded, state
