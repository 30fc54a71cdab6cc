"""The studies that are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from aqlm_cli.spec.study import load_study

STUDIES = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_names_its_command_and_has_cells_on_one_calibration(path: Path) -> None:
    study = load_study(path)
    assert f"aqlm compare configs/studies/{path.name}" in path.read_text()
    assert len(study.cells) >= 4
    assert len({cell.config.calibrate for cell in study.cells}) == 1
    assert all("ppl" in cell.config.evaluate.kinds for cell in study.cells)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_settings_that_a_study_calls_those_of_the_preset_are(path: Path) -> None:
    preset = yaml.safe_load((path.parents[1] / "fast.yaml").read_text())
    assert "The settings of the preset fast" in path.read_text()
    assert yaml.safe_load(path.read_text())["quantize"] == preset["quantize"]
