"""Matmuls of one x with layers of any mix of schemes, in one compiled call, and rows of a quantized table."""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_cases import Case
from torch import nn

from aqlm_kernels import AdditiveLinear, KernelError, UniformMatrix, why_not_compiled
from aqlm_kernels.cpu.rows import rows_of
from aqlm_kernels.cpu.stacks import NONE, OUTPUTS, Matmuls, matmuls

pytestmark = pytest.mark.usefixtures("nan_filled_outputs")

INPUTS = 576


def additive(num_codebooks, bits, group_size, outputs, kind="integers"):
    case = Case(num_codebooks, bits, group_size, outputs, INPUTS // group_size, rows=1)
    return AdditiveLinear(getattr(case, kind)()[1])


def uniform(bits, group_size, outputs, kind="integers", exponent=0):
    draw = torch.Generator().manual_seed(bits * outputs)
    groups = INPUTS // group_size
    levels = torch.randint(1 << bits, (outputs, INPUTS), generator=draw, dtype=torch.uint8)
    zeros = torch.randint(1 << bits, (outputs, groups), generator=draw, dtype=torch.uint8)
    scales = 2.0 ** torch.randint(-2, 3, (outputs, groups), generator=draw)
    if kind == "reals":
        scales = 0.5 + torch.rand(outputs, groups, generator=draw)
    numbers = torch.tensor(bits, dtype=torch.uint8), torch.tensor(exponent, dtype=torch.int16)
    return UniformMatrix(levels, zeros, scales if kind == "float32" else scales.half(), *numbers).module()


def dense(outputs, dtype):
    draw = torch.Generator().manual_seed(outputs)
    layer = nn.Linear(INPUTS, outputs, bias=False)
    layer.weight.data = torch.randint(-3, 4, (outputs, INPUTS), generator=draw).to(dtype)
    return layer


MIXES = {
    "one": lambda: [additive(2, 8, 8, 65)],
    "one stack": lambda: [additive(2, 8, 8, outputs) for outputs in (130, 1, 64)],
    "a stack of the first and the last": lambda: [additive(2, 8, 8, 65), additive(3, 8, 16, 63), additive(2, 8, 8, 9)],
    "three schemes": lambda: [additive(1, 8, 8, 65), additive(4, 8, 4, 63), additive(5, 4, 8, 200)],
    "dense": lambda: [dense(65, torch.float16), dense(1, torch.bfloat16), dense(200, torch.float32)],
    "uniform": lambda: [uniform(4, 64, 65), uniform(8, 32, 1), uniform(3, 36, 200)],
    "uniform of one scheme": lambda: [uniform(4, 64, 65), uniform(4, 64, 130), uniform(4, 64, 1)],
    "uniform with an exponent": lambda: [uniform(2, 64, 65, exponent=-3), uniform(2, 64, 9), uniform(6, 576, 9)],
    "all kinds": lambda: [dense(63, torch.float16), uniform(5, 16, 100), additive(2, 8, 8, 65)],
    "dense beside additive": lambda: [additive(2, 8, 8, 65), dense(63, torch.float16), additive(2, 8, 8, 100)],
}


def weight_of(layer):
    return layer.weight.detach().float() if isinstance(layer, nn.Linear) else layer.matrix().dequantize()


def product(x, layers, lut_bytes, threads=2):
    """y of each layer, out of the y of all."""
    shared = Matmuls.of(layers)
    y = matmuls(x.numpy(), shared.fields, lut_bytes, threads)[0]
    assert len(y) == shared.outputs
    return [
        torch.from_numpy(y[start:][: layer.out_features]) for layer, start in zip(layers, shared.starts, strict=True)
    ]


@pytest.mark.parametrize("lut_bytes", [0, 2])
@pytest.mark.parametrize("mix", MIXES)
def test_matmuls_of_integers_are_exact_for_every_mix(mix, lut_bytes):
    layers = MIXES[mix]()
    x = torch.randint(-3, 4, (1, INPUTS), generator=torch.Generator().manual_seed(3)).float()
    for layer, y in zip(layers, product(x, layers, lut_bytes), strict=True):
        assert torch.equal(y, x[0] @ weight_of(layer).T)


@pytest.mark.parametrize("mix", MIXES)
def test_one_wrong_weight_shows_in_its_own_layer_alone(mix):
    layers = MIXES[mix]()
    x = torch.ones(1, INPUTS)
    before = product(x, layers, 0)
    last = layers[-1]
    if isinstance(last, nn.Linear):
        last.weight.data[0, -1] += 1
    else:
        last.scales.data[0] *= 2
    *others, after = (torch.equal(*pair) for pair in zip(before, product(x, layers, 0), strict=True))
    assert all(others) and not after


@pytest.mark.parametrize("lut_bytes", [0, 1, 2])
def test_a_layer_gives_the_same_bits_alone_and_in_any_mix(lut_bytes):
    layers = [
        additive(2, 8, 8, 65, "reals"),
        uniform(4, 64, 100, "reals"),
        additive(3, 8, 16, 63, "reals"),
        uniform(4, 64, 30, "reals"),
        additive(2, 8, 8, 300, "reals"),
    ]
    x = torch.randn(1, INPUTS, generator=torch.Generator().manual_seed(3))
    for layer, y in zip(layers, product(x, layers, lut_bytes), strict=True):
        assert torch.equal(y, product(x, [layer], lut_bytes, threads=1)[0])


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_uniform_matmul_has_the_bits_of_its_layer(bits):
    layer = uniform(bits, 48, 70, "reals")
    x = torch.randn(1, INPUTS, generator=torch.Generator().manual_seed(3))
    exact = x[0].double() @ weight_of(layer).double().T
    (y,) = product(x, [layer], 0)
    assert (y - exact).norm() < 1e-6 * exact.norm()
    with torch.inference_mode():
        assert torch.equal(y, layer(x)[0])


def test_scales_that_float16_would_round_stay_in_float32():
    stored, trained = uniform(4, 64, 65), uniform(4, 64, 65, "float32")
    trained.scales.data *= 1 + 2**-20
    x = torch.ones(1, INPUTS)
    _, y = product(x, [stored, trained], 0)
    assert torch.equal(y, product(x, [trained], 0)[0])
    assert not torch.equal(y, product(x, [stored, trained], 0)[0])


def test_places_without_a_matmul_are_passed_over():
    shared = Matmuls.of([additive(2, 8, 8, 65)])
    padded = torch.cat([torch.zeros(1, shared.fields.shape[1]).long(), torch.from_numpy(shared.fields)]).numpy()
    assert padded[0, 0] == NONE and padded[0, OUTPUTS] == 0
    x = torch.ones(1, INPUTS).numpy()
    assert (matmuls(x, padded, 0, 1) == matmuls(x, shared.fields, 0, 1)).all()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: additive(1, 12, 8, 5), "has codebooks of 4096 entries; 256 at most are supported"),
        (lambda: dense(5, torch.float64), "has weights of type torch.float64"),
    ],
)
def test_a_layer_without_a_compiled_matmul_is_refused(layer, reason):
    assert why_not_compiled(layer()) == reason
    with pytest.raises(KernelError, match=reason):
        Matmuls.of([layer()])


class OtherKind:
    """A kind of matrix that the decoder has no compiled code for."""

    kind = "other"

    def __init__(self, weight):
        self.weight, self.out_features, self.in_features = weight, *weight.shape

    def rows(self, index):
        return OtherKind(self.weight.index_select(0, index))

    def dequantize(self):
        return 2 * self.weight


TABLES = {
    "other": lambda: OtherKind(torch.randn(70, INPUTS, generator=torch.Generator().manual_seed(5))),
    "2x8g8": lambda: additive(2, 8, 8, 70, "reals").matrix(),
    "4x8g4": lambda: additive(4, 8, 4, 70, "reals").matrix(),
    "1x12g8": lambda: additive(1, 12, 8, 70, "reals").matrix(),
    "3x5g16": lambda: additive(3, 5, 16, 70, "reals").matrix(),
    "int4g64": lambda: uniform(4, 64, 70, "reals").matrix(),
    "int8g36": lambda: uniform(8, 36, 70, "reals", exponent=-5).matrix(),
    "float16": lambda: torch.randn(70, INPUTS, generator=torch.Generator().manual_seed(5)).half(),
}


@pytest.mark.parametrize("table", TABLES)
def test_rows_are_those_of_the_dequantized_table_bit_for_bit(table):
    matrix = TABLES[table]()
    rows, dense = rows_of(matrix), matrix.float() if isinstance(matrix, torch.Tensor) else matrix.dequantize()
    ids = torch.tensor([69, 0, 3, 3, 17])
    assert torch.equal(rows.rows(ids), dense[ids])
    for token in ids.tolist():
        row = torch.from_numpy(rows.row(token))
        assert torch.equal(row, dense[token][None])
        row += 1  # is no part of the table
        assert torch.equal(rows.rows(ids), dense[ids])


@pytest.mark.parametrize("table", TABLES)
def test_a_token_without_a_row_never_reaches_compiled_code(table):
    with pytest.raises(IndexError):
        rows_of(TABLES[table]()).row(70)
