"""Products by look-ups in registers: against what rounded tables give, and on machines without the instructions."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import pytest
import torch
from helpers.kernel_cases import CASES

from aqlm_kernels import PackedMatrix, reference
from aqlm_kernels.cpu import avx512, lut
from aqlm_kernels.packed import blocks_of

SMALL = [case for case in CASES if case.codebook_bits <= 8]
GREATEST = {lut.by_lookup: 65535, lut.by_byte_lookup: 255}

pytestmark = pytest.mark.usefixtures("nan_filled_outputs")


def by_rounded_tables(x, matrix, greatest):
    """The specification: y [rows, out] in float64 from tables whose entries are integers up to `greatest`."""
    groups = x.double().reshape(len(x), -1, matrix.group_size)  # [rows, n, g]
    tables = torch.einsum("rji,mki->rjmk", groups, matrix.codebooks.double()).flatten(1, 2)  # [rows, n * M, K]
    codes = matrix.codes.flatten(1).long()  # [out, n * M]
    y = torch.zeros(len(x), matrix.out_features, dtype=torch.float64)
    _, size = blocks_of(codes.shape[1])
    for start in range(0, codes.shape[1], size):
        block = tables[:, start : start + size]
        least = block.amin(2, keepdim=True)
        unit = (block - least).amax((1, 2), keepdim=True) / greatest
        if greatest == 65535:
            unit = torch.exp2(unit.log2().ceil())
        levels = torch.where(unit > 0, (block - least) / unit, 0.0).round()
        for t in range(block.shape[1]):
            y += (unit[:, 0] * levels[:, t] + least[:, t])[:, codes[:, start + t]]
    return y * matrix.scales.double()


@pytest.fixture(params=SMALL, ids=str)
def small(request):
    return request.param


@pytest.mark.parametrize("product", GREATEST, ids=lambda product: product.__name__)
def test_it_is_the_matmul_by_rounded_tables(small, product):
    if small.rows == 0:
        pytest.skip("no numbers to compare")
    x, matrix = small.reals()
    expected, exact = (
        by_rounded_tables(x, matrix, GREATEST[product]),
        reference.matmul(x.double(), PackedMatrix(matrix)),
    )
    # Where an entry lies near the middle of two levels, float32 may round it the other way.
    assert (product(x, PackedMatrix(matrix)) - expected).norm() < 0.5 * (expected - exact).norm()


@pytest.mark.parametrize("product", [lut.by_lookup, lut.by_float_lookup])
def test_all_but_bytes_are_exact_where_all_is_integer(small, product):
    x, matrix = small.integers()
    assert torch.equal(product(x, PackedMatrix(matrix)), reference.matmul(x, PackedMatrix(matrix)))


def test_floats_are_not_rounded(small):
    if small.rows == 0:
        pytest.skip("no numbers to compare")
    x, matrix = small.reals()
    exact = reference.matmul(x.double(), PackedMatrix(matrix))
    assert (lut.by_float_lookup(x, PackedMatrix(matrix)) - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("product", GREATEST, ids=lambda product: product.__name__)
def test_an_input_of_zeros_gives_zeros(small, product):
    x, matrix = small.reals()
    assert not product(torch.zeros_like(x), PackedMatrix(matrix)).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("product", GREATEST, ids=lambda product: product.__name__)
def test_values_that_are_not_finite_spoil_their_own_row_only(product, value):
    x, matrix = CASES[3].reals()
    clean = product(x, PackedMatrix(matrix))
    x[2, 7] = value
    spoilt = product(x, PackedMatrix(matrix))
    assert spoilt[2].isnan().all()
    assert torch.equal(spoilt[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.slow
@pytest.mark.skipif(not avx512.HAS_VBMI, reason="the tests above have run without the instructions")
@pytest.mark.parametrize(("name", "features"), [("generic", ""), ("haswell", "+avx,+avx2,+fma,+f16c")])
def test_it_does_the_same_without_the_instructions(name, features, tmp_path):
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
        "NUMBA_NUM_THREADS": str(numba.config.NUMBA_NUM_THREADS),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "skipped" in done.stdout  # this test itself, for there it has no other machine to play
