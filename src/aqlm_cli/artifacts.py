"""The run directory: artifacts, their manifests, and how a stage publishes.

    runs/SmolLM2-135M-Instruct-2bit/
        run.yaml                complete settings of the run
        calibration/            an artifact: safetensors files and a manifest.json
        quantized/              the next one; its manifest names the digest of the calibration it came from
        packed.partial/         a stage that is running, or died: its next start wipes it, or goes on from its work/
        lock                    held by the process at work (locking.py)
        reports/                what was measured, as plain JSON
        logs/                   what the screen showed of each stage (journal.py)

A stage is published whole or not at all: it works in `<name>.partial/`, its manifest is written last, after the
digests of all files are known, and one rename makes the directory visible. So a directory with a manifest is complete,
and a crash leaves the previous one in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict

from aqlm_cli.config import RunConfig, build_config, differences, dump_yaml
from aqlm_cli.errors import ArtifactError
from aqlm_cli.locking import LOCK, LOGS
from aqlm_cli.storage import digest_file, storage_errors, sync_directory, write_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
RUN_FILE = "run.yaml"
WORK, BEGUN = "work", "begun.json"
"""What a stage needs to go on after an interruption lies in `work/`, beside what it was begun with; never published."""

# Where each kind of artifact lies in a run directory; of several directories of one kind the first complete one counts.
DIRECTORIES: Mapping[str, tuple[str, ...]] = {
    "calibration": ("calibration",),
    "quantized": ("quantized",),
    "packed": ("packed",),
}

MADE_BY: Mapping[str, str] = {
    "calibration": "aqlm calibrate --config {run}/run.yaml --out {run}",
    "quantized": "aqlm quantize --config {run}/run.yaml --out {run}",
    "packed": "aqlm pack {run}",
}
"""The command that makes an artifact of each kind in a run."""

# ------------------------------------------------------------------------------------------------------ manifests


class FileRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """What an artifact is and where it came from.

    `settings` is the part of the run file that shaped it, `parents` maps each kind it was made from to that parent's
    digest (for the model: its identity), `files` lists every file beside the manifest, `results` what was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    kind: str
    settings: dict[str, Any]
    parents: dict[str, str]
    files: dict[str, FileRecord]
    results: dict[str, Any]

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of all but `results`.

        Results hold times, which differ between two runs that wrote the same bytes; those must have one digest.
        """
        text = json.dumps(self.model_dump(exclude={"results"}), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A complete directory; only `open_artifact` and `Stage.publish` make one."""

    directory: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def path(self, name: str) -> Path:
        """A file that the manifest lists."""
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.directory} holds no {name}; rerun the stage that wrote it with --overwrite")
        return self.directory / name


def open_artifact(directory: Path, kind: str) -> Artifact:
    """Check version, kind, and that every file is there, inside the directory, and of its recorded size.

    Not covered: the digests of the files, which would mean reading all of them.
    """
    path = directory / MANIFEST
    try:
        found = json.loads(path.read_bytes())
        version = found.get("format_version")
        if version != FORMAT_VERSION:
            raise ArtifactError(f"{path} has format version {version}, this aqlm reads {FORMAT_VERSION}; update aqlm")
        manifest = Manifest.model_validate(found)
    except FileNotFoundError:
        raise ArtifactError(f"{directory} is not a complete artifact, {MANIFEST} is missing") from None
    except (OSError, ValueError, AttributeError) as error:  # pydantic's ValidationError is a ValueError
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path} is not a manifest ({reason}); redo its stage with --overwrite") from error
    if manifest.kind != kind:
        raise ArtifactError(f"{directory} holds a {manifest.kind} artifact, not a {kind} one")
    for name, record in manifest.files.items():
        _check_file(directory, name, record)
    return Artifact(directory, manifest)


def _check_file(directory: Path, name: str, record: FileRecord) -> None:
    """A manifest comes from disk and may come from a stranger: its names must not lead out of its directory."""
    relative = PurePosixPath(name)
    inside = not relative.is_absolute() and ".." not in relative.parts and "\\" not in name
    if not inside or not (directory / name).resolve().is_relative_to(directory.resolve()):
        raise ArtifactError(f"{directory / MANIFEST} names {name}, which lies outside {directory}; do not use it")
    size = (directory / name).stat().st_size if (directory / name).is_file() else None
    if size != record.bytes:
        found = "is missing" if size is None else f"has {size} bytes, not {record.bytes}"
        raise ArtifactError(f"{directory / name} {found}; redo its stage with --overwrite")


# ---------------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Stage:
    """A stage at work. What it writes into `directory` is nobody's business until `publish`."""

    directory: Path
    published: Path
    kind: str
    settings: Mapping[str, Any]
    parents: Mapping[str, str]

    @property
    def work(self) -> Path:
        return self.directory / WORK

    def publish(self, results: Mapping[str, Any]) -> Artifact:
        """Write the manifest and rename the directory to its name, in place of the artifact that was there."""
        with storage_errors(self.directory):
            (self.directory / MANIFEST).unlink(missing_ok=True)  # of a publication that was interrupted
            files = {
                path.relative_to(self.directory).as_posix(): FileRecord(
                    sha256=digest_file(path), bytes=path.stat().st_size
                )
                for path in sorted(self.directory.rglob("*"))
                if path.is_file() and not path.is_relative_to(self.work)
            }
        manifest = Manifest(
            kind=self.kind, settings=dict(self.settings), parents=dict(self.parents), files=files, results=dict(results)
        )
        text = json.dumps(manifest.model_dump(), indent=1, sort_keys=True)
        write_file(self.directory / MANIFEST, text.encode())
        replaced = self.published.with_name(self.published.name + ".old")
        with storage_errors(self.published):
            if replaced.exists():  # left there by a crash
                shutil.rmtree(replaced)
            if self.published.exists():
                os.replace(self.published, replaced)
            os.replace(self.directory, self.published)
            sync_directory(self.published.parent)
            if replaced.exists():
                shutil.rmtree(replaced)
            if (self.published / WORK).exists():
                shutil.rmtree(self.published / WORK)
        return Artifact(self.published, manifest)


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
        for name in DIRECTORIES[kind]:
            if (self.path / name / MANIFEST).exists():
                return open_artifact(self.path / name, kind)
        return None

    def current(self, kind: str) -> Artifact:
        """The newest complete artifact, to build on.

        ArtifactError if there is none, or if something it was made from, directly or not, has been made anew since.
        """
        artifact, command = self.artifact(kind), MADE_BY[kind].format(run=self.path)
        if artifact is None:
            raise ArtifactError(f"{self.path} has no complete {DIRECTORIES[kind][0]}/; make it with `{command}`")
        for parent, digest in artifact.manifest.parents.items():
            if parent in DIRECTORIES and self.artifact(parent) and self.current(parent).digest != digest:
                raise ArtifactError(
                    f"{artifact.directory} was made from {parent} {digest[:12]}, which is now "
                    f"{self.current(parent).digest[:12]}; redo it with `{command} --overwrite`"
                )
        return artifact

    def reusable(
        self, kind: str, settings: Mapping[str, Any], parents: Mapping[str, str], overwrite: bool
    ) -> Artifact | None:
        """The one rule for existing work: same settings and parents, reuse; different ones, refuse and name each.

        None means that there is nothing to reuse, or that the user wants it redone.
        """
        artifact = None if overwrite else self.artifact(kind)
        if artifact is None:
            return None
        wanted = _as_json({"settings": dict(settings), "made from": dict(parents)})
        there = {"settings": artifact.manifest.settings, "made from": artifact.manifest.parents}
        found = list(_differences(there, wanted))
        if found:
            raise ArtifactError(f"{artifact.directory} is there with {'; '.join(found)}; add --overwrite to redo it")
        if (artifact.directory / WORK).exists():  # an interruption came just before it was cleared away
            shutil.rmtree(artifact.directory / WORK)
        return artifact

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

    @contextlib.contextmanager
    def stage(self, name: str, kind: str, settings: Mapping[str, Any], parents: Mapping[str, str]) -> Iterator[Stage]:
        """Start a stage in an empty `<name>.partial/`. Left without `publish`, the directory stays for inspection."""
        partial = self.path / f"{name}.partial"
        with storage_errors(partial):
            if (partial / WORK / BEGUN).exists():  # first of all: nobody shall go on from what is half removed
                (partial / WORK / BEGUN).unlink()
                sync_directory(partial / WORK)
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
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
        other settings, from other parents or on another machine, unless
        `overwrite` gives it up. What was begun with the same goes on in either case.
        """
        partial = self.path / f"{name}.partial"
        wanted = _as_json({"settings": dict(settings), "made from": dict(parents), "machine": dict(machine)})
        begun = _begun(partial)
        if begun is not None and begun != wanted:
            if not overwrite:
                found = "; ".join(_differences(begun, wanted))
                raise ArtifactError(f"{partial} was begun with {found}; add --overwrite to begin anew")
            begun = None
        if begun is None:
            with self.stage(name, kind, settings, parents) as stage:
                with storage_errors(stage.work):
                    stage.work.mkdir()
                write_file(stage.work / BEGUN, json.dumps(wanted).encode())
        else:
            with storage_errors(partial):
                for half_written in partial.rglob("*.tmp"):
                    half_written.unlink()
        yield Stage(partial, self.path / name, kind, settings, parents)


def _begun(partial: Path) -> Any:
    """With what the stage was begun that was interrupted there; None if it left nothing to go on from."""
    try:
        return json.loads((partial / WORK / BEGUN).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
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
    return (path / RUN_FILE).is_file()


def refuse_other_directory(path: Path) -> None:
    """ArtifactError where `path` is there and neither a run nor the place of one that has just begun."""
    if is_run(path) or not path.exists():
        return
    if not path.is_dir() or any(entry.name not in (LOCK, LOGS) for entry in path.iterdir()):
        raise ArtifactError(f"{path} is there and is not a run directory; choose another --out")


def open_run(path: Path, config: RunConfig, overwrite: bool = False) -> RunDirectory:
    """Create the run, or enter the one that is there.

    Settings that shaped an artifact which is there must be the same; otherwise the run is refused, with each
    difference named, unless `overwrite` lets the new settings take the place of the old.
    """
    if is_run(path):
        earlier = read_run(path)
        there = [kind for kind in _SHAPED_BY if earlier.artifact(kind) or _begun(path / f"{kind}.partial") is not None]
        sections = {section for kind in there for section in _SHAPED_BY[kind]}
        found = [line for section in sorted(sections) for line in differences(earlier.config, config, section)]
        if found and not overwrite:
            raise ArtifactError(f"{path} is another run: {'; '.join(found)}; choose another --out, or add --overwrite")
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
