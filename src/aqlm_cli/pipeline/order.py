"""The order of the stages, and how a command gets the stages it needs.

Stages do not know each other. Each takes what an earlier one published, and says so if it is missing; here the earlier
one is run first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numba
import torch

from aqlm_cli.data.spec import sampled_sequences
from aqlm_cli.errors import ArtifactError, PlanError, UsageError
from aqlm_cli.evaluation import BenchReport, GenerationSettings, PerplexitySettings, SpeedSettings
from aqlm_cli.evaluation.speed import measure_shape
from aqlm_cli.events import Emit, Noted, Warned, silent
from aqlm_cli.formatting import clock, plain, readable_bytes
from aqlm_cli.models import Subject, find_subject
from aqlm_cli.openmp import forbid_nested_loops
from aqlm_cli.pipeline.overrides import (
    default_run_directory,
    refuse_lengths,
    settings_for,
    settings_of_run,
    settings_to_finetune,
)
from aqlm_cli.pipeline.preflight import plan_report, preflight, within_limits
from aqlm_cli.pipeline.stage_reports import CalibrationReport, ImportReport, PackReport, QuantizeReport
from aqlm_cli.pipeline.stages.calibrate import calibrate
from aqlm_cli.pipeline.stages.doctor import doctor
from aqlm_cli.pipeline.stages.evaluate import evaluate
from aqlm_cli.pipeline.stages.finetune import finetune
from aqlm_cli.pipeline.stages.import_checkpoint import fitting_network, import_checkpoint
from aqlm_cli.pipeline.stages.pack import pack
from aqlm_cli.pipeline.stages.plan import forecast, tell_if_without_weights
from aqlm_cli.pipeline.stages.quantize import quantize
from aqlm_cli.pipeline.stages.sample import sample
from aqlm_cli.pipeline.stages.status import status
from aqlm_cli.pipeline.stages.verify import verify
from aqlm_cli.quantization.training.distributed import World, joined, own_device, processes_here
from aqlm_cli.records import PlanReport, Record, VerifyReport
from aqlm_cli.runs.directory import RunDirectory, find_artifact, is_run, read_run, refuse_other_directory
from aqlm_cli.runs.lock import exclusive
from aqlm_cli.runs.log import logged
from aqlm_cli.spec.config import PackConfig, RunConfig
from aqlm_cli.spec.cost import Cost
from aqlm_cli.spec.schemes import parse_scheme

__all__ = [
    "calibrate_run",
    "compare_speed",
    "compare_speed_of_shape",
    "continue_text",
    "default_run_directory",
    "doctor",
    "finetune_run",
    "forecast_run",
    "measure",
    "pack_run",
    "prepare",
    "quantize_and_pack",
    "run_all",
    "settings_for",
    "settings_of_run",
    "settings_to_finetune",
    "status",
    "use_machine",
    "verify_run",
]


FORECAST = "forecast.json"
"""The report of a run that keeps what its stages were thought to take."""


def use_machine(config: RunConfig) -> None:
    """Let torch's products and our own kernels run on `config.threads`; None leaves both at all of the machine's.

    Raises UsageError for threads or a device that this machine has not got.
    """
    device = torch.device(own_device(config.device))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: torch finds {torch.cuda.device_count()} such devices here; choose cpu")
    threads = config.threads or max(1, numba.get_num_threads() // processes_here())
    try:
        numba.set_num_threads(threads)  # starts Numba's threads
    except ValueError as error:
        raise UsageError(f"--threads {threads}: this machine has {numba.get_num_threads()}") from error
    torch.set_num_threads(threads)
    forbid_nested_loops()


def prepare(config: RunConfig, emit: Emit = silent) -> tuple[RunConfig, PlanReport]:
    """The settings within the limits that they name, and what `quantize` would do with them."""
    known = preflight(config)
    tell_if_without_weights(known, emit)
    return within_limits(config, known), plan_report(config, known.plan)


def forecast_run(config: RunConfig, run_directory: Path, emit: Emit) -> dict[str, Record]:
    """The plan, and what it will take; no weight is read.

    Raises PlanError for a run that takes its codes over: what that takes is not known, and little.
    """
    if config.quantize.import_from is not None:
        raise PlanError(f"the codes are those of {config.quantize.import_from}, so nothing is quantized")
    known = preflight(config, with_weights=False)
    tell_if_without_weights(known, emit)
    config = within_limits(config, known)
    return {"plan": plan_report(config, known.plan), "forecast": forecast(config, known, run_directory, emit)}


def quantize_and_pack(config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit) -> dict[str, Record]:
    """From the model to a checkpoint; what is complete and was made with the same settings is reused."""
    with _at_work(run_directory):
        if config.quantize.import_from is not None:
            imported = _quantize(config, run_directory, overwrite, emit, {})
            return {"quantize": imported, "pack": _pack(config, run_directory, overwrite, emit, {})}
        if find_artifact(run_directory, "calibration") is None:
            emit(Noted("there is no calibration yet, it runs first"))
        costs = _costs(config, run_directory, overwrite, emit)
        _calibrate(config, run_directory, overwrite, emit, costs)
        read_run(run_directory).write_report(FORECAST, {"settings": plain(config.model_dump()), "costs": plain(costs)})
        return {
            "quantize": _quantize(config, run_directory, overwrite, emit, costs),
            "pack": _pack(config, run_directory, overwrite, emit, costs),
        }


def _costs(config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit) -> Mapping[str, Cost]:
    """What each stage is thought to take: as an interrupted run of the same settings was told, or measured now."""
    settings = plain(config.model_dump())
    with contextlib.suppress(ArtifactError, TypeError, KeyError, AttributeError):  # then it is made anew
        kept = RunDirectory(run_directory, config).read_report(FORECAST)
        if kept["settings"] == settings and not overwrite:
            return {stage: Cost(**cost) for stage, cost in kept["costs"].items()}
    report = forecast(config, preflight(config), run_directory, emit)
    emit(
        Noted(
            f"about {clock(report.seconds)} ahead, with {readable_bytes(report.memory_bytes)} of memory at most and "
            f"{readable_bytes(report.disk_bytes)} on the disk"
        )
    )
    for line in report.advice:
        emit(Warned(f"this machine may have too little {line}"))
    return report.stages


def calibrate_run(config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit) -> CalibrationReport:
    with _at_work(run_directory):
        return _calibrate(config, run_directory, overwrite, emit, {})


def pack_run(config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit) -> PackReport:
    """Pack a run, after quantizing it where that is missing."""
    quantized = read_run(run_directory).artifact("quantized")
    with _at_work(run_directory):
        if quantized is None:
            _quantize_first(config, run_directory, emit)
        return _pack(config, run_directory, overwrite, emit, {})


def _quantize_first(config: RunConfig, run_directory: Path, emit: Emit) -> None:
    emit(Noted(f"{run_directory} is not quantized yet, that runs first"))
    if config.quantize.import_from is None:
        _calibrate(config, run_directory, False, emit, {})
    _quantize(config, run_directory, False, emit, {})


def _calibrate(
    config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit, costs: Mapping[str, Cost]
) -> CalibrationReport:
    with logged(run_directory, "calibrate", emit) as both:
        return calibrate(config, run_directory, overwrite, both, costs.get("calibrate"))


def _quantize(
    config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit, costs: Mapping[str, Cost]
) -> QuantizeReport | ImportReport:
    with logged(run_directory, "quantize", emit) as both:
        if config.quantize.import_from is not None:
            return import_checkpoint(config, run_directory, overwrite, both)
        return quantize(config, run_directory, overwrite, both, costs.get("quantize"))


def _pack(config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit, costs: Mapping[str, Cost]) -> PackReport:
    with logged(run_directory, "pack", emit) as both:
        return pack(run_directory, config.pack.format, overwrite, both, costs.get("pack"))


def measure(target: str, config: RunConfig, windows: int | None, emit: Emit) -> dict[str, Record]:
    """Perplexity on every text of the settings."""
    subject, section = _subject(target, config, emit), config.eval_ppl
    with _logged_of(subject, "eval-ppl", emit) as both:
        settings = [
            PerplexitySettings(text, section.sequence_length, windows, section.bos, section.dtype)
            for text in section.data
        ]
        return {one.data: evaluate(subject, "ppl", one, config.device, both) for one in settings}


def compare_speed(target: str, config: RunConfig, emit: Emit) -> BenchReport:
    subject = _subject(target, config, emit)
    with _logged_of(subject, "bench", emit) as both:
        report = evaluate(subject, "speed", SpeedSettings(config.bench, config.seed), "cpu", both)
    assert isinstance(report, BenchReport)
    return report


def compare_speed_of_shape(shape: str, config: RunConfig, emit: Emit) -> BenchReport:
    scheme = parse_scheme(config.quantize.scheme)
    if scheme.codebook_shape is None:
        raise UsageError(f"scheme {scheme} is packed as ordinary weights; choose one such as 2x8g8")
    return measure_shape(shape, scheme, SpeedSettings(config.bench, config.seed), emit)


def continue_text(target: str, config: RunConfig, prompt: str, tokens: int, temperature: float, emit: Emit) -> Record:
    subject, section = _subject(target, config, emit), config.bench
    settings = GenerationSettings(
        prompt, tokens, temperature, config.seed, section.backend, section.head, config.device
    )
    return evaluate(subject, "generation", settings, config.device, emit)


def finetune_run(target: str, config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit) -> dict[str, Record]:
    """Teach a quantized run by its original, and pack it anew; what is missing before it runs first.

    The run is `target`, or another one that begins with the codes of `target`. Nothing comes of it in a process that
    torchrun started beside the first.
    """
    config = config.model_copy(update={"device": own_device(config.device)})
    with joined(config.device) as world:
        if not world.is_rank_zero:
            finetune(config, run_directory, overwrite, silent, world)
            return {}
        return _finetune_and_pack(target, config, run_directory, overwrite, emit, world)


def _finetune_and_pack(
    target: str, config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit, world: World
) -> dict[str, Record]:
    begins = run_directory != Path(target)
    if begins:
        _pack_first(target, emit)
        if overwrite or not is_run(run_directory):
            fitting_network(config, preflight(config))  # or it is refused before anything is written
    with _at_work(run_directory):
        if begins:
            _quantize(config, run_directory, overwrite, emit, {})
        run = read_run(run_directory)
        if run.own("quantized", "quantized") is None:
            _quantize_first(run.config, run_directory, emit)
        if run.config.quantize.import_from is not None and config.finetune.data is None:
            emit(Noted("without --data the text is that of calibration, which runs first"))
            _calibrate(run.config, run_directory, overwrite and begins, emit, {})
        if sampled_sequences(config.finetune.data, config.finetune.sequences):
            with logged(run_directory, "sample", emit) as both:
                sample(config, run_directory, overwrite, both)
        with logged(run_directory, "finetune", emit) as both:
            tuned = finetune(config, run_directory, overwrite, both, world)
            assert tuned is not None  # in rank 0
        run = read_run(run_directory)
        packed = run.own("packed", "packed")
        outdated = packed is not None and packed.manifest.parents.get("quantized") != run.current("quantized").digest
        format = run.config.pack.format if packed is None else packed.manifest.settings["format"]
        again = run.config.model_copy(update={"pack": PackConfig(format=format)})
        return {"finetune": tuned, "pack": _pack(again, run_directory, outdated, emit, {})}


def verify_run(run_directory: Path, emit: Emit) -> VerifyReport:
    read_run(run_directory)  # or it is refused before a lock is made
    with _at_work(run_directory), logged(run_directory, "verify", emit) as both:
        return verify(run_directory, both)


def run_all(config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit) -> dict[str, Record]:
    """Every stage in order; `finetune` where the settings have a section of that name."""
    refuse_lengths(config)
    made = quantize_and_pack(config, run_directory, overwrite, emit)
    if "finetune" in config.model_fields_set:
        made |= finetune_run(str(run_directory), config, run_directory, overwrite, emit)
    measured = measure(str(run_directory), config, None, emit)
    return {**made, **measured, "bench": compare_speed(str(run_directory), config, emit)}


def _subject(target: str, config: RunConfig, emit: Emit) -> Subject:
    """What `target` means; where it is a run without a checkpoint, the stages that are missing run first."""
    _pack_first(target, emit)
    return find_subject(target, config.revision, config.trust_remote_code)


def _pack_first(target: str, emit: Emit) -> None:
    if is_run(Path(target)):
        run = read_run(Path(target))
        if run.artifact("packed") is None:
            emit(Noted(f"{target} is not packed yet, that runs first"))
            pack_run(run.config, run.path, overwrite=False, emit=emit)


def _logged_of(subject: Subject, stage: str, emit: Emit) -> AbstractContextManager[Emit]:
    """In the run's log, where the subject is a run."""
    return nullcontext(emit) if subject.run is None else logged(subject.run.path, stage, emit)


def _at_work(run_directory: Path) -> AbstractContextManager[None]:
    refuse_other_directory(run_directory)
    return exclusive(run_directory)
