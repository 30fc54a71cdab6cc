from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aqlm_cli.quantization.training.distill import Distillation, Training, begin, one_step, train
from aqlm_cli.quantization.training.distributed import World
from aqlm_cli.quantization.training.optimizers import Adam, trust_ratio
from aqlm_cli.quantization.training.pv import CodeSteps
from aqlm_cli.spec.finetune import CodesConfig, FinetuneConfig
from aqlm_kernels import AdditiveLinear, AdditiveMatrix

OUT, IN, GROUP = 12, 32, 8
GROUPS = OUT * IN // GROUP


def layer(seed: int = 0) -> AdditiveLinear:
    rng = torch.Generator().manual_seed(seed)
    return AdditiveLinear(
        AdditiveMatrix(
            codes=torch.randint(16, (OUT, IN // GROUP, 2), generator=rng, dtype=torch.uint8),
            codebooks=torch.randn(2, 16, GROUP, generator=rng),
            scales=torch.rand(OUT, generator=rng) + 0.5,
        )
    )


def steps(one: AdditiveLinear, lamb: bool = False, **settings: Any) -> CodeSteps:
    return CodeSteps({"one": one}, CodesConfig(**{"share": 1.0, "trust_ratio": None, "beam": 16, **settings}), lamb)


def weight(one: AdditiveLinear) -> Tensor:
    return one.matrix().dequantize()


def pushed(codes: CodeSteps, gradient: Tensor, rate: float) -> int:
    codes.ahead["one"].grad = gradient.to(codes.ahead["one"].dtype)
    return codes.step("one", rate)


def nearest(one: AdditiveLinear, target: Tensor) -> Tensor:
    """For every group the sum of two entries that is nearest to `target` [out, in], of all there are."""
    first, second = one.codebooks.detach()
    sums = (first[:, None] + second[None]).flatten(0, 1)  # [K * K, g]
    points = sums[None] * one.scales.detach()[:, None, None]  # [out, K * K, g]
    found = [
        row[torch.cdist(groups.view(-1, GROUP), row).argmin(1)] for groups, row in zip(target, points, strict=True)
    ]
    return torch.stack([row.flatten() for row in found])


def test_gradients_of_the_weights_codebooks_and_scales_are_those_of_the_dequantized_layer() -> None:
    one, x = layer(), torch.randn(5, IN)
    for parameter in one.parameters():
        parameter.requires_grad_(True)
    codes = steps(one)
    with codes.learning():
        y = one(x)
        y.square().sum().backward()
    written = weight(one).requires_grad_(True)
    wanted = x @ written.T
    wanted.square().sum().backward()
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(codes.ahead["one"].grad, written.grad)
    found = one.codebooks.grad.clone(), one.scales.grad.clone()
    one.zero_grad()
    one(x).square().sum().backward()
    torch.testing.assert_close(found, (one.codebooks.grad, one.scales.grad), rtol=1e-4, atol=1e-4)


def test_every_group_gets_the_codes_nearest_to_where_its_weights_have_run() -> None:
    one, gradient = layer(), torch.randn(OUT, IN)
    before, rate = weight(one), 3.0
    codes = steps(one)
    changed = pushed(codes, gradient, rate)
    target = before - rate * codes.units["one"] * gradient.sign()
    torch.testing.assert_close(weight(one), nearest(one, target), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight(one) + codes.ahead["one"], target, rtol=1e-4, atol=1e-4)
    moved = (weight(one) != before).view(-1, GROUP).any(1)
    assert changed == int(moved.sum()) > GROUPS // 2


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_only_the_groups_that_are_furthest_ahead_move(share: float) -> None:
    one, size = layer(), torch.rand(GROUPS, 1)
    codes, before = steps(one, share=share), one.codes.clone()
    codes.ahead["one"].data.copy_((3 * size * torch.randn(GROUPS, GROUP).sign()).view(OUT, IN))
    pushed(codes, torch.zeros(OUT, IN), 1.0)
    moved = (one.codes != before).any(2).flatten()
    allowed = size.flatten().argsort(descending=True)[: math.ceil(share * GROUPS)]
    assert set(moved.nonzero().flatten().tolist()) <= set(allowed.tolist()) and bool(moved.any())


def test_a_step_ends_for_a_matrix_when_the_furthest_groups_have_changed_it_enough() -> None:
    ahead, wanting = 3 * torch.rand(GROUPS, 1) * torch.randn(GROUPS, GROUP).sign(), set[int]()
    apart = ahead.square().sum(1)
    for ratio in (None, 0.3, 0.01):
        one = layer()
        before, codes = weight(one), steps(one, trust_ratio=ratio)
        codes.ahead["one"].data.copy_(ahead.view(OUT, IN))
        count = pushed(codes, torch.zeros(OUT, IN), 1.0)
        change = (weight(one) - before).view(GROUPS, GROUP).square().sum(1)
        moved = set(change.nonzero().flatten().tolist())
        assert count == len(moved)
        if ratio is None:
            wanting = moved  # those that are nearer to other codes than their own
            continue
        last = min(moved, key=lambda group: float(apart[group]))
        assert moved == {group for group in wanting if apart[group] >= apart[last]} != wanting
        # Without the last one, which always goes, or it would stop all others for good.
        assert float(change.sum() - change[last]) <= (ratio * float(before.norm())) ** 2 < float(change.sum())


def test_weights_that_run_ahead_stay_where_they_are_while_codebooks_move() -> None:
    one = layer()
    codes = steps(one)
    pushed(codes, torch.randn(OUT, IN), 0.1)
    before = weight(one) + codes.ahead["one"].detach()
    with codes.staying("one"):
        one.codebooks.data.mul_(1.1)
        one.scales.data.add_(0.2)
    torch.testing.assert_close(weight(one) + codes.ahead["one"], before)


def test_half_the_memory_comes_to_nearly_the_same() -> None:
    whole, half = layer(), layer()
    first, second = steps(whole, share=0.1), steps(half, share=0.1, state="bfloat16")
    for number in range(1, 20):
        gradient = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(number)) + 0.5
        pushed(first, gradient, 0.02)
        pushed(second, gradient, 0.02)
    kept = [*second.ahead.values(), second.optimizer.moments["second/one"]]
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16} and len(second.optimizer.moments) == 2
    ahead = [one + codes.ahead["one"] for one, codes in ((weight(whole), first), (weight(half), second))]
    assert float((ahead[0] - ahead[1]).norm() / ahead[0].norm()) < 0.01


# ----------------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adam_is_that_of_torch(beta1: float) -> None:
    ours, theirs = torch.ones(7), nn.Parameter(torch.ones(7))
    adam, reference = Adam(beta1, 0.95), torch.optim.Adam([theirs], lr=0.1, betas=(beta1, 0.95), eps=1e-12)
    for _ in range(8):
        gradient = torch.randn(7)
        ours -= 0.1 * adam.direction("one", gradient)
        theirs.grad = gradient.clone()
        reference.step()
        torch.testing.assert_close(ours, theirs.detach())
    assert adam.moments.keys() == {"steps/one", "second/one", *(["first/one"] if beta1 else [])}


def test_lamb_moves_in_units_of_the_present_norm() -> None:
    values, direction = torch.randn(50), torch.randn(50)
    step = 0.01 * trust_ratio(values, direction) * direction
    assert float(step.norm()) == pytest.approx(0.01 * float(values.norm()))
    assert trust_ratio(values, torch.zeros(50)) == 0 == trust_ratio(torch.zeros(50), direction)


# ------------------------------------------------------------------------------------------------------------- training


def lesson() -> tuple[AdditiveLinear, Distillation]:
    """A student with some codes of the teacher's replaced; all else is the same."""
    rng = torch.Generator().manual_seed(1)
    student, embeddings, head = layer(), torch.randn(40, IN, generator=rng), torch.randn(40, OUT, generator=rng) / 4
    written = weight(student).clone()
    with torch.no_grad():
        student.codes[:, 0, 0] = (student.codes[:, 0, 0] + 1) % 16
    ids = torch.randint(40, (24, 6), generator=rng)
    data = Distillation(
        lambda ids: student(embeddings[ids]),
        lambda ids: embeddings[ids] @ written.T,
        lambda states: states @ head.T,
        lambda states: states @ head.T,
        tuple,
        ids[8:],
        ids[:8],
        torch.float32,
        torch.device("cpu"),
        World(),
    )
    return student, data


def settings(**codes: Any) -> FinetuneConfig:
    return FinetuneConfig(
        steps=40,
        batch=8,
        learning_rate=1e-3,
        evaluate_every=10,
        codes={"share": 0.1, "learning_rate": 0.1, "trust_ratio": 0.2, "beam": 16, **codes},
    )


def started(section: FinetuneConfig) -> tuple[AdditiveLinear, Distillation, Training]:
    student, data = lesson()
    parameters = {"one.codebooks": student.codebooks, "one.scales": student.scales}
    return student, data, begin(data, parameters, {"one": student}, section)


def test_codes_that_learn_come_nearer_than_codebooks_alone() -> None:
    best = []
    for share in (0.0, 0.1):
        student, data, training = started(settings(share=share))
        before = student.codes.clone()
        train(data, training, settings(share=share), 0, lambda *_: None)
        assert bool((student.codes != before).any()) == (training.changed > 0) == (share > 0)
        assert data.held_out_divergence(4) == pytest.approx(training.best, rel=1e-5), "the best codes are what remains"
        best.append(training.best)
    assert best[1] < 0.6 * best[0]


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_a_stored_training_resumes_to_the_same_codes(state: str) -> None:
    section = settings(state=state)
    wanted, data, whole = started(section)
    train(data, whole, section, 0, lambda *_: None)

    class Stop(Exception):
        pass

    def stopping(now: Training, loss: float) -> None:
        if now.step == 15:
            raise Stop

    _, data, training = started(section)
    with pytest.raises(Stop):
        train(data, training, section, 0, stopping)
    kept, facts = {name: tensor.clone() for name, tensor in training.tensors().items()}, training.facts()
    student, data, again = started(section)
    again.restore(kept, facts)
    train(data, again, section, 0, lambda *_: None)
    for name, tensor in wanted.matrix().tensors().items():
        assert torch.equal(tensor, student.matrix().tensors()[name]), name
    assert again.changed == whole.changed > facts["changed"]


def test_what_was_only_timed_leaves_no_trace() -> None:
    section = settings(learning_rate=1.0)
    _, data, training = started(section)
    before = {name: tensor.clone() for name, tensor in training.values.items()}
    for _ in range(3):
        one_step(data, training, section, 0)
    assert training.changed > 0
    training.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.values.items())
    assert training.codes is not None and not any(bool(ahead.any()) for ahead in training.codes.ahead.values())
    assert (training.step, training.changed) == (0, 0)
    assert not training.optimizer.moments and not training.codes.optimizer.moments
