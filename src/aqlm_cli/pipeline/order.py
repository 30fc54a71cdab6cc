"""The order of the stages, and how a command gets the stages it needs.

Stages do not know each other. Each takes what an earlier one published, and refuses where that is missing; here the
earlier one runs first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numba
import torch

from aqlm_cli.data.spec import sampled_sequences
from aqlm_cli.errors import PlanError, UsageError
from aqlm_cli.events import Emit, Noted, Warned
from aqlm_cli.formatting import clock, readable_bytes
from aqlm_cli.models import ResolvedModel, refuse_too_long
from aqlm_cli.openmp import forbid_nested_loops
from aqlm_cli.pipeline.allocation_report import AllocationForecast, read_record, same_layers, schemes_by_name
from aqlm_cli.pipeline.forecast_cache import keep_costs, kept_costs
from aqlm_cli.pipeline.job import Job, make_job
from aqlm_cli.pipeline.overrides import (
    settings_for,
    settings_of_run,
    settings_to_bench,
    settings_to_finetune,
)
from aqlm_cli.pipeline.preflight import plan_report
from aqlm_cli.pipeline.stage_reports import CalibrationReport, ImportReport, PackReport, PlanReport, QuantizeReport
from aqlm_cli.pipeline.stages.allocate import allocate
from aqlm_cli.pipeline.stages.calibrate import calibrate
from aqlm_cli.pipeline.stages.doctor import doctor
from aqlm_cli.pipeline.stages.finetune import finetune
from aqlm_cli.pipeline.stages.import_checkpoint import fitting_network, import_checkpoint
from aqlm_cli.pipeline.stages.pack import pack
from aqlm_cli.pipeline.stages.plan import forecast, tell_if_without_weights
from aqlm_cli.pipeline.stages.quantize import quantize
from aqlm_cli.pipeline.stages.sample import sample
from aqlm_cli.pipeline.stages.status import status
from aqlm_cli.pipeline.stages.verify import VerifyReport, verify
from aqlm_cli.quantization.sensitivity import fit_effects
from aqlm_cli.quantization.training.distributed import World, joined, own_device, processes_here
from aqlm_cli.records import Record
from aqlm_cli.runs.directory import find_artifact, is_run, read_run, refuse_other_directory
from aqlm_cli.runs.lock import exclusive
from aqlm_cli.runs.stages import ALLOCATE, CALIBRATE, FINETUNE, PACK, QUANTIZE, SAMPLE
from aqlm_cli.spec.config import PackConfig, RunConfig
from aqlm_cli.spec.cost import Cost
from aqlm_cli.spec.scores import expected_scores

__all__ = [
    "calibrate_run",
    "doctor",
    "dry_run",
    "find_device",
    "finetune_run",
    "forecast_run",
    "make_job",
    "pack_first",
    "pack_run",
    "prepare",
    "quantize_and_pack",
    "settings_for",
    "settings_of_run",
    "settings_to_bench",
    "settings_to_finetune",
    "status",
    "use_machine",
    "verify_run",
]


def use_machine(config: RunConfig) -> None:
    """Let torch and our own kernels run on `config.threads` threads; None: on all of the machine's.

    Raises UsageError for threads or a device that this machine does not have.
    """
    find_device(own_device(config.device))
    threads = config.threads or max(1, numba.get_num_threads() // processes_here())
    try:
        numba.set_num_threads(threads)  # starts Numba's threads
    except ValueError as error:
        raise UsageError(f"--threads {threads}: this machine has {numba.get_num_threads()}") from error
    torch.set_num_threads(threads)
    forbid_nested_loops()


def find_device(name: str) -> torch.device:
    """The device of this name. UsageError where this machine does not have it."""
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: torch finds {torch.cuda.device_count()} such devices here; choose cpu")
    return device


def prepare(job: Job) -> tuple[Job, PlanReport]:
    """The job within the limits that its settings name, and what `quantize` would do in it."""
    job = job.within_limits()
    return job, plan_report(job.config, job.preflight)


def dry_run(job: Job) -> dict[str, Record]:
    """The plan of a quantization, and nothing written."""
    _, plan = prepare(job)
    tell_if_without_weights(job)
    return {"plan": plan}


def forecast_run(job: Job) -> dict[str, Record]:
    """The plan, and what it will take; no weight is read.

    Raises PlanError for a run that imports its codes: what that takes is not known, and little.
    """
    if job.config.quantize.import_from is not None:
        raise PlanError(f"the codes are imported from {job.config.quantize.import_from}; there is nothing to forecast")
    job, allocation = _foretold(job)
    job, plan = prepare(job)
    tell_if_without_weights(job)
    return {"plan": plan, **allocation, "forecast": forecast(job)}


def _foretold(job: Job) -> tuple[Job, dict[str, Record]]:
    """The job with the allocation of its target, solved from the scores that its run holds, or else expected."""
    target = job.config.quantize.target
    if target.question is None:
        return job, {}
    known, facts, solution, measured = job.preflight, job.preflight.facts, job.preflight.expected, False
    stored = find_artifact(job.directory, ALLOCATE.kind) if is_run(job.directory) else None
    layers = facts.open_layers(job.config)
    if stored is not None:
        record = read_record(job.run.current(ALLOCATE.kind))
        if same_layers(record, expected_scores(layers)):
            effects, goal = fit_effects(*record.loads(len(record.mixes))), facts.goal(job.config, layers)
            solution, measured = facts.solve(job.config, record.scores, effects, goal), True
            job = job.with_allocation(solution.treatments)
            known = job.preflight
    assert solution is not None
    schemes = schemes_by_name(solution.choices)
    report = AllocationForecast(str(target), solution.divergence, known.packed_bytes, measured, schemes)
    return job, {"allocation": report}


def quantize_and_pack(job: Job, forecasting: bool = True) -> dict[str, Record]:
    """Quantize the model and pack the result; complete work with the same settings is reused.

    Before it starts it tells what it will take, for which this machine is timed, unless `forecasting` is False.
    """
    with _in_use(job.directory):
        if job.config.quantize.import_from is None:
            if job.reads_text and find_artifact(job.directory, CALIBRATE.kind) is None:
                job.emit(Noted("calibration is missing; it runs first"))
            if forecasting:
                job = dataclasses.replace(job, planned=_planned(job))
            if job.reads_text:
                _calibrate(job)
            else:
                job.open_run()
            if forecasting:
                keep_costs(job.run, job.config, job.planned)
        job, reports = _allocated(job)
        return {**reports, QUANTIZE.name: _quantize(job), PACK.name: _pack(job)}


def _planned(job: Job) -> Mapping[str, Cost]:
    """The forecast of each stage: the one of an interrupted run with the same settings, or made now."""
    kept = None if job.overwrite else kept_costs(job.directory, job.config, job.emit)
    if kept is not None:
        return kept
    report = forecast(job)
    job.emit(
        Noted(
            f"expected: {clock(report.seconds)}, at most {readable_bytes(report.memory_bytes)} of memory and "
            f"{readable_bytes(report.disk_bytes)} of disk"
        )
    )
    for line in report.advice:
        job.emit(Warned(f"this machine may have too little {line}"))
    return report.stages


def calibrate_run(job: Job) -> CalibrationReport:
    """The text of a run, and the statistics of the base model on it."""
    with _in_use(job.directory):
        return _calibrate(job)


def pack_run(job: Job) -> PackReport:
    """Pack a run, after quantizing it where that is missing."""
    quantized = job.run.artifact(QUANTIZE.kind)
    with _in_use(job.directory):
        if quantized is None:
            _quantize_first(job)
        return _pack(job)


def _quantize_first(job: Job) -> None:
    """Quantize a run that another stage needs quantized; nothing in it is overwritten."""
    job = dataclasses.replace(job, overwrite=False)
    job.emit(Noted(f"{job.directory} is not quantized yet; this runs first"))
    if job.reads_text:
        _calibrate(job)
    _quantize(job)


def _calibrate(job: Job) -> CalibrationReport:
    with job.logging(CALIBRATE.name) as logged:
        return calibrate(logged)


def _allocated(job: Job) -> tuple[Job, dict[str, Record]]:
    """The job with the allocation that its target asks for, which is made where it is missing, and its report."""
    if job.config.quantize.target.question is None or job.config.quantize.import_from is not None:
        return job, {}
    with job.logging(ALLOCATE.name) as logged:
        report = allocate(dataclasses.replace(logged, config=logged.within_limits().config))
    return job.with_allocation(read_record(job.run.current(ALLOCATE.kind)).treatments), {ALLOCATE.name: report}


def _quantize(job: Job) -> QuantizeReport | ImportReport:
    if job.survey.allocated is None:
        job, _ = _allocated(job)
    with job.logging(QUANTIZE.name) as logged:
        return quantize(logged) if job.config.quantize.import_from is None else import_checkpoint(logged)


def _pack(job: Job) -> PackReport:
    with job.logging(PACK.name) as logged:
        return pack(logged)


def finetune_run(target: str, job: Job) -> dict[str, Record]:
    """Fine-tune a quantized run by distillation from its base model, and pack it again; what is missing runs first.

    The run is `target`, or another one that begins with the codes of `target`. Returns nothing in a process that
    torchrun started beside the first.
    """
    refuse_too_long(job.source, job.config.finetune.sequence_length, "--sequence-length")
    job = job.with_settings(device=own_device(job.config.device))
    with joined(job.config.device) as world:
        if not world.is_rank_zero:
            finetune(job, world)
            return {}
        return _finetune_and_pack(target, job, world)


def _finetune_and_pack(target: str, job: Job, world: World) -> dict[str, Record]:
    section, begins = job.config.finetune, job.directory != Path(target)
    if begins:
        pack_first(target, job.emit, job.model)
        if job.overwrite or not is_run(job.directory):
            fitting_network(job)  # or it is refused before anything is written
    with _in_use(job.directory):
        if begins:
            _quantize(job)
        config = job.run.config
        of_run = dataclasses.replace(job, config=config)
        if job.run.own(QUANTIZE) is None:
            _quantize_first(of_run)
        if section.data is None and not of_run.reads_text:
            job.emit(Noted("without --data the calibration set is used; calibration runs first"))
            _calibrate(dataclasses.replace(of_run, overwrite=job.overwrite and begins))
        if sampled_sequences(section.data, section.sequences):
            with job.logging(SAMPLE.name) as logged:
                sample(logged)
        with job.logging(FINETUNE.name) as logged:
            tuned = finetune(logged, world)
            assert tuned is not None  # in rank 0
        return {FINETUNE.name: tuned, PACK.name: _pack_again(job)}


def _pack_again(job: Job) -> PackReport:
    """Pack the changed model in the format that the run was packed in, or else in that of its run file."""
    run = job.run
    packed = run.own(PACK)
    outdated = packed is not None and packed.manifest.parents.get("quantized") != run.current("quantized").digest
    format = run.config.pack.format if packed is None else packed.manifest.settings["format"]
    config = run.config.model_copy(update={"pack": PackConfig(format=format)})
    return _pack(dataclasses.replace(job, config=config, overwrite=outdated))


def verify_run(job: Job) -> VerifyReport:
    """Compare the files of a run with their digests, and quantize one layer again."""
    read_run(job.directory)  # or it is refused before a lock is made
    with _in_use(job.directory), job.logging("verify") as logged:
        return verify(logged)


def pack_first(target: str, emit: Emit, base_model: ResolvedModel | None) -> ResolvedModel | None:
    """The base model of a run at `target`, which is packed from here on; None for what is no run."""
    if not is_run(Path(target)):
        return None
    run = read_run(Path(target))
    if run.artifact(PACK.kind) is not None:
        return base_model
    emit(Noted(f"{target} is not packed yet; this runs first"))
    job = make_job(run.config, run.path, emit=emit, resolved=base_model)
    pack_run(job)
    return job.model


def _in_use(run_directory: Path) -> AbstractContextManager[None]:
    refuse_other_directory(run_directory)
    return exclusive(run_directory)
