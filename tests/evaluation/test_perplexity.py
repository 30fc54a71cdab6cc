from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aqlm_cli.errors import AqlmError, ArtifactError, DataError, ModelError
from aqlm_cli.evaluation import PerplexityReport, PerplexitySettings
from aqlm_cli.evaluation.estimates import estimate
from aqlm_cli.events import Event, Noted, StageStarted
from aqlm_cli.models import find_subject
from aqlm_cli.pipeline.stages.evaluate import evaluate
from aqlm_cli.runs.directory import RunDirectory, open_run
from aqlm_cli.runs.stages import PACK, StageKey
from aqlm_cli.spec.run_file import build_config

LENGTH = 64
WINDOWS = 4


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} times {number} is {number**2}. " for number in range(15)), encoding="utf-8")
    return str(path)


def measure(
    target: Path,
    text: str,
    events: list[Event] | None = None,
    dtype: str = "float32",
    sequences: int | None = WINDOWS,
    length: int = LENGTH,
    divergence: bool = False,
) -> PerplexityReport:
    emit = ([] if events is None else events).append
    settings = PerplexitySettings(text, length, sequences, dtype=dtype, divergence=divergence)
    report = evaluate(find_subject(str(target)), "ppl", settings, "cpu", emit)
    assert isinstance(report, PerplexityReport)
    return report


def by_transformers(directory: Path, text: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer(Path(text).read_text(), return_tensors="pt").input_ids
    total = 0.0
    with torch.no_grad():
        for start in range(0, WINDOWS * LENGTH, LENGTH):
            window = ids[:, start : start + LENGTH]
            total += network(window, labels=window).loss.item()
    return math.exp(total / WINDOWS)


# Gemma 2 bends its logits behind the head.
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_perplexity_is_that_of_a_plain_transformers_loop(family: str, tmp_path: Path, text: str) -> None:
    directory = tiny_models.save(family, tmp_path / "model")
    report = measure(directory, text)
    assert report.perplexity == pytest.approx(by_transformers(directory, text), rel=1e-5)
    assert (report.sequences, report.base_model, report.ratio) == (WINDOWS, None, None)


def test_logits_longer_than_a_chunk_are_scored_whole(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    monkeypatch.setattr("aqlm_cli.evaluation.scoring.ROWS_PER_CHUNK", 10)
    assert measure(directory, text).perplexity == pytest.approx(by_transformers(directory, text), rel=1e-5)


def test_the_standard_error_is_the_spread_that_repeated_measurements_show() -> None:
    losses = 3 + 0.2 * torch.randn(1000, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measured = [estimate(7 * sample, torch.full((50,), 7.0)) for sample in losses]
    spread = torch.tensor([result.perplexity for result in measured]).std().item()
    claimed = sum(result.stderr for result in measured) / len(measured)
    assert claimed == pytest.approx(spread, rel=0.07)  # a spread of 1000 samples is itself known to 2 %


def test_the_asked_dtype_is_used(tmp_path: Path, text: str) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    exact, rounded = measure(directory, text).perplexity, measure(directory, text, dtype="bfloat16").perplexity
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


# ----------------------------------------------------------------------------------------------------------------- runs


def packed_run(directory: Path, original: Path) -> RunDirectory:
    """A run whose packed model has another head than the original."""
    run = open_run(directory, build_config(None, None, {"model": str(original)}))
    with run.stage(StageKey(PACK, {}, {"quantized": "a1b2"})) as stage:
        tiny_models.save("llama", stage.directory)
        weights = load_file(stage.directory / "model.safetensors")
        weights["lm_head.weight"] = weights["lm_head.weight"] * 1.5
        save_file(weights, stage.directory / "model.safetensors", metadata={"format": "pt"})
        stage.publish({})
    return run


def measured_models(events: list[Event]) -> int:
    return sum(isinstance(event, StageStarted) for event in events)


def test_a_run_is_measured_beside_its_original_which_is_measured_once(tmp_path: Path, text: str) -> None:
    original = tiny_models.save("llama", tmp_path / "model")
    run = packed_run(tmp_path / "run", original)
    events: list[Event] = []
    report = measure(run.path, text, events)
    assert measured_models(events) == 2
    assert report.base_model is not None and report.ratio is not None
    assert report.perplexity == pytest.approx(by_transformers(run.path / "packed", text), rel=1e-5)
    assert report.base_model.perplexity == pytest.approx(by_transformers(original, text), rel=1e-5)
    assert report.ratio == report.perplexity / report.base_model.perplexity != 1

    events.clear()
    assert measure(run.path, text, events) == report
    assert measured_models(events) == 1


def test_a_run_and_its_original_are_read_together_for_their_divergence(tmp_path: Path, text: str) -> None:
    run, events = packed_run(tmp_path / "run", tiny_models.save("llama", tmp_path / "model")), []
    report, alone = measure(run.path, text, events, divergence=True), measure(run.path, text)
    assert report.divergence is not None and 0 < report.divergence.mean < report.divergence.maximum
    assert report.divergence.agreement == 1  # the head is a multiple of the original's
    assert (report.base_model, report.ratio) == (alone.base_model, alone.ratio)
    assert [event.stage for event in events if isinstance(event, StageStarted)] == ["eval-ppl run beside its base"]


def test_an_original_measured_otherwise_is_measured_again(tmp_path: Path, text: str) -> None:
    run = packed_run(tmp_path / "run", tiny_models.save("llama", tmp_path / "model"))
    measure(run.path, text)
    events: list[Event] = []
    measure(run.path, text, events, dtype="bfloat16")
    assert measured_models(events) == 2
    events.clear()
    measure(run.path, text, events, sequences=WINDOWS - 1)
    assert measured_models(events) == 2
    events.clear()
    Path(text).write_text(Path(text).read_text().replace("times", "TIMES"))
    measure(run.path, text, events)
    assert measured_models(events) == 2


def test_the_report_of_a_run_is_written_with_the_digest_of_what_was_measured(tmp_path: Path, text: str) -> None:
    run, events = packed_run(tmp_path / "run", tiny_models.save("llama", tmp_path / "model")), []
    report = measure(run.path, text, events)
    written = run.path / "reports" / "eval-ppl-text.txt-4x64-float32.json"
    assert json.loads(written.read_bytes()) == {**report.as_json(), "quantized": "a1b2"}
    assert isinstance(events[-1], Noted) and f"wrote {written}" in events[-1].message


def test_a_run_without_a_packed_model_says_how_to_make_one(tmp_path: Path, text: str) -> None:
    original = tiny_models.save("llama", tmp_path / "model")
    run = open_run(tmp_path / "run", build_config(None, None, {"model": str(original)}))
    with pytest.raises(ArtifactError, match="aqlm pack"):
        measure(run.path, text)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("length", "windows", "error", "reason"),
    [
        (257, 2, ModelError, "accepts 256 tokens, not 257"),
        (LENGTH, 1, DataError, "no standard error"),
        (256, None, DataError, "no standard error"),
    ],
)
def test_sequences_that_cannot_be_measured_are_refused(
    tmp_path: Path, text: str, length: int, windows: int | None, error: type[AqlmError], reason: str
) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    with pytest.raises(error, match=reason):
        measure(directory, text, sequences=windows, length=length)


def test_weights_that_are_not_numbers_give_no_perplexity(tmp_path: Path, text: str) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="sequence 0 is not finite"):
        measure(directory, text)


def test_a_loss_beyond_every_perplexity_is_refused_in_one_line(tmp_path: Path) -> None:
    """Text without spaces has one word a document, whose loss is that of all its tokens."""
    with pytest.raises(DataError, match=r"a mean loss of 900 nats is no perplexity that a number holds.*gptq-2048"):
        estimate(torch.tensor([900.0, 900.0]), torch.ones(2))
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": "\u6f22" * 100}) + "\n" for _ in range(3)))
    subject = find_subject(str(tiny_models.save("llama", tmp_path / "model", max_position_embeddings=4096)))
    with pytest.raises(DataError, match="too few words for a protocol that counts them"):
        evaluate(subject, "ppl", PerplexitySettings(str(path), protocol="word"), "cpu", lambda event: None)
