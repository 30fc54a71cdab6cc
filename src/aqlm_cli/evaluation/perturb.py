"""Perturbations of the weights in the blocks, as in "What Makes Quantization for Large Language Models Hard?"
(arXiv 2403.06408).

Noise: Delta = k ||W||_F (xi * m) / ||xi * m||_F with the strength k, xi from NOISES and m from FACTORS. All noise of
one strength has one norm, so that what differs is where it lies. Clipping: the largest share of |w| is bounded by the
largest of the rest.

Noise is drawn by the name of its layer and its own: it is the same at all strengths, and under all factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from aqlm_cli.evaluation.formats import linear_layers
from aqlm_cli.models.blocks import replace_module
from aqlm_cli.seeds import generator
from aqlm_kernels import QuantizedLayer, quantized_layers


def _rademacher(shape: torch.Size, rng: Generator) -> Tensor:
    return torch.randint(2, shape, generator=rng).mul_(2).sub_(1).float()


NOISES: Mapping[str, Callable[[torch.Size, Generator], Tensor]] = {
    "gaussian": lambda shape, rng: torch.randn(shape, generator=rng),
    "rademacher": _rademacher,
    "uniform": lambda shape, rng: torch.rand(shape, generator=rng).mul_(2).sub_(1),
}
"""xi `[out, in]` by the name of its distribution."""

FACTORS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "up": torch.abs,
    "down": lambda weight: weight.abs().max() - weight.abs(),
}
"""m `[out, in]` by its name, of a weight."""


class Perturbation(Protocol):
    """A change of every linear layer's weight."""

    @property
    def words(self) -> tuple[str, str]:
        """Kind, and what it is correlated with."""
        ...

    @property
    def size(self) -> float:
        """Strength, or share of the weights."""
        ...

    def perturbed(self, weight: Tensor, path: str, seed: int) -> Tensor:
        """The weight `[out, in]` of the layer at `path`, changed; in the same type."""
        ...


@dataclass(frozen=True)
class Noise:
    """Noise of one distribution, factor and strength."""

    noise: str
    correlate: str
    strength: float

    @property
    def words(self) -> tuple[str, str]:
        return self.noise, self.correlate

    @property
    def size(self) -> float:
        return self.strength

    def delta(self, weight: Tensor, path: str, seed: int) -> Tensor:
        """Delta `[out, in]` in float64; zero where W or xi * m is."""
        xi = NOISES[self.noise](weight.shape, generator(seed, f"probe {self.noise} {path}"))
        weight = weight.double()
        direction = xi.to(weight) * FACTORS[self.correlate](weight)
        norm = direction.norm()
        return direction * (self.strength * weight.norm() / norm if float(norm) else 0.0)

    def perturbed(self, weight: Tensor, path: str, seed: int) -> Tensor:
        return added(weight, self.delta(weight, path, seed))


@dataclass(frozen=True)
class Clipping:
    """Clipping of a share of the weights, the largest of each matrix."""

    share: float

    @property
    def words(self) -> tuple[str, str]:
        return "clip", ""

    @property
    def size(self) -> float:
        return self.share

    def perturbed(self, weight: Tensor, path: str, seed: int) -> Tensor:
        rest = weight.numel() - round(self.share * weight.numel())  # weights that stay
        bound = float(weight.abs().float().flatten().kthvalue(max(1, rest)).values)
        return torch.clamp(weight, -bound, bound)


def added(weight: Tensor, delta: Tensor) -> Tensor:
    """W + Delta in the type of W; where Delta is zero W keeps its bytes, the sign of a zero included."""
    return torch.where(delta == 0, weight, (weight.double() + delta).to(weight.dtype))


class Perturbed:
    """The linear layers in the blocks of a network, whose weights can be changed and come back to the last bit.

    The network changes in place: quantized layers become dense ones of the same weights, and fused experts are taken
    apart.
    """

    @torch.no_grad()
    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        for path in linear_layers(network).keys() & (quantized := quantized_layers(network)).keys():
            replace_module(network, path, dense(quantized[path], dtype))
        self._layers: dict[str, nn.Linear] = linear_layers(network)
        self._weights = {path: layer.weight.detach().clone() for path, layer in self._layers.items()}

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def change(self, perturbed: Callable[[Tensor, str], Tensor]) -> float:
        """Put `perturbed(weight, path)` in the place of every unperturbed weight.

        Returns ||change||_F / ||W||_F of all weights together.
        """
        changed, whole = 0.0, 0.0
        for path, weight in self._weights.items():
            new = perturbed(weight, path)
            self._layers[path].weight.copy_(new)
            changed += float((new.double() - weight.double()).square().sum())
            whole += float(weight.double().square().sum())
        return (changed / whole) ** 0.5 if whole else 0.0


def dense(layer: QuantizedLayer, dtype: torch.dtype) -> nn.Linear:
    """nn.Linear with the weight and bias of a quantized layer."""
    matrix, bias = layer.matrix(), layer.trainable().get("bias")
    made = nn.Linear(matrix.in_features, matrix.out_features, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(matrix.dequantize(dtype), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return made
