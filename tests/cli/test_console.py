from __future__ import annotations

import re
from pathlib import Path

import pytest

from aqlm_cli.cli import console as screen_module
from aqlm_cli.cli.console import PLAIN_STEPS, Screen
from aqlm_cli.errors import UsageError
from aqlm_cli.events import Advanced, BlockQuantized, LayerQuantized, Noted, StageStarted, Warned
from aqlm_cli.pipeline.stage_reports import PackReport


@pytest.mark.parametrize("total", [1, 7, 10, 148])
def test_without_a_terminal_a_stage_prints_at_most_ten_lines_and_always_the_last(
    capsys: pytest.CaptureFixture[str], total: int
) -> None:
    with Screen(as_json=False) as screen:
        screen.emit(StageStarted("calibrate", total, "window"))
        for done in range(1, total + 1):
            screen.emit(Advanced("calibrate", done, "loss 3.2"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == min(total, PLAIN_STEPS)
    assert lines[-1] == f"calibrate: {total} of {total} window{'s' * (total > 1)}, done in 0:00:00, loss 3.2"


def packed(directory: Path, format: str) -> PackReport:
    return PackReport(
        directory=directory, format=format, scheme="2x8g8", nominal_bits=2.15, stored_bits=2.15, bytes=200, layers=14
    )


def test_every_event_is_one_line_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(as_json=False) as screen:
        screen.emit(LayerQuantized("model.layers.0.mlp.up_proj", 0.0655, 2.148, 2.6))
        screen.emit(BlockQuantized(0, 0.0321, 0.21, 39.0))
        screen.emit(Noted("a path " + "/long" * 40 + " and [brackets]"))
        screen.emit(Warned("mind the gap"))
    layer, block, note, warning = capsys.readouterr().out.splitlines()
    assert layer == "  model.layers.0.mlp.up_proj: relative error 0.0655, 2.148 bits, 2.6 s"
    assert block == "block 0: relative error of its output 0.0321, fitting removed 21.0%, 39.0 s"
    assert note.endswith("/long and [brackets]") and warning == "warning: mind the gap"


def test_a_block_that_was_not_fitted_says_nothing_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(as_json=False) as screen:
        screen.emit(BlockQuantized(3, 0.0321, 0.0, 39.0))
    assert capsys.readouterr().out == "block 3: relative error of its output 0.0321, 39.0 s\n"


def test_a_path_in_a_table_that_goes_to_a_file_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("runs") / ("long-" * 20) / "packed"
    with Screen(as_json=False) as screen:
        screen.show(packed(path, "transformers"))
    assert str(path) in capsys.readouterr().out


def test_with_json_the_events_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(as_json=True) as screen:
        screen.emit(Noted("working"))
    assert capsys.readouterr() == ("", "working\n")


def test_quiet_leaves_results_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(as_json=False, quiet=True) as screen:
        screen.emit(StageStarted("quantize", 1, "block"))
        screen.emit(Advanced("quantize", 1))
        screen.emit(Noted("working"))
        screen.emit(Warned("mind the gap"))
        screen.show(packed(Path("on the way"), "transformers"))
        screen.finish({"pack": packed(Path("at the end"), "dense")}, "next")
    found = capsys.readouterr().out
    assert found.startswith("warning: mind the gap\n") and "at the end" in found
    assert not any(said in found for said in ("working", "quantize", "on the way", "next"))


def test_verbose_tells_every_step_and_when(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(as_json=False, verbose=True) as screen:
        screen.emit(StageStarted("calibrate", 100, "window"))
        for done in range(1, 101):
            screen.emit(Advanced("calibrate", done))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 100
    assert all(re.match(r"\d\d:\d\d:\d\d calibrate: \d+ of 100 windows, ", line) for line in lines)


def test_quiet_and_verbose_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="give one of them"):
        Screen(as_json=False, quiet=True, verbose=True)


def test_steps_before_an_interruption_took_no_time_of_this_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 160.0])
    monkeypatch.setattr(screen_module.time, "monotonic", lambda: next(clock))
    with Screen(as_json=False) as screen:
        screen.emit(StageStarted("quantize", 10, "block", done=4))
        screen.emit(Advanced("quantize", 6))  # two blocks in a minute, so the last four take two
    assert "quantize: 6 of 10 blocks, 0:02:00 left" in capsys.readouterr().out
