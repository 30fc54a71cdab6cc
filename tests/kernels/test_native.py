"""Native checkpoints in stock transformers."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import native_files, tiny_models
from helpers.packing import logits, relative_rms
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aqlm_kernels import CompressedEmbedding, KernelError, quantized_layers

EMBEDDING, HEAD, Q = "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "body": ("llama", {}, {}),
    "biases": ("qwen2", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {EMBEDDING: "int4g32"}),
    "tied additive": ("llama", {"tie_word_embeddings": True}, {EMBEDDING: "2x4g8"}),
    "embedding": ("llama", {"tie_word_embeddings": False}, {EMBEDDING: "int4g32"}),
    "head": ("llama", {"tie_word_embeddings": False}, {HEAD: "2x8g8"}),
    "both": ("llama", {"tie_word_embeddings": False}, {EMBEDDING: "int5g64", HEAD: "int6g64"}),
    "scaled": ("gemma3_text", {}, {EMBEDDING: "int4g32"}),
}


@pytest.fixture(params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A native checkpoint, and the dense network that it stands for."""
    family, settings, tables = MODELS[request.param]
    original = tiny_models.save(family, tmp_path / "original", **settings)
    weights = native_files.save_native(original, tmp_path / "packed", tables)
    return tmp_path / "packed", native_files.dense_network(original, weights)


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **{"dtype": torch.float32, **options})


def test_stock_transformers_loads_every_mix(checkpoint: tuple[Path, Any]) -> None:
    directory, dense = checkpoint
    network, report = load(directory, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert relative_rms(logits(network), logits(dense)) < 1e-5
    for path, layer in quantized_layers(network).items():
        assert torch.equal(layer.matrix().dequantize(), dense.get_submodule(path).weight), path
    assert not any(p.requires_grad for layer in quantized_layers(network).values() for p in layer.trainable().values())


def test_what_it_saves_is_the_same_checkpoint(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    directory, _ = checkpoint
    network = load(directory, dtype=torch.float16)
    network.save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / "model.safetensors") for folder in (directory, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) and first[name].dtype == again[name].dtype for name in first)
    settings = [json.loads((folder / "config.json").read_text()) for folder in (directory, tmp_path / "again")]
    assert settings[0]["quantization_config"] == settings[1]["quantization_config"]
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(directory)))


def test_it_generates_what_the_dense_model_does(checkpoint: tuple[Path, Any]) -> None:
    directory, dense = checkpoint
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids = tiny_models.token_ids(1, 20)
    assert torch.equal(load(directory).generate(ids, **settings), dense.generate(ids, **settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_and_logits_have_the_type_that_is_asked(dtype: torch.dtype, tmp_path: Path) -> None:
    original = tiny_models.save("llama", tmp_path / "original", tie_word_embeddings=True)
    weights = native_files.save_native(original, tmp_path / "packed", {EMBEDDING: "int4g32"})
    network = load(tmp_path / "packed", dtype=dtype)
    assert network.model.embed_tokens(torch.tensor([[1, 2]])).dtype == logits(network).dtype == dtype
    assert relative_rms(logits(network).float(), logits(native_files.dense_network(original, weights))) < 0.05


def test_a_tied_head_is_the_table_itself(tmp_path: Path) -> None:
    original = tiny_models.save("llama", tmp_path / "original", tie_word_embeddings=True)
    native_files.save_native(original, tmp_path / "packed", {EMBEDDING: "int4g32"})
    network = load(tmp_path / "packed")
    assert isinstance(network.model.embed_tokens, CompressedEmbedding)
    assert network.lm_head is network.model.embed_tokens.table
    network.tie_weights()  # finds nothing to tie
    assert network.lm_head is network.model.embed_tokens.table
    assert EMBEDDING in quantized_layers(network) and HEAD not in quantized_layers(network)


ADAPTED = ["q_proj", "k_proj", "v_proj", "down_proj"]  # additive, uniform, 16 bits, uniform


def test_lora_learns_on_it_is_saved_and_loaded(tmp_path: Path) -> None:
    original = tiny_models.save("llama", tmp_path / "original", tie_word_embeddings=True)
    native_files.save_native(original, tmp_path / "packed", {EMBEDDING: "int4g32"})
    network, ids = load(tmp_path / "packed"), tiny_models.token_ids(2, 24)
    before = {path: layer.matrix().dequantize() for path, layer in quantized_layers(network).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = get_peft_model(network, LoraConfig(r=4, target_modules=ADAPTED, task_type="CAUSAL_LM"))
    optimizer = torch.optim.Adam([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(tmp_path / "packed"), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(adapted.eval()))
    after = {path: layer.matrix().dequantize() for path, layer in quantized_layers(adapted.unload()).items()}
    assert all(torch.equal(before[path], after[path]) for path in before)


def test_what_peft_cannot_do_on_codes_is_refused_with_the_way_out(tmp_path: Path) -> None:
    original = tiny_models.save("llama", tmp_path / "original", tie_word_embeddings=True)
    native_files.save_native(original, tmp_path / "packed", {EMBEDDING: "int4g32"})
    adapted = get_peft_model(load(tmp_path / "packed"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(NotImplementedError, match=r"cannot be merged into the codes.*aqlm pack --format dense"):
        adapted.merge_and_unload()
    embeddings = load(tmp_path / "packed").get_input_embeddings()
    assert not hasattr(embeddings, "weight") and getattr(embeddings, "weight", 3) == 3
    rows = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    with pytest.raises(AttributeError, match=r"compressed embedding has no weight.*dequantize"):
        get_peft_model(load(tmp_path / "packed"), rows)


def test_adapters_are_saved_alone_and_loaded_by_transformers_itself(tmp_path: Path) -> None:
    original = tiny_models.save("llama", tmp_path / "original")
    native_files.save_native(original, tmp_path / "packed")
    network = load(tmp_path / "packed")
    network.add_adapter(LoraConfig(r=4, target_modules=ADAPTED, init_lora_weights=False))
    network.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    other = load(tmp_path / "packed")
    other.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(other), logits(network))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2 of the format aqlm_native"),
        ({"layers": {}}, "lists no layers"),
        ({"layers": {"model.norm": {"scheme": "2x8g8", "kind": "additive", "duty": "linear"}}}, "has a LlamaRMSNorm"),
        (
            {"layers": {"model.no": {"scheme": "2x8g8", "kind": "additive", "duty": "linear"}}},
            "the model no such module",
        ),
        ({"layers": {Q: {"scheme": "2x8g8", "kind": "additive"}}}, f"no scheme, kind and duty for {Q}"),
        ({"layers": {Q: {"scheme": "2x8g8", "kind": "odd", "duty": "linear"}}}, "update aqlm-cli"),
        ({"layers": {Q: {"scheme": "2x4g8", "kind": "additive", "duty": "linear"}}}, f"{Q}: .*2x4g8"),
        ({"layers": {Q: {"scheme": "int4g8", "kind": "uniform", "duty": "linear"}}}, f"{Q}: |lacks the tensor"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(changes: Any, message: str, tmp_path: Path) -> None:
    original = tiny_models.save("llama", tmp_path / "original")
    native_files.save_native(original, tmp_path / "packed")
    described = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    native_files.edit_config(tmp_path / "packed", quantization_config={**described, **changes})
    with pytest.raises(KernelError, match=message):
        load(tmp_path / "packed")


def test_a_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    original = tiny_models.save("llama", tmp_path / "original")
    native_files.save_native(original, tmp_path / "packed")
    native_files.edit_config(tmp_path / "packed", num_attention_heads=2, head_dim=16)
    with pytest.raises(KernelError, match=r"q_proj has a matrix \(64, 64\) in the files, the model has \(32, 64\)"):
        load(tmp_path / "packed")


@pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "disk"}, {"": "disk"}])
def test_offloading_is_refused(device_map: dict[str, str], tmp_path: Path) -> None:
    original = tiny_models.save("llama", tmp_path / "original")
    native_files.save_native(original, tmp_path / "packed")
    with pytest.raises(KernelError, match="cannot be offloaded"):
        load(tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "disk")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loaded_model_takes_another_type(checkpoint: tuple[Path, Any], dtype: torch.dtype) -> None:
    directory, dense = checkpoint
    network = load(directory).to(dtype)
    assert logits(network).dtype == dtype
    assert relative_rms(logits(network).float(), logits(dense)) < 0.05


@pytest.mark.parametrize("tables", [{EMBEDDING: "2x4g8"}, {HEAD: "int4g32"}, {EMBEDDING: "int4g32", HEAD: "2x8g8"}])
def test_a_quantized_table_is_never_resized(tables: dict[str, str], tmp_path: Path) -> None:
    original = tiny_models.save("llama", tmp_path / "original", tie_word_embeddings=False)
    native_files.save_native(original, tmp_path / "packed", tables)
    network = copy.deepcopy(load(tmp_path / "packed"))
    for size in None, network.config.vocab_size:
        assert network.resize_token_embeddings(size) is network.get_input_embeddings()
    for size, multiple in (300, None), (None, 64):
        with pytest.raises(KernelError, match="cannot be resized from 258 tokens; resize the base model, then quant"):
            network.resize_token_embeddings(size, multiple)
