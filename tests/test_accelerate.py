"""Stock transformers' AQLM models, made right and fast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from aqlm_kernels import AdditiveLinear, KernelError, accelerate


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
def test_logits_stay_what_they_were(stock: Any, after_a_product: bool, one_thread: None) -> None:
    ids = tiny_models.token_ids(1, 20)
    expected = stock(ids).logits
    if not after_a_product:
        for module in stock.modules():
            if getattr(module, "gemv_op", None) is not None:  # as it was loaded
                module.codes.data = module.codes.data.transpose(0, 1).contiguous()
                module.gemv_op = None
    assert accelerate(stock) is stock
    layers = [module for module in stock.modules() if isinstance(module, AdditiveLinear)]
    assert len(layers) == 14
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    for length, bound in (20, 1e-5), (3, 5e-4):
        found = stock(ids[:, :length]).logits
        assert (found - expected[:, :length]).norm() < bound * expected[:, :length].norm()


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(KernelError, match="no layer of the package aqlm"):
        accelerate(torch.nn.Sequential(torch.nn.Linear(8, 8)))
