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
from helpers.commands import FINETUNE, add_settings, run
from safetensors.torch import load_file, save_file
from typer.testing import Result

from aqlm_cli.errors import UsageError
from aqlm_cli.models import halves_of, load_network, resolve
from aqlm_cli.pipeline.stages import finetune as stage
from aqlm_cli.runs.artifact import open_artifact
from aqlm_cli.spec.units import parse_duration


@pytest.fixture
def made(finished_run: Path) -> Path:
    """A quantized run, with settings for finetuning."""
    add_settings(finished_run, FINETUNE)
    return finished_run


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def results(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "manifest.json").read_text())["results"]
    return found


def test_the_quantized_model_comes_nearer_to_the_original_with_its_codes_as_they_were(made: Path) -> None:
    before = {name: load_file(made / "quantized" / name) for name in contents(made / "quantized")}
    packed = contents(made / "packed")
    told = json.loads(run("finetune", "run", "--json").stdout)
    assert told["finetune"]["after"] < told["finetune"]["before"]
    assert told["finetune"]["steps"] == 6 and told["finetune"]["tokens"] == 6 * 2 * 16
    assert contents(made / "finetuned").keys() == {*before, "outside.safetensors"}
    for name, tensors in before.items():
        tuned = load_file(made / "finetuned" / name)
        assert tuned.keys() == tensors.keys()
        for key, tensor in tensors.items():
            moved = not torch.equal(tuned[key], tensor)
            assert moved == (not key.endswith("codes")), key
    assert contents(made / "packed") != packed, "it is packed anew"
    for name in ("finetune.json", "finetune.png", "finetune.svg"):
        assert (made / "reports" / name).stat().st_size > 0


@pytest.mark.slow
def test_run_finetunes_where_its_file_has_that_section(run_file: Path, made: Path) -> None:
    """The same bytes as one command after the other give."""
    assert run("finetune", "run").exit_code == 0
    told = json.loads(run("run", "run.yaml", "--out", "whole", "--json").stdout)
    assert list(told) == ["quantize", "pack", "finetune", "notes.txt", "bench"]
    assert told["finetune"]["steps"] == 6
    assert contents(Path("whole/packed")) == contents(made / "packed")
    again = run("run", "run.yaml", "--out", "whole")
    assert "whole/finetuned exists already" in again.output and "whole/packed exists already" in again.output


def test_what_comes_after_takes_the_finetuned_model(made: Path) -> None:
    coarse = json.loads(run("eval-ppl", "run", "--sequences", "4", "--json").stdout)
    run("finetune", "run", "--steps", "20")
    fine = json.loads(run("eval-ppl", "run", "--sequences", "4", "--json").stdout)
    assert fine["perplexity"] != coarse["perplexity"] and fine["base_model"] == coarse["base_model"]
    assert "exists already" in run("pack", "run").output
    verified = json.loads(run("verify", "run", "--json").stdout)
    assert verified["layer"] and verified["files"] == sum(
        len(json.loads(path.read_text())["files"]) for path in made.glob("*/manifest.json")
    )
    stages = [stage["stage"] for stage in json.loads(run("status", "run", "--json").stdout)["stages"]]
    assert stages == ["calibrate", "quantize", "finetune", "pack"]


def test_it_is_done_once_and_other_settings_are_refused_by_name(made: Path) -> None:
    run("finetune", "run")
    first = contents(made / "finetuned")
    assert "exists already" in run("finetune", "run").output
    refused = run("finetune", "run", "--steps", "7")
    assert refused.exit_code == 1 and "steps 6 there, 7 asked" in refused.stderr
    assert yaml.safe_load((made / "run.yaml").read_text())["finetune"]["steps"] == 6, "what is refused changes nothing"
    assert contents(made / "finetuned") == first
    assert run("finetune", "run", "--steps", "7", "--overwrite").exit_code == 0
    assert contents(made / "finetuned") != first


@pytest.mark.parametrize("count", [1, 2, 3])
def test_interrupted_it_resumes_to_the_same_bytes(
    made: Path, count: int, interrupted_at: Callable[..., Result]
) -> None:
    shutil.copytree(made, "whole")
    run("finetune", "whole")
    assert interrupted_at("training.safetensors", count, "finetune", "run").exit_code == 130
    result = run("finetune", "run")
    assert result.exit_code == 0, result.output
    assert ("resuming" in result.output) == (count > 1)
    assert contents(Path("run/finetuned")) == contents(Path("whole/finetuned"))
    assert contents(Path("run/packed")) == contents(Path("whole/packed"))


def test_a_quantized_model_that_is_made_again_puts_an_end_to_the_finetuned_one(made: Path) -> None:
    run("finetune", "run")
    assert run("quantize", "--config", "run.yaml", "--out", "run", "--seed", "1", "--overwrite").exit_code == 0
    assert (made / "finetuned").exists()
    made_from = json.loads((made / "packed/manifest.json").read_text())["parents"]["quantized"]
    assert made_from == open_artifact(made / "quantized", "quantized").digest
    stages = json.loads(run("status", "run", "--json").stdout)["stages"]
    assert [one["state"] for one in stages if one["stage"] == "finetune"] == ["made from an earlier quantized model"]
    assert run("finetune", "run").exit_code == 1, "it was made from another quantized model"
    assert run("finetune", "run", "--overwrite").exit_code == 0


def test_what_was_started_resumes_although_other_settings_were_asked_meanwhile(
    made: Path, interrupted_at: Callable[..., Result]
) -> None:
    interrupted_at("training.safetensors", 2, "finetune", "run", "--time-budget", "1s")
    steps = yaml.safe_load((made / "run.yaml").read_text())["finetune"]["steps"]
    for other in (("--time-budget", "2s"), ("--steps", "1")):
        refused = run("finetune", "run", *other)
        assert refused.exit_code == 1 and "finetuned.partial was started with" in refused.stderr
    assert run("quantize", "--config", "run.yaml", "--out", "run").exit_code == 0
    result = run("finetune", "run", "--time-budget", "1s", "--overwrite")
    assert result.exit_code == 0 and "resuming" in result.output, result.output
    assert results(made / "finetuned")["report"]["steps"] == steps


def test_a_calibration_that_is_made_again_is_noticed(made: Path) -> None:
    run("calibrate", "--config", "run.yaml", "--out", "run", "--seed", "5", "--overwrite")
    refused = run("finetune", "run")
    assert refused.exit_code == 1 and "was made from calibration" in refused.stderr


def test_blocks_without_quantized_layers_are_left_alone(run_file: Path) -> None:
    run_file.write_text(run_file.read_text() + FINETUNE)
    run("quantize", "--config", "run.yaml", "--out", "run", "--skip", r"model\.layers\.0\..*")
    told = json.loads(run("finetune", "run", "--json").stdout)["finetune"]
    files = ("block-001", "outside")
    learnt = {name: tensor for file in files for name, tensor in load_file(f"run/finetuned/{file}.safetensors").items()}
    assert not (Path("run/finetuned") / "block-000.safetensors").exists()
    assert told["parameters"] == sum(tensor.numel() for name, tensor in learnt.items() if not name.endswith("codes"))
    assert run("verify", "run").exit_code == 0


def test_the_format_that_was_packed_stays(made: Path) -> None:
    run("pack", "run", "--format", "dense", "--overwrite")
    for _ in range(2):
        told = json.loads(run("finetune", "run", "--json").stdout)
        assert told["pack"]["format"] == "dense"


@pytest.mark.parametrize("family", sorted({**tiny_models.FAMILIES, **tiny_models.WITH_EXPERTS}))
def test_body_and_head_make_the_whole_whatever_the_family_does_to_its_logits(family: str, tmp_path: Path) -> None:
    network = load_network(resolve(str(tiny_models.save(family, tmp_path / "model"))), torch.float32)
    ids = tiny_models.token_ids()
    with torch.no_grad():
        whole = network(input_ids=ids, use_cache=False).logits
        halves = halves_of(network)
        logits = halves.logits(halves.states(ids).flatten(0, 1))
    torch.testing.assert_close(logits, whole.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_a_model_that_bounds_its_logits_learns_too(run_file: Path, tmp_path: Path) -> None:
    bounded = tiny_models.save("gemma2", tmp_path / "bounded")
    run_file.write_text(run_file.read_text() + FINETUNE)
    told = json.loads(run("quantize", str(bounded), "--config", "run.yaml", "--out", "run", "--json").stdout)
    assert told
    told = json.loads(run("finetune", "run", "--steps", "20", "--json").stdout)["finetune"]
    assert told["after"] < told["before"]


def test_codes_learn_where_they_are_asked_to_and_resume_after_an_interruption(
    made: Path, interrupted_at: Callable[..., Result]
) -> None:
    run_file = yaml.safe_load((made / "run.yaml").read_text())
    run_file["finetune"]["codes"] |= {"learning_rate": 0.5, "trust_ratio": None}
    (made / "run.yaml").write_text(yaml.safe_dump(run_file))
    shutil.copytree(made, "whole")
    told = json.loads(run("finetune", "whole", "--codes", "0.1", "--json").stdout)["finetune"]
    before, after = (load_file(f"whole/{name}/block-000.safetensors") for name in ("quantized", "finetuned"))
    moved = sum(int((after[name] != before[name]).any(2).sum()) for name in before if name.endswith("codes"))
    assert 0 < moved <= told["changed"]
    assert interrupted_at("training.safetensors", 2, "finetune", "run", "--codes", "0.1").exit_code == 130
    assert "resuming" in run("finetune", "run", "--codes", "0.1").output
    assert contents(Path("run/finetuned")) == contents(Path("whole/finetuned"))


def test_embeddings_and_head_learn_where_they_are_asked_to(made: Path) -> None:
    told = json.loads(run("finetune", "run", "--embeddings", "--json").stdout)
    learnt = load_file(made / "finetuned/outside.safetensors")
    assert (
        any(tensor.ndim == 2 for tensor in learnt.values()) and told["finetune"]["after"] < told["finetune"]["before"]
    )
    packed = load_file(made / "packed/model.safetensors")
    for name, tensor in learnt.items():
        torch.testing.assert_close(packed[name].float(), tensor, rtol=0, atol=0)
    model = yaml.safe_load((made / "run.yaml").read_text())["model"]
    original = load_network(resolve(model), torch.float32).state_dict()
    assert all(not torch.equal(original[name], tensor) for name, tensor in learnt.items())


@pytest.mark.parametrize("stored", [("model.embed_tokens.weight",), ("model.embed_tokens.weight", "lm_head.weight")])
def test_a_tied_head_learns_with_the_embeddings_however_it_is_stored(
    stored: Sequence[str], run_file: Path, tmp_path: Path
) -> None:
    model = tiny_models.save("llama", tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    tensors |= {name: tensors["model.embed_tokens.weight"].clone() for name in stored}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    run_file.write_text(run_file.read_text() + FINETUNE)
    assert run("quantize", str(model), "--config", "run.yaml", "--out", "run").exit_code == 0
    told = json.loads(run("finetune", "run", "--embeddings", "--json").stdout)["finetune"]
    packed, learnt = (
        load_file(f"run/{name}") for name in ("packed/model.safetensors", "finetuned/outside.safetensors")
    )
    assert all(torch.equal(packed[name].float(), learnt["model.embed_tokens.weight"]) for name in stored)
    network = load_network(resolve("run"), torch.float32)
    assert torch.equal(network.get_output_embeddings().weight, learnt["model.embed_tokens.weight"])
    again = run("finetune", "run", "--out", "new", "--steps", "1", "--data", "notes.txt:20", "--json")
    assert again.exit_code == 0, again.output
    wanted = json.loads(
        run("finetune", "run", "--embeddings", "--data", "notes.txt:20", "--overwrite", "--json").stdout
    )
    assert json.loads(again.stdout)["finetune"]["before"] < wanted["finetune"]["before"], (
        "it begins where the other ended"
    )
    assert told["after"] < told["before"]


def test_a_bias_of_the_head_learns_with_the_embeddings_alone(run_file: Path, tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tiny_models.save("phi", tmp_path / "phi", **small)
    run_file.write_text(run_file.read_text() + FINETUNE)
    assert run("quantize", str(model), "--config", "run.yaml", "--out", "run").exit_code == 0
    for flags, there in (((), False), (("--embeddings", "--overwrite"), True)):
        assert run("finetune", "run", *flags).exit_code == 0
        learnt = load_file("run/finetuned/outside.safetensors")
        assert ("lm_head.bias" in learnt) == there
    assert not torch.equal(learnt["lm_head.bias"], load_file(model / "model.safetensors")["lm_head.bias"].float())


def test_codes_cannot_learn_where_there_are_none(run_file: Path) -> None:
    run_file.write_text(run_file.read_text() + FINETUNE)
    assert (
        run("quantize", "--config", "run.yaml", "--method", "rtn", "--scheme", "int4g8", "--out", "run").exit_code == 0
    )
    assert run("finetune", "run").exit_code == 0
    result = run("finetune", "run", "--codes", "0.1", "--overwrite")
    assert result.exit_code == 2 and "no layer of this run has codes" in result.stderr


def test_computing_blocks_again_changes_nothing(made: Path) -> None:
    shutil.copytree(made, "other")
    for directory, checkpointing in ((made, False), (Path("other"), True)):
        run_file = yaml.safe_load((directory / "run.yaml").read_text())
        run_file["finetune"]["gradient_checkpointing"] = checkpointing
        (directory / "run.yaml").write_text(yaml.safe_dump(run_file))
        run("finetune", str(directory))
    assert contents(made / "finetuned") == contents(Path("other/finetuned"))


def test_a_preset_takes_the_place_of_the_run_s_settings_and_flags_that_of_the_preset_s(made: Path) -> None:
    flags = ("--preset", "pv-tuning", "--batch", "2", "--steps", "1")
    assert run("finetune", "run", *flags).exit_code == 0
    section = yaml.safe_load((made / "run.yaml").read_text())["finetune"]
    assert (section["optimizer"], section["batch"], section["steps"]) == ("lamb", 2, 1)
    assert section["codes"]["trust_ratio"] is None, "null is a value, too"
    assert section["sequence_length"] == 16, "which the preset does not name"
    assert "choose default, fast" in run("finetune", "run", "--preset", "pv").stderr


def test_the_curve_is_drawn_again_where_it_is_missing(made: Path) -> None:
    run("finetune", "run")
    (made / "reports/finetune.png").unlink()
    run("finetune", "run")
    assert (made / "reports/finetune.png").exists()


def test_a_damaged_state_says_what_to_remove(made: Path, interrupted_at: Callable[..., Result]) -> None:
    interrupted_at("training.safetensors", 2, "finetune", "run")
    path = made / "finetuned.partial/work/training.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    refused = run("finetune", "run")
    assert refused.exit_code == 1 and f"{path} is damaged; remove it" in refused.stderr
    path.unlink()
    assert run("finetune", "run").exit_code == 0


def test_a_time_budget_becomes_steps_that_the_run_file_keeps(made: Path, interrupted_at: Callable[..., Result]) -> None:
    interrupted_at("training.safetensors", 1, "finetune", "run", "--time-budget", "1s")
    section = yaml.safe_load((made / "run.yaml").read_text())["finetune"]
    assert section["time_budget"] == "1s" and section["steps"] >= 1
    result = run("finetune", "run", "--time-budget", "1s")
    assert result.exit_code == 0 and "a step takes" not in result.output, "it is not timed again"
    assert results(made / "finetuned")["report"]["steps"] == section["steps"]


def test_timing_leaves_the_model_as_it_was(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "parse_duration", lambda text: 0.0)  # one step, however long it takes
    shutil.copytree(made, "other")
    run("finetune", "run", "--time-budget", "1m")
    run("finetune", "other", "--steps", "1")
    assert results(made / "finetuned")["report"]["steps"] == 1
    assert contents(made / "finetuned") == contents(Path("other/finetuned"))


def test_other_text_can_be_learnt_from(made: Path) -> None:
    told = json.loads(run("finetune", "run", "--data", "notes.txt:10", "--json").stdout)
    assert told["finetune"]["text_tokens"] == 8 * 16
    too_little = run("finetune", "run", "--data", "notes.txt:2", "--overwrite")
    assert too_little.exit_code == 1 and "2 sequences, and 2 are held out" in too_little.stderr


def test_what_does_not_go_together_is_refused(made: Path) -> None:
    assert run("finetune", "run", "--steps", "2", "--time-budget", "1h").exit_code == 2
    assert "--sequences counts sequences of --data" in run("finetune", "run", "--sequences", "9").stderr
    assert "not understood as a time" in run("finetune", "run", "--time-budget", "soon").stderr


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("1 H", 3600)]
)
def test_times_are_read_as_people_write_them(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "2", "h", "-1h", "1.5h", "30m2h", "2 days"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not understood as a time"):
        parse_duration(text)
