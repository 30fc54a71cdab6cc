"""Runs with random quantized layers, as `quantize` would leave them, and what is packed of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers import tiny_models
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aqlm_cli.events import Emit, silent
from aqlm_cli.models import load_network, resolve
from aqlm_cli.models.blocks import count_parameters, describe_layers, find_blocks
from aqlm_cli.models.experts import expert_place
from aqlm_cli.pipeline.job import make_job
from aqlm_cli.pipeline.stage_reports import PackReport
from aqlm_cli.pipeline.stages.pack import pack
from aqlm_cli.quantization.methods import rtn
from aqlm_cli.runs.directory import RunDirectory, open_run, read_run
from aqlm_cli.runs.files import save_tensors
from aqlm_cli.runs.stages import QUANTIZE, StageKey
from aqlm_cli.spec.config import PackConfig
from aqlm_cli.spec.plan import Plan, Target, make_plan
from aqlm_cli.spec.run_file import build_config
from aqlm_cli.spec.schemes import AdditiveScheme, UniformScheme, parse_scheme
from aqlm_cli.spec.selection import Selection
from aqlm_cli.spec.treatment import parse_treatment
from aqlm_kernels import AdditiveMatrix, Matrix

SKIPPED = "model.layers.1.mlp.down_proj"
SKIP = ["lm_head", r".*layers\.1\.(mlp\.down_proj|fc2)"]
NORM = "model.layers.0.input_layernorm.weight"
TUNED_NORM = torch.linspace(0.5, 2, 64).half().float()


def random_matrix(target: Target) -> Matrix:
    """A compressed matrix of the target's shape, of entries that float16 holds exactly."""
    generator = torch.Generator().manual_seed(sum(target.path.encode()))
    scheme = target.scheme
    if isinstance(scheme, UniformScheme):
        weight = 0.1 * torch.randn(target.out_features, target.in_features, generator=generator)
        return rtn.quantize(weight, None, scheme, generator, None)  # type: ignore[arg-type]
    assert isinstance(scheme, AdditiveScheme)
    groups = target.in_features // scheme.group_size
    codes = torch.randint(
        0, scheme.codebook_size, (target.out_features, groups, scheme.num_codebooks), generator=generator
    )
    codebooks = torch.randn(scheme.num_codebooks, scheme.codebook_size, scheme.group_size, generator=generator)
    scales = 0.1 * torch.rand(target.out_features, generator=generator) + 0.05
    return AdditiveMatrix(codes, codebooks.half().float(), scales.half().float())


def matrices(plan: Plan) -> dict[str, Matrix]:
    return {target.path: random_matrix(target) for target in plan.quantized}


def quantized_run(
    tmp_path: Path,
    family: str = "llama",
    scheme: str = "2x8g8",
    dtype: str | None = None,
    edited: dict[str, Tensor] | None = None,
    mixed: str | None = None,
    skip: Sequence[str] = SKIP,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[RunDirectory, Plan]:
    """A run as `quantize` leaves it: one tuned norm, one layer skipped, and random codes for all others.

    `edited` are other weights for the model, `mixed` is another scheme for its first layer, `settings` go into the
    model's configuration before it is made and `config` into its file afterwards.
    """
    directory = tiny_models.save(family, tmp_path / "model", **settings)
    if edited is not None:
        save_file(edited, directory / "model.safetensors", {"format": "pt"})
    if dtype is not None:
        AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).save_pretrained(directory)
    if config is not None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return quantized_model(directory, tmp_path, scheme, mixed, skip)


def quantized_model(
    directory: Path, tmp_path: Path, scheme: str = "2x8g8", mixed: str | None = None, skip: Sequence[str] = ()
) -> tuple[RunDirectory, Plan]:
    """The run of a model that is there."""
    source = resolve(str(directory))
    network = load_network(source, torch.float32)
    plan = make_plan(describe_layers(network), count_parameters(network), Selection(parse_treatment(scheme), skip, []))
    if mixed is not None:
        plan = replace(plan, targets=(replace(plan.targets[0], scheme=parse_scheme(mixed)), *plan.targets[1:]))
    method = "aqlm" if isinstance(parse_scheme(scheme), AdditiveScheme) else "rtn"
    run_config = build_config(
        None,
        None,
        {
            "model": str(directory),
            "quantize": {"scheme": scheme, "method": method},
            "calibrate": {"data": f"{tmp_path}/notes.txt:4,builtin:4"},
        },
    )
    run = open_run(tmp_path / "run", run_config)
    with run.stage(StageKey(QUANTIZE, {"scheme": scheme}, {"model": source.identity})) as stage:
        for index, prefix in enumerate(find_blocks(network).paths):
            block = {path: matrix for path, matrix in matrices(plan).items() if path.startswith(f"{prefix}.")}
            tensors = {
                f"{path}.{name}": part for path, matrix in block.items() for name, part in matrix.tensors().items()
            }
            if index == 0 and NORM in dict(network.named_parameters()):
                tensors[NORM] = TUNED_NORM
            kinds = json.dumps({path: matrix.kind for path, matrix in block.items()})
            save_tensors(stage.directory / f"block-{index:03}.safetensors", tensors, {"kinds": kinds})
        model = {"identity": source.identity, "name": source.name}
        stage.publish({"plan": plan.to_json(), "layers": {}, "model": model})
    return run, plan


def packed(run: RunDirectory, format: str = "transformers", overwrite: bool = False, emit: Emit = silent) -> PackReport:
    config = read_run(run.path).config
    chosen = PackConfig.model_validate({"format": format})
    return pack(make_job(config.model_copy(update={"pack": chosen}), run.path, overwrite=overwrite, emit=emit))


def with_weights_written_out(run: RunDirectory, plan: Plan) -> nn.Module:
    """The original in float16 with each quantized weight replaced by its definition, and the tuned norm."""
    network = load_network(resolve(run.config.model), torch.float32)
    for parameter in network.parameters():  # also those that transformers would keep in 32 bits
        parameter.data = parameter.data.half().float()
    for path, matrix in matrices(plan).items():
        write_weight(network, path, matrix.dequantize())
    if NORM in dict(network.named_parameters()):
        network.get_parameter(NORM).data = TUNED_NORM
    return network


@torch.no_grad()
def write_weight(network: nn.Module, path: str, weight: Tensor) -> None:
    """Give the layer at `path` another weight `[out, in]`, of its own though it was shared; or one of fused experts."""
    place = expert_place(network, path)
    if place is None:
        network.get_submodule(path).weight = nn.Parameter(weight, requires_grad=False)
    else:
        network.get_parameter(place.parameter)[place.number] = weight.T if place.transposed else weight


@torch.no_grad()
def logits(network: nn.Module) -> Tensor:
    return network(tiny_models.token_ids(), use_cache=False).logits


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def config_json(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


AFTER_LOADING = """
import sys, torch
model = model if model.dtype == torch.float32 else model.float()  # where the card takes the type of the files
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[1], weights_only=True), use_cache=False).logits, {logits!r})
"""


def _lines_of_the_card(directory: Path) -> str:
    code = (directory / "README.md").read_text().split("## Loading")[1].split("```python\n")[1].split("```")[0]
    assert code.count("PATH_OR_ID") == 2
    logits = str(directory / "../stock-logits.pt")
    return code.replace("PATH_OR_ID", str(directory)) + AFTER_LOADING.format(logits=logits)


def stock_logits(directories: Sequence[Path], tmp_path: Path) -> list[Tensor]:
    """Logits by transformers and the `aqlm` package as they are, where the model cards' own lines have loaded them.

    In a process in which nothing is set, so that it has all of the machine's threads but for what a card does.
    """
    torch.save(tiny_models.token_ids(), tmp_path / "ids.pt")
    script = "\n".join(_lines_of_the_card(directory) for directory in directories)
    environment = {name: value for name, value in os.environ.items() if "THREADS" not in name}
    command = [sys.executable, "-c", script, str(tmp_path / "ids.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Once upon a time") == len(directories)
    return [torch.load(directory / "../stock-logits.pt", weights_only=True) for directory in directories]
