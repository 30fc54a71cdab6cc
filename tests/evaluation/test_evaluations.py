"""What every kind of evaluation must do, without a run directory and without a directory of a model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from aqlm_cli.errors import ModelError, UsageError
from aqlm_cli.evaluation import (
    EVALUATIONS,
    AttributionSettings,
    GateSettings,
    GenerationSettings,
    LoadedModel,
    PerplexitySettings,
    ProbeSettings,
    SpeedSettings,
    StoredModel,
    TasksSettings,
)
from aqlm_cli.events import silent
from aqlm_cli.models import resolve
from aqlm_cli.models.blocks import find_blocks, linears, replace_module
from aqlm_cli.spec.evaluate import BenchConfig, GateConfig
from aqlm_cli.spec.probe import ProbeConfig
from aqlm_kernels import AdditiveLinear, AdditiveMatrix


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"{number} times {number} is {number**2}. " for number in range(15)))
    lines = [{"question": f"{n} times {n} is", "choices": [f"{n**2}", "nothing"], "answer": 0} for n in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tiny_models.save("llama", tmp_path / "model")


@pytest.fixture
def settings(tmp_path: Path) -> Mapping[str, Any]:
    return {
        "ppl": PerplexitySettings(str(tmp_path / "text.txt"), sequence_length=64, sequences=2),
        "gate": GateSettings(GateConfig(prompts=("2 times 2", "x = "), tokens=8)),
        "attribution": AttributionSettings(str(tmp_path / "text.txt"), sequences=2, sequence_length=32),
        "generation": GenerationSettings("2 times 2", max_new_tokens=4),
        "probe": ProbeSettings(ProbeConfig(data=str(tmp_path / "text.txt"), sequence_length=64, sequences=2)),
        "speed": SpeedSettings(BenchConfig(prompt=8, tokens=2, repeats=1)),
        "tasks": TasksSettings(str(tmp_path / "questions.jsonl")),
    }


def loaded(directory: Path) -> LoadedModel:
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return LoadedModel("mine", network, AutoTokenizer.from_pretrained(directory))


def quantized(base: LoadedModel) -> LoadedModel:
    """A copy with random codes in every linear layer of its blocks."""
    network: nn.Module = copy.deepcopy(base.loaded)
    rng, blocks = torch.Generator().manual_seed(0), find_blocks(network)
    for block in blocks.modules:
        for path, layer in linears(block, "").items():
            codes = torch.randint(256, (layer.out_features, layer.in_features // 8, 2), generator=rng)
            books = 0.1 * torch.randn(2, 256, 8, generator=rng)
            replace_module(block, path, AdditiveLinear(AdditiveMatrix(codes, books, torch.ones(layer.out_features))))
    return LoadedModel("quantized", network, base.loaded_tokenizer)


@pytest.mark.parametrize("kind", EVALUATIONS)
def test_a_network_and_its_tokenizer_are_enough(kind: str, directory: Path, settings: Mapping[str, Any]) -> None:
    evaluation, base = EVALUATIONS[kind], loaded(directory)
    before = {name: tensor.clone() for name, tensor in base.loaded.state_dict().items()}
    report = evaluation.run(quantized(base), base, settings[kind], silent)
    found = report.as_json()
    assert (found["model"], found["version"]) == ("quantized", 2 if kind == "ppl" else 1)
    json.dumps(found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.loaded.state_dict().items())
    assert all(content for content in evaluation.files(report).values())


def test_a_model_in_memory_has_the_figures_of_the_same_model_on_the_disk(
    directory: Path, settings: Mapping[str, Any]
) -> None:
    base, stored = loaded(directory), StoredModel(resolve(str(directory)))
    figures = [EVALUATIONS["ppl"].run(model, base, settings["ppl"], silent).as_json() for model in (base, stored)]
    assert figures[0]["perplexity"] == figures[1]["perplexity"] and figures[0]["stderr"] > 0
    assert figures[0]["ratio"] == 1
    assert EVALUATIONS["ppl"].run(quantized(base), base, settings["ppl"], silent).as_json()["ratio"] != 1
    texts = [EVALUATIONS["generation"].run(model, None, settings["generation"], silent) for model in (base, stored)]
    assert texts[0].as_json()["text"] == texts[1].as_json()["text"]


def test_the_size_of_a_network_in_memory_counts_codes_tables_and_the_rest(
    directory: Path, settings: Mapping[str, Any]
) -> None:
    base = loaded(directory)
    rows = EVALUATIONS["speed"].run(quantized(base), base, settings["speed"], silent).as_json()["rows"]
    assert [row["name"] for row in rows] == ["FP16", "BF16", "FP32", "packed"]
    layers = [layer for block in find_blocks(base.loaded).modules for layer in linears(block, "").values()]
    weights = sum(layer.weight.numel() for layer in layers)
    tables = sum(2 * 256 * 8 + layer.out_features for layer in layers)
    rest = sum(parameter.numel() for parameter in base.loaded.parameters()) - weights
    assert rows[-1]["bytes"] == weights // 4 + 2 * (tables + rest)
    assert 0 < rows[-1]["relative_error"] < 1e-3


def test_figures_of_the_base_model_are_computed_once(directory: Path, settings: Mapping[str, Any]) -> None:
    kept: dict[str, dict[str, Any]] = {}

    def remember(facts: Mapping[str, Any], compute: Any) -> dict[str, Any]:
        return kept.setdefault(json.dumps(facts, sort_keys=True), compute() if not kept else {"losses": [0.0, 0.0]})

    base, alone = loaded(directory), replace(settings["ppl"], divergence=False)
    first = EVALUATIONS["ppl"].run(base, base, alone, silent, remember).as_json()
    again = EVALUATIONS["ppl"].run(base, base, alone, silent, remember).as_json()
    assert first == again and len(kept) == 1


def test_more_tokens_than_a_network_in_memory_reads_are_refused(directory: Path) -> None:
    with pytest.raises(ModelError, match="mine reads 256 tokens, not 300; lower --prompt or --tokens"):
        section = BenchConfig(prompt=290, tokens=10, repeats=1)
        EVALUATIONS["speed"].run(loaded(directory), None, SpeedSettings(section), silent)


def test_a_text_needs_a_tokenizer(directory: Path, settings: Mapping[str, Any]) -> None:
    with pytest.raises(ModelError, match="mine has no tokenizer"):
        EVALUATIONS["ppl"].run(LoadedModel("mine", loaded(directory).loaded), None, settings["ppl"], silent)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PerplexitySettings(3), "PerplexitySettings: `data` takes str, not 3"),  # type: ignore[arg-type]
        (lambda: PerplexitySettings("text.txt", sequence_length=1), "sequences of 1 tokens score none"),
        (lambda: PerplexitySettings("text.txt", sequences=-1), "-1 sequences are none"),
        (lambda: PerplexitySettings("text.txt", dtype="int8"), "there is no type 'int8' to compute in; choose float32"),
        (lambda: GenerationSettings("2", max_new_tokens=0), "0 new tokens are none"),
        (lambda: GenerationSettings("2", temperature=float("nan")), "temperature nan is not possible"),
        (lambda: GenerationSettings("2", head="nope"), "`head` takes Head, not 'nope'"),  # type: ignore[arg-type]
        (lambda: TasksSettings("q.jsonl", questions=1), "1 questions give no standard error; ask at least 2, or all"),
        (lambda: TasksSettings("q.jsonl", dtype="int8"), "there is no type 'int8' to compute in; choose float32"),
        (lambda: SpeedSettings(None), "SpeedSettings: `section` takes BenchConfig, not None"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_cannot_be_are_refused_when_they_are_made(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError) as error:
        make()
    assert words in str(error.value)
