from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import commands, mixed_models, tiny_models
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from aqlm_cli.errors import ModelError, UsageError
from aqlm_cli.evaluation import EVALUATIONS, BenchReport, LoadedModel, SpeedSettings, candidates, timing
from aqlm_cli.evaluation.matmul import relative_error
from aqlm_cli.evaluation.read_bytes import bytes_by_part
from aqlm_cli.evaluation.speed import measure_shape
from aqlm_cli.evaluation.timing import run_pass
from aqlm_cli.events import Advanced, Event, Noted
from aqlm_cli.models import Decoding, decoding_of, find_subject, random_models
from aqlm_cli.models.decoding import narrowest
from aqlm_cli.pipeline.stages.evaluate import evaluate
from aqlm_cli.runs.directory import RunDirectory, open_run
from aqlm_cli.runs.stages import PACK, StageKey
from aqlm_cli.spec.evaluate import BenchConfig
from aqlm_cli.spec.run_file import build_config
from aqlm_cli.spec.schemes import AdditiveScheme, parse_scheme
from aqlm_kernels import AdditiveLinear, KernelError, read_bandwidth
from aqlm_kernels.cpu import avx512, bandwidth

PROMPT, TOKENS = 24, 6
DECODING = f"compiled decoder, {'cpu-avx512' if avx512.HAS_VBMI else 'cpu-lut'}"
BY_TRANSFORMERS = "transformers, reference (the compiled decoder needs one of cpu-avx512, cpu-avx512-8bit, cpu-lut)"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.save("llama", tmp_path / "model")


@pytest.fixture
def run(model: Path, tmp_path: Path) -> RunDirectory:
    run = open_run(tmp_path / "run", build_config(None, None, {"model": str(model)}))
    with run.stage(StageKey(PACK, {}, {})) as stage:
        stage.directory.rmdir()
        tiny_models.save_additive(model, stage.directory)
        stage.publish({})
    return run


def measured(target: Path, events: list[Event] | None = None, repeats: int = 2, **settings: Any) -> BenchReport:
    emit = (events if events is not None else []).append
    chosen = {"prompt": PROMPT, "tokens": TOKENS, "repeats": repeats, **settings}
    settings = SpeedSettings(BenchConfig.model_validate(chosen))
    report = evaluate(find_subject(str(target)), "speed", settings, "cpu", emit)
    assert isinstance(report, BenchReport)
    return report


def test_a_run_stands_beside_its_original_in_three_types(run: RunDirectory) -> None:
    events: list[Event] = []
    report = measured(run.path, events, repeats=3)
    assert [row.name for row in report.rows] == ["FP16", "BF16", "FP32", "packed"]
    assert (report.backend, report.threads) == (DECODING, torch.get_num_threads())
    for row in report.rows:
        assert 0 < row.decode_low <= row.decode_median <= row.decode_high
        assert 0 < row.prefill_low <= row.prefill_median <= row.prefill_high
    assert [event.done for event in events if isinstance(event, Advanced)] == [1, 2, 3]
    written = json.loads((run.path / "reports" / "bench.json").read_text())
    assert written == {**report.as_json(), "quantized": None} and written["version"] == 1


def test_a_picture_stands_beside_the_report_of_a_run(run: RunDirectory) -> None:
    events: list[Event] = []
    measured(run.path, events)
    for name in "bench.png", "bench.svg":
        assert (run.path / "reports" / name).stat().st_size > 1000
        assert Noted(f"wrote {run.path / 'reports' / name}") in events


def test_llama_cpp_takes_turns_with_ours(run: RunDirectory, tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    answer = '[{"model_type": "llama Q2_K", "model_size": 1000, "avg_ts": 25.0}]'
    program.write_text(f"#!/bin/sh\necho $* >> {tmp_path / 'calls'}\necho '{answer}'\n")
    program.chmod(0o755)
    report = measured(run.path, llama_bench=str(program), llama_models=["a.gguf"], repeats=2)
    assert [row.name for row in report.rows] == ["FP16", "BF16", "FP32", "packed", "a.gguf, llama Q2_K"]
    row = report.rows[-1]
    assert (row.decode_median, row.prefill_median, row.bytes, row.relative_error) == (25.0, 25.0, 1000, None)
    assert row.decode_times["FP16"] == 25.0 / report.rows[0].decode_median
    assert report.backend == DECODING
    assert len((tmp_path / "calls").read_text().splitlines()) == 1 + 2 * 2


def test_sizes_are_those_of_the_tensors_in_each_type(run: RunDirectory, model: Path) -> None:
    half, brain, single, packed = measured(run.path).rows
    parameters = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert (half.bytes, brain.bytes, single.bytes) == (2 * parameters, 2 * parameters, 4 * parameters)
    file = (run.path / "packed" / "model.safetensors").stat().st_size
    assert file - 10_000 < packed.bytes < file


def test_errors_are_those_of_the_types(run: RunDirectory) -> None:
    half, brain, single, packed = measured(run.path).rows
    assert single.relative_error is None
    assert half.relative_error is not None and brain.relative_error is not None and packed.relative_error is not None
    assert 1e-4 < half.relative_error < brain.relative_error < 5e-2
    assert 0 < packed.relative_error < 1e-3


def test_a_named_backend_is_obeyed_and_stands_in_the_report(run: RunDirectory) -> None:
    for backend, name in ("cpu-lut", "compiled decoder, cpu-lut"), ("reference", BY_TRANSFORMERS):
        report = measured(run.path / "packed", backend=backend)
        assert report.backend == name
        assert (report.rows[-1].relative_error or 0) < 1e-5
    with pytest.raises(KernelError, match="there is no backend fast"):
        measured(run.path / "packed", backend="fast")


def test_an_int8_head_shows_its_error(run: RunDirectory) -> None:
    exact, rounded = (measured(run.path / "packed", head=head).rows[-1].relative_error for head in ("exact", "int8"))
    assert exact is not None and rounded is not None
    assert 2 * exact < rounded < 0.05


def test_an_int8_head_is_not_left_out_in_silence(run: RunDirectory) -> None:
    with pytest.raises(KernelError, match="an int8 head needs the compiled decoder"):
        measured(run.path / "packed", head="int8", backend="reference")


def test_a_product_that_is_wrong_shows_in_the_error(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    right = AdditiveLinear.forward
    monkeypatch.setattr(AdditiveLinear, "forward", lambda self, x: right(self, x) * (1 + 1e-3))
    assert (measured(run.path, backend="reference").rows[-1].relative_error or 0) > 1e-4


def test_models_take_turns(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []

    def spy(decoding: Decoding, ids: Tensor, prompt: int) -> timing.Pass:
        order.append(decoding)
        return run_pass(decoding, ids, prompt)

    monkeypatch.setattr(timing, "run_pass", spy)
    measured(run.path, repeats=3)
    turns = order[-12:]
    assert len({id(decoding) for decoding in turns[:4]}) == 4
    assert turns == turns[:4] * 3
    assert {id(decoding) for decoding in turns} <= {id(decoding) for decoding in order[:-12]}  # all were warm


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "opt"])
def test_decoding_through_the_cache_gives_the_logits_of_one_forward(family: str, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny_models.save(family, tmp_path / family)).eval()
    ids = tiny_models.token_ids(1, PROMPT + TOKENS)
    logits = run_pass(decoding_of(network, PROMPT + TOKENS), ids[0], PROMPT).logits
    assert logits.shape[0] == TOKENS
    assert relative_error(logits, network(ids).logits[0, PROMPT:].detach()) < 1e-4


def test_a_plain_model_is_measured_alone(model: Path) -> None:
    report = measured(model)
    assert [row.name for row in report.rows] == ["FP16", "BF16", "FP32"]
    assert report.backend == "transformers"


@pytest.mark.parametrize("asked", [{"backend": "cpu-lut"}, {"head": "int8"}])
def test_what_only_packed_layers_can_do_is_refused_of_a_plain_model(model: Path, asked: dict[str, str]) -> None:
    with pytest.raises(KernelError, match="has no packed layers; leave --backend and --head out"):
        measured(model, **asked)


def test_an_aqlm_checkpoint_is_measured_alone(run: RunDirectory) -> None:
    report = measured(run.path / "packed")
    assert [row.name for row in report.rows] == ["packed"]
    assert report.backend == DECODING


def test_what_is_compared_with_holds_no_codes_and_keeps_the_biases(tmp_path: Path) -> None:
    """By tables in 16 bits codes are off by little, and by nothing if both held codes; a bias left out is much."""
    tiny_models.save_additive(tiny_models.save("opt", tmp_path / "model"), tmp_path / "packed")
    assert 0 < (measured(tmp_path / "packed").rows[-1].relative_error or 0) < 1e-3


def test_more_tokens_than_the_model_reads_are_refused(model: Path) -> None:
    with pytest.raises(ModelError, match="accepts 256 tokens, not 303; lower --prompt or --tokens"):
        measured(model, prompt=300, tokens=3)


# ------------------------------------------------------------------------------------------------------- shapes, bounds


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(random_models.SHAPES, "tiny", (64, 128, 2, 4, 2, 258, request.param))
    return "tiny"


def measured_shape(shape: str, scheme: str, table: str | None = None, **settings: Any) -> BenchReport:
    chosen = BenchConfig.model_validate({"prompt": PROMPT, "tokens": TOKENS, "repeats": 1, **settings})
    other = None if table is None else parse_scheme(table)
    return measure_shape(shape, parse_scheme(scheme), SpeedSettings(chosen), lambda event: None, other)


def test_a_shape_is_measured_with_random_numbers(shape: str) -> None:
    report = measured_shape(shape, "2x8g8")
    assert (report.model, report.backend) == ("tiny, 2x8g8, random numbers", DECODING)
    assert [row.name for row in report.rows] == ["FP16", "BF16", "FP32", "packed"]
    assert 0 < (report.rows[-1].relative_error or 0) < 1e-3
    blocks = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # weights
    codebooks = 2 * 7 * 2 * 256 * 8
    outputs = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    others = 258 * 64 * (1 if random_models.SHAPES[shape][-1] else 2) + 5 * 64
    assert report.rows[-1].bytes == blocks // 4 + 2 * (codebooks + outputs) + 2 * others
    assert report.rows[0].bytes == 2 * (blocks + others)


@pytest.mark.parametrize("table", ["int4g32", "2x8g8", "3x8g8+int4g32r9"])
def test_embeddings_and_head_of_a_shape_have_a_scheme_of_their_own(table: str, shape: str) -> None:
    report, dense = (measured_shape(shape, "1x8g8", one) for one in (table, None))
    assert (report.model, report.backend) == (f"tiny, 1x8g8, embeddings {table}, random numbers", DECODING)
    assert 0 < (report.rows[-1].relative_error or 0) < 1e-3
    stored, count = parse_scheme(table).stored_bits(258, 64) // 8, 1 if random_models.SHAPES[shape][-1] else 2
    whole = report.rows[-1].bytes - dense.rows[-1].bytes
    assert whole == pytest.approx(count * (stored - 2 * 258 * 64), abs=16)
    assert report.rows[-1].read_bytes["head"] == pytest.approx(stored, abs=16)


def test_a_width_that_a_scheme_refuses_is_named(shape: str) -> None:
    with pytest.raises(UsageError, match=r"embed_tokens cannot have the scheme int4g48: .*48"):
        measured_shape(shape, "1x8g8", "int4g48")


def test_a_random_model_holds_numbers_that_sixteen_bits_hold(shape: str) -> None:
    """As a real one does: its head is read in the type that the bound counts."""
    parsed = parse_scheme("2x8g8")
    assert isinstance(parsed, AdditiveScheme)
    network = random_models.random_packed_network(shape, parsed)
    assert narrowest(network.lm_head.weight).dtype == torch.float16


def test_the_bound_counts_what_one_token_reads(shape: str) -> None:
    report = measured_shape(shape, "1x8g8")
    tied = random_models.SHAPES[shape][-1]
    for row, itemsize in zip(report.rows, (2, 2, 4, 2), strict=True):
        read = row.bytes - (0 if tied else itemsize * 257 * 64)  # of the embeddings, one row
        assert sum(row.read_bytes.values()) == read
        assert row.decode_bound == pytest.approx(report.read_bandwidth / read)
        assert row.decode_times == {
            other.name: row.decode_median / other.decode_median for other in report.rows if other.name != "packed"
        }


def test_the_bytes_of_a_token_are_shown_by_part(shape: str) -> None:
    report = measured_shape(shape, "1x8g8")
    tied = random_models.SHAPES[shape][-1]
    for row, itemsize in zip(report.rows, (2, 2, 4, 2), strict=True):
        assert row.read_bytes["norms"] == itemsize * 5 * 64
        assert row.read_bytes["head"] == itemsize * 258 * 64
        assert row.read_bytes["embedding_row"] == (0 if tied else itemsize * 64)
        assert row.read_bytes["other"] == 0
    dense, packed = report.rows[0].read_bytes, report.rows[-1].read_bytes
    assert dense["attention"] == 2 * 2 * (2 * 64 * 64 + 2 * 64 * 32)
    assert dense["mlp"] == 2 * 2 * 3 * 64 * 128
    codebooks, outputs = 256 * 8, 64 + 32 + 32 + 64
    assert packed["attention"] == dense["attention"] // 16 + 2 * 2 * (4 * codebooks + outputs)
    assert report.as_json()["rows"][-1]["read_bytes"] == packed
    with StringIO() as text:
        Console(file=text, width=200).print(report.table())
        (header,) = [line for line in text.getvalue().splitlines() if "attention" in line]
    assert ["embedding row" in header, "head" in header, "other" in header] == [not tied, True, False]


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_table_counts_as_its_scheme_does(tied: bool, tmp_path: Path) -> None:
    mix = {"embed_tokens": "4x8g8", "": "2x8g8"}
    network = mixed_models.network(mix, tmp_path, tie_word_embeddings=tied)
    chosen = BenchConfig.model_validate({"prompt": PROMPT, "tokens": TOKENS, "repeats": 1})
    model = LoadedModel("a mix", network, tiny_models.byte_tokenizer())
    report = EVALUATIONS["speed"].run(model, None, SpeedSettings(chosen), lambda event: None)
    (row,) = report.rows
    assert report.backend == DECODING and 0 < (row.relative_error or 0) < 1e-3
    table = network.model.embed_tokens.matrix().bits() // 8
    assert row.read_bytes["head"] == (table if tied else 2 * 258 * 64)
    assert row.read_bytes["embedding_row"] == (0 if tied else -(-table // 258))
    assert sum(row.read_bytes.values()) == row.bytes - (0 if tied else table - -(-table // 258))


def test_single_matmuls_are_those_that_x_takes_part_in(tmp_path: Path) -> None:
    mix = {"embed_tokens": "1x10g8", "lm_head": "int8g32", "q_proj": "int4g64", "o_proj": "int4g64", "": "2x8g8"}
    model = LoadedModel("a mix", mixed_models.network(mix, tmp_path), tiny_models.byte_tokenizer())
    chosen = BenchConfig.model_validate({"prompt": PROMPT, "tokens": TOKENS, "repeats": 1})
    report = EVALUATIONS["speed"].run(model, None, SpeedSettings(chosen), lambda event: None)
    found = [(row.out_features, row.in_features, row.backend) for row in report.matmuls]
    coded = DECODING.removeprefix("compiled decoder, ")
    assert found == [
        (32, 64, coded),
        (64, 64, "uniform"),
        (64, 128, coded),
        (128, 64, coded),
        (258, 64, "uniform"),
    ]
    assert all(row.relative_error < 1e-3 and row.bandwidth_share > 0 for row in report.matmuls)


def test_of_experts_a_token_reads_those_that_it_uses(tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny_models.save("mixtral", tmp_path / "model"))
    sizes = {name: 2 * tensor.numel() for name, tensor in network.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert experts and network.config.num_experts_per_tok == 2 and network.config.num_local_experts == 4
    routers = sum(size for name, size in sizes.items() if ".mlp." in name and ".experts." not in name)
    assert bytes_by_part(network, sizes)["mlp"] == experts // 2 + routers


def test_an_int8_head_is_half_to_read(shape: str) -> None:
    exact, rounded = (measured_shape(shape, "1x8g8", head=head) for head in ("exact", "int8"))
    read = [report.read_bandwidth / report.rows[-1].decode_bound for report in (exact, rounded)]
    assert read[0] - read[1] == pytest.approx(258 * 64)


def test_types_that_do_not_fit_are_left_out_and_named(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates.os, "sysconf", lambda name: 600 if name == "SC_PAGE_SIZE" else 1000)
    events: list[Event] = []
    parsed = parse_scheme("1x8g8")
    assert isinstance(parsed, AdditiveScheme)
    chosen = BenchConfig.model_validate({"prompt": PROMPT, "tokens": TOKENS, "repeats": 1})
    report = measure_shape(shape, parsed, SpeedSettings(chosen), events.append)
    assert [row.name for row in report.rows] == ["FP16", "packed"]
    assert report.rows[-1].relative_error is None
    assert Noted("BF16, FP32 would take more than half of this machine's memory, and is not measured") in events


def test_a_shape_that_is_not_known_names_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"unknown shape huge; choose one of smollm2-135m, llama-3\.2-1b"):
        measured_shape("huge", "2x8g8")


def test_the_bandwidth_is_all_bytes_over_the_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 3.0, 10.0, 10.5, 20.0, 22.0])
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(moments))
    assert read_bandwidth(repeats=3) == bandwidth.SIZE / 0.5


def test_bandwidth_is_read_by_all_threads() -> None:
    assert 1e8 < read_bandwidth(repeats=1) < 1e13


@pytest.mark.parametrize("flag", [["--revision", "main"], ["--trust-remote-code"]])
def test_a_shape_has_no_revision_and_no_code(flag: list[str]) -> None:
    result = commands.run("bench", "--shape", "smollm2-135m", *flag)
    assert result.exit_code == 2 and "belong to a model" in result.output
