"""Perturbations of the weights, against plain arithmetic, and what the probe measures under them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers import tiny_models
from helpers.commands import refused, run
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from aqlm_cli.errors import UsageError
from aqlm_cli.evaluation import LoadedModel, ProbeReport, ProbeSettings
from aqlm_cli.evaluation.perturb import FACTORS, NOISES, Clipping, Noise, Perturbed, added, dense
from aqlm_cli.evaluation.probe import ProbeEvaluation
from aqlm_cli.events import Advanced, Event, StageStarted, silent
from aqlm_cli.models.blocks import find_blocks, linears, replace_module
from aqlm_cli.spec.probe import Correlation, NoiseName, ProbeConfig
from aqlm_kernels import AdditiveLinear, AdditiveMatrix

PAIRS = [(noise, factor) for noise in NOISES for factor in FACTORS]


def weights_of(network: Any) -> dict[str, nn.Linear]:
    blocks = find_blocks(network)
    found: dict[str, nn.Linear] = {}
    for path, block in zip(blocks.paths, blocks.modules, strict=True):
        found |= linears(block, path)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tiny_models.save("llama", tmp_path_factory.mktemp("llama"))
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture
def weight() -> Tensor:
    drawn = torch.randn(40, 96, generator=torch.Generator().manual_seed(3))
    drawn[0, 0], drawn[1, 1] = 0.0, -0.0
    return drawn


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(("noise", "factor"), PAIRS)
def test_all_noise_of_one_strength_has_one_norm(noise: str, factor: str, weight: Tensor) -> None:
    for strength in (1e-3, 0.1, 2.0):
        delta = Noise(noise, factor, strength).delta(weight, "layer", 0)
        assert float(delta.norm()) == pytest.approx(strength * float(weight.double().norm()), rel=1e-6)


@pytest.mark.parametrize(("noise", "factor"), PAIRS)
def test_no_strength_keeps_the_bytes(noise: str, factor: str, weight: Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        same = Noise(noise, factor, 0.0).perturbed(weight.to(dtype), "layer", 0)
        assert same.view(torch.uint8).equal(weight.to(dtype).view(torch.uint8))


def test_noise_has_its_distribution_and_lies_where_its_factor_says(weight: Tensor) -> None:
    by_noise = {name: NOISES[name](torch.Size((400, 250)), torch.Generator().manual_seed(0)) for name in NOISES}
    kurtosis = {name: float((xi**4).mean() / (xi**2).mean() ** 2) for name, xi in by_noise.items()}
    assert kurtosis == pytest.approx({"gaussian": 3.0, "rademacher": 1.0, "uniform": 1.8}, rel=0.03)
    assert all(abs(float(xi.mean())) < 0.01 for xi in by_noise.values())
    none, up, down = (Noise("rademacher", factor, 0.1).delta(weight, "layer", 0).abs() for factor in FACTORS)
    size = weight.double().abs()
    assert float(none.max() - none.min()) < 1e-12
    torch.testing.assert_close(up / up.max(), size / size.max())
    torch.testing.assert_close(down / down.max(), 1 - size / size.max(), atol=1e-12, rtol=1e-6)


def test_noise_is_drawn_by_layer_name_and_seed_and_is_the_same_at_every_strength(weight: Tensor) -> None:
    one = Noise("gaussian", "none", 0.1).delta(weight, "a", 0)
    assert torch.equal(one, Noise("gaussian", "none", 0.1).delta(weight, "a", 0))
    torch.testing.assert_close(Noise("gaussian", "none", 0.3).delta(weight, "a", 0), 3 * one)
    for path, seed in (("b", 0), ("a", 1)):
        other = Noise("gaussian", "none", 0.1).delta(weight, path, seed)
        assert abs(float(F.cosine_similarity(one.flatten(), other.flatten(), dim=0))) < 0.1


def test_a_matrix_of_zeros_stays() -> None:
    zeros = torch.zeros(3, 4)
    for noise, factor in PAIRS:
        assert torch.equal(Noise(noise, factor, 0.5).perturbed(zeros, "layer", 0), zeros)


def test_clipping_bounds_the_largest_share_by_the_largest_of_the_rest() -> None:
    weight = torch.arange(-50.0, 50.0).view(10, 10)[:, torch.randperm(10, generator=torch.Generator().manual_seed(0))]
    found = Clipping(0.05).perturbed(weight, "layer", 0)  # -50, -49, 49, -48 and 48: 47 is the largest of the rest
    assert torch.equal(found, weight.clamp(-47, 47))
    assert torch.equal(Clipping(0.001).perturbed(weight, "layer", 0), weight)  # no weight of a hundred


def test_weights_come_back_to_the_last_bit(llama: Any) -> None:
    network = copy.deepcopy(llama)
    probed = Perturbed(network, torch.float32)
    noise = Noise("uniform", "up", 0.2)
    assert probed.change(lambda weight, path: noise.perturbed(weight, path, 0)) == pytest.approx(0.2, rel=1e-6)
    changed = weights_of(network)
    for path, layer in weights_of(llama).items():
        assert torch.equal(changed[path].weight, noise.perturbed(layer.weight.detach(), path, 0))
    assert probed.change(lambda weight, _: weight) == 0
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), llama.parameters(), strict=True))


def quantized(network: Any) -> Any:
    """A copy with random codes, and biases, in every linear layer of its blocks."""
    copied, rng = copy.deepcopy(network), torch.Generator().manual_seed(0)
    for path, layer in weights_of(copied).items():
        codes = torch.randint(256, (layer.out_features, layer.in_features // 8, 2), generator=rng)
        books = 0.1 * torch.randn(2, 256, 8, generator=rng)
        bias = torch.randn(layer.out_features, generator=rng)
        replace_module(copied, path, AdditiveLinear(AdditiveMatrix(codes, books, torch.ones(layer.out_features)), bias))
    return copied


def test_the_error_of_a_quantizer_reproduces_its_logits(llama: Any) -> None:
    network, ids = copy.deepcopy(llama), tiny_models.token_ids()
    wanted = quantized(llama)
    for path in weights_of(network):  # the biases of the quantized layers, which are no part of W
        replace_module(network, path, dense(wanted.get_submodule(path), torch.float32))
        network.get_submodule(path).weight = nn.Parameter(llama.get_submodule(path).weight.detach().clone())
    of_quantizer = {path: wanted.get_submodule(path).matrix().dequantize() for path in weights_of(network)}
    Perturbed(network, torch.float32).change(lambda weight, path: added(weight, of_quantizer[path].double() - weight))
    with torch.no_grad():
        found, logits = network(input_ids=ids).logits, wanted(input_ids=ids).logits
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


def test_a_quantized_model_becomes_dense_and_computes_the_same(llama: Any) -> None:
    network, ids = quantized(llama), tiny_models.token_ids()
    with torch.no_grad():
        wanted = network(input_ids=ids).logits
        probed = Perturbed(network, torch.float32)
        torch.testing.assert_close(network(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(probed) == len(weights_of(network)) == 14


# --------------------------------------------------------------------------------------------------------- measurement


def test_the_names_of_the_run_file_are_those_of_the_tables() -> None:
    assert (get_args(NoiseName), get_args(Correlation)) == (tuple(NOISES), tuple(FACTORS))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} times {number} is {number**2}. " for number in range(15)))
    return str(path)


def probed(model: LoadedModel, text: str, events: list[Event] | None = None, **settings: Any) -> ProbeReport:
    section = ProbeConfig(data=text, sequence_length=48, sequences=3, **settings)
    emit = silent if events is None else events.append
    return ProbeEvaluation().run(model, None, ProbeSettings(section, seed=5), emit)


def test_every_row_is_what_a_plain_loop_measures(llama: Any, text: str) -> None:
    model, events = LoadedModel("mine", llama, tiny_models.byte_tokenizer()), list[Event]()
    report = probed(model, text, events, noise=("rademacher",), correlate=("up",), strength=(0.0, 0.1), clip=(0.2,))
    tokens = model.loaded_tokenizer.encode(Path(text).read_text(), add_special_tokens=False)
    windows = torch.tensor(tokens[: 3 * 48]).view(3, 48)
    perturbed = [copy.deepcopy(llama) for _ in range(3)]
    for network, change in zip(perturbed[1:], (Noise("rademacher", "up", 0.1), Clipping(0.2)), strict=True):
        for path, layer in weights_of(network).items():
            layer.weight.data = change.perturbed(layer.weight.data, path, 5)
    with torch.no_grad():
        own = llama(input_ids=windows).logits[:, :-1].double().log_softmax(2)
        for row, network in zip(report.rows, perturbed, strict=True):
            other = network(input_ids=windows).logits[:, :-1].double().log_softmax(2)
            loss = F.nll_loss(other.flatten(0, 1), windows[:, 1:].flatten())
            kl = (own.exp() * (own - other)).sum(2)
            assert row.perplexity.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
            assert row.divergence.mean == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-9)
            assert row.ratio.perplexity == pytest.approx(row.perplexity.perplexity / report.unperturbed.perplexity)
    still, noisy, clipped = report.rows
    assert (still.change, still.divergence.maximum, still.ratio.perplexity, still.ratio.stderr) == (0, 0, 1, 0)
    assert still.perplexity == report.unperturbed
    assert noisy.change == pytest.approx(0.1, rel=1e-6) and 0 < clipped.change < 1
    assert [(row.noise, row.correlate, row.size) for row in report.rows[1:]] == [
        ("rademacher", "up", 0.1),
        ("clip", "", 0.2),
    ]
    started = [event for event in events if isinstance(event, StageStarted)]
    steps = [event.done for event in events if isinstance(event, Advanced)]
    assert [event.total for event in started] == [12] and steps == list(range(1, 13))


def test_nothing_to_probe_is_refused(llama: Any, text: str) -> None:
    with pytest.raises(UsageError, match="there is nothing to probe"):
        probed(LoadedModel("mine", llama, tiny_models.byte_tokenizer()), text, noise=(), clip=())


def test_the_command_prints_tables_and_json(run_file: Path) -> None:
    flags = ("--data", "notes.txt", "--sequence-length", "32", "--sequences", "2", "--clip", "0.01")
    arguments = ("probe", "tiny", "--noise", "gaussian,uniform", "--correlate", "none", "--strength", "0.1,0.3", *flags)
    found = json.loads(run(*arguments, "--json").stdout)
    rows = [(row["noise"], row["correlate"], row["size"]) for row in found["rows"]]
    kinds = [(noise, "none", size) for noise in ("gaussian", "uniform") for size in (0.1, 0.3)]
    assert rows == [*kinds, ("clip", "", 0.01)] and found["layers"] == 14
    printed = run(*arguments, "--md").stdout
    assert "| noise | correlate | 0.1 | 0.3 |" in printed and "| clipped | change |" in printed
    cells = [f"{row['perplexity']['perplexity']:.2f} ± {row['perplexity']['stderr']:.2f}" for row in found["rows"]]
    assert f"| gaussian | none | {cells[0]} | {cells[1]} |" in printed
    assert "probe.noise" in refused("probe", "tiny", "--noise", "pink", status=2)


def test_a_run_keeps_the_report(finished_run: Path) -> None:
    flags = ("--data", "notes.txt", "--sequence-length", "32", "--sequences", "2", "--strength", "0.1")
    assert run("probe", str(finished_run), *flags).exit_code == 0
    kept = json.loads((finished_run / "reports" / "probe-notes.txt-2x32-float32.json").read_bytes())
    assert len(kept["rows"]) == 4 and kept["quantized"]
