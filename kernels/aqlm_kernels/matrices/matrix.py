"""Protocols of a compressed matrix and of the layer that computes with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Matrix(Protocol):
    """One compressed weight matrix W `[out, in]`: a frozen record of its tensors.

    `learnable` names the continuous ones: those that block fitting and finetuning train, in which `dequantize` must be
    differentiable. All other tensors are of integers or of single bits and stay.
    """

    @property
    def kind(self) -> str: ...

    @property
    def learnable(self) -> tuple[str, ...]: ...

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything to store, by name."""

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Matrix:
        """The inverse of `tensors`."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W `[out, in]`."""

    def bits(self) -> int:
        """Stored bits, tables and scales included, as the scheme counts them."""

    def stored(self) -> Matrix:
        """The matrix as it is after rounding to the 16 bits of a checkpoint."""

    def balanced(self) -> Matrix:
        """The same W with the learnable tensors in the range of float16."""

    def nearest(self, weight: Tensor) -> Matrix:
        """The same tables with the codes nearest to W `[out, in]`; KernelError for a kind that has no such codes."""

    def module(self, bias: Tensor | None = None) -> nn.Module:
        """The QuantizedLayer that computes x W^T + bias."""


@runtime_checkable
class QuantizedLayer(Protocol):
    """A module that computes x W^T + bias with a compressed W."""

    def matrix(self) -> Any:
        """The Matrix with the present values."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """The continuous parameters by name, the bias included."""

    def balance(self) -> None:
        """Bring the parameters into the range of float16, in place and without a change of W."""
