"""The compiled decoder against transformers, family by family, and the reasons why it does not serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import mixed_models, tiny_models
from torch import Tensor

from aqlm_cli.errors import ModelError
from aqlm_cli.models import Decoding, decoding_of, load_network, open_decoding, resolve
from aqlm_cli.models import decoding as decoding_module
from aqlm_cli.models.decoding import narrowest
from aqlm_kernels import KernelError
from aqlm_kernels.cpu import avx512
from aqlm_kernels.cpu.decoder import SHORT

LENGTH, PROMPT, LONG_PROMPT = 30, 11, 20
assert PROMPT < SHORT < LONG_PROMPT

BACKENDS = ["cpu-avx512", "cpu-lut"] if avx512.HAS_VBMI else ["cpu-lut"]


def packed_network(family: str, directory: Path, **changes: Any) -> Any:
    tiny_models.save_additive(tiny_models.save(family, directory / "model", **changes), directory / "packed")
    return load_network(resolve(str(directory / "packed")), torch.float32)


def test_positions_of_long_models_are_those_of_one_forward(tmp_path: Path) -> None:
    scaled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    network = packed_network("llama", tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, **scaled})
    ids = tiny_models.token_ids(1, LENGTH)
    decoding = decoding_of(network, LENGTH)
    assert decoding.name.startswith("compiled decoder")
    found = [decoding.prefill(ids[0, :LONG_PROMPT]), *(decoding.step(token) for token in ids[0, LONG_PROMPT:].tolist())]
    expected = network(ids).logits[0, LONG_PROMPT - 1 :]
    assert (torch.stack(found) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_its_logits_are_those_of_one_forward(family: str, backend: str, prompt: int, tmp_path: Path) -> None:
    changes = {"sliding_window": None} if family == "mistral" else {}
    network = packed_network(family, tmp_path, **changes)
    ids = tiny_models.token_ids(1, LENGTH)
    expected = network(ids).logits[0, prompt - 1 :]
    decoding = decoding_of(network, LENGTH, backend)
    assert decoding.name == f"compiled decoder, {backend}"
    for _ in range(2):  # a second prompt begins anew
        found = [decoding.prefill(ids[0, :prompt]), *(decoding.step(token) for token in ids[0, prompt:].tolist())]
        assert (torch.stack(found) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT])
def test_it_stops_at_its_capacity(prompt: int, tmp_path: Path) -> None:
    decoding = decoding_of(packed_network("llama", tmp_path), prompt + 1)
    decoding.prefill(tiny_models.token_ids(1, prompt)[0])
    decoding.step(3)
    with pytest.raises(KernelError, match=f"capacity of {prompt + 1} positions"):
        decoding.step(3)
    with pytest.raises(KernelError, match=f"capacity of {prompt + 1} positions"):
        decoding.prefill(tiny_models.token_ids(1, prompt + 2)[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["exact", "int8"])
def test_a_checkpoint_decodes_without_a_network(
    tied: bool, head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = packed_network("llama", tmp_path, tie_word_embeddings=tied)
    monkeypatch.setattr(decoding_module, "load_network", lambda *_: pytest.fail("the network was loaded"))
    opened = open_decoding(resolve(str(tmp_path / "packed")), LENGTH, head=head)
    expected = decoding_of(network, LENGTH, head=head)
    ids = tiny_models.token_ids(1, LONG_PROMPT)[0]
    assert opened.name == expected.name
    assert torch.equal(opened.prefill(ids), expected.prefill(ids))
    assert torch.equal(opened.step(3), expected.step(3))


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_a_model_that_it_cannot_read_is_loaded_by_transformers(family: str, tmp_path: Path) -> None:
    changes = {"hidden_act": "gelu"} if family == "llama" else {}
    network = packed_network(family, tmp_path, **changes)
    opened = open_decoding(resolve(str(tmp_path / "packed")), LENGTH)
    ids = tiny_models.token_ids(1, PROMPT)[0]
    assert opened.name == decoding_of(network, LENGTH).name
    assert torch.equal(opened.prefill(ids), decoding_of(network, LENGTH).prefill(ids))


def test_codes_that_do_not_fit_the_model_never_reach_compiled_code(tmp_path: Path) -> None:
    packed_network("llama", tmp_path)
    path = tmp_path / "packed" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 64}))
    with pytest.raises(ModelError, match=r"mlp.down_proj give a matrix \(64, 128\), the model has \(64, 64\)"):
        open_decoding(resolve(str(tmp_path / "packed")), LENGTH)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma3_text", {}, "supports llama, mistral, qwen2, not gemma3_text"),
        ("llama", {"hidden_act": "gelu"}, "does not support gelu"),
        ("mistral", {"sliding_window": 16}, "does not support a sliding window of 16"),
        ("llama", {"attention_bias": True}, "does not support the bias of model.layers.0.self_attn.o_proj"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "does not support dynamic position embeddings",
        ),
    ],
)
def test_transformers_runs_the_rest_and_the_name_says_why(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    network = packed_network(family, tmp_path, **changes)
    ids = tiny_models.token_ids(1, LENGTH)
    decoding = decoding_of(network, LENGTH)
    assert decoding.name.startswith(f"transformers, {BACKENDS[0]} (the compiled decoder") and reason in decoding.name
    found = [decoding.prefill(ids[0, :PROMPT]), *(decoding.step(token) for token in ids[0, PROMPT:].tolist())]
    expected = network(ids).logits[0, PROMPT - 1 :]
    assert (torch.stack(found) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1.0), (torch.bfloat16, 1e-9)])
def test_a_head_goes_back_to_the_sixteen_bits_it_came_from(dtype: torch.dtype, size: float) -> None:
    weight = (size * torch.randn(5, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert narrowest(weight.float()).dtype == dtype
    assert torch.equal(narrowest(weight.float()), weight)
    assert narrowest(weight.float() * 1.0001).dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": None},
        {"rope_parameters": {"rope_type": "default"}},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": "4"},
        {"rms_norm_eps": "1e-5"},
        {"hidden_act": None},
        {"head_dim": 3.5},
    ],
)
def test_an_invalid_config_never_reaches_compiled_code(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_network("llama", tmp_path)
    path = tmp_path / "packed" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    monkeypatch.setattr(decoding_module, "load_network", lambda *_: "a network")
    monkeypatch.setattr(decoding_module, "decoding_of", lambda network, *_: f"by transformers, of {network}")
    assert open_decoding(resolve(str(tmp_path / "packed")), LENGTH) == "by transformers, of a network"


# ------------------------------------------------------------------------- mixes of schemes, quantized tables and heads


def logits_of(decoding: Decoding, ids: Tensor, prompt: int) -> Tensor:
    return torch.stack([decoding.prefill(ids[:prompt]), *(decoding.step(token) for token in ids[prompt:].tolist())])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mix", mixed_models.MIXES)
def test_logits_of_every_mix_are_those_of_one_forward(mix: str, tied: bool, tmp_path: Path) -> None:
    if tied and "lm_head" in mixed_models.MIXES[mix]:
        pytest.skip("a tied head has the scheme of the embeddings")
    network = mixed_models.network(mixed_models.MIXES[mix], tmp_path, tie_word_embeddings=tied, attention_bias=False)
    if tied and mix == "embeddings of long codes":
        assert decoding_of(network, LENGTH).name.startswith("transformers, cpu-gather")
        return
    decoding = decoding_of(network, LENGTH)
    assert decoding.name == "compiled decoder" + (f", {BACKENDS[0]}" if mix != "uniform alone" else "")
    ids = tiny_models.token_ids(1, LENGTH)
    expected = network(ids).logits[0]
    for prompt in PROMPT, LONG_PROMPT:
        assert (logits_of(decoding, ids[0], prompt) - expected[prompt - 1 :]).norm() < 1e-3 * expected.norm()


def test_widths_and_vocabularies_need_be_no_multiple_of_a_tile(tmp_path: Path) -> None:
    shape = {"hidden_size": 72, "intermediate_size": 104, "num_attention_heads": 3, "num_key_value_heads": 1}
    mix = {"embed_tokens": "4x8g8", **mixed_models.MIXES["one of a stack another"], "layers.1.mlp": "2x8g8"}
    network = mixed_models.network(mix, tmp_path, **shape, head_dim=24, tie_word_embeddings=True)
    ids = tiny_models.token_ids(1, LENGTH)
    expected = network(ids).logits[0, PROMPT - 1 :]
    found = logits_of(decoding_of(network, LENGTH), ids[0], PROMPT)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_a_quantized_head_takes_no_int8(tmp_path: Path) -> None:
    network = mixed_models.network(mixed_models.MIXES["a quantized head"], tmp_path)
    with pytest.raises(KernelError, match="made of a 16-bit lm_head, and this one is quantized; leave --head out"):
        decoding_of(network, LENGTH, head="int8")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mix", ["every layer another", "dense layers", "quantized embeddings", "the head alone"])
def test_a_mix_in_a_checkpoint_decodes_without_a_network(
    mix: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors of a layer say how it is stored, that of embeddings and head as those of any other."""
    if tied and "lm_head" in mixed_models.MIXES[mix]:
        pytest.skip("a tied head has the scheme of the embeddings")
    network = mixed_models.network(mixed_models.MIXES[mix], tmp_path, tie_word_embeddings=tied)
    directory = mixed_models.save(network, tmp_path)
    monkeypatch.setattr(decoding_module, "load_network", lambda *_: pytest.fail("the network was loaded"))
    opened, expected = open_decoding(resolve(str(directory)), LENGTH), decoding_of(network, LENGTH)
    ids = tiny_models.token_ids(1, LONG_PROMPT + 2)[0]
    assert opened.name == expected.name
    assert torch.equal(logits_of(opened, ids, LONG_PROMPT), logits_of(expected, ids, LONG_PROMPT))


def test_a_head_of_64_bits_is_read_in_32() -> None:
    assert narrowest(torch.full((2, 2), 1 / 3, dtype=torch.float64)).dtype == torch.float32
