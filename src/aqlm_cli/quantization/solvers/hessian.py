"""Statistics of a layer beside its weight: the Hessian of its output error, and the metrics made from it.

A layer's error on its inputs is `tr(dW H dW^T)` with H the mean of x x^T. H couples all input features; a search that
decides one group of g features after the other sees it through two kinds of g x g metrics:

- the diagonal blocks H_jj: the price of an error in group j while all other groups stay as they are;
- the block LDL of H: the price of an error in group j when the groups decided after it may still make up for it.
  H = L^T L with L lower triangular gives r H r^T = sum_j | L_jj r_j + sum_{k<j} L_jk r_k |^2, so that group j is paid
  for with D_j = L_jj^T L_jj, and an error e_k made earlier pulls at it with e_k L_jk^T L_jj.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """H = mean over `tokens` inputs of x x^T, `[in, in]` float32; of those of keys and values, a weighed mean."""

    second_moment: Tensor
    tokens: int

    def relative_error(self, weight: Tensor, approximation: Tensor) -> float:
        """tr(dW H dW^T) / tr(W H W^T); 0 where no input ever reaches the weight.

        In units of a power of two near the largest weight: squares of small and of large weights leave float32.
        """
        unit = 2.0 ** min(max(math.frexp(float(weight.abs().max()))[1], -126), 126)
        weight, approximation = weight / unit, approximation / unit
        difference = approximation - weight
        whole = float((weight @ self.second_moment * weight).sum(dtype=torch.float64))
        return float((difference @ self.second_moment * difference).sum(dtype=torch.float64)) / whole if whole else 0.0


TOKENS_PER_FEATURE = 4
"""Inputs for each feature below which the H of an expert is completed with that of all experts."""


class SecondMoment:
    """Collects H over batches of inputs.

    Each batch's product is summed in float32, the batches in float64: over millions of tokens a float32 sum would lose
    the small entries. Products never run under autocast, which would round the result to bfloat16: it would no longer
    be positive definite.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self._sum = torch.zeros(features, features, dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add the inputs x `[tokens, in]`, each as often as its weight says, `[tokens]` with a mean of 1, or once."""
        if weights is not None:
            x = x.float() * weights.sqrt()[:, None]
        with torch.autocast(x.device.type, enabled=False), _bfloat16_products(x.dtype == torch.bfloat16):
            x = x.float()
            self._sum += x.T @ x
        self._tokens += x.shape[0]

    def empty(self) -> SecondMoment:
        """Return a moment of the same features that has seen no input."""
        return SecondMoment(len(self._sum), self._sum.device)

    def merge(self, other: SecondMoment) -> None:
        """Add the inputs that another one has collected."""
        self._sum += other._sum
        self._tokens += other._tokens

    def statistics(self, common: SecondMoment | None = None) -> LayerStatistics:
        """H of the inputs. With `common`, those of all experts, missing inputs are made up for by their mean.

        n inputs with the sum S give, where n is below n0 = TOKENS_PER_FEATURE * in,

            H = (S + (n0 - n) H_common) / n0 = n/n0 H_own + (1 - n/n0) H_common,

        as if n0 - n average inputs of all experts had been sent to it beside its own: H_common without any input of its
        own, H_own from n0 inputs on, and never singular because few tokens arrived. One of the two must not be empty.
        """
        missing = 0 if common is None else max(0, TOKENS_PER_FEATURE * len(self._sum) - self._tokens)
        total = self._sum if common is None or not missing else self._sum + common._sum * (missing / common._tokens)
        return LayerStatistics((total / (self._tokens + missing)).float(), self._tokens)


@contextmanager
def _bfloat16_products(allowed: bool) -> Iterator[None]:
    """Let oneDNN multiply float32 matrices that hold bfloat16 values in bfloat16, which is exact and twice as fast.

    Sums and the result stay in float32.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch's hints do not know it
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if allowed else before
    try:
        yield
    finally:
        settings.fp32_precision = before


@dataclass(frozen=True, eq=False)
class Feedback:
    """The effect of an error in one group of inputs on the targets of later ones; see `ldlq.sweep`."""

    metric: Tensor  # [n, g, g]
    coupling: Tensor  # [in, in]: row k times the error of feature k is added to the state
    forward: bool  # whether only later groups are changed


def damped(second_moment: Tensor, share: float) -> Tensor:
    """H with `share` of its mean diagonal added to the diagonal; the identity where H is zero.

    This makes H positive definite, so inputs that were never seen have a small price instead of none.
    """
    result = second_moment.clone()
    _add_damping(result, share)
    return result


def _add_damping(matrix: Tensor, share: float) -> None:
    mean = matrix.diagonal().mean()
    if mean == 0:
        matrix.copy_(torch.eye(len(matrix)))
    else:
        matrix.diagonal().add_(share * mean)


def diagonal_blocks(matrix: Tensor, group: int) -> Tensor:
    """The g x g blocks on the diagonal of `[in, in]`: `[n, g, g]`."""
    n = matrix.shape[0] // group
    return matrix.view(n, group, n, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def most_active_first(second_moment: Tensor, group: int) -> Tensor:
    """Groups by falling energy of their inputs `[n]`: what matters most is decided while others can make up for it."""
    return second_moment.diagonal().view(-1, group).sum(1).argsort(descending=True, stable=True)


def columns_most_active_first(second_moment: Tensor, group: int) -> Tensor:
    """Inputs `[in]`: groups by falling energy, and in each of them its inputs likewise, so that groups stay whole."""
    order = most_active_first(second_moment, group)  # [n]
    inside = second_moment.diagonal().view(-1, group)[order].argsort(dim=1, descending=True, stable=True)
    return (order[:, None] * group + inside).flatten()


LDL_GROUPS = 64
"""Groups that are brought into the form of a feedback at once."""


def block_ldl(second_moment: Tensor, group: int, damping: float) -> Feedback:
    """The block LDL of H, its groups decided in the order in which they lie.

    Factorised in float64, with `damping` of the mean diagonal added, ten times more as often as H is not yet positive
    definite. Raises QuantizationError where that never helps, which means H holds NaN. What is large exists once: two
    matrices `[in, in]` of float64 at a time.
    """
    features = len(second_moment)
    for attempt in range(8):
        reverse = second_moment.flip(0, 1).double()
        _add_damping(reverse, damping * 10.0**attempt)
        lower, failed = torch.linalg.cholesky_ex(reverse)  # reversed and transposed, it is L
        del reverse
        if not failed:
            break
    else:
        raise QuantizationError("the Hessian cannot be factorised; the activations hold NaN")
    metric = torch.empty(features // group, group, group, device=lower.device)
    coupling = torch.empty(features, features, device=lower.device)
    for first in range(0, features, rows := LDL_GROUPS * group):
        inside = slice(first, min(first + rows, features))
        factor = lower[:, features - inside.stop : features - first].flip(0, 1).T.contiguous()  # these rows of L
        factor = factor.view(-1, group, features)
        corners = factor[:, :, inside].reshape(len(factor), group, len(factor), group)
        corners = corners.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # L_jj [b, g, g]
        pulls = corners.transpose(1, 2) @ factor  # L_jj^T L_jk for all k
        own = pulls[:, :, inside].view(len(factor), group, len(factor), group).diagonal(dim1=0, dim2=2)  # [g, g, b]
        metric[first // group : inside.stop // group] = own.permute(2, 0, 1)  # D_j
        own.zero_()
        coupling[:, inside] = pulls.flatten(0, 1).T
    return Feedback(metric, coupling, forward=True)
