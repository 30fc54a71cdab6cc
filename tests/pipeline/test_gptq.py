"""Runs with the method gptq, from the plan to finetuning: the commands serve it as they serve any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import commands
from helpers.commands import refused
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import Result

from aqlm_cli.models import resolve
from aqlm_cli.models.native_checkpoint import native_matrices
from aqlm_cli.runs.artifact import open_artifact
from aqlm_kernels import Matrix, UniformMatrix

RUN_FILE = """
model: tiny
threads: 1
calibrate: {data: "notes.txt:10", sequence_length: 32, statistics_sequences: 2}
quantize: {method: gptq, scheme: int4g64, statistics_sequences: 8, fit: {sequences: 4, held_out: 2}}
pack: {format: native}
eval_ppl: {data: [notes.txt], sequence_length: 32}
"""

QUANTIZE = ("quantize", "--config", "run.yaml", "--out")


@pytest.fixture(autouse=True)
def gptq_run_file(run_file: Path) -> None:
    run_file.write_text(RUN_FILE + commands.FINETUNE)


def told(*arguments: str) -> Any:
    result = commands.run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def stored(directory: str) -> Mapping[str, Matrix]:
    """The matrices of an artifact of the run, by path."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        tensors |= load_file(path)
    paths = [name.removesuffix(".levels") for name in tensors if name.endswith(".levels")]
    own = {
        path: {key.removeprefix(f"{path}."): tensors[key] for key in tensors if key.startswith(path)} for path in paths
    }
    return {path: UniformMatrix.from_tensors(part) for path, part in own.items()}


def errors_of(run: str) -> Mapping[str, float]:
    layers = open_artifact(Path(run) / "quantized", "quantized").manifest.results["layers"]
    return {path: layer["relative_error"] for path, layer in layers.items()}


def test_all_stages_serve_it() -> None:
    planned = told("plan", "--config", "run.yaml")
    assert planned["plan"]["method"] == "gptq" and set(planned["plan"]["schemes"].values()) == {"int4g64"}
    told(*QUANTIZE, "run")
    quantized, packed = stored("run/quantized"), native_matrices(resolve("run/packed"))
    assert quantized.keys() == packed.keys() == planned["plan"]["schemes"].keys()
    for path, matrix in packed.items():
        assert matrix.scheme == "int4g64"
        assert torch.equal(matrix.dequantize(), quantized[path].dequantize()), path
    (file,) = Path("run/packed").glob("*.safetensors")
    assert file.stat().st_size == planned["forecast"]["safetensors_bytes"]

    assert 1 < told("eval-ppl", "run")["perplexity"] < 1e4
    assert 1 < told("evaluate", "run", "--kind", "ppl")["perplexity"] < 1e4
    assert told("verify", "run")["layer"] in quantized
    tuned = told("finetune", "run")["finetune"]
    assert tuned["after"] < tuned["before"]
    for path, matrix in stored("run/finetuned").items():
        before, after = quantized[path].tensors(), matrix.tensors()
        assert torch.equal(after["levels"], before["levels"]) and not torch.equal(after["scales"], before["scales"])


def test_its_errors_are_below_those_of_round_to_nearest_on_the_same_inputs() -> None:
    told(*QUANTIZE, "run")
    config = yaml.safe_load(RUN_FILE)
    config["quantize"] |= {"method": "rtn", "fit": {"epochs": 1, "sequences": 4, "held_out": 2}}  # which reads text
    Path("run.yaml").write_text(yaml.safe_dump(config))
    told(*QUANTIZE, "rounded")
    ours, theirs = errors_of("run"), errors_of("rounded")
    first = [path for path in ours if ".layers.0.self_attn." in path and ".o_proj" not in path]
    assert len(first) == 3 and all(ours[path] < 0.9 * theirs[path] for path in first)  # whose inputs are the same


def test_an_interrupted_run_resumes_to_the_same_bytes(interrupted_at: Callable[..., Result]) -> None:
    told(*QUANTIZE, "whole")
    assert interrupted_at("model.layers.1", 3, *QUANTIZE, "run").exit_code == 130
    resumed = commands.run(*QUANTIZE, "run").output
    assert "run/quantized.partial holds 1 of 2 blocks; resuming after them" in resumed
    assert commands.made("run") == commands.made("whole")
    settings = yaml.safe_load(Path("run/run.yaml").read_text())["quantize"]
    assert settings["gptq"] == {"order": "active", "damping": 0.01, "grid": "minmax"} and "aqlm" not in settings
    changed = RUN_FILE.replace("int4g64,", "int4g64, gptq: {order: none},")
    Path("run.yaml").write_text(changed)
    assert "quantize.gptq.order: active there, none here" in refused(*QUANTIZE, "run")


def test_a_group_size_that_does_not_divide_the_inputs_leaves_them_in_16_bits_with_the_reason() -> None:
    planned = told("plan", "--config", "run.yaml", "--scheme", "int4g128")["plan"]
    assert [path.rpartition(".")[2] for path in planned["schemes"]] == ["down_proj", "down_proj"]
    reasons = {reason for path, reason in planned["skipped"] if "layers" in path}
    assert reasons == {"64 input features are not a multiple of the group size 128"}


def test_single_layers_are_quantized_by_it_in_a_run_of_another_method() -> None:
    settings = yaml.safe_load(RUN_FILE)
    aqlm = {"rounds": 1, "ldlq_rounds": 1, "kmeans_iterations": 1}
    rule = {"match": ".*down_proj", "method": "gptq", "scheme": "int3g32"}
    section = {"statistics_sequences": 8, "scheme": "2x4g8", "aqlm": aqlm, "layers": [rule], "fit": {"epochs": 0}}
    Path("run.yaml").write_text(yaml.safe_dump({**settings, "quantize": {**section, "gptq": {"grid": "norm2.4"}}}))
    told(*QUANTIZE, "run")
    schemes = {path: matrix.scheme for path, matrix in native_matrices(resolve("run/packed")).items()}
    assert {path for path, scheme in schemes.items() if scheme == "int3g32"} == {
        f"model.layers.{index}.mlp.down_proj" for index in range(2)
    }
    assert told("verify", "run")["layer"] in schemes


def test_an_allocation_chooses_among_its_schemes_with_the_settings_of_the_run() -> None:
    settings = yaml.safe_load(RUN_FILE)
    settings["quantize"]["target"] = {"among": ["int2g64", "int4g64"], "tables": [], "mixes": 2, "sequences": 4}
    limit = "100000"

    def scores(**section: Any) -> Any:
        made = {**settings, "quantize": {**settings["quantize"], "gptq": section}}
        Path("run.yaml").write_text(yaml.safe_dump(made))
        shutil.rmtree("run", ignore_errors=True)
        told(*QUANTIZE, "run", "--target-size", limit)
        (file,) = Path("run/packed").glob("*.safetensors")
        assert file.stat().st_size <= int(limit)
        return json.loads(Path("run/allocation/scores.json").read_text())

    found = scores()
    words = {word for layer in found["layers"].values() for word in (option["word"] for option in layer["options"])}
    assert {"gptq:int2g64", "gptq:int4g64"} <= words
    assert told("verify", "run")["replayed"] == len(found["layers"])
    assert scores(grid="norm2.4")["layers"] != found["layers"]
