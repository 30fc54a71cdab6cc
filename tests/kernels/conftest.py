"""The awkward cases of kernel_cases.py, one test each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.kernel_cases import CASES, Case


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    selected: Case = request.param
    return selected


@pytest.fixture
def nan_filled_outputs() -> Iterator[None]:
    """`torch.empty` gives NaN, so that an output which nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)
