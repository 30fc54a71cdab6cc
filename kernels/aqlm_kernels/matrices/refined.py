"""RefinedMatrix: a compressed matrix, and a second one that is added to some of its rows.

Tokens are used very unequally: of a table of embeddings a hundredth of the rows can make half of the error. So the base
stores all rows in few bits, and the patch what the base leaves of these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from aqlm_kernels.errors import KernelError
from aqlm_kernels.matrices.additive import AdditiveMatrix
from aqlm_kernels.matrices.matrix import Matrix
from aqlm_kernels.matrices.uniform import UniformMatrix


@dataclass(frozen=True, eq=False)
class RefinedMatrix:
    """W = base, and W[index[k]] += patch[k]."""

    base: Matrix  # [out, in]
    index: Tensor  # [rows] int32, rising
    patch: Matrix  # [rows, in]

    kind = "refined"

    def __post_init__(self) -> None:
        rows, features = (self.patch.out_features, self.patch.in_features)
        if self.index.shape != (rows,) or features != self.base.in_features:
            raise KernelError(
                f"index {list(self.index.shape)} and a patch of {rows} x {features} do not fit a matrix of "
                f"{self.base.out_features} x {self.base.in_features}"
            )

    @property
    def learnable(self) -> tuple[str, ...]:
        return tuple(f"{name}_{one}" for name, part in self._parts() for one in part.learnable)

    @property
    def scheme(self) -> str:
        return f"{self.base.scheme}+{self.patch.scheme}r{len(self.index)}"

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def in_features(self) -> int:
        return self.base.in_features

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W `[out, in]`, differentiable in the learnable tensors of both."""
        working = torch.promote_types(dtype, torch.float32)
        return self.base.dequantize(working).index_add(0, self.index, self.patch.dequantize(working)).to(dtype)

    def rows(self, index: Tensor) -> RefinedMatrix:
        """The matrix of these rows; those that have no patch, or are refined, in any order."""
        hit, position = refined_rows(self.index, index)
        return RefinedMatrix(self.base.rows(index), hit.int(), self.patch.rows(position))

    def bits(self) -> int:
        """Bits of base and patch, and 32 for the index of each row of the patch."""
        return self.base.bits() + self.patch.bits() + 32 * len(self.index)

    def stored(self) -> RefinedMatrix:
        """Both parts as a checkpoint has them."""
        return replace(self, base=self.base.stored(), patch=self.patch.stored())

    def balanced(self) -> RefinedMatrix:
        """Both parts in the range of float16."""
        return replace(self, base=self.base.balanced(), patch=self.patch.balanced())

    def nearest(self, weight: Tensor) -> RefinedMatrix:
        """The codes of the base nearest to W less the patch, and those of the patch nearest to what it then leaves."""
        rows = self.index.long()
        base = self.base.nearest(weight.index_add(0, rows, self.patch.dequantize(), alpha=-1))
        return replace(self, base=base, patch=self.patch.nearest(weight[rows] - base.rows(rows).dequantize()))

    def module(self, bias: Tensor | None = None) -> nn.Module:
        """The layer that adds the products of both."""
        from aqlm_kernels.refined import RefinedLinear  # which needs this file

        return RefinedLinear(self, bias)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of both, as base_NAME and patch_NAME, and the index."""
        parts = {f"{name}_{one}": tensor for name, part in self._parts() for one, tensor in part.tensors().items()}
        return {**parts, "index": self.index}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> RefinedMatrix:
        base, patch = _part(tensors, "base_"), _part(tensors, "patch_")
        return cls(_kind_of(base).from_tensors(base), tensors["index"], UniformMatrix.from_tensors(patch))

    def packed_tensors(self) -> dict[str, Tensor]:
        """The packed tensors of both, as base_NAME and patch_NAME, and the index in int32."""
        parts = {f"{n}_{one}": tensor for n, part in self._parts() for one, tensor in part.packed_tensors().items()}
        return {**parts, "index": self.index.int()}

    @classmethod
    def from_packed(cls, tensors: Mapping[str, Tensor], word: str) -> RefinedMatrix:
        """The matrix of `packed_tensors`; KernelError where they are not of the scheme, such as 3x8g8+int4g64r512."""
        base_word, plus, rest = word.partition("+")
        patch_word, _, rows = rest.rpartition("r")
        index = tensors["index"]
        if index.ndim != 1 or index.dtype != torch.int32:
            raise KernelError(f"the index of a patch is {list(index.shape)} of {index.dtype}, not rows in int32")
        if not (plus and rows == str(len(index))):
            raise KernelError(f"an index of {len(index)} rows is not that of scheme {word}")
        base, patch = _part(tensors, "base_"), _part(tensors, "patch_")
        matrix = cls(_kind_of(base).from_packed(base, base_word), index, UniformMatrix.from_packed(patch, patch_word))
        if not bool((index.diff() > 0).all() and index[0] >= 0 and index[-1] < matrix.out_features):
            raise KernelError(f"the index of a patch is not rising from 0 to below {matrix.out_features}")
        return matrix

    def _parts(self) -> tuple[tuple[str, Matrix], tuple[str, Matrix]]:
        return ("base", self.base), ("patch", self.patch)


def refined_rows(index: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Find which of the wanted rows `[n]` the rising `index` has: their places in `wanted`, and in `index`."""
    if not len(index):
        return wanted[:0], wanted[:0]
    position = torch.searchsorted(index, wanted.to(index.dtype)).clamp_max(len(index) - 1)
    hit = (index[position] == wanted).nonzero()[:, 0]
    return hit, position[hit]


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _kind_of(names: Mapping[str, Tensor]) -> type[AdditiveMatrix] | type[UniformMatrix]:
    return AdditiveMatrix if "codebooks" in names else UniformMatrix
