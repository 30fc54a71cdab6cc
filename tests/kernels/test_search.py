"""The two forms of the code search, in plain torch and compiled, against each other and against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numba
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aqlm_kernels import KernelError, search
from aqlm_kernels.cpu import search as compiled

FORMS = {"plain": search.choose_codes, "compiled": compiled.choose_codes}
SLACK = 1e-5  # of a row's squared error: more than roundings of 2^-24 make, less than any other choice of codes


@dataclass(frozen=True)
class Search:
    """One group of inputs: `rows` targets, and codebooks of 2^bits entries."""

    num_codebooks: int
    bits: int
    group: int
    rows: int

    def __str__(self) -> str:
        return f"{self.num_codebooks}x{self.bits}g{self.group}-{self.rows}"

    def integers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Metric, targets, codebooks and codes, so small that sums are exact; each entry comes twice: ties abound."""
        draw = torch.Generator().manual_seed(0)
        root = torch.randint(-1, 2, (self.group, self.group), generator=draw).float()
        targets = torch.randint(-20, 21, (self.rows, self.group), generator=draw).float()
        half = torch.randint(-3, 4, (self.num_codebooks, 2**self.bits // 2, self.group), generator=draw).float()
        return root.T @ root, targets, torch.cat([half, half], 1), self._codes(draw)

    def reals(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of normally distributed numbers; targets are `metric @ x` for the vectors x to be approximated."""
        draw = torch.Generator().manual_seed(1)
        root = torch.randn(2 * self.group, self.group, generator=draw)
        codebooks = torch.randn(self.num_codebooks, 2**self.bits, self.group, generator=draw)
        x = self.num_codebooks**0.5 * torch.randn(self.rows, self.group, generator=draw)
        metric = root.T @ root / (2 * self.group)
        return metric, x @ metric, codebooks, self._codes(draw)

    def _codes(self, draw: torch.Generator) -> Tensor:
        return torch.randint(0, 2**self.bits, (self.rows, self.num_codebooks), generator=draw)


# The compiled form takes 16 rows at a time, and keeps a table of products for codebooks of up to 1024 entries.
CASES = (
    Search(1, 4, 8, rows=33),
    Search(1, 8, 4, rows=16),
    Search(1, 12, 16, rows=5),
    Search(1, 16, 8, rows=2),
    Search(2, 1, 4, rows=7),
    Search(2, 4, 8, rows=33),
    Search(2, 8, 8, rows=17),
    Search(2, 8, 3, rows=1),
    Search(2, 10, 8, rows=3),
    Search(2, 11, 4, rows=3),
    Search(2, 12, 16, rows=2),
    Search(3, 4, 4, rows=18),
    Search(3, 8, 16, rows=5),
    Search(4, 4, 16, rows=9),
    Search(4, 8, 8, rows=4),
)
BEAMS = (2, 8, 64, 4096)


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Search:
    selected: Search = request.param
    return selected


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(2)
    except ValueError:
        pytest.skip("this machine has one core")
    yield
    numba.set_num_threads(before)


def squared_errors(problem: tuple[Tensor, Tensor, Tensor, Tensor], codes: Tensor) -> Tensor:
    """(v - x)^T H (v - x) of every row in float64, with H x = t: the objective, shifted so that zero is perfect."""
    metric, targets, codebooks = (part.double() for part in problem[:3])
    wanted: Tensor = torch.linalg.solve(metric, targets.T)  # [g, rows]
    difference = approximation(codebooks, codes) - wanted.T
    return (difference @ metric * difference).sum(1)


def approximation(codebooks: Tensor, codes: Tensor) -> Tensor:  # [rows, g]
    return torch.stack([codebook[codes[:, m]] for m, codebook in enumerate(codebooks)]).sum(0)


# -------------------------------------------------------------------------------------------------- the two, together


@pytest.mark.parametrize("beam", BEAMS)
def test_codes_of_integers_are_equal_ties_included(case: Search, beam: int) -> None:
    problem = case.integers()
    assert torch.equal(compiled.choose_codes(*problem, beam), search.choose_codes(*problem, beam))


@pytest.mark.parametrize("beam", BEAMS)
def test_a_choice_among_reals_is_as_good_and_one_wrong_code_is_not(case: Search, beam: int) -> None:
    problem = case.reals()
    codes = compiled.choose_codes(*problem, beam)
    errors, plain = squared_errors(problem, codes), squared_errors(problem, search.choose_codes(*problem, beam))
    assert (errors <= plain * (1 + SLACK)).all()
    assert (plain <= errors * (1 + SLACK)).all()
    codes[-1, -1] = (codes[-1, -1] + 1) % 2**case.bits
    assert not (squared_errors(problem, codes) <= plain * (1 + SLACK)).all()


@pytest.mark.parametrize("beam", BEAMS[:2])
def test_codes_do_not_depend_on_the_number_of_threads(case: Search, beam: int, two_threads: None) -> None:
    problem = case.reals()
    found = []
    for threads in 1, 2:
        numba.set_num_threads(threads)
        found.append(compiled.choose_codes(*problem, beam))
    assert torch.equal(*found)


# ------------------------------------------------------------------------------------------------------------ each one


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_one_codebook_is_searched_exactly_and_a_tie_goes_to_the_lower_code(form: str) -> None:
    problem = Search(1, 6, 4, rows=40).integers()
    metric, targets, codebooks, _ = problem
    scores = torch.stack([metric.mv(c).dot(c) - 2 * targets.mv(c) for c in codebooks[0]], 1)  # [rows, K]
    lowest = [min(range(64), key=lambda k: (row[k], k)) for row in scores.tolist()]
    assert FORMS[form](*problem, 2)[:, 0].tolist() == lowest
    assert max(lowest) < 32


def test_a_beam_of_all_entries_finds_the_best_of_all_pairs(form: str) -> None:
    problem = Search(2, 4, 4, rows=40).reals()
    pairs = torch.tensor(list(itertools.product(range(16), repeat=2)))
    errors = torch.stack([squared_errors(problem, pair.expand(40, 2)) for pair in pairs], 1)  # [rows, K * K]
    for beam in (16, 128):
        codes = FORMS[form](*problem, beam)
        torch.testing.assert_close(squared_errors(problem, codes), errors.min(1).values, rtol=SLACK, atol=0)


def test_half_the_beam_is_the_best_of_each_class_beside_the_partner_and_half_the_best_alone(form: str) -> None:
    """Against the words of the specification, one row and one candidate at a time, in exact integers."""
    problem = Search(2, 4, 4, rows=30).integers()
    metric, targets, codebooks, codes = (part.long() for part in problem)
    for beam in (2, 8):
        classes = [range(c, 16, beam // 2) for c in range(beam // 2)]
        found = FORMS[form](*problem, beam).tolist()
        for row, (target, (a, b)) in enumerate(zip(targets, codes.tolist(), strict=True)):

            def objective(*entries: Tensor, t: Tensor = target) -> int:
                v = torch.stack(entries).sum(0)
                return int(v @ metric @ v - 2 * t @ v)

            beside = [objective(entry, codebooks[1, b]) for entry in codebooks[0]]
            alone = [objective(entry) for entry in codebooks[0]]
            tried = [a, *(min(one, key=scores.__getitem__) for scores in (beside, alone) for one in classes)]
            pairs = [(p, q) for p in tried for q in range(16)]
            scores = [objective(codebooks[0, p], codebooks[1, q]) for p, q in pairs]
            assert found[row] == list(pairs[scores.index(min(scores))])


@pytest.mark.parametrize("beam", BEAMS[:2])
def test_a_choice_is_never_worse_than_the_present_codes(case: Search, beam: int, form: str) -> None:
    metric, targets, codebooks, codes = problem = case.reals()
    for _ in range(3):
        chosen = FORMS[form](metric, targets, codebooks, codes, beam)
        assert (squared_errors(problem, chosen) <= squared_errors(problem, codes) * (1 + SLACK)).all()
        codes = chosen


@st.composite
def searches(draw: st.DrawFn) -> Search:
    bits = draw(st.integers(1, 12))
    num_codebooks = draw(st.integers(1, 4 if bits <= 8 else 2))
    return Search(num_codebooks, bits, draw(st.integers(1, 16)), draw(st.integers(1, 40)))


@given(
    drawn=searches(),
    beams=st.lists(st.sampled_from([2, 4, 8, 16]), min_size=3, max_size=3),
    rank=st.integers(0, 16),
    seed=st.integers(0, 2**32),
)
def test_no_choice_raises_the_objective_under_any_metric(
    drawn: Search, beams: list[int], rank: int, seed: int, form: str
) -> None:
    """Of any rank, with targets that its inverse could not explain, and from codes that are good already; in integers,
    where sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randint(-1, 2, (rank, drawn.group), generator=generator).float()
    metric, (_, targets, codebooks, codes) = root.T @ root, drawn.integers()

    def objective(codes: Tensor) -> Tensor:  # [rows], v^T H v - 2 t.v
        v = approximation(codebooks, codes)
        return ((v @ metric - 2 * targets) * v).sum(1)

    for beam in beams:
        before, codes = objective(codes), FORMS[form](metric, targets, codebooks, codes, beam)
        assert (objective(codes) <= before).all()


def test_of_three_codebooks_every_pair_is_chosen_jointly(form: str) -> None:
    """What is left cannot be improved by the last pair, and the first pair has been improved before it."""
    problem = Search(3, 3, 4, rows=30).reals()
    codes = FORMS[form](*problem, 8)
    first, *rest = codes.T
    pairs = itertools.product(range(8), repeat=2)
    errors = [
        squared_errors(problem, torch.stack([first, torch.full_like(first, b), torch.full_like(first, c)], 1))
        for b, c in pairs
    ]
    torch.testing.assert_close(squared_errors(problem, codes), torch.stack(errors, 1).min(1).values, rtol=SLACK, atol=0)
    assert (first != problem[3][:, 0]).any()
    assert all((now != before).any() for now, before in zip(rest, problem[3].T[1:], strict=True))


def test_a_search_does_not_change_its_inputs(case: Search, form: str) -> None:
    problem = case.reals()
    before = [part.clone() for part in problem]
    chosen = FORMS[form](*problem, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, problem, strict=True))
    assert chosen.dtype == torch.int64 and chosen.shape == problem[3].shape
    chosen[:] = -1
    assert torch.equal(problem[3], before[3])


def test_slices_of_larger_tensors_are_read_in_place(case: Search, form: str) -> None:
    metric, targets, codebooks, codes = problem = case.integers()
    strided = [torch.stack([part, torch.zeros_like(part)], -1)[..., 0] for part in (metric, targets, codebooks, codes)]
    assert not strided[1].is_contiguous() or targets.numel() == 1
    metric, targets, codebooks, codes = strided
    assert torch.equal(FORMS[form](metric, targets, codebooks, codes, 4), FORMS[form](*problem, 4))


def test_a_group_without_weight_keeps_its_present_first_code(form: str) -> None:
    _, _, codebooks, codes = Search(2, 4, 8, rows=9).reals()
    chosen = FORMS[form](torch.zeros(8, 8), torch.zeros(9, 8), codebooks, codes, 4)
    assert torch.equal(chosen, torch.stack([codes[:, 0], torch.zeros(9, dtype=torch.int64)], 1))


# ------------------------------------------------------------------------------------------------------------ refusals


def test_parts_that_do_not_fit_together_are_refused(form: str) -> None:
    metric, targets, codebooks, codes = Search(2, 4, 8, rows=3).reals()
    for wrong in (
        (metric[:7, :7], targets, codebooks, codes),
        (metric, targets[:, :7], codebooks, codes),
        (metric, targets, codebooks[:1], codes),
        (metric, targets, codebooks, codes[:2]),
    ):
        with pytest.raises(KernelError, match=r"code search: metric .* do not fit together"):
            FORMS[form](*wrong, 4)


@pytest.mark.parametrize("beam", [0, 1, 12])
def test_a_beam_that_cannot_be_halved_into_equal_classes_is_refused(beam: int, form: str) -> None:
    with pytest.raises(KernelError, match=rf"beam is {beam}, a power of two from 2"):
        FORMS[form](*Search(2, 4, 8, rows=3).reals(), beam)


# ----------------------------------------------------------------------------------------------- all groups at once


@dataclass(frozen=True)
class Assignment:
    """Points `[rows, groups, group]` to be given to entries of one codebook of 2^bits, as k-means does."""

    bits: int
    group: int
    rows: int
    groups: int

    def __str__(self) -> str:
        return f"1x{self.bits}g{self.group}-{self.rows}x{self.groups}"

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Importance, targets and a codebook so small that sums are exact; each entry comes twice."""
        draw = torch.Generator().manual_seed(0)
        importance = torch.randint(0, 4, (self.groups, self.group), generator=draw).float()
        targets = torch.randint(-20, 21, (self.rows, self.groups, self.group), generator=draw).float()
        half = torch.randint(-3, 4, (2**self.bits // 2, self.group), generator=draw).float()
        return importance, targets, torch.cat([half, half])

    def reals(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of real numbers; targets are `importance * x` for the points x."""
        draw = torch.Generator().manual_seed(1)
        importance = 0.1 + torch.rand(self.groups, self.group, generator=draw)
        points = torch.randn(self.rows, self.groups, self.group, generator=draw)
        return importance, importance * points, torch.randn(2**self.bits, self.group, generator=draw)


ASSIGNMENTS = (
    Assignment(1, 4, rows=1, groups=1),
    Assignment(4, 8, rows=33, groups=5),
    Assignment(8, 3, rows=16, groups=3),
    Assignment(8, 16, rows=17, groups=2),
    Assignment(12, 8, rows=3, groups=4),
)
NEAREST = {"plain": search.nearest_entries, "compiled": compiled.nearest_entries}


@pytest.mark.parametrize("assignment", ASSIGNMENTS, ids=str)
def test_nearest_entries_of_integers_are_equal_ties_included(assignment: Assignment) -> None:
    problem = assignment.integers()
    assert torch.equal(compiled.nearest_entries(*problem), search.nearest_entries(*problem))


@pytest.mark.parametrize("assignment", ASSIGNMENTS, ids=str)
def test_the_nearest_entry_is_the_nearest_and_no_other_is(assignment: Assignment, form: str) -> None:
    importance, targets, codebook = (part.double() for part in assignment.reals())
    points = targets / importance
    distances = ((points[:, :, None] - codebook).square() * importance[:, None]).sum(3)  # [rows, groups, K]
    found = NEAREST[form](*assignment.reals())
    assert found.dtype == torch.int64
    chosen = distances.gather(2, found[..., None])[..., 0]
    assert (chosen <= distances.min(2).values * (1 + SLACK)).all()
    found[-1, -1] = (found[-1, -1] + 1) % 2**assignment.bits
    chosen = distances.gather(2, found[..., None])[..., 0]
    assert not (chosen <= distances.min(2).values * (1 + SLACK)).all()


@pytest.mark.parametrize("assignment", ASSIGNMENTS, ids=str)
def test_nearest_entries_are_the_codes_chosen_under_diagonal_metrics(assignment: Assignment, form: str) -> None:
    importance, targets, codebook = assignment.integers()
    start = torch.zeros(assignment.rows, 1, dtype=torch.int64)
    chosen = [
        FORMS[form](importance[j].diag(), targets[:, j], codebook[None], start, 2) for j in range(assignment.groups)
    ]
    assert torch.equal(NEAREST[form](importance, targets, codebook), torch.cat(chosen, 1))
