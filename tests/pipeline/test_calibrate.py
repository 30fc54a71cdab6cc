from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from aqlm_cli.data.sequences import calibration_sequences
from aqlm_cli.errors import ArtifactError, DataError, QuantizationError, StorageError
from aqlm_cli.events import Advanced, Event, Noted, StageStarted
from aqlm_cli.models.blocks import find_blocks, linears
from aqlm_cli.pipeline.job import make_job
from aqlm_cli.pipeline.stage_reports import CalibrationReport
from aqlm_cli.pipeline.stages.calibrate import calibrate
from aqlm_cli.quantization import block_inputs
from aqlm_cli.runs.artifact import open_artifact
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.run_file import build_config

WINDOWS, LENGTH = 12, 32


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.save("llama", tmp_path / "model")


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files in the working directory, of which the second is all capitals."""
    words = "".join(f"{number} times {number} is {number**2}. " for number in range(40))
    (tmp_path / "a.txt").write_text(words)
    (tmp_path / "b.txt").write_text(words.upper())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_inputs, "compute_dtype", lambda device: torch.float32)


def settings(model: Path, seed: int = 0, **section: Any) -> RunConfig:
    given = {"data": "a.txt:8,b.txt:4", "sequence_length": LENGTH, "statistics_sequences": 6, **section}
    return build_config(None, None, {"model": str(model), "seed": seed, "calibrate": given})


def run(config: RunConfig, overwrite: bool = False, events: list[Event] | None = None) -> CalibrationReport:
    return calibrate(make_job(config, Path("run"), overwrite=overwrite, emit=([] if events is None else events).append))


def files(directory: Path = Path("run/calibration")) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "manifest.json"}


def windows() -> Tensor:
    return load_file("run/calibration/windows.safetensors")["ids"]


# ------------------------------------------------------------------------------------------------------- what it holds


def test_the_sequences_are_those_of_the_text_in_order_of_the_sources(model: Path) -> None:
    report = run(settings(model))
    expected = calibration_sequences("a.txt:8,b.txt:4", None, LENGTH, 0, AutoTokenizer.from_pretrained(model))
    assert windows().dtype == torch.int32
    assert torch.equal(windows().long(), expected.ids)
    assert (report.sequences, report.sequence_length, report.tokens) == (WINDOWS, LENGTH, WINDOWS * LENGTH)
    assert report.sources == {"a.txt": 8, "b.txt": 4}
    assert report.directory == Path("run/calibration")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_moments_are_the_mean_squares_of_every_layers_inputs(family: str, tmp_path: Path, in_float32: None) -> None:
    directory = tiny_models.save(family, tmp_path / family)
    run(settings(directory, statistics_sequences=WINDOWS))
    moments = load_file("run/calibration/second_moments.safetensors")
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    blocks = find_blocks(network)
    inputs: dict[str, list[Tensor]] = {}
    for prefix, block in zip(blocks.paths, blocks.modules, strict=True):
        for path, layer in linears(block, prefix).items():

            def note(_: nn.Module, given: tuple[Tensor, ...], path: str = path) -> None:
                inputs.setdefault(path, []).append(given[0])

            layer.register_forward_pre_hook(note)
    with torch.no_grad():
        network(windows().long())
    assert moments.keys() == inputs.keys()
    for path, given in inputs.items():
        expected = torch.cat(given).double().square().mean((0, 1))
        torch.testing.assert_close(moments[path].double(), expected, rtol=1e-4, atol=1e-8)


def test_the_loss_is_the_models_own_on_the_sequences_measured(model: Path, in_float32: None) -> None:
    report = run(settings(model, statistics_sequences=3))
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    chosen = windows()[[0, 5, 11]].long()  # evenly spread, so that both sources take part
    with torch.no_grad():
        losses = [float(network(window[None], labels=window[None]).loss) for window in chosen]
    assert report.loss == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_16_bit_products_change_little(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for dtype in torch.float32, torch.bfloat16:
        monkeypatch.setattr(block_inputs, "compute_dtype", lambda device, dtype=dtype: dtype)
        report = run(settings(model), overwrite=True)
        found.append((report.loss, load_file("run/calibration/second_moments.safetensors")))
    (loss, moments), (rounded_loss, rounded) = found
    assert rounded_loss == pytest.approx(loss, rel=0.01)
    assert any(not torch.equal(rounded[path], entries) for path, entries in moments.items())
    for path, entries in moments.items():
        torch.testing.assert_close(rounded[path], entries, rtol=0.05, atol=0.01 * float(entries.mean()))


def test_its_progress_counts_the_blocks(model: Path) -> None:
    events: list[Event] = []
    run(settings(model), events=events)
    assert events == [
        each
        for stage in ("check", "calibrate")
        for each in (StageStarted(stage, 2, "block"), Advanced(stage, 1), Advanced(stage, 2))
    ]


# ------------------------------------------------------------------------------------------------------ what is reused


def test_the_same_settings_give_the_same_bytes(model: Path) -> None:
    run(settings(model))
    first = files()
    digest = open_artifact(Path("run/calibration"), "calibration").digest
    run(settings(model), overwrite=True)
    assert files() == first
    assert open_artifact(Path("run/calibration"), "calibration").digest == digest


def test_what_is_there_with_the_same_settings_is_reused(model: Path) -> None:
    report = run(settings(model))
    written = Path("run/calibration/manifest.json").stat().st_mtime_ns
    events: list[Event] = []
    assert run(settings(model), events=events) == report
    assert Path("run/calibration/manifest.json").stat().st_mtime_ns == written
    (event,) = events
    assert isinstance(event, Noted) and "exists already" in event.message


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"data": "a.txt:12"}, "calibrate.data: a.txt:8,b.txt:4 there, a.txt:12 here"),
        ({"sequence_length": 16}, "calibrate.sequence_length: 32 there, 16 here"),
    ],
)
def test_other_settings_are_refused_by_name_and_redone_on_request(
    model: Path, changes: dict[str, Any], difference: str
) -> None:
    run(settings(model))
    before = open_artifact(Path("run/calibration"), "calibration").digest
    with pytest.raises(ArtifactError, match="--overwrite") as error:
        run(settings(model, **changes))
    assert difference in str(error.value)
    assert open_artifact(Path("run/calibration"), "calibration").digest == before
    run(settings(model, **changes), overwrite=True)
    assert open_artifact(Path("run/calibration"), "calibration").digest != before


def test_another_model_is_refused_though_it_has_the_same_name(model: Path) -> None:
    run(settings(model))
    tensors = load_file(model / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"made from\.model sha256:\w+ there, sha256:\w+ asked"):
        run(settings(model))


# ------------------------------------------------------------------------------------------------------------ refusals


def damage(model: Path, name: str, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.input_layernorm", torch.nan, r"^model\.layers\.1\.input_layernorm: the weight holds NaN"),
        ("model.layers.1.input_layernorm", 1e30, r"^model\.layers\.1\.self_attn\.q_proj: its inputs hold NaN"),
        ("model.norm", 1e38, "the loss of the base model is not finite"),
    ],
)
def test_activations_that_are_no_numbers_are_refused_with_the_first_layer_that_meets_them(
    model: Path, name: str, value: float, message: str
) -> None:
    damage(model, f"{name}.weight", value)
    with pytest.raises(QuantizationError, match=message):
        run(settings(model))
    assert not Path("run/calibration").exists()


def test_too_little_text_is_refused_before_any_work(model: Path) -> None:
    events: list[Event] = []
    with pytest.raises(DataError, match="has 24 sequences of 32 tokens, 1000 are needed"):
        run(settings(model, data="a.txt:1000"), events=events)
    assert events == []


@pytest.mark.parametrize("successes", [0, 2, 4, 6])
def test_a_full_disk_is_one_line_and_publishes_nothing(
    model: Path, fail_disk: Callable[[int, int], None], successes: int
) -> None:
    fail_disk(errno.ENOSPC, successes)
    with pytest.raises(StorageError, match="no space left"):
        run(settings(model))
    assert not Path("run/calibration/manifest.json").exists()


def test_a_failure_leaves_an_earlier_calibration_in_its_place(model: Path) -> None:
    run(settings(model))
    before = files()
    damage(model, "model.layers.1.input_layernorm.weight", torch.nan)
    with pytest.raises(QuantizationError):
        run(settings(model), overwrite=True)
    assert files() == before
    manifest = json.loads(Path("run/calibration/manifest.json").read_text())
    assert manifest["kind"] == "calibration"
