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
    def scheme(self) -> str:
        """The word of the scheme that describes it, such as 2x8g8."""

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

    def packed_tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint, by name: integers at their true width (bitpack.py), all else in float16.

        Their bytes are those of `bits`, less than one more for each tensor. Raises KernelError where float16 overflows.
        """

    @classmethod
    def from_packed(cls, tensors: Mapping[str, Tensor], word: str) -> Matrix:
        """The inverse of `packed_tensors`, and equal to `stored`; `word` is that of the scheme, such as 2x8g8.

        Raises KernelError for tensors that are not of this scheme.
        """

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W `[out, in]`."""

    def rows(self, index: Tensor) -> Matrix:
        """The matrix of these rows of W, `[n]` of int64 in any order, as often as they come; differentiable.

        A learnable tensor that belongs to rows has them as its first axis; any other stays the same object.
        """

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
