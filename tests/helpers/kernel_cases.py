"""The awkward products that every kernel is held to, by hand and drawn, and the exact answers.

With small integers and power-of-two scales each float32 sum is exact in any order, so such a case tests the layout: a
kernel must equal the reference bit for bit. Normally distributed numbers test the arithmetic, within a bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from aqlm_kernels import AdditiveMatrix


@dataclass(frozen=True)
class Case:
    """A product x W^T; the last row of W is zero, and x is every second column of a wider one where `strided`."""

    num_codebooks: int
    codebook_bits: int
    group_size: int
    out_features: int
    groups: int
    rows: int
    strided: bool = False

    def __str__(self) -> str:
        scheme = f"{self.num_codebooks}x{self.codebook_bits}g{self.group_size}"
        return f"{scheme}-{self.rows}x{self.in_features}x{self.out_features}" + "-strided" * self.strided

    @property
    def in_features(self) -> int:
        return self.groups * self.group_size

    def integers(self) -> tuple[Tensor, AdditiveMatrix]:
        """x [rows, in] and W, small enough for exact sums in float32."""
        draw = torch.Generator().manual_seed(0)
        x = self._input(torch.randint(-3, 4, (self.rows, 2 * self.in_features), generator=draw).float())
        entries = torch.randint(-4, 5, self._codebooks(), generator=draw).float()
        scales = 2.0 ** torch.randint(-2, 3, (self.out_features,), generator=draw)
        return x, self._matrix(entries, scales, draw)

    def reals(self) -> tuple[Tensor, AdditiveMatrix]:
        """x [rows, in] and W, normally distributed."""
        draw = torch.Generator().manual_seed(1)
        x = self._input(torch.randn(self.rows, 2 * self.in_features, generator=draw))
        scales = 0.5 + torch.rand(self.out_features, generator=draw)
        return x, self._matrix(torch.randn(self._codebooks(), generator=draw), scales, draw)

    def _codebooks(self) -> tuple[int, int, int]:
        return self.num_codebooks, 2**self.codebook_bits, self.group_size

    def _input(self, wide: Tensor) -> Tensor:
        return wide[:, ::2] if self.strided else wide[:, : self.in_features].contiguous()

    def _matrix(self, entries: Tensor, scales: Tensor, draw: torch.Generator) -> AdditiveMatrix:
        codes = torch.randint(0, entries.shape[1], (self.out_features, self.groups, self.num_codebooks), generator=draw)
        if self.out_features > 1:
            scales[-1] = 0
        return AdditiveMatrix(codes, entries, scales)


CASES = (
    Case(1, 8, 8, out_features=1, groups=1, rows=1),
    Case(1, 8, 8, out_features=65, groups=3, rows=3),
    Case(2, 8, 8, out_features=64, groups=72, rows=1),
    Case(2, 8, 8, out_features=130, groups=9, rows=5, strided=True),
    Case(2, 8, 8, out_features=63, groups=2, rows=0),
    Case(3, 8, 16, out_features=100, groups=5, rows=7),
    Case(4, 8, 4, out_features=192, groups=17, rows=2),
    Case(5, 4, 8, out_features=31, groups=11, rows=8, strided=True),
    Case(1, 12, 8, out_features=70, groups=10, rows=3),
    Case(2, 12, 4, out_features=129, groups=7, rows=1, strided=True),
    Case(1, 16, 8, out_features=66, groups=13, rows=2),
    Case(1, 16, 16, out_features=20, groups=6, rows=1),
)

LARGEST = 2**19
"""Numbers in the codebooks of a drawn case at most: so a case takes milliseconds."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Codes of 1 to 16 bits, 1 to 8 codebooks, any group and any shape."""
    bits = draw(st.integers(1, 16))
    num_codebooks = draw(st.integers(1, min(8, LARGEST >> bits)))
    group_size = draw(st.integers(1, min(64, (LARGEST >> bits) // num_codebooks)))
    return Case(
        num_codebooks,
        bits,
        group_size,
        out_features=draw(st.integers(1, 600)),  # ten tiles: bundles of all widths, and a tile that is not full
        groups=draw(st.integers(1, 10) | st.integers(60, 70)),  # a block of tables, several, and parts of blocks
        rows=draw(st.integers(0, 5)),
        strided=draw(st.booleans()),
    )
