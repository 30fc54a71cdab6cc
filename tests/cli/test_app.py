from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers.commands import run

from aqlm_cli.cli.app import app
from aqlm_cli.errors import DataError
from aqlm_cli.pipeline import evaluations, order
from aqlm_cli.spec.schemes import SCHEMES_BY_BITS
from aqlm_kernels import KernelError

COMMANDS = sorted(typer.main.get_group(app).commands)


def fails_with(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise error

    return fail


# ------------------------------------------------------------------------------------------------------ help and speed


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example_of_it(command: str) -> None:
    help = run(command, "--help").stdout
    assert "Example:" in help
    assert f"  aqlm {command}" in help


def test_the_help_of_every_command_explains_every_option() -> None:
    for command in typer.main.get_group(app).commands.values():
        for parameter in command.params:
            assert parameter.name == "help" or getattr(parameter, "help", None), f"{command.name} {parameter.name}"


def test_the_first_page_says_in_a_whole_sentence_what_every_command_does() -> None:
    commands = run("--help").stdout.partition("Commands:")[2].splitlines()[1:]
    assert [line.split()[0] for line in commands] == [*typer.main.get_group(app).commands]
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)


def test_help_loads_neither_torch_nor_anything_that_loads_it() -> None:
    slow = "{'torch', 'transformers', 'datasets', 'numba', 'aqlm_kernels'}"
    code = f"import sys, aqlm_cli.cli.app; print(sorted({slow} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------------------------------------- errors and statuses


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", "tiny", "--strange"], "--strange"),
        (["quantize", "tiny", "--bits", "many"], "--bits"),
        (["quantize", "tiny", "--bits", "2.2"], "2 (2x8g8) and 2.5 (5x8g16)"),
        (["quantize", "tiny", "--bits", "2", "--scheme", "2x8g8"], "give one of them"),
        (["quantize", "tiny", "--scheme", "2y8"], "2y8"),
        (["quantize", "tiny", "--method", "magic"], "quantize.method"),
        (["quantize", "tiny", "--preset", "slow"], "default, fast, paper"),
        (["quantize", "--bits", "2"], "no model is named"),
        (["generate", "tiny"], "--prompt"),
        (["eval-ppl", "tiny", "--dtype", "float8"], "eval_ppl.dtype"),
        (["calibrate", "tiny", "--threads", "0"], "threads"),
        (["calibrate", "tiny", "--threads", "9999"], "this machine has"),
    ],
)
def test_a_malformed_flag_ends_with_status_2_and_says_which(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("error", [DataError("no text;\nchoose another"), KernelError("no text; choose another")])
def test_what_a_user_can_mend_is_one_line_and_status_1(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(evaluations, "continue_text", fails_with(error))
    result = run("generate", "tiny", "--prompt", "Hello", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: no text; choose another\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "continue_text", fails_with(ZeroDivisionError()))
    assert isinstance(run("generate", "tiny", "--prompt", "Hello").exception, ZeroDivisionError)


def test_an_interrupt_ends_with_status_130_and_says_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "continue_text", fails_with(KeyboardInterrupt()))
    result = run("generate", "tiny", "--prompt", "Hello")
    assert result.exit_code == 130
    assert result.stderr.count("\n") == 1 and "kept" in result.stderr


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(("bits", "scheme"), SCHEMES_BY_BITS.items())
def test_bits_mean_their_scheme(monkeypatch: pytest.MonkeyPatch, bits: float, scheme: object) -> None:
    seen: list[str] = []

    def prepare(job: Any) -> Any:
        seen.append(job.config.quantize.scheme)
        raise DataError("enough")

    monkeypatch.setattr(order, "prepare", prepare)
    run("quantize", "tiny", "--bits", str(bits), "--out", "anywhere")
    assert seen == [str(scheme)]


def test_a_dry_run_needs_no_text_and_writes_nothing(run_file: Path) -> None:
    before = sorted(Path().rglob("*"))
    result = run("quantize", "--config", str(run_file), "--data", "nowhere.txt:4", "--dry-run")
    assert result.exit_code == 0, result.output
    for words in ("14, aqlm 2x4g8", "1.000 of codes", "embeddings and head included", "next: "):
        assert words in result.stdout
    assert sorted(Path().rglob("*")) == before


def test_the_plan_tells_what_is_skipped_and_why(run_file: Path) -> None:
    flags = ("--skip", r".*\.1\.mlp\..*", "--only", r".*(mlp|q_proj).*")
    plan = json.loads(run("quantize", "--config", str(run_file), *flags, "--dry-run", "--json").stdout)
    reasons = dict(plan["skipped"])
    assert plan["layers"] == 5 and len(reasons) == 9 + 2
    assert reasons["lm_head"] == "outside the blocks; --head SCHEME quantizes it"
    assert reasons["model.layers.1.mlp.up_proj"] == r"skipped by '.*\.1\.mlp\..*'"
    assert reasons["model.layers.0.self_attn.k_proj"] == "not among those chosen with --only"


def test_flags_beat_the_run_file_and_flags_not_given_leave_it_alone(run_file: Path) -> None:
    result = run(
        *("quantize", "--config", str(run_file), "--only", r".*q_proj", "--skip", r".*\.0\..*", "--dry-run", "--json")
    )
    plan = json.loads(result.stdout)
    assert (plan["scheme"], plan["layers"]) == ("2x4g8", 1)
    assert not Path("runs").exists()


# ----------------------------------------------------------------------------------------------------------- whole runs


def test_a_model_goes_from_text_to_text_and_every_command_says_what_is_next(run_file: Path) -> None:
    """The journey of the README on a tiny model, each command as printed by the one before."""
    quantized = run("quantize", "--config", str(run_file))
    assert quantized.exit_code == 0, quantized.output
    order = [quantized.output.index(words) for words in ("plan", "it runs first", "calibrate: ", "block 0: ", "packed")]
    assert order == sorted(order), "the plan comes before the work"
    assert "next: aqlm eval-ppl runs/tiny-2x4g8\n" in quantized.output
    measured = run("eval-ppl", "runs/tiny-2x4g8", "--sequences", "4")
    assert "next: aqlm bench runs/tiny-2x4g8\n" in measured.output
    assert "±" in measured.output and "base" in measured.output
    assert "wrote runs/tiny-2x4g8/reports/eval-ppl-notes.txt-4x32-float32.json" in measured.output
    compared = run("bench", "runs/tiny-2x4g8")
    assert "packed" in compared.output and "FP16" in compared.output
    assert "wrote runs/tiny-2x4g8/reports/bench.json" in compared.output
    table = run("bench", "runs/tiny-2x4g8", "--csv").stdout.splitlines()
    assert table[0].startswith("name,decode_median,") and [row.partition(",")[0] for row in table[1:5]] == [
        "FP16",
        "BF16",
        "FP32",
        "packed",
    ]
    assert table[5] == "" and table[6].startswith("out_features,in_features,rows,backend,")
    assert all(row.count(",") == table[0].count(",") for row in table[:5])
    assert run("bench", "runs/tiny-2x4g8", "--md").stdout.startswith("| name | decode_median |")
    assert run("bench", "runs/tiny-2x4g8", "--md", "--json").exit_code == 2
    continued = run("generate", "runs/tiny-2x4g8", "--prompt", "1 is", "--tokens", "3")
    assert "3 tokens in" in continued.output
    dense = run("pack", "runs/tiny-2x4g8", "--format", "dense", "--overwrite")
    assert "dense" in dense.output
    card = Path("runs/tiny-2x4g8/packed/README.md").read_text()
    assert "perplexity, notes.txt, 4 sequences of 32 tokens" in card
    again = run("quantize", "--config", str(run_file), "--scheme", "3x4g8", "--out", "runs/tiny-2x4g8")
    assert again.exit_code == 1 and "quantize.scheme: 2x4g8 there, 3x4g8 here" in again.stderr


def test_json_is_one_object_on_stdout_and_nothing_else(run_file: Path) -> None:
    result = run("run", str(run_file), "--out", "out", "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    assert list(json.loads(result.stdout)) == ["quantize", "pack", "notes.txt", "bench"]
    assert "next: aqlm generate out --prompt 'The capital of France is'" in result.stderr
    order = [result.stderr.index(words) for words in ("plan", "it runs first", "calibrate: ", "block 0: ", "packed")]
    assert order == sorted(order), "the plan comes before the work"
    single = json.loads(run("eval-ppl", "out", "--json").stdout)
    keys = [
        "model",
        "data",
        "protocol",
        "perplexity",
        "stderr",
        "sequences",
        "sequence_length",
        "dtype",
        "base_model",
        "ratio",
        "ratio_stderr",
        "divergence",
        "others",
        "bos",
        "passport",
        "losses",
        "counts",
        "formats",
        "version",
    ]
    assert list(single) == keys and list(single["base_model"]) == ["perplexity", "stderr"]
    assert (single["model"], single["data"], single["ratio"]) == (
        "out",
        "notes.txt",
        single["perplexity"] / single["base_model"]["perplexity"],
    )


def test_a_stage_that_is_missing_runs_first_and_a_finished_one_is_reused(run_file: Path) -> None:
    calibrated = run("calibrate", "--config", str(run_file))
    assert "next: aqlm quantize --config runs/tiny-2x4g8/run.yaml --out runs/tiny-2x4g8\n" in calibrated.output
    continued = run("generate", "runs/tiny-2x4g8", "--prompt", "1 is", "--tokens", "2")
    assert continued.exit_code == 0, continued.output
    assert "is not packed yet; this runs first" in continued.output
    assert "calibration exists already" in continued.output


def test_the_same_command_gives_the_same_packed_bytes(run_file: Path) -> None:
    for out in ("first", "second"):
        assert run("quantize", "--config", str(run_file), "--out", out).exit_code == 0
    for name in ("model.safetensors", "config.json", "README.md"):
        assert Path("first/packed", name).read_bytes() == Path("second/packed", name).read_bytes(), name


def test_doctor_names_every_backend_with_its_reason() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert {row["name"] for row in found["backends"]} >= {"cpu-lut", "reference"}
    assert any(row["refusal"] for row in found["backends"]) and found["versions"]["torch"]


@pytest.mark.parametrize("command", ["eval-ppl", "evaluate"])
@pytest.mark.parametrize("other", [("--sequence-length", "64"), ("--no-bos",)])
def test_a_protocol_beside_a_length_or_a_beginning_is_refused(command: str, other: tuple[str, ...]) -> None:
    refused = run(command, "model", "--protocol", "llamacpp-512", *other)
    assert refused.exit_code == 2
    assert "leave --sequence-length and --bos out" in refused.stderr


def test_evaluate_computes_in_the_type_and_at_the_length_that_it_is_given(run_file: Path) -> None:
    given = "--sequence-length", "16", "--dtype", "bfloat16", "--no-bos", "--data", "notes.txt"
    shown = run("evaluate", "tiny", "--kind", "ppl", "--json", *given)
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    assert (told["sequence_length"], told["dtype"], told["bos"]) == (16, "bfloat16", False)
