from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aqlm_cli.quantization.solvers import codebooks as solver
from aqlm_cli.quantization.solvers.code_search import CodeSearch, code_search
from aqlm_cli.quantization.solvers.codebooks import Approximation, improve_codebooks, improve_scales
from aqlm_cli.quantization.solvers.hessian import damped
from aqlm_cli.spec.schemes import AdditiveScheme
from aqlm_kernels import AdditiveMatrix

COMPILED = code_search(torch.device("cpu"))
PLAIN = code_search(torch.device("meta"))  # any device but the CPU
ROWS, GROUPS, GROUP, ENTRIES = 20, 3, 4, 5
FEATURES = GROUPS * GROUP


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2, 3])
def present(request: pytest.FixtureRequest) -> Approximation:
    """Random codes and codebooks; no code uses the last entry."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, ENTRIES - 1, (ROWS, GROUPS, request.param), generator=draw)
    return Approximation(codes, random(request.param, ENTRIES, GROUP, seed=1), random(ROWS, seed=2).exp())


def moment() -> Tensor:
    x = random(100, FEATURES, seed=3) @ random(FEATURES, FEATURES, seed=4)
    return damped(x.T @ x / 100, 0.01)


WEIGHT = random(ROWS, FEATURES, seed=5)


def objective(found: Approximation, weight: Tensor = WEIGHT) -> float:
    """sum_i (w_i - s_i v_i) H (w_i - s_i v_i) in float64."""
    difference = weight.double() - approximation(found)
    return float((difference @ moment().double() * difference).sum())


def approximation(found: Approximation) -> Tensor:  # [out, in] float64
    entries = [found.codebooks[m].double()[found.codes[:, :, m]] for m in range(found.codes.shape[2])]
    return found.scales.double()[:, None] * torch.stack(entries).sum(0).flatten(1)


def improve(present: Approximation, steps: int, search: CodeSearch = COMPILED) -> Approximation:
    return improve_codebooks(WEIGHT / present.scales[:, None], moment(), present, steps, search)


# ---------------------------------------------------------------------------------------------------------- codebooks


def normal_equations(present: Approximation) -> tuple[Tensor, Tensor, float]:
    """A, b and the mean diagonal of A for the M*K*g unknowns, written out: A = P^T (S^2 x H) P with P the selection."""
    num_codebooks = present.codes.shape[2]
    unknowns = num_codebooks * ENTRIES * GROUP
    selection = torch.zeros(ROWS, FEATURES, unknowns, dtype=torch.float64)
    for i in range(ROWS):
        for j in range(GROUPS):
            for m in range(num_codebooks):
                for d in range(GROUP):
                    entry = (m * ENTRIES + int(present.codes[i, j, m])) * GROUP + d
                    selection[i, j * GROUP + d, entry] = present.scales[i]
    weighted = torch.einsum("ifu,fh->ihu", selection, moment().double())
    hessian = torch.einsum("ihu,ihv->uv", weighted, selection)
    right = torch.einsum("ihu,ih->u", weighted, WEIGHT.double() - approximation(present))
    return hessian, right, float(hessian.diagonal().mean())


def test_many_steps_end_at_the_solution_of_the_normal_equations(present: Approximation) -> None:
    hessian, right, mean = normal_equations(present)
    unused = hessian.diagonal() == 0
    ridge = solver.RIDGE * mean * torch.eye(len(hessian), dtype=torch.float64)
    solution = torch.linalg.solve(hessian + ridge + torch.diag(unused.double()), right)
    found = improve(present, steps=300)
    expected = Approximation(present.codes, present.codebooks + solution.view_as(present.codebooks), present.scales)
    assert objective(found) == pytest.approx(objective(expected), rel=1e-5)
    torch.testing.assert_close(approximation(found), approximation(expected), rtol=0, atol=2e-3)
    best = torch.linalg.lstsq(hessian, right, driver="gelsd").solution  # without the ridge
    assert objective(found) <= objective(present) - float(right @ best) * (1 - 1e-3)


def test_each_step_lowers_the_objective_and_two_do_most_of_it(present: Approximation) -> None:
    losses = [objective(improve(present, steps)) for steps in (0, 1, 2, 4, 8, 300)]
    assert losses[0] == objective(present)
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))
    assert losses[1] < losses[0]
    assert losses[0] - losses[2] > 0.8 * (losses[0] - losses[-1])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_so_many_steps_find_the_best_that_as_many_preconditioned_gradients_span(
    present: Approximation, steps: int
) -> None:
    """Which is what conjugate gradients do."""
    hessian, right, _ = normal_equations(present)
    blocks = torch.zeros(present.codebooks.shape[0], ENTRIES, GROUP, GROUP, dtype=torch.float64)
    for i, row in enumerate(present.codes.tolist()):
        for j, codes in enumerate(row):
            corner = moment()[j * GROUP : (j + 1) * GROUP, j * GROUP : (j + 1) * GROUP]
            for m, code in enumerate(codes):
                blocks[m, code] += present.scales[i] ** 2 * corner
    own = blocks.diagonal(dim1=2, dim2=3).mean(2).flatten().repeat_interleave(GROUP)  # mean diagonal of each block
    used = own > 0
    ridge = solver.RIDGE * float(own.mean())
    damping = torch.diag(ridge + solver.BLOCK_RIDGE * own)
    preconditioner = (torch.block_diag(*blocks.flatten(0, 1)) + damping)[used][:, used].inverse()
    right = right[used]
    whole = hessian[used][:, used] + ridge * torch.eye(len(right), dtype=torch.float64)
    spanned = [preconditioner @ right]
    for _ in range(steps - 1):
        spanned.append(preconditioner @ (whole @ spanned[-1]))
    basis = torch.linalg.qr(torch.stack(spanned, 1)).Q
    best = torch.zeros(used.shape, dtype=torch.float64)
    best[used] = basis @ torch.linalg.solve(basis.T @ whole @ basis, basis.T @ right)
    moved = (improve(present, steps).codebooks - present.codebooks).double().flatten()
    torch.testing.assert_close(moved, best, rtol=0, atol=1e-3 * float(best.norm()))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_from_the_solution_no_step_raises_the_objective(present: Approximation, steps: int) -> None:
    solved = improve(present, 300)
    assert objective(improve(solved, steps)) <= objective(solved) * (1 + 1e-5)


def test_an_entry_that_no_code_uses_stays_as_it_is(present: Approximation) -> None:
    found = improve(present, 4)
    assert torch.equal(found.codebooks[:, -1], present.codebooks[:, -1])
    assert (found.codebooks[:, :-1] != present.codebooks[:, :-1]).any(2).all()


def test_codes_and_scales_stay_and_nothing_that_is_read_changes(present: Approximation) -> None:
    before = [part.clone() for part in (present.codes, present.codebooks, present.scales)]
    found = improve(present, 4)
    assert torch.equal(found.codes, present.codes) and torch.equal(found.scales, present.scales)
    after = present.codes, present.codebooks, present.scales
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_both_forms_of_the_sums_give_the_same_codebooks(present: Approximation) -> None:
    torch.testing.assert_close(
        improve(present, 2, PLAIN).codebooks, improve(present, 2).codebooks, rtol=1e-4, atol=1e-5
    )


def test_both_forms_give_the_same_gradients_and_weights(present: Approximation) -> None:
    values = random(ROWS, FEATURES, seed=6)
    parts = present.codes, present.codebooks, present.scales
    for one, other in zip(COMPILED.gradients(values, *parts), PLAIN.gradients(values, *parts), strict=True):
        torch.testing.assert_close(one, other)
    expanded = COMPILED.expand(present.codebooks, present.codes)
    assert torch.equal(expanded, PLAIN.expand(present.codebooks, present.codes))
    assert torch.equal(
        expanded, AdditiveMatrix(present.codes, padded(present.codebooks), torch.ones(ROWS)).dequantize()
    )


def padded(codebooks: Tensor) -> Tensor:
    """To a power of two of entries."""
    return torch.nn.functional.pad(codebooks, (0, 0, 0, 8 - ENTRIES))


def test_a_weight_that_is_met_exactly_is_left_alone(present: Approximation) -> None:
    weights = COMPILED.expand(present.codebooks, present.codes)
    found = improve_codebooks(weights, moment(), present, 4, COMPILED)
    assert torch.equal(found.codebooks, present.codebooks)


# ------------------------------------------------------------------------------------------------------------- scales


def test_every_scale_is_the_least_squares_optimum(present: Approximation) -> None:
    found = improve_scales(WEIGHT, moment(), present, COMPILED)
    unscaled = approximation(dataclasses.replace(present, scales=torch.ones(ROWS)))
    pulled = unscaled @ moment().double()
    expected = (pulled * WEIGHT).sum(1) / (pulled * unscaled).sum(1)
    torch.testing.assert_close(found.scales.double(), expected, rtol=1e-4, atol=1e-6)
    for row in range(ROWS):
        for factor in 0.99, 1.01:
            scales = found.scales.clone()
            scales[row] *= factor
            assert objective(dataclasses.replace(found, scales=scales)) > objective(found)
    assert torch.equal(found.codes, present.codes) and torch.equal(found.codebooks, present.codebooks)


def test_where_the_entries_add_up_to_zero_the_scale_is_kept(present: Approximation) -> None:
    nothing = dataclasses.replace(present, codebooks=torch.zeros_like(present.codebooks))
    assert torch.equal(improve_scales(WEIGHT, moment(), nothing, COMPILED).scales, present.scales)


# ----------------------------------------------------------------------------------------------------- any shape of it


@pytest.mark.slow
@settings(max_examples=60)  # one takes a tenth of a second
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 20),
    scheme=st.builds(AdditiveScheme, st.integers(1, 4), st.integers(1, 8), st.integers(1, 16)),
    tokens=st.integers(0, 200),
    steps=st.integers(1, 8),
    spread=st.floats(0, 3),
    seed=st.integers(0, 2**32),
)
def test_no_update_of_codebooks_or_scales_raises_the_objective(
    rows: int, groups: int, scheme: AdditiveScheme, tokens: int, steps: int, spread: float, seed: int
) -> None:
    """From any start, with fewer groups than entries or more, inputs of any rank, and rows and inputs of any sizes."""
    draw = torch.Generator().manual_seed(seed)
    features = groups * scheme.group_size
    x = torch.randn(tokens, features, generator=draw) * (spread * torch.randn(features, generator=draw)).exp()
    metric = damped(x.T @ x / max(1, tokens), 0.01)
    codes = torch.randint(0, scheme.codebook_size, (rows, groups, scheme.num_codebooks), generator=draw)
    codebooks = torch.randn(scheme.num_codebooks, scheme.codebook_size, scheme.group_size, generator=draw)
    start = Approximation(codes, codebooks, (spread * torch.randn(rows, generator=draw)).exp())
    weight = torch.randn(rows, features, generator=draw)

    def norm(matrix: Tensor, metric: Tensor = metric) -> float:
        return float((matrix.double() @ metric.double() * matrix.double()).sum()) ** 0.5

    def loss(found: Approximation) -> float:
        return norm(weight - approximation(found))

    def rounding(found: Approximation) -> float:
        """What float32 makes of the entries, which may be large and cancel each other, at most."""
        sizes = approximation(dataclasses.replace(found, codebooks=found.codebooks.abs()))
        return 2**-22 * norm(weight.abs() + sizes, metric.abs())

    present = start
    for _ in range(3):
        solved = improve_codebooks(weight / present.scales[:, None], metric, present, steps, COMPILED)
        assert loss(solved) <= loss(present) + rounding(solved)
        present = improve_scales(weight, metric, solved, COMPILED)
        assert loss(present) <= loss(solved) + rounding(present)
