"""Micro-benchmark: times of the parts of a run on this machine, from a few steps of each on random values.

The code that will run is timed: a block's forward pass, its Hessians, the quantization of matrices in parallel, steps
of block fit. The block has attention and a gated feed-forward, as most models do, and is at most as wide as
SmolLM2-135M's; a time a weight and token carries over to wider ones. Small matrices are timed in the model's own
shapes, larger ones from two sizes that tell the cost of a weight from that of the inputs beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aqlm_cli.models.blocks import linears, replace_module
from aqlm_cli.models.hidden_states import compute_dtype, run_block
from aqlm_cli.models.walk import BlockInput
from aqlm_cli.quantization.parallel import Task, compress_all
from aqlm_cli.quantization.solvers.hessian import LayerStatistics, SecondMoment
from aqlm_cli.quantization.training.block import BlockData, fit_block
from aqlm_cli.runs.files import digest_file, load_tensors, save_tensors
from aqlm_cli.spec.cost import ModelShape, Work
from aqlm_cli.spec.quantize import QuantizeConfig
from aqlm_cli.spec.schemes import Scheme, StoredTensor, parse_scheme
from aqlm_cli.spec.time_estimate import Rates
from aqlm_kernels import MATRIX_KINDS, quantized_layers

WIDTHS = (576, 1536)
"""Residual stream and feed-forward of the block that is timed, at most: SmolLM2-135M's."""

SMALL = 1_000_000
"""Most weights of a matrix that is timed in its own shape."""

SAMPLES = ((384, 512), (384, 1536))
"""Shapes that stand for all others."""


def measure_rates(
    model: ModelShape, work: Work, section: QuantizeConfig, device: torch.device, seed: int, character: float
) -> Rates:
    """Time a few steps of everything that the settings ask for; `character` is how long one of text takes to read."""
    scheme = parse_scheme(section.scheme)
    block = _block(model, scheme).to(device)
    weights, tokens = sum(layer.weight.numel() for layer in linears(block, "").values()), 2 * work.length
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, work.length, block.width, generator=rng).to(device)
    dtype = compute_dtype(device)
    forward = _best(lambda: run_block(block, BlockInput.alone(hidden), dtype))
    x = torch.randn(tokens, block.down.in_features, generator=rng).to(device)
    moment = _best(lambda: SecondMoment(x.shape[1], device).add(x.to(dtype)))
    matrices, weight, coupling = _compression(model, work, section, scheme, seed, rng)
    _compress_block(block, scheme, rng)
    quantized_forward = _best(lambda: run_block(block, BlockInput.alone(hidden), dtype))
    per_pass = weights * tokens
    return Rates(
        forward=forward / per_pass,
        quantized_forward=quantized_forward / per_pass,
        step=_step(block, work, device, quantized_forward / 2, rng) / (weights * work.fit.batch * work.length),
        moment=moment / (tokens * x.shape[1] ** 2),
        matrices=matrices,
        weight=weight,
        coupling=coupling,
        character=character,
        byte=_byte(),
    )


class _Block(nn.Module):
    """A quarter as many keys and values as queries would change little."""

    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.width, self.heads = hidden, max(1, hidden // 64)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(hidden, wide, bias=False) for _ in range(2))
        self.down = nn.Linear(wide, hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:  # [b, L, d]
        x = self.norms[0](hidden)
        query, key, value = self._in_heads(self.query(x)), self._in_heads(self.key(x)), self._in_heads(self.value(x))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        hidden = hidden + self.out(attended)
        x = self.norms[1](hidden)
        result: Tensor = hidden + self.down(F.silu(self.gate(x)) * self.up(x))
        return result

    def _in_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


def _block(model: ModelShape, scheme: Scheme) -> _Block:
    unit = math.lcm(64, scheme.group_size)
    targets = model.blocks[-1].targets
    wanted = min(target.in_features for target in targets), max(target.in_features for target in targets)
    hidden, wide = (math.ceil(min(one, most) / unit) * unit for one, most in zip(wanted, WIDTHS, strict=True))
    return _Block(hidden, wide).requires_grad_(False)


def _best(work: Callable[[], object]) -> float:
    """Seconds of the faster of two calls, after one to warm up."""
    work()
    return min(_timed(work) for _ in range(2))


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _compression(
    model: ModelShape, work: Work, section: QuantizeConfig, scheme: Scheme, seed: int, rng: torch.Generator
) -> tuple[Mapping[tuple[int, int], float], float, float]:
    """Seconds by shape, and for other shapes those of a weight, and of a weight and input."""
    shapes = {(t.out_features, t.in_features) for block in model.blocks for t in block.quantized}
    small = bool(shapes) and max(out * features for out, features in shapes) <= SMALL
    _compress(section, seed, scheme, [(8, scheme.group_size * 2)], work.workers, rng)  # whatever has to be compiled
    if small:
        found = _compress(section, seed, scheme, shapes, work.workers, rng)
        return found, max(seconds / (out * features) for (out, features), seconds in found.items()), 0.0
    group = scheme.group_size
    samples = [(out, math.ceil(features / group) * group) for out, features in SAMPLES]
    seconds = _compress(section, seed, scheme, samples, work.workers, rng)
    (few, first), (many, second) = ((f, seconds[out, f] / (out * f)) for out, f in samples)
    coupling = max(0.0, (second - first) / (many - few))
    return {}, first - few * coupling, coupling


def _compress(
    section: QuantizeConfig,
    seed: int,
    scheme: Scheme,
    shapes: Iterable[tuple[int, int]],
    workers: int,
    rng: torch.Generator,
) -> dict[tuple[int, int], float]:
    """Seconds by shape, with at least as many workers as in the run, which slow each other down."""
    wanted = list(shapes)
    tasks = []
    for number in range(max(len(wanted), workers)):
        out, features = wanted[number % len(wanted)]
        x = torch.randn(2 * features, features, generator=rng)
        statistics = LayerStatistics(x.T @ x / len(x), len(x))
        weight = torch.randn(out, features, generator=rng)
        tasks.append(Task(f"{number}", weight, statistics, section.default))
    done = compress_all(tasks, section.settings_of, seed, workers, lambda _: None)
    return {shape: done[f"{number}"].seconds for number, shape in enumerate(wanted)}


def _compress_block(block: _Block, scheme: Scheme, rng: torch.Generator) -> None:
    """Codes and codebooks that are as good as any to be timed."""
    for path, layer in linears(block, "").items():
        layouts = scheme.stored_layouts(layer.out_features, layer.in_features)
        tensors = {name: _random(layout, rng) for name, layout in layouts.items()}
        matrix = MATRIX_KINDS[scheme.kind].from_tensors(tensors)
        replace_module(block, path, matrix.module().requires_grad_(False).to(layer.weight.device))


def _random(layout: StoredTensor, rng: torch.Generator) -> Tensor:
    dtype: torch.dtype = getattr(torch, layout.dtype)
    if layout.values is not None and not layout.shape:  # a number of bits: that of the scheme
        return torch.tensor(layout.values - 1, dtype=dtype)
    if layout.values is not None:
        return torch.randint(layout.values, layout.shape, generator=rng).to(dtype)
    return (torch.randn(layout.shape, generator=rng) / max(layout.shape)).to(dtype)  # sums in a block stay small


def _step(block: _Block, work: Work, device: torch.device, evaluation: float, rng: torch.Generator) -> float:
    """Seconds of a training step, 0 where the quantized block is not fitted; `evaluation` are those of one sequence."""
    if not work.fitted or not quantized_layers(block):
        return 0.0
    steps = 2
    windows = torch.randn(steps * work.fit.batch + 1, work.length, block.width, generator=rng)

    def given(chosen: Tensor) -> BlockInput:
        return BlockInput.alone(windows[chosen].to(device))

    data = BlockData(given, windows, compute_dtype(device), device, per_token=work.fit.error == "per_token")
    training, held_out = torch.arange(len(windows) - 1), torch.tensor([len(windows) - 1])
    once = work.fit.model_copy(update={"epochs": 1})
    seconds = _best(lambda: fit_block(block, data, training, held_out, once, rng))
    return max(0.0, seconds - 2 * evaluation) / steps


def _byte() -> float:
    """Seconds per byte to write with fsync, digest, and read back."""
    tensors = {"zeros": torch.zeros(2**25, dtype=torch.uint8)}
    with TemporaryDirectory() as directory:
        path = Path(directory) / "zeros.safetensors"
        started = time.perf_counter()
        save_tensors(path, tensors)
        digest_file(path)
        load_tensors(path)
        return (time.perf_counter() - started) / 2**25
