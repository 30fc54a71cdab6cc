"""The recipe of AQLM's authors, to be compared with: its parts do what the paper says, and ours beats it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from aqlm_cli.quantization.methods import aqlm, aqlm_original
from aqlm_cli.quantization.solvers.code_search import code_search
from aqlm_cli.quantization.solvers.codebooks import Approximation
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec.methods.aqlm import AqlmSettings
from aqlm_cli.spec.schemes import AdditiveScheme
from aqlm_kernels import AdditiveMatrix

ROWS, FEATURES = 32, 64
SCHEME = AdditiveScheme(2, 4, 4)
SETTINGS = AqlmSettings(algorithm="reference")
SEARCH = code_search(torch.device("cpu"))


def layer(seed: int = 0) -> tuple[Tensor, LayerStatistics]:
    """A random weight, and inputs that are correlated in no order and of different sizes."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.randperm(FEATURES, generator=draw)
    sizes = torch.exp(0.7 * torch.randn(FEATURES, generator=draw))
    moment = 0.9 ** (places[:, None] - places).abs() * sizes[:, None] * sizes
    return torch.randn(ROWS, FEATURES, generator=draw), LayerStatistics(moment, 1000)


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def row_losses(weight: Tensor, statistics: LayerStatistics, found: Approximation) -> Tensor:  # [out] float64
    entries = [found.codebooks[m].double()[found.codes[:, :, m]] for m in range(2)]
    difference = weight - found.scales.double()[:, None] * torch.stack(entries).sum(0).flatten(1)
    return (difference @ statistics.second_moment.double() * difference).sum(1)


def test_it_starts_with_row_norms_and_plain_kmeans() -> None:
    """One row is a thousand times larger than the others: normalised, it counts as any other."""
    weight, _ = layer()
    start = aqlm_original._start(weight, SCHEME, draw(), SETTINGS, SEARCH)
    torch.testing.assert_close(start.scales, weight.norm(dim=1))
    weight[0] *= 1000
    again = aqlm_original._start(weight, SCHEME, draw(), SETTINGS, SEARCH)
    torch.testing.assert_close(again.codebooks, start.codebooks, rtol=1e-3, atol=1e-4)


def test_training_is_amsgrad_adam_on_the_loss_of_the_paper() -> None:
    """Against torch's own gradients of tr((W^ - W) H (W^ - W)^T) / out."""
    weight, statistics = layer()
    start = aqlm_original._start(weight, SCHEME, draw(), SETTINGS, SEARCH)
    settings = AqlmSettings(algorithm="reference", adam_steps=20, adam_learning_rate=1e-3)
    trained = aqlm_original._train(weight, statistics.second_moment, start, settings, SEARCH)
    codebooks, scales = start.codebooks.clone().requires_grad_(), start.scales.clone().requires_grad_()
    optimizer = torch.optim.Adam([codebooks, scales], lr=1e-3, betas=(0.0, 0.95), amsgrad=True)
    for _ in range(20):
        optimizer.zero_grad()
        entries = torch.stack([codebooks[m][start.codes[:, :, m]] for m in range(2)])
        approximation = scales[:, None] * entries.sum(0).flatten(1)
        difference = approximation - weight
        ((difference @ statistics.second_moment * difference).sum() / ROWS).backward()
        optimizer.step()
    torch.testing.assert_close(trained.codebooks, codebooks.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(trained.scales, scales.detach(), rtol=0, atol=1e-4)
    assert (trained.codebooks - start.codebooks).abs().max() > 1e-2
    assert torch.equal(trained.codes, start.codes)


def test_training_changes_nothing_it_reads() -> None:
    weight, statistics = layer()
    start = aqlm_original._start(weight, SCHEME, draw(), SETTINGS, SEARCH)
    before = start.codebooks.clone(), start.scales.clone()
    aqlm_original._train(weight, statistics.second_moment, start, SETTINGS, SEARCH)
    assert torch.equal(start.codebooks, before[0]) and torch.equal(start.scales, before[1])


def test_a_greedy_pass_never_raises_the_loss_of_a_row() -> None:
    weight, statistics = layer()
    present = aqlm_original._start(weight, SCHEME, draw(), SETTINGS, SEARCH)
    rng = draw()
    losses = [row_losses(weight, statistics, present)]
    for _ in range(3):
        present = aqlm_original._greedy_pass(weight, statistics.second_moment, present, rng, SEARCH)
        losses.append(row_losses(weight, statistics, present))
    for before, after in pairwise(losses):
        assert (after <= before * (1 + 1e-4)).all()
    assert losses[1].sum() < 0.6 * losses[0].sum()


def test_a_greedy_pass_takes_the_best_entry_for_the_last_code_it_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All other codes held: no other entry of that group and codebook lowers any row's loss."""
    weight, statistics = layer()
    start = aqlm_original._start(weight, SCHEME, draw(), SETTINGS, SEARCH)
    orders: list[Tensor] = []
    randperm = torch.randperm

    def noted(count: int, generator: torch.Generator) -> Tensor:
        orders.append(randperm(count, generator=generator))
        return orders[-1]

    monkeypatch.setattr(torch, "randperm", noted)
    found = aqlm_original._greedy_pass(weight, statistics.second_moment, start, draw(), SEARCH)
    group, codebook = int(orders[0][-1]), int(orders[-1][-1])
    assert sorted(orders[0].tolist()) == list(range(FEATURES // 4)) and len(orders) == 1 + FEATURES // 4
    losses = row_losses(weight, statistics, found)
    for entry in range(16):
        codes = found.codes.clone()
        codes[:, group, codebook] = entry
        other = row_losses(weight, statistics, Approximation(codes, found.codebooks, found.scales))
        assert (losses <= other * (1 + 1e-5)).all()


@pytest.mark.parametrize("tolerance", [0.5, 0.001])
def test_it_ends_at_the_first_pass_that_gains_too_little(tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = layer()
    measure, losses = aqlm_original._loss, []

    def noted(*arguments: object) -> float:
        losses.append(measure(*arguments))  # type: ignore[arg-type]
        return losses[-1]

    monkeypatch.setattr(aqlm_original, "_loss", noted)
    settings = AqlmSettings(algorithm="reference", tolerance=tolerance)
    found = aqlm.quantize(weight, statistics, SCHEME, draw(), settings)
    gains = [1 - after / before for before, after in pairwise(losses)]
    assert all(gain > tolerance for gain in gains[:-1]) and gains[-1] <= tolerance
    assert losses[-1] == pytest.approx(float(row_losses(weight, statistics, found_as(found)).mean()), rel=1e-4)


def test_a_loss_that_is_no_number_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = layer()
    losses = iter([1.0, 0.5, torch.nan])
    monkeypatch.setattr(aqlm_original, "_loss", lambda *_: next(losses))  # StopIteration where a fourth is asked
    aqlm.quantize(weight, statistics, SCHEME, draw(), AqlmSettings(algorithm="reference", adam_steps=1))


def found_as(matrix: AdditiveMatrix) -> Approximation:
    return Approximation(matrix.codes.long(), matrix.codebooks, matrix.scales)


@pytest.mark.parametrize("seed", [0, 1])
def test_our_recipe_leaves_far_less_error(seed: int) -> None:
    weight, statistics = layer(seed)
    errors = [
        statistics.relative_error(weight, aqlm.quantize(weight, statistics, SCHEME, draw(), settings).dequantize())
        for settings in (AqlmSettings(), SETTINGS)
    ]
    assert errors[0] < 0.7 * errors[1]
    assert errors[1] < 0.05


def test_the_generator_alone_decides() -> None:
    weight, statistics = layer()
    settings = AqlmSettings(algorithm="reference", adam_steps=5)
    first, again = (aqlm.quantize(weight, statistics, SCHEME, draw(), settings) for _ in range(2))
    other = aqlm.quantize(weight, statistics, SCHEME, torch.Generator().manual_seed(1), settings)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in first.tensors().items())
    assert not torch.equal(first.codes, other.codes)
