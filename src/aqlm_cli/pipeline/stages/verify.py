"""`aqlm verify`: the files of a run compared with their digests, and one layer quantized again.

The seed chooses the layer, which is quantized from the model and the text. Its codes must be the same to the bit.
(Codebooks and scales are fitted together with those of the whole block afterwards; their digests were compared before.)
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.table import Table
from torch import Tensor, nn

from aqlm_cli.errors import ArtifactError
from aqlm_cli.events import Advanced, Noted, StageStarted
from aqlm_cli.formatting import clock, facts, readable_bytes
from aqlm_cli.models import BlockLoader
from aqlm_cli.models.blocks import find_blocks, unfuse
from aqlm_cli.models.plain_linear import is_plain
from aqlm_cli.models.walk import Walk
from aqlm_cli.pipeline.allocation_report import read_record
from aqlm_cli.pipeline.job import Job
from aqlm_cli.pipeline.weights_alone import without_text
from aqlm_cli.quantization.block_files import (
    TABLES,
    block_file,
    matrix_kinds,
    plan_of,
    read_matrix,
    restore_block,
    restore_tables,
)
from aqlm_cli.quantization.block_inputs import machine_of, mixed_sequences, start_calibration_pass, walk_through
from aqlm_cli.quantization.parallel import Task, compress_all
from aqlm_cli.quantization.resume import ResumeState
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.quantization.table_statistics import table_of
from aqlm_cli.records import Record
from aqlm_cli.runs import stages
from aqlm_cli.runs.artifact import MANIFEST, Artifact, rebuild_command
from aqlm_cli.runs.directory import RunDirectory
from aqlm_cli.runs.files import digest_file
from aqlm_cli.runs.stages import ALLOCATE, CALIBRATE, QUANTIZE, StageSpec
from aqlm_cli.seeds import generator
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.plan import Target
from aqlm_cli.spec.treatment import Treatment
from aqlm_kernels import Matrix

VERIFY = "verify"


@dataclass(frozen=True)
class VerifyReport(Record):
    """All `files` of the run's artifacts match their manifests; `layer` was quantized again to the same codes.

    `layer` is None if nothing is quantized yet, or if that was done on another kind of machine. `replayed` counts the
    layers whose schemes were solved for again from the scores of an allocation; None where the run has none.
    """

    directory: Path
    files: int
    bytes: int
    layer: str | None
    seconds: float
    replayed: int | None = None

    def table(self) -> Table:
        again = "nothing to quantize again" if self.layer is None else f"{self.layer}: the same codes"
        rows = [
            ("files", f"{self.files} match their manifests, {readable_bytes(self.bytes)}"),
            ("quantized again", again),
            *([] if self.replayed is None else [("solved again", f"{self.replayed} layers: the same schemes")]),
            ("time", clock(self.seconds)),
        ]
        return facts(f"{self.directory} is sound", rows)


def verify(job: Job) -> VerifyReport:
    """Raises ArtifactError for the first file, or the layer, that is not what it was, and says how to fix it."""
    started = time.monotonic()
    run, emit = job.run, job.emit
    artifacts = [artifact for stage in stages.STAGES if (artifact := _complete(run, stage)) is not None]
    if not artifacts:
        raise ArtifactError(f"{run.path} holds nothing to verify yet; start with `aqlm quantize`")
    files = [(artifact, name) for artifact in artifacts for name in artifact.manifest.files]
    emit(StageStarted(VERIFY, len(files), "file"))
    for number, (artifact, name) in enumerate(files, start=1):
        _compare_digest(artifact, name)
        emit(Advanced(VERIFY, number))
    for kind in {artifact.manifest.kind for artifact in artifacts}:
        run.current(kind)  # made from what is there now
    allocation = run.own(ALLOCATE)
    replayed = None if allocation is None else _solve_again(job, run, allocation)
    quantized = run.own(QUANTIZE)
    layer = None if quantized is None else _requantize(job, run, quantized)
    return VerifyReport(
        directory=run.path,
        files=len(files),
        bytes=sum(artifact.manifest.files[name].bytes for artifact, name in files),
        layer=layer,
        seconds=time.monotonic() - started,
        replayed=replayed,
    )


def _complete(run: RunDirectory, stage: StageSpec) -> Artifact | None:
    """The artifact of the stage; None if it is not complete. Raises ArtifactError where its manifest is lost."""
    artifact, place = run.own(stage), run.path / stage.directory
    if artifact is None and place.is_dir():  # which has this name from its publication on
        raise ArtifactError(f"{place} is damaged ({MANIFEST} is missing); {rebuild_command(place, stage.kind)}")
    return artifact


def _solve_again(job: Job, run: RunDirectory, allocation: Artifact) -> int:
    """The number of layers whose treatment is solved for again; ArtifactError where one differs from that stored."""
    record = read_record(allocation)
    again, stored = job.preflight.facts.replayed(run.config, record), record.chosen.choices
    if differing := [path for path in stored if again.get(path) != stored[path]]:
        way_out = rebuild_command(allocation.directory, allocation.manifest.kind)
        raise ArtifactError(
            f"{allocation.directory}: its scores give {differing[0]} {again.get(differing[0], 'no scheme')}, the plan "
            f"says {stored[differing[0]]}; {way_out}"
        )
    return len(stored)


def _compare_digest(artifact: Artifact, name: str) -> None:
    path = artifact.path(name)
    if digest_file(path) != artifact.manifest.files[name].sha256:
        way_out = rebuild_command(artifact.directory, artifact.manifest.kind)
        raise ArtifactError(f"{path} is damaged (its digest differs from the manifest); {way_out}")


def _requantize(job: Job, run: RunDirectory, quantized: Artifact) -> str | None:
    """The path of the layer; None where this machine would not compute the same bits."""
    config, plan = run.config, plan_of(quantized)
    treatments, tables = plan.treatments, {table.path: table for table in plan.tables}
    if config.quantize.import_from is not None:
        job.emit(Noted(f"the codes were imported from {config.quantize.import_from}, so no layer is quantized again"))
        return None
    if quantized.manifest.results.get("machine") != machine_of(config):
        job.emit(Noted("quantized by another version or on another kind of machine, so no layer is quantized again"))
        return None
    chosen = sorted(treatments)[int(torch.randint(len(treatments), (), generator=generator(config.seed, VERIFY)))]
    with TemporaryDirectory(prefix="verify.", dir=run.path) as work:
        if chosen in tables:
            again, there = _both_tables(job, run, quantized, tables[chosen], Path(work))
        else:
            again, there = _both(job, run, quantized, chosen, treatments[chosen], Path(work))
    for name, numbers in again.tensors().items():
        other = there.tensors()[name]
        if not numbers.is_floating_point() and not torch.equal(numbers.long(), other.long()):
            share = float((numbers.long() != other.long()).float().mean())
            raise ArtifactError(
                f"{chosen}: quantized again, {share:.1%} of its {name} differ from those in {quantized.directory}; "
                f"{rebuild_command(quantized.directory, quantized.manifest.kind)}"
            )
    return chosen


def _both_tables(job: Job, run: RunDirectory, quantized: Artifact, target: Target, work: Path) -> tuple[Matrix, Matrix]:
    """The embeddings or the head, quantized again, and as they are stored."""
    config, calibration = run.config, run.current("calibration")
    ids, _ = mixed_sequences(config, calibration)
    walk = walk_through(job.base_model(run), ids, torch.device(config.device), job.emit)
    made = table_of(target, walk, ids, calibration, config, work, job.emit)
    kind = matrix_kinds(quantized, TABLES)[target.path]
    return made.matrix.stored(), read_matrix(quantized, TABLES, target.path, kind)


def _both(
    job: Job, run: RunDirectory, quantized: Artifact, chosen: str, treatment: Treatment, work: Path
) -> tuple[Matrix, Matrix]:
    """The matrix of the chosen layer, quantized again on the output of the blocks before it, and the stored one."""
    config, source, emit = run.config, job.base_model(run), job.emit
    if CALIBRATE.kind not in quantized.manifest.parents:
        return _both_of_weights(job, run, quantized, chosen, treatment)
    ids, measured = mixed_sequences(config, run.current("calibration"))

    def outside(walk: Walk) -> object:
        return restore_tables(quantized, walk.network)

    states = start_calibration_pass(source, ids, measured, config, ResumeState(work), emit, outside)
    index = states.walk.last([chosen])
    emit(StageStarted(chosen, index + 1, "block"))
    for number in range(index):
        block = states.walk.load(number)
        restore_block(quantized, number, states.path, block)
        states.advance(block)
        states = states.next()
        emit(Advanced(chosen, number + 1))
    block = states.walk.load(index)
    inside = chosen.removeprefix(states.path + ".")
    statistics = states.measure(block, [inside])[inside]
    again = _again(config, chosen, _plain(block, inside).weight, statistics, treatment)
    emit(Advanced(chosen, index + 1))
    return again, _stored(quantized, index, chosen)


def _both_of_weights(
    job: Job, run: RunDirectory, quantized: Artifact, chosen: str, treatment: Treatment
) -> tuple[Matrix, Matrix]:
    """The same of a quantization without text."""
    config, paths = run.config, find_blocks(job.preflight.facts.network).paths
    index = next(number for number, path in enumerate(paths) if chosen.startswith(f"{path}."))
    block = unfuse(BlockLoader(job.base_model(run), torch.float32, config.device)(index))
    inside = chosen.removeprefix(f"{paths[index]}.")
    layer = _plain(block, inside)
    again = _again(config, chosen, layer.weight, without_text({inside: layer})[inside], treatment)
    return again, _stored(quantized, index, chosen)


def _plain(block: nn.Module, path: str) -> nn.Linear:
    layer = block.get_submodule(path)
    assert is_plain(layer)
    return layer


def _again(config: RunConfig, path: str, weight: Tensor, statistics: LayerStatistics, treatment: Treatment) -> Matrix:
    task = Task(path, weight.detach(), statistics, treatment)
    return compress_all([task], config.quantize.settings_of, config.seed, 1, lambda _: None)[path].matrix


def _stored(quantized: Artifact, index: int, path: str) -> Matrix:
    file = block_file(index)
    return read_matrix(quantized, file, path, matrix_kinds(quantized, file)[path])
