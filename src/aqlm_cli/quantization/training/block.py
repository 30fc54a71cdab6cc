"""Block fit: codebooks, scales, norms and biases of a quantized block are trained, codes stay.

Matrices were quantized one by one. Trained together, to the output of the same block of the base model on the same
inputs, they compensate each other's errors. Adam on the squared error, with learning rates in units of each tensor's
own root mean square, so that codebooks, scales and norms need no rates of their own (a tensor of zeros stays as it is).
The best state on the validation set is kept.

Each token's error is relative to its own output: from some block on, the first token of a sequence holds nine tenths
of the energy of all (arXiv 2402.17762), and the next norm removes that; a sum over tokens would see little but this
token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aqlm_cli.errors import QuantizationError
from aqlm_cli.models.hidden_states import Activations, autocast, run_block
from aqlm_cli.models.walk import BlockInput
from aqlm_cli.quantization.training.schedule import copied, learning_rate_factor, put_back, root_mean_square
from aqlm_cli.spec.quantize import FitConfig
from aqlm_kernels import QuantizedLayer


@dataclass(frozen=True, eq=False)
class BlockData:
    """Arguments of a block for the sequences with some numbers, and its targets `[n, ..., d]`."""

    given: Callable[[Tensor], BlockInput]
    targets: Tensor | Activations
    dtype: torch.dtype  # of the matmuls
    device: torch.device
    per_token: bool  # errors are relative to each token's own target; False: to that of all tokens

    def error(self, output: Tensor, target: Tensor) -> Tensor:
        """Error of each token, `[b, ...]` of `[b, ..., d]`."""
        square = (output - target).square().mean(-1)
        if not self.per_token:
            return square
        energy = target.square().mean(-1)
        return square / torch.where(energy > 0, energy, 1.0)

    def relative_error(self, block: nn.Module, sequences: Tensor, batch: int) -> float:
        """The error over the sequences with these numbers, as a share of that of an output of zeros."""
        error = energy = 0.0
        for chosen in sequences.split(batch):
            target = self.targets[chosen].to(self.device)
            output, _ = run_block(block, self.given(chosen), self.dtype)
            error += float(self.error(output, target).sum(dtype=torch.float64))
            energy += self._energy(target)
        return error / energy if energy > 0 else 0.0

    def energy(self, sequences: Tensor, batch: int) -> float:
        """The error that an output of zeros has, summed over the sequences with these numbers."""
        return sum(self._energy(self.targets[chosen].to(self.device)) for chosen in sequences.split(batch))

    def _energy(self, target: Tensor) -> float:
        return float(self.error(torch.zeros_like(target), target).sum(dtype=torch.float64))


def tuned_parameters(block: nn.Module, prefix: str = "") -> dict[str, nn.Parameter]:
    """Parameters that block fit trains, by path: those of quantized layers, and every vector (norms and biases)."""
    found: dict[str, nn.Parameter] = {}
    for path, module in block.named_modules(prefix=prefix):
        if isinstance(module, QuantizedLayer):
            parameters = module.trainable()
        else:
            parameters = {name: one for name, one in module.named_parameters(recurse=False) if one.ndim == 1}
        found |= {f"{path}.{name}": parameter for name, parameter in parameters.items()}
    return found


def fit_block(
    block: nn.Module, data: BlockData, training: Tensor, held_out: Tensor, settings: FitConfig, rng: torch.Generator
) -> tuple[float, float]:
    """Train the block in place on the `training` sequences; keep the state that is best on the `held_out` ones.

    Returns the held-out error before and after.
    """
    parameters, epochs = tuned_parameters(block), settings.epochs or 0
    steps_per_epoch = math.ceil(len(training) / settings.batch)
    tokens = training.numel() * math.prod(data.targets.shape[1:-1])
    energy = data.energy(training, settings.batch) / tokens or 1.0
    optimizer = torch.optim.Adam(
        [{"params": [parameter], "lr": _rate(parameter, settings)} for parameter in parameters.values()],
        betas=(0.9, 0.95),
        eps=1e-12,  # gradients of a relative error are small; the usual 1e-8 would damp the rates
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, steps_per_epoch * epochs, settings.warmup_steps, settings.min_lr_ratio),
    )
    before = best = data.relative_error(block, held_out, settings.batch)
    kept, stale = copied(parameters), 0
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for _ in range(epochs):
        for chosen in _shuffled(training, settings.batch, rng):
            given = data.given(chosen)
            with autocast(data.device, data.dtype):
                output = given(block)
            loss = data.error(output.float(), data.targets[chosen].to(data.device)).mean() / energy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        error = data.relative_error(block, held_out, settings.batch)
        stale = 0 if error < best else stale + 1
        if error < best:
            best, kept = error, copied(parameters)
        if settings.patience is not None and stale >= settings.patience:
            break
    put_back(parameters, kept)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return before, best


@torch.no_grad()
def round_block(block: nn.Module, prefix: str = "") -> None:
    """Round all trained parameters of the block at `prefix` to the bits in which they are stored.

    First the codebooks and scales of each layer are brought into the range of float16, which fitting may have left.
    """
    for module in block.modules():
        if isinstance(module, QuantizedLayer):
            module.balance()
            stored, trained = module.matrix().stored().tensors(), module.trainable()
            for name in stored.keys() & trained.keys():
                trained[name].copy_(stored[name])
    round_to_16_bits(tuned_parameters(block, prefix))


@torch.no_grad()
def round_to_16_bits(parameters: Mapping[str, nn.Parameter]) -> None:
    """Round to float16, as the parameters are stored, so that every later step sees the stored values."""
    for name, parameter in parameters.items():
        rounded = parameter.half().float()
        if not bool(rounded.isfinite().all()):
            raise QuantizationError(f"{name.lstrip('.')}: a value is out of the range of float16")
        parameter.copy_(rounded)


def _rate(parameter: Tensor, settings: FitConfig) -> float:
    if settings.learning_rate_unit == "absolute":
        return settings.learning_rate
    return settings.learning_rate * root_mean_square(parameter)


def _shuffled(sequences: Tensor, batch: int, rng: torch.Generator) -> Iterator[Tensor]:
    yield from sequences[torch.randperm(len(sequences), generator=rng)].split(batch)
