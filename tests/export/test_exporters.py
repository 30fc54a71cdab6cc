"""What every format must do; a new row of EXPORTERS is tested by being there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numba
import pytest
import torch
from helpers import tiny_models
from helpers.packing import config_json, logits, relative_rms
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aqlm_cli.errors import AqlmError, ArtifactError, ModelError, PlanError
from aqlm_cli.export import EXPORTERS, export
from aqlm_cli.models import ModelSource, load_network, resolve
from aqlm_cli.models.blocks import find_blocks, linears
from aqlm_cli.spec.config import PackFormat
from aqlm_kernels import AdditiveMatrix

NORM = "model.norm.weight"
FAMILIES = ("llama", "qwen2", "mixtral")  # a plain one, biases, and experts that transformers joins while it loads


def handmade(linear: nn.Linear, seed: int, size: int = 256) -> AdditiveMatrix:
    """Random codes; codebooks and scales that float16 holds exactly."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, size, (linear.out_features, linear.in_features // 8, 2), generator=rng)
    codebooks = (0.1 * torch.randn(2, size, 8, generator=rng)).half().float()
    return AdditiveMatrix(codes, codebooks, (0.5 + torch.rand(linear.out_features, generator=rng)).half().float())


def first_block(source: ModelSource) -> dict[str, AdditiveMatrix]:
    """A matrix for every linear layer of the first block."""
    found = find_blocks(load_network(source, torch.float32))
    layers = linears(found.modules[0], found.paths[0])
    return {path: handmade(layer, number) for number, (path, layer) in enumerate(layers.items())}


def expected(source: ModelSource, matrices: dict[str, AdditiveMatrix], changed: dict[str, Tensor]) -> Tensor:
    """Logits of the base model in 16 bits, with each weight replaced by what its matrix stands for."""
    network = load_network(source, torch.float32)
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    for path, matrix in matrices.items():
        network.get_submodule(path).weight = nn.Parameter(matrix.dequantize())
    for name, values in changed.items():
        network.get_parameter(name).data = values
    return logits(network)


def stock_logits(directory: Path) -> Tensor:
    threads = numba.get_num_threads()
    numba.set_num_threads(1)  # the CPU kernel of the aqlm package adds into one vector from every thread
    try:
        return logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())
    finally:
        numba.set_num_threads(threads)


def test_the_run_file_names_every_format_and_no_other() -> None:
    assert {"auto", *EXPORTERS} == set(get_args(PackFormat))
    assert all(exporter.name == name for name, exporter in EXPORTERS.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", EXPORTERS)
def test_matrices_made_by_hand_round_trip_through_stock_transformers(format: str, family: str, tmp_path: Path) -> None:
    """Without a run directory."""
    source = resolve(str(tiny_models.save(family, tmp_path / "model")))
    matrices, changed = first_block(source), {NORM: torch.full((64,), 0.75)}
    facts = export(source, matrices, changed, tmp_path / "out", EXPORTERS[format])
    wanted = expected(source, matrices, changed)
    assert relative_rms(stock_logits(tmp_path / "out"), wanted) < 2e-3
    assert relative_rms(logits(load_network(resolve(str(tmp_path / "out")), torch.float32)), wanted) < 2e-3
    other = {path: handmade_again(matrix) for path, matrix in matrices.items()}
    assert relative_rms(stock_logits(tmp_path / "out"), expected(source, other, changed)) > 2e-2, "the bound bites"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert facts.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert facts.layers == len(matrices) and facts.scheme == "2x8g8"


def handmade_again(matrix: AdditiveMatrix) -> AdditiveMatrix:
    """The same but for the codes of one row."""
    codes = matrix.codes.clone()
    codes[0] = codes[0].flip(0)
    return AdditiveMatrix(codes, matrix.codebooks, matrix.scales)


@pytest.mark.parametrize("format", EXPORTERS)
def test_every_layout_is_planned_before_a_tensor_exists_and_kept(format: str, tmp_path: Path) -> None:
    from aqlm_cli.models import load_skeleton, tensor_index
    from aqlm_cli.spec.schemes import parse_scheme

    source = resolve(str(tiny_models.save("llama", tmp_path / "model", tie_word_embeddings=True)))
    matrices = first_block(source)
    stored = {name: tensor.layout for name, tensor in tensor_index(source.directory).items()}
    schemes = dict.fromkeys(matrices, parse_scheme("2x8g8"))
    planned = EXPORTERS[format].layouts(load_skeleton(source), stored, schemes, {NORM}).tensors
    export(source, matrices, {NORM: torch.ones(64)}, tmp_path / "out", EXPORTERS[format])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: (layout.dtype, layout.shape) for name, layout in planned.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()
    }


@pytest.mark.parametrize("format", EXPORTERS)
def test_the_card_leaves_out_what_is_not_known(format: str, tmp_path: Path) -> None:
    source = resolve(str(tiny_models.save("llama", tmp_path / "model")))
    export(source, first_block(source), {}, tmp_path / "out", EXPORTERS[format])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "compressed by `aqlm` (2x8g8)" in card and "None" not in card and "calibration text" not in card
    assert config_json(tmp_path / "out")["aqlm_cli"]["quantized"] is None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_matrices_of_several_schemes_fit_the_dense_format_alone(tmp_path: Path) -> None:
    source = resolve(str(tiny_models.save("llama", tmp_path / "model")))
    found = find_blocks(load_network(source, torch.float32))
    layers = linears(found.modules[0], found.paths[0])
    matrices = {path: handmade(layer, 0, size) for size, (path, layer) in zip((16, 256), layers.items(), strict=False)}
    with pytest.raises(PlanError, match=r"2x4g8: model.*; 2x8g8: model.*--format native"):
        export(source, matrices, {}, tmp_path / "codes", EXPORTERS["transformers"])
    assert export(source, matrices, {}, tmp_path / "dense", EXPORTERS["dense"]).scheme == "2x4g8, 2x8g8"


def test_a_matrix_or_parameter_without_a_place_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = resolve(str(tiny_models.save("llama", tmp_path / "model")))
    path, matrix = next(iter(first_block(source).items()))
    with pytest.raises(ModelError, match=r"model\.norm is no linear layer, and its matrix \(64, 64\)"):
        export(source, {"model.norm": matrix}, {}, tmp_path / "out")
    with pytest.raises(ModelError, match=r"has no parameter model\.norm\.weight of the shape \[3\]"):
        export(source, {path: matrix}, {NORM: torch.ones(3)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ArtifactError, match="is not empty"):
        export(source, {path: matrix}, {}, tmp_path / "out")


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("matrices", "changed", "words"),
    [
        ({}, {}, "no matrix is given"),
        ({UP: torch.zeros(128, 64)}, {}, f"`matrices` takes a Matrix for {UP}, not Tensor"),
        ({UP: None}, {}, f"`matrices` takes a Matrix for {UP}, not NoneType"),
        ({UP: ...}, {NORM: None}, f"`changed` takes a tensor of floating-point numbers for {NORM}"),
        ({UP: ...}, {NORM: torch.ones(64, dtype=torch.long)}, "`changed` takes a tensor of floating-point numbers"),
        ({UP: ...}, {f"{UP}.weight": torch.ones(128, 64)}, "is changed, and its layer has a matrix; give one of them"),
    ],
)
def test_what_is_no_matrix_and_no_parameter_is_one_line(
    tmp_path: Path, matrices: dict[str, Any], changed: dict[str, Any], words: str
) -> None:
    source = resolve(str(tiny_models.save("llama", tmp_path / "model")))
    given = {path: first_block(source)[path] if matrix is ... else matrix for path, matrix in matrices.items()}
    with pytest.raises(AqlmError) as error:
        export(source, given, changed, tmp_path / "out")
    assert words in str(error.value) and not (tmp_path / "out").exists()


def test_a_failure_while_writing_leaves_the_directory_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(str(tiny_models.save("llama", tmp_path / "model")))
    matrices = first_block(source)

    def fail(*_: object) -> None:
        raise ArtifactError("it does not load")

    with monkeypatch.context() as patch:
        patch.setattr(type(EXPORTERS["dense"]), "verify", fail)
        with pytest.raises(ArtifactError, match="it does not load"):
            export(source, matrices, {}, tmp_path / "out", EXPORTERS["dense"])
    assert not list((tmp_path / "out").iterdir())
    export(source, matrices, {}, str(tmp_path / "out"), EXPORTERS["dense"])
    assert (tmp_path / "out" / "README.md").exists()
