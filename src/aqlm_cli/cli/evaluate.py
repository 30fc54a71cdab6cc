"""The commands that measure a model and generate text with it; registered in app.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from aqlm_cli.cli import options
from aqlm_cli.cli.console import Screen
from aqlm_cli.errors import UsageError
from aqlm_cli.formatting import PROMPT, command_line
from aqlm_cli.records import Record
from aqlm_cli.spec.flags import BENCH, EVAL_PPL, EVALUATE, GENERATE, PROBE, as_settings


def eval_ppl(
    target: options.Target,
    data: Annotated[str | None, typer.Option(help="Text: wikitext2, c4, builtin or a file.")] = None,
    sequence_length: options.SequenceLength = None,
    bos: options.Bos = None,
    protocol: options.Protocol = None,
    divergence: Annotated[
        bool | None, typer.Option("--divergence/--no-divergence", help="Divergence from the base model (default: on).")
    ] = None,
    activations: options.Activations = None,
    cache: options.Cache = None,
    sort_keys: options.SortKeys = None,
    sequences: Annotated[int | None, typer.Option(min=2, help="Number of sequences (default: all).")] = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = None,
    device: options.Device = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure perplexity, and the divergence from the base model.

    Without --protocol it is GPTQ's: sequences without overlap, every token but the first of each scored. Where the
    tokenizer puts a BOS token before a text, each sequence starts with one, unlike in GPTQ: use --no-bos to compare
    with published figures.

    \b
    Example:
      aqlm eval-ppl runs/SmolLM2-135M-Instruct-2bit --data wikitext2 --sequence-length 2048
    """
    flags = dict(locals())
    _refuse_both(protocol, sequence_length, bos)
    from aqlm_cli.pipeline import evaluations, order

    settings = order.settings_for(target, as_settings({**flags, "data": data and [data]}, EVAL_PPL))
    with Screen(json, quiet, verbose) as screen:
        order.use_machine(settings)
        reports = evaluations.measure(target, settings, sequences, screen.emit)
        screen.finish(reports, following=command_line("bench", target))


def evaluate(
    targets: Annotated[list[str], typer.Argument(metavar="TARGET...", help="Run directories or models.")],
    kind: Annotated[str | None, typer.Option(help="Kinds of evaluation, such as ppl,gate (default: ppl).")] = None,
    data: Annotated[str | None, typer.Option(help="Text: wikitext2, c4, builtin or a file.")] = None,
    sequence_length: options.SequenceLength = None,
    bos: options.Bos = None,
    dtype: options.Dtype = None,
    protocol: options.Protocol = None,
    activations: options.Activations = None,
    cache: options.Cache = None,
    sort_keys: options.SortKeys = None,
    way: Annotated[str | None, typer.Option(help="attribution: swap each layer in, or out (default: in).")] = None,
    unit: Annotated[str | None, typer.Option(help="attribution: by layer or by block (default: layer).")] = None,
    budget_minutes: Annotated[float | None, typer.Option(help="attribution: take about so many minutes.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE_OR_NAME", help="Questions: a .jsonl file, or a task of lm-evaluation-harness; repeatable."
        ),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(min=2, help="Number of sequences, or of questions of a task (default: all).")
    ] = None,
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = None,
    device: options.Device = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Evaluate models in every way that is asked for. Several are measured one after the other.

    ppl is perplexity and divergence, gate compares texts with the base model's, attribution is the divergence that each
    layer causes, tasks is the accuracy on questions. Exit status 3: a model collapsed at the gate.

    \b
    Example:
      aqlm evaluate runs/SmolLM2-135M-Instruct-2bit --kind ppl,gate --data builtin
      aqlm evaluate runs/SmolLM2-135M-Instruct-2bit --kind tasks --tasks questions.jsonl
    """
    flags = dict(locals())
    _refuse_both(protocol, sequence_length, bos)
    from aqlm_cli.pipeline import evaluations, order

    kinds = kind and _listed(kind)
    given = as_settings({**flags, "data": data and [data], "kinds": kinds}, EVALUATE)
    if sequence_length is not None:
        given.setdefault("evaluate", {}).setdefault("attribution", {})["sequence_length"] = sequence_length
    with Screen(json, quiet, verbose) as screen:
        reports: dict[str, Record] = {}
        for target in targets:
            settings = order.settings_for(target, given)
            _refuse_unused(flags, settings.evaluate.kinds)
            order.use_machine(settings)
            found = evaluations.evaluate_model(target, settings, sequences, screen.emit)
            reports |= found if len(targets) == 1 else {f"{target}: {name}": one for name, one in found.items()}
        screen.finish(reports, following=command_line("bench", targets[0]))
    if any(getattr(report, "collapsed", False) for report in reports.values()):
        raise typer.Exit(3)


USED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("bos", "protocol", "activations", "cache", "sort_keys"), ("ppl",)),
    **dict.fromkeys(("way", "unit", "budget_minutes"), ("attribution",)),
    **dict.fromkeys(("data", "sequence_length"), ("ppl", "attribution")),
    "dtype": ("ppl", "tasks"),
    "sequences": ("ppl", "attribution", "tasks", "probe"),
    "tasks": ("tasks",),
}
"""The kinds of evaluation that each flag of `evaluate` is for."""


def _refuse_unused(flags: Mapping[str, Any], kinds: Sequence[str]) -> None:
    """UsageError for a flag that none of these kinds looks at."""
    for name, of in USED.items():
        if flags[name] is not None and not set(of) & set(kinds):
            raise UsageError(f"--{name.replace('_', '-')} is for the kind {' or '.join(of)}; add it to --kind")


def compare(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="File of a study in YAML.")],
    out: Annotated[Path | None, typer.Option(help="Directory of the runs (default: runs/STUDY).")] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    md: options.Markdown = False,
    csv: options.Csv = False,
) -> None:
    """Quantize a model in many ways, and evaluate all of them alike.

    Each cell of the study becomes a run directory; complete ones are reused, so that an interrupted command continues
    after its last cell.

    \b
    Example:
      aqlm compare configs/studies/methods-3bit.yaml
    """
    from aqlm_cli.pipeline import compare as comparing
    from aqlm_cli.spec.study import load_study

    found = load_study(study)
    directory = Path("runs") / found.name if out is None else out
    with Screen(json, quiet, verbose, md=md, csv=csv) as screen:
        report = comparing.compare(found, directory, screen.emit, overwrite)
        screen.finish({"compare": report}, following=command_line("evaluate", directory / found.cells[0].name))
    if md or csv:
        print(report.as_markdown() if md else report.as_csv())


def probe(
    target: options.Target,
    noise: Annotated[str | None, typer.Option(help="Noise: gaussian, rademacher, uniform; several by comma.")] = None,
    correlate: Annotated[
        str | None, typer.Option(help="Noise is none: equal, up: as large as weights, down: largest on the smallest.")
    ] = None,
    strength: Annotated[
        str | None, typer.Option(help="Norms of the noise as shares of those of the weights, such as 0.01,0.1.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Shares of the largest weights to clip, such as 0.001; several by comma.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Text: wikitext2, c4, builtin or a file.")] = None,
    sequences: Annotated[int | None, typer.Option(min=2, help="Number of sequences (default: 8).")] = None,
    sequence_length: options.SequenceLength = None,
    bos: options.Bos = None,
    dtype: options.Dtype = None,
    seed: options.Seed = None,
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = None,
    device: options.Device = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    md: options.Markdown = False,
) -> None:
    """Measure the harm of noise and of clipping on the weights.

    All noise of one strength has one norm; it differs in its distribution and in which weights it falls on. Perplexity
    and divergence are those from the same model without noise, on a few sequences.

    \b
    Example:
      aqlm probe smollm2-135m --noise gaussian,rademacher --strength 0.03,0.1 --data builtin
    """
    flags = dict(locals())
    from aqlm_cli.pipeline import evaluations, order

    lists = {name: flags[name] and _listed(flags[name]) for name in ("noise", "correlate", "strength", "clip")}
    settings = order.settings_for(target, as_settings({**flags, **lists}, PROBE))
    with Screen(json, quiet, verbose, md=md) as screen:
        order.use_machine(settings)
        report = evaluations.probe_model(target, settings, screen.emit)
        screen.finish({"probe": report}, following=command_line("eval-ppl", target))
    if md:
        print(report.as_markdown())


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def bench(
    target: options.OptionalTarget = None,
    shape: Annotated[
        str | None, typer.Option(help="Shape in place of a model, such as llama-3.2-1b, with random weights.")
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="Scheme for --shape, such as 2x8g8.")] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Scheme of embeddings and head for --shape (default: 16 bits).")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to decode.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Prompt length in tokens.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Number of repetitions.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of x in a single matmul.")] = None,
    backend: options.Backend = None,
    head: options.Head = None,
    llama_bench: Annotated[str | None, typer.Option(help="llama.cpp's llama-bench, to compare with.")] = None,
    llama_model: Annotated[list[str] | None, typer.Option(help=".gguf file for llama-bench; repeatable.")] = None,
    seed: options.Seed = None,
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    md: options.Markdown = False,
    csv: options.Csv = False,
) -> None:
    """Measure tokens per second; of a run, beside its base model.

    Prefill, decoding token by token, and single matmuls are measured separately, on the CPU.

    \b
    Example:
      aqlm bench runs/SmolLM2-135M-Instruct-2bit --threads 1
      aqlm bench --shape llama-3.2-1b --scheme 2x8g8
    """
    flags = dict(locals())
    from aqlm_cli.pipeline import evaluations, order

    settings = order.settings_to_bench(target, shape, as_settings(flags, BENCH))
    with Screen(json, quiet, verbose, md=md, csv=csv) as screen:
        order.use_machine(settings)
        if target is None:
            report = evaluations.compare_speed_of_shape(str(shape), settings, screen.emit)
            screen.finish({"bench": report}, following=command_line("quantize", "--bits", 2, "MODEL"))
        else:
            report = evaluations.compare_speed(target, settings, screen.emit)
            screen.finish({"bench": report}, following=command_line("generate", target, "--prompt", PROMPT))
    if md or csv:
        print(report.as_markdown() if md else report.as_csv())


def generate(
    target: options.Target,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0: always the likeliest token.")
    ] = 0.0,
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
    from aqlm_cli.pipeline import evaluations, order

    settings = order.settings_for(target, as_settings(flags, GENERATE))
    with Screen(json, quiet, verbose) as screen:
        order.use_machine(settings)
        report = evaluations.continue_text(target, settings, prompt, tokens, temperature, screen.emit)
        screen.finish({"generate": report}, following=command_line("bench", target))


def _refuse_both(protocol: str | None, sequence_length: int | None, bos: bool | None) -> None:
    if protocol is not None and (sequence_length is not None or bos is not None):
        raise UsageError("--protocol has a length and a beginning of its own; leave --sequence-length and --bos out")
