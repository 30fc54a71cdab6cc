"""Every backend over one list of cases: layout exactly, arithmetic within a bound, and the bound bites."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.kernel_cases import cases
from hypothesis import assume, given
from hypothesis import strategies as st

from aqlm_kernels import BACKENDS, AdditiveMatrix, KernelError, PackedMatrix, choose, matmul, reference
from aqlm_kernels.cpu import avx512

CPU = torch.device("cpu")
FLOAT32_BOUND = 1e-6  # relative RMS of y against float64: a few roundings of 2^-24
BOUNDS = {"cpu-avx512": 3e-4}  # of tables in 16 bits

pytestmark = pytest.mark.usefixtures("nan_filled_outputs")


@pytest.fixture(params=[backend.name for backend in BACKENDS if not backend.on_request])
def backend(request, case):
    _, matrix = case.integers()
    chosen = next(backend for backend in BACKENDS if backend.name == request.param)
    if chosen.refuses(PackedMatrix(matrix), CPU):
        pytest.skip("the backend refuses this scheme")
    return chosen.name


def relative_rms(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


def exact_product(x, matrix):
    return x.double() @ matrix.dequantize(torch.float64).T


def test_matmul_of_integers_equals_the_reference_bit_for_bit(case, backend):
    x, matrix = case.integers()
    y = matmul(x, PackedMatrix(matrix), backend)
    assert torch.equal(y, reference.matmul(x, PackedMatrix(matrix)))
    assert torch.equal(y.double(), exact_product(x, matrix))


def test_matmul_of_reals_is_near_float64_and_one_wrong_code_is_not(case, backend):
    if case.rows == 0:
        pytest.skip("no numbers to compare")
    x, matrix = case.reals()
    exact, bound = exact_product(x, matrix), BOUNDS.get(backend, FLOAT32_BOUND)
    assert relative_rms(matmul(x, PackedMatrix(matrix), backend), exact) < bound
    wrong = matrix.codes.clone()
    wrong[0, -1, -1] = (wrong[0, -1, -1].int() + 1) % matrix.codebook_size
    y = matmul(x, PackedMatrix(dataclasses.replace(matrix, codes=wrong)), backend)
    assert relative_rms(y, exact) > bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded_once(case, backend, dtype):
    x, matrix = case.reals()
    x, packed = x.to(dtype), PackedMatrix(matrix)
    y = matmul(x, packed, backend)
    assert torch.equal(y, matmul(x.float(), packed, backend).to(dtype))


@pytest.mark.parametrize("name", [backend.name for backend in BACKENDS if not backend.on_request])
@given(drawn=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_matmul_of_any_scheme_and_shape_equals_the_reference(name, drawn, dtype):
    chosen = next(backend for backend in BACKENDS if backend.name == name)
    if chosen.refuses(packed_with(256), CPU):
        pytest.skip("the backend refuses this machine")
    x, matrix = drawn.integers()
    x, packed = x.to(dtype), PackedMatrix(matrix)
    assume(chosen.refuses(packed, CPU) is None)
    assert torch.equal(matmul(x, packed, name), reference.matmul(x, packed))


def test_any_leading_axes_are_rows(case, backend):
    x, matrix = case.integers()
    packed = PackedMatrix(matrix)
    rows = matmul(x, packed, backend)
    assert torch.equal(matmul(x[None, :, None], packed, backend), rows[None, :, None])
    for row, y in zip(x, rows, strict=True):
        assert torch.equal(matmul(row, packed, backend), y)


def test_a_matmul_does_not_change_its_inputs(case, backend):
    x, matrix = case.reals()
    packed = PackedMatrix(matrix)
    before = [tensor.clone() for tensor in (x, matrix.codes, matrix.codebooks, matrix.scales)]
    matmul(x, packed, backend)
    after = [x, matrix.codes, matrix.codebooks, matrix.scales]
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(before, after, strict=True))


def test_autocast_does_not_coarsen_a_matmul(case, backend):
    x, matrix = case.reals()
    packed = PackedMatrix(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        inside = matmul(x, packed, backend)
    assert torch.equal(inside, matmul(x, packed, backend))


def packed_with(codebook_size):
    codes = torch.zeros(3, 4, 1, dtype=torch.long)
    return PackedMatrix(AdditiveMatrix(codes, torch.zeros(1, codebook_size, 8), torch.ones(3)))


def test_the_first_backend_that_can_is_chosen():
    assert choose(packed_with(256), CPU).name == ("cpu-avx512" if avx512.HAS_VBMI else "cpu-lut")
    assert choose(packed_with(512), CPU).name == "cpu-gather"
    assert choose(packed_with(256), torch.device("meta")).name == "reference"


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_named_backend_is_obeyed(backend):
    if backend.refuses(packed_with(256), CPU):
        pytest.skip("the backend refuses this machine")
    assert choose(packed_with(256), CPU, backend.name) is backend


def test_a_named_backend_that_cannot_raises_its_reason():
    with pytest.raises(KernelError, match="cpu-lut needs codebooks of at most 256 entries, these have 512"):
        choose(packed_with(512), CPU, "cpu-lut")
    with pytest.raises(KernelError, match="cpu-gather runs on the CPU, x is on meta"):
        choose(packed_with(256), torch.device("meta"), "cpu-gather")
    with pytest.raises(
        KernelError,
        match="no backend cuda; choose one of cpu-avx512, cpu-avx512-8bit, cpu-lut, cpu-gather, ",
    ):
        choose(packed_with(256), CPU, "cuda")


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(1, 31), r"x is \[1, 31\]; its last axis must be the matrix's 32 inputs"),
        (torch.zeros(1, 32).double(), "x is torch.float64; convert it"),
        (torch.zeros(1, 32, device="meta"), "x is on meta, the matrix on cpu"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(x, reason):
    with pytest.raises(KernelError, match=reason):
        matmul(x, packed_with(256))
