"""`aqlm`: one function a command, each in three sentences: read the settings, run the stages, print the result.

The stages load torch and transformers, which takes seconds, so they are imported inside the commands; `aqlm --help` and
a misspelt flag answer at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from aqlm_cli.cli import evaluate, finetune, inspect, options
from aqlm_cli.cli.console import OneLineErrors, Screen
from aqlm_cli.formatting import PROMPT, command_line
from aqlm_cli.openmp import share_pool
from aqlm_cli.spec.flags import QUANTIZE, as_settings
from aqlm_cli.spec.run_file import build_config

app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


def main() -> None:
    """Run the command line.

    Under torchrun, skip interpreter shutdown: a Gloo thread that still holds a tensor can abort there
    (pytorch/pytorch#179291), and torchrun would then stop the other processes.
    """
    share_pool()
    try:
        app()
    except SystemExit as end:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))


@app.callback()
def about(version: options.Version = False) -> None:
    """Compress a language model to 1-4 bits per weight, and measure what it costs.

    \b
    Example:
      aqlm quantize --bits 2 smollm2-135m
      aqlm eval-ppl runs/SmolLM2-135M-Instruct-2bit
    """


@app.command()
def calibrate(
    model: options.Model = None,
    data: options.CalibrationData = None,
    sequences: options.Sequences = None,
    sequence_length: options.SequenceLength = None,
    bos: options.Bos = None,
    seed: options.Seed = None,
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = None,
    device: options.Device = None,
    threads: options.Threads = None,
    preset: options.Preset = None,
    config: options.RunFile = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Cut a text into sequences and measure the model on them.

    \b
    Example:
      aqlm calibrate smollm2-135m --data builtin --sequences 80
    """
    flags = dict(locals())
    from aqlm_cli.pipeline import order

    settings = build_config(preset, config, as_settings(flags, QUANTIZE))
    with Screen(json, quiet, verbose) as screen:
        order.use_machine(settings)
        job = order.make_job(settings, out, overwrite=overwrite, emit=screen.emit)
        report = order.calibrate_run(job)
        following = command_line("quantize", "--config", job.directory / "run.yaml", "--out", job.directory)
        screen.finish({"calibrate": report}, following)


@app.command()
def quantize(
    model: options.Model = None,
    bits: options.Bits = None,
    scheme: options.Scheme = None,
    method: options.Method = None,
    embeddings: options.Embeddings = None,
    head: options.QuantizedHead = None,
    layer: options.Layer = None,
    target_size: options.TargetSize = None,
    target_bits: options.TargetBits = None,
    target: options.TargetKl = None,
    target_speed: options.TargetSpeed = None,
    among: options.Among = None,
    skip: options.Skip = None,
    only: options.Only = None,
    format: options.Format = None,
    data: options.CalibrationData = None,
    sequences: options.Sequences = None,
    sequence_length: options.SequenceLength = None,
    bos: options.Bos = None,
    seed: options.Seed = None,
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = None,
    device: options.Device = None,
    threads: options.Threads = None,
    max_memory: options.MaxMemory = None,
    max_disk: options.MaxDisk = None,
    preset: options.Preset = None,
    config: options.RunFile = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Quantize the linear layers of a model and pack the result.

    Calibration runs first where it is missing.

    \b
    Example:
      aqlm quantize --bits 2 HuggingFaceTB/SmolLM2-135M-Instruct
      aqlm quantize --target-size 60MB smollm2-135m
      aqlm quantize --scheme 3x8g8 --skip '.*down_proj' --data notes.txt:64,builtin:64 smollm2-135m
    """
    flags = dict(locals())
    from aqlm_cli.pipeline import order

    settings = build_config(preset, config, as_settings(flags, QUANTIZE))
    with Screen(json, quiet, verbose) as screen:
        order.use_machine(settings)
        job = order.make_job(settings, out, overwrite=overwrite, emit=screen.emit)
        if dry_run:
            screen.finish(order.dry_run(job), following="the same command without --dry-run")
            return
        job, plan = order.prepare(job)
        screen.show(plan)
        reports = order.quantize_and_pack(job)
        screen.finish(reports, following=command_line("eval-ppl", job.directory))


@app.command()
def plan(
    model: options.Model = None,
    bits: options.Bits = None,
    scheme: options.Scheme = None,
    method: options.Method = None,
    embeddings: options.Embeddings = None,
    head: options.QuantizedHead = None,
    layer: options.Layer = None,
    target_size: options.TargetSize = None,
    target_bits: options.TargetBits = None,
    target: options.TargetKl = None,
    target_speed: options.TargetSpeed = None,
    among: options.Among = None,
    skip: options.Skip = None,
    only: options.Only = None,
    format: options.Format = None,
    data: options.CalibrationData = None,
    sequences: options.Sequences = None,
    sequence_length: options.SequenceLength = None,
    bos: options.Bos = None,
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = None,
    device: options.Device = None,
    threads: options.Threads = None,
    max_memory: options.MaxMemory = None,
    max_disk: options.MaxDisk = None,
    preset: options.Preset = None,
    config: options.RunFile = None,
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Show the plan of a run, and its time, memory and disk.

    Reads config.json and the headers of the model's files, no weights, and measures this machine for some seconds.

    \b
    Example:
      aqlm plan --bits 2 smollm2-135m
      aqlm plan --target-size 60MB smollm2-135m
      aqlm plan --bits 2 --max-memory 8GiB path/to/Llama-3-70B
    """
    flags = dict(locals())
    from aqlm_cli.pipeline import order

    settings = build_config(preset, config, as_settings(flags, QUANTIZE))
    with Screen(json) as screen:
        order.use_machine(settings)
        job = order.make_job(settings, out or Path.cwd(), emit=screen.emit, with_weights=False)
        reports = order.forecast_run(job)
        screen.finish(reports, following="the same command with quantize in the place of plan")


@app.command()
def pack(
    run: options.Run,
    format: options.Format = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a quantized model as a checkpoint that others can load.

    \b
    Example:
      aqlm pack runs/SmolLM2-135M-Instruct-2bit --format dense --overwrite
    """
    flags = dict(locals())
    from aqlm_cli.pipeline import order

    settings = order.settings_of_run(run, as_settings(flags, QUANTIZE))
    with Screen(json, quiet, verbose) as screen:
        report = order.pack_run(order.make_job(settings, run, overwrite=overwrite, emit=screen.emit))
        screen.finish({"pack": report}, following=command_line("generate", run, "--prompt", PROMPT))


app.command()(finetune.finetune)
for measuring in (
    evaluate.eval_ppl,
    evaluate.evaluate,
    evaluate.probe,
    evaluate.compare,
    evaluate.bench,
    evaluate.generate,
):
    app.command()(measuring)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Run file in YAML.")],
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Run all stages of a run file, from calibration to benchmark.

    `finetune` is included where the file has a section of that name.

    \b
    Example:
      aqlm run configs/smollm2-2bit.yaml
    """
    from aqlm_cli.pipeline import evaluations, order

    settings = build_config(None, file, {})
    with Screen(json, quiet, verbose) as screen:
        order.use_machine(settings)
        job, plan = order.prepare(order.make_job(settings, out, overwrite=overwrite, emit=screen.emit))
        screen.show(plan)
        reports = evaluations.run_all(job)
        screen.finish(reports, following=command_line("generate", job.directory, "--prompt", PROMPT))


for looking in (inspect.status, inspect.report, inspect.verify, inspect.doctor):
    app.command()(looking)
