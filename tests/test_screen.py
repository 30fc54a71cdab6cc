from __future__ import annotations

import pytest

from aqlm_cli.report import Advanced, BlockQuantized, LayerQuantized, Noted, StageStarted, Warned
from aqlm_cli.screen import PLAIN_STEPS, Screen


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
    assert lines[-1] == f"calibrate: window {total} of {total}, 0:00:00 left, loss 3.2"


def test_every_event_is_one_line_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(as_json=False) as screen:
        screen.emit(LayerQuantized("model.layers.0.mlp.up_proj", 0.0655, 2.148, 2.6))
        screen.emit(BlockQuantized(0, 30, 0.041, 0.0321, 39.0))
        screen.emit(Noted("a path " + "/long" * 40 + " and [brackets]"))
        screen.emit(Warned("mind the gap"))
    layer, block, note, warning = capsys.readouterr().out.splitlines()
    assert layer == "  model.layers.0.mlp.up_proj: relative error 0.06550, 2.148 bits, 2.6 s"
    assert block.startswith("block 1 of 30: relative error of its output 0.03210 (0.04100 before fitting)")
    assert note.endswith("/long and [brackets]") and warning == "warning: mind the gap"


def test_with_json_the_events_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(as_json=True) as screen:
        screen.emit(Noted("working"))
    assert capsys.readouterr() == ("", "working\n")
