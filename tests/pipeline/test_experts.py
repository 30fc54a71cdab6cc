"""Models whose experts lie in one parameter, from text to a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import mixtures
from helpers.commands import refused, run
from helpers.mixtures import model_of, planned, quantize, work_in
from helpers.packing import logits, write_weight
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from aqlm_cli.models import load_network, resolve
from aqlm_cli.models.blocks import find_blocks, linears, unfuse
from aqlm_cli.models.experts import expert_groups, expert_place
from aqlm_cli.pipeline.job import make_job
from aqlm_cli.pipeline.stages import quantize as stage
from aqlm_cli.runs.directory import read_run
from aqlm_cli.runs.files import load_tensors, read_metadata
from aqlm_cli.spec.run_file import build_config
from aqlm_kernels import MATRIX_KINDS, SingleExperts, is_fused, quantized_layers

FAMILIES = sorted(mixtures.FAMILIES)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in(tmp_path, monkeypatch)


def with_run_written_in(network: nn.Module, made: str = "quantized") -> nn.Module:
    """The network in float16 with the matrices, norms and biases of the run in their places, by this test's hand."""
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    for file in sorted(Path("run", made).glob("block-*.safetensors")):
        kinds = json.loads(read_metadata(file)["kinds"])
        for path, kind in kinds.items():
            matrix = MATRIX_KINDS[kind].from_tensors(load_tensors(file, f"{path}."))
            write_weight(network, path, matrix.dequantize().half().float())
        for name, values in load_tensors(file).items():
            place = expert_place(network, name) if name.endswith(".bias") else None
            if place is not None:
                network.get_parameter(place.parameter)[place.number] = values
            elif name.endswith(".bias") or name.rpartition(".")[0] not in kinds:
                network.get_parameter(name).data = values
    return network


# ------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_with_single_experts_gives_the_same_logits(family: str) -> None:
    network = model_of(family)
    wanted = logits(network)
    for block in find_blocks(network).modules:
        assert unfuse(block) is block
    assert sum(isinstance(module, SingleExperts) for module in network.modules()) == 2
    assert not any(is_fused(module) for module in network.modules())
    torch.testing.assert_close(logits(network), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_taking_experts_apart_copies_no_weight() -> None:
    block = find_blocks(model_of("gpt_oss")).modules[0]
    before = {parameter.untyped_storage().data_ptr() for parameter in block.parameters() if parameter.ndim > 2}
    layers = linears(unfuse(block), "")
    experts = [path for group in expert_groups(block) for path in group]
    assert len(experts) == 8
    assert {layers[path].weight.untyped_storage().data_ptr() for path in experts} == before


# ------------------------------------------------------------------------------------------------------ from end to end


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_quantized_and_packed_and_the_router_stays(family: str) -> None:
    network = model_of(family)
    told = quantize()
    plan = planned()
    experts = [target for target in plan.targets if target.kind == "expert"]
    count = next(len(p) for p in network.parameters() if p.ndim == 3)
    assert len(experts) == 2 * count * 2 and all(target.scheme is not None for target in experts)
    # Routers are linear layers in no family of these: they hold a bare matrix, and are listed with the reason.
    assert all("expert" not in target.path or target.kind == "expert" for target in plan.targets)
    assert all(target.scheme is None for target in plan.targets if target.path.endswith(("gate", "router")))
    before = logits(network)
    wanted = logits(with_run_written_in(network))
    assert (wanted - before).norm() > 0.01 * before.norm()  # so the comparisons mean something
    packed = resolve("run/packed")
    for loaded in (load_network(packed, torch.float32), AutoModelForCausalLM.from_pretrained("run/packed").float()):
        torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert told["pack"]["layers"] == len(plan.quantized)
    # In the native format codes stay codes, of every expert, for aqlm and for transformers with the plugin.
    result = run("pack", "run", "--format", "native", "--overwrite")
    assert result.exit_code == 0, result.output
    stock = AutoModelForCausalLM.from_pretrained("run/packed", dtype=torch.float32)
    for loaded in (load_network(resolve("run/packed"), torch.float32), stock):
        assert set(quantized_layers(loaded)) == {target.path for target in plan.quantized}
        torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))
    result = run("eval-ppl", "run", "--json")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_dense_files_have_the_names_that_the_base_model_has(family: str) -> None:
    model_of(family)
    quantize()
    base, packed = load_file("tiny/model.safetensors"), load_file("run/packed/model.safetensors")
    assert any(".experts.0." in name for name in base)
    assert {name: tensor.shape for name, tensor in packed.items()} == {n: t.shape for n, t in base.items()}


def test_experts_that_are_left_out_stay_and_the_others_do_not() -> None:
    network = model_of("gpt_oss")
    quantize("--skip", r".*experts\.[01]\..*")
    wanted = logits(with_run_written_in(network))
    found = logits(load_network(resolve("run/packed"), torch.float32))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    reasons = {target.reason for target in planned().targets if ".experts.1." in target.path}
    assert reasons == {r"skipped by '.*experts\.[01]\..*'"}


def test_experts_that_the_files_have_one_by_one_can_be_left_out_one_by_one() -> None:
    network = model_of("qwen3_moe")
    quantize("--skip", r".*experts\.[01]\..*")
    wanted = logits(with_run_written_in(network))
    found = logits(load_network(resolve("run/packed"), torch.float32))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_codes_of_experts_are_refused_by_a_format_without_them() -> None:
    model_of("mixtral")
    line = refused("quantize", "--config", "run.yaml", "--out", "run", "--format", "transformers")
    assert "model.layers.0.mlp.experts.0.gate_up_proj" in line and "--format native or dense" in line
    assert not Path("run/quantized").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "olmoe"])
def test_finetuning_trains_the_experts_too_and_verify_finds_them_again(family: str) -> None:
    network = model_of(family)
    quantize()
    result = run("finetune", "run", "--json")
    assert result.exit_code == 0, result.output
    before, after = (load_file(f"run/{name}/block-000.safetensors") for name in ("quantized", "finetuned"))
    assert before.keys() == after.keys()
    scales = [name for name in before if "experts" in name and name.endswith("scales")]
    assert any(not torch.equal(before[name], after[name]) for name in scales)
    wanted = logits(with_run_written_in(network, "finetuned"))
    found = logits(load_network(resolve("run/packed"), torch.float32))
    # The finetuned norm outside the blocks is in what is packed alone.
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    result = run("verify", "run")
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_a_run_of_experts_resumes_to_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model_of("qwen3_moe")
    quantize()
    whole = {path.name: path.read_bytes() for path in Path("run/quantized").glob("block-*")}
    saved = stage.ResumeState.keep
    count = 0

    def keep(state: Any, compressed: Any) -> None:
        nonlocal count
        saved(state, compressed)
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(stage.ResumeState, "keep", keep)
    stopped = run("quantize", "--config", "run.yaml", "--out", "again")
    assert stopped.exit_code == 130, stopped.output
    assert run("quantize", "--config", "run.yaml", "--out", "again").exit_code == 0
    assert {path.name: path.read_bytes() for path in Path("again/quantized").glob("block-*")} == whole


@pytest.mark.slow
@pytest.mark.parametrize("format", ["dense", "native"])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_the_planned_size_is_that_of_the_file(family: str, format: str) -> None:
    mixtures.save(family, Path("tiny"))
    AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.bfloat16).save_pretrained("tiny")
    quantize("--format", format)
    known = make_job(read_run(Path("run")).config, Path("run")).preflight
    assert known.packed_bytes == sum(path.stat().st_size for path in Path("run/packed").glob("*.safetensors"))


def test_every_expert_has_a_hessian_in_the_cost_estimate_and_a_quarter_takes_part() -> None:
    model_of("qwen3_moe")
    shape = make_job(build_config(None, Path("run.yaml"), {}), Path("run")).preflight.shape.blocks[0]
    experts, attention = 6 * (64**2 + 32**2), 4 * 64**2
    assert shape.hessian_entries == attention + experts + 64**2  # and the mean of all
    assert shape.entries_per_token == attention + experts / 4
    weights = [target.weights for target in shape.targets if target.kind == "expert"]
    assert shape.weights_per_token == sum(target.weights for target in shape.targets) - 0.75 * sum(weights)
