from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.training import distill
from aqlm_cli.quantization.training.distill import (
    ChunkedDivergence,
    Distillation,
    Training,
    begin,
    one_step,
    train,
)
from aqlm_cli.quantization.training.distributed import World
from aqlm_cli.spec.finetune import FinetuneConfig

CPU = torch.device("cpu")
VOCABULARY, WIDTH = 50, 16


def direct(student: Tensor, teacher: Tensor, head: Tensor, student_head: Tensor) -> Tensor:
    ours, theirs = torch.log_softmax(student @ student_head.T, 1), torch.log_softmax(teacher @ head.T, 1)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_loss_and_gradient_are_those_of_whole_logits(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "CHUNK", 7)
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(tokens, WIDTH, generator=rng, dtype=torch.float64) for _ in range(2))
    head = torch.randn(VOCABULARY, WIDTH, generator=rng)
    ours = student.float().requires_grad_(True)
    weight = head.clone().requires_grad_(True)
    loss = ChunkedDivergence.apply(ours, teacher.float(), lambda x: x @ weight.T, lambda x: x @ head.T, weight)
    (3 * loss).backward()
    exact, exact_head = student.requires_grad_(True), head.double().requires_grad_(True)
    wanted = direct(exact, teacher, head.double(), exact_head)
    (3 * wanted).backward()
    assert ours.grad is not None and exact.grad is not None
    assert weight.grad is not None and exact_head.grad is not None
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), exact_head.grad, rtol=1e-4, atol=1e-6)
    same = lambda x: x @ head.T  # noqa: E731
    assert float(ChunkedDivergence.apply(teacher.float(), teacher.float(), same, same)) == pytest.approx(0, abs=1e-6)


def test_logits_never_exist_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "CHUNK", 5)
    rows: list[int] = []
    softmax = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, dim: rows.append(len(x)) or softmax(x, dim))
    states, head = torch.randn(23, WIDTH), torch.randn(VOCABULARY, WIDTH)
    ChunkedDivergence.apply(states, states, lambda x: x @ head.T, lambda x: x @ head.T)
    assert max(rows) == 5 and sum(rows) == 2 * 23


# ------------------------------------------------------------------------------------------------------------- training


def lesson(windows: int = 12) -> tuple[nn.Module, Distillation]:
    """A student whose one linear layer has to find the teacher's."""
    rng = torch.Generator().manual_seed(0)
    embeddings = torch.randn(VOCABULARY, WIDTH, generator=rng)
    teacher, student = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        for layer in (teacher, student):
            layer.weight.copy_(torch.randn(WIDTH, WIDTH, generator=rng))
            layer.bias.copy_(torch.randn(WIDTH, generator=rng))
    teacher.requires_grad_(False)
    ids = torch.randint(VOCABULARY, (windows, 6), generator=rng)
    head = torch.randn(VOCABULARY, WIDTH, generator=rng)
    data = Distillation(
        lambda ids: student(embeddings[ids]),
        lambda ids: teacher(embeddings[ids]),
        lambda states: states @ head.T,
        lambda states: states @ head.T,
        tuple,
        ids[4:],
        ids[:4],
        torch.float32,
        CPU,
        World(),
    )
    return student, data


def settings(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig(
        **{"steps": 12, "batch": 4, "micro_batch": 4, "learning_rate": 0.05, "evaluate_every": 3, **changes}
    )


def taught(student: nn.Module, data: Distillation, section: FinetuneConfig) -> Training:
    training = begin(data, dict(student.named_parameters()), {}, section)
    train(data, training, section, 0, lambda training, loss: None)
    return training


def test_the_student_comes_nearer_and_is_left_without_gradients() -> None:
    student, data = lesson()
    training = taught(student, data, settings(learning_rate=0.1))
    held_out = [point["held_out"] for point in training.curve]
    assert [point["step"] for point in training.curve] == [0, 3, 6, 9, 12]
    assert held_out[-1] < 0.7 * held_out[0]
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_the_best_state_on_the_held_out_sequences_is_what_remains() -> None:
    student, data = lesson()
    training = taught(student, data, settings(learning_rate=2.0, steps=30, min_lr_ratio=1.0))
    held_out = [point["held_out"] for point in training.curve]
    assert min(held_out) < held_out[-1], "such a rate destroys in the end"
    assert data.held_out_divergence(4) == pytest.approx(min(held_out), rel=1e-6) == pytest.approx(training.best)


def test_it_stops_when_patience_is_at_its_end() -> None:
    student, data = lesson()
    training = taught(student, data, settings(learning_rate=5.0, steps=300, patience=2, min_lr_ratio=1.0))
    assert training.step < 300
    held_out = [point["held_out"] for point in training.curve]
    assert len(held_out) - 1 - held_out.index(min(held_out)) == 2


def test_sequences_go_through_in_parts_with_the_same_gradient() -> None:
    found = []
    for at_once in (4, 1):
        student, data = lesson()
        training = begin(data, dict(student.named_parameters()), {}, settings())
        one_step(data, training, settings(micro_batch=at_once), 0)
        found.append([parameter.detach().clone() for parameter in student.parameters()])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_stored_training_resumes_to_the_same_bits(stop: int) -> None:
    student, data = lesson()
    taught(student, data, settings())
    wanted = [parameter.detach().clone() for parameter in student.parameters()]

    class Stop(Exception):
        pass

    def stopping(training: Training, loss: float) -> None:
        if training.step == stop:
            raise Stop

    student, data = lesson()
    training = begin(data, dict(student.named_parameters()), {}, settings())
    with pytest.raises(Stop):
        train(data, training, settings(), 0, stopping)
    kept, facts = {name: tensor.clone() for name, tensor in training.tensors().items()}, training.facts()
    student, data = lesson()
    again = begin(data, dict(student.named_parameters()), {}, settings())
    again.restore(kept, facts)
    train(data, again, settings(), 0, lambda training, loss: None)
    for parameter, there in zip(student.parameters(), wanted, strict=True):
        assert torch.equal(parameter, there)


def test_every_epoch_has_every_sequence_once_in_an_order_of_its_own() -> None:
    student, data = lesson(windows=4 + 10)
    seen: list[Tensor] = []
    teacher = data.teacher
    data = dataclasses.replace(data, teacher=lambda ids: seen.append(ids) or teacher(ids))
    section = settings(steps=10)
    training = begin(data, dict(student.named_parameters()), {}, section)
    for _ in range(10):
        one_step(data, training, section, 0)
    matches = (torch.cat(seen)[:, None] == data.training).all(2)  # [40, windows]
    chosen = matches.long().argmax(1).tolist()
    assert bool((matches.sum(1) == 1).all())
    epochs = [chosen[first : first + 10] for first in range(0, 40, 10)]
    assert all(Counter(epoch) == Counter(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_loss_that_is_no_number_ends_it_with_a_word_on_the_rate() -> None:
    student, data = lesson()
    broken = dataclasses.replace(data, student=lambda ids: data.student(ids) * torch.nan)
    with pytest.raises(QuantizationError, match="step 0: the KL is nan; a smaller --learning-rate may help"):
        one_step(broken, begin(broken, dict(student.named_parameters()), {}, settings()), settings(), 0)
