"""The command that fine-tunes a quantized model by distillation; registered in app.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aqlm_cli.cli import options
from aqlm_cli.cli.console import Screen
from aqlm_cli.formatting import command_line
from aqlm_cli.spec.flags import FINETUNE, as_settings


def finetune(
    target: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, or any AQLM checkpoint.")],
    teacher: Annotated[str | None, typer.Option(help="Base model of CHECKPOINT.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of a new run (default for a CHECKPOINT: runs/NAME-finetuned).")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Training text; self:64 is sampled from the base model (default: the calibration set)."),
    ] = None,
    sequences: options.Sequences = None,
    sequence_length: options.SequenceLength = None,
    bos: options.Bos = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    time_budget: Annotated[str | None, typer.Option(help="Time limit, such as 2h or 90m, in place of --steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate, relative to the size of each tensor.")
    ] = None,
    codes: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of the codes that may change at a step, such as 0.01.")
    ] = None,
    embeddings: Annotated[
        bool | None, typer.Option("--embeddings", help="Train the embeddings and the lm_head, too.")
    ] = None,
    preset: options.FinetunePreset = None,
    device: options.Device = None,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Fine-tune a quantized model by distillation. The size does not change.

    The base model is the teacher. Trains codebooks, scales, norms and biases, and with --codes the codes. Packs the
    result. A new run starts with the newest codes, codebooks and scales of another run, or of a checkpoint. Several
    processes train together under `torchrun --nproc-per-node N -m aqlm_cli finetune ...`.

    \b
    Example:
      aqlm finetune runs/SmolLM2-135M-Instruct-2bit --time-budget 30m
      aqlm finetune path/to/AQLM-checkpoint --teacher path/to/base-model --data notes.txt:400
    """
    flags = as_settings(locals(), FINETUNE)
    from aqlm_cli.pipeline import order

    settings, run = order.settings_to_finetune(target, teacher, out, flags, preset)
    with Screen(json, quiet, verbose) as screen:
        order.use_machine(settings)
        reports = order.finetune_run(target, order.make_job(settings, run, overwrite=overwrite, emit=screen.emit))
        if reports:
            screen.finish(reports, following=command_line("eval-ppl", run))
