from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from helpers import packing, tiny_models
from helpers.packing import (
    NORM,
    SKIPPED,
    TUNED_NORM,
    config_json,
    logits,
    matrices,
    packed,
    quantized_run,
    relative_rms,
    stock_logits,
    with_weights_written_out,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aqlm_cli.errors import ArtifactError, ModelError, PlanError, QuantizationError, StorageError
from aqlm_cli.events import Event, Warned
from aqlm_cli.export import writer
from aqlm_cli.models import load_network, resolve
from aqlm_cli.runs.directory import open_run
from aqlm_cli.spec.plan import Target
from aqlm_cli.spec.run_file import build_config
from aqlm_kernels import AdditiveMatrix, Matrix

CASES: list[dict[str, Any]] = [
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"family": "qwen2", "scheme": "1x12g8", "dtype": "bfloat16"},
    {"family": "opt", "tie_word_embeddings": True},
    {"family": "gpt_neox", "skip": []},
    {"family": "mixtral", "skip": [r".*\.1\..*o_proj", r".*experts.*"]},
    {"scheme": "int4g16"},
]


@pytest.mark.slow
def test_stock_transformers_computes_and_generates_from_what_is_packed(tmp_path: Path) -> None:
    """Tied and untied heads, biases, codes of 12 bits, renamed heads, fused experts, ordinary weights."""
    directories = [
        packed(quantized_run(tmp_path / str(number), **case)[0]).directory for number, case in enumerate(CASES)
    ]
    for case, directory, stock in zip(CASES, directories, stock_logits(directories, tmp_path), strict=True):
        ours = logits(load_network(resolve(str(directory)), torch.float32))
        assert relative_rms(stock, ours) < 1e-3, case


@pytest.mark.parametrize("square", [True, False])
def test_the_inference_package_spoils_what_is_saved_after_a_product_and_ours_does_not(
    square: bool, tmp_path: Path
) -> None:
    """aqlm 1.1.7 transposes codes in place; those of keys and values are square here, 8 outputs by 64 / 8 groups."""
    skip = [r"(?!.*[kv]_proj).*"] if square else ["lm_head"]
    run, _ = quantized_run(tmp_path, skip=skip, num_attention_heads=8, num_key_value_heads=1)
    directory, threads = packed(run).directory, numba.get_num_threads()
    ours = load_network(resolve(str(directory)), torch.float32)
    before = {name: tensor.clone() for name, tensor in ours.named_buffers()}
    wanted = logits(ours)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.named_buffers())
    numba.set_num_threads(1)  # its threads add into one vector
    try:
        stock = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        stock.save_pretrained(tmp_path / "before")
        assert relative_rms(logits(stock), wanted) < 1e-3
        stock.save_pretrained(tmp_path / "after")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "before", dtype=torch.float32).eval()
        assert relative_rms(logits(again), wanted) < 1e-3
        if not square:
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.float32)
            with pytest.raises(ModelError, match=r"codes of model\.layers\.0\.\S+ are transposed"):
                load_network(resolve(str(tmp_path / "after")), torch.float32)
        else:
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.float32).eval()
            assert relative_rms(logits(again), wanted) > 0.01
    finally:
        numba.set_num_threads(threads)


# Biases, a renamed head, fused layers, fused experts; tests/models/test_families.py packs every family in both formats,
# tests/pipeline/test_experts.py quantizes experts.
@pytest.mark.parametrize("family", ["opt", "gpt_neox", "phi3", "mixtral"])
def test_what_is_packed_computes_what_the_definition_says(family: str, tmp_path: Path) -> None:
    skip = [r".*\.1\..*(o_proj|out_proj|dense)", *([r".*experts.*"] if family == "mixtral" else [])]
    run, plan = quantized_run(tmp_path, family, skip=skip)
    assert len(plan.skipped) >= 1
    wanted = logits(with_weights_written_out(run, plan))
    assert relative_rms(logits(load_network(resolve(str(packed(run).directory)), torch.float32)), wanted) < 1e-5
    dense = packed(run, "dense", overwrite=True).directory
    assert relative_rms(logits(load_network(resolve(str(dense)), torch.float32)), wanted) < 2e-3


# ---------------------------------------------------------------------------------------------------------- the format


def test_everything_that_keeps_its_weight_is_listed_in_both_forms(tmp_path: Path) -> None:
    """A tied head has no tensor of its own and is listed all the same."""
    run, plan = quantized_run(tmp_path, tie_word_embeddings=True)
    directory = packed(run).directory
    listed = json.loads((directory / "config.json").read_text())["quantization_config"][
        "linear_weights_not_to_quantize"
    ]
    network = load_network(resolve(run.config.model), torch.float32)
    linears = {path for path, module in network.named_modules() if isinstance(module, nn.Linear)}
    quantized = {target.path for target in plan.quantized}
    assert {"lm_head", SKIPPED} <= linears - quantized
    for path in linears - quantized:
        assert path in listed and f"{path}.weight" in listed
    assert not quantized & set(listed)


def test_one_scheme_is_told_to_the_reader_and_the_bits_of_every_layer_to_whoever_asks(tmp_path: Path) -> None:
    run, plan = quantized_run(tmp_path, scheme="2x4g8")
    config = config_json(packed(run).directory)
    told = {
        key: value for key, value in config["quantization_config"].items() if key != "linear_weights_not_to_quantize"
    }
    assert told == {
        "quant_method": "aqlm",
        "num_codebooks": 2,
        "nbits_per_codebook": 4,
        "in_group_size": 8,
        "out_group_size": 1,
    }
    assert config["aqlm_cli"]["bits"].keys() == {target.path for target in plan.quantized}
    assert config["dtype"] == "float16"


def test_the_sizes_reported_are_those_of_the_tensors_on_the_disk(tmp_path: Path) -> None:
    run, plan = quantized_run(tmp_path, tie_word_embeddings=True)
    report = packed(run)
    tensors = load_file(report.directory / "model.safetensors")
    assert report.bytes == sum(tensor.nbytes for tensor in tensors.values()) == plan.bytes_after
    codes = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith((".codes", ".codebooks", ".scales")))
    assert report.stored_bits == 8 * codes / sum(target.weights for target in plan.quantized)
    assert report.nominal_bits == plan.stored_bits


def test_floats_become_float16_and_bfloat16_stays(tmp_path: Path) -> None:
    for dtype, kept in (("float32", torch.float16), ("bfloat16", torch.bfloat16)):
        run, _ = quantized_run(tmp_path / dtype, dtype=dtype)
        tensors = load_file(packed(run).directory / "model.safetensors")
        original = load_file(Path(run.config.model) / "model.safetensors")["model.embed_tokens.weight"]
        assert tensors["model.embed_tokens.weight"].dtype == kept
        assert torch.equal(tensors["model.embed_tokens.weight"], original.to(kept))
        assert torch.equal(tensors[NORM], TUNED_NORM.half())
        config = config_json(packed(run).directory)
        assert config["dtype"] == str(kept).removeprefix("torch.")


@pytest.mark.parametrize(
    ("case", "format"),
    [({}, "transformers"), ({"mixed": "1x8g8"}, "native"), ({"scheme": "int4g16"}, "native")],
)
def test_by_itself_the_first_format_is_taken_that_keeps_every_matrix_at_its_bits(
    case: dict[str, str], format: str, tmp_path: Path
) -> None:
    run, _ = quantized_run(tmp_path, **case)  # type: ignore[arg-type]
    report = packed(run, "auto")
    assert report.format == format and report.stored_bits == pytest.approx(report.nominal_bits, rel=0.01)


def test_the_dense_format_holds_ordinary_weights(tmp_path: Path) -> None:
    run, plan = quantized_run(tmp_path)
    report = packed(run, "dense")
    tensors = load_file(report.directory / "model.safetensors")
    for path, matrix in matrices(plan).items():
        assert torch.equal(tensors[f"{path}.weight"], matrix.dequantize(torch.float16))
    assert tensors.keys() == load_file(Path(run.config.model) / "model.safetensors").keys()
    assert "quantization_config" not in config_json(report.directory)
    assert (report.format, report.stored_bits, report.nominal_bits) == ("dense", 16, plan.stored_bits)


def test_a_uniform_grid_is_reported_with_its_nominal_bits_and_its_true_bytes(tmp_path: Path) -> None:
    run, plan = quantized_run(tmp_path, scheme="int2g16")
    report = packed(run)
    assert (report.format, report.scheme, report.stored_bits) == ("dense", "int2g16", 16)
    assert report.nominal_bits == pytest.approx(2 + 18 / 16)
    assert report.bytes == plan.bytes_before


# ----------------------------------------------------------------------------------------------------- what is promised


def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    run, _ = quantized_run(tmp_path)
    first = {path.name: path.read_bytes() for path in packed(run).directory.iterdir()}
    second = {path.name: path.read_bytes() for path in packed(run, overwrite=True).directory.iterdir()}
    assert first == second
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= first.keys()


def test_nothing_in_the_package_tells_a_path_of_this_machine(tmp_path: Path) -> None:
    run, _ = quantized_run(tmp_path, config={"_name_or_path": str(tmp_path)})  # as transformers 4 wrote it
    for path in packed(run).directory.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_a_finished_package_is_reused_and_another_format_is_refused(tmp_path: Path) -> None:
    run, _ = quantized_run(tmp_path)
    report = packed(run)
    written = (report.directory / "model.safetensors").stat().st_mtime_ns
    assert packed(run) == replace(report, seconds=None, memory_bytes=None, disk_bytes=None)
    assert (report.directory / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ArtifactError, match=r"settings\.format transformers there, dense asked"):
        packed(run, "dense")
    assert packed(run, "dense", overwrite=True).format == "dense"


def test_the_card_names_origin_licence_bits_size_text_and_how_to_load_it(tmp_path: Path) -> None:
    run, _ = quantized_run(tmp_path)
    (Path(run.config.model) / "README.md").write_text("---\nlicense: mit\nbase_model: someone/Tiny\n---\n")
    card = (packed(run).directory / "README.md").read_text()
    front = card.split("---")[1]
    assert "base_model: someone/Tiny" in front and "license: mit" in front and "library_name: transformers" in front
    assert "2x8g8" in card and "kB" in card and "notes.txt:4, builtin:4" in card
    assert "aqlm[cpu]==1.1.7" in card and "AutoModelForCausalLM.from_pretrained" in card
    assert "perplexity" not in card
    assert "aqlm[cpu]" not in (packed(run, "dense", overwrite=True).directory / "README.md").read_text()


def test_the_card_shows_a_perplexity_of_this_quantized_model_only(tmp_path: Path) -> None:
    run, _ = quantized_run(tmp_path)
    run.reports.mkdir()
    report: dict[str, Any] = {
        "data": "/home/me/wiki.txt",
        "perplexity": 23.456,
        "stderr": 0.5,
        "sequences": 9,
        "sequence_length": 64,
    }
    report |= {"base_model": {"perplexity": 20.0, "stderr": 0.4}, "quantized": run.current("quantized").digest}
    path = run.reports / "eval-ppl-wiki.txt-9x64-float32.json"
    path.write_text(json.dumps(report))
    card = (packed(run).directory / "README.md").read_text()
    assert "wiki.txt, 9 sequences of 64 tokens | 23.46 ± 0.50, base model 20.00 ± 0.40" in card
    path.write_text(json.dumps({**report, "bos": True}))
    card = (packed(run, overwrite=True).directory / "README.md").read_text()
    assert "9 sequences of 64 tokens, each with a beginning token | 23.46" in card
    path.write_text(json.dumps({**report, "quantized": "that of another"}))
    assert "perplexity" not in (packed(run, overwrite=True).directory / "README.md").read_text()


def test_the_card_has_what_the_gate_and_the_benchmark_found_of_this_model(tmp_path: Path) -> None:
    run, _ = quantized_run(tmp_path)
    run.reports.mkdir()
    digest = run.current("quantized").digest
    gate = {"distinct": 0.5149, "base_distinct": 0.8586, "surprise": 0.793, "base_surprise": 0.759, "tokens": 64}
    gate |= {"samples": [{}, {}], "reasons": []}
    rows = [{"name": name, "decode_median": 188.1, "decode_times": {"FP16": 4.94}} for name in ("FP16", "packed")]
    reports = {"eval-gate.json": gate, "bench.json": {"threads": 2, "rows": rows}}
    for name, report in reports.items():
        (run.reports / name).write_text(json.dumps({**report, "quantized": digest}))
    card = (packed(run).directory / "README.md").read_text()
    assert (
        "| greedy text after 2 prompts, up to 64 tokens | 51% of the 3-grams are new, 86% of its base model's;" in card
    )
    assert "0.79 nats a token by the base model, 0.76 of its own; it has not collapsed |" in card
    assert card.count("decoding") == 1 and "| decoding, 2 CPU threads | 188.1 tokens/s, 4.94 x FP16 |" in card
    for name, report in reports.items():
        (run.reports / name).write_text(json.dumps({**report, "quantized": "that of another"}))
    card = (packed(run, overwrite=True).directory / "README.md").read_text()
    assert "3-grams" not in card and "decoding" not in card


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_reads_back_different_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = quantized_run(tmp_path)
    write = writer.stream_tensors

    def with_one_wrong_code(path: Path, layouts: Any, read: Callable[[str], Tensor], metadata: Any) -> None:
        def wrong(name: str) -> Tensor:
            tensor = read(name).clone()
            if name == "model.layers.1.self_attn.q_proj.codes":
                tensor.view(-1)[17] += 1
            return tensor

        write(path, layouts, wrong, metadata)

    monkeypatch.setattr(writer, "stream_tensors", with_one_wrong_code)
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.self_attn\.q_proj\.codes reads back different"):
        packed(run)
    assert run.artifact("packed") is None


@pytest.mark.parametrize("successes", [0, 2, 6])
def test_a_full_disk_is_one_line_and_publishes_nothing(
    tmp_path: Path, fail_disk: Callable[[int, int], None], successes: int
) -> None:
    run, _ = quantized_run(tmp_path)
    fail_disk(errno.ENOSPC, successes)
    with pytest.raises(StorageError, match="no space left"):
        packed(run)
    assert run.artifact("packed") is None


def test_a_value_out_of_the_range_of_float16_is_refused_with_its_name(tmp_path: Path) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    run, _ = quantized_run(tmp_path, edited=tensors)
    with pytest.raises(QuantizationError, match=r"model\.norm\.weight reaches 1e\+06"):
        packed(run)
    assert run.artifact("packed") is None


def scaled(monkeypatch: pytest.MonkeyPatch, size: float, first_row: float = 1.0) -> None:
    """From here on all matrices are so much larger, and their first rows again."""
    ordinary = packing.random_matrix

    def other(target: Target) -> Matrix:
        matrix = ordinary(target)
        assert isinstance(matrix, AdditiveMatrix)
        scales = size**0.5 * matrix.scales
        scales[0] *= first_row
        return AdditiveMatrix(matrix.codes, size**0.5 * matrix.codebooks, scales)

    monkeypatch.setattr(packing, "random_matrix", other)


def test_weights_that_float16_cannot_hold_are_refused_in_the_dense_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(monkeypatch, 2.0**22)
    run, _ = quantized_run(tmp_path)
    assert packed(run).format == "transformers"
    with pytest.raises(QuantizationError, match=r"weight reaches .* too much for torch\.float16; use a bfloat16 copy"):
        packed(run, "dense", overwrite=True)


@pytest.mark.parametrize(("size", "first_row"), [(2.0**-20, 1.0), (1.0, 2.0**-22)])
@pytest.mark.parametrize(("dtype", "warned"), [("float32", True), ("bfloat16", False)])
def test_rows_that_lose_bits_in_float16_are_told_of(
    dtype: str, warned: bool, size: float, first_row: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(monkeypatch, size, first_row)
    run, plan = quantized_run(tmp_path, dtype=dtype)
    events: list[Event] = []
    tensors = load_file(packed(run, "dense", emit=events.append).directory / "model.safetensors")
    warnings = [event.message for event in events if isinstance(event, Warned)]
    assert len(warnings) == warned
    if warned:
        worst = 0.0
        for path, one in matrices(plan).items():
            wanted = one.dequantize().double()
            rows = (tensors[f"{path}.weight"].double() - wanted).square().sum(1) / wanted.square().sum(1)
            worst = max(worst, float(rows.max()))
        assert f"loses {worst:.2g} of one's energy" in warnings[0]
        assert f"({len(plan.quantized)} such layers)" in warnings[0]


def test_a_model_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    run, _ = quantized_run(tmp_path)
    tensors = load_file(Path(run.config.model) / "model.safetensors")
    save_file({**tensors, NORM: 2 * tensors[NORM]}, Path(run.config.model) / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"was made from sha256:\w+, and .* is now sha256:\w+"):
        packed(run)


def test_a_run_that_is_not_quantized_says_how_to_do_it(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", build_config(None, None, {"model": "tiny"}))
    with pytest.raises(ArtifactError, match=f"aqlm quantize --config {run.path}/run.yaml --out {run.path}"):
        packed(run)


def test_layers_of_several_schemes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    run, _ = quantized_run(tmp_path, mixed="1x8g8")
    with pytest.raises(PlanError, match=r"1x8g8: model.*; 2x8g8: model.*--format native"):
        packed(run)
    assert not (run.path / "packed.partial").exists()
    assert packed(run, "native").scheme == "1x8g8, 2x8g8"
    assert packed(run, "dense", overwrite=True).scheme == "1x8g8, 2x8g8"
