from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from aqlm_cli.quantization.solvers import ldlq
from aqlm_cli.quantization.solvers.hessian import Feedback, block_ldl, damped, diagonal_blocks
from aqlm_cli.quantization.solvers.ldlq import sweep, sweep_columns

GROUP, GROUPS, ROWS = 4, 10, 6
FEATURES = GROUP * GROUPS


def integers(*shape: int, seed: int, most: int = 3) -> Tensor:
    """Small enough for exact sums, in any order."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coordinate_descent(moment: Tensor, group: int = GROUP) -> Feedback:
    return Feedback(diagonal_blocks(moment, group), moment, forward=False)


def correlated() -> Tensor:
    """H of neighbours that go together, damped as quantization does it."""
    places = torch.arange(FEATURES)
    return damped(0.9 ** (places[:, None] - places).abs(), 0.01)


def minimiser(j: int, metric: Tensor, targets: Tensor) -> Tensor:
    """D^-1 t, which minimises v^T D v - 2 t.v over all v."""
    found: Tensor = torch.linalg.solve(metric, targets.T)
    return found.T


def nearest(j: int, metric: Tensor, targets: Tensor) -> Tensor:
    """The integers nearest to the minimiser: crude, but it uses all that it gets."""
    return minimiser(j, metric, targets).round()


def loss(moment: Tensor, difference: Tensor) -> float:
    return float((difference.double() @ moment.double() * difference.double()).sum())


@pytest.fixture(params=[1, GROUP, 3 * GROUP - 1, 128])
def lazy_columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are spread in pieces of less than a group, of one, of two, and all at once."""
    monkeypatch.setattr(ldlq, "LAZY_COLUMNS", request.param)


@pytest.mark.usefixtures("lazy_columns")
@pytest.mark.parametrize("forward", [False, True])
def test_every_group_aims_at_what_the_errors_made_before_leave(forward: bool) -> None:
    """Against the definition, one group and one error at a time, in exact integers."""
    coupling = integers(FEATURES, FEATURES, seed=0)
    if forward:
        place = torch.arange(FEATURES) // GROUP
        coupling = coupling * (place[:, None] < place)
    metric = integers(GROUPS, GROUP, GROUP, seed=1)
    metric = metric + metric.mT
    base, start = integers(ROWS, FEATURES, seed=2), integers(ROWS, FEATURES, seed=3)
    values = integers(ROWS, FEATURES, seed=4)
    met: list[int] = []
    state = start.clone()

    def check(j: int, given: Tensor, targets: Tensor) -> Tensor:
        columns = slice(j * GROUP, (j + 1) * GROUP)
        assert torch.equal(given, metric[j])
        assert torch.equal(targets, state[:, columns] + base[:, columns] @ metric[j])
        state.add_((base - values)[:, columns] @ coupling[columns])
        met.append(j)
        return values[:, columns]

    before = [part.clone() for part in (start, base, metric, coupling)]
    rounded, after = sweep(start, base, Feedback(metric, coupling, forward), check)
    assert met == list(range(GROUPS))
    assert torch.equal(rounded, values)
    assert forward or torch.equal(after, state)
    assert all(torch.equal(a, b) for a, b in zip(before, (start, base, metric, coupling), strict=True))


@pytest.mark.usefixtures("lazy_columns")
def test_after_coordinate_descent_the_state_is_that_of_the_rounded_matrix() -> None:
    root = integers(FEATURES, FEATURES, seed=0, most=1)
    moment, weight = root.T @ root, integers(ROWS, FEATURES, seed=1)
    present = integers(ROWS, FEATURES, seed=2)
    draw = iter(integers(GROUPS, ROWS, GROUP, seed=3))
    rounded, state = sweep((weight - present) @ moment, present, coordinate_descent(moment), lambda *_: next(draw))
    assert torch.equal(state, (weight - rounded) @ moment)
    assert not torch.equal(rounded, present)


@pytest.mark.usefixtures("lazy_columns")
def test_coordinate_descent_never_raises_the_objective() -> None:
    moment, weight = correlated(), 2 * random(ROWS, FEATURES)
    present = weight.round()
    losses = [loss(moment, weight - present)]

    def better_of_two(j: int, metric: Tensor, targets: Tensor) -> Tensor:
        """The new integers, or the present ones where they are no worse: what the code search does with codes."""
        columns = slice(j * GROUP, (j + 1) * GROUP)
        options = [present[:, columns].clone(), nearest(j, metric, targets)]
        scores = [(v @ metric * v).sum(1) - 2 * (targets * v).sum(1) for v in options]
        present[:, columns] = torch.where((scores[1] < scores[0])[:, None], options[1], options[0])
        losses.append(loss(moment, weight - present))
        return present[:, columns]

    for _ in range(3):
        base = present.clone()
        sweep((weight - base) @ moment, base, coordinate_descent(moment), better_of_two)
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < 0.7 * losses[0]


def test_error_feedback_beats_rounding_without_it_and_descent_cannot_catch_up() -> None:
    """In groups of one feature, where the nearest integer is the best one."""
    moment, weight = correlated(), random(200, FEATURES)
    without = weight.round()
    ahead, _ = sweep(torch.zeros_like(weight), weight, block_ldl(moment, 1, 1e-4), nearest)
    descended = without
    for _ in range(4):
        state = (weight - descended) @ moment
        descended, _ = sweep(state, descended, coordinate_descent(moment, 1), nearest)
    assert loss(moment, weight - descended) < 0.6 * loss(moment, weight - without)
    assert loss(moment, weight - ahead) < 0.7 * loss(moment, weight - descended)


@pytest.mark.parametrize("forward", [False, True])
def test_a_rounder_that_need_not_round_leaves_no_error(forward: bool) -> None:
    moment, weight = correlated(), random(ROWS, FEATURES)
    ways = block_ldl(moment, GROUP, 1e-4) if forward else coordinate_descent(moment)
    rounded, state = sweep(torch.zeros_like(weight), weight, ways, minimiser)
    torch.testing.assert_close(rounded, weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, torch.zeros_like(state), rtol=0, atol=1e-3)


class Recorder:
    """Rounds every other span to integers, and keeps what it sees."""

    span = 2 * GROUP

    def __init__(self) -> None:
        self.entered: list[Tensor] = []
        self.aims: list[Tensor] = []

    def enter(self, first: int, values: Tensor) -> None:
        assert first == self.span * len(self.entered)
        self.entered.append(values.clone())

    def column(self, i: int, values: Tensor) -> Tensor:
        assert i == len(self.aims)
        self.aims.append(values.clone())
        return values.round() if i // self.span % 2 == 0 else values


@pytest.mark.usefixtures("lazy_columns")
def test_a_span_begins_with_the_values_that_its_columns_have_if_none_of_them_is_rounded() -> None:
    moment, weight, recorder = correlated(), random(ROWS, FEATURES), Recorder()
    rounded = sweep_columns(weight, block_ldl(moment, 1, 1e-4), recorder)
    aims, entered = torch.stack(recorder.aims, 1), torch.cat(recorder.entered, 1)
    odd = torch.arange(FEATURES) // recorder.span % 2 == 1
    torch.testing.assert_close(entered[:, odd], aims[:, odd], rtol=1e-5, atol=1e-5)
    assert (entered[:, ~odd] - aims[:, ~odd]).abs().max() > 0.1  # where columns are rounded, those behind them move
    assert torch.equal(recorder.entered[0], weight[:, : recorder.span]) and torch.equal(aims[:, 0], weight[:, 0])
    assert torch.equal(rounded, torch.where(odd, aims, aims.round()))


@pytest.mark.usefixtures("lazy_columns")
def test_single_columns_are_rounded_as_groups_of_one() -> None:
    class Nearest(Recorder):
        def column(self, i: int, values: Tensor) -> Tensor:
            return values.round()

    moment, weight = correlated(), 2 * random(ROWS, FEATURES)
    feedback = block_ldl(moment, 1, 1e-4)
    expected, _ = sweep(torch.zeros_like(weight), weight, feedback, nearest)
    assert torch.equal(sweep_columns(weight, feedback, Nearest()), expected)
