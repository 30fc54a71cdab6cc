"""The native format: any mix of schemes, tables included, at the bytes of the plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.native_files import SCHEMES, random_packed
from helpers.packing import config_json, logits, relative_rms
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aqlm_cli.errors import ModelError, PlanError
from aqlm_cli.export import EXPORTERS, export
from aqlm_cli.export.writer import checkpoint_bytes
from aqlm_cli.models import ModelSource, load_network, load_skeleton, resolve, tensor_index, trial, untie_stored
from aqlm_cli.models.blocks import describe_layers, find_blocks, linears
from aqlm_cli.models.native_checkpoint import load_dense, native_matrices
from aqlm_cli.quantization.methods import rtn
from aqlm_cli.spec.schemes import parse_scheme
from aqlm_kernels import MATRIX_KINDS, Matrix, quantized_layers

EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm.weight"

MODELS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, str]]] = {
    "body": ("llama", {}, {}),
    "biases": ("qwen2", {}, {EMBEDDING: "int4g32"}),
    "tied": ("llama", {"tie_word_embeddings": True}, {EMBEDDING: "3x4g8"}),
    "untied": ("llama", {"tie_word_embeddings": False}, {EMBEDDING: "int3g16", HEAD: "2x8g8"}),
    "scaled": ("gemma3_text", {}, {EMBEDDING: "int4g32"}),
}


def matrix(scheme: str, rows: int, columns: int, seed: int) -> Matrix:
    kind = MATRIX_KINDS["uniform" if scheme.startswith("int") else "additive"]
    return kind.from_packed(random_packed(scheme, rows, columns, seed)[0], scheme)


def mixed(source: ModelSource, tables: Mapping[str, str]) -> dict[str, Matrix]:
    """A matrix for the layers of SCHEMES in every block, and one of each scheme of `tables`."""
    network = load_network(source, torch.float32)
    blocks = find_blocks(network)
    layers = {
        path: SCHEMES[path.rpartition(".")[2]]
        for prefix, block in zip(blocks.paths, blocks.modules, strict=True)
        for path in linears(block, prefix)
        if path.rpartition(".")[2] in SCHEMES
    }
    weights = {path: network.get_submodule(path).weight for path in {**layers, **tables}}
    schemes = {**layers, **tables}
    return {path: matrix(schemes[path], *weights[path].shape, seed=n) for n, path in enumerate(schemes)}


def expected(source: ModelSource, matrices: Mapping[str, Matrix]) -> Tensor:
    """Logits of the base model in 16 bits with dequantized weights; those of a tied pair stay one."""
    network = load_network(source, torch.float32)
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    for path, one in matrices.items():
        network.get_submodule(path).weight.data = one.dequantize()
    network.get_parameter(NORM).data = torch.full((64,), 0.75)
    return logits(network)


def exported(source: ModelSource, matrices: Mapping[str, Matrix], directory: Path, format: str = "native") -> Path:
    export(source, matrices, {NORM: torch.full((64,), 0.75)}, directory, EXPORTERS[format])
    return directory


@pytest.mark.parametrize("name", MODELS)
def test_matrices_come_back_bit_for_bit_and_stock_transformers_computes_what_we_do(name: str, tmp_path: Path) -> None:
    family, settings, tables = MODELS[name]
    source = resolve(str(tiny_models.save(family, tmp_path / "model", **settings)))
    matrices = mixed(source, tables)
    packed = resolve(str(exported(source, matrices, tmp_path / "out")))
    ours, read = load_network(packed, torch.float32), native_matrices(packed)
    loaded = {path: layer.matrix() for path, layer in quantized_layers(ours).items()}
    assert read.keys() == loaded.keys() == matrices.keys()
    for path, wanted in matrices.items():
        for last, tensor in wanted.packed_tensors().items():
            assert torch.equal(tensor, read[path].packed_tensors()[last]), path
            assert torch.equal(tensor, loaded[path].packed_tensors()[last]), path
    stock = AutoModelForCausalLM.from_pretrained(packed.directory, dtype=torch.float32)
    wanted_logits = expected(source, matrices)
    assert relative_rms(logits(stock), wanted_logits) < 1e-5
    assert relative_rms(logits(ours), wanted_logits) < 1e-5
    assert relative_rms(logits(load_dense(packed, torch.float32)), wanted_logits) < 1e-5
    described = config_json(packed.directory)["quantization_config"]
    assert {path: layer["scheme"] for path, layer in described["layers"].items()} == {
        path: one.scheme for path, one in matrices.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_file_has_the_bytes_of_the_plan_and_of_the_schemes(name: str, tmp_path: Path) -> None:
    family, settings, tables = MODELS[name]
    source = resolve(str(tiny_models.save(family, tmp_path / "model", **settings)))
    matrices = mixed(source, tables)
    network, stored = load_skeleton(source), {n: t.layout for n, t in tensor_index(source.directory).items()}
    untie_stored(network, stored)
    schemes = {path: parse_scheme(one.scheme) for path, one in matrices.items()}
    layout = EXPORTERS["native"].layouts(network, stored, schemes, {NORM})
    file = exported(source, matrices, tmp_path / "out") / "model.safetensors"
    tensors = load_file(file)
    assert file.stat().st_size == checkpoint_bytes(layout.tensors)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        name: (planned.dtype, planned.shape) for name, planned in layout.tensors.items()
    }
    for path, one in matrices.items():
        bits = 8 * sum(tensor.nbytes for name, tensor in tensors.items() if name.rpartition(".")[0] == path)
        bits -= 16 * one.out_features * (f"{path}.bias" in tensors)
        assert one.bits() <= bits < one.bits() + 8 * len(one.packed_tensors()) + 16


def test_a_tied_matrix_is_stored_once_and_so_it_is_in_the_dense_format(tmp_path: Path) -> None:
    source = resolve(str(tiny_models.save("llama", tmp_path / "model", tie_word_embeddings=True)))
    matrices = {EMBEDDING: matrix("int4g32", 258, 64, 0)}
    for format in "native", "dense":
        directory = exported(source, matrices, tmp_path / format, format)
        names = load_file(directory / "model.safetensors").keys()
        assert not any(name.startswith(HEAD) for name in names)
        stock = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        assert relative_rms(logits(stock), expected(source, matrices)) < (1e-5 if format == "native" else 2e-3)


def test_a_head_that_the_files_hold_beside_its_twin_is_a_matrix_of_its_own(tmp_path: Path) -> None:
    """The config says tied, and the files have two tensors."""
    directory = tiny_models.save("llama", tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    head = torch.randn(258, 64, generator=torch.Generator().manual_seed(3))
    save_file({**tensors, f"{HEAD}.weight": head}, directory / "model.safetensors", {"format": "pt"})
    source = resolve(str(directory))
    matrices = {EMBEDDING: matrix("int4g32", 258, 64, 0)}
    packed = exported(source, matrices, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    assert torch.equal(stock.lm_head.weight, head.half().float())
    assert relative_rms(logits(stock), expected(source, matrices)) < 1e-5


# ------------------------------------------------------------------------------------------------------------- refusals


def test_the_transformers_format_refuses_a_table_and_a_mix_by_name(tmp_path: Path) -> None:
    source = resolve(str(tiny_models.save("llama", tmp_path / "model", tie_word_embeddings=True)))
    with pytest.raises(PlanError, match=r"has embeddings in 16 bits, and model\.embed_tokens is.*--format native"):
        exported(source, {EMBEDDING: matrix("2x8g8", 258, 64, 0)}, tmp_path / "out", "transformers")
    layers = {"model.layers.0.mlp.up_proj": "2x8g8", "model.layers.1.mlp.up_proj": "int4g32"}
    mix = {path: matrix(scheme, 128, 64, 0) for path, scheme in layers.items()}
    with pytest.raises(PlanError, match=r"2x8g8: model\.layers\.0\.mlp\.up_proj; int4g32: model\.layers\.1.*native"):
        exported(source, mix, tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


def test_a_matrix_without_a_scheme_is_refused_by_name(tmp_path: Path) -> None:
    source = resolve(str(tiny_models.save("llama", tmp_path / "model")))
    one_bit = MATRIX_KINDS["uniform"].from_packed(random_packed("int1g16", 128, 64, 0)[0], "int1g16")
    with pytest.raises(PlanError, match=r"native cannot hold model\.layers\.0\.mlp\.up_proj"):
        exported(source, {"model.layers.0.mlp.up_proj": one_bit}, tmp_path / "out")


def test_an_embedding_that_does_more_than_look_up_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(str(tiny_models.save("gemma3_text", tmp_path / "model")))
    kind = type(load_network(source, torch.float32).model.embed_tokens)
    monkeypatch.setattr(kind, "forward", lambda self, ids: nn.Embedding.forward(self, ids).tanh())
    with pytest.raises(PlanError, match=r"Gemma3TextScaledWordEmbedding, which does more than look rows up"):
        exported(source, {EMBEDDING: matrix("int4g32", 258, 64, 0)}, tmp_path / "out")


def test_a_network_that_reads_the_weight_of_its_embedding_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(str(tiny_models.save("llama", tmp_path / "model", tie_word_embeddings=True)))
    network = load_network(source, torch.float32)
    forward = type(network.model).forward

    def reading(self: Any, *args: Any, **options: Any) -> Any:
        self.embed_tokens.weight.new_ones(())
        return forward(self, *args, **options)

    monkeypatch.setattr(type(network.model), "forward", reading)
    with pytest.raises(PlanError, match=r"accesses the weight of model\.embed_tokens.*--format dense"):
        exported(source, {EMBEDDING: matrix("int4g32", 258, 64, 0)}, tmp_path / "out")


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    source = resolve(str(tiny_models.save("llama", tmp_path / "model")))
    packed = exported(source, mixed(source, {}), tmp_path / "out")
    tensors = load_file(packed / "model.safetensors")
    path = "model.layers.0.self_attn.q_proj"
    for damage, message in (
        ({f"{path}.codes": tensors[f"{path}.codes"][:-3]}, f"{path}: .*bytes, found"),
        ({f"{path}.codes": None}, f"{path} lacks the tensor codes"),
        ({NORM: None}, f"lacks the tensor {NORM}"),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **damage}.items() if tensor is not None}
        save_file(changed, packed / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=message):
            load_network(resolve(str(packed)), torch.float32)


def test_verify_finds_a_layer_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(str(tiny_models.save("llama", tmp_path / "model", tie_word_embeddings=True)))
    packed = resolve(str(exported(source, {EMBEDDING: matrix("int4g32", 258, 64, 0)}, tmp_path / "out")))
    assert trial.disagreement(packed) is None
    monkeypatch.setattr("aqlm_kernels.native.embedding_scale", lambda embedding: 2.0)
    assert trial.disagreement(packed) == "transformers computes other logits with it than aqlm"


@pytest.mark.slow
def test_every_matrix_of_the_embedded_model_comes_back_in_stock_transformers(tmp_path: Path) -> None:
    """SmolLM2-135M, tied: 4 bits for its table and attention, 8 for the rest."""
    source = resolve("smollm2-135m")
    network, rng = load_network(source, torch.float32), torch.Generator().manual_seed(0)
    paths = [EMBEDDING, *(layer.path for layer in describe_layers(network))]
    matrices: dict[str, Matrix] = {}
    for path in paths:
        scheme = parse_scheme("int8g64" if ".mlp." in path else "int4g32")
        matrices[path] = rtn.quantize(network.get_submodule(path).weight, None, scheme, rng, None)  # type: ignore[arg-type]
        network.get_submodule(path).weight.data = matrices[path].stored().dequantize()
    assert network.lm_head.weight is network.model.embed_tokens.weight
    facts = export(source, matrices, {}, tmp_path / "out", EXPORTERS["native"])
    bits = sum(one.bits() for one in matrices.values())
    rest = sum(tensor.numel() for tensor in network.parameters() if tensor.ndim == 1)
    assert facts.bytes == bits / 8 + 2 * len(matrices) + 2 * rest
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(0, 49152, (1, 24), generator=rng)
    with torch.no_grad():
        wanted, found = network(ids).logits, stock(ids).logits
    assert relative_rms(found, wanted) < 1e-4  # norms are rounded to float16


# -------------------------------------------------------------------------------------------------------------- experts

EXPERTS: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
}


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_matrices_of_their_own(family: str, every: bool, tmp_path: Path) -> None:
    """All of them, or some beside others in 16 bits."""
    source = resolve(str(tiny_models.save(family, tmp_path / "model", **{**tiny_models.SHAPE, **EXPERTS[family]})))
    layers = [layer for layer in describe_layers(load_skeleton(source)) if layer.kind == "expert"]
    chosen = layers if every else layers[::3]
    assert chosen and not any(layer.reason for layer in chosen)
    matrices = {
        layer.path: matrix("2x4g8" if number % 2 else "int4g32", layer.out_features, layer.in_features, number)
        for number, layer in enumerate(chosen)
    }
    packed = resolve(str(exported(source, matrices, tmp_path / "out")))
    dense = exported(source, matrices, tmp_path / "dense", "dense")
    wanted = logits(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32))
    ours = load_network(packed, torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(packed.directory, dtype=torch.float32)
    assert quantized_layers(ours).keys() == matrices.keys()
    assert relative_rms(logits(ours), wanted) < 1e-3
    assert relative_rms(logits(stock), logits(ours)) < 1e-5
    stock.save_pretrained(tmp_path / "again")
    again = load_network(resolve(str(tmp_path / "again")), torch.float32)
    assert torch.equal(logits(again), logits(ours))
