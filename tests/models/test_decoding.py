"""The compiled decoder against transformers, family by family, and the reasons why it does not serve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import save_file
from torch import Tensor

from aqlm_cli.errors import ModelError
from aqlm_cli.models import Decoding, decoding_of, load_network, open_decoding, resolve
from aqlm_cli.models import decoding as decoding_module
from aqlm_cli.models.blocks import replace_module
from aqlm_cli.models.decoding import narrowest
from aqlm_cli.quantization.methods import rtn
from aqlm_cli.spec.schemes import UniformScheme, parse_scheme
from aqlm_kernels import AdditiveMatrix, CompressedEmbedding, KernelError
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

MIXES: dict[str, dict[str, str]] = {
    "every layer another": {
        "q_proj": "1x8g8",
        "k_proj": "2x8g8",
        "v_proj": "3x8g8",
        "o_proj": "4x8g8",
        "gate_proj": "3x8g16",
        "up_proj": "2x6g4",
        "down_proj": "5x8g8",
    },
    "one of a stack another": {"layers.1.self_attn.k_proj": "1x8g8", "layers.0.mlp.gate_proj": "3x8g8", "": "2x8g8"},
    "dense layers": {"layers.0": "2x8g8", "layers.1.self_attn.v_proj": "2x8g8", "layers.1.mlp.down_proj": "1x8g8"},
    "uniform layers": {
        "q_proj": "int4g64",
        "k_proj": "int4g64",
        "v_proj": "2x8g8",
        "o_proj": "int8g32",
        "mlp": "int3g16",
    },
    "uniform alone": {"embed_tokens": "int6g32", "lm_head": "int4g32", "": "int8g64"},
    "a uniform table": {"embed_tokens": "int4g32", "": "2x8g8"},
    "a quantized head": {"lm_head": "4x8g8", "": "2x8g8"},
    "quantized embeddings": {"embed_tokens": "4x8g8", "": "2x8g8"},
    "embeddings of long codes": {"embed_tokens": "1x10g8", "": "2x8g8"},
    "both, of two schemes": {"embed_tokens": "3x8g16", "lm_head": "2x8g8", "": "2x8g8"},
    "the head alone": {"lm_head": "4x8g8"},
}
"""Scheme of the layers whose path ends so, or is inside; the first that matches. Others stay dense."""


def mixed_network(mix: dict[str, str], directory: Path, **changes: Any) -> Any:
    """A Llama of random weights and codes; embeddings and head are tied if nothing else is said."""
    directory = tiny_models.save("llama", directory / "model", **changes)
    network = load_network(resolve(str(directory)), torch.float32)
    for path, module in list(network.named_modules()):
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) or scheme_of(path, mix) is None:
            continue
        layer = quantized(module.weight, scheme_of(path, mix), getattr(module, "bias", None))
        table = isinstance(module, torch.nn.Embedding)
        replace_module(network, path, CompressedEmbedding(layer) if table else layer)
        if table and network.config.tie_word_embeddings:
            network.lm_head = layer
    return network.half().float().requires_grad_(False)


def scheme_of(path: str, mix: dict[str, str]) -> str | None:
    table = path.endswith(("embed_tokens", "lm_head"))
    return next((word for key, word in mix.items() if key in path and (key or not table)), None)


def quantized(weight: Tensor, word: str, bias: Tensor | None) -> torch.nn.Module:
    """Random codes, in the size of the weights."""
    scheme, draw = parse_scheme(word), torch.Generator().manual_seed(len(weight))
    bias = None if bias is None else bias.detach()
    if isinstance(scheme, UniformScheme):
        return rtn.quantize(weight.detach(), None, scheme, draw, None).module(bias)
    assert scheme.codebook_shape is not None
    num_codebooks, entries, group_size = scheme.codebook_shape
    shape = (len(weight), weight.shape[1] // group_size, num_codebooks)
    codes = torch.randint(0, entries, shape, generator=draw)
    codebooks = 0.1 * torch.randn(scheme.codebook_shape, generator=draw).half().float()
    scales = (0.5 + torch.rand(len(weight), generator=draw)).half().float()
    return AdditiveMatrix(codes, codebooks, scales).module(bias)


def logits_of(decoding: Decoding, ids: Tensor, prompt: int) -> Tensor:
    return torch.stack([decoding.prefill(ids[:prompt]), *(decoding.step(token) for token in ids[prompt:].tolist())])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_logits_of_every_mix_are_those_of_one_forward(mix: str, tied: bool, tmp_path: Path) -> None:
    if tied and "lm_head" in MIXES[mix]:
        pytest.skip("a tied head has the scheme of the embeddings")
    network = mixed_network(MIXES[mix], tmp_path, tie_word_embeddings=tied, attention_bias=False)
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
    mix = {"embed_tokens": "4x8g8", **MIXES["one of a stack another"], "layers.1.mlp": "2x8g8"}
    network = mixed_network(mix, tmp_path, **shape, head_dim=24, tie_word_embeddings=True)
    ids = tiny_models.token_ids(1, LENGTH)
    expected = network(ids).logits[0, PROMPT - 1 :]
    found = logits_of(decoding_of(network, LENGTH), ids[0], PROMPT)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_a_quantized_head_takes_no_int8(tmp_path: Path) -> None:
    network = mixed_network(MIXES["a quantized head"], tmp_path)
    with pytest.raises(KernelError, match="made of a 16-bit lm_head, and this one is quantized; leave --head out"):
        decoding_of(network, LENGTH, head="int8")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mix", ["every layer another", "dense layers", "quantized embeddings", "the head alone"])
def test_a_mix_in_a_checkpoint_decodes_without_a_network(
    mix: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors of a layer say how it is stored, that of embeddings and head as those of any other."""
    if tied and "lm_head" in MIXES[mix]:
        pytest.skip("a tied head has the scheme of the embeddings")
    network = mixed_network(MIXES[mix], tmp_path, tie_word_embeddings=tied)
    directory = saved_mix(network, tmp_path)
    monkeypatch.setattr(decoding_module, "load_network", lambda *_: pytest.fail("the network was loaded"))
    opened, expected = open_decoding(resolve(str(directory)), LENGTH), decoding_of(network, LENGTH)
    ids = tiny_models.token_ids(1, LONG_PROMPT + 2)[0]
    assert opened.name == expected.name
    assert torch.equal(logits_of(opened, ids, LONG_PROMPT), logits_of(expected, ids, LONG_PROMPT))


def saved_mix(network: Any, tmp_path: Path) -> Path:
    """An AQLM checkpoint of the network, with each layer's own codebooks."""
    directory, tied = tmp_path / "packed", network.config.tie_word_embeddings
    shutil.copytree(tmp_path / "model", directory, ignore=shutil.ignore_patterns("*.safetensors"))
    state = {name.replace(".table.", "."): tensor for name, tensor in network.state_dict().items()}
    kept = {name: tensor for name, tensor in state.items() if not (tied and name.startswith("lm_head."))}
    stored = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in kept.items()}
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_head_of_64_bits_is_read_in_32() -> None:
    assert narrowest(torch.full((2, 2), 1 / 3, dtype=torch.float64)).dtype == torch.float32
