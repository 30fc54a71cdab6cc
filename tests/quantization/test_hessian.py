from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.solvers.hessian import (
    TOKENS_PER_FEATURE,
    LayerStatistics,
    SecondMoment,
    block_ldl,
    damped,
    diagonal_blocks,
    most_active_first,
)

FEATURES = 48


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def second_moment(features: int = FEATURES, tokens: int = 100) -> Tensor:
    """Of correlated features whose sizes differ; singular where there are fewer tokens than features."""
    x = random(tokens, features) @ random(features, features, seed=1)
    return x.T @ x / tokens


AWKWARD = {
    "full": second_moment(),
    "of fewer tokens than features": second_moment(tokens=5),
    "of one token": second_moment(tokens=1),
    "with dead inputs": torch.block_diag(second_moment(32), torch.zeros(16, 16)),
    "zero": torch.zeros(FEATURES, FEATURES),
    "large": 1e12 * second_moment(),
    "small": 1e-12 * second_moment(),
}

# ------------------------------------------------------------------------------------------------------- the block LDL


@pytest.mark.parametrize("group", [1, 4, 8, 16, FEATURES])
@pytest.mark.parametrize("name", AWKWARD)
def test_the_blocks_add_up_to_the_whole_quadratic_form(name: str, group: int) -> None:
    """r H r = sum_j (r_j + D_j^-1 b_j) D_j (r_j + D_j^-1 b_j), where b_j is what earlier errors add to the state."""
    feedback = block_ldl(AWKWARD[name], group, 0.01)
    metric, coupling = feedback.metric.double(), feedback.coupling.double()
    r = random(20, FEATURES).double()
    pulls = (r @ coupling).view(20, -1, group)
    shifted = r.view(20, -1, group) + torch.linalg.solve(metric, pulls[..., None])[..., 0]
    total = torch.einsum("ijx,jxy,ijy->i", shifted, metric, shifted)
    whole = damped(AWKWARD[name].double(), 0.01)
    torch.testing.assert_close(total, (r @ whole * r).sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("group", [4, 16])
def test_a_group_pays_what_remains_when_all_later_ones_make_up_for_it(group: int) -> None:
    """D_j is the Schur complement: the inverse of the corner of the inverse of what has not been decided."""
    feedback, whole = block_ldl(second_moment(), group, 0.01), damped(second_moment().double(), 0.01)
    for j, metric in enumerate(feedback.metric):
        remaining = whole[j * group :, j * group :]
        expected = remaining.inverse()[:group, :group].inverse()
        torch.testing.assert_close(metric.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.diagonal().mean()))


@pytest.mark.parametrize("name", AWKWARD)
def test_errors_pull_at_later_groups_only(name: str) -> None:
    feedback = block_ldl(AWKWARD[name], 8, 0.01)
    same_or_earlier = torch.arange(FEATURES)[:, None] // 8 >= torch.arange(FEATURES) // 8
    assert feedback.forward
    assert (feedback.coupling[same_or_earlier] == 0).all()
    assert name == "zero" or (feedback.coupling[~same_or_earlier] != 0).any()


@pytest.mark.parametrize("name", AWKWARD)
def test_every_metric_is_positive_definite(name: str) -> None:
    feedback = block_ldl(AWKWARD[name], 8, 1e-4)
    assert feedback.coupling.isfinite().all()
    assert (torch.linalg.eigvalsh(feedback.metric.double()) > 0).all()


def test_a_slightly_indefinite_moment_is_damped_until_it_can_be_factorised() -> None:
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.03]))
    assert (torch.linalg.eigvalsh(block_ldl(indefinite, 2, 1e-4).metric) > 0).all()


def test_a_moment_of_nan_is_refused() -> None:
    with pytest.raises(QuantizationError, match="cannot be factorised; the activations hold NaN"):
        block_ldl(torch.full((8, 8), torch.nan), 4, 0.01)


# ------------------------------------------------------------------------------------------------------------- metrics


def test_damping_adds_a_share_of_the_mean_diagonal_and_makes_nothing_of_zero() -> None:
    moment = second_moment()
    before = moment.clone()
    expected = moment.double() + 0.25 * moment.double().diagonal().mean() * torch.eye(FEATURES)
    torch.testing.assert_close(damped(moment, 0.25).double(), expected)
    assert torch.equal(moment, before)
    assert torch.equal(damped(torch.zeros(4, 4), 0.25), torch.eye(4))


def test_diagonal_blocks_are_the_corners_in_order() -> None:
    matrix = second_moment()
    corners = torch.stack([matrix[j : j + 8, j : j + 8] for j in range(0, FEATURES, 8)])
    assert torch.equal(diagonal_blocks(matrix, 8), corners)


def test_groups_come_by_falling_energy_and_equal_ones_stay_in_order() -> None:
    energies = torch.tensor([1.0, 1, 4, 0, 2, 0, 0, 2, 3, 2])  # of five groups: 2, 4, 2, 2, 5
    assert most_active_first(torch.diag(energies), 2).tolist() == [4, 1, 0, 2, 3]


# ------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_moment_is_that_of_float64_under_autocast_too(dtype: torch.dtype, autocast: bool) -> None:
    """Wide enough for the library that multiplies large matrices of bfloat16 in bfloat16."""
    batches = [random(tokens, 128, seed=tokens).to(dtype) for tokens in (300, 1, 30)]
    moment = SecondMoment(128, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for batch in batches:
            moment.add(batch)
        rounded = batches[0].T @ batches[0]
    exact = torch.cat(batches).double()
    exact = exact.T @ exact / 331
    found = moment.statistics()
    assert found.tokens == 331 and found.second_moment.dtype == torch.float32
    assert (found.second_moment - exact).norm() < 2e-6 * exact.norm()
    first = batches[0].double().T @ batches[0].double()
    assert not autocast or (rounded - first).norm() > 1e-4 * first.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_counts_as_often_as_its_weight_says(dtype: torch.dtype) -> None:
    x, weights = random(300, 16).to(dtype), random(300).exp()
    moment = SecondMoment(16, torch.device("cpu"))
    moment.add(x, weights)
    moment.add(x)
    found, exact = moment.statistics(), x.double()
    wanted = (exact * (1 + weights.double())[:, None]).T @ exact / 600
    assert found.tokens == 600
    assert (found.second_moment - wanted).norm() < 1e-6 * wanted.norm()


def test_the_precision_of_other_products_is_left_as_it_was() -> None:
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, products.fp32_precision = products.fp32_precision, "ieee"
    try:
        SecondMoment(8, torch.device("cpu")).add(random(4, 8).bfloat16())
        assert products.fp32_precision == "ieee"
    finally:
        products.fp32_precision = before


def test_small_entries_survive_many_batches_beside_large_ones() -> None:
    moment = SecondMoment(2, torch.device("cpu"))
    moment.add(torch.tensor([[2.0**13, 2.0**13]]))
    for _ in range(1000):
        moment.add(torch.ones(1, 2))
    found = moment.statistics().second_moment.double() * 1001
    torch.testing.assert_close(found, torch.full((2, 2), 2.0**26 + 1000, dtype=torch.float64), rtol=1e-7, atol=0)
    assert torch.tensor(2.0**26) + 1 == 2.0**26  # what a float32 sum would have done a thousand times


def test_inputs_that_overflow_show_in_the_moment() -> None:
    moment = SecondMoment(2, torch.device("cpu"))
    moment.add(torch.tensor([[1e30, 1.0]]))
    assert not moment.statistics().second_moment.isfinite().all()


# ----------------------------------------------------------------------------------------------------- relative errors


def test_the_relative_error_is_that_of_the_outputs() -> None:
    x, weight, approximation = random(100, FEATURES), random(7, FEATURES, seed=2), random(7, FEATURES, seed=3)
    statistics = LayerStatistics(x.T @ x / 100, 100)
    outputs, wrong = x.double() @ weight.double().T, x.double() @ approximation.double().T
    expected = float((outputs - wrong).square().sum() / outputs.square().sum())
    assert statistics.relative_error(weight, approximation) == pytest.approx(expected, rel=1e-5)
    assert statistics.relative_error(weight, weight) == 0
    assert statistics.relative_error(weight, torch.zeros_like(weight)) == pytest.approx(1, rel=1e-6)


def test_where_no_input_reaches_the_weight_there_is_no_error() -> None:
    statistics = LayerStatistics(torch.zeros(FEATURES, FEATURES), 100)
    assert statistics.relative_error(random(3, FEATURES), torch.zeros(3, FEATURES)) == 0


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_relative_error_does_not_depend_on_the_size_of_the_weights(size: float) -> None:
    weight, moment = random(5, FEATURES), torch.eye(FEATURES)
    approximation = weight + 0.1 * random(5, FEATURES, seed=1)
    expected = LayerStatistics(moment, 1).relative_error(weight, approximation)
    found = LayerStatistics(moment, 1).relative_error(size * weight, size * approximation)
    assert found == pytest.approx(expected, rel=1e-4) and found > 0.001


# ------------------------------------------------------------------------------------------- experts with few tokens


def collected(x: Tensor) -> SecondMoment:
    moment = SecondMoment(x.shape[1], x.device)
    moment.add(x)
    return moment


def common_of(*parts: Tensor) -> SecondMoment:
    moment = SecondMoment(parts[0].shape[1], parts[0].device)
    for part in parts:
        moment.merge(collected(part))
    return moment


@pytest.mark.parametrize("tokens", [0, 1, 7, 31])
def test_few_tokens_are_completed_with_the_mean_of_all_experts(tokens: int) -> None:
    few, many = random(tokens, 8), 3 * random(200, 8, seed=1)
    found = collected(few).statistics(common_of(few, many))
    everyone = torch.cat([few, many])
    mean, share = everyone.T @ everyone / len(everyone), tokens / (TOKENS_PER_FEATURE * 8)
    wanted = share * few.T @ few / max(tokens, 1) + (1 - share) * mean
    torch.testing.assert_close(found.second_moment, wanted, rtol=1e-5, atol=1e-5)
    assert found.tokens == tokens


def test_enough_tokens_are_left_alone() -> None:
    enough, others = random(TOKENS_PER_FEATURE * 8, 8), 100 * random(50, 8, seed=1)
    found = collected(enough).statistics(common_of(enough, others))
    assert torch.equal(found.second_moment, collected(enough).statistics().second_moment)


def test_completed_moments_of_few_tokens_are_not_singular() -> None:
    few, many = random(2, 8), random(200, 8, seed=1)
    alone = torch.linalg.eigvalsh(collected(few).statistics().second_moment)
    together = torch.linalg.eigvalsh(collected(few).statistics(common_of(few, many)).second_moment)
    assert float(alone[0]) < 1e-5 < 0.1 < float(together[0])
