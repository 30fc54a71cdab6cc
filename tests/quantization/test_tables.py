from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization import tables
from aqlm_cli.quantization.methods import aqlm, rtn
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.quantization.tables import QuantizedTable, TableMoments, TableStatistics, quantize_table, rows_to_search
from aqlm_cli.spec.methods.aqlm import AqlmSettings
from aqlm_cli.spec.schemes import parse_scheme
from aqlm_kernels import RefinedMatrix

VOCABULARY, FEATURES = 400, 32
QUICK = AqlmSettings(kmeans_iterations=5, rounds=2, ldlq_rounds=1, beam=4, final_beam=8)
SCHEMES = ("2x4g4", "int3g16", "2x4g4+int4g16r20")


def table(rows: int = VOCABULARY, features: int = FEATURES, seed: int = 0) -> tuple[Tensor, TableStatistics]:
    """Random rows, correlated hidden states, and tokens that are used very unequally."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.randperm(features, generator=draw)
    sizes = torch.exp(0.7 * torch.randn(features, generator=draw))
    head = 0.9 ** (places[:, None] - places).abs() * sizes[:, None] * sizes
    weights = 1 / (1.0 + torch.randperm(rows, generator=draw))
    return (
        torch.randn(rows, features, generator=draw),
        TableStatistics(head, 0.1 * torch.eye(features), weights / weights.mean()),
    )


def quantized(weight: Tensor, statistics: TableStatistics, scheme: str, workers: int = 1) -> QuantizedTable:
    return quantize_table(weight, statistics, parse_scheme(scheme), QUICK, torch.Generator().manual_seed(0), workers)


def row_errors(weight: Tensor, statistics: TableStatistics, found: QuantizedTable) -> Tensor:
    difference = found.matrix.stored().dequantize() - weight
    return (difference @ statistics.metric() * difference).sum(1)


def same_tensors(found: QuantizedTable, expected: QuantizedTable) -> bool:
    pairs = zip(found.matrix.tensors().values(), expected.matrix.tensors().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


# ------------------------------------------------------------------------------------------------------ what it wins


@pytest.mark.parametrize("scheme, factor", [("3x4g4", 1.5), ("int3g16", 2)])
def test_it_beats_round_to_nearest_with_no_more_bits(scheme: str, factor: float) -> None:
    weight, statistics = table()
    found = quantized(weight, statistics, scheme)
    rounded = rtn.quantize(
        weight, LayerStatistics(statistics.metric(), 0), parse_scheme("int3g16"), torch.Generator(), None
    )
    nearest = row_errors(weight, statistics, QuantizedTable(rounded, 0.0))
    assert found.matrix.bits() <= rounded.bits()
    weights = statistics.row_weights
    assert (weights * row_errors(weight, statistics, found)).sum() < (weights * nearest).sum() / factor


def test_both_duties_count() -> None:
    weight, statistics = table()
    head, embedding = statistics.head, 10 * torch.eye(FEATURES)
    assert head is not None
    alone = quantized(weight, TableStatistics(head, None, statistics.row_weights), "int3g16").matrix.dequantize()
    tied = quantized(weight, TableStatistics(head, embedding, statistics.row_weights), "int3g16").matrix.dequantize()
    assert (tied - weight).square().sum() < 0.9 * (alone - weight).square().sum()
    assert ((alone - weight) @ head * (alone - weight)).sum() < 0.9 * ((tied - weight) @ head * (tied - weight)).sum()


def test_rows_that_weigh_more_come_nearer() -> None:
    """The codebooks are made for them; where nothing is shared by rows, weights change nothing."""
    weight, statistics = table()
    weight[:100] = 0.1 * weight[:100] ** 3  # of another distribution than the rest
    equal = TableStatistics(statistics.head, statistics.embedding, torch.ones(VOCABULARY))
    first = TableStatistics(statistics.head, statistics.embedding, 1 + 99.0 * (torch.arange(VOCABULARY) < 100))
    before, after = (row_errors(weight, one, quantized(weight, one, "2x4g4"))[:100].sum() for one in (equal, first))
    assert after < 0.9 * before
    assert same_tensors(quantized(weight, equal, "int3g16"), quantized(weight, first, "int3g16"))


def test_a_patch_goes_to_the_rows_whose_errors_cost_most() -> None:
    weight, statistics = table()
    base, refined = (quantized(weight, statistics, scheme) for scheme in ("2x4g4", "2x4g4+int4g16r20"))
    costs = statistics.row_weights * row_errors(weight, statistics, base)
    assert isinstance(refined.matrix, RefinedMatrix)
    assert torch.equal(refined.matrix.index.long(), costs.topk(20).indices.sort().values)
    assert costs.topk(20).values.sum() > 0.3 * costs.sum()
    assert refined.relative_error < 0.65 * base.relative_error


def test_a_base_that_there_is_already_is_refined_as_it_is() -> None:
    weight, statistics = table()
    base = quantized(weight, statistics, "int3g16")
    scheme, draw = parse_scheme("int3g16+int4g16r20"), torch.Generator().manual_seed(1)
    given = quantize_table(weight, statistics, scheme, QUICK, draw, 1, base.matrix)
    assert same_tensors(given, quantized(weight, statistics, "int3g16+int4g16r20"))
    other = base.matrix.from_tensors({**base.matrix.tensors(), "zeros": base.matrix.tensors()["zeros"] + 1})
    refined = quantize_table(weight, statistics, scheme, QUICK, draw, 1, other).matrix
    assert isinstance(refined, RefinedMatrix) and refined.base is other


def test_the_relative_error_is_that_of_the_stored_matrix() -> None:
    weight, statistics = table()
    for scheme in SCHEMES:
        found = quantized(weight, statistics, scheme)
        errors = (statistics.row_weights * row_errors(weight, statistics, found)).sum()
        whole = (statistics.row_weights * (weight @ statistics.metric() * weight).sum(1)).sum()
        assert found.relative_error == pytest.approx(float(errors / whole), rel=1e-3)


@pytest.mark.parametrize("scheme", ["2x4g4", "int3g16", "2x4g4+int4g16r20"])
def test_the_rows_gone_through_end_at_those_that_were_announced(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CHUNK_WEIGHTS", 64 * FEATURES)
    weight, statistics = table()
    told: list[int] = []
    draw = torch.Generator().manual_seed(0)
    quantize_table(weight, statistics, parse_scheme(scheme), QUICK, draw, done=told.append)
    assert len(told) > 3 and told == sorted(told)
    assert told[-1] == rows_to_search(weight, parse_scheme(scheme))


# ---------------------------------------------------------------------------------------------------- exact, and equal


def test_a_table_that_has_a_code_is_met_exactly() -> None:
    draw = torch.Generator().manual_seed(0)
    _, statistics = table()
    levels = torch.randint(8, (VOCABULARY, FEATURES), generator=draw)
    levels[:, ::16], levels[:, 1::16] = 0, 7
    on_grid = 0.125 * (levels - 3.0)
    assert quantized(on_grid, statistics, "int3g16").relative_error == 0
    entries = torch.randn(16, 4, generator=draw)
    entries /= entries.norm(dim=1, keepdim=True)  # then all rows have one norm
    of_entries = entries[torch.randint(16, (VOCABULARY, FEATURES // 4), generator=draw)].flatten(1)
    random = quantized(table()[0], statistics, "2x4g4").relative_error
    assert quantized(of_entries, statistics, "2x4g4").relative_error < random / 50  # conjugate gradients are cut short


@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunks_give_what_one_piece_gives(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = table()
    expected = quantized(weight, statistics, scheme)
    monkeypatch.setattr(tables, "CHUNK_WEIGHTS", 64 * FEATURES)
    assert same_tensors(quantized(weight, statistics, scheme), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_number_of_threads_does_not_show(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = table()
    monkeypatch.setattr(tables, "CHUNK_WEIGHTS", 64 * FEATURES)
    one, two = (quantized(weight, statistics, scheme, workers) for workers in (1, 2))
    assert same_tensors(one, two) and one.relative_error == two.relative_error


@pytest.mark.parametrize("rows", [16_000, pytest.param(256_000, marks=pytest.mark.slow)])
def test_the_search_never_sees_more_rows_than_a_chunk(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = table(rows, 16)
    sizes: list[int] = []
    encode, fit = aqlm.encode, aqlm.fit
    monkeypatch.setattr(tables, "CHUNK_WEIGHTS", 4096 * 16)
    monkeypatch.setattr(tables, "SAMPLE_WEIGHTS", 2000 * 16)
    monkeypatch.setattr(aqlm, "encode", lambda part, *rest: (sizes.append(len(part)), encode(part, *rest))[1])
    monkeypatch.setattr(aqlm, "fit", lambda part, *rest: (sizes.append(len(part)), fit(part, *rest))[1])
    found = quantized(weight.bfloat16(), statistics, "1x4g8")
    assert max(sizes) <= 4096 and sum(sizes[1:]) == rows and 1700 < sizes[0] < 2300
    assert found.matrix.out_features == rows and found.relative_error < 0.6


# ------------------------------------------------------------------------------------------------------ awkward tables


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_zeros_stay_zero(scheme: str) -> None:
    weight, statistics = table()
    weight[7] = weight[-1] = 0
    assert (quantized(weight, statistics, scheme).matrix.stored().dequantize()[[7, -1]] == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_no_number_is_refused(scheme: str) -> None:
    weight, statistics = table()
    weight[3, 5] = math.nan
    with pytest.raises(QuantizationError, match="weight holds NaN"):
        quantized(weight, statistics, scheme)
    broken = TableStatistics(statistics.head, torch.full((FEATURES, FEATURES), math.inf), statistics.row_weights)
    with pytest.raises(QuantizationError, match="inputs hold NaN"):
        quantized(table()[0], broken, scheme)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_moments_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = table()
    draw = torch.Generator().manual_seed(1)
    hidden, gradients = torch.randn(2, 50, FEATURES, generator=draw)
    ids = torch.randint(VOCABULARY, (50,), generator=draw)
    monkeypatch.setattr(tables, "MOST_PROBABILITIES", 7 * VOCABULARY)
    collected = TableMoments(VOCABULARY, FEATURES, weight.device)
    for part in range(0, 50, 20):
        inside = slice(part, part + 20)
        collected.add(ids[inside], hidden[inside], lambda states: states @ weight.T)
        collected.add_gradients(gradients[inside])
    found = collected.statistics(head=True, embedding=True)
    probabilities = (hidden @ weight.T).softmax(1)
    left_open = 1 - probabilities.square().sum(1, keepdim=True)
    assert found.head is not None and found.embedding is not None
    torch.testing.assert_close(found.head, (left_open * hidden).T @ hidden / 50)
    torch.testing.assert_close(found.embedding, tables.GRADIENT_PRICE * gradients.T @ gradients / 50)
    usage = ids.bincount(minlength=VOCABULARY) + probabilities.sum(0)
    assert found.row_weights.mean() == pytest.approx(1)
    assert torch.equal(found.row_weights.argsort(stable=True), usage.argsort(stable=True))


def test_hidden_states_and_tokens_alone_will_do() -> None:
    collected = TableMoments(VOCABULARY, FEATURES, torch.device("cpu"))
    hidden = torch.randn(40, FEATURES, generator=torch.Generator().manual_seed(0))
    collected.add(torch.arange(40) % 5, hidden)
    tied, head, input_table = (collected.statistics(*duties) for duties in ((True, True), (True, False), (False, True)))
    assert tied.head is not None and tied.embedding is not None
    torch.testing.assert_close(tied.head, hidden.T @ hidden / 40)
    assert tied.embedding.diagonal().mean() == pytest.approx(
        float(tables.EMBEDDING_SHARE * tied.head.diagonal().mean())
    )
    assert head.embedding is None and input_table.head is None
    assert (tied.row_weights[:5] > tied.row_weights[5]).all()


@pytest.mark.parametrize("word", SCHEMES)
def test_layouts_and_bits_are_those_of_the_scheme(word: str) -> None:
    weight, statistics = table()
    matrix, scheme = quantized(weight, statistics, word).matrix, parse_scheme(word)
    assert matrix.scheme == word and matrix.bits() == scheme.stored_bits(VOCABULARY, FEATURES)
    for tensors, layouts in (
        (matrix.tensors(), scheme.stored_layouts(VOCABULARY, FEATURES)),
        (matrix.packed_tensors(), scheme.native_layouts(VOCABULARY, FEATURES)),
    ):
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        assert found == {name: (getattr(torch, layout.dtype), layout.shape) for name, layout in layouts.items()}
