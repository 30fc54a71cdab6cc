from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny_models
from helpers.commands import FINETUNE, add_settings, made, refused, run
from helpers.packing import logits, relative_rms, stock_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import Result

from aqlm_cli.models import base_model_of, load_network, resolve
from aqlm_cli.models.blocks import find_blocks
from aqlm_cli.pipeline.stages import import_checkpoint as stage
from aqlm_cli.quantization.block_files import restore_block
from aqlm_cli.runs.directory import read_run

NORM = "model.layers.0.input_layernorm.weight"
LAYER = "model.layers.0.self_attn.q_proj"
SHORT = ("--threads", "1", "--steps", "6", "--batch", "2", "--sequence-length", "16", "--data", "builtin:40")


@pytest.fixture
def quantized(finished_run: Path) -> Path:
    """A run of ours, with settings for finetuning."""
    add_settings(finished_run, FINETUNE)
    return finished_run


@pytest.fixture
def stranger(run_file: Path) -> Path:
    """A checkpoint of `tiny` by other hands, in the published format: signed bytes for codes, and a norm of its own."""
    return by_hand(Path("tiny"), Path("stranger"))


def by_hand(original: Path, directory: Path) -> Path:
    tiny_models.save_additive(original, directory)
    edit(directory, lambda tensors: tensors.update({NORM: 1.5 * tensors[NORM]} if NORM in tensors else {}))
    return directory


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def finetuned(*arguments: str) -> dict[str, Any]:
    result = run("finetune", *arguments, "--json")
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def numbers(directory: Path) -> dict[str, torch.Tensor]:
    """Of all blocks of an artifact, or of a checkpoint."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def artifacts(directory: str) -> dict[str, Any]:
    """With the settings, and without reports of times."""
    return {name: content for name, content in made(directory).items() if not name.startswith("reports/")}


def same(there: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return there.keys() == wanted.keys() and all(
        there[name].dtype == tensor.dtype and torch.equal(there[name], tensor) for name, tensor in wanted.items()
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt_neox", "opt", "mixtral"])
def test_the_imported_model_computes_and_packs_what_the_checkpoint_holds(family: str, run_file: Path) -> None:
    """In a model that has 16 bits itself, or the embeddings would be rounded."""
    original = tiny_models.save(family, Path("original"))
    AutoModelForCausalLM.from_pretrained(original, dtype=torch.float16).save_pretrained(original)
    stranger = by_hand(original, Path("stranger"))
    Path("imported.yaml").write_text("{model: original, quantize: {import_from: stranger}}")
    assert run("quantize", "--config", "imported.yaml", "--out", "new").exit_code == 0
    imported = read_run(Path("new"))
    network, quantized = (
        load_network(base_model_of(imported.config).source, torch.float32),
        imported.current("quantized"),
    )
    blocks = find_blocks(network)
    for index, (prefix, block) in enumerate(zip(blocks.paths, blocks.modules, strict=True)):
        restore_block(quantized, index, prefix, block)
    wanted = logits(load_network(resolve("stranger"), torch.float32))
    assert torch.equal(logits(network), wanted)
    assert torch.equal(logits(load_network(resolve("new"), torch.float32)), wanted)
    packed, coded = numbers(Path("new/packed")), ("codes", "codebooks", "scales")
    assert same(*({name: each[name] for name in each if name.endswith(coded)} for each in (packed, numbers(stranger))))


@pytest.mark.slow
def test_a_foreign_checkpoint_is_finetuned_and_stock_transformers_loads_it(stranger: Path, tmp_path: Path) -> None:
    told = finetuned("stranger", "--teacher", "tiny", *SHORT)
    assert told["finetune"]["after"] < told["finetune"]["before"]
    made_there = Path("runs/stranger-finetuned")
    assert told["finetune"]["directory"] == str(made_there / "finetuned")
    there, start = numbers(made_there / "packed"), numbers(stranger)
    assert all(torch.equal(there[name], start[name]) == name.endswith("codes") for name in start if "layers" in name)
    ours = logits(load_network(resolve(str(made_there)), torch.float32))
    assert relative_rms(stock_logits([made_there / "packed"], tmp_path)[0], ours) < 1e-3
    assert not (made_there / "calibration").exists(), "other text was given"
    assert "calibration text | not known" in (made_there / "packed/README.md").read_text()


@pytest.mark.parametrize("skip", [(), ("--skip", r"model\.layers\.0\..*"), ("--skip", ".*1.mlp.*")])
def test_our_checkpoint_without_our_marks_is_imported_number_by_number(skip: Sequence[str], quantized: Path) -> None:
    """Also where a block, or a part of one, has no codes."""
    assert run("quantize", "--config", "run.yaml", *skip, "--out", "run", "--overwrite").exit_code == 0
    shutil.copytree(quantized / "packed", "bare", ignore=shutil.ignore_patterns("manifest.json", "README.md"))
    edit_config(Path("bare"), lambda config: config.pop("aqlm_cli"))
    assert "warning" not in run("finetune", "bare", "--teacher", "tiny", "--out", "new", *SHORT).output
    assert same(numbers(Path("new/quantized")), numbers(quantized / "quantized"))
    assert yaml.safe_load(Path("new/run.yaml").read_text())["quantize"]["scheme"] == "2x4g8"


def test_what_has_learnt_outside_the_blocks_is_imported_and_kept(stranger: Path) -> None:
    """The last norm and the embeddings: those of a checkpoint, and then those that finetune does not train."""

    def learnt(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"].mul_(1.25)
        tensors["model.embed_tokens.weight"][3, 5] += 0.5

    edit(stranger, learnt)
    told = finetuned("stranger", "--teacher", "tiny", "--out", "new", *SHORT)
    assert told["finetune"]["after"] < told["finetune"]["before"]
    there, start = load_file("new/quantized/outside.safetensors"), numbers(stranger)
    assert set(there) == {"model.norm.weight", "model.embed_tokens.weight"}
    assert all(torch.equal(there[name], start[name].float()) for name in there)
    packed = numbers(Path("new/packed"))
    assert torch.equal(packed["model.embed_tokens.weight"], start["model.embed_tokens.weight"].half())
    assert not torch.equal(packed["model.norm.weight"], start["model.norm.weight"].half()), "it has learnt on"


def test_a_run_begins_where_another_ended(quantized: Path) -> None:
    ended = finetuned("run")["finetune"]["after"]
    begun = finetuned("run", "--out", "new")["finetune"]
    assert same(numbers(Path("new/quantized")), numbers(quantized / "finetuned"))
    assert begun["before"] == ended > begun["after"]
    assert made("new/calibration") == made("run/calibration")
    again = finetuned("new", "--out", "newest")["finetune"]
    assert again["before"] == begun["after"]


def test_a_run_that_is_not_packed_yet_is_packed_first(quantized: Path) -> None:
    shutil.rmtree(quantized / "packed")
    result = run("finetune", "run", "--out", "new")
    assert result.exit_code == 0 and "run is not packed yet; this runs first" in result.output


def test_a_run_that_is_packed_as_ordinary_weights_says_how_to_pack_it(quantized: Path) -> None:
    run("pack", "run", "--format", "dense", "--overwrite")
    assert "`aqlm pack RUN --format transformers --overwrite`" in refused("finetune", "run", "--out", "new")
    run("pack", "run", "--format", "transformers", "--overwrite")
    assert run("finetune", "run", "--out", "new").exit_code == 0


def test_it_is_done_once_and_what_differs_is_refused_by_name(stranger: Path) -> None:
    command = ("finetune", "stranger", "--teacher", "tiny", "--out", "new", *SHORT)
    run(*command)
    first = artifacts("new")
    assert run(*command).output.count("exists already") == 3
    assert "exists already" in run("finetune", "new").output, "the run knows what it began with"
    assert artifacts("new") == first
    shutil.copytree("tiny", "other")
    assert "model: tiny there, other here" in refused("finetune", "stranger", "--teacher", "other", "--out", "new")
    assert "steps 6 there, 7 asked" in refused(*command, "--steps", "7")
    shutil.copytree("stranger", "elsewhere")
    line = refused("finetune", "elsewhere", "--teacher", "tiny", "--out", "new")
    assert "quantize.import_from: stranger there, elsewhere here" in line
    edit(stranger, lambda tensors: tensors[NORM].mul_(1.5))
    assert "made from.checkpoint sha256:" in refused(*command)
    assert artifacts("new") == first
    assert run(*command, "--overwrite").exit_code == 0
    assert artifacts("new") != first


def test_interrupted_while_it_is_imported_it_begins_with_the_same_codes(
    stranger: Path, interrupted_at: Callable[..., Result]
) -> None:
    finetuned("stranger", "--teacher", "tiny", "--out", "whole", *SHORT)
    command = ("finetune", "stranger", "--teacher", "tiny", "--out", "new", *SHORT)
    assert interrupted_at("block-001", 1, *command).exit_code == 130
    stages = json.loads(run("status", "new", "--json").stdout)["stages"]
    assert {one["stage"]: one["state"] for one in stages}["quantize"].startswith("interrupted")
    assert run("finetune", "new").exit_code == 0
    assert same(numbers(Path("new/finetuned")), numbers(Path("whole/finetuned")))


def test_other_commands_know_where_the_codes_come_from(stranger: Path) -> None:
    finetuned("stranger", "--teacher", "tiny", "--out", "new", *SHORT)
    told = json.loads(run("status", "new", "--json").stdout)
    assert [(one["stage"], one["state"]) for one in told["stages"]] == [
        (stage, "finished") for stage in ("quantize", "finetune", "pack")
    ]
    assert told["scheme"] == "2x8g8"
    assert "the codes were imported from stranger" in run("verify", "new").output
    assert run("eval-ppl", "new", "--data", "notes.txt", "--sequence-length", "32").exit_code == 0
    assert "the codes are imported from stranger" in refused("plan", "--config", "new/run.yaml")
    path = Path("new/quantized/block-000.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    line = refused("verify", "new")
    rebuild_command = "quantize --config new/run.yaml --out new --overwrite"
    assert rebuild_command in line and run(*rebuild_command.split()).exit_code == 0
    assert run("verify", "new").exit_code == 0


def test_without_other_text_calibration_comes_first(stranger: Path) -> None:
    begun = ("--teacher", "tiny", "--out", "new")
    assert run("finetune", "stranger", *begun, *SHORT).exit_code == 0
    path = Path("new/run.yaml")
    settings = yaml.safe_load(path.read_text())
    settings["calibrate"].update(data="builtin:8", sequence_length=64, statistics_sequences=2)
    settings["finetune"].update(data=None)
    path.write_text(yaml.safe_dump(settings))
    result = run("finetune", "new", "--overwrite")
    assert result.exit_code == 0 and "calibration runs first" in result.output, result.output
    run("calibrate", "--config", "new/run.yaml", "--seed", "1", "--out", "new", "--overwrite")
    assert "was made from calibration" in refused("pack", "new"), "what was learnt from is a parent"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_original", [torch.float16, torch.bfloat16, torch.float32])
def test_what_stays_is_compared_in_16_bits(dtype: torch.dtype, of_original: torch.dtype) -> None:
    """Whatever types the two are stored in; and the smallest change in one number is seen."""
    original = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(of_original)
    there = original.to(dtype, copy=True)
    assert stage._same(there.float(), original.float())
    if dtype == torch.float32:
        there.view(torch.int32)[7] += 2**13  # the last bit of float16
    else:
        there.view(torch.int16)[7] += 1
    assert not stage._same(there.float(), original.float())


def without_codes(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("codes", "codebooks", "scales"):
        del tensors[f"{LAYER}.{name}"]
    tensors[f"{LAYER}.weight"] = torch.ones(64, 64).half()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an embedding": (
        lambda path: edit(path, lambda tensors: tensors["model.embed_tokens.weight"].mul_(2)),
        "model.embed_tokens.weight differs from that of tiny",
    ),
    "the last norm": (
        lambda path: edit(path, lambda tensors: tensors["model.norm.weight"].neg_()),
        "model.norm.weight differs from that of tiny",
    ),
    "the head": (
        lambda path: edit(path, lambda tensors: tensors["lm_head.weight"].neg_()),
        "lm_head.weight differs from that of tiny",
    ),
    "a head with codes": (
        lambda path: edit(path, lambda tensors: tensors.update({"lm_head.codes": tensors[f"{LAYER}.codes"].clone()})),
        "codes for lm_head; only codes of linear layers in the blocks",
    ),
    "a layer without codes": (
        lambda path: edit(path, without_codes),
        f"{LAYER}.weight differs from that of tiny",
    ),
    "rotary embeddings": (
        lambda path: edit_config(path, lambda config: config["rope_parameters"].update(rope_theta=1e6)),
        "inv_freq differs from that of tiny",
    ),
    "two schemes": (
        lambda path: edit(path, lambda tensors: tensors.update({
            f"{LAYER}.codes": tensors[f"{LAYER}.codes"][..., :1].contiguous(),
            f"{LAYER}.codebooks": tensors[f"{LAYER}.codebooks"][:1].clone(),
        })),
        "2 schemes (1x8g8, 2x8g8)",
    ),
    "codes of another shape": (
        lambda path: edit(path, lambda tensors: tensors[f"{LAYER}.codes"].resize_(32, 8, 2)),
        f"{LAYER} has codes [32, 8, 2]",
    ),
    "no scales": (
        lambda path: edit(path, lambda tensors: tensors.pop(f"{LAYER}.scales")),
        f"{LAYER} has codes [64, 8, 2], codebooks [2, 256, 1, 8] and no bias",
    ),
    "no codes": (
        lambda path: edit_config(path, lambda config: config.pop("quantization_config")),
        "stranger is not an AQLM checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_the_run_would_change_in_silence_is_refused(case: str, stranger: Path) -> None:
    change, words = REFUSED[case]
    change(stranger)
    before = sorted(Path.cwd().rglob("*"))
    assert words in refused("finetune", "stranger", "--teacher", "tiny", "--out", "new")
    assert sorted(Path.cwd().rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("qwen2", {}, "has model type llama, other has qwen2"),
        ("llama", {"num_hidden_layers": 1}, "codes for model.layers.1."),
        ("llama", {"num_hidden_layers": 3}, "only other has model.layers.2."),
        ("llama", {"intermediate_size": 192}, "the base model has 192 x 64 weights"),
        ("llama", {"vocab_size": 300}, "is [258, 64] there and [300, 64] in other"),
        ("llama", {"attention_bias": True}, "and no bias"),
    ],
)
def test_another_architecture_is_refused(family: str, settings: dict[str, Any], words: str, stranger: Path) -> None:
    tiny_models.save(family, Path("other"), **settings)
    before = sorted(Path.cwd().rglob("*"))
    assert words in refused("finetune", "stranger", "--teacher", "other")
    assert sorted(Path.cwd().rglob("*")) == before


def test_settings_of_a_search_that_does_not_take_place_are_refused(stranger: Path) -> None:
    Path("imported.yaml").write_text("{model: tiny, quantize: {import_from: stranger}}")
    for flag in (("--bits", "3"), ("--skip", ".*q_proj"), ("--only", ".*q_proj")):
        line = refused("quantize", "--config", "imported.yaml", *flag, "--out", "new")
        assert "has no effect where the codes of stranger are imported" in line, flag
    assert not Path("new").exists()


def test_what_is_no_checkpoint_or_has_no_original_is_refused(stranger: Path) -> None:
    assert "tiny is not an AQLM checkpoint" in refused("finetune", "tiny", "--teacher", "tiny")
    Path("empty").mkdir()
    assert "no config.json" in refused("finetune", "empty", "--teacher", "tiny")
    assert "name its base model with --teacher" in refused("finetune", "stranger")
    assert "quantized already" in refused("finetune", "stranger", "--teacher", "stranger")
    assert not Path("runs").exists()
    assert "is stranger itself" in refused("finetune", "stranger", "--teacher", "tiny", "--out", "stranger", status=2)


def test_other_settings_in_its_config_are_told(stranger: Path) -> None:
    edit_config(stranger, lambda config: config.update(rms_norm_eps=1e-3))
    output = run("finetune", "stranger", "--teacher", "tiny", *SHORT).output
    assert "warning: stranger has other settings than tiny: rms_norm_eps 0.001, not 1e-06" in output
