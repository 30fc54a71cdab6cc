"""Models that are quantized already are refused, by whatever tells it: config.json, or the tensors alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import load_file, save_file
from torch import Tensor

from aqlm_cli.errors import ModelError
from aqlm_cli.models import load_network, load_skeleton, resolve
from aqlm_cli.models import source as model_source


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., model_source.ModelSource]:
    return lambda name, **options: resolve(str(name), cache_dir=tmp_path / "cache", **options)


def change_config(directory: Path, **settings: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def logits(network: Any) -> Tensor:
    found: Tensor = network(tiny_models.token_ids()).logits
    return found


def mlx_weights(directory: Path) -> None:
    """Every matrix as mlx-lm writes it: 4 bits, eight numbers in a uint32, a scale and a bias for each group of 64."""
    weights = load_file(directory / "model.safetensors")
    for name in [name for name, tensor in weights.items() if tensor.ndim == 2]:
        rows, columns = weights.pop(name).shape
        stem = name.removesuffix(".weight")
        weights[name] = torch.zeros(rows, columns // 8, dtype=torch.uint32)
        weights[f"{stem}.scales"] = weights[f"{stem}.biases"] = torch.zeros(rows, columns // 64).half()
    save_file(
        {name: tensor.clone() for name, tensor in weights.items()}, directory / "model.safetensors", {"format": "mlx"}
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, r"MLX \(4 bits, groups of 64\)"),
        ({k: {"group_size": 64, "bits": 4} for k in ("quantization", "quantization_config")}, r"MLX \(4 bits, .*"),
        ({}, r"MLX \(.*weight has type U32\)"),
    ],
)
def test_a_model_quantized_by_mlx_is_refused_by_name(
    settings: dict[str, Any], words: str, tmp_path: Path, find: Any
) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    mlx_weights(directory)
    change_config(directory, **settings)
    (directory / "README.md").write_text("---\nbase_model: someone/Tiny\n---\n")
    for load in load_skeleton, lambda source: load_network(source, torch.float32):
        with pytest.raises(ModelError, match=f"quantized already, with {words}; use its base model, someone/Tiny, or"):
            load(find(directory))


def test_whole_weights_written_by_mlx_are_read(tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    expected = logits(load_network(find(directory), torch.float32))
    save_file(load_file(directory / "model.safetensors"), directory / "model.safetensors", {"format": "mlx"})
    assert torch.equal(logits(load_network(find(directory), torch.float32)), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(({"quant_method": name}, name) for name in ("gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "exl2")),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "a method it does not name"),
    ],
)
def test_a_method_that_config_json_has_is_named(
    settings: dict[str, Any], words: str, tmp_path: Path, find: Any
) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    change_config(directory, quantization_config=settings)
    with pytest.raises(ModelError, match=f"quantized already, with {words}; use its base model, or a copy"):
        load_skeleton(find(directory))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weight: weight.to(torch.float8_e4m3fn), r"values of type F8_E4M3 \(model\.layers\.0"),
        (lambda weight: weight.to(torch.float8_e5m2), "values of type F8_E5M2"),
        (lambda weight: weight.to(torch.uint8), "values of type U8"),
        (lambda weight: weight.to(torch.int8), "values of type I8"),
    ],
)
def test_weights_of_other_types_are_recognised_without_config_json(
    change: Callable[[Tensor], Tensor], words: str, tmp_path: Path, find: Any
) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    changed = {name: change(tensor) if "proj" in name else tensor for name, tensor in weights.items()}
    save_file(changed, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"quantized already, with {words}"):
        load_network(find(directory), torch.float32)


def test_tensors_of_gptq_are_recognised_without_config_json(tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    renamed = {name.replace("proj.weight", "proj.qweight"): tensor for name, tensor in weights.items()}
    save_file(renamed, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="with GPTQ, AWQ or the like"):
        load_network(find(directory), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ordinary_weights_of_any_width_are_read(dtype: torch.dtype, tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, directory / "model.safetensors")
    network = load_network(find(directory), torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(network.state_dict()[name], weights[name].to(dtype).float())
