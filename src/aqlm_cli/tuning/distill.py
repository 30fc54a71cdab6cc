"""Tuning a quantized network as a whole: its logits towards those of the original, with the codes as they are.

The loss is KL(teacher || student), averaged over tokens: the P steps of PV-Tuning (arXiv 2405.14852). Codebooks,
scales, norms and biases move by Adam, each tensor at a rate in units of its own root mean square: one rate serves all.

The logits of all tokens are the largest tensor of a step, and never exist as a whole: head and loss go through the
tokens in chunks, and as the gradient of KL by the logits is softmax(student) - softmax(teacher), a chunk gives loss and
gradient at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from aqlm_cli.activations import autocast
from aqlm_cli.config import FinetuneConfig
from aqlm_cli.errors import QuantizationError
from aqlm_cli.seeds import generator
from aqlm_cli.tuning.descent import copied, put_back, root_mean_square, share_of_rate

CHUNK = 256
"""Tokens whose logits exist at a time: 50 MB for a vocabulary of 49,152."""

States: TypeAlias = Callable[[Tensor], Tensor]
"""Token ids `[b, L]` -> what enters the head, `[b, L, d]`."""


class ChunkedDivergence(torch.autograd.Function):
    """The mean over tokens of KL(teacher || student) for what enters the head, `[tokens, d]` each.

    `head` is the weight `[vocabulary, d]` of both; products are in its type, the softmax is in float32.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        gradient, total = torch.empty_like(student), 0.0
        for first in range(0, len(student), CHUNK):
            chunk = slice(first, first + CHUNK)
            ours = torch.log_softmax((student[chunk].to(head.dtype) @ head.T).float(), 1)  # [chunk, vocabulary]
            theirs = torch.log_softmax((teacher[chunk].to(head.dtype) @ head.T).float(), 1)
            weights = theirs.exp()
            total += float((weights * theirs.sub_(ours)).sum(dtype=torch.float64))
            difference = ours.exp_().sub_(weights).to(head.dtype)
            gradient[chunk] = (difference @ head).to(gradient.dtype) / len(student)
        ctx.save_for_backward(gradient)
        return student.new_tensor(total / len(student), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None, None


@dataclass(frozen=True, eq=False)
class Distillation:
    """What is compared on which text. `training` and `held_out` are token ids `[windows, L]`."""

    student: States
    teacher: States
    head: Tensor  # [vocabulary, d], in the type of products
    training: Tensor
    held_out: Tensor
    dtype: torch.dtype  # of the products
    device: torch.device

    def divergence(self, ids: Tensor) -> Tensor:
        """KL over the windows `[b, L]`, differentiable in what the student is made of."""
        ids = ids.to(self.device)
        with torch.no_grad(), autocast(self.device, self.dtype):
            teacher = self.teacher(ids).flatten(0, 1)
        with autocast(self.device, self.dtype):
            student = self.student(ids).flatten(0, 1)
        kl: Tensor = ChunkedDivergence.apply(student.float(), teacher.float(), self.head)  # type: ignore[no-untyped-call]
        return kl

    @torch.no_grad()
    def held_out_divergence(self, batch: int) -> float:
        parts = [float(self.divergence(ids)) * len(ids) for ids in self.held_out.split(batch)]
        return sum(parts) / len(self.held_out)


@dataclass(eq=False)
class Training:
    """Where it stands; all of it can be stored and restored, so that it goes on to the same bits."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Adam
    rates: Mapping[str, float]  # units of each tensor's rate: what it was like at the beginning
    kept: dict[str, Tensor]  # the parameters at their best
    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)  # held-out KL by step
    seconds: float = 0.0

    @property
    def best(self) -> float:
        """The least held-out KL so far."""
        found = (point["held_out"] for point in self.curve)
        return min((kl for kl in found if math.isfinite(kl)), default=math.inf)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"now/{name}": tensor.detach() for name, tensor in self.parameters.items()}
        found |= {f"best/{name}": tensor for name, tensor in self.kept.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            found |= {f"{key}/{name}": moments[key] for key in ("exp_avg", "exp_avg_sq") if moments}
        return found

    def facts(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds, "curve": self.curve}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Of a training that has just begun with the same parameters."""
        self.step, self.seconds, self.curve = facts["step"], facts["seconds"], list(facts["curve"])
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"now/{name}"])
            self.kept[name] = tensors[f"best/{name}"].clone()
            if f"exp_avg/{name}" in tensors:
                moments = {key: tensors[f"{key}/{name}"].clone() for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}


def begin(parameters: Mapping[str, nn.Parameter]) -> Training:
    """Nothing is trained yet; `parameters` will be, and ask for gradients from here on."""
    rates = {name: root_mean_square(parameter) for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    groups = [{"params": [parameter], "lr": 0.0} for parameter in parameters.values()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)
    return Training(parameters, optimizer, rates, copied(parameters))


def train(
    data: Distillation,
    training: Training,
    settings: FinetuneConfig,
    seed: int,
    stepped: Callable[[Training, float], None],
) -> None:
    """Go on from where it stands to the last step; the parameters then are the best ones on the held-out windows.

    `stepped` is called after every step with its KL. Raises QuantizationError where the loss is not finite.
    """
    if not training.curve:
        _judge(data, training, settings)
    while training.step < settings.steps and not _stale(training, settings):
        started = time.monotonic()
        loss = one_step(data, training, settings, seed)
        training.seconds += time.monotonic() - started
        if training.step % settings.evaluate_every == 0 or training.step == settings.steps:
            _judge(data, training, settings)
        stepped(training, loss)
    put_back(training.parameters, training.kept)
    for parameter in training.parameters.values():
        parameter.requires_grad_(False)


def one_step(data: Distillation, training: Training, settings: FinetuneConfig, seed: int) -> float:
    """The KL before it."""
    ids = data.training[_chosen(training.step, settings.batch, len(data.training), seed)]
    total = 0.0
    for part in ids.split(settings.windows_at_once):
        share = len(part) / len(ids)
        loss = data.divergence(part) * share
        loss.backward()
        total += float(loss.detach())
    if not math.isfinite(total):
        raise QuantizationError(f"step {training.step}: the KL is {total}; a smaller --learning-rate may help")
    share = share_of_rate(training.step, settings.steps, settings.warmup_steps, settings.final_rate)
    for group, name in zip(training.optimizer.param_groups, training.parameters, strict=True):
        group["lr"] = settings.learning_rate * share * training.rates[name]
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.step += 1
    return total


def _judge(data: Distillation, training: Training, settings: FinetuneConfig) -> None:
    started = time.monotonic()
    kl = data.held_out_divergence(settings.windows_at_once)
    training.seconds += time.monotonic() - started
    if kl < training.best:
        training.kept = copied(training.parameters)
    training.curve.append({"step": training.step, "seconds": training.seconds, "held_out": kl})


def _stale(training: Training, settings: FinetuneConfig) -> bool:
    if settings.patience is None:
        return False
    held_out = [point["held_out"] for point in training.curve]
    return len(held_out) - 1 - held_out.index(min(held_out)) >= settings.patience


def _chosen(step: int, batch: int, windows: int, seed: int) -> Tensor:
    """The windows of a step: all once in each epoch, in an order of its own, whatever came before."""
    places = range(step * batch, (step + 1) * batch)
    orders = {
        epoch: torch.randperm(windows, generator=generator(seed, f"epoch {epoch}"))
        for epoch in {place // windows for place in places}
    }
    return torch.stack([orders[place // windows][place % windows] for place in places])
