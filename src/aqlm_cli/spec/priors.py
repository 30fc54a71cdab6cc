"""Expected errors and sensitivities of layers that nobody has measured: a forecast, and the start of a measurement.

The divergence of a layer is taken as its sensitivity times its relative error. Both were measured on SmolLM2-135M by an
allocation: errors by a fast search under the Hessians of ordinary text, sensitivities by gradients, times what whole
models of about 3 bits had instead of the sum of their layers (2.2). So were the divergences of its table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from aqlm_cli.spec.choices import OpenLayer
from aqlm_cli.spec.schemes import RefinedScheme, Scheme, parse_scheme

KL_PER_MILLION: Mapping[str, float] = {
    "up_proj": 0.0045,
    "v_proj": 0.0043,
    "down_proj": 0.0041,
    "k_proj": 0.0036,
    "gate_proj": 0.0028,
    "o_proj": 0.0024,
    "q_proj": 0.0021,
}
"""Nats a token for a million weights of this name in 3x8g8, all depths alike: at both ends it is half as much again.

Values and keys are those of tokens weighted by attention; with all tokens alike it is 3 and 2 times as much."""

ORDINARY_KL = 0.004
"""The same of a name that is not listed."""

BANDS = 3
"""Parts of the depth that have sensitivities of their own when they are measured."""


def sensitivity(layer: OpenLayer) -> float:
    """Nats a token for a relative error of 1 of a layer in the blocks."""
    at_3_bits = expected_error(parse_scheme("3x8g8"))
    return KL_PER_MILLION.get(layer.name, ORDINARY_KL) * layer.weights / 1e6 / at_3_bits


ERRORS = {"additive": (0.075, 3.0), "uniform": (2.0, 4.6)}
"""Relative error of a layer at no bits, and the factor by which a bit lowers it, by the kind of scheme."""

DIVERGENCES = {"additive": (0.196, 3.6), "uniform": (0.79, 4.0)}
"""The same of the divergence that a million weights of a table make, in nats a token."""

REFINED_ROWS = 6.2
"""Divisor of the divergence, less 1, per root of the share of rows that are refined to 4 bits: 256, 1,024 and 4,096
rows of SmolLM2-135M's 49,152 leave 69, 53 and 36 % of what 3x8g8 has, and are measured to leave 69, 51 and 38 %."""


COARSE_CODEBOOKS = 1e-4
"""Relative error that codebooks in 8 bits add, measured at 5e-5 to 1.3e-4 for 2 to 4 codebooks."""


def expected_error(scheme: Scheme) -> float:
    """Relative error of a layer's output: 0.008 for 2x8g8, 0.018 for int3g64."""
    at_no_bits, per_bit = ERRORS.get(scheme.kind, ERRORS["uniform"])
    return float(at_no_bits * per_bit**-scheme.code_bits) + (0.0 if scheme.finer is None else COARSE_CODEBOOKS)


def expected_divergence(layer: OpenLayer, scheme: Scheme) -> float:
    """Nats a token for embeddings and head in this scheme: 0.43 for 2x8g8 on the 28 million weights of a tied table."""
    if isinstance(scheme, RefinedScheme):
        refined = math.sqrt(scheme.rows / layer.out_features)
        return expected_divergence(layer, scheme.base) / (1 + REFINED_ROWS * refined)
    millions = layer.weights / 1e6
    at_no_bits, per_bit = DIVERGENCES.get(scheme.kind, DIVERGENCES["uniform"])
    return float(at_no_bits * millions * per_bit**-scheme.code_bits)


def group_of(layer: OpenLayer) -> str:
    """Name of the layers that share a correction of their sensitivities: the same matrices in a third of the depth."""
    return f"{layer.name} {min(BANDS - 1, int(layer.depth * BANDS))}"
