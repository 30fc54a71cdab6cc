"""AQLM for one weight matrix: W `[out, in]` ~ scales * sums of codebook entries, close on the layer's inputs.

    minimise  sum_i  (w_i - s_i v_i) H (w_i - s_i v_i)      v_ij = sum_m C_m[a_ijm]

over codes a, codebooks C and scales s. What makes it good, in this order: codes are chosen with error feedback (LDLQ),
the most active input groups first; both codes of a pair are chosen jointly; k-means starts in the metric of that
feedback; codebooks are solved for instead of trained, in alternation with the codes, and in all but the last rounds
the codes are chosen from scratch for the new codebooks. Against AQLM's own procedure (arXiv 2401.06118; here
aqlm_original.py) this leaves a third less error in a twentieth of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.methods.aqlm_original import quantize_reference
from aqlm_cli.quantization.solvers.code_search import CodeSearch, code_search, sum_of_entries
from aqlm_cli.quantization.solvers.codebooks import Approximation, improve_codebooks, improve_scales, starting_scales
from aqlm_cli.quantization.solvers.hessian import (
    Feedback,
    LayerStatistics,
    block_ldl,
    damped,
    diagonal_blocks,
    most_active_first,
)
from aqlm_cli.quantization.solvers.kmeans import residual_kmeans
from aqlm_cli.quantization.solvers.ldlq import Rounder, sweep
from aqlm_cli.spec.methods.aqlm import AqlmSettings
from aqlm_cli.spec.schemes import BITS_PER_FLOAT, AdditiveScheme
from aqlm_kernels import AdditiveMatrix, balanced
from aqlm_kernels.matrices.additive import rounded_codebooks


@torch.no_grad()
def quantize(
    weight: Tensor, statistics: LayerStatistics, scheme: AdditiveScheme, rng: torch.Generator, settings: AqlmSettings
) -> AdditiveMatrix:
    """Quantize W `[out, in]` float32, with codebooks and scales in the range of float16 as far as there is such a pair.

    Raises QuantizationError where W or H hold NaN or infinity.
    """
    if not bool(weight.isfinite().all()):
        raise QuantizationError("the weight holds NaN or infinite values; the model is damaged")
    if not bool(statistics.second_moment.isfinite().all()):
        raise QuantizationError("its inputs hold NaN or infinite values; the model is damaged or overflows")
    algorithm = {"ldlq": _quantize, "reference": quantize_reference}[settings.algorithm]
    unit = ordinary_unit(weight)
    approximation = algorithm(weight / unit, statistics, scheme, rng, settings)
    scales = (unit * approximation.scales).masked_fill((weight == 0).all(dim=1), 0)
    return balanced(AdditiveMatrix(approximation.codes, approximation.codebooks, scales, scheme.entry_bits))


def with_coarser_codebooks(matrix: Any, scheme: Any) -> AdditiveMatrix:
    """The additive matrix with its codebooks in the bits of this additive scheme; codes and scales stay."""
    coarser: AdditiveMatrix = replace(matrix, entry_bits=scheme.entry_bits)
    return coarser


ORDINARY = 2.0**-10, 2.0**10
"""The search squares weights, and some of its thresholds and rates are absolute: for largest weights between these."""


def ordinary_unit(weight: Tensor) -> float:
    """1 for ordinary weights, else the power of two next above the largest, by which float32 divides exactly."""
    largest = float(weight.abs().max())
    if largest == 0 or ORDINARY[0] <= largest <= ORDINARY[1]:
        return 1.0
    return float(2.0 ** min(max(math.frexp(largest)[1], -126), 126))


def _quantize(
    weight: Tensor, statistics: LayerStatistics, scheme: AdditiveScheme, rng: torch.Generator, settings: AqlmSettings
) -> Approximation:
    sweeps = Sweeps.of(statistics, scheme.group_size, settings, weight.device)
    return fit(weight, sweeps, scheme, rng, settings)


@dataclass(frozen=True, eq=False)
class Sweeps:
    """The damped Hessian in the forms that the search needs; they serve any number of rows."""

    metric: Tensor  # [in, in]
    order: Tensor  # [n]: groups as the LDLQ pass takes them
    ahead: Feedback  # of that pass, in its order
    around: Feedback  # of coordinate descent
    search: CodeSearch

    @classmethod
    def of(cls, statistics: LayerStatistics, group: int, settings: AqlmSettings, device: torch.device) -> Sweeps:
        metric = damped(statistics.second_moment, settings.damping)
        order = most_active_first(metric, group)
        columns = (order[:, None] * group + torch.arange(group, device=order.device)).flatten()
        ahead = block_ldl(metric[columns][:, columns], group, settings.factor_damping)
        around = Feedback(diagonal_blocks(metric, group), metric, forward=False)
        return cls(metric, order, ahead, around, code_search(device))

    @property
    def importance(self) -> Tensor:
        """Price of an error of each input `[n, g]`: the diagonals of the LDL's blocks."""
        return self.ahead.metric[self.order.argsort()].diagonal(dim1=1, dim2=2)


def fit(
    weight: Tensor, sweeps: Sweeps, scheme: AdditiveScheme, rng: torch.Generator, settings: AqlmSettings
) -> Approximation:
    """Codes, codebooks and scales for W `[out, in]`, whose largest weight is of ordinary size."""
    metric, search = sweeps.metric, sweeps.search
    present = _start(weight, sweeps.importance, scheme, rng, settings, search)
    present = _search_ahead(weight, present, sweeps.ahead, sweeps.order, settings.beam, search)
    present = _search_around(weight, present, sweeps.around, settings.beam, search)
    for round_number in range(1, settings.rounds + 1):
        present = improve_codebooks(weight / present.scales[:, None], metric, present, settings.cg_steps, search)
        present = improve_scales(weight, metric, present, search)
        if round_number <= settings.ldlq_rounds:
            present = _search_ahead(weight, present, sweeps.ahead, sweeps.order, settings.beam, search)
        final = round_number > settings.rounds - 2
        present = _search_around(
            weight, present, sweeps.around, settings.final_beam if final else settings.beam, search
        )
    present = improve_codebooks(weight / present.scales[:, None], metric, present, settings.final_cg_steps, search)
    if scheme.entry_bits < BITS_PER_FLOAT:  # codes and scales for the codebooks that will be stored
        present = Approximation(present.codes, rounded_codebooks(present.codebooks, scheme.entry_bits), present.scales)
        present = _search_around(weight, present, sweeps.around, settings.final_beam, search)
    return improve_scales(weight, metric, present, search)


def encode(weight: Tensor, sweeps: Sweeps, codebooks: Tensor, settings: AqlmSettings) -> Approximation:
    """Codes and scales for W `[rows, in]` with the `codebooks` that `fit` found on other rows; each row for itself."""
    search, importance, scales = sweeps.search, sweeps.importance, starting_scales(weight)
    residual = (weight / scales[:, None]).view(len(weight), -1, codebooks.shape[2])  # [rows, n, g]
    codes = []
    for codebook in codebooks:
        codes.append(search.nearest(importance, residual * importance, codebook))
        residual = residual - codebook[codes[-1]]
    present = Approximation(torch.stack(codes, 2), codebooks, scales)
    for beam in settings.beam, settings.final_beam:
        present = _search_ahead(weight, present, sweeps.ahead, sweeps.order, settings.beam, search)
        present = _search_around(weight, present, sweeps.around, beam, search)
        present = improve_scales(weight, sweeps.metric, present, search)
    return present


def _start(
    weight: Tensor,
    importance: Tensor,
    scheme: AdditiveScheme,
    rng: torch.Generator,
    settings: AqlmSettings,
    search: CodeSearch,
) -> Approximation:
    """Row norms as scales, and k-means weighted by the diagonal of the LDL."""
    scales = starting_scales(weight)
    codes, codebooks = residual_kmeans(
        (weight / scales[:, None]).view(len(weight), -1, scheme.group_size),
        scales.square(),
        importance,
        scheme.num_codebooks,
        scheme.codebook_size,
        settings.kmeans_iterations,
        search,
        rng,
    )
    return Approximation(codes, codebooks, scales)


def _search_ahead(
    weight: Tensor, present: Approximation, ahead: Feedback, order: Tensor, beam: int, search: CodeSearch
) -> Approximation:
    """LDLQ from scratch; the present codes only guide the search for pairs."""
    group = present.codebooks.shape[2]
    base = (weight / present.scales[:, None]).view(len(weight), -1, group)[:, order].flatten(1)  # [out, in]
    codes = present.codes[:, order].contiguous()
    sweep(torch.zeros_like(base), base, ahead, _rounder(codes, present.codebooks, beam, search))
    return Approximation(codes[:, order.argsort()].contiguous(), present.codebooks, present.scales)


def _search_around(
    weight: Tensor, present: Approximation, around: Feedback, beam: int, search: CodeSearch
) -> Approximation:
    """One sweep of coordinate descent over all groups; it never raises the objective."""
    base = search.expand(present.codebooks, present.codes)
    state = (weight / present.scales[:, None] - base) @ around.coupling
    codes = present.codes.clone()
    sweep(state, base, around, _rounder(codes, present.codebooks, beam, search))
    return Approximation(codes, present.codebooks, present.scales)


def _rounder(codes: Tensor, codebooks: Tensor, beam: int, search: CodeSearch) -> Rounder:
    """Rounds a group to sums of entries, and keeps the choice in `codes` `[out, n, M]`."""

    def round_group(j: int, metric: Tensor, targets: Tensor) -> Tensor:
        codes[:, j] = search.choose(metric, targets, codebooks, codes[:, j], beam)
        return sum_of_entries(codebooks, codes[:, j])

    return round_group
