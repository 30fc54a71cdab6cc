"""The multiple-choice knapsack: one option of every group, the least cost in all, and no more weight than a limit.

For a price p of weight, let m_g = min over the options of group g of cost + p weight, and r = cost + p weight - m_g of
an option its reduced cost. Then for every choice

    cost = bound + sum of r + p (limit - weight)        bound = sum_g m_g - p limit

so that `bound` is below the cost of every choice within the limit, and a choice better than a known one, of cost u, has
options with a sum of r below u - bound. That gap is small: of most groups one option is left, and the others are merged
one after the other into the front of all (weight, cost) of which none is beaten in both, cut off where the gap or the
limit cannot be kept any more. The result is exact.

Bisection for p takes O(G K) for G groups of K options each time; a merge is a sort of K times the front. Fronts have
some hundred states for 200 layers as for 20,000, for the gap falls as groups are added. Where weights differ by little
beside their steps (a knapsack to be filled to the byte with crumbs) fronts can grow without end. Such a front is
thinned to the states of least reduced cost, as many as a minute allows: the result keeps the limit still, but may cost
more than the least of all, by no more than `Selection.gap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

LARGEST_FRONT = 2**17
"""States of a front, of 24 bytes each; the way back to each state takes 5 bytes for every group that is merged."""

MOST_STATES = 2**25
"""States of all fronts together."""

CORE, CORE_FRONT = 256, 2**12
"""Groups, those that are the nearest to another option, and states of their fronts, that give the first good choice."""

ROUNDING = 1e-9
"""Relative error of sums in float64, with a wide margin: what is pruned is worse by more than this."""


@dataclass(frozen=True)
class Selection:
    """The number of the chosen option of each group, and the sums; `gap`: 0, or by how much less the least may cost."""

    options: tuple[int, ...]
    weight: float
    cost: float
    gap: float


def select(weights: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float) -> Selection | None:
    """The cheapest choice of weight at most `limit`; None where even the lightest is heavier.

    Of two choices of the same cost the lighter one. Weights and costs are finite; sums of integers are exact up to
    2^53.
    """
    groups = [_front_of(weight, cost) for weight, cost in zip(weights, costs, strict=True)]
    if sum(group.weights[0] for group in groups) > limit:
        return None
    if sum(group.weights[-1] for group in groups) <= limit:
        return _selection(groups, [len(group.weights) - 1 for group in groups], 0.0)
    limit = _attainable(groups, limit)
    table = _table(groups)
    price = _price(table, limit)
    reduced = _priced(table, price)  # [G, K]
    least = reduced.min(1)
    reduced -= least[:, None]
    bound = float(least.sum()) - price * limit
    best = _lightest_at(table, price, limit)
    search = _Search(table, reduced, price, limit)
    for states, most in ((CORE_FRONT, CORE), (LARGEST_FRONT, len(groups))):
        gap = max(0.0, _selection(groups, best, 0.0).cost - bound) + ROUNDING * float(np.abs(least).sum() + abs(bound))
        found, whole = search.within(gap, states, most)
        best = best if found is None else found
    found_cost = _selection(groups, best, 0.0).cost
    return _selection(groups, best, 0.0 if whole else max(0.0, found_cost - bound))


@dataclass(frozen=True, eq=False)
class _Group:
    """Options of which none is beaten in weight and cost, by rising weight and falling cost."""

    numbers: Indices
    weights: Floats
    costs: Floats


def _front_of(weights: Sequence[float], costs: Sequence[float]) -> _Group:
    weight, cost = np.asarray(weights, float), np.asarray(costs, float)
    order = np.lexsort((cost, weight))
    order = order[_undominated(cost[order])]
    return _Group(order, weight[order], cost[order])


def _undominated(costs: Floats) -> NDArray[np.bool_]:
    """True for a state, of those sorted by weight and cost, that costs less than all before it."""
    kept = np.ones(len(costs), bool)
    kept[1:] = costs[1:] < np.minimum.accumulate(costs)[:-1]
    return kept


def _attainable(groups: Sequence[_Group], limit: float) -> float:
    """The limit, rounded down to a weight that the steps between options can sum up to, where these are integers."""
    steps = np.concatenate([group.weights - group.weights[0] for group in groups])
    lightest = sum(group.weights[0] for group in groups)
    if not np.array_equal(steps, np.rint(steps)) or not float(lightest).is_integer():
        return limit
    unit = int(np.gcd.reduce(steps.astype(np.int64)))
    return float(lightest + (limit - lightest) // unit * unit)


@dataclass(frozen=True, eq=False)
class _Table:
    """Weights and costs `[G, K]` of all groups; an option that does not exist costs infinity."""

    weights: Floats
    costs: Floats


def _table(groups: Sequence[_Group]) -> _Table:
    most = max(len(group.weights) for group in groups)
    weights, costs = np.zeros((len(groups), most)), np.full((len(groups), most), np.inf)
    for number, group in enumerate(groups):
        weights[number, : len(group.weights)] = group.weights
        costs[number, : len(group.costs)] = group.costs
    return _Table(weights, costs)


def _priced(table: _Table, price: float) -> Floats:
    priced: Floats = table.costs + price * table.weights
    return priced


def _weight_at(table: _Table, price: float) -> float:
    """The weight of the lightest cheapest options at this price."""
    chosen = _priced(table, price).argmin(1)  # the first, which is the lightest
    return float(np.take_along_axis(table.weights, chosen[:, None], 1).sum())


def _price(table: _Table, limit: float) -> float:
    """The price at which the cheapest options just keep the limit, to float64."""
    low, high = 0.0, 1.0
    while _weight_at(table, high) > limit:
        low, high = high, 4 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _weight_at(table, middle) > limit else (low, middle)
    return high


def _lightest_at(table: _Table, price: float, limit: float) -> list[int]:
    """The cheapest options at the price, each made heavier, those that gain most by weight first, as far as it fits."""
    chosen = _priced(table, price).argmin(1)
    weight = float(np.take_along_axis(table.weights, chosen[:, None], 1).sum())
    rows = np.arange(len(chosen))
    heavier = np.minimum(chosen + 1, table.weights.shape[1] - 1)
    gain = table.costs[rows, chosen] - table.costs[rows, heavier]  # -inf where there is no heavier one
    more = table.weights[rows, heavier] - table.weights[rows, chosen]
    for row in np.argsort(-gain / np.maximum(more, 1e-300), kind="stable"):
        if gain[row] > 0 and weight + more[row] <= limit:
            weight += more[row]
            chosen[row] = heavier[row]
    return [int(option) for option in chosen]


def _selection(groups: Sequence[_Group], chosen: Sequence[int], gap: float) -> Selection:
    return Selection(
        options=tuple(int(group.numbers[option]) for group, option in zip(groups, chosen, strict=True)),
        weight=float(sum(group.weights[option] for group, option in zip(groups, chosen, strict=True))),
        cost=float(sum(group.costs[option] for group, option in zip(groups, chosen, strict=True))),
        gap=gap,
    )


# ------------------------------------------------------------------------------------------------------------- merging


@dataclass(frozen=True, eq=False)
class _Search:
    """Merging of groups for one price."""

    table: _Table
    reduced: Floats  # [G, K]
    price: float
    limit: float

    def within(self, gap: float, states: int, most: int) -> tuple[list[int] | None, bool]:
        """The best choice whose reduced costs sum up to at most `gap`, if any; False where a front was thinned.

        All but `most` groups, those that are the nearest to another option, keep the cheapest at the price.
        """
        possible = self._possible(gap, most)
        chosen = possible.argmax(1)
        single = possible.sum(1) == 1
        lightest = np.where(possible, self.table.weights, np.inf).min(1)
        heaviest = np.where(possible, self.table.weights, -np.inf).max(1)
        spread = (heaviest - lightest)[~single]
        merged = np.flatnonzero(~single)[np.argsort(-spread, kind="stable")]  # small steps last: they fill up
        rest_light, rest_heavy = _rest(lightest[merged]), _rest(heaviest[merged])
        lowest = self.limit - gap / self.price if self.price > 0 else -np.inf
        lowest -= ROUNDING * abs(self.limit)
        states = min(states, MOST_STATES // max(1, len(merged)))
        front = _Front(*(np.array([table[single, chosen[single]].sum()]) for table in self._tables()))
        way, whole = [], True
        for place, row in enumerate(merged, start=1):
            options = np.flatnonzero(possible[row])
            grown = front.with_group(*(table[row, options] for table in self._tables()))
            kept = grown.kept(gap, lowest - rest_heavy[place], self.limit - rest_light[place])
            if len(kept) > states:
                kept, whole = grown.thinned(kept, states), False
            front = grown.at(kept)
            way.append(((kept // len(options)).astype(np.int32), options[kept % len(options)].astype(np.int8)))
        if not len(front.costs):
            return None, whole
        state = int(front.costs.argmin())
        for row, (parents, taken) in zip(merged[::-1], reversed(way), strict=True):
            chosen[row] = taken[state]
            state = int(parents[state])
        return [int(option) for option in chosen], whole

    def _tables(self) -> tuple[Floats, Floats, Floats]:
        return self.table.weights, self.table.costs, self.reduced

    def _possible(self, gap: float, most: int) -> NDArray[np.bool_]:
        """True for the options `[G, K]` that are tried."""
        possible = self.reduced <= gap
        if most < len(possible):
            nearest = np.sort(self.reduced, 1)[:, 1] if self.reduced.shape[1] > 1 else np.zeros(len(possible))
            far = np.argsort(nearest, kind="stable")[most:]
            possible[far] = np.arange(possible.shape[1]) == self.reduced[far].argmin(1)[:, None]
        return possible


@dataclass(frozen=True, eq=False)
class _Front:
    """States: choices in the groups merged so far, by their sums."""

    weights: Floats
    costs: Floats
    reduced: Floats

    def with_group(self, weights: Floats, costs: Floats, reduced: Floats) -> _Front:
        """Every state with every option of one more group, the options of a state side by side."""
        sums = ((self.weights, weights), (self.costs, costs), (self.reduced, reduced))
        return _Front(*((before[:, None] + more).ravel() for before, more in sums))

    def at(self, places: Indices) -> _Front:
        return _Front(self.weights[places], self.costs[places], self.reduced[places])

    def kept(self, gap: float, lowest: float, limit: float) -> Indices:
        """Places of the states within these bounds that no other beats in weight and cost, by rising weight."""
        kept = np.flatnonzero((self.reduced <= gap) & (self.weights >= lowest) & (self.weights <= limit))
        kept = kept[np.lexsort((self.costs[kept], self.weights[kept]))]
        return kept[_undominated(self.costs[kept])]

    def thinned(self, places: Indices, states: int) -> Indices:
        """The given number of these places with the least reduced cost, in the same order."""
        kept: Indices = np.sort(np.argpartition(self.reduced[places], states)[:states])
        return places[kept]


def _rest(values: Floats) -> Floats:
    """Sums of the values from each place to the end, and 0 after it."""
    return np.append(values[::-1].cumsum()[::-1], 0.0)
