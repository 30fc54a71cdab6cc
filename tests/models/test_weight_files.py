"""Weights as others store them: read, or refused in one line that says what they are and what to do."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import commands, tiny_models
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from aqlm_cli.errors import ModelError
from aqlm_cli.models import load_network, load_skeleton, resolve, tensor_index
from aqlm_cli.models import source as model_source


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., model_source.ModelSource]:
    return lambda name, **options: resolve(str(name), cache_dir=tmp_path / "cache", **options)


def sharded(directory: Path) -> list[Path]:
    """A tiny model in three shards or more, with its index."""
    whole = AutoModelForCausalLM.from_pretrained(tiny_models.save("llama", directory))
    (directory / "model.safetensors").unlink()
    whole.save_pretrained(directory, max_shard_size="100KB")
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 2
    return shards


def pickled(directory: Path, shards: int = 1) -> Path:
    """A tiny model with pickles in place of safetensors, as transformers 4 wrote them."""
    tiny_models.save("llama", directory)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if shards == 1:
        torch.save(weights, directory / "pytorch_model.bin")
        return directory
    files = {name: f"pytorch_model-{1 + at % shards:05d}-of-{shards:05d}.bin" for at, name in enumerate(weights)}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in weights if files[name] == file}, directory / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


def logits(network: Any) -> Tensor:
    found: Tensor = network(tiny_models.token_ids()).logits
    return found


def follow(message: str) -> Path:
    """Run the command that a message has between its backticks, as a shell would read it; the directory it wrote."""
    program, flag, code, *arguments = shlex.split(message.split("`")[1])
    assert (program, flag) == ("python", "-c")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["-c", *arguments])
        exec(code, {})
    return Path(arguments[-1])


# ------------------------------------------------------------------------------------------------ shards without index


@pytest.mark.parametrize("stem", ["model", "pytorch_model", "my-weights"])
def test_shards_without_an_index_give_the_network_of_those_with_one(stem: str, tmp_path: Path, find: Any) -> None:
    shards = sharded(tmp_path / "with")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "with").eval())
    shutil.copytree(tmp_path / "with", tmp_path / "without")
    (tmp_path / "without" / "model.safetensors.index.json").unlink()
    for path in shards:
        (tmp_path / "without" / path.name).rename(tmp_path / "without" / path.name.replace("model", stem, 1))
    before = sorted((tmp_path / "without").iterdir())
    source = find(tmp_path / "without")
    assert (source.name, source.short_name) == (str(tmp_path / "without"), "without")
    assert torch.equal(logits(load_network(source, torch.float32)), expected)
    assert tensor_index(source.directory).keys() == tensor_index(tmp_path / "with").keys()
    assert sorted((tmp_path / "without").iterdir()) == before
    again = find(tmp_path / "without")
    assert (again.directory, again.identity) == (source.directory, source.identity)


def test_a_change_in_shards_without_an_index_changes_the_identity(tmp_path: Path, find: Any) -> None:
    shards = sharded(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    first = find(tmp_path / "model").identity
    weights = load_file(shards[0])
    save_file({name: tensor + 1 for name, tensor in weights.items()}, shards[0], {"format": "pt"})
    assert find(tmp_path / "model").identity != first


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize(
    ("lost", "words"), [([1], r"model-00002-of-0000\d\.safetensors"), ([0, 2], "model-00001-.* and 1 more")]
)
def test_a_shard_that_is_missing_is_named_before_any_work(
    lost: list[int], words: str, with_index: bool, tmp_path: Path, find: Any
) -> None:
    shards = sharded(tmp_path / "model")
    for number in lost:
        shards[number].unlink()
    if not with_index:
        (tmp_path / "model" / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=f"lacks {words}.*fetch the model again"):
        find(tmp_path / "model")


def test_an_index_alone_is_refused_here_and_enough_for_a_plan_of_the_hub(
    tmp_path: Path, find: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sharded(tmp_path / "model"):
        path.unlink()
    with pytest.raises(ModelError, match=r"lacks model-00001-of-.*, which model\.safetensors\.index\.json names"):
        find(tmp_path / "model")
    monkeypatch.setattr(model_source, "snapshot_download", lambda *_, **__: str(tmp_path / "model"))
    assert load_skeleton(find("someone/Tiny", with_weights=False)).num_parameters() > 0


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}, {"metadata": []}])
def test_an_index_without_metadata_is_read_as_with_it(metadata: Any, tmp_path: Path, find: Any) -> None:
    shards = sharded(tmp_path / "model")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval())
    path = tmp_path / "model" / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"], **metadata}))
    before = path.read_bytes()
    assert torch.equal(logits(load_network(find(tmp_path / "model"), torch.float32)), expected)
    assert path.read_bytes() == before
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"lacks {shards[1].name}, which"):
        find(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "model-00001-of-99999999999.safetensors",
            "lacks model-00002-of-99999999999.safetensors and 99999999997 more;",
        ),
        (
            "model-00007-of-99999999999.safetensors",
            "lacks model-00001-of-99999999999.safetensors and 99999999997 more;",
        ),
    ],
)
def test_the_shards_that_a_name_counts_are_not_listed(name: str, words: str, tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(ModelError, match=words):
        find(directory)


def test_shards_that_hold_a_tensor_twice_are_refused(tmp_path: Path, find: Any) -> None:
    shards = sharded(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    shutil.copy(shards[0], shards[1])
    with pytest.raises(ModelError, match="both hold"):
        find(tmp_path / "model")


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path: Path, find: Any) -> None:
    """As where a model was saved anew over its shards."""
    sharded(tmp_path / "model")
    other = AutoModelForCausalLM.from_pretrained(tiny_models.save("llama", tmp_path / "other", initializer_range=0.2))
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "model")
    source = find(tmp_path / "model")
    assert {stored.file.name for stored in tensor_index(source.directory).values()} == {"model.safetensors"}
    assert torch.equal(logits(load_network(source, torch.float32)), logits(other.eval()))


# -------------------------------------------------------------------------------------------------- weights as pickles


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_are_refused_with_a_command_that_makes_a_model_of_them(
    shards: int, tmp_path: Path, find: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = pickled(tmp_path / "it's $HOME", shards)
    with pytest.raises(ModelError, match="only weights in safetensors are read") as told:
        find(directory)
    assert "\n" not in str(told.value)
    made = follow(str(told.value))
    assert made == tmp_path / "it's $HOME-safetensors"
    expected = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=False).eval()
    assert torch.equal(logits(load_network(find(made), torch.float32)), logits(expected))
    first, second = (AutoTokenizer.from_pretrained(place).encode("hello") for place in (made, directory))
    assert first == second


def test_pickles_on_the_hub_are_refused_with_their_hub_id(tmp_path: Path, find: Any, monkeypatch: Any) -> None:
    (pickled(tmp_path / "model") / "pytorch_model.bin").unlink()
    monkeypatch.setattr(model_source, "snapshot_download", lambda *_, **__: str(tmp_path / "model"))
    monkeypatch.setattr(model_source, "list_repo_files", lambda *_, **__: ["config.json", "pytorch_model.bin"])
    with pytest.raises(ModelError, match=r"someone/Tiny has pickles; .* someone/Tiny Tiny-safetensors`"):
        find("someone/Tiny")
    monkeypatch.setattr(model_source, "list_repo_files", lambda *_, **__: ["config.json", "Tiny.Q4_0.gguf"])
    with pytest.raises(ModelError, match=r"holds GGUF files; run `hf download someone/Tiny Tiny\.Q4_0\.gguf"):
        find("someone/Tiny")


def test_an_adapter_is_refused_with_a_command_that_merges_it(tmp_path: Path, find: Any) -> None:
    base = tiny_models.save("llama", tmp_path / "base")
    network = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    network.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"holds a PEFT adapter \(adapter_config\.json\)") as told:
        find(tmp_path / "adapter")
    made = load_network(find(follow(str(told.value))), torch.float32)
    torch.testing.assert_close(logits(made), logits(network.eval()))
    assert not torch.allclose(logits(made), logits(AutoModelForCausalLM.from_pretrained(base).eval()))
    shutil.copytree(base, tmp_path / "adapter", dirs_exist_ok=True)  # transformers would load the base that it names
    with pytest.raises(ModelError, match="PEFT adapter"):
        find(tmp_path / "adapter")


# ----------------------------------------------------------------------------------------------- one line for the rest


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["Tiny.Q4_0.gguf"], r"name the file: .*/model/Tiny\.Q4_0\.gguf$"),
        (["A.gguf", "B.gguf"], r"name the file: .*/A\.gguf \(or another of its 2 files\)$"),
        (["A-00002-of-00002.gguf", "A-00001-of-00002.gguf"], r"name the file: .*/A-00001-of-00002\.gguf$"),
        (["consolidated.safetensors", "params.json"], r"its publisher's own format \(consolidated\.safetensors\)"),
        (["consolidated.00.pth", "consolidated.01.pth"], r"own format \(consolidated\.00\.pth and 1 more\)"),
    ],
)
def test_files_of_other_programs_are_refused_by_name(
    files: list[str], words: str, config: bool, tmp_path: Path, find: Any
) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    (directory / "model.safetensors").unlink()
    if not config:
        (directory / "config.json").unlink()
    for name in files:
        (directory / name).write_bytes(b"")
    with pytest.raises(ModelError, match=words):
        find(directory)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["tf_model.h5"], r"only TensorFlow weights \(tf_model\.h5\)"),
        (["flax_model.msgpack"], r"only Flax weights"),
        (["weights.safetensors"], r"has weights\.safetensors and no model\.safetensors, .* rename or convert it"),
        (["model.pth"], r"has model\.pth and no model\.safetensors"),
        (["model-00001-of-00001.safetensors", "b-00001-of-00002.safetensors"], "has shards of 2 sets"),
        (["training_args.bin", "weights.pt"], r"has weights\.pt and no"),
    ],
)
def test_weights_that_transformers_does_not_read_are_one_line(files: list[str], words: str, tmp_path: Path) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    (directory / "model.safetensors").unlink()
    for name in files:
        (directory / name).write_bytes(b"")
    assert re.search(words, commands.refused("plan", str(directory)))
    with pytest.raises(ModelError, match=words):
        resolve(str(directory), cache_dir=tmp_path / "cache")


# ---------------------------------------------------------------------------------------------- tensors that do not fit


def change(directory: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = directory / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})


@pytest.mark.parametrize(
    ("family", "name", "words"),
    [
        (
            "llama",
            "model.layers.0.mlp.down_proj.weight",
            "of the shape [32, 128], and its config.json asks for [64, 128]",
        ),
        ("bloom", "h.0.input_layernorm.weight", "of the shape [32], and its config.json asks for [64]"),
    ],
)
def test_a_tensor_of_another_shape_is_named_before_any_work(family: str, name: str, words: str, tmp_path: Path) -> None:
    directory = tiny_models.save(
        family, tmp_path / "model", hidden_size=64, **({"n_layer": 2, "n_head": 4} if family == "bloom" else {})
    )
    if family == "bloom":  # as its files on the hub have them
        change(directory, lambda all: {key.removeprefix("transformer."): tensor for key, tensor in all.items()})
    change(directory, lambda all: {**all, name: all[name][:32].contiguous()})
    line = f"error: {directory} has {name} {words}; fetch the model again\n"
    for flags in [], ["--format", "dense"]:
        assert commands.refused("plan", str(directory), *flags) == line
    with pytest.raises(ModelError, match=re.escape(words)):
        load_network(resolve(str(directory), cache_dir=tmp_path / "cache"), torch.float32)


def test_missing_blocks_are_refused_by_the_plan(tmp_path: Path) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    line = "lacks the tensor model.layers.2.input_layernorm.weight and 8 more, which its config.json asks for; fetch"
    assert line in commands.refused("plan", str(directory))


def test_a_file_without_tensors_is_refused_by_the_plan(tmp_path: Path) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    change(directory, lambda _: {})
    assert re.search(r"lacks the tensor lm_head\.weight and 20 more, which", commands.refused("plan", str(directory)))


def test_a_missing_expert_is_refused_by_the_plan(tmp_path: Path) -> None:
    directory = tiny_models.save("mixtral", tmp_path / "model")
    gone = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    change(directory, lambda all: {key: tensor for key, tensor in all.items() if key != gone})
    line = commands.refused("plan", str(directory))
    assert "has model.layers.1.mlp.experts.down_proj (made of " in line
    assert "of the shape [3, 64, 128], and its config.json asks for [4, 64, 128]; fetch" in line
