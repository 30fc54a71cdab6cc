"""Embedding tables and heads: matrices `[vocabulary, d]` with many rows and one or both of two duties.

A row v of a head is multiplied by the final hidden states h, a row of a table of embeddings is looked up. To second
order in the errors e_v of the rows, the divergence of the model's predictions per token is

    sum_v  w_v  e_v (s H + G) e_v^T        H = mean of h h^T, weighted by 1 - sum_v p_v(h)^2,
                                           G = mean of g g^T, g the gradient of the loss by an embedding,

with w_v the frequency of token v, which is also the mean of its probability. A tied table pays both prices, an input
table G alone, a head H alone. Without gradients, G is a multiple of the identity.

Rows are coupled through the codebooks only. So these are fitted on a sample of rows, each counted w_v^alpha times, and
all rows are encoded with them in chunks: beside the table and the result, memory does not grow with the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.methods import aqlm
from aqlm_cli.quantization.parallel import single_threaded_pool
from aqlm_cli.quantization.solvers import grids
from aqlm_cli.quantization.solvers.hessian import LayerStatistics, SecondMoment
from aqlm_cli.spec.methods.aqlm import AqlmSettings
from aqlm_cli.spec.schemes import AdditiveScheme, Scheme, UniformScheme
from aqlm_kernels import AdditiveMatrix, Matrix, UniformMatrix
from aqlm_kernels.matrices.uniform import grid_exponent

CHUNK_WEIGHTS = 2**22
"""Weights that go through the search at once: 16 MiB of float32, of which it has about ten copies."""

SAMPLE_WEIGHTS = 2**23
"""Weights of the rows that codebooks are fitted on: ten vectors for each of 65,536 entries of a group of 8."""

SMOOTHING = 0.5
"""Added to the count of every token."""

MOST_PROBABILITIES = 2**25
"""Probabilities that exist at once: 128 MiB of float32, of which the softmax has three copies."""

DAMPING, FACTOR_DAMPING = 0.01, 1e-4
"""Damping of the metric for uniform schemes, as `quantize.aqlm` has it for additive ones."""

EMBEDDING_SHARE = 0.1
"""Share of the mean diagonal of H: the price of an error of the embedding where no gradients are known."""

ROW_EXPONENT = 0.5
"""alpha: rows count w^alpha in the fit of the codebooks."""


@dataclass(frozen=True, eq=False)
class TableStatistics:
    """The metrics of a table's duties, and the weight of each of its rows. At least one of the duties is given."""

    head: Tensor | None  # [d, d]: H
    embedding: Tensor | None  # [d, d]: G
    row_weights: Tensor  # [vocabulary], above 0, of mean 1

    def metric(self) -> Tensor:
        """H + G `[d, d]`, of those duties there are."""
        parts = [part for part in (self.head, self.embedding) if part is not None]
        return torch.stack(parts).sum(0)


@dataclass(frozen=True, eq=False)
class QuantizedTable:
    """The relative error is sum_v w_v e_v (H + G) e_v^T over the same sum for the rows themselves."""

    matrix: Matrix
    relative_error: float


@torch.no_grad()
def quantize_table(
    weight: Tensor,
    statistics: TableStatistics,
    scheme: Scheme,
    settings: Any,
    rng: torch.Generator,
    workers: int = 1,
) -> QuantizedTable:
    """Quantize a table W `[vocabulary, d]` of any floating type, `workers` chunks of rows at a time.

    Settings are those of the method aqlm; a uniform scheme takes None. The result does not depend on the number of
    workers. Raises QuantizationError where W or the statistics hold NaN or infinity.
    """
    metric = statistics.metric().float()
    if not bool(metric.isfinite().all() and statistics.row_weights.isfinite().all()):
        raise QuantizationError("its inputs hold NaN or infinite values; the model is damaged or overflows")
    if not all(bool(weight[chunk].isfinite().all()) for chunk in _chunks(weight)):
        raise QuantizationError("the weight holds NaN or infinite values; the model is damaged")
    family = FAMILIES[scheme.kind]
    with single_threaded_pool(workers) as pool:
        coder = pool.submit(family.coder, weight, statistics.row_weights, metric, scheme, settings, rng).result()

        def code(chunk: Tensor) -> tuple[Matrix, float, float]:
            rows = weight[chunk].float()
            part = coder(rows)
            error = part.balanced().stored().dequantize() - rows
            weights = statistics.row_weights[chunk]
            return part, _weighted_square(error, metric, weights), _weighted_square(rows, metric, weights)

        parts, errors, wholes = zip(*pool.map(code, _chunks(weight)), strict=True)
    whole = math.fsum(wholes)
    return QuantizedTable(family.join(parts).balanced(), math.fsum(errors) / whole if whole else 0.0)


def _weighted_square(rows: Tensor, metric: Tensor, weights: Tensor) -> float:
    """sum_v w_v r_v M r_v^T."""
    return float(((rows @ metric * rows).sum(1).double() * weights).sum())


# ------------------------------------------------------------------------------------------------------ kinds of scheme

Logits: TypeAlias = Callable[[Tensor], Tensor]
"""Hidden states `[n, d]` -> logits `[n, vocabulary]`."""

Coder: TypeAlias = Callable[[Tensor], Matrix]
"""Rows `[rows, d]` float32 -> their part of the matrix; each row for itself."""


def _additive_coder(
    weight: Tensor,
    row_weights: Tensor,
    metric: Tensor,
    scheme: AdditiveScheme,
    settings: AqlmSettings,
    rng: torch.Generator,
) -> Coder:
    """Codebooks fitted on a weighted sample of rows, and the search with them."""
    unit = max(aqlm.ordinary_unit(weight[chunk].float()) for chunk in _chunks(weight))
    sweeps = aqlm.Sweeps.of(LayerStatistics(metric, 0), scheme.group_size, settings, weight.device)
    chosen, counts = _sample(row_weights, max(1, SAMPLE_WEIGHTS // weight.shape[1]), rng)
    # A row counts as the square of its scale: times the root of its weight, it counts weight times as much.
    sample = weight[chosen].float() / unit * counts.sqrt()[:, None]
    codebooks = aqlm.fit(sample, sweeps, scheme, rng, settings).codebooks

    def code(rows: Tensor) -> AdditiveMatrix:
        found = aqlm.encode(rows / unit, sweeps, codebooks, settings)
        scales = (unit * found.scales).masked_fill((rows == 0).all(dim=1), 0)
        return AdditiveMatrix(found.codes, codebooks, scales)

    return code


def _sample(weights: Tensor, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """About `size` rows, the heavy ones more often, and what each then counts for: on average, its weight."""
    probability = size * weights.double() / weights.sum(dtype=torch.float64)
    for _ in range(20):  # rows that are certain leave more for the others
        certain = probability >= 1
        rest = probability[~certain].sum()
        probability[~certain] *= ((size - certain.sum()) / rest).clamp_min(1) if rest else 1
        probability.clamp_(max=1)
    chosen = (torch.rand(len(weights), generator=rng, dtype=torch.float64) < probability).nonzero()[:, 0]
    return chosen, (weights[chosen] / probability[chosen]).float()


def _join_additive(parts: Sequence[AdditiveMatrix]) -> AdditiveMatrix:
    return replace(
        parts[0], codes=torch.cat([part.codes for part in parts]), scales=torch.cat([part.scales for part in parts])
    )


def _uniform_coder(
    weight: Tensor, row_weights: Tensor, metric: Tensor, scheme: UniformScheme, settings: None, rng: torch.Generator
) -> Coder:
    """Nothing is shared by the rows but the exponent of their scales."""
    sweeps = grids.ColumnSweeps.of(metric, DAMPING, FACTOR_DAMPING)
    ranges = [weight[chunk].float().view(len(chunk), -1, scheme.group_size).aminmax(dim=2) for chunk in _chunks(weight)]
    widest = torch.cat([high.clamp_min(0) - low.clamp_max(0) for low, high in ranges])
    exponent = grid_exponent(widest / (2**scheme.bits - 1))

    def code(rows: Tensor) -> UniformMatrix:
        found = grids.fit(rows, scheme.bits, scheme.group_size, sweeps, exponent)
        scales = torch.ldexp(found.steps, -exponent).half()
        bits = torch.tensor(scheme.bits, dtype=torch.uint8)
        return UniformMatrix(found.levels.to(torch.uint8), found.zeros.to(torch.uint8), scales, bits, exponent)

    return code


def _join_uniform(parts: Sequence[UniformMatrix]) -> UniformMatrix:
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("levels", "zeros", "scales")}
    return replace(parts[0], **joined)


def _chunks(weight: Tensor) -> Sequence[Tensor]:
    """Indices of the rows that go through the search at once."""
    rows, features = weight.shape
    indices: Sequence[Tensor] = torch.arange(rows, device=weight.device).split(max(1, CHUNK_WEIGHTS // features))
    return indices


@dataclass(frozen=True)
class _Family:
    coder: Callable[..., Coder]
    join: Callable[[Any], Matrix]


FAMILIES: Mapping[str, _Family] = {
    "additive": _Family(_additive_coder, _join_additive),
    "uniform": _Family(_uniform_coder, _join_uniform),
}
"""The search for codes, by the kind of scheme."""


# ------------------------------------------------------------------------------------------------------- statistics


class TableMoments:
    """Collects the statistics of a table over batches of tokens; probabilities exist for a few tokens at a time."""

    def __init__(self, vocabulary: int, features: int, device: torch.device) -> None:
        self._counts = torch.zeros(vocabulary, dtype=torch.float64, device=device)
        self._probabilities = torch.zeros_like(self._counts)
        self._head, self._embedding = SecondMoment(features, device), SecondMoment(features, device)
        self._features = features
        self._hidden = self._gradients = False

    def add(self, ids: Tensor, hidden: Tensor, logits: Logits | None = None) -> None:
        """Tokens `[tokens]` and the final hidden states `[tokens, d]` at their positions, as the head multiplies them.

        With `logits`, which applies the head to some of them, a position counts 1 - sum_v p_v^2, what its prediction
        leaves open, and a token its probability; without, all positions are alike, and tokens are counted.
        """
        self._counts += ids.bincount(minlength=len(self._counts))
        self._hidden = True
        if logits is None:
            self._head.add(hidden)
            return
        for states in hidden.split(max(1, MOST_PROBABILITIES // len(self._counts))):
            probabilities = logits(states).float().softmax(1)  # [states, vocabulary]
            self._probabilities += probabilities.sum(0)
            self._head.add(states.float() * (1 - probabilities.square().sum(1, keepdim=True)).clamp_min(0).sqrt())

    def add_gradients(self, gradients: Tensor) -> None:
        """Gradients `[tokens, d]` of the loss by the embeddings: of the sum over a sequence's tokens, each drawn from
        the model's own prediction."""
        self._embedding.add(gradients)
        self._gradients = True

    def statistics(self, head: bool, embedding: bool) -> TableStatistics:
        """Statistics for a table of these duties."""
        second_moment = self._head.statistics().second_moment if self._hidden else None
        gradients = self._embedding.statistics().second_moment if self._gradients else None
        if gradients is None:
            mean = 1.0 if second_moment is None else float(second_moment.diagonal().mean())
            gradients = EMBEDDING_SHARE * mean * torch.eye(self._features, device=self._counts.device)
        weights = (self._counts + self._probabilities + SMOOTHING) ** ROW_EXPONENT
        return TableStatistics(
            second_moment if head else None, gradients if embedding else None, (weights / weights.mean()).float()
        )
