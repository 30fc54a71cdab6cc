"""Job: all that the stages of one command share, resolved once.

A command names a model, settings and a place. The job finds the model's files when a stage first asks for them and
looks at the model (preflight) when a stage first needs that; no later stage does either again. Every stage is
`stage(job) -> record`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from aqlm_cli.errors import ArtifactError
from aqlm_cli.events import Emit, silent
from aqlm_cli.models import ModelSource, ResolvedModel, base_model_of, refuse_other_model
from aqlm_cli.pipeline.overrides import default_run_directory
from aqlm_cli.pipeline.preflight import Preflight, preflight, within_limits
from aqlm_cli.runs.artifact import Artifact
from aqlm_cli.runs.directory import RunDirectory, open_run, read_run
from aqlm_cli.runs.log import logged
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.cost import Cost
from aqlm_cli.spec.treatment import Treatment


@dataclass(frozen=True, eq=False)
class Survey:
    """The preflight of a model, made when it is first asked for, and only once."""

    config: RunConfig
    model: ResolvedModel
    allocated: Mapping[str, Treatment | None] | None = None  # what an allocation decided, by path

    @cached_property
    def preflight(self) -> Preflight:
        """Raises as `preflight` does."""
        return preflight(self.config, self.model.source, self.allocated)


@dataclass(frozen=True, eq=False)
class Job:
    """The work of one command in one run directory.

    `overwrite` redoes what exists under other settings. `planned` is what each stage was forecast to take, by its
    name; empty where nothing was forecast. Derived jobs (`with_settings`, `logging`) share model and preflight.
    """

    config: RunConfig
    directory: Path
    survey: Survey
    emit: Emit = silent
    overwrite: bool = False
    planned: Mapping[str, Cost] = field(default_factory=dict)

    @property
    def model(self) -> ResolvedModel:
        """The base model by its name."""
        return self.survey.model

    @property
    def source(self) -> ModelSource:
        """The files of the base model."""
        return self.survey.model.source

    @property
    def preflight(self) -> Preflight:
        """The model before any of its weights is read, under the settings with which the job was made."""
        return self.survey.preflight

    @property
    def reads_text(self) -> bool:
        """Check that a quantization with these settings needs the calibration of the run."""
        return self.preflight.reads_text(self.config)

    @property
    def run(self) -> RunDirectory:
        """The run that exists in `directory`. ArtifactError where there is none."""
        return read_run(self.directory)

    def open_run(self) -> RunDirectory:
        """Create the run, or enter the existing one with the settings of the job. Raises as `open_run` does."""
        return open_run(self.directory, self.config, self.overwrite)

    def base_model(self, run: RunDirectory) -> ModelSource:
        """The files of the base model. ArtifactError where the run was made from another model."""
        refuse_other_model(run, self.source)
        return self.source

    def calibration(self, run: RunDirectory) -> Artifact:
        """The calibration of the run. ArtifactError where there is none, or it was made from another model."""
        calibration = run.current("calibration")
        if calibration.manifest.parents["model"] != self.source.identity:
            raise ArtifactError(
                f"{calibration.directory} was made from another model than {self.source.name}; "
                "add --overwrite to redo it"
            )
        return calibration

    def with_settings(self, **sections: Any) -> Job:
        """The same job with other values of these settings, none of which changes the plan."""
        return dataclasses.replace(self, config=self.config.model_copy(update=sections))

    def with_allocation(self, treatments: Mapping[str, Treatment | None]) -> Job:
        """The same job, its plan with the treatments that an allocation decided, by path."""
        return dataclasses.replace(self, survey=Survey(self.config, self.survey.model, treatments))

    def within_limits(self) -> Job:
        """The same job with the batch that `max_memory` allows. Raises PlanError where a limit cannot be kept."""
        return dataclasses.replace(self, config=within_limits(self.config, self.preflight))

    @contextmanager
    def logging(self, stage: str) -> Iterator[Job]:
        """The same job, while open, with events also written to the log of this stage."""
        with logged(self.directory, stage, self.emit) as emit:
            yield dataclasses.replace(self, emit=emit)


def make_job(
    config: RunConfig,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    emit: Emit = silent,
    with_weights: bool = True,
    resolved: ResolvedModel | None = None,
) -> Job:
    """A job on the model that the settings name. `out` None: runs/NAME-BITS, which resolves the model at once.

    With `with_weights` False nothing large is fetched from the hub: enough for a preflight. `resolved` is the model of
    another job, used where the settings name the same one.
    """
    model = base_model_of(config, with_weights)
    if resolved == model:
        model = resolved
    directory = default_run_directory(config, model.source) if out is None else out
    return Job(config, directory, Survey(config, model), emit, overwrite)
