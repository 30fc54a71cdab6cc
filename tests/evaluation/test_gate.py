"""The gate against collapse, and the attribution of a divergence to layers and blocks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import commands, tiny_models
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM

from aqlm_cli.errors import ModelError, UsageError
from aqlm_cli.evaluation import EVALUATIONS, AttributionSettings, GateSettings, LoadedModel
from aqlm_cli.evaluation.repetition import common_start, distinct_share, longest_loop
from aqlm_cli.events import silent
from aqlm_cli.models.blocks import find_blocks, linears, replace_module
from aqlm_cli.spec.evaluate import AttributionConfig, GateConfig
from aqlm_kernels import AdditiveLinear, AdditiveMatrix

PROMPTS = ("One two three", "A line of text", "x = ")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tiny_models.save("llama", tmp_path_factory.mktemp("model"))
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return LoadedModel("base", network, tiny_models.byte_tokenizer())


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} times {n} is {n**2}. " for n in range(30)))
    return str(path)


def damaged(base: LoadedModel, amounts: dict[str, float]) -> LoadedModel:
    """A copy whose layers hold codes for the base model's weights plus noise, of the amount of their block."""
    network: nn.Module = copy.deepcopy(base.loaded)
    rng, blocks = torch.Generator().manual_seed(0), find_blocks(network)
    for prefix, block in zip(blocks.paths, blocks.modules, strict=True):
        for path, layer in linears(block, "").items():
            weight = layer.weight.detach()
            noisy = weight + amounts[prefix] * weight.std() * torch.randn(weight.shape, generator=rng)
            replace_module(block, path, AdditiveLinear(exact_matrix(noisy)))
    return LoadedModel("damaged", network, base.loaded_tokenizer)


def exact_matrix(weight: torch.Tensor) -> AdditiveMatrix:
    """Codes with one entry for each group: groups of 8, as many entries as groups, in codebooks of 16 bits."""
    out, features = weight.shape
    entries = weight.reshape(-1, 8)
    codes = torch.arange(len(entries)).view(out, features // 8, 1)
    books = torch.zeros(1, 2 ** max(8, (len(entries) - 1).bit_length()), 8)
    books[0, : len(entries)] = entries
    return AdditiveMatrix(codes, books, torch.ones(out))


# ------------------------------------------------------------------------------------------------------------ measures


def test_loops_and_repetition_are_counted_by_hand() -> None:
    assert longest_loop([1, 2, 3, 4, 5]) == 0
    assert longest_loop([9, 1, 2, 1, 2, 1, 2, 7]) == 4  # two more rounds of two
    assert longest_loop([5, 5, 5, 5]) == 3
    assert longest_loop([1, 2, 3, 1, 2]) == 0  # the second round is not complete
    assert distinct_share([1, 2, 3, 4]) == 1
    assert distinct_share([1, 1, 1, 1, 1]) == pytest.approx(1 / 3)
    assert distinct_share([1, 2]) == 1
    assert [common_start([1, 2, 3], other) for other in ([1, 2, 4], [1, 2], [2])] == [2, 2, 0]


# ---------------------------------------------------------------------------------------------------------------- gate


def gate(model: LoadedModel, base: LoadedModel | None, **limits: Any) -> Any:
    settings = GateSettings(GateConfig(prompts=PROMPTS, tokens=24, **limits))
    return EVALUATIONS["gate"].run(model, base, settings, silent)


def test_a_model_agrees_with_itself_and_passes(base: LoadedModel) -> None:
    report = gate(base, base, least_agreement=1)
    assert not report.collapsed and report.block is None
    assert report.agreement == sum(one.base.tokens for one in report.samples) / 3
    assert (report.distinct, report.surprise) == (report.base_distinct, report.base_surprise)


def test_surprise_is_the_loss_of_the_base_model_on_the_text(base: LoadedModel) -> None:
    sample = gate(base, base).samples[0]
    prompt = base.loaded_tokenizer.encode(PROMPTS[0], add_special_tokens=False)
    ids = list(prompt)
    for _ in range(sample.base.tokens):
        ids.append(int(base.loaded(torch.tensor([ids])).logits[0, -1].argmax()))
    with torch.no_grad():
        logits = base.loaded(torch.tensor([ids])).logits[0].log_softmax(1)
    losses = [-float(logits[place - 1, ids[place]]) for place in range(len(prompt), len(ids))]
    assert sample.base.surprise == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_model_beyond_a_limit_collapses_and_its_worst_block_is_named(base: LoadedModel) -> None:
    model = damaged(base, {"model.layers.0": 0.05, "model.layers.1": 3.0})
    report = gate(model, base, most_surprise=0.0, least_agreement=24)
    assert report.collapsed and report.block == "model.layers.1"
    assert any("agrees with its base model for" in reason for reason in report.reasons)
    assert json.loads(json.dumps(report.as_json()))["block"] == "model.layers.1"
    model = damaged(base, {"model.layers.0": 3.0, "model.layers.1": 0.05})
    assert gate(model, base, least_agreement=24).block == "model.layers.0"


def test_a_gate_needs_a_base_model_and_prompts_with_tokens(base: LoadedModel) -> None:
    with pytest.raises(UsageError, match="no base model to compare with"):
        gate(base, None)
    with pytest.raises(UsageError, match="has no token"):
        EVALUATIONS["gate"].run(base, base, GateSettings(GateConfig(prompts=("",))), silent)


def test_a_model_of_few_positions_is_told_its_worst_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than it reads at once came together from the prompts; each text by itself it can read."""
    monkeypatch.chdir(tmp_path)
    tiny_models.save("opt", tmp_path / "model", max_position_embeddings=64)
    assert commands.run("quantize", "model", "--method", "rtn", "--scheme", "int2g32", "--out", "run").exit_code == 0
    settings = yaml.safe_load(Path("run/run.yaml").read_text())
    prompts = ["hello there", "a dog ran by", "tea and more tea", "one two three four"]
    settings["evaluate"]["gate"] = {"tokens": 16, "least_agreement": 1000, "prompts": prompts}
    Path("run/run.yaml").write_text(yaml.safe_dump(settings))
    result = commands.run("evaluate", "run", "--kind", "gate", "--json")
    assert result.exit_code == 3, result.output
    assert json.loads(result.stdout)["block"].startswith("model.decoder.layers.")


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("gate", ("--activations", "int8t")),
        ("gate", ("--dtype", "float16")),
        ("gate", ("--data", "builtin")),
        ("gate,attribution", ("--protocol", "word")),
        ("attribution", ("--cache", "bfp4g32")),
        ("ppl", ("--way", "out")),
        ("ppl", ("--budget-minutes", "1")),
        ("gate", ("--sequences", "3")),
    ],
)
def test_a_flag_of_another_kind_is_refused(finished_run: Path, kind: str, flags: tuple[str, str]) -> None:
    told = commands.refused("evaluate", "run", "--kind", kind, *flags, status=2)
    assert f"{flags[0]} is for the kind" in told and "add it to --kind" in told


def test_the_length_of_sequences_is_that_of_attribution_too(finished_run: Path) -> None:
    flags = ("--sequence-length", "24", "--sequences", "2", "--json")
    report = json.loads(commands.run("evaluate", "run", "--kind", "attribution", *flags).stdout)
    assert (report["sequences"], report["sequence_length"]) == (2, 24)


def test_the_length_of_sequences_needs_no_other_flag(finished_run: Path) -> None:
    result = commands.run("evaluate", "run", "--sequence-length", "24", "--sequences", "2", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["sequence_length"] == 24


# --------------------------------------------------------------------------------------------------------- attribution


def attributed(model: LoadedModel, base: LoadedModel, text: str, **settings: Any) -> Any:
    given = {"sequences": 2, "sequence_length": 48, **settings}
    return EVALUATIONS["attribution"].run(model, base, AttributionSettings(text, **given), silent)


def divergence(base: nn.Module, other: nn.Module, text: str, tokenizer: Any) -> float:
    ids = torch.tensor(tokenizer.encode(Path(text).read_text(), add_special_tokens=False)[:96]).view(2, 48)
    with torch.no_grad():
        own, mine = (one(ids).logits.log_softmax(2) for one in (base, other))
    return float((own.exp() * (own - mine)).sum(2).mean())


@pytest.mark.parametrize("way", ["in", "out"])
def test_the_effect_of_a_layer_is_that_of_swapping_it(base: LoadedModel, text: str, way: str) -> None:
    model = damaged(base, {"model.layers.0": 0.3, "model.layers.1": 0.6})
    report = attributed(model, base, text, way=way)
    whole = divergence(base.loaded, model.loaded, text, base.loaded_tokenizer)
    assert report.whole == pytest.approx(whole, rel=1e-3)
    path = "model.layers.1.mlp.up_proj"
    mixed = copy.deepcopy(base.loaded if way == "in" else model.loaded)
    replace_module(mixed, path, (model.loaded if way == "in" else base.loaded).get_submodule(path))
    alone = divergence(base.loaded, mixed, text, base.loaded_tokenizer)
    assert report.effects[path] == pytest.approx(alone if way == "in" else whole - alone, rel=1e-2, abs=1e-5)
    assert len(report.effects) == 14 and report.worst_block == max(report.blocks, key=lambda one: report.blocks[one])
    assert report.blocks["model.layers.1"] == pytest.approx(
        sum(effect for name, effect in report.effects.items() if name.startswith("model.layers.1."))
    )


def test_a_block_stands_for_all_of_its_layers(base: LoadedModel, text: str) -> None:
    model = damaged(base, {"model.layers.0": 0.3, "model.layers.1": 0.6})
    report = attributed(model, base, text, unit="block")
    mixed = copy.deepcopy(base.loaded)
    mixed.model.layers[1] = model.loaded.model.layers[1]
    alone = divergence(base.loaded, mixed, text, base.loaded_tokenizer)
    assert report.effects["model.layers.1"] == report.blocks["model.layers.1"] == pytest.approx(alone, rel=1e-3)


def test_a_small_budget_reads_less_text(base: LoadedModel, text: str) -> None:
    model = damaged(base, {"model.layers.0": 0.3, "model.layers.1": 0.6})
    report = attributed(model, base, text, budget_minutes=1e-6)
    assert (report.sequences, report.sequence_length) == (1, 32)


def test_no_budget_is_too_large(base: LoadedModel, text: str) -> None:
    model = damaged(base, {"model.layers.0": 0.3, "model.layers.1": 0.6})
    assert attributed(model, base, text, budget_minutes=1e308).sequences == 2
    with pytest.raises(ValidationError):
        AttributionConfig(budget_minutes=float("inf"))


def test_a_model_in_16_bits_has_nothing_to_attribute(base: LoadedModel, text: str) -> None:
    with pytest.raises(ModelError, match="no quantized layer"):
        attributed(base, base, text)
