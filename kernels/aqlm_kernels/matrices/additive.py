"""AdditiveMatrix: a weight matrix whose groups of inputs are sums of codebook entries.

A row of W is cut into groups of g consecutive weights. Each group is the sum of M vectors of g numbers, one picked by
a code from each of M codebooks, times one scale for the row. At 2 codebooks of 256 entries and g = 8 the codes take
2 * 8 / 8 = 2 bits a weight; the codebooks are shared by the whole matrix and the scales by whole rows, so that they
add little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aqlm_kernels.errors import KernelError
from aqlm_kernels.matrices.balance import balanced, to_float16
from aqlm_kernels.matrices.bitpack import pack_bits, unpack_bits
from aqlm_kernels.matrices.entries import entries_of, levels_of, round_entries
from aqlm_kernels.search import choose_codes

if TYPE_CHECKING:
    from aqlm_kernels.linear import AdditiveLinear

MOST_SCORES = 2**28
"""Entries times groups that `nearest` compares at a time: 1 GiB of float32."""


@dataclass(frozen=True, eq=False)
class AdditiveMatrix:
    """W[o, j*g + i] = scales[o] * sum_m codebooks[m, codes[o, j, m], i].

    Codes of any integer type are accepted and kept as uint8 where K <= 256, as int32 otherwise. The floating types of
    codebooks and scales are kept. On the meta device only shapes and types are checked. Codebooks are floats of any
    value here; `entry_bits`, 16 or 8, is what they are stored in.
    """

    codes: Tensor  # [out, in/g, M], integers in [0, K)
    codebooks: Tensor  # [M, K, g]; K is a power of two
    scales: Tensor  # [out]
    entry_bits: int = 16

    kind = "additive"
    learnable = ("codebooks", "scales")

    def __post_init__(self) -> None:
        _check(self.codes, self.codebooks, self.scales)
        if self.entry_bits not in (8, 16):
            raise KernelError(f"codebooks of {self.entry_bits} bits; choose 8 or 16")
        object.__setattr__(self, "codes", self.codes.to(code_dtype(self.codebook_size)))

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * self.group_size

    @property
    def num_codebooks(self) -> int:
        return self.codebooks.shape[0]

    @property
    def codebook_size(self) -> int:
        return self.codebooks.shape[1]

    @property
    def codebook_bits(self) -> int:
        return self.codebook_size.bit_length() - 1

    @property
    def group_size(self) -> int:
        return self.codebooks.shape[2]

    @property
    def scheme(self) -> str:
        return scheme(self.codebooks, self.entry_bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [out, in]; see the function `dequantize`."""
        return dequantize(self.codes, self.codebooks, self.scales, dtype)

    def rows(self, index: Tensor) -> AdditiveMatrix:
        """The matrix of these rows `[n]`; its codebooks are the same tensor."""
        return replace(self, codes=self.codes.index_select(0, index), scales=self.scales.index_select(0, index))

    def stored(self) -> AdditiveMatrix:
        """The matrix with codebooks and scales rounded to what is stored; infinite or NaN where out of range."""
        scales = self.scales.to(torch.float16).to(self.scales.dtype)
        return replace(self, codebooks=rounded_codebooks(self.codebooks, self.entry_bits), scales=scales)

    def balanced(self) -> AdditiveMatrix:
        """The same matrix with codebooks and scales in the range of float16 (balance.py)."""
        return balanced(self)

    def nearest(self, weight: Tensor, beam: int = 8) -> AdditiveMatrix:
        """The same tables with codes near to W `[out, in]`, for no group further than the present codes.

        Exact for one codebook; for more, pairs of codes are searched jointly with `beam` candidates (search.py).
        """
        scales = torch.where(self.scales == 0, 1.0, self.scales)[:, None]
        targets = (weight.to(self.codebooks.dtype) / scales).view(-1, self.group_size)  # [out * n, g]
        metric = torch.eye(self.group_size, dtype=targets.dtype, device=targets.device)
        rows = max(1, MOST_SCORES // self.codebook_size)
        parts = zip(targets.split(rows), self.codes.flatten(0, 1).split(rows), strict=True)
        codes = torch.cat([choose_codes(metric, goal, self.codebooks, present, beam) for goal, present in parts])
        return replace(self, codes=codes.view_as(self.codes))

    def module(self, bias: Tensor | None = None) -> AdditiveLinear:
        """The layer with compiled products."""
        from aqlm_kernels.linear import AdditiveLinear  # which needs this file

        return AdditiveLinear(self, bias)

    def bits(self) -> int:
        """Stored bits: codes at log2(K) bits each, codebooks at 16, or at 8 and their ranges at 16, scales at 16."""
        codes = self.codes.numel() * self.codebook_bits
        ranges = self.num_codebooks * self.group_size if self.entry_bits == 8 else 0
        return codes + self.entry_bits * self.codebooks.numel() + 16 * (ranges + self.scales.numel())

    def tensors(self) -> dict[str, Tensor]:
        """Everything to store; `from_tensors` is the inverse. `entry_bits` only where it is not 16."""
        bits = torch.tensor(self.entry_bits, dtype=torch.uint8, device=self.codes.device)
        tensors = {"codes": self.codes, "codebooks": self.codebooks, "scales": self.scales}
        return tensors if self.entry_bits == 16 else {**tensors, "entry_bits": bits}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> AdditiveMatrix:
        bits = int(tensors["entry_bits"]) if "entry_bits" in tensors else 16
        return cls(tensors["codes"], tensors["codebooks"], tensors["scales"], bits)

    def packed_tensors(self) -> dict[str, Tensor]:
        """All codes in their order in memory at log2(K) bits each, codebooks `[M, K, g]` and scales `[out]` in float16.

        Codebooks in 8 bits are int8 levels, and their ranges `[M, g]` are in float16.

        Raises KernelError where float16 cannot hold them, and where out * M codes have fewer than 8 bits: their bytes
        would not tell the number of groups.
        """
        if self.out_features * self.num_codebooks * self.codebook_bits < 8:
            raise KernelError(f"a matrix of {self.out_features} x {self.in_features} is too small for {self.scheme}")
        codebooks = {"codebooks": to_float16(self.codebooks, "codebooks")}
        if self.entry_bits == 8:
            levels, ranges = levels_of(self.codebooks)
            codebooks = {"codebooks": levels, "ranges": ranges}
        return {
            "codes": pack_bits(self.codes.flatten(), self.codebook_bits),
            **codebooks,
            "scales": to_float16(self.scales, "scales"),
        }

    @classmethod
    def from_packed(cls, tensors: Mapping[str, Tensor], word: str) -> AdditiveMatrix:
        """The matrix of `packed_tensors`; KernelError where they are not of the scheme of this word, such as 2x8g8."""
        stored, codebooks, scales = tensors["codes"], tensors["codebooks"], tensors["scales"]
        entry_bits = 8 if word.endswith("c8") else 16
        if entry_bits == 8:
            codebooks = entries_of(codebooks, tensors["ranges"])
        if codebooks.ndim != 3 or word != scheme(codebooks, entry_bits):
            raise KernelError(f"codebooks are {list(codebooks.shape)}, which are not those of the scheme {word}")
        num_codebooks, bits = codebooks.shape[0], codebooks.shape[1].bit_length() - 1
        column = max(1, scales.numel() * num_codebooks * bits)  # bits of the codes of one group of all rows
        groups = 8 * stored.numel() // column
        codes = unpack_bits(stored, bits, scales.numel() * groups * num_codebooks)
        return cls(codes.view(scales.numel(), groups, num_codebooks), codebooks, scales, entry_bits)


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """W [out, in], summed over m = 0, 1, ... and then scaled, in float32 (float64 if that is asked), rounded once.

    The specification of every compiled version, and differentiable in codebooks and scales on any device.
    """
    working = torch.promote_types(dtype, torch.float32)
    index = codes.long()  # [out, n, M]
    total = codebooks[0].to(working)[index[..., 0]]  # [out, n, g]
    for m in range(1, codebooks.shape[0]):
        total = total + codebooks[m].to(working)[index[..., m]]
    return (scales.to(working)[:, None] * total.flatten(1)).to(dtype)  # [out, n * g]


def code_dtype(codebook_size: int) -> torch.dtype:
    """The type codes are kept in."""
    return torch.uint8 if codebook_size <= 256 else torch.int32


def rounded_codebooks(codebooks: Tensor, entry_bits: int) -> Tensor:  # [M, K, g]
    """Codebooks rounded to what is stored of them, in their own type; infinite or NaN where out of range."""
    return round_entries(codebooks) if entry_bits == 8 else codebooks.to(torch.float16).to(codebooks.dtype)


def scheme(codebooks: Tensor, entry_bits: int = 16) -> str:  # [M, K, g]
    """The word of the scheme, such as 2x8g8, or 2x8g8c8 where codebooks are stored in 8 bits."""
    num_codebooks, codebook_size, group_size = codebooks.shape
    entries = "" if entry_bits == 16 else f"c{entry_bits}"
    return f"{num_codebooks}x{codebook_size.bit_length() - 1}g{group_size}{entries}"


def _check(codes: Tensor, codebooks: Tensor, scales: Tensor) -> None:
    shapes = f"codes {list(codes.shape)}, codebooks {list(codebooks.shape)}, scales {list(scales.shape)}"
    if codes.ndim != 3 or codebooks.ndim != 3 or scales.ndim != 1:
        raise KernelError(
            f"an additive matrix is codes [out, in/g, M], codebooks [M, K, g], scales [out]; got {shapes}"
        )
    if codes.shape[2] != codebooks.shape[0] or codes.shape[0] != scales.shape[0]:
        raise KernelError(f"the shapes of an additive matrix do not fit each other: {shapes}")
    if 0 in codes.shape or 0 in codebooks.shape:
        raise KernelError(f"an additive matrix is empty: {shapes}")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise KernelError(f"codes are {codes.dtype}; convert them to an integer type")
    if not (codebooks.is_floating_point() and scales.is_floating_point()):
        raise KernelError(f"codebooks are {codebooks.dtype}, scales {scales.dtype}; convert them to a floating type")
    if not codes.device == codebooks.device == scales.device:
        devices = f"codes on {codes.device}, codebooks on {codebooks.device}, scales on {scales.device}"
        raise KernelError(f"{devices}; move them to one device")
    _check_entries(codes, codebooks.shape[1])


def _check_entries(codes: Tensor, codebook_size: int) -> None:
    if codebook_size & (codebook_size - 1) or not 2 <= codebook_size <= 65536:
        raise KernelError(f"a codebook has {codebook_size} entries; it needs a power of two from 2 to 65536")
    if codes.is_meta or (codes.dtype == torch.uint8 and codebook_size >= 256):
        return  # no values yet; no byte can leave 256 entries
    low, high = (int(bound) for bound in torch.aminmax(codes.int() if codes.dtype == torch.uint16 else codes))
    if low < 0 or high >= codebook_size:
        raise KernelError(f"codes lie in [{low}, {high}], codebooks have entries 0 to {codebook_size - 1}")
