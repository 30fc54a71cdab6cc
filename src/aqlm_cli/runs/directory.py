"""The run directory: its settings, and the artifacts that its stages make.

runs/SmolLM2-135M-Instruct-2bit/
    run.yaml                complete settings of the run
    calibration/            an artifact: safetensors files and a manifest.json
    text/                   what finetuning sampled from the original model, where its settings ask for that
    quantized/              the next one; its manifest names the digest of the calibration it came from
    packed.partial/         a stage that is running, or died: its next start wipes it, or goes on from its work/
    lock                    held by the process at work (locking.py)
    reports/                what was measured, as plain JSON
    logs/                   what the screen showed of each stage (journal.py)
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqlm_cli.errors import ArtifactError
from aqlm_cli.runs.artifact import MADE_BY, MANIFEST, WORK, Artifact, Stage, open_artifact, rebuild_command
from aqlm_cli.runs.files import storage_errors, sync_directory, write_file
from aqlm_cli.runs.lock import LOCK, LOGS
from aqlm_cli.spec.config import FinetuneConfig, RunConfig
from aqlm_cli.spec.run_file import build_config, differences, dump_yaml

RUN_FILE = "run.yaml"

BEGUN = "begun.json"
"""In the `work/` of a stage that can go on after an interruption: what it was begun with."""

# Where each kind of artifact lies in a run directory; of several directories of one kind the first complete one counts.
# In the order in which they are made: each is made from earlier ones only.
DIRECTORIES: Mapping[str, tuple[str, ...]] = {
    "calibration": ("calibration",),
    "text": ("text",),
    "quantized": ("finetuned", "quantized"),
    "packed": ("packed",),
}

START = "start"
"""The parent by which a finetuned model names the `quantized/` that it was made from."""


def find_artifact(run_directory: Path, kind: str) -> Path | None:
    """Where the newest complete artifact of this kind lies, its files damaged or not."""
    places = (run_directory / name for name in DIRECTORIES[kind])
    return next((place for place in places if (place / MANIFEST).exists() and not _outlived(place, kind)), None)


def _outlived(place: Path, kind: str) -> bool:
    """Whether it was finetuned from a quantized model that has been made anew since."""
    if place.name != "finetuned":
        return False
    digest = open_artifact(place, kind).manifest.parents.get(START)
    start = place.with_name("quantized")
    return (start / MANIFEST).exists() and open_artifact(start, kind).digest != digest


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

    def own(self, name: str, kind: str) -> Artifact | None:
        """The artifact in the directory of this name, or None if that is not complete."""
        there = (self.path / name / MANIFEST).exists()
        return open_artifact(self.path / name, kind) if there else None

    def current(self, kind: str) -> Artifact:
        """The newest complete artifact, to build on.

        ArtifactError if there is none, or if something it was made from, directly or not, has been made anew since.
        """
        artifact = self.artifact(kind)
        if artifact is None:
            command = MADE_BY[kind].format(run=self.path)
            raise ArtifactError(f"{self.path} has no complete {DIRECTORIES[kind][-1]}/; make it with `{command}`")
        self.refuse_outdated(artifact)
        return artifact

    def refuse_outdated(self, artifact: Artifact) -> None:
        """ArtifactError if something it was made from, directly or not, has been made anew since."""
        kind = artifact.manifest.kind
        for parent in itertools.takewhile(lambda earlier: earlier != kind, DIRECTORIES):
            digest = artifact.manifest.parents.get(parent)
            if digest is not None and self.artifact(parent) and self.current(parent).digest != digest:
                raise ArtifactError(
                    f"{artifact.directory} was made from {parent} {digest[:12]}, which is now "
                    f"{self.current(parent).digest[:12]}; {rebuild_command(artifact.directory, kind)}"
                )

    def reusable(
        self, name: str, kind: str, settings: Mapping[str, Any], parents: Mapping[str, str], overwrite: bool
    ) -> Artifact | None:
        """The one rule for existing work: same settings and parents, reuse; different ones, refuse and name each.

        None means that there is nothing to reuse, or that the user wants it redone.
        """
        artifact = None if overwrite else self.own(name, kind)
        if artifact is None:
            return None
        wanted = _as_json({"settings": dict(settings), "made from": dict(parents)})
        there = {"settings": artifact.manifest.settings, "made from": artifact.manifest.parents}
        found = list(_differences(there, wanted))
        if found:
            raise ArtifactError(f"{artifact.directory} is there with {'; '.join(found)}; add --overwrite to redo it")
        if (artifact.directory / WORK).exists():  # an interruption came just before it was cleared away
            with storage_errors(artifact.directory):
                shutil.rmtree(artifact.directory / WORK)
        return artifact

    def goes_on(
        self,
        name: str,
        settings: Mapping[str, Any],
        parents: Mapping[str, str],
        machine: Mapping[str, str],
        overwrite: bool,
    ) -> bool:
        """Whether an interrupted stage is there that was begun with the same; ArtifactError as of `resumed_stage`."""
        partial, wanted = self.path / f"{name}.partial", _beginning(settings, parents, machine)
        begun = _begun(partial)
        if begun not in (None, wanted) and not overwrite:
            found = "; ".join(_differences(begun, wanted))
            raise ArtifactError(f"{partial} was begun with {found}; add --overwrite to begin anew")
        return bool(begun == wanted)

    def known_settings(self, name: str, overwrite: bool) -> Mapping[str, Any]:
        """Those that an interrupted stage of this name was begun with, or else its artifact was made with; or none."""
        begun = _begun(self.path / f"{name}.partial")
        if begun is not None:
            return dict(begun["settings"])
        there = (self.path / name / MANIFEST).exists() and not overwrite
        return open_artifact(self.path / name, "quantized").manifest.settings if there else {}

    def keep_finetune_settings(self, section: FinetuneConfig) -> None:
        """In run.yaml; all others stay what they are there."""
        write_file(self.file, dump_yaml(self.config.model_copy(update={"finetune": section})).encode())

    @property
    def reports(self) -> Path:
        return self.path / "reports"

    def write_report(self, name: str, content: Mapping[str, Any] | bytes) -> Path:
        """What was measured of the run, as plain JSON or as it is; an earlier report of this name is replaced."""
        with storage_errors(self.reports):
            self.reports.mkdir(exist_ok=True)
        data = content if isinstance(content, bytes) else json.dumps(content, indent=1).encode()
        write_file(self.reports / name, data)
        return self.reports / name

    def read_report(self, name: str) -> dict[str, Any]:
        path = self.reports / name
        try:
            report: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); remove it and measure again") from error
        return report

    @contextlib.contextmanager
    def stage(self, name: str, kind: str, settings: Mapping[str, Any], parents: Mapping[str, str]) -> Iterator[Stage]:
        """Start a stage in an empty `<name>.partial/`. Left without `publish`, the directory stays for inspection."""
        partial = self.path / f"{name}.partial"
        _make_empty(partial)
        yield Stage(partial, self.path / name, kind, settings, parents)

    @contextlib.contextmanager
    def resumed_stage(
        self,
        name: str,
        kind: str,
        settings: Mapping[str, Any],
        parents: Mapping[str, str],
        machine: Mapping[str, str],
        overwrite: bool,
    ) -> Iterator[Stage]:
        """The same, with what an interrupted one has left there; `work/` exists.

        `machine` is what else decides the last bits. ArtifactError, with each difference named, if that was begun with
        other settings, from other parents or on another machine, unless `overwrite` gives it up. What was begun with
        the same goes on in either case.
        """
        partial = self.path / f"{name}.partial"
        stage = Stage(partial, self.path / name, kind, settings, parents)
        goes_on = self.goes_on(name, settings, parents, machine, overwrite)
        with storage_errors(partial):
            if goes_on:
                for half_written in partial.rglob("*.tmp"):
                    half_written.unlink()
            else:
                _make_empty(partial)
                stage.work.mkdir()
                write_file(stage.work / BEGUN, json.dumps(_beginning(settings, parents, machine)).encode())
        yield stage


def _make_empty(partial: Path) -> None:
    with storage_errors(partial):
        if (partial / WORK / BEGUN).exists():  # first of all: nobody shall go on from what is half removed
            (partial / WORK / BEGUN).unlink()
            sync_directory(partial / WORK)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()  # without parents: a run that is gone is not made again without its settings


def _beginning(settings: Mapping[str, Any], parents: Mapping[str, str], machine: Mapping[str, str]) -> Any:
    return _as_json({"settings": dict(settings), "made from": dict(parents), "machine": dict(machine)})


def _begun(partial: Path) -> Any:
    """With what the stage was begun that was interrupted there; None if it left nothing to go on from."""
    try:
        return json.loads((partial / WORK / BEGUN).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{partial / WORK} cannot be read ({error}); remove it to begin anew") from error


def _as_json(value: Any) -> Any:
    """As it comes back from a file: tuples become lists, integer keys become strings."""
    return json.loads(json.dumps(value))


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """Leaves in which two JSON values differ: "settings.scheme 2x8g8 there, 3x8g8 asked"."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted({*there, *here}):
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}" if name else str(key))
    elif there != here:
        yield f"{name} {there} there, {here} asked"


# ------------------------------------------------------------------------------------------------------------ runs

# The sections of run.yaml that shape an artifact of each kind; "" are the settings outside all sections.
_SHAPED_BY: Mapping[str, tuple[str, ...]] = {
    "calibration": ("", "calibrate"),
    "quantized": ("", "calibrate", "quantize"),
}


def is_run(path: Path) -> bool:
    return os.path.isfile(path / RUN_FILE)  # pathlib's raises where a directory on the way cannot be entered


def refuse_other_directory(path: Path) -> None:
    """ArtifactError where `path` is there and neither a run nor the place of one that has just begun."""
    with storage_errors(path):
        if is_run(path) or not path.exists():
            return
        if not path.is_dir() or any(entry.name not in (LOCK, LOGS) for entry in path.iterdir()):
            raise ArtifactError(f"{path} is there and is not a run directory; choose another --out")


def open_run(path: Path, config: RunConfig, overwrite: bool = False) -> RunDirectory:
    """Create the run, or enter the one that is there.

    Settings that shaped an artifact which is there must be the same; otherwise the run is refused, with each
    difference named, unless `overwrite` lets the new settings take the place of the old. What is there is not looked at
    then: it may be damaged.
    """
    if is_run(path) and not overwrite:
        earlier = read_run(path)
        there = [kind for kind in _SHAPED_BY if earlier.artifact(kind) or _begun(path / f"{kind}.partial") is not None]
        sections = {section for kind in there for section in _SHAPED_BY[kind]}
        found = [line for section in sorted(sections) for line in differences(earlier.config, config, section)]
        if found:
            raise ArtifactError(f"{path} is another run: {'; '.join(found)}; choose another --out, or add --overwrite")
        if any((path / name).exists() for name in ("finetuned", "finetuned.partial")):  # those it was made with stay
            config = config.model_copy(update={"finetune": earlier.config.finetune})
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
