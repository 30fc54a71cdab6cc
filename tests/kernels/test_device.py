"""The products on a GPU, compiled for it; with `--device cpu` the same through the backends of the CPU.

Skipped where there is no GPU: `make gpu-check` runs these tests on a machine that has one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.kernel_cases import Case
from torch import Tensor

from aqlm_kernels import AdditiveLinear, AdditiveMatrix, PackedMatrix, choose, matmul, reference
from aqlm_kernels import search as plain

pytestmark = pytest.mark.usefixtures("nan_filled_where_it_may")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUNDS = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Of the relative RMS error; on the CPU tables of 16 bits are what float32 is rounded to."""


@pytest.fixture
def nan_filled_where_it_may() -> Iterator[None]:
    """`torch.empty` gives NaN, and what torch cannot repeat to the bit on a GPU warns alone."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    chosen = torch.device(request.config.getoption("--device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here")
    return chosen


def moved(matrix: AdditiveMatrix, device: torch.device) -> AdditiveMatrix:
    return AdditiveMatrix(matrix.codes.to(device), matrix.codebooks.to(device), matrix.scales.to(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_integers_equal_the_reference(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    x, matrix = case.integers()
    expected = reference.matmul(x.to(dtype), PackedMatrix(matrix))
    packed = PackedMatrix(moved(matrix, device))
    backend = "cpu-gather" if device.type == "cpu" else None  # by tables a product is nearly exact
    found = matmul(x.to(dtype).to(device), packed, backend)
    assert choose(packed, device).name != "reference"
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_reals_are_near_float64_and_one_wrong_code_shows(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    if case.rows == 0:
        pytest.skip("no numbers to compare")
    x, matrix = case.reals()
    exact = x.double() @ matrix.dequantize(torch.float64).T
    found = matmul(x.to(dtype).to(device), PackedMatrix(moved(matrix, device))).cpu().double()
    assert error(found, exact) < BOUNDS[dtype]
    codes = matrix.codes.clone()
    codes[0, 0, 0] = (codes[0, 0, 0].long() + 1) % matrix.codebooks.shape[1]
    wrong = AdditiveMatrix(codes, matrix.codebooks, matrix.scales)
    row = matmul(x.to(dtype).to(device), PackedMatrix(moved(wrong, device))).cpu().double()
    assert not torch.equal(row[:, 0], found[:, 0])
    assert torch.equal(row[:, 1:], found[:, 1:])


def test_many_rows_and_all_gradients_are_near_float64(case: Case, device: torch.device) -> None:
    x, matrix = case.reals()
    x = x.repeat(40, 1)[:256]
    if len(x) == 0:
        pytest.skip("no numbers to compare")
    dy = torch.randn(len(x), case.out_features, generator=torch.Generator().manual_seed(2))
    found, wanted = (gradients(matrix, x, dy, *place) for place in ((device, torch.float32), ("cpu", torch.float64)))
    for name, exact in wanted.items():
        assert error(found[name], exact) < 1e-4, name


def gradients(
    matrix: AdditiveMatrix, x: Tensor, dy: Tensor, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """y, dx, dC and ds of a layer."""
    codebooks, scales = matrix.codebooks.to(dtype).to(device), matrix.scales.to(dtype).to(device)
    layer = AdditiveLinear(AdditiveMatrix(matrix.codes.to(device), codebooks, scales))
    inputs = x.detach().clone().to(dtype).to(device).requires_grad_()
    y = layer(inputs)
    y.backward(dy.to(dtype).to(device))
    assert inputs.grad is not None and layer.codebooks.grad is not None and layer.scales.grad is not None
    parts = {"y": y.detach(), "dx": inputs.grad, "dC": layer.codebooks.grad, "ds": layer.scales.grad}
    return {name: tensor.cpu().double() for name, tensor in parts.items()}


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape and found.isfinite().all()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))


def test_the_search_for_codes_finds_the_same_as_on_the_cpu(device: torch.device) -> None:
    """Ties aside: the objective that it ends at is the same."""
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=draw)
    metric, codebooks = root.T @ root, torch.randn(2, 16, 8, generator=draw)
    targets = torch.randn(100, 8, generator=draw) @ metric
    codes = torch.randint(16, (100, 2), generator=draw)
    found = plain.choose_codes(*(tensor.to(device) for tensor in (metric, targets, codebooks, codes)), 8).cpu()
    expected = plain.choose_codes(metric, targets, codebooks, codes, 8)

    def objective(chosen: Tensor) -> Tensor:
        entries = sum(codebooks[m][chosen[:, m]] for m in range(2))
        return ((entries @ metric) * entries).sum(1) - 2 * (entries * targets).sum(1)

    torch.testing.assert_close(objective(found), objective(expected), rtol=1e-4, atol=1e-4)
    assert not torch.equal(expected, codes)
