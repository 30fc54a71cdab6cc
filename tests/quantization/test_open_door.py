"""A new method with a new kind of matrix: all of it is in this file, and the commands take it like any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.commands import FINETUNE, refused, run
from safetensors.torch import load_file
from torch import Tensor, nn

from aqlm_cli.quantization import methods
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec import schemes
from aqlm_cli.spec.methods import METHODS, MethodSpec
from aqlm_cli.spec.schemes import StoredTensor, parse_scheme
from aqlm_cli.spec.section import Rate, Section
from aqlm_kernels import MATRIX_KINDS, CompressedLinear

# ------------------------------------------------------------------------------------------------- the kind of matrix


@dataclass(frozen=True, eq=False)
class SignMatrix:
    """W[o, 8*j + b] = scales[o] * (1 where bit b of signs[o, j] is set, else -1)."""

    signs: Tensor  # [out, in/8] uint8
    scales: Tensor  # [out] float16, float32 while it is trained

    kind = "sign"
    learnable = ("scales",)

    scheme = "sign"

    @property
    def out_features(self) -> int:
        return self.signs.shape[0]

    @property
    def in_features(self) -> int:
        return 8 * self.signs.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        bits = (self.signs[..., None] >> torch.arange(8)) & 1  # [out, in/8, 8]
        return ((2.0 * bits.flatten(1) - 1) * self.scales.float()[:, None]).to(dtype)

    def rows(self, index: Tensor) -> SignMatrix:
        return SignMatrix(self.signs[index], self.scales[index])

    def stored(self) -> SignMatrix:
        return SignMatrix(self.signs, self.scales.half())

    def balanced(self) -> SignMatrix:
        return self

    def nearest(self, weight: Tensor) -> SignMatrix:
        bits = (weight * self.scales.float()[:, None] >= 0).view(len(weight), -1, 8)
        return SignMatrix((bits * 2 ** torch.arange(8)).sum(2).to(torch.uint8), self.scales)

    def module(self, bias: Tensor | None = None) -> nn.Module:
        return CompressedLinear(self, bias)

    def bits(self) -> int:
        return 8 * self.signs.numel() + 16 * self.scales.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"signs": self.signs, "scales": self.scales}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SignMatrix:
        return cls(tensors["signs"], tensors["scales"])

    def packed_tensors(self) -> dict[str, Tensor]:
        return self.stored().tensors()

    @classmethod
    def from_packed(cls, tensors: Mapping[str, Tensor], word: str) -> SignMatrix:
        return cls.from_tensors(tensors)


# -------------------------------------------------------------------------------------------------------- the scheme


@dataclass(frozen=True)
class SignScheme:
    kind = "sign"
    form = "sign"
    group_size = 8
    code_bits = 1.0
    codebook_shape = None
    finer = None

    def __str__(self) -> str:
        return "sign"

    @classmethod
    def parse(cls, text: str) -> SignScheme | None:
        return cls() if text == "sign" else None

    def bound(self, in_features: int) -> SignScheme:
        return self

    def stored_bits(self, out_features: int, in_features: int) -> int:
        return out_features * in_features + 16 * out_features

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        return 1 + 16 / in_features

    def refuses(self, out_features: int, in_features: int) -> str | None:
        return f"{in_features} inputs are no whole bytes of signs" if in_features % 8 else None

    def stored_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        signs = StoredTensor("uint8", (out_features, in_features // 8), values=256)
        return {"signs": signs, "scales": StoredTensor("float16", (out_features,))}

    def packed_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        return {"weight": StoredTensor("float16", (out_features, in_features))}

    def native_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        return self.stored_layouts(out_features, in_features)

    def peak_bytes(self, out_features: int, in_features: int) -> int:
        return 8 * out_features * in_features


# -------------------------------------------------------------------------------------------------------- the method


class SignSettings(Section):
    factor: Rate = 1.0


def quantize(
    weight: Tensor, statistics: LayerStatistics, scheme: SignScheme, rng: torch.Generator, settings: SignSettings
) -> SignMatrix:
    """The signs, and `factor` times the mean size of each row."""
    scales = settings.factor * weight.abs().mean(1)
    return SignMatrix(torch.zeros(len(weight), weight.shape[1] // 8), scales.half()).nearest(weight)


RUN_FILE = """
model: tiny
threads: 1
calibrate: {data: "builtin:8", sequence_length: 32, statistics_sequences: 2}
quantize:
  method: sign
  scheme: sign
  statistics_sequences: 8
  sign: {factor: 1.5}
  fit: {sequences: 4, held_out: 4}
pack: {format: dense}
eval_ppl: {data: [notes.txt], sequence_length: 32}
"""


@pytest.fixture
def sign(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that a new method and a new kind need, and a run file that names them."""
    monkeypatch.setitem(MATRIX_KINDS, "sign", SignMatrix)  # type: ignore[arg-type]
    monkeypatch.setitem(schemes.FAMILIES, "sign", SignScheme)  # type: ignore[arg-type]
    monkeypatch.setitem(METHODS, "sign", MethodSpec("signs", SignSettings, ("sign",), "sign", epochs=2))  # type: ignore[arg-type]
    monkeypatch.setitem(methods.METHODS, "sign", quantize)  # type: ignore[arg-type]
    run_file.write_text(RUN_FILE + FINETUNE)


def told(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def tensors_of(directory: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(Path("run", directory).glob("*.safetensors")):
        found |= load_file(path)
    return found


def matrices_of(directory: str) -> dict[str, SignMatrix]:
    stored = tensors_of(directory)
    paths = [name.removesuffix(".signs") for name in stored if name.endswith(".signs")]
    return {path: SignMatrix(stored[f"{path}.signs"], stored[f"{path}.scales"]) for path in paths}


@pytest.mark.usefixtures("sign")
def test_a_new_method_and_kind_go_through_all_stages() -> None:
    planned = told("plan", "--config", "run.yaml")
    assert planned["plan"]["method"] == "sign" and set(planned["plan"]["schemes"].values()) == {"sign"}
    assert planned["plan"]["kernel"] is None
    made = told("quantize", "--config", "run.yaml", "--out", "run")
    original, quantized = load_file("tiny/model.safetensors"), matrices_of("quantized")
    assert quantized.keys() == planned["plan"]["schemes"].keys()
    for path, matrix in quantized.items():
        weight = original[f"{path}.weight"].float()
        assert torch.equal(matrix.dequantize() >= 0, weight >= 0), path
        start = 1.5 * weight.abs().mean(1)
        assert not torch.equal(matrix.scales, start.half()), "block fitting moves the scales"
        torch.testing.assert_close(matrix.scales.float(), start, rtol=0.5, atol=0)
    bits, weights = sum(map(SignMatrix.bits, quantized.values())), sum(one.signs.numel() for one in quantized.values())
    assert bits == 8 * sum(tensor.nbytes for one in quantized.values() for tensor in one.tensors().values())
    assert made["quantize"]["stored_bits"] == pytest.approx(bits / (8 * weights)) and made["quantize"]["code_bits"] == 1
    refuse_other_settings()

    tuned = told("finetune", "run")["finetune"]
    assert tuned["after"] < tuned["before"]
    finetuned = matrices_of("finetuned")
    assert all(torch.equal(finetuned[path].signs, matrix.signs) for path, matrix in quantized.items())
    assert not any(torch.equal(finetuned[path].scales, matrix.scales) for path, matrix in quantized.items())
    packed = tensors_of("packed")
    for path, matrix in finetuned.items():
        assert torch.equal(packed[f"{path}.weight"], matrix.dequantize(torch.float16)), path
    (file,) = Path("run/packed").glob("*.safetensors")
    assert file.stat().st_size == planned["forecast"]["safetensors_bytes"]

    assert 1 < told("eval-ppl", "run")["perplexity"] < 1e4
    assert told("verify", "run")["layer"] in quantized
    assert "no layer of this run has codes" in refused("finetune", "run", "--codes", "0.1", "--overwrite", status=2)


def refuse_other_settings() -> None:
    """What is another's, or changed, is named."""
    settings = yaml.safe_load(Path("run/run.yaml").read_text())
    assert settings["quantize"]["sign"] == {"factor": 1.5} and "aqlm" not in settings["quantize"]
    for section, line in (
        ({"factor": 2.0}, "quantize.sign.factor: 1.5 there, 2.0 here"),
        ({"beam": 4}, "unknown key `quantize.sign.beam`; nearest valid key is `quantize.aqlm.beam`"),
        ({"factor": -1}, "`quantize.sign.factor`: Input should be greater than 0, found -1"),
    ):
        changed = {**settings, "quantize": {**settings["quantize"], "sign": section}}
        Path("other.yaml").write_text(yaml.safe_dump(changed))
        assert line in refused("quantize", "--config", "other.yaml", "--out", "run")
    flags = ("--method", "aqlm", "--scheme", "2x4g8")
    assert "quantize.method: sign there, aqlm here" in refused(
        "quantize", "--config", "run.yaml", "--out", "run", *flags
    )
    Path("other.yaml").write_text(yaml.safe_dump({"quantize": {"sign": {"factor": 2.0}}}))
    line = "`quantize.sign`: settings of method sign, but quantize.method is aqlm; remove them"
    assert line in refused("quantize", "tiny", "--config", "other.yaml")


@pytest.mark.usefixtures("sign")
def test_a_new_kind_is_not_fitted_where_the_run_file_says_so() -> None:
    Path("run.yaml").write_text(RUN_FILE.replace("fit: {", "fit: {epochs: 0, "))
    told("quantize", "--config", "run.yaml", "--out", "run")
    original = load_file("tiny/model.safetensors")
    for path, matrix in matrices_of("quantized").items():
        weight = original[f"{path}.weight"].float()
        assert torch.equal(matrix.scales, (1.5 * weight.abs().mean(1)).half()), path


@pytest.mark.parametrize(
    "scheme",
    [
        "2x4g8",
        "2x4g8c8",
        "1x9g4",
        "3x8g16c8",
        "3x8g16",
        "int2g16",
        "int8g64",
        "nf4tg16",
        "cube3",
        "bfp5g16",
        "bmf6e2g16",
        "bl4g8",
        "sign",
    ],
)
@pytest.mark.usefixtures("sign")
def test_a_scheme_tells_the_layout_and_the_bits_of_its_matrices(scheme: str) -> None:
    statistics = LayerStatistics(torch.eye(64), 1)
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    parsed = parse_scheme(scheme).bound(64)
    name = next(name for name, method in METHODS.items() if parsed.kind in method.families)
    section = METHODS[name].settings
    settings = None if section is None else section()
    matrix = methods.METHODS[name](weight, statistics, parsed, torch.Generator().manual_seed(0), settings)
    assert matrix.kind == parsed.kind and isinstance(matrix, MATRIX_KINDS[parsed.kind])
    layouts = parsed.stored_layouts(24, 64)
    stored = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in matrix.tensors().items()}
    assert stored == {key: (getattr(torch, layout.dtype), layout.shape) for key, layout in layouts.items()}
    for key, layout in layouts.items():
        tensor = matrix.tensors()[key]
        assert layout.bytes == tensor.nbytes
        assert layout.values is None or 0 <= int(tensor.min()) <= int(tensor.max()) < layout.values
    assert matrix.bits() == parsed.stored_bits(24, 64) == pytest.approx(parsed.bits_per_weight(24, 64) * 24 * 64)
