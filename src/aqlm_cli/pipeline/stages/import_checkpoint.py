"""The codes of an AQLM checkpoint, made by anyone, as the `quantized/` of a run.

A run whose `quantize.import_from` names one starts with its codes, codebooks and scales, with the norms and biases of
its blocks, and with the parameters that were trained outside the blocks, value by value. Everything else in the run is
taken from the base model, so the checkpoint must have the same values there.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from aqlm_cli.errors import ModelError
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted, Warned
from aqlm_cli.formatting import some
from aqlm_cli.memory import peak_memory_bytes, reset_peak_memory
from aqlm_cli.models import ModelSource, load_config, load_network, load_without, stored_parameters
from aqlm_cli.models.blocks import find_blocks
from aqlm_cli.pipeline.job import Job
from aqlm_cli.pipeline.stage_reports import ImportReport, restored
from aqlm_cli.quantization.block_files import OUTSIDE, block_file, save_block
from aqlm_cli.quantization.student import names_in_files, outside_blocks
from aqlm_cli.quantization.training.block import tuned_parameters
from aqlm_cli.runs.files import disk_bytes, save_tensors
from aqlm_cli.runs.stages import QUANTIZE, StageKey
from aqlm_kernels import quantized_layers

STAGE = "import_checkpoint"

NOT_COMPARED = {"_name_or_path", "aqlm_cli", "architectures", "dtype", "quantization_config", "transformers_version"}
"""Settings in config.json that say how a model is stored, and by whom."""

FURTHEST_TRAINED = 0.5
"""Distance by its norm: a tensor further from that of the base model was not trained from there."""


def import_checkpoint(job: Job) -> ImportReport:
    """Write `quantized/` from the checkpoint that the settings name, or reuse what was made from the same one.

    The run file gets the scheme of the checkpoint. Raises ModelError where it was not made from the run's model.
    """
    started = time.monotonic()
    source, checkpoint, plan = job.source, checkpoint_of(job), job.preflight.plan
    run = job.with_settings(quantize=job.config.quantize.model_copy(update={"scheme": plan.scheme})).open_run()
    parents = {"model": source.identity, "checkpoint": checkpoint.identity}
    key = StageKey(QUANTIZE, {}, parents, overwrite=job.overwrite)
    imported = run.reusable(key)
    if imported is not None:
        job.emit(Noted(f"{imported.directory} exists already, made from the same checkpoint"))
        return restored(ImportReport, imported, imported.result("report"))
    reset_peak_memory()
    network, learnt = fitting_network(job)
    if other := _other_settings(checkpoint, source):
        line = f"{checkpoint.name} has other settings than {source.name}: {some(other)}"
        job.emit(Warned(f"{line}; those of {source.name} are kept"))
    with run.stage(key) as stage:
        _save_blocks(network, stage.directory, job.emit)
        if learnt:
            save_tensors(stage.directory / OUTSIDE, learnt, {})
        report = ImportReport(
            directory=stage.published,
            checkpoint=checkpoint.name,
            model=source.name,
            scheme=plan.scheme,
            layers=len(plan.quantized),
            code_bits=plan.code_bits,
            stored_bits=plan.stored_bits,
            bytes_before=plan.bytes_before,
            bytes_after=plan.bytes_after,
            seconds=time.monotonic() - started,
            memory_bytes=peak_memory_bytes(),
            disk_bytes=disk_bytes(run.path),
        )
        model = {"name": source.name, "identity": source.identity}
        stage.publish({"plan": plan.to_json(), "layers": {}, "model": model, "report": report.results()})
    job.emit(Noted(f"{report.layers} layers of {checkpoint.name} are in {report.directory}"))
    return report


def checkpoint_of(job: Job) -> ModelSource:
    """The AQLM checkpoint from which the codes are imported."""
    assert job.preflight.checkpoint is not None
    return job.preflight.checkpoint


def fitting_network(job: Job) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network of the checkpoint, and by name the parameters trained outside its blocks; all else is the base model.

    Raises ModelError for the first tensor that is not.
    """
    checkpoint, source, schemes = checkpoint_of(job), job.source, job.preflight.plan.schemes
    network = load_network(checkpoint, torch.float32)
    original = load_without(source, list(schemes), torch.float32)
    layers = tuple(f"{path}." for path in schemes)
    there = {name: tensor for name, tensor in _tensors(network).items() if not name.startswith(layers)}
    wanted, taken = _tensors(original), _taken_over(network)
    if alone := sorted(there.keys() ^ wanted.keys()):
        owner = checkpoint if alone[0] in there else source
        raise ModelError(f"{checkpoint.name} was not made from {source.name}: only {owner.name} has {alone[0]}")
    outside, learnt = outside_blocks(network), dict[str, Tensor]()
    names = names_in_files(original, stored_parameters(original, source))
    for name in sorted(there):
        if there[name].shape != wanted[name].shape:
            shapes = f"{list(there[name].shape)} there and {list(wanted[name].shape)} in {source.name}"
            raise ModelError(f"{checkpoint.name}: {name} is {shapes}; name the base model of the checkpoint")
        if name in taken or _same(there[name], wanted[name]):
            continue
        if name in outside and _near(there[name], wanted[name]):
            learnt.update({stored: there[name].detach() for stored in names[name]})
        else:
            raise ModelError(
                f"{checkpoint.name}: {name} differs from that of {source.name}, by more than training changes; "
                "name the base model of the checkpoint"
            )
    return network, learnt


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by path, computed ones such as the frequencies of rotary embeddings included; a tied head
    comes once."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _taken_over(network: nn.Module) -> set[str]:
    """Norms and biases of the blocks in which anything has codes."""
    blocks = find_blocks(network)
    return {
        name
        for prefix, block in zip(blocks.paths, blocks.modules, strict=True)
        if quantized_layers(block)
        for name in tuned_parameters(block, prefix)
    }


def _near(there: Tensor, wanted: Tensor) -> bool:
    return float((there - wanted).norm()) <= FURTHEST_TRAINED * float(wanted.norm())


def _same(there: Tensor, wanted: Tensor) -> bool:
    """True where both are one tensor in different types: equal in float16, or the first is the second in bfloat16."""
    return torch.equal(there.half(), wanted.half()) or torch.equal(there, wanted.bfloat16().float())


def _other_settings(checkpoint: ModelSource, original: ModelSource) -> list[str]:
    """Settings in config.json that differ: most of them change no value, and which do differs by architecture."""
    there, kept = load_config(checkpoint).to_dict(), load_config(original).to_dict()
    keys = sorted({*there, *kept} - NOT_COMPARED)
    return [f"{key} {there.get(key)}, not {kept.get(key)}" for key in keys if there.get(key) != kept.get(key)]


def _save_blocks(network: nn.Module, directory: Path, emit: Emit) -> None:
    blocks = find_blocks(network)
    emit(StageStarted(STAGE, len(blocks.paths), "block"))
    for index, (prefix, block) in enumerate(zip(blocks.paths, blocks.modules, strict=True)):
        layers = {path: layer.matrix() for path, layer in quantized_layers(block, prefix).items()}
        if layers:
            save_block(directory / block_file(index), prefix, block, layers)
        emit(Advanced(STAGE, index + 1))
