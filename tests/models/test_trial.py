"""What is packed is loaded before it is published, and what could not be is refused before anything is quantized."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.meddling import FAMILIES, SHARED
from helpers.packing import logits, packed, quantized_model, quantized_run, relative_rms, with_weights_written_out
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from aqlm_cli.errors import ArtifactError, PlanError
from aqlm_cli.models import blocks, load_network, resolve, trial
from aqlm_cli.pipeline.preflight import preflight
from aqlm_cli.spec.run_file import build_config

LOOKING: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mamba2": ("out_proj", FAMILIES["mamba2"]),
    "gpt_bigcode": ("c_proj", FAMILIES["gpt_bigcode"]),
    "nanochat": ("o_proj", FAMILIES["nanochat"]),
}
"""Families that initialize a linear layer from the module that holds it, whether it was loaded or not."""


def planned(directory: Path, format: str, *skip: str) -> None:
    settings = {"model": str(directory), "pack": {"format": format}, "calibrate": {"sequence_length": 64}}
    config = build_config(None, None, {**settings, "quantize": {"scheme": "2x4g8", "skip": list(skip)}})
    preflight(config, resolve(config.model))


@pytest.mark.parametrize("family", LOOKING)
def test_a_family_that_accesses_the_weight_of_a_quantized_layer_is_refused_first(family: str, tmp_path: Path) -> None:
    name, settings = LOOKING[family]
    directory = tiny_models.save(family, tmp_path / "model", **settings)
    wanted = (
        rf"accesses the weight of .*\.0\..*{name} in a network of the family {family}.*--skip '\.\*\\.{name}'.*dense"
    )
    with pytest.raises(PlanError, match=wanted):
        planned(directory, "transformers")
    planned(directory, "dense")
    planned(directory, "transformers", rf".*\.{name}")


@pytest.mark.parametrize("family", LOOKING)
def test_such_a_family_is_packed_densely_or_with_these_layers_in_16_bits(family: str, tmp_path: Path) -> None:
    name, settings = LOOKING[family]
    directory = tiny_models.save(family, tmp_path / "model", **settings)
    for format, skip, bound in (("dense", [], 2e-3), ("transformers", [rf".*\.{name}"], 1e-5)):
        run, plan = quantized_model(directory, tmp_path / format, "2x4g8", skip=skip)
        wanted = logits(with_weights_written_out(run, plan))
        place = packed(run, format).directory
        assert relative_rms(logits(load_network(resolve(str(place)), torch.float32)), wanted) < bound
        assert relative_rms(logits(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)), wanted) < bound


def test_a_run_of_such_a_family_is_not_packed_with_codes(tmp_path: Path) -> None:
    run, _ = quantized_run(tmp_path, "mamba2", "2x4g8", skip=[], **FAMILIES["mamba2"])
    with pytest.raises(PlanError, match="use --format dense"):
        packed(run, "transformers")
    assert run.artifact("packed") is None


def test_a_layer_whose_weight_only_the_forward_reads_is_found_too(tmp_path: Path, monkeypatch: Any) -> None:
    """Also where the plan has not seen it."""
    monkeypatch.setattr(blocks, "weight_readers", lambda *_: {})
    directory = tiny_models.save("llama", tmp_path / "model")
    kind = type(load_network(resolve(str(directory)), torch.float32).model.layers[0].mlp)
    forward = kind.forward

    def reading(self: Any, x: Any) -> Any:
        return forward(self, x * self.down_proj.weight.new_ones(()))

    monkeypatch.setattr(kind, "forward", reading)
    with pytest.raises(PlanError, match=r"weight of model\.layers\.0\.mlp\.down_proj.*--skip '\.\*\\\.down_proj'"):
        planned(directory, "transformers")


def test_a_head_of_any_name_is_listed_and_keeps_its_weight(tmp_path: Path) -> None:
    run, plan = quantized_run(tmp_path, "biogpt", "2x4g8", skip=[], **tiny_models.SHAPE)
    place = packed(run).directory
    listed = json.loads((place / "config.json").read_text())["quantization_config"]["linear_weights_not_to_quantize"]
    assert {"output_projection", "output_projection.weight"} <= set(listed)
    stock = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    assert isinstance(stock.get_output_embeddings(), nn.Linear)
    assert relative_rms(logits(stock), logits(with_weights_written_out(run, plan))) < 1e-5


@pytest.mark.parametrize("format", ["transformers", "dense"])
def test_blocks_that_share_weights_keep_these_and_are_packed(format: str, tmp_path: Path) -> None:
    run, plan = quantized_run(tmp_path, "zamba2", "2x4g8", skip=[], **SHARED)
    reasons = {target.path: target.reason for target in plan.skipped if "shared_transformer" in target.path}
    assert any(str(reason).startswith("its weight is also model.layers.") for reason in reasons.values())
    expected = with_weights_written_out(run, plan)
    for name, parameter in expected.named_parameters():
        if format == "dense" or name.rpartition(".")[0] not in plan.schemes:
            parameter.data = parameter.data.half().float()
    wanted, place = logits(expected), packed(run, format).directory
    assert relative_rms(logits(load_network(resolve(str(place)), torch.float32)), wanted) < 1e-5
    assert relative_rms(logits(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)), wanted) < 1e-5


# ------------------------------------------------------------------------------------------------- after it is written


def test_a_packed_checkpoint_agrees_with_itself_until_it_is_changed(tmp_path: Path) -> None:
    run, plan = quantized_run(tmp_path, "llama", "2x4g8", skip=[])
    place = packed(run).directory
    assert trial.disagreement(resolve(str(place))) is None
    config = json.loads((place / "config.json").read_text())
    listed = config["quantization_config"]["linear_weights_not_to_quantize"]

    def with_list(names: list[str]) -> str | None:
        changed = {**config["quantization_config"], "linear_weights_not_to_quantize": names}
        (place / "config.json").write_text(json.dumps({**config, "quantization_config": changed}))
        return trial.disagreement(resolve(str(place)))

    assert with_list([]) == "transformers would find no tensor for lm_head.codebooks"
    # A layer that is listed keeps its weight in transformers, and we go by the codes.
    coded = [target.path for target in plan.quantized]
    original = load_file(Path(run.config.model) / "model.safetensors")
    weights = {f"{path}.weight": original[f"{path}.weight"].half() for path in coded}
    save_file({**load_file(place / "model.safetensors"), **weights}, place / "model.safetensors", {"format": "pt"})
    assert with_list([*listed, *coded]) == "transformers computes other logits with it than aqlm"


def test_a_model_that_does_not_load_is_not_published_and_the_earlier_one_stays(
    tmp_path: Path, monkeypatch: Any
) -> None:
    run, _ = quantized_run(tmp_path, "llama", "2x4g8")
    before = packed(run).directory / "model.safetensors"
    content = before.read_bytes()
    monkeypatch.setattr(trial, "disagreement", lambda packed: "it has no wings")
    with pytest.raises(ArtifactError, match="not published in the format dense: it has no wings"):
        packed(run, "dense", overwrite=True)
    assert before.read_bytes() == content
