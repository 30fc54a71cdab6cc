"""Targets of a whole model: the file keeps its size, the scores are kept, resumed and replayed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import refused, run
from typer.testing import Result

from aqlm_cli.pipeline import allocation
from aqlm_cli.spec.choices import HEADER_LINE

TARGET = {
    "among": ["1x4g8", "2x4g8", "2x4g8c8"],
    "tables": ["2x4g8", "2x4g8+int4g32r8", "int4g32"],
    "mixes": 3,
    "sequences": 4,
}


@pytest.fixture
def target(run_file: Path) -> Path:
    settings = yaml.safe_load(run_file.read_text())
    settings["quantize"]["target"] = TARGET
    run_file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return run_file


def safetensors_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("packed/*.safetensors"))


def quantize(size: int, *more: str) -> tuple[str, ...]:
    return "quantize", "--config", "run.yaml", "--target-size", str(size), "--out", "out", *more


LIMIT = 100_000
"""Bytes between those of the model with all layers in their smallest scheme, and in their largest."""


def test_the_file_has_the_size_that_was_asked_for(target: Path) -> None:
    result = run(*quantize(LIMIT, "--json"))
    assert result.exit_code == 0, result.output
    assert 0.9 * LIMIT <= safetensors_bytes(Path("out")) <= LIMIT
    reports = json.loads(result.stdout)
    assert reports["allocate"]["divergence"] > 0


def test_coarser_codebooks_are_scored_by_rounding_those_of_the_search(target: Path) -> None:
    """They cost a little, and save the same bytes in every layer."""
    assert run(*quantize(LIMIT)).exit_code == 0
    for path, layer in scores()["layers"].items():
        options = {option["word"]: option for option in layer["options"]}
        if not layer["table"]:
            fine, coarse = options["aqlm:2x4g8"], options["aqlm:2x4g8c8"]
            assert coarse["effect"] != fine["effect"] and coarse["effect"] == pytest.approx(fine["effect"], rel=0.1)
            saved = 2 * 16 * 8 - 2 * (2 * 8)  # a byte of each entry, less the ranges
            assert fine["bytes"] - coarse["bytes"] == saved - (len(path) + HEADER_LINE)  # of one tensor more


def test_finished_work_is_reused_and_replayed(target: Path) -> None:
    assert run(*quantize(LIMIT)).exit_code == 0
    again = run(*quantize(LIMIT), "--verbose")
    assert again.exit_code == 0 and "allocation exists already" in again.output
    report = json.loads(run("verify", "out", "--json").stdout)
    assert report["replayed"] == len(scores()["layers"])


def test_the_gradients_of_an_allocation_serve_the_quantization(target: Path) -> None:
    assert run(*quantize(LIMIT)).exit_code == 0
    logs = {name: Path(f"out/logs/{name}.jsonl").read_text() for name in ("allocate", "quantize")}
    assert "gradients of the embeddings" in logs["allocate"] and "gradients of the embeddings" not in logs["quantize"]
    table = next(Path("out/quantized").rglob("tables.safetensors")).read_bytes()
    Path("out/allocation/embedding_metric.safetensors").unlink()
    manifest = json.loads(Path("out/allocation/manifest.json").read_text())
    del manifest["files"]["embedding_metric.safetensors"]
    Path("out/allocation/manifest.json").write_text(json.dumps(manifest))
    for stage in "quantized", "packed":
        shutil.rmtree(Path("out") / stage)
    assert run(*quantize(LIMIT)).exit_code == 0
    assert "gradients of the embeddings" in Path("out/logs/quantize.jsonl").read_text()
    assert next(Path("out/quantized").rglob("tables.safetensors")).read_bytes() == table


def scores() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(Path("out/allocation/scores.json").read_text())
    return stored


def test_verify_finds_a_plan_that_its_scores_do_not_give(target: Path) -> None:
    assert run(*quantize(LIMIT)).exit_code == 0
    stored = scores()
    for candidate in stored["candidates"]:
        path, word = next(iter(candidate["choices"].items()))
        candidate["choices"][path] = "aqlm:2x4g8" if word == "16 bits" else "16 bits"
    text = json.dumps(stored).encode()
    Path("out/allocation/scores.json").write_bytes(text)
    manifest = json.loads(Path("out/allocation/manifest.json").read_text())
    manifest["files"]["scores.json"] = {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}
    Path("out/allocation/manifest.json").write_text(json.dumps(manifest))
    for stage in "quantized", "packed":
        shutil.rmtree(Path("out") / stage)
    assert re.search("its scores give model.*, the plan says ", refused("verify", "out"))


@pytest.mark.parametrize(("text", "count"), [("@aqlm-2x4g8", 9), ("mix-", 2)])
def test_an_interrupted_allocation_resumes_to_the_same_bytes(
    target: Path, interrupted_at: Callable[..., Result], text: str, count: int
) -> None:
    assert interrupted_at(text, count, *quantize(LIMIT)).exit_code == 130
    assert not Path("out/allocation").exists()
    assert run(*quantize(LIMIT)).exit_code == 0
    resumed = Path("out/allocation/scores.json").read_bytes()
    shutil.rmtree("out")
    assert run(*quantize(LIMIT)).exit_code == 0
    assert Path("out/allocation/scores.json").read_bytes() == resumed


def test_damaged_measurements_of_an_interrupted_allocation_are_made_again(
    target: Path, interrupted_at: Callable[..., Result]
) -> None:
    assert interrupted_at("mix-", 4, *quantize(LIMIT)).exit_code == 130
    first, second, *_ = sorted(Path("out").rglob("mix-*.json"))
    whole = first.read_bytes(), second.read_bytes()
    first.write_bytes(whole[0][:9])
    second.write_bytes(b'{"divergence": "0.1"}')
    assert interrupted_at("scores.json", 1, *quantize(LIMIT)).exit_code == 130
    assert (first.read_bytes(), second.read_bytes()) == whole


def test_a_matrix_that_is_gone_does_not_count_as_16_bits(target: Path, interrupted_at: Callable[..., Result]) -> None:
    assert interrupted_at("mix-", 1, *quantize(LIMIT)).exit_code == 130
    for file in Path("out").rglob("model.layers.*@*.safetensors"):
        file.unlink()
    assert re.search(r"model\.layers.*safetensors is missing; remove .*work to start again", refused(*quantize(LIMIT)))


def test_a_damaged_record_is_named_with_the_way_out(target: Path) -> None:
    assert run(*quantize(LIMIT)).exit_code == 0
    file, command = Path("out/allocation/scores.json"), ("plan", "--config", "run.yaml", "--out", "out")
    whole = file.read_bytes()
    damaged = {b'"size"': b'"sizd"', b"aqlm:1x4g8": b"aqlm:1x5g8", b'"divergence": 0': b'"divergence":"0', b"{": b"["}
    for before, after in damaged.items():
        file.write_bytes(whole.replace(before, after, 1))
        for args in (*command, "--target-size", str(LIMIT - 5000)), quantize(LIMIT):
            assert re.search(r"scores\.json is damaged \(.*\); redo it with `aqlm .*--overwrite", refused(*args)), (
                before,
                args,
            )


def test_a_plan_for_another_size_is_solved_from_the_scores_of_the_run(target: Path) -> None:
    command = ("plan", "--config", "run.yaml", "--target-size", str(LIMIT), "--out", "out", "--json")
    before = json.loads(run(*command).stdout)["allocation"]
    assert not before["measured"] and before["safetensors_bytes"] <= LIMIT
    assert run(*quantize(LIMIT)).exit_code == 0
    after = json.loads(run(*command).stdout)["allocation"]
    assert after["measured"] and after["safetensors_bytes"] <= LIMIT
    other = json.loads(run(*command[:4], str(LIMIT - 5000), *command[5:]).stdout)["allocation"]
    assert other["measured"] and other["safetensors_bytes"] <= LIMIT - 5000


def test_a_size_that_nothing_keeps_is_refused_before_any_work(target: Path) -> None:
    assert "raise the target" in refused(*quantize(20_000))
    assert not Path("out").exists()


def test_the_least_size_of_all_is_kept_and_one_byte_less_refused(target: Path) -> None:
    line = refused(*quantize(20_000))
    (least,) = map(int, re.findall(r"makes a file of (\d+) bytes, and 20000 \(20000 bytes\)", line))
    assert f"makes a file of {least} bytes, and {least - 1} " in refused(*quantize(least - 1))
    assert run(*quantize(least)).exit_code == 0
    assert safetensors_bytes(Path("out")) == least


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--target-size", "1MB"), "the model keeps the target 1MB in 16 bits; ask for less"),
        (("--target-speed", "1"), "the model keeps the target 1 tokens/s in 16 bits; ask for more"),
        (("--target", "kl=1e-10"), "the model keeps the target KL 1e-10 in 16 bits alone; raise the target"),
    ],
)
def test_a_target_for_16_bits_is_refused_with_the_way_out(target: Path, flags: tuple[str, ...], line: str) -> None:
    assert line in refused("plan", "--config", "run.yaml", *flags)


def test_a_target_is_kept_by_what_rules_quantize(target: Path) -> None:
    """The layers that it decides about all stay in 16 bits then."""
    rule = "--layer", r".*\.(mlp|self_attn)\..*=2x4g8"
    assert run(*quantize(1_000_000, *rule)).exit_code == 0
    words = {word for layer in scores()["candidates"] for word in layer["choices"].values()}
    assert words == {"16 bits"}
    assert run("verify", "out").exit_code == 0


def test_tables_may_be_refined(target: Path) -> None:
    settings = yaml.safe_load(target.read_text())
    settings["quantize"]["target"]["tables"] = ["1x4g8+int4g32r40"]
    target.write_text(yaml.safe_dump(settings))
    assert run(*quantize(50_000)).exit_code == 0
    assert safetensors_bytes(Path("out")) <= 50_000
    layers = json.loads(Path("out/packed/config.json").read_text())["quantization_config"]["layers"]
    chosen = scores()["candidates"][0]["choices"]
    assert {"1x4g8+int4g32r40"} == {layers[path]["scheme"] for path in ("model.embed_tokens", "lm_head")}
    assert chosen["lm_head"] == "aqlm:1x4g8+int4g32r40"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--target-size", "1MB", "--target-bits", "2"), "targets exclude each other"),
        (("--target-size", "1MB", "--bits", "2"), "leave --bits and --scheme out"),
        (("--target", "0.1"), "write kl=NUMBER"),
        (("--target-size", "big"), "is not understood as a size"),
        (("--target-size", "1MB", "--among", "2x8"), "is not understood"),
    ],
)
def test_targets_are_refused_by_name(target: Path, flags: tuple[str, ...], line: str) -> None:
    assert line in refused("quantize", "--config", "run.yaml", "--out", "out", *flags, status=2)


def test_a_divergence_is_kept_at_the_least_size(target: Path) -> None:
    kl = ("--target", "kl=0.15", "--config", "run.yaml", "--out", "out")
    result = run("quantize", *kl, "--json")
    assert result.exit_code == 0, result.output
    stored = scores()
    assert stored["goal"] == {"question": "kl", "limit": 0.15}
    assert json.loads(result.stdout)["allocate"]["divergence"] <= 0.15


def test_a_speed_is_bytes_a_token(target: Path) -> None:
    rate = "100000"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "read_bandwidth", lambda: 100_000 * 150_000.0)
        result = run("quantize", "--target-speed", rate, "--config", "run.yaml", "--out", "out", "--json")
        assert result.exit_code == 0, result.output
    stored = scores()
    assert stored["goal"]["question"] == "speed"
    best = min(stored["candidates"], key=lambda one: one["divergence"])
    options = {(path, one["word"]): one for path, layer in stored["layers"].items() for one in layer["options"]}
    read = sum(options[choice]["read"] for choice in best["choices"].items())
    assert read <= stored["goal"]["limit"] < 150_000
