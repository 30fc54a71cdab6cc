"""SingleExperts: the experts of a mixture with one linear layer for each projection of each expert.

transformers keeps the experts of a block in one module: 3-D parameters [experts, out, in], and a forward that selects
from them. A compressed matrix stands for one linear layer, so the experts are taken apart:

    experts.gate_up_proj [E, 2m, d]    ->    experts.0.gate_up_proj  nn.Linear(d, 2m), experts.1.gate_up_proj, ...
    experts.down_proj [E, d, m]        ->    experts.0.down_proj     nn.Linear(m, d), ...

What distinguishes the families is read from the attributes that transformers' own experts functions read: `has_gate`,
`has_bias`, `is_transposed`, `has_post_expert_norm`, and the method `_apply_gate`. No family is named here.

Dimension letters: E experts, t tokens, k experts of a token, d hidden size, m inner size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 6
INNER = 8
"""Tokens of the trial, and the inner size of its experts."""

FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed")
"""Attributes by which a module of fused experts is known."""


class SingleExperts(nn.Module):
    """y[t] = sum_j weights[t, j] expert(index[t, j])(x[t]), where expert(e)(x) = norm(down_e(gate(up_e(x)))).

    The experts are the children named 0 to E - 1. Every other child of the fused module (its activation, its norm)
    keeps its name, so that parameters which are no matrices of experts have the names that they had.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        first, second = projections(fused)
        self.num_experts: int = fused.num_experts  # type: ignore[assignment]
        self.first, self.second = first, second
        for index in range(self.num_experts):
            self.add_module(str(index), nn.ModuleDict({name: _linear(fused, name, index) for name in (first, second)}))
        for name, child in fused.named_children():
            self.add_module(name, child)
        self._gate = _Method(fused, "_apply_gate" if fused.has_gate else "act_fn")
        self._normed: bool = _normed(fused)
        self.train(fused.training)

    def layers(self) -> Iterator[tuple[str, str]]:
        """Paths of the linear layers inside this module, and the projection that each belongs to."""
        for index in range(self.num_experts):
            for name in (self.first, self.second):
                yield f"{index}.{name}", name

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Hidden states [t, d], numbers [t, k] and weights [t, k] of each token's experts -> [t, d].

        An index of E or more stands for no expert. Sums are in float32 at least, as in transformers' own functions.
        """
        pairs, weights = top_k_index.flatten(), top_k_weights.flatten()  # [t * k]
        order = pairs.argsort(stable=True)
        counts = torch.bincount(pairs, minlength=self.num_experts)[: self.num_experts].tolist()
        accumulator = torch.promote_types(hidden_states.dtype, torch.float32)
        total = torch.zeros(hidden_states.shape, dtype=accumulator, device=hidden_states.device)
        start = 0
        for index, count in enumerate(counts):
            if count:
                chosen = order[start : start + count]
                token = chosen // top_k_index.shape[1]
                output = self._expert(index, hidden_states[token]) * weights[chosen, None]
                total.index_add_(0, token, output.to(accumulator))
                start += count
        return total.to(hidden_states.dtype)

    def _expert(self, index: int, x: Tensor) -> Tensor:  # [t, d] -> [t, d]
        expert: Any = self._modules[str(index)]
        output: Tensor = expert[self.second](self._gate(expert[self.first](x)))
        if self._normed:
            output = self.get_submodule("post_expert_norm")(output)
        return output


# ---------------------------------------------------------------------------------------------- what can be taken apart


def projections(fused: nn.Module) -> tuple[str, str]:
    """Names of the parameters that enter and leave the inner size."""
    return ("gate_up_proj" if fused.has_gate else "up_proj"), "down_proj"


def is_fused(module: nn.Module) -> bool:
    """True for a module that holds experts in the 3-D parameters that transformers' experts functions read."""
    if not all(hasattr(module, flag) for flag in FLAGS):
        return False
    return all(getattr(module._parameters.get(name), "ndim", 0) == 3 for name in projections(module))


def expert_shapes(fused: nn.Module) -> dict[str, tuple[int, int]]:
    """`(out, in)` of one expert's matrix, by the name of the projection."""
    shapes: dict[str, tuple[int, int]] = {}
    for name in projections(fused):
        rows, columns = fused.get_parameter(name).shape[1:]
        shapes[name] = (columns, rows) if fused.is_transposed else (rows, columns)
    return shapes


def why_not_single(fused: nn.Module) -> str | None:
    """Reason why SingleExperts cannot stand for the fused module, or None.

    Both are tried on random numbers in float32, with a few small experts; the module may be without weights.
    """
    kind = type(fused).__name__
    shapes = expert_shapes(fused)
    (out, hidden), (back, inner) = shapes.values()
    wanted = {*shapes, *(f"{name}_bias" for name in shapes if fused.has_bias)}
    if {name for name, parameter in fused._parameters.items() if parameter is not None} != wanted:
        return f"{kind} holds more than the matrices of its experts"
    if (out, back) != (inner * (2 if fused.has_gate else 1), hidden):
        return f"{kind} holds experts of another form than gate, up and down"
    if any(len(fused.get_parameter(name)) != fused.num_experts for name in shapes):
        return f"{kind} holds matrices of other experts than its {fused.num_experts}"
    try:
        with torch.no_grad(), torch.device("cpu"):
            same = _compute_the_same(fused, hidden)
    except Exception as error:  # a forward of another kind may fail in any way
        return f"{kind} cannot be taken apart ({type(error).__name__})"
    return None if same else f"{kind} computes something else than its experts one by one"


def _compute_the_same(fused: nn.Module, hidden: int) -> bool:
    draw = torch.Generator().manual_seed(0)
    small = _small(fused, hidden, draw)
    x = torch.randn(TOKENS, hidden, generator=draw)
    index = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1]])
    weights = torch.rand(TOKENS, 2, generator=draw)
    wanted = type(fused).forward(small, x, index, weights)
    found = SingleExperts(small)(x, index, weights)
    size = float(wanted.abs().max())
    return wanted.shape == found.shape and torch.allclose(found, wanted, rtol=0, atol=1e-4 * size)


def _small(fused: nn.Module, hidden: int, draw: torch.Generator) -> nn.Module:
    """The module with three experts of INNER features and random numbers; what it holds beside them has its size."""
    first, second = projections(fused)
    rows = {first: INNER * (2 if fused.has_gate else 1), second: hidden}
    parameters: dict[str, nn.Parameter | None] = {}
    for name, columns in ((first, hidden), (second, INNER)):
        weight = torch.randn(3, rows[name], columns, generator=draw) / columns**0.5
        parameters[name] = nn.Parameter(weight.transpose(1, 2).contiguous() if fused.is_transposed else weight)
        if fused.has_bias:
            parameters[f"{name}_bias"] = nn.Parameter(torch.randn(3, rows[name], generator=draw))
    small = copy.copy(fused)
    small.__dict__ = {**fused.__dict__, "num_experts": 3, "_parameters": parameters}
    small._modules = {name: _filled(child, draw) for name, child in fused.named_children()}
    return small


def _filled(module: nn.Module, draw: torch.Generator) -> nn.Module:
    """A copy on the CPU with random numbers in its parameters."""
    memo: dict[int, Any] = {
        id(one): nn.Parameter(torch.rand(one.shape, generator=draw) + 0.5) for one in module.parameters()
    }
    return copy.deepcopy(module, memo)


# ----------------------------------------------------------------------------------------------------------- its parts


def _linear(fused: nn.Module, name: str, index: int) -> nn.Linear:
    """The layer of one expert; its weight is a view of the fused parameter."""
    stored = fused.get_parameter(name).detach()[index]
    weight = stored.T if fused.is_transposed else stored
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if fused.has_bias:
        bias = fused.get_parameter(f"{name}_bias").detach()[index].clone()
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


class _Method:
    """A method of the fused module, of a copy without parameters: it may read limits and factors from there."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name, self.module = name, copy.copy(module)
        self.module.__dict__ = {**module.__dict__, "_parameters": {}}

    def __call__(self, x: Tensor) -> Tensor:
        output: Tensor = getattr(self.module, self.name)(x)
        return output


def _normed(fused: nn.Module) -> bool:
    return bool(getattr(fused, "has_post_expert_norm", False))
