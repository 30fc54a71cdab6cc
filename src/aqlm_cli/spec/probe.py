"""Settings of the probe: the perturbations of the weights that a model is measured under."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from aqlm_cli.spec.section import LARGEST, Section

NoiseName: TypeAlias = Literal["gaussian", "rademacher", "uniform"]
"""Names of distributions, which lie where torch may be imported: `evaluation.perturb.NOISES`."""

Correlation: TypeAlias = Literal["none", "up", "down"]
"""Names of the factors of the noise, likewise: `evaluation.perturb.FACTORS`."""

Strength: TypeAlias = Annotated[float, Field(strict=False, ge=0, le=1000)]
Share: TypeAlias = Annotated[float, Field(strict=False, gt=0, le=0.5)]


class ProbeConfig(Section):
    """Every `noise` with every `correlate` at every `strength`, and every share of `clip`, one after the other.

    `strength` is the norm of the noise as a share of the norm of each matrix. `correlate` none: noise of one size on
    all weights of a matrix; up: as large as the weight; down: largest where weights are smallest. `clip` is the share
    of the weights of each matrix, the largest, that are clipped. `bos` and `dtype` are as in `eval_ppl`.
    """

    noise: Annotated[tuple[NoiseName, ...], Field(strict=False)] = ("gaussian",)
    correlate: Annotated[tuple[Correlation, ...], Field(strict=False)] = ("none", "up", "down")
    strength: Annotated[tuple[Strength, ...], Field(strict=False)] = (0.01, 0.03, 0.1)
    clip: Annotated[tuple[Share, ...], Field(strict=False)] = (0.001,)
    data: str = "wikitext2"
    sequences: Annotated[int, Field(ge=2, le=LARGEST)] = 8
    sequence_length: Annotated[int, Field(ge=2, le=LARGEST)] = 512
    bos: bool | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
