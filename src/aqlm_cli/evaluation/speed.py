"""Speed of a packed model beside its original in 16 and 32 bits, and the error of what was computed.

Two speeds count for whoever waits for text: how fast a prompt is read (many tokens at a time, bound by arithmetic) and
how fast one token follows another (one at a time, bound by reading the weights).  All models get the same random
tokens, also while decoding, so all do the same work.  They take turns, pass by pass, so that a machine that warms up or
is disturbed does it to all of them.

Decoding one token reads every weight once (of an embedding that is not also the head, one row): memory bounds it, and
the share of that bound that is reached says what is left to gain.

A fast product may be wrong, so each row carries the relative RMS error of its logits while decoding: of the packed
model against the same weights written out and multiplied in float32, of the original in 16 bits against itself in 32.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aqlm_cli.evaluation.llama_cpp import LlamaModel, find_llama_models
from aqlm_cli.evaluation.matmul import measure_product, relative_error
from aqlm_cli.evaluation.plots import draw_speed
from aqlm_cli.evaluation.speed_report import BenchReport, BenchRow, ProductRow
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.models import (
    Decoding,
    ModelSource,
    Subject,
    decoding_of,
    is_quantized,
    load_network,
    load_tokenizer,
    refuse_longer_than_stated,
    tensor_index,
)
from aqlm_cli.models.blocks import count_parameters, replace_module
from aqlm_cli.models.random_models import empty_network, random_network, random_packed_network
from aqlm_cli.quantization.student import names_in_files
from aqlm_cli.spec.config import BenchConfig, Head
from aqlm_cli.spec.schemes import Scheme
from aqlm_kernels import AdditiveLinear, KernelError, QuantizedLayer, coded_layers, read_bandwidth

DTYPES = {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32}


class Speed(NamedTuple):
    """Tokens per second."""

    prefill: float
    decode: float


class Pass(NamedTuple):
    """One prompt read and continued."""

    logits: Tensor  # [tokens, vocabulary], of every decoding step
    speed: Speed


@dataclass(frozen=True)
class Candidate:
    """A model that takes part, its size, and the error of its logits (None where there is nothing to compare with)."""

    name: str
    decoding: Decoding | LlamaModel
    bytes: int
    read_bytes: int  # of these, what one token reads
    relative_error: float | None
    layers: tuple[AdditiveLinear, ...] = ()  # of a packed model

    def turn(self, ids: Tensor, prompt: int) -> Speed:
        if isinstance(self.decoding, LlamaModel):
            return Speed(*self.decoding.speed(prompt, len(ids) - prompt, torch.get_num_threads()))
        return run_pass(self.decoding, ids, prompt).speed


def bench(subject: Subject, settings: BenchConfig, seed: int, emit: Emit) -> BenchReport:
    """Measure what a run has packed beside the model it was made from, or any one model; on the CPU, one sequence.

    The report of a run is written to its `reports/`, with a picture of it.
    """
    emit(Noted(f"measuring {subject.source.directory}"))
    others = _llama_models(settings)
    ids = _random_ids(subject.source, settings.prompt + settings.tokens, seed)
    report = _compare(subject.source.name, _candidates(subject, ids, settings), others, ids, settings, emit)
    if subject.run is not None:
        emit(Noted(f"wrote {subject.run.write_report('bench.json', report.as_json())}"))
        for name, picture in draw_speed(report).items():
            emit(Noted(f"wrote {subject.run.write_report(f'bench.{name}', picture)}"))
    return report


def bench_shape(shape: str, scheme: Scheme, settings: BenchConfig, seed: int, emit: Emit) -> BenchReport:
    """The same for a model of a shape alone, with random weights and codes: those types that fit in half the memory."""
    others = _llama_models(settings)
    length = settings.prompt + settings.tokens
    parameters = count_parameters(empty_network(shape))
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    sizes = {name: dtype.itemsize * parameters for name, dtype in DTYPES.items()}
    left_out = [name for position, name in enumerate(sizes) if sum(list(sizes.values())[: position + 1]) > free]
    if left_out:
        emit(Noted(f"{', '.join(left_out)} would take more than half of this machine's memory, and is not measured"))
    packed = random_packed_network(shape, scheme)
    ids = torch.randint(packed.config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
    exact = None
    if "FP32" not in left_out:
        exact = run_pass(decoding_of(_written_out(copy.deepcopy(packed)), length), ids, settings.prompt).logits
    decoding = decoding_of(packed, length, settings.backend, settings.head)
    found = run_pass(decoding, ids, settings.prompt).logits
    layers = tuple(coded_layers(packed).values())
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    size = 2 * (parameters - weights) + sum(layer.matrix().bits() // 8 for layer in layers)
    candidates = [
        Candidate(
            name,
            decoding_of(random_network(shape, DTYPES[name]), length),
            bytes=sizes[name],
            read_bytes=sizes[name] - DTYPES[name].itemsize * _embedded_only(packed),
            relative_error=None,
        )
        for name in DTYPES
        if name not in left_out
    ]
    error = None if exact is None else relative_error(found, exact)
    candidates.append(Candidate("packed", decoding, size, size - _unread(packed, settings.head), error, layers))
    return _compare(f"{shape}, {scheme}, random numbers", candidates, others, ids, settings, emit)


def _compare(
    model: str,
    candidates: Sequence[Candidate],
    others: Sequence[Candidate],
    ids: Tensor,
    settings: BenchConfig,
    emit: Emit,
) -> BenchReport:
    """The last of the candidates is the one that the report is about."""
    bandwidth = read_bandwidth()
    passes = _take_turns([*candidates, *others], ids, settings.prompt, settings.repeats, emit)
    medians = {name: statistics.median(one.decode for one in turns) for name, turns in passes.items()}
    return BenchReport(
        model=model,
        threads=torch.get_num_threads(),
        backend=candidates[-1].decoding.name,
        prompt=settings.prompt,
        tokens=settings.tokens,
        repeats=settings.repeats,
        read_bandwidth=bandwidth,
        rows=tuple(_row(one, passes[one.name], medians, bandwidth) for one in (*candidates, *others)),
        products=tuple(_products(candidates[-1].layers, settings, bandwidth)),
    )


def _products(layers: Sequence[AdditiveLinear], settings: BenchConfig, bandwidth: float) -> list[ProductRow]:
    """One row for each shape and scheme among the layers."""
    kinds = {(layer.out_features, layer.in_features, tuple(layer.codebooks.shape)) for layer in layers}
    return [
        measure_product(shape, codebooks, settings.backend, settings.batch, settings.repeats, bandwidth, DTYPES)
        for *shape, codebooks in sorted(kinds)
    ]


def run_pass(decoding: Decoding, ids: Tensor, prompt: int) -> Pass:  # ids [prompt + tokens]
    """Read the prompt at once, then feed the other tokens one by one."""
    started = time.perf_counter()
    decoding.prefill(ids[:prompt])
    read = time.perf_counter()
    logits = [decoding.step(token) for token in ids[prompt:].tolist()]
    finished = time.perf_counter()
    return Pass(torch.stack(logits), Speed(prompt / (read - started), len(logits) / (finished - read)))


# ---------------------------------------------------------------------------------------------------------- candidates


def _llama_models(settings: BenchConfig) -> list[Candidate]:
    return [
        Candidate(model.name, model, bytes=model.bytes, read_bytes=model.bytes, relative_error=None)
        for model in find_llama_models(settings.llama_bench, settings.llama_models)
    ]


def _random_ids(source: ModelSource, length: int, seed: int) -> Tensor:
    refuse_longer_than_stated(source, length, "--prompt or --tokens")
    vocabulary = len(load_tokenizer(source))
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def _candidates(subject: Subject, ids: Tensor, settings: BenchConfig) -> list[Candidate]:
    original, source = subject.original(), subject.source
    if original is not None:
        return [*_originals(original, ids, settings.prompt), _packed(source, ids, settings)]
    if is_quantized(source):
        return [_packed(source, ids, settings)]
    if settings.backend is not None or settings.head != "exact":
        raise KernelError(f"{source.name} has no packed layers; leave --backend and --head out")
    return _originals(source, ids, settings.prompt)


def _originals(source: ModelSource, ids: Tensor, prompt: int) -> list[Candidate]:
    networks = {name: load_network(source, dtype) for name, dtype in DTYPES.items()}
    decodings = {name: decoding_of(network, len(ids)) for name, network in networks.items()}
    logits = {name: run_pass(decoding, ids, prompt).logits for name, decoding in decodings.items()}
    return [
        Candidate(
            name,
            decodings[name],
            bytes=DTYPES[name].itemsize * count_parameters(network),
            read_bytes=DTYPES[name].itemsize * (count_parameters(network) - _embedded_only(network)),
            relative_error=None if name == "FP32" else relative_error(logits[name], logits["FP32"]),
        )
        for name, network in networks.items()
    ]


def _packed(source: ModelSource, ids: Tensor, settings: BenchConfig) -> Candidate:
    written_out = decoding_of(_written_out(load_network(source, torch.float32)), len(ids))
    exact = run_pass(written_out, ids, settings.prompt).logits
    stored = tensor_index(source.directory)
    size = sum(tensor.bytes for tensor in stored.values())
    network = load_network(source, torch.float32)
    decoding = decoding_of(network, len(ids), settings.backend, settings.head)
    found = run_pass(decoding, ids, settings.prompt).logits
    error = relative_error(found, exact)
    twice = sum(stored[name].bytes for names in names_in_files(network, stored).values() for name in names[1:])
    read = size - _unread(network, settings.head) - twice
    return Candidate("packed", decoding, size, read, error, tuple(coded_layers(network).values()))


def _unread(network: Any, head: Head) -> int:
    """Bytes of a packed model that one token does not read."""
    return 2 * _embedded_only(network) + (int(network.get_output_embeddings().weight.numel()) if head == "int8" else 0)


def _embedded_only(network: Any) -> int:
    """Weights of the embedding where it is not the head, too: of these a token reads one row."""
    embedding, head = network.get_input_embeddings().weight, network.get_output_embeddings().weight
    return 0 if embedding is head else int(embedding.numel())


def _written_out(network: nn.Module) -> nn.Module:
    """The same weights as ordinary linear layers; the given network is used up."""
    for path, module in list(network.named_modules()):
        if isinstance(module, QuantizedLayer):
            weight, bias = module.matrix().dequantize(), module.trainable().get("bias")
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                linear.bias = bias
            replace_module(network, path, linear)
    return network


# -------------------------------------------------------------------------------------------------------------- timing


def _take_turns(
    candidates: Sequence[Candidate], ids: Tensor, prompt: int, repeats: int, emit: Emit
) -> dict[str, list[Speed]]:
    """Every model once, then every model again.  All have run before, so nothing is compiled any more."""
    passes: dict[str, list[Speed]] = {candidate.name: [] for candidate in candidates}
    emit(StageStarted("bench", repeats, "repeat"))
    for done in range(1, repeats + 1):
        for candidate in candidates:
            passes[candidate.name].append(candidate.turn(ids, prompt))
        emit(Advanced("bench", done))
    return passes


def _row(candidate: Candidate, passes: Sequence[Speed], medians: Mapping[str, float], bandwidth: float) -> BenchRow:
    decode, prefill = [one.decode for one in passes], [one.prefill for one in passes]
    median = medians[candidate.name]
    return BenchRow(
        name=candidate.name,
        decode_median=median,
        decode_low=min(decode),
        decode_high=max(decode),
        decode_times={name: median / medians[name] for name in DTYPES if name in medians},
        decode_bound=bandwidth / candidate.read_bytes,
        prefill_median=statistics.median(prefill),
        prefill_low=min(prefill),
        prefill_high=max(prefill),
        bytes=candidate.bytes,
        relative_error=candidate.relative_error,
    )
