"""Formats of activations and of the cache, against plain loops and identities that hold to the last bit."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.commands import refused, run
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from aqlm_cli.errors import ModelError, UsageError
from aqlm_cli.evaluation import LoadedModel, PerplexitySettings
from aqlm_cli.evaluation.formats import (
    activation_format,
    applied,
    block_float,
    in_order,
    int8_per_token,
    key_orders,
    rounded_inputs,
)
from aqlm_cli.evaluation.perplexity import PerplexityEvaluation
from aqlm_cli.events import Event, Noted, silent
from aqlm_cli.models.attention import attend_to, attention_layers
from aqlm_cli.models.blocks import find_blocks, linears, replace_module
from aqlm_cli.spec.formats import BlockFloat, Formats
from aqlm_kernels import AdditiveLinear, AdditiveMatrix, quantized_layers

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of many sizes."""
    rng = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=rng) * torch.randn(shape, generator=rng).exp()).to(dtype)


def network_of(family: str, directory: Path) -> Any:
    tiny_models.save(family, directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits_of(network: Any, formats: Formats, ids: Tensor) -> Tensor:
    with applied(network, formats, ids[0], silent), torch.no_grad():
        found: Tensor = network(input_ids=ids, use_cache=False).logits
    return found


# ---------------------------------------------------------------------------------------------------------- arithmetic


def by_fractions(block: list[float], mantissa: int) -> list[float]:
    """One block by exact arithmetic: the smallest e with max |x| <= 2^e, and rounding half to even."""
    largest = max(abs(Fraction(x)) for x in block)
    if largest == 0:
        return [0.0] * len(block)
    exponent = next(e for e in range(-200, 200) if largest <= Fraction(2) ** e)
    step = Fraction(2) ** (exponent - mantissa)
    levels = [max(-(2**mantissa) + 1, min(2**mantissa - 1, round(Fraction(x) / step))) for x in block]
    return [float(level * step) for level in levels]


@pytest.mark.parametrize("word", ["bfp2g4", "bfp4g16", "bfp6g16", "bfp8g32"])
@pytest.mark.parametrize("dtype", TYPES)
def test_block_float_is_its_formula_in_exact_arithmetic(word: str, dtype: torch.dtype) -> None:
    block, x = BlockFloat.parse(word), drawn(3, 64, dtype=dtype)
    x[0, :32], x[1, 0], x[1, 5] = 0, 4, -4  # a power of two is its own 2^e
    found = block_float(x, block)
    wanted = [by_fractions(part.tolist(), block.width - 1) for part in x.view(-1, block.group)]
    assert found.dtype == dtype and found.shape == x.shape
    assert torch.equal(found.view(-1, block.group).double(), torch.tensor(wanted, dtype=torch.float64))
    assert not bool(found[0, :32].any())


@pytest.mark.parametrize("width", range(3, 17))  # with 2 bits the only level is half of the largest value
@pytest.mark.parametrize("exponent", [-100, -3, 0, 7, 100])
def test_values_of_the_format_come_back_bit_for_bit(width: int, exponent: int) -> None:
    rng, most = torch.Generator().manual_seed(width), 2 ** (width - 1) - 1
    levels = torch.randint(-most, most + 1, (5, 4, 16), generator=rng)
    levels[..., 0] = most
    x = (levels.double() * 2.0 ** (exponent - width + 1)).float().flatten(1)
    assert torch.equal(block_float(x, BlockFloat(width, 16)), x)


@pytest.mark.parametrize("power", [-90, -1, 1, 13, 90])
def test_a_block_scaled_by_a_power_of_two_has_the_result_scaled(power: int) -> None:
    x, block = drawn(4, 64), BlockFloat(5, 16)
    scales = torch.tensor([1.0, 2.0**power, 1.0, 2.0**power]).repeat_interleave(16)
    assert torch.equal(block_float(x * scales, block), block_float(x, block) * scales)


def test_exponents_have_eight_bits_and_what_is_not_finite_is_found() -> None:
    x = torch.tensor([[2.0**-140, 2.0**-149], [3.4e38, 1.0], [math.inf, 1.0], [math.nan, 1.0]])
    found = block_float(x, BlockFloat(4, 2))
    assert found[0].tolist() == [0, 0]  # below half of 2^-131, the step at e = -128
    assert found[1].tolist() == [7 / 8 * 2.0**127, 0]
    assert bool(found[2:].isnan().all())


@pytest.mark.parametrize("dtype", TYPES)
def test_int8_has_one_scale_a_token(dtype: torch.dtype) -> None:
    x = drawn(2, 3, 40, dtype=dtype)
    x[1, 1] = 0
    found = int8_per_token(x)
    assert found.dtype == dtype
    for row, rounded in zip(x.flatten(0, 1).float(), found.flatten(0, 1), strict=True):
        scale = max(abs(value) for value in row.tolist()) / 127
        levels = torch.tensor([round(value / scale) if scale else 0 for value in row.tolist()])
        assert int(levels.abs().max()) == (127 if scale else 0)
        rtol = 2e-7 if dtype == torch.float32 else 0.0
        torch.testing.assert_close(rounded, (levels * scale).to(dtype), rtol=rtol, atol=0)
    assert bool(int8_per_token(torch.tensor([[math.inf, 1.0]])).isnan().all())


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("int4t", "there is no format of activations 'int4t'; choose int8t or block float such as bfp6g16"),
        ("bfp6", "there is no block float 'bfp6'; write bfp, bits, g and a block size, such as bfp6g16"),
        ("bfp1g16", "bfp1g16: values have 2 to 16 bits"),
        ("bfp17g16", "bfp17g16: values have 2 to 16 bits"),
        ("bfp06g16", "there is no block float 'bfp06g16'"),
    ],
)
def test_a_word_that_is_no_format_is_refused(word: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        activation_format(word)
    with pytest.raises(UsageError):
        Formats(cache=word)


def test_keys_are_sorted_for_the_blocks_of_a_cache_only() -> None:
    with pytest.raises(UsageError, match="add --cache"):
        Formats(sort_keys=True)
    assert BlockFloat.parse("bfp6g16").bits == 6.5


# ---------------------------------------------------------------------------------------------------------- activations


def quantized(network: Any) -> Any:
    """A copy in which the linear layers of the first block have random codes."""
    copied, rng = copy.deepcopy(network), torch.Generator().manual_seed(0)
    for path, layer in linears(find_blocks(copied).modules[0], "").items():
        codes = torch.randint(256, (layer.out_features, layer.in_features // 8, 2), generator=rng)
        books = 0.1 * torch.randn(2, 256, 8, generator=rng)
        module = AdditiveLinear(AdditiveMatrix(codes, books, torch.ones(layer.out_features)))
        replace_module(find_blocks(copied).modules[0], path, module)
    return copied


class Rounded(nn.Module):
    """A linear layer behind the rounding of its input."""

    def __init__(self, layer: nn.Module, word: str) -> None:
        super().__init__()
        self.layer, self.word = layer, word

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(activation_format(self.word)(x))
        return y


@pytest.mark.parametrize("word", ["int8t", "bfp4g16"])
def test_every_linear_layer_of_the_blocks_reads_rounded_inputs(word: str, tmp_path: Path) -> None:
    network, ids = quantized(network_of("llama", tmp_path)), tiny_models.token_ids()
    by_hand, events = copy.deepcopy(network), list[Event]()
    for block in find_blocks(by_hand).modules:
        for path, layer in {**linears(block, ""), **quantized_layers(block)}.items():
            replace_module(block, path, Rounded(layer, word))
    with torch.no_grad():
        wanted, plain = by_hand(input_ids=ids).logits, network(input_ids=ids).logits
        with rounded_inputs(network, word, events.append):
            assert torch.equal(network(input_ids=ids).logits, wanted)
        assert torch.equal(network(input_ids=ids).logits, plain)  # the hooks are gone
    assert not torch.equal(wanted, plain)
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert events == [Noted(f"inputs of 14 linear layers are rounded to {word}")]


def test_experts_that_are_fused_read_rounded_inputs_too(tmp_path: Path) -> None:
    network, ids, events = network_of("mixtral", tmp_path), tiny_models.token_ids(), list[Event]()
    with torch.no_grad():
        plain = network(input_ids=ids).logits
        with rounded_inputs(network, "bfp3g16", events.append):
            rounded = network(input_ids=ids).logits
        torch.testing.assert_close(network(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-5)
    assert events == [Noted("inputs of 24 linear layers are rounded to bfp3g16")]  # 4 + 4 x 2, in 2 blocks
    assert float((rounded - plain).norm() / plain.norm()) > 1e-3


def test_blocks_that_do_not_divide_the_inputs_are_refused_with_the_layer(tmp_path: Path) -> None:
    network = network_of("llama", tmp_path)
    with pytest.raises(UsageError, match=r"bfp6g48: model.layers.0.self_attn.q_proj has 64 inputs"):
        logits_of(network, Formats("bfp6g48"), tiny_models.token_ids())
    assert not any(module._forward_pre_hooks for module in network.modules())


# ---------------------------------------------------------------------------------------------------------------- cache

HEAD = 16  # features of a head of the tiny models


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    network = network_of("llama", tmp_path_factory.mktemp("llama"))
    for layer in network.model.layers:  # features of very different sizes, in no order
        spread = torch.randn(layer.self_attn.k_proj.out_features, generator=torch.Generator().manual_seed(1)).exp()
        layer.self_attn.k_proj.weight.data *= spread[:, None]
    return network


@pytest.fixture
def table() -> Iterator[None]:
    """Nothing stays in transformers' tables."""
    before = set(AttentionInterface())
    yield
    assert set(AttentionInterface()) == before


def test_attention_reads_rounded_keys_and_values(llama: Any, table: None) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    own, block = AttentionInterface()["sdpa"], BlockFloat(4, 8)

    def by_hand(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((key, value))
        return own(module, query, block_float(key, block), block_float(value, block), *rest, **options)

    ids = tiny_models.token_ids()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        plain = llama(input_ids=ids, use_cache=False).logits
        patch.setitem(AttentionInterface._global_mapping, "sdpa", by_hand)
        wanted = llama(input_ids=ids, use_cache=False).logits
    assert [key.shape for key, _ in seen] == [(2, 2, 40, HEAD)] * 2
    assert torch.equal(logits_of(llama, Formats(cache="bfp4g8"), ids), wanted)
    assert not torch.equal(wanted, plain)
    assert torch.equal(logits_of(llama, Formats(), ids), plain) and llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", sorted({**tiny_models.FAMILIES, **tiny_models.WITH_EXPERTS}))
def test_a_wide_cache_leaves_every_family_as_it_is_sorted_or_not(family: str, tmp_path: Path, table: None) -> None:
    network, ids = network_of(family, tmp_path), tiny_models.token_ids()
    plain, wide = logits_of(network, Formats(), ids), Formats(cache="bfp16g4", sort_keys=True)
    narrow = logits_of(network, Formats(cache="bfp3g16"), ids)
    assert float((logits_of(network, wide, ids) - plain).norm() / plain.norm()) < 1e-3
    assert float((narrow - plain).norm() / plain.norm()) > 1e-3
    assert torch.equal(logits_of(network, Formats(), ids), plain)
    assert len(attention_layers(network)) == network.config.num_hidden_layers


def test_an_order_of_queries_and_keys_leaves_the_logits(llama: Any, table: None) -> None:
    """The order is any: here the one that the keys are sorted by, given to both sides of the product."""
    ids = tiny_models.token_ids()
    orders, own = key_orders(llama, ids[0]), AttentionInterface()["sdpa"]
    assert all(sorted(order[0].tolist()) == list(range(HEAD)) for order in orders.values())
    assert any(order[0].tolist() != list(range(HEAD)) for order in orders.values())

    def permuted(module: Any, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        order = orders[module]
        of_queries = order.repeat_interleave(query.shape[1] // key.shape[1], 0)
        q = query.gather(3, of_queries[None, :, None].expand_as(query))
        return own(module, q, key.gather(3, order[None, :, None].expand_as(key)), *rest, **options)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        plain = llama(input_ids=ids, use_cache=False).logits
        patch.setitem(AttentionInterface._global_mapping, "sdpa", permuted)
        torch.testing.assert_close(llama(input_ids=ids, use_cache=False).logits, plain, rtol=1e-4, atol=1e-5)


def test_keys_rounded_in_an_order_are_those_that_a_sorted_cache_holds() -> None:
    keys, block = drawn(2, 3, 5, 8), BlockFloat(4, 4)
    order = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(head)) for head in range(3)])
    found = in_order(keys, order, block)
    for head in range(3):
        assert torch.equal(found[:, head][..., order[head]], block_float(keys[:, head][..., order[head]], block))


def test_sorting_one_block_a_head_changes_no_bit_and_smaller_ones_it_does(llama: Any) -> None:
    ids = tiny_models.token_ids()
    for word, same in ((f"bfp4g{HEAD}", True), ("bfp4g4", False)):
        unsorted, by_size = (logits_of(llama, Formats(cache=word, sort_keys=one), ids) for one in (False, True))
        assert torch.equal(unsorted, by_size) == same


def test_features_are_ordered_by_the_rms_of_rotated_keys(llama: Any) -> None:
    ids, kept = tiny_models.token_ids()[:1], dict[nn.Module, Tensor]()
    with attend_to(llama, lambda module, k, v: (kept.setdefault(module, k), v)), torch.no_grad():
        llama(input_ids=ids, use_cache=False)
    orders = key_orders(llama, ids[0])
    assert orders.keys() == kept.keys() and len(kept) == 2
    for module, keys in kept.items():
        for head, order in enumerate(orders[module]):
            sizes = [math.sqrt(sum(float(key[f]) ** 2 for key in keys[0, head])) for f in order.tolist()]
            assert sizes == sorted(sizes, reverse=True)


def test_sorted_blocks_round_spread_keys_with_smaller_errors(llama: Any) -> None:
    ids, kept = tiny_models.token_ids()[:1], dict[nn.Module, Tensor]()
    with attend_to(llama, lambda module, k, v: (kept.setdefault(module, k), v)), torch.no_grad():
        llama(input_ids=ids, use_cache=False)
    block = BlockFloat(4, 4)
    for module, order in key_orders(llama, ids[0]).items():
        keys = kept[module]
        by_size, unsorted = in_order(keys, order, block), block_float(keys, block)
        assert float((by_size - keys).norm()) < float((unsorted - keys).norm())


def test_heads_that_blocks_do_not_divide_are_refused_with_their_layer(llama: Any, table: None) -> None:
    reason = r"bfp4g32: model.layers.0.self_attn has heads of 16 features in its keys, no multiple"
    with pytest.raises(UsageError, match=reason):
        logits_of(llama, Formats(cache="bfp4g32"), tiny_models.token_ids())
    assert llama.config._attn_implementation == "sdpa"


def test_an_attention_that_cannot_be_changed_is_refused(tmp_path: Path, table: None) -> None:
    network = network_of("mamba", tmp_path)
    with pytest.raises(ModelError, match="MambaForCausalLM"):
        logits_of(network, Formats(cache="bfp4g16"), tiny_models.token_ids())


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} times {number} is {number**2}. " for number in range(15)))
    return str(path)


@pytest.mark.parametrize("divergence", [True, False])
def test_formats_are_those_of_the_model_and_not_of_its_base_model(llama: Any, text: str, divergence: bool) -> None:
    model, found = LoadedModel("mine", llama, tiny_models.byte_tokenizer()), []
    for formats in (Formats(), Formats("bfp3g16"), Formats(cache="bfp3g8", sort_keys=True)):
        settings = PerplexitySettings(text, 64, 2, divergence=divergence, formats=formats)
        found.append(PerplexityEvaluation().run(model, model, settings, silent))
    plain, *rounded = found
    assert plain.ratio == 1 and plain.base_model is not None
    assert [report.base_model for report in rounded] == [plain.base_model] * 2
    assert all(report.ratio != 1 and report.passport.column != plain.passport.column for report in rounded)
    assert [report.passport.formats for report in found] == ["", "activations bfp3g16", "cache bfp3g8 sorted"]
    names = [next(iter(PerplexityEvaluation().files(report))) for report in found]
    endings = ["", "-bfp3g16", "-cache-bfp3g8-sorted"]
    assert names == [f"eval-ppl-text.txt-2x64-float32{ending}.json" for ending in endings]


def test_the_command_takes_formats(run_file: Path) -> None:
    arguments = ("eval-ppl", "tiny", "--data", "notes.txt", "--sequence-length", "32", "--sequences", "2", "--json")
    plain, rounded = (
        json.loads(run(*arguments, *more).stdout)
        for more in ((), ("--activations", "int8t", "--cache", "bfp4g8", "--sort-keys"))
    )
    assert plain["formats"] == {"activations": None, "cache": None, "sort_keys": False}
    assert rounded["passport"]["formats"] == "activations int8t, cache bfp4g8 sorted"
    assert rounded["perplexity"] != plain["perplexity"]
    assert "eval_ppl.activations" in refused("eval-ppl", "tiny", "--activations", "int4", status=2)
    assert "add --cache" in refused("eval-ppl", "tiny", "--sort-keys", status=2)
