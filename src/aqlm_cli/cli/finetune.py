"""The command that teaches a quantized model by its original; registered by cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aqlm_cli.cli import options
from aqlm_cli.cli.console import Screen
from aqlm_cli.formatting import command_line
from aqlm_cli.spec.flags import FINETUNE, as_settings


def finetune(
    target: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, or an AQLM checkpoint by anyone.")],
    teacher: Annotated[str | None, typer.Option(help="The model that CHECKPOINT was made from.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Begin a new run here; of a CHECKPOINT runs/NAME-finetuned if not given.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text to learn from; self:64 is sampled from the original; if not given, calibration's."),
    ] = None,
    sequences: options.Sequences = None,
    sequence_length: options.SequenceLength = None,
    bos: options.Bos = None,
    steps: Annotated[int | None, typer.Option(help="How many.")] = None,
    time_budget: Annotated[str | None, typer.Option(help="Such as 2h or 90m: as many steps as fit.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Relative to the size of each tensor.")] = None,
    codes: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Let so many of the codes move at a step, such as 0.01.")
    ] = None,
    embeddings: Annotated[bool | None, typer.Option("--embeddings", help="Train them and the head as well.")] = None,
    preset: options.FinetunePreset = None,
    device: options.Device = None,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Teach a quantized model by its original, at the same size.

    Codebooks, scales, norms and biases move; the codes stay, unless --codes lets them. Packs the result. A new run
    begins with the newest codes, codebooks and scales of another one, or of a checkpoint. Several processes learn
    together under `torchrun --nproc-per-node N -m aqlm_cli finetune ...`.

    \b
    Example:
      aqlm finetune runs/SmolLM2-135M-Instruct-2bit --time-budget 30m
      aqlm finetune path/to/AQLM-checkpoint --teacher path/to/original --data notes.txt:400
    """
    flags = as_settings(locals(), FINETUNE)
    from aqlm_cli.pipeline import order

    settings, run = order.settings_to_finetune(target, teacher, out, flags, preset)
    with Screen(json, quiet, verbose) as screen:
        order.use_machine(settings)
        reports = order.finetune_run(target, order.make_job(settings, run, overwrite=overwrite, emit=screen.emit))
        if reports:
            screen.finish(reports, following=command_line("eval-ppl", run))
