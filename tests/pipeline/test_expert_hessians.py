"""The Hessians of experts: of the tokens routed to each, completed with those of all where they are few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import mixtures
from helpers.mixtures import model_of, planned, quantize, work_in
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aqlm_cli.models import load_network, resolve
from aqlm_cli.pipeline import block_work
from aqlm_cli.quantization.parallel import Task
from aqlm_cli.quantization.solvers.hessian import TOKENS_PER_FEATURE, LayerStatistics
from aqlm_cli.seeds import generator
from aqlm_kernels import is_fused

FAMILIES = sorted(mixtures.FAMILIES)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in(tmp_path, monkeypatch)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Task]:
    """Everything that is compressed, by path."""
    seen: dict[str, Task] = {}
    compress_all = block_work.compress_all

    def noted(todo: list[Task], *rest: Any) -> Any:
        seen.update({task.path: task for task in todo})
        return compress_all(todo, *rest)

    monkeypatch.setattr(block_work, "compress_all", noted)
    return seen


def measured_ids() -> Tensor:
    """Of the calibration, in the order in which quantization takes them."""
    ids = load_file("run/calibration/windows.safetensors")["ids"].long()
    return ids[torch.randperm(len(ids), generator=generator(0, "windows"))][:8]


def routed_inputs(network: nn.Module) -> dict[str, Tensor]:
    """Inputs of every expert's layers in the first block, from the fused module's own arguments."""
    given: list[Tensor] = []
    fused: Any = next(module for module in network.modules() if is_fused(module))
    fused.register_forward_pre_hook(lambda _, args: given.extend(args[:2]))
    with torch.no_grad():
        network(measured_ids(), use_cache=False)
    x, index = given[0], given[1]
    inputs = {}
    for number in range(fused.num_experts):
        own = x[(index == number).any(-1)]
        inputs[f"model.layers.0.mlp.experts.{number}.gate_up_proj"] = own
        weight = fused.gate_up_proj[number]
        projected = own @ (weight if fused.is_transposed else weight.T)
        projected += fused.gate_up_proj_bias[number] if fused.has_bias else 0
        inputs[f"model.layers.0.mlp.experts.{number}.down_proj"] = fused._apply_gate(projected)
    return inputs


def completed(inputs: dict[str, Tensor], path: str) -> Tensor:
    """H by the formula, in float64."""
    x, projection = inputs[path].double(), path.rpartition(".")[2]
    everyone = torch.cat([one for other, one in inputs.items() if other.endswith(projection)]).double()
    share = min(1.0, len(x) / (TOKENS_PER_FEATURE * x.shape[1]))
    own = x.T @ x / max(len(x), 1)
    return share * own + (1 - share) * everyone.T @ everyone / len(everyone)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hessian_of_an_expert_is_of_the_tokens_routed_to_it(family: str, tasks: dict[str, Task]) -> None:
    network = model_of(family)
    quantize()
    inputs = routed_inputs(network)
    shares = set()
    for path, x in inputs.items():
        statistics = tasks[path].statistics
        assert statistics.tokens == len(x)
        shares.add(len(x) >= TOKENS_PER_FEATURE * x.shape[1])
        wanted = completed(inputs, path)
        torch.testing.assert_close(
            statistics.second_moment.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
        )
    assert False in shares  # so that the completion takes part


def test_an_expert_without_a_token_is_quantized_by_the_hessian_of_the_others(tasks: dict[str, Task]) -> None:
    mixtures.save("gpt_oss", Path("tiny"))
    tensors = load_file("tiny/model.safetensors")
    tensors["model.layers.0.mlp.router.bias"][2] = -1e3
    save_file(tensors, "tiny/model.safetensors", {"format": "pt"})
    network = load_network(resolve("tiny"), torch.float32)
    quantize()
    inputs = routed_inputs(network)
    silent = [path for path, x in inputs.items() if not len(x)]
    for path in silent:
        assert tasks[path].statistics.tokens == 0
        torch.testing.assert_close(
            tasks[path].statistics.second_moment.double(), completed(inputs, path), rtol=1e-4, atol=1e-5
        )
    assert len(silent) == 2
    assert all(target.scheme is not None for target in planned().targets if target.path in silent)


@pytest.mark.slow
def test_one_expert_has_the_same_hessian_whether_or_not_the_others_are_quantized(tasks: dict[str, Task]) -> None:
    """What `verify` relies on."""
    model_of("qwen3_moe")
    path = "model.layers.0.mlp.experts.2.down_proj"
    quantize()
    whole = tasks[path].statistics
    quantize("--only", r".*experts\.2\.down_proj", "--overwrite")
    alone: LayerStatistics = tasks[path].statistics
    assert torch.equal(whole.second_moment, alone.second_moment) and whole.tokens == alone.tokens
