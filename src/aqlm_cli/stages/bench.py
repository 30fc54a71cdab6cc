"""Speed of a packed model beside its original in 16 and 32 bits, and the error of what was computed.

Two speeds count for whoever waits for text: how fast a prompt is read (many tokens at a time, bound by arithmetic) and
how fast one token follows another (one at a time, bound by reading the weights).  All models get the same random
tokens, also while decoding, so all do the same work.  They take turns, pass by pass, so that a machine that warms up or
is disturbed does it to all of them.

A fast product may be wrong, so each row carries the relative RMS error of its logits while decoding: of the packed
model against the same weights written out and multiplied in float32, of the original in 16 bits against itself in 32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aqlm_cli.blocks import count_parameters, replace_module
from aqlm_cli.errors import ModelError
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.model import (
    ModelSource,
    Subject,
    is_coded,
    load_network,
    load_tokenizer,
    model_config,
    tensor_index,
)
from aqlm_cli.report import BenchReport, BenchRow
from aqlm_kernels import AdditiveLinear, choose

DTYPES = {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32}


@dataclass(frozen=True)
class Pass:
    """One prompt read and continued."""

    logits: Tensor  # [tokens, vocabulary], of every decoding step
    prefill: float  # tokens per second
    decode: float


@dataclass(frozen=True)
class Contender:
    """A model that takes part, its size, and the error of its logits (None for what others are compared with)."""

    name: str
    network: nn.Module
    bytes: int
    relative_error: float | None


def bench(subject: Subject, prompt: int, tokens: int, repeats: int, seed: int, emit: Emit) -> BenchReport:
    """Measure what a run has packed beside the model it was made from, or any one model; on the CPU, one sequence.

    `prompt` and `tokens` are the tokens read at once and one by one.  The report of a run is written to its `reports/`.
    """
    emit(Noted(f"measuring {subject.source.directory}"))
    ids = _random_ids(subject.source, prompt + tokens, seed)
    contenders = _contenders(subject, ids, prompt)
    passes = _take_turns(contenders, ids, prompt, repeats, emit)
    report = BenchReport(
        model=subject.source.name,
        threads=torch.get_num_threads(),
        backend=_backends(contenders),
        prompt=prompt,
        tokens=tokens,
        repeats=repeats,
        rows=tuple(_row(contender, passes[contender.name]) for contender in contenders),
    )
    if subject.run is not None:
        emit(Noted(f"wrote {subject.run.write_report('bench.json', report.as_json())}"))
    return report


@torch.inference_mode()
def run_pass(network: nn.Module, ids: Tensor, prompt: int) -> Pass:  # ids [1, prompt + tokens]
    """Read the prompt in one forward, then feed the other tokens one by one through the cache of keys and values."""
    started = time.perf_counter()
    out = network(ids[:, :prompt], use_cache=True, logits_to_keep=1)
    read = time.perf_counter()
    logits = []
    for position in range(prompt, ids.shape[1]):
        out = network(ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0, -1].float())
    finished = time.perf_counter()
    return Pass(torch.stack(logits), prompt / (read - started), len(logits) / (finished - read))


# ---------------------------------------------------------------------------------------------------------- contenders


def _random_ids(source: ModelSource, length: int, seed: int) -> Tensor:
    longest = model_config(source).get("max_position_embeddings")
    if longest is not None and length > longest:
        raise ModelError(f"{source.name} reads {longest} tokens, not {length}; lower --prompt or --tokens")
    vocabulary = len(load_tokenizer(source))
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))


def _contenders(subject: Subject, ids: Tensor, prompt: int) -> list[Contender]:
    original, source = subject.original(), subject.source
    if original is not None:
        return [*_originals(original, ids, prompt), _packed(source, ids, prompt)]
    return [_packed(source, ids, prompt)] if is_coded(source) else _originals(source, ids, prompt)


def _originals(source: ModelSource, ids: Tensor, prompt: int) -> list[Contender]:
    networks = {name: load_network(source, dtype) for name, dtype in DTYPES.items()}
    logits = {name: run_pass(network, ids, prompt).logits for name, network in networks.items()}
    return [
        Contender(
            name,
            network,
            bytes=DTYPES[name].itemsize * count_parameters(network),
            relative_error=None if name == "FP32" else relative_error(logits[name], logits["FP32"]),
        )
        for name, network in networks.items()
    ]


def _packed(source: ModelSource, ids: Tensor, prompt: int) -> Contender:
    exact = run_pass(_written_out(load_network(source, torch.float32)), ids, prompt).logits
    size = sum(tensor.bytes for tensor in tensor_index(source.directory).values())
    network = load_network(source, torch.float32)
    return Contender("packed", network, size, relative_error(run_pass(network, ids, prompt).logits, exact))


def _written_out(network: nn.Module) -> nn.Module:
    """The same weights as ordinary linear layers; the given network is used up."""
    for path, module in list(network.named_modules()):
        if isinstance(module, AdditiveLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = nn.Parameter(module.matrix.dequantize(), requires_grad=False)
            if module.bias is not None:
                linear.bias = module.bias
            replace_module(network, path, linear)
    return network


def relative_error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||"""
    return float((found - exact).norm() / exact.norm())


# -------------------------------------------------------------------------------------------------------------- timing


def _take_turns(
    contenders: Sequence[Contender], ids: Tensor, prompt: int, repeats: int, emit: Emit
) -> dict[str, list[Pass]]:
    """Every model once, then every model again.  All have run before, so nothing is compiled any more."""
    passes: dict[str, list[Pass]] = {contender.name: [] for contender in contenders}
    emit(StageStarted("bench", repeats, "repeat"))
    for done in range(1, repeats + 1):
        for contender in contenders:
            passes[contender.name].append(run_pass(contender.network, ids, prompt))
        emit(Advanced("bench", done))
    return passes


def _row(contender: Contender, passes: Sequence[Pass]) -> BenchRow:
    decode, prefill = [one.decode for one in passes], [one.prefill for one in passes]
    return BenchRow(
        name=contender.name,
        decode_median=statistics.median(decode),
        decode_low=min(decode),
        decode_high=max(decode),
        prefill_median=statistics.median(prefill),
        prefill_low=min(prefill),
        prefill_high=max(prefill),
        bytes=contender.bytes,
        relative_error=contender.relative_error,
    )


def _backends(contenders: Sequence[Contender]) -> str:
    """The product kernels that the packed layers choose while decoding."""
    layers = [module for one in contenders for module in one.network.modules() if isinstance(module, AdditiveLinear)]
    return ", ".join(sorted({choose(layer.packed(), layer.codes.device).name for layer in layers})) or "torch"
