"""The options that several commands share, each with its one line of help.

All but the switches are None where they were not given: the run file, the preset or the default then counts.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from aqlm_cli.errors import UsageError
from aqlm_cli.spec.methods import METHODS
from aqlm_cli.spec.run_file import FINETUNE_PRESETS, PRESETS
from aqlm_cli.spec.schemes import SCHEMES_BY_BITS, scheme_for_bits


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
Target = Annotated[str, typer.Argument(metavar="MODEL|RUN", help="A model, or the directory of a run.")]
OptionalTarget = Annotated[
    str | None, typer.Argument(metavar="[MODEL|RUN]", help="A model, or the directory of a run.", show_default=False)
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run, such as runs/NAME-2bit.")]

Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")]
RemoteCode = Annotated[bool | None, typer.Option("--trust-remote-code", help="Run Python code of the model.")]
Preset = Annotated[str | None, typer.Option(help=f"Settings under the run file: {', '.join(PRESETS)}.")]
FinetunePreset = Annotated[
    str | None, typer.Option("--preset", help=f"Settings over those of the run: {', '.join(FINETUNE_PRESETS)}.")
]
RunFile = Annotated[Path | None, typer.Option("--config", help="A run file in YAML; flags beat it.")]

Bits = Annotated[
    float | None, typer.Option(help=f"Code bits a weight: {', '.join(f'{bits:g}' for bits in SCHEMES_BY_BITS)}.")
]
Scheme = Annotated[
    str | None,
    typer.Option(
        help=f"The same, exactly: {', '.join(f'{method.scheme} ({name})' for name, method in METHODS.items())}."
    ),
]
Method = Annotated[
    str | None, typer.Option(help=f"{'; '.join(f'{name}: {method.summary}' for name, method in METHODS.items())}.")
]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX", help="Layers to leave in 16 bits, by their whole paths; may be repeated."),
]
Only = Annotated[
    list[str] | None, typer.Option(metavar="REGEX", help="Quantize no other layers than these; may be repeated.")
]

Format = Annotated[
    str | None, typer.Option(help="Of the packed checkpoint: transformers, or dense, an ordinary one in 16 bits.")
]
CalibrationData = Annotated[
    str | None, typer.Option(help="Text to fit to: c4, wikitext2, redpajama, builtin or files; c4:96,notes.txt:32.")
]
Sequences = Annotated[int | None, typer.Option(help="Sequences of text in all, where --data counts none.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens in a window.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Begin every window with the beginning token; if not given, as the tokenizer does by itself.",
        show_default=False,
    ),
]

Seed = Annotated[int | None, typer.Option(help="Of all randomness.")]
Device = Annotated[str | None, typer.Option(help="cpu, or cuda where there is one.")]
Threads = Annotated[int | None, typer.Option(help="Of the processor; all, if not given.")]
Backend = Annotated[str | None, typer.Option(help="Of packed products, as `aqlm doctor` names them.")]
Head = Annotated[str | None, typer.Option(help="exact, or int8: the output head in bytes, which is less to read.")]
MaxMemory = Annotated[str | None, typer.Option(help="Take no more, such as 8GiB: less is then done at a time.")]
MaxDisk = Annotated[str | None, typer.Option(help="Refuse to begin what would take more, such as 20GB.")]
Out = Annotated[Path | None, typer.Option(help="Run directory; runs/NAME-BITS if not given.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Redo what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Results, warnings and errors alone.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Every step, with the time of day.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]


def machine_flags(
    model: str | None,
    revision: str | None,
    trust_remote_code: bool | None,
    seed: int | None,
    device: str | None,
    threads: int | None,
) -> dict[str, Any]:
    """Those that are settings of no section."""
    return {
        "model": model,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
        "device": device,
        "threads": threads,
    }


def limits(max_memory: str | None, max_disk: str | None) -> dict[str, Any]:
    return {"max_memory": max_memory, "max_disk": max_disk}


def chosen_scheme(bits: float | None, scheme: str | None) -> str | None:
    """What `--bits` or `--scheme` says."""
    if bits is not None and scheme is not None:
        raise UsageError("--bits and --scheme say the same thing; give one of them")
    return scheme if bits is None else str(scheme_for_bits(bits))
