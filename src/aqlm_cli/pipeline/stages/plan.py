"""`aqlm plan`: the plan of a run and its cost, before any weight is read."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from aqlm_cli.data.sources import builtin_texts
from aqlm_cli.errors import ModelError
from aqlm_cli.evaluation.machine import measure_rates
from aqlm_cli.events import Noted, Warned
from aqlm_cli.formatting import readable_bytes, some
from aqlm_cli.memory import available_memory_bytes
from aqlm_cli.models import ModelSource, load_tokenizer
from aqlm_cli.models.weight_files import WEIGHTS, has_weights
from aqlm_cli.pipeline.forecast_report import ForecastReport
from aqlm_cli.pipeline.job import Job
from aqlm_cli.pipeline.preflight import disk_needed, planned_work
from aqlm_cli.spec.allocation_cost import allocation_cost
from aqlm_cli.spec.cost import (
    Cost,
    ModelShape,
    Work,
    calibration_memory,
    least_memory,
    packing_memory,
    quantization_memory,
    what_needs_less,
)
from aqlm_cli.spec.time_estimate import calibration_seconds, packing_seconds, quantization_seconds

TEXT_SAMPLE = 100_000  # characters


def forecast(job: Job) -> ForecastReport:
    """The time, memory and disk that the stages of the job will take."""
    preflight, emit = job.preflight, job.emit
    model, work = preflight.shape, planned_work(job.config, preflight.shape)
    if grown := preflight.plan.grown:
        names = some([target.path for target in grown])
        emit(Warned(f"{preflight.plan.scheme} and its codebooks take more than 16 bits a weight in {names}"))
    disks = disk_needed(preflight, work)
    emit(Noted("measuring the speed of this machine"))
    started = time.monotonic()
    device, character = torch.device(job.config.device), _seconds_a_character(job.source)
    rates = measure_rates(model, work, job.config.quantize, device, job.config.seed, character)
    costs = {
        "calibrate": (calibration_seconds(model, work, rates), calibration_memory(model, work)),
        "quantize": (quantization_seconds(model, work, rates), quantization_memory(model, work)),
        "pack": (packing_seconds(preflight.packed_bytes, rates), packing_memory(model)),
    }
    stages = {stage: Cost(*cost, disks[stage]) for stage, cost in costs.items()}
    section = job.config.quantize
    if not job.reads_text:
        del stages["calibrate"]
    if section.target.question is not None:
        layers = preflight.facts.open_layers(job.config).values()
        cost = allocation_cost(layers, section.target, model, work, rates, section.default.scheme)
        stages = {"calibrate": stages.pop("calibrate"), "allocate": cost, **stages}
    report = ForecastReport(
        stages=stages,
        batch=work.batch,
        safetensors_bytes=preflight.packed_bytes,
        memory_available=available_memory_bytes(),
        disk_available=shutil.disk_usage(_there(job.directory)).free,
        measured_seconds=time.monotonic() - started,
        advice=(),
    )
    return dataclasses.replace(report, advice=tuple(_advice(report, model, work)))


def tell_if_without_weights(job: Job) -> None:
    """Warn of a local directory without weights. Of a model on the hub a plan fetches none."""
    source = job.source
    if source.cached_identity is None and not has_weights(source.directory):
        job.emit(Warned(f"{source.name} holds no {WEIGHTS}; planned from config.json alone"))


def _advice(report: ForecastReport, model: ModelShape, work: Work) -> Iterator[str]:
    if report.memory_bytes > report.memory_available:
        least = least_memory(model, work)
        if least <= report.memory_available:
            yield f"memory: add --max-memory {report.memory_available // 10**6}MB, so that less is computed at a time"
        else:
            yield f"memory: at least {readable_bytes(least)} are needed; {what_needs_less(model)}"
    if report.disk_bytes > report.disk_available:
        missing = readable_bytes(report.disk_bytes - report.disk_available)
        yield f"disk: free {missing}, choose another --out, or use fewer sequences (--data or --sequences)"


def _there(directory: Path) -> Path:
    """The nearest directory above that exists."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())


def _seconds_a_character(source: ModelSource) -> float:
    """Time to tokenize a text; 0 where the model has no tokenizer yet."""
    try:
        tokenizer = load_tokenizer(source)
    except ModelError:
        return 0.0
    text = "\n".join(builtin_texts("calibration"))[:TEXT_SAMPLE]
    started = time.perf_counter()
    tokenizer.encode(text, add_special_tokens=False)
    return (time.perf_counter() - started) / len(text)
