"""Fixed tables of levels: the tables themselves, and the methods that round to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError, UsageError
from aqlm_cli.quantization.methods import gptq, information, rtn
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec.methods.gptq import GptqSettings
from aqlm_cli.spec.methods.information import InformationSettings
from aqlm_cli.spec.schemes import LevelScheme, parse_scheme
from aqlm_cli.spec.schemes.level import TABLES
from aqlm_cli.spec.treatment import Treatment, method_for
from aqlm_kernels import LevelMatrix
from aqlm_kernels.matrices import level
from aqlm_kernels.matrices.level import levels

STATISTICS = LayerStatistics(torch.full((64, 64), torch.nan), 1)  # not to be looked at
OUT, IN = 12, 64

# The NF4 of QLoRA's code, as its paper prints it (arXiv 2305.14314, appendix E).
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def scheme(word: str) -> LevelScheme:
    found = parse_scheme(word).bound(IN)
    assert isinstance(found, LevelScheme)
    return found


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(rows: int = OUT) -> Tensor:
    return torch.randn(rows, IN, generator=draw())


def rounded(word: str, weight: Tensor) -> LevelMatrix:
    matrix = rtn.quantize(weight, STATISTICS, scheme(word), draw(), None)
    assert isinstance(matrix, LevelMatrix)
    return matrix


def even(word: str, weight: Tensor, settings: InformationSettings | None = None) -> LevelMatrix:
    return information.quantize(weight, STATISTICS, scheme(word), draw(), settings or InformationSettings())


def test_the_table_of_4_bits_is_that_of_qlora() -> None:
    assert torch.equal(levels("nf", 4), torch.tensor(NF4))


def test_schemes_count_the_tables_as_matrices_do() -> None:
    assert tuple(level.TABLES) == TABLES


@pytest.mark.parametrize("bits", range(2, 9))
def test_tables_rise_from_minus_one_over_zero_to_one(bits: int) -> None:
    for name, count in (("nf", 2**bits), ("cube", 2**bits - 1)):
        table = levels(name, bits)
        assert len(table) == count and (table.diff() > 0).all()
        assert table[0] == -1 and table[-1] == 1 and (table == 0).sum() == 1


def test_the_cubes_are_those_of_the_integers() -> None:
    assert levels("cube", 3).tolist() == pytest.approx([(q / 3) ** 3 for q in range(-3, 4)])


@pytest.mark.parametrize("word", ["nf4g16", "nf3", "nf4tg16", "nf2t"])
def test_every_weight_is_at_the_nearest_level_of_its_group(word: str) -> None:
    weight, matrix = random(), rounded(word, random())
    shifts = torch.zeros_like(matrix.scales) if matrix.shifts is None else matrix.shifts
    points = matrix.scales.float()[..., None] * matrix.levels + shifts.float()[..., None]  # [out, n, levels]
    distances = (points[:, :, None] - weight.view(*matrix.scales.shape, -1, 1)).abs().amin(3).flatten(1)
    torch.testing.assert_close((matrix.dequantize() - weight).abs(), distances, rtol=0, atol=1e-6)


@pytest.mark.parametrize("word", ["cube4g16", "cube3", "cube5tg32"])
def test_cubes_are_rounded_after_companding(word: str) -> None:
    weight, matrix = random(), rounded(word, random())
    top = len(matrix.levels) // 2
    shifts = torch.zeros_like(matrix.scales) if matrix.shifts is None else matrix.shifts
    for o in range(OUT):
        for i in range(IN):
            s, t = (float(numbers[o, i // matrix.group_size]) for numbers in (matrix.scales, shifts))
            y = (float(weight[o, i]) - t) / s
            q = max(-top, min(top, round(math.copysign(abs(y) ** (1 / 3), y) * top)))
            assert int(matrix.codes[o, i]) == q + top


def test_companding_with_the_power_of_one_would_be_symmetric_rounding() -> None:
    """The border between two levels is where their roots' middle is, which for a table of equal steps is its middle."""
    weight, matrix = random(), rounded("cube4", random())
    differ = (matrix.codes != matrix.nearest(weight).codes).float().mean()
    assert 0.03 < differ < 0.2


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e-7, 1e4, 1e6, 1e30])
@pytest.mark.parametrize("word", ["nf4g16", "nf4tg16", "cube4"])
def test_small_and_large_weights_are_met_as_ordinary_ones_are(word: str, size: float) -> None:
    def error(weight: Tensor) -> Tensor:
        found = rounded(word, weight).dequantize().double()
        return (found - weight.double()).norm(dim=1) / weight.double().norm(dim=1)

    torch.testing.assert_close(error(size * random()), error(random()), rtol=0.05, atol=0)


def test_what_is_zero_stays_zero() -> None:
    weight = random()
    weight[:, ::3], weight[4] = 0, 0
    for word in ("nf4g16", "cube4"):
        restored = rounded(word, weight).dequantize()
        assert (restored[:, ::3] == 0).all() and (restored[4] == 0).all()


@pytest.mark.parametrize("order", ["active", "none"])
@pytest.mark.parametrize("word", ["nf4g16", "nf3tg32", "nf3"])
def test_error_feedback_without_errors_to_make_up_for_is_round_to_nearest(word: str, order: str) -> None:
    weight, plain = random(), rounded(word, random())
    settings = GptqSettings.model_validate({"order": order})
    found = gptq.quantize(weight, LayerStatistics(torch.eye(IN), 9), scheme(word), draw(), settings)
    assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in plain.tensors().items())


def test_error_feedback_has_the_lower_error_under_its_hessian() -> None:
    x = torch.randn(200, IN, generator=draw(1)) @ torch.randn(IN, IN, generator=draw(2))
    statistics, weight = LayerStatistics(x.T @ x / len(x), len(x)), random(48)
    errors = [
        statistics.relative_error(weight, matrix.dequantize())
        for matrix in (
            gptq.quantize(weight, statistics, scheme("nf3g16"), draw(), GptqSettings()),
            rounded("nf3g16", weight),
        )
    ]
    assert errors[0] < 0.6 * errors[1]


# -------------------------------------------------------------------------------------------------------- information


def entropies(matrix: LevelMatrix) -> Tensor:
    """Of the codes of each group, in bits."""
    groups = matrix.codes.view(-1, matrix.group_size)
    found = torch.zeros(len(groups), dtype=torch.float64)
    for code in range(len(matrix.levels)):
        share = (groups == code).double().mean(1)
        found -= torch.where(share > 0, share * share.clamp_min(1e-9).log2(), 0.0)
    return found


def test_the_codes_have_no_less_entropy_in_any_group_than_without_a_shift() -> None:
    weight = random(40)
    plain, found = rounded("nf4", weight), even("nf4t", weight)
    middle = even("nf4t", weight, InformationSettings(shifts=1, reach=0))
    assert (entropies(found) >= entropies(middle) - 0.02).all(), "but for weights that rounding a shift moves"
    assert entropies(found).mean() > entropies(plain).mean() + 0.03


def test_one_shift_of_no_reach_is_the_median() -> None:
    weight = random()
    weight -= weight.median(1, keepdim=True).values  # so that the lower median is 0, and the other one near it
    found = even("nf4t", weight, InformationSettings(shifts=1, reach=0))
    assert found.shifts is not None
    torch.testing.assert_close(found.shifts.float()[:, 0], weight.quantile(0.5, dim=1), rtol=1e-3, atol=1e-6)
    centred = weight - found.shifts.float()
    assert torch.equal(found.codes, rounded("nf4", centred).codes)


def test_the_shift_is_the_first_of_the_most_even_ones() -> None:
    weight, table = random(5), levels("nf", 3)
    for row in weight:
        median = row.quantile(0.5)
        span, best, most = (row - median).abs().max(), None, -1.0
        for f in torch.linspace(-0.05, 0.05, 11, dtype=torch.float64).tolist():
            centred = row - (median + f * span)
            codes = (centred / centred.abs().max() - table[:, None]).abs().argmin(0)
            shares = codes.bincount(minlength=8).double() / IN
            entropy = -float((shares[shares > 0] * shares[shares > 0].log()).sum())
            if entropy > most + 1e-12:
                best, most = median + f * span, entropy
        (found,) = information.most_even_shifts(row[None], table, 11, 0.05)
        torch.testing.assert_close(found, best)


def test_chunks_of_weights_do_not_change_a_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = even("nf4tg16", random())
    monkeypatch.setattr(information, "CHUNK_WEIGHTS", 100)
    parts = even("nf4tg16", random())
    assert all(torch.equal(parts.tensors()[name], tensor) for name, tensor in whole.tensors().items())


def test_a_scheme_without_shifts_is_refused_and_not_proposed() -> None:
    with pytest.raises(UsageError, match="does not take nf4g64: it chooses shifts"):
        Treatment("information", parse_scheme("nf4g64"))
    assert method_for(parse_scheme("nf4g64"), "information") == "rtn"
    assert method_for(parse_scheme("nf4tg64"), "information") == "information"


@pytest.mark.parametrize("method", ["rtn", "information"])
def test_a_weight_that_is_no_number_is_refused(method: str) -> None:
    weight = random()
    weight[3, 7] = torch.nan
    with pytest.raises(QuantizationError, match="the weight holds NaN or infinite values"):
        even("nf4t", weight) if method == "information" else rounded("nf4t", weight)
