"""`aqlm`: one function a command, each in three sentences: read the settings, run the stages, print the result.

The stages load torch and transformers, which takes seconds, so they are imported inside the commands; `aqlm --help` and
a misspelt flag answer at once.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from aqlm_cli import options
from aqlm_cli.config import build_config
from aqlm_cli.errors import UsageError
from aqlm_cli.openmp import share_pool
from aqlm_cli.screen import OneLineErrors, Screen

PROMPT = "The capital of France is"
"""To suggest; every language model has something to say to it."""

app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


def main() -> None:
    share_pool()
    app()


@app.callback()
def about(version: options.Version = False) -> None:
    """Compress a language model to 1-4 bits a weight, and see what was won and lost.

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
    """Cut a text into windows and measure the model on them.

    \b
    Example:
      aqlm calibrate smollm2-135m --data builtin --sequences 80
    """
    from aqlm_cli import pipeline

    settings = build_config(
        preset,
        config,
        {
            **options.machine_flags(model, revision, trust_remote_code, seed, device, threads),
            "calibrate": {"data": data, "sequences": sequences, "sequence_length": sequence_length},
        },
    )
    with Screen(json, quiet, verbose) as screen:
        pipeline.use_machine(settings)
        directory = out or pipeline.default_run_directory(settings)
        report = pipeline.calibrate_run(settings, directory, overwrite, screen.emit)
        screen.finish(
            {"calibrate": report},
            following=_command("quantize", "--config", directory / "run.yaml", "--out", directory),
        )


@app.command()
def quantize(
    model: options.Model = None,
    bits: options.Bits = None,
    scheme: options.Scheme = None,
    method: options.Method = None,
    skip: options.Skip = None,
    only: options.Only = None,
    data: options.CalibrationData = None,
    sequences: options.Sequences = None,
    sequence_length: options.SequenceLength = None,
    seed: options.Seed = None,
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = None,
    device: options.Device = None,
    threads: options.Threads = None,
    preset: options.Preset = None,
    config: options.RunFile = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Compress a model's linear layers and pack the result.

    Calibrates first where that has not been done.

    \b
    Example:
      aqlm quantize --bits 2 HuggingFaceTB/SmolLM2-135M-Instruct
      aqlm quantize --scheme 3x8g8 --skip '.*down_proj' --data notes.txt:64,builtin:64 smollm2-135m
    """
    from aqlm_cli import pipeline

    settings = build_config(
        preset,
        config,
        {
            **options.machine_flags(model, revision, trust_remote_code, seed, device, threads),
            "calibrate": {"data": data, "sequences": sequences, "sequence_length": sequence_length},
            "quantize": {"method": method, "scheme": options.chosen_scheme(bits, scheme), "skip": skip, "only": only},
        },
    )
    with Screen(json, quiet, verbose) as screen:
        pipeline.use_machine(settings)
        directory = out or pipeline.default_run_directory(settings)
        plan = pipeline.prepare(settings)
        if dry_run:
            screen.finish({"plan": plan}, following="the same command without --dry-run")
            return
        screen.show(plan)
        reports = pipeline.quantize_and_pack(settings, directory, overwrite, screen.emit)
        screen.finish(reports, following=_command("eval-ppl", directory))


@app.command()
def pack(
    run: options.Run,
    format: Annotated[str | None, typer.Option(help="transformers, or dense: an ordinary 16-bit checkpoint.")] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a quantized model as a checkpoint for others.

    \b
    Example:
      aqlm pack runs/SmolLM2-135M-Instruct-2bit --format dense --overwrite
    """
    from aqlm_cli import pipeline

    settings = pipeline.settings_of_run(run, {"pack": {"format": format}})
    with Screen(json, quiet, verbose) as screen:
        report = pipeline.pack_run(settings, run, overwrite, screen.emit)
        screen.finish({"pack": report}, following=_command("generate", run, "--prompt", PROMPT))


@app.command()
def eval_ppl(
    target: options.Target,
    data: Annotated[str | None, typer.Option(help="wikitext2, c4, builtin or a file.")] = None,
    sequence_length: options.SequenceLength = None,
    windows: Annotated[int | None, typer.Option(min=2, help="Only the first so many; all, if not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = None,
    device: options.Device = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure perplexity; of a run, beside the original's.

    The protocol is GPTQ's: windows without overlap, every token but a window's first scored.

    \b
    Example:
      aqlm eval-ppl runs/SmolLM2-135M-Instruct-2bit --data wikitext2 --sequence-length 2048
    """
    from aqlm_cli import pipeline

    settings = pipeline.settings_for(
        target,
        {
            **options.machine_flags(None, revision, trust_remote_code, None, device, threads),
            "eval_ppl": {"data": data and [data], "sequence_length": sequence_length, "dtype": dtype},
        },
    )
    with Screen(json, quiet, verbose) as screen:
        pipeline.use_machine(settings)
        reports = pipeline.measure(target, settings, windows, screen.emit)
        screen.finish(reports, following=_command("bench", target))


@app.command()
def bench(
    target: options.OptionalTarget = None,
    shape: Annotated[
        str | None, typer.Option(help="In place of a model: llama-3.2-1b or the like, with random numbers.")
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="With --shape: 2x8g8 or the like.")] = None,
    tokens: Annotated[int | None, typer.Option(help="New tokens to decode.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of the prompt.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Times that each model runs.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of x in a single product.")] = None,
    backend: options.Backend = None,
    head: options.Head = None,
    llama_bench: Annotated[str | None, typer.Option(help="llama.cpp's program, to measure beside.")] = None,
    llama_model: Annotated[list[str] | None, typer.Option(help="A .gguf file that it runs; repeatable.")] = None,
    seed: options.Seed = None,
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    md: Annotated[bool, typer.Option("--md", help="Markdown tables on stdout, everything else on stderr.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Likewise comma-separated values.")] = False,
) -> None:
    """Measure tokens per second; of a run, beside the original's.

    Reading a prompt, decoding token by token, and single products are measured apart, on the CPU.

    \b
    Example:
      aqlm bench runs/SmolLM2-135M-Instruct-2bit --threads 1
      aqlm bench --shape llama-3.2-1b --scheme 2x8g8
    """
    from aqlm_cli import pipeline

    if (target is None) == (shape is None):
        raise UsageError("give a model, a run or --shape, one of them")
    if json + md + csv > 1:
        raise UsageError("--json, --md and --csv are three forms of the same; give one of them")
    if scheme is not None and shape is None:
        raise UsageError("--scheme goes with --shape; a run has a scheme of its own")
    lengths = {"tokens": tokens, "prompt": prompt, "repeats": repeats, "batch": batch}
    settings = pipeline.settings_for(
        target or str(shape),
        {
            **options.machine_flags(None, revision, trust_remote_code, seed, None, threads),
            "quantize": {"scheme": scheme},
            "bench": {
                **lengths,
                "backend": backend,
                "head": head,
                "llama_bench": llama_bench,
                "llama_models": llama_model,
            },
        },
    )
    with Screen(json, quiet, verbose, for_machines=md or csv) as screen:
        pipeline.use_machine(settings)
        if target is None:
            report = pipeline.compare_speed_of_shape(str(shape), settings, screen.emit)
            screen.finish({"bench": report}, following=_command("quantize", "--bits", 2, "MODEL"))
        else:
            report = pipeline.compare_speed(target, settings, screen.emit)
            screen.finish({"bench": report}, following=_command("generate", target, "--prompt", PROMPT))
    if md or csv:
        print(report.as_markdown() if md else report.as_csv())


@app.command()
def generate(
    target: options.Target,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    backend: options.Backend = None,
    head: options.Head = None,
    seed: options.Seed = None,
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = None,
    device: options.Device = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Continue a text.

    \b
    Example:
      aqlm generate runs/SmolLM2-135M-Instruct-2bit --prompt "The capital of France is"
    """
    from aqlm_cli import pipeline

    flags = options.machine_flags(None, revision, trust_remote_code, seed, device, threads)
    settings = pipeline.settings_for(target, {**flags, "bench": {"backend": backend, "head": head}})
    with Screen(json, quiet, verbose) as screen:
        pipeline.use_machine(settings)
        report = pipeline.continue_text(target, settings, prompt, tokens, temperature, screen.emit)
        screen.finish({"generate": report}, following=_command("bench", target))


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run file in YAML.")],
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Run all stages of a run file, calibration to benchmark.

    \b
    Example:
      aqlm run configs/smollm2-2bit.yaml
    """
    from aqlm_cli import pipeline

    settings = build_config(None, file, {})
    with Screen(json, quiet, verbose) as screen:
        pipeline.use_machine(settings)
        directory = out or pipeline.default_run_directory(settings)
        screen.show(pipeline.prepare(settings))
        reports = pipeline.run_all(settings, directory, overwrite, screen.emit)
        screen.finish(reports, following=_command("generate", directory, "--prompt", PROMPT))


@app.command()
def status(run: options.Run, json: options.Json = False) -> None:
    """Show where a run stands and how long it will take.

    Another process may be at work in it; nothing is waited for.

    \b
    Example:
      aqlm status runs/SmolLM2-135M-Instruct-2bit
    """
    from aqlm_cli import pipeline

    with Screen(json) as screen:
        report = pipeline.status(run)
        finished = all(stage.state == "finished" for stage in report.stages)
        following = _command("eval-ppl", run) if finished else _command("status", run)
        if not finished and report.process is None:
            following = _command("quantize", "--config", run / "run.yaml", "--out", run)
        screen.finish({"status": report}, following=following)


@app.command()
def doctor(json: options.Json = False) -> None:
    """Show what this machine has and which backends it can use.

    \b
    Example:
      aqlm doctor
    """
    from aqlm_cli import pipeline

    with Screen(json) as screen:
        screen.finish({"doctor": pipeline.doctor()}, following=_command("quantize", "--bits", 2, "smollm2-135m"))


def _command(name: str, *arguments: object) -> str:
    """A command as one would type it."""
    return shlex.join(["aqlm", name, *map(str, arguments)])
