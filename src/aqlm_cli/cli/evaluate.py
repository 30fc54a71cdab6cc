"""The commands that measure a model and let it speak, registered by cli.py."""

from __future__ import annotations

from typing import Annotated

import typer

from aqlm_cli.cli import options
from aqlm_cli.cli.console import Screen
from aqlm_cli.formatting import PROMPT, command_line
from aqlm_cli.spec.flags import BENCH, EVAL_PPL, GENERATE, as_settings


def eval_ppl(
    target: options.Target,
    data: Annotated[str | None, typer.Option(help="wikitext2, c4, builtin or a file.")] = None,
    sequence_length: options.SequenceLength = None,
    bos: options.Bos = None,
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

    The protocol is GPTQ's: windows without overlap, every token but a window's first scored. Where the tokenizer puts a
    beginning token before a text, each window has one, which GPTQ's have not: --no-bos compares with published figures.

    \b
    Example:
      aqlm eval-ppl runs/SmolLM2-135M-Instruct-2bit --data wikitext2 --sequence-length 2048
    """
    flags = dict(locals())
    from aqlm_cli.pipeline import order

    settings = order.settings_for(target, as_settings({**flags, "data": data and [data]}, EVAL_PPL))
    with Screen(json, quiet, verbose) as screen:
        order.use_machine(settings)
        reports = order.measure(target, settings, windows, screen.emit)
        screen.finish(reports, following=command_line("bench", target))


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
    flags = dict(locals())
    from aqlm_cli.pipeline import order

    settings = order.settings_to_bench(target, shape, as_settings(flags, BENCH))
    with Screen(json, quiet, verbose, md=md, csv=csv) as screen:
        order.use_machine(settings)
        if target is None:
            report = order.compare_speed_of_shape(str(shape), settings, screen.emit)
            screen.finish({"bench": report}, following=command_line("quantize", "--bits", 2, "MODEL"))
        else:
            report = order.compare_speed(target, settings, screen.emit)
            screen.finish({"bench": report}, following=command_line("generate", target, "--prompt", PROMPT))
    if md or csv:
        print(report.as_markdown() if md else report.as_csv())


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
    flags = dict(locals())
    from aqlm_cli.pipeline import order

    settings = order.settings_for(target, as_settings(flags, GENERATE))
    with Screen(json, quiet, verbose) as screen:
        order.use_machine(settings)
        report = order.continue_text(target, settings, prompt, tokens, temperature, screen.emit)
        screen.finish({"generate": report}, following=command_line("bench", target))
