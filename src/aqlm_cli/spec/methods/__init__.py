"""The methods by name: the settings of each, the schemes that it takes, and what a run does with it by default.

A new method is its settings here, one row in `METHODS`, and the function of the same name in quantization/methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aqlm_cli.spec.methods import gptq, information
from aqlm_cli.spec.methods.aqlm import AqlmSettings
from aqlm_cli.spec.schemes import Scheme
from aqlm_cli.spec.section import Section


@dataclass(frozen=True)
class MethodSpec:
    summary: str  # a few words for help texts
    settings: type[Section] | None  # the section of a run file named after the method; None: it has no settings
    families: tuple[str, ...]  # of schemes that it can quantize to
    scheme: str  # an example of one
    epochs: int  # of block fitting, where the run file leaves that to the method
    # Memory that quantizing an [out, in] matrix takes at most, beside weight and Hessian; None: what its scheme says.
    peak_bytes: Callable[[int, int], int] | None = None
    refuses: Callable[[Scheme], str | None] | None = None  # the reason why it does not take one of its families
    reads_text: bool = True  # whether it looks at a layer's inputs


METHODS: Mapping[str, MethodSpec] = {
    "aqlm": MethodSpec("additive codebooks", AqlmSettings, ("additive", "refined"), "2x8g8", epochs=2),
    "rtn": MethodSpec(
        "round to nearest, the baseline",
        None,
        ("uniform", "level", "refined"),
        "int2g64",
        epochs=0,  # fitted only if asked
        reads_text=False,
    ),
    "gptq": MethodSpec(
        "uniform grids with error feedback",
        gptq.GptqSettings,
        ("uniform", "level", "refined"),
        "int4g64",
        epochs=0,
        peak_bytes=gptq.peak_bytes,
    ),
    "blockfloat": MethodSpec(
        "numbers below an exponent of their block", None, ("blockfloat",), "bfp6g16", epochs=0, reads_text=False
    ),
    "information": MethodSpec(
        "levels shifted to use all codes evenly",
        information.InformationSettings,
        ("level",),
        "nf4tg64",
        epochs=0,
        refuses=information.refuses,
        reads_text=False,
    ),
}


def known_methods() -> str:
    """Their names for a message: `a, b or c`."""
    *others, last = METHODS
    return f"{', '.join(others)} or {last}"
