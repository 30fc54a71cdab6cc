"""`aqlm`: one function a command, each in three sentences: read the settings, run the stages, print the result.

The stages load torch and transformers, which takes seconds, so they are imported inside the commands; `aqlm --help` and
a misspelt flag answer at once.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from aqlm_cli.config import PRESETS, build_config
from aqlm_cli.errors import AqlmError, UsageError
from aqlm_cli.scheme import SCHEMES_BY_BITS, scheme_for_bits
from aqlm_cli.screen import Screen, show_error


class OneLineErrors(TyperGroup):
    """What a user can mend is one line on stderr; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _mendable() as error:
            show_error(error)
            raise typer.Exit(getattr(error, "exit_status", 1)) from error
        except KeyboardInterrupt as interrupt:
            show_error(AqlmError("interrupted; finished stages are kept, the same command goes on after them"))
            raise typer.Exit(130) from interrupt


def _mendable() -> tuple[type[Exception], ...]:
    """Looked up when something was raised: a KernelError can only come from a package that is loaded by then."""
    kernels = sys.modules.get("aqlm_kernels.errors")
    return (AqlmError,) if kernels is None else (AqlmError, kernels.KernelError)


app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


def main() -> None:
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aqlm-cli {metadata.version('aqlm-cli')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Compress a language model to 1-4 bits a weight, and see what was won and lost.

    \b
    Example:
      aqlm quantize --bits 2 smollm2-135m
      aqlm eval-ppl runs/SmolLM2-135M-Instruct-2bit
    """


# -------------------------------------------------------------------------------------------------- options they share
# None stands for "not given": the run file, the preset or the default then counts.

BITS = ", ".join(f"{bits:g}" for bits in SCHEMES_BY_BITS)

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Hub id, directory, .gguf file or smollm2-135m; may stand in the run file."),
]
Target = Annotated[str, typer.Argument(metavar="MODEL|RUN", help="A model, or the directory of a run.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run, such as runs/NAME-2bit.")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")]
RemoteCode = Annotated[bool | None, typer.Option("--trust-remote-code", help="Run Python code of the model.")]
Preset = Annotated[str | None, typer.Option(help=f"Settings under the run file: {', '.join(PRESETS)}.")]
RunFile = Annotated[Path | None, typer.Option("--config", help="A run file in YAML; flags beat it.")]
CalibrationData = Annotated[
    str | None, typer.Option(help="Text to fit to: c4, wikitext2, redpajama, builtin or files; c4:96,notes.txt:32.")
]
Sequences = Annotated[int | None, typer.Option(help="Windows of text in all, where --data counts none.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens in a window.")]
Seed = Annotated[int | None, typer.Option(help="Of all randomness.")]
Device = Annotated[str | None, typer.Option(help="cpu, or cuda where there is one.")]
Threads = Annotated[int | None, typer.Option(help="Of the processor; all, if not given.")]
Out = Annotated[Path | None, typer.Option(help="Run directory; runs/NAME-BITS if not given.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Redo what is there.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]


# ------------------------------------------------------------------------------------------------------------ commands


@app.command()
def calibrate(
    model: Model = None,
    data: CalibrationData = None,
    sequences: Sequences = None,
    sequence_length: SequenceLength = None,
    seed: Seed = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = None,
    device: Device = None,
    threads: Threads = None,
    preset: Preset = None,
    config: RunFile = None,
    out: Out = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Cut windows from a text and measure what the model makes of them.

    \b
    Example:
      aqlm calibrate smollm2-135m --data builtin --sequences 80
    """
    from aqlm_cli import pipeline

    settings = build_config(
        preset,
        config,
        {
            **_machine_flags(model, revision, trust_remote_code, seed, device, threads),
            "calibrate": {"data": data, "sequences": sequences, "sequence_length": sequence_length},
        },
    )
    with Screen(json) as screen:
        pipeline.use_threads(settings.threads)
        directory = out or pipeline.default_run_directory(settings)
        report = pipeline.calibrate(settings, directory, overwrite, screen.emit)
        screen.finish({"calibrate": report}, following=f"aqlm quantize --config {directory}/run.yaml --out {directory}")


@app.command()
def quantize(
    model: Model = None,
    bits: Annotated[float | None, typer.Option(help=f"Code bits a weight: {BITS}.")] = None,
    scheme: Annotated[str | None, typer.Option(help="The same, exactly: 2x8g8, 1x16g8; for rtn int2g64.")] = None,
    method: Annotated[str | None, typer.Option(help="aqlm, or rtn: round to nearest, the baseline.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave layers in 16 bits: a regular expression that matches whole paths.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Quantize no other layers than these; likewise.")] = None,
    data: CalibrationData = None,
    sequences: Sequences = None,
    sequence_length: SequenceLength = None,
    seed: Seed = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = None,
    device: Device = None,
    threads: Threads = None,
    preset: Preset = None,
    config: RunFile = None,
    out: Out = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json: Json = False,
) -> None:
    """Compress a model's linear layers and pack the result; calibrates first where that is missing.

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
            **_machine_flags(model, revision, trust_remote_code, seed, device, threads),
            "calibrate": {"data": data, "sequences": sequences, "sequence_length": sequence_length},
            "quantize": {
                "method": method,
                "scheme": _scheme(bits, scheme),
                "skip": skip or None,
                "only": only or None,
            },
        },
    )
    with Screen(json) as screen:
        pipeline.use_threads(settings.threads)
        directory = out or pipeline.default_run_directory(settings)
        plan = pipeline.prepare(settings)
        if dry_run:
            screen.finish({"plan": plan}, following="the same command without --dry-run")
            return
        screen.show(plan)
        reports = pipeline.quantize_and_pack(settings, directory, overwrite, screen.emit)
        screen.finish(reports, following=f"aqlm eval-ppl {directory}")


@app.command()
def pack(
    run: Run,
    format: Annotated[str | None, typer.Option(help="transformers, or dense: an ordinary 16-bit checkpoint.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a quantized model as a checkpoint that transformers loads.

    \b
    Example:
      aqlm pack runs/SmolLM2-135M-Instruct-2bit --format dense --overwrite
    """
    from aqlm_cli import pipeline

    settings = pipeline.settings_of_run(run, {"pack": {"format": format}})
    with Screen(json) as screen:
        report = pipeline.pack_run(settings, run, overwrite, screen.emit)
        screen.finish({"pack": report}, following=f"aqlm generate {run} --prompt ...")


@app.command()
def eval_ppl(
    target: Target,
    data: Annotated[str | None, typer.Option(help="wikitext2, c4, builtin or a file.")] = None,
    sequence_length: SequenceLength = None,
    windows: Annotated[int | None, typer.Option(min=2, help="Only the first so many; all, if not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure perplexity as GPTQ does; of a run, beside the original's.

    \b
    Example:
      aqlm eval-ppl runs/SmolLM2-135M-Instruct-2bit --data wikitext2 --sequence-length 2048
    """
    from aqlm_cli import pipeline

    settings = pipeline.settings_for(
        target,
        {
            **_machine_flags(None, revision, trust_remote_code, None, device, threads),
            "eval_ppl": {"data": data and [data], "sequence_length": sequence_length, "dtype": dtype},
        },
    )
    with Screen(json) as screen:
        pipeline.use_threads(settings.threads)
        reports = pipeline.measure(target, settings, windows, screen.emit)
        screen.finish(reports, following=f"aqlm bench {target}")


@app.command()
def bench(
    target: Target,
    tokens: Annotated[int | None, typer.Option(help="New tokens to decode.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of the prompt.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Times that each model runs.")] = None,
    seed: Seed = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure tokens per second, of decoding and of reading a prompt; of a run, beside the original's.

    \b
    Example:
      aqlm bench runs/SmolLM2-135M-Instruct-2bit --threads 1
    """
    from aqlm_cli import pipeline

    settings = pipeline.settings_for(
        target,
        {
            **_machine_flags(None, revision, trust_remote_code, seed, None, threads),
            "bench": {"tokens": tokens, "prompt": prompt, "repeats": repeats},
        },
    )
    with Screen(json) as screen:
        pipeline.use_threads(settings.threads)
        report = pipeline.compare_speed(target, settings, screen.emit)
        screen.finish({"bench": report}, following=f"aqlm generate {target} --prompt ...")


@app.command()
def generate(
    target: Target,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Seed = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Continue a text.

    \b
    Example:
      aqlm generate runs/SmolLM2-135M-Instruct-2bit --prompt "The capital of France is"
    """
    from aqlm_cli import pipeline

    flags = _machine_flags(None, revision, trust_remote_code, seed, device, threads)
    settings = pipeline.settings_for(target, flags)
    with Screen(json) as screen:
        pipeline.use_threads(settings.threads)
        report = pipeline.continue_text(target, settings, prompt, tokens, temperature, screen.emit)
        screen.finish({"generate": report}, following=f"aqlm bench {target}")


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run file in YAML.")],
    out: Out = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Run all stages of a run file, from calibration to the benchmark.

    \b
    Example:
      aqlm run configs/smollm2-2bit.yaml
    """
    from aqlm_cli import pipeline

    settings = build_config(None, file, {})
    with Screen(json) as screen:
        pipeline.use_threads(settings.threads)
        directory = out or pipeline.default_run_directory(settings)
        reports = pipeline.run_all(settings, directory, overwrite, screen.emit)
        screen.finish(reports, following=f"aqlm generate {directory} --prompt ...")


@app.command()
def doctor(json: Json = False) -> None:
    """Show what this machine has, which backends it can use, and why not the others.

    \b
    Example:
      aqlm doctor
    """
    from aqlm_cli import pipeline

    with Screen(json) as screen:
        screen.finish({"doctor": pipeline.doctor()}, following="aqlm quantize --bits 2 MODEL")


def _machine_flags(
    model: str | None,
    revision: str | None,
    trust_remote_code: bool | None,
    seed: int | None,
    device: str | None,
    threads: int | None,
) -> dict[str, Any]:
    return {
        "model": model,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
        "device": device,
        "threads": threads,
    }


def _scheme(bits: float | None, scheme: str | None) -> str | None:
    if bits is not None and scheme is not None:
        raise UsageError("--bits and --scheme say the same thing; give one of them")
    return scheme if bits is None else str(scheme_for_bits(bits))
