from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aqlm_cli.errors import ArtifactError, StorageError
from aqlm_cli.runs.artifact import Artifact, Manifest, open_artifact
from aqlm_cli.runs.directory import RunDirectory, is_run, open_run, read_run
from aqlm_cli.runs.files import write_file
from aqlm_cli.runs.stages import QUANTIZE, StageKey, stages_of
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.run_file import build_config

SETTINGS = {"scheme": "2x8g8", "skip": ("lm_head",)}
PARENTS = {"model": "sha256:abc"}
KEY = StageKey(QUANTIZE, SETTINGS, PARENTS)


def config(**flags: Any) -> RunConfig:
    return build_config(None, None, {"model": "tiny", **flags})


def publish(run: RunDirectory, text: str = "codes", kind: str = "quantized", **results: Any) -> Artifact:
    with run.stage(StageKey(stages_of(kind)[-1], SETTINGS, PARENTS)) as stage:
        write_file(stage.directory / "block-000.safetensors", text.encode())
        return stage.publish(results)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return open_run(tmp_path / "run", config())


# --------------------------------------------------------------------------------------------------------- publishing


def test_a_stage_is_seen_only_when_it_is_published(run: RunDirectory) -> None:
    with run.stage(KEY) as stage:
        write_file(stage.directory / "block-000.safetensors", b"codes")
        assert run.artifact("quantized") is None
        stage.publish({"loss": 1.5})
    found = run.artifact("quantized")
    assert found is not None
    assert found.path("block-000.safetensors").read_bytes() == b"codes"
    assert found.manifest.results == {"loss": 1.5}
    assert sorted(path.name for path in run.path.iterdir()) == ["quantized", "run.yaml"]


def test_a_stage_that_dies_leaves_its_work_and_the_next_start_wipes_it(run: RunDirectory) -> None:
    with pytest.raises(RuntimeError), run.stage(KEY) as stage:
        write_file(stage.directory / "stale", b"")
        raise RuntimeError
    assert (run.path / "quantized.partial" / "stale").exists()
    assert run.artifact("quantized") is None
    assert publish(run).manifest.files.keys() == {"block-000.safetensors"}


def test_a_new_artifact_takes_the_place_of_the_old(run: RunDirectory) -> None:
    publish(run, "old")
    publish(run, "new")
    found = run.artifact("quantized")
    assert found is not None
    assert found.path("block-000.safetensors").read_bytes() == b"new"
    assert not list(run.path.glob("*.old"))


# The file and its directory are synced, then the manifest and its, then the run's directory.
@pytest.mark.parametrize("successes", range(4))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_at_any_write_publishes_nothing(
    run: RunDirectory, fail_disk: Callable[[int, int], None], code: int, successes: int
) -> None:
    publish(run, "old")
    fail_disk(code, successes)
    with pytest.raises(StorageError):
        publish(run, "new")
    found = run.artifact("quantized")
    assert found is not None
    assert found.path("block-000.safetensors").read_bytes() == b"old"


def test_what_a_crash_left_beside_an_artifact_does_not_stop_the_next_stage(run: RunDirectory) -> None:
    publish(run, "old")
    (run.path / "quantized.old").mkdir()
    (run.path / "quantized.old" / "block-000.safetensors").write_bytes(b"older")
    assert publish(run, "new").path("block-000.safetensors").read_bytes() == b"new"
    assert not (run.path / "quantized.old").exists()


def test_the_digest_tells_contents_settings_and_parents_apart_but_not_measurements(run: RunDirectory) -> None:
    first = publish(run, seconds=1.0)
    assert publish(run, seconds=2.0).digest == first.digest
    assert publish(run, "other", seconds=1.0).digest != first.digest
    changed = [{"settings": {"scheme": "3x8g8"}}, {"parents": {"model": "sha256:def"}}, {"kind": "packed"}]
    assert len({first.manifest.model_copy(update=change).digest for change in [*changed, {}]}) == 4


def test_an_artifact_opened_again_has_the_same_digest(run: RunDirectory) -> None:
    assert open_artifact(publish(run).directory, "quantized").digest == publish(run).digest


# ------------------------------------------------------------------------------------------------------------ opening


def rewrite(artifact: Artifact, **changes: Any) -> None:
    path = artifact.directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret", "link/secret"])
def test_a_name_that_leads_out_of_the_directory_is_refused(run: RunDirectory, name: str) -> None:
    artifact = publish(run)
    (run.path / "secret").write_bytes(b"12345")
    (artifact.directory / "link").symlink_to(run.path)
    rewrite(artifact, files={name: {"sha256": "0", "bytes": 5}})
    with pytest.raises(ArtifactError, match="outside"):
        open_artifact(artifact.directory, "quantized")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800"], ids=["NUL", "long", "no text"])
def test_a_name_that_no_file_can_have_is_refused(run: RunDirectory, name: str) -> None:
    artifact = publish(run)
    rewrite(artifact, files={name: {"sha256": "0", "bytes": 5}})
    with pytest.raises(ArtifactError, match="which is no file name"):
        open_artifact(artifact.directory, "quantized")


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_file_that_is_missing_or_cut_is_named(run: RunDirectory, damage: str) -> None:
    artifact = publish(run)
    path = artifact.path("block-000.safetensors")
    path.unlink() if damage == "missing" else path.write_bytes(b"c")
    with pytest.raises(ArtifactError, match=r"block-000\.safetensors"):
        run.artifact("quantized")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"kind": "calibration"}, "holds a calibration artifact"),
        ({"strange": 1}, "not a manifest"),
        ({"files": 7}, "not a manifest"),
    ],
)
def test_a_manifest_of_another_kind_or_version_is_one_line(
    run: RunDirectory, changes: dict[str, Any], words: str
) -> None:
    rewrite(publish(run), **changes)
    with pytest.raises(ArtifactError, match=words) as caught:
        run.artifact("quantized")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_manifest_that_is_no_json_object_is_one_line(run: RunDirectory, text: str) -> None:
    (publish(run).directory / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="not a manifest"):
        run.artifact("quantized")


def test_a_manifest_of_lists_in_lists_is_one_line(run: RunDirectory) -> None:
    path = publish(run).directory / "manifest.json"
    path.write_text(path.read_text().replace('"2x8g8"', "[" * 100_000 + "]" * 100_000))
    with pytest.raises(ArtifactError, match="not a manifest"):
        run.artifact("quantized")


def test_artifacts_that_name_each_other_as_parents_are_not_followed_in_a_circle(run: RunDirectory) -> None:
    rewrite(publish(run, kind="calibration"), parents={"quantized": "0", "calibration": "0"})
    rewrite(publish(run, kind="quantized"), parents={"quantized": "0", "packed": "0"})
    assert run.current("calibration").manifest.kind == "calibration"
    assert run.current("quantized").manifest.kind == "quantized"


def test_a_file_that_no_manifest_lists_cannot_be_asked_for(run: RunDirectory) -> None:
    with pytest.raises(ArtifactError, match=r"no block-007\.safetensors"):
        publish(run).path("block-007.safetensors")


def test_a_manifest_reads_back_the_same(run: RunDirectory) -> None:
    artifact = publish(run, loss=1.5)
    stored = json.loads((artifact.directory / "manifest.json").read_text())
    assert Manifest.model_validate(stored).digest == artifact.digest


# ---------------------------------------------------------------------------------------- the rule for existing work


def test_the_same_settings_and_parents_are_reused(run: RunDirectory) -> None:
    artifact = publish(run)
    assert run.reusable(KEY) == run.artifact("quantized")
    assert artifact.digest == publish(run).digest


def test_other_settings_or_parents_are_refused_with_each_difference(run: RunDirectory) -> None:
    publish(run)
    with pytest.raises(ArtifactError) as caught:
        changed = {**SETTINGS, "scheme": "3x8g8"}
        run.reusable(StageKey(QUANTIZE, changed, {"model": "sha256:def"}))
    assert "settings.scheme 2x8g8 there, 3x8g8 asked" in str(caught.value)
    assert "made from.model sha256:abc there, sha256:def asked" in str(caught.value)
    assert "--overwrite" in str(caught.value)


def test_overwrite_and_an_empty_run_leave_nothing_to_reuse(run: RunDirectory) -> None:
    assert run.reusable(KEY) is None
    publish(run)
    assert run.reusable(replace(KEY, overwrite=True)) is None


def test_what_was_made_from_something_that_is_made_again_is_not_built_on(run: RunDirectory) -> None:
    def publish_from(kind: str, parents: dict[str, str], text: str = "codes") -> str:
        with run.stage(StageKey(stages_of(kind)[-1], {}, parents)) as stage:
            write_file(stage.directory / "file", text.encode())
            return stage.publish({}).digest

    calibration = publish_from("calibration", {"model": "sha256:abc"})
    quantized = publish_from("quantized", {"model": "sha256:abc", "calibration": calibration})
    packed = publish_from("packed", {"quantized": quantized})
    assert run.current("packed").digest == packed
    publish_from("calibration", {"model": "sha256:abc"}, "other text")
    with pytest.raises(ArtifactError, match=f"quantized was made from calibration {calibration[:12]}, which is now"):
        run.current("packed")
    assert publish_from("calibration", {"model": "sha256:abc"}) == calibration
    publish_from("quantized", {"model": "sha256:abc", "calibration": calibration}, "other codes")
    with pytest.raises(ArtifactError, match=f"aqlm pack {run.path} --overwrite"):
        run.current("packed")


def test_a_run_of_another_model_or_scheme_is_refused_with_each_difference(run: RunDirectory) -> None:
    publish(run)
    other = config(model="other", quantize={"scheme": "3x8g8"})
    with pytest.raises(ArtifactError) as caught:
        open_run(run.path, other)
    assert "model: tiny there, other here" in str(caught.value)
    assert "quantize.scheme: 2x8g8 there, 3x8g8 here" in str(caught.value)
    assert read_run(run.path).config == run.config
    assert open_run(run.path, other, overwrite=True).config == other


def test_settings_that_no_finished_stage_depends_on_may_change(run: RunDirectory) -> None:
    publish(run, kind="calibration")
    changed = config(threads=1, quantize={"scheme": "3x8g8"}, eval_ppl={"sequence_length": 64})
    open_run(run.path, changed)
    assert read_run(run.path).config == changed
    with pytest.raises(ArtifactError, match=r"calibrate\.data"):
        open_run(run.path, config(calibrate={"data": "builtin"}))


def test_a_directory_of_something_else_is_never_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert not is_run(tmp_path)
    with pytest.raises(ArtifactError, match="not a run directory"):
        open_run(tmp_path, config(), overwrite=True)
    with pytest.raises(ArtifactError, match=r"run\.yaml"):
        read_run(tmp_path)


def test_a_read_only_output_is_one_line(tmp_path: Path, fail_disk: Callable[[int, int], None]) -> None:
    fail_disk(errno.EROFS, 0)
    with pytest.raises(StorageError, match="read-only"):
        open_run(tmp_path / "run", config())
