"""Embeddings and head from `quantize` to `finetune`, on tiny models with and without tied embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import commands, tiny_models
from helpers.commands import refused, run
from helpers.walks import walk_of
from safetensors.torch import load_file
from torch import nn
from typer.testing import Result

from aqlm_cli.models import load_network, resolve
from aqlm_cli.models.tables import describe_tables
from aqlm_cli.pipeline.stages import quantize as stage
from aqlm_cli.quantization.block_files import block_file, restore_block, restore_tables
from aqlm_cli.runs.artifact import open_artifact
from aqlm_cli.runs.files import load_tensors
from aqlm_kernels import CompressedEmbedding, quantized_layers

RUN_FILE = commands.RUN_FILE + "pack: {format: dense}\n" + commands.FINETUNE

QUANTIZE = "quantize", "--config", "run.yaml", "--out", "run"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A tiny model and its run file in the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_models.save("llama", Path("tiny"), tie_word_embeddings=request.param)
    Path("run.yaml").write_text(RUN_FILE)
    return bool(request.param)


def tables(tied: bool) -> list[str]:
    return ["--embeddings", "3x4g8", *([] if tied else ["--head", "int4g16"])]


def restored(directory: str) -> nn.Module:
    """The base model with everything of the artifact put into it."""
    network, artifact = (
        load_network(resolve("tiny"), torch.float32),
        open_artifact(Path("run") / directory, "quantized"),
    )
    restore_tables(artifact, network)
    for index in range(2):
        restore_block(artifact, index, f"model.layers.{index}", network.get_submodule(f"model.layers.{index}"))
    for name, tensor in load_tensors(artifact.path("outside.safetensors")).items() if directory == "finetuned" else ():
        network.get_parameter(name).data.copy_(tensor)
    return network


def test_tables_are_listed_once_with_their_duty(tied: bool) -> None:
    described = {layer.path: layer.kind for layer in describe_tables(load_network(resolve("tiny"), torch.float32))}
    assert described == (
        {"model.embed_tokens": "table"} if tied else {"model.embed_tokens": "embedding", "lm_head": "head"}
    )


@pytest.mark.slow
def test_a_run_with_tables_from_the_first_stage_to_the_last(tied: bool) -> None:
    assert run(*QUANTIZE, *tables(tied)).exit_code == 0
    network = restored("quantized")
    paths = {"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"}
    assert paths == {path for path in quantized_layers(network) if not path.startswith("model.layers")}
    embedding = network.get_submodule("model.embed_tokens")
    assert isinstance(embedding, CompressedEmbedding)
    assert (network.get_submodule("lm_head") is embedding.table) == tied
    # The dense checkpoint computes what the quantized network does.
    ids = torch.arange(40)[None]
    packed = load_network(resolve("run/packed"), torch.float32)
    expected = network(input_ids=ids).logits
    assert torch.allclose(packed(input_ids=ids).logits, expected, atol=2e-3 * float(expected.abs().max()))
    before = load_file("run/quantized/tables.safetensors")

    assert run("verify", "run").exit_code == 0
    assert run("finetune", "run").exit_code == 0
    after = load_file("run/finetuned/tables.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        learnable = name.rpartition(".")[2] in ("codebooks", "scales")
        assert torch.equal(after[name], tensor) != learnable, name
        assert not learnable or torch.equal(after[name].half().float(), after[name].float()), "as it will be stored"
    network, packed = restored("finetuned"), load_network(resolve("run/packed"), torch.float32)
    expected = network(input_ids=ids).logits
    assert torch.allclose(packed(input_ids=ids).logits, expected, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("tied", [True], indirect=True)
def test_the_first_block_sees_the_errors_of_the_embeddings(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    entering: list[torch.Tensor] = []
    original = stage.start_calibration_pass

    def noting(*arguments: Any) -> Any:
        states = original(*arguments)
        entering.append(states.hidden[torch.arange(2)])
        return states

    monkeypatch.setattr(stage, "start_calibration_pass", noting)
    assert run(*QUANTIZE, *tables(tied)).exit_code == 0
    ids = load_file("run/calibration/windows.safetensors")["ids"].long()
    own = restored("quantized").get_submodule("model.embed_tokens")(ids)
    (seen,) = entering
    assert all(any(torch.equal(row, one) for one in own) for row in seen)
    base = walk_of(load_network(resolve("tiny"), torch.float32), ids).entering(ids)
    assert not any(torch.equal(row, one) for one in base for row in seen)


@pytest.mark.parametrize("tied", [True], indirect=True)
def test_a_plan_may_hold_the_table_alone(tied: bool) -> None:
    assert run(*QUANTIZE, "--layer", r"model\.layers.*=keep", "--embeddings", "int8g16").exit_code == 0
    artifact = open_artifact(Path("run/quantized"), "quantized")
    assert sorted(artifact.manifest.files) == ["tables.safetensors"]
    assert list(artifact.manifest.results["layers"]) == ["model.embed_tokens"]
    assert artifact.manifest.results["layers"]["model.embed_tokens"]["relative_error"] < 1e-4
    assert run("verify", "run").exit_code == 0


@pytest.mark.parametrize("tied", [False], indirect=True)
def test_a_finished_table_survives_an_interruption(
    tied: bool, interrupted_at: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interrupted_at(block_file(0), 1, *QUANTIZE, *tables(tied)).exit_code == 130
    with monkeypatch.context() as patch:
        patch.setattr(stage, "table_of", None)  # nothing calls it again
        result = run(*QUANTIZE, *tables(tied))
    assert result.exit_code == 0, result.output
    resumed = {path.name: path.read_bytes() for path in Path("run/quantized").glob("*.safetensors")}
    assert run("quantize", "--config", "run.yaml", "--out", "again", *tables(tied)).exit_code == 0
    assert resumed == {path.name: path.read_bytes() for path in Path("again/quantized").glob("*.safetensors")}


@pytest.mark.parametrize("tied", [True], indirect=True)
def test_a_calibration_without_statistics_of_the_head_is_refused(tied: bool) -> None:
    assert run("calibrate", "--config", "run.yaml", "--out", "run").exit_code == 0
    Path("run/calibration/table_statistics.safetensors").unlink()
    manifest = Path("run/calibration/manifest.json")
    stored = json.loads(manifest.read_text())
    del stored["files"]["table_statistics.safetensors"]
    manifest.write_text(json.dumps(stored))
    assert "has no statistics of embeddings and head" in refused(*QUANTIZE, *tables(tied))
