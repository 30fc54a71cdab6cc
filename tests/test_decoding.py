"""The compiled decoder against transformers, family by family, and the reasons why it does not serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from aqlm_cli.model import decoding_of, load_network, resolve
from aqlm_cli.model.decoding import narrowest
from aqlm_kernels import KernelError
from aqlm_kernels.cpu import registers

LENGTH, PROMPT = 30, 11

BACKENDS = ["cpu-avx512", "cpu-lut"] if registers.HAS_VBMI else ["cpu-lut"]


def packed_network(family: str, directory: Path, **changes: Any) -> Any:
    tiny_models.save_additive(tiny_models.save(family, directory / "model", **changes), directory / "packed")
    return load_network(resolve(str(directory / "packed")), torch.float32)


def test_positions_of_long_models_are_those_of_one_forward(tmp_path: Path) -> None:
    scaled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    network = packed_network("llama", tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, **scaled})
    ids = tiny_models.token_ids(1, LENGTH)
    decoding = decoding_of(network, LENGTH)
    assert decoding.name.startswith("compiled decoder")
    found = [decoding.read(ids[0, :PROMPT]), *(decoding.step(token) for token in ids[0, PROMPT:].tolist())]
    expected = network(ids).logits[0, PROMPT - 1 :]
    assert (torch.stack(found) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_its_logits_are_those_of_one_forward(family: str, backend: str, tmp_path: Path) -> None:
    changes = {"sliding_window": None} if family == "mistral" else {}
    network = packed_network(family, tmp_path, **changes)
    ids = tiny_models.token_ids(1, LENGTH)
    expected = network(ids).logits[0, PROMPT - 1 :]
    decoding = decoding_of(network, LENGTH, backend)
    assert decoding.name == f"compiled decoder, {backend}"
    for _ in range(2):  # a second prompt begins anew
        found = [decoding.read(ids[0, :PROMPT]), *(decoding.step(token) for token in ids[0, PROMPT:].tolist())]
        assert (torch.stack(found) - expected).norm() < 1e-3 * expected.norm()


def test_it_stops_where_its_room_ends(tmp_path: Path) -> None:
    decoding = decoding_of(packed_network("llama", tmp_path), PROMPT + 1)
    decoding.read(tiny_models.token_ids(1, PROMPT)[0])
    decoding.step(3)
    with pytest.raises(KernelError, match=f"room for {PROMPT + 1} positions"):
        decoding.step(3)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma3_text", {}, "knows llama, mistral, qwen2, this is gemma3_text"),
        ("llama", {"hidden_act": "gelu"}, "knows no gelu"),
        ("mistral", {"sliding_window": 16}, "sees all tokens, this model 16"),
        ("llama", {"attention_bias": True}, "knows no bias of o_proj"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "knows no dynamic positions",
        ),
    ],
)
def test_what_it_cannot_run_transformers_runs_and_the_reason_is_said(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    network = packed_network(family, tmp_path, **changes)
    ids = tiny_models.token_ids(1, LENGTH)
    decoding = decoding_of(network, LENGTH)
    assert decoding.name.startswith(f"transformers, {BACKENDS[0]} (the compiled decoder") and reason in decoding.name
    found = [decoding.read(ids[0, :PROMPT]), *(decoding.step(token) for token in ids[0, PROMPT:].tolist())]
    expected = network(ids).logits[0, PROMPT - 1 :]
    assert (torch.stack(found) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1.0), (torch.bfloat16, 1e-9)])
def test_a_head_goes_back_to_the_sixteen_bits_it_came_from(dtype: torch.dtype, size: float) -> None:
    weight = (size * torch.randn(5, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert narrowest(weight.float()).dtype == dtype
    assert torch.equal(narrowest(weight.float()), weight)
    assert narrowest(weight.float() * 1.0001).dtype == torch.float32
