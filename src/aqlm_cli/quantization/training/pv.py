"""Trainable codes: the V steps of PV-Tuning (arXiv 2405.14852).

Codes are discrete. V, the latent weights, is a continuous copy of the weights that the straight-through gradient
updates. At each step the groups whose latent weights are furthest from their codes get the codes nearest to V: only a
share of them, and only until the matrix has changed by its trust ratio, as a gradient predicts small changes only.

V minus the present weights is stored, not V: it is small, so that 16 bits can hold it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aqlm_cli.quantization.solvers.code_search import code_search, sum_of_entries
from aqlm_cli.quantization.training.optimizers import Adam, trust_ratio
from aqlm_cli.quantization.training.schedule import root_mean_square
from aqlm_cli.spec.finetune import CodesConfig
from aqlm_kernels import AdditiveLinear

BETAS = (0.0, 0.95)  # as published

MOST_SCORES = 2**28
"""Scores of entries for groups that exist at a time, where the search keeps them all: 1 GiB."""


class _StraightThrough(torch.autograd.Function):
    """Weights `[out, in]` of a layer; their gradient is also that of `ahead` `[out, in]`, whose values do not count."""

    @staticmethod
    def forward(
        ctx: Any, ahead: Tensor, codebooks: Tensor, scales: Tensor, codes: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(codebooks, scales, codes)
        ctx.dtype = ahead.dtype
        return code_search(codes.device).dequantize(codes, codebooks, scales, dtype)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        codebooks, scales, codes = ctx.saved_tensors
        by_codebooks, by_scales = code_search(codes.device).gradients(outer, codes, codebooks, scales)
        return outer.to(ctx.dtype), by_codebooks, by_scales, None, None


@dataclass(eq=False)
class CodeSteps:
    """The additive layers with trainable codes, by path, and V minus the weights of each."""

    layers: Mapping[str, AdditiveLinear]
    settings: CodesConfig
    lamb: bool
    ahead: dict[str, nn.Parameter] = field(init=False)
    units: dict[str, float] = field(init=False)  # of the learning rate: root mean square of each matrix at the start
    optimizer: Adam = field(init=False)

    def __post_init__(self) -> None:
        dtype = getattr(torch, self.settings.state)
        self.ahead = {
            path: nn.Parameter(
                torch.zeros(layer.out_features, layer.in_features, dtype=dtype, device=layer.codes.device)
            )
            for path, layer in self.layers.items()
        }
        self.units = {path: root_mean_square(_weight(layer)) for path, layer in self.layers.items()}
        self.optimizer = Adam(*BETAS, dtype)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Leave the gradient of V in `ahead` at every backward through the layers while this is open."""
        for path, layer in self.layers.items():
            layer.forward = _through(layer, self.ahead[path])  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in self.layers.values():
                del layer.forward  # that of the class shows again

    @contextmanager
    @torch.no_grad()
    def staying(self, path: str) -> Iterator[None]:
        """Keep V as it is while this is open, although the layer's codebooks and scales may change."""
        layer, ahead = self.layers[path], self.ahead[path]
        before = _weight(layer)
        yield
        ahead.add_(before.sub_(_weight(layer)))

    @torch.no_grad()
    def step(self, path: str, rate: float) -> int:
        """Move V of one layer against its gradient, and then its codes towards V.

        Returns the number of groups with new codes.
        """
        layer, ahead = self.layers[path], self.ahead[path]
        if ahead.grad is None:  # an expert that no token went to
            return 0
        direction = self.optimizer.direction(path, ahead.grad)
        weight = _weight(layer)
        unit = trust_ratio(weight + ahead, direction) if self.lamb else self.units[path]
        moved = ahead.float().sub_(direction, alpha=rate * unit)
        changed = self._follow(layer, weight, moved)
        ahead.copy_(moved)
        ahead.grad = None
        return changed

    def _follow(self, layer: AdditiveLinear, weight: Tensor, ahead: Tensor) -> int:
        """Choose new codes where V is furthest from `weight` `[out, in]`; reduce `ahead`, V - weight, by the change."""
        _, _, group = layer.codebooks.shape
        rows, groups = layer.out_features, layer.codes.shape[1]
        apart = ahead.view(rows * groups, group).square().sum(1)
        count = math.ceil(self.settings.share * rows * groups)
        chosen = apart.topk(count).indices  # the furthest first
        row = chosen // groups
        present = layer.codes.view(rows * groups, -1)[chosen].long()  # [count, M]
        scales = layer.scales[row, None]
        target = (weight.view(-1, group)[chosen] + ahead.view(-1, group)[chosen]) / scales
        search = code_search(weight.device)
        identity = torch.eye(group, device=weight.device)
        at_once = MOST_SCORES // layer.codebooks.shape[1]
        parts = zip(target.split(at_once), present.split(at_once), strict=True)
        books, beam = layer.codebooks, self.settings.beam
        codes = torch.cat([search.choose(identity, goal, books, there, beam) for goal, there in parts])
        step = scales * (sum_of_entries(books, codes) - sum_of_entries(books, present))  # [count, g]
        keep = (codes != present).any(1)
        if self.settings.trust_ratio is not None:
            square = step.square().sum(1)
            before = square.cumsum(0) - square  # the one that reaches the bound goes, or it would stop all for good
            keep &= before <= (self.settings.trust_ratio * weight.norm()) ** 2
        chosen, codes, step = chosen[keep], codes[keep], step[keep]
        layer.codes.view(rows * groups, -1)[chosen] = codes.to(layer.codes.dtype)
        ahead.view(-1, group)[chosen] -= step
        return len(chosen)

    @torch.no_grad()
    def forget(self) -> None:
        """Reset V to the weights."""
        for ahead in self.ahead.values():
            ahead.zero_()
        self.optimizer.moments.clear()

    def codes(self) -> dict[str, Tensor]:
        return {f"{path}.codes": layer.codes for path, layer in self.layers.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of a stored training, beside the codes."""
        found = {f"ahead/{path}": ahead.detach() for path, ahead in self.ahead.items()}
        return found | {f"ahead/{key}": moment for key, moment in self.optimizer.moments.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for path, ahead in self.ahead.items():
            ahead.copy_(tensors[f"ahead/{path}"])
        self.optimizer.restore("ahead/", tensors)


def _through(layer: AdditiveLinear, ahead: Tensor) -> Any:
    def forward(x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        weight = _StraightThrough.apply(ahead, layer.codebooks, layer.scales, layer.codes, x.dtype)  # type: ignore[no-untyped-call]
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, weight, bias)

    return forward


def _weight(layer: AdditiveLinear) -> Tensor:
    """W [out, in] in float32."""
    return code_search(layer.codes.device).dequantize(layer.codes, layer.codebooks, layer.scales, torch.float32)
