"""One family through the whole pipeline as a tiny random model, each result beside the right one.

The search is replaced by one that takes no time: what matters here is where the codes go, and not how good they are.
Everything is compared with transformers' own forward in float32, of the network as it is, or with the weights written
out that the codes stand for.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
import transformers
from helpers import families, tiny_models
from helpers.packing import write_weight
from helpers.walks import logits_of_walk
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from aqlm_cli.errors import AqlmError, PlanError
from aqlm_cli.events import Event
from aqlm_cli.models import load_network, resolve
from aqlm_cli.models.blocks import find_blocks
from aqlm_cli.pipeline.job import make_job
from aqlm_cli.pipeline.stages.calibrate import calibrate
from aqlm_cli.pipeline.stages.pack import pack
from aqlm_cli.pipeline.stages.quantize import quantize
from aqlm_cli.quantization.methods import METHODS
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.runs.artifact import open_artifact
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.methods.aqlm import AqlmSettings
from aqlm_cli.spec.plan import OUTSIDE, Plan
from aqlm_cli.spec.run_file import build_config
from aqlm_cli.spec.schemes import AdditiveScheme
from aqlm_kernels import AdditiveMatrix

SCHEME = "1x4g8"
"""Sixteen entries a codebook: the matrices are small, and the stock package compiles nothing for so few."""

SAME = 1e-5
"""Of the largest logit: what two ways of one computation in float32 may differ by."""

LOSS = 0.05
"""In nats: what products in bfloat16 may move the loss of a random model by."""

WINDOWS = 3


@dataclass(frozen=True)
class Outcome:
    """What the program makes of a family. `fault`: what is wrong in that, None where nothing is."""

    family: str
    blocks: int = 0
    quantized: int = 0  # matrices of the blocks
    matrices: int = 0
    codes: bool = False  # whether the format of the package `aqlm` can hold them
    native: bool = False  # whether the native format can
    reason: str | None = None  # why it cannot, or why the family is refused altogether
    fault: str | None = None

    @property
    def refused(self) -> bool:
        return self.quantized == 0


def examine(family: str) -> Outcome:
    """Raises nothing: what goes wrong is the outcome's fault."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)  # the stock package's product is wrong with more
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setitem(METHODS, "aqlm", nearest)  # type: ignore[arg-type]
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})  # so that stages run in bfloat16
        try:
            return _examined(family, Path(directory))
        except Exception:
            return Outcome(family, fault=traceback.format_exc().replace(directory, "..."))


def _examined(family: str, directory: Path) -> Outcome:
    trial = Trial(family, directory)
    try:
        reason = trial.why_no_codes("transformers")
        trial.calibrate()
    except AqlmError as error:
        return Outcome(family, reason=str(error).replace(f"{trial.model} ", "").replace(str(directory), "..."))
    blocks = len(find_blocks(trial.network).modules)
    trial.walk()
    plan = trial.quantize()
    trial.pack_dense()
    if reason is None:
        trial.pack_codes("transformers")
    unheld = trial.why_no_codes("native")
    if unheld is None:
        trial.pack_codes("native")
    inside = [target for target in plan.targets if target.kind not in OUTSIDE]
    reasons = "; ".join(dict.fromkeys(one for one in (reason, unheld) if one is not None)) or None
    return Outcome(family, blocks, len(plan.quantized), len(inside), reason is None, unheld is None, reasons)


class Trial:
    """The steps of an examination, in order; AssertionError where a result is wrong."""

    def __init__(self, family: str, directory: Path) -> None:
        self.directory, self.model, self.run = directory, directory / "model", directory / "run"
        families.save(family, self.model)
        self.network = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        self.network.requires_grad_(False)
        self.wanted = logits_of(self.network)
        text = directory / "text.txt"
        text.write_text("".join(f"{n} is {n * n % 97}, and {chr(65 + n % 57)} follows {n % 7}. " for n in range(200)))
        self.settings = settings_of(self.model, text)

    def why_no_codes(self, format: str) -> str | None:
        """The reason why files of the format cannot hold codes, if any; PlanError where they can hold nothing."""
        try:
            make_job(self.config(format), self.run).preflight  # noqa: B018
        except PlanError as error:
            make_job(self.config("dense"), self.run).preflight  # noqa: B018
            return str(error)
        return None

    def config(self, format: str) -> RunConfig:
        return build_config(None, None, {**self.settings, "pack": {"format": format}})

    @torch.no_grad()
    def calibrate(self) -> None:
        report = calibrate(make_job(self.config("dense"), self.run))
        ids = load_file(self.run / "calibration" / "windows.safetensors")["ids"].long()
        ids = ids[torch.linspace(0, len(ids) - 1, 2).long()]
        logits = self.network(input_ids=ids, use_cache=False).logits.float()
        loss = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        assert abs(report.loss - loss) < LOSS, f"calibrate finds a loss of {report.loss}, transformers {loss}"

    def walk(self) -> None:
        found = logits_of_walk(self.network, tiny_models.token_ids(WINDOWS), batch=2)
        same("the walk through the blocks", found, self.wanted)

    @torch.no_grad()
    def quantize(self) -> Plan:
        """What became of each matrix. The codes, decoded by hand, become the weights of the network, all in 16 bits."""
        report = quantize(make_job(self.config("dense"), self.run))
        plan = Plan.from_json(open_artifact(report.directory, "quantized").manifest.results["plan"])
        stored: dict[str, Tensor] = {}
        for file in sorted((self.run / "quantized").glob("block-*.safetensors")):
            stored |= load_file(file)
        for tensor in self.network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
        self.weights = {}
        for target in plan.quantized:
            codes, codebooks, scales = (stored[f"{target.path}.{name}"] for name in ("codes", "codebooks", "scales"))
            groups = codebooks[0].float()[codes[..., 0].long() % 16]  # [out, in/8, 8]
            self.weights[target.path] = groups.flatten(1) * scales.float().flatten()[:, None]
            write_weight(self.network, target.path, self.weights[target.path])
        self.wanted_of_codes = logits_of(self.network)
        changed = distance(self.wanted_of_codes, self.wanted)
        assert changed > 1e3 * SAME, "nothing that was quantized takes part"
        return plan

    def pack_codes(self, format: str) -> None:
        directory = pack(make_job(self.config(format), self.run, overwrite=True)).directory
        ours = load_network(resolve(str(directory)), torch.float32)
        same(f"what is packed as {format}, loaded by ours", logits_of(ours), self.wanted_of_codes)
        stock, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"], f"stock transformers finds no {sorted(report['missing_keys'])}"
        same(f"what is packed as {format}, loaded by stock transformers", logits_of(stock.eval()), self.wanted_of_codes)

    @torch.no_grad()
    def pack_dense(self) -> None:
        directory = pack(make_job(self.config("dense"), self.run, overwrite=True)).directory
        found = logits_of(load_network(resolve(str(directory)), torch.float32))
        for path, weight in self.weights.items():
            write_weight(self.network, path, weight.half().float())
        same("what is packed dense", found, logits_of(self.network))


def settings_of(model: Path, text: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "threads": 1,
        "calibrate": {"data": f"{text}:6", "sequence_length": 40, "statistics_sequences": 2},
        "quantize": {"scheme": SCHEME, "statistics_sequences": 6, "batch": 4, "fit": {"epochs": 0}},
    }


def unheard(_: Event) -> None:
    pass


def nearest(
    weight: Tensor, _: LayerStatistics, scheme: AdditiveScheme, rng: torch.Generator, __: AqlmSettings
) -> AdditiveMatrix:
    """Codebooks of groups drawn from the weight, and of each group the code of the nearest entry."""
    scales = weight.square().mean(1).sqrt() + 1e-6  # [out]
    groups = (weight / scales[:, None]).reshape(-1, scheme.group_size)  # [out * in/g, g]
    entries = groups[torch.randint(len(groups), (scheme.codebook_size,), generator=rng)]
    codes = torch.cdist(groups, entries).argmin(1).view(len(weight), -1, 1)
    return AdditiveMatrix(codes, entries[None], scales)


@torch.no_grad()
def logits_of(network: nn.Module) -> Tensor:
    logits: Tensor = network(input_ids=tiny_models.token_ids(WINDOWS), use_cache=False).logits
    return logits.float()


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of the largest logit."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def same(name: str, found: Tensor, wanted: Tensor) -> None:
    difference = distance(found, wanted)
    assert difference <= SAME, f"{name}: logits differ by {difference:.2g} of the largest"
