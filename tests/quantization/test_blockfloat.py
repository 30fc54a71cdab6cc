"""Block floats: the numbers that a form has, and rounding to them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError, UsageError
from aqlm_cli.evaluation.formats import block_float
from aqlm_cli.quantization.methods.blockfloat import quantize
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec.formats import BlockFloat
from aqlm_cli.spec.schemes import BlockFloatScheme, parse_scheme
from aqlm_kernels import BlockFloatMatrix
from aqlm_kernels.matrices.blockfloat import magnitudes

STATISTICS = LayerStatistics(torch.full((64, 64), torch.nan), 1)  # not to be looked at
WORDS = ["bfp6g16", "bfp2g32", "bfp8g64", "bmf6e2g16", "bmf4e1g16", "bmf8e4g16", "bl5g16", "bl2g16", "bl8g64"]


def rounded(word: str, weight: Tensor) -> BlockFloatMatrix:
    scheme = parse_scheme(word)
    assert isinstance(scheme, BlockFloatScheme)
    return quantize(weight, STATISTICS, scheme, torch.Generator(), None)


def random(rows: int = 12) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))


def numbers(word: str, largest: float) -> list[float]:
    """All sizes that a number may have in a block whose largest weight has this size, by the published formulas."""
    scheme = parse_scheme(word)
    assert isinstance(scheme, BlockFloatScheme)
    width = scheme.width
    if scheme.form_name == "bfp":
        return [2.0 ** math.ceil(math.log2(largest)) * k / 2 ** (width - 1) for k in range(2 ** (width - 1))]
    if scheme.form_name == "bl":
        beta = 2 ** (width - 1) - 1 - math.ceil(math.log2(largest))
        return [2.0**k for k in range(-beta, 2 ** (width - 1) - beta)]
    bits = width - 1 - scheme.own
    bias = 2**scheme.own - 1 - math.floor(math.log2(largest))
    mantissas = range(2**bits)
    subnormal = [m / 2**bits * 2.0 ** (1 - bias) for m in mantissas]
    return subnormal + [(1 + m / 2**bits) * 2.0 ** (f - bias) for f in range(1, 2**scheme.own) for m in mantissas]


@pytest.mark.parametrize("word", WORDS)
def test_every_weight_goes_to_a_number_of_its_block_and_to_the_nearest_by_size_or_logarithm(word: str) -> None:
    weight, matrix = random(), rounded(word, random())
    found, g = matrix.dequantize(), matrix.group_size
    for o in range(len(weight)):
        for j in range(64 // g):
            block, values = weight[o, j * g : (j + 1) * g], found[o, j * g : (j + 1) * g]
            sizes = numbers(word, float(block.abs().max()))
            for w, v in zip(block.tolist(), values.tolist(), strict=True):
                assert min(abs(abs(v) - size) for size in sizes) <= 1e-6 * abs(v), "it is one of them"
                assert v == 0 or (v > 0) == (w > 0)
                scale = math.log2 if word.startswith("bl") else float
                distance = min(abs(scale(abs(w)) - scale(size)) for size in sizes)
                assert abs(scale(abs(w)) - scale(abs(v))) <= distance + 1e-5 * (1 + abs(scale(abs(w))))


@pytest.mark.parametrize("word", ["bfp6g16", "bfp4g32", "bfp8g64"])
def test_it_is_the_block_float_that_activations_are_rounded_to(word: str) -> None:
    assert torch.equal(rounded(word, random()).dequantize(), block_float(random(), BlockFloat.parse(word)))


@pytest.mark.parametrize("word", WORDS)
def test_what_the_form_has_comes_back_bit_for_bit(word: str) -> None:
    """With the exponents that it has: where the largest became a power of two, new ones could be lower by one."""
    matrix = rounded(word, random())
    once = matrix.dequantize()
    assert torch.equal(matrix.nearest(once).dequantize(), once)
    largest = torch.tensor([[0.75 if i % 16 == 0 else (i % 47 - 23) / 32 for i in range(64)]])
    if word == "bfp6g16":
        assert torch.equal(rounded(word, largest).dequantize(), largest)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("power", [-60, -3, 5, 60])
def test_a_power_of_two_passes_through(word: str, power: int) -> None:
    scaled = rounded(word, torch.ldexp(random(), torch.tensor(power))).dequantize()
    assert torch.equal(scaled, torch.ldexp(rounded(word, random()).dequantize(), torch.tensor(power)))


@pytest.mark.parametrize("word", WORDS)
def test_blocks_of_zeros_stay_zero_and_so_do_the_smallest_weights_finite(word: str) -> None:
    weight = random()
    weight[3], weight[5] = 0, 1e-44
    found = rounded(word, weight).dequantize()
    assert (found[3] == 0).all() and found.isfinite().all() and float(found[5].abs().max()) < 1e-30


def test_a_bit_more_of_a_mantissa_quarters_the_error() -> None:
    errors = [
        float((rounded(f"bfp{width}g16", random(200)).dequantize() - random(200)).square().mean())
        for width in (4, 5, 6, 7)
    ]
    assert all(3.5 < coarse / fine < 4.5 for coarse, fine in pairwise(errors))


def test_schemes_count_the_forms_as_matrices_do() -> None:
    for word in WORDS:
        stored, layouts = rounded(word, random()).tensors(), parse_scheme(word).stored_layouts(12, 64)
        assert stored.keys() == layouts.keys()
        for name in ("form", "width", "own"):
            assert int(stored[name]) + 1 == layouts[name].values


@pytest.mark.parametrize(("form", "width", "own"), [("bfp", 4, 0), ("bmf", 6, 2), ("bmf", 3, 1), ("bl", 5, 0)])
def test_magnitudes_rise(form: str, width: int, own: int) -> None:
    table = magnitudes(form, width, own)
    assert len(table) == 2 ** (width - 1) and (table.diff() > 0).all()
    assert (table[0] == 0) == (form != "bl")


@pytest.mark.parametrize("word", ["bfp1g16", "bfp9g16", "bmf6e5g16", "bmf6e0g16", "bl6g0", "bfp6"])
def test_words_of_no_form_are_refused(word: str) -> None:
    with pytest.raises(UsageError):
        parse_scheme(word)


def test_a_weight_that_is_no_number_is_refused() -> None:
    weight = random()
    weight[3, 7] = torch.inf
    with pytest.raises(QuantizationError, match="the weight holds NaN or infinite values"):
        rounded("bfp6g16", weight)
