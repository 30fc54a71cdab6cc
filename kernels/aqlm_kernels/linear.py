"""AdditiveLinear: nn.Linear whose weight is an AdditiveMatrix, differentiable in its input, codebooks and scales.

Three ways to the same product. A few rows without gradients read the codes directly (`backends.matmul`).
More rows, or gradients: on the CPU compiled code writes tiles of W in the type of x and torch multiplies, on a GPU
Triton restores them in registers. Both are operators of torch (ops.py). Elsewhere, and for float64: tiled.py.
The result has the type of x, or autocast's, whatever the type of the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_kernels import hf_layout, ops, tiled
from aqlm_kernels.errors import KernelError
from aqlm_kernels.matrices import additive
from aqlm_kernels.matrices.additive import AdditiveMatrix
from aqlm_kernels.matrices.balance import balancing_shift, to_float16
from aqlm_kernels.packed import PackedMatrix

FEW_ROWS = {"cpu": 8, "cuda": 64}  # of x that are multiplied straight from the codes


class AdditiveLinear(nn.Module):
    """y = x W^T + bias with W[o, j*g + i] = scales[o] * sum_m codebooks[m, codes[o, j, m], i].

    Codebooks, scales and bias are parameters in float32 (float64 if they come so), whatever type x will have. The
    `state_dict` is the checkpoint's own layout (hf_layout.py): saving rounds to float16, so to keep a state exactly,
    clone the parameters.
    """

    codes: Tensor  # [out, n, M]
    codebooks: nn.Parameter  # [M, K, g]
    scales: nn.Parameter  # [out]
    bias: nn.Parameter | None  # [out]

    def __init__(self, matrix: AdditiveMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        if bias is not None and bias.shape != matrix.scales.shape:
            raise KernelError(f"bias is {list(bias.shape)}, the matrix has {matrix.out_features} outputs")
        self.register_buffer("codes", matrix.codes)
        self.codebooks = _parameter(matrix.codebooks)
        self.scales = _parameter(matrix.scales)
        self.bias = None if bias is None else _parameter(bias)
        self.entry_bits = matrix.entry_bits
        self.backend: str | None = None  # of products with a few rows; None: the first that can
        self._key = ops.new_key(self)

    @classmethod
    def empty(
        cls,
        out_features: int,
        in_features: int,
        *,
        num_codebooks: int,
        codebook_bits: int,
        group_size: int,
        bias: bool,
        device: torch.device | str = "cpu",
    ) -> AdditiveLinear:
        """A layer of zeros, to load a checkpoint into; on the meta device with `load_state_dict(..., assign=True)`."""
        matrix = AdditiveMatrix(
            codes=torch.zeros(out_features, in_features // group_size, num_codebooks, dtype=torch.uint8, device=device),
            codebooks=torch.zeros(num_codebooks, 2**codebook_bits, group_size, device=device),
            scales=torch.zeros(out_features, device=device),
        )
        return cls(matrix, torch.zeros(out_features, device=device) if bias else None)

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * self.codebooks.shape[2]

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    def matrix(self) -> AdditiveMatrix:
        """The present values; they share memory with the parameters."""
        return AdditiveMatrix(self.codes, self.codebooks.detach(), self.scales.detach(), self.entry_bits)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything but the codes, by name."""
        return dict(self.named_parameters(recurse=False))

    @torch.no_grad()
    def balance(self) -> None:
        """Bring codebooks and scales into the range of float16, in place and without a change of W (balance.py)."""
        shift = balancing_shift(self.codebooks, self.scales)
        if shift:
            self.codebooks.mul_(2.0**shift)
            self.scales.mul_(2.0**-shift)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of W at this index, `[n, in]`, with gradients; all others stay as they are stored."""
        codes, scales = self.codes.index_select(0, index), self.scales.index_select(0, index)
        return tiled.dequantize(AdditiveMatrix(codes, self.codebooks, scales), dtype)

    def packed(self) -> PackedMatrix:
        """The present values in the matmul kernels' order: made at the first call, and again after a change."""
        return ops.packed(self._key, self.codes, self.codebooks, self.scales)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        if x.shape[-1] != self.in_features:
            raise KernelError(f"x is {list(x.shape)}; its last axis must be the layer's {self.in_features} inputs")
        x = tiled.as_autocast(x)
        few = x.numel() <= FEW_ROWS.get(x.device.type, 0) * self.in_features and not self._records_gradients(x)
        y: Tensor
        if few and x.dtype in tiled.COMPILED_TYPES:
            y = ops.decoding_product(x, self.codes, self.codebooks, self.scales, self._key, self.backend or "")
        elif x.dtype in tiled.COMPILED_TYPES and ops.has_product(x.device, self.codebooks.shape[2]):
            y = ops.product(x, self.codes, self.codebooks, self.scales)
        else:
            tensors = {"codes": self.codes, "codebooks": self.codebooks, "scales": self.scales}
            y = tiled.linear(x, AdditiveMatrix, tensors)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:  # also of a copy
        self.__dict__.update(state)
        self._key = ops.new_key(self)

    def extra_repr(self) -> str:
        scheme = additive.scheme(self.codebooks, self.entry_bits)
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={scheme}, bias={bias}"

    def _records_gradients(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (x, self.codebooks, self.scales))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        stored = hf_layout.to_checkpoint(self.matrix())
        if self.bias is not None:
            stored["bias"] = to_float16(self.bias, "bias")
        destination.update({prefix + name: tensor for name, tensor in stored.items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Bring what is stored into the layer's own layout; torch does the rest, and reports what does not fit."""
        own = dict(state_dict)
        for name, tensor in state_dict.items():
            if name == prefix + "codes":
                dtype = additive.code_dtype(self.codebooks.shape[1])
                own[name] = hf_layout.unsigned(tensor, self.codebooks.shape[1]).to(dtype)
            elif name == prefix + "codebooks":
                own[name] = tensor.squeeze(2).float()
            elif name in (prefix + "scales", prefix + "bias"):
                own[name] = tensor.flatten().float()
        super()._load_from_state_dict(own, prefix, *rest)


def coded_layers(network: nn.Module, prefix: str = "") -> dict[str, AdditiveLinear]:
    """The layers of a network that multiply straight from codes, by path: those that have compiled products."""
    modules = network.named_modules(prefix=prefix)
    return {path: module for path, module in modules if isinstance(module, AdditiveLinear)}


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().to(torch.promote_types(values.dtype, torch.float32)))
