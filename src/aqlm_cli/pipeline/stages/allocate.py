"""`allocation/`: the scheme of every layer, chosen so that the whole model keeps its target and loses the least.

1. The base model goes through a part of the calibration set block by block; every layer is quantized to every scheme by
   a fast search, which gives its relative error under its own H;
2. embeddings and head are quantized to each of their schemes, and the model's divergence with that alone is measured;
3. some whole models near the target are measured, which tells what an error in each kind of layer does
   (quantization/sensitivity.py), and the best plan is solved for (spec/scores.py);
4. that plan is measured, joins the mixes, and is solved for once more. The best of what was measured is chosen, so that
   an allocation is never worse than the best single scheme that fits.

Every finished matrix and every measured divergence is on the disk: after an interruption the same command resumes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aqlm_cli.events import Advanced, Emit, Noted, StageStarted, Warned
from aqlm_cli.formatting import plain
from aqlm_cli.memory import give_back_memory, peak_memory_bytes, reset_peak_memory
from aqlm_cli.models import load_network
from aqlm_cli.models.blocks import linears
from aqlm_cli.models.gradients import OutputGradients
from aqlm_cli.models.hidden_states import compute_dtype
from aqlm_cli.models.walk import Walk
from aqlm_cli.pipeline.allocation_report import RECORD, AllocationReport, schemes_by_name, single_divergence
from aqlm_cli.pipeline.job import Job
from aqlm_cli.pipeline.measured_mixes import MeasuredMixes, file_name
from aqlm_cli.pipeline.preflight import planned_work
from aqlm_cli.pipeline.stage_reports import restored
from aqlm_cli.pipeline.whole_models import WholeModels
from aqlm_cli.quantization.block_inputs import machine_of, mixed_sequences, start_calibration_pass
from aqlm_cli.quantization.methods import aqlm
from aqlm_cli.quantization.mixed_model import MixedModel
from aqlm_cli.quantization.parallel import Compressed, Task, compress_all
from aqlm_cli.quantization.resume import ResumeState
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.quantization.table_scores import quantize_tables
from aqlm_cli.quantization.table_statistics import (
    METRIC,
    METRIC_FILE,
    STAGE,
    embedding_metric,
    gradient_text,
    read_statistics,
)
from aqlm_cli.quantization.tables import TableStatistics
from aqlm_cli.runs.artifact import Artifact, Stage
from aqlm_cli.runs.files import disk_bytes, load_tensors, save_tensors, write_file
from aqlm_cli.runs.stages import ALLOCATE, StageKey
from aqlm_cli.seeds import generator
from aqlm_cli.spec.allocation_record import AllocationRecord
from aqlm_cli.spec.choices import OpenLayer
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.methods import METHODS
from aqlm_cli.spec.methods.aqlm import FAST
from aqlm_cli.spec.plan import Target
from aqlm_cli.spec.scores import SIXTEEN_BITS, Scores, scored
from aqlm_cli.spec.section import Section
from aqlm_cli.spec.target import WHOLE_MODELS
from aqlm_cli.spec.treatment import Treatment
from aqlm_kernels import Matrix


def allocate(job: Job) -> AllocationReport:
    """Write `allocation/` from the run's calibration, or reuse one that was made with the same settings.

    Raises PlanError where no choice of schemes keeps the target.
    """
    config, source, run = job.config, job.source, job.open_run()
    calibration = job.calibration(run)
    parents = {"model": source.identity, "calibration": calibration.digest}
    key = StageKey(ALLOCATE, settings_of(config), parents, machine_of(config), job.overwrite)
    existing = run.reusable(key)
    if existing is not None:
        job.emit(Noted(f"{existing.directory} exists already, made with the same settings"))
        return restored(AllocationReport, existing, existing.result("report"))
    reset_peak_memory()
    started = time.monotonic()
    with run.resumed_stage(key) as stage:
        record, gradients = _measure(job, calibration, stage)
        save_tensors(stage.directory / METRIC_FILE, {METRIC: gradients.metric})
        write_file(stage.directory / RECORD, json.dumps(record.to_json(), indent=1).encode())
        report = AllocationReport(
            directory=stage.published,
            target=str(config.quantize.target),
            divergence=record.chosen.divergence,
            single=single_divergence(record),
            measured=len(record.mixes),
            schemes=schemes_by_name(record.chosen.choices),
            seconds=time.monotonic() - started,
            memory_bytes=peak_memory_bytes(),
            disk_bytes=disk_bytes(stage.directory.parent),
            planned=plain(job.planned.get(ALLOCATE.name)),
        )
        stage.publish({"report": report.results()})
    return report


SEARCHES: Mapping[str, Section] = {"aqlm": FAST}
"""Settings that a method scores layers with, where they are not those of the run."""


def settings_of(config: RunConfig) -> dict[str, Any]:
    """All settings that an allocation depends on."""
    names = ["method", "target", "layers", "embeddings", "head", "skip", "only", "token_weights", "batch"]
    section = config.quantize.model_dump(mode="json")
    names += [name for name in METHODS if name in section and name not in SEARCHES]
    return {**{name: section[name] for name in names}, "format": config.pack.format, "seed": config.seed}


def _scoring(config: RunConfig) -> Callable[[str], Section | None]:
    """Settings of a method, by its name, for the errors that layers are scored by."""
    return lambda method: SEARCHES.get(method) or config.quantize.settings_of(method)


@dataclass(frozen=True, eq=False)
class _Work:
    """The parts that stay the same from measurement to measurement."""

    job: Job
    stage: Stage
    state: ResumeState
    ids: Tensor  # [n, L]: all sequences, shuffled
    workers: int

    @property
    def emit(self) -> Emit:
        return self.job.emit

    @property
    def sequences(self) -> int:
        return min(self.job.config.quantize.target.sequences, len(self.ids))

    def table(self, path: str, treatment: Treatment) -> Matrix | None:
        kept = self.state.kept(file_name(path, str(treatment)))
        return None if kept is None else kept.matrix

    def keep(self, path: str, treatment: Treatment, made: Compressed) -> None:
        self.state.keep(replace(made, path=file_name(path, str(treatment))))


def _measure(job: Job, calibration: Artifact, stage: Stage) -> tuple[AllocationRecord, _Gradients]:
    config, facts = job.config, job.preflight.facts
    ids, _ = mixed_sequences(config, calibration)
    workers = planned_work(config, job.preflight.shape).workers
    work = _Work(job, stage, ResumeState(stage.work), ids, workers)
    layers = facts.open_layers(config)
    goal = facts.goal(config, layers)
    effects, gradients = _layer_errors(work, layers)
    for path in [path for path, layer in layers.items() if not layer.outside and path not in effects]:
        job.emit(Warned(f"{path} stays in 16 bits: no text reaches it; add text to quantize it"))
        del layers[path]
    give_back_memory()
    dtype = compute_dtype(torch.device(config.device))
    network = load_network(job.source, torch.float32, config.device)
    tables = [layer for layer in layers.values() if layer.outside]

    def statistics(layer: OpenLayer) -> TableStatistics:
        target = Target(layer.path, layer.kind, layer.out_features, layer.in_features, None, SIXTEEN_BITS)
        return read_statistics(calibration, target, gradients.metric)

    quantize_tables(network, tables, statistics, config.seed, workers, kept=work.table, keep=work.keep, emit=work.emit)
    give_back_memory()
    model = MixedModel(network, ids[-max(1, round(WHOLE_MODELS * work.sequences)) :], dtype)
    measured = MeasuredMixes(work.state, model, layers)
    effects |= measured.of_tables(job.emit)
    sensitivities = gradients.sensitivities
    scores = Scores({path: scored(one, effects.get(path, {}), sensitivities.get(path)) for path, one in layers.items()})
    return WholeModels(job, measured.of, scores, goal).search(), gradients


# ----------------------------------------------------------------------------------------------------- errors of layers


class _Gradients(NamedTuple):
    metric: Tensor  # [d, d]: the price of errors of the embeddings
    sensitivities: dict[str, float]  # of the layers in the blocks, by path


def _layer_errors(work: _Work, layers: Mapping[str, OpenLayer]) -> tuple[dict[str, dict[str, float]], _Gradients]:
    """The relative error of every layer in the blocks by path and treatment; none of a layer that no text reaches."""
    config, state = work.job.config, work.state
    ids = work.ids[: work.sequences]
    states = start_calibration_pass(work.job.source, ids, len(ids), config, state, work.emit)
    gradients = _gradients(work, states.walk)
    inside = [path for path, layer in layers.items() if not layer.outside]
    last = states.walk.last(inside) if inside else -1
    work.emit(StageStarted(ALLOCATE.name, last + 1, "block", done=state.blocks))
    for index in range(states.index, last + 1):
        block, prefix = states.walk.load(index), states.path
        chosen = {path: layer for path, layer in linears(block, "").items() if f"{prefix}.{path}" in layers}
        statistics = states.measure(block, chosen)
        reached = chosen.keys() & statistics.keys()
        weights = {f"{prefix}.{path}": chosen[path].weight.detach() for path in reached}
        errors = _errors(work, layers, weights, {f"{prefix}.{path}": statistics[path] for path in reached})
        states.advance(block)
        state.record(index, errors)
        states = states.next()
        give_back_memory()
        work.emit(Advanced(ALLOCATE.name, index + 1))
    found: dict[str, dict[str, float]] = {}
    for index in range(last + 1):
        found |= state.recorded(index)
    return found, gradients


def _errors(
    work: _Work,
    layers: Mapping[str, OpenLayer],
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, LayerStatistics],
) -> dict[str, dict[str, float]]:
    """The relative errors of these layers by path and treatment; every matrix is kept.

    Where a treatment is another with coarser codebooks, its matrix is that one's, rounded.
    """
    state = work.state
    options = {path: [one.treatment for one in layers[path].choices if one.treatment is not None] for path in weights}
    every = [(path, one) for path, found in options.items() for one in found]
    kept = {(path, one): state.kept(file_name(path, str(one))) for path, one in every}
    missing = [pair for pair, one in kept.items() if one is None]
    searched = {
        (path, one): Task(file_name(path, str(one)), weights[path], statistics[path], one)
        for path, one in missing
        if one.finer not in options[path]
    }
    config = work.job.config
    made = compress_all([*searched.values()], _scoring(config), config.seed, work.workers, state.keep)
    kept |= {pair: made[task.path] for pair, task in searched.items()}
    for path, one in missing:
        finer = None if one.finer is None else kept.get((path, one.finer))
        if finer is not None:
            matrix = aqlm.with_coarser_codebooks(finer.matrix, one.scheme)
            error = statistics[path].relative_error(weights[path], matrix.stored().dequantize())
            kept[path, one] = rounded = replace(finer, matrix=matrix, relative_error=error)
            work.keep(path, one, rounded)
    errors: dict[str, dict[str, float]] = {path: {} for path in weights}
    for (path, one), result in kept.items():
        assert result is not None
        errors[path][str(one)] = result.relative_error
    return errors


def _gradients(work: _Work, walk: Walk) -> _Gradients:
    """The gradients, from a file if they were measured before."""
    file = work.state.directory / "gradients.safetensors"
    if not file.exists():
        config = work.job.config
        rng, layers = generator(config.seed, STAGE), OutputGradients(config.quantize.weighs_tokens)
        states = work.state.directory / "gradients"
        metric = embedding_metric(walk, work.ids, states, rng, work.emit, layers.watch)
        found = layers.sensitivities(gradient_text(work.ids).numel())
        tensors = {path: torch.tensor(value, dtype=torch.float64) for path, value in found.items()}
        save_tensors(file, {METRIC: metric, **tensors})
    stored = load_tensors(file)
    return _Gradients(stored.pop(METRIC), {path: float(value) for path, value in stored.items()})
