"""Speed of a quantized model beside its base model in 16 and 32 bits, and the error of what was computed.

Two speeds count for whoever waits for text: prefill (many tokens at a time, bound by arithmetic) and decoding (one
token at a time, bound by reading the weights). All models get the same random tokens, also while decoding, so all do
the same work. Their runs are interleaved, so that a machine that warms up or is disturbed does it to all of them.

Decoding one token reads every weight once (of an embedding that is not also the head, one row): memory bounds it, and
the share of that bound that is reached says what is left to gain.

A fast kernel may be wrong, so each row carries the relative RMS error of its logits while decoding: the quantized model
against its dequantized weights in float32, the base model in 16 bits against itself in 32.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aqlm_cli.arguments import check_fields
from aqlm_cli.evaluation.candidates import DTYPES, candidates_of_shape, llama_candidates, load_candidates
from aqlm_cli.evaluation.evaluation import Remember, compute_again
from aqlm_cli.evaluation.matmul import MatmulScheme, measure_product
from aqlm_cli.evaluation.model import EvaluatedModel
from aqlm_cli.evaluation.plots import draw_speed
from aqlm_cli.evaluation.speed_report import BenchReport, BenchRow, MatmulRow
from aqlm_cli.evaluation.timing import Candidate, Speed, interleave
from aqlm_cli.events import Emit
from aqlm_cli.models.random_models import empty_network
from aqlm_cli.spec.evaluate import BenchConfig
from aqlm_cli.spec.schemes import Scheme
from aqlm_kernels import AdditiveLinear, CompressedLinear, read_bandwidth


@dataclass(frozen=True)
class SpeedSettings:
    """The section `bench` of a run file, and the seed that draws the tokens."""

    section: BenchConfig
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)


class SpeedEvaluation:
    """Prefill and decoding on the CPU, with one sequence."""

    beside_base = True

    def run(
        self,
        model: EvaluatedModel,
        base: EvaluatedModel | None,
        settings: SpeedSettings,
        emit: Emit,
        remember: Remember = compute_again,
    ) -> BenchReport:
        section = settings.section
        others = llama_candidates(section.llama_bench, section.llama_models)
        length = section.prompt + section.tokens
        model.refuse_length(length, "--prompt or --tokens", stated=True)
        ids = _random_ids(len(model.tokenizer()), length, settings.seed)
        return _compare(model.name, load_candidates(model, base, ids, section), others, ids, section, emit)

    def files(self, report: BenchReport) -> Mapping[str, Mapping[str, Any] | bytes]:
        return {"bench.json": report.as_json(), **{f"bench.{kind}": data for kind, data in draw_speed(report).items()}}


def measure_shape(
    shape: str, scheme: Scheme, settings: SpeedSettings, emit: Emit, table: Scheme | None = None
) -> BenchReport:
    """Measure a model of a shape alone, with random weights and codes; `table` is the scheme of embeddings and head."""
    section = settings.section
    others = llama_candidates(section.llama_bench, section.llama_models)
    ids = _random_ids(empty_network(shape).config.vocab_size, section.prompt + section.tokens, settings.seed)
    candidates = candidates_of_shape(shape, (scheme, table), ids, section, emit)
    described = f"{scheme}" if table is None else f"{scheme}, embeddings {table}"
    return _compare(f"{shape}, {described}, random numbers", candidates, others, ids, section, emit)


def _random_ids(vocabulary: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def _compare(
    model: str,
    candidates: Sequence[Candidate],
    others: Sequence[Candidate],
    ids: torch.Tensor,
    settings: BenchConfig,
    emit: Emit,
) -> BenchReport:
    """The report on the last of the candidates."""
    bandwidth = read_bandwidth()
    passes = interleave([*candidates, *others], ids, settings.prompt, settings.repeats, emit)
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
        matmuls=tuple(_matmuls(candidates[-1].layers, settings, bandwidth)),
    )


def _matmuls(
    layers: Sequence[AdditiveLinear | CompressedLinear], settings: BenchConfig, bandwidth: float
) -> list[MatmulRow]:
    """One row for each shape and scheme among the layers."""
    return [
        measure_product(scheme, settings.backend, settings.batch, settings.repeats, bandwidth, DTYPES)
        for scheme in sorted({MatmulScheme.of(layer) for layer in layers})
    ]


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
        read_bytes=candidate.read,
        relative_error=candidate.relative_error,
    )
