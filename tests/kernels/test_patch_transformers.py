"""Stock transformers' AQLM models, made right and fast."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from helpers import tiny_models
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.aqlm import AqlmLoraLinear
from torch import nn
from transformers import AutoModelForCausalLM

from aqlm_cli.models.blocks import replace_module
from aqlm_kernels import AdditiveLinear, KernelError, patch_transformers


@pytest.fixture(params=["llama", "qwen2"])  # without and with biases
def stock(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    original = tiny_models.save(request.param, tmp_path / "original")
    tiny_models.save_additive(original, tmp_path / "packed")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = numba.get_num_threads()
    numba.set_num_threads(1)  # in the inference package's own kernel all threads add into one vector
    yield
    numba.set_num_threads(before)


@pytest.mark.parametrize("after_a_product", [False, True])
def test_logits_do_not_change(stock: Any, after_a_product: bool, one_thread: None) -> None:
    ids = tiny_models.token_ids(1, 20)
    expected = stock(ids).logits
    if not after_a_product:
        for module in stock.modules():
            if getattr(module, "gemv_op", None) is not None:  # as it was loaded
                module.codes.data = module.codes.data.transpose(0, 1).contiguous()
                module.gemv_op = None
    assert patch_transformers(stock) is stock
    layers = [module for module in stock.modules() if isinstance(module, AdditiveLinear)]
    assert len(layers) == 14
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    for length, bound in (20, 1e-5), (3, 5e-4):
        found = stock(ids[:, :length]).logits
        assert (found - expected[:, :length]).norm() < bound * expected[:, :length].norm()


def with_adapters(network: Any) -> Any:
    """LoRA on the attention of `network`, where AdditiveLinear is registered the way peft has for new layers."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"])
    config._register_custom_module({AdditiveLinear: AqlmLoraLinear})
    adapted = get_peft_model(network, config)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # B begins as zeros, and gradients of A with it
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=rng)
    return adapted


def with_written_out_weights(network: Any) -> Any:
    dense = copy.deepcopy(network)
    for path, module in list(dense.named_modules()):
        if isinstance(module, AdditiveLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.matrix().dequantize()
            if module.bias is not None:
                linear.bias.data = module.bias.detach().clone()
            replace_module(dense, path, linear.requires_grad_(False))
    return dense


def test_lora_adapters_learn_on_top_of_codes_that_stay(stock: Any) -> None:
    network = patch_transformers(stock)
    ids = tiny_models.token_ids(2, 20)
    adapted, dense = with_adapters(copy.deepcopy(network)), with_adapters(with_written_out_weights(network))
    codes = {name: buffer.clone() for name, buffer in adapted.named_buffers() if name.endswith("codes")}
    assert len(codes) == 14

    for model in (adapted, dense):
        model(input_ids=ids, labels=ids).loss.backward()
    ours, theirs = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (adapted, dense))
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 2 * 3
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() < 1e-4 * gradient.norm(), name

    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(buffer, codes[name]) for name, buffer in adapted.named_buffers() if name in codes)


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(KernelError, match="no layer of the package aqlm"):
        patch_transformers(torch.nn.Sequential(torch.nn.Linear(8, 8)))
