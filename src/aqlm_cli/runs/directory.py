"""The run directory: its settings, and the artifacts that its stages make.

runs/SmolLM2-135M-Instruct-2bit/
    run.yaml                complete settings of the run
    calibration/            an artifact: safetensors files and a manifest.json
    allocation/             scores and the scheme of each layer, where the settings have a target
    text/                   text that finetuning sampled from the base model, where its settings ask for that
    quantized/              the next one; its manifest names the digest of the calibration it came from
    packed.partial/         a stage that is running, or was interrupted: its next start wipes it, or resumes from work/
    lock                    held by the running process (lock.py)
    reports/                measurements, as plain JSON
    logs/                   the events of each stage (log.py)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqlm_cli.errors import ArtifactError
from aqlm_cli.runs import stages
from aqlm_cli.runs.artifact import MANIFEST, WORK, Artifact, Stage, open_artifact, rebuild_command
from aqlm_cli.runs.files import storage_errors, sync_directory, write_file
from aqlm_cli.runs.lock import LOCK, LOGS
from aqlm_cli.runs.stages import StageKey, StageSpec
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.run_file import build_config, differences, dump_yaml
from aqlm_cli.spec.section import Section

RUN_FILE = "run.yaml"

BEGUN = "begun.json"
"""File in the `work/` of a stage that can resume: the inputs that it was started with."""


def find_artifact(run_directory: Path, kind: str) -> Path | None:
    """The directory of the newest complete artifact of this kind, its files damaged or not."""
    for stage in stages.stages_of(kind):
        place = run_directory / stage.directory
        if (place / MANIFEST).exists() and not _outdated(place, stage):
            return place
    return None


def _outdated(place: Path, stage: StageSpec) -> bool:
    """True where the artifact that it replaces was rebuilt since."""
    if stage.replaces is None:
        return False
    digest = open_artifact(place, stage.kind).manifest.parents.get(stages.START)
    start = place.with_name(stage.replaces)
    return (start / MANIFEST).exists() and open_artifact(start, stage.kind).digest != digest


@dataclass(frozen=True)
class RunDirectory:
    """One run: its settings and its artifacts. Made by `open_run`."""

    path: Path
    config: RunConfig

    @property
    def file(self) -> Path:
        return self.path / RUN_FILE

    def artifact(self, kind: str) -> Artifact | None:
        """The newest complete artifact of this kind, or None."""
        found = find_artifact(self.path, kind)
        return None if found is None else open_artifact(found, kind)

    def own(self, stage: StageSpec) -> Artifact | None:
        """The artifact that this stage made, or None if it is not complete."""
        place = self.path / stage.directory
        return open_artifact(place, stage.kind) if (place / MANIFEST).exists() else None

    def partial(self, stage: StageSpec) -> Path:
        """The directory of this stage while it runs, or after an interruption."""
        return self.path / f"{stage.directory}.partial"

    def current(self, kind: str) -> Artifact:
        """The newest complete artifact, to build on.

        ArtifactError if there is none, or if something it was made from, directly or not, was rebuilt since.
        """
        artifact = self.artifact(kind)
        if artifact is None:
            stage = stages.stages_of(kind)[-1]
            command = stage.command.format(run=self.path)
            raise ArtifactError(f"{self.path} has no complete {stage.directory}/; make it with `{command}`")
        self.refuse_outdated(artifact)
        return artifact

    def refuse_outdated(self, artifact: Artifact) -> None:
        """ArtifactError if something it was made from, directly or not, was rebuilt since."""
        kind = artifact.manifest.kind
        for parent in stages.stage_at(artifact.directory, kind).parents:
            digest = artifact.manifest.parents.get(parent)
            if digest is not None and self.artifact(parent) and self.current(parent).digest != digest:
                raise ArtifactError(
                    f"{artifact.directory} was made from {parent} {digest[:12]}, which is now "
                    f"{self.current(parent).digest[:12]}; {rebuild_command(artifact.directory, kind)}"
                )

    def reusable(self, key: StageKey) -> Artifact | None:
        """The one rule for existing work: same settings and parents, reuse; different ones, refuse and name each.

        None: nothing to reuse, or the user wants it redone.
        """
        artifact = None if key.overwrite else self.own(key.stage)
        if artifact is None:
            return None
        wanted = _as_json({"settings": dict(key.settings), "made from": dict(key.parents)})
        existing = {"settings": artifact.manifest.settings, "made from": artifact.manifest.parents}
        differing = list(_differences(existing, wanted))
        if differing:
            raise ArtifactError(f"{artifact.directory} exists with {'; '.join(differing)}; add --overwrite to redo it")
        if (artifact.directory / WORK).exists():  # an interruption came just before it was cleared away
            with storage_errors(artifact.directory):
                shutil.rmtree(artifact.directory / WORK)
        return artifact

    def resumes(self, key: StageKey) -> bool:
        """True where an interrupted stage was started with the same key; ArtifactError as of `resumed_stage`."""
        partial, wanted = self.partial(key.stage), _beginning(key)
        begun = _begun(partial)
        if begun not in (None, wanted) and not key.overwrite:
            differing = "; ".join(_differences(begun, wanted))
            raise ArtifactError(f"{partial} was started with {differing}; add --overwrite to start again")
        return bool(begun == wanted)

    def known_settings(self, stage: StageSpec, overwrite: bool) -> Mapping[str, Any]:
        """The settings with which an interrupted stage was started, or else its artifact was made; or none."""
        begun = _begun(self.partial(stage))
        if begun is not None:
            return dict(begun["settings"])
        artifact = None if overwrite else self.own(stage)
        return {} if artifact is None else artifact.manifest.settings

    def keep_section(self, name: str, section: Section) -> None:
        """Write one section to run.yaml; all others stay what they are there."""
        write_file(self.file, dump_yaml(self.config.model_copy(update={name: section})).encode())

    @property
    def reports(self) -> Path:
        return self.path / "reports"

    def write_report(self, name: str, content: Mapping[str, Any] | bytes) -> Path:
        """Write a measurement of the run, as plain JSON or as it is; an earlier report of this name is replaced."""
        with storage_errors(self.reports):
            self.reports.mkdir(exist_ok=True)
        data = content if isinstance(content, bytes) else json.dumps(content, indent=1).encode()
        write_file(self.reports / name, data)
        return self.reports / name

    def read_report(self, name: str) -> dict[str, Any]:
        path = self.reports / name
        try:
            report = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); remove it and measure again") from error
        if not isinstance(report, dict):
            raise ArtifactError(f"{path} is no report: it holds no names and values; remove it and measure again")
        return report

    @contextlib.contextmanager
    def stage(self, key: StageKey) -> Iterator[Stage]:
        """Start a stage in an empty `<name>.partial/`. Left without `publish`, the directory stays for inspection."""
        partial = self.partial(key.stage)
        _make_empty(partial)
        yield Stage(partial, self.path / key.stage.directory, key)

    @contextlib.contextmanager
    def resumed_stage(self, key: StageKey) -> Iterator[Stage]:
        """The same, with what an interrupted one has left there; `work/` exists.

        ArtifactError, with each difference named, if that was started with other settings, from other parents or on
        another machine, unless `overwrite` gives it up. What was started with the same key resumes in either case.
        """
        partial = self.partial(key.stage)
        stage = Stage(partial, self.path / key.stage.directory, key)
        resumes = self.resumes(key)
        with storage_errors(partial):
            if resumes:
                for half_written in partial.rglob("*.tmp"):
                    half_written.unlink()
            else:
                _make_empty(partial)
                stage.work.mkdir()
                write_file(stage.work / BEGUN, json.dumps(_beginning(key)).encode())
        yield stage


def _make_empty(partial: Path) -> None:
    with storage_errors(partial):
        if (partial / WORK / BEGUN).exists():  # first of all: nobody shall resume from what is half removed
            (partial / WORK / BEGUN).unlink()
            sync_directory(partial / WORK)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()  # without parents: a run that was removed is not made again without its settings


def _beginning(key: StageKey) -> Any:
    return _as_json({"settings": dict(key.settings), "made from": dict(key.parents), "machine": dict(key.machine)})


def _begun(partial: Path) -> Any:
    """Inputs of the interrupted stage, or None."""
    try:
        return json.loads((partial / WORK / BEGUN).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{partial / WORK} cannot be read ({error}); remove it to start again") from error


def _as_json(value: Any) -> Any:
    """The value as it comes back from a file: tuples become lists, integer keys become strings."""
    return json.loads(json.dumps(value))


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """The leaves in which two JSON values differ: "settings.scheme 2x8g8 there, 3x8g8 asked"."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted({*there, *here}):
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}" if name else str(key))
    elif there != here:
        yield f"{name} {there} there, {here} asked"


# ------------------------------------------------------------------------------------------------------------ runs


def is_run(path: Path) -> bool:
    return os.path.isfile(path / RUN_FILE)  # pathlib's raises where a directory on the way cannot be entered


def refuse_other_directory(path: Path) -> None:
    """ArtifactError where `path` exists and is neither a run nor the place of one that has just started."""
    with storage_errors(path):
        if is_run(path) or not path.exists():
            return
        if not path.is_dir() or any(entry.name not in (LOCK, LOGS) for entry in path.iterdir()):
            raise ArtifactError(f"{path} exists and is not a run directory; choose another --out")


def open_run(path: Path, config: RunConfig, overwrite: bool = False) -> RunDirectory:
    """Create the run, or enter the existing one.

    Settings on which an existing artifact depends must be the same; otherwise the run is refused, with each
    difference named, unless `overwrite` lets the new settings take the place of the old. Existing artifacts are not
    opened then: they may be damaged.
    """
    if is_run(path) and not overwrite:
        earlier = read_run(path)
        started = [
            stage
            for stage in stages.STAGES
            if stage.sections and (earlier.artifact(stage.kind) or _begun(earlier.partial(stage)) is not None)
        ]
        sections = {section for stage in started for section in stage.sections}
        differing = [line for section in sorted(sections) for line in differences(earlier.config, config, section)]
        if differing:
            line = "; ".join(differing)
            raise ArtifactError(f"{path} is another run: {line}; choose another --out, or add --overwrite")
        for stage in stages.STAGES:
            if stage.kept_section and ((path / stage.directory).exists() or earlier.partial(stage).exists()):
                kept = getattr(earlier.config, stage.kept_section)
                config = config.model_copy(update={stage.kept_section: kept})
    refuse_other_directory(path)
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    write_file(path / RUN_FILE, dump_yaml(config).encode())
    return RunDirectory(path, config)


def read_run(path: Path) -> RunDirectory:
    """Enter an existing run with the settings it was made with."""
    if not is_run(path):
        raise ArtifactError(
            f"{path} is not a run directory, {RUN_FILE} is missing; make one with `aqlm quantize MODEL`"
        )
    return RunDirectory(path, build_config(None, path / RUN_FILE, {}))
