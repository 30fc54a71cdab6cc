"""The search over codes, in plain torch: the specification that `cpu/search.py` makes fast, and the GPU's form.

Everything quantization decides about codes is one small problem, met once a row and input group:

    minimise over a_1..a_M    v^T H v - 2 t.v      with  v = sum_m C_m[a_m],

with H `[g, g]` the metric of the group (shared by all rows) and t `[g]` the target of the row in that metric. One
codebook is searched exactly. With several, every pair of codebooks (p, q) in turn is chosen jointly while the others
keep their entries: a handful of candidates for a_p, and for each of them the best a_q exactly, through the table
`X[a, b] = 2 C_p[a]^T H C_q[b]`, which does not depend on the row. The present pair is always among the candidates, so
the objective never rises.

Candidates are not the best entries overall, which take longer to find than to try, but the best of each class of
entries k, k + c, k + 2c, ...: that is one vector minimum, holds the best of all, and most of those next to it.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from aqlm_kernels.errors import KernelError


def choose_codes(metric: Tensor, targets: Tensor, codebooks: Tensor, codes: Tensor, beam: int) -> Tensor:
    """New codes `[rows, M]` (int64) for one input group of every row, never worse than `codes` `[rows, M]`.

    `metric` is H `[g, g]`, `targets` t `[rows, g]`, `codebooks` `[M, K, g]`. `beam`, a power of two, is the number
    of candidates for the first code of a pair beside the present one: half of them are the best of beam/2 classes given
    the present second code, half the best of these classes on their own; K or more means all entries. Ties go to the
    present first code, then to the earlier candidate, and to the lower second code.
    """
    check_search(metric, targets, codebooks, codes, beam)
    codes = codes.long().clone()  # [rows, M]
    if codebooks.shape[0] == 1:
        return _scores(metric, targets, codebooks[0]).argmin(1, keepdim=True)
    for p, q in combinations(range(codebooks.shape[0]), 2):
        others = [m for m in range(codebooks.shape[0]) if m not in (p, q)]
        kept = sum((codebooks[m][codes[:, m]] for m in others), torch.zeros_like(targets))  # [rows, g]
        codes[:, [p, q]] = _choose_pair(
            metric, targets - kept @ metric, codebooks[p], codebooks[q], codes[:, [p, q]], beam
        )
    return codes


def nearest_entries(importance: Tensor, targets: Tensor, codebook: Tensor) -> Tensor:
    """Find for every row and group j the entry c of least sum_d h_jd c_d^2 - 2 t_d c_d: `[rows, n]`, ties to the lower.

    `importance` is h `[n, g]`, `targets` t `[rows, n, g]`, `codebook` `[K, g]`: `choose_codes` for one codebook and
    diagonal metrics, all groups at once, as k-means assigns points.
    """
    squares = importance @ codebook.square().T  # [n, K]
    return torch.stack([(squares[j] - 2 * targets[:, j] @ codebook.T).argmin(1) for j in range(len(importance))], 1)


def _choose_pair(metric: Tensor, targets: Tensor, first: Tensor, second: Tensor, pair: Tensor, beam: int) -> Tensor:
    """The best pair `[rows, 2]` of entries of `first` and `second` `[K, g]` among the candidates of `choose_codes`."""
    alone = _scores(metric, targets, first)  # [rows, K]
    partner = _scores(metric, targets, second)  # [rows, K]
    cross = 2 * first @ metric @ second.T  # [K, K]
    candidates = _candidates(alone, _scores(metric, targets - second[pair[:, 1]] @ metric, first), pair[:, 0], beam)
    best = torch.full_like(alone[:, 0], torch.inf)  # [rows]
    chosen = pair.clone()
    for column in candidates.T:  # [rows]: one candidate a row
        value, b = (partner + cross[column]).min(1)
        value = value + alone.gather(1, column[:, None])[:, 0]
        better = value < best
        best = torch.where(better, value, best)
        chosen = torch.where(better[:, None], torch.stack([column, b], 1), chosen)
    return chosen


def _candidates(alone: Tensor, given_partner: Tensor, present: Tensor, beam: int) -> Tensor:
    """Entries to try `[rows, 1 + beam]`, the present one first."""
    if beam >= alone.shape[1]:
        everything = torch.arange(alone.shape[1], device=alone.device).expand_as(alone)
        return torch.cat([present[:, None], everything], 1)
    return torch.cat(
        [present[:, None], _best_of_classes(given_partner, beam // 2), _best_of_classes(alone, beam // 2)], 1
    )


def _best_of_classes(scores: Tensor, classes: int) -> Tensor:
    """The entries of the lowest scores `[rows, K]`, one of each class c, c + classes, ...: `[rows, classes]`."""
    within = scores.view(len(scores), -1, classes).argmin(1)  # [rows, classes]
    return within * classes + torch.arange(classes, device=scores.device)


def _scores(metric: Tensor, targets: Tensor, codebook: Tensor) -> Tensor:
    """`c^T H c - 2 t.c` for every row's t and every entry c: `[rows, K]`."""
    return (codebook @ metric * codebook).sum(1) - 2 * targets @ codebook.T


def check_search(metric: Tensor, targets: Tensor, codebooks: Tensor, codes: Tensor, beam: int) -> None:
    """Raise KernelError unless the shapes of `choose_codes` fit together."""
    num_codebooks, _, group = codebooks.shape
    rows = targets.shape[0]
    if metric.shape != (group, group) or targets.shape != (rows, group) or codes.shape != (rows, num_codebooks):
        raise KernelError(
            f"code search: metric {tuple(metric.shape)}, targets {tuple(targets.shape)}, codebooks "
            f"{tuple(codebooks.shape)} and codes {tuple(codes.shape)} do not fit together"
        )
    if beam < 2 or beam & (beam - 1):
        raise KernelError(f"code search: beam is {beam}, a power of two from 2 on is needed")
