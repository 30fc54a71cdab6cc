from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from helpers.commands import refused, run
from safetensors.torch import load_file

from aqlm_cli.runs.files import read_metadata, save_tensors


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and "logs" not in path.parts}


def test_a_run_that_is_as_it_was_written_is_sound(finished_run: Path) -> None:
    before = contents(finished_run)
    result = run("verify", "run", "--json")
    told = json.loads(result.stdout)
    files = [path for path in finished_run.glob("*/*") if path.parent.name in ("calibration", "quantized", "packed")]
    assert told["files"] == len([path for path in files if path.name != "manifest.json"])
    assert told["layer"].startswith("model.layers.")
    assert "next: aqlm eval-ppl run" in result.stderr and "is sound" in result.stderr
    assert contents(finished_run) == before


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("calibration/second_moments.safetensors", "aqlm calibrate --config run/run.yaml --out run --overwrite"),
        ("quantized/block-001.safetensors", "aqlm quantize --config run/run.yaml --out run --overwrite"),
        ("packed/model.safetensors", "aqlm pack run --overwrite"),
        ("packed/tokenizer.json", "aqlm pack run --overwrite"),
    ],
)
def test_one_flipped_bit_is_found_and_what_mends_it_is_named(finished_run: Path, name: str, command: str) -> None:
    content = bytearray((finished_run / name).read_bytes())
    content[-3] ^= 1
    (finished_run / name).write_bytes(content)
    message = refused("verify", "run")
    assert f"run/{name} is damaged" in message and f"`{command}`" in message
    assert run(*command.split()[1:]).exit_code == 0
    if not name.startswith("packed"):
        assert run("quantize", "--config", "run/run.yaml", "--out", "run", "--overwrite").exit_code == 0
    assert run("verify", "run").exit_code == 0


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("calibration", "aqlm calibrate --config run/run.yaml --out run --overwrite"),
        ("quantized", "aqlm quantize --config run/run.yaml --out run --overwrite"),
        ("packed", "aqlm pack run --overwrite"),
    ],
)
def test_an_artifact_without_its_manifest_is_damaged(finished_run: Path, name: str, command: str) -> None:
    (finished_run / name / "manifest.json").unlink()
    told = f"error: run/{name} is damaged (manifest.json is missing); redo it with `{command}`\n"
    assert refused("verify", "run") == told


def test_codes_that_are_not_the_models_are_found_though_every_digest_fits(finished_run: Path) -> None:
    layer = json.loads(run("verify", "run", "--json").stdout)["layer"]
    path = next(path for path in (finished_run / "quantized").glob("block-*") if f"{layer}.codes" in load_file(path))
    tensors, about = load_file(path), read_metadata(path)
    tensors[f"{layer}.codes"] = tensors[f"{layer}.codes"].flip(0)
    save_tensors(path, tensors, about)
    manifest = json.loads((finished_run / "quantized/manifest.json").read_text())
    manifest["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (finished_run / "quantized/manifest.json").write_text(json.dumps(manifest))
    for child in finished_run.glob("packed*/**/*"):
        child.unlink()
    (finished_run / "packed").rmdir()
    message = refused("verify", "run")
    assert message.startswith(f"error: {layer}: quantized again, ") and "aqlm quantize" in message


def test_what_another_machine_quantized_is_not_quantized_again(finished_run: Path) -> None:
    path = finished_run / "quantized/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["results"]["machine"]["products"] = "float8"
    path.write_text(json.dumps(manifest))
    result = run("verify", "run", "--json")
    assert json.loads(result.stdout)["layer"] is None
    assert "another kind of machine" in result.stderr


def test_the_seed_chooses_the_layer_and_the_codes_of_another_seed_are_refused(finished_run: Path) -> None:
    path, layers = finished_run / "run.yaml", set()
    for seed in range(1, 4):
        path.write_text(re.sub(r"seed: \d+", f"seed: {seed}", path.read_text()))
        line = refused("verify", "run")
        assert "quantized again, " in line
        layers.add(line.split(": ")[1])
    assert len(layers) > 1


def test_a_run_without_anything_in_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is not a run directory" in refused("verify", "nothing")
    assert not Path("nothing").exists()
