"""Rotary positions of GGUF files: the converted model turns every pair as the original does, or the file is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.gguf_files import (
    F32,
    WITHOUT_ROPE_KEYS,
    errors_of,
    llama3_factors,
    logits,
    relative_error,
    save_halved,
    write_gguf,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from aqlm_cli.errors import ModelError
from aqlm_cli.models import load_network, model_config, resolve
from aqlm_cli.models import source as model_source


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., model_source.ModelSource]:
    return lambda name, **options: resolve(str(name), cache_dir=tmp_path / "cache", **options)


LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "scaling", [{}, {"factor": 32.0}, {"high_freq_factor": 2.0, "factor": 4.0}, {"low_freq_factor": 1.5}]
)
@pytest.mark.parametrize("length", [64, 8192])
@pytest.mark.parametrize("head", [16, 64, 128])
def test_rope_freqs_of_a_llama3_scaling_give_the_logits_of_the_base_model(
    head: int, length: int, scaling: dict[str, float], tmp_path: Path, find: Any
) -> None:
    said = {**LLAMA_3_1, **scaling, "original_max_position_embeddings": length}
    base = 500000.0
    original = save_halved(
        tmp_path / "original", head_dim=head, rope_parameters={"rope_type": "llama3", "rope_theta": base, **said}
    )
    factors = {"rope_freqs.weight": llama3_factors(head // 2, base, said)}
    settings = {"rope.freq_base": base, "rope.dimension_count": head}
    write_gguf(original, tmp_path / "tiny.gguf", F32, settings=settings, **factors)
    source = find(tmp_path / "tiny.gguf")
    assert model_config(source)["rope_parameters"]["rope_type"] == "llama3"
    assert errors_of(original, source) < 1e-5
    plain = save_halved(tmp_path / "plain", head_dim=head, rope_parameters={"rope_type": "default", "rope_theta": base})
    shutil.copy(original / "model.safetensors", plain)
    assert errors_of(plain, source) > 1e-4  # the bound above can fail


def test_the_scaling_of_llama_3_1_is_found_by_its_own_numbers(tmp_path: Path, find: Any) -> None:
    for factor in 8.0, 32.0:
        said = {**LLAMA_3_1, "factor": factor}
        parameters = {"rope_type": "llama3", "rope_theta": 500000.0, **said}
        original = save_halved(tmp_path / f"original-{factor}", head_dim=128, rope_parameters=parameters)
        factors = {"rope_freqs.weight": llama3_factors(64, 500000.0, said)}
        write_gguf(
            original,
            tmp_path / f"{factor}.gguf",
            F32,
            settings={"rope.freq_base": 500000.0, "rope.dimension_count": 128},
            **factors,
        )
        assert model_config(find(tmp_path / f"{factor}.gguf"))["rope_parameters"] == parameters


def test_rope_freqs_of_ones_change_nothing(tmp_path: Path, find: Any) -> None:
    original = save_halved(tmp_path / "original")
    write_gguf(original, tmp_path / "tiny.gguf", F32, **{"rope_freqs.weight": torch.ones(8)})
    source = find(tmp_path / "tiny.gguf")
    assert model_config(source)["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert errors_of(original, source) < 1e-5


@pytest.mark.parametrize(
    "factors",
    [
        torch.tensor([1.0, 1.5, 1.2, 4.0, 2.0, 4.0, 3.0, 4.0]),  # neither rising nor of one slope
        torch.ones(7),
        torch.full((8,), 0.5),
        torch.tensor([1.0] * 7 + [float("nan")]),
        torch.zeros(8),
        torch.tensor([1.0] * 7 + [-2.0]),
    ],
)
def test_factors_that_no_scaling_has_are_refused_by_name(factors: Tensor, tmp_path: Path, find: Any) -> None:
    original = save_halved(tmp_path / "original")
    write_gguf(original, tmp_path / "tiny.gguf", F32, **{"rope_freqs.weight": factors})
    with pytest.raises(ModelError, match=r"llama in transformers cannot express rope_freqs\.weight; use the"):
        find(tmp_path / "tiny.gguf")


def longrope(directory: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A tiny Phi-3 for long texts, with three quarters of each head turned, as in Phi-4-mini."""
    short, long = [1.0 + 0.05 * i for i in range(6)], [1.0 + 2.0 * i for i in range(6)]
    said = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "original_max_position_embeddings": 64}
    parameters = {**said, "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    original = save_halved(directory, "phi3", rope_parameters=parameters, original_max_position_embeddings=64)
    attention = float(np.sqrt(1 + np.log(256 / 64) / np.log(64)))
    settings = {
        **WITHOUT_ROPE_KEYS,
        ".tokenizer.ggml.padding_token_id": 0,
        "rope.dimension_count": 12,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": attention,
    }
    return (
        original,
        settings,
        {"rope_factors_long.weight": torch.tensor(long), "rope_factors_short.weight": torch.tensor(short)},
    )


@pytest.mark.parametrize("length", [40, 200])
def test_two_tensors_of_factors_are_those_of_short_and_of_long_texts(length: int, tmp_path: Path, find: Any) -> None:
    original, settings, factors = longrope(tmp_path / "original")
    write_gguf(original, tmp_path / "tiny.gguf", F32, "phi3", settings, **factors)
    source = find(tmp_path / "tiny.gguf")
    assert errors_of(original, source, length) < 1e-5


def test_one_of_two_tensors_of_factors_is_refused(tmp_path: Path, find: Any) -> None:
    original, settings, factors = longrope(tmp_path / "original")
    del factors["rope_factors_short.weight"]
    write_gguf(original, tmp_path / "tiny.gguf", F32, "phi3", settings, **factors)
    with pytest.raises(ModelError, match=r"rope_factors_long\.weight without its counterpart"):
        find(tmp_path / "tiny.gguf")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "parameters", "settings"),
    [
        ("qwen2", {"rope_type": "default", "rope_theta": 1e6}, {"rope.freq_base": 1e6}),
        ("qwen2", {"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ("qwen2", {"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}),
        ("llama", {"rope_type": "linear", "factor": 2.0}, {"rope.scaling.factor": 2.0}),
        (
            "qwen2",
            YARN,
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.finetuned": True,
            },
        ),
        (
            "qwen3",
            {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
                "attention.key_length": 16,
            },
        ),
        (
            "phi3",
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            {"rope.dimension_count": 8, ".tokenizer.ggml.padding_token_id": 0},
        ),
        ("starcoder2", {"rope_type": "default", "rope_theta": 99999.0}, {"rope.freq_base": 99999.0}),
    ],
)
def test_positions_in_the_settings_give_the_logits_of_the_base_model(
    family: str, parameters: dict[str, Any], settings: dict[str, Any], tmp_path: Path, find: Any
) -> None:
    """transformers' own conversion leaves all of these at their defaults, without a word."""
    given = {"rope_theta": 10000.0, **parameters}
    shape = dict(tiny_models.SHAPE) if family == "starcoder2" else {}
    original = save_halved(tmp_path / "original", family, **{**shape, "rope_parameters": given})
    write_gguf(original, tmp_path / "tiny.gguf", F32, family, {**WITHOUT_ROPE_KEYS, **settings})
    assert errors_of(original, find(tmp_path / "tiny.gguf")) < 1e-5
    write_gguf(
        original,
        tmp_path / "plain.gguf",
        F32,
        family,
        {"attention.key_length": 16, ".tokenizer.ggml.padding_token_id": 0},
    )
    assert errors_of(original, find(tmp_path / "plain.gguf")) > 1e-4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "cannot express rope.scaling.type longrope"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "cannot express rope.scaling.type yarn"),
        ({"rope.scaling.alpha": 2.0}, "has rope.scaling.alpha, which transformers does not support"),
        ({"rope.scaling.attn_factor": 2.0}, "cannot express rope.scaling.type none"),
        ({"rope.dimension_count": 8}, "has the shape"),
    ],
)
def test_positions_that_no_config_can_express_are_refused(
    settings: dict[str, Any], words: str, tmp_path: Path, find: Any
) -> None:
    original = save_halved(tmp_path / "original")
    write_gguf(original, tmp_path / "tiny.gguf", F32, settings={**WITHOUT_ROPE_KEYS, **settings})
    with pytest.raises(ModelError, match=words):
        find(tmp_path / "tiny.gguf")


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "scalar"), [(2, 32), (6, 32), pytest.param(62, 16, marks=pytest.mark.soak)])
def test_a_gemma_has_the_bases_of_its_sliding_windows_and_the_scale_of_its_size(
    layers: int, scalar: int, tmp_path: Path, find: Any
) -> None:
    parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    shape = {**tiny_models.SHAPE, "layer_types": None, "sliding_window": 16, "head_dim": 32, "intermediate_size": 64}
    given = {"num_hidden_layers": layers, "query_pre_attn_scalar": scalar, "rope_parameters": parameters}
    original = save_halved(tmp_path / "original", "gemma3_text", **{**shape, **given})
    settings = {
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 5000.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "attention.key_length": 32,
        "attention.sliding_window": 16,
        ".tokenizer.ggml.padding_token_id": 0,
    }
    write_gguf(original, tmp_path / "tiny.gguf", F32, "gemma3", settings)
    source = find(tmp_path / "tiny.gguf")
    assert model_config(source)["rope_parameters"] == parameters
    assert model_config(source)["query_pre_attn_scalar"] == scalar
    if layers == 6:
        assert errors_of(original, source, 100) < 1e-5
        other = AutoModelForCausalLM.from_pretrained(original, query_pre_attn_scalar=16).eval()
        assert relative_error(logits(other, 100), logits(load_network(source, torch.float32), 100)) > 1e-3
