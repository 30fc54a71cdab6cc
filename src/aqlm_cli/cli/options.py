"""The options that several commands share, each with its one line of help.

All but the switches are None where they were not given: the run file, the preset or the default counts then.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from aqlm_cli.spec.methods import METHODS
from aqlm_cli.spec.run_file import FINETUNE_PRESETS, PRESETS
from aqlm_cli.spec.schemes import SCHEMES_BY_BITS


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aqlm-cli {metadata.version('aqlm-cli')}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
]

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Hub id, directory, .gguf file or smollm2-135m; may stand in the run file."),
]
Target = Annotated[str, typer.Argument(metavar="MODEL|RUN", help="A model or a run directory.")]
OptionalTarget = Annotated[
    str | None, typer.Argument(metavar="[MODEL|RUN]", help="A model or a run directory.", show_default=False)
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, such as runs/NAME-2bit.")]

Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a model on the Hub.")]
RemoteCode = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
]
Preset = Annotated[str | None, typer.Option(help=f"Preset; the run file overrides it: {', '.join(PRESETS)}.")]
FinetunePreset = Annotated[
    str | None,
    typer.Option("--preset", help=f"Preset; it overrides the settings of the run: {', '.join(FINETUNE_PRESETS)}."),
]
RunFile = Annotated[Path | None, typer.Option("--config", help="Run file in YAML; flags override it.")]

Bits = Annotated[
    float | None, typer.Option(help=f"Code bits per weight: {', '.join(f'{bits:g}' for bits in SCHEMES_BY_BITS)}.")
]
Scheme = Annotated[
    str | None,
    typer.Option(
        help=f"Storage scheme, such as {', '.join(f'{method.scheme} ({name})' for name, method in METHODS.items())}."
    ),
]
Method = Annotated[
    str | None, typer.Option(help=f"{'; '.join(f'{name}: {method.summary}' for name, method in METHODS.items())}.")
]
Embeddings = Annotated[
    str | None, typer.Option(metavar="SCHEME", help="Quantize the embeddings, such as 4x8g8 or int8g64.")
]
QuantizedHead = Annotated[
    str | None,
    typer.Option("--head", metavar="SCHEME", help="Quantize the lm_head; a tied one goes with --embeddings."),
]
Layer = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX=SCHEME", help="Scheme of some layers by whole path, METHOD:SCHEME or keep; repeatable."
    ),
]
TargetSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Size of all safetensors files, such as 60MB: schemes are chosen.")
]
TargetBits = Annotated[
    float | None, typer.Option(metavar="BITS", help="The same in bits per parameter of the whole model, such as 2.5.")
]
TargetKl = Annotated[
    str | None,
    typer.Option("--target", metavar="kl=NATS", help="The smallest model with this divergence, such as kl=0.1."),
]
TargetSpeed = Annotated[
    float | None, typer.Option(metavar="TOKENS", help="The best model that decodes so many tokens/s on this machine.")
]
Among = Annotated[
    str | None, typer.Option(metavar="SCHEMES", help="Schemes that a target chooses from, such as 1x8g8,2x8g8,4x8g8.")
]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX", help="Layers to leave in 16 bits, by whole path; repeatable."),
]
Only = Annotated[
    list[str] | None, typer.Option(metavar="REGEX", help="Quantize only these layers, by whole path; repeatable.")
]

Format = Annotated[
    str | None,
    typer.Option(help="Checkpoint format: transformers, native (any mix of schemes), dense (16 bits), or auto."),
]
CalibrationData = Annotated[
    str | None, typer.Option(help="Calibration text: c4, wikitext2, redpajama, builtin or files; c4:96,notes.txt:32.")
]
Sequences = Annotated[int | None, typer.Option(help="Number of sequences, where --data gives no counts.")]
Dtype = Annotated[str | None, typer.Option(help="Compute type: float32, bfloat16 or float16.")]
Protocol = Annotated[str | None, typer.Option(help="Protocol, such as llamacpp-512, in place of length and BOS.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens per sequence.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Start every sequence with the BOS token (default: as the tokenizer does).",
        show_default=False,
    ),
]

Activations = Annotated[
    str | None,
    typer.Option(metavar="FORMAT", help="Round inputs of linear layers: int8t or block float such as bfp6g16."),
]
Cache = Annotated[
    str | None, typer.Option(metavar="FORMAT", help="Round keys and values: block float such as bfp4g32.")
]
SortKeys = Annotated[
    bool | None,
    typer.Option("--sort-keys", help="Order features of keys by size, for --cache.", show_default=False),
]

Seed = Annotated[int | None, typer.Option(help="Random seed.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:NUMBER.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads (default: all).")]
Backend = Annotated[str | None, typer.Option(help="Matmul backend; see `aqlm doctor`.")]
Head = Annotated[str | None, typer.Option(help="exact (16-bit lm_head) or int8 (less to read).")]
MaxMemory = Annotated[str | None, typer.Option(help="Memory limit, such as 8GiB: smaller batches.")]
MaxDisk = Annotated[str | None, typer.Option(help="Disk limit, such as 20GB: refuse a run that needs more.")]
Out = Annotated[Path | None, typer.Option(help="Run directory (default: runs/NAME-BITS).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Overwrite existing results.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print results, warnings and errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print every step, with the time of day.")]
Markdown = Annotated[bool, typer.Option("--md", help="Print Markdown tables on stdout, all else on stderr.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print comma-separated values on stdout, all else on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")]
