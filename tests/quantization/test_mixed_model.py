"""MixedModel: its divergence is that of the two models' logits, and the network is itself again afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from torch import Tensor

from aqlm_cli.models import load_network, resolve
from aqlm_cli.quantization.methods import rtn
from aqlm_cli.quantization.mixed_model import MixedModel
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec.schemes import UniformScheme
from aqlm_kernels import Matrix

LAYER, TABLE = "model.layers.1.mlp.down_proj", "model.embed_tokens"
IDS = tiny_models.token_ids()


def rounded(weight: Tensor) -> Matrix:
    statistics = LayerStatistics(torch.eye(weight.shape[1]), 1)
    return rtn.quantize(weight, statistics, UniformScheme(2, 32), torch.Generator(), None)


def divergence(base: Tensor, other: Tensor) -> float:
    theirs, ours = base.log_softmax(-1), other.log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_the_divergence_is_that_of_the_logits(tmp_path: Path, tied: bool) -> None:
    source = resolve(str(tiny_models.save("llama", tmp_path / "tiny", tie_word_embeddings=tied)))
    network, other = load_network(source, torch.float32), load_network(source, torch.float32)
    base = network(IDS).logits
    model = MixedModel(network, IDS, torch.float32)
    layers = {LAYER: rounded(other.get_submodule(LAYER).weight)}
    tables = {TABLE: rounded(other.get_submodule(TABLE).weight)}
    assert model.divergence({}, {}) == pytest.approx(0, abs=1e-6)
    for chosen_layers, chosen_tables in (layers, {}), ({}, tables), (layers, tables):
        mixed = load_network(source, torch.float32)
        for path, matrix in {**chosen_layers, **chosen_tables}.items():
            mixed.get_parameter(f"{path}.weight").copy_(matrix.dequantize())
        wanted = divergence(base, mixed(IDS).logits)
        assert wanted > 1e-4
        assert model.divergence(chosen_layers, chosen_tables) == pytest.approx(wanted, rel=1e-3)
    assert torch.equal(network(IDS).logits, base)


@torch.no_grad()
def test_single_experts_are_replaced(tmp_path: Path) -> None:
    source = resolve(str(tiny_models.save("mixtral", tmp_path / "tiny")))
    network = load_network(source, torch.float32)
    model = MixedModel(network, IDS, torch.float32)
    path = "model.layers.0.mlp.experts.1.down_proj"
    layer = network.get_submodule(path)
    assert model.divergence({path: rounded(layer.weight.contiguous())}, {}) > 1e-5
