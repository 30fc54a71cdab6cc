"""The studies that are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from aqlm_cli.spec.study import load_study

STUDIES = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_names_its_command_and_has_cells_on_one_calibration(path: Path) -> None:
    study = load_study(path)
    assert f"aqlm compare configs/studies/{path.name}" in path.read_text()
    assert len(study.cells) >= 4
    assert len({cell.config.calibrate for cell in study.cells}) == 1
    assert all("ppl" in cell.config.evaluate.kinds for cell in study.cells)
