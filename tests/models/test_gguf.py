"""GGUF files as llama.cpp writes them: parts, types, biases; what they become is what they say."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers import commands, tiny_models
from helpers.gguf_files import (
    F32,
    Q2_0,
    WITHOUT_ROPE_KEYS,
    errors_of,
    logits,
    save_halved,
    write_gguf,
    write_split,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from aqlm_cli.errors import ModelError
from aqlm_cli.models import load_network, load_tokenizer, model_config, resolve
from aqlm_cli.models import source as model_source


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., model_source.ModelSource]:
    return lambda name, **options: resolve(str(name), cache_dir=tmp_path / "cache", **options)


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("given", [0, 1, 2])
def test_a_split_file_is_read_whole_from_any_of_its_parts(given: int, tmp_path: Path, find: Any) -> None:
    original = save_halved(tmp_path / "original", tie_word_embeddings=False)
    paths = write_split(original, tmp_path, count=3)
    source = find(paths[given])
    assert (source.short_name, model_config(source)["tie_word_embeddings"]) == ("tiny", False)
    assert errors_of(original, source) < 1e-5
    assert load_tokenizer(source).encode("hello") == tiny_models.byte_tokenizer().encode("hello")


def test_the_identity_of_a_split_file_is_of_all_its_parts(tmp_path: Path, find: Any) -> None:
    paths = write_split(save_halved(tmp_path / "original"), tmp_path, count=3)
    identity = find(paths[0]).identity
    assert find(paths[2]).identity == identity
    changed = bytearray(paths[2].read_bytes())
    changed[-1] ^= 1
    paths[2].write_bytes(changed)
    assert find(paths[0]).identity != identity


def test_a_part_that_is_missing_is_named(tmp_path: Path, find: Any) -> None:
    paths = write_split(save_halved(tmp_path / "original"), tmp_path, count=4)
    paths[1].unlink()
    with pytest.raises(ModelError, match=r"is one of 4 files; .*tiny-00002-of-00004\.gguf is missing: fetch"):
        find(paths[0])
    paths[0].unlink()
    with pytest.raises(ModelError, match=r"tiny-00001-of-00004\.gguf is missing and 1 more"):
        find(paths[2])


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, find: Any) -> None:
    original = save_halved(tmp_path / "original")
    first, second = write_split(original, tmp_path, count=2)
    shutil.copy(second, tmp_path / "alone.gguf")
    with pytest.raises(
        ModelError, match=r"alone\.gguf is part 2 of 2; give each part its name, here NAME-00002-of-00002"
    ):
        find(tmp_path / "alone.gguf")
    shutil.copy(second, tmp_path / "other-00001-of-00002.gguf")
    shutil.copy(first, tmp_path / "other-00002-of-00002.gguf")
    with pytest.raises(ModelError, match="is part 2 of 2, but its name says 1 of 2"):
        find(tmp_path / "other-00001-of-00002.gguf")
    few = write_split(original, tmp_path, count=2, name="few", **{".split.tensors.count": 30})
    with pytest.raises(ModelError, match="states 30 tensors for its parts, but they have 21"):
        find(few[0])
    twice = write_split(original, tmp_path, count=2, name="twice", **{".split.tensors.count": 42})
    split = {**WITHOUT_ROPE_KEYS, ".split.no": 0, ".split.count": 2, ".split.tensors.count": 42}
    write_gguf(original, twice[0], F32, settings=split)
    with pytest.raises(ModelError, match="a second time"):
        find(twice[1])


def test_a_damaged_part_is_named(tmp_path: Path, find: Any) -> None:
    paths = write_split(save_halved(tmp_path / "original"), tmp_path, count=3)
    data = paths[2].read_bytes()
    for damaged, words in [(data[:300], "not a complete GGUF file"), (data[:-5000], r"needs \d+ bytes, the file has")]:
        paths[2].write_bytes(damaged)
        with pytest.raises(ModelError, match=rf"tiny-00003-of-00003\.gguf cannot be converted: .*{words}"):
            find(paths[0])


@pytest.mark.parametrize("string", [b"llama.rope.freq_base", b"tokenizer.ggml.model", b"<bos>"])
def test_a_damaged_string_names_the_file_and_not_one_in_the_cache(string: bytes, tmp_path: Path, find: Any) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(save_halved(tmp_path / "original"), path, F32)
    assert string in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(string, b"\xff" + string[1:], 1))
    with pytest.raises(ModelError) as told:
        find(path)
    reason = "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
    assert str(told.value) == f"the settings of {path} are damaged ({reason}); fetch it again"


def test_a_file_that_is_named_as_a_part_and_is_whole_is_read(tmp_path: Path, find: Any) -> None:
    original = save_halved(tmp_path / "original")
    write_gguf(original, tmp_path / "tiny-00001-of-00001.gguf", F32)
    assert errors_of(original, find(tmp_path / "tiny-00001-of-00001.gguf")) < 1e-5


# --------------------------------------------------------------------------------------------------------------- types


def with_type_q2_0(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Teach gguf's writer this type; readers do not see it."""
    kind = int.__new__(gguf.GGMLQuantizationType, Q2_0)
    kind._name_, kind._value_ = "Q2_0", Q2_0
    monkeypatch.setitem(gguf.GGMLQuantizationType._value2member_map_, Q2_0, kind)
    monkeypatch.setitem(gguf.GGML_QUANT_SIZES, kind, (size, 2 + size // 4))


@pytest.mark.parametrize(("code", "size", "bits"), [(41, 128, 1), (Q2_0, 64, 2), (Q2_0, 128, 2)])
def test_blocks_of_one_and_two_bits_dequantize_as_in_llama_cpp(
    code: int, size: int, bits: int, tmp_path: Path, find: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = save_halved(tmp_path / "original", hidden_size=128, intermediate_size=256, head_dim=32)
    chance, name, rows, columns = np.random.default_rng(0), "blk.0.ffn_down.weight", 128, 256
    blocks, expected = [], []
    for _ in range(rows * columns // size):
        scale, codes = np.float16(chance.normal()), chance.integers(0, 2**bits, size)
        packed = [
            sum(int(c) << (bits * i) for i, c in enumerate(codes[at : at + 8 // bits]))
            for at in range(0, size, 8 // bits)
        ]
        blocks += [*scale.tobytes(), *packed]
        expected += [float(scale) * (2 * c - 1 if bits == 1 else c - 1) for c in codes.tolist()]
    data = np.array(blocks, np.uint8).reshape(rows, -1)
    with monkeypatch.context() as patch:
        if code == Q2_0:
            with_type_q2_0(patch, size)
        write_gguf(original, tmp_path / "tiny.gguf", F32, raw={name: (data, code)})
    network = load_network(find(tmp_path / "tiny.gguf"), torch.float32)
    found = network.state_dict()["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(found, torch.tensor(expected).half().float().reshape(rows, columns))


@pytest.mark.parametrize("name", ["Q8_K", "I8", "I32"])
def test_a_type_that_cannot_be_read_is_refused_with_its_tensor(name: str, tmp_path: Path, find: Any) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    original, kind = save_halved(tmp_path / "original", **shape), gguf.GGMLQuantizationType[name]
    size, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    types = {"I8": np.int8, "I32": np.int32}
    data = np.zeros((256, 256 // size * size_bytes), np.uint8) if name == "Q8_K" else np.zeros((256, 256), types[name])
    write_gguf(original, tmp_path / "tiny.gguf", F32, raw={"blk.1.ffn_up.weight": (data, kind.value)})
    with pytest.raises(
        ModelError, match=rf"blk\.1\.ffn_up\.weight is of the type {name}, which gguf .* cannot read; use"
    ):
        find(tmp_path / "tiny.gguf")


def test_a_type_of_the_future_is_refused_by_its_number(tmp_path: Path, find: Any) -> None:
    write_gguf(save_halved(tmp_path / "original"), tmp_path / "tiny.gguf", F32)
    data, name = (tmp_path / "tiny.gguf").read_bytes(), b"blk.1.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    (tmp_path / "tiny.gguf").write_bytes(data[:at] + (77).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight is of the type number 77, which gguf .* cannot read"):
        find(tmp_path / "tiny.gguf")


def test_double_precision_is_read(tmp_path: Path, find: Any) -> None:
    original = save_halved(tmp_path / "original")
    weight = load_file(original / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].double().numpy()
    write_gguf(original, tmp_path / "tiny.gguf", F32, raw={"blk.1.ffn_up.weight": (weight, 28)})
    assert errors_of(original, find(tmp_path / "tiny.gguf")) < 1e-5


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "BF16", "F16", "TQ1_0", "TQ2_0"])
def test_types_that_gguf_writes_are_read_as_it_dequantizes_them(name: str, tmp_path: Path, find: Any) -> None:
    kind = gguf.GGMLQuantizationType[name]
    original = save_halved(tmp_path / "original", hidden_size=256, intermediate_size=256, head_dim=64)
    write_gguf(original, tmp_path / "tiny.gguf", kind)
    found = load_network(find(tmp_path / "tiny.gguf"), torch.float32).state_dict()["model.layers.0.mlp.up_proj.weight"]
    weight = load_file(original / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy()
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, kind), kind))
    dtype = torch.bfloat16 if name == "BF16" else torch.float16
    assert torch.equal(found, expected.to(dtype).float())


def test_a_big_endian_file_is_refused_with_the_command_that_converts_it(tmp_path: Path, find: Any) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"is big-endian; run `gguf-convert-endian .*tiny\.gguf little`"):
        find(tmp_path / "tiny.gguf")


# -------------------------------------------------------------------------------------------------------------- biases


@pytest.mark.parametrize("switches", [["attention_bias"], ["mlp_bias"], ["attention_bias", "mlp_bias"]])
def test_biases_of_a_llama_are_read(switches: list[str], tmp_path: Path, find: Any) -> None:
    original = save_halved(tmp_path / "original", **dict.fromkeys(switches, True))
    write_gguf(original, tmp_path / "tiny.gguf", F32)
    source = find(tmp_path / "tiny.gguf")
    assert {key for key in ("attention_bias", "mlp_bias") if model_config(source)[key]} == set(switches)
    assert errors_of(original, source) < 1e-5


def test_biases_of_q_k_and_v_alone_leave_the_output_without(tmp_path: Path, find: Any) -> None:
    original = save_halved(tmp_path / "original", attention_bias=True)
    weights = load_file(original / "model.safetensors")
    without = {name: tensor * 0 if name.endswith("o_proj.bias") else tensor for name, tensor in weights.items()}
    save_file(without, original / "model.safetensors", {"format": "pt"})
    write_gguf(original, tmp_path / "tiny.gguf", F32, written=lambda name: not name.endswith("attn_output.bias"))
    assert errors_of(original, find(tmp_path / "tiny.gguf")) < 1e-5


@pytest.mark.parametrize("lost", [r"blk\.1\.attn_q\.bias", r"blk\.0\.attn_output\.bias", r"blk\.\d\.attn_k\.bias"])
def test_some_biases_and_not_others_are_refused(lost: str, tmp_path: Path, find: Any) -> None:
    original = save_halved(tmp_path / "original", attention_bias=True)
    write_gguf(original, tmp_path / "tiny.gguf", F32, written=lambda name: not re.fullmatch(lost, name))
    with pytest.raises(ModelError, match=r"lacks model\.layers\.\d\.self_attn\.[qko]_proj\.bias"):
        find(tmp_path / "tiny.gguf")


def test_a_tensor_that_the_network_has_no_place_for_is_refused_by_name(tmp_path: Path, find: Any) -> None:
    original = save_halved(tmp_path / "original")
    write_gguf(original, tmp_path / "tiny.gguf", F32, raw={"blk.0.attn_norm.bias": (np.zeros(64, np.float32), 0)})
    with pytest.raises(
        ModelError, match=r"holds blk\.0\.attn_norm\.bias, which llama in transformers does not use; use"
    ):
        find(tmp_path / "tiny.gguf")


# ------------------------------------------------------------------------------------------------------- what is saved


def test_no_quantization_setting_of_the_file_is_saved(tmp_path: Path, find: Any) -> None:
    original = save_halved(tmp_path / "original")
    write_gguf(original, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0)
    source = find(tmp_path / "tiny.gguf")
    network = AutoModelForCausalLM.from_pretrained(source.directory).eval()
    assert not getattr(network, "is_quantized", False) and not hasattr(network, "hf_quantizer")
    network.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again), logits(network))
    for directory in source.directory, tmp_path / "again":
        assert "quantization_config" not in (directory / "config.json").read_text()
        assert {tensor.dtype for tensor in load_file(directory / "model.safetensors").values()} == {torch.float16}


def test_named_chat_templates_of_a_file_are_kept(tmp_path: Path, find: Any) -> None:
    original = save_halved(tmp_path / "original")
    write_gguf(
        original, tmp_path / "tiny.gguf", F32, settings={**WITHOUT_ROPE_KEYS, ".tokenizer.chat_template.rag": "R"}
    )
    default = tiny_models.byte_tokenizer().chat_template
    assert load_tokenizer(find(tmp_path / "tiny.gguf")).chat_template == {"default": default, "rag": "R"}


def test_packed_of_a_run_from_a_gguf_is_an_ordinary_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, find: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    run_file = commands.save_run_file(tmp_path)
    original = save_halved(tmp_path / "original")
    write_gguf(original, tmp_path / "tiny.gguf", F32, **{"rope_freqs.weight": torch.tensor([1.0] * 4 + [8.0] * 4)})
    run_file.write_text(run_file.read_text().replace("model: tiny", "model: tiny.gguf\npack: {format: dense}"))
    for command in (
        ["quantize", "--config", str(run_file), "--out", "made", "--method", "rtn", "--scheme", "int4g32"],
        ["pack", "made"],
    ):
        done = commands.run(*command)
        assert done.exit_code == 0, done.output
    packed = tmp_path / "made" / "packed"
    assert "quantization_config" not in (packed / "config.json").read_text()
    parameters = model_config(find(tmp_path / "tiny.gguf"))["rope_parameters"]
    assert parameters["rope_type"] == "llama3" and model_config(find(packed))["rope_parameters"] == parameters
    network = AutoModelForCausalLM.from_pretrained(packed).eval()
    network.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again), logits(network))
