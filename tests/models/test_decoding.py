"""The compiled decoder against transformers, family by family, and the reasons why it does not serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models

from aqlm_cli.errors import ModelError
from aqlm_cli.models import decoding as decoding_module
from aqlm_cli.models import decoding_of, load_network, open_decoding, resolve
from aqlm_cli.models.decoding import narrowest
from aqlm_kernels import AdditiveLinear, AdditiveMatrix, KernelError
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


def test_two_schemes_in_one_stack_are_run_by_transformers(tmp_path: Path) -> None:
    network = packed_network("llama", tmp_path)
    layer = network.model.layers[1].self_attn.k_proj
    other = AdditiveMatrix(layer.codes[..., :1], layer.codebooks[:1].detach(), layer.scales.detach())
    network.model.layers[1].self_attn.k_proj = AdditiveLinear(other)
    found = decoding_of(network, LENGTH)
    assert "needs one scheme for self_attn.q_proj, self_attn.k_proj" in found.name


def test_a_head_of_64_bits_is_read_in_32() -> None:
    assert narrowest(torch.full((2, 2), 1 / 3, dtype=torch.float64)).dtype == torch.float32
