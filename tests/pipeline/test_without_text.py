"""Methods that look at the weights alone: no text is read, no calibration is made, and all other stages serve them."""

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

from aqlm_cli.quantization.methods import METHODS
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec.methods.information import InformationSettings
from aqlm_cli.spec.schemes import parse_scheme
from aqlm_kernels import MATRIX_KINDS, Matrix

RUN_FILE = """
model: tiny
threads: 1
calibrate: {data: "no-such-file.txt:10", sequence_length: 32}
quantize: {method: rtn, scheme: int4g64}
eval_ppl: {data: [notes.txt], sequence_length: 32}
"""

QUANTIZE = ("quantize", "--config", "run.yaml", "--out")

CHOICES = [
    ("rtn", "int4g64"),
    ("rtn", "nf4g64"),
    ("rtn", "cube4"),
    ("information", "nf3tg32"),
    ("blockfloat", "bfp6g16"),
    ("blockfloat", "bl4g16"),
]


@pytest.fixture(autouse=True)
def file(run_file: Path) -> None:
    run_file.write_text(RUN_FILE + commands.FINETUNE)


def told(*arguments: str) -> Any:
    result = commands.run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def stored(directory: str, kind: str) -> Mapping[str, Matrix]:
    """The matrices of an artifact, by path."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(Path(directory).glob("block-*.safetensors")):
        tensors |= load_file(path)
    ends = (".scales", ".exponents")
    paths = [name.rpartition(".")[0] for name in tensors if name.endswith(ends)]
    return {
        path: MATRIX_KINDS[kind].from_tensors(
            {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items() if name.startswith(f"{path}.")}
        )
        for path in paths
    }


@pytest.mark.parametrize(("method", "scheme"), CHOICES)
def test_they_run_without_text_and_give_what_the_method_gives(method: str, scheme: str) -> None:
    reports = told(*QUANTIZE, "run", "--method", method, "--scheme", scheme)
    assert not Path("run/calibration").exists()
    original, kind = load_file("tiny/model.safetensors"), parse_scheme(scheme).kind
    settings = InformationSettings() if method == "information" else None
    matrices = stored("run/quantized", kind)
    assert len(matrices) == reports["quantize"]["layers"] == 14
    for path, matrix in matrices.items():
        weight = original[f"{path}.weight"].float()
        unknown = LayerStatistics(torch.full((1, 1), torch.nan), 0)
        bound = parse_scheme(scheme).bound(weight.shape[1])
        wanted = METHODS[method](weight, unknown, bound, torch.Generator(), settings)
        assert torch.equal(matrix.dequantize(), wanted.stored().dequantize()), path
    assert 1 < told("eval-ppl", "run")["perplexity"] < 1e4


def test_errors_are_those_of_the_weights_and_are_called_so() -> None:
    printed = commands.run(*QUANTIZE, "run").output
    assert "of the weights alone, as no text is read" in printed and "calibrat" not in printed
    original = load_file("tiny/model.safetensors")
    manifest = json.loads(Path("run/quantized/manifest.json").read_text())
    for path, matrix in stored("run/quantized", "uniform").items():
        weight = original[f"{path}.weight"].float()
        error = float((matrix.dequantize() - weight).square().sum() / weight.square().sum())
        assert manifest["results"]["layers"][path]["relative_error"] == pytest.approx(error, rel=1e-4), path


def test_the_forecast_has_no_calibration_and_no_text_on_the_disk() -> None:
    stages = told("plan", "--config", "run.yaml")["forecast"]["stages"]
    assert list(stages) == ["quantize", "pack"]
    with_text = yaml.safe_load(RUN_FILE)
    with_text["calibrate"]["data"] = "notes.txt:10"
    Path("run.yaml").write_text(yaml.safe_dump(with_text))
    other = told("plan", "--config", "run.yaml", "--method", "gptq")["forecast"]["stages"]
    assert stages["quantize"]["disk_bytes"] < other["quantize"]["disk_bytes"]
    assert stages["quantize"]["memory_bytes"] < other["quantize"]["memory_bytes"]


def test_verify_and_status_know_of_no_calibration() -> None:
    told(*QUANTIZE, "run")
    assert told("verify", "run")["layer"].startswith("model.layers.")
    assert [stage["stage"] for stage in told("status", "run")["stages"]] == ["quantize", "pack"]
    card = Path("run/packed/README.md").read_text()
    assert "no text: the weights alone are looked at" in card
    file = next(Path("run/quantized").glob("block-000*"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert "is damaged" in refused("verify", "run")


def test_an_interrupted_run_resumes_to_the_same_bytes(interrupted_at: Callable[..., Result]) -> None:
    told(*QUANTIZE, "whole")
    assert interrupted_at("model.layers.1", 3, *QUANTIZE, "run").exit_code == 130
    resumed = commands.run(*QUANTIZE, "run").output
    assert "run/quantized.partial holds 1 of 2 blocks; resuming after them" in resumed
    assert commands.made("run") == commands.made("whole")
    assert "exists already, made with the same settings" in commands.run(*QUANTIZE, "run").output


@pytest.mark.parametrize(
    "changes",
    [
        {"fit": {"epochs": 1, "sequences": 4, "held_out": 2}},
        {"embeddings": "int4g64"},
        {"layers": [{"match": ".*down_proj", "method": "gptq"}]},
        {"layers": [{"match": "lm_head|model.embed_tokens", "scheme": "int4g64"}], "skip": []},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_text_is_read_where_anything_of_the_run_needs_it(changes: Mapping[str, Any]) -> None:
    settings = yaml.safe_load(RUN_FILE)
    settings["quantize"] |= changes
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    assert "no-such-file.txt" in refused(*QUANTIZE, "run")


def test_finetuning_calibrates_for_its_own_text_where_none_is_named() -> None:
    settings = yaml.safe_load(RUN_FILE)
    settings["calibrate"]["data"] = "notes.txt:10"
    Path("run.yaml").write_text(yaml.safe_dump(settings) + commands.FINETUNE)
    told(*QUANTIZE, "run")
    shutil.copytree("run", "named")
    assert told("finetune", "run")["finetune"]["after"] > 0
    assert Path("run/calibration").is_dir()
    assert told("finetune", "named", "--data", "notes.txt:10")["finetune"]["after"] > 0
    assert not Path("named/calibration").exists()
