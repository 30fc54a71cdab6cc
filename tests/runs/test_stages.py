"""The table of stages is the only list of stages."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from aqlm_cli.errors import ArtifactError
from aqlm_cli.pipeline.job import make_job
from aqlm_cli.pipeline.stages.status import status
from aqlm_cli.pipeline.stages.verify import verify
from aqlm_cli.runs import stages
from aqlm_cli.runs.artifact import Artifact
from aqlm_cli.runs.directory import RunDirectory, open_run
from aqlm_cli.runs.files import write_file
from aqlm_cli.runs.stages import CALIBRATE, QUANTIZE, START, StageKey, StageSpec
from aqlm_cli.spec.run_file import build_config

PRUNE = StageSpec(
    name="prune",
    command="aqlm prune {run}",
    directory="pruned",
    kind="quantized",
    sections=("bench",),
    kept_section="pack",
    parents=("calibration",),
    replaces="quantized",
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run in which a stage that is only in the table has made its artifact."""
    after = stages.STAGES.index(QUANTIZE) + 1
    monkeypatch.setattr(stages, "STAGES", (*stages.STAGES[:after], PRUNE, *stages.STAGES[after:]))
    run = open_run(tmp_path / "run", build_config(None, None, {"model": "tiny"}))
    calibration = publish(run, StageKey(CALIBRATE, {}, {}))
    quantized = publish(run, StageKey(QUANTIZE, {}, {"calibration": calibration.digest}))
    publish(run, StageKey(PRUNE, {}, {"calibration": calibration.digest, START: quantized.digest}))
    return run


def publish(run: RunDirectory, key: StageKey, content: bytes = b"codes") -> Artifact:
    with run.stage(key) as stage:
        write_file(stage.directory / "block-000.safetensors", content)
        return stage.publish({})


def test_its_artifact_is_the_newest_of_its_kind(run: RunDirectory) -> None:
    assert run.current("quantized").directory.name == "pruned"
    shutil.rmtree(run.path / "pruned")
    assert run.current("quantized").directory.name == "quantized"


def test_it_is_outdated_when_what_it_replaces_is_rebuilt(run: RunDirectory) -> None:
    publish(run, StageKey(QUANTIZE, {}, run.own(QUANTIZE).manifest.parents), b"other codes")  # type: ignore[union-attr]
    assert run.current("quantized").directory.name == "quantized"


def test_it_is_outdated_when_a_parent_is_rebuilt_and_the_error_names_its_command(run: RunDirectory) -> None:
    publish(run, StageKey(CALIBRATE, {}, {}), b"other text")
    with pytest.raises(ArtifactError, match=rf"pruned was made from calibration .*`aqlm prune {run.path} --overwrite`"):
        run.refuse_outdated(run.own(PRUNE))  # type: ignore[arg-type]


def test_a_damaged_file_of_it_names_its_command(run: RunDirectory) -> None:
    (run.path / "pruned" / "block-000.safetensors").unlink()
    with pytest.raises(ArtifactError, match=f"`aqlm prune {run.path} --overwrite`"):
        run.own(PRUNE)


def test_settings_that_it_depends_on_may_not_change(run: RunDirectory) -> None:
    changed = build_config(None, None, {"model": "tiny", "bench": {"tokens": 3}})
    with pytest.raises(ArtifactError, match=r"bench\.tokens"):
        open_run(run.path, changed)


def test_the_section_that_it_keeps_stays_in_the_run_file(run: RunDirectory) -> None:
    changed = build_config(None, None, {"model": "tiny", "pack": {"format": "dense"}})
    assert open_run(run.path, changed).config.pack.format == "auto"


def test_status_shows_it(run: RunDirectory) -> None:
    assert [stage.stage for stage in status(run.path).stages] == ["calibrate", "quantize", "prune", "pack"]
    publish(run, replace(StageKey(QUANTIZE, {}, {}), settings={"other": 1}))
    states = {stage.stage: stage.state for stage in status(run.path).stages}
    assert states["prune"] not in ("finished", states["pack"])


def test_verify_reads_it(run: RunDirectory) -> None:
    (run.path / "pruned" / "block-000.safetensors").write_bytes(b"c0des")
    with pytest.raises(ArtifactError, match=r"pruned/block-000\.safetensors is damaged"):
        verify(make_job(run.config, run.path))
