from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny_models
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aqlm_cli.artifacts import RunDirectory, open_run
from aqlm_cli.blocks import count_parameters, describe_layers
from aqlm_cli.config import build_config
from aqlm_cli.methods import CompressedMatrix, rtn
from aqlm_cli.model import load_network, resolve
from aqlm_cli.plan import Plan, Target, make_plan
from aqlm_cli.report import Event, PackReport
from aqlm_cli.scheme import AdditiveScheme, UniformScheme, parse_scheme
from aqlm_cli.stages.pack import pack
from aqlm_cli.storage import save_tensors
from aqlm_kernels import AdditiveMatrix

SKIPPED = "model.layers.1.mlp.down_proj"
SKIP = ["lm_head", r".*layers\.1\.(mlp\.down_proj|fc2)"]
NORM = "model.layers.0.input_layernorm.weight"
TUNED_NORM = torch.linspace(0.5, 2, 64).half().float()


def random_matrix(target: Target) -> CompressedMatrix:
    """A compressed matrix of the target's shape, of entries that float16 holds exactly."""
    generator = torch.Generator().manual_seed(sum(target.path.encode()))
    scheme = target.scheme
    if isinstance(scheme, UniformScheme):
        weight = torch.randn(target.out_features, target.in_features, generator=generator)
        return rtn.quantize(weight, None, scheme, generator, None)  # type: ignore[arg-type]
    assert isinstance(scheme, AdditiveScheme)
    groups = target.in_features // scheme.group_size
    codes = torch.randint(
        0, scheme.codebook_size, (target.out_features, groups, scheme.num_codebooks), generator=generator
    )
    codebooks = torch.randn(scheme.num_codebooks, scheme.codebook_size, scheme.group_size, generator=generator)
    scales = 0.1 * torch.rand(target.out_features, generator=generator) + 0.05
    return AdditiveMatrix(codes, codebooks.half().float(), scales.half().float())


def matrices(plan: Plan) -> dict[str, CompressedMatrix]:
    return {target.path: random_matrix(target) for target in plan.quantized}


def quantized_run(
    tmp_path: Path, family: str = "llama", scheme: str = "2x8g8", dtype: str | None = None, **settings: Any
) -> tuple[RunDirectory, Plan]:
    """A run as `quantize` leaves it, with one tuned norm, one layer skipped, and random codes for all others."""
    directory = tiny_models.save(family, tmp_path / "model", **settings)
    if dtype is not None:
        AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).save_pretrained(directory)
    source = resolve(str(directory))
    network = load_network(source, torch.float32)
    plan = make_plan(describe_layers(network), count_parameters(network), parse_scheme(scheme), SKIP, [])
    method = "aqlm" if isinstance(parse_scheme(scheme), AdditiveScheme) else "rtn"
    config = build_config(
        None,
        None,
        {
            "model": str(directory),
            "quantize": {"scheme": scheme, "method": method},
            "calibrate": {"data": f"{tmp_path}/notes.txt:4,builtin:4"},
        },
    )
    run = open_run(tmp_path / "run", config)
    with run.stage("quantized", "quantized", {"scheme": scheme}, {"model": source.identity}) as stage:
        for index in range(2):
            block = {path: matrix for path, matrix in matrices(plan).items() if f".{index}." in path}
            tensors = {
                f"{path}.{name}": part for path, matrix in block.items() for name, part in matrix.tensors().items()
            }
            if index == 0 and family == "llama":
                tensors[NORM] = TUNED_NORM
            kinds = json.dumps({path: matrix.kind for path, matrix in block.items()})
            save_tensors(stage.directory / f"block-{index:03}.safetensors", tensors, {"kinds": kinds})
        model = {"identity": source.identity, "name": source.name}
        stage.publish({"plan": plan.to_json(), "layers": {}, "model": model})
    return run, plan


def packed(run: RunDirectory, format: str | None = None, overwrite: bool = False) -> PackReport:
    events: list[Event] = []
    return pack(run.path, format, overwrite, events.append)


def with_weights_written_out(run: RunDirectory, plan: Plan) -> nn.Module:
    """The original network with each quantized weight replaced by its definition, and the tuned norm."""
    network = load_network(resolve(run.config.model), torch.float32)
    for path, matrix in matrices(plan).items():
        network.get_submodule(path).weight.data = matrix.dequantize()
    if NORM in dict(network.named_parameters()):
        network.get_parameter(NORM).data = TUNED_NORM
    return network


@torch.no_grad()
def logits(network: nn.Module) -> Tensor:
    return network(tiny_models.token_ids(), use_cache=False).logits


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for directory in sys.argv[2:]:
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.load(sys.argv[1], weights_only=True)
    with torch.no_grad():
        torch.save(network(ids, use_cache=False).logits, directory + "/../stock-logits.pt")
    assert network.generate(ids[:1], max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
"""


def stock_logits(directories: Sequence[Path], tmp_path: Path) -> list[Tensor]:
    """Logits by transformers and the `aqlm` package as they are; in a process with one thread, as that package's
    product is wrong with more."""
    torch.save(tiny_models.token_ids(), tmp_path / "ids.pt")
    command = [sys.executable, "-c", STOCK, str(tmp_path / "ids.pt"), *map(str, directories)]
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(directory / "../stock-logits.pt", weights_only=True) for directory in directories]


CASES: list[dict[str, Any]] = [
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"family": "qwen2", "scheme": "1x12g8", "dtype": "bfloat16"},
    {"family": "opt", "tie_word_embeddings": True},
    {"scheme": "int4g16"},
]


def test_stock_transformers_computes_what_the_definition_says(tmp_path: Path) -> None:
    """Tied and untied heads, biases, codes of 12 bits, ordinary weights: stock, our reader and the definition agree."""
    runs = [quantized_run(tmp_path / str(number), **case) for number, case in enumerate(CASES)]
    directories = [packed(run).directory for run, _ in runs]
    for case, (run, plan), directory, stock in zip(
        CASES, runs, directories, stock_logits(directories, tmp_path), strict=True
    ):
        ours = logits(load_network(resolve(str(directory)), torch.float32))
        assert relative_rms(stock, ours) < 1e-3, case
        assert relative_rms(ours, logits(with_weights_written_out(run, plan))) < 3e-3, case
