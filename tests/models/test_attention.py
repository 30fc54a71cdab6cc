from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from aqlm_cli.models import attend_blockwise, load_network, resolve
from aqlm_cli.models import attention as module
from aqlm_cli.models.attention import BlockwiseAttention


def drawn(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """q of two sequences with two key heads that three query heads share each, k, and v of another width."""
    rng = torch.Generator().manual_seed(length)
    shapes = (4, 3, length, 16), (4, length, 16), (4, length, 24)
    q, k, v = (torch.randn(shape, generator=rng, dtype=dtype).requires_grad_(True) for shape in shapes)
    return q, k, v


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k[:, None].transpose(2, 3)
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(later, -torch.inf), 3) @ v[:, None]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
def test_result_and_gradients_are_those_of_the_whole_matrix_of_scores(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUERIES", 8)
    ours, wanted = drawn(length), drawn(length)
    outer = torch.randn(4, 3, length, 24, dtype=torch.float64)
    got, expected = BlockwiseAttention.apply(*ours), written_out(*wanted)
    torch.testing.assert_close(got, expected)
    got.backward(outer)
    expected.backward(outer)
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [0, 10, 100])
def test_in_bfloat16_it_is_nearly_as_exact_as_torch_whatever_all_keys_share(shared: float, tmp_path: Path) -> None:
    """A bias of the keys, say: it changes no probability."""
    attend_blockwise(load_network(resolve(str(tiny_models.save("llama", tmp_path / "model"))), torch.float32))
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 200, 16, generator=rng).bfloat16() for heads in (6, 2, 2))
    k += shared
    scores = q.double() @ k.double().repeat_interleave(3, 1).transpose(2, 3) / 4
    later = torch.ones(200, 200, dtype=torch.bool).triu(1)
    exact = torch.softmax(scores.masked_fill(later, -torch.inf), 3) @ v.double().repeat_interleave(3, 1)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = AttentionInterface()[module.NAME](torch.nn.Module(), q, k, v, None)[0].transpose(1, 2)
    errors = [float((out.double() - exact).norm() / exact.norm()) for out in (ours, theirs)]
    assert errors[0] < 4 * errors[1] < 0.03


def test_a_llama_in_bfloat16_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, apply = [], BlockwiseAttention.apply
    monkeypatch.setattr(BlockwiseAttention, "apply", lambda *args: calls.append(1) or apply(*args))
    network = load_network(resolve(str(tiny_models.save("llama", tmp_path / "model"))), torch.float32)
    attend_blockwise(network)
    with torch.autocast("cpu", torch.bfloat16):
        network(input_ids=tiny_models.token_ids(), use_cache=False)
    assert len(calls) == network.config.num_hidden_layers


@pytest.mark.parametrize("family", sorted({**tiny_models.FAMILIES, **tiny_models.WITH_EXPERTS}))
def test_every_family_computes_the_same_with_it(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with sliding windows, other scales and softcaps, for which torch's own is called or nothing changes."""
    monkeypatch.setattr(module, "QUERIES", 8)
    network = load_network(resolve(str(tiny_models.save(family, tmp_path / "model"))), torch.float32)
    ids, found = tiny_models.token_ids(), []
    for attend in (lambda _: None, attend_blockwise):
        attend(network)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(network(input_ids=ids, use_cache=False).logits.float())
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.02


def test_a_float32_network_keeps_torchs_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockwiseAttention, "forward", lambda *_: pytest.fail("it is for bfloat16"))
    network = load_network(resolve(str(tiny_models.save("llama", tmp_path / "model"))), torch.float32)
    ids = tiny_models.token_ids()
    wanted = network(input_ids=ids, use_cache=False).logits
    attend_blockwise(network)
    assert torch.equal(network(input_ids=ids, use_cache=False).logits, wanted)
