"""The commands that look at a run, or at the machine, and change neither; registered by cli.py."""

from __future__ import annotations

from aqlm_cli.cli import options
from aqlm_cli.cli.console import Screen
from aqlm_cli.formatting import command_line


def status(run: options.Run, json: options.Json = False) -> None:
    """Show where a run stands and how long it will take.

    Another process may be at work in it; nothing is waited for.

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


def verify(
    run: options.Run, json: options.Json = False, quiet: options.Quiet = False, verbose: options.Verbose = False
) -> None:
    """Compare a run's files with their digests and one layer anew.

    The layer is chosen by the seed, and quantized again from the model and the text.

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
    """Show what this machine has and which backends it can use.

    \b
    Example:
      aqlm doctor
    """
    from aqlm_cli.pipeline import order

    with Screen(json) as screen:
        screen.finish({"doctor": order.doctor()}, following=command_line("quantize", "--bits", 2, "smollm2-135m"))
