from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aqlm_cli.errors import QuantizationError
from aqlm_cli.models.walk import BlockInput
from aqlm_cli.quantization.training.block import BlockData, fit_block, round_block, round_to_16_bits, tuned_parameters
from aqlm_cli.spec.quantize import FitConfig
from aqlm_kernels import AdditiveLinear, AdditiveMatrix

WINDOWS, LENGTH, WIDTH = 24, 10, 16
TRAINING, HELD_OUT = torch.arange(16), torch.arange(16, WINDOWS)
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class KnownData(BlockData):
    inputs: Tensor  # [windows, L, d]


def given_of(inputs: Tensor) -> Callable[[Tensor], BlockInput]:
    return lambda windows: BlockInput.alone(inputs[windows])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A norm, a layer that is quantized, an activation, and a layer that is not."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.norm.bias.data = random(WIDTH, seed=6) / 4
        self.first = first
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight.data = random(WIDTH, WIDTH, seed=1) / 4
        self.second.bias.data = random(WIDTH, seed=2)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        change: Tensor = self.second(torch.relu(self.first(self.norm(hidden))))
        return hidden + change


def quantized() -> Block:
    """With one bit a weight of the original's first layer, its sign, and with scales that are too large."""
    weight = original().first.weight.view(WIDTH, WIDTH // 2, 2)
    codes = (weight > 0).long() @ torch.tensor([1, 2])
    codebook = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])[None]
    matrix = AdditiveMatrix(codes[..., None], codebook, 1.5 * weight.abs().mean((1, 2)))
    return Block(AdditiveLinear(matrix, original().first.bias))


def original() -> Any:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.weight.data, layer.bias.data = random(WIDTH, WIDTH, seed=3) / 4, random(WIDTH, seed=4)
    return Block(layer)


def block_data(dtype: torch.dtype = torch.float32, per_token: bool = False) -> KnownData:
    inputs = random(WINDOWS, LENGTH, WIDTH, seed=5)
    return KnownData(given_of(inputs), original()(inputs).detach(), dtype, CPU, per_token, inputs)


def settings(**changes: Any) -> FitConfig:
    return FitConfig.model_validate({"epochs": 4, "batch": 4, "learning_rate": 0.02, **changes})


def fit(block: nn.Module, seed: int = 0, data: BlockData | None = None, **changes: Any) -> tuple[float, float]:
    draw = torch.Generator().manual_seed(seed)
    return fit_block(block, data or block_data(), TRAINING, HELD_OUT, settings(**changes), draw)


def state(block: nn.Module) -> dict[str, Tensor]:
    """Exactly: a state_dict would round what is additive."""
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


# -------------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_lowers_the_error_on_sequences_it_never_trains_on(dtype: torch.dtype) -> None:
    block, data = quantized(), block_data(dtype)
    measured = data.relative_error(block, HELD_OUT, 3)
    before, after = fit(block, data=data, epochs=8)
    assert before == pytest.approx(measured, rel=1e-5)
    assert after < 0.6 * before
    assert after == pytest.approx(data.relative_error(block, HELD_OUT, 3), rel=1e-5)


def test_codes_and_unquantized_weights_stay_and_all_else_moves() -> None:
    block = quantized()
    before = state(block)
    fit(block)
    assert before.keys() - changed(before, state(block)) == {"first.codes", "second.weight"}
    assert tuned_parameters(block, "model.7").keys() == {
        "model.7.norm.weight",
        "model.7.norm.bias",
        "model.7.first.codebooks",
        "model.7.first.scales",
        "model.7.first.bias",
        "model.7.second.bias",
    }


def test_no_parameter_is_left_with_a_gradient_to_come() -> None:
    block = quantized()
    assert block.first.codebooks.requires_grad is False
    fit(block)
    assert not any(parameter.requires_grad for parameter in block.parameters())


def test_an_absurd_rate_leaves_the_block_as_it_was() -> None:
    block = quantized()
    before = state(block)
    error, kept = fit(block, learning_rate=1e6, warmup_steps=0)
    assert error == kept
    assert changed(before, state(block)) == set()


def test_its_inputs_are_not_changed() -> None:
    data = block_data()
    inputs, targets = data.inputs.clone(), data.targets.clone()
    fit(quantized(), data=data)
    assert torch.equal(data.inputs, inputs) and torch.equal(data.targets, targets)


def test_the_generator_alone_decides() -> None:
    blocks = [quantized() for _ in range(3)]
    for block, seed in zip(blocks, (0, 0, 1), strict=True):
        fit(block, seed)
    first, again, other = map(state, blocks)
    assert changed(first, again) == set()
    assert changed(first, other)


# ---------------------------------------------------------------------------------------------------------- the epochs


class ScriptedErrors:
    """Stands for the measurements on held-out windows: these errors, one after the other."""

    def __init__(self, errors: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: Iterator[float] = iter(errors)
        self.states: list[dict[str, Tensor]] = []
        monkeypatch.setattr(BlockData, "relative_error", lambda data, block, *_: self.next(block))

    def next(self, block: nn.Module) -> float:
        self.states.append(state(block))
        return next(self.left)


@pytest.mark.parametrize(
    ("errors", "best"), [([0.5, 0.4, 0.6, 0.3, 0.7], 3), ([0.5, 0.4, 0.4, 0.6, 0.7], 1), ([0.5, 0.6, 0.5, 0.9, 0.9], 0)]
)
def test_the_state_of_the_best_epoch_is_kept(errors: list[float], best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block = quantized()
    script = ScriptedErrors(errors, monkeypatch)
    assert fit(block) == (errors[0], errors[best])
    assert changed(script.states[best], state(block)) == set()
    assert all(changed(script.states[best], other) for number, other in enumerate(script.states) if number != best)


def test_an_error_that_is_no_number_is_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    block = quantized()
    script = ScriptedErrors([0.5, math.nan, 0.4, math.nan, math.inf], monkeypatch)
    assert fit(block) == (0.5, 0.4)
    assert changed(script.states[2], state(block)) == set()


@pytest.mark.parametrize(("patience", "measured"), [(None, 7), (1, 4), (2, 5), (3, 7)])
def test_it_stops_after_as_many_epochs_without_gain_as_it_may(
    patience: int | None, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ScriptedErrors([0.9, 0.8, 0.7, 0.7, 0.75, 0.6, 0.6], monkeypatch)
    fit(quantized(), epochs=6, patience=patience)
    assert len(script.states) == measured


def windows_trained_on(epochs: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The windows of every training step, as the block saw them."""
    seen: list[list[int]] = []
    data = block_data()
    forward = Block.forward

    def noting(block: Block, hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            matches = (hidden[:, None] == data.inputs).flatten(2).all(2)  # [b, windows]
            seen.append(matches.long().argmax(1).tolist())
        return forward(block, hidden)

    monkeypatch.setattr(Block, "forward", noting)
    fit(quantized(), data=data, epochs=epochs, batch=5)
    return seen


def test_every_epoch_goes_once_through_the_training_sequences_each_in_another_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = windows_trained_on(3, monkeypatch)
    assert [len(step) for step in steps] == [5, 5, 5, 1] * 3
    epochs = [list(chain(*steps[start : start + 4])) for start in (0, 4, 8)]
    assert all(sorted(epoch) == TRAINING.tolist() for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


# ----------------------------------------------------------------------------------------------------------- the rates


def one_step(**changes: Any) -> dict[str, float]:
    """How far one step of Adam moves each tensor at most, as a share of its own root mean square before."""
    block = quantized()
    before = {name: parameter.detach().clone() for name, parameter in tuned_parameters(block).items()}
    data = block_data()
    held_out = HELD_OUT[:1]
    draw = torch.Generator().manual_seed(0)
    fit_block(block, data, TRAINING, held_out, settings(epochs=1, batch=100, **changes), draw)
    return {
        name: float((parameter.detach() - before[name]).abs().max() / before[name].square().mean().sqrt())
        for name, parameter in tuned_parameters(block).items()
        if before[name].any()
    }


@pytest.mark.parametrize("rate", [1e-4, 1e-3])
def test_a_rate_in_units_of_rms_moves_every_tensor_by_the_same_share(rate: float) -> None:
    moves = one_step(learning_rate=rate, warmup_steps=0)
    assert {"first.codebooks", "first.scales", "norm.weight", "second.bias"} <= moves.keys()
    assert moves == pytest.approx(dict.fromkeys(moves, rate), rel=0.01)


def test_an_absolute_rate_moves_every_tensor_by_the_same_distance() -> None:
    moves = one_step(learning_rate=1e-3, warmup_steps=0, learning_rate_unit="absolute")
    sizes = {name: float(tensor.square().mean().sqrt()) for name, tensor in tuned_parameters(quantized()).items()}
    distances = {name: move * sizes[name] for name, move in moves.items()}
    assert distances == pytest.approx(dict.fromkeys(moves, 1e-3), rel=0.01)


def test_the_first_steps_are_smaller_while_it_warms_up() -> None:
    moves = one_step(learning_rate=1e-3, warmup_steps=3)
    assert moves == pytest.approx(dict.fromkeys(moves, 1e-3 / 4), rel=0.01)


@pytest.mark.parametrize("min_lr_ratio", [0.05, 1.0])
def test_the_rate_falls_as_half_a_cosine_to_its_final_share(
    min_lr_ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.Adam.step

    def noting(optimizer: torch.optim.Adam, *arguments: Any) -> Any:
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", noting)
    fit(quantized(), epochs=5, batch=4, warmup_steps=0, learning_rate_unit="absolute", min_lr_ratio=min_lr_ratio)
    shares = [min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * number / 20)) / 2 for number in range(20)]
    assert rates == pytest.approx([0.02 * share for share in shares], rel=1e-6)


# ------------------------------------------------------------------------------------------------------------ measuring


def test_the_relative_error_is_summed_over_sequences_whatever_the_batch() -> None:
    block, data = quantized(), block_data()
    output = block(data.inputs[HELD_OUT]).double()
    target = data.targets[HELD_OUT].double()
    expected = float((output - target).square().sum() / target.square().sum())
    for batch in 1, 3, 100:
        assert data.relative_error(block, HELD_OUT, batch) == pytest.approx(expected, rel=1e-5)
    assert data.relative_error(original(), HELD_OUT, 4) < 1e-12


def test_the_error_per_token_is_the_mean_of_each_token_s_own() -> None:
    block, data = quantized(), block_data(per_token=True)
    data.inputs[:, 0] *= 1e4  # as the first token of a window has it in deep blocks
    data.targets[:, 0] *= 1e4
    output = block(data.inputs[HELD_OUT]).double()
    target = data.targets[HELD_OUT].double()
    expected = float(((output - target).square().sum(2) / target.square().sum(2)).mean())
    for batch in 1, 3, 100:
        assert data.relative_error(block, HELD_OUT, batch) == pytest.approx(expected, rel=1e-5)


def test_fitted_per_token_a_token_of_great_energy_does_not_drown_the_others() -> None:
    def others(per_token: bool) -> float:
        block, data = quantized(), block_data(per_token=per_token)
        data.targets[:, 0] += 1e3 * random(WINDOWS, WIDTH, seed=7)
        fit(block, data=data, epochs=8)
        output, target = block(data.inputs)[HELD_OUT, 1:], data.targets[HELD_OUT, 1:]
        return float((output - target).square().sum() / target.square().sum())

    assert others(per_token=True) < 0.9 * others(per_token=False)


@pytest.mark.parametrize("per_token", [False, True])
def test_targets_of_zero_have_no_error_and_can_be_fitted_to(per_token: bool) -> None:
    data = block_data()
    silent = BlockData(data.given, torch.zeros_like(data.targets), torch.float32, CPU, per_token)
    assert fit(quantized(), data=silent) == (0, 0)


def test_a_tuned_value_that_float16_cannot_hold_is_refused_by_name() -> None:
    block = quantized()
    block.norm.weight.data[2] = 1e6
    with pytest.raises(QuantizationError, match=r"norm\.weight: a value is out of the range of float16"):
        round_to_16_bits(tuned_parameters(block))


def test_what_was_fitted_is_brought_into_the_range_of_float16_before_it_is_rounded() -> None:
    block = quantized()
    block.first.codebooks.data *= 2.0**21
    block.first.scales.data *= 2.0**-21
    before = state(block)
    wanted = block.first.matrix().dequantize()
    round_block(block)
    torch.testing.assert_close(block.first.matrix().dequantize(), wanted, rtol=1e-3, atol=0)
    assert all(torch.equal(tensor, tensor.half().float()) for tensor in tuned_parameters(block).values())
    assert changed(before, state(block)) >= {"first.codebooks", "first.scales"}


def test_codebooks_in_8_bits_are_rounded_to_them() -> None:
    matrix = replace(quantized().first.matrix(), entry_bits=8)
    block = Block(matrix.module(original().first.bias))
    block.first.codebooks.data += 0.3 * random(*matrix.codebooks.shape, seed=7)
    expected = block.first.matrix().stored()
    round_block(block)
    assert torch.equal(block.first.codebooks, expected.codebooks)
    assert block.first.matrix().scheme == "1x2g2c8"
    steps = block.first.codebooks / block.first.codebooks.abs().amax(1, keepdim=True) * 127
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=0.1)


def test_fitting_goes_the_same_way_wherever_the_power_of_two_lies() -> None:
    blocks = [quantized() for _ in range(2)]
    blocks[1].first.codebooks.data *= 2.0**-8
    blocks[1].first.scales.data *= 2.0**8
    errors = [fit(block) for block in blocks]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4) and errors[0][1] < errors[0][0]
    torch.testing.assert_close(*(block.first.matrix().dequantize() for block in blocks), rtol=1e-3, atol=1e-5)
