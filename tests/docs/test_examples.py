"""Every example runs, on a tiny packed model."""

from __future__ import annotations

import importlib.util
import re
import types
from pathlib import Path

import numba
import pytest
from helpers import commands, pages


def _example(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, pages.ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        commands.save_run_file(directory)
        result = commands.run("quantize", "--config", "run.yaml", "--out", "run")
    assert result.exit_code == 0, result.output
    return directory / "run" / "packed"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example writes into the working directory and sets a variable of the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")


def test_packed_model_gives_the_same_logits_in_stock_transformers(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numba.set_num_threads(1)  # which Numba, loaded by now, reads no more
    _example("load_in_transformers").main(str(packed))
    difference = re.search(r"relative difference of the logits: (\S+)", capsys.readouterr().out)
    assert difference is not None and float(difference[1]) < 1e-5


def test_lora_learns_on_a_packed_model(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (packed / "model.safetensors").read_bytes()
    _example("lora").main(str(packed), 5)
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert Path("lora-adapter/adapter_model.safetensors").exists()
    assert (packed / "model.safetensors").read_bytes() == before
