"""The rotary positions of a GGUF, in the words of transformers' `rope_parameters`.

With i the number of a pair of features, of d rotated ones, llama.cpp turns the pair at position t by t times

    f_i = base^(-2i/d) / factor_i

Its factors are a tensor, `rope_freqs.weight`, which its converter computes from the "llama3" scaling of a model. Here
the scaling is found again from the factors. Phi-3 has two such tensors, for short and for long texts ("longrope"), and
other files have a linear scaling or YaRN in their settings. transformers' own conversion reads none of these. Whatever
is written into the config is compared with the file afterwards: the frequencies that transformers' network has for
this config must be f_i, or the file is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aqlm_cli.errors import ModelError

Array = npt.NDArray[np.float64]
Parameters = dict[str, Any]

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FACTORS, LONG, SHORT)
"""Tensors that belong to the positions and not to the network."""

TOLERANCE = 5e-6
"""Relative, of f_i: the factors have come through a few operations in float32."""

UNREAD = ("alpha", "yarn_log_multiplier", "yarn_attn_factor", "yarn_ext_factor")
"""Settings below `rope.scaling.` that change the positions, but for the value 1, and have no word in transformers."""

LENGTHS = tuple(2**power for power in range(9, 21))
"""Original lengths of context to try where the factors of a small head leave it open."""


@dataclass(frozen=True)
class FilePositions:
    """What the file says: `settings` without the architecture before them ("rope.freq_base"), `factors` by TENSORS."""

    name: str
    settings: Mapping[str, Any]
    factors: Mapping[str, Array]

    @property
    def base(self) -> float:
        return float(self.settings.get("rope.freq_base", 10000.0))  # llama.cpp's own, where nothing is said

    @property
    def kind(self) -> str:
        """ "none", "linear", "yarn" or "longrope"; llama.cpp takes a factor without a kind for a linear one."""
        if LONG in self.factors or SHORT in self.factors:
            return "longrope"
        return str(self.settings.get("rope.scaling.type", "none" if self.scaling == 1 else "linear"))

    @property
    def scaling(self) -> float:
        said = self.settings.get("rope.scaling.factor", self.settings.get("rope.scale_linear"))
        return float(said) if said else 1.0

    @property
    def length(self) -> int | None:
        """The context before it was scaled."""
        said = self.settings.get("rope.scaling.original_context_length")
        return None if said is None else int(said)

    @property
    def loudness(self) -> float:
        """By what cosines and sines are multiplied."""
        own = float(self.settings.get("rope.scaling.attn_factor", 1.0))
        return own * (1 + 0.1 * math.log(self.scaling)) if self.kind == "yarn" and self.scaling > 1 else own

    def betas(self) -> tuple[float, float]:
        fast = self.settings.get("rope.scaling.yarn_beta_fast", 32.0)
        return float(fast), float(self.settings.get("rope.scaling.yarn_beta_slow", 1.0))

    def frequencies(self, pairs: int, factors: Array | None, truncate: bool) -> Array:
        """f_i [pairs] as llama.cpp computes them."""
        index = np.arange(pairs, dtype=np.float64)
        plain = self.base ** (-index / pairs) / (1.0 if factors is None else factors)
        if self.kind == "linear":
            return plain / self.scaling
        if self.kind != "yarn" or self.length is None:
            return plain
        ends = [
            pairs * math.log(self.length / (beta * 2 * math.pi)) / math.log(self.base) for beta in self.betas()
        ]  # the pairs that turn so many times within the original context
        low, high = (math.floor(ends[0]), math.ceil(ends[1])) if truncate else ends
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        slow = np.clip((index - low) / max(high - low, 0.001), 0, 1)  # 1 where a pair is scaled whole
        return plain / self.scaling * slow + plain * (1 - slow)


# ---------------------------------------------------------------------------------------------------------- the config


def set_positions(found: FilePositions, config: PreTrainedConfig, network: PreTrainedModel) -> None:
    """Write into `config.rope_parameters` what the file says; ModelError where no config of this family says it."""
    rotary = next((module for module in network.modules() if _is_rotary(module)), None)
    if rotary is None:
        if found.factors:
            raise ModelError(f"{found.name} holds {next(iter(found.factors))}, and {config.model_type} turns no pairs")
        return
    odd = [key for key in UNREAD if found.settings.get(f"rope.scaling.{key}", 1.0) != 1.0]
    if odd:
        raise ModelError(f"{found.name} has rope.scaling.{odd[0]}, which transformers does not know; {WAY_OUT}")
    with np.errstate(all="ignore"):  # a factor may be 0, and then agrees with nothing
        _fit(found, config, type(rotary))


def _fit(found: FilePositions, config: PreTrainedConfig, rotary: type[nn.Module]) -> None:
    given = config.rope_parameters
    nested = "full_attention" in given
    for parameters in _candidates(found, given["full_attention"] if nested else given, config):
        config.rope_parameters = parameters if not nested else _for_layers(found, given, parameters)
        if _agrees(found, rotary(config), config, parameters):
            return
    what = next(iter(found.factors)) if found.factors else f"rope.scaling.type {found.kind}"
    raise ModelError(f"{found.name}: no positions of {config.model_type} in transformers are as {what} says; {WAY_OUT}")


WAY_OUT = "use the original model in safetensors"


def _is_rotary(module: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))


def _for_layers(found: FilePositions, given: Mapping[str, Any], full: Parameters) -> Parameters:
    """Layers with a sliding window have a base of their own, and nothing that is scaled."""
    base = found.settings.get("rope.freq_base_swa")
    changed = {} if base is None else {"rope_theta": float(base)}
    return {key: full if key == "full_attention" else {**value, **changed} for key, value in given.items()}


def _candidates(found: FilePositions, given: Parameters, config: PreTrainedConfig) -> Iterator[Parameters]:
    """Parameters that may be those of the file, the likeliest first."""
    plain = {"rope_type": "default", "rope_theta": found.base}
    head, turned = _head_dim(config), found.settings.get("rope.dimension_count")
    if "partial_rotary_factor" in given or (turned is not None and head != turned):
        plain["partial_rotary_factor"] = given.get("partial_rotary_factor") if turned is None else int(turned) / head
    if found.kind == "longrope" and found.factors:
        yield {**plain, **_longrope(found, config)}
    elif found.kind == "linear":
        yield {**plain, "rope_type": "linear", "factor": found.scaling}
    elif found.kind == "yarn" and found.length is not None:
        fast, slow = found.betas()
        yarn = {"rope_type": "yarn", "factor": found.scaling, "original_max_position_embeddings": found.length}
        truncate = {key: given[key] for key in ("truncate",) if key in given}
        yield {**plain, **yarn, "beta_fast": fast, "beta_slow": slow, "attention_factor": found.loudness, **truncate}
    elif found.kind == "none":
        yield plain
        yield {**given, "rope_theta": found.base}  # of a family that has a form of its own
        if FACTORS in found.factors:
            for scaling in llama3_scalings(found.factors[FACTORS], found.base, found.length):
                yield {**plain, "rope_type": "llama3", **scaling}


def _head_dim(config: PreTrainedConfig) -> int:
    own = config.to_dict()  # of what may differ between layers a config gives no attribute
    return int(own.get("head_dim") or own["hidden_size"] // own["num_attention_heads"])


def _longrope(found: FilePositions, config: PreTrainedConfig) -> Parameters:
    if not {LONG, SHORT} <= found.factors.keys() or found.length is None:
        there = next(iter(found.factors))
        raise ModelError(f"{found.name} holds {there} without the other one or the context that it is for; {WAY_OUT}")
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = found.length
    return {
        "rope_type": "longrope",
        "short_factor": found.factors[SHORT].tolist(),
        "long_factor": found.factors[LONG].tolist(),
        "original_max_position_embeddings": found.length,
        "attention_factor": found.loudness,
    }


def _agrees(found: FilePositions, rotary: nn.Module, config: PreTrainedConfig, parameters: Parameters) -> bool:
    """Whether transformers turns every pair as the file says: in short texts, in long ones, and as loud."""
    buffers = dict(rotary.named_buffers(recurse=False))
    if not {"inv_freq", "full_attention_inv_freq"} & buffers.keys() and not found.factors:
        return True  # so few layers that each has a window
    turned = [(buffers.get("inv_freq", buffers.get("full_attention_inv_freq")), found.factors.get(FACTORS))]
    loudness = getattr(rotary, "attention_scaling", getattr(rotary, "full_attention_attention_scaling", 1.0))
    if found.kind == "longrope":
        assert found.length is not None
        compute = ROPE_INIT_FUNCTIONS["longrope"]
        turned = [
            (compute(config, torch.device("cpu"), seq_len=found.length + more)[0], found.factors[name])
            for more, name in [(0, SHORT), (1, LONG)]
        ]
    return math.isclose(loudness, found.loudness, rel_tol=TOLERANCE) and all(
        buffer is not None and _equal(found, buffer.double().numpy(), factors, parameters) for buffer, factors in turned
    )


def _equal(found: FilePositions, theirs: Array, factors: Array | None, parameters: Parameters) -> bool:
    turned = found.settings.get("rope.dimension_count", 2 * len(theirs))
    if 2 * len(theirs) != turned or (factors is not None and factors.shape != theirs.shape):
        return False
    ours = found.frequencies(len(theirs), factors, parameters.get("truncate", True))
    return np.allclose(theirs, ours, rtol=TOLERANCE, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- llama3's scaling


def llama3_scalings(factors: Array, base: float, length: int | None) -> Iterator[Parameters]:
    """Scalings of which the factors [pairs] may come.

    With w the wavelengths, F the factor, L the original length of context, l and h the factors of low and high
    frequencies, the factors are 1 where w < L/h, F where w > L/l, and between 1 / ((1 - s) / F + s) with
    s = (L/w - l) / (h - l). Only L/l and h/l matter, so l = 1 where L is an integer then. Between, 1/factor is linear
    in 1/w: F known, two wavelengths there give L and h; with one, h is guessed; with none, L as well.
    """
    pairs = len(factors)
    if not (pairs and np.isfinite(factors).all() and (factors > 0).all() and factors.max() > 1):
        return
    wavelengths = 2 * math.pi * base ** (np.arange(pairs) / pairs)
    largest, first = float(factors.max()), float(wavelengths[factors > 1 + TOLERANCE].min(initial=math.inf))
    if first == math.inf:
        return
    likely = [float(factor) for factor in (8, 32, 2, 4, 16, 64) if factor >= largest * (1 - TOLERANCE)]
    for factor in dict.fromkeys([_rounded(largest), largest, *likely]):
        between = (factors > 1 + TOLERANCE) & (factors < factor * (1 - TOLERANCE))
        inverse = 1 / wavelengths[between]
        shares = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)  # s
        highs = [4.0, 2.0, 8.0, 3.0, 16.0, 1.5]
        if len(inverse) > 1:
            _, start = np.polyfit(inverse, shares, 1)  # L / (h - 1) and -1 / (h - 1)
            if start >= 0:
                continue
            highs = [_rounded(1 - 1 / start), float(1 - 1 / start)]
        for high in highs:
            contexts = [(context, 1.0) for context in (length or 8192, *LENGTHS, math.floor(first))]
            if len(inverse):
                exact = float(np.mean((shares * (high - 1) + 1) / inverse))  # L/l
                contexts = [(round(exact), 1.0), (length or 8192, (length or 8192) / exact)]
            for context, low in contexts:
                yield {
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high * low,
                    "original_max_position_embeddings": context,
                }


def _rounded(value: float) -> float:
    """The integer beside it, where it is one but for its rounding."""
    return float(round(value)) if math.isclose(value, round(value), rel_tol=1e-3) else value
