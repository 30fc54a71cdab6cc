"""`aqlm calibrate`: the calibration set, and statistics of the base model on it.

The artifact holds the token ids. A part of the sequences goes through the base model once: the mean square of every
input feature of every linear layer shows which features are dead and which are outliers, and the loss of the model
shows at a glance whether the text suits it. The inputs of the head and the tokens give the statistics by which
embeddings and head are quantized.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aqlm_cli.data.sequences import TextTokenizer, calibration_sequences, opening_tokens, settings_of_text
from aqlm_cli.errors import QuantizationError
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.formatting import plain
from aqlm_cli.memory import peak_memory_bytes, reset_peak_memory
from aqlm_cli.models import ModelSource, load_tokenizer, refuse_too_long, refuse_unknown_tokens
from aqlm_cli.models.blocks import linears
from aqlm_cli.models.hidden_states import Handed, autocast, run_block
from aqlm_cli.pipeline.job import Job
from aqlm_cli.pipeline.stage_reports import CalibrationReport, restored
from aqlm_cli.quantization.block_inputs import entering_states, walk_through
from aqlm_cli.quantization.table_statistics import moments_of, save_statistics, watched_head
from aqlm_cli.quantization.tables import TableMoments
from aqlm_cli.runs.artifact import Stage
from aqlm_cli.runs.files import disk_bytes, save_tensors
from aqlm_cli.runs.stages import CALIBRATE, StageKey


def calibrate(job: Job) -> CalibrationReport:
    """Write `calibration/`, or reuse one that was made from the same model, text and seed."""
    config, source = job.config, job.source
    refuse_too_long(source, config.calibrate.sequence_length, "--sequence-length")
    tokenizer = load_tokenizer(source)
    opening = opening_tokens(tokenizer, config.calibrate.bos)
    run = job.open_run()
    settings = {**settings_of_text(config.calibrate, bool(opening)), "seed": config.seed}
    key = StageKey(CALIBRATE, settings, {"model": source.identity}, overwrite=job.overwrite)
    calibration = run.reusable(key)
    if calibration is None:
        with run.stage(key) as stage:
            stage.work.mkdir()
            report = _measure(job, tokenizer, opening, stage)
            stage.publish(report.results())
            return report
    job.emit(Noted(f"{calibration.directory} exists already, made from the same model and text"))
    return restored(CalibrationReport, calibration, calibration.manifest.results)


def _measure(job: Job, tokenizer: TextTokenizer, opening: Sequence[int], stage: Stage) -> CalibrationReport:
    """Write the token ids and the moments."""
    config, source, emit = job.config, job.source, job.emit
    started = time.monotonic()
    reset_peak_memory()
    section, length = config.calibrate, config.calibrate.sequence_length
    windows = calibration_sequences(
        section.data, section.sequences, length, config.seed, tokenizer, opening=opening, emit=emit
    )
    refuse_unknown_tokens(source, windows.ids)
    save_tensors(stage.directory / "windows.safetensors", {"ids": windows.ids.to(torch.int32)})
    # Evenly spread, so that every source takes part.
    chosen = torch.linspace(0, len(windows.ids) - 1, min(section.statistics_sequences, len(windows.ids))).long()
    moments, tables, loss = _teacher_statistics(
        source, windows.ids[chosen], stage.work, torch.device(config.device), emit
    )
    save_tensors(stage.directory / "second_moments.safetensors", moments)
    save_statistics(stage.directory, tables)
    return CalibrationReport(
        directory=stage.published,
        sequences=len(windows.ids),
        sequence_length=length,
        tokens=windows.ids.numel(),
        loss=loss,
        sources=dict(Counter(windows.sources)),
        bos=bool(opening),
        seconds=time.monotonic() - started,
        memory_bytes=peak_memory_bytes(),
        disk_bytes=disk_bytes(stage.directory.parent),
        planned=plain(job.planned.get(CALIBRATE.name)),
    )


@torch.no_grad()
def _teacher_statistics(
    source: ModelSource, ids: Tensor, work: Path, device: torch.device, emit: Emit
) -> tuple[dict[str, Tensor], TableMoments | None, float]:
    """The mean square of every input feature of every linear layer in the blocks `[in]`, the statistics of embeddings
    and head, and the mean loss in nats.

    With one block's weights in memory at a time, and hidden states in a file in `work`.
    """
    walk = walk_through(source, ids, device, emit)
    _refuse_damaged(walk.network, "")
    windows = torch.arange(len(ids)).split(1)
    hidden = entering_states(walk, ids, 1, work / "hidden.activations")
    handed, handing = Handed(work / "handed"), Handed(work / "handed.partial")
    emit(StageStarted(CALIBRATE.name, len(walk.paths), "block"))
    moments: dict[str, Tensor] = {}
    for index, prefix in enumerate(walk.paths):
        block = walk.load(index)
        _refuse_damaged(block, prefix)
        with _mean_squares(block, prefix, ids.numel()) as sums:
            for window in windows:
                given = walk.given(index, ids[window], hidden[window], handed[window])
                output, handing[window] = run_block(block, given, walk.dtype)
                hidden[window] = output.cpu()
        handed.remove()
        handing.rename(handed.directory)
        for path, entries in sums.items():
            if not bool(entries.isfinite().all()):
                raise QuantizationError(
                    f"{path}: its inputs hold NaN or infinite values: the activations of the base model overflow"
                )
            moments[path] = entries.float().cpu()
        emit(Advanced(CALIBRATE.name, index + 1))
    total, tables = 0.0, moments_of(walk.network)
    for window in windows:
        with autocast(device, walk.dtype), watched_head(walk.network, tables, ids[window]):
            logits = walk.logits(ids[window], hidden[window], handed[window])[0]
        total += float(F.cross_entropy(logits[:-1].float(), ids[window][0, 1:].to(device)))
    if not math.isfinite(total):
        raise QuantizationError("the loss of the base model is not finite: its activations overflow")
    return moments, tables, total / len(ids)


@contextmanager
def _mean_squares(block: nn.Module, prefix: str, tokens: int) -> Iterator[dict[str, Tensor]]:
    """Mean squares `[in]` of the inputs of each linear layer, by path; every forward of `block` adds to them."""
    sums: dict[str, Tensor] = {}

    def watch(path: str, layer: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        sums[path] = torch.zeros(layer.in_features, dtype=torch.float64, device=layer.weight.device)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[path] += inputs[0].float().square().flatten(0, -2).sum(0) / tokens

        return layer.register_forward_pre_hook(hook)

    hooks = [watch(path, layer) for path, layer in linears(block, prefix).items()]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_damaged(module: nn.Module, path: str) -> None:
    """QuantizationError for NaN or infinite weights. Weights on the meta device are skipped."""
    for owner, part in module.named_modules(prefix=path):
        for parameter in part.parameters(recurse=False):
            if not parameter.is_meta and not bool(parameter.isfinite().all()):
                raise QuantizationError(f"{owner}: the weight holds NaN or infinite values; the model is damaged")
