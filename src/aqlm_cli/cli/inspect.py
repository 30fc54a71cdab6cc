"""The commands that inspect a run, or the machine, and change neither; registered in app.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aqlm_cli.cli import options
from aqlm_cli.cli.console import Screen
from aqlm_cli.formatting import command_line


def status(run: options.Run, json: options.Json = False) -> None:
    """Show the state of a run and the time that it still needs.

    Another process may be running in it; the command does not wait.

    \b
    Example:
      aqlm status runs/SmolLM2-135M-Instruct-2bit
    """
    from aqlm_cli.pipeline import order

    with Screen(json) as screen:
        report = order.status(run)
        finished = all(stage.state == "finished" for stage in report.stages)
        following = command_line("eval-ppl", run) if finished else command_line("status", run)
        if not finished and report.process is None:
            following = command_line("quantize", "--config", run / "run.yaml", "--out", run)
            if any(stage.stage == "finetune" and stage.state != "finished" for stage in report.stages):
                following = command_line("finetune", run)
        screen.finish({"status": report}, following=following)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; the page is about the first.")],
    out: Annotated[Path | None, typer.Option(help="File of the page (default: RUN/reports/report.html).")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write one HTML page about runs, from all that was measured.

    \b
    Example:
      aqlm report runs/SmolLM2-135M-Instruct-2bit
    """
    from aqlm_cli.pipeline.stages.report import report as write

    with Screen(json, quiet, verbose) as screen:
        screen.finish({"report": write(runs, out)}, following=command_line("evaluate", runs[0], "--kind", "ppl,gate"))


def verify(
    run: options.Run, json: options.Json = False, quiet: options.Quiet = False, verbose: options.Verbose = False
) -> None:
    """Check the files of a run, and quantize one layer again.

    The seed chooses the layer. Its codes must be the same to the bit.

    \b
    Example:
      aqlm verify runs/SmolLM2-135M-Instruct-2bit
    """
    from aqlm_cli.pipeline import order

    with Screen(json, quiet, verbose) as screen:
        settings = order.settings_of_run(run, {})
        order.use_machine(settings)
        report = order.verify_run(order.make_job(settings, run, emit=screen.emit))
        screen.finish({"verify": report}, following=command_line("eval-ppl", run))


def doctor(json: options.Json = False) -> None:
    """Show this machine, and the backends that it can use.

    \b
    Example:
      aqlm doctor
    """
    from aqlm_cli.pipeline import order

    with Screen(json) as screen:
        screen.finish({"doctor": order.doctor()}, following=command_line("quantize", "--bits", 2, "smollm2-135m"))
