from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aqlm_cli.errors import ArtifactError
from aqlm_cli.export import writer
from aqlm_cli.export.writer import Entry, total_bytes, write_checkpoint
from aqlm_cli.runs.files import TensorLayout, read_metadata


def entries(tensors: dict[str, torch.Tensor]) -> dict[str, Entry]:
    return {
        name: Entry(TensorLayout(tensor.dtype, tuple(tensor.shape)), partial(torch.clone, tensor))
        for name, tensor in tensors.items()
    }


def test_transformers_loads_the_shards_of_a_model(tmp_path: Path) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    write_checkpoint(directory, entries(tensors), shard_bytes=50_000)
    assert len(list(directory.glob("model-*-of-*.safetensors"))) > 2
    found = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_shards_hold_each_tensor_once_and_none_is_larger_than_asked(tmp_path: Path) -> None:
    tensors = {
        name: torch.full((size,), float(size)) for name, size in zip("fbdace", (10, 20, 30, 60, 5, 1), strict=True)
    }
    write_checkpoint(tmp_path, entries(tensors), shard_bytes=160)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total_bytes(entries(tensors)) == 4 * 126
    found = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    for name, tensor in tensors.items():
        assert [file for file, held in found.items() if name in held] == [index["weight_map"][name]]
        assert torch.equal(found[index["weight_map"][name]][name], tensor)
    # A tensor of 240 bytes fits no shard and has one of its own.
    assert all(sum(t.nbytes for t in held.values()) <= 160 or list(held) == ["a"] for held in found.values())


def test_one_file_is_enough_for_a_small_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, entries({"a": torch.ones(3)}))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert read_metadata(tmp_path / "model.safetensors") == {"format": "pt"}


def test_a_tensor_that_reads_back_different_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = writer.read_tensor
    monkeypatch.setattr(writer, "read_tensor", lambda path, name: read(path, name) + (name == "b"))
    with pytest.raises(ArtifactError, match=r"model\.safetensors: b reads back different"):
        write_checkpoint(tmp_path, entries({"a": torch.ones(3), "b": torch.ones(3)}))
