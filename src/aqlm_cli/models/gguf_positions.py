"""Rotary position embeddings of a GGUF, converted to transformers' `rope_parameters`.

With i the number of a pair of features, of d rotated ones, llama.cpp turns the pair at position t by t times

    f_i = base^(-2i/d) / factor_i

Its factors are a tensor, `rope_freqs.weight`, which its converter computes from the "llama3" scaling of a model. Here
the scaling is found again from the factors. Phi-3 has two such tensors, for short and for long texts ("longrope"), and
other files have a linear scaling or YaRN in their settings. transformers' own conversion reads none of these. The
config is compared with the file afterwards: the frequencies that transformers' network has for it must be f_i, or the
file is refused.
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
"""Tensors that describe the position embeddings and are not weights of the network."""

TOLERANCE = 5e-6
"""Relative tolerance of f_i: the factors went through a few operations in float32."""

UNREAD = ("alpha", "yarn_log_multiplier", "yarn_attn_factor", "yarn_ext_factor")
"""Settings under `rope.scaling.` that transformers cannot express; the value 1 changes nothing."""

LENGTHS = tuple(2**power for power in range(9, 21))
"""Original context lengths to try if the factors of a small head do not determine it."""


@dataclass(frozen=True)
class FilePositions:
    """Settings of a file without the name of the architecture ("rope.freq_base"), and `factors` by TENSORS."""

    name: str
    settings: Mapping[str, Any]
    factors: Mapping[str, Array]

    @property
    def base(self) -> float:
        return float(self.settings.get("rope.freq_base", 10000.0))  # llama.cpp's default

    @property
    def kind(self) -> str:
        """ "none", "linear", "yarn" or "longrope"; a factor without a type is linear in llama.cpp."""
        if LONG in self.factors or SHORT in self.factors:
            return "longrope"
        return str(self.settings.get("rope.scaling.type", "none" if self.scaling == 1 else "linear"))

    @property
    def scaling(self) -> float:
        factor = self.settings.get("rope.scaling.factor", self.settings.get("rope.scale_linear"))
        return float(factor) if factor else 1.0

    @property
    def length(self) -> int | None:
        """The context length before scaling."""
        length = self.settings.get("rope.scaling.original_context_length")
        return None if length is None else int(length)

    @property
    def loudness(self) -> float:
        """Factor on cosines and sines (`attention_factor` in transformers)."""
        own = float(self.settings.get("rope.scaling.attn_factor", 1.0))
        return own * (1 + 0.1 * math.log(self.scaling)) if self.kind == "yarn" and self.scaling > 1 else own

    def betas(self) -> tuple[float, float]:
        fast = self.settings.get("rope.scaling.yarn_beta_fast", 32.0)
        return float(fast), float(self.settings.get("rope.scaling.yarn_beta_slow", 1.0))

    def frequencies(self, pairs: int, factors: Array | None, truncate: bool) -> Array:
        """Frequencies f_i [pairs], computed as in llama.cpp."""
        index = np.arange(pairs, dtype=np.float64)
        plain = self.base ** (-index / pairs) / (1.0 if factors is None else factors)
        if self.kind == "linear":
            return plain / self.scaling
        if self.kind != "yarn" or self.length is None:
            return plain
        ends = [
            pairs * math.log(self.length / (beta * 2 * math.pi)) / math.log(self.base) for beta in self.betas()
        ]  # the pairs that turn beta times within the original context
        low, high = (math.floor(ends[0]), math.ceil(ends[1])) if truncate else ends
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        slow = np.clip((index - low) / max(high - low, 0.001), 0, 1)  # 1 where a pair is scaled fully
        return plain / self.scaling * slow + plain * (1 - slow)


# ---------------------------------------------------------------------------------------------------------- the config


def set_positions(positions: FilePositions, config: PreTrainedConfig, network: PreTrainedModel) -> None:
    """Set `config.rope_parameters` after the file; ModelError if this model type has no config for it."""
    rotary = next((module for module in network.modules() if _is_rotary(module)), None)
    if rotary is None:
        if positions.factors:
            name = next(iter(positions.factors))
            raise ModelError(f"{positions.name} holds {name}, but {config.model_type} has no rotary embeddings")
        return
    odd = [key for key in UNREAD if positions.settings.get(f"rope.scaling.{key}", 1.0) != 1.0]
    if odd:
        raise ModelError(f"{positions.name} has rope.scaling.{odd[0]}, which transformers does not support; {WAY_OUT}")
    with np.errstate(all="ignore"):  # a factor may be 0, which then never agrees
        _fit(positions, config, type(rotary))


def _fit(positions: FilePositions, config: PreTrainedConfig, rotary: type[nn.Module]) -> None:
    given = config.rope_parameters
    nested = "full_attention" in given
    for parameters in _candidates(positions, given["full_attention"] if nested else given, config):
        config.rope_parameters = parameters if not nested else _for_layers(positions, given, parameters)
        if _agrees(positions, rotary(config), config, parameters):
            return
    what = next(iter(positions.factors)) if positions.factors else f"rope.scaling.type {positions.kind}"
    raise ModelError(f"{positions.name}: {config.model_type} in transformers cannot express {what}; {WAY_OUT}")


WAY_OUT = "use the model in safetensors"


def _is_rotary(module: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))


def _for_layers(positions: FilePositions, given: Mapping[str, Any], full: Parameters) -> Parameters:
    """Parameters by kind of layer: layers with a sliding window have their own base and no scaling."""
    base = positions.settings.get("rope.freq_base_swa")
    changed = {} if base is None else {"rope_theta": float(base)}
    return {key: full if key == "full_attention" else {**value, **changed} for key, value in given.items()}


def _candidates(positions: FilePositions, given: Parameters, config: PreTrainedConfig) -> Iterator[Parameters]:
    """Candidates for the parameters of the file, the likeliest first."""
    plain = {"rope_type": "default", "rope_theta": positions.base}
    head, turned = _head_dim(config), positions.settings.get("rope.dimension_count")
    if "partial_rotary_factor" in given or (turned is not None and head != turned):
        plain["partial_rotary_factor"] = given.get("partial_rotary_factor") if turned is None else int(turned) / head
    if positions.kind == "longrope" and positions.factors:
        yield {**plain, **_longrope(positions, config)}
    elif positions.kind == "linear":
        yield {**plain, "rope_type": "linear", "factor": positions.scaling}
    elif positions.kind == "yarn" and positions.length is not None:
        fast, slow = positions.betas()
        yarn = {"rope_type": "yarn", "factor": positions.scaling, "original_max_position_embeddings": positions.length}
        truncate = {key: given[key] for key in ("truncate",) if key in given}
        betas = {"beta_fast": fast, "beta_slow": slow}
        yield {**plain, **yarn, **betas, "attention_factor": positions.loudness, **truncate}
    elif positions.kind == "none":
        yield plain
        yield {**given, "rope_theta": positions.base}  # for a model type with its own rope type
        if FACTORS in positions.factors:
            for scaling in llama3_scalings(positions.factors[FACTORS], positions.base, positions.length):
                yield {**plain, "rope_type": "llama3", **scaling}


def _head_dim(config: PreTrainedConfig) -> int:
    own = config.to_dict()  # a config has no attribute for values that may differ between layers
    return int(own.get("head_dim") or own["hidden_size"] // own["num_attention_heads"])


def _longrope(positions: FilePositions, config: PreTrainedConfig) -> Parameters:
    if not {LONG, SHORT} <= positions.factors.keys() or positions.length is None:
        name = next(iter(positions.factors))
        raise ModelError(f"{positions.name} holds {name} without its counterpart or the original context; {WAY_OUT}")
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = positions.length
    return {
        "rope_type": "longrope",
        "short_factor": positions.factors[SHORT].tolist(),
        "long_factor": positions.factors[LONG].tolist(),
        "original_max_position_embeddings": positions.length,
        "attention_factor": positions.loudness,
    }


def _agrees(positions: FilePositions, rotary: nn.Module, config: PreTrainedConfig, parameters: Parameters) -> bool:
    """True if transformers gives the file's frequencies, for short and long texts, and its factor on them."""
    buffers = dict(rotary.named_buffers(recurse=False))
    if not {"inv_freq", "full_attention_inv_freq"} & buffers.keys() and not positions.factors:
        return True  # so few layers that all have a sliding window
    turned = [(buffers.get("inv_freq", buffers.get("full_attention_inv_freq")), positions.factors.get(FACTORS))]
    loudness = getattr(rotary, "attention_scaling", getattr(rotary, "full_attention_attention_scaling", 1.0))
    if positions.kind == "longrope":
        assert positions.length is not None
        compute = ROPE_INIT_FUNCTIONS["longrope"]
        turned = [
            (compute(config, torch.device("cpu"), seq_len=positions.length + more)[0], positions.factors[name])
            for more, name in [(0, SHORT), (1, LONG)]
        ]
    return math.isclose(loudness, positions.loudness, rel_tol=TOLERANCE) and all(
        buffer is not None and _equal(positions, buffer.double().numpy(), factors, parameters)
        for buffer, factors in turned
    )


def _equal(positions: FilePositions, theirs: Array, factors: Array | None, parameters: Parameters) -> bool:
    turned = positions.settings.get("rope.dimension_count", 2 * len(theirs))
    if 2 * len(theirs) != turned or (factors is not None and factors.shape != theirs.shape):
        return False
    ours = positions.frequencies(len(theirs), factors, parameters.get("truncate", True))
    return np.allclose(theirs, ours, rtol=TOLERANCE, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- llama3's scaling


def llama3_scalings(factors: Array, base: float, length: int | None) -> Iterator[Parameters]:
    """Llama 3 scalings that can produce the factors [pairs].

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
    """The nearest integer if the value is one up to rounding, else the value."""
    return float(round(value)) if math.isclose(value, round(value), rel_tol=1e-3) else value
