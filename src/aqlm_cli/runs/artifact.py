"""Artifacts: directories with a manifest, and how a stage publishes one.

An artifact is published whole or not at all: a stage works in `<name>.partial/`, its manifest is written last, after
the digests of all files are known, and one rename makes the directory visible. So a directory with a manifest is
complete, and a crash leaves the previous one in place.
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

from aqlm_cli.errors import ArtifactError, shortened
from aqlm_cli.runs.files import digest_file, storage_errors, sync_directory, write_file
from aqlm_cli.runs.stages import StageKey, stage_at
from aqlm_kernels import KernelError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WORK = "work"
"""Folder of a running stage with the state that it resumes from; never published."""


def rebuild_command(directory: Path, kind: str) -> str:
    """The fix for an artifact of a run that is damaged or out of date."""
    return f"redo it with `{stage_at(directory, kind).command.format(run=directory.parent)} --overwrite`"


# ------------------------------------------------------------------------------------------------------ manifests


class FileRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """The identity and origin of an artifact.

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

    def result(self, name: str) -> Any:
        """A result of the stage. ArtifactError where the manifest has none of this name."""
        if name not in self.manifest.results:
            way_out = rebuild_command(self.directory, self.manifest.kind)
            raise ArtifactError(f"{self.directory / MANIFEST} has no result `{name}`; {way_out}")
        return self.manifest.results[name]

    def path(self, name: str) -> Path:
        """A file that the manifest lists."""
        if name not in self.manifest.files:
            raise ArtifactError(
                f"{self.directory} holds no {name}; {rebuild_command(self.directory, self.manifest.kind)}"
            )
        return self.directory / name

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """Open a listed file. A damaged file raises ArtifactError with the command that rebuilds it."""
        path = self.path(name)
        try:
            yield path
        except (ArtifactError, KernelError, LookupError, ValueError) as error:
            way_out = rebuild_command(self.directory, self.manifest.kind)
            raise ArtifactError(f"{path} is damaged ({error.__cause__ or error}); {way_out}") from error


def open_artifact(directory: Path, kind: str) -> Artifact:
    """Check version, kind, and that every file exists inside the directory, with its recorded size.

    Not covered: the digests of the files, which would mean reading all of them.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            shown = shortened(str(version))
            raise ArtifactError(f"{path} has format version {shown}, this aqlm reads {FORMAT_VERSION}; update aqlm")
        manifest = Manifest.model_validate(content)
    except FileNotFoundError:
        raise ArtifactError(f"{directory} is not a complete artifact, {MANIFEST} is missing") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path} is not a manifest ({reason}); {rebuild_command(directory, kind)}") from error
    if manifest.kind != kind:
        found = shortened(manifest.kind)
        raise ArtifactError(
            f"{directory} holds a {found} artifact, not a {kind} one; {rebuild_command(directory, kind)}"
        )
    for name, record in manifest.files.items():
        _check_file(directory, kind, name, record)
    return Artifact(directory, manifest)


def _check_file(directory: Path, kind: str, name: str, record: FileRecord) -> None:
    """A manifest is untrusted: its names must not lead out of its directory."""
    relative = PurePosixPath(name)
    inside = not relative.is_absolute() and ".." not in relative.parts and "\\" not in name
    try:
        inside = inside and (directory / name).resolve().is_relative_to(directory.resolve())
        size = (directory / name).stat().st_size if inside and (directory / name).is_file() else None
    except (OSError, ValueError, RuntimeError) as error:  # too long, no text, or a link to itself
        shown = shortened(repr(name))
        raise ArtifactError(f"{directory / MANIFEST} names {shown}, which is no file name; do not use it") from error
    if not inside:
        raise ArtifactError(f"{directory / MANIFEST} names {name}, which lies outside {directory}; do not use it")
    if size != record.bytes:
        fault = "is missing" if size is None else f"has {size} bytes, not {record.bytes}"
        raise ArtifactError(f"{directory / name} {fault}; {rebuild_command(directory, kind)}")


# ---------------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Stage:
    """A running stage. Other stages do not see `directory` before `publish`."""

    directory: Path
    published: Path
    key: StageKey

    @property
    def work(self) -> Path:
        return self.directory / WORK

    def publish(self, results: Mapping[str, Any]) -> Artifact:
        """Write the manifest and rename the directory to its name, in place of the earlier artifact."""
        with storage_errors(self.directory):
            (self.directory / MANIFEST).unlink(missing_ok=True)  # left by an interrupted publication
            files = {
                path.relative_to(self.directory).as_posix(): FileRecord(
                    sha256=digest_file(path), bytes=path.stat().st_size
                )
                for path in sorted(self.directory.rglob("*"))
                if path.is_file() and not path.is_relative_to(self.work)
            }
        manifest = Manifest(
            kind=self.key.stage.kind,
            settings=dict(self.key.settings),
            parents=dict(self.key.parents),
            files=files,
            results=dict(results),
        )
        text = json.dumps(manifest.model_dump(), indent=1, sort_keys=True)
        write_file(self.directory / MANIFEST, text.encode())
        replaced = self.published.with_name(self.published.name + ".old")
        with storage_errors(self.published):
            if replaced.exists():  # left by a crash
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
