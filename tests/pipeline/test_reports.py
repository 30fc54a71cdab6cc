from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from aqlm_cli.evaluation import GenerationReport, Perplexity, PerplexityReport
from aqlm_cli.evaluation.estimates import Divergence
from aqlm_cli.evaluation.passport import Passport
from aqlm_cli.evaluation.speed_report import BenchReport, BenchRow, MatmulRow
from aqlm_cli.formatting import readable_bytes
from aqlm_cli.pipeline.stage_reports import CalibrationReport, PackReport, PlanReport, QuantizeReport
from aqlm_cli.pipeline.stages.doctor import BackendReport, MachineReport
from aqlm_cli.records import Record

PERPLEXITY = PerplexityReport(
    model="runs/tiny-2bit",
    data="wikitext2",
    protocol="gptq-2048",
    perplexity=24.5,
    stderr=0.25,
    sequences=148,
    sequence_length=2048,
    dtype="float32",
    base_model=Perplexity(21.5, 0.2),
    ratio=24.5 / 21.5,
    ratio_stderr=0.01,
    divergence=Divergence(0.25, 0.01, 0.125, 1.5, 9.0, 0.75, (1, 2)),
    others={},
    bos=False,
    passport=Passport("gptq-2048", "a1", "b2", "c3", 148, 302956, "float32", {"torch": "2"}),
    losses=(3.0, 4.0),
    counts=(2047.0, 2047.0),
)
RECORDS: list[Record] = [
    PERPLEXITY,
    PlanReport(
        "tiny",
        "aqlm",
        "2x8g8",
        14,
        2.0,
        2.15,
        1000,
        200,
        "cpu-lut",
        {"q": "2x8g8"},
        (("q", "left"), ("k", "left")),
    ),
    CalibrationReport(
        directory=Path("run/calibration"),
        sequences=8,
        sequence_length=64,
        tokens=512,
        loss=3.25,
        sources={"c4": 4, "notes.txt": 4},
        seconds=1.5,
    ),
    QuantizeReport(
        directory=Path("run/quantized"),
        model="tiny",
        scheme="2x8g8",
        method="aqlm",
        layers=14,
        code_bits=2.0,
        stored_bits=2.15,
        bytes_before=1000,
        bytes_after=200,
        mean_relative_error=0.01,
        seconds=9.5,
        memory_bytes=10**9,
        disk_bytes=10**6,
        planned={"seconds": 9.0, "memory_bytes": 10**9, "disk_bytes": 10**6},
    ),
    PackReport(
        directory=Path("run/packed"),
        format="transformers",
        scheme="2x8g8",
        nominal_bits=2.15,
        stored_bits=2.15,
        bytes=200,
        layers=14,
    ),
    BenchReport(
        "tiny",
        2,
        "cpu-lut",
        512,
        32,
        5,
        3e10,
        (BenchRow("packed", 9, 8, 10, {"FP16": 4}, 20, 90, 80, 100, 200, {"mlp": 150, "head": 50}, 0.001),),
        (MatmulRow(64, 128, 1, "cpu-lut", 2.5, {"FP16": 4}, 0.3, 1e-4),),
    ),
    GenerationReport("tiny", "Hello", " [bold]world[/bold]", 2, 0.5, 4.0, "transformers"),
    MachineReport("x86_64", ("avx2",), 2, 2, (), {"triton": None}, (BackendReport("lut", "2x8g8", "cpu", None),)),
]


def printed(record: Record) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(record.table())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_every_record_is_json_with_the_names_of_its_fields(record: Record) -> None:
    found = json.loads(json.dumps(record.as_json()))
    assert list(found) == [field.name for field in dataclasses.fields(record)]


ROWS = {
    "PerplexityReport": ("base wikitext2 148 x 2048 float32 21.500 ± 0.200 1", "24.500 ± 0.250 1.1395"),
    "PlanReport": ("model size 1.0 kB -> 200 B, embeddings and head included (5.00x smaller)", "skipped 2 q, k: left"),
    "CalibrationReport": ("sequences 8 of 64 tokens (512 tokens)", "from c4 (4), notes.txt (4)"),
    "QuantizeReport": ("bits per weight 2.000 of codes, 2.150 stored", "peak disk 1.0 MB (planned 1.0 MB)"),
    "PackReport": ("bits per weight 2.150 nominal, 2.150 in these files", "size 200 B"),
    "BenchReport": (
        "packed 9.0 (8.0-10.0) 4.00 45% 90 (80-100) 200 B 1.0e-03",
        "1 x 128 x 64 2.5 4.00 30% 1.0e-04 cpu-lut",
    ),
    "GenerationReport": ("text [bold]world[/bold]", "speed 2 tokens in 0.5 s: 4.0 tokens/s; transformers"),
    "MachineReport": ("processor x86_64, 2 cores", "backend lut 2x8g8 on cpu: ready"),
}
"""Some cells of the table of each record, as they follow each other."""


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_every_record_prints_its_numbers(record: Record) -> None:
    cells = " ".join(printed(record).replace("│", " ").replace("┃", " ").split())
    for row in ROWS[type(record).__name__]:
        assert row in cells


def test_a_perplexity_is_exactly_the_object_that_programs_expect() -> None:
    assert PERPLEXITY.as_json() == {
        "model": "runs/tiny-2bit",
        "data": "wikitext2",
        "protocol": "gptq-2048",
        "perplexity": 24.5,
        "stderr": 0.25,
        "sequences": 148,
        "sequence_length": 2048,
        "dtype": "float32",
        "base_model": {"perplexity": 21.5, "stderr": 0.2},
        "ratio": 24.5 / 21.5,
        "ratio_stderr": 0.01,
        "divergence": {
            "mean": 0.25,
            "stderr": 0.01,
            "median": 0.125,
            "percentile_99": 1.5,
            "maximum": 9.0,
            "agreement": 0.75,
            "histogram": [1, 2],
        },
        "others": {},
        "bos": False,
        "passport": {
            "protocol": "gptq-2048",
            "text": "a1",
            "tokenizer": "b2",
            "model": "c3",
            "sequences": 148,
            "scored": 302956,
            "dtype": "float32",
            "versions": {"torch": "2"},
            "formats": "",
        },
        "formats": {"activations": None, "cache": None, "sort_keys": False},
        "losses": [3.0, 4.0],
        "counts": [2047.0, 2047.0],
        "version": 2,
    }


def test_a_perplexity_is_printed_with_all_that_it_depends_on() -> None:
    text = printed(PERPLEXITY)
    for fact in (
        "wikitext2",
        "148 x 2048",
        "float32",
        "24.500 ± 0.250",
        "21.500 ± 0.200",
        "1.1395",
        "0.2500 ± 0.0100",
        "75.00%",
    ):
        assert fact in text


def test_a_text_is_printed_by_its_name_and_told_to_programs_as_it_was_typed() -> None:
    record = dataclasses.replace(PERPLEXITY, data="/home/me/wiki.txt")
    assert " wiki.txt " in printed(record) and "/home/me" not in printed(record)
    assert record.as_json()["data"] == "/home/me/wiki.txt"


def test_brackets_in_a_text_are_printed_as_they_are() -> None:
    assert "[bold]world[/bold]" in printed(RECORDS[6])


def test_layers_skipped_for_one_reason_are_counted_together() -> None:
    assert "skipped 2" in printed(RECORDS[1])


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1000, "1.0 kB"), (85_123_456, "85.1 MB"), (13 * 10**9, "13.0 GB")]
)
def test_sizes_are_decimal(count: int, text: str) -> None:
    assert readable_bytes(count) == text
