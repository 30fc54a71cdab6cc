"""The cost of an allocation before it starts: every layer in every scheme, and some whole models."""

from __future__ import annotations

from collections.abc import Iterable

from aqlm_cli.spec.choices import OpenLayer
from aqlm_cli.spec.cost import FLOAT, PROCESS, Cost, ModelShape, Work, quantization_memory
from aqlm_cli.spec.plan import Target
from aqlm_cli.spec.schemes import Scheme, total_bytes
from aqlm_cli.spec.target import WHOLE_MODELS, TargetConfig
from aqlm_cli.spec.time_estimate import Rates

FAST_SHARE = 0.16
"""Time of the fast search, as a share of the whole search for the same scheme."""

PLANS = 3
"""Whole plans that are measured beside the mixes: the best single scheme, and what is solved for."""

HEADS = 2
"""Products with the head for every token of a whole model: the base model's, and its own."""


def allocation_cost(
    layers: Iterable[OpenLayer], target: TargetConfig, model: ModelShape, work: Work, rates: Rates, default: Scheme
) -> Cost:
    """The stage `allocate`: seconds, peak resident memory, and bytes on the disk.

    The time of a search grows with the bits of its codes; `rates` are those of the default scheme. What a patch adds to
    a base that is searched anyway is not counted, nor is what coarser codebooks take.
    """
    layers = list(layers)
    options = [(layer, one.treatment) for layer in layers for one in layer.choices if one.treatment is not None]
    searches = sum(
        rates.compression(_target(layer, treatment.scheme)) * treatment.scheme.code_bits / default.code_bits
        for layer, treatment in options
        if not {treatment.base, treatment.finer} & {one.treatment for one in layer.choices if one.treatment}
    )
    tokens = min(target.sequences, work.sequences) * work.length
    inside = sum(block.weights_per_token for block in model.blocks)
    head = model.vocabulary * model.hidden
    moments = sum(block.entries_per_token for block in model.blocks) * rates.moment
    walking = tokens * (2 * inside * rates.forward + moments)
    tables = sum(layer.outside for layer, _ in options)
    whole = (
        WHOLE_MODELS * (1 + target.mixes + PLANS + tables) * tokens * (inside + HEADS * head) * rates.quantized_forward
    )
    kept = sum(total_bytes(t.scheme.stored_layouts(layer.out_features, layer.in_features)) for layer, t in options)
    parameters = model.outside + sum(block.parameters for block in model.blocks)
    in_memory = PROCESS + FLOAT * parameters + _largest_mix(layers) + FLOAT * tokens * model.hidden
    return Cost(
        walking + FAST_SHARE * searches / work.workers + whole,
        max(in_memory, quantization_memory(model, work)),
        kept + 2 * FLOAT * tokens * model.hidden,
    )


def _largest_mix(layers: Iterable[OpenLayer]) -> int:
    """Bytes of the largest matrices of every layer, as they are kept; a table is dequantized."""
    total = 0
    for layer in layers:
        schemes = [one.treatment.scheme for one in layer.choices if one.treatment is not None]
        sizes = [total_bytes(scheme.stored_layouts(layer.out_features, layer.in_features)) for scheme in schemes]
        total += max(sizes, default=0) + (FLOAT * layer.weights if layer.outside else 0)
    return total


def _target(layer: OpenLayer, scheme: Scheme) -> Target:
    return Target(layer.path, layer.kind, layer.out_features, layer.in_features, scheme, None)
