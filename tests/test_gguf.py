"""GGUF files as llama.cpp writes them: positions, parts, types, biases; what they become is what they say."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from gguf_files import F32, Q2_0, WITHOUT_ROPE_KEYS, llama3_factors, write_gguf, write_split
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from aqlm_cli import sources
from aqlm_cli.errors import ModelError
from aqlm_cli.model import load_network, load_tokenizer, model_config, resolve


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., sources.ModelSource]:
    return lambda name, **options: resolve(str(name), cache_dir=tmp_path / "cache", **options)


def save(directory: Path, family: str = "llama", **settings: Any) -> Path:
    """A tiny model whose weights are numbers of float16, so that nothing is rounded on the way."""
    tiny_models.save(family, directory, vocab_size=259, **settings)
    halved = {name: tensor.half().float() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(halved, directory / "model.safetensors", {"format": "pt"})
    return directory


def logits(network: Any, length: int = 200) -> Tensor:
    """Of positions in which every pair has turned, and the scaled ones too little or too far if they are not scaled."""
    found: Tensor = network(tiny_models.token_ids(1, length)).logits
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def errors_of(original: Path, source: sources.ModelSource, length: int = 200) -> float:
    """Of the converted model beside transformers' own forward of the original, in float32."""
    expected = logits(AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval(), length)
    return relative_error(logits(load_network(source, torch.float32), length), expected)


# ----------------------------------------------------------------------------------------------------------- positions

LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "scaling", [{}, {"factor": 32.0}, {"high_freq_factor": 2.0, "factor": 4.0}, {"low_freq_factor": 2.0}]
)
@pytest.mark.parametrize("length", [64, 8192])
@pytest.mark.parametrize("head", [16, 64, 128])
def test_rope_freqs_of_a_llama3_scaling_give_the_logits_of_the_original(
    head: int, length: int, scaling: dict[str, float], tmp_path: Path, find: Any
) -> None:
    said = {**LLAMA_3_1, **scaling, "original_max_position_embeddings": length}
    base = 500000.0
    original = save(
        tmp_path / "original", head_dim=head, rope_parameters={"rope_type": "llama3", "rope_theta": base, **said}
    )
    factors = {"rope_freqs.weight": llama3_factors(head // 2, base, said)}
    settings = {"rope.freq_base": base, "rope.dimension_count": head}
    write_gguf(original, tmp_path / "tiny.gguf", F32, settings=settings, **factors)
    source = find(tmp_path / "tiny.gguf")
    assert model_config(source)["rope_parameters"]["rope_type"] == "llama3"
    assert errors_of(original, source) < 1e-5
    plain = save(tmp_path / "plain", head_dim=head, rope_parameters={"rope_type": "default", "rope_theta": base})
    shutil.copy(original / "model.safetensors", plain)
    assert errors_of(plain, source) > 1e-4  # the bound above can fail


def test_the_scaling_of_llama_3_1_is_found_by_its_own_numbers(tmp_path: Path, find: Any) -> None:
    for factor in 8.0, 32.0:
        said = {**LLAMA_3_1, "factor": factor}
        parameters = {"rope_type": "llama3", "rope_theta": 500000.0, **said}
        original = save(tmp_path / f"original-{factor}", head_dim=128, rope_parameters=parameters)
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
    original = save(tmp_path / "original")
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
    original = save(tmp_path / "original")
    write_gguf(original, tmp_path / "tiny.gguf", F32, **{"rope_freqs.weight": factors})
    with pytest.raises(
        ModelError, match=r"no positions of llama in transformers are as rope_freqs\.weight says; use the"
    ):
        find(tmp_path / "tiny.gguf")


def longrope(directory: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A tiny Phi-3 for long texts, with three quarters of each head turned, as in Phi-4-mini."""
    short, long = [1.0 + 0.05 * i for i in range(6)], [1.0 + 2.0 * i for i in range(6)]
    said = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "original_max_position_embeddings": 64}
    parameters = {**said, "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    original = save(directory, "phi3", rope_parameters=parameters, original_max_position_embeddings=64)
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
    with pytest.raises(ModelError, match=r"rope_factors_long\.weight without the other one"):
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
def test_positions_in_the_settings_give_the_logits_of_the_original(
    family: str, parameters: dict[str, Any], settings: dict[str, Any], tmp_path: Path, find: Any
) -> None:
    """transformers' own conversion leaves all of these at their defaults, without a word."""
    given = {"rope_theta": 10000.0, **parameters}
    shape = dict(tiny_models.SHAPE) if family == "starcoder2" else {}
    original = save(tmp_path / "original", family, **{**shape, "rope_parameters": given})
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
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "as rope.scaling.type longrope says"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "as rope.scaling.type yarn says"),
        ({"rope.scaling.alpha": 2.0}, "has rope.scaling.alpha, which transformers does not know"),
        ({"rope.scaling.attn_factor": 2.0}, "as rope.scaling.type none says"),
        ({"rope.dimension_count": 8}, "has the shape"),
    ],
)
def test_positions_that_no_config_says_are_refused(
    settings: dict[str, Any], words: str, tmp_path: Path, find: Any
) -> None:
    original = save(tmp_path / "original")
    write_gguf(original, tmp_path / "tiny.gguf", F32, settings={**WITHOUT_ROPE_KEYS, **settings})
    with pytest.raises(ModelError, match=words):
        find(tmp_path / "tiny.gguf")


def test_layers_of_a_window_keep_a_base_of_their_own(tmp_path: Path, find: Any) -> None:
    parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    shape = {**tiny_models.FAMILIES["gemma3_text"], "num_hidden_layers": 6, "layer_types": None, "sliding_window": 16}
    original = save(tmp_path / "original", "gemma3_text", **{**shape, "rope_parameters": parameters})
    settings = {
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 5000.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "attention.key_length": 16,
        "attention.sliding_window": 16,
    }
    write_gguf(original, tmp_path / "tiny.gguf", F32, "gemma3", settings)
    source = find(tmp_path / "tiny.gguf")
    assert model_config(source)["rope_parameters"] == parameters


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("given", [0, 1, 2])
def test_a_split_file_is_read_whole_from_any_of_its_parts(given: int, tmp_path: Path, find: Any) -> None:
    original = save(tmp_path / "original", tie_word_embeddings=False)
    paths = write_split(original, tmp_path, count=3)
    source = find(paths[given])
    assert (source.short_name, model_config(source)["tie_word_embeddings"]) == ("tiny", False)
    assert errors_of(original, source) < 1e-5
    assert load_tokenizer(source).encode("hello") == tiny_models.byte_tokenizer().encode("hello")


def test_the_identity_of_a_split_file_is_of_all_its_parts(tmp_path: Path, find: Any) -> None:
    paths = write_split(save(tmp_path / "original"), tmp_path, count=3)
    identity = find(paths[0]).identity
    assert find(paths[2]).identity == identity
    changed = bytearray(paths[2].read_bytes())
    changed[-1] ^= 1
    paths[2].write_bytes(changed)
    assert find(paths[0]).identity != identity


def test_a_part_that_is_missing_is_named(tmp_path: Path, find: Any) -> None:
    paths = write_split(save(tmp_path / "original"), tmp_path, count=4)
    paths[1].unlink()
    with pytest.raises(ModelError, match=r"is one of 4 files, and .*tiny-00002-of-00004\.gguf is not there; fetch"):
        find(paths[0])
    paths[0].unlink()
    with pytest.raises(ModelError, match=r"tiny-00001-of-00004\.gguf is not there and 1 more"):
        find(paths[2])


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, find: Any) -> None:
    original = save(tmp_path / "original")
    first, second = write_split(original, tmp_path, count=2)
    shutil.copy(second, tmp_path / "alone.gguf")
    with pytest.raises(
        ModelError, match=r"alone\.gguf is part 2 of 2; give each part its name, here NAME-00002-of-00002"
    ):
        find(tmp_path / "alone.gguf")
    shutil.copy(second, tmp_path / "other-00001-of-00002.gguf")
    shutil.copy(first, tmp_path / "other-00002-of-00002.gguf")
    with pytest.raises(ModelError, match="says that it is part 2 of 2, and its name that it is 1 of 2"):
        find(tmp_path / "other-00001-of-00002.gguf")
    few = write_split(original, tmp_path, count=2, name="few", **{".split.tensors.count": 30})
    with pytest.raises(ModelError, match="says that its parts have 30 tensors, and they have 21"):
        find(few[0])
    twice = write_split(original, tmp_path, count=2, name="twice", **{".split.tensors.count": 42})
    split = {**WITHOUT_ROPE_KEYS, ".split.no": 0, ".split.count": 2, ".split.tensors.count": 42}
    write_gguf(original, twice[0], F32, settings=split)
    with pytest.raises(ModelError, match="a second time"):
        find(twice[1])


def test_a_damaged_part_is_named(tmp_path: Path, find: Any) -> None:
    paths = write_split(save(tmp_path / "original"), tmp_path, count=3)
    data = paths[2].read_bytes()
    for damaged, words in [(data[:300], "is no whole GGUF file"), (data[:-5000], r"needs \d+ bytes, and there are")]:
        paths[2].write_bytes(damaged)
        with pytest.raises(ModelError, match=rf"tiny-00003-of-00003\.gguf cannot be converted: .*{words}"):
            find(paths[0])


def test_a_file_that_is_named_as_a_part_and_is_whole_is_read(tmp_path: Path, find: Any) -> None:
    original = save(tmp_path / "original")
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
def test_blocks_of_one_and_of_two_bits_stand_for_what_llama_cpp_computes_of_them(
    code: int, size: int, bits: int, tmp_path: Path, find: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = save(tmp_path / "original", hidden_size=128, intermediate_size=256, head_dim=32)
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
    original, kind = save(tmp_path / "original", **shape), gguf.GGMLQuantizationType[name]
    size, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    types = {"I8": np.int8, "I32": np.int32}
    data = np.zeros((256, 256 // size * size_bytes), np.uint8) if name == "Q8_K" else np.zeros((256, 256), types[name])
    write_gguf(original, tmp_path / "tiny.gguf", F32, raw={"blk.1.ffn_up.weight": (data, kind.value)})
    with pytest.raises(
        ModelError, match=rf"blk\.1\.ffn_up\.weight is of the type {name}, which gguf .* cannot read; use"
    ):
        find(tmp_path / "tiny.gguf")


def test_a_type_of_the_future_is_refused_by_its_number(tmp_path: Path, find: Any) -> None:
    write_gguf(save(tmp_path / "original"), tmp_path / "tiny.gguf", F32)
    data, name = (tmp_path / "tiny.gguf").read_bytes(), b"blk.1.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    (tmp_path / "tiny.gguf").write_bytes(data[:at] + (77).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight is of the type number 77, which gguf .* cannot read"):
        find(tmp_path / "tiny.gguf")


def test_double_precision_is_read(tmp_path: Path, find: Any) -> None:
    original = save(tmp_path / "original")
    weight = load_file(original / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].double().numpy()
    write_gguf(original, tmp_path / "tiny.gguf", F32, raw={"blk.1.ffn_up.weight": (weight, 28)})
    assert errors_of(original, find(tmp_path / "tiny.gguf")) < 1e-5


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "BF16", "F16", "TQ1_0", "TQ2_0"])
def test_types_that_gguf_writes_are_read_as_it_dequantizes_them(name: str, tmp_path: Path, find: Any) -> None:
    kind = gguf.GGMLQuantizationType[name]
    original = save(tmp_path / "original", hidden_size=256, intermediate_size=256, head_dim=64)
    write_gguf(original, tmp_path / "tiny.gguf", kind)
    found = load_network(find(tmp_path / "tiny.gguf"), torch.float32).state_dict()["model.layers.0.mlp.up_proj.weight"]
    weight = load_file(original / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy()
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, kind), kind))
    dtype = torch.bfloat16 if name == "BF16" else torch.float16
    assert torch.equal(found, expected.to(dtype).float())


def test_a_big_endian_file_is_told_with_the_command_that_turns_it(tmp_path: Path, find: Any) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"is big-endian; run `gguf-convert-endian .*tiny\.gguf little`"):
        find(tmp_path / "tiny.gguf")


# -------------------------------------------------------------------------------------------------------------- biases


@pytest.mark.parametrize("switches", [["attention_bias"], ["mlp_bias"], ["attention_bias", "mlp_bias"]])
def test_biases_of_a_llama_are_read(switches: list[str], tmp_path: Path, find: Any) -> None:
    original = save(tmp_path / "original", **dict.fromkeys(switches, True))
    write_gguf(original, tmp_path / "tiny.gguf", F32)
    source = find(tmp_path / "tiny.gguf")
    assert {key for key in ("attention_bias", "mlp_bias") if model_config(source)[key]} == set(switches)
    assert errors_of(original, source) < 1e-5


def test_biases_of_q_k_and_v_alone_leave_the_output_without(tmp_path: Path, find: Any) -> None:
    original = save(tmp_path / "original", attention_bias=True)
    weights = load_file(original / "model.safetensors")
    without = {name: tensor * 0 if name.endswith("o_proj.bias") else tensor for name, tensor in weights.items()}
    save_file(without, original / "model.safetensors", {"format": "pt"})
    write_gguf(original, tmp_path / "tiny.gguf", F32, written=lambda name: not name.endswith("attn_output.bias"))
    assert errors_of(original, find(tmp_path / "tiny.gguf")) < 1e-5


@pytest.mark.parametrize("lost", [r"blk\.1\.attn_q\.bias", r"blk\.0\.attn_output\.bias", r"blk\.\d\.attn_k\.bias"])
def test_some_biases_and_not_others_are_refused(lost: str, tmp_path: Path, find: Any) -> None:
    original = save(tmp_path / "original", attention_bias=True)
    write_gguf(original, tmp_path / "tiny.gguf", F32, written=lambda name: not re.fullmatch(lost, name))
    with pytest.raises(ModelError, match=r"lacks model\.layers\.\d\.self_attn\.[qko]_proj\.bias"):
        find(tmp_path / "tiny.gguf")


def test_a_tensor_that_the_network_has_no_place_for_is_refused_by_name(tmp_path: Path, find: Any) -> None:
    original = save(tmp_path / "original")
    write_gguf(original, tmp_path / "tiny.gguf", F32, raw={"blk.0.attn_norm.bias": (np.zeros(64, np.float32), 0)})
    with pytest.raises(
        ModelError, match=r"holds blk\.0\.attn_norm\.bias, for which llama of transformers has no place; use"
    ):
        find(tmp_path / "tiny.gguf")


# ------------------------------------------------------------------------------------------------------- what is saved


def test_nothing_of_the_file_s_quantization_is_saved(tmp_path: Path, find: Any) -> None:
    original = save(tmp_path / "original")
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
    original = save(tmp_path / "original")
    write_gguf(
        original, tmp_path / "tiny.gguf", F32, settings={**WITHOUT_ROPE_KEYS, ".tokenizer.chat_template.rag": "R"}
    )
    default = tiny_models.byte_tokenizer().chat_template
    assert load_tokenizer(find(tmp_path / "tiny.gguf")).chat_template == {"default": default, "rag": "R"}
