from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.commands import run
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from typer.testing import Result

from aqlm_cli.errors import PlanError, UsageError
from aqlm_cli.evaluation import machine
from aqlm_cli.events import Event, Warned
from aqlm_cli.models import load_network, resolve
from aqlm_cli.models import source as model_source
from aqlm_cli.models.hidden_states import compute_dtype
from aqlm_cli.pipeline import order
from aqlm_cli.pipeline.job import make_job
from aqlm_cli.pipeline.preflight import model_shape
from aqlm_cli.pipeline.stages import plan as stage
from aqlm_cli.runs import digests
from aqlm_cli.runs.files import load_tensors
from aqlm_cli.spec.cost import (
    PROCESS,
    BlockShape,
    ModelShape,
    Work,
    least_memory,
    peak_memory,
    quantized_bytes,
    within_memory,
    work_of,
)
from aqlm_cli.spec.plan import Target
from aqlm_cli.spec.run_file import build_config
from aqlm_cli.spec.schemes import parse_scheme
from aqlm_cli.spec.time_estimate import Rates, quantization_seconds
from aqlm_cli.spec.units import parse_bytes
from aqlm_kernels import quantized_layers

QUICK: dict[str, Any] = {
    "threads": 1,
    "calibrate": {"data": "builtin:4", "sequence_length": 16, "statistics_sequences": 1},
    "quantize": {
        "aqlm": {"rounds": 1, "ldlq_rounds": 1, "kmeans_iterations": 1, "beam": 2, "final_beam": 2},
        "fit": {"epochs": 0},
    },
}

LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


# ---------------------------------------------------------------------------------------------------------------- sizes


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a tiny model and of its quantization, of all that decides sizes."""
    coded = draw(st.booleans())
    scheme = draw(st.sampled_from(["2x8g8", "1x4g4", "3x6g16", "1x9g8"] if coded else ["int2g64", "int4g32"]))
    return {
        "family": draw(st.sampled_from(["llama", "qwen2", "gemma2", "opt", "phi3"])),
        "tied": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "layers": draw(st.integers(1, 3)),
        "wide": 64 * draw(st.integers(1, 3)),
        "scheme": scheme,
        "method": "aqlm" if coded else "rtn",
        "format": draw(st.sampled_from(["transformers", "dense"])),
        "skip": draw(st.sampled_from([(), (r".*\.0\..*v_proj",), (r".*\.0\..*",)])),
    }


@pytest.mark.slow
@settings(max_examples=12)
@given(model=models())
def test_the_planned_sizes_are_those_of_the_files(
    tmp_path_factory: pytest.TempPathFactory, model: dict[str, Any]
) -> None:
    directory = tmp_path_factory.mktemp("planned")
    width = {"ffn_dim" if model["family"] == "opt" else "intermediate_size": model["wide"]}
    settings = {"num_hidden_layers": model["layers"], "tie_word_embeddings": model["tied"], **width}
    saved = tiny_models.save(model["family"], directory / "model", **settings)
    AutoModelForCausalLM.from_pretrained(saved, dtype=model["dtype"]).save_pretrained(saved)
    fused = model["family"] == "phi3"  # it has no v_proj of its own
    skip = [] if model["layers"] == 1 or (fused and model["skip"]) else [*model["skip"]]
    own = {key: value for key, value in QUICK["quantize"].items() if key in (model["method"], "fit")}
    config = build_config(
        None,
        None,
        {
            **QUICK,
            "model": str(saved),
            "quantize": {**own, "scheme": model["scheme"], "method": model["method"], "skip": skip},
            "pack": {"format": model["format"]},
        },
    )
    job = make_job(config, directory / "run")
    known = job.preflight
    order.quantize_and_pack(job)
    files = (directory / "run" / "packed").glob("*.safetensors")
    assert known.packed_bytes == sum(path.stat().st_size for path in files)
    stored: dict[str, int] = {}
    for path in (directory / "run" / "quantized").glob("block-*"):
        for name, tensor in load_tensors(path).items():
            owner = name.rpartition(".")[0]
            if owner in known.plan.schemes and not name.endswith("bias"):
                stored[owner] = stored.get(owner, 0) + tensor.nbytes
    counted = {target.path: quantized_bytes(target) for target in known.plan.quantized}
    assert stored == counted


@pytest.mark.usefixtures("benchmark")
def test_a_model_of_70_billion_weights_is_planned_from_its_config_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "available_memory_bytes", lambda: 24 * 10**9)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_70B))
    short = ("--sequence-length", "64", "--data", "c4:128")
    result = run("plan", str(tmp_path), "--bits", "2", *short, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    plan, forecast = told["plan"], told["forecast"]
    assert plan["layers"] == 560 and set(plan["schemes"].values()) == {"2x8g8"} and len(plan["schemes"]) == 560
    hidden, wide, keys = 8192, 28672, 1024
    shapes = [(hidden, hidden)] * 2 + [(keys, hidden)] * 2 + [(wide, hidden)] * 2 + [(hidden, wide)]
    layers = sum(2 * (out * features // 8) + 2 * (2 * 256 * 8 + out) for out, features in shapes)
    outside = 2 * (2 * 128256 * hidden + hidden)
    assert plan["bytes_after"] == 80 * (layers + 2 * 2 * hidden) + outside
    assert 0 < forecast["safetensors_bytes"] - plan["bytes_after"] < 400_000, "the headers come on top"
    assert forecast["stages"]["quantize"]["memory_bytes"] > 26 * wide**2
    assert forecast["stages"]["quantize"]["seconds"] > 3600
    assert "--skip '.*down_proj'" in " ".join(forecast["advice"])


@pytest.mark.parametrize(
    ("command", "kept"),
    [(("plan", "--json"), "weights.npz"), (("quantize", "--dry-run"), None), (("quantize", "--dry-run"), "Model.ST")],
)
def test_a_plan_says_so_where_there_are_no_weights(command: tuple[str, ...], kept: str | None, run_file: Path) -> None:
    path, arguments = run_file.parent / "tiny" / "model.safetensors", (*command, "--config", str(run_file))
    line = "warning: tiny holds no model.safetensors; planned from config.json alone\n"
    whole = run(*arguments)
    assert whole.exit_code == 0 and line not in whole.output
    path.unlink() if kept is None else path.rename(path.with_name(kept))
    alone = run(*arguments)
    assert alone.exit_code == 0 and alone.output.count(line) == 1


@pytest.mark.usefixtures("benchmark")
def test_no_weight_is_read_for_a_plan(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "digest_file", lambda path: pytest.fail(f"{path} was read"))
    monkeypatch.setattr(model_source, "read_tensor", lambda *_: pytest.fail("a tensor was read"))
    before = sorted(Path().rglob("*"))
    result = run("plan", "--config", "run.yaml")
    assert result.exit_code == 0, result.output
    for words in ("14, aqlm 2x4g8", "peak memory", "bytes of safetensors", "this machine has", "next: "):
        assert words in result.stdout
    assert sorted(Path().rglob("*")) == before, "and nothing is written"


# --------------------------------------------------------------------------------------------------------------- shapes


def test_the_shape_counts_every_number_once(tmp_path: Path) -> None:
    directory = tiny_models.save("qwen2", tmp_path / "model", tie_word_embeddings=True)
    network = load_network(resolve(str(directory)), torch.float32)
    known = make_job(build_config(None, None, {"model": str(directory)}), Path("run")).preflight
    shape = model_shape(network, known.plan)
    assert shape == known.shape
    assert shape.outside + sum(block.parameters for block in shape.blocks) == network.num_parameters()
    assert (shape.vocabulary, shape.hidden) == tuple(network.get_input_embeddings().weight.shape)
    assert shape.blocks[0].vectors == sum(p.numel() for p in network.model.layers[0].parameters() if p.ndim == 1)


def test_layers_that_share_an_input_share_its_second_moment_but_queries_have_their_own(tmp_path: Path) -> None:
    known = make_job(
        build_config(None, None, {"model": str(tiny_models.save("llama", tmp_path / "model"))}), Path("run")
    ).preflight
    assert sorted(known.shape.blocks[0].input_widths) == [64, 64, 64, 64, 128]


@pytest.mark.parametrize(("times", "workers", "seconds"), [([1, 1, 1, 3], 2, 3), ([2, 2, 2], 2, 4), ([2, 2, 2], 1, 6)])
def test_the_longest_matrix_is_started_first(times: list[float], workers: int, seconds: float) -> None:
    shapes = [(8 * number, 8) for number in range(1, len(times) + 1)]
    targets = tuple(Target(f"{out}", "linear", out, width, parse_scheme("2x8g8"), None) for out, width in shapes)
    model = ModelShape((BlockShape(targets, 0),), outside=0, vocabulary=1, hidden=1)
    work = work_of(build_config(None, None, {"model": "any"}), sequences=8, workers=workers, product_bytes=2)
    nothing = dict.fromkeys(("forward", "quantized_forward", "step", "moment", "weight", "coupling", "character"), 0.0)
    rates = Rates(**nothing, byte=0.0, matrices=dict(zip(shapes, times, strict=True)))
    assert quantization_seconds(model, work, rates) == seconds


@pytest.mark.parametrize("scheme", ["2x4g8", "2x4g8c8", "int3g16"])
def test_the_block_that_is_timed_has_matrices_of_the_scheme(scheme: str) -> None:
    block = machine._Block(64, 128)
    machine._compress_block(block, parse_scheme(scheme), torch.Generator().manual_seed(0))
    assert {layer.matrix().scheme for layer in quantized_layers(block).values()} == {scheme}


# --------------------------------------------------------------------------------------------------------------- limits


def shape_and_work() -> tuple[ModelShape, Work]:
    targets = tuple(
        Target(f"model.layers.0.{name}", "linear", out, features, parse_scheme("2x8g8"), None)
        for name, out, features in (("up_proj", 8192, 2048), ("down_proj", 2048, 8192))
    )
    shape = ModelShape((BlockShape(targets, 2 * 8192 * 2048),), outside=10**6, vocabulary=500, hidden=2048)
    return shape, work_of(build_config(None, None, {"model": "any"}), sequences=192, workers=4, product_bytes=2)


def test_a_limit_is_kept_by_doing_less_at_a_time() -> None:
    shape, work = shape_and_work()
    assert within_memory(shape, work, None) == work
    whole, least = peak_memory(shape, work), least_memory(shape, work)
    assert least < whole
    for limit in range(least, whole + 1, (whole - least) // 20):
        within = within_memory(shape, work, limit)
        assert peak_memory(shape, within) <= limit
        assert work.batch % within.batch == 0 and 1 <= within.workers <= work.workers
    assert within_memory(shape, work, whole) == work


def test_the_factorisation_of_a_method_counts_for_the_limit_and_no_other_methods() -> None:
    shape, work = shape_and_work()
    work = replace(work, batch=1)  # a pass then needs less than a search

    def peak(method: str, scheme: str) -> int:
        targets = (replace(t, method=method, scheme=parse_scheme(scheme)) for t in shape.blocks[0].targets)
        return peak_memory(replace(shape, blocks=(replace(shape.blocks[0], targets=tuple(targets)),)), work)

    hessians, factors = 4 * (8192**2 + 2048**2), 2 * 8 * 8192**2  # in float32, and in float64 while it is factored
    assert peak("rtn", "int4g64") < PROCESS + hessians + factors < peak("gptq", "int4g64")
    assert peak("aqlm", "2x8g8") == peak_memory(shape, work)


def test_a_block_that_stays_in_16_bits_hides_none_of_the_others() -> None:
    shape, work = shape_and_work()
    plain = replace(
        shape.blocks[0], targets=tuple(replace(t, scheme=None, reason="skipped") for t in shape.blocks[0].targets)
    )
    for blocks in ((plain, *shape.blocks), (*shape.blocks, plain)):
        assert peak_memory(replace(shape, blocks=blocks), work) == peak_memory(shape, work)
    with pytest.raises(PlanError, match="down_proj"):
        within_memory(replace(shape, blocks=(plain, *shape.blocks)), work, 10**8)


@pytest.mark.parametrize(
    "flags", [("--scheme", "1x4g24"), *(("--method", name, "--scheme", "int2g192") for name in ("rtn", "gptq"))]
)
@pytest.mark.usefixtures("benchmark")
def test_groups_of_any_size_are_timed_for_matrices_of_any_size(tmp_path: Path, flags: tuple[str, ...]) -> None:
    config = {**LLAMA_3_70B, "hidden_size": 960, "intermediate_size": 1920, "num_hidden_layers": 1, "vocab_size": 100}
    config |= {"num_attention_heads": 15, "num_key_value_heads": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    short = ("--sequence-length", "16", "--data", "c4:8")
    result = run("plan", str(tmp_path), *flags, *short, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["forecast"]["stages"]["quantize"]["seconds"] > 0


@pytest.mark.parametrize("command", ["pack", "eval-ppl"])
def test_limits_hold_where_another_command_quantizes_first(run_file: Path, command: str) -> None:
    run_file.write_text(run_file.read_text() + "max_disk: 10kB\n")
    assert run("calibrate", "--config", "run.yaml", "--out", "run").exit_code == 0
    result = run(command, "run")
    assert result.exit_code == 1 and "--max-disk 10kB: this run needs" in result.stderr


def test_below_the_least_a_limit_is_refused_with_it() -> None:
    shape, work = shape_and_work()
    least = least_memory(shape, work)
    with pytest.raises(PlanError, match=rf"needs {least / 1e9:.2f}GB .*--skip '\.\*down_proj'"):
        within_memory(shape, work, least - 1)


def test_the_batch_that_a_limit_allows_stands_in_the_run_file(run_file: Path) -> None:
    text = run_file.read_text().replace("sequence_length: 32,", "sequence_length: 512,")
    run_file.write_text(text.replace("builtin:8", "builtin:16"))
    known = make_job(build_config(None, run_file, {}), Path("run")).preflight
    product_bytes = compute_dtype(torch.device("cpu")).itemsize
    work = work_of(build_config(None, run_file, {}), sequences=16, workers=1, product_bytes=product_bytes)
    halved = peak_memory(known.shape, Work(**{**vars(work), "batch": 4}))
    result = run("quantize", "--config", "run.yaml", "--max-memory", f"{halved}B", "--out", "run")
    assert halved < peak_memory(known.shape, work)
    assert "batch: 4\n" in Path("run/run.yaml").read_text(), result.output
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max-memory", "100MB"), "--max-memory 0.10GB: this model needs"),
        (("--max-disk", "10kB"), "--max-disk 10kB: this run needs"),
        (("--max-memory", "much"), "'much' is not understood as a size"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_what_cannot_be_kept_is_refused_before_anything_is_written(
    run_file: Path, command: str, flags: tuple[str, str], words: str
) -> None:
    result = run(command, "--config", "run.yaml", *flags)
    assert result.exit_code in (1, 2) and words in result.stderr, result.output
    assert not any(path.name == "manifest.json" for path in Path().rglob("*"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("8 GB", 8 * 10**9), ("1.5g", 15 * 10**8), ("500mb", 5 * 10**8), ("7", 7), ("2KiB", 2048)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "8 apples", "٣GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not understood as a size"):
        parse_bytes(text)


# --------------------------------------------------------------------------------------------------- planned and actual


def test_planned_and_actual_stand_side_by_side(run_file: Path) -> None:
    result = run("quantize", "--config", "run.yaml", "--out", "run")
    assert result.output.count("(planned ") >= 3 and "expected: " in result.output
    for kind, report in (("calibration", lambda found: found), ("quantized", lambda found: found["report"])):
        found = report(json.loads(Path("run", kind, "manifest.json").read_text())["results"])
        assert found["planned"].keys() == {"seconds", "memory_bytes", "disk_bytes"}
        assert all(found[key] > 0 for key in found["planned"])
    again = json.loads(run("quantize", "--config", "run.yaml", "--out", "run", "--json").stdout)
    assert again["quantize"]["planned"] == found["planned"]


def test_a_run_that_resumes_keeps_what_it_was_told(
    run_file: Path, interrupted_at: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_at("work/block-000.json", 1, "quantize", "--config", "run.yaml", "--out", "run")
    told = json.loads(Path("run/reports/forecast.json").read_text())["costs"]
    monkeypatch.setattr(stage, "measure_rates", lambda *_: pytest.fail("measured again"))
    assert run("quantize", "--config", "run.yaml", "--out", "run").exit_code == 0
    assert (
        json.loads(Path("run/quantized/manifest.json").read_text())["results"]["report"]["planned"] == told["quantize"]
    )


@pytest.mark.soak
def test_memory_and_disk_of_a_real_model_are_within_15_percent(tmp_path: Path) -> None:
    """In a process of its own, on the first blocks: memory does not grow after them, and disk does as counted."""
    command = [sys.executable, "-m", "aqlm_cli", "quantize", "smollm2-135m", "--bits", "2", "--preset", "fast"]
    command += ["--data", "builtin:80", "--only", r"model\.layers\.[012]\..*", "--out", str(tmp_path / "run"), "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(told.stdout)["quantize"]
    for key in ("memory_bytes", "disk_bytes"):
        assert report[key] == pytest.approx(report["planned"][key], rel=0.15), (key, report)


@pytest.mark.parametrize(("scheme", "warned"), [("2x8g8", True), ("2x4g8", False)])
def test_a_scheme_whose_codebooks_outweigh_the_matrices_is_told_of(run_file: Path, scheme: str, warned: bool) -> None:
    events: list[Event] = []
    config = build_config(None, run_file, {"quantize": {"scheme": scheme}})
    stage.forecast(make_job(config, Path("run"), emit=events.append))
    warnings = [event.message for event in events if isinstance(event, Warned)]
    assert len(warnings) == warned
    if warned:
        assert warnings[0].startswith(f"{scheme} and its codebooks take more than 16 bits a weight in model.layers.0.")
