"""Settings of the method `gptq`."""

from __future__ import annotations

from typing import Literal

from aqlm_cli.spec.section import Rate, Section


class GptqSettings(Section):
    """GPTQ, the baseline of error feedback on uniform grids.

    `order` active rounds the groups of the most active inputs first, and in each its most active inputs; none goes from
    the first input to the last. Groups are those of consecutive inputs either way. `grid` minmax reaches from the least
    to the largest weight of a group; norm2.4 is the one of 80 sizes with the least sum of errors to the power of 2.4. A
    table of levels reaches over all weights of a group whatever `grid` says.
    """

    order: Literal["active", "none"] = "active"
    damping: Rate = 0.01
    grid: Literal["minmax", "norm2.4"] = "minmax"


def peak_bytes(out_features: int, in_features: int) -> int:
    """Two float64 matrices [in, in] in the factorisation and some of float32; later, copies of the weight."""
    return max(26 * in_features**2, 5 * in_features**2 + 22 * out_features * in_features)
