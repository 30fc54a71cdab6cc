"""Embedding tables and heads: matrices `[vocabulary, d]` with many rows and one or both of two duties.

A row v of a head is multiplied by the final hidden states h, a row of a table of embeddings is looked up. To second
order in the errors e_v of the rows, the divergence of the model's predictions per token is

    sum_v  w_v  e_v (H + G) e_v^T          H = mean of h h^T, weighted by 1 - sum_v p_v(h)^2,
                                           G = mean of g g^T, g the gradient of the loss by an embedding,

with w_v the frequency of token v, which is also the mean of its probability. A tied table pays both prices, an input
table G alone, a head H alone. Without gradients, G is a multiple of the identity.

Rows are coupled through the codebooks only. So these are fitted on a sample of rows, each counted w_v^alpha times, and
all rows are encoded with them in chunks: beside the table and the result, memory does not grow with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.methods import aqlm, blockfloat
from aqlm_cli.quantization.parallel import single_threaded_pool
from aqlm_cli.quantization.solvers import grids, level_tables
from aqlm_cli.quantization.solvers.hessian import LayerStatistics, SecondMoment, damped
from aqlm_cli.spec.schemes import AdditiveScheme, BlockFloatScheme, LevelScheme, RefinedScheme, Scheme, UniformScheme
from aqlm_kernels import AdditiveMatrix, BlockFloatMatrix, LevelMatrix, Matrix, RefinedMatrix, UniformMatrix
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

GRADIENT_PRICE = 2.0
"""Factor of G: to second order and at each position alone, an embedding's error is priced too low by about that."""

HEAD_RIDGE = 0.2
"""Share of its mean diagonal that is added to H: other text has hidden states in directions that C4 has few in."""

EMBEDDING_SHARE = 0.1
"""Share of the mean diagonal of H: the price of an error of the embedding where no gradients are known."""

ROW_EXPONENT = 1.0
"""alpha: rows count w^alpha in the fit of the codebooks."""

Logits: TypeAlias = Callable[[Tensor], Tensor]
"""Hidden states `[n, d]` -> logits `[n, vocabulary]`."""


@dataclass(frozen=True, eq=False)
class TableStatistics:
    """The metrics of a table's duties, and the weight of each of its rows. At least one of the duties is given."""

    head: Tensor | None  # [d, d]: H
    embedding: Tensor | None  # [d, d]: G
    row_weights: Tensor  # [vocabulary], above 0: how often each token is used

    def metric(self) -> Tensor:
        """H + G `[d, d]`, of those duties there are, H with its ridge."""
        parts = [self.embedding] if self.embedding is not None else []
        if self.head is not None:
            parts.append(damped(self.head, HEAD_RIDGE))
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
    base: Matrix | None = None,
    done: Callable[[int], None] = lambda rows: None,
) -> QuantizedTable:
    """Quantize a table W `[vocabulary, d]` of any floating type, `workers` chunks of rows at a time.

    Settings are those of the method aqlm; a uniform scheme takes None. `base` is that of a refined scheme, if there is
    one already. `done` is called with the rows gone through so far, of `rows_to_search`. The result does not depend on
    the number of workers. Raises QuantizationError where W or the statistics hold NaN or infinity.
    """
    metric = statistics.metric().float()
    if not bool(metric.isfinite().all() and statistics.row_weights.isfinite().all()):
        raise QuantizationError("its inputs hold NaN or infinite values; the model is damaged or overflows")
    with single_threaded_pool(workers) as pool:
        table = _Table(weight, statistics.row_weights, metric, settings, rng, pool, base, _Count(done))
        if not all(bool(weight[chunk].isfinite().all()) for chunk in table.chunks()):
            raise QuantizationError("the weight holds NaN or infinite values; the model is damaged")
        matrix = FAMILIES[scheme.kind](table, scheme)
        whole = float(table.energies(None).sum())
        return QuantizedTable(matrix, float(table.energies(matrix).sum()) / whole if whole else 0.0)


# ------------------------------------------------------------------------------------------------------ kinds of scheme


def rows_to_search(weight: Tensor, scheme: Scheme, base: Matrix | None = None) -> int:
    """Rows that `quantize_table` goes through: those of the table, and those that something is fitted on before."""
    rows, features = weight.shape
    if isinstance(scheme, RefinedScheme):
        return scheme.rows + (rows_to_search(weight, scheme.base) if base is None else 0)
    return rows + (min(rows, _sample_size(features)) if scheme.codebook_shape is not None else 0)


class _Count:
    """Adds up the rows that are done."""

    def __init__(self, done: Callable[[int], None]) -> None:
        self._done, self._rows = done, 0

    def add(self, rows: int) -> None:
        self._rows += rows
        self._done(self._rows)


@dataclass(frozen=True, eq=False)
class _Table:
    weight: Tensor  # [vocabulary, d]
    row_weights: Tensor  # [vocabulary]
    metric: Tensor  # [d, d] float32: M
    settings: Any
    rng: torch.Generator
    pool: Executor
    base: Matrix | None
    count: _Count

    def chunks(self) -> Sequence[Tensor]:
        """Indices of the rows that go through the search at once."""
        rows, features = self.weight.shape
        indices = torch.arange(rows, device=self.weight.device)
        chunks: Sequence[Tensor] = indices.split(max(1, CHUNK_WEIGHTS // features))
        return chunks

    def energies(self, matrix: Matrix | None) -> Tensor:
        """w_v e_v M e_v^T of every row, `[vocabulary]` float64: e the error of the stored matrix, or the row itself."""

        def energy(chunk: Tensor) -> Tensor:
            rows = self.weight[chunk].float()
            if matrix is not None:
                rows = matrix.rows(chunk).balanced().stored().dequantize() - rows
            return (rows @ self.metric * rows).sum(1).double() * self.row_weights[chunk]

        return torch.cat(list(self.pool.map(energy, self.chunks())))

    def encoded(self, code: Callable[[Tensor], Part]) -> list[Part]:
        """Encode rows `[rows, d]` float32 chunk by chunk, each row for itself."""
        parts = []
        for chunk, part in zip(
            self.chunks(), self.pool.map(lambda chunk: code(self.weight[chunk].float()), self.chunks()), strict=True
        ):
            parts.append(part)
            self.count.add(len(chunk))
        return parts


def _additive(table: _Table, scheme: AdditiveScheme) -> AdditiveMatrix:
    """Codebooks fitted on a weighted sample of rows, and the search with them."""
    weight, settings = table.weight, table.settings
    unit = max(aqlm.ordinary_unit(weight[chunk].float()) for chunk in table.chunks())
    sweeps = aqlm.Sweeps.of(LayerStatistics(table.metric, 0), scheme.group_size, settings, weight.device)
    size = _sample_size(weight.shape[1])
    chosen, counts = _sample(table.row_weights**ROW_EXPONENT, size, table.rng)
    # A row counts as the square of its scale: times the root of its weight, it counts weight times as much.
    sample = weight[chosen].float() / unit * counts.sqrt()[:, None]
    codebooks = table.pool.submit(aqlm.fit, sample, sweeps, scheme, table.rng, settings).result().codebooks
    table.count.add(min(len(weight), size))

    def code(rows: Tensor) -> AdditiveMatrix:
        found = aqlm.encode(rows / unit, sweeps, codebooks, settings)
        scales = (unit * found.scales).masked_fill((rows == 0).all(dim=1), 0)
        return AdditiveMatrix(found.codes, codebooks, scales, scheme.entry_bits)

    parts = table.encoded(code)
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
    return AdditiveMatrix(codes, codebooks, scales, scheme.entry_bits).balanced()


def _sample_size(features: int) -> int:
    """Rows that codebooks are fitted on, at most."""
    return max(1, SAMPLE_WEIGHTS // features)


def _sample(weights: Tensor, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """About `size` rows, the heavy ones more often, and what each then counts for: on average, its weight."""
    weights = weights.double() / weights.mean(dtype=torch.float64)
    probability = size * weights / len(weights)
    for _ in range(20):  # rows that are certain leave more for the others
        certain = probability >= 1
        rest = probability[~certain].sum()
        probability[~certain] *= ((size - certain.sum()) / rest).clamp_min(1) if rest else 1
        probability.clamp_(max=1)
    draws = torch.rand(len(weights), generator=rng, dtype=torch.float64).to(weights.device)
    chosen = (draws < probability).nonzero()[:, 0]
    return chosen, (weights[chosen] / probability[chosen]).float()


def _uniform(table: _Table, scheme: UniformScheme) -> UniformMatrix:
    """Nothing is shared by the rows but the exponent of their scales."""
    sweeps = grids.ColumnSweeps.of(table.metric, DAMPING, FACTOR_DAMPING)
    groups = (table.weight[chunk].float().view(len(chunk), -1, scheme.group_size) for chunk in table.chunks())
    ranges = torch.cat([part.amax(2).clamp_min(0) - part.amin(2).clamp_max(0) for part in groups])  # [vocabulary, n]
    exponent = grid_exponent(ranges / (2**scheme.bits - 1))
    bits = torch.tensor(scheme.bits, dtype=torch.uint8)

    def code(rows: Tensor) -> UniformMatrix:
        found = grids.fit(rows, scheme.bits, scheme.group_size, sweeps, exponent)
        scales = torch.ldexp(found.steps, -exponent).half()
        return UniformMatrix(found.levels.to(torch.uint8), found.zeros.to(torch.uint8), scales, bits, exponent)

    return _joined(table.encoded(code), ("levels", "zeros", "scales"))


def _levels(table: _Table, scheme: LevelScheme) -> LevelMatrix:
    """The levels nearest to each weight, as rtn has them; the metric is not looked at."""
    group, inputs = scheme.bound(table.weight.shape[1]).group, table.weight.shape[1]

    def reach(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return level_tables.reach(rows.float().view(len(rows), -1, group), scheme)

    found = [reach(table.weight[chunk]) for chunk in table.chunks()]
    exponent = level_tables.exponent_of([numbers for pair in found for numbers in pair if numbers is not None])

    def code(rows: Tensor) -> LevelMatrix:
        return level_tables.ROUNDED[scheme.table](level_tables.of_reach(*reach(rows), scheme, inputs, exponent), rows)

    return _joined(table.encoded(code), ("codes", "scales", "shifts") if scheme.shifted else ("codes", "scales"))


def _blocks(table: _Table, scheme: BlockFloatScheme) -> BlockFloatMatrix:
    """Every block for itself; the metric is not looked at."""
    unknown = LayerStatistics(table.metric, 0)
    parts = table.encoded(lambda rows: blockfloat.quantize(rows, unknown, scheme, table.rng, None))
    return _joined(parts, ("codes", "exponents"))


def _joined(parts: Sequence[Part], names: Sequence[str]) -> Part:
    """One matrix of parts that have these tensors by rows, and all others alike."""
    joined = {name: torch.cat([part.tensors()[name] for part in parts]) for name in names}
    return type(parts[0]).from_tensors({**parts[0].tensors(), **joined})  # type: ignore[return-value]


def _refined(table: _Table, scheme: RefinedScheme) -> RefinedMatrix:
    """The base's error of those rows whose errors cost most, quantized once more."""
    base = table.base if table.base is not None else FAMILIES[scheme.base.kind](table, scheme.base)
    index = table.energies(base).topk(scheme.rows).indices.sort().values
    error = table.weight[index].float() - base.rows(index).stored().dequantize()
    rest = replace(table, weight=error, row_weights=table.row_weights[index])
    return RefinedMatrix(base, index.int(), FAMILIES[scheme.patch.kind](rest, scheme.patch))


Part = TypeVar("Part", bound=Matrix)

FAMILIES: Mapping[str, Callable[[_Table, Any], Any]] = {
    "additive": _additive,
    "uniform": _uniform,
    "level": _levels,
    "blockfloat": _blocks,
    "refined": _refined,
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
            predicted = probabilities.sum(0)
            self._probabilities[: len(predicted)] += predicted  # a head may have fewer rows than the embeddings
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
        else:
            gradients = GRADIENT_PRICE * gradients
        weights = self._counts + self._probabilities + SMOOTHING
        return TableStatistics(
            second_moment if head else None, gradients if embedding else None, (weights / weights.mean()).float()
        )
