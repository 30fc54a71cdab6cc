from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from helpers.commands import refused, run
from safetensors.torch import load_file

from aqlm_cli.runs.files import read_metadata, save_tensors


@pytest.fixture
def made(run_file: Path) -> Path:
    assert run("quantize", "--config", "run.yaml", "--out", "run").exit_code == 0
    return Path("run")


def test_a_run_that_is_as_it_was_written_is_sound(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file() and "logs" not in path.parts}
    result = run("verify", "run", "--json")
    told = json.loads(result.stdout)
    files = [path for path in made.glob("*/*") if path.parent.name in ("calibration", "quantized", "packed")]
    assert told["files"] == len([path for path in files if path.name != "manifest.json"])
    assert told["layer"].startswith("model.layers.")
    assert "next: aqlm eval-ppl run" in result.stderr and "is sound" in result.stderr
    after = {path: path.read_bytes() for path in made.rglob("*") if path.is_file() and "logs" not in path.parts}
    assert after == before


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("calibration/second_moments.safetensors", "aqlm calibrate --config run/run.yaml --out run --overwrite"),
        ("quantized/block-001.safetensors", "aqlm quantize --config run/run.yaml --out run --overwrite"),
        ("packed/model.safetensors", "aqlm pack run --overwrite"),
        ("packed/tokenizer.json", "aqlm pack run --overwrite"),
    ],
)
def test_one_flipped_bit_is_found_and_what_mends_it_is_named(made: Path, name: str, command: str) -> None:
    content = bytearray((made / name).read_bytes())
    content[-3] ^= 1
    (made / name).write_bytes(content)
    message = refused("verify", "run")
    assert f"run/{name} is damaged" in message and f"`{command}`" in message
    assert run(*command.split()[1:]).exit_code == 0
    if not name.startswith("packed"):
        assert run("quantize", "--config", "run/run.yaml", "--out", "run", "--overwrite").exit_code == 0
    assert run("verify", "run").exit_code == 0


def test_codes_that_are_not_the_models_are_found_though_every_digest_fits(made: Path) -> None:
    layer = json.loads(run("verify", "run", "--json").stdout)["layer"]
    path = next(path for path in (made / "quantized").glob("block-*") if f"{layer}.codes" in load_file(path))
    tensors, about = load_file(path), read_metadata(path)
    tensors[f"{layer}.codes"] = tensors[f"{layer}.codes"].flip(0)
    save_tensors(path, tensors, about)
    manifest = json.loads((made / "quantized/manifest.json").read_text())
    manifest["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (made / "quantized/manifest.json").write_text(json.dumps(manifest))
    for child in made.glob("packed*/**/*"):
        child.unlink()
    (made / "packed").rmdir()
    message = refused("verify", "run")
    assert message.startswith(f"error: {layer}: quantized again, ") and "aqlm quantize" in message


def test_what_another_machine_quantized_is_not_quantized_again(made: Path) -> None:
    path = made / "quantized/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["results"]["machine"]["products"] = "float8"
    path.write_text(json.dumps(manifest))
    result = run("verify", "run", "--json")
    assert json.loads(result.stdout)["layer"] is None
    assert "another kind of machine" in result.stderr


def test_the_layer_is_chosen_by_the_seed(made: Path) -> None:
    layers = set()
    for seed in range(3):
        run("quantize", "--config", "run.yaml", "--seed", str(seed), "--out", f"run-{seed}")
        layers.add(json.loads(run("verify", f"run-{seed}", "--json").stdout)["layer"])
    assert len(layers) > 1


def test_a_run_without_anything_in_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is not a run directory" in refused("verify", "nothing")
    assert not Path("nothing").exists()
