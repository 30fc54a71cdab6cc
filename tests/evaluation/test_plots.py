from __future__ import annotations

import struct
from xml.etree import ElementTree

from aqlm_cli.evaluation.plots import draw_curve, draw_speed
from aqlm_cli.evaluation.speed_report import BenchReport, BenchRow


def report(*decode: float) -> BenchReport:
    names = "FP16", "packed", "a.gguf"
    rows = tuple(
        BenchRow(name, speed, 0.9 * speed, 1.1 * speed, {}, 200 / (1 + number), 90, 80, 100, 200, {}, None)
        for number, (name, speed) in enumerate(zip(names, decode, strict=False))
    )
    return BenchReport("tiny", 2, "compiled decoder", 8, 4, 3, 2e10, rows, ())


def test_every_model_stands_in_the_picture_with_its_speed_and_share() -> None:
    picture = draw_speed(report(100, 160, 20))["svg"].decode()
    ElementTree.fromstring(picture)  # well-formed
    for said in (
        "FP16: 100.0 tokens/s, 50% of what memory allows",
        "packed: 160.0 tokens/s, 160% of what memory allows",
        "a.gguf: 20.0 tokens/s, 30% of what memory allows",
        "tiny: decoding with 2 threads; the line is 20.0 GB/s of memory",
    ):
        assert f"<!-- {said} -->" in picture


def test_the_png_has_the_size_of_the_figure() -> None:
    picture = draw_speed(report(100))["png"]
    assert picture.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", picture[16:24]) == (1050, 750)


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert draw_speed(report(1, 2)) == draw_speed(report(1, 2))
    assert draw_speed(report(1, 2)) != draw_speed(report(1, 3))


def test_a_curve_has_a_point_for_every_look_at_the_held_out_sequences() -> None:
    curve = [{"step": step, "seconds": 60.0 * step, "held_out": 1 / (1 + step)} for step in range(5)]
    picture = draw_curve(curve)
    ElementTree.fromstring(picture["svg"].decode())
    assert "<!-- minutes -->" in picture["svg"].decode()
    assert picture["svg"] != draw_curve(curve[:4])["svg"]
