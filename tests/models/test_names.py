"""Models whose files name their tensors otherwise than their networks do, packed under the names of the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.packing import logits, packed, quantized_model, relative_rms, with_weights_written_out
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from aqlm_cli.models import load_network, load_skeleton, plan_of_checkpoint, resolve
from aqlm_cli.models.blocks import count_parameters, describe_layers
from aqlm_cli.models.source import tensor_index

STATES: Mapping[str, Any] = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1}
OLD: Mapping[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8}
RECURRENT: Mapping[str, Any] = {f"linear_{name}_head_dim": 16 for name in ("key", "value")}


def with_eyes(directory: Path) -> Path:
    """Gemma 3 with a vision tower: a prefix inside the names is another one."""
    text = {**tiny_models.FAMILIES["gemma3_text"], "vocab_size": 262}
    eyes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"boi_token_index": 258, "eoi_token_index": 259, "image_token_index": 260, "eos_token_id": 257}
    config = Gemma3Config(
        text_config=dict(text), vision_config={**eyes, "image_size": 28}, mm_tokens_per_image=4, **tokens
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(directory)
    tiny_models.byte_tokenizer().save_pretrained(directory)
    return directory


def renamed(family: str, rename: Callable[[str], str], **settings: Any) -> Callable[[Path], Path]:
    """A model with other names in its file."""

    def save(directory: Path) -> Path:
        tiny_models.save(family, directory, **settings)
        tensors = {rename(name): tensor for name, tensor in load_file(directory / "model.safetensors").items()}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    return save


def family(name: str, **settings: Any) -> Callable[[Path], Path]:
    return lambda directory: tiny_models.save(name, directory, **{**tiny_models.SHAPE, **settings})


MODELS: Mapping[str, Callable[[Path], Path]] = {
    "eyes": with_eyes,
    "nemotron_h": family("nemotron_h", layers_block_type=["mamba", "attention", "mlp"], chunk_size=16, **STATES),
    # convolutions that are three in the files and one in the network
    "olmo_hybrid": family("olmo_hybrid", layer_types=["linear_attention", "full_attention"], **RECURRENT),
    "lfm3": family("lfm3", layer_types=["conv", "full_attention"]),
    # matrices that are one in the files and four in the network
    "hrm_text": family("hrm_text", head_dim=16),
    # as the class without a head saves it, which is how GPT-2 lies on the hub
    "no prefix": renamed("llama", lambda name: name.removeprefix("model."), tie_word_embeddings=True),
    "no prefix, biases": renamed("gptj", lambda name: name.removeprefix("transformer."), **OLD),
    "a prefix too many": renamed("llama", lambda name: f"model.{name.removeprefix('model.')}"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_packed_under_the_names_of_its_files_computes_the_same(kind: str, tmp_path: Path) -> None:
    run, plan = quantized_model(MODELS[kind](tmp_path / "model"), tmp_path, "2x4g8", skip=[r".*\.1\..*q_proj"])
    wanted = logits(with_weights_written_out(run, plan))
    directory = packed(run).directory
    assert relative_rms(logits(load_network(resolve(str(directory)), torch.float32)), wanted) < 1e-5
    assert relative_rms(stock(directory), wanted) < 1e-5
    dense = packed(run, "dense", overwrite=True).directory
    assert relative_rms(logits(load_network(resolve(str(dense)), torch.float32)), wanted) < 2e-3
    assert relative_rms(stock(dense), wanted) < 2e-3


@pytest.mark.parametrize("kind", MODELS)
def test_only_slices_of_a_quantized_layer_get_another_name(kind: str, tmp_path: Path) -> None:
    run, _ = quantized_model(MODELS[kind](tmp_path / "model"), tmp_path, "2x4g8", skip=[r".*\.1\..*q_proj"])
    before, after = (tensor_index(path) for path in (Path(run.config.model), packed(run, "dense").directory))
    removed, added = before.keys() - after.keys(), after.keys() - before.keys()
    cut = ("attn.gqkv_proj.weight", "mlp.gate_up_proj.weight") if kind == "hrm_text" else ()
    assert all(name.endswith(cut) for name in removed)
    assert bool(removed) == bool(added) == bool(cut)


@pytest.mark.parametrize("kind", MODELS)
def test_the_layers_of_a_checkpoint_are_found_by_what_they_are_in_the_network(kind: str, tmp_path: Path) -> None:
    run, plan = quantized_model(MODELS[kind](tmp_path / "model"), tmp_path, "2x4g8", skip=[r".*\.1\..*q_proj"])
    original = resolve(run.config.model)
    network = load_skeleton(original)
    layers, count = describe_layers(network), count_parameters(network)
    told = plan_of_checkpoint(resolve(str(packed(run).directory)), original, network, layers, count)
    assert told.schemes == plan.schemes


def stock(directory: Path) -> Tensor:
    """By transformers and the inference package as they are, which writes out the weights of codes of 4 bits."""
    return logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())
