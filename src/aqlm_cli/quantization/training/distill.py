"""Distillation of the base model, the teacher, into a quantized network, the student, as a whole.

The loss is KL(teacher || student), averaged over tokens. Codebooks, scales, norms and biases are trained by Adam or
LAMB, with learning rates in units of each tensor's own size: one rate serves all. These are the P steps of PV-Tuning
(arXiv 2405.14852); its V steps, in which codes change, are in pv.py.

The logits of all tokens are the largest tensor of a step, and never exist as a whole: head and loss go through the
tokens in chunks, and as the gradient of KL by the logits is softmax(student) - softmax(teacher), a chunk gives loss and
gradient at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from aqlm_cli.errors import QuantizationError
from aqlm_cli.models.hidden_states import autocast
from aqlm_cli.quantization.training.distributed import World
from aqlm_cli.quantization.training.optimizers import Adam, trust_ratio
from aqlm_cli.quantization.training.pv import CodeSteps
from aqlm_cli.quantization.training.schedule import copied, learning_rate_factor, put_back, root_mean_square
from aqlm_cli.seeds import generator
from aqlm_cli.spec.finetune import FinetuneConfig
from aqlm_kernels import AdditiveLinear

CHUNK = 128
"""Tokens whose logits exist at a time: 25 MB in float32 for a vocabulary of 49,152; 256 take a quarter longer."""

BETAS = (0.9, 0.95)

States: TypeAlias = Callable[[Tensor], Tensor]
"""Token ids `[b, L]` -> inputs of the head, `[b, L, d]`."""

Head: TypeAlias = Callable[[Tensor], Tensor]
"""Inputs of the head, `[tokens, d]` -> logits, `[tokens, vocabulary]`."""


class ChunkedDivergence(torch.autograd.Function):
    """The mean over tokens of KL(teacher || student) for the inputs of their heads, `[tokens, d]` each.

    `trained` are the tensors of the student's head that a gradient is wanted for. The softmax is in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, student_head: Head, teacher_head: Head, *trained: Tensor
    ) -> Tensor:
        learning, total = any(ctx.needs_input_grad), 0.0
        gradients = [torch.zeros_like(tensor) for tensor in (student, *trained)] if learning else []
        for first in range(0, len(student), CHUNK):
            chunk = slice(first, first + CHUNK)
            with torch.set_grad_enabled(learning):
                entering = student[chunk].detach().requires_grad_(learning)
                logits = student_head(entering)  # [chunk, vocabulary]
            ours = torch.log_softmax(logits.detach().float(), 1)
            theirs = torch.log_softmax(teacher_head(teacher[chunk]).float(), 1)
            weights = theirs.exp()
            total += float((weights * theirs.sub_(ours)).sum(dtype=torch.float64))
            if not learning:
                continue
            difference = ours.exp_().sub_(weights).to(logits.dtype)
            found = torch.autograd.grad(logits, (entering, *trained), difference)
            gradients[0][chunk] = found[0] / len(student)
            for gradient, part in zip(gradients[1:], found[1:], strict=True):
                gradient.add_(part, alpha=1 / len(student))
        ctx.save_for_backward(*gradients)
        return student.new_tensor(total / len(student), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        by_student, *by_trained = (outer * gradient for gradient in ctx.saved_tensors)
        return by_student, None, None, None, *by_trained


@dataclass(frozen=True, eq=False)
class Distillation:
    """Teacher, student, and their text: token ids `[n, L]` to train on, and those of the validation set."""

    student: States
    teacher: States
    student_head: Head
    teacher_head: Head
    trained_head: Callable[[], tuple[Tensor, ...]]  # tensors of the student's head that are trained, at this step
    training: Tensor
    held_out: Tensor
    dtype: torch.dtype  # of the matmuls
    device: torch.device
    world: World

    def divergence(self, ids: Tensor) -> Tensor:
        """KL over the sequences `[b, L]`, differentiable in the parameters of the student."""
        ids = ids.to(self.device)
        with torch.no_grad(), autocast(self.device, self.dtype):
            teacher = self.teacher(ids).flatten(0, 1)
        with autocast(self.device, self.dtype):
            student = self.student(ids).flatten(0, 1)
            heads = self.student_head, self.teacher_head, *self.trained_head()
            kl: Tensor = ChunkedDivergence.apply(student.float(), teacher, *heads)  # type: ignore[no-untyped-call]
        return kl

    @torch.no_grad()
    def held_out_divergence(self, batch: int) -> float:
        parts = self.held_out.split(batch)[self.world.rank :: self.world.size]
        return self.world.total(sum(float(self.divergence(ids)) * len(ids) for ids in parts)) / len(self.held_out)


class _Objective(nn.Module):
    """The divergence as a module that holds all that is trained, as DistributedDataParallel wants it."""

    def __init__(self, data: Distillation, trained: list[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)
        self._data = data

    def forward(self, ids: Tensor) -> Tensor:
        return self._data.divergence(ids)


@dataclass(eq=False)
class Training:
    """State of a training. Stored and restored, it continues to the same bits."""

    parameters: Mapping[str, nn.Parameter]
    codes: CodeSteps | None
    optimizer: Adam
    rates: Mapping[str, float]  # unit of each tensor's learning rate: its root mean square at the start
    kept: dict[str, Tensor]  # `values` at their best
    objective: nn.Module
    step: int = 0
    changed: int = 0  # how often a group got other codes
    curve: list[dict[str, float]] = field(default_factory=list)  # held-out KL by step
    seconds: float = 0.0

    @property
    def values(self) -> dict[str, Tensor]:
        """All trained tensors, codes included."""
        return {**self.parameters, **({} if self.codes is None else self.codes.codes())}

    @property
    def best(self) -> float:
        """The least held-out KL so far."""
        found = (point["held_out"] for point in self.curve)
        return min((kl for kl in found if math.isfinite(kl)), default=math.inf)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"now/{name}": tensor.detach() for name, tensor in self.values.items()}
        found |= {f"best/{name}": tensor for name, tensor in self.kept.items()}
        found |= {f"moments/{key}": tensor for key, tensor in self.optimizer.moments.items()}
        return found if self.codes is None else found | self.codes.tensors()

    def facts(self) -> dict[str, Any]:
        return {"step": self.step, "changed": self.changed, "seconds": self.seconds, "curve": self.curve}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take a stored state into a training that has just started with the same parameters."""
        self.step, self.changed, self.seconds = facts["step"], facts["changed"], facts["seconds"]
        self.curve = list(facts["curve"])
        for name, values in self.values.items():
            values.copy_(tensors[f"now/{name}"])
            self.kept[name] = tensors[f"best/{name}"].clone()
        self.optimizer.restore("moments/", tensors)
        if self.codes is not None:
            self.codes.restore(tensors)

    def undo(self) -> None:
        """Return to the state at the start."""
        put_back(self.values, self.kept)
        self.step = self.changed = 0
        self.optimizer.moments.clear()
        if self.codes is not None:
            self.codes.forget()


def begin(
    data: Distillation,
    parameters: Mapping[str, nn.Parameter],
    layers: Mapping[str, AdditiveLinear],
    settings: FinetuneConfig,
) -> Training:
    """Start a training of `parameters`, which get gradients from here on, and of the codes of `layers`.

    A layer's codebooks and scales are among the parameters by its path.
    """
    rates = {name: root_mean_square(parameter) for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    codes = CodeSteps(layers, settings.codes, settings.optimizer == "lamb") if settings.codes.share else None
    trained = [*parameters.values(), *([] if codes is None else codes.ahead.values())]
    objective = data.world.parallel(_Objective(data, trained))
    training = Training(parameters, codes, Adam(*BETAS), rates, {}, objective)
    training.kept = copied(training.values)
    return training


def train(
    data: Distillation,
    training: Training,
    settings: FinetuneConfig,
    seed: int,
    stepped: Callable[[Training, float], None],
) -> None:
    """Train to the last step; the parameters are then the best ones on the validation set.

    `stepped` is called after every step with its KL. Raises QuantizationError where the loss is not finite.
    """
    if not training.curve:
        _evaluate(data, training, settings)
    while training.step < settings.steps and not _out_of_patience(training, settings):
        started = time.monotonic()
        loss = one_step(data, training, settings, seed)
        training.seconds += time.monotonic() - started
        if training.step % settings.evaluate_every == 0 or training.step == settings.steps:
            _evaluate(data, training, settings)
        stepped(training, loss)
    put_back(training.values, training.kept)
    for parameter in training.parameters.values():
        parameter.requires_grad_(False)


def one_step(data: Distillation, training: Training, settings: FinetuneConfig, seed: int) -> float:
    """Do one step and return the KL before it."""
    world, codes = data.world, training.codes
    ids = world.share(data.training[_chosen(training.step, settings.batch, len(data.training), seed)])
    parts, total = ids.split(settings.micro_batch), 0.0
    with nullcontext() if codes is None else codes.learning():
        for number, part in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else world.unsynchronized(training.objective):
                loss = training.objective(part) * (len(part) / len(ids))
                loss.backward()
            total += float(loss.detach())
    total = world.total(total) / world.size
    if not math.isfinite(total):
        raise QuantizationError(f"step {training.step}: the KL is {total}; a smaller --learning-rate may help")
    share = learning_rate_factor(training.step, settings.steps, settings.warmup_steps, settings.min_lr_ratio)
    training.step += 1
    _update(training, settings, share)
    return total


@torch.no_grad()
def _update(training: Training, settings: FinetuneConfig, share: float) -> None:
    """Update everything trained at this share of the learning rates, and clear the gradients."""
    rest, codes = dict(training.parameters), training.codes
    if codes is not None:
        for path in codes.layers:
            with codes.staying(path):
                for name in (f"{path}.codebooks", f"{path}.scales"):
                    _move(training, name, rest.pop(name), settings, share)
            training.changed += codes.step(path, share * settings.codes.learning_rate)
    for name, parameter in rest.items():
        _move(training, name, parameter, settings, share)


def _move(training: Training, name: str, parameter: nn.Parameter, settings: FinetuneConfig, share: float) -> None:
    if parameter.grad is None:  # an expert that no token went to
        return
    direction = training.optimizer.direction(name, parameter.grad)
    unit = trust_ratio(parameter, direction) if settings.optimizer == "lamb" else training.rates[name]
    parameter.sub_(direction, alpha=settings.learning_rate * share * unit)
    parameter.grad = None


def _evaluate(data: Distillation, training: Training, settings: FinetuneConfig) -> None:
    started = time.monotonic()
    kl = data.held_out_divergence(settings.micro_batch)
    training.seconds += time.monotonic() - started
    if kl < training.best:
        training.kept = copied(training.values)
    training.curve.append({"step": training.step, "seconds": training.seconds, "held_out": kl})


def _out_of_patience(training: Training, settings: FinetuneConfig) -> bool:
    if settings.patience is None:
        return False
    held_out = [point["held_out"] for point in training.curve]
    return len(held_out) - 1 - held_out.index(min(held_out)) >= settings.patience


def _chosen(step: int, batch: int, sequences: int, seed: int) -> Tensor:
    """Numbers of the sequences of a step: each once in an epoch, in an order that depends on seed and epoch alone."""
    places = range(step * batch, (step + 1) * batch)
    orders = {
        epoch: torch.randperm(sequences, generator=generator(seed, f"epoch {epoch}"))
        for epoch in {place // sequences for place in places}
    }
    return torch.stack([orders[place // sequences][place % sequences] for place in places])
