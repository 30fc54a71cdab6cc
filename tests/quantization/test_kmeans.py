from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aqlm_cli.quantization.solvers.code_search import code_search
from aqlm_cli.quantization.solvers.kmeans import residual_kmeans

SEARCH = code_search(torch.device("cpu"))
ROWS, GROUPS, GROUP = 40, 6, 4
LLOYD_ENDS = 100  # iterations: more than any case here needs until no vector moves any more


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = random(ROWS, GROUPS, GROUP)
EVEN_ROWS, EVEN_INPUTS = torch.ones(ROWS), torch.ones(GROUPS, GROUP)
ROW_WEIGHTS = random(ROWS, seed=1).exp()
IMPORTANCE = random(GROUPS, GROUP, seed=2).exp()


def kmeans(
    weights: Tensor = WEIGHTS,
    row_weights: Tensor = ROW_WEIGHTS,
    importance: Tensor = IMPORTANCE,
    num_codebooks: int = 2,
    entries: int = 8,
    iterations: int = LLOYD_ENDS,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return residual_kmeans(weights, row_weights, importance, num_codebooks, entries, iterations, SEARCH, draw)


def residuals(weights: Tensor, codes: Tensor, codebooks: Tensor) -> list[Tensor]:
    """What each codebook was given, and at the end what is left."""
    given = [weights]
    for m, codebook in enumerate(codebooks):
        given.append(given[-1] - codebook[codes[:, :, m]])
    return given


def weighted_error(left: Tensor, row_weights: Tensor = ROW_WEIGHTS, importance: Tensor = IMPORTANCE) -> float:
    return float((left.square() * importance * row_weights[:, None, None]).sum())


@pytest.mark.parametrize("iterations", [1, 3, LLOYD_ENDS])
def test_every_vector_has_the_entry_that_is_nearest_in_its_groups_metric(iterations: int) -> None:
    codes, codebooks = kmeans(iterations=iterations)
    for m, given in enumerate(residuals(WEIGHTS, codes, codebooks)[:-1]):
        squares = (given[:, :, None] - codebooks[m]).square().double()  # [out, n, K, g]
        distances = (squares * IMPORTANCE[:, None]).sum(3)
        chosen = distances.gather(2, codes[:, :, m, None])[..., 0]
        assert (chosen <= distances.min(2).values * (1 + 1e-4) + 1e-6).all()


def test_an_entry_is_the_weighted_mean_of_the_vectors_that_have_it() -> None:
    """Rows count by their weight, features by their importance in the vector's own group."""
    codes, codebooks = kmeans()
    for m, given in enumerate(residuals(WEIGHTS, codes, codebooks)[:-1]):
        for k, entry in enumerate(codebooks[m]):
            share = (codes[:, :, m] == k)[..., None] * IMPORTANCE * ROW_WEIGHTS[:, None, None]  # [out, n, g]
            mean = (share * given).sum((0, 1)) / share.sum((0, 1))
            torch.testing.assert_close(entry, mean, rtol=1e-4, atol=1e-5)


def test_iterations_and_codebooks_each_lower_the_weighted_error() -> None:
    def left(iterations: int, num_codebooks: int) -> float:
        found = kmeans(iterations=iterations, num_codebooks=num_codebooks, entries=16)
        return weighted_error(residuals(WEIGHTS, *found)[-1])

    by_iterations = [left(iterations, 1) for iterations in (1, 2, 4, 8, LLOYD_ENDS)]
    assert by_iterations == sorted(by_iterations, reverse=True)
    assert by_iterations[-1] < 0.9 * by_iterations[0]
    by_codebooks = [left(LLOYD_ENDS, num_codebooks) for num_codebooks in (1, 2, 3)]
    assert by_codebooks[1] < 0.5 * by_codebooks[0] and by_codebooks[2] < 0.5 * by_codebooks[1]


@pytest.mark.parametrize(
    ("row_weights", "importance"), [(ROW_WEIGHTS, EVEN_INPUTS), (EVEN_ROWS, IMPORTANCE)], ids=["rows", "inputs"]
)
def test_entries_go_where_errors_cost(row_weights: Tensor, importance: Tensor) -> None:
    row_weights, importance = row_weights**3, importance**3
    weighted = kmeans(row_weights=row_weights, importance=importance, num_codebooks=1)
    even = kmeans(row_weights=EVEN_ROWS, importance=EVEN_INPUTS, num_codebooks=1)
    costs = [weighted_error(residuals(WEIGHTS, *found)[-1], row_weights, importance) for found in (weighted, even)]
    assert costs[0] < 0.5 * costs[1]


def test_only_ratios_of_the_importance_count() -> None:
    codes, codebooks = kmeans()
    for factor in (1e-36, 1e36):  # squares of which are no float32
        scaled_codes, scaled_codebooks = kmeans(importance=factor * IMPORTANCE)
        assert torch.equal(scaled_codes, codes)
        torch.testing.assert_close(scaled_codebooks, codebooks)


def test_fewer_vectors_than_entries_are_all_met_exactly_and_the_rest_is_zero() -> None:
    codes, codebooks = kmeans(weights=WEIGHTS[:3], row_weights=ROW_WEIGHTS[:3], entries=64, num_codebooks=2)
    torch.testing.assert_close(residuals(WEIGHTS[:3], codes, codebooks)[-1], torch.zeros(3, GROUPS, GROUP))
    assert len(codes[:, :, 0].unique()) == 3 * GROUPS
    assert (codebooks[0].abs().sum(1) > 0).sum() == 3 * GROUPS
    assert codebooks[1].abs().max() < 1e-5  # nothing was left


def test_more_entries_than_distinct_vectors_leave_nothing_undefined() -> None:
    repeated = WEIGHTS[:2].repeat(ROWS // 2, 1, 1)
    codes, codebooks = kmeans(weights=repeated, entries=32)
    assert codebooks.isfinite().all()
    torch.testing.assert_close(residuals(repeated, codes, codebooks)[-1], torch.zeros_like(repeated))


def test_an_entry_that_no_vector_wants_is_moved_to_a_vector() -> None:
    """Three clusters, all first entries drawn from the largest: they begin equal, and one is never the nearest."""
    weights = torch.cat([torch.zeros(98, 1, 2), torch.full((1, 1, 2), 100.0), torch.full((1, 1, 2), -100.0)])
    drawn = (torch.randperm(100, generator=torch.Generator().manual_seed(seed))[:3] for seed in range(20))
    seed = next(seed for seed, chosen in enumerate(drawn) if (chosen < 98).all())
    _, codebooks = kmeans(weights, torch.ones(100), torch.ones(1, 2), 1, entries=3, iterations=1000, seed=seed)
    assert sorted(codebooks[0, :, 0].tolist()) == [-100, 0, 100]


def test_the_generator_alone_decides() -> None:
    first, again, other = (kmeans(iterations=5, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert first[0].shape == (ROWS, GROUPS, 2) and first[1].shape == (2, 8, GROUP)
